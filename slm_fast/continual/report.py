"""Results of continual learning: `report.json`, one self-contained `report.html`, and text for terminals.

    write_report(result, directory) -> (report.json, report.html)

`result` holds "title", "created", "environment", "seconds" and "runs". A run holds "name", "tasks" and
"methods"; a method holds the matrix R: R[t][i] = the score on task i after learning task t, None where not
evaluated. What else there is ("base", "settings", "routing", "requests", "notes", ...) becomes a section of
the page, and what is missing is left out. Scores are fractions in the data and percentages in print.
"""

import base64
import html
import io
import json
import math
import textwrap
from pathlib import Path

SCHEMA = 1
MISSING = "-"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", "-", "--", "-.")
MEASURES = (
    ("average_accuracy", "average"),
    ("forgetting", "forgetting"),
    ("backward_transfer", "backward transfer"),
    ("forward_transfer", "forward transfer"),
)
SECONDS = (("seconds_train", "training, s"), ("seconds_eval", "evaluation, s"))
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.edgecolor": "#8a94a0",
    "axes.labelcolor": "#333c46",
    "xtick.color": "#333c46",
    "ytick.color": "#333c46",
    "svg.hashsalt": "slm_fast",
}


def write_report(result: dict, directory: str | Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into the folder (made if missing) and return their paths."""
    result = _plain({**result, "schema": SCHEMA})
    for run in result.get("runs") or ():
        _check_run(run)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    json_path, html_path = directory / "report.json", directory / "report.html"
    json_path.write_text(json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n", "utf8")
    html_path.write_text(_page(result), "utf8")
    return json_path, html_path


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


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _percent(value: float | None, digits: int = 1) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{round(100 * value, digits) + 0.0:.{digits}f}"  # + 0.0 makes -0.0 a plain 0.0


def _number(value: object) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# Text for terminals


def format_matrix(names: list[str], matrix: list[list[float | None]], *, width: int = 12) -> str:
    """The accuracy matrix in percent: a line per stage, a column per task, "-" where not evaluated."""
    short = [name if len(name) <= width else name[: width - 2] + ".." for name in names]
    first = max(map(len, [*short, "after learning"]))
    columns = [max(len(name), 5) for name in short]
    head = "  ".join(name.rjust(size) for name, size in zip(short, columns, strict=True))
    lines = [f"{'after learning':<{first}}  {head}"]
    for name, row in zip(short, matrix, strict=True):
        cells = "  ".join(_percent(value).rjust(size) for value, size in zip(row, columns, strict=True))
        lines.append(f"{name:<{first}}  {cells}")
    return "\n".join(lines)


def format_comparison(methods: dict[str, dict]) -> str:
    """A line per method of a run's "methods": average, forgetting and transfer in percent, and seconds."""
    header = ["method"] + [title for _, title in MEASURES + SECONDS]
    rows = [[method.get("label", name), *_measures(method)] for name, method in methods.items()]
    keep = [0] + [i for i in range(1, len(header)) if any(row[i] != MISSING for row in rows)]
    rows = [[row[i] for i in keep] for row in [header, *rows]]
    sizes = [max(len(row[i]) for row in rows) for i in range(len(keep))]
    pad = [str.ljust] + [str.rjust] * (len(keep) - 1)
    cells = [[pad[i](cell, sizes[i]) for i, cell in enumerate(row)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _measures(method: dict) -> list[str]:
    scores = [_percent(method.get(field)) for field, _ in MEASURES]
    seconds = [method.get(field) for field, _ in SECONDS]
    return scores + [MISSING if value is None else f"{value:,.1f}" for value in seconds]


# Pictures


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _picture(draw, alt: str) -> str:
    """An <img> with the figure that `draw()` returns, as SVG in the page itself."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the report's pictures need matplotlib: pip install 'slm_fast[train]'") from error
    with matplotlib.rc_context(STYLE):
        buffer = io.BytesIO()
        draw().savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img class="picture" alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'


def _short(name: str, width: int = 22) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def _heat_map(
    axes, rows: list[str], columns: list[str], values: list[list[float | None]], cell: float, top: float = 1
):
    """Cells coloured from 0 to `top`, with percentages in them if `cell`, their width in points, allows it.

    Returns the mesh if there are no numbers in the cells, so that the caller can draw a colour bar.
    """
    grid = [[math.nan if value is None else value for value in row] for row in values]
    mesh = axes.pcolormesh(grid, cmap="Blues", vmin=0, vmax=top, edgecolors="white", linewidth=0.8)
    axes.set_facecolor("#f1f3f5")
    axes.invert_yaxis()
    step = math.ceil(9 / cell)  # labels that would overlap are left out
    shown = range(0, len(columns), step)
    axes.set_xticks([i + 0.5 for i in shown], [_short(columns[i]) for i in shown], fontsize=8)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], map(_short, rows), fontsize=8)
    axes.tick_params(length=0)
    for label in axes.get_xticklabels():
        label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.spines[:].set_visible(False)
    digits = 1 if cell >= 26 else 0
    size = min(9.0, cell / 2.6 if digits else cell / 2)
    if size < 6:
        return mesh
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is not None:
                style = {"fontsize": size, "color": "white" if value > 0.6 * top else "#1c2733"}
                axes.text(j + 0.5, i + 0.5, _percent(value, digits), ha="center", va="center", **style)


def _draw_matrices(tasks: list[str], methods: dict[str, dict]):
    per_row = min(len(methods), 3 if len(tasks) <= 6 else 2 if len(tasks) <= 15 else 1)
    lines = -(-len(methods) // per_row)
    panel = 11 / per_row if len(tasks) > 15 else 11 / max(per_row, 2)
    cell = 72 * (panel - 1.4) / len(tasks)
    figure = _figure(panel * per_row, (0.9 * panel + 0.4) * lines)
    for position, (name, method) in enumerate(methods.items(), 1):
        axes = figure.add_subplot(lines, per_row, position)
        _heat_map(axes, tasks, tasks, method["matrix"], cell)
        axes.set_title(textwrap.fill(method.get("label", name), int(8 * panel)), loc="left")
        axes.set_xlabel("tested on")
        if position % per_row == 1 or per_row == 1:
            axes.set_ylabel("after learning")
    return figure


def _draw_curves(tasks: list[str], methods: dict[str, dict]):
    figure = _figure(6.4, 3.9)
    axes = figure.add_subplot()
    for position, (name, method) in enumerate(methods.items()):
        points = [(i, 100 * v) for i, v in enumerate(seen_averages(method["matrix"])) if v is not None]
        style = {"color": COLOURS[position % 7], "marker": MARKERS[position % 7], "ls": DASHES[position % 7]}
        axes.plot(*zip(*points, strict=True), label=method.get("label", name), lw=1.8, ms=5, **style)
    _label_tasks(axes, tasks)
    axes.set_ylabel("average over the tasks so far, %")
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, low - 3), min(101, high + 3))
    _frame(figure, axes)
    return figure


def _draw_forgetting(tasks: list[str], methods: dict[str, dict]):
    figure = _figure(6.4, 3.9)
    axes = figure.add_subplot()
    width = 0.8 / len(methods)
    for position, (name, method) in enumerate(methods.items()):
        drops = [0 if drop is None else 100 * drop for drop in forgetting_per_task(method["matrix"])]
        at = [i + (position - (len(methods) - 1) / 2) * width for i in range(len(drops))]
        axes.bar(at, drops, width * 0.92, color=COLOURS[position % 7], label=method.get("label", name))
    axes.axhline(0, color="#333c46", lw=0.8)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -1), max(high, 1))
    _label_tasks(axes, tasks[:-1])
    axes.set_ylabel("forgotten at the end, points")
    _frame(figure, axes)
    return figure


def _label_tasks(axes, tasks: list[str]) -> None:
    axes.set_xticks(range(len(tasks)), map(_short, tasks), fontsize=9 if len(tasks) <= 8 else 7)
    if len(tasks) > 5 or max(map(len, tasks)) > 12:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")


def _frame(figure, axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e7eb", lw=0.8)
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)


def _draw_heat_map(rows: list[str], columns: list[str], values: list[list[float | None]], x: str, y: str):
    width = min(11.0, max(5.4, 0.42 * len(columns) + 1.6))
    figure = _figure(width, min(9.0, max(2.6, 0.36 * len(rows) + 1.7)))
    axes = figure.add_subplot()
    top = max((value for row in values for value in row if value is not None), default=0) or 1
    mesh = _heat_map(axes, rows, columns, values, 72 * (width - 1.8) / len(columns), top)
    if mesh is not None:
        figure.colorbar(
            mesh, ax=axes, shrink=0.6, format=lambda share, _: f"{100 * share:.0f}%"
        ).outline.set_visible(False)
    axes.set(xlabel=x, ylabel=y)
    return figure


# The page

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 32px 24px 64px; background: #fff; color: #1c2733;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 21px; margin: 48px 0 4px; padding-top: 20px; border-top: 2px solid #1c2733; }
h3 { font-size: 16px; margin: 32px 0 8px; }
h4 { font-size: 13px; margin: 16px 0 4px; }
p { margin: 4px 0 10px; max-width: 80ch; }
.quiet { color: #5a6672; font-size: 13px; }
.picture { display: block; max-width: 100%; height: auto; }
.side { display: grid; grid-template-columns: minmax(0, 1.35fr) minmax(0, 1fr);
  gap: 24px; align-items: start; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 4px 0 8px; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid #e3e7eb; vertical-align: top; }
th { font-weight: 600; border-bottom: 1.5px solid #8a94a0; vertical-align: bottom; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
table.dense { font-size: 11px; }
table.dense th, table.dense td { padding: 2px 6px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.tile { border: 1px solid #d5dbe1; border-left-width: 5px; border-radius: 4px;
  padding: 8px 16px; min-width: 190px; }
.tile b { display: block; font-size: 26px; line-height: 1.2; }
.request { max-width: 46ch; overflow-wrap: anywhere; }
.entry { display: grid; grid-template-columns: 13ch 90px 5ch; gap: 6px; align-items: center;
  font-size: 12px; }
.entry span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.entry span:last-child { text-align: right; }
.bar { height: 9px; background: #e8edf2; border-radius: 2px; }
.bar i { display: block; height: 9px; background: #0072B2; border-radius: 2px; }
.right { color: #00694d; font-weight: 600; } .wrong { color: #a63c00; font-weight: 600; }
@media (max-width: 800px) { .side { grid-template-columns: minmax(0, 1fr); } }
@media print {
  body { max-width: none; padding: 0; font-size: 11px; }
  h2 { break-before: page; } h2.first { break-before: auto; } h3, h4 { break-after: avoid; }
  .picture, table, .tile, tr { break-inside: avoid; } .scroll { overflow: visible; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def _page(result: dict) -> str:
    title = html.escape(str(result.get("title") or "Continual learning report"))
    created = [str(result["created"])] if result.get("created") else []
    if result.get("seconds") is not None:
        created.append(f"{result['seconds']:,.0f} seconds in all")
    body = [f"<h1>{title}</h1>", f'<p class="quiet">{html.escape(" · ".join(created))}</p>']
    runs = result.get("runs") or []
    if len(runs) > 1:
        rows = [
            [run["name"], method.get("label", name), *_measures(method)[: len(MEASURES)]]
            for run in runs
            for name, method in run["methods"].items()
        ]
        body += ["<h3>All runs</h3>", _table(["run", "method", *(title for _, title in MEASURES)], rows)]
    for position, run in enumerate(runs):
        body += _run_section(run, first=position == 0)
    if result.get("environment"):
        body += ["<h2>Environment</h2>", _pairs(result["environment"])]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _run_section(run: dict, *, first: bool) -> list[str]:
    tasks, methods = [str(task) for task in run["tasks"]], run["methods"]
    metric = str(run.get("metric") or "score").replace("_", " ")
    base = {"model": None, **(run.get("base") or {})}
    facts = [str(base["model"])] if base["model"] else []
    facts += [f"{base['parameters']:,} parameters"] if base.get("parameters") is not None else []
    if base.get("trainable_per_task") is not None:
        facts.append(f"{base['trainable_per_task']:,} of them trained per task")
    facts.append(f"{len(tasks)} tasks, in this order: {', '.join(tasks)}")
    out = [
        f"<h2{' class=first' if first else ''}>{html.escape(run['name'])}</h2>",
        f'<p class="quiet">{html.escape(" · ".join(facts))}</p>',
        _tiles(methods, metric),
        _table(
            ["method", *(title for _, title in MEASURES + SECONDS)],
            [[method.get("label", name), *_measures(method)] for name, method in methods.items()],
        ),
        _explanations(metric, run.get("metrics_note") or {}),
    ]
    drawn = {name: method for name, method in methods.items() if _has_numbers(method.get("matrix"))}
    if drawn:
        out += _matrix_sections(tasks, drawn, metric)
    out += _routing_section(tasks, run.get("routing") or {})
    out += _requests_section(run.get("requests") or [])
    if run.get("settings"):
        out += ["<h3>Settings</h3>", _pairs(run["settings"])]
    if run.get("notes"):
        notes = "".join(f"<li>{html.escape(str(note))}</li>" for note in run["notes"])
        out += ["<h3>Notes</h3>", f"<ul>{notes}</ul>"]
    return out


def _explanations(metric: str, notes: dict[str, str]) -> str:
    lines = [f"{metric.capitalize()} and its differences in percent; seconds are wall clock."]
    lines += [f"{name.replace('_', ' ')}: {note}" for name, note in notes.items()]
    return f'<p class="quiet">{"<br>".join(map(html.escape, lines))}</p>'


def _has_numbers(matrix: list[list[float | None]] | None) -> bool:
    return bool(matrix) and any(value is not None for row in matrix for value in row)


def _tiles(methods: dict[str, dict], metric: str) -> str:
    tiles = []
    for position, (name, method) in enumerate(methods.items()):
        if method.get("average_accuracy") is not None:
            tiles.append(
                f'<div class="tile" style="border-left-color:{COLOURS[position % 7]}">'
                f"{html.escape(str(method.get('label', name)))}<b>{_percent(method['average_accuracy'])}%</b>"
                f'<span class="quiet">average {html.escape(metric)}, '
                f"forgetting {_percent(method.get('forgetting'))}</span></div>"
            )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _matrix_sections(tasks: list[str], methods: dict[str, dict], metric: str) -> list[str]:
    labels = [method.get("label", name) for name, method in methods.items()]
    curves = [seen_averages(method["matrix"]) for method in methods.values()]
    out = ["<h3>As the tasks are learnt</h3>"]
    rows = [[task, *(_percent(curve[stage]) for curve in curves)] for stage, task in enumerate(tasks)]
    picture = _picture(lambda: _draw_curves(tasks, methods), "average score after each task")
    out.append(_side(picture, _table(["after learning", *labels], rows, dense=len(tasks) > 8)))
    drops = [forgetting_per_task(method["matrix"]) for method in methods.values()]
    if any(drop is not None for per_task in drops for drop in per_task):
        rows = [[task, *(_percent(drop[i]) for drop in drops)] for i, task in enumerate(tasks[:-1])]
        rows.append(["mean", *(_percent(_mean(drop)) for drop in drops)])
        picture = _picture(lambda: _draw_forgetting(tasks, methods), "forgetting per task")
        out += ["<h3>Forgetting</h3>", _side(picture, _table(["task", *labels], rows, dense=len(tasks) > 8))]
    out += [
        f"<h3>{html.escape(metric.capitalize())} on every task after every stage</h3>",
        _picture(lambda: _draw_matrices(tasks, methods), "score matrices"),
    ]
    for label, method in zip(labels, methods.values(), strict=True):
        rows = [[task, *map(_percent, row)] for task, row in zip(tasks, method["matrix"], strict=True)]
        out += [
            f"<h4>{html.escape(str(label))}</h4>",
            _table(["after learning", *tasks], rows, dense=len(tasks) > 5),
        ]
    return out


def _routing_section(tasks: list[str], routing: dict) -> list[str]:
    out: list[str] = []
    if routing.get("accuracy"):
        rows = [[name, _percent(value)] for name, value in routing["accuracy"].items()]
        out.append(_table(["routing accuracy", "%"], rows))
    for field, title, x in (
        ("confusion", "True task and the task that gets the largest weight", "task with the largest weight"),
        ("mass", "Where the routing weight goes", "pool entry"),
    ):
        values = routing.get(field)
        if not values or len(values) != len(tasks):
            continue
        width = len(values[0])
        names = [str(name) for name in routing.get("entry_names") or ()] if field == "mass" else tasks
        if len(names) != width:
            names = tasks if width == len(tasks) else [str(i) for i in range(width)]
        picture = _picture(lambda v=values, n=names, x=x: _draw_heat_map(tasks, n, v, x, "true task"), title)
        if width <= 16:
            rows = [[task, *map(_percent, row)] for task, row in zip(tasks, values, strict=True)]
            table = _table(["true task", *names], rows, dense=width > 5)
        else:
            rows = [[task, _largest(names, row)] for task, row in zip(tasks, values, strict=True)]
            table = _table(["true task", "largest weights, %"], rows, text=True)
        out += [f"<h4>{title}, % of the true task's rows</h4>", picture, table]
    return ["<h3>Routing</h3>", *out] if out else []


def _largest(names: list[str], row: list[float | None], count: int = 4) -> str:
    ranked = sorted(zip(row, names, strict=True), key=lambda pair: -(pair[0] or 0))
    return ", ".join(f"{name} {_percent(value)}" for value, name in ranked[:count] if value)


def _requests_section(requests: list[dict]) -> list[str]:
    if not requests:
        return []
    rows = []
    for request in requests:
        answer, expected = request.get("answer"), request.get("expected")
        verdict = ""
        if expected is not None:
            right = " ".join(str(answer).lower().split()) == " ".join(str(expected).lower().split())
            verdict = "right" if right else "wrong"
        entries = "".join(map(_entry, (request.get("routing") or [])[:6]))
        cells = [
            f'<td class="request">{html.escape(_short(str(request.get("text", "")), 400))}</td>',
            f"<td>{html.escape(str(request.get('task') or MISSING))}</td>",
            f'<td class="{verdict}">{html.escape(_short(str(answer), 300))}</td>',
            f"<td>{MISSING if expected is None else html.escape(_short(str(expected), 300))}</td>",
            f"<td>{entries or 'base model'}</td>",
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    titles = ("request", "task", "answer", "expected", "entries and weights")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return [
        "<h3>One batch of mixed requests</h3>",
        f'<div class="scroll"><table class="text"><tr>{head}</tr>{"".join(rows)}</table></div>',
    ]


def _entry(entry: dict) -> str:
    weight = entry.get("weight") or 0.0
    score = "" if entry.get("score") is None else f"score {entry['score']:.3f}"
    name = html.escape(str(entry.get("entry", "")))
    return (
        f'<div class="entry" title="{name} {score}"><span>{name}</span><span class="bar">'
        f'<i style="width:{100 * min(max(weight, 0), 1):.1f}%"></i></span><span>{weight:.2f}</span></div>'
    )


def _side(picture: str, table: str) -> str:
    return f'<div class="side"><div>{picture}</div><div>{table}</div></div>'


def _pairs(values: dict) -> str:
    rows = [
        [name, json.dumps(v) if isinstance(v, (dict, list)) else _number(v)] for name, v in values.items()
    ]
    return _table(["", ""], rows, text=True)


def _table(header: list[str], rows: list[list[str]], *, dense: bool = False, text: bool = False) -> str:
    classes = " ".join(name for name, wanted in (("dense", dense), ("text", text)) if wanted)
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    head = f"<tr>{head}</tr>" if any(header) else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="{classes}">{head}{body}</table></div>'
