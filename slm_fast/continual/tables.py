"""The numbers of a report as tables: for terminals, Markdown, LaTeX (booktabs) and the HTML page.

A table is (header, rows) of strings, a line per method. Scores are fractions in the data and percentages in
print, a mean over runs has its sample standard deviation behind it, and "-" stands for what was not measured.
"""

import html
import math

from slm_fast.continual.metrics import REFERENCE, single_task_reference, summarize

Table = tuple[list[str], list[list[str]]]

MISSING = "-"
FORWARD = "forward_transfer_single"
MEASURES = (
    ("average_accuracy", "average"),
    ("forgetting", "forgetting (max-last)"),
    ("forgetting_first", "forgetting (first-last)"),
    ("backward_transfer", "backward transfer"),
    ("forward_transfer", "forward transfer (Lopez-Paz)"),
    (FORWARD, "forward transfer (single-task)"),
    ("routing_accuracy", "routing accuracy"),
)
ROUTING_NOTE = (
    "mean over tasks of the share of test rows whose largest weight is the task's, a query at a time"
)
COUNTS = (("trained_parameters", "trained of a task"), ("steps", "steps"))
SECONDS = (("seconds_train", "training, s"), ("seconds_eval", "evaluation, s"))
PROBE_SHARES = (
    ("frozen_rows", "rows on the frozen model"),
    ("equal_rows", "rows unchanged"),
    ("score_before", "score before"),
    ("score_after", "score after"),
)
LATEX = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


# Numbers


def seen_averages(matrix: list[list[float | None]]) -> list[float | None]:
    """After each task, the mean over the tasks learnt so far; None where one of them was not measured."""
    seen = [row[: stage + 1] for stage, row in enumerate(matrix)]
    return [None if None in scores else sum(scores) / len(scores) for scores in seen]


def forgetting_per_task(matrix: list[list[float | None]]) -> list[float | None]:
    """For every task but the last, its best score at an earlier stage minus its score at the end."""
    drops = []
    for task in range(len(matrix) - 1):
        earlier = [row[task] for row in matrix[task:-1] if row[task] is not None]
        last = matrix[-1][task]
        drops.append(max(earlier) - last if earlier and last is not None else None)
    return drops


def mean(values: list[float | None]) -> float | None:
    """The mean of what was measured, None if nothing was."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def measured(run: dict) -> dict[str, dict]:
    """The run's methods, with what follows from their matrices and its routing section where it is not there:

    "slm" gets the mean over the tasks of the routing accuracy, and all get the forward transfer against
    single-task learning if a method among them learns and answers every task alone.
    """
    methods = run["methods"]
    matrices = {name: method.get("matrix") for name, method in methods.items()}
    reference, single = single_task_reference(matrices, (run.get("settings") or {}).get("init", "zero"))
    accuracy = (run.get("routing") or {}).get("accuracy") or {}
    out = {}
    for name, method in methods.items():
        derived = {}
        if single is not None and method.get("matrix") and method.get(FORWARD) is None:
            forward = summarize(method["matrix"], single=single)[FORWARD]
            derived = {} if forward is None else {FORWARD: forward, REFERENCE: reference}
        if name == "slm":
            derived["routing_accuracy"] = mean(list(accuracy.values()))
        new = {f: v for f, v in derived.items() if v is not None and method.get(f) is None}
        out[name] = method | new
    return out


def mean_over_runs(runs: list[dict]) -> dict[str, dict]:
    """Every method's measures over the runs: {"mean", "std", "runs"}; std is the sample's, None for one run.

    A measure counts where it was measured, so that "runs" can be less than all.
    """
    out: dict[str, dict] = {}
    for run in runs:
        for name, method in run["methods"].items():
            of_method = out.setdefault(name, {"label": method.get("label", name)})
            for field, _ in MEASURES + COUNTS + SECONDS:
                if method.get(field) is not None:
                    of_method.setdefault(field, []).append(method[field])
    for of_method in out.values():
        for field, values in of_method.items():
            if field != "label":
                of_method[field] = spread(values)
    return out


def spread(values: list[float]) -> dict:
    """Repeated values, as cells take them: their mean, the sample's deviation (None of one), their number."""
    centre = sum(values) / len(values)
    squares = sum((value - centre) ** 2 for value in values)
    std = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None
    return {"mean": centre, "std": std, "runs": len(values)}


