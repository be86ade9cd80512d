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

import torch
import triton
import triton.language as tl

from slm_fast.kernels.pool_grads import pool_grads
from slm_fast.kernels.rank_space import (
    dot_precision,
    gather_columns,
    mixed_dot,
    rank_columns,
    routing_arguments,
    segment_tile,
    split_blocks,
    splits_at_once,
    steady,
    sum_splits,
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
    AT_ONCE: tl.constexpr,
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
                if PDL:  # B and the routing do not come from the launch before
                    tl.extra.cuda.gdc_wait()
                at = tokens[:, None] * stride_ut + columns[None, :]
                listed = in_tile[:, None] & (columns < num_columns)[None, :]
                u = sum_splits(u_ptr, num_splits, stride_us, at, listed, AT_ONCE)
                v = weighted(u, coefficient[None, :])
                update = mixed_dot(v, b.to(tl.float32), update, PRECISION)
    if PDL:
        tl.extra.cuda.gdc_wait()
    y_block = y_ptr + tokens[:, None] * out_features + n[None, :]
    if ACCUMULATE:
        if active > 0:  # a row without weights keeps its bits
            y = tl.load(y_block, mask=in_y, other=0.0)
            tl.store(y_block, (y.to(tl.float32) + update).to(y.dtype), mask=in_y)
    else:
        tl.store(y_block, update.to(y_ptr.dtype.element_ty), mask=in_y)


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
        AT_ONCE=splits_at_once(num_splits, tiles["BLOCK_T"], tiles["BLOCK_C"], tiles["num_warps"]),
        **arguments,
        **tiles,
        **({"launch_pdl": True} if pdl else {}),
    )


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
