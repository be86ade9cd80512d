"""Which layers of a base model tell tasks apart, for `encoder="backbone"`, and what a query costs.

Training texts of known tasks are routed one at a time, without a task id, by keys and whitened statistics of
the other folds (`backbone_encoder.separation`). Prints a row for each layer alone and for sets of layers, and
recommends the cheapest one within a standard error of the best. "cost" is the share of a text's prefill that
its query takes: layers that run / layers.

    python benchmarks/bench_layers.py --base smollm2 --data FOLDER --texts 240 --json FILE
"""

import argparse
import math
import os
import random
from pathlib import Path

import torch
from cpu_timing import machine, report

from slm_fast.backbone_encoder import BackboneEncoder, auto_layers, separation
from slm_fast.continual.tasks import load_jsonl_tasks
from slm_fast.encoder import MAX_QUERY_DIM
from slm_fast.loading import load_base

TASKS = "ag,yelp,amazon,yahoo,dbpedia"


def layer_sets(num_layers: int, hidden_size: int) -> list[list[int]]:
    """What is measured: each layer alone, and evenly spaced ones up to several depths, with and without 0."""
    sets = [[layer] for layer in range(num_layers + 1)]
    for share in (1 / 6, 1 / 3, 1 / 2, 2 / 3, 1):
        depth = math.ceil(num_layers * share)
        for count in (2, 3, 5):
            spaced = sorted({math.ceil(depth * i / count) for i in range(1, count + 1)})
            sets += [spaced, [0, *spaced]]
    sets.append(auto_layers(num_layers, hidden_size))
    fitting = [layers for layers in sets if len(layers) * hidden_size <= MAX_QUERY_DIM or len(layers) == 1]
    return sorted(map(list, {tuple(layers) for layers in fitting}), key=lambda s: (len(s) > 1, s[-1], len(s)))


def measured(queries: dict[str, torch.Tensor], layers: list[int], folds: int) -> dict:
    """Separation of a set of layers.  queries: {task: [N, num_layers + 1, hidden_size]}."""
    accuracy = separation({task: query[:, layers].flatten(1) for task, query in queries.items()}, folds=folds)
    return {"layers": layers, "accuracy": accuracy, "mean": sum(accuracy.values()) / len(accuracy)}


def recommended(rows: list[dict], num_texts: int) -> dict:
    """The cheapest row within one standard error of the best; of equally deep ones the one with the smaller
    query."""
    best = max(row["mean"] for row in rows)
    error = math.sqrt(best * (1 - best) / num_texts)
    near = [row for row in rows if row["mean"] >= best - error]
    return min(near, key=lambda row: (row["cost"], len(row["layers"]), -row["mean"]))


def main() -> None:
    default_data = os.environ.get("SLM_FAST_DATA", str(Path(__file__).parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="smollm2", help="folder, hub id, GGUF file, minilm or smollm2")
    parser.add_argument("--data", default=default_data, help="folder with bert5/")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--texts", type=int, default=240, help="training texts of each task")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    base, tokenizer = load_base(args.base)
    hidden_size, num_layers = base.config.hidden_size, base.config.num_hidden_layers
    every = list(range(num_layers + 1))
    encoder = BackboneEncoder(base, tokenizer, query_layers=every, max_length=args.max_length)
    queries = {}
    for task in load_jsonl_tasks(Path(args.data) / "bert5", args.tasks.split(",")):
        texts = [example.text for example in task.train]
        texts = random.Random(args.seed).sample(texts, min(args.texts, len(texts)))
        queries[task.name] = encoder(texts, progress=True).unflatten(1, (len(every), hidden_size))
    auto, rows = auto_layers(num_layers, hidden_size), []
    print(f"{'layers':24s} {'values':>6s} {'cost':>5s} {'mean':>6s} " + " ".join(f"{t:>8s}" for t in queries))
    for layers in layer_sets(num_layers, hidden_size):
        row = measured(queries, layers, args.folds) | {"cost": max(*layers, 1) / num_layers}
        rows.append(row)
        cells = " ".join(f"{100 * value:8.1f}" for value in row["accuracy"].values())
        name = ", ".join(map(str, layers)) + (" (auto)" if layers == auto else "")
        values = len(layers) * hidden_size
        print(f"{name:24s} {values:6d} {row['cost']:5.0%} {100 * row['mean']:6.1f} {cells}", flush=True)
    best = recommended(rows, sum(len(query) for query in queries.values()))
    print(f"\nquery_layers={best['layers']}: {best['mean']:.1%} for {best['cost']:.0%} of a text's prefill")
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "json")}
    result = {"command": "python benchmarks/bench_layers.py", "settings": settings, "machine": machine()}
    report(result | {"auto": auto, "recommended": best["layers"], "rows": rows}, args.json)


if __name__ == "__main__":
    main()
