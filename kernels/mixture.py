"""The mixture of low-rank updates, forward and backward.

    y[t] += sum_k weights[b, k] * scaling[i] * B[i]^T (A[i] x[t]),   i = indices[b, k], b = row of token t

Symbols: T tokens, U distinct entries picked in the batch, r rank, C = top_k * max_rank rank columns of a
token, s bytes of an element (2 for bf16). Factors are slabs: A [total_rank, in], B [total_rank, out].

One pass (decoding, few tokens): grid (T, out / BLOCK_N). A program shrinks its token again for its block of
outputs; the factors come from L2 after the first program. HBM bytes U r (in + out) s + T (in + 2 out) s: for
LLaMA-2-7B's o_proj in bf16, K=2, r=8, one row: 0.26 MB of factors against 33.6 MB of weights, 0.8%.
L2 bytes T C in s * out / BLOCK_N: 16 programs of 128 KB a token, 2 MB, so it is the plan up to a few tokens.

Two passes (more tokens, prefill, training): shrink writes u [splits, T, C] fp32, expand reads it once per
output block. HBM bytes U r (in + out) s + T (in + 2 out) s + 8 T C; operations 2 T C (in + out), memory-bound
at any T. 64 rows with 12 distinct entries: 1.6 MB of factors and 1.6 MB of x and y, 9.4% of the o_proj's
bytes (floor 0.95 us at 3.35 TB/s), of which x is already in L2. On sm_90 and later, expand starts before
shrink has ended (programmatic dependent launch) and waits for it only before it reads u.
Prefill: x once and y twice over T (in + 2 out) s bytes = 24.6 KB a token = 7.3 ns against 42 ns of o_proj at
800 TFLOP/s: 17%. A separate launch cannot get below that; `fused_linear` does.

Backward: g = B dy is the shrink with B, dx the expand with A. dA and dB sum over tokens per owned slab row,
in token order, in one program per block: no atomics. Rows of A and B that are not owned are skipped.
Bytes 2 T out s (dy twice) + T in s (x) + T in s (dx).
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl

from slm_fast.kernels.rank_space import (
    gather_columns,
    mixed_dot,
    rank_columns,
    segment_tile,
    steady,
    weighted,
)


@triton.jit(**steady)
def _mixture_one_pass_fwd_kernel(
    x_ptr,
    y_ptr,
    A_ptr,
    B_ptr,
    start_ptr,
    rank_ptr,
    scaling_ptr,
    indices_ptr,
    weights_ptr,
    cu_seqlens_ptr,
    num_tokens,
    num_rows,
    tokens_per_row,
    num_entries,
    top_k,
    max_rank,
    num_columns,
    in_features,
    out_features,
    VARLEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, token, end = segment_tile(
        tl.program_id(0), cu_seqlens_ptr, num_tokens, num_rows, tokens_per_row, 1, VARLEN
    )
    if token >= end:
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_y = n < out_features
    update = tl.zeros([BLOCK_N], tl.float32)
    active = 0
    for first in range(0, num_columns, BLOCK_C):
        slab_row, exists, coefficient = gather_columns(
            first + tl.arange(0, BLOCK_C),
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
        used = tl.max((coefficient != 0).to(tl.int32), 0)
        active = tl.maximum(active, used)
        if used > 0:
            u = tl.zeros([BLOCK_C], tl.float32)
            for k0 in range(0, in_features, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                x = tl.load(x_ptr + token * in_features + k, mask=k < in_features, other=0.0)
                a = tl.load(
                    A_ptr + slab_row[:, None] * in_features + k[None, :],
                    mask=exists[:, None] & (k < in_features)[None, :],
                    other=0.0,
                )  # [BLOCK_C, BLOCK_K]
                u += tl.sum(a.to(tl.float32) * x.to(tl.float32)[None, :], 1)
            b = tl.load(
                B_ptr + slab_row[:, None] * out_features + n[None, :],
                mask=exists[:, None] & in_y[None, :],
                other=0.0,
            )  # [BLOCK_C, BLOCK_N]
            update += tl.sum(b.to(tl.float32) * weighted(u, coefficient)[:, None], 0)
    if active > 0:
        y_block = y_ptr + token * out_features + n
        y = tl.load(y_block, mask=in_y, other=0.0)
        tl.store(y_block, (y.to(tl.float32) + update).to(y.dtype), mask=in_y)


@triton.jit(**steady)
def _mixture_shrink_kernel(
    x_ptr,
    u_ptr,
    A_ptr,
    start_ptr,
    rank_ptr,
    scaling_ptr,
    indices_ptr,
    weights_ptr,
    cu_seqlens_ptr,
    num_tokens,
    num_rows,
    tokens_per_row,
    num_entries,
    top_k,
    max_rank,
    num_columns,
    in_features,
    blocks_per_split,
    stride_us,
    stride_ut,
    RESIDENT: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """u[split, t, c] = <A[slab row of c], x[t]> over the split's slice of in_features; 0 if c is masked."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    if RESIDENT:
        first = tl.program_id(0).to(tl.int64) * BLOCK_T
        end = num_tokens.to(tl.int64)
        row = first * 0
    else:
        row, first, end = segment_tile(
            tl.program_id(0), cu_seqlens_ptr, num_tokens, num_rows, tokens_per_row, BLOCK_T, VARLEN
        )
        if first >= end:
            return
    slab_row, exists = rank_columns(
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
        RESIDENT,
    )
    tokens = first + tl.arange(0, BLOCK_T)
    in_tile = tokens < end
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    last_block = tl.minimum((split + 1) * blocks_per_split, tl.cdiv(in_features, BLOCK_K))
    if tl.max(exists.to(tl.int32), 0) == 0:  # a row without weights reads nothing
        last_block = split * 0
    for block in range(split * blocks_per_split, last_block):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + tokens[:, None] * in_features + k[None, :],
            mask=in_tile[:, None] & (k < in_features)[None, :],
            other=0.0,
        )  # [BLOCK_T, BLOCK_K]
        a = tl.load(
            A_ptr + slab_row[None, :] * in_features + k[:, None],
            mask=exists[None, :] & (k < in_features)[:, None],
            other=0.0,
        )  # [BLOCK_K, BLOCK_C]
        acc = mixed_dot(x, a, acc, PRECISION)
    tl.store(
        u_ptr + split * stride_us + tokens[:, None] * stride_ut + columns[None, :],
        acc,
        mask=in_tile[:, None] & (columns < num_columns)[None, :],
    )


