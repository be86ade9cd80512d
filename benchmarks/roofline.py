"""Bytes, operations and floor times of the kernels at real shapes. Counted, not measured.

Each `count_*` function below says what one kernel moves: HBM bytes, every tensor once; L2 bytes, what the
update's blocks read again (the linear's own tiles are not in it: any GEMM has them); operations, a multiply-
add is two. Rank-space vectors are fp32, so products with them are tf32 ones, at half the bf16 rate. The floor
of a kernel is the longer of

    HBM bytes / datasheet bandwidth,    (bf16 operations + 2 * tf32 operations) / reached bf16 rate

and contains no launch, no gap between launches and no latency: a kernel can be slower than its floor, never
faster. Several launches are given twice: one after the other, and overlapped as far as programmatic dependent
launch and a second stream can (the longer of the summed resources). L2 reads run beside HBM and the tensor
cores where a kernel hides them: their time at an assumed rate stands in a column of its own, as what they
cost if nothing does.
Shares are of the frozen linear's own floor.

    python benchmarks/roofline.py [--device H100]
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

from slm_fast import plan

HALF, FLOAT, KEY_BYTES = 2, 4, 4
TOKENS = (1, 8, 64, 4096, 16384)
TOP_K, RANK, ENTRIES = 2, 8, 12
RESIDENT = ENTRIES * RANK  # slab rows of a resident pool, 96
OWNED = 4 * RANK  # slab rows that a task trains: 4 entries
ROW = 128  # tokens of a row in prefill and training
REACHED = 0.81  # of the datasheet's tensor rate: 800 of 989 TFLOP/s on an H100, assumed alike elsewhere
L2_TO_HBM = 1.65  # 5.5 TB/s on an H100, an assumption; no datasheet states it


@dataclass(frozen=True)
class Device:
    """Datasheet rates: dense bf16 on the tensor cores, fp32 outside them."""

    name: str
    hbm: float  # bytes/s
    tensor: float  # operations/s
    vector: float  # operations/s
    table: str  # of plans
    memory: float  # bytes

    @property
    def dependent_launch(self) -> bool:
        """Programmatic dependent launch: sm_90 and later."""
        return self.table != "sm_80"

    def floor(self, cost: "Cost") -> float:
        """Seconds."""
        return max(cost.hbm / self.hbm, (cost.operations + 2 * cost.tf32) / (self.tensor * REACHED))

    def l2_time(self, cost: "Cost") -> float:
        return cost.l2 / (self.hbm * L2_TO_HBM)

    def serial(self, *costs: "Cost") -> float:
        return sum(self.floor(cost) for cost in costs)

    def overlapped(self, *costs: "Cost") -> float:
        """The least time of kernels that may run side by side; on older cards they cannot."""
        return self.floor(sum(costs, Cost())) if self.dependent_launch else self.serial(*costs)


DEVICES = {
    "A100": Device("A100 SXM 80GB", 2.04e12, 312e12, 19.5e12, "sm_80", 80e9),
    "H100": Device("H100 SXM", 3.35e12, 989e12, 67e12, "sm_90", 80e9),
    "H200": Device("H200", 4.8e12, 989e12, 67e12, "sm_90", 141e9),
    "B200": Device("B200", 8e12, 2250e12, 75e12, "sm_100", 180e9),
}


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    inter: int
    layers: int
    gated: bool  # RMSNorm before q, k, v and silu(gate) * up before down


MODELS = (
    Model("LLaMA-2-7B", 4096, 11008, 32, True),
    Model("LLaMA-2-13B", 5120, 13824, 40, True),
    Model("BERT-base", 768, 3072, 12, False),
    Model("T5-large", 1024, 4096, 48, False),
)


@dataclass(frozen=True)
class Cost:
    hbm: float = 0.0
    l2: float = 0.0
    operations: float = 0.0  # bf16
    tf32: float = 0.0  # operations

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.hbm + other.hbm,
            self.l2 + other.l2,
            self.operations + other.operations,
            self.tf32 + other.tf32,
        )


@dataclass(frozen=True)
class LinearTiles:
    """What decides the L2 traffic of `fused_linear` and the columns that it expands: tile, partial sums."""

    block_m: int
    block_n: int
    splits: int
    block_c: int = 16

    @staticmethod
    def of(device: Device, phase: str, tokens: int, in_features: int, out_features: int) -> "LinearTiles":
        """From the plan table of the device; a backward's u has one part."""
        sizes = (tokens, RESIDENT, in_features, out_features)
        found = plan.find(device.table, "fused_linear", phase, False, *sizes)
        splits = found["splits"] if phase == "forward" else 1
        linear = found["linear"]
        return LinearTiles(linear["BLOCK_M"], linear["BLOCK_N"], splits, linear["BLOCK_C"])

    def expanded(self, tokens: int, rows: int) -> int:
        """Rank columns that a tile expands: the blocks that hold an entry which one of its rows picks. Rows
        have one token while decoding, ROW in prefill."""
        rows_of_tile = min(tokens, self.block_m) if tokens <= 64 else math.ceil(self.block_m / ROW)
        blocks = min(distinct(rows_of_tile), math.ceil(rows / self.block_c))
        return min(blocks * self.block_c, rows)


