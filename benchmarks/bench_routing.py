"""Retrieval, one query at a time and without a task id: how many texts find their task, and at what cost.

For every way to retrieve: the share of test texts whose largest routing mass is on their own task (also with
tasks of equal labels as one), the mean mass there, how unevenly the keys are picked (hubs are keys near
everything, Radovanovic et al., JMLR 2010), the bytes of keys and statistics, and the time of a search for one
query; with `--pool`, a saved pool that has learnt the first benchmark's tasks, also the accuracy of the
answers that its entries give in the mixtures that were found. Its base answers; where that generates, all is
measured on prompts, as it was learnt. Then the calibrated floor: the share of test texts that keep their
mixture, and the share of other tasks' texts that fall to the frozen model. Then the time of a search against
the number of tasks, and of encoding a text.

    python benchmarks/bench_routing.py [--quick] [--benchmark bert5 all25] [--queries FOLDER]
        [--backbone MODEL] [--pool FOLDER] [--json FILE]

`--quick`: 100 texts a task, within a few minutes. `--backbone` adds a row for `encoder="backbone"`: a base's
own layers, without a second model; "prefill" is the share of a text's prefill that its query takes,
"encoding" the time of one. The last line is JSON.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from cpu_timing import interleaved, machine, report
from torch import Tensor

from slm_fast.backbone_encoder import BackboneEncoder
from slm_fast.config import SLMConfig
from slm_fast.continual.benchmarks import BENCHMARKS, answer_tokens, load_benchmark, tasks_in_order
from slm_fast.continual.metrics import merge_tasks
from slm_fast.continual.tasks import Task, same_labels, score
from slm_fast.encoder import Encoder
from slm_fast.loading import load_base
from slm_fast.model import SLMModel
from slm_fast.pool import KnowledgePool
from slm_fast.routing import Routing
from slm_fast.storage import read_index

PROBES = ("clinc150", "banking77", "hwu64", "trec6", "sst2", "mnli", "boolq")  # learnt by no task of bert5
KEYS = {"key_learning_rate": 1e-2, "key_epochs": 20}  # at the authors' 1e-3 and 2 they hardly move
RETRIEVALS = {
    "paper: last layer, cosine, learnt keys": SLMConfig.paper(**KEYS),
    "the same, averaged over 32 texts of one task": SLMConfig.paper(mixing="batch", **KEYS),
    "last layer, cosine, averaged keys": SLMConfig.paper(key_method="group_avg"),
    "last layer, whitened": SLMConfig(query_layers=[-1]),
    "layers 0, 3, 6, whitened": SLMConfig(query_layers=[0, 3, 6]),
    "all layers, whitened, k-means keys": SLMConfig(key_method="kmeans"),
    "all layers, whitened, 64 directions": SLMConfig(statistics_rank=64),
    "all layers, whitened, 256 directions": SLMConfig(statistics_rank=256),
    "all layers, whitened, keys of entries": SLMConfig(label_keys=False),
    "all layers, whitened": SLMConfig(),
    "all layers, whitened, temperature fitted": SLMConfig(temperature="auto"),
    "all layers, whitened, all directions": SLMConfig(statistics_rank=1 << 20),
}
TOP_K = 4  # entries of a row, as in the protocols
NUM_TASKS = (5, 25, 1000, 10_000)
BATCH = 32  # texts of one task that share a mixture where scores are averaged over batches

Queries = list[tuple[Tensor, Tensor]]  # of every task's training and test texts


def encode(tasks: Sequence[Task], encoder: Encoder) -> Queries:
    parts = ([[row.text for row in part] for part in (task.train, task.test)] for task in tasks)
    return [tuple(encoder(texts, progress=True) for texts in pair) for pair in parts]


def selected(queries: Queries, layers: list[int] | str, num_layers: int) -> Queries:
    """The part of all-layer queries that belongs to some layers."""
    if layers == "auto":
        return queries

    def part(query: Tensor) -> Tensor:
        slices = query.chunk(num_layers, dim=-1)
        return torch.cat([slices[layer] for layer in layers], dim=-1)

    return [(part(train), part(test)) for train, test in queries]


def learn(config: SLMConfig, tasks: Sequence[Task], queries: Queries) -> KnowledgePool:
    return KnowledgePool.of_queries(
        replace(config, top_k=TOP_K),
        {task.name: train for task, (train, _) in zip(tasks, queries, strict=True)},
        {task.name: [row.target for row in task.train] for task in tasks},
    )


def size(pool: KnowledgePool) -> int:
    """Bytes of keys and statistics."""
    tensors = [pool.keys, pool.index_keys, pool.index_bias, pool.index_task, *pool.metric.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def search(pool: KnowledgePool, query: Tensor) -> Routing:
    """One query at a time, but where the pool averages the scores of a batch."""
    if pool.config.mixing != "batch":
        return pool.search(query)
    return Routing.cat([pool.search(part) for part in query.split(BATCH)])


def hubs(picked: Sequence[Tensor], num_entries: int) -> float:
    """Skewness of how often each key is picked, E[(N - mean)^3] / std^3, by texts of all tasks alike: a pick
    counts 1 / (texts of the task). 0 where all are picked alike, as with perfect routing to tasks of as many
    entries as are picked.

    picked: indices [texts, top_k] of each task.
    """
    counts = sum(
        torch.bincount(indices.flatten().long(), minlength=num_entries).double() / len(indices)
        for indices in picked
    )
    centred = counts - counts.mean()
    std = centred.square().mean().sqrt()
    return float((centred**3).mean() / std**3) if std > 1e-9 else 0.0


class Answers:
    """Answers of a trained pool's model in mixtures that another pool has found for the same entries.

    base: the one that the pool was made with, if it is not where it was then.  max_length: of a text.
    """

    def __init__(self, folder: Path, base: str | None, max_length: int) -> None:
        model, tokenizer = load_base(base or read_index(folder)["base"]["name_or_path"])
        self.model = SLMModel.from_pretrained(model, folder, tokenizer=tokenizer)
        self.limits = {"max_length": max_length}

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Raises ValueError on tasks that the pool has not learnt, or with another number of entries."""
        wanted = SLMConfig().entries_per_task
        for task in tasks:
            if (count := len(self.model.pool.task(task.name).slots)) != wanted:
                raise ValueError(f"the pool's task {task.name!r} has {count} entries, not {wanted}")
        self.limits["max_new_tokens"] = answer_tokens(self.model.require_tokenizer(), [*tasks])

    def score(self, task: Task, pool: KnowledgePool, routing: Routing) -> float:
        """The score of the task's test texts."""
        own, slots = self.model.pool, torch.full((len(pool.start),), -1)
        for name in pool.task_names():
            slots[pool.task(name).slots] = torch.tensor(own.task(name).slots)
        routing = Routing.make(slots[routing.indices.long()], routing.weights, pool_version=own.version)
        texts = [row.text for row in task.test]
        made = self.model.predict(texts, routing=routing, **self.limits)
        return score(task, [p.answer or "" for p in made], [row.target for row in task.test])