def repeated_runs(runs: list[dict]) -> list[list[dict]]:
    """Runs of the same base and tasks, in whatever order: the groups of two and more of them."""
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        base = (run.get("base") or {}).get("model")
        groups.setdefault((base, *sorted(map(str, run["tasks"]))), []).append(run)
    return [group for group in groups.values() if len(group) > 1]


# Cells


def percent(value: float | dict | None, digits: int = 1) -> str:
    """A fraction, or its mean over runs, in percent."""
    if isinstance(value, dict):
        return _with_std(percent(value["mean"], digits), value, lambda std: percent(std, digits))
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{round(100 * value, digits) + 0.0:.{digits}f}"  # + 0.0 makes -0.0 a plain 0.0


def number(value: int | dict | None) -> str:
    """A count, which is the same in repeated runs, or their mean."""
    if isinstance(value, dict):
        value = round(value["mean"])
    return MISSING if value is None else f"{value:,}"


def seconds(value: float | dict | None) -> str:
    if isinstance(value, dict):
        return _with_std(seconds(value["mean"]), value, seconds)
    return MISSING if value is None else f"{value:,.1f}"


def _with_std(text: str, value: dict, show) -> str:
    return text if value["std"] is None else f"{text} ± {show(value['std'])}"


# Tables


def comparison(methods: dict[str, dict]) -> Table:
    """A line per method: `MEASURES` in percent, counts, seconds; what nobody measured is left out."""
    header = ["method"] + [title for _, title in MEASURES + COUNTS + SECONDS]
    rows = [
        [
            str(method.get("label", name)),
            *(percent(method.get(field)) for field, _ in MEASURES),
            *(number(method.get(field)) for field, _ in COUNTS),
            *(seconds(method.get(field)) for field, _ in SECONDS),
        ]
        for name, method in methods.items()
    ]
    keep = [0] + [i for i in range(1, len(header)) if any(row[i] != MISSING for row in rows)]
    header, *rows = [[row[i] for i in keep] for row in [header, *rows]]
    return header, rows


def probe_table(probes: dict) -> Table:
    """A line per task that was never learnt: what is still the frozen model's, and its score, in percent."""
    header = ["never learnt", "metric", "rows", *(title for _, title in PROBE_SHARES)]
    rows = [
        [name, task["metric"], str(task["rows"]), *(percent(task[field]) for field, _ in PROBE_SHARES)]
        for name, task in probes["tasks"].items()
    ]
    return header, rows


def percent_table(
    corner: str, names: list[str], columns: list[str], values: list[list[float | None]]
) -> Table:
    """A matrix in percent, a line for each of the names."""
    return [corner, *columns], [[n, *map(percent, row)] for n, row in zip(names, values, strict=True)]


def matrix_table(tasks: list[str], matrix: list[list[float | None]]) -> Table:
    """Scores on each task (column) after learning each task (row), in percent."""
    return percent_table("after learning", tasks, tasks, matrix)


def text_score_table(scores: dict[str, dict[str, float]]) -> Table:
    """A line per task of long answers: its final answers by every metric of such, in percent."""
    metrics = list(dict.fromkeys(metric for found in scores.values() for metric in found))
    rows = [[task, *(percent(found.get(metric)) for metric in metrics)] for task, found in scores.items()]
    return ["final answers", *(metric.replace("_", " ") for metric in metrics)], rows


def cost_table(cost: dict) -> Table:
    """A line per part of an answer (a label, or its first token) and of a task."""
    rows = [[what, f"{value:.2f} ms"] for what, value in cost["milliseconds"].items()]
    rows += [[what, f"{value / 1e6:,.2f} MB"] for what, value in cost["bytes"].items()]
    return ["one text by itself, to its label or first token; a task, in the mean", "cost"], rows


def probe_title(probes: dict) -> str:
    floor = probes["min_similarity"]
    return f"Zero-shot kept, {probes['unchanged']}; min_similarity: {'no floor' if floor is None else floor}"


# Formats


def format_table(table: Table) -> str:
    """For terminals: the first column to the left, the others to the right."""
    header, rows = table
    sizes = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    pad = [str.ljust] + [str.rjust] * (len(header) - 1)
    lines = [[pad[i](cell, sizes[i]) for i, cell in enumerate(row)] for row in [header, *rows]]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def format_comparison(methods: dict[str, dict]) -> str:
    """`comparison` for terminals."""
    return format_table(comparison(methods))


