"""Continual learning by the protocols, as `slm-fast learn` runs them, and what of the targets it reaches.

    python benchmarks/bench_continual.py [PROTOCOL ...] [--output RUNS] [--data FOLDER] [--json FILE]

PROTOCOL: see `PROTOCOLS`; without one, all of them. Runs are kept in RUNS, where a finished one is only read
and an interrupted one continued; what was trained once is shared. A FILE of the same machine and versions
keeps its other protocols. "python benchmarks/bench_continual.py --results
benchmarks/results/continual.json" prints a result again. The last line is JSON.
"""

import argparse
import json
import time
from pathlib import Path

from cpu_timing import machine

from slm_fast.cli import main as slm_fast
from slm_fast.continual.tables import format_table, mean

MINILM = ["--base", "minilm", "--batch-size", "16", "--max-length", "128"]
LABELLED = "ag,yelp,amazon,dbpedia,yahoo,sst2,mnli,rte,cb,qqp,wic,copa,boolq,imdb,multirc,"
LABELLED += "clinc150,banking77,trec6,hwu64"  # the data sets whose answers are labels
PROTOCOLS = {
    "bert5": ["--benchmark", "bert5", "--order", "all", "--methods", "slm,oracle"],
    "bert5_shared": ["--benchmark", "bert5", "--order", "all", "--twin-share", "0.3333"]
    + ["--methods", "slm,oracle"],
    "bert5_joint": ["--benchmark", "bert5", "--head-init", "zero", "--methods", "joint"]
    + ["--evaluate", "last"],
    "bert5_joint_probe": ["--benchmark", "bert5", "--methods", "joint", "--evaluate", "last"],
    "bert5_baselines": ["--benchmark", "bert5", "--max-train", "400", "--max-test", "200"]
    + ["--methods", "slm,oracle,batch,paper,seq,finetune,replay,ewc,olora,per_task,joint"],
    "bert5_probes": ["--benchmark", "bert5", "--min-similarity", "auto", "--set", "feature_penalty=0.1"]
    + ["--methods", "slm,oracle"]
    + ["--probes", "clinc150,trec6,boolq,mnli,sst2,banking77,hwu64", "--evaluate", "last"],
    "bert5_batch": ["--benchmark", "bert5", "--methods", "slm,oracle,batch", "--evaluate", "last"],
    "seq15": ["--benchmark", "seq15", "--methods", "slm,oracle", "--evaluate", "last"],
    "seq15_shared": ["--benchmark", "seq15", "--twin-share", "0.3333", "--methods", "slm,oracle"]
    + ["--evaluate", "last"],
    "labels19": ["--benchmark", "all25", "--tasks", LABELLED, *MINILM]
    + ["--methods", "slm,oracle", "--evaluate", "last"],
    "intents": ["--benchmark", "all25", "--tasks", "clinc150,banking77,trec6,hwu64", *MINILM]
    + ["--epochs", "8", "--methods", "slm,oracle", "--evaluate", "last"],
    "llama3": ["--benchmark", "llama3", "--order", "all", "--methods", "slm,oracle", "--max-train", "150"]
    + ["--max-test", "60"],
    "t5_fewshot": ["--benchmark", "t5_fewshot", "--order", "all", "--methods", "slm,oracle", "--epochs", "5"]
    + ["--max-test", "100"],
    "all25": ["--benchmark", "all25", "--methods", "slm,oracle", "--evaluate", "last"]
    + ["--max-train", "800", "--max-steps", "40", "--max-length", "96", "--max-test", "50"],
}
SAME = ("cpu", "cores", "threads", "isa", "torch", "transformers")  # of the machine, within a file of results
# Accuracy of a logistic regression on the frozen encoder's embeddings.
LINEAR = {
    "ag": 0.86,
    "yelp": 0.42,
    "amazon": 0.39,
    "yahoo": 0.67,
    "dbpedia": 0.94,
    "sst2": 0.76,
    "imdb": 0.73,
    "clinc150": 0.92,
    "banking77": 0.89,
    "trec6": 0.87,
    "hwu64": 0.88,
}


def run(name: str, output: Path, data: str | None, seeds: str | None = None) -> list[dict]:
    """The reports of a protocol's runs, which are made if they are not there."""
    path = output / name / "report.json"
    found = read_runs(path)
    there = {str(of["settings"]["seeds"]["run"]) for of in found}
    missing = not found if seeds is None else set(seeds.split(",")) - there
    if missing:
        common = ["--output", str(path.parent)]
        common += ["--trained", str(output / "trained"), "--queries", str(output / "queries")]
        common += [*(["--data", data] if data else []), *(["--seeds", seeds] if seeds else [])]
        if slm_fast(["learn", *PROTOCOLS[name], *common]) != 0:
            raise SystemExit(f"{name} failed")
        found = read_runs(path)
    return found


def read_runs(path: Path) -> list[dict]:
    """The runs of a report, none where there is no such file."""
    return json.loads(path.read_text(encoding="utf8"))["runs"] if path.is_file() else []


def trimmed(run: dict) -> dict:
    """What is kept of a report: nothing that holds texts or folders, and no times of single answers, which
    are the suite's."""
    settings = {k: v for k, v in run["settings"].items() if k != "encoder_name_or_path"}
    kinds = {task: source.split(":")[0] for task, source in settings.get("sources", {}).items()}
    settings |= {"sources": kinds} if kinds else {}
    kept = {k: v for k, v in run.items() if k not in ("requests", "base", "cost")} | {"settings": settings}
    if "routing" in run:
        kept["routing"] = {k: v for k, v in run["routing"].items() if k not in ("mass", "entry_names")}
    return kept


def average(runs: list[dict], method: str, field: str = "average_accuracy") -> float | None:
    return mean([run["methods"].get(method, {}).get(field) for run in runs])