def distinct(tokens: int) -> int:
    """Entries that the rows of a decoding batch pick: top_k each, at most all of them."""
    return min(ENTRIES, TOP_K * tokens)


def count_linear(tokens: int, in_features: int, out_features: int) -> Cost:
    """y = W x: s (in out + T in + T out) bytes, 2 T in out operations."""
    hbm = HALF * (in_features * out_features + tokens * (in_features + out_features))
    return Cost(hbm, 0, 2 * tokens * in_features * out_features)


def count_one_pass(tokens: int, in_features: int, out_features: int, block_n: int = 256) -> Cost:
    """U r (in + out) s + T (in + 2 out) s bytes; every block of outputs shrinks again, so L2 serves
    T (C + 1) in s bytes a block, and 2 T C in operations a block are made."""
    columns, blocks = TOP_K * RANK, math.ceil(out_features / block_n)
    factors = distinct(tokens) * RANK * (in_features + out_features) * HALF
    hbm = factors + tokens * (in_features + 2 * out_features) * HALF
    l2 = tokens * HALF * (columns + 1) * in_features * blocks
    return Cost(hbm, l2, 2 * tokens * columns * (in_features * blocks + out_features))


def count_shrink(tokens: int, in_features: int, columns: int, rows: int, splits: int = 1) -> Cost:
    """u = A x: T in s (x) + rows in s (A) + 4 splits T C (u) bytes, 2 T C in operations."""
    hbm = HALF * in_features * (tokens + rows) + FLOAT * splits * tokens * columns
    return Cost(hbm, 0, 2 * tokens * columns * in_features)


def count_expand(tokens: int, out_features: int, columns: int, rows: int, splits: int = 1) -> Cost:
    """y += B u: 2 T out s (y) + rows out s (B) + 4 splits T C (u) bytes, 2 T C out operations in tf32; L2
    serves u once a block of 256 outputs."""
    u = FLOAT * splits * tokens * columns
    hbm = HALF * out_features * (2 * tokens + rows) + u
    return Cost(hbm, u * math.ceil(out_features / 256), 0, 2 * tokens * columns * out_features)


def count_gather(tokens: int, in_features: int, out_features: int) -> tuple[Cost, ...]:
    """`mixture`: one launch up to 4 tokens, else shrink and expand."""
    if tokens <= 4:
        return (count_one_pass(tokens, in_features, out_features),)
    splits = 8 if tokens <= 256 else 1
    sizes = {"columns": TOP_K * RANK, "rows": distinct(tokens) * RANK, "splits": splits}
    return count_shrink(tokens, in_features, **sizes), count_expand(tokens, out_features, **sizes)


