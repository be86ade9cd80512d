"""Which op runs a frozen linear and its mixture at how many tokens and slab rows: the rows "linear" of a plan
table, from the times of `mixture` (after the linear), `fused_linear` and `segment_linear`."""

import math
import statistics
import time
from collections.abc import Callable

import gpu_timing
import gpu_workloads as workloads
import torch
from gpu_workloads import Batch, Contender
from roofline import RANK

from slm_fast import plan

Choices = dict[int | None, dict[int, str]]  # bound of tokens (None: any number) -> slab rows -> op
COLUMNS = (16, 32, 64, 96, 128, 256, 512)
# Of a phase: bound of tokens -> (rows, tokens of a row) to measure at, and the ops to choose from.
PHASES = {
    "forward": {
        "at": {16: (8, 1), 64: (64, 1), 256: (256, 1), None: (64, 16)},
        "ops": ("mixture", "fused_linear"),
    },
    "segments": {
        "at": {512: (4, 128), 4096: (32, 128), None: (128, 128)},
        "ops": ("mixture", "segment_linear", "fused_linear"),
    },
}
GAIN = 0.98  # what the table has now stays unless another op takes at most this share of its time
Measure = Callable[[list[Contender], int], dict[str, list[float]]]


def measure_on_device(contenders: list[Contender], layers: int, rounds: int = 15) -> dict[str, list[float]]:
    torch.cuda.empty_cache()
    calls = {c.name: gpu_timing.Captured(c.run, layers, c.prepare) for c in contenders}
    return gpu_timing.interleave(calls, rounds)


def choose(samples: dict[str, list[float]], now: str) -> str:
    """The fastest op, but the present one unless it is clearly slower."""
    times = {op: statistics.median(taken) for op, taken in samples.items()}
    fastest = min(times, key=times.get)
    return now if now in times and times[fastest] > GAIN * times[now] else fastest


def rows_of(choices: Choices, phase: str, card: str) -> list[dict]:
    """Table rows, the first that fits is taken: fewest tokens first, in them fewest slab rows first."""
    runs: list[tuple[int | None, list[tuple[int | None, str]]]] = []
    for bound, by_columns in choices.items():
        ends: list[tuple[int | None, str]] = []
        for columns, op in sorted(by_columns.items()):
            if ends and ends[-1][1] == op:
                ends.pop()
            ends.append((columns, op))
        ends[-1] = None, ends[-1][1]  # as the largest measured, so beyond
        if runs and runs[-1][1] == ends:
            runs.pop()
        runs.append((bound, ends))
    rows = []
    for bound, ends in runs:
        for columns, op in ends:
            row = {"op": "linear", "phase": phase, "dtype": "half"}
            row |= {} if bound is None else {"max_tokens": bound}
            row |= {} if columns is None else {"max_columns": columns}
            rows.append(row | {"tuned": card, "plan": {"kernel": op}})
    return rows


def replace_rows(table: dict, phase: str, rows: list[dict]) -> None:
    """Put `rows` in front of the phase's own, of which those for half floats go."""
    kept, at = [], None
    for row in table["rows"]:
        if (row["op"], row["phase"]) == ("linear", phase):
            at = len(kept) if at is None else at
            if row.get("dtype") == "half":
                continue
        kept.append(row)
    at = len(kept) if at is None else at
    table["rows"][:] = kept[:at] + rows + kept[at:]
    plan.find.cache_clear()


def tune(
    table: dict,
    card: str,
    end: float = math.inf,
    measure: Measure = measure_on_device,
    *,
    features: tuple[int, int] = (4096, 4096),
    columns: tuple[int, ...] = COLUMNS,
    phases: dict = PHASES,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    say: Callable[[str], object] = print,
) -> list[str]:
    """Rewrite the table's "linear" rows for half floats; a phase that the time does not suffice for stays."""
    done = []
    for phase, what in phases.items():
        choices: Choices = {}
        for bound, (rows, length) in what["at"].items():
            by_columns = choices[bound] = {}
            for slab_rows in columns:
                if time.monotonic() > end:
                    say(f"out of time: linear {phase} stays as it is")
                    return done
                entries = max(slab_rows // RANK, 1)
                settings = {"entries": entries, "dtype": dtype, "device": device}
                few = rows * length >= 256 or device == "cpu"
                layers = 2 if few else workloads.copies(2 * math.prod(features), gpu_timing.l2_bytes())
                batch = Batch(rows, length, *features, layers=layers, **settings)
                contenders = right(batch, what["ops"], say)
                if not contenders:
                    say(f"linear {phase} stays as it is: no op is right")
                    return done
                samples = measure(contenders, layers)
                sizes = (rows * length, slab_rows, *features)
                now = present(table, phase, *sizes)
                by_columns[slab_rows] = choose(samples, now)
                times = {op: f"{1e6 * statistics.median(s) / layers:.2f}" for op, s in samples.items()}
                say(f"linear {phase} {rows} x {length}, {slab_rows} slab rows: {times} us, {now} before")
        replace_rows(table, phase, rows_of(choices, phase, card))
        done.append(f"linear {phase}")
    return done


def present(table: dict, phase: str, *sizes: int) -> str:
    for row in table["rows"]:
        if (row["op"], row["phase"]) == ("linear", phase) and plan.fits(row, False, *sizes):
            return row["plan"]["kernel"]
    return "mixture"


def right(batch: Batch, names: tuple[str, ...], say) -> list[Contender]:
    """Those ops that give the formula's result."""
    contenders = []
    for op in names:
        contender = workloads.forward(batch, op)
        try:
            reason = contender.judge(contender.run(0), 0)
        except Exception as error:
            if batch.x.is_cuda:
                torch.cuda.synchronize()  # raises where a launch broke the device for all that follow
            reason = f"{type(error).__name__}: {str(error).strip()[:160]}"
        if reason:
            say(f"  {op} dropped: {reason}")
        else:
            contenders.append(contender)
    return contenders
