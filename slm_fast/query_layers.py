"""Which layers make up a query, chosen by what they tell apart: before the first task is learnt, for keys are
made of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slm_fast.backbone_encoder import auto_layers
from slm_fast.config import SLMConfig
from slm_fast.encoder import MAX_QUERY_DIM, Encoder, joined
from slm_fast.pool import KnowledgePool

SHARES = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 1)  # of the depth, up to which layers are spread
COUNTS = (2, 3, 5)  # of layers


class Separation(NamedTuple):
    """What layers separate: the share of each task's texts that are routed to it; `cost`: the share of the
    encoder's layers that a query runs through."""

    layers: list[int]
    accuracy: dict[str, float]
    cost: float

    @property
    def mean(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)


def separation(
    queries: Mapping[str, Tensor], config: SLMConfig | None = None, folds: int = 4
) -> dict[str, float]:
    """How well queries tell tasks apart: the share of each task's that are routed to it, one at a time.

    queries: {task: [N, D]} of training texts in random order. Each of `folds` parts is routed by keys and
    statistics of the other parts. Raises ValueError where those are fewer than a task's keys.
    """
    config, parts = config or SLMConfig(), {task: query.chunk(folds) for task, query in queries.items()}
    correct = dict.fromkeys(queries, 0)
    for fold in range(folds):
        kept = {task: torch.cat(part[:fold] + part[fold + 1 :]) for task, part in parts.items()}
        pool = KnowledgePool.of_queries(config, kept)
        for task, part in parts.items():
            mass, names = pool.task_mass(pool.search(part[fold]))
            correct[task] += int((mass.argmax(-1) == names.index(task)).sum())
    return {task: count / len(queries[task]) for task, count in correct.items()}


def layer_sets(num_layers: int, hidden_size: int, deepest: int) -> list[list[int]]:
    """What is measured: each layer alone, evenly spaced ones up to several depths, with and without 0, and
    `auto_layers`; none behind layer `deepest`, and no queries of more than 4,096 values but of one layer."""
    sets = [[layer] for layer in range(num_layers + 1)] + [auto_layers(num_layers, hidden_size)]
    for depth in {deepest, *(math.ceil(num_layers * share) for share in SHARES)}:
        for count in COUNTS:
            spaced = sorted({math.ceil(depth * i / count) for i in range(1, count + 1)})
            sets += [spaced, [0, *spaced]]
    near = [layers for layers in sets if max(layers) <= deepest]
    fitting = [layers for layers in near if len(layers) * hidden_size <= MAX_QUERY_DIM or len(layers) == 1]
    return sorted(map(list, {tuple(layers) for layers in fitting}), key=lambda s: (len(s) > 1, s[-1], len(s)))


def measure_query_layers(
    encoder: Encoder,
    texts: Mapping[str, Sequence[str]],
    *,
    budget: float = 1.0,
    config: SLMConfig | None = None,
    folds: int = 4,
    progress: bool = True,
) -> Iterator[Separation]:
    """The `separation` of each of `layer_sets`, of one pass over the texts; see `choose_query_layers`."""
    if len(texts) < 2:
        raise ValueError(f"layers are chosen by telling tasks apart: texts of two or more, got {len(texts)}")
    deepest = int(budget * encoder.num_layers + 1e-6)
    if not 1 <= deepest <= encoder.num_layers:
        raise ValueError(
            f"budget must be a share of the {encoder.num_layers} layers, up to 1 and with one of them at "
            f"least, got {budget}"
        )
    means = {}
    for task, of_task in texts.items():
        order = torch.randperm(len(of_task), generator=torch.Generator().manual_seed(0)).tolist()
        shuffled = [of_task[n] for n in order]
        means[task] = encoder.layer_means(shuffled, range(deepest + 1), progress)
    for layers in layer_sets(encoder.num_layers, encoder.hidden_size, deepest):
        queries = {task: joined([mean[:, layer] for layer in layers]) for task, mean in means.items()}
        cost = max(*layers, 1) / encoder.num_layers
        yield Separation(layers, separation(queries, config, folds), cost)


def cheapest(found: Sequence[Separation], num_texts: int) -> Separation:
    """The cheapest one whose mean is within one standard error of the best; of equally deep ones the one with
    the smaller query."""
    best = max(row.mean for row in found)
    error = math.sqrt(best * (1 - best) / num_texts)
    near = [row for row in found if row.mean >= best - error]
    return min(near, key=lambda row: (row.cost, len(row.layers), -row.mean))


def choose_query_layers(
    encoder: Encoder,
    texts: Mapping[str, Sequence[str]],
    *,
    budget: float = 1.0,
    config: SLMConfig | None = None,
    folds: int = 4,
    progress: bool = True,
) -> list[int]:
    """Layers for `SLMConfig.query_layers`: the shallowest whose queries tell tasks apart as well as the best.

    The texts are routed one at a time by what is learnt from the others, for every set of layers tried.

    Args:
        encoder: an `Encoder`, or the `BackboneEncoder` of a base; its own layers do not matter.
        texts: {task: training texts}, of two or more tasks like those to come; some hundred of each.
        budget: the share of the encoder's layers that a query may run through.
        config: how keys are made and searched.  folds: parts of which one is routed by the others.
    Raises ValueError for less than two tasks, a budget of no layer, and fewer texts than a task's keys.
    """
    found = list(
        measure_query_layers(encoder, texts, budget=budget, config=config, folds=folds, progress=progress)
    )
    return cheapest(found, sum(map(len, texts.values()))).layers
