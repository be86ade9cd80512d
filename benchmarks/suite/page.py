"""The suite's result as a page with plots: cost against batch, rank, pool size and length, with the floor.

A floor is what the measured ceilings allow: the longer of bytes over read (or copy) bandwidth and operations
over the product's rate. Every plot is also a PNG of its own.
"""

import html
from pathlib import Path

from slm_fast.continual.page import CSS
from slm_fast.continual.pictures import COLOURS, DASHES, MARKERS, STYLE, new_figure, svg_picture
from slm_fast.continual.tables import html_table
from suite import machine
from suite.search import growth

# (file name, title, section, the varying axis, its words, what the records must have)
PLOTS = (
    (
        "search_keys",
        "Key search, one query",
        "search",
        "keys",
        "keys",
        {"queries": 1, "cache": "hot", "dim": 384},
    ),
    ("search_keys_16", "Key search, 16 queries", "search", "keys", "keys", {"queries": 16, "cache": "hot"}),
    ("search_queries", "Key search, 100,000 keys", "search", "queries", "queries", {"keys": 100_000}),
    (
        "mixture_rows",
        "Mixture, decoding",
        "mixture",
        "rows",
        "rows of a batch",
        {"kind": "update", "length": 1, "rank": 8, "top_k": 2, "popularity": "distinct"},
    ),
    (
        "mixture_rank",
        "Mixture, decoding 8 rows",
        "mixture",
        "rank",
        "rank",
        {"kind": "update", "length": 1, "rows": 8, "top_k": 2, "popularity": "distinct"},
    ),
    (
        "mixture_length",
        "Mixture, 8 rows",
        "mixture",
        "length",
        "tokens of a row",
        {"kind": "update", "rows": 8, "rank": 8, "top_k": 2, "popularity": "distinct"},
    ),
    (
        "mixture_pool",
        "Mixture, the same picks",
        "mixture",
        "entries",
        "entries of the pool",
        {"kind": "pool"},
    ),
    ("decode_rows", "Decoding, SmolLM2-135M", "model", "rows", "rows", {"kind": "decode", "model": "smol"}),
    ("decode_rows_7b", "Decoding, 7B's shape", "model", "rows", "rows", {"kind": "decode", "model": "7b"}),
    (
        "prefill_tokens",
        "Prefill, 8 rows, SmolLM2-135M",
        "model",
        "tokens",
        "tokens of a row",
        {"kind": "prefill", "model": "smol", "rows": 8},
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


def chosen(results: list[dict], section: str, axis: str, having: dict) -> list[dict]:
    """The records of a plot in the order of its axis."""
    results = results + of_pools(results)
    found = [r for r in results if r["section"] == section and axis in r["axes"]]
    found = [r for r in found if all(r["axes"].get(key) == value for key, value in having.items())]
    return sorted(found, key=lambda record: record["axes"][axis])


def floor(record: dict, ceilings: dict) -> float | None:
    """Seconds."""
    if record["bytes"] is None:
        return None
    rate = max(ceilings["operations_per_second"].values())
    return max(record["bytes"] / machine.bandwidth(ceilings), (record["operations"] or 0) / rate)


def draw(records: list[dict], axis: str, words: str, title: str, ceilings: dict):
    """A figure: medians with their quantiles, both axes logarithmic, and the floor as a grey line."""
    figure = new_figure(6.4, 3.9)
    axes = figure.subplots()
    names = list(dict.fromkeys(name for record in records for name in record["contenders"]))
    for i, name in enumerate(names):
        points = [(r["axes"][axis], r["contenders"].get(name, {})) for r in records]
        points = [(x, found) for x, found in points if "seconds" in found]
        if not points:
            continue
        x, y = [x for x, _ in points], [1e3 * found["seconds"] for _, found in points]
        spread = [[1e3 * (f["seconds"] - f["low"]) for _, f in points]]
        spread.append([1e3 * (f["high"] - f["seconds"]) for _, f in points])
        style = dict(color=COLOURS[i % 7], marker=MARKERS[i % 7], linestyle=DASHES[i % 7], markersize=4)
        axes.errorbar(x, y, yerr=spread, label=name, linewidth=1.4, capsize=2, **style)
    floors = [(r["axes"][axis], floor(r, ceilings)) for r in records]
    floors = [(x, 1e3 * value) for x, value in floors if value is not None]
    if floors:
        axes.plot(
            *zip(*floors, strict=True), color="#8a94a0", linewidth=3, alpha=0.5, label="floor", zorder=0
        )
    axes.set(xscale="log", yscale="log", xlabel=words, ylabel="milliseconds", title=title)
    values = [r["axes"][axis] for r in records]
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.minorticks_off()
    axes.grid(color="#e3e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def table(records: list[dict], ceilings: dict) -> str:
    header = ["case", "contender", "median", "20% to 80%", "times ours", "also"]
    rows = []
    for record in records:
        for name, found in record["contenders"].items():
            row = [record["case"] if name == next(iter(record["contenders"])) else "", name]
            if "error" in found:
                rows.append([*row, "", "", "", found["error"]])
                continue
            also = [
                f"{key.replace('_', ' ')} {value:,.3g}"
                for key, value in found.items()
                if key in ALSO and value is not None
            ]
            row += [milliseconds(found.get("seconds"))]
            row += [
                f"{milliseconds(found['low'])} to {milliseconds(found['high'])}" if "low" in found else ""
            ]
            row += [f"{found['ratio']:.2f}" if "ratio" in found else "", ", ".join(also)]
            rows.append(row)
    return html_table(header, rows)


ALSO = ("recall", "tokens_per_second", "memory_bytes", "first_token_50", "first_token_95", "per_token_50")
ALSO += ("per_token_95", "average", "forgetting", "routing")


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.3g} ms"


def write(result: dict, folder: Path) -> Path:
    """Write `suite.html` and the plots; the page's path. Without matplotlib the page has tables alone."""
    ceilings, results = result["ceilings"], result["results"]
    body = [f"<h1>slm_fast benchmark{', quick' if result['quick'] else ''}</h1>"]
    body += [f'<p class="quiet">{html.escape(machine.line(result["machine"], ceilings))}</p>']
    body += [
        f'<p class="quiet">{html.escape(result["created"])}. Medians with 20% and 80% quantiles; ratios '
        "to ours, pair by pair; the floor is what the measured bandwidth and products allow.</p>"
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
                f"{line['bytes_per_second'] / 1e9:.1f} GB/s of what it reads.</p>"
            )
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
    for name, title, of, axis, words, having in PLOTS:
        records = chosen(results, section, axis, having) if of == section else []
        if len({record["axes"][axis] for record in records}) < 2:
            continue
        with matplotlib.rc_context(STYLE):
            figure = draw(records, axis, words, title, ceilings)
            figure.savefig(folder / f"{name}.png", dpi=160)
        found.append(svg_picture(lambda figure=figure: figure, title))
    return found
