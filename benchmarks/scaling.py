"""The scaling model: bytes, time and memory of each phase, for a model, a pool, a batch and a machine.

    python benchmarks/scaling.py check SUITE.json [MORE.json ...]    errors against every point
        --write    also docs/scaling.md and its plot
        --check    instead: fail where docs/scaling.md is not what would be written
    python benchmarks/scaling.py ask --model llama7b --entries 10000 --rows 8 --tokens 512 --card H100
        a line a phase: bytes, operations, seconds; a table of memory; how many tasks fit. A model may be a
        Hugging Face folder or hub name; --suite SUITE.json instead of --card: that machine's constants

Bytes and operations are counted from shapes. What a machine makes of them are a few constants a phase,

    seconds = sum_i constant_i * feature_i,    no constant below zero,

fitted to the machine's own suite result with relative errors. Features are seconds at the pace that the
machine had while the point was measured: a CPU that others share is a third slower in some minutes. Every
point is predicted with constants that were fitted to the other points of its phase, so the printed error is
one of prediction. Memory is counted (`scaling_shapes.py`), nothing is fitted. For GPUs times are datasheet
floors (`roofline.py`), which no kernel reaches; docs/scaling.md says by how much an H100 missed them. With
`--suite` of a GPU they are floors by its measured ceilings, times what its model cases took over theirs;
`check` predicts each of these cases by the others of its phase. The exit status is 1 where a point, or bytes,
are predicted more than 15% off.

`scaling_shapes.py` counts, `scaling_features.py` says what is fitted, `scaling_ask.py` answers,
`scaling_page.py` writes docs/scaling.md.
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from compare import SMALL
from scaling_features import (
    ADD,
    SEARCH,
    Point,
    Speed,
    add_features,
    points,
    search_features,
    training_points,
)
from scaling_shapes import SHAPES, SIZES, Batch, Pool, find
from units import amount, duration

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEMORY = RESULTS / "cpu_memory_smol.json", RESULTS / "cpu_avx2_memory_7b.json"
STEPS = RESULTS / "cpu_avx2_training_wide.json", RESULTS / "cpu_avx2_training_wide_o_proj.json"
TOLERANCE = 0.15
PEAK_TOKENS = 16 + 2  # in the cache at the step whose peak is measured: the second behind the prompt
ENTRIES = {"smol": 64, "7b": 12}  # of the pools in bench_memory.py, a task each


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


def check(points: Sequence[Point], whole: bool = False) -> list[Checked]:
    """Every point, predicted from the others of its phase, or, `whole`, from those of other cases; phases of
    fewer than three points are left out, with one feature of fewer than two."""
    found = []
    for members in by_phase(points).values():
        if len(members) < min(3, 1 + len(members[0].features)):
            continue
        for point in members:
            others = [p for p in members if p is not point and not (whole and p.case == point.case)]
            found.append(Checked(point, predict(fit(others), point.features)))
    return found


def measured_points(result: dict, *more: dict) -> list[Point]:
    """Of suite results of one machine, the first one's where several have a case, and of `STEPS`."""
    found = {}
    for each in (result, *more):
        found = {(p.phase, p.name): p for p in points(each)} | found
    steps = [p for path in STEPS for p in training_points(load(path), result)] if found else []
    return [*found.values(), *steps]


def unmodelled(result: dict, measured: Sequence[Point]) -> dict[str, int]:
    """{section: timed cases that have no point}"""
    timed = [r for r in result["results"] if any("seconds" in found for found in r["contenders"].values())]
    known = {p.case for p in measured}
    left = [r["section"] for r in timed if f"{r['section']}, {r['case']}" not in known]
    return {section: left.count(section) for section in dict.fromkeys(left)}


@dataclass(frozen=True)
class Kept:
    """Bytes that were measured and what is counted for them."""

    name: str
    measured: int
    predicted: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def within(self) -> bool:
        return abs(self.error) <= TOLERANCE


def memory_check(results: Sequence[dict]) -> list[Kept]:
    """Of results of `bench_memory.py` and of the suite: the pool's factors, and what is resident above the
    frozen model's memory, which should be no more than they."""
    found = []
    for result in results:
        isa = result["machine"]["isa"]
        for record in result["results"]:
            axes = record.get("axes", record)
            if axes.get("kind", "memory") != "memory" or axes.get("model") not in ENTRIES:
                continue
            size = Pool(ENTRIES[axes["model"]], per_task=1).factors(SHAPES[axes["model"]])
            on = record["contenders"]["on"]
            name = f"{axes['model']}, {axes['rows']} rows, {isa}"
            found.append(Kept(f"{name}: factors", on.get("pool", on.get("pool_bytes")), size))
            found.append(Kept(f"{name}: above frozen", on.get("above_frozen", on.get("memory_bytes")), size))
    return found


