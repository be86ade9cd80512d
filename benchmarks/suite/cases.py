"""A case of the suite: contenders for the same work, verified first, then timed in turns.

A record of a case holds

    section, case     names; together they identify the case in another result file
    axes              {what varies: value}, for plots
    ours              the contender that ratios are about
    bytes, operations of one call of ours: the least that must be read, and multiply-adds counted twice
    dtype             of those operations, or None; "int8" are a search's codes
    clock             "wall" (CPU), or "events" (CUDA)
    pace              the CPU's speed in those minutes: medians of probes that took turns with the contenders
    contenders        {name: numbers}; `seconds` is the median, `low` and `high` the 20% and 80% quantiles,
                      and `ratio`, `ratio_low`, `ratio_high` the same of (its seconds / ours) by pairs: the
                      two samples of a round drift together. `peak_bytes`: see `memory.py`; of the call
                      that was verified, or of a graph's capture. `graph`, on CUDA: whether a call
                      replays a graph. `error` instead: why it has no time. Ours also has
                      `bytes_per_second`, `operations_per_second` and their shares of the machine's
                      ceilings, see `machine.rates`

Times are of one call; where a contender does a part of the work (one row of many), `scale` made it whole.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from gpu_timing import deviation

from suite import machine
from suite.memory import Peak

MIN_SECONDS = 0.002  # of a sample: shorter calls are repeated in it
LONG = 0.05  # seconds of a call to which the state of the caches makes no difference
VERY_LONG = 1.0  # seconds of a first call that no second one is needed to judge
PAUSE = 0.003  # libraries with OpenMP pools of their own spin for a while after each call


@dataclass
class Contender:
    """`run(i)` does the work on the i-th copy of the inputs; `check(result)` says why a result is wrong, or
    None. `numbers(result)` go into the record as they are: recall, bytes in memory. graph: `run` replays a
    CUDA graph, whose capture took `peak_bytes`."""

    name: str
    run: Callable[[int], object]
    check: Callable[[object], str | None] | None = None
    numbers: Callable[[object], dict] | None = None
    scale: float = 1.0
    graph: bool = False
    peak_bytes: int | None = None


@dataclass
class Case:
    """`copies`: of the inputs, which calls take in turns, so that each finds the caches cold.

    warm: right after a call that is not timed, of the copy before, where calls are short.
    skipped: {contender: why it does not take part}; of a case without contenders ours.
    """

    section: str
    name: str
    axes: dict
    contenders: list[Contender]
    ours: str = "slm_fast"
    bytes: int | None = None
    operations: int | None = None
    copies: int = 1
    dtype: str | None = None
    warm: bool = True
    skipped: dict[str, str] = field(default_factory=dict)


def contenders_of(
    calls: dict[str, Callable], rows: int = 1, wrong: dict[str, str] | None = None
) -> list[Contender]:
    """Of calls without arguments; `dense` answers one of the `rows`. Graphs have a `replay`, as
    `gpu_timing.Captured`. wrong: {contender: why it must not be timed}, whether it has a call or not."""
    found = []
    for name in dict.fromkeys([*calls, *(wrong or {})]):
        call, reason = calls.get(name), (wrong or {}).get(name)
        options = dict(scale=rows if name == "dense" else 1.0)
        if (replay := getattr(call, "replay", None)) is not None:
            options |= dict(graph=True, peak_bytes=replay.peak_bytes)
        if reason is None:
            found.append(Contender(name, lambda _, call=call: call(), **options))
        else:
            found.append(Contender(name, lambda _: None, lambda _, reason=reason: reason))
    return found


@dataclass(frozen=True)
class Effort:
    """How long a case is measured: at least `least` rounds, then until `seconds` have gone or `most` are
    done."""

    least: int
    most: int
    seconds: float


QUICK, FULL = Effort(3, 30, 1.0), Effort(5, 40, 5.0)


class Wall:
    """Seconds of calls on the CPU."""

    name = "wall"

    def pause(self) -> None:
        time.sleep(PAUSE)

    def __call__(self, run: Callable[[int], object], first: int, repeats: int) -> float:
        begin = time.perf_counter()
        for i in range(first, first + repeats):
            run(i)
        return (time.perf_counter() - begin) / repeats


class Events:
    """Seconds of calls on a CUDA device, between two events; the call in front lets the host run ahead."""

    name = "events"

    def pause(self) -> None:
        torch.cuda.synchronize()

    def __call__(self, run: Callable[[int], object], first: int, repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run(first - 1)
        begin.record()
        for i in range(first, first + repeats):
            run(i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / repeats


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:200]}"


def clock_of(device: str) -> Wall | Events:
    return Events() if device == "cuda" else Wall()


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(20%, median, 80%)"""
    if len(values) < 2:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def take_turns(
    runs: dict[str, Callable], first: dict[str, float], case: Case, effort: Effort, clock, probes=()
) -> dict[str, list[float]]:
    """Seconds per call of each contender, a sample a round, in ever another order. first: of first calls;
    probes: those that are warm in any case."""
    once, turn, samples = dict(first), dict.fromkeys(runs, 0), {name: [] for name in runs}
    for name, run in runs.items():
        if first[name] < VERY_LONG:  # the first one may have had something to set up
            once[name] = clock(run, 1 % case.copies, 1)
        if once[name] < LONG:
            once[name] = min(once[name], clock(run, 2 % case.copies, 1))
    repeats = {name: max(1, math.ceil(MIN_SECONDS / max(seconds, 1e-7))) for name, seconds in once.items()}
    order, begin = random.Random(0), time.perf_counter()
    for done in range(effort.most):
        if done >= effort.least and time.perf_counter() - begin > effort.seconds:
            break
        for name in order.sample(list(runs), len(runs)):
            clock.pause()
            if (case.warm or name in probes) and once[name] < LONG:
                runs[name](turn[name] - 1)  # what the contender before left in the caches must not count
            samples[name].append(clock(runs[name], turn[name], repeats[name]))
            turn[name] += repeats[name]
    return samples


