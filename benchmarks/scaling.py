"""The scaling model: bytes, time and memory of each phase, for a model, a pool, a batch and a machine.

    python benchmarks/scaling.py SUITE.json [MORE.json ...]             errors against every measured point
    python benchmarks/scaling.py SUITE.json [MORE.json ...] --write     also docs/scaling.md and its plot

Bytes and operations are counted from shapes. What a machine makes of them are a few constants a phase,

    seconds = sum_i constant_i * feature_i,    no constant below zero,

fitted to the machine's own suite result with relative errors. Every point is predicted with constants that
were fitted to the other points of its phase, so the printed error is one of prediction. Memory is counted
alone, nothing is fitted. For GPUs, on which nothing was measured, times are datasheet floors (`roofline.py`).
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
from units import duration

TOLERANCE = 0.15
SERIAL_CODES, SERIAL_UPDATE = 1_000_000, 300_000  # multiply-adds below which one thread does it (csrc/cpu)
HIDDEN = 4  # queries whose products hide behind the reads of the codes
SLOT_BYTES = 4 + 4 + 4 + 1 + 8 + 8 + 8  # of a slot: start, rank, scaling, active, two versions, task
STATISTICS_RANK, QUANTILES = 512, 1001  # of a task; `SLMConfig.statistics_rank`, `task_statistics`
CODE_BYTES = 12  # of a key beside its codes: scale and two norms


@dataclass(frozen=True)
class Shape:
    """A model, with its adapted linears. `key_value`: width of k and v. `gated`: gate, up and down, else two
    linears a feed-forward."""

    name: str
    hidden: int
    inter: int
    layers: int
    key_value: int
    vocab: int
    gated: bool = True

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in_features, out_features) of a layer."""
        h, kv, i = self.hidden, self.key_value, self.inter
        feed_forward = [(h, i), (h, i), (i, h)] if self.gated else [(h, i), (i, h)]
        return [(h, h), (h, kv), (h, kv), (h, h), *feed_forward]

    @property
    def features(self) -> int:
        """Numbers of an entry of rank 1: in + out of every linear."""
        return self.layers * sum(i + o for i, o in self.linears)

    @property
    def weights(self) -> int:
        """Of the linears and the head."""
        return self.layers * sum(i * o for i, o in self.linears) + self.vocab * self.hidden


SHAPES = {
    "minilm": Shape("all-MiniLM-L6-v2", 384, 1536, 6, 384, 0, gated=False),
    "smol": Shape("SmolLM2-135M", 576, 1536, 30, 192, 49152),
    "7b": Shape("two layers of LLaMA-2-7B", 4096, 11008, 2, 4096, 32000),
    "llama7b": Shape("LLaMA-2-7B", 4096, 11008, 32, 4096, 32000),
    "llama70b": Shape("LLaMA-2-70B", 8192, 28672, 80, 1024, 32000),
}


def doubled(count: int, first: int) -> int:
    """The room for `count` that doubling from `first` on makes."""
    return first * 2 ** max(0, math.ceil(math.log2(count / first)))


@dataclass(frozen=True)
class Pool:
    """`entries` of rank `rank`, `per_task` of them a task; queries of `dim` numbers; factors of `size` bytes
    a number."""

    entries: int
    rank: int = 8
    per_task: int = 4
    dim: int = 2688  # seven states of MiniLM
    size: int = 2

    @property
    def tasks(self) -> float:
        return self.entries / self.per_task

    def factors(self, shape: Shape) -> int:
        """Bytes of A and B: with the base, or in host memory behind resident slots. Slabs double."""
        return doubled(self.entries, self.per_task) * self.rank * shape.features * self.size

    @property
    def index(self) -> int:
        """Bytes of keys and the slots' numbers, which double, of what is searched, and of its codes: in host
        memory."""
        codes = 32 * math.ceil(self.entries / 32) * (8 * math.ceil(self.dim / 8) + CODE_BYTES)
        kept = doubled(self.entries, 8) * (4 * self.dim + SLOT_BYTES)
        return kept + self.entries * 4 * (self.dim + 1) + codes

    @property
    def statistics(self) -> int:
        """Bytes of the tasks' statistics (as many directions as there are) and of the metric."""
        task = self.dim * (2 * STATISTICS_RANK + 8 + 4) + 4 * QUANTILES
        return round(self.tasks * task + 4 * self.dim**2)

    def of_an_entry(self, shape: Shape) -> tuple[int, int]:
        """(bytes of its factors, of its keys and codes), without room to grow."""
        return self.rank * shape.features * self.size, 9 * self.dim + CODE_BYTES + SLOT_BYTES + 4

    def memory(self, shape: Shape) -> int:
        return self.factors(shape) + self.index + self.statistics


# ---- what a machine's constants are fitted to