def count_fused_linear(
    tokens: int,
    in_features: int,
    out_features: int,
    tiles: LinearTiles,
    *,
    inline: bool = False,
    rows: int = RESIDENT,
    expanded: int | None = None,
) -> Cost:
    """The linear, + R out s (B) + 4 splits T E (u) bytes, + 2 T E out operations in tf32; E are the columns
    that a tile expands, of R; of gathered entries those of its rows.

    L2: E rows of B once a block of tokens and u, all its partial sums, once a block of outputs. Inline reads
    no u but all of A in every block, and shrinks again there: 2 T R in operations a block of outputs.
    """
    blocks_m, blocks_n = math.ceil(tokens / tiles.block_m), math.ceil(out_features / tiles.block_n)
    expanded = tiles.expanded(tokens, rows) if expanded is None else expanded
    u = 0 if inline else FLOAT * tiles.splits * tokens * expanded
    A = rows * HALF * in_features if inline else 0
    operations = 2 * tokens * rows * in_features * blocks_n if inline else 0
    l2 = A * blocks_m * blocks_n + expanded * HALF * out_features * blocks_m + u * blocks_n
    update = Cost(A + rows * HALF * out_features + u, l2, operations, 2 * tokens * expanded * out_features)
    return count_linear(tokens, in_features, out_features) + update


def count_segments(tokens: int, in_features: int, out_features: int, tiles: LinearTiles) -> tuple[Cost, Cost]:
    """(u = A x, the linear with the mixture) of gathered entries: a tile expands its rows' columns."""
    columns, rows = TOP_K * RANK, distinct(tokens) * RANK
    expanded = columns * math.ceil(tiles.block_m / ROW)
    shrink = count_shrink(tokens, in_features, columns, rows)
    linear = count_fused_linear(tokens, in_features, out_features, tiles, rows=rows, expanded=expanded)
    return shrink, linear


def count_factor_grads(tokens: int, in_features: int, out_features: int, columns: int) -> Cost:
    """dA and dB read x and dy once more, for the rows that the task owns: T (in + out) s bytes, 2 T owned
    (in + out) operations in tf32, + 8 T (C + 2 owned) bytes for the coefficients."""
    features = in_features + out_features
    hbm = HALF * tokens * features + FLOAT * OWNED * features + 2 * FLOAT * tokens * (columns + 2 * OWNED)
    return Cost(hbm, 0, 0, 2 * tokens * OWNED * features)


def count_norm(tokens: int, features: int) -> Cost:
    """2 T in s bytes: x in, h out."""
    return Cost(2 * tokens * features * HALF + features * HALF)


def count_norm_shrink(tokens: int, features: int, linears: int, columns: int, rows: int, splits: int) -> Cost:
    """The norm, + L rows in s (A) + 4 L splits T C (u) bytes, + 2 L T C in operations."""
    hbm = linears * (rows * features * HALF + FLOAT * splits * tokens * columns)
    return count_norm(tokens, features) + Cost(hbm, 0, 2 * linears * tokens * columns * features)


def count_silu_mul(tokens: int, features: int) -> Cost:
    """3 T in s bytes: gate and up in, h out."""
    return Cost(3 * tokens * features * HALF)


def count_silu_mul_shrink(tokens: int, features: int, columns: int, rows: int, splits: int) -> Cost:
    """The activation, + rows in s (A) + 4 splits T C (u) bytes, + 2 T C in operations."""
    hbm = rows * features * HALF + FLOAT * splits * tokens * columns
    return count_silu_mul(tokens, features) + Cost(hbm, 0, 2 * tokens * columns * features)


def count_key_search(queries: int, keys: int, dim: int, top_k: int = 4) -> Cost:
    """keys (dim s + 4 (bias)) bytes; 2 queries keys dim operations in fp32, outside the tensor cores. Groups
    of 8 queries run side by side and share the keys through L2."""
    hbm = keys * (dim * HALF + KEY_BYTES) + queries * (dim * FLOAT + top_k * 12)
    return Cost(hbm, math.ceil(queries / 8) * keys * dim * HALF, 2 * queries * keys * dim)


