"""A frozen linear and the mixture in one kernel, forward and backward.

    y[t] = W x[t] + bias + sum_c coefficient[b, c] * B[c] <A[c], x[t]>,   b = row of token t

over rank columns c. Two ways to say which columns a token has:

    resident  all R slab rows of the pool, the same for every token; the routing is the dense matrix w [rows,
              entries], so between two steps only its numbers change. For decoding with small pools.
    gathered  the C = top_k * max_rank columns of the row's own picks, from a pool of any size. Where rows are
              long (prefill, training), a tile walks over the rows that its tokens belong to. Where nearly
              every token has a row of its own (decoding), all tokens of a tile gather at once, B as [tokens,
              columns, features], multiplied and summed: a row costs C columns whatever the pool holds.

Symbols: T tokens, s bytes of an element. Columns that no token of a long tile has a weight for cost that tile
nothing; a short tile that meets all its columns at once loads B and the coefficients before the product.

Grid: (T / BLOCK_M) x (out / BLOCK_N) programs, grouped so that neighbours share tiles in L2. The update has
its own accumulator (two dots chained into one are wrong on some sm_103 compilers, and a token without weights
must get exactly what the linear alone computes) except where the plan says CHAIN.

The rank-space vector u = A x comes from one of three places:
 * `norm_shrink` or `silu_mul_shrink` made it with x. Bytes added to the linear: R out s + 4 T R.
 * inline (resident only): a second accumulator over the x tiles that the linear loads anyway. One launch, but
   every block of outputs reads all of A from L2: L2 bytes grow by R / BLOCK_N of the weight's. For few slab
   rows.
 * its own small launch. On sm_90 and later the linear starts at once (programmatic dependent launch), streams
   its weights while the shrink runs on the idle multiprocessors, and waits for u only before its epilogue.

LLaMA-2-7B's o_proj (4096 x 4096, bf16, H100, 3.35 TB/s): weight 33.6 MB = 10.0 us. R = 96 (12 entries, r=8):
A and B 1.6 MB, u 25 KB at 64 rows: +4.8% bytes, 0.5 us, of which the half that is A moves beside the weights.
What is left is the epilogue (B, u: 0.25 us) and the gap between two dependent launches (0.3-0.8 us, to be
measured): expected 6-10% with its own launch, 3% behind `norm_shrink`. Inline at R = 96 moves 33.6 * 96 / 64
= 50 MB more through L2 (5.5 TB/s: 9 us) and loses; at R = 16 it moves 8 MB, hidden behind 10 us of weights.

Prefill and training, 4096 tokens in rows of 128, K=2, r=8: the linear is bound by its 137 GFLOP, 172 us at
800 TFLOP/s. Gathered, the update adds 0.4% of them in the shrink and 0.8% (tf32 at half the rate) in the
epilogue: floor 1.2%; the shrink's own pass over x, 33.6 MB = 10 us, is hidden only as far as it overlaps with
the product (floor 6.8% if it does not). Resident with R = 96: 3.9% and 7.8%. `benchmarks/roofline.py` counts
all of it.

Backward: dx = dy W + coefficient * g A is the same kernel with W transposed and A, B swapped, after g = B dy.
dA and dB read x and dy once more, 67 MB = 20 us: on a second stream beside dx, which is bound by operations.
Floor 4.3% over the frozen dx gathered, 7.0% resident, 19-21% if nothing overlaps.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from slm_fast.kernels.mixture import shrink
from slm_fast.kernels.pool_grads import beside, factor_grads, pool_grads, row_products
from slm_fast.kernels.rank_space import (
    dot_precision,
    gather_columns,
    mixed_dot,
    rows_of_tokens,
    splits_at_once,
    steady,
    sum_splits,
    weighted,
)

REGISTERS, REGISTERS_OF_THREAD, FP32_REGISTERS = 65536, 255, 192  # the first: of a multiprocessor
FEW_TOKENS, SHORT_ROW = 64, 4  # of a tile and of a row that decode
MAX_PARTS = 4
SLOTS = [f"slot{i}" for i in range(MAX_PARTS)]


@triton.jit
def resident_coefficients(columns, rows, num_columns, num_entries, row_entry_ptr, scaling_ptr, weights_ptr):
    """weights[row, entry of column] * scaling: [tokens, columns] fp32, 0 for columns that no entry owns."""
    entry = tl.load(row_entry_ptr + columns, mask=columns < num_columns, other=-1)
    owned = (entry >= 0) & (entry < num_entries)
    scaling = tl.load(scaling_ptr + entry, mask=owned, other=0.0)
    weight = tl.load(
        weights_ptr + rows[:, None] * num_entries + entry[None, :],
        mask=owned[None, :] & (rows >= 0)[:, None],
        other=0.0,
    )
    return tl.where(weight == 0, 0.0, weight * scaling[None, :])


@triton.jit
def token_operands(
    columns,
    rows,
    in_part,
    in_y,
    B_ptr,
    start_ptr,
    rank_ptr,
    scaling_ptr,
    indices_ptr,
    weights_ptr,
    num_entries,
    top_k,
    max_rank,
    num_columns,
    features,
):
    """(B [tokens, columns, features], coefficient [tokens, columns]) of the columns of every token's own row;
    a token without a row (-1) has coefficients 0."""
    slab_row, exists, coefficient = gather_columns(
        columns[None, :],
        tl.maximum(rows, 0)[:, None],
        start_ptr,
        rank_ptr,
        scaling_ptr,
        indices_ptr,
        weights_ptr,
        num_entries,
        top_k,
        max_rank,
    )
    has_row = (rows >= 0)[:, None]
    b = tl.load(
        B_ptr + slab_row[:, :, None] * features + in_part[None, None, :],
        mask=(exists & has_row)[:, :, None] & in_y[None, None, :],
        other=0.0,
    )
    return b, tl.where(has_row & (columns < num_columns)[None, :], coefficient, 0.0)


@triton.jit
def prefetch_rows(ptr, rows, exists, stride, row_size, LINES: tl.constexpr):
    """Bring the first 128-byte lines of a matrix's rows to L2; in the place of rows that do not exist, the
    first one's."""
    line = 1024 // ptr.dtype.element_ty.primitive_bitwidth  # elements
    start = tl.where(exists, rows, 0).to(tl.int64)[:, None] * stride
    k = tl.minimum(tl.arange(0, LINES) * line, row_size - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [(ptr + start + k[None, :]).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def outside_no_row(rows, tokens, cu_seqlens_ptr, VARLEN: tl.constexpr):
    """`rows`, but -1 for tokens that cu_seqlens gives to no row."""
    if VARLEN:
        begin = tl.load(cu_seqlens_ptr + rows, mask=rows >= 0, other=0)
        end = tl.load(cu_seqlens_ptr + rows + 1, mask=rows >= 0, other=0)
        rows = tl.where((tokens >= begin) & (tokens < end), rows, -1)
    return rows


@triton.jit(**(steady | {"do_not_specialize": [*steady["do_not_specialize"], *SLOTS]}))
def _fused_linear_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    u_ptr,
    A_ptr,
    B_ptr,
    B1_ptr,
    B2_ptr,
    B3_ptr,
    row_entry_ptr,
    start_ptr,
    rank_ptr,
    scaling_ptr,
    indices_ptr,
    weights_ptr,
    cu_seqlens_ptr,
    num_tokens,
    num_rows,
    search_steps,
    tokens_per_row,
    num_entries,
    top_k,
    max_rank,
    num_columns,
    in_features,
    out_features,
    features0,
    features1,
    features2,
    features3,
    slot0,
    slot1,
    slot2,
    slot3,
    stride_w,
    num_splits,
    stride_us,
    stride_ut,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,
    INLINE: tl.constexpr,
    RESIDENT: tl.constexpr,
    TOKENWISE: tl.constexpr,
    EARLY: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    AHEAD: tl.constexpr,
    LINES: tl.constexpr,
    WEIGHT_IS_KN: tl.constexpr,
    TMA: tl.constexpr,
    CHAIN: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(features0, BLOCK_N)
    if PARTS > 1:
        tiles_n += tl.cdiv(features1, BLOCK_N)
    if PARTS > 2:
        tiles_n += tl.cdiv(features2, BLOCK_N)
    if PARTS > 3:
        tiles_n += tl.cdiv(features3, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    tile_m, tile_n = group * GROUP_M + within % group_rows, within // group_rows
    tokens = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Of the tile's part; `tile_n` then counts the tiles of that part.
    begin, features, slot = tile_n * 0, features0, slot0
    if PARTS > 1:
        if tile_n >= tl.cdiv(features0, BLOCK_N):
            tile_n -= tl.cdiv(features0, BLOCK_N)
            begin, features, slot, B_ptr = features0, features1, slot1, B1_ptr
            if PARTS > 2:
                if tile_n >= tl.cdiv(features1, BLOCK_N):
                    tile_n -= tl.cdiv(features1, BLOCK_N)
                    begin, features, slot, B_ptr = features0 + features1, features2, slot2, B2_ptr
                    if PARTS > 3:
                        if tile_n >= tl.cdiv(features2, BLOCK_N):
                            tile_n -= tl.cdiv(features2, BLOCK_N)
                            begin += features2
                            features, slot, B_ptr = features3, slot3, B3_ptr
    in_part = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n = begin + in_part
    in_x, in_y = tokens < num_tokens, in_part < features

    if AHEAD and LINES > 0:
        prefetch_rows(weight_ptr, n, in_y, stride_w, in_features, LINES)
    if AHEAD and INLINE:  # nothing is known of the launch before, but that it did not write the weights
        tl.extra.cuda.gdc_wait()
    mixes = 1
    if PARTS > 1:
        mixes = tl.where(slot < 0, 0, 1)
    if EARLY:  # all columns at once: what the update needs beside u is on its way before the product
        rows = rows_of_tokens(tokens, cu_seqlens_ptr, num_rows, search_steps, tokens_per_row, VARLEN)
        rows = tl.where(in_x, rows, -1)
        if not RESIDENT:
            rows = outside_no_row(rows, tokens, cu_seqlens_ptr, VARLEN)
        columns = tl.arange(0, BLOCK_C)
        if TOKENWISE:
            b, coefficient = token_operands(
                columns,
                tl.where(mixes > 0, rows, -1),
                in_part,
                in_y,
                B_ptr,
                start_ptr,
                rank_ptr,
                scaling_ptr,
                indices_ptr,
                weights_ptr,
                num_entries,
                top_k,
                max_rank,
                num_columns,
                features,
            )
        else:
            coefficient = resident_coefficients(
                columns,
                tl.where(mixes > 0, rows, -1),
                num_columns,
                num_entries,
                row_entry_ptr,
                scaling_ptr,
                weights_ptr,
            )
            used = (tl.max((coefficient != 0).to(tl.int32), 0) > 0)[:, None]
            b = tl.load(
                B_ptr + columns.to(tl.int64)[:, None] * features + in_part[None, :],
                mask=used & in_y[None, :],
                other=0.0,
            )  # [BLOCK_C, BLOCK_N]
    if AHEAD and not INLINE:  # x and u come from the launch before; weights, B and routing do not
        tl.extra.cuda.gdc_wait()

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if INLINE:
        inline_u = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        c = tl.arange(0, BLOCK_C)
    for k0 in range(0, in_features, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if TMA:  # x_ptr and weight_ptr are tensor descriptors; tiles past an edge are filled with zeros
            x = x_ptr.load([tile_m * BLOCK_M, k0])
            if WEIGHT_IS_KN:
                w = weight_ptr.load([k0, tile_n * BLOCK_N])
            else:
                w = weight_ptr.load([begin + tile_n * BLOCK_N, k0]).T
        else:
            x = tl.load(
                x_ptr + tokens[:, None] * in_features + k[None, :],
                mask=in_x[:, None] & (k < in_features)[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_K]
            if WEIGHT_IS_KN:
                w_block = weight_ptr + k[:, None].to(tl.int64) * stride_w + n[None, :]
            else:
                w_block = weight_ptr + n[None, :].to(tl.int64) * stride_w + k[:, None]
            w = tl.load(
                w_block, mask=in_y[None, :] & (k < in_features)[:, None], other=0.0
            )  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if INLINE:
            a = tl.load(
                A_ptr + c[None, :].to(tl.int64) * in_features + k[:, None],
                mask=(c < num_columns)[None, :] & (k < in_features)[:, None],
                other=0.0,
            )  # [BLOCK_K, BLOCK_C]
            inline_u = mixed_dot(x, a, inline_u, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=in_y, other=0.0).to(tl.float32)[None, :]

    if not EARLY:
        rows = rows_of_tokens(tokens, cu_seqlens_ptr, num_rows, search_steps, tokens_per_row, VARLEN)
        rows = tl.where(in_x, rows, -1)
        if not RESIDENT:
            rows = outside_no_row(rows, tokens, cu_seqlens_ptr, VARLEN)
    if CHAIN:
        update = acc
    else:
        update = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    active = tl.zeros([BLOCK_M], tl.int32)
    if PDL and not AHEAD:
        tl.extra.cuda.gdc_wait()
    if PARTS > 1:
        u_ptr += tl.maximum(slot, 0).to(tl.int64) * num_splits * stride_us
    if EARLY:
        active = tl.max((coefficient != 0).to(tl.int32), 1)
        if INLINE:
            u = inline_u
        else:
            at = tokens[:, None] * stride_ut + columns[None, :]
            listed = in_x[:, None] & (columns < num_columns)[None, :]
            u = sum_splits(u_ptr, num_splits, stride_us, at, listed, AT_ONCE)
        if TOKENWISE:
            update += tl.sum(b.to(tl.float32) * weighted(u, coefficient)[:, :, None], 1)
        else:
            update = mixed_dot(weighted(u, coefficient), b.to(tl.float32), update, PRECISION)
    elif TOKENWISE:
        for c0 in range(0, num_columns * mixes, BLOCK_C):
            columns = c0 + tl.arange(0, BLOCK_C)
            b, coefficient = token_operands(
                columns,
                rows,
                in_part,
                in_y,
                B_ptr,
                start_ptr,
                rank_ptr,
                scaling_ptr,
                indices_ptr,
                weights_ptr,
                num_entries,
                top_k,
                max_rank,
                num_columns,
                features,
            )
            active = tl.maximum(active, tl.max((coefficient != 0).to(tl.int32), 1))
            at = tokens[:, None] * stride_ut + columns[None, :]
            listed = in_x[:, None] & (columns < num_columns)[None, :]
            u = sum_splits(u_ptr, num_splits, stride_us, at, listed, AT_ONCE)
            update += tl.sum(b.to(tl.float32) * weighted(u, coefficient)[:, :, None], 1)
    else:
        if RESIDENT:  # every token has the same columns
            first_row, end_row = 0, mixes
        else:  # each row of the tile has its own, one row at a time
            end_row = tl.max(rows, 0) + 1
            first_row = tl.min(tl.where(rows >= 0, rows, end_row), 0)
            end_row = tl.where(mixes > 0, end_row, first_row)
        for i in range(0, end_row - first_row):  # from 0: Triton 3.9 loses the loads' width otherwise
            row = first_row + i
            for c0 in range(0, num_columns, BLOCK_C):
                columns = c0 + tl.arange(0, BLOCK_C)
                if RESIDENT:
                    slab_row, exists = columns.to(tl.int64), columns < num_columns
                    coefficient = resident_coefficients(
                        columns, rows, num_columns, num_entries, row_entry_ptr, scaling_ptr, weights_ptr
                    )
                else:
                    slab_row, exists, of_row = gather_columns(
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
                    coefficient = tl.where((rows == row)[:, None], of_row[None, :], 0.0)
                used = tl.max((coefficient != 0).to(tl.int32), 1)
                active = tl.maximum(active, used)
                if tl.max(used, 0) > 0:  # columns that no token of the tile uses cost nothing
                    b = tl.load(
                        B_ptr + slab_row[:, None] * features + in_part[None, :],
                        mask=exists[:, None] & in_y[None, :],
                        other=0.0,
                    )  # [BLOCK_C, BLOCK_N]
                    if INLINE:
                        u = inline_u
                    else:
                        at = tokens[:, None] * stride_ut + columns[None, :]
                        listed = in_x[:, None] & (columns < num_columns)[None, :]
                        u = sum_splits(u_ptr, num_splits, stride_us, at, listed, AT_ONCE)
                    update = mixed_dot(weighted(u, coefficient), b.to(tl.float32), update, PRECISION)
    if CHAIN:
        y = update
    else:
        y = tl.where((active > 0)[:, None], acc + update, acc)
    at, mask = tokens[:, None] * out_features + n[None, :], in_x[:, None] & in_y[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(**steady)
def _fused_linear_coefficients_bwd_kernel(
    u_ptr,
    g_ptr,
    owned_u_ptr,
    owned_g_ptr,
    row_entry_ptr,
    scaling_ptr,
    weights_ptr,
    cu_seqlens_ptr,
    num_tokens,
    num_rows,
    search_steps,
    tokens_per_row,
    num_entries,
    num_columns,
    owned_begin,
    num_owned,
    VARLEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """owned[t, j] = weight * scaling * column owned_begin + j, for u and for g."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    owned = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_x = tokens < num_tokens
    rows = rows_of_tokens(tokens, cu_seqlens_ptr, num_rows, search_steps, tokens_per_row, VARLEN)
    rows = tl.where(in_x, rows, -1)
    columns = owned_begin + owned
    coefficient = resident_coefficients(
        columns, rows, owned_begin + num_owned, num_entries, row_entry_ptr, scaling_ptr, weights_ptr
    )
    mask = in_x[:, None] & (owned < num_owned)[None, :]
    at = tokens[:, None] * num_columns + columns[None, :]
    to = tokens[:, None] * num_owned + owned[None, :]
    tl.store(owned_u_ptr + to, weighted(tl.load(u_ptr + at, mask=mask, other=0.0), coefficient), mask=mask)
    tl.store(owned_g_ptr + to, weighted(tl.load(g_ptr + at, mask=mask, other=0.0), coefficient), mask=mask)


def _rows(num_tokens, num_rows, cu_seqlens):
    """The launch arguments of `rows_of_tokens`."""
    return {
        "num_rows": num_rows,
        "search_steps": num_rows.bit_length(),
        "tokens_per_row": num_tokens // max(num_rows, 1),
        "VARLEN": cu_seqlens is not None,
    }


def _parts(B):
    """The launch arguments of a weight's parts, in their order: a slab, or the size of a part without one."""
    slabs = [part for part in B if not isinstance(part, int)]
    slots, pointers, sizes = [], [], []
    for part in B:
        without = isinstance(part, int)
        slots.append(-1 if without else len(slots) - slots.count(-1))
        pointers.append(slabs[0] if without else part)
        sizes.append(part if without else part.shape[1])
    rest = MAX_PARTS - len(B)
    pointers += [None] * rest
    return sizes, {
        **dict(zip(("B_ptr", "B1_ptr", "B2_ptr", "B3_ptr"), pointers, strict=True)),
        **{f"features{i}": size for i, size in enumerate(sizes + [0] * rest)},
        **dict(zip(SLOTS, slots + [-1] * rest, strict=True)),
        "PARTS": len(B),
    }


def _fused_linear(
    x,
    weight,
    bias,
    u,
    A,
    B,
    routing,
    *,
    max_rank,
    tiles,
    pdl=False,
    ahead=None,
    residual=None,
    transposed=False,
):
    """B: a slab or the size of each part of the weight, see `_parts`.  u: [slabs * splits, T, C]; None: made
    inline.  pdl: begins beside the launch before, which made u and not x.  ahead: begins beside the launch
    before, whatever it made, and asks for so many lines of its weights until that has ended."""
    num_tokens, in_features = x.shape
    sizes, parts = _parts(B)
    out_features, resident = sum(sizes), max_rank is None
    if resident:
        row_entry, scaling, weights, cu_seqlens = routing
        start = rank = indices = None
        num_columns, top_k, num_entries = parts["B_ptr"].shape[0], 1, scaling.shape[0]
    else:
        start, rank, scaling, indices, weights, cu_seqlens = routing
        row_entry, top_k, num_entries = None, indices.shape[1], start.shape[0]
        num_columns = top_k * max_rank
    y = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    tiles_n = sum(triton.cdiv(size, tiles["BLOCK_N"]) for size in sizes)
    num_programs = triton.cdiv(num_tokens, tiles["BLOCK_M"]) * tiles_n
    tma = tiles["TMA"] and not any(
        t.data_ptr() % 16 or t.stride(0) * t.element_size() % 16 for t in (x, weight)
    )
    num_splits = 0 if u is None else u.shape[0] // (max(parts[slot] for slot in SLOTS) + 1)
    # While decoding nearly every token has a row of its own: all tokens of a tile gather at once.
    few = tiles["BLOCK_M"] <= FEW_TOKENS and not tma and not tiles["CHAIN"]
    tokenwise = few and not resident and num_tokens <= SHORT_ROW * weights.shape[0]
    if tokenwise:
        held = 128 // x.element_size() * 32 * tiles["num_warps"]  # numbers of B in the threads' registers
        held //= tiles["BLOCK_M"] * tiles["BLOCK_N"]
        tiles = tiles | {"BLOCK_C": 1 << max(held.bit_length() - 1, 1)}
    tiles = tiles | {"TMA": tma}
    ahead = ahead if few else None
    pdl = pdl or ahead is not None
    tile = tiles["BLOCK_M"], tiles["BLOCK_C"], tiles["num_warps"]
    # What is loaded before the product stays in registers: a thread's share of the coefficients at most 16.
    early = tokenwise or (few and resident and tile[0] * tile[1] <= 16 * 32 * tile[2])
    inline = u is None
    # Shared memory decides how many blocks run at once. Told no limit of registers, ptxas picks one (64, 80,
    # 168) that would let one more run, and spills to stay below it; fp32 tiles would fill any limit.
    limit = FP32_REGISTERS if x.dtype == torch.float32 else REGISTERS_OF_THREAD
    tiles.setdefault("maxnreg", min(REGISTERS // (32 * tiles["num_warps"]), limit))
    x_arg, weight_arg = x, weight
    if tma and num_programs:
        n, k = tiles["BLOCK_N"], tiles["BLOCK_K"]
        x_arg = TensorDescriptor.from_tensor(x, [tiles["BLOCK_M"], k])
        weight_arg = TensorDescriptor.from_tensor(weight, [k, n] if transposed else [n, k])
    if num_programs:
        _fused_linear_fwd_kernel[(num_programs,)](
            x_ptr=x_arg,
            weight_ptr=weight_arg,
            bias_ptr=bias,
            residual_ptr=residual,
            y_ptr=y,
            u_ptr=u,
            A_ptr=A,
            **parts,
            row_entry_ptr=row_entry,
            start_ptr=start,
            rank_ptr=rank,
            scaling_ptr=scaling,
            indices_ptr=indices,
            weights_ptr=weights,
            cu_seqlens_ptr=cu_seqlens,
            num_tokens=num_tokens,
            num_entries=num_entries,
            top_k=top_k,
            max_rank=max_rank or 1,
            num_columns=num_columns,
            in_features=in_features,
            out_features=out_features,
            stride_w=weight.stride(0),
            num_splits=num_splits,
            stride_us=num_tokens * num_columns,
            stride_ut=num_columns,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            INLINE=inline,
            RESIDENT=resident,
            TOKENWISE=tokenwise,
            EARLY=early and num_columns <= tiles["BLOCK_C"],
            PRECISION=dot_precision(x),
            PDL=pdl,
            AHEAD=ahead is not None,
            LINES=ahead or 0,
            WEIGHT_IS_KN=transposed,
            AT_ONCE=splits_at_once(num_splits, *tile),
            **_rows(num_tokens, weights.shape[0], cu_seqlens),
            **tiles,
            **({"launch_pdl": True} if pdl else {}),
        )
    return y


def fused_linear_fwd(
    x, weight, bias, A, B, routing, *, plan, max_rank=None, u=None, residual=None, save_u=False
):
    """(y [T, out], unweighted u [T, C] if `save_u`).

    routing: (row_entry, scaling, weights, cu_seqlens) of a resident pool, C = R; with max_rank, gathered:
    (start, rank, scaling, indices, weights, cu_seqlens), C = top_k * max_rank.
    u: [splits, T, C] made with x by `norm_shrink` or `silu_mul_shrink`.  residual: [T, out], added to y.
    """
    tiles = plan["linear"]
    fits = max_rank is None and A.shape[0] <= tiles["BLOCK_C"]  # all of a resident pool's columns at once
    inline = plan["kernel"] == "inline" and fits and u is None and not save_u
    settings = {"max_rank": max_rank, "tiles": tiles, "residual": residual}
    if not inline and u is None:
        splits, pdl = 1 if save_u else plan["splits"], plan["pdl"]
        u = _rank_space(x, A, routing, max_rank, plan, splits=splits, pdl=pdl)
        settings["pdl"] = pdl
    else:
        settings["ahead"] = _ahead(plan)
    y = _fused_linear(x, weight, bias, u, A, [B], routing, **settings)
    return y, (u[0] if u.shape[0] == 1 else u.sum(0)) if save_u else None


def stacked_linear_fwd(x, weight, bias, B, routing, u, *, plan, max_rank=None):
    """y [T, sum of the parts]: linears that read the same x, their weights stacked, in one product.

    B: of each, a slab or the number of features.  u: [slabs, splits, T, C].  routing: as above.
    """
    settings = {"max_rank": max_rank, "tiles": plan["linear"], "ahead": _ahead(plan)}
    return _fused_linear(x, weight, bias, u.flatten(0, 1), None, B, routing, **settings)


def _ahead(plan):
    """Lines of each weight row to ask for before the launch in front has ended; None: wait for its end."""
    return plan.get("ahead") if plan["pdl"] else None


def _rank_space(x, A, routing, max_rank, plan, *, splits=1, pdl):
    """u [splits, T, C] by a launch of its own."""
    gathered = None if max_rank is None else routing
    num_columns = A.shape[0] if max_rank is None else routing[3].shape[1] * max_rank
    settings = {"num_columns": num_columns, "max_rank": max_rank or 1, "tiles": plan["shrink"]}
    return shrink(x, A, gathered, **settings, splits=splits, pdl=pdl)


def fused_linear_bwd(dy, x, u, weight, A, B, routing, *, plan, owned, needs, max_rank=None):
    """(dx, dA, dB, dweights, g = B dy) at dy [T, out]; dA and dB: the slab rows `owned`.

    The first four are None unless `needs` asks. dx includes the frozen linear's dy W. dweights is 0 where
    the weight is 0, as in `mixture`.  routing, max_rank: as in `fused_linear_fwd`.
    """
    g = _rank_space(dy, B, routing, max_rank, plan, pdl=plan["pdl"])
    settings = {"plan": plan, "owned": owned, "needs": needs[1:]}
    with beside(x) as join:
        if max_rank is None:
            grads = _resident_grads(dy, x, u, g[0], routing, **settings)
        else:
            grads = pool_grads(dy, x, u, g[0], routing, max_rank=max_rank, **settings)
    dx = None
    if needs[0]:
        settings = {"max_rank": max_rank, "tiles": plan["linear"], "pdl": plan["pdl"]}
        dx = _fused_linear(dy, weight, None, g, B, [A], routing, **settings, transposed=True)
    join()
    return dx, *grads, g[0]


def _resident_grads(dy, x, u, g, routing, *, plan, owned, needs):
    """(dA, dB, dweights) of a resident pool, None where `needs` asks for none.  u, g: [T, R] fp32."""
    row_entry, scaling, weights, cu_seqlens = routing
    num_tokens, num_columns = u.shape
    num_rows, num_entries = weights.shape
    num_owned, tiles = owned[1] - owned[0], plan["coefficients"]
    needs_A, needs_B, needs_weights = needs
    dA = dB = dweights = None
    if needs_A or needs_B:
        owned_u, owned_g = torch.empty(2, num_tokens, num_owned, dtype=torch.float32, device=x.device)
        if num_tokens and num_owned:
            _fused_linear_coefficients_bwd_kernel[
                (triton.cdiv(num_tokens, tiles["BLOCK_T"]), triton.cdiv(num_owned, tiles["BLOCK_C"]))
            ](
                u,
                g,
                owned_u,
                owned_g,
                row_entry,
                scaling,
                weights,
                cu_seqlens,
                num_tokens=num_tokens,
                num_entries=num_entries,
                num_columns=num_columns,
                owned_begin=owned[0],
                num_owned=num_owned,
                **_rows(num_tokens, num_rows, cu_seqlens),
                **tiles,
            )
        settings = {"tiles": plan["factors"], "splits": plan["splits"]}
        dA = factor_grads(owned_g, x, **settings) if needs_A else None
        dB = factor_grads(owned_u, dy, **settings) if needs_B else None
    if needs_weights:
        products = row_products(u, g, num_rows, cu_seqlens, tiles=plan["weights"])
        entries = torch.arange(num_entries, dtype=row_entry.dtype, device=x.device)
        of_entry = (row_entry[:num_columns, None] == entries).float() * scaling  # [R, entries]
        dweights = torch.where(weights == 0, 0.0, products @ of_entry)
    return dA, dB, dweights
