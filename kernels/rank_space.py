"""Device code that the kernels share: which tokens a program owns, and which slab rows a rank column reads.

A rank column is one number of a token's rank-space vector. Two ways to number them:

    gather    column c = pick * max_rank + offset: slab row start[i] + offset of i = indices[row, pick]
    resident  column c = slab row c, the same for every token

Columns that do not exist (offset beyond the entry's rank, weight 0) are masked: they move no bytes.
"""

import triton
import triton.language as tl


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