def routed(
    pool: KnowledgePool, tasks: Sequence[Task], queries: Queries, answers: Answers | None = None
) -> dict:
    """Routing accuracy, mass on the own task, hubs, size and final accuracy of one way to retrieve."""
    confusion, own, final, picked = [], [], [], []
    for number, (_, test) in enumerate(queries):
        found = search(pool, test)
        picked.append(found.indices)
        mass, names = pool.task_mass(found)
        chosen = mass.argmax(-1)
        confusion.append((torch.bincount(chosen, minlength=len(names)) / len(mass)).tolist())
        own.append(float(mass[:, number].mean()))
        if answers is not None:
            final.append(answers.score(tasks[number], pool, found))
    names = [task.name for task in tasks]
    merged = merge_tasks(confusion, names, same_labels(tasks))
    found = {"accuracy": {name: confusion[i][i] for i, name in enumerate(names)}, "merged": merged}
    found |= {"mass": dict(zip(names, own, strict=True)), "hubs": hubs(picked, pool.num_entries)}
    found |= {"bytes": size(pool)}
    return found | ({"final": dict(zip(names, final, strict=True))} if final else {})


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def compare(
    ways: dict[str, tuple[SLMConfig, Queries]],
    tasks: Sequence[Task],
    num_layers: int,
    answers: Answers | None = None,
) -> list[dict]:
    """A row for each way to retrieve: its name, its settings and queries of all of the encoder's layers."""
    rows, searches = [], {}
    for name, (config, queries) in ways.items():
        own = selected(queries, config.query_layers, num_layers)
        pool = learn(config, tasks, own)
        rows.append({"retrieval": name, **routed(pool, tasks, own, answers)})
        searches[name] = lambda pool=pool, query=own[0][1][:1]: pool.search(query)
    for row, times in zip(rows, interleaved(searches, 20).values(), strict=True):
        row["milliseconds"] = 1e3 * statistics.median(times)
    width = max(map(len, ways))
    shown = ("accuracy", "merged", "mass", *(("final",) if answers else ()))
    print(f"\n{'retrieval':{width}}  " + "  ".join(f"{k:>8}" for k in shown) + "   hubs      MB      ms")
    for row in rows:
        shares = "  ".join(f"{100 * mean(row[k]):8.2f}" for k in shown)
        sizes = f"{row['hubs']:5.2f}  {row['bytes'] / 1e6:6.1f}  {row['milliseconds']:6.3f}"
        print(f"{row['retrieval']:{width}}  {shares}  {sizes}")
    return rows


