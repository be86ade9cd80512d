"""Choose the tiles of the plan table by measurement on the card at hand, and between the ops of a linear.

For each bf16 row of the table of this architecture, `slm_fast/plans/sm_<nn>.json`, and shapes of
LLaMA-2-7B that the row serves, one number of the plan after the other is varied (`tile_grid.py`). A candidate
that does not compile, spills or differs from the fp32 formula is dropped, with the reason; the others are
timed in CUDA graphs, in turns with the best plan so far, and have to beat it by half a percent and more
often than not. Rows that this card has tuned already are left alone. The op "linear" measures which of
`fused_linear`, `segment_linear` and `mixture` to take at each number of tokens and slab rows. The table is
written after every row. Run `make audit` on the result.

    PYTHONPATH=. python benchmarks/tune.py --op all --budget 500 [--output FILE]
"""

import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gpu_timing
import gpu_workloads as workloads
import linear_choice
import tile_grid
import torch
from gpu_workloads import Batch, Contender

from slm_fast import dispatch, plan

OPS = ("mixture", "fused_linear", "norm_shrink", "silu_mul_shrink")
TOKENS = (1, 8, 16, 64, 4096, 16384)
O_PROJ, DOWN = (4096, 4096), (11008, 4096)  # in_features, out_features
ROW = 128  # tokens of a row beyond decoding
MAX_SHAPES = 3  # of a row
GAIN = 0.995  # the ratio of times below which a candidate is better
SPILLS = "spills registers"
KB = 1024
SHARED_LIMIT = {"sm_80": 99 * KB}  # of a block; 227 KB on later ones


@dataclass(frozen=True)
class Shape:
    """A problem that a row serves. op: that of `gpu_workloads`; kind: of u's columns, for the shrinks."""

    op: str
    rows: int
    length: int
    features: tuple[int, int]  # in, out
    entries: int = workloads.ENTRIES
    rank: int = workloads.RANK
    top_k: int = workloads.TOP_K
    kind: str = "gather"

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def columns(self) -> int:
        resident = self.op == "fused_linear" or self.kind == "resident"
        return self.entries * self.rank if resident else self.top_k * self.rank

    def __str__(self) -> str:
        size = f"{self.features[0]}->{self.features[1]}"
        return f"{self.op} {self.rows} x {self.length} tokens {size}, {self.columns} columns"

    def contender(self, phase: str, dtype: torch.dtype, device: str) -> tuple[Contender, int]:
        """(the work of this shape, the number of layers that keep their parameters out of L2)."""
        in_features, out_features = self.features
        sizes = {"entries": self.entries, "rank": self.rank, "top_k": self.top_k}
        settings = {**sizes, "dtype": dtype, "device": device}
        shrinks = self.op in ("norm_shrink", "silu_mul_shrink")
        linears = 3 if self.op == "norm_shrink" else 1
        read = self.entries * self.rank * linears if shrinks else out_features
        few = self.tokens >= 2 * ROW or device == "cpu"
        l2 = 0 if few else gpu_timing.l2_bytes()
        layers = workloads.copies(2 * in_features * read, l2)
        settings |= {"layers": layers, "linears": linears}
        if shrinks:
            batch = Batch(self.rows, self.length, in_features, **settings)
            make = workloads.shrink_backward if phase == "backward" else workloads.shrink
            return make(batch, self.op, self.kind), layers
        batch = Batch(self.rows, self.length, in_features, out_features, **settings)
        make = workloads.backward if phase == "backward" else workloads.forward
        return make(batch, self.op), layers


def row_of(rows: list[dict], op: str, phase: str, full: bool, tokens, columns, in_features, out_features):
    """The row that `plan.find` takes, None if none fits."""
    for row in rows:
        if (row["op"], row["phase"]) == (op, phase):
            if plan.fits(row, full, tokens, columns, in_features, out_features):
                return row
    return None