@dataclass(frozen=True)
class Point:
    """A measured case: its phase, its features in seconds at the machine's ceilings, and its seconds."""

    phase: str
    name: str
    features: tuple[float, ...]
    seconds: float


def points(result: dict) -> Iterator[Point]:
    """Of a suite result, the cases that the model speaks about."""
    read = result["ceilings"]["read_bytes_per_second"]
    rates = result["ceilings"]["operations_per_second"]
    cache = result["machine"].get("cache_bytes", 32 << 20)
    for record in result["results"]:
        axes, ours = record["axes"], record["contenders"][record["ours"]]
        kind = axes.get("kind")
        if "seconds" not in ours:
            continue
        if record["section"] == "search" and kind is None and axes["cache"] == "hot":
            found = search_features(axes["keys"], axes["dim"], axes["queries"], read, rates["float32"], cache)
            yield Point("search", record["case"], found, ours["seconds"])
        elif kind == "refresh":
            found = refresh_features(axes["keys"], axes["dim"], rates["float32"])
            yield Point("add a task", record["case"], found, ours["seconds"])
        elif kind == "update" and axes["length"] == 1:
            found = update_features(axes["rows"], axes["distinct"], axes["rank"], axes["top_k"], read)
            yield Point("mixture, decoding", record["case"], found, ours["seconds"])
        elif kind == "update":
            work = axes["rows"] * axes["length"] * axes["top_k"] * axes["rank"] * 4 * 576
            yield Point("mixture, prefill", record["case"], (1e-5, work / rates["float32"]), ours["seconds"])
        elif kind == "decode":
            shape = SHAPES[axes["model"]]
            found = decode_features(shape, axes["rows"], axes["distinct"], 8, 2, read, rates["float32"])
            yield Point("decoding", record["case"], found, ours["seconds"])
        elif kind == "prefill":
            work = record["operations"] / rates[axes["dtype"]]
            yield Point("prefill", record["case"], (1e-3, work), ours["seconds"])


def decode_points(result: dict, rate: float) -> Iterator[Point]:
    """Of a result of `bench_decode.py` on the machine of a suite result, whose product rate is `rate`."""
    for record in result["results"]:
        if record["targets"] == "all":
            rows, shape = record["rows"], SHAPES[record["model"]]
            distinct = min(record["entries"], 2 * rows)
            found = decode_features(shape, rows, distinct, 8, 2, result["bytes_per_second"], rate)
            name = f"decode, {record['model']}, {rows} rows, bench_decode"
            yield Point("decoding", name, found, record["milliseconds"]["on"] / 1e3)


def search_features(keys: int, dim: int, queries: int, read: float, rate: float, cache: int) -> tuple:
    """(a call, a query, a block of 32 keys for a query, codes from memory, products by one thread, by all)

    Groups of 16 queries read the codes again. Products of few queries hide behind the reads, and reads behind
    the products of many: the shorter counts nothing.
    """
    size = keys * (dim + CODE_BYTES) * math.ceil(queries / 16)
    products = 2 * queries * keys * dim / rate
    serial, blocks = queries * keys * dim < SERIAL_CODES, queries * math.ceil(keys / 32) * 1e-9
    outside = min(1.0, max(0.0, 2 * size / cache - 1))  # of what does not stay in half of the cache
    moved = outside * size / read if queries <= HIDDEN else 0.0
    parallel = 0.0 if serial else products * (1 - outside if queries <= HIDDEN else 1)
    return 1e-6, queries * 1e-6, blocks, moved, products if serial else 0.0, parallel


def refresh_features(keys: int, dim: int, rate: float) -> tuple:
    """(the metric's factor: D^3 / 3 operations, two triangular solves a key: 2 D^2), fp64: half the rate"""
    return 2 * dim**3 / 3 / rate, 4 * keys * dim**2 / rate


def update_features(
    rows: int, distinct: int, rank: int, top_k: int, read: float, features: int = 576
) -> tuple:
    """(a call, a row; factors from memory, and factors that are picked again, by one thread; and by all)"""
    one = 2 * rank * features * 4 / read
    moved, again = distinct * one, (rows * top_k - distinct) * one
    if rows * top_k * rank * 2 * features < SERIAL_UPDATE:
        return 1e-6, rows * 1e-6, moved, again, 0.0, 0.0
    return 1e-6, rows * 1e-6, 0.0, 0.0, moved, again


def decode_features(
    shape: Shape, rows: int, distinct: int, rank: int, top_k: int, read: float, rate: float, size: int = 2
) -> tuple:
    """(weights and factors from memory, multiply-adds of both, a layer)"""
    moved = (shape.weights + distinct * rank * shape.features) * size
    work = 2 * rows * (shape.weights + top_k * rank * shape.features)
    return moved / read, work / rate, shape.layers * 1e-3


