"""Five text-classification tasks in sequence, one query at a time: routing, accuracy and forgetting.

The paper's tasks (ag, yelp, amazon, yahoo, dbpedia) on an all-MiniLM-L6-v2 backbone, rank 8 on all linears,
4 entries a task. Prints a table of routing accuracy for the paper's retrieval and for `whitened`, then the
accuracy matrices of the engine without a task id, told the task, and of sequential LoRA on the same budget.

    python benchmarks/bench_continual.py --data FOLDER --output RUN --json benchmarks/results/bert5.json
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch
import transformers
from bench_routing import learn, routed, selected

from slm_fast.cli import print_run
from slm_fast.config import SLMConfig
from slm_fast.continual.runner import ContinualRunner, write_reports
from slm_fast.continual.tasks import Task, load_jsonl_tasks
from slm_fast.encoder import Encoder
from slm_fast.loading import load_base
from slm_fast.model import get_slm_model
from slm_fast.trainer import default_arguments

TASKS = ["ag", "yelp", "amazon", "yahoo", "dbpedia"]
RETRIEVALS = {
    "paper: last layer, grouped cosine, learnt keys": SLMConfig.paper(),
    "last layer, grouped cosine, averaged keys": SLMConfig.paper(key_method="group_avg"),
    "last layer, whitened": SLMConfig(query_layers=[-1]),
    "layers 0, 2, 6, whitened": SLMConfig(query_layers=[0, 2, 6]),
    "all layers, whitened": SLMConfig(),
    "all layers, whitened, k-means keys": SLMConfig(key_method="kmeans", temperature=32.0),
}


def routing_table(tasks: list[Task], encoder: Encoder) -> list[dict]:
    """Routing accuracy per task, one query at a time, of every retrieval; `bench_routing.py` has more."""
    queries = [
        tuple(encoder([e.text for e in part], progress=True) for part in (t.train, t.test)) for t in tasks
    ]
    rows = []
    for name, config in RETRIEVALS.items():
        own = selected(queries, config.query_layers, len(encoder.layers))
        found = routed(learn(config, tasks, own), tasks, own)
        merged = found["merged"]
        rows.append({"retrieval": name, "accuracy": found["accuracy"], "accuracy_shared_labels": merged})
    return rows


def print_routing(rows: list[dict], names: list[str]) -> None:
    width = max(len(row["retrieval"]) for row in rows)
    print(
        f"\n{'routing accuracy, %':{width}s} "
        + " ".join(f"{n:>8s}" for n in names)
        + "     mean  yelp=amazon"
    )
    for row in rows:
        mean, merged = (sum(row[k].values()) / len(names) for k in ("accuracy", "accuracy_shared_labels"))
        cells = " ".join(f"{100 * row['accuracy'][n]:8.1f}" for n in names)
        print(f"{row['retrieval']:{width}s} {cells} {100 * mean:8.1f} {100 * merged:12.1f}")


def main() -> None:
    default_data = os.environ.get("SLM_FAST_DATA", str(Path(__file__).parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=default_data, help="folder with bert5/")
    parser.add_argument("--output", default="runs/bert5", help="folder of the run; continued if interrupted")
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--order", default=",".join(TASKS))
    parser.add_argument("--max-train", type=int, default=2000)
    parser.add_argument("--max-test", type=int)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default="slm,oracle,seq")
    parser.add_argument("--routing-only", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    tasks = load_jsonl_tasks(Path(args.data) / "bert5", args.order.split(","))
    tasks = [task.subset(args.max_train, args.max_test, args.seed) for task in tasks]
    encoder = Encoder("minilm")
    table = routing_table(tasks, encoder)
    print_routing(table, [task.name for task in tasks])
    result = {
        "command": "python benchmarks/bench_continual.py",
        "arguments": {k: v for k, v in vars(args).items() if k not in ("data", "output", "json")},
        "machine": {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "platform": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "routing": table,
    }
    if not args.routing_only:
        base, tokenizer = load_base("minilm")
        config = SLMConfig(target_modules="all-linear", top_k=args.top_k)
        model = get_slm_model(base, config, encoder=encoder, tokenizer=tokenizer)
        training = default_arguments(
            args.output, num_train_epochs=args.epochs, learning_rate=args.learning_rate, seed=args.seed
        )
        runner = ContinualRunner(
            model,
            tasks,
            training,
            output_dir=args.output,
            methods=tuple(args.methods.split(",")),
            max_length=args.max_length,
            seed=args.seed,
        )
        report = runner.fit().report("all-MiniLM-L6-v2, five tasks")
        print_run(report)
        methods = report["methods"]
        if "oracle" in methods:
            gap = methods["oracle"]["average_accuracy"] - methods["slm"]["average_accuracy"]
            print(f"told the task minus no task id: {100 * gap:.2f} points")
        write_reports([report], args.output, "Five text-classification tasks", time.perf_counter() - began)
        report.pop("requests", None)
        report["base"]["model"] = "all-MiniLM-L6-v2"
        report["settings"]["sources"] = {task.name: "bert5" for task in tasks}
        report["settings"]["encoder_name_or_path"] = "all-MiniLM-L6-v2"
        result["run"] = report
    result["seconds"] = time.perf_counter() - began
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    print(
        json.dumps(
            {"seconds": round(result["seconds"]), "routing": {r["retrieval"]: r["accuracy"] for r in table}}
        )
    )


if __name__ == "__main__":
    main()
