"""docs/scaling.md: what the scaling model answers, with its plot and its check."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from roofline import DEVICES
from scaling import SHAPES, TOLERANCE, Checked, Machine, Pool, tasks_that_fit
from units import amount, duration

from slm_fast.continual.pictures import new_figure

DOCS = Path(__file__).parents[1] / "docs"
GB = 1e9
LINK = 64e9  # bytes/s between host and card, PCIe 5 x16 by its standard
SIZES = (100, 1000, 10_000, 100_000, 1_000_000)


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
    words = "Slabs and slots double when they are full, so a pool may hold up to twice its factors and keys."
    return ["## What an entry and a task take", "", words, "", *table(header, rows)]


def fit_section() -> list[str]:
    rows = []
    for key, memory, where in (
        ("smol", 24e9 - 0.3e9, "one host of 24 GB, the base beside"),
        ("llama7b", 80e9 - 13.5e9 - 8e9, "one card of 80 GB, base and 8 GB of cache beside"),
        ("llama7b", 1e12, "one host of 1 TB, entries in use in slots of its card"),
        ("llama7b", 16e12, "16 such hosts"),
        ("llama70b", 16e12, "16 such hosts"),
    ):
        count = tasks_that_fit(SHAPES[key], memory, Pool(4))
        rows.append([SHAPES[key].name, where, f"{count:,}", f"{4 * count:,}"])
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


def fleet_section() -> list[str]:
    shape, rows = SHAPES["llama7b"], []
    for entries in SIZES:
        pool, host = Pool(entries), 0.9e12
        hosts = max(1, math.ceil(pool.memory(shape) / host))
        scanned = entries / hosts * pool.dim * 2
        rows.append([f"{entries:,}", str(hosts), amount(pool.index), duration(scanned / DEVICES["H100"].hbm)])
    text = """## A fleet

Tasks are split over hosts, a task's entries stay together: a row is answered where its task is. Keys are
split with them; a query goes to every host and the best of their answers is taken. Hosts of 1 TB (0.9 used)
with one H100; the search is its floor at the datasheet's bandwidth, bf16 keys; nothing here was measured.
"""
    header = ["entries", "hosts for LLaMA-2-7B", "keys in all", "floor of a search on its host's card"]
    return [*text.splitlines(), "", *table(header, rows)]


def check_section(machine: Machine, checked: Sequence[Checked]) -> list[str]:
    rows = []
    for phase in dict.fromkeys(c.point.phase for c in checked):
        found = [c for c in checked if c.point.phase == phase]
        errors, within = [abs(c.error) for c in found], sum(c.within for c in found)
        median, worst = f"{statistics.median(errors):.0%}", f"{max(errors):.0%}"
        rows.append([phase, str(len(found)), median, worst, f"{within} of {len(found)}"])
    header = ["phase", "points", "median error", "largest", f"within {TOLERANCE:.0%}"]
    words = f"Every measured point of {machine.name}, predicted from the others of its phase."
    return ["## The check", "", words, "", *table(header, rows)]


def draw(machine: Machine, path: Path) -> None:
    """Search, adding a task and memory against the pool's size."""
    figure = new_figure(9.6, 3.8)
    left, right = figure.subplots(1, 2)
    sizes = [round(10 ** (power / 4)) for power in range(8, 25)]
    pools = [Pool(size) for size in sizes]
    left.plot(
        sizes, [1e3 * machine.search(pool) for pool in pools], color="#0072B2", label="search, one query"
    )
    left.plot(sizes, [1e3 * machine.add(pool) for pool in pools], color="#D55E00", label="adding a task")
    left.set(
        xscale="log", yscale="log", xlabel="entries", ylabel="milliseconds", title="2,688-wide queries, CPU"
    )
    for shape, colour in ((SHAPES["smol"], "#009E73"), (SHAPES["llama7b"], "#CC79A7")):
        memory = [pool.memory(shape) / GB for pool in pools]
        right.plot(sizes, memory, color=colour, label=f"{shape.name}: all")
    right.plot(sizes, [p.statistics / GB for p in pools], color="#555555", linestyle="--", label="statistics")
    right.plot(sizes, [p.index / GB for p in pools], color="#E69F00", linestyle=":", label="keys")
    for size, words in ((24, "24 GB"), (1000, "1 TB host"), (16_000, "16 hosts")):
        right.axhline(size, color="#c8ced4", linewidth=1)
        right.text(sizes[0], size * 1.1, words, fontsize=7, color="#5a6672")
    right.set(
        xscale="log", yscale="log", xlabel="entries", ylabel="GB", title="Memory, rank 8, all linears, bf16"
    )
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(color="#e3e7eb", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140, metadata={"Software": None})


def document(machine: Machine, checked: Sequence[Checked], command: str) -> str:
    head = f"""# How it scales

Written by `{command}`: bytes and operations
are counted from shapes, a machine's few constants a phase are fitted to its suite result, in seconds at the
pace that memory and arithmetic had while a case was measured. The formulas are in `benchmarks/scaling.py`.

![time and memory against the number of entries](scaling.png)
"""
    lines = [*head.splitlines(), "", *costs_section(), *fit_section(), *adapter_section(machine)]
    return "\n".join([*lines, *fleet_section(), *check_section(machine, checked)]).rstrip() + "\n"


def write(machine: Machine, checked: Sequence[Checked], command: str) -> None:
    """The page and its plot, for a machine."""
    (DOCS / "scaling.md").write_text(document(machine, checked, command), encoding="utf8")
    draw(machine, DOCS / "scaling.png")
