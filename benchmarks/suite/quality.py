"""What is learnt: the continual-learning tables, from the same code as `slm-fast learn`.

In quick mode three tasks of installed documentation, 64 texts each, on all-MiniLM-L6-v2; in full mode
the protocols of `bench_continual.py` (hours), kept in `RUNS`: finished ones there, and tasks that were
trained, are only read, whoever made them. Contenders are methods, and their numbers shares: `average`,
`forgetting` (max minus last), and for ours `routing`.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bench_continual

from slm_fast.cli import main as slm_fast
from suite.cases import Effort

RUNS = Path("runs")
QUICK = [
    "--data",
    "docs",
    "--tasks",
    "networkx,sympy,torch",
    "--base",
    "minilm",
    "--methods",
    "slm,oracle",
    "--epochs",
    "1",
]
QUICK += ["--max-train", "64", "--max-test", "32", "--max-length", "64"]


def as_record(run: dict, name: str) -> dict:
    found = {}
    for method, numbers in run["methods"].items():
        found[method] = {"average": numbers["average_accuracy"], "forgetting": numbers["forgetting"]}
    if shares := list(run.get("routing", {}).get("accuracy", {}).values()):
        found["slm"]["routing"] = sum(shares) / len(shares)
    ours = "slm" if "slm" in found else next(iter(found))  # of a protocol of other methods
    record = {"section": "quality", "case": name, "axes": {"tasks": len(run["tasks"])}, "ours": ours}
    return record | {"bytes": None, "operations": None, "clock": "none", "contenders": found}


def records(quick: bool, device: str, effort: Effort) -> Iterator[dict]:
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            if slm_fast(["learn", *QUICK, "--output", folder]) != 0:
                raise RuntimeError("slm-fast learn failed")
            report = json.loads((Path(folder) / "report.json").read_text(encoding="utf8"))
        yield as_record(report["runs"][0], "three tasks of documentation, MiniLM")
        return
    if "SLM_FAST_DATA" not in os.environ:
        raise RuntimeError("the protocols need SLM_FAST_DATA, a folder with the data sets")
    for name in bench_continual.PROTOCOLS:
        for run in bench_continual.run(name, RUNS, None):
            yield as_record(run, f"{name}: {run['name']}")


def targets(records: list[dict], ceilings: dict) -> list[dict]:
    """`bench_continual.py` prints those of the protocols."""
    return []
