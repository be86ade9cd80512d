"""docs/scaling.md: what the scaling model answers, with its plot and its check."""

import difflib
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from roofline import DEVICES
from scaling import RESULTS, TOLERANCE, Checked, Kept, Machine, check, load
from scaling_ask import Card, card_cases
from scaling_features import ADD, SEARCH, TRAINING
from scaling_shapes import LEARNT_BYTES, SHAPES, Batch, Pool, tasks_that_fit
from units import amount, duration

from slm_fast.continual.pictures import new_figure

DOCS = Path(__file__).parents[1] / "docs"
GB = 1e9
LINK = 64e9  # bytes/s between host and card, PCIe 5 x16 by its standard
SIZES = (100, 1000, 10_000, 100_000, 1_000_000)
HOST = 0.9e12  # bytes of a host of 1 TB that are used
PER_TASK = 4  # entries
CACHED = 8 * 2048  # tokens: 8 rows of 2,048


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def costs_section() -> list[str]:
    rows = []
    for key in ("minilm", "smol", "llama7b", "llama70b"):
        shape, task = SHAPES[key], Pool(4)
        factors, keys = task.of_an_entry(shape)
        own = task.statistics - 4 * task.dim**2
        cells = [factors, keys, 4 * factors, own, 4 * (factors + keys) + own]
        rows.append([shape.name, *(amount(size) for size in cells)])
    header = ["rank 8, all linears, bf16", "factors of an entry", "its keys", "factors of a task of 4"]
    header += ["its statistics", "a task in all"]
    label = amount(Pool(4).of_a_label)
    words = f"""Slabs and slots double when they are full, so a pool may hold up to twice its factors and
keys. A task that is found by its labels (`label_keys`) takes {label} more for each; a label is searched as
an entry is, which the times below do not count."""
    return ["## What an entry and a task take", "", words, "", *table(header, rows)]


def fit_section() -> list[str]:
    rows, smol, llama = [], SHAPES["smol"], SHAPES["llama7b"]
    cache = llama.cache(CACHED, 2)
    beside = f"base and {amount(cache)} of keys and values (8 rows of 2,048 tokens) beside"
    for key, memory, where in (
        ("smol", 24e9 - 2 * smol.numbers, "one host of 24 GB, the base beside"),
        ("llama7b", 80e9 - 2 * llama.numbers - cache, f"one card of 80 GB, {beside}"),
    ):
        count = tasks_that_fit(SHAPES[key], memory, Pool(PER_TASK))
        rows.append([SHAPES[key].name, where, f"{count:,}", f"{PER_TASK * count:,}"])
    for key, hosts, where in (
        ("llama7b", 1, "one host of 1 TB (0.9 used), entries in use in slots of its card"),
        ("llama7b", 16, "16 such hosts"),
        ("llama70b", 16, "16 such hosts"),
    ):
        count = hosts * entries_of_a_host(key)
        rows.append([SHAPES[key].name, where, f"{count // PER_TASK:,}", f"{count:,}"])
    words = "Tasks of 4 entries, with factors, keys, statistics and what doubling leaves free: powers of two."
    return ["## How many tasks fit", "", words, "", *table(["base", "memory", "tasks", "entries"], rows)]


def adapter_section(machine: Machine) -> list[str]:
    shape, rows = SHAPES["llama7b"], []
    for entries in SIZES:
        pool = Pool(entries)
        cells = [f"{entries:,}", amount(pool.factors(shape)), amount(pool.index), amount(pool.statistics)]
        rows.append([*cells, duration(machine.search(pool)), duration(machine.add(pool))])
    header = ["entries", "factors, LLaMA-2-7B", "keys", "statistics", "search, one query", "adding a task"]
    pool = Pool(10_000)
    copied, keys = pool.of_an_entry(shape)
    more = machine.search(pool) - machine.search(Pool(9_999))
    text = f"""## What the 10,000th adapter costs

Of LLaMA-2-7B, rank 8 on all linears: {amount(copied)} of factors, {amount(keys)} of keys, a
quarter of a task's {amount(Pool(4).statistics - 4 * pool.dim**2)} of statistics; {duration(more)} more for
every search and {duration(machine.add(pool))} once, when its task is added. A decoding step costs what the
entries of its batch cost, whatever the pool's size; an entry that is not in a slot of the card is copied
there first: {duration(copied / LINK)} at {LINK / GB:.0f} GB/s.

Times are predictions for {machine.name}; beyond the measured sizes they are extrapolated.
"""
    return [*text.splitlines(), "", *table(header, rows)]


