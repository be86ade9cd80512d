"""The suite's result as a page with plots: cost against batch, rank, pool size, length, load, with the floor.

A floor is what the measured ceilings allow: the longer of bytes over read (or copy) bandwidth and operations
over the rate of products in the record's dtype, where that was measured. Every plot is also a PNG of its own.
"""

import html
from pathlib import Path
from typing import NamedTuple

from units import amount

from slm_fast.continual.page import CSS
from slm_fast.continual.pictures import COLOURS, DASHES, MARKERS, STYLE, new_figure, svg_picture
from slm_fast.continual.tables import html_table
from suite import machine
from suite.search import growth


class Plot(NamedTuple):
    """`axis` in `words` is what varies among the section's records that have `having` among their axes."""

    file: str
    title: str
    section: str
    axis: str
    words: str
    having: dict
    values: tuple[str, ...] = ("seconds",)  # of every contender, a line each


UPDATE = {"kind": "update", "rank": 8, "top_k": 2, "popularity": "distinct"}
MODELS = {"smol": "SmolLM2-135M", "7b": "two layers of 7B's shape", "llama-2-7b": "LLaMA-2-7B's shape, GPU"}
ALONE = {"queries": 1, "cache": "hot", "dim": 384}
PLOTS = (
    Plot("search_keys", "Key search, one query", "search", "keys", "keys", ALONE),
    Plot("search_keys_16", "Key search, 16 queries", "search", "keys", "keys", ALONE | {"queries": 16}),
    Plot("search_queries", "Key search, 100,000 keys", "search", "queries", "queries", {"keys": 100_000}),
    Plot("mixture_rows", "Mixture, decoding", "mixture", "rows", "rows of a batch", UPDATE | {"length": 1}),
    Plot(
        "mixture_rank",
        "Mixture, decoding 8 rows",
        "mixture",
        "rank",
        "rank",
        {key: value for key, value in UPDATE.items() if key != "rank"} | {"length": 1, "rows": 8},
    ),
    Plot("mixture_length", "Mixture, 8 rows", "mixture", "length", "tokens of a row", UPDATE | {"rows": 8}),
    Plot("mixture_pool", "Mixture, the same picks", "mixture", "entries", "entries", {"kind": "pool"}),
    *(
        Plot(f"decode_rows_{model}", f"Decoding, {words}", "model", "rows", "rows", having)
        for model, words in MODELS.items()
        for having in ({"kind": "decode", "model": model},)
    ),
    *(
        Plot(f"prefill_tokens_{model}_{rows}", title, "model", "tokens", "tokens of a row", having)
        for model, words in MODELS.items()
        for rows, title in ((1, f"Prefill, 1 row, {words}"), (8, f"Prefill, 8 rows, {words}"))
        for having in ({"kind": "prefill", "model": model, "rows": rows},)
    ),
    Plot(
        "serve_load",
        "Requests that arrive over time: until the first token, 50% and 95%",
        "serve",
        "load",
        "share of the requests that the machine can answer",
        {"arrivals": "poisson"},
        ("first_token_50", "first_token_95"),
    ),
)


def of_pools(results: list[dict]) -> list[dict]:
    """Records of the pools that the contenders of a "flat" case are."""
    found = []
    for record in results:
        if record["axes"].get("kind") == "flat":
            for name, times in record["contenders"].items():
                axes = {"kind": "pool", "entries": int(name.split()[0].replace(",", ""))}
                rows = f"slm_fast, {record['axes']['rows']} rows"
                found.append(record | {"axes": axes, "contenders": {rows: times}})
    return found


def chosen(results: list[dict], plot: Plot) -> list[dict]:
    """The measured records of a plot in the order of its axis."""
    results = results + of_pools(results)
    found = [r for r in results if r["section"] == plot.section and plot.axis in r["axes"]]
    found = [r for r in found if all(r["axes"].get(key) == value for key, value in plot.having.items())]
    found = [r for r in found if any(plot.values[0] in times for times in r["contenders"].values())]
    return sorted(found, key=lambda record: record["axes"][plot.axis])


def floor(record: dict, ceilings: dict) -> float | None:
    """Seconds."""
    if record["bytes"] is None:
        return None
    rate = machine.product_rate(ceilings, machine.dtype_of(record))
    products = (record["operations"] or 0) / rate if rate else 0.0
    return max(record["bytes"] / machine.bandwidth(ceilings), products)


def curve(plot: Plot, records: list[dict], name: str, value: str) -> tuple[list, list, list]:
    """(x, milliseconds, (below, above) of the quantiles) of a contender."""
    points = [(r["axes"][plot.axis], r["contenders"].get(name, {})) for r in records]
    points = [(x, found) for x, found in points if value in found]
    x, y = [x for x, _ in points], [1e3 * found[value] for _, found in points]
    low, high = ("low", "high") if value == "seconds" else (f"{value}_low", f"{value}_high")
    below = [max(0.0, 1e3 * (found[value] - found.get(low, found[value]))) for _, found in points]
    above = [max(0.0, 1e3 * (found.get(high, found[value]) - found[value])) for _, found in points]
    return x, y, [below, above]


