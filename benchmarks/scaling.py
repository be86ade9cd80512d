"""The scaling model: bytes, time and memory of each phase, for a model, a pool, a batch and a machine.

    python benchmarks/scaling.py SUITE.json [MORE.json ...]             errors against every measured point
    python benchmarks/scaling.py SUITE.json [MORE.json ...] --write     also docs/scaling.md and its plot

Bytes and operations are counted from shapes. What a machine makes of them are a few constants a phase,

    seconds = sum_i constant_i * feature_i,    no constant below zero,

fitted to the machine's own suite result with relative errors. Features are seconds at the pace that the
machine had while the point was measured: a CPU that others share is a third slower in some minutes. Every
point is predicted with constants that were fitted to the other points of its phase, so the printed error is
one of prediction. Memory is counted alone, nothing is fitted. For GPUs times are datasheet floors
(`roofline.py`), which no kernel reaches: an H100's decoding takes 1.5 to 1.7 times as long.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
from units import duration

TOLERANCE = 0.15
SEARCH = "search, one thread", "search, all threads"
UPDATE = "mixture, decoding, one thread", "mixture, decoding, all threads"
SERIAL_CODES, SERIAL_UPDATE = 1_000_000, 300_000  # multiply-adds below which one thread does it (csrc/cpu)
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


@dataclass(frozen=True)
class Speed:
    """What a machine's memory and arithmetic do, usually or while a case was measured.

    read: bytes/s.  rate: operations/s in fp32.  cache: bytes of the last level.  near: of the one above, of
    all threads.  slow: how much longer than usual calls take.
    """

    read: float
    rate: float
    cache: int
    near: int
    slow: float = 1.0

    @classmethod
    def usual(cls, result: dict) -> "Speed":
        """The median pace of a suite result's cases."""
        paces = [record["pace"] for record in result["results"] if "pace" in record]
        read, rate = (
            statistics.median(pace[key] for pace in paces)
            for key in ("read_bytes_per_second", "float32_operations_per_second")
        )
        return cls(read, rate, result["machine"]["cache_bytes"], result["machine"]["core_cache_bytes"])

    def during(self, pace: dict) -> "Speed":
        rate = pace["float32_operations_per_second"]
        return replace(self, read=pace["read_bytes_per_second"], rate=rate, slow=self.rate / rate)

    @property
    def call(self) -> float:
        """A usual microsecond."""
        return 1e-6 * self.slow

    def moved(self, size: float) -> float:
        """Seconds of reading from memory."""
        return size / self.read

    def work(self, operations: float) -> float:
        return operations / self.rate


def points(result: dict) -> Iterator[Point]:
    """Of a suite result, the cases that the model speaks about."""
    paced = [record for record in result["results"] if "pace" in record]
    if not paced:
        return
    usual, rates = Speed.usual(result), result["ceilings"]["operations_per_second"]
    for record in paced:
        axes, ours = record["axes"], record["contenders"][record["ours"]]
        kind = axes.get("kind")
        if "seconds" not in ours:
            continue
        speed = usual.during(record["pace"])
        if record["section"] == "search" and kind is None and axes["cache"] == "hot":
            phase, found = search_features(axes["keys"], axes["dim"], axes["queries"], speed)
            yield Point(phase, record["case"], found, ours["seconds"])
        elif kind == "refresh":
            found = refresh_features(axes["keys"], axes["dim"], speed)
            yield Point("add a task", record["case"], found, ours["seconds"])
        elif kind == "update" and axes["length"] == 1:
            phase, found = update_features(axes["rows"], axes["distinct"], axes["rank"], axes["top_k"], speed)
            yield Point(phase, record["case"], found, ours["seconds"])
        elif kind == "update":
            found = 10 * speed.call, speed.work(record["operations"])
            yield Point("mixture, prefill", record["case"], found, ours["seconds"])
        elif kind == "decode":
            for name, distinct, top_k in (("on", axes["distinct"], 2), ("off", 0, 0)):
                if "seconds" not in record["contenders"][name]:
                    continue
                found = decode_features(SHAPES[axes["model"]], axes["rows"], distinct, 8, top_k, speed)
                case = f"{record['case']}, pool {name}"
                yield Point("decoding", case, found, record["contenders"][name]["seconds"])
        elif kind == "prefill":
            work = speed.work(record["operations"]) * rates["float32"] / rates[axes["dtype"]]
            yield Point("prefill", record["case"], (1e3 * speed.call, work), ours["seconds"])


