"""The report's HTML page: one file with its pictures in it, that loads nothing."""

import html
import json

from slm_fast.continual.pictures import (
    COLOURS,
    draw_cost,
    draw_curves,
    draw_forgetting,
    draw_heat_map,
    draw_matrices,
    short,
    svg_picture,
)
from slm_fast.continual.tables import (
    MISSING,
    Table,
    comparison,
    cost_table,
    definitions,
    forgetting_per_task,
    html_table,
    matrix_table,
    mean,
    mean_over_runs,
    percent,
    percent_table,
    probe_table,
    probe_title,
    repeated_runs,
    seen_averages,
    text_score_table,
)

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


def page(result: dict) -> str:
    title = html.escape(str(result.get("title") or "Continual learning report"))
    created = [str(result["created"])] if result.get("created") else []
    if result.get("seconds") is not None:
        created.append(f"{result['seconds']:,.0f} seconds in all")
    body = [f"<h1>{title}</h1>", f'<p class="quiet">{html.escape(" · ".join(created))}</p>']
    runs = result.get("runs") or []
    if len(runs) > 1:
        body += ["<h3>All runs</h3>", html_table(*_all_runs(runs))]
    for group in repeated_runs(runs):
        names = html.escape(", ".join(run["name"] for run in group))
        body += [
            f"<h3>Mean and standard deviation over {len(group)} runs</h3>",
            f'<p class="quiet">{names}</p>',
            html_table(*comparison(mean_over_runs(group))),
        ]
    for position, run in enumerate(runs):
        body += _run_section(run, first=position == 0)
    if result.get("environment"):
        body += ["<h2>Environment</h2>", _pairs(result["environment"])]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _all_runs(runs: list[dict]) -> Table:
    """A line per run and method."""
    lines = [(run["name"], name, method) for run in runs for name, method in run["methods"].items()]
    header, rows = comparison({str(i): {"label": name} | method for i, (_, name, method) in enumerate(lines)})
    return ["run", *header], [[str(line[0]), *row] for line, row in zip(lines, rows, strict=True)]


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
        html_table(*comparison(methods)),
        _explanations(metric, definitions([run])),
    ]
    drawn = {name: method for name, method in methods.items() if _has_numbers(method.get("matrix"))}
    if drawn:
        out += _matrix_sections(tasks, drawn, metric)
    out += _routing_section(tasks, run.get("routing") or {})
    if run.get("text_scores"):
        out += ["<h3>Long answers</h3>", html_table(*text_score_table(run["text_scores"]))]
    if run.get("cost"):
        picture = svg_picture(lambda: draw_cost(run["cost"]), "what an answer and a task cost")
        out += ["<h3>Cost</h3>", _side(picture, html_table(*cost_table(run["cost"])))]
    if run.get("probes"):
        title = html.escape(probe_title(run["probes"]))
        out += [f"<h3>{title}</h3>", html_table(*probe_table(run["probes"]))]
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
                f"{html.escape(str(method.get('label', name)))}<b>{percent(method['average_accuracy'])}%</b>"
                f'<span class="quiet">average {html.escape(metric)}, '
                f"forgetting {percent(method.get('forgetting'))}</span></div>"
            )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _matrix_sections(tasks: list[str], methods: dict[str, dict], metric: str) -> list[str]:
    labels = [method.get("label", name) for name, method in methods.items()]
    curves = [seen_averages(method["matrix"]) for method in methods.values()]
    out = ["<h3>As the tasks are learnt</h3>"]
    rows = [[task, *(percent(curve[stage]) for curve in curves)] for stage, task in enumerate(tasks)]
    picture = svg_picture(lambda: draw_curves(tasks, methods), "average score after each task")
    out.append(_side(picture, html_table(["after learning", *labels], rows, dense=len(tasks) > 8)))
    drops = [forgetting_per_task(method["matrix"]) for method in methods.values()]
    if any(drop is not None for per_task in drops for drop in per_task):
        rows = [[task, *(percent(drop[i]) for drop in drops)] for i, task in enumerate(tasks[:-1])]
        rows.append(["mean", *(percent(mean(drop)) for drop in drops)])
        picture = svg_picture(lambda: draw_forgetting(tasks, methods), "forgetting per task")
        out += [
            "<h3>Forgetting</h3>",
            _side(picture, html_table(["task", *labels], rows, dense=len(tasks) > 8)),
        ]
    out += [
        f"<h3>{html.escape(metric.capitalize())} on every task after every stage</h3>",
        svg_picture(lambda: draw_matrices(tasks, methods), "score matrices"),
    ]
    for label, method in zip(labels, methods.values(), strict=True):
        table = html_table(*matrix_table(tasks, method["matrix"]), dense=len(tasks) > 5)
        out += [f"<h4>{html.escape(str(label))}</h4>", table]
    return out


def _routing_section(tasks: list[str], routing: dict) -> list[str]:
    out: list[str] = []
    if routing.get("accuracy"):
        rows = [[name, percent(value)] for name, value in routing["accuracy"].items()]
        out.append(html_table(["routing accuracy", "%"], rows))
    if alike := {name: others for name, others in (routing.get("near_duplicates") or {}).items() if others}:
        rows = [[name, ", ".join(others)] for name, others in alike.items()]
        out += [
            "<h4>Tasks whose texts look alike</h4>",
            html_table(["task", "near-duplicates"], rows, text=True),
        ]
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
        picture = svg_picture(
            lambda v=values, n=names, x=x: draw_heat_map(tasks, n, v, x, "true task"), title
        )
        if width <= 16:
            table = html_table(*percent_table("true task", tasks, names, values), dense=width > 5)
        else:
            rows = [[task, _largest(names, row)] for task, row in zip(tasks, values, strict=True)]
            table = html_table(["true task", "largest weights, %"], rows, text=True)
        out += [f"<h4>{title}, % of the true task's rows</h4>", picture, table]
    return ["<h3>Routing</h3>", *out] if out else []


def _largest(names: list[str], row: list[float | None], count: int = 4) -> str:
    ranked = sorted(zip(row, names, strict=True), key=lambda pair: -(pair[0] or 0))
    return ", ".join(f"{name} {percent(value)}" for value, name in ranked[:count] if value)


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
            f'<td class="request">{html.escape(short(str(request.get("text", "")), 400))}</td>',
            f"<td>{html.escape(str(request.get('task') or MISSING))}</td>",
            f'<td class="{verdict}">{html.escape(short(str(answer), 300))}</td>',
            f"<td>{MISSING if expected is None else html.escape(short(str(expected), 300))}</td>",
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
    return html_table(["", ""], rows, text=True)


def _number(value: object) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
