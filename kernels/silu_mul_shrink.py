"""silu(gate) * up that also makes the rank-space vector of down_proj behind it, forward and backward.

    h[t] = silu(gate[t]).to(dtype) * up[t]                  as transformers' LlamaMLP: act_fn(gate) * up
    u[split, t, c] = <A[slab row of c], h[t]>               fp32, over the split's slice of features

so that down_proj needs no shrink of its own: u goes to `mixture_fwd(u=...)` or `fused_linear_fwd(u=...)`.
Symbols: T tokens, C rank columns of a token, r rank, U distinct entries in the batch, s bytes of an element.

Forward: grid (tiles of tokens) x (splits of features) x (C / BLOCK_C). A program reads its slice of gate and
up once and multiplies it with the slab rows of its columns; programs of the first column block write h. Tiles
of one token multiply and sum, larger ones use tensor cores and stay below 64 tokens (see `norm_shrink`).
HBM bytes U r in s + 3 T in s + 4 splits T C; operations 2 T C in. LLaMA-2-7B's down_proj (in 11008, bf16,
K=2, r=8, H100 at 3.35 TB/s): 1 row 0.35 MB of A and 66 KB of gate, up and h: floor 0.12 us, so the launch
(2-3 us) is the cost, 9% of the 90.2 MB = 27 us of down_proj; but the activation's own launches (two in
PyTorch) were there before, and a shrink is gone. 64 rows with 12 entries: 2.1 MB of A, 4.2 MB of gate, up and
h, 45 KB of u at 11 splits: floor 1.9 us, of which the activation alone is 1.3 us. Gathered, each row reads
its entries from L2: T C in s = 22.5 MB, 4.1 us at 5.5 TB/s, expected 18% of down_proj; resident, four tiles
of 16 rows read 8.5 MB of A: expected 10% with the launch. Prefill: 3 T in s bytes = 66 KB a token = 20 ns,
what the activation alone costs; A stays in L2.

Backward: dh' = dh + du A, sigma = sigmoid(gate),
    dup = dh' * silu(gate),  dgate = dh' * up * sigma * (1 + gate * (1 - sigma))
    dA[j] = sum_t du[t, column of j] * h[t],  owned slab rows only, fp32
Grid (tiles) x (in / BLOCK_N), elementwise but for the product with A. HBM bytes 5 T in s + 4 T C, and T in s
where h is made again for dA instead of being kept: 4096 tokens of LLaMA-2-7B 451 MB = 135 us + 27 us for h,
of the 462 us that the down_proj product of the backward takes at 800 TFLOP/s; the activation's own backward
moves the same 451 MB.

Every token gets its h; tokens outside all rows get no u and their du is ignored (see `norm_shrink`).
"""

import torch
import triton
import triton.language as tl

from slm_fast.kernels.norm_shrink import launch_columns, slab_grads
from slm_fast.kernels.rank_space import (
    expand_dot,
    load_columns,
    rank_columns,
    shrink_dot,
    split_blocks,
    steady,
    tile_tokens,
)


@triton.jit
def silu(gate):
    """gate / (1 + exp(-gate)) in fp32, rounded to gate's dtype."""
    g = gate.to(tl.float32)
    return (g / (1.0 + tl.exp(-g))).to(gate.dtype)


@triton.jit(**steady)
def _silu_mul_shrink_fwd_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
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
    stride_gate,
    stride_up,
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
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    writes_h = tokens < tl.where(tl.program_id(2) == 0, end, first)
    split = tl.program_id(1).to(tl.int64)
    last_block = tl.minimum((split + 1) * blocks_per_split, tl.cdiv(in_features, BLOCK_K))
    for block in range(split * blocks_per_split, last_block):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        in_h = k < in_features
        mask = in_tile[:, None] & in_h[None, :]
        gate = tl.load(gate_ptr + tokens[:, None] * stride_gate + k[None, :], mask=mask, other=0.0)
        up = tl.load(up_ptr + tokens[:, None] * stride_up + k[None, :], mask=mask, other=0.0)
        h = (silu(gate).to(tl.float32) * up.to(tl.float32)).to(gate.dtype)  # [BLOCK_T, BLOCK_K]
        tl.store(
            h_ptr + tokens[:, None] * in_features + k[None, :], h, mask=writes_h[:, None] & in_h[None, :]
        )
        acc = shrink_dot(h, acc, A_ptr, slab_row, exists, k, in_features, PRECISION)
    in_row = (tokens >= row_begin) & (tokens < row_end)
    tl.store(
        u_ptr + split * stride_us + tokens[:, None] * stride_ut + columns[None, :],
        acc,
        mask=in_row[:, None] & (columns < num_columns)[None, :],
    )


