"""RMSNorm that also makes the rank-space vectors of the linears behind it, forward and backward.

    h[t] = weight * (x[t] * rsqrt(mean(x[t]^2) + eps)).to(dtype)     rounded where LlamaRMSNorm rounds
    u[l, split, t, c] = <A[l][slab row of c], h[t]>                  fp32, over the split's slice of features

for L = 1 to 4 linears that read the same h (q, k, v or gate, up), so that they need no shrink of their own:
u[l] goes to `mixture_fwd(u=...)` or `fused_linear_fwd(u=...)`. Of what transformers computes, only the order
in which the squares are added differs. Symbols: T tokens, C rank columns of a token, r rank, U distinct
entries in the batch, s bytes of an element.

Forward: grid (tiles of tokens) x (splits of features) x (C / BLOCK_C). A program reads its tokens whole for
the statistics (from L2 after the first), then its slice once for all L linears: one accumulator a linear, in
one loop. Programs of the first column block write h, each its slice. The L slabs are separate pointers, each
under a static branch, so that every one keeps its 16-byte loads. A tile of one token (decoding, where every
row of the batch gathers other entries) multiplies and sums; larger tiles use tensor cores. Tiles stay below
64 tokens: h is cast to the dtype inside the loop, and an operand cast inside a pipelined wgmma is wrong on
ptxas before 13.3; below 64 rows the product is mma.sync, which has no such fault.
HBM bytes L U r in s + 2 T in s + 4 L splits T C; operations 2 L T C in. LLaMA-2-7B's q, k, v (in 4096, bf16,
K=2, r=8, H100 at 3.35 TB/s): 1 row 0.39 MB of A, 16 KB of x and h, 1.5 KB of u at 8 splits: floor 0.13 us,
so the launch (2-3 us) is the cost, 8% of the 100.7 MB = 30 us of q, k, v; but the norm's own launch was there
before, and three shrinks are gone. 64 rows with 12 entries: 2.4 MB of A, 1.0 MB of x and h, 0.1 MB of u at 8
splits: floor 1.1 us. Gathered, each row reads its entries from L2: L T C in s = 25 MB and 4 MB for the
statistics, 5.3 us at 5.5 TB/s, expected 20% of q, k, v; resident, four tiles of 16 rows read 9.4 MB of A:
1.7 us, expected 10% with the launch. A norm and three shrinks of 2-3 us each were there before.
Prefill: 2 T in s bytes = 16.4 KB a token = 4.9 ns, what a norm alone costs; A stays in L2.

Backward: dh' = dh + sum_l du[l] A[l], xhat = x * rstd,
    dx = rstd * (weight * dh' - xhat * mean(weight * xhat * dh'))
    dA[l][j] = sum_t du[l][t, column of j] * h[t],  owned slab rows only, fp32
The mean needs no second look at A: the sum over features of weight * xhat * du[l] A[l] is <du[l], u[l]>. Grid
(tiles) x (splits of features, which change no bit); a program reads x and dh for the two sums, then its
slice again (L2) with A. HBM bytes 3 T in s + 8 L T C, and T in s where h is made again for dA instead of
being kept; 4096 tokens of LLaMA-2-7B: 101 MB = 30 us + 10 us for h, 8% of the 515 us that the q, k, v
products of the backward take at 800 TFLOP/s. The norm's weight is frozen: it has no gradient.

Every token gets its h. With `cu_seqlens`, tokens before the first row or after the last get h, no u, and
their du is ignored; rows without weights get h and u = 0. Without, num_tokens is a multiple of the rows.
"""

import torch
import triton
import triton.language as tl

from slm_fast.kernels.pool_grads import factor_grads, owned_coefficients
from slm_fast.kernels.rank_space import (
    dot_precision,
    expand_dot,
    load_columns,
    rank_columns,
    routing_arguments,
    shrink_dot,
    split_blocks,
    steady,
    tile_tokens,
    weighted,
)

