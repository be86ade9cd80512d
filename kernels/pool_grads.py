"""Gradients of factors and weights, which `mixture`, `fused_linear` and the ops that make u share.

    owned_u[t, j], owned_g[t, j] = weight * scaling * (u, g) of token t's column of slab row j, else 0
    dB[j] = sum_t owned_u[t, j] dy[t],  dA[j] = sum_t owned_g[t, j] x[t],  dweights from sum_t u[t] * g[t]

Sums run in token order in one program per block, or in a fixed number of parts added at the end: no atomics,
the same bits each time. Slab rows that the task does not own are skipped. Bytes: T (in + out) s for x and dy,
8 T (C + 2 owned) for the coefficients.
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl

from slm_fast.kernels.rank_space import (
    dot_precision,
    mixed_dot,
    routing_arguments,
    segment_tile,
    split_blocks,
    steady,
)


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