def peak_check(result: dict) -> list[Kept]:
    """Peaks of a suite result's decoding steps, where they say something: keys and values, of which every
    step makes new tensors, and the logits. What other calls take are activations, which are not counted."""
    found = []
    for record in result["results"]:
        axes = record["axes"]
        if axes.get("kind") != "decode" or axes["model"] not in SHAPES or record["clock"] != "wall":
            continue
        shape, rows = SHAPES[axes["model"]], axes["rows"]
        size = 4 if axes["dtype"] == "float32" else 2
        counted = shape.cache(rows * PEAK_TOKENS, size) + size * rows * shape.vocab
        for name in ("on", "off"):
            peak = record["contenders"].get(name, {}).get("peak_bytes") or 0
            if peak >= SMALL:
                found.append(Kept(f"{record['case']}, pool {name}: peak of a step", peak, counted))
    return found


@dataclass(frozen=True)
class Machine:
    """Usual speed and fitted constants of the machine of a suite result; what they were fitted to."""

    name: str
    speed: Speed
    memory: int
    slower: dict[str, float]  # products of a dtype than fp32's
    measured: list[Point]
    constants: dict[str, numpy.ndarray]

    @classmethod
    def of(cls, result: dict, measured: Sequence[Point]) -> "Machine":
        """A phase needs two points, or one where it has one constant."""
        machine, rates = result["machine"], result["ceilings"]["operations_per_second"]
        constants = {
            phase: fit(found)
            for phase, found in by_phase(measured).items()
            if len(found) >= min(2, len(found[0].features))
        }
        name = f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
        slower = {dtype: rates["float32"] / rate for dtype, rate in rates.items()}
        memory = machine.get("memory_bytes", 0)
        return cls(name, Speed.usual(result), memory, slower, list(measured), constants)

    def seconds(self, phase: str, features: Sequence[float]) -> float | None:
        """None for a phase that was not measured."""
        return predict(self.constants[phase], features) if phase in self.constants else None

    def search(self, pool: Pool, queries: int = 1) -> float:
        found = search_features(pool.entries, pool.dim, queries, self.speed)
        return predict(self.constants[SEARCH], found)

    def add(self, pool: Pool) -> float:
        """Seconds of a new task: the metric and everything that is searched, again."""
        return predict(self.constants[ADD], add_features(pool, self.speed))


def tell(name: str, measured: Sequence[Point], checked: Sequence[Checked], kept: Sequence[Kept]) -> int:
    """Print every error and how many are within; the exit status."""

    def row(phase: str, what: str, numbers: str, found: Checked | Kept) -> None:
        print(f"  {phase:32}{what:52}{numbers} {found.error:+7.1%}{'' if found.within else '  beyond'}")

    print(name)
    for c in checked:
        times = f"{duration(c.point.seconds):>9} measured {duration(c.predicted):>9} predicted"
        row(c.point.phase, c.point.name, times, c)
    for phase in by_phase(measured).keys() - {c.point.phase for c in checked}:
        print(f"  {phase:32}unchecked: too few points")
    for k in kept:
        sizes = f"{amount(k.measured):>9} measured {amount(k.predicted):>9} predicted"
        row("memory", k.name, sizes, k)
    good, memory = (sum(found.within for found in group) for group in (checked, kept))
    print(f"time: {good} of {len(checked)} within {TOLERANCE:.0%}")
    if kept:
        print(f"memory: {memory} of {len(kept)} within {TOLERANCE:.0%}")
    worst = max(abs(c.error) for c in checked)
    told = {"within": good, "points": len(checked), "largest_error": round(worst, 3)}
    print(json.dumps(told | {"memory_within": memory, "memory_points": len(kept)}))
    return int(good + memory < len(checked) + len(kept))


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf8"))