def entries_of_a_host(key: str) -> int:
    """The most that fit one host of a fleet, whose slabs and slots double by themselves."""
    return PER_TASK * tasks_that_fit(SHAPES[key], HOST, Pool(PER_TASK))


def fleet(entries: int, key: str = "llama7b") -> int:
    """Hosts that hold so many entries."""
    return math.ceil(entries / entries_of_a_host(key))


def batch_section() -> list[str]:
    shape, pool, batch = SHAPES["llama7b"], Pool(10_000), Batch(8, 512, 128, 4, 32)
    rows = [
        [
            phase.name,
            amount(phase.count.bytes),
            f"{phase.count.operations:.3g}",
            "-" if phase.seconds is None else duration(phase.seconds),
            phase.note,
        ]
        for phase in Card("H100", "bf16").phases(shape, pool, batch)
    ]
    learnt = LEARNT_BYTES * pool.learnt(shape)
    text = f"""## What a batch costs

8 rows of 512 tokens, then 128 new ones each, 4 of 10,000 entries a row, LLaMA-2-7B in bf16 on an H100: floors
by its datasheet, which no kernel reaches. The decoding step is the last one; the training step learns one
task with the same batch, and keeps {amount(learnt)} of factors, gradients and moments.
`python benchmarks/scaling.py ask` answers for other models, pools, batches, cards, and for measured machines.
"""
    return [*text.splitlines(), "", *table(["phase", "bytes", "operations", "time", "note"], rows)]


def fleet_section() -> list[str]:
    rows = []
    for entries in SIZES:
        pool, hosts = Pool(entries), fleet(entries)
        scanned = entries / hosts * pool.dim * 2
        rows.append([f"{entries:,}", str(hosts), amount(pool.index), duration(scanned / DEVICES["H100"].hbm)])
    text = """## A fleet

Tasks are split over hosts, a task's entries stay together: a row is answered where its task is. Keys are
split with them; a query goes to every host and the best of their answers is taken. Hosts of 1 TB (0.9 used)
with one H100; each holds the entries that fit it with what doubling leaves free. The search is its floor at
the datasheet's bandwidth, bf16 keys; nothing here was measured.
"""
    header = ["entries", "hosts for LLaMA-2-7B", "keys in all", "floor of a search on its host's card"]
    return [*text.splitlines(), "", *table(header, rows)]


def limits_section(machine: Machine, missing: dict[str, int]) -> list[str]:
    """What the check does not say. missing: timed cases without a point, by section."""
    lines = []
    if missing:
        parts = [f"{section} ({count})" for section, count in missing.items()]
        lines.append(f"Timed cases that are not modelled: {', '.join(parts)}.")
    if "serve" in missing:
        lines += ["Requests under load wait for each other, and nothing here predicts a queue."]
    lines += ["Of a first token the tokenizer and the search are left out, and so are all peers."]
    steps = [p for p in machine.measured if p.phase == TRAINING]
    sizes = {(p.axes["model"], p.axes["rows"], p.axes["tokens"]) for p in steps}
    if len(sizes) == 1:
        lines += [
            f"The training step's points ({len(steps)}) are all of one model and one size: that they predict"
        ]
        lines += ["each other does not say how the time grows."]
    return [*lines, ""]