def fit(points: Sequence[Point]) -> numpy.ndarray:
    """Constants, none below zero, with the least squared relative errors: the best subset of features."""
    count = len(points[0].features)
    matrix = numpy.array([[value / point.seconds for value in point.features] for point in points])
    best, least = numpy.zeros(count), math.inf
    for size in range(1, min(count, len(points)) + 1):
        for chosen in itertools.combinations(range(count), size):
            found, *_ = numpy.linalg.lstsq(matrix[:, chosen], numpy.ones(len(points)), rcond=None)
            if (found < 0).any():
                continue
            error = float(((matrix[:, chosen] @ found - 1) ** 2).sum())
            if error < least - 1e-9:
                best, least = numpy.zeros(count), error
                best[list(chosen)] = found
    return best


def predict(constants: numpy.ndarray, features: Sequence[float]) -> float:
    return float(constants @ numpy.array(features))


@dataclass(frozen=True)
class Checked:
    point: Point
    predicted: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.point.seconds - 1

    @property
    def within(self) -> bool:
        return abs(self.error) <= TOLERANCE


def by_phase(points: Sequence[Point]) -> dict[str, list[Point]]:
    return {
        phase: [p for p in points if p.phase == phase] for phase in dict.fromkeys(p.phase for p in points)
    }


def check(points: Sequence[Point]) -> list[Checked]:
    """Every point, predicted from the others of its phase; phases of fewer than three points are left out."""
    found = []
    for members in by_phase(points).values():
        if len(members) < 3:
            continue
        for i, point in enumerate(members):
            others = members[:i] + members[i + 1 :]
            found.append(Checked(point, predict(fit(others), point.features)))
    return found


@dataclass(frozen=True)
class Machine:
    """Ceilings and fitted constants of the machine of a suite result."""

    name: str
    read: float
    rate: float
    cache: int
    constants: dict[str, numpy.ndarray]

    @classmethod
    def of(cls, result: dict, measured: Sequence[Point]) -> "Machine":
        ceilings, machine = result["ceilings"], result["machine"]
        constants = {phase: fit(found) for phase, found in by_phase(measured).items() if len(found) > 1}
        name = f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
        rate, read = ceilings["operations_per_second"]["float32"], ceilings["read_bytes_per_second"]
        return cls(name, read, rate, machine.get("cache_bytes", 32 << 20), constants)

    def search(self, pool: Pool, queries: int = 1) -> float:
        """Seconds."""
        found = search_features(pool.entries, pool.dim, queries, self.read, self.rate, self.cache)
        return predict(self.constants["search"], found)

    def add(self, pool: Pool) -> float:
        """Seconds of a new task: the metric and everything that is searched, again."""
        return predict(self.constants["add a task"], refresh_features(pool.entries, pool.dim, self.rate))


def tasks_that_fit(shape: Shape, memory: float, pool: Pool) -> int:
    """The most tasks whose factors, keys and statistics fit into `memory` bytes."""

    def fits(tasks: int) -> bool:
        return replace(pool, entries=tasks * pool.per_task).memory(shape) <= memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def print_check(machine: Machine, checked: Sequence[Checked]) -> None:
    print(machine.name)
    for c in checked:
        mark = "" if c.within else "  beyond"
        times = f"{duration(c.point.seconds):>9} measured {duration(c.predicted):>9} predicted"
        print(f"  {c.point.phase:18}{c.point.name:66}{times} {c.error:+7.1%}{mark}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, help="result of the suite")
    parser.add_argument(
        "more",
        nargs="*",
        type=Path,
        help="of the same machine: further points, of the suite or bench_decode.py",
    )
    parser.add_argument("--write", action="store_true", help="docs/scaling.md and docs/scaling.png")
    args = parser.parse_args()
    result, *more = (json.loads(path.read_text(encoding="utf8")) for path in (args.suite, *args.more))
    measured = {(p.phase, p.name): p for p in points(result)}
    for other in more:
        rate = result["ceilings"]["operations_per_second"]["float32"]
        found = points(other) if "schema" in other else decode_points(other, rate)
        measured |= {(p.phase, p.name): p for p in found if (p.phase, p.name) not in measured}
    machine, checked = Machine.of(result, [*measured.values()]), check([*measured.values()])
    if not checked:
        raise SystemExit("no phase has three points: run more of the suite")
    print_check(machine, checked)
    if args.write:
        from scaling_page import write

        words = ["python benchmarks/scaling.py", str(args.suite), *map(str, args.more), "--write"]
        write(machine, checked, " ".join(words))
    within, worst = sum(c.within for c in checked), max(abs(c.error) for c in checked)
    print(json.dumps({"within": within, "points": len(checked), "largest_error": round(worst, 3)}))
    raise SystemExit(within < len(checked))


if __name__ == "__main__":
    main()