def share(added: float, frozen: float) -> float:
    """Percent of the frozen linear's floor."""
    return 100 * added / frozen


def targets(tokens: int) -> dict[str, float]:
    """Percent of the frozen linear that a path may cost."""
    if tokens <= 64:
        return {"gather": 15.0, "fused": 8.0}
    return {"gather": 5.0, "fused": 5.0, "backward": 10.0}


@dataclass(frozen=True)
class Line:
    """One path of one linear: what it moves beyond the frozen linear and the least that this costs."""

    path: str
    cost: Cost
    seconds: float
    percent: float
    l2_percent: float  # on top, if nothing hides the L2 reads
    target: float | None

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        if self.percent > self.target:
            return "the floor itself exceeds it"
        return "within" if self.percent + self.l2_percent <= self.target else "within if L2 reads are hidden"


def paths(device: Device, tokens: int, in_features: int, out_features: int) -> list[Line]:
    """All paths of a linear at a number of tokens."""
    frozen = count_linear(tokens, in_features, out_features)
    base = device.floor(frozen)
    target = targets(tokens)
    gather = count_gather(tokens, in_features, out_features)
    tiles = LinearTiles.of(device, "forward", tokens, in_features, out_features)
    shrink = count_shrink(tokens, in_features, RESIDENT, RESIDENT, tiles.splits)
    fused = count_fused_linear(tokens, in_features, out_features, tiles)

    def line(path, costs, seconds, kind):
        total = sum(costs, Cost())
        added = Cost(total.hbm - frozen.hbm, total.l2, total.operations - frozen.operations, total.tf32)
        l2 = share(device.l2_time(total), base)
        return Line(path, added, seconds - base, share(seconds - base, base), l2, target.get(kind))

    lines = [
        line("gather", (frozen, *gather), base + device.serial(*gather), "gather"),
        line("fused, shrink first", (shrink, fused), device.serial(shrink, fused), "fused"),
        line("fused, overlapped", (shrink, fused), device.overlapped(shrink, fused), "fused"),
        line("fused, u given", (fused,), device.floor(fused), "fused"),
    ]
    for rows in (2 * TOP_K * RANK, RESIDENT):
        inline = count_fused_linear(tokens, in_features, out_features, tiles, inline=True, rows=rows)
        lines.append(line(f"fused, inline, {rows} slab rows", (inline,), device.floor(inline), "fused"))
    if tokens > 64:
        segments = count_segments(tokens, in_features, out_features, tiles)
        lines.append(line("segments, shrink first", segments, device.serial(*segments), "fused"))
        lines.append(line("segments, overlapped", segments, device.overlapped(*segments), "fused"))
        # dx is the linear of the backward, dy its input.
        tiles = LinearTiles.of(device, "backward", tokens, out_features, in_features)
        g = count_shrink(tokens, out_features, RESIDENT, RESIDENT)
        resident = g, count_fused_linear(tokens, out_features, in_features, tiles)
        for name, columns, (g, dx) in (
            ("fused", RESIDENT, resident),
            ("segments", TOP_K * RANK, count_segments(tokens, out_features, in_features, tiles)),
        ):
            factors = count_factor_grads(tokens, in_features, out_features, columns)
            costs = g, dx, factors
            beside = device.floor(g) + device.floor(dx + factors)
            lines.append(line(f"{name} backward, serial", costs, device.serial(*costs), "backward"))
            lines.append(line(f"{name} backward, g first", costs, beside, "backward"))
            lines.append(line(f"{name} backward, overlapped", costs, device.overlapped(*costs), "backward"))
    return lines


