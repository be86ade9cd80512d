"""The tiles that `tune.py` tries: for each part of a plan the values of each number, and what cannot run.

A part is the set of launch arguments of one kernel. The search changes one number at a time, so a list here
costs its length, not a product.
"""

from collections.abc import Iterator

import triton

GRID = {
    "one_pass": {"BLOCK_N": (64, 128, 256, 512), "BLOCK_K": (256, 512, 1024, 2048), "num_warps": (4, 8)},
    "shrink": {
        "BLOCK_T": (16, 32, 64, 128),
        "BLOCK_C": (16, 32, 64, 128),
        "BLOCK_K": (64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
    },
    "expand": {
        "BLOCK_T": (16, 32, 64, 128),
        "BLOCK_N": (64, 128, 256, 512),
        "BLOCK_C": (16, 32),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2),
    },
    "linear": {
        "BLOCK_M": (16, 32, 64, 128),
        "BLOCK_N": (32, 64, 128, 256),
        "BLOCK_K": (64, 128),
        "num_warps": (4, 8),
        "num_stages": (3, 4, 5, 7),
        "GROUP_M": (1, 4, 8, 16),
        "TMA": (False, True),
        "BLOCK_C": (16, 32),
    },
    "factors": {
        "BLOCK_T": (32, 64, 128),
        "BLOCK_N": (32, 64, 128),
        "BLOCK_C": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    # Tiles of 64 tokens would cast an operand inside a pipelined wgmma: see kernels/norm_shrink.py.
    "forward": {
        "BLOCK_T": (1, 16, 32),
        "BLOCK_K": (64, 128, 256),
        "BLOCK_C": (16, 32),
        "BLOCK_S": (256, 512, 1024),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    "backward": {
        "BLOCK_T": (16, 32),
        "BLOCK_N": (32, 64, 128),
        "BLOCK_S": (256, 512, 1024),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    "splits": (1, 2, 4, 8, 16),
    "pdl": (False, True),
}


def parts(op: str, phase: str, plan: dict) -> tuple[str, ...]:
    """What of a plan its launches use, the largest kernel first."""
    if op == "mixture":
        if phase == "backward":
            return "expand", "shrink", "factors", "splits"
        return ("one_pass",) if plan["kernel"] == "one_pass" else ("expand", "shrink", "splits", "pdl")
    if op == "fused_linear":
        if phase == "backward":
            return "linear", "shrink", "factors", "splits", "pdl"
        return ("linear",) if plan["kernel"] == "inline" else ("linear", "shrink", "splits", "pdl")
    return ("backward", "factors", "splits") if phase == "backward" else ("forward", "splits", "pdl")


def kernels(op: str, plan: dict) -> tuple[str, ...]:
    """The kernels that a plan has the tiles for."""
    if op == "mixture" and "one_pass" in plan:
        return "one_pass", "two_pass"
    return ("inline", "two_launch") if plan.get("kernel") == "inline" else ()


def steps(op: str, phase: str, plan: dict) -> Iterator[tuple[str, str | None, tuple]]:
    """(part, number in it or None, values to try); numbers that the plan does not have are left out."""
    for part in parts(op, phase, plan):
        if not isinstance(GRID[part], dict):
            yield part, None, GRID[part]
            continue
        for key, values in GRID[part].items():
            if key in plan[part]:
                yield part, key, values


def changed(plan: dict, part: str, key: str | None, value) -> dict:
    """A plan with one number changed."""
    return plan | {part: value if key is None else plan[part] | {key: value}}


def shared_bytes(part: str, tiles: dict, size: int, linears: int = 1) -> int:
    """Shared memory of a block, roughly: what its pipelined loads hold. `size`: bytes of an element."""
    stages = max(tiles.get("num_stages", 1), 1)
    t, c = tiles.get("BLOCK_T", 0), tiles.get("BLOCK_C", 0)
    k, n = tiles.get("BLOCK_K", 0), tiles.get("BLOCK_N", 0)
    if part == "shrink":
        return stages * size * k * (t + c)
    if part == "linear":
        return stages * size * k * (tiles["BLOCK_M"] + n)
    if part == "forward":
        return stages * size * k * (t + c * linears)
    if part == "factors":
        return stages * t * (n * size + 4 * c)
    return 0  # the others load straight into registers


def refusal(row: dict, plan: dict, part: str, shared_limit: int, architecture: str) -> str | None:
    """Why a plan is not worth compiling, or None."""
    size = 4 if row.get("dtype") == "float" else 2
    if part == "pdl":
        return "no dependent launch before sm_90" if plan["pdl"] and architecture == "sm_80" else None
    if not isinstance(plan[part], dict):
        return None
    tiles = plan[part]
    if (needed := shared_bytes(part, tiles, size)) > shared_limit:
        return f"{needed} bytes of shared memory, the limit is {shared_limit}"
    tokens = max(16, triton.next_power_of_2(row.get("max_tokens", 1 << 20)))
    if max(tiles.get("BLOCK_T", 0), tiles.get("BLOCK_M", 0)) > tokens:
        return f"a tile of more tokens than the row's {row['max_tokens']}"
    if plan.get("kernel") == "inline" and part == "linear" and tiles["BLOCK_C"] < row["max_columns"]:
        return "inline needs all columns in one block"
    if part == "linear" and tiles["TMA"] and architecture == "sm_80":
        return "no tensor descriptors before sm_90"
    return None
