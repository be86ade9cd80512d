"""What the scaling model's constants are fitted to: a suite result's cases, each with its features.

A feature is a part of a case's work in seconds at the ceilings that the machine had while it was measured.
The parts are those that csrc/cpu has.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from scaling_shapes import (
    BLOCK,
    CODE_BYTES,
    GROUP,
    SHAPES,
    Batch,
    Pool,
    Shape,
    count_prefill,
    count_step,
    count_training,
)

SEARCH, ADD, UPDATE, MIXTURE = "key search", "adding a task", "mixture, decoding", "mixture, prefill"
BACKWARD, DECODE, PREFILL = "mixture, forward and backward", "decoding step", "prefill"
TRAINING = "training step"
# Multiply-adds: that are worth a thread, and below which one thread does it (csrc/cpu).
SEARCH_THREAD, SERIAL_UPDATE = 150_000, 300_000
CONTEXT = 16 + 4  # tokens before a decoder's timed steps: the prompt and what is not timed (bench_decode.py)


@dataclass(frozen=True)
class Point:
    """A measured case: its phase, its features in seconds at the machine's ceilings, and its seconds.

    case, axes: of the suite's record, which may hold several points.
    """

    phase: str
    name: str
    features: tuple[float, ...]
    seconds: float
    case: str = ""
    axes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Speed:
    """What a machine's memory and arithmetic do, usually or while a case was measured.

    read: bytes/s.  rate: operations/s in fp32.  cache: bytes of the last level.  slow: how much longer than
    usual calls take.
    """

    read: float
    rate: float
    cache: int
    threads: int
    slow: float = 1.0

    @classmethod
    def usual(cls, result: dict) -> "Speed":
        """The median pace of a suite result's cases."""
        paces = [record["pace"] for record in result["results"] if "pace" in record]
        read, rate = (
            statistics.median(pace[key] for pace in paces)
            for key in ("read_bytes_per_second", "float32_operations_per_second")
        )
        return cls(read, rate, result["machine"]["cache_bytes"], result["machine"]["threads"])

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
        speed, section = usual.during(record["pace"]), record["section"]
        for phase, contender, found in features_of(record, speed, rates):
            seconds = record["contenders"].get(contender, {}).get("seconds")
            if seconds is not None:
                name = record["case"] + (f", pool {contender}" if contender in ("on", "off") else "")
                yield Point(phase, name, found, seconds, f"{section}, {record['case']}", record["axes"])