@triton.jit(**steady)
def _mixture_expand_kernel(
    u_ptr,
    y_ptr,
    B_ptr,
    start_ptr,
    rank_ptr,
    scaling_ptr,
    indices_ptr,
    weights_ptr,
    cu_seqlens_ptr,
    num_tokens,
    num_rows,
    tokens_per_row,
    num_entries,
    top_k,
    max_rank,
    num_columns,
    out_features,
    num_splits,
    stride_us,
    stride_ut,
    ACCUMULATE: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[t] (+)= sum_c coefficient[c] * u[t, c] * B[slab row of c]; splits of u are summed in order."""
    row, first, end = segment_tile(
        tl.program_id(0), cu_seqlens_ptr, num_tokens, num_rows, tokens_per_row, BLOCK_T, VARLEN
    )
    tokens = first + tl.arange(0, BLOCK_T)
    in_tile = tokens < end
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_y = in_tile[:, None] & (n < out_features)[None, :]
    update = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    active = 0
    if PDL:
        tl.extra.cuda.gdc_wait()
    if first < end:
        for c0 in range(0, num_columns, BLOCK_C):
            columns = c0 + tl.arange(0, BLOCK_C)
            slab_row, exists, coefficient = gather_columns(
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
            used = tl.max((coefficient != 0).to(tl.int32), 0)
            active = tl.maximum(active, used)
            if used > 0:
                b = tl.load(
                    B_ptr + slab_row[:, None] * out_features + n[None, :],
                    mask=exists[:, None] & (n < out_features)[None, :],
                    other=0.0,
                )  # [BLOCK_C, BLOCK_N]
                u = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
                for split in range(num_splits):
                    u += tl.load(
                        u_ptr + split * stride_us + tokens[:, None] * stride_ut + columns[None, :],
                        mask=in_tile[:, None] & (columns < num_columns)[None, :],
                        other=0.0,
                    )
                v = weighted(u, coefficient[None, :])
                update = mixed_dot(v, b.to(tl.float32), update, PRECISION)
    y_block = y_ptr + tokens[:, None] * out_features + n[None, :]
    if ACCUMULATE:
        if active > 0:  # a row without weights keeps its bits
            y = tl.load(y_block, mask=in_y, other=0.0)
            tl.store(y_block, (y.to(tl.float32) + update).to(y.dtype), mask=in_y)
    else:
        tl.store(y_block, update.to(y_ptr.dtype.element_ty), mask=in_y)


@triton.jit(**steady)
def _mixture_coefficients_bwd_kernel(
    u_ptr,
    g_ptr,
    owned_u_ptr,
    owned_g_ptr,
    start_ptr,
    rank_ptr,
    scaling_ptr,
    indices_ptr,
    weights_ptr,
    cu_seqlens_ptr,
    num_tokens,
    num_rows,
    tokens_per_row,
    num_entries,
    top_k,
    max_rank,
    num_columns,
    owned_begin,
    num_owned,
    VARLEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Spread a token's weighted rank columns over the owned slab rows: owned[t, j] = sum over picks of j's
    entry of weight * scaling * column (of the column itself where not WEIGHTED, still only of picks with a
    weight); tokens outside every row get zeros from the caller."""
    row, first, end = segment_tile(
        tl.program_id(0), cu_seqlens_ptr, num_tokens, num_rows, tokens_per_row, BLOCK_T, VARLEN
    )
    if first >= end:
        return
    tokens = first + tl.arange(0, BLOCK_T)
    in_tile = (tokens < end)[:, None]
    owned = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    slab_row = owned_begin + owned
    u = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    g = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for pick in range(top_k):
        entry = tl.load(indices_ptr + row * top_k + pick)
        weight = tl.load(weights_ptr + row * top_k + pick)
        used = (weight != 0) & (entry >= 0) & (entry < num_entries)
        begin = tl.load(start_ptr + entry, mask=used, other=0)
        rank = tl.load(rank_ptr + entry, mask=used, other=0)
        coefficient = weight * tl.load(scaling_ptr + entry, mask=used, other=0.0) if WEIGHTED else 1.0
        offset = slab_row - begin
        mine = in_tile & ((offset >= 0) & (offset < rank) & (owned < num_owned))[None, :]
        at = tokens[:, None] * num_columns + pick * max_rank + offset[None, :]
        u += tl.load(u_ptr + at, mask=mine, other=0.0) * coefficient
        g += tl.load(g_ptr + at, mask=mine, other=0.0) * coefficient
    at = tokens[:, None] * num_owned + owned[None, :]
    tl.store(owned_u_ptr + at, u, mask=in_tile & (owned < num_owned)[None, :])
    tl.store(owned_g_ptr + at, g, mask=in_tile & (owned < num_owned)[None, :])


@triton.jit(**steady)
def _mixture_factors_bwd_kernel(
    coefficients_ptr,
    x_ptr,
    grad_ptr,
    num_tokens,
    num_owned,
    blocks_per_split,
    features,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad[split, j] = sum over the split's tokens of coefficients[t, j] * x[t], in token order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    owned = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(2).to(tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    last_block = tl.minimum((split + 1) * blocks_per_split, tl.cdiv(num_tokens, BLOCK_T))
    for block in range(split * blocks_per_split, last_block):
        tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
        in_split = tokens < num_tokens
        x = tl.load(
            x_ptr + tokens[:, None] * features + n[None, :],
            mask=in_split[:, None] & (n < features)[None, :],
            other=0.0,
        )  # [BLOCK_T, BLOCK_N]
        coefficients = tl.load(
            coefficients_ptr + tokens[:, None] * num_owned + owned[None, :],
            mask=in_split[:, None] & (owned < num_owned)[None, :],
            other=0.0,
        )  # [BLOCK_T, BLOCK_C]
        acc = mixed_dot(tl.trans(x), coefficients, acc, PRECISION)
    tl.store(
        grad_ptr + (split * num_owned + owned)[None, :] * features + n[:, None],
        acc,
        mask=(owned < num_owned)[None, :] & (n < features)[:, None],
    )


@triton.jit(**steady)
def _mixture_weights_bwd_kernel(
    u_ptr,
    g_ptr,
    products_ptr,
    cu_seqlens_ptr,
    num_tokens,
    tokens_per_row,
    num_columns,
    VARLEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """products[row, c] = sum over the row's tokens of u[t, c] * g[t, c], in token order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if VARLEN:
        begin = tl.maximum(tl.load(cu_seqlens_ptr + row), 0).to(tl.int64)
        end = tl.minimum(tl.load(cu_seqlens_ptr + row + 1), num_tokens).to(tl.int64)
    else:
        begin = row * tokens_per_row
        end = begin + tokens_per_row
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for t0 in range(begin, end, BLOCK_T):
        tokens = t0 + tl.arange(0, BLOCK_T)
        at = tokens[:, None] * num_columns + columns[None, :]
        mask = (tokens < end)[:, None] & (columns < num_columns)[None, :]
        total += tl.load(u_ptr + at, mask=mask, other=0.0) * tl.load(g_ptr + at, mask=mask, other=0.0)
    tl.store(products_ptr + row * num_columns + columns, tl.sum(total, 0), mask=columns < num_columns)


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


def split_blocks(size: int, block: int, splits: int) -> tuple[int, int]:
    """(blocks per split, splits) that cover `size` in whole blocks, none of them empty."""
    blocks = max(triton.cdiv(size, block), 1)
    per_split = triton.cdiv(blocks, splits)
    return per_split, triton.cdiv(blocks, per_split)


def shrink(x, A, routing, *, num_columns, max_rank, tiles, splits=1, pdl=False):
    """u [splits, T, num_columns] fp32: the unweighted rank-space vectors, in `splits` partial sums.

    routing: (start, rank, scaling, indices, weights, cu_seqlens), or None: columns are slab rows.
    """
    num_tokens, in_features = x.shape
    num_programs, arguments = routing_arguments(
        routing, num_tokens, max_rank=max_rank, block=tiles["BLOCK_T"], num_columns=num_columns
    )
    blocks_per_split, splits = split_blocks(in_features, tiles["BLOCK_K"], splits)
    u = torch.empty(splits, num_tokens, num_columns, dtype=torch.float32, device=x.device)
    if num_programs and num_columns:
        _mixture_shrink_kernel[(num_programs, splits, triton.cdiv(num_columns, tiles["BLOCK_C"]))](
            x_ptr=x,
            u_ptr=u,
            A_ptr=A,
            in_features=in_features,
            blocks_per_split=blocks_per_split,
            stride_us=num_tokens * num_columns,
            stride_ut=num_columns,
            RESIDENT=routing is None,
            PRECISION=dot_precision(x),
            PDL=pdl,
            **arguments,
            **tiles,
            **({"launch_pdl": True} if pdl else {}),
        )
    return u


def expand(u, y, B, routing, *, max_rank, tiles, accumulate=True, pdl=False):
    """Add (or write, if not `accumulate`) the weighted expansion of u [splits, T, columns] to y [T, out]."""
    num_splits, num_tokens, num_columns = u.shape
    out_features = B.shape[1]
    num_programs, arguments = routing_arguments(
        routing, num_tokens, max_rank=max_rank, block=tiles["BLOCK_T"]
    )
    if num_programs == 0 or num_columns == 0:
        return
    _mixture_expand_kernel[(num_programs, triton.cdiv(out_features, tiles["BLOCK_N"]))](
        u_ptr=u,
        y_ptr=y,
        B_ptr=B,
        out_features=out_features,
        num_splits=num_splits,
        stride_us=num_tokens * num_columns,
        stride_ut=num_columns,
        ACCUMULATE=accumulate,
        PRECISION=dot_precision(y),
        PDL=pdl,
        **arguments,
        **tiles,
        **({"launch_pdl": True} if pdl else {}),
    )


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


@contextlib.contextmanager
def beside(x):
    """Launches inside run beside those that follow: on a second stream of x's device, after all that is
    queued so far. Yields `join`, which makes the current stream wait for them.

    For passes bound by memory beside a product bound by its operations. Their priority is the higher one: few
    programs that stay on few multiprocessors, while the product fills the others.
    """
    if not x.is_cuda:
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


def factor_grads(coefficients, x, *, tiles, splits=1):
    """sum over t of coefficients[t]^T x[t]: [num_owned, features] fp32, in an order that never varies."""
    num_tokens, features = x.shape
    num_owned = coefficients.shape[1]
    blocks_per_split, splits = split_blocks(num_tokens, tiles["BLOCK_T"], splits)
    grad = torch.empty(splits, num_owned, features, dtype=torch.float32, device=x.device)
    if num_owned:
        grid = (triton.cdiv(features, tiles["BLOCK_N"]), triton.cdiv(num_owned, tiles["BLOCK_C"]), splits)
        _mixture_factors_bwd_kernel[grid](
            coefficients_ptr=coefficients,
            x_ptr=x,
            grad_ptr=grad,
            num_tokens=num_tokens,
            num_owned=num_owned,
            blocks_per_split=blocks_per_split,
            features=features,
            PRECISION=dot_precision(x),
            **tiles,
        )
    return grad[0] if splits == 1 else grad.sum(0)


def row_products(u, g, num_rows, cu_seqlens, *, tiles):
    """sum over a row's tokens of u[t] * g[t]: [num_rows, num_columns] fp32.  u, g: [T, num_columns] fp32."""
    num_tokens, num_columns = u.shape
    products = torch.empty(num_rows, num_columns, dtype=torch.float32, device=u.device)
    if num_rows and num_columns:
        _mixture_weights_bwd_kernel[(num_rows, triton.cdiv(num_columns, tiles["BLOCK_C"]))](
            u_ptr=u,
            g_ptr=g,
            products_ptr=products,
            cu_seqlens_ptr=cu_seqlens,
            num_tokens=num_tokens,
            tokens_per_row=num_tokens // num_rows,
            num_columns=num_columns,
            VARLEN=cu_seqlens is not None,
            **tiles,
        )
    return products


def mixture_fwd(y, x, A, B, routing, *, max_rank, plan, u=None, save_u=False):
    """Add the mixture to y [T, out] in place. Returns the unweighted u [T, top_k * max_rank] if `save_u`.

    u: [splits, T, columns] from `norm_shrink` or `silu_mul_shrink` replaces the shrink.
    """
    num_tokens, in_features = x.shape
    num_columns = routing[3].shape[1] * max_rank
    if plan["kernel"] == "one_pass" and u is None and not save_u:
        tiles = plan["one_pass"]
        num_programs, arguments = routing_arguments(routing, num_tokens, max_rank=max_rank, block=1)
        if num_programs and num_columns:
            _mixture_one_pass_fwd_kernel[(num_programs, triton.cdiv(B.shape[1], tiles["BLOCK_N"]))](
                x_ptr=x,
                y_ptr=y,
                A_ptr=A,
                B_ptr=B,
                in_features=in_features,
                out_features=B.shape[1],
                **arguments,
                **tiles,
            )
        return None
    pdl = plan["pdl"]
    if u is None:
        splits = 1 if save_u else plan["splits"]
        u = shrink(
            x,
            A,
            routing,
            num_columns=num_columns,
            max_rank=max_rank,
            tiles=plan["shrink"],
            splits=splits,
            pdl=pdl,
        )
    else:
        pdl = False
    expand(u, y, B, routing, max_rank=max_rank, tiles=plan["expand"], pdl=pdl)
    return u.sum(0) if save_u and u.shape[0] > 1 else u[0] if save_u else None


def mixture_bwd(dy, x, u, A, B, routing, *, max_rank, plan, owned, needs):
    """(dx, dA, dB, dweights, g = B dy) at dy [T, out]; dA and dB: the slab rows `owned`.

    The first four are None unless `needs` asks for them.  u: [T, top_k * max_rank] fp32 from `mixture_fwd`.
    """
    g = shrink(dy, B, routing, num_columns=u.shape[1], max_rank=max_rank, tiles=plan["shrink"])
    dx = None
    if needs[0]:
        # Every token is written, but for those that cu_seqlens leaves out.
        whole = routing[5] is None and u.shape[1] > 0
        dx = torch.empty_like(x) if whole else torch.zeros_like(x)
        expand(g, dx, A, routing, max_rank=max_rank, tiles=plan["expand"], accumulate=False)
    grads = pool_grads(dy, x, u, g[0], routing, max_rank=max_rank, plan=plan, owned=owned, needs=needs[1:])
    return dx, *grads, g[0]


def pool_grads(dy, x, u, g, routing, *, max_rank, plan, owned, needs):
    """(dA, dB, dweights) of gathered entries, None where `needs` asks for none.  u, g: [T, columns] fp32."""
    start, rank, scaling, indices, weights, cu_seqlens = routing
    num_rows, top_k = indices.shape
    needs_A, needs_B, needs_weights = needs
    dA = dB = dweights = None
    if needs_A or needs_B:
        owned_u, owned_g = owned_coefficients(u, g, routing, max_rank=max_rank, plan=plan, owned=owned)
        settings = {"tiles": plan["factors"], "splits": plan["splits"]}
        dA = factor_grads(owned_g, x, **settings) if needs_A else None
        dB = factor_grads(owned_u, dy, **settings) if needs_B else None
    if needs_weights:
        products = row_products(u, g, num_rows, cu_seqlens, tiles=plan["weights"])
        of_pick = scaling[indices.long().clamp(0, max(start.shape[0] - 1, 0))] if start.shape[0] else 0.0
        dweights = products.view(num_rows, top_k, max_rank).sum(-1) * of_pick
        dweights = torch.where(weights == 0, 0.0, dweights)
    return dA, dB, dweights


def owned_coefficients(u, g, routing, *, max_rank, plan, owned, weighted=True):
    """weight * scaling * (u, g) of every token, or (u, g), per owned slab row: two [T, num_owned] fp32."""
    num_tokens = u.shape[0]
    num_owned, tiles = owned[1] - owned[0], plan["coefficients"]
    make = torch.empty if routing[5] is None else torch.zeros  # cu_seqlens may leave tokens out
    owned_u, owned_g = make(2, num_tokens, num_owned, dtype=torch.float32, device=u.device)
    num_programs, arguments = routing_arguments(
        routing, num_tokens, max_rank=max_rank, block=tiles["BLOCK_T"]
    )
    if num_programs and num_owned:
        _mixture_coefficients_bwd_kernel[(num_programs, triton.cdiv(num_owned, tiles["BLOCK_C"]))](
            u_ptr=u,
            g_ptr=g,
            owned_u_ptr=owned_u,
            owned_g_ptr=owned_g,
            owned_begin=owned[0],
            num_owned=num_owned,
            WEIGHTED=weighted,
            **arguments,
            **tiles,
        )
    return owned_u, owned_g