def numbers_of(
    samples: Sequence[float], ours: Sequence[float] | None, scale: float, ours_scale: float
) -> dict:
    low, middle, high = (scale * value for value in quantiles(samples))
    found = {"seconds": middle, "low": low, "high": high, "rounds": len(samples)}
    if ours is None:
        return found
    ratios = [scale * a / (ours_scale * b) for a, b in zip(samples, ours, strict=True)]
    return found | dict(zip(("ratio_low", "ratio", "ratio_high"), quantiles(ratios), strict=True))


def measure(case: Case, effort: Effort, clock=None) -> dict:
    """The record of a case. Ours that fails raises; a peer that fails has its words instead of a time."""
    clock = clock or Wall()
    record = {"section": case.section, "case": case.name, "axes": case.axes, "ours": case.ours}
    record |= {"bytes": case.bytes, "operations": case.operations, "dtype": case.dtype}
    record |= {"clock": clock.name, "contenders": {}}
    runs, first, found = {}, {}, record["contenders"]
    probes = machine.probes() if clock.name == "wall" and case.contenders else {}
    for contender in case.contenders:
        try:
            with Peak(clock.name) as peak:
                begin = time.perf_counter()
                result = contender.run(0)
                first[contender.name] = time.perf_counter() - begin
            reason = contender.check(result) if contender.check else None
            numbers = contender.numbers(result) if contender.numbers else {}
            numbers["peak_bytes"] = contender.peak_bytes if contender.graph else peak.bytes
            del result
        except Exception as error:  # a peer's failure is a finding; ours is raised below
            reason, numbers = reason_of(error), {}
        found[contender.name] = numbers if reason is None else {}
        if clock.name == "events":
            found[contender.name]["graph"] = contender.graph
        if reason is None:
            run = contender.run
            runs[contender.name] = lambda i, run=run: run(i % case.copies)
        elif contender.name == case.ours:
            raise RuntimeError(f"{case.section}, {case.name}: {reason}; nothing is timed")
        else:
            found[contender.name]["error"] = reason
    samples = take_turns(runs | probes, first | dict.fromkeys(probes, 0.0), case, effort, clock, probes)
    if probes:
        record["pace"] = machine.pace({name: statistics.median(samples.pop(name)) for name in probes})
    scales = {contender.name: contender.scale for contender in case.contenders}
    for name, taken in samples.items():
        found[name] |= numbers_of(taken, samples.get(case.ours), scales[name], scales.get(case.ours, 1.0))
    for name, reason in case.skipped.items():
        found[name] = {"error": reason}
    return record


def measured(cases: Iterator[Case], device: str, effort: Effort) -> Iterator[dict]:
    """Their records; a case is built when its turn comes and is gone before the next."""
    for case in cases:
        yield measure(case, effort, clock_of(device))
        del case
        gc.collect()


def target(what: str, reached: float, relation: str, wanted: float) -> dict:
    """A number that a section has to reach."""
    holds = reached >= wanted if relation == ">=" else reached <= wanted
    return {"what": what, "reached": reached, "wanted": f"{relation} {wanted:g}", "holds": holds}


def near(want: torch.Tensor, tolerance: float) -> Callable[[torch.Tensor], str | None]:
    """A check: at most `tolerance` of the largest wanted value off."""

    def check(got: torch.Tensor) -> str | None:
        error = deviation(got, want)
        return None if error <= tolerance else f"wrong result: error {error:.1e}, allowed {tolerance:.0e}"

    return check