def shapes_of(row: dict, rows: list[dict], features=(O_PROJ, DOWN), tokens=TOKENS) -> list[Shape]:
    """A few shapes that `row` serves: fewest tokens, most, and one between."""
    bound = row.get("max_tokens", max(tokens))
    found: list[Shape] = []
    for count in sorted({*tokens, bound}):
        rows_and_length = (count, 1) if count < 2 * ROW else (count // ROW, ROW)
        serving = [
            shape
            for shape in variants(row, *rows_and_length, features)
            if row_of(rows, row["op"], row["phase"], row.get("dtype") == "float", *lookup(row, shape)) is row
        ]
        found += serving[-1:]
    return [found[i] for i in sorted({0, len(found) // 2, len(found) - 1})] if found else []


def lookup(row: dict, shape: Shape) -> tuple[int, int, int, int]:
    """(tokens, columns, in_features, out_features) as `dispatch` looks them up."""
    in_features, out_features = shape.features
    if row["op"] == "fused_linear" and row["phase"] == "backward":  # dx is the linear of the backward
        in_features, out_features = out_features, in_features
    return shape.tokens, shape.columns, in_features, out_features


def variants(row: dict, rows: int, length: int, features) -> Iterator[Shape]:
    """The numbers of columns at which an op is asked for, the one to be tuned for last."""
    (in_features, out_features), (inter, _) = features
    op, square = row["op"], (in_features, out_features)
    if op == "mixture":
        yield Shape(op, rows, length, square, rank=12, top_k=4)
        yield Shape(op, rows, length, square)
    elif op == "fused_linear":
        for entries in (2, 4, 8, 2 * workloads.ENTRIES, workloads.ENTRIES):
            yield Shape(op, rows, length, square, entries=entries)
        if length >= dispatch.LONG_ROW:
            yield Shape("segment_linear", rows, length, square)
    else:
        shape = (in_features, in_features) if op == "norm_shrink" else (inter, inter)
        yield Shape(op, rows, length, shape, kind="gather")
        yield Shape(op, rows, length, shape, kind="resident")


@contextlib.contextmanager
def in_use(row: dict, candidate: dict) -> Iterator[None]:
    """The ops launch a row with another plan."""
    kept, row["plan"] = row["plan"], candidate
    plan.find.cache_clear()
    try:
        yield
    finally:
        row["plan"] = kept
        plan.find.cache_clear()


@dataclass
class Trial:
    """A plan at a shape."""

    row: dict
    plan: dict
    contender: Contender
    layers: int
    call: Callable[[], object] | None = None  # kept by who measures

    def fault(self) -> str | None:
        """Why the plan cannot be used, or None: it runs once and is held against the formula."""
        spilled = spills()
        try:
            with in_use(self.row, self.plan):
                if self.contender.prepare is not None:
                    self.contender.prepare()
                reason = self.contender.judge(self.contender.run(0), 0)
        except Exception as error:  # the compiler's own words are the reason
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises where a launch broke the device for all that follow
            return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"
        return reason or (SPILLS if spills() > spilled else None)


def spills() -> int:
    """Kernel variants of this process that spill registers."""
    kernels = {
        id(value): value
        for name, module in list(sys.modules.items())
        if name.startswith("slm_fast.kernels.")
        for value in vars(module).values()
        if hasattr(value, "device_caches")
    }
    compiled = (
        k for f in kernels.values() for caches in f.device_caches.values() for k in caches[0].values()
    )
    return sum(bool(getattr(kernel, "n_spills", 0)) for kernel in compiled)


Measure = Callable[[dict[str, Trial]], dict[str, list[float]]]


def measure_on_device(trials: dict[str, Trial], rounds: int = 15) -> dict[str, list[float]]:
    torch.cuda.empty_cache()  # the graphs of dropped candidates held memory of their own
    for trial in trials.values():
        if trial.call is None:
            with in_use(trial.row, trial.plan):
                contender = trial.contender
                trial.call = gpu_timing.Captured(contender.run, trial.layers, contender.prepare)
    return gpu_timing.interleave({name: trial.call for name, trial in trials.items()}, rounds)


class Tuner:
    """Tunes rows of a loaded table in place. `measure` times the trials of one shape, in turns."""

    def __init__(
        self,
        table: dict,
        card: str,
        measure: Measure = measure_on_device,
        *,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        features=(O_PROJ, DOWN),
        tokens=TOKENS,
        say: Callable[[str], object] = print,
    ) -> None:
        self.table, self.card, self.measure, self.say = table, card, measure, say
        self.device, self.dtype, self.features, self.tokens = device, dtype, features, tokens
        self.spilled: set[str] = set()  # tiles whose variant this process has loaded before

    def tune_row(self, row: dict, deadline: float = math.inf) -> None:
        """Leave the best plan in `row`; a row without a usable shape stays as it is."""
        shapes = shapes_of(row, self.table["rows"], self.features, self.tokens)
        work = [shape.contender(row["phase"], self.dtype, self.device) for shape in shapes]
        original = [Trial(row, row["plan"], contender, layers) for contender, layers in work]
        self.say(f"{label(row)}: {len(shapes)} shapes")
        for shape, trial in zip(shapes, original, strict=True):
            if reason := trial.fault():
                self.say(f"  left as it is, the plan fails at {shape}: {reason}")
                return
        if not shapes:
            return
        best = original
        for kernel in tile_grid.kernels(row["op"], row["plan"]):
            if kernel != best[0].plan["kernel"]:
                candidate = best[0].plan | {"kernel": kernel}
                best = self.better(row, candidate, "kernel", best, f"kernel={kernel}")
        for part, key, values in tile_grid.steps(row["op"], row["phase"], best[0].plan):
            for value in values:
                now = best[0].plan[part] if key is None else best[0].plan[part][key]
                if value == now:
                    continue
                if time.monotonic() > deadline:
                    self.say("  out of time: what was not tried stays")
                    return self.settle(row, shapes, original, best)
                candidate = tile_grid.changed(best[0].plan, part, key, value)
                best = self.better(row, candidate, part, best, f"{part} {key or ''}={value}")
        self.settle(row, shapes, original, best)

    def better(self, row: dict, candidate: dict, part: str, best: list[Trial], what: str) -> list[Trial]:
        """The candidate's trials if it beats `best` over all shapes, else `best`."""
        limit = SHARED_LIMIT.get(self.table["architecture"], 227 * KB)
        reason = tile_grid.refusal(row, candidate, part, limit, self.table["architecture"])
        trials = [Trial(row, candidate, trial.contender, trial.layers) for trial in best]
        tiles = json.dumps([row["op"], row["phase"], part, candidate[part]])
        reason = reason or (SPILLS if tiles in self.spilled else None)
        ratios, quartile = [], 0.0
        for trial, other in zip(trials, best, strict=True):
            reason = reason or trial.fault()
            if reason == SPILLS:
                self.spilled.add(tiles)
            if reason:
                self.say(f"  {what}: dropped, {reason}")
                return best
            samples = self.measure({"best": other, "candidate": trial})
            pairs = gpu_timing.ratios(samples["candidate"], samples["best"])
            ratios.append(statistics.median(pairs))
            quartile = max(quartile, gpu_timing.quartiles(pairs)[2]) if ratios[-1] < 1 else quartile
        ratio = statistics.geometric_mean(ratios)
        wins = ratio < GAIN and quartile < 1
        self.say(f"  {what}: {ratio:.3f}{' better' if wins else ''}")
        return trials if wins else best

    def settle(self, row: dict, shapes: list[Shape], original: list[Trial], best: list[Trial]) -> None:
        """Time the winner against what the row had, once more, and keep the better of the two."""
        row["tuned"] = self.card
        if best is original:
            return
        ratios = []
        for shape, before, after in zip(shapes, original, best, strict=True):
            samples = self.measure({"before": before, "after": after})
            ratios.append(statistics.median(gpu_timing.ratios(samples["after"], samples["before"])))
            times = [1e6 * statistics.median(samples[name]) / before.layers for name in ("before", "after")]
            self.say(f"  {shape}: {times[0]:.2f} -> {times[1]:.2f} us")
        if statistics.geometric_mean(ratios) < 1:
            row["plan"] = best[0].plan
            plan.find.cache_clear()
        else:
            self.say("  not confirmed, the row keeps its plan")


def label(row: dict) -> str:
    limits = [f"{key}<={row[key]}" for key in ("max_tokens", "max_columns") if key in row]
    return " ".join([row["op"], row["phase"], *limits])


def write_table(path: Path, table: dict) -> None:
    """A row a line, as the tables are kept; the file is replaced as a whole."""
    head = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items() if k != "rows")
    rows = ",\n".join(f"    {json.dumps(row)}" for row in table["rows"])
    partial = path.with_name(path.name + ".part")
    partial.write_text(f'{{\n{head},\n  "rows": [\n{rows}\n  ]\n}}\n', encoding="utf8")
    partial.replace(path)


def tune_rows(tuner: Tuner, chosen: tuple[str, ...], end: float, path: Path, again: bool) -> list[str]:
    """Tune the half rows of some ops, each with an equal share of the time that is left; their labels."""
    waiting = [
        row
        for row in tuner.table["rows"]
        if row["op"] in chosen and row.get("dtype") == "half" and (again or row["tuned"] != tuner.card)
    ]
    done = []
    for i, row in enumerate(waiting):
        left = end - time.monotonic()
        if left <= 0:
            tuner.say(f"out of time: {len(waiting) - i} rows left as they are")
            break
        tuner.tune_row(row, time.monotonic() + left / (len(waiting) - i))
        done.append(label(row))
        write_table(path, tuner.table)
        gc.collect()
        if tuner.device == "cuda":
            torch.cuda.empty_cache()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=(*OPS, "linear", "all"), default="all")
    parser.add_argument("--budget", type=float, default=500, help="seconds")
    parser.add_argument("--output", type=Path, help="the table to write; default: the package's own")
    parser.add_argument("--again", action="store_true", help="also rows that this card has tuned")
    args = parser.parse_args()
    if (reason := dispatch.available()["gpu"]) is not None or not torch.cuda.is_available():
        raise SystemExit(f"no GPU to tune for: {reason or 'torch sees no CUDA device'}")
    torch.set_float32_matmul_precision("highest")
    end = time.monotonic() + args.budget
    architecture = plan.architecture_of(torch.cuda.get_device_capability())
    table, card = plan.load(architecture), torch.cuda.get_device_name()
    path = args.output or plan.FOLDER / f"{architecture}.json"
    print(f"{card}, {architecture}, to {path}", flush=True)
    tuner = Tuner(table, card, say=lambda text: print(text, flush=True))
    done = tune_rows(tuner, OPS if args.op == "all" else (args.op,), end, path, args.again)
    if args.op in ("linear", "all") and time.monotonic() < end:
        done += linear_choice.tune(table, card, end, say=tuner.say)
        write_table(path, table)
    print(json.dumps({"card": card, "architecture": architecture, "rows": done, "output": str(path)}))


if __name__ == "__main__":
    main()