def floors(tasks: Sequence[Task], queries: Queries, probes: Sequence[Task], outside: Queries) -> list[dict]:
    """Shares of rows that keep a mixture, for every coverage."""
    found = []
    pool = learn(SLMConfig(min_similarity="auto"), tasks, queries)
    print("\ncoverage   own texts kept   others' texts on the frozen model")
    for coverage in (0.9, 0.95, 0.99):
        pool.config.coverage = coverage
        share = [
            float((pool.search(test).weights.sum(1) > 0).float().mean()) for _, test in (*queries, *outside)
        ]
        kept = dict(zip((task.name for task in tasks), share, strict=False))
        frozen = {t.name: 1 - s for t, s in zip(probes, share[len(tasks) :], strict=True)}
        found.append({"coverage": coverage, "kept": kept, "frozen": frozen})
        cells = "  ".join(f"{name} {100 * value:.0f}%" for name, value in frozen.items())
        print(f"{coverage:8.2f}   {100 * mean(kept):13.1f}%   {cells}")
    return found


def encoding(encoder: Encoder, text: str, runs: int = 5) -> float:
    """Milliseconds of encoding a text."""
    began = time.perf_counter()
    for _ in range(runs):
        encoder.encode([text])
    return 1e3 * (time.perf_counter() - began) / runs


def growth(query: Tensor, encoder: Encoder, text: str) -> dict:
    """Milliseconds of a search for one query, and of its encoding, against the number of tasks."""
    searches = {}
    for count in NUM_TASKS:
        pool = KnowledgePool(SLMConfig(), {"none": (1, 1)})
        generator = torch.Generator().manual_seed(count)
        keys = torch.randn(4 * count, query.shape[1], generator=generator)
        pool.add_task("all", keys)  # whose keys they are makes no difference to a search among entries
        searches[str(count)] = lambda pool=pool: pool.search(query[:1])
    times = {name: 1e3 * statistics.median(t) for name, t in interleaved(searches, 20).items()}
    times["encoding"] = encoding(encoder, text)
    print("\nms for one query: " + ", ".join(f"{k} {v:.3f}" for k, v in times.items()))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmark", nargs="+", choices=BENCHMARKS, default=["bert5", "all25"])
    parser.add_argument("--retrieval", nargs="+", choices=RETRIEVALS, default=list(RETRIEVALS))
    parser.add_argument("--data", help="data folder, by default SLM_FAST_DATA's")
    parser.add_argument("--queries", help="folder where encoded texts are kept")
    parser.add_argument(
        "--pool", type=Path, help="folder of a pool that has learnt the first benchmark's tasks"
    )
    parser.add_argument("--base", help="base model of that pool, if it is not where the pool was trained")
    parser.add_argument(
        "--backbone", help="base model whose own layers are a row: folder, hub id, smollm2, ..."
    )
    parser.add_argument("--max-train", type=int)
    parser.add_argument("--max-test", type=int)
    parser.add_argument("--quick", action="store_true", help="bert5 alone, 100 texts a task")
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()
    if args.quick:
        args.benchmark, args.max_train, args.max_test = ["bert5"], 100, 100
    limits = {"max_train": args.max_train, "max_test": args.max_test}
    encoder, results, backbone = Encoder("minilm"), [], None
    if args.backbone:
        backbone = BackboneEncoder(*load_base(args.backbone))
    for each in (encoder, backbone):
        if each is not None and args.queries:
            each.keep_in(args.queries)
    for name in args.benchmark:
        answers, generates = None, None
        try:
            if args.pool and name == args.benchmark[0]:
                answers = Answers(args.pool, args.base, BENCHMARKS[name].ours.max_length)
                generates = answers.model.can_generate
            tasks = load_benchmark(name, data=args.data, generates=generates, **limits)
            if answers is not None:
                answers.prepare(tasks)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        queries = encode(tasks, encoder)
        print(f"\n{name}: {len(tasks)} tasks, {sum(len(q) for _, q in queries):,} test texts")
        found = {"benchmark": name, "rows": {t.name: [len(t.train), len(t.test)] for t in tasks}}
        ways = {way: (RETRIEVALS[way], queries) for way in args.retrieval}
        if backbone is not None:
            layers = ", ".join(map(str, backbone.layers))
            ways[f"{args.backbone}'s layers {layers}, whitened"] = SLMConfig(), encode(tasks, backbone)
        found["retrievals"] = compare(ways, tasks, len(encoder.layers), answers)
        if backbone is not None:
            row = found["retrievals"][-1]
            row |= {"encoding": encoding(backbone, tasks[0].test[0].text), "prefill": backbone.cost}
            cost = f"{row['encoding']:.1f} ms to encode a text, {row['prefill']:.0%} of its prefill"
            print(f"{row['retrieval']}: {cost}")
        others = [probe for probe in PROBES if probe not in tasks_in_order(name)]
        if others:
            probes = load_benchmark("all25", data=args.data, tasks=others, generates=generates, **limits)
            found["floors"] = floors(tasks, queries, probes, encode(probes, encoder))
        results.append(found)
    times = growth(queries[0][1], encoder, tasks[0].test[0].text)
    report({"machine": machine(), "results": results, "milliseconds": times}, args.json)


if __name__ == "__main__":
    main()