@triton.jit(**steady)
def _silu_mul_shrink_bwd_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    du_ptr,
    dgate_ptr,
    dup_ptr,
    h_ptr,
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
    RESIDENT: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WRITE_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dgate and dup, and h where WRITE_H."""
    row, first, end, row_begin, row_end = tile_tokens(
        tl.program_id(0), cu_seqlens_ptr, num_tokens, num_rows, tokens_per_row, BLOCK_T, RESIDENT, VARLEN
    )
    if first >= end:
        return
    tokens = first + tl.arange(0, BLOCK_T)
    in_row = (tokens >= row_begin) & (tokens < row_end)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (tokens < end)[:, None] & (n < in_features)[None, :]
    at = tokens[:, None] * in_features + n[None, :]
    grad = tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_N]
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0)
    up = tl.load(up_ptr + at, mask=mask, other=0.0)
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
        grad = expand_dot(du, grad, A_ptr, slab_row, exists, n, in_features, PRECISION)
    active = silu(gate).to(tl.float32)
    g = gate.to(tl.float32)
    sigma = 1.0 / (1.0 + tl.exp(-g))
    up = up.to(tl.float32)
    dgate = grad * up * sigma * (1.0 + g * (1.0 - sigma))
    tl.store(dgate_ptr + at, dgate.to(gate.dtype), mask=mask)
    tl.store(dup_ptr + at, (grad * active).to(gate.dtype), mask=mask)
    if WRITE_H:
        tl.store(h_ptr + at, (active * up).to(gate.dtype), mask=mask)


def silu_mul_shrink_fwd(gate, up, A, routing, *, max_rank, plan, splits=None):
    """(h [T, in], u [splits, T, C] fp32): silu(gate) * up, and the unweighted <A rows, h>.

    Args: gate, up: [T, in], of one dtype, whose rows may lie apart.  A: [total_rank, in].  routing: (start,
    rank, scaling, indices, weights, cu_seqlens), C = top_k * max_rank; None: columns are slab rows,
    C = total_rank.
    plan: "splits", "pdl", "forward": BLOCK_T (1, 16 or 32), BLOCK_C, BLOCK_K, num_warps, num_stages.
    splits: exactly so many, instead of the plan's or as few as the blocks.
    """
    tiles, pdl = plan["forward"], plan["pdl"]
    num_programs, num_columns, arguments = launch_columns(
        gate, A, routing, max_rank=max_rank, block=tiles["BLOCK_T"]
    )
    num_tokens, in_features = gate.shape
    blocks_per_split, filled = split_blocks(in_features, tiles["BLOCK_K"], splits or plan["splits"])
    splits = splits or filled  # those beyond the blocks are 0
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    u = torch.empty(splits, num_tokens, num_columns, dtype=torch.float32, device=gate.device)
    if num_programs:
        grid = (num_programs, splits, max(triton.cdiv(num_columns, tiles["BLOCK_C"]), 1))
        _silu_mul_shrink_fwd_kernel[grid](
            gate_ptr=gate,
            up_ptr=up,
            h_ptr=h,
            u_ptr=u,
            A_ptr=A,
            stride_gate=gate.stride(0),
            stride_up=up.stride(0),
            blocks_per_split=blocks_per_split,
            stride_us=num_tokens * num_columns,
            stride_ut=num_columns,
            PDL=pdl,
            **arguments,
            **tiles,
            **({"launch_pdl": True} if pdl else {}),
        )
    return h, u


def silu_mul_shrink_bwd(dh, du, gate, up, A, routing, *, max_rank, plan, owned, needs, h=None):
    """(dgate, dup, dA) at dh [T, in] and du [T, C]; None unless `needs` asks for it.

    Args: du: [T, C] fp32, the gradient of the unweighted u (0 where the weight is 0).  owned: slab rows
    begin:end that dA [end - begin, in] fp32 is for.  needs: (dgate and dup, dA).  h: the forward's, if it was
    kept.  plan: "splits" (of dA's sum over tokens), "backward" (BLOCK_T, BLOCK_C, BLOCK_N), "factors",
    "coefficients".
    """
    tiles = plan["backward"]
    num_programs, num_columns, arguments = launch_columns(
        gate, A, routing, max_rank=max_rank, block=tiles["BLOCK_T"]
    )
    needs_inputs, needs_A = needs
    writes_h = needs_A and h is None and owned[0] < owned[1]
    dgate = dup = dA = None
    if needs_inputs or writes_h:
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        h = torch.empty_like(gate) if writes_h else h
        if num_programs:
            _silu_mul_shrink_bwd_kernel[(num_programs, triton.cdiv(gate.shape[1], tiles["BLOCK_N"]))](
                dh_ptr=dh,
                gate_ptr=gate,
                up_ptr=up,
                du_ptr=du,
                dgate_ptr=dgate,
                dup_ptr=dup,
                h_ptr=h if writes_h else None,
                A_ptr=A,
                WRITE_H=writes_h,
                **arguments,
                **tiles,
            )
    if needs_A:
        h = gate if h is None else h  # nothing is owned: only its shape is looked at
        (dA,) = slab_grads(du[None], h, routing, max_rank=max_rank, plan=plan, owned=owned)
    return (dgate, dup, dA) if needs_inputs else (None, None, dA)