# The backward has one program a tile of tokens; below this many, features are split to fill the machine.
PROGRAMS = 512


@triton.jit
def normalize(x, weight, rstd):
    """weight * (x * rstd).to(dtype), each product rounded to the dtype; x: [tokens, features]."""
    rounded = (x.to(tl.float32) * rstd[:, None]).to(x.dtype)
    return (weight.to(tl.float32)[None, :] * rounded.to(tl.float32)).to(x.dtype)


@triton.jit(**steady)
def _norm_shrink_fwd_kernel(
    x_ptr,
    weight_ptr,
    h_ptr,
    u_ptr,
    A0_ptr,
    A1_ptr,
    A2_ptr,
    A3_ptr,
    start_ptr,
    rank_ptr,
    scaling_ptr,
    indices_ptr,
    weights_ptr,
    cu_seqlens_ptr,
    eps,
    num_tokens,
    num_rows,
    tokens_per_row,
    num_entries,
    top_k,
    max_rank,
    num_columns,
    in_features,
    num_splits,
    blocks_per_split,
    stride_us,
    stride_ut,
    LINEARS: tl.constexpr,
    RESIDENT: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, first, end, row_begin, row_end = tile_tokens(
        tl.program_id(0), cu_seqlens_ptr, num_tokens, num_rows, tokens_per_row, BLOCK_T, RESIDENT, VARLEN
    )
    if first >= end:
        return
    tokens = first + tl.arange(0, BLOCK_T)
    in_tile = tokens < end
    x_rows = x_ptr + tokens[:, None] * in_features
    squares = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for k0 in range(0, in_features, BLOCK_S):
        k = k0 + tl.arange(0, BLOCK_S)
        x = tl.load(x_rows + k[None, :], mask=in_tile[:, None] & (k < in_features)[None, :], other=0.0)
        squares += x.to(tl.float32) * x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(squares, 1) / in_features + eps)

    columns = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
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
    acc0 = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if LINEARS > 1:
        acc1 = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if LINEARS > 2:
        acc2 = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if LINEARS > 3:
        acc3 = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    writes_h = tokens < tl.where(tl.program_id(2) == 0, end, first)
    split = tl.program_id(1).to(tl.int64)
    last_block = tl.minimum((split + 1) * blocks_per_split, tl.cdiv(in_features, BLOCK_K))
    for block in range(split * blocks_per_split, last_block):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        in_x = k < in_features
        x = tl.load(x_rows + k[None, :], mask=in_tile[:, None] & in_x[None, :], other=0.0)
        weight = tl.load(weight_ptr + k, mask=in_x, other=0.0)
        h = normalize(x, weight, rstd)  # [BLOCK_T, BLOCK_K]
        tl.store(
            h_ptr + tokens[:, None] * in_features + k[None, :], h, mask=writes_h[:, None] & in_x[None, :]
        )
        acc0 = shrink_dot(h, acc0, A0_ptr, slab_row, exists, k, in_features, PRECISION)
        if LINEARS > 1:
            acc1 = shrink_dot(h, acc1, A1_ptr, slab_row, exists, k, in_features, PRECISION)
        if LINEARS > 2:
            acc2 = shrink_dot(h, acc2, A2_ptr, slab_row, exists, k, in_features, PRECISION)
        if LINEARS > 3:
            acc3 = shrink_dot(h, acc3, A3_ptr, slab_row, exists, k, in_features, PRECISION)

    in_row = (tokens >= row_begin) & (tokens < row_end)
    mask = in_row[:, None] & (columns < num_columns)[None, :]
    u = u_ptr + tokens[:, None] * stride_ut + columns[None, :]
    tl.store(u + split * stride_us, acc0, mask=mask)
    if LINEARS > 1:
        tl.store(u + (num_splits + split) * stride_us, acc1, mask=mask)
    if LINEARS > 2:
        tl.store(u + (num_splits * 2 + split) * stride_us, acc2, mask=mask)
    if LINEARS > 3:
        tl.store(u + (num_splits * 3 + split) * stride_us, acc3, mask=mask)


