"""What a batch costs: a line a phase, and a table of memory. See `scaling.py ask`."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import scaling_features as features
from roofline import DEVICES, REACHED, Cost, Device, search_floor
from scaling import TOLERANCE, Machine, by_phase, check
from scaling_shapes import (
    LEARNT_BYTES,
    SHAPES,
    Batch,
    Count,
    Pool,
    Shape,
    count_add,
    count_prefill,
    count_search,
    count_step,
    count_training,
    count_update,
    tasks_that_fit,
)
from units import amount, duration

CARD_ENTRIES = 12  # of the pools in suite/gpu_model.py
CARD_SHAPES = {"llama-2-7b": SHAPES["llama7b"]}  # by the names that models have there
NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # of dtypes in a suite result


@dataclass(frozen=True)
class Phase:
    """seconds: None where nothing is known."""

    name: str
    count: Count
    seconds: float | None
    note: str


def counts(shape: Shape, pool: Pool, batch: Batch) -> Iterator[tuple[str, Count]]:
    """Of the phases that the model has: what has no head generates nothing."""
    yield features.SEARCH, count_search(pool, batch.rows)
    yield features.ADD, count_add(pool)
    if shape.vocab:
        yield features.UPDATE, count_update(shape, pool, batch)
        yield features.DECODE, count_step(shape, pool, batch)
    yield features.PREFILL, count_prefill(shape, pool, batch)
    yield features.TRAINING, count_training(shape, pool, batch)


@dataclass(frozen=True)
class Card:
    """One of `roofline.DEVICES`: floors by its datasheet, or by what a suite result says that it reached.

    reached: with measured ceilings.  cases: {phase: [(floor, measured over it)]} of the result's models.
    """

    name: str
    dtype: str
    reached: Device | None = None
    cases: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, suite: dict, dtype: str) -> "Card":
        """Of a GPU's suite result. SystemExit says what it lacks."""
        card, ceilings = suite["machine"].get("card", "without a name"), suite["ceilings"]
        name = next((key for key in DEVICES if key in card), None)
        if name is None:
            raise SystemExit(f"card {card}: there are datasheets of {', '.join(DEVICES)}")
        sheet, measured = DEVICES[name], [*card_cases(suite, dtype)]
        copy = ceilings.get("copy_bytes_per_second")
        rate = ceilings.get("operations_per_second", {}).get(NAMES["bf16"])
        if copy is None and rate is None and not measured:
            raise SystemExit(f"neither measured ceilings nor model cases in {dtype}: there is --card {name}")
        tensor = sheet.tensor if rate is None else rate / REACHED
        memory = suite["machine"].get("memory_bytes", sheet.memory)
        reached = replace(sheet, name=card, hbm=copy or sheet.hbm, tensor=tensor, memory=memory)
        found, cases = cls(name, dtype, reached), {}
        for phase, _, count, seconds in measured:
            floor = found.floor(count)
            cases.setdefault(phase, []).append((floor, seconds / floor))
        return replace(found, cases=cases)

    @property
    def device(self) -> Device:
        return self.reached or DEVICES[self.name]

    def __str__(self) -> str:
        words = "its datasheet, no kernel reaches them"
        if self.reached:
            words = "what it reached, times what measured models took over theirs, where there are some"
        return f"{self.device.name}, {self.dtype}: floors by {words}"

    @property
    def memory(self) -> float:
        return self.device.memory

    def cost(self, count: Count) -> Cost:
        """Half of a mixture's products are tf32 ones, in fp32 all products are."""
        tf32 = count.operations if self.dtype == "fp32" else count.mixture / 2
        return Cost(count.bytes, 0, count.operations - tf32, tf32)

    def floor(self, count: Count) -> float:
        return self.device.floor(self.cost(count))

    def phases(self, shape: Shape, pool: Pool, batch: Batch) -> Iterator[Phase]:
        """A task is added on the host."""
        for name, count in counts(shape, pool, batch):
            if name == features.ADD:
                yield Phase(name, count, None, "on the host")
                continue
            if name == features.SEARCH:
                seconds = search_floor(self.device, batch.rows, pool.entries, pool.dim)
                yield Phase(name, count, seconds, "floor, bf16 keys")
                continue
            floor = self.floor(count)
            note = "floor, memory" if count.bytes / self.device.hbm >= floor else "floor, arithmetic"
            yield self.scaled(Phase(name, count, floor, note))

    def scaled(self, phase: Phase) -> Phase:
        """As far above its floor as the measured cases of the phase were, by the median."""
        if not (cases := self.cases.get(phase.name)):
            return phase
        floors, factors = zip(*cases, strict=True)
        factor = statistics.median(factors)
        note = f"{phase.note}, x {factor:.2f} as measured, cases: {len(cases)}"
        if not min(floors) <= phase.seconds <= max(floors):
            note += "; extrapolated"
        return replace(phase, seconds=factor * phase.seconds, note=note)


def card_cases(suite: dict, dtype: str = "bf16") -> Iterator[tuple[str, str, Count, float]]:
    """(phase, case, what it must move and compute, seconds) of whole models in a GPU's suite result."""
    pool = Pool(4)
    phases = {"decode": features.DECODE, "prefill": features.PREFILL, "step": features.TRAINING}
    for record in suite["results"]:
        axes, found = record["axes"], record["contenders"].get(record["ours"], {})
        phase, shape = phases.get(axes.get("kind")), CARD_SHAPES.get(axes.get("model"))
        if None in (phase, shape) or axes.get("dtype") != NAMES[dtype] or "seconds" not in found:
            continue
        shape = replace(shape, layers=axes.get("layers", shape.layers))
        distinct = axes.get("distinct", min(CARD_ENTRIES, 2 * axes["rows"]))
        tokens, new = axes.get("tokens", axes.get("context", 0)), int(phase == features.DECODE)
        counted = dict(counts(shape, pool, Batch(axes["rows"], tokens, new, 2, distinct)))
        yield phase, record["case"], counted[phase], found["seconds"]


