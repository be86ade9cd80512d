"""Zero-shot kept: what learning changed for tasks that were never learnt.

The frozen model is the model with all weights 0, to the bit: one call after learning measures both.
"""

import torch
from torch import Tensor

from slm_fast.answers import batches, evaluating, longest_first, text_features
from slm_fast.continual.tasks import Task, score
from slm_fast.model import SLMModel
from slm_fast.routing import Routing


def probe(
    model: SLMModel,
    tasks: list[Task],
    *,
    batch_size: int = 32,
    max_length: int = 256,
    max_new_tokens: int = 16,
    progress: bool = False,
) -> dict:
    """Compare the frozen model and the routed one on the test rows of tasks that were never learnt.

    A base that generates is asked for answers, and their score is the task's. An encoder is asked for the
    features that heads read, and their score is the accuracy of a nearest-centroid classifier (Euclidean,
    fitted to the frozen features of the training rows) on them.

    Returns {"unchanged": what of a row is compared, "min_similarity", "tasks": {name: shares of the rows}}:
    frozen_rows routed to the frozen model, equal_rows whose answer or features (to the bit) are the frozen
    model's, score_before and score_after learning.
    Raises ValueError on a task that was learnt and, for an encoder, on one without labels.
    """
    check_probes(tasks, model.pool.task_names(), model.can_generate)
    results = {}
    for task in tasks:
        texts = [row.text for row in task.test]
        frozen = model.pool.fixed_routing(["__base__"] * len(texts))
        routed = model.route(texts, progress=progress) if model.pool.num_entries else frozen
        if model.can_generate:
            options = dict(batch_size=batch_size, max_length=max_length, max_new_tokens=max_new_tokens)
            result = _compare_answers(model, task, frozen, routed, options | dict(progress=progress))
        else:
            result = _compare_features(model, task, frozen, routed, batch_size, max_length)
        unused = (routed.weights == 0).all(-1)
        results[task.name] = {"rows": len(texts), "frozen_rows": float(unused.float().mean())} | result
    return {
        "unchanged": "same answers" if model.can_generate else "bit-equal features",
        "min_similarity": model.slm_config.min_similarity,
        "tasks": results,
    }


def check_probes(tasks: list[Task], learnt: list[str], can_generate: bool) -> None:
    """Raise ValueError where `probe` would, before anything was learnt."""
    for task in tasks:
        if task.name in learnt:
            raise ValueError(f"a probe must not be learnt, but {task.name!r} is among {', '.join(learnt)}")
        if task.labels is None and not can_generate:
            raise ValueError(f"probe {task.name!r} needs labels: the base model generates no text")


def _compare_answers(model: SLMModel, task: Task, frozen: Routing, routed: Routing, options: dict) -> dict:
    texts, targets = [row.text for row in task.test], [row.target for row in task.test]
    before, after = (
        [prediction.answer or "" for prediction in model.predict(texts, routing=routing, **options)]
        for routing in (frozen, routed)
    )
    return {
        "metric": task.metric.replace("_", " "),
        "equal_rows": sum(a == b for a, b in zip(before, after, strict=True)) / len(texts),
        "score_before": score(task, before, targets),
        "score_after": score(task, after, targets),
    }


def _compare_features(
    model: SLMModel, task: Task, frozen: Routing, routed: Routing, batch_size: int, max_length: int
) -> dict:
    options = (batch_size, max_length)
    texts = [row.text for row in task.train]
    train = _features(model, texts, model.pool.fixed_routing(["__base__"] * len(texts)), *options)
    labels = sorted({row.target for row in task.train})
    of_label = [[row.target == label for row in task.train] for label in labels]
    centroids = torch.stack([train[torch.tensor(mask)].mean(0) for mask in of_label])
    texts = [row.text for row in task.test]
    before, after = (_features(model, texts, routing, *options) for routing in (frozen, routed))
    targets = [row.target for row in task.test]

    def accuracy(features: Tensor) -> float:
        nearest = torch.cdist(features, centroids).argmin(-1).tolist()
        return score(task, [labels[label] for label in nearest], targets)

    return {
        "metric": "accuracy, nearest centroid",
        "equal_rows": float((before == after).all(-1).float().mean()),
        "score_before": accuracy(before),
        "score_after": accuracy(after),
    }


@torch.no_grad()
def _features(
    model: SLMModel, texts: list[str], routing: Routing, batch_size: int, max_length: int
) -> Tensor:
    """What heads read of every text: [N, H] fp32 on the CPU. The batches do not depend on the routing."""
    tokenizer, routing = model.require_tokenizer(), routing.to(model.device)
    out: list[Tensor | None] = [None] * len(texts)
    with evaluating(model):
        for rows in batches(longest_first(texts), batch_size):
            with model.state.use(routing.rows(rows)):
                features = text_features(model, tokenizer, [texts[row] for row in rows], max_length)
            for row, feature in zip(rows, features.cpu(), strict=True):
                out[row] = feature
    return torch.stack(out)