@triton.jit(**steady)
def _norm_shrink_bwd_kernel(
    dh_ptr,
    x_ptr,
    weight_ptr,
    du_ptr,
    u_ptr,
    dx_ptr,
    h_ptr,
    A0_ptr,
    A1_ptr,
    A2_ptr,
    A3_ptr,
    start_ptr,
    rank_ptr,
    scaling_ptr,
    indices_ptr,
    weights_ptr,
    cu_seqlens_ptr,
    eps,
    num_tokens,
    num_rows,
    tokens_per_row,
    num_entries,
    top_k,
    max_rank,
    num_columns,
    in_features,
    blocks_per_split,
    LINEARS: tl.constexpr,
    RESIDENT: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WRITE_H: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx, and h where WRITE_H; ONE_BLOCK: all columns fit in BLOCK_C and stay in registers."""
    row, first, end, row_begin, row_end = tile_tokens(
        tl.program_id(0), cu_seqlens_ptr, num_tokens, num_rows, tokens_per_row, BLOCK_T, RESIDENT, VARLEN
    )
    if first >= end:
        return
    tokens = first + tl.arange(0, BLOCK_T)
    in_tile = tokens < end
    in_row = (tokens >= row_begin) & (tokens < row_end)
    rows = tokens[:, None] * in_features
    squares = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    products = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for k0 in range(0, in_features, BLOCK_S):
        k = k0 + tl.arange(0, BLOCK_S)
        mask = in_tile[:, None] & (k < in_features)[None, :]
        x = tl.load(x_ptr + rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + k, mask=k < in_features, other=0.0).to(tl.float32)
        squares += x * x
        products += x * weight[None, :] * dh
    rstd = tl.rsqrt(tl.sum(squares, 1) / in_features + eps)
    projection = rstd * tl.sum(products, 1)  # of weight * dh' on xhat

    for c0 in range(0, num_columns, BLOCK_C):
        columns = c0 + tl.arange(0, BLOCK_C)
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
        for linear in tl.static_range(LINEARS):
            du = load_columns(du_ptr, linear, tokens, in_row, num_tokens, columns, exists, num_columns)
            u = load_columns(u_ptr, linear, tokens, in_row, num_tokens, columns, exists, num_columns)
            projection += tl.sum(weighted(u, du), 1)
    mean = projection / in_features

    columns = tl.arange(0, BLOCK_C)
    if ONE_BLOCK:
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
        du0 = load_columns(du_ptr, 0, tokens, in_row, num_tokens, columns, exists, num_columns)
        if LINEARS > 1:
            du1 = load_columns(du_ptr, 1, tokens, in_row, num_tokens, columns, exists, num_columns)
        if LINEARS > 2:
            du2 = load_columns(du_ptr, 2, tokens, in_row, num_tokens, columns, exists, num_columns)
        if LINEARS > 3:
            du3 = load_columns(du_ptr, 3, tokens, in_row, num_tokens, columns, exists, num_columns)
    split = tl.program_id(1).to(tl.int64)
    last_block = tl.minimum((split + 1) * blocks_per_split, tl.cdiv(in_features, BLOCK_N))
    for block in range(split * blocks_per_split, last_block):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = in_tile[:, None] & (n < in_features)[None, :]
        x = tl.load(x_ptr + rows + n[None, :], mask=mask, other=0.0)  # [BLOCK_T, BLOCK_N]
        grad = tl.load(dh_ptr + rows + n[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + n, mask=n < in_features, other=0.0)
        if ONE_BLOCK:
            grad = expand_dot(du0, grad, A0_ptr, slab_row, exists, n, in_features, PRECISION)
            if LINEARS > 1:
                grad = expand_dot(du1, grad, A1_ptr, slab_row, exists, n, in_features, PRECISION)
            if LINEARS > 2:
                grad = expand_dot(du2, grad, A2_ptr, slab_row, exists, n, in_features, PRECISION)
            if LINEARS > 3:
                grad = expand_dot(du3, grad, A3_ptr, slab_row, exists, n, in_features, PRECISION)
        else:
            for c0 in range(0, num_columns, BLOCK_C):
                columns = c0 + tl.arange(0, BLOCK_C)
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
                du = load_columns(du_ptr, 0, tokens, in_row, num_tokens, columns, exists, num_columns)
                grad = expand_dot(du, grad, A0_ptr, slab_row, exists, n, in_features, PRECISION)
                if LINEARS > 1:
                    du = load_columns(du_ptr, 1, tokens, in_row, num_tokens, columns, exists, num_columns)
                    grad = expand_dot(du, grad, A1_ptr, slab_row, exists, n, in_features, PRECISION)
                if LINEARS > 2:
                    du = load_columns(du_ptr, 2, tokens, in_row, num_tokens, columns, exists, num_columns)
                    grad = expand_dot(du, grad, A2_ptr, slab_row, exists, n, in_features, PRECISION)
                if LINEARS > 3:
                    du = load_columns(du_ptr, 3, tokens, in_row, num_tokens, columns, exists, num_columns)
                    grad = expand_dot(du, grad, A3_ptr, slab_row, exists, n, in_features, PRECISION)
        xhat = x.to(tl.float32) * rstd[:, None]
        dx = rstd[:, None] * (grad * weight.to(tl.float32)[None, :] - xhat * mean[:, None])
        tl.store(dx_ptr + rows + n[None, :], dx.to(x.dtype), mask=mask)
        if WRITE_H:
            tl.store(h_ptr + rows + n[None, :], normalize(x, weight, rstd), mask=mask)


def launch_columns(x, A, routing, *, max_rank, block):
    """(tiles of tokens, rank columns, the launch arguments that say which tokens and slab rows they are)."""
    resident = routing is None
    num_tokens, in_features = x.shape
    num_programs, arguments = routing_arguments(
        routing, num_tokens, max_rank=max_rank, block=block, num_columns=A.shape[0]
    )
    num_columns = arguments["num_columns"]
    arguments |= {"in_features": in_features, "RESIDENT": resident, "PRECISION": dot_precision(x)}
    if arguments["num_rows"] == 0 or num_columns == 0:
        # Without rows or columns every token still has its h: tiles of consecutive tokens.
        num_programs = triton.cdiv(num_tokens, block)
        arguments |= {"num_columns": num_columns if resident else 0, "RESIDENT": True, "VARLEN": False}
    return num_programs, num_columns, arguments


def slab_pointers(A: list[torch.Tensor]) -> dict:
    return {f"A{i}_ptr": A[i] if i < len(A) else None for i in range(4)} | {"LINEARS": len(A)}


def slab_grads(du, h, routing, *, max_rank, plan, owned) -> list[torch.Tensor]:
    """dA of every linear's owned slab rows, [num_owned, in] fp32.  du: [linears, T, C] fp32, h: [T, in]."""
    begin, end = owned
    if begin == end or (routing is not None and not routing[3].numel()):
        return [torch.zeros(end - begin, h.shape[1], dtype=torch.float32, device=h.device) for _ in du]
    if routing is None:
        spread = [g[:, begin:end].contiguous() for g in du]
    else:
        spread = []
        for i in range(0, len(du), 2):  # two linears a launch
            pair = du[i], du[min(i + 1, len(du) - 1)]
            spread += owned_coefficients(
                *pair, routing, max_rank=max_rank, plan=plan, owned=owned, weighted=False
            )
    return [factor_grads(spread[i], h, tiles=plan["factors"], splits=plan["splits"]) for i in range(len(du))]


def norm_shrink_fwd(x, weight, eps, A, routing, *, max_rank, plan, splits=None):
    """(h [T, in], u [linears, splits, T, C] fp32): RMSNorm of x, and the unweighted <A[l] rows, h>.

    Args: x: [T, in], weight: [in], of one dtype.  A: 1 to 4 slabs [total_rank, in] with the same slab rows.
    routing: (start, rank, scaling, indices, weights, cu_seqlens), C = top_k * max_rank; None: columns are
    slab rows, C = total_rank.  plan: "splits", "pdl", "forward": BLOCK_T (1, 16 or 32), BLOCK_C, BLOCK_K,
    BLOCK_S, num_warps, num_stages.  splits: exactly so many, instead of the plan's or as few as the blocks.
    """
    tiles, pdl = plan["forward"], plan["pdl"]
    num_programs, num_columns, arguments = launch_columns(
        x, A[0], routing, max_rank=max_rank, block=tiles["BLOCK_T"]
    )
    num_tokens, in_features = x.shape
    blocks_per_split, filled = split_blocks(in_features, tiles["BLOCK_K"], splits or plan["splits"])
    splits = splits or filled  # those beyond the blocks are 0
    h = torch.empty_like(x)
    u = torch.empty(len(A), splits, num_tokens, num_columns, dtype=torch.float32, device=x.device)
    if num_programs:
        grid = (num_programs, splits, max(triton.cdiv(num_columns, tiles["BLOCK_C"]), 1))
        _norm_shrink_fwd_kernel[grid](
            x_ptr=x,
            weight_ptr=weight,
            h_ptr=h,
            u_ptr=u,
            eps=eps,
            num_splits=splits,
            blocks_per_split=blocks_per_split,
            stride_us=num_tokens * num_columns,
            stride_ut=num_columns,
            PDL=pdl,
            **slab_pointers(A),
            **arguments,
            **tiles,
            **({"launch_pdl": True} if pdl else {}),
        )
    return h, u


def norm_shrink_bwd(dh, du, x, weight, eps, u, A, routing, *, max_rank, plan, owned, needs, h=None):
    """(dx [T, in], [dA of each linear]) at dh [T, in] and du [linears, T, C]; None unless `needs` asks.

    Args: du, u: [linears, T, C] fp32; u is the forward's, its splits summed, du its gradient (0 where the
    weight is 0).  owned: slab rows begin:end that dA is for.  needs: (dx, dA).  h: the forward's, if it was
    kept.  plan: "splits" (of dA's sum over tokens), "backward" (BLOCK_T, BLOCK_C, BLOCK_N, BLOCK_S),
    "factors", "coefficients".
    """
    tiles = plan["backward"]
    num_programs, num_columns, arguments = launch_columns(
        x, A[0], routing, max_rank=max_rank, block=tiles["BLOCK_T"]
    )
    needs_x, needs_A = needs
    writes_h = needs_A and h is None and owned[0] < owned[1]
    dx = dA = None
    if needs_x or writes_h:
        dx = torch.empty_like(x)
        h = torch.empty_like(x) if writes_h else h
        if num_programs:
            blocks_per_split, splits = split_blocks(
                x.shape[1], tiles["BLOCK_N"], triton.cdiv(PROGRAMS, num_programs)
            )
            _norm_shrink_bwd_kernel[(num_programs, splits)](
                dh_ptr=dh,
                x_ptr=x,
                weight_ptr=weight,
                du_ptr=du,
                u_ptr=u,
                dx_ptr=dx,
                h_ptr=h if writes_h else None,
                eps=eps,
                blocks_per_split=blocks_per_split,
                WRITE_H=writes_h,
                ONE_BLOCK=num_columns <= tiles["BLOCK_C"],
                **slab_pointers(A),
                **arguments,
                **tiles,
            )
    if needs_A:
        h = x if h is None else h  # nothing is owned: only its shape is looked at
        dA = slab_grads(du, h, routing, max_rank=max_rank, plan=plan, owned=owned)
    return dx if needs_x else None, dA