def suite_result(path: Path) -> dict:
    """Of a file of the suite, or of `gpu_check.py`, which holds one. SystemExit where it is neither."""
    found = load(path)
    found = found.get("suite", found) if isinstance(found, dict) else {}
    if missing := {"machine", "ceilings", "results"} - found.keys():
        raise SystemExit(f"{path} is no result of the suite: no {', '.join(sorted(missing))}")
    return found


def run_check(args: argparse.Namespace) -> int:
    result, *more = map(suite_result, (args.suite, *args.more))
    if card := result["machine"].get("device") == "cuda":
        if more or args.write or args.check:
            raise SystemExit(f"{args.suite} is of a GPU: it is checked alone, no page is made of it")
        from scaling_ask import card_points

    measured = card_points(result) if card else measured_points(result, *more)
    if not (checked := check(measured)):
        raise SystemExit("no phase has three points: run more of the suite")
    if card:
        return tell(result["machine"]["card"], measured, checked, [])
    machine = Machine.of(result, measured)
    kept = [*memory_check([*map(load, MEMORY), result]), *peak_check(result)]
    if args.write or args.check:
        import scaling_page

        missing, words = unmodelled(result, measured), command(args.suite, *args.more)
        page = scaling_page.document(machine, checked, kept, missing, words)
        if args.check:
            return scaling_page.compare(page)
        scaling_page.write(machine, page)
    return tell(machine.name, measured, checked, kept)


def command(*paths: Path) -> str:
    """That writes the page, from the repository's root."""
    found = [path.resolve() for path in paths]
    named = [str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path) for path in found]
    return " ".join(["python benchmarks/scaling.py check", *named, "--write"])


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main() -> None:
    from roofline import DEVICES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    checking = commands.add_parser("check", help="errors against every measured point")
    checking.add_argument("suite", type=Path, help="result of the suite")
    checking.add_argument("more", nargs="*", type=Path, help="further ones, of the same machine")
    page = checking.add_mutually_exclusive_group()
    page.add_argument("--write", action="store_true", help="docs/scaling.md and docs/scaling.png")
    page.add_argument("--check", action="store_true", help="fail where docs/scaling.md is another one")
    checking.set_defaults(run=run_check)
    asking = commands.add_parser("ask", help="what a batch costs")
    asking.add_argument(
        "--model", required=True, help=f"{', '.join(SHAPES)}, or a Hugging Face folder or name"
    )
    for name, value, words in (
        ("entries", None, "of the pool"),
        ("rows", 1, "of the batch"),
        ("tokens", 128, "of a prompt, and of a training step's row"),
        ("new", 128, "tokens that are generated for each row"),
        ("rank", 8, "of an entry"),
        ("top-k", 4, "entries that a row mixes"),
        ("per-task", 4, "entries of a task"),
        ("dim", Pool.dim, "numbers of a query"),
    ):
        asking.add_argument(f"--{name}", type=positive, default=value, required=value is None, help=words)
    words = "entries that the rows pick together (default: as many as they can)"
    asking.add_argument("--distinct", type=positive, help=words)
    asking.add_argument("--dtype", choices=SIZES, default="bf16", help="of weights and factors")
    where = asking.add_mutually_exclusive_group(required=True)
    where.add_argument("--card", choices=DEVICES, help="floors by its datasheet: no kernel reaches them")
    where.add_argument(
        "--suite", type=Path, help="a result of the suite: its machine's constants, or its card's factors"
    )
    asking.set_defaults(run=run_ask)
    args = parser.parse_args()
    raise SystemExit(args.run(args))


def run_ask(args: argparse.Namespace) -> int:
    import scaling_ask

    shape, size = find(args.model), SIZES[args.dtype]
    pool = Pool(args.entries, args.rank, args.per_task, args.dim, size)
    distinct = min(args.distinct or args.entries, args.rows * args.top_k, args.entries)
    batch = Batch(args.rows, args.tokens, args.new, min(args.top_k, args.entries), distinct)
    if args.card:
        where = scaling_ask.Card(args.card, args.dtype)
    else:
        result = suite_result(args.suite)
        if result["machine"].get("device") == "cuda":
            where = scaling_ask.Card.of(result, args.dtype)
        elif measured := measured_points(result):
            where = scaling_ask.Measured.of(Machine.of(result, measured), args.dtype)
        else:
            raise SystemExit(f"{args.suite} has no case with the CPU's pace beside it: run the suite again")
    print("\n".join(scaling_ask.answer(shape, pool, batch, where)))
    return 0


if __name__ == "__main__":
    main()