def shrinks(device: Device, model: Model, tokens: int) -> Iterator[Line]:
    """The norm and the activation that also shrink: what they add to the norm or activation alone, as a share
    of the linears behind them."""
    splits = 8 if tokens <= 256 else 1
    for kind in ("gather", "resident"):
        columns = TOP_K * RANK if kind == "gather" else RESIDENT
        rows = distinct(tokens) * RANK if kind == "gather" else RESIDENT
        qkv = 3 * device.floor(count_linear(tokens, model.hidden, model.hidden))
        plain = count_norm(tokens, model.hidden)
        whole = count_norm_shrink(tokens, model.hidden, 3, columns, rows, splits)
        yield shrink_line(device, f"norm_shrink, q k v, {kind}", plain, whole, qkv)
        down = device.floor(count_linear(tokens, model.inter, model.hidden))
        plain = count_silu_mul(tokens, model.inter)
        whole = count_silu_mul_shrink(tokens, model.inter, columns, rows, splits)
        yield shrink_line(device, f"silu_mul_shrink, down, {kind}", plain, whole, down)


def shrink_line(device: Device, path: str, plain: Cost, whole: Cost, frozen: float) -> Line:
    added = Cost(whole.hbm - plain.hbm, whole.l2, whole.operations, whole.tf32)
    seconds = device.floor(whole) - device.floor(plain)
    return Line(path, added, seconds, share(seconds, frozen), 0.0, None)


def print_line(line: Line):
    operations = line.cost.operations + line.cost.tf32
    cost = f"{line.cost.hbm / 1e6:9.2f}{line.cost.l2 / 1e6:9.1f}{operations / 1e9:9.2f}"
    target = f"<= {line.target:g}%: " if line.target is not None else ""
    shares = f"{line.seconds * 1e6:9.2f}{line.percent:7.1f}%{line.l2_percent:7.1f}%"
    print(f"  {line.path:31}{cost}{shares}  {target}{line.verdict}".rstrip())


def print_model(device: Device, model: Model):
    size = model.hidden
    for tokens in TOKENS:
        frozen = count_linear(tokens, size, size)
        weight = size * size * HALF
        print(
            f"\n{model.name}, o_proj {size} x {size}, {tokens} tokens: weight {weight / 1e6:.2f} MB; "
            f"{frozen.hbm / 1e6:.2f} MB, {frozen.operations / 1e9:.2f} GFLOP, "
            f"floor {device.floor(frozen) * 1e6:.2f} us"
        )
        print(f"  {'added by':31}{'MB':>9}{'L2 MB':>9}{'GFLOP':>9}{'us':>9}{'share':>8}{'+L2':>8}  target")
        for line in paths(device, tokens, size, size):
            print_line(line)
        for line in shrinks(device, model, tokens) if model.gated else ():
            print_line(line)


def search_floor(device: Device, queries: int, keys: int, dim: int) -> float:
    """Seconds; the products are fp32 ones."""
    cost = count_key_search(queries, keys, dim)
    return max(cost.hbm / device.hbm, cost.operations / device.vector)


def print_key_search():
    print("\nKey search, 1,000,000 keys x 768 bf16 (1.54 GB), floors for 1, 8 and 64 queries")
    for device in DEVICES.values():
        times = [search_floor(device, queries, 1_000_000, 768) for queries in (1, 8, 64)]
        print(f"  {device.name:16}" + ", ".join(f"{1e3 * seconds:.2f} ms" for seconds in times))


def report(device: Device = DEVICES["H100"]):
    """Print the tables of a device."""
    print(
        f"{device.name}: floors at datasheet rates, not measurements. HBM {device.hbm / 1e12:g} TB/s; "
        f"{device.tensor / 1e12:g} TFLOP/s dense bf16, {100 * REACHED:.0f}% assumed reached; "
        f"L2 assumed {device.hbm * L2_TO_HBM / 1e12:.1f} TB/s.\nK={TOP_K}, r={RANK}, {ENTRIES} distinct "
        f"entries, {RESIDENT} slab rows, {OWNED} of them trained. No launches counted."
    )
    for model in MODELS:
        print_model(device, model)
    print_key_search()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="H100")
    report(DEVICES[parser.parse_args().device])


if __name__ == "__main__":
    main()
