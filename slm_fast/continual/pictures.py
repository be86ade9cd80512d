"""The pictures of a report: accuracy matrices, curves, forgetting and heat maps, as SVG inside the page."""

import base64
import html
import io
import math
import textwrap

from slm_fast.continual.tables import forgetting_per_task, percent, seen_averages

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", "-", "--", "-.")
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


def new_figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def svg_picture(draw, alt: str) -> str:
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


def short(name: str, width: int = 22) -> str:
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
    axes.set_xticks([i + 0.5 for i in shown], [short(columns[i]) for i in shown], fontsize=8)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], map(short, rows), fontsize=8)
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
                axes.text(j + 0.5, i + 0.5, percent(value, digits), ha="center", va="center", **style)


def draw_matrices(tasks: list[str], methods: dict[str, dict]):
    per_row = min(len(methods), 3 if len(tasks) <= 6 else 2 if len(tasks) <= 15 else 1)
    lines = -(-len(methods) // per_row)
    panel = 11 / per_row if len(tasks) > 15 else 11 / max(per_row, 2)
    cell = 72 * (panel - 1.4) / len(tasks)
    figure = new_figure(panel * per_row, (0.9 * panel + 0.4) * lines)
    for position, (name, method) in enumerate(methods.items(), 1):
        axes = figure.add_subplot(lines, per_row, position)
        _heat_map(axes, tasks, tasks, method["matrix"], cell)
        axes.set_title(textwrap.fill(method.get("label", name), int(8 * panel)), loc="left")
        axes.set_xlabel("tested on")
        if position % per_row == 1 or per_row == 1:
            axes.set_ylabel("after learning")
    return figure


def draw_curves(tasks: list[str], methods: dict[str, dict]):
    figure = new_figure(6.4, 3.9)
    axes = figure.add_subplot()
    for position, (name, method) in enumerate(methods.items()):
        averages = seen_averages(method["matrix"])
        stages = [stage for stage, value in enumerate(averages) if value is not None]
        look = (
            position + position // 7
        ) % 7  # an eighth method has the first one's colour, but not its marker
        style = {"color": COLOURS[position % 7], "marker": MARKERS[look], "ls": DASHES[look]}
        percents = [100 * averages[stage] for stage in stages]
        axes.plot(stages, percents, label=method.get("label", name), lw=1.8, ms=5, **style)
    _label_tasks(axes, tasks)
    axes.set_ylabel("average over the tasks so far, %")
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, low - 3), min(101, high + 3))
    _frame(figure, axes)
    return figure


def draw_forgetting(tasks: list[str], methods: dict[str, dict]):
    figure = new_figure(6.4, 3.9)
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


def draw_cost(cost: dict):
    """Two bars of stacked parts: milliseconds of an answer beside the frozen model's, and bytes of a task."""
    figure = new_figure(6.4, 2.8)
    times, sizes = figure.subplots(1, 2)
    milliseconds = dict(cost["milliseconds"])
    frozen = milliseconds.pop("answer of the frozen model")
    _stack(times, "with its mixture", milliseconds)
    times.bar("frozen model", frozen, color=COLOURS[6], label="answer of the frozen model")
    times.set(ylabel="milliseconds", title="one text, to its label or first token")
    of_a_task = {what: value / 1e6 for what, value in cost["bytes"].items() if what.endswith(" of a task")}
    _stack(sizes, "a task", {what.removesuffix(" of a task"): value for what, value in of_a_task.items()})
    sizes.set(ylabel="MB", title="kept of a task", xlim=(-1, 1))
    for axes in (times, sizes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e7eb", lw=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=7)
    return figure


def _stack(axes, place: str, parts: dict[str, float]) -> None:
    bottom = 0.0
    for position, (what, value) in enumerate(parts.items()):
        axes.bar(place, value, bottom=bottom, color=COLOURS[position % 7], label=what)
        bottom += value


def _label_tasks(axes, tasks: list[str]) -> None:
    axes.set_xticks(range(len(tasks)), map(short, tasks), fontsize=9 if len(tasks) <= 8 else 7)
    if len(tasks) > 5 or max(map(len, tasks)) > 12:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")


def _frame(figure, axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e7eb", lw=0.8)
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)


def draw_heat_map(rows: list[str], columns: list[str], values: list[list[float | None]], x: str, y: str):
    width = min(11.0, max(5.4, 0.42 * len(columns) + 1.6))
    figure = new_figure(width, min(9.0, max(2.6, 0.36 * len(rows) + 1.7)))
    axes = figure.add_subplot()
    top = max((value for row in values for value in row if value is not None), default=0) or 1
    mesh = _heat_map(axes, rows, columns, values, 72 * (width - 1.8) / len(columns), top)
    if mesh is not None:
        figure.colorbar(
            mesh, ax=axes, shrink=0.6, format=lambda share, _: f"{100 * share:.0f}%"
        ).outline.set_visible(False)
    axes.set(xlabel=x, ylabel=y)
    return figure
