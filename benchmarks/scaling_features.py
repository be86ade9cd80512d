"""What the scaling model's constants are fitted to: a suite result's cases, each with its features.

A feature is a part of a case's work in seconds at the ceilings that the machine had while it was measured.
The parts are those that csrc/cpu has.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

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
    total,
)

SEARCH, ADD, UPDATE, MIXTURE = "key search", "adding a task", "mixture, decoding", "mixture, prefill"
BACKWARD, DECODE, PREFILL = "mixture, forward and backward", "decoding step", "prefill"
TRAINING, LAYER, LAYER_STEP = "training step", "linear with mixture", "linear, forward and backward"
# Multiply-adds: that are worth a thread, and below which one thread does it (csrc/cpu).
SEARCH_THREAD, SERIAL_UPDATE = 150_000, 120_000
FEATURES, ENTRIES_OF_FLAT = 576, dict(rank=8, top_k=2)  # of linears, and of "flat" cases (suite/mixture.py)
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


class Part(NamedTuple):
    """What a record says about a phase. measured: the name of its seconds among the contender's numbers."""

    phase: str
    contender: str
    features: tuple[float, ...]
    measured: str = "seconds"


def points(result: dict) -> Iterator[Point]:
    """Of a suite result, the cases that the model speaks about."""
    paced = [record for record in result["results"] if "pace" in record]
    if not paced:
        return
    usual, rates = Speed.usual(result), result["ceilings"]["operations_per_second"]
    parts = {"search": search_parts, "mixture": mixture_parts, "model": model_parts}
    for record in paced:
        speed, section = usual.during(record["pace"]), record["section"]
        slower = {dtype: rates["float32"] / rate for dtype, rate in rates.items()}
        for part in parts[section](record, speed, slower) if section in parts else ():
            seconds = record["contenders"].get(part.contender, {}).get(part.measured)
            if seconds is not None:
                case, name = f"{section}, {record['case']}", name_of(record, part)
                yield Point(part.phase, name, part.features, seconds, case, record["axes"])


def name_of(record: dict, part: Part) -> str:
    name = record["case"]
    if part.contender in ("on", "off"):
        name += f", pool {part.contender}"
    elif part.contender != record["ours"]:
        name += f", {part.contender}"
    return name if part.measured == "seconds" else f"{name}, {part.measured.removesuffix('_seconds')}"


def search_parts(record: dict, speed: Speed, slower: dict) -> Iterator[Part]:
    axes, ours = record["axes"], record["ours"]
    if axes.get("kind") == "refresh":
        yield Part(ADD, ours, add_features(Pool(axes["keys"], dim=axes["dim"]), speed))
    elif "cache" in axes:
        sizes = axes["keys"], axes["dim"], axes["queries"]
        yield Part(SEARCH, ours, search_features(*sizes, speed, cold=axes["cache"] == "cold"))


def mixture_parts(record: dict, speed: Speed, slower: dict) -> Iterator[Part]:
    axes, ours, kind = record["axes"], record["ours"], record["axes"]["kind"]
    if kind == "update" and axes["length"] == 1:
        sizes = axes["rows"], axes["distinct"], axes["rank"], axes["top_k"]
        yield Part(UPDATE, ours, update_features(*sizes, speed))
    elif kind == "flat":
        found = update_features(axes["rows"], axes["distinct"], **ENTRIES_OF_FLAT, speed=speed)
        yield from (Part(UPDATE, pool, found) for pool in record["contenders"])
    elif kind in ("update", "step"):
        work = speed.work(record["operations"]), speed.moved(record["bytes"])
        yield Part(MIXTURE if kind == "update" else BACKWARD, ours, (speed.call, *work))
    elif kind in ("layer", "layer step"):
        sizes = axes["rows"], axes["length"], axes["rank"], axes["top_k"]
        phase, features = (LAYER, layer_features) if kind == "layer" else (LAYER_STEP, layer_step_features)
        yield Part(phase, "frozen", features(*sizes[:3], 0, speed))
        yield Part(phase, ours, features(*sizes, speed))


