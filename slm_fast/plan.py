"""Which kernel and which tiles run an op: a small table per GPU architecture, `plans/sm_<nn>.json`.

A table is a list of rows, the first that fits is taken. A row holds conditions (`op`, `phase`, and where
they matter `dtype`, `max_tokens`, `max_columns`, `in_features`, `out_features`) and a `plan`: the kernel's
name and the keyword arguments of its launches. Columns are the rank columns of a token: top_k * max_rank
where entries are gathered, the slab rows of a resident pool in `fused_linear`. `tuned` names the card that a
row was measured on, null where nobody has.
"""

import functools
import json
from pathlib import Path

FOLDER = Path(__file__).parent / "plans"
CONDITIONS = ("dtype", "max_tokens", "max_columns", "in_features", "out_features")


def architecture_of(capability: tuple[int, int]) -> str:
    """The table for a compute capability: its own, else that of its family, else sm_80's, which fits all."""
    major, minor = capability
    for name in (f"sm_{major}{minor}", f"sm_{major}0"):
        if (FOLDER / f"{name}.json").exists():
            return name
    return "sm_80"


@functools.cache
def load(architecture: str) -> dict:
    """The table of an architecture, as read from its file."""
    return json.loads((FOLDER / f"{architecture}.json").read_text(encoding="utf8"))


def fits(row: dict, full: bool, tokens: int, columns: int, in_features: int, out_features: int) -> bool:
    """Whether a row's conditions hold; a condition that the row does not name always does."""
    return (
        row.get("dtype", "float" if full else "half") == ("float" if full else "half")
        and tokens <= row.get("max_tokens", tokens)
        and columns <= row.get("max_columns", columns)
        and row.get("in_features", in_features) == in_features
        and row.get("out_features", out_features) == out_features
    )


@functools.lru_cache(maxsize=8192)
def find(
    architecture: str,
    op: str,
    phase: str,
    full: bool,
    tokens: int,
    columns: int,
    in_features: int,
    out_features: int,
) -> dict:
    """The plan of the first row that fits; `full`: fp32 ("float" rows), else "half". ValueError if none."""
    for row in load(architecture)["rows"]:
        if row["op"] == op and row["phase"] == phase:
            if fits(row, full, tokens, columns, in_features, out_features):
                return row["plan"]
    raise ValueError(f"no plan for {op} {phase} with {tokens} tokens and {columns} columns on {architecture}")