def routing(runs: list[dict], field: str = "accuracy") -> float:
    return mean([mean(list(run["routing"][field].values())) for run in runs])


def told_gaps(run: dict) -> dict[str, float]:
    """By task: the score when told the task, minus the one without, after the last task."""
    slm, told = (run["methods"][name]["matrix"][-1] for name in ("slm", "oracle"))
    return {task: b - a for task, a, b in zip(run["tasks"], slm, told, strict=True)}


def targets(runs: dict[str, list[dict]]) -> list[dict]:
    """Every target that the runs say something about: what, wanted, reached, and whether it holds."""
    rows = []

    def check(what: str, reached: float, relation: str, wanted: float) -> None:
        holds = reached >= wanted - 1e-9 if relation == ">=" else reached <= wanted + 1e-9
        rows.append(
            {"what": what, "reached": reached, "target": f"{relation} {100 * wanted:.1f}", "holds": holds}
        )

    starts = ("bert5_joint", "bert5_joint_probe")  # of its heads; the better one counts
    joint = max((average(runs[name], "joint") for name in starts if runs.get(name)), default=None)
    batch = average(runs.get("bert5_batch", []), "batch")  # on the same weights
    for name in ("bert5", "bert5_shared"):
        if not (bert5 := runs.get(name)):
            continue
        slm, orders = average(bert5, "slm"), f"{name}, {len(bert5)} runs"
        if batch is not None:
            check(f"{orders}: average, against the paper's retrieval by batches", slm, ">=", batch)
        if joint is not None:
            check(f"{orders}: average, against joint LoRA - 1", slm, ">=", joint - 0.01)
        check(f"{orders}: told the task minus no task id", average(bert5, "oracle") - slm, "<=", 0.005)
        check(f"{orders}: forgetting, max minus last", average(bert5, "slm", "forgetting"), "<=", 0.003)
        check(f"{orders}: routing accuracy", routing(bert5), ">=", 0.98)
        check(f"{orders}: routing, yelp = amazon", routing(bert5, "accuracy_shared_labels"), ">=", 0.99)
    alone = {}
    for run in (run for name in ("seq15", "bert5", "intents") for run in runs.get(name, ())):
        matrix = run["methods"]["oracle"]["matrix"]
        alone |= {task: matrix[n][n] for n, task in enumerate(run["tasks"])}
    for task, wanted in LINEAR.items():
        if task in alone:
            check(f"{task} by itself, against logistic regression", alone[task], ">=", wanted)
    for name in ("seq15", "seq15_shared", "labels19", "all25"):
        if found := runs.get(name):
            gap = average(found, "oracle") - average(found, "slm")
            check(f"{name}: told the task minus no task id", gap, "<=", 0.01)
            check(f"{name}: routing accuracy", routing(found), ">=", 0.96)
    for run in runs.get("bert5_probes", ()):
        for task, found in run["probes"]["tasks"].items():
            lost = found["score_before"] - found["score_after"]
            check(f"{task}, never learnt, with the floor: lost by learning", lost, "<=", 0.0)
    for run in runs.get("llama3", ()):
        order = run["settings"]["order"]
        slm = run["methods"]["slm"]
        check(f"llama3, order {order}: forgetting, max minus last", slm["forgetting"], "<=", 0.005)
        for task, gap in told_gaps(run).items():
            check(f"llama3, order {order}: {task}, told minus not told", gap, "<=", 0.01)
    return rows


def show(results: dict[str, list[dict]]) -> list[dict]:
    rows = targets(results)
    cells = [
        [r["what"], f"{100 * r['reached']:.2f}", r["target"], "yes" if r["holds"] else "NO"] for r in rows
    ]
    print(format_table((["target, %", "reached", "wanted", "holds"], cells)))
    return rows


def earlier(path: Path) -> dict:
    """The result of a file, of this machine and these versions, or an empty one where there is no file."""
    if not path.is_file():
        return {"runs": {}, "commands": {}}
    found, here = json.loads(path.read_text(encoding="utf8")), machine()
    if any(found["machine"][name] != here[name] for name in SAME):
        raise SystemExit(f"{path} is a result of another machine, or of other versions: choose a new file")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("protocols", nargs="*", help=", ".join(PROTOCOLS))
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--data", help="data folder, by default SLM_FAST_DATA's")
    parser.add_argument("--seeds", help="a run with each, separated by commas (default: 0)")
    parser.add_argument("--results", type=Path, help="print this result again; nothing is run")
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()
    if unknown := set(args.protocols) - set(PROTOCOLS):
        parser.error(f"unknown protocol {min(unknown)}; there are {', '.join(PROTOCOLS)}")
    if args.results:
        show(json.loads(args.results.read_text(encoding="utf8"))["runs"])
        return
    kept = earlier(args.json) if args.json else None  # an unfit file is found now, not after hours
    began = time.perf_counter()
    names = args.protocols or list(PROTOCOLS)
    runs = {
        name: [trimmed(found) for found in run(name, args.output, args.data, args.seeds)] for name in names
    }
    rows = show(runs)
    seeds = ["--seeds", args.seeds] if args.seeds else []
    commands = {name: " ".join(["slm-fast learn", *PROTOCOLS[name], *seeds]) for name in names}
    seconds = round(time.perf_counter() - began)
    if kept is not None:
        runs, commands = kept["runs"] | runs, kept["commands"] | commands
        order = [name for name in PROTOCOLS if name in runs]
        result = {"machine": machine(), "commands": {name: commands[name] for name in order}}
        result |= {"targets": targets(runs), "runs": {name: runs[name] for name in order}}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    print(json.dumps({"seconds": seconds, "targets": rows}))


if __name__ == "__main__":
    main()