def model_parts(record: dict, speed: Speed, slower: dict) -> Iterator[Part]:
    axes, kind = record["axes"], record["axes"]["kind"]
    if axes["model"] not in SHAPES:
        return
    shape, rows = SHAPES[axes["model"]], axes["rows"]
    if kind == "step":
        pool, batch = Pool(4, size=4), Batch(rows, axes["tokens"], top_k=2)
        yield Part(TRAINING, record["ours"], training_features(shape, pool, batch, speed))
    elif kind == "decode":
        for contender, top_k in (("on", 2), ("off", 0)):
            rounds = record["contenders"][contender].get("rounds", 0)
            batch = Batch(rows, CONTEXT, rounds // 2, top_k, axes["distinct"] if top_k else 0)
            yield Part(DECODE, contender, step_features(shape, Pool(4), batch, speed))
    elif kind in ("prefill", "first_token"):
        pool, factor = Pool(4, size=4 if axes["dtype"] == "float32" else 2), slower[axes["dtype"]]
        if kind == "first_token":
            yield from first_token_parts(record, shape, pool, speed, factor)
            return
        for contender, top_k in (("on", 2), ("off", 0)):
            batch = Batch(rows, axes["tokens"], 0, top_k)
            yield Part(PREFILL, contender, prefill_features(shape, pool, batch, speed, factor))


def first_token_parts(record: dict, shape: Shape, pool: Pool, speed: Speed, slower: float) -> Iterator[Part]:
    """Encoders and prefills, each a prefill of a model. Texts have two tokens more for MiniLM; where prompts
    are routed in the prefill, the encoder is the model's first half, and mixtures are in the other: as much
    work as half of them in all layers."""
    rows, tokens, found = record["axes"]["rows"], record["axes"]["tokens"], record["contenders"]
    if halves := "in the prefill" in found:
        encoder, read = replace(shape, layers=shape.layers // 2, vocab=0), tokens
    else:
        encoder, read = SHAPES["minilm"], tokens + 2
    batch = Batch(rows, tokens, 0, 1 if halves else 2)
    encoding = prefill_features(encoder, pool, replace(batch, tokens=read, top_k=0), speed, slower)
    answering = prefill_features(shape, pool, batch, speed, slower)
    for contender in ("on", "in the prefill"):
        yield Part(PREFILL, contender, encoding, "encoder_seconds")
        yield Part(PREFILL, contender, answering, "prefill_seconds")


def training_points(bench: dict, suite: dict) -> Iterator[Point]:
    """Of a result of `bench_training.py` on a machine of the suite's kind, in fp32, at the machine's usual
    pace: none was measured beside it."""
    kinds = [[r["machine"].get(key) for key in ("cores", "threads", "isa")] for r in (bench, suite)]
    if kinds[0] != kinds[1]:
        return
    speed = Speed.usual(suite)
    for record in bench["results"]:
        if record["dtype"] != "fp32" or record["model"] not in SHAPES:
            continue
        shape, again = SHAPES[record["model"]], record["checkpointing"] == "on"
        adapted = total(shape.layers * [(shape.attention, shape.hidden)]) / shape.features
        adapted = {"all": 1.0, "o_proj": adapted}[record["targets"]]
        batch = Batch(record["rows"], record["tokens"], top_k=2)
        found = training_features(shape, Pool(4, size=4), batch, speed, adapted=adapted, again=again)
        words = f"{record['targets']}{', checkpoints' if again else ''}, bench_training.py"
        name = f"training step, {record['model']}, {words}"
        axes = {key: record[key] for key in ("model", "rows", "tokens", "targets", "checkpointing")}
        yield Point(TRAINING, name, found, record["milliseconds"]["engine"] / 1e3, name, axes)


def search_features(keys: int, dim: int, queries: int, speed: Speed, cold: bool = False) -> tuple:
    """A call, waking the threads, queries, products, codes that pass through a thread, codes from memory:
    all of them when cold.

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
        (1.0 if cold else beyond(size, speed.cache)) * speed.moved(size * groups),
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


def layer_features(rows: int, length: int, rank: int, top_k: int, speed: Speed) -> tuple:
    """(a linear's call, its weights, which are packed for more tokens than one, its products; of the mixture
    a call, rows that decode, products). top_k: 0 without one."""
    tokens, mixed = rows * length, top_k > 0
    weights = FEATURES**2
    linear = speed.call, (tokens > 1) * speed.moved(4 * weights), speed.work(2 * tokens * weights)
    decoded = rows * mixed if length == 1 else 0
    products = speed.work(4 * tokens * top_k * rank * FEATURES)
    return (*linear, mixed * speed.call, decoded * speed.call, products)


def layer_step_features(rows: int, length: int, rank: int, top_k: int, speed: Speed) -> tuple:
    """(a call, products with the frozen weights, the mixture's): forward and backward."""
    tokens = rows * length
    mixture = speed.work(12 * tokens * top_k * rank * FEATURES)
    return speed.call, speed.work(4 * tokens * FEATURES**2), mixture


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


def training_features(
    shape: Shape,
    pool: Pool,
    batch: Batch,
    speed: Speed,
    slower: float = 1.0,
    *,
    adapted: float = 1.0,
    again: bool = False,
) -> tuple:
    """adapted: the share of the mixtures' features that is learnt. again: layers run twice (checkpoints)."""
    count = count_training(shape, pool, batch)
    mixture = adapted * count.mixture
    work = count.frozen + mixture + count.attention
    if again:
        work += count.frozen / 2 + (mixture + count.attention) / 3
    return (slower * speed.work(work),)
