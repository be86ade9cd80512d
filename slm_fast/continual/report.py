"""Results of continual learning as files: numbers, a page with pictures, and tables for papers.

    write_report(result, directory) -> (report.json, report.html), with report.md and report.tex beside them

`result` holds "title", "created", "environment", "seconds" and "runs". A run holds "name", "tasks" and
"methods"; a method holds the matrix R: R[t][i] = the score on task i after learning task t, None where not
evaluated. What else there is ("base", "settings", "routing", "probes", "requests", "notes", ...) becomes a
section of the page, and what is missing is left out. Runs of one base and the same tasks, in other orders or
with other seeds, also get a table of means: "means" in `report.json`. Scores are fractions in the data and
percentages in print.
"""

import json
import math
from pathlib import Path

from slm_fast.continual.page import page
from slm_fast.continual.tables import latex_document, markdown, mean_over_runs, measured, repeated_runs

SCHEMA = 1


def write_report(result: dict, directory: str | Path) -> tuple[Path, Path]:
    """Write the four files into the folder (made if missing); return the paths of json and html."""
    result = _plain({**result, "schema": SCHEMA})
    runs = result.get("runs") or []
    for run in runs:
        _check_run(run)
        run["methods"] = measured(run)
    means = [
        {"runs": [run["name"] for run in group], "methods": mean_over_runs(group)}
        for group in repeated_runs(runs)
    ]
    numbers = result | ({"means": means} if means else {})
    texts = {
        "report.json": json.dumps(numbers, indent=2, allow_nan=False, ensure_ascii=False) + "\n",
        "report.html": page(result),
        "report.md": markdown(result),
        "report.tex": latex_document(result),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (directory / name).write_text(text, "utf8")
    return directory / "report.json", directory / "report.html"


def _plain(value):
    """The value in JSON's own types; numbers that are not finite become None."""
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _check_run(run: dict) -> None:
    for field in ("name", "tasks", "methods"):
        if field not in run:
            raise ValueError(f"a run needs name, tasks and methods, got {', '.join(run)}")
    count = len(run["tasks"])
    for name, method in run["methods"].items():
        matrix = method.get("matrix")
        if matrix is not None and (len(matrix) != count or any(len(row) != count for row in matrix)):
            raise ValueError(f"{run['name']}: the matrix of {name} must be {count} x {count}")
