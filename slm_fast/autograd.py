"""What an op does once its backend is chosen: forward, backward, and the autograd functions that join them.

`ops` checks the arguments and comes here; `compiled` registers the same functions for `torch.compile`.
A routing is a tuple: (start, rank, scaling, indices, weights, cu_seqlens) where entries are gathered,
(row_entry, scaling, weights, cu_seqlens) where the whole pool takes part. The ops that make u take the
former, or None: the columns of u are all slab rows.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slm_fast import dispatch, reference

Grads = tuple[Tensor | None, ...]


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def leaf_grads(grads: Grads, needs, owned_dtypes: tuple, u_shape: torch.Size | None) -> Grads:
    """(dx, dA, dB, dweights, du) as gradients of (x, weights, A_owned, B_owned, u); None if not needed."""
    dx, dA, dB, dweights, du = (g if need else None for g, need in zip(grads, needs, strict=True))
    dA, dB = (None if g is None else g.to(t) for g, t in zip((dA, dB), owned_dtypes, strict=True))
    return dx, dweights, dA, dB, None if du is None else du.expand(u_shape)


def rows_of_tokens(num_tokens: int, num_rows: int, cu_seqlens: Tensor | None, device) -> Tensor:
    """The row of each token, [num_tokens] int64, made on the device."""
    tokens = torch.arange(num_tokens, device=device)
    if cu_seqlens is None:
        return tokens // max(num_tokens // max(num_rows, 1), 1)
    return (torch.searchsorted(cu_seqlens, tokens, right=True) - 1).clamp(0, max(num_rows - 1, 0))


# ---- mixture


def mixture_forward(
    backend: str,
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    routing: tuple,
    max_rank: int,
    u: Tensor | None = None,
    save_u: bool = False,
) -> Tensor | None:
    """Add the mixture to `y` in place; what the backward needs as `u` if `save_u` (None on `reference`)."""
    num_tokens = x.shape[:-1].numel()
    flat_x, flat_y = x.reshape(num_tokens, A.shape[1]), y.reshape(num_tokens, B.shape[1])
    if backend == "reference" or (u is not None and backend == "cpu"):
        check_indices(routing)
        given = None if u is None else u.sum(0)
        y.copy_(reference.mixture(flat_y, flat_x, A, B, *routing, u=given).view(y.shape))
        return given
    out, flat_x, A, B, *routing = contiguous(flat_y, flat_x, A, B, *routing)
    if backend == "cpu":
        num_columns = routing[3].shape[1] * max_rank
        saved = torch.empty(num_tokens, num_columns) if save_u else None
        dispatch.mixture_forward_cpu(out, flat_x, num_tokens, A, B, *routing, saved)
    else:
        (u,) = contiguous(u)
        saved = dispatch.mixture_forward_gpu(out, flat_x, A, B, tuple(routing), max_rank, u, save_u)
    if out.data_ptr() != y.data_ptr():
        y.copy_(out.view(y.shape))
    return saved


def check_indices(routing: tuple | None) -> None:
    if routing is None:
        return
    start, _, _, indices, weights, _ = routing
    num_entries = start.shape[0]
    outside = (indices < 0) | (indices >= max(num_entries, 1))
    if outside.any() or (num_entries == 0 and weights.any()):
        raise ValueError(f"indices must lie in 0..{num_entries - 1}, got {indices.tolist()}")


def mixture_backward(
    backend: str,
    dy: Tensor,
    x: Tensor,
    u: Tensor | None,
    A: Tensor,
    B: Tensor,
    routing: tuple,
    max_rank: int,
    owned: tuple[int, int],
    needs: tuple[bool, bool, bool, bool, bool],
    given_u: bool = False,
) -> Grads:
    """(dx, dA, dB, dweights, du) at dy, None unless `needs` asks; dA and dB are the owned rows, in fp32."""
    num_tokens, shape = x.shape[:-1].numel(), x.shape
    dy, x = dy.reshape(num_tokens, B.shape[1]), x.reshape(num_tokens, A.shape[1])
    if backend == "reference" or (given_u and backend == "cpu"):
        given = u if given_u else None
        dx, *grads = reference.mixture_backward(dy, x, A, B, *routing, u=given, owned=owned)
        return (None, *grads, dx) if given_u else (dx.view(shape), *grads, None)
    dy, x, A, B, *routing = contiguous(dy, x, A, B, *routing)
    if backend == "cpu":
        dx, *grads = dispatch.mixture_backward_cpu(dy, x, u, A, B, *routing, owned, needs[:4])
        return (None if dx is None else dx.view(shape), *grads, None)
    dx, *grads, g = dispatch.mixture_backward_gpu(dy, x, u, A, B, tuple(routing), max_rank, owned, needs[:4])
    dx = None if dx is None else dx.view(shape)
    return (dx, *grads, gathered_du(g, routing, max_rank) if needs[4] else None)


def gathered_du(g: Tensor, routing: tuple, max_rank: int) -> Tensor:
    """The gradient of the unweighted u: weight * scaling * g, [T, top_k * max_rank] fp32."""
    start, _, scaling, indices, weights, cu_seqlens = routing
    num_tokens = g.shape[0]
    entry = indices.long().clamp(0, max(start.shape[0] - 1, 0))
    per_pick = weights * scaling[entry] if start.shape[0] else torch.zeros_like(weights)
    row = rows_of_tokens(num_tokens, indices.shape[0], cu_seqlens, g.device)
    du = g.view(num_tokens, indices.shape[1], max_rank) * per_pick[row][:, :, None]
    return du.view(g.shape)


class MixtureFunction(torch.autograd.Function):
    """`ops.mixture` for training: keeps x and the unweighted rank-space vectors u."""

    @staticmethod
    def forward(ctx, y, x, weights, A_owned, B_owned, u, A, B, routing, max_rank, owned, backend):
        start, rank, scaling, indices, cu_seqlens = routing
        routing = (start, rank, scaling, indices, weights, cu_seqlens)
        saved = mixture_forward(backend, y, x, A, B, routing, max_rank, u, save_u=True)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, saved, A, B, *routing)
        ctx.settings = (max_rank, owned, backend, None if u is None else u.shape)
        ctx.grad_dtypes = tuple(None if p is None else p.dtype for p in (A_owned, B_owned))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, saved, A, B, *routing = ctx.saved_tensors
        max_rank, owned, backend, u_shape = ctx.settings
        needs_y, needs_x, needs_w, needs_A, needs_B, needs_u = ctx.needs_input_grad[:6]
        needs = (needs_x and u_shape is None, needs_A and u_shape is None, needs_B, needs_w, needs_u)
        grads = mixture_backward(
            backend, dy, x, saved, A, B, tuple(routing), max_rank, owned, needs, u_shape is not None
        )
        leaves = leaf_grads(grads, needs, ctx.grad_dtypes, u_shape)
        return (dy if needs_y else None, *leaves, *(None,) * 6)


# ---- fused linear: of a resident pool, or on `gpu` of gathered entries, which have a max_rank


def fused_linear_forward(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    routing: tuple,
    u: Tensor | None,
    save_u: bool,
    max_rank: int | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y [T, out_features] plus `residual`, what the backward needs as `u` if `save_u`)."""
    if backend == "gpu":
        x, bias, A, B, u, residual, *routing = contiguous(x, bias, A, B, u, residual, *routing)
        weight, routing = unit_stride(weight), tuple(routing)
        return dispatch.fused_linear_forward_gpu(
            x, weight, bias, A, B, routing, max_rank, u, save_u, residual
        )
    given = None if u is None else u.sum(0)
    y = reference.fused_linear(x, weight, bias, A, B, *routing, u=given)
    return y if residual is None else y + residual, given


