"""Which layers of a base model tell tasks apart, for `encoder="backbone"`, and what a query costs.

Training texts of known tasks are routed one at a time, without a task id, by keys and whitened statistics of
the other folds (`slm_fast.query_layers`). Prints a row for each layer alone and for sets of layers, and the
one that `slm_fast.choose_query_layers` chooses: the cheapest within a standard error of the best. "cost" is
the share of a text's prefill that its query takes: layers that run / layers.

    python benchmarks/bench_layers.py --base smollm2 [--benchmark NAME] [--data FOLDER] [--json FILE]

Tasks are those of a benchmark or of a folder, as in `slm-fast learn`; without either those of bert5.
"""

import argparse
import random
from pathlib import Path

from cpu_timing import machine, report

from slm_fast.backbone_encoder import BackboneEncoder, auto_layers
from slm_fast.continual.benchmarks import BENCHMARKS, load_benchmark
from slm_fast.continual.tasks import Task, load_tasks
from slm_fast.loading import load_base
from slm_fast.query_layers import cheapest, measure_query_layers


def tasks_of(benchmark: str | None, data: str | None, names: list[str] | None) -> list[Task]:
    if benchmark is None and data is not None:
        return load_tasks(data, names)
    return load_benchmark(benchmark or "bert5", data=data, tasks=names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="smollm2", help="folder, hub id, GGUF file, minilm or smollm2")
    parser.add_argument("--benchmark", choices=BENCHMARKS)
    parser.add_argument(
        "--data",
        help='folder of JSON lines, "docs", "chat", or hub:NAME; with --benchmark the data folder (default: '
        "SLM_FAST_DATA, else the Hub)",
    )
    parser.add_argument("--tasks", help="names, separated by commas (default: all)")
    parser.add_argument("--budget", type=float, default=1.0, help="share of the layers that may run")
    parser.add_argument("--texts", type=int, default=240, help="training texts of each task")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    base, tokenizer = load_base(args.base)
    encoder = BackboneEncoder(base, tokenizer, max_length=args.max_length)
    texts = {}
    for task in tasks_of(args.benchmark, args.data, args.tasks.split(",") if args.tasks else None):
        every = [example.text for example in task.train]
        texts[task.name] = random.Random(args.seed).sample(every, min(args.texts, len(every)))
    auto, found = auto_layers(encoder.num_layers, encoder.hidden_size), []
    print(f"{'layers':24s} {'values':>6s} {'cost':>5s} {'mean':>6s} " + " ".join(f"{t:>8s}" for t in texts))
    for row in measure_query_layers(encoder, texts, budget=args.budget, folds=args.folds):
        found.append(row)
        cells = " ".join(f"{100 * value:8.1f}" for value in row.accuracy.values())
        name = ", ".join(map(str, row.layers)) + (" (auto)" if row.layers == auto else "")
        values = len(row.layers) * encoder.hidden_size
        print(f"{name:24s} {values:6d} {row.cost:5.0%} {100 * row.mean:6.1f} {cells}", flush=True)
    best = cheapest(found, sum(map(len, texts.values())))
    print(f"\nquery_layers={best.layers}: {best.mean:.1%} for {best.cost:.0%} of a text's prefill")
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "json")}
    result = {"command": "python benchmarks/bench_layers.py", "settings": settings, "machine": machine()}
    rows = [row._asdict() | {"mean": row.mean} for row in found]
    report(result | {"auto": auto, "recommended": best.layers, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