def beyond(size: float, cache: int) -> float:
    """The share of what is read over and over that does not stay in half of a cache."""
    return min(1.0, max(0.0, 2 * size / cache - 1))


def search_features(keys: int, dim: int, queries: int, speed: Speed) -> tuple[str, tuple]:
    """The phase, and by one thread (a call, products), or by all (a call, a query, a block of 32 keys for a
    query, products, codes from the last cache, from memory). Groups of 16 queries read the codes again."""
    products = speed.work(2 * queries * keys * dim)
    if queries * keys * dim < SERIAL_CODES:
        return SEARCH[0], (speed.call, products)
    size = keys * (dim + CODE_BYTES)
    far, near = beyond(size, speed.cache), beyond(size, speed.near)
    reads = speed.moved(size * math.ceil(queries / 16))
    blocks = 1e-3 * queries * math.ceil(keys / 32)
    calls = speed.call, queries * speed.call, blocks * speed.call
    return SEARCH[1], (*calls, products, (near - far) * reads, far * reads)


def refresh_features(keys: int, dim: int, speed: Speed) -> tuple:
    """(the metric's factor: D^3 / 3 operations, two triangular solves a key: 2 D^2), fp64: half the rate"""
    return speed.work(2 * dim**3 / 3), speed.work(4 * keys * dim**2)


def update_features(
    rows: int, distinct: int, rank: int, top_k: int, speed: Speed, features: int = 576
) -> tuple[str, tuple]:
    """The phase, and by one thread (a call, factors), or by all (a call, a row, factors from memory, factors
    that are picked again)"""
    one, picks = speed.moved(2 * rank * features * 4), rows * top_k
    if picks * rank * 2 * features < SERIAL_UPDATE:
        return UPDATE[0], (speed.call, picks * one)
    return UPDATE[1], (speed.call, rows * speed.call, distinct * one, (picks - distinct) * one)


def decode_features(
    shape: Shape, rows: int, distinct: int, rank: int, top_k: int, speed: Speed, size: int = 2
) -> tuple:
    """(weights and factors from memory, multiply-adds of both, a layer, a layer of a row)"""
    moved = (shape.weights + distinct * rank * shape.features) * size
    work, layers = 2 * rows * (shape.weights + top_k * rank * shape.features), shape.layers * 1e3 * speed.call
    return speed.moved(moved), speed.work(work), layers, rows * layers


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
    """Usual speed and fitted constants of the machine of a suite result."""

    name: str
    speed: Speed
    constants: dict[str, numpy.ndarray]

    @classmethod
    def of(cls, result: dict, measured: Sequence[Point]) -> "Machine":
        machine = result["machine"]
        constants = {phase: fit(found) for phase, found in by_phase(measured).items() if len(found) > 1}
        name = f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
        return cls(name, Speed.usual(result), constants)

    def search(self, pool: Pool, queries: int = 1) -> float:
        """Seconds."""
        phase, found = search_features(pool.entries, pool.dim, queries, self.speed)
        return predict(self.constants[phase], found)

    def add(self, pool: Pool) -> float:
        """Seconds of a new task: the metric and everything that is searched, again."""
        return predict(self.constants["add a task"], refresh_features(pool.entries, pool.dim, self.speed))


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
        print(f"  {c.point.phase:32}{c.point.name:52}{times} {c.error:+7.1%}{mark}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, help="result of the suite")
    parser.add_argument("more", nargs="*", type=Path, help="further ones, of the same machine")
    parser.add_argument("--write", action="store_true", help="docs/scaling.md and docs/scaling.png")
    args = parser.parse_args()
    result, *more = (json.loads(path.read_text(encoding="utf8")) for path in (args.suite, *args.more))
    measured = {(p.phase, p.name): p for p in points(result)}
    for other in more:
        measured |= {(p.phase, p.name): p for p in points(other) if (p.phase, p.name) not in measured}
    checked = check([*measured.values()])
    if not checked:
        raise SystemExit("no phase has three points: run more of the suite")
    machine = Machine.of(result, [*measured.values()])
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