def features_of(record: dict, speed: Speed, rates: dict) -> Iterator[tuple[str, str, tuple]]:
    """(phase, contender, features) of a record of the suite."""
    axes, ours = record["axes"], record["ours"]
    kind, section = axes.get("kind"), record["section"]
    if section == "search" and kind is None and axes["cache"] == "hot":
        yield SEARCH, ours, search_features(axes["keys"], axes["dim"], axes["queries"], speed)
    elif kind == "refresh":
        yield ADD, ours, add_features(Pool(axes["keys"], dim=axes["dim"]), speed)
    elif kind == "update" and axes["length"] == 1:
        yield (
            UPDATE,
            ours,
            update_features(axes["rows"], axes["distinct"], axes["rank"], axes["top_k"], speed),
        )
    elif kind == "update":
        yield MIXTURE, ours, (speed.call, speed.work(record["operations"]), speed.moved(record["bytes"]))
    elif kind == "step" and section == "mixture":
        yield BACKWARD, ours, (speed.call, speed.work(record["operations"]))
    elif kind == "step" and axes["model"] in SHAPES:
        pool, batch = Pool(4, size=4), Batch(axes["rows"], axes["tokens"], top_k=2)
        yield TRAINING, ours, training_features(SHAPES[axes["model"]], pool, batch, speed)
    elif kind in ("decode", "prefill") and axes["model"] in SHAPES:
        shape, rows = SHAPES[axes["model"]], axes["rows"]
        for contender in ("on", "off"):
            top_k = 2 if contender == "on" else 0
            if kind == "decode":
                rounds = record["contenders"][contender].get("rounds", 0)
                distinct = axes["distinct"] if top_k else 0
                batch = Batch(rows, CONTEXT, rounds // 2, top_k, distinct)
                yield DECODE, contender, step_features(shape, Pool(4), batch, speed)
            else:
                batch, size = Batch(rows, axes["tokens"], 0, top_k), 4 if axes["dtype"] == "float32" else 2
                slower = rates["float32"] / rates[axes["dtype"]]
                yield PREFILL, contender, prefill_features(shape, Pool(4, size=size), batch, speed, slower)


def search_features(keys: int, dim: int, queries: int, speed: Speed) -> tuple:
    """A call, waking the threads, queries, products, codes that pass through a thread, codes from memory.

    The keys are split over the threads, or, if there are enough of them, groups of 16 queries, each of which
    reads all codes; small searches are one thread's."""
    threads = max(1, min(speed.threads, queries * keys * dim // SEARCH_THREAD))
    alone, groups = threads == 1, math.ceil(queries / GROUP)
    slices = 1 if groups >= threads else threads
    share = math.ceil(groups * slices / threads) / (groups * slices)  # of all, a thread's
    coded = BLOCK * math.ceil(keys / BLOCK) * dim
    size = keys * (dim + CODE_BYTES)
    return (
        speed.call,
        0.0 if alone else speed.call,
        queries * slices * share * speed.call,
        speed.work(2 * queries * coded * share),
        speed.work(groups * coded * share),
        beyond(size, speed.cache) * speed.moved(size * groups),
    )


def beyond(size: float, cache: int) -> float:
    """The share of what is read over and over that does not stay in half of a cache."""
    return min(1.0, max(0.0, 2 * size / cache - 1))


def add_features(pool: Pool, speed: Speed) -> tuple:
    """(the metric's factor: D^3 / 3 operations, two triangular solves a key: 2 D^2), fp64: half the rate"""
    return speed.work(2 * pool.dim**3 / 3), speed.work(4 * pool.entries * pool.dim**2)


def update_features(
    rows: int, distinct: int, rank: int, top_k: int, speed: Speed, features: float = 2 * 576
) -> tuple:
    """A call, waking the threads, and by each of them rows, products, factors from memory: scattered rows of
    a slab, which a thread does not read at the bandwidth. features: in + out."""
    work = rows * top_k * rank * features
    alone = work < SERIAL_UPDATE
    threads = 1 if alone else speed.threads
    shared = rows * speed.call, speed.work(2 * work), speed.moved(4 * distinct * rank * features)
    return (speed.call, 0.0 if alone else speed.call, *(seconds / threads for seconds in shared))


def step_features(shape: Shape, pool: Pool, batch: Batch, speed: Speed) -> tuple:
    """(bytes from memory, operations, a layer, a layer of a row)"""
    count, layers = count_step(shape, pool, batch), (shape.decoder or shape.layers) * 1e3 * speed.call
    return speed.moved(count.bytes), speed.work(count.operations), layers, batch.rows * layers


def prefill_features(shape: Shape, pool: Pool, batch: Batch, speed: Speed, slower: float = 1.0) -> tuple:
    """(products with the weights, the mixtures', weights, which every call reads and packs for its product,
    attention's products: the less tokens, the more the packing counts). slower: than fp32, by dtype."""
    count = count_prefill(shape, pool, batch)
    work = [slower * speed.work(n) for n in (count.frozen, count.mixture, count.attention)]
    return work[0], work[1], speed.moved(pool.size * shape.weights), work[2]


def training_features(shape: Shape, pool: Pool, batch: Batch, speed: Speed, slower: float = 1.0) -> tuple:
    return (slower * speed.work(count_training(shape, pool, batch).operations),)