def format_matrix(names: list[str], matrix: list[list[float | None]], *, width: int = 12) -> str:
    """The accuracy matrix in percent: a line per stage, a column per task, "-" where not evaluated."""
    short = [name if len(name) <= width else name[: width - 2] + ".." for name in names]
    first = max(map(len, [*short, "after learning"]))
    columns = [max(len(name), 5) for name in short]
    head = "  ".join(name.rjust(size) for name, size in zip(short, columns, strict=True))
    lines = [f"{'after learning':<{first}}  {head}"]
    for name, row in zip(short, matrix, strict=True):
        cells = "  ".join(percent(value).rjust(size) for value, size in zip(row, columns, strict=True))
        lines.append(f"{name:<{first}}  {cells}")
    return "\n".join(lines)


def html_table(header: list[str], rows: list[list[str]], *, dense: bool = False, text: bool = False) -> str:
    classes = " ".join(name for name, wanted in (("dense", dense), ("text", text)) if wanted)
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    head = f"<tr>{head}</tr>" if any(header) else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="{classes}">{head}{body}</table></div>'


def markdown_table(table: Table) -> str:
    header, rows = table
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def latex_table(table: Table, caption: str) -> str:
    """A booktabs table; text is escaped."""
    header, rows = table
    lines = [" & ".join(map(latex, line)) + r" \\" for line in [header, *rows]]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


# Files


PERCENT, SCORES = "In percent.", "Scores in percent."


def sections(result: dict) -> list[tuple[str, Table, str]]:
    """(title, table, its unit) of all that `report.md` and `report.tex` show: means first, then every run."""
    runs = result.get("runs") or []
    out = [
        (
            f"Mean over {len(group)} runs: {', '.join(run['name'] for run in group)}",
            comparison(mean_over_runs(group)),
            SCORES,
        )
        for group in repeated_runs(runs)
    ]
    for run in runs:
        name, tasks = str(run["name"]), [str(task) for task in run["tasks"]]
        out.append((name, comparison(run["methods"]), SCORES))
        for method in run["methods"].values():
            if method.get("matrix"):
                title = f"{name}. {method.get('label')}: scores on each task after learning each"
                out.append((title, matrix_table(tasks, method["matrix"]), PERCENT))
        if (run.get("routing") or {}).get("confusion"):
            title = f"{name}. Routing: true task and the task with the largest weight"
            out.append(
                (title, percent_table("true task", tasks, tasks, run["routing"]["confusion"]), PERCENT)
            )
        if run.get("text_scores"):
            out.append((f"{name}. Long answers", text_score_table(run["text_scores"]), PERCENT))
        if run.get("cost"):
            out.append((f"{name}. Cost", cost_table(run["cost"]), ""))
        if run.get("probes"):
            out.append((f"{name}. {probe_title(run['probes'])}", probe_table(run["probes"]), SCORES))
    return out


def definitions(runs: list[dict]) -> dict[str, str]:
    """What the columns mean: the runs' notes, and the routing accuracy where it was measured."""
    notes: dict[str, str] = {}
    for run in runs:
        notes |= run.get("metrics_note") or {}
        if run.get("routing"):
            notes["routing_accuracy"] = ROUTING_NOTE
    return notes


def markdown(result: dict) -> str:
    lines = [f"# {result.get('title') or 'Continual learning report'}"]
    for title, table, _ in sections(result):
        lines += ["", f"## {title}", "", markdown_table(table)]
    notes = definitions(result.get("runs") or [])
    lines += ["", "Scores and their differences in percent; seconds are wall clock."]
    lines += ["", *(f"- {name.replace('_', ' ')}: {note}" for name, note in notes.items())] if notes else []
    return "\n".join(lines) + "\n"


def latex_document(result: dict) -> str:
    """Tables to `\\input`; they need `\\usepackage{booktabs}`."""
    notes = [
        f"% {name.replace('_', ' ')}: {note}" for name, note in definitions(result.get("runs") or []).items()
    ]
    tables = [latex_table(table, f"{title}. {unit}".rstrip()) for title, table, unit in sections(result)]
    return "\n\n".join(["\n".join(["% \\usepackage{booktabs}", *notes]), *tables]) + "\n"