def check_section(
    machine: Machine, checked: Sequence[Checked], kept: Sequence[Kept], missing: dict[str, int]
) -> list[str]:
    rows, apart = [], check(machine.measured, whole=True)
    for phase in dict.fromkeys(c.point.phase for c in checked):
        found = [c for c in checked if c.point.phase == phase]
        errors, within = [abs(c.error) for c in found], sum(c.within for c in found)
        median, worst = f"{statistics.median(errors):.0%}", f"{max(errors):.0%}"
        strict = sum(c.within for c in apart if c.point.phase == phase)
        rows.append([phase, str(len(found)), median, worst, f"{within} of {len(found)}", str(strict)])
    within, strict = (sum(c.within for c in found) for found in (checked, apart))
    rows.append(["all", str(len(checked)), "", "", f"{within} of {len(checked)}", str(strict)])
    header = ["phase", "points", "median error", "largest", f"within {TOLERANCE:.0%}", "case left out"]
    words = f"""Every modelled point of {machine.name}, predicted from the others of its phase. A model's
case gives two points, pool on and off, a linear's too, with a mixture and frozen; in the last column no point
of a case has another of it to learn from. Encoders are prefills of their model. Training steps are also of
`benchmarks/bench_training.py`, on as many cores and threads with these instructions; they have no pace of
their own and count at the usual one."""
    lines = ["## The check", "", *words.splitlines(), "", *table(header, rows)]
    counts = {phase: sum(p.phase == phase for p in machine.measured) for phase in machine.constants}
    few = [f"{phase} ({count})" for phase, count in counts.items() if count < 3]
    if few:
        lines += [f"Unchecked, with fewer than three points: {', '.join(few)}.", ""]
    lines += limits_section(machine, missing)
    rows = [[k.name, amount(k.measured), amount(k.predicted), f"{k.error:+.1%}"] for k in kept]
    words = """Memory, counted from shapes: the pool's factors against those of a real pool, and against all
that is resident above the frozen model, by `benchmarks/bench_memory.py` and the suite. What lies there beside
the factors, buffers of the engine, is not counted. A decoding step's peak is its keys and values, which
transformers' cache copies, and its logits; peaks below 4 MB say nothing, those of other calls are
activations, which are not counted."""
    return [*lines, *words.splitlines(), "", *table(["memory", "measured", "counted", "error"], rows)]


def card_section(name: str = "H100", file: str = "nvidia_h100_80gb_hbm3.json") -> list[str]:
    """What a card took for whole models, over the floors of its datasheet."""
    suite, card, rows = load(RESULTS / file)["suite"], Card(name, "bf16"), []
    for _, case, count, seconds in card_cases(suite):
        floor = card.floor(count)
        rows.append([case, duration(seconds), duration(floor), f"{seconds / floor:.2f}"])
    words = f"""Measured on {suite["machine"]["card"]}, every row its own mixture of two; floors are the
datasheet's. `scaling.py ask --suite` takes `benchmarks/results/{file}` too: floors by what the card
reached in it, times what these cases took over theirs."""
    header = ["case", "measured", "floor", "measured / floor"]
    return ["## A card against its floors", "", *words.splitlines(), "", *table(header, rows)]