def draw(plot: Plot, records: list[dict], ceilings: dict):
    """A figure: medians with their quantiles, both axes logarithmic, and the floor as a grey line."""
    figure = new_figure(6.4, 3.9)
    axes = figure.subplots()
    names = list(dict.fromkeys(name for record in records for name in record["contenders"]))
    for i, name in enumerate(names):
        for j, value in enumerate(plot.values):
            x, y, spread = curve(plot, records, name, value)
            if not x:
                continue
            dash = DASHES[(i if len(plot.values) == 1 else j) % 7]
            label = name if len(plot.values) == 1 else f"{name}, {value.rpartition('_')[2]}%"
            style = dict(color=COLOURS[i % 7], marker=MARKERS[i % 7], linestyle=dash, markersize=4)
            axes.errorbar(x, y, yerr=spread, label=label, linewidth=1.4, capsize=2, **style)
    floors = [(r["axes"][plot.axis], floor(r, ceilings)) for r in records]
    floors = [(x, 1e3 * value) for x, value in floors if value is not None]
    if floors:
        axes.plot(
            *zip(*floors, strict=True), color="#8a94a0", linewidth=3, alpha=0.5, label="floor", zorder=0
        )
    axes.set(xscale="log", yscale="log", xlabel=plot.words, ylabel="milliseconds", title=plot.title)
    values = [r["axes"][plot.axis] for r in records]
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.minorticks_off()
    axes.grid(color="#e3e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def table(records: list[dict], ceilings: dict) -> str:
    header = ["case", "contender", "median", "20% to 80%", "times ours", "reached", "peak memory", "also"]
    rows = []
    for record in records:
        for name, found in record["contenders"].items():
            row = [record["case"] if name == next(iter(record["contenders"])) else "", name]
            if "error" in found:
                rows.append([*row, "", "", "", "", "", found["error"]])
                continue
            ours, peak = name == record["ours"], found.get("peak_bytes")
            also = [
                f"{key.replace('_', ' ')} {value:,.3g}"
                for key, value in found.items()
                if key in ALSO and value is not None
            ]
            if "graph" in found:
                also.append("graph" if found["graph"] else "eager")
            row += [milliseconds(found.get("seconds"))]
            row += [
                f"{milliseconds(found['low'])} to {milliseconds(found['high'])}" if "low" in found else ""
            ]
            row += [f"{found['ratio']:.2f}" if "ratio" in found else ""]
            row += [
                machine.rates_line(record, ceilings) if ours else "",
                "" if peak is None else amount(peak),
            ]
            rows.append([*row, ", ".join(also)])
    return html_table(header, rows)


ALSO = ("recall", "tokens_per_second", "memory_bytes", "first_token_50", "first_token_95", "per_token_50")
ALSO += ("per_token_95", "first_token_seconds", "encoder_seconds", "search_seconds", "tokenizer_seconds")
ALSO += ("prefill_seconds", "average", "forgetting", "routing")


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.3g} ms"


def quick_words(quick: bool | dict[str, bool]) -> str:
    """Which sections were measured in quick mode, if it is not of all together."""
    if isinstance(quick, dict):
        found = [section for section, value in quick.items() if value]
        return f", quick: {', '.join(found)}" if found else ""
    return ", quick" if quick else ""


def write(result: dict, folder: Path) -> Path:
    """Write `suite.html` and the plots; the page's path. Without matplotlib the page has tables alone."""
    ceilings, results = result["ceilings"], result["results"]
    body = [f"<h1>slm_fast benchmark{quick_words(result['quick'])}</h1>"]
    body += [f'<p class="quiet">{html.escape(machine.line(result["machine"], ceilings))}</p>']
    body += [
        f'<p class="quiet">{html.escape(result["created"])}. Medians with 20% and 80% quantiles; ratios '
        "to ours, pair by pair; the floor is what the measured bandwidth and products allow, and what ours "
        "reached is given beside its share of them; peak memory is what a call takes beyond what was there "
        "before.</p>"
    ]
    if result["targets"]:
        header = ["target", "reached", "wanted", "holds"]
        rows = [
            [t["what"], f"{t['reached']:.2f}", t["wanted"], "yes" if t["holds"] else "no"]
            for t in result["targets"]
        ]
        body += ["<h2>Targets</h2>", html_table(header, rows)]
    for section in dict.fromkeys(record["section"] for record in results):
        mine = [record for record in results if record["section"] == section]
        body += [f"<h2>{section}</h2>", *pictures(section, results, ceilings, folder), table(mine, ceilings)]
        if section == "search" and (line := growth(mine)):
            body.append(
                f"<p>From {line['from_keys']:,} to {line['to_keys']:,} keys a query takes "
                f"{1e9 * line['seconds_per_key']:.2f} ns more for each key, "
                f"{line['bytes_per_second'] / 1e9:.1f} GB/s of what it reads"
                + (f"; times are at most {line['residual']:.0%} off that line" if "residual" in line else "")
                + ".</p>"
            )
    for section, reason in result.get("skipped", {}).items():
        body.append(f"<p>{section}: {html.escape(reason)}</p>")
    for section, reason in result["failed"].items():
        body.append(f'<p class="wrong">{section} failed: {html.escape(reason)}</p>')
    text = '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    text += (
        f"<title>slm_fast benchmark</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )
    path = folder / "suite.html"
    path.write_text(text, encoding="utf8")
    return path


def pictures(section: str, results: list[dict], ceilings: dict, folder: Path) -> list[str]:
    """The section's plots as <img>; each also goes to the folder as PNG."""
    try:
        import matplotlib
    except ImportError:
        return ["<p>The plots need matplotlib: pip install 'slm_fast[bench]'</p>"]
    found = []
    for plot in PLOTS:
        records = chosen(results, plot) if plot.section == section else []
        if len({record["axes"][plot.axis] for record in records}) < 2:
            continue
        with matplotlib.rc_context(STYLE):
            figure = draw(plot, records, ceilings)
            figure.savefig(folder / f"{plot.file}.png", dpi=160)
        found.append(svg_picture(lambda figure=figure: figure, plot.title))
    return found
