"""Device code and launch arguments that the kernels share: a program's tokens, a rank column's slab row.

A rank column is one number of a token's rank-space vector. Two ways to number them:

    gather    column c = pick * max_rank + offset: slab row start[i] + offset of i = indices[row, pick]
    resident  column c = slab row c, the same for every token

Columns that do not exist (offset beyond the entry's rank, weight 0) are masked: they move no bytes.
"""

import torch
import triton
import triton.language as tl

SIZES = [
    "num_tokens",
    "num_rows",
    "tokens_per_row",
    "num_entries",
    "top_k",
    "max_rank",
    "num_columns",
    "num_splits",
    "blocks_per_split",
    "stride_us",
    "stride_ut",
    "owned_begin",
    "num_owned",
    "search_steps",
]
ROUTING = [
    "start_ptr",
    "rank_ptr",
    "scaling_ptr",
    "indices_ptr",
    "weights_ptr",
    "cu_seqlens_ptr",
    "row_entry_ptr",
]
# Nothing that varies while serving may cause a new compilation.
steady = {"do_not_specialize": SIZES, "do_not_specialize_on_alignment": ROUTING}


@triton.jit
def segment_tile(
    tile, cu_seqlens_ptr, num_tokens, num_rows, tokens_per_row, BLOCK_T: tl.constexpr, VARLEN: tl.constexpr
):
    """(row, first token, end token) of a tile: at most BLOCK_T tokens, all of one row; empty if first >= end.

    Tiles of row b are numbered from cu_seqlens[b] // BLOCK_T + b, which leaves room for every partial tile:
    no map is built, and num_tokens // BLOCK_T + num_rows tiles always suffice.
    """
    if VARLEN:
        low = tile * 0
        high = low + num_rows
        while high - low > 1:  # the last row whose first tile is not after this one
            middle = (low + high) // 2
            after = tl.load(cu_seqlens_ptr + middle) // BLOCK_T + middle > tile
            high = tl.where(after, middle, high)
            low = tl.where(after, low, middle)
        row = low.to(tl.int64)
        begin = tl.maximum(tl.load(cu_seqlens_ptr + row), 0).to(tl.int64)
        end = tl.minimum(tl.load(cu_seqlens_ptr + row + 1), num_tokens).to(tl.int64)
        first = begin + (tile - begin // BLOCK_T - row) * BLOCK_T
    else:
        tiles_per_row = tl.cdiv(tokens_per_row, BLOCK_T)
        row = (tile // tiles_per_row).to(tl.int64)
        begin = row * tokens_per_row
        end = begin + tokens_per_row
        first = begin + (tile % tiles_per_row).to(tl.int64) * BLOCK_T
    return row, first, end


@triton.jit
def tile_tokens(
    tile,
    cu_seqlens_ptr,
    num_tokens,
    num_rows,
    tokens_per_row,
    BLOCK_T: tl.constexpr,
    RESIDENT: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """(row, first, end, row_begin, row_end) of a tile: tokens first:end are the tile's, BLOCK_T at most, and
    those in row_begin:row_end belong to the row. Tiles without a row (RESIDENT) take consecutive tokens."""
    row = tile.to(tl.int64) * 0
    first = tile.to(tl.int64) * BLOCK_T
    end = num_tokens.to(tl.int64)
    row_begin = row
    row_end = end
    if not RESIDENT:
        row, row_first, row_end = segment_tile(
            tile, cu_seqlens_ptr, num_tokens, num_rows, tokens_per_row, BLOCK_T, VARLEN
        )
        if VARLEN:  # the first row's tiles begin at token 0, the last row's end at num_tokens
            row_begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
            first = tl.where(row == 0, first, row_first)
            end = tl.where(row == num_rows - 1, end, row_end)
        else:
            first = row_first
            end = row_end
    return row, first, end, row_begin, row_end


@triton.jit
def rows_of_tokens(
    tokens, cu_seqlens_ptr, num_rows, search_steps, tokens_per_row, VARLEN: tl.constexpr
):  # [BLOCK] int64
    """The row of each token; tokens outside every row get the nearest one."""
    if VARLEN:
        low = (tokens * 0).to(tl.int32)
        high = low + num_rows
        for _ in range(search_steps):
            middle = (low + high) // 2
            after = tl.load(cu_seqlens_ptr + middle) > tokens
            high = tl.where(after & (high - low > 1), middle, high)
            low = tl.where(after | (high - low <= 1), low, middle)
        return low.to(tl.int64)
    return tl.minimum(tokens // tl.maximum(tokens_per_row, 1), tl.maximum(num_rows - 1, 0))


@triton.jit
def gather_columns(
    columns, row, start_ptr, rank_ptr, scaling_ptr, indices_ptr, weights_ptr, num_entries, top_k, max_rank
):
    """(slab row int64, exists, coefficient fp32) of a row's rank columns; coefficient = weight * scaling.

    An index outside the pool reads nothing and makes the coefficient NaN: wrong ids show, and never read out
    of bounds.
    """
    pick = columns // max_rank
    offset = columns - pick * max_rank
    listed = pick < top_k
    at = row * top_k + pick
    entry = tl.load(indices_ptr + at, mask=listed, other=0)
    weight = tl.load(weights_ptr + at, mask=listed, other=0.0)
    active = listed & (weight != 0)
    inside = (entry >= 0) & (entry < num_entries)
    used = active & inside
    begin = tl.load(start_ptr + entry, mask=used, other=0)
    rank = tl.load(rank_ptr + entry, mask=used, other=0)
    scaling = tl.load(scaling_ptr + entry, mask=used, other=0.0)
    exists = used & (offset < rank)
    coefficient = tl.where(exists, weight * scaling, 0.0)
    coefficient = tl.where(active & ~inside, float("nan"), coefficient)
    return (begin + offset).to(tl.int64), exists, coefficient


@triton.jit
def rank_columns(
    columns,
    row,
    start_ptr,
    rank_ptr,
    scaling_ptr,
    indices_ptr,
    weights_ptr,
    num_entries,
    top_k,
    max_rank,
    num_columns,
    RESIDENT: tl.constexpr,
):
    """(slab row int64, exists) of rank columns."""
    if RESIDENT:
        slab_row = columns.to(tl.int64)
        exists = columns < num_columns
    else:
        slab_row, exists, _ = gather_columns(
            columns,
            row,
            start_ptr,
            rank_ptr,
            scaling_ptr,
            indices_ptr,
            weights_ptr,
            num_entries,
            top_k,
            max_rank,
        )
    return slab_row, exists


@triton.jit
def mixed_dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b; operands of different dtypes meet in fp32 (tf32 products), never cast down."""
    if a.dtype != b.dtype:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def weighted(u, coefficient):
    """coefficient * u, exactly 0 where the coefficient is 0, so that no masked column can bring in a NaN."""
    return tl.where(coefficient == 0, 0.0, u * coefficient)


@triton.jit
def sum_splits(u_ptr, num_splits, stride_us, at, mask, AT_ONCE: tl.constexpr):
    """u[tokens, columns] at the offsets `at`: its partial sums, added in order; AT_ONCE are on their way."""
    u = tl.zeros([at.shape[0], at.shape[1]], tl.float32)
    for first in range(0, num_splits, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            split = first + i
            listed = mask & (tl.zeros_like(at) + split < num_splits)
            u += tl.load(u_ptr + split * stride_us + at, mask=listed, other=0.0)
    return u


@triton.jit
def shrink_dot(h, acc, A_ptr, slab_row, exists, k, in_features, PRECISION: tl.constexpr):
    """acc + h @ A[slab rows]^T over the features k; h: [BLOCK_T, BLOCK_K], acc: [BLOCK_T, BLOCK_C]."""
    a = tl.load(
        A_ptr + slab_row[None, :] * in_features + k[:, None],
        mask=exists[None, :] & (k < in_features)[:, None],
        other=0.0,
    )  # [BLOCK_K, BLOCK_C]
    if h.shape[0] == 1:
        return acc + tl.sum(tl.trans(h).to(tl.float32) * a.to(tl.float32), 0)[None, :]
    return mixed_dot(h, a, acc, PRECISION)


@triton.jit
def load_columns(ptr, LINEAR: tl.constexpr, tokens, in_row, num_tokens, columns, exists, num_columns):
    """ptr[LINEAR, tokens, columns] of [linears, T, C] fp32, 0 where the column or the token has no row."""
    at = (num_tokens.to(tl.int64) * LINEAR + tokens)[:, None] * num_columns + columns[None, :]
    return tl.load(ptr + at, mask=in_row[:, None] & exists[None, :], other=0.0)


@triton.jit
def expand_dot(du, acc, A_ptr, slab_row, exists, n, in_features, PRECISION: tl.constexpr):
    """acc + du @ A[slab rows] at the features n; du: [BLOCK_T, BLOCK_C], acc: [BLOCK_T, BLOCK_N]."""
    a = tl.load(
        A_ptr + slab_row[:, None] * in_features + n[None, :],
        mask=exists[:, None] & (n < in_features)[None, :],
        other=0.0,
    )  # [BLOCK_C, BLOCK_N]
    return mixed_dot(du, a.to(tl.float32), acc, PRECISION)


# ---- launch arguments


def dot_precision(x: torch.Tensor) -> str:
    """fp32 inputs are multiplied exactly; half ones meet fp32 factors in tf32, which holds them exactly."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def num_tiles(num_tokens: int, num_rows: int, cu_seqlens: torch.Tensor | None, block: int) -> int:
    """Programs that `segment_tile` needs to reach every token."""
    if cu_seqlens is not None:
        return num_tokens // block + num_rows
    return num_rows * triton.cdiv(num_tokens // num_rows, block) if num_rows else 0


def routing_arguments(routing, num_tokens, *, max_rank, block, num_columns=None):
    """(programs along the tokens, the launch arguments that say which tokens and slab rows they read).

    routing: (start, rank, scaling, indices, weights, cu_seqlens), or None for a resident pool: its
    num_columns are the slab rows, its tiles consecutive tokens.
    """
    resident = routing is None
    start, rank, scaling, indices, weights, cu_seqlens = (None,) * 6 if resident else routing
    num_rows, top_k = (0, 1) if resident else indices.shape
    if resident:
        num_programs = triton.cdiv(num_tokens, block)
    else:
        num_programs = num_tiles(num_tokens, num_rows, cu_seqlens, block)
    return num_programs, {
        "start_ptr": start,
        "rank_ptr": rank,
        "scaling_ptr": scaling,
        "indices_ptr": indices,
        "weights_ptr": weights,
        "cu_seqlens_ptr": cu_seqlens,
        "num_tokens": num_tokens,
        "num_rows": num_rows,
        "tokens_per_row": num_tokens // max(num_rows, 1),
        "num_entries": 0 if resident else start.shape[0],
        "top_k": top_k,
        "max_rank": max_rank,
        "num_columns": num_columns if resident else top_k * max_rank,
        "VARLEN": cu_seqlens is not None,
    }


def splits_at_once(num_splits: int, tokens: int, columns: int, num_warps: int) -> int:
    """AT_ONCE of `sum_splits`: at most 8, in at most 32 registers of a thread."""
    fits = min(32 * 32 * num_warps // (tokens * columns), 8)
    return max(min(fits, triton.next_power_of_2(max(num_splits, 1))), 1)


def split_blocks(size: int, block: int, splits: int) -> tuple[int, int]:
    """(blocks per split, splits) that cover `size` in whole blocks, none of them empty."""
    blocks = max(triton.cdiv(size, block), 1)
    per_split = triton.cdiv(blocks, splits)
    return per_split, triton.cdiv(blocks, per_split)