def panel(axes, title: str, y_label: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="entries", ylabel=y_label, title=title)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(color="#e3e7eb", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw_times(axes, machine: Machine, sizes: Sequence[int]) -> None:
    """Predicted for a machine at its usual pace, with the measured points."""
    for dim, colour, dash in ((384, "#0072B2", "-"), (2688, "#56B4E9", "--")):
        times = [1e3 * machine.search(Pool(size, dim=dim)) for size in sizes]
        axes.plot(sizes, times, color=colour, linestyle=dash, label=f"search, one query of {dim:,}")
        found = [p for p in machine.measured if p.phase == SEARCH]
        found = [p for p in found if (p.axes["queries"], p.axes["dim"]) == (1, dim)]
        axes.plot([p.axes["keys"] for p in found], [1e3 * p.seconds for p in found], "o", color=colour)
    times = [1e3 * machine.add(Pool(size)) for size in sizes]
    axes.plot(sizes, times, color="#D55E00", label="adding a task, 2,688 wide")
    found = [p for p in machine.measured if p.phase == ADD]
    axes.plot([p.axes["keys"] for p in found], [1e3 * p.seconds for p in found], "o", color="#D55E00")
    panel(axes, "Time on a CPU; points are measured", "milliseconds")


def draw_memory(axes, sizes: Sequence[int]) -> None:
    pools = [Pool(size) for size in sizes]
    for shape, colour in ((SHAPES["smol"], "#009E73"), (SHAPES["llama7b"], "#CC79A7")):
        memory = [pool.memory(shape) / GB for pool in pools]
        axes.plot(sizes, memory, color=colour, label=f"{shape.name}: all")
    axes.plot(sizes, [p.statistics / GB for p in pools], color="#555555", linestyle="--", label="statistics")
    axes.plot(sizes, [p.index / GB for p in pools], color="#E69F00", linestyle=":", label="keys")
    for size, words in ((24, "24 GB"), (1000, "1 TB host"), (16_000, "16 hosts")):
        axes.axhline(size, color="#c8ced4", linewidth=1)
        axes.text(sizes[0], size * 1.1, words, fontsize=7, color="#5a6672")
    panel(axes, "Memory, rank 8, all linears, bf16", "GB")


def draw_fleet(axes, sizes: Sequence[int]) -> None:
    for key, colour in (("smol", "#009E73"), ("llama7b", "#CC79A7"), ("llama70b", "#0072B2")):
        hosts = [fleet(size, key) for size in sizes]
        axes.plot(sizes, hosts, color=colour, drawstyle="steps-post", label=SHAPES[key].name)
    panel(axes, "A fleet: hosts of 1 TB", "hosts")


def draw(machine: Machine, path: Path) -> None:
    """Search, adding a task, memory and hosts against the pool's size."""
    figure = new_figure(13.2, 3.8)
    times, memory, hosts = figure.subplots(1, 3)
    sizes = [round(10 ** (power / 4)) for power in range(8, 25)]
    draw_times(times, machine, sizes)
    draw_memory(memory, sizes)
    draw_fleet(hosts, sizes)
    figure.savefig(path, dpi=140, metadata={"Software": None})


def document(
    machine: Machine,
    checked: Sequence[Checked],
    kept: Sequence[Kept],
    missing: dict[str, int],
    command: str,
) -> str:
    head = f"""# How it scales

Bytes and operations are counted from shapes; a machine's few constants a phase are fitted to its suite
result, in seconds at the pace that memory and arithmetic had while a case was measured. The formulas are in
`benchmarks/scaling_shapes.py` and `benchmarks/scaling_features.py`. This page and its plot are written by

    {command}

![time, memory and hosts against the number of entries](scaling.png)
"""
    lines = [*head.splitlines(), "", *costs_section(), *fit_section(), *adapter_section(machine)]
    lines += [*fleet_section(), *batch_section(), *check_section(machine, checked, kept, missing)]
    lines += card_section()
    return "\n".join(lines).rstrip() + "\n"


def write(machine: Machine, page: str) -> None:
    """The page, and its plot for a machine."""
    (DOCS / "scaling.md").write_text(page, encoding="utf8")
    draw(machine, DOCS / "scaling.png")


def compare(page: str) -> int:
    """Prints how docs/scaling.md differs from what it should be; the exit status."""
    there = (DOCS / "scaling.md").read_text(encoding="utf8")
    changes = difflib.unified_diff(
        there.splitlines(), page.splitlines(), "docs/scaling.md", "wanted", "", "", 0
    )
    print("\n".join([*changes]) or "docs/scaling.md is what the result makes of it")
    return int(there != page)