def unit_stride(x: Tensor) -> Tensor:
    """x [rows, features], copied unless the features of a row lie side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def stacked_linear_forward(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    B: list[Tensor | int],
    routing: tuple,
    u: Tensor,
    max_rank: int | None,
) -> Tensor:
    """y [T, sum of the linears' features]; u: [slabs, splits, T, columns]."""
    if backend == "gpu":
        x, bias, u, *routing = contiguous(x, bias, u, *routing)
        B = [part if isinstance(part, int) else part.contiguous() for part in B]
        return dispatch.stacked_linear_gpu(x, unit_stride(weight), bias, B, tuple(routing), u, max_rank)
    if max_rank is not None:
        check_indices(routing)
    return reference.stacked_linear(x, weight, bias, B, routing, u.sum(1), max_rank)


def fused_linear_backward(
    backend: str,
    dy: Tensor,
    x: Tensor,
    u: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    routing: tuple,
    owned: tuple[int, int],
    needs: tuple[bool, bool, bool, bool, bool],
    given_u: bool,
    max_rank: int | None = None,
) -> Grads:
    """(dx, dA, dB, dweights, du) at dy [T, out]; with a given u, dx is the frozen linear's and dA is None."""
    needs_x, needs_A, needs_B, needs_w, needs_u = needs
    if backend != "gpu":
        given = u if given_u else None
        dx, dA, dB, *grads = reference.fused_linear_backward(dy, x, weight, A, B, *routing, given)
        return dx, dA[slice(*owned)], dB[slice(*owned)], *grads
    dy, x, weight, A, B, *routing = contiguous(dy, x, weight, A, B, *routing)
    inner = (needs_x and not given_u, needs_A and not given_u, needs_B, needs_w)
    dx, dA, dB, dweights, g = dispatch.fused_linear_backward_gpu(
        dy, x, u, weight, A, B, tuple(routing), max_rank, owned, inner
    )
    if given_u and needs_x:
        dx = dy @ weight
    if not needs_u:
        return dx, dA, dB, dweights, None
    if max_rank is not None:
        return dx, dA, dB, dweights, gathered_du(g, routing, max_rank)
    row_entry, scaling, weights, cu_seqlens = routing
    if len(scaling):
        of_row = (weights * scaling)[:, row_entry.clamp(min=0).long()] * (row_entry >= 0)
    else:
        of_row = weights.new_zeros(weights.shape[0], row_entry.shape[0])
    row = rows_of_tokens(dy.shape[0], weights.shape[0], cu_seqlens, dy.device)
    return dx, dA, dB, dweights, g * of_row[row]


class FusedLinearFunction(torch.autograd.Function):
    """`ops.fused_linear` and `ops.segment_linear` for training; the linear itself is frozen.

    routing: without the weights, which are a leaf.
    """

    @staticmethod
    def forward(ctx, x, weights, A_owned, B_owned, u, weight, bias, A, B, routing, max_rank, owned, backend):
        *pool, cu_seqlens = routing
        routing = (*pool, weights, cu_seqlens)
        y, saved = fused_linear_forward(backend, x, weight, bias, A, B, routing, u, True, max_rank)
        ctx.save_for_backward(x, saved, weight, A, B, *routing)
        ctx.settings = (max_rank, owned, backend, None if u is None else u.shape)
        ctx.grad_dtypes = tuple(None if p is None else p.dtype for p in (A_owned, B_owned))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, saved, weight, A, B, *routing = ctx.saved_tensors
        max_rank, owned, backend, u_shape = ctx.settings
        needs_x, needs_w, needs_A, needs_B, needs_u = ctx.needs_input_grad[:5]
        given_u = u_shape is not None
        needs = (needs_x, needs_A and not given_u, needs_B, needs_w, needs_u)
        grads = fused_linear_backward(
            backend, dy, x, saved, weight, A, B, tuple(routing), owned, needs, given_u, max_rank
        )
        return (*leaf_grads(grads, needs, ctx.grad_dtypes, u_shape), *(None,) * 8)


# ---- the ops that make u for those above


def contiguous_routing(routing: tuple | None) -> tuple | None:
    return None if routing is None else contiguous(*routing)


def norm_shrink_forward(
    backend: str,
    x: Tensor,
    weight: Tensor,
    eps: float,
    A: list[Tensor],
    routing: tuple | None,
    max_rank: int,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(h [T, in_features], u [linears, splits, T, columns]); only `gpu` has more than one split."""
    x, weight, *A = contiguous(x, weight, *A)
    routing = contiguous_routing(routing)
    if backend == "gpu":
        return dispatch.norm_shrink_forward_gpu(x, weight, eps, A, routing, max_rank, splits)
    check_indices(routing)
    h, u = reference.norm_shrink(x, weight, eps, A, routing, max_rank=max_rank)
    return h, u[:, None]


def norm_shrink_backward(
    backend: str,
    dh: Tensor,
    du: Tensor,
    x: Tensor,
    h: Tensor,
    u: Tensor,
    weight: Tensor,
    eps: float,
    A: list[Tensor],
    routing: tuple | None,
    max_rank: int,
    owned: tuple[int, int],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, list[Tensor] | None]:
    """(dx, dA of each slab) at dh and du [linears, 1, T, columns]; dA: the owned rows, in fp32."""
    du, u = du[:, 0], u[:, 0]
    if backend == "gpu":
        dh, du, x, h, u, weight, *A = contiguous(dh, du, x, h, u, weight, *A)
        routing = contiguous_routing(routing)
        return dispatch.norm_shrink_backward_gpu(
            dh, du, x, h, u, weight, eps, A, routing, max_rank, owned, needs
        )
    return reference.norm_shrink_backward(dh, du, x, weight, eps, A, routing, max_rank=max_rank, owned=owned)


def slab_leaf_grads(dA: list[Tensor] | None, need: bool, owned_dtypes: list) -> list[Tensor | None]:
    """The dA of each slab as gradients of A_owned; None if not needed."""
    if not need:
        return [None] * len(owned_dtypes)
    return [g.to(dtype) for g, dtype in zip(dA, owned_dtypes, strict=True)]


class NormShrinkFunction(torch.autograd.Function):
    """`ops.norm_shrink` for training; the norm's weight is frozen. Keeps h, which the linears keep too."""

    @staticmethod
    def forward(ctx, x, weight, eps, A, routing, max_rank, owned, backend, *A_owned):
        h, u = norm_shrink_forward(backend, x, weight, eps, A, routing, max_rank, splits=1)
        ctx.save_for_backward(x, h, u, weight, *A, *(routing or ()))
        ctx.settings = (eps, len(A), max_rank, owned, backend)
        ctx.grad_dtypes = [p.dtype for p in A_owned]
        return h, u

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, du):
        eps, linears, max_rank, owned, backend = ctx.settings
        x, h, u, weight, *rest = ctx.saved_tensors
        A, routing = rest[:linears], tuple(rest[linears:]) or None
        needs = (ctx.needs_input_grad[0], any(ctx.needs_input_grad[8:]))
        dx, dA = norm_shrink_backward(
            backend, dh, du, x, h, u, weight, eps, A, routing, max_rank, owned, needs
        )
        return (dx, *(None,) * 7, *slab_leaf_grads(dA, needs[1], ctx.grad_dtypes))


def silu_mul_shrink_forward(
    backend: str,
    gate: Tensor,
    up: Tensor,
    A: Tensor,
    routing: tuple | None,
    max_rank: int,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(h [T, in_features], u [splits, T, columns]); only `gpu` has more than one split."""
    (A,) = contiguous(A)
    gate, up = unit_stride(gate), unit_stride(up)  # parts of a stacked product, whose rows lie apart
    routing = contiguous_routing(routing)
    if backend == "gpu":
        return dispatch.silu_mul_shrink_forward_gpu(gate, up, A, routing, max_rank, splits)
    check_indices(routing)
    h, u = reference.silu_mul_shrink(gate, up, A, routing, max_rank=max_rank)
    return h, u[None]


def silu_mul_shrink_backward(
    backend: str,
    dh: Tensor,
    du: Tensor,
    gate: Tensor,
    up: Tensor,
    h: Tensor,
    A: Tensor,
    routing: tuple | None,
    max_rank: int,
    owned: tuple[int, int],
    needs: tuple[bool, bool, bool],
) -> Grads:
    """(dgate, dup, dA) at dh and du [1, T, columns]; dA: the owned rows, in fp32."""
    du = du[0]
    if backend == "gpu":
        dh, du, gate, up, h, A = contiguous(dh, du, gate, up, h, A)
        routing, inner = contiguous_routing(routing), (needs[0] or needs[1], needs[2])
        return dispatch.silu_mul_shrink_backward_gpu(dh, du, gate, up, h, A, routing, max_rank, owned, inner)
    return reference.silu_mul_shrink_backward(dh, du, gate, up, A, routing, max_rank=max_rank, owned=owned)


class SiluMulShrinkFunction(torch.autograd.Function):
    """`ops.silu_mul_shrink` for training. Keeps h, which the linear behind it keeps too."""

    @staticmethod
    def forward(ctx, gate, up, A_owned, A, routing, max_rank, owned, backend):
        h, u = silu_mul_shrink_forward(backend, gate, up, A, routing, max_rank, splits=1)
        ctx.save_for_backward(gate, up, h, A, *(routing or ()))
        ctx.settings = (max_rank, owned, backend)
        ctx.grad_dtype = None if A_owned is None else A_owned.dtype
        return h, u

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, du):
        max_rank, owned, backend = ctx.settings
        gate, up, h, A, *routing = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        dgate, dup, dA = silu_mul_shrink_backward(
            backend, dh, du, gate, up, h, A, tuple(routing) or None, max_rank, owned, needs
        )
        return (dgate, dup, dA.to(ctx.grad_dtype) if needs[2] else None, *(None,) * 5)