def card_points(suite: dict) -> list[features.Point]:
    """A GPU's model cases in bf16; their one feature is the floor by what the card reached."""
    card, cases = Card.of(suite, "bf16"), card_cases(suite)
    return [
        features.Point(phase, case, (card.floor(count),), seconds) for phase, case, count, seconds in cases
    ]


@dataclass(frozen=True)
class Measured:
    """The machine of a suite result: its constants, and how well each phase was predicted."""

    machine: Machine
    dtype: str
    within: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, machine: Machine, dtype: str) -> "Measured":
        checked, within = check(machine.measured), {}
        for phase, points in by_phase(machine.measured).items():
            good = sum(c.within for c in checked if c.point.phase == phase)
            within[phase] = f"{good} of {len(points)} points within {TOLERANCE:.0%}"
            if len(points) < 3:
                within[phase] = f"unchecked, points: {len(points)}"
        return cls(machine, dtype, within)

    def __str__(self) -> str:
        return f"{self.machine.name}, {self.dtype}: constants of its suite result"

    @property
    def memory(self) -> float:
        return self.machine.memory

    def seconds(self, phase: str, shape: Shape, pool: Pool, batch: Batch) -> float | None:
        speed, slower = self.machine.speed, self.machine.slower.get(NAMES[self.dtype])
        if phase == features.SEARCH:
            found = features.search_features(pool.entries, pool.dim, batch.rows, speed)
        elif phase == features.ADD:
            found = features.add_features(pool, speed)
        elif phase == features.UPDATE:
            sizes = batch.rows, batch.distinct, pool.rank, batch.top_k, speed
            each = (features.update_features(*sizes, i + o) for i, o in shape.step)
            found = tuple(map(sum, zip(*each, strict=True)))
        elif phase == features.DECODE:
            found = features.step_features(shape, pool, batch, speed)
        elif slower is None:
            return None
        elif phase == features.PREFILL:
            found = features.prefill_features(shape, pool, batch, speed, slower)
        else:
            found = features.training_features(shape, pool, batch, speed, slower)
        return self.machine.seconds(phase, found)

    def phases(self, shape: Shape, pool: Pool, batch: Batch) -> Iterator[Phase]:
        """A mixture alone is one call for each linear."""
        for name, count in counts(shape, pool, batch):
            seconds, notes = self.seconds(name, shape, pool, batch), [self.within.get(name, "not measured")]
            measured = [p.seconds for p in self.machine.measured if p.phase == name]
            calls = len(shape.step) if name == features.UPDATE else 1
            if seconds is None:
                notes = ["not measured"]
            elif not min(measured) <= seconds / calls <= max(measured):
                notes.append("extrapolated")
            slower = self.machine.slower.get(NAMES[self.dtype], 1.0)
            if name in (features.PREFILL, features.TRAINING) and slower > 2 and seconds is not None:
                notes.append(f"{self.dtype} products take {slower:.0f} times as long as fp32's")
            yield Phase(name, count, seconds, "; ".join(notes))


def kept(shape: Shape, pool: Pool, batch: Batch) -> dict[str, int]:
    """Bytes of what lies in memory at once."""
    return {
        "base weights": shape.numbers * pool.size,
        "factors of the pool": pool.factors(shape),
        "keys, and their codes": pool.index,
        "statistics": pool.statistics,
        f"keys and values of {batch.cached:,} tokens": shape.cache(batch.cached, pool.size),
        "a task in training": LEARNT_BYTES * pool.learnt(shape),
    }


def answer(shape: Shape, pool: Pool, batch: Batch, where: Card | Measured) -> Iterator[str]:
    """Lines of text."""
    yield f"{shape.name}: {pool.entries:,} entries of rank {pool.rank}, {pool.per_task} a task"
    picks = f"each mixes {batch.top_k}, together {batch.distinct} distinct"
    yield f"{batch.rows} rows of {batch.tokens} tokens, {batch.new} new; {picks}"
    yield f"{where}\n"
    yield f"{'phase':24}{'bytes':>10}{'operations':>12}{'time':>12}  note"
    for phase in where.phases(shape, pool, batch):
        time = "-" if phase.seconds is None else duration(phase.seconds)
        sizes = f"{amount(phase.count.bytes):>10}{phase.count.operations:12.3g}"
        yield f"{phase.name:24}{sizes}{time:>12}  {phase.note}"
    memory = kept(shape, pool, batch)
    yield f"\n{'memory':36}{'bytes':>10}"
    for name, size in memory.items():
        yield f"{name:36}{amount(size):>10}"
    whole = sum(memory.values())
    room = where.memory - (whole - pool.memory(shape))
    fits = "fits" if whole <= where.memory else "does not fit"
    yield f"{'all':36}{amount(whole):>10}  {fits} into {amount(where.memory)}"
    yield "not counted: activations; a training step keeps those of its whole batch"
    tasks = tasks_that_fit(shape, room, pool)
    yield f"tasks that fit beside the rest: {tasks:,}, with {tasks * pool.per_task:,} entries"
