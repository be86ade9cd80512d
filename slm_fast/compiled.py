"""The ops as `torch.library` custom ops, for `torch.compile`: opaque to it, with fakes and gradients.

Eager code does not come here: a custom op costs 9 us a call where a plain function costs 1. The backend is
chosen when the op runs, so that tracing needs to know nothing of it ("" is the default choice).
"""

import torch
from torch import Tensor

from slm_fast import autograd, dispatch

# torch.library reads the schema from the annotations: no aliases, no tuples as arguments.


def _select(x: Tensor, backend: str) -> str:
    return dispatch.select(x, backend or None)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


def _kept(grads: tuple, needs: list[bool], x: Tensor) -> tuple[Tensor, ...]:
    """The gradients that are needed, empty tensors for the others: a custom op returns no None."""
    return tuple(g.contiguous() if need else _empty(x) for g, need in zip(grads, needs, strict=True))


def _copy_of_given(saved: Tensor | None, u: Tensor | None) -> Tensor | None:
    """What a forward saves, copied where it is the only split of the given u: no output may be an input."""
    return saved.clone() if u is not None and u.shape[0] == 1 and saved is not None else saved


def _fake_grads(x, A, B, weights, saved, num_owned, needs):
    """Fakes of (dx, dA, dB, dweights, du)."""
    shapes = (x.shape, (num_owned, A.shape[1]), (num_owned, B.shape[1]), weights.shape, saved.shape)
    dtypes = (x.dtype, *(torch.float32,) * 4)
    return tuple(
        x.new_empty(shape, dtype=dtype) if need else _empty(x)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


@torch.library.custom_op("slm_fast::key_search", mutates_args=())
def key_search(
    query: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    shift: Tensor | None,
    top_k: int,
    weighting: str,
    temperature: float,
    min_similarity: float | None,
    num_groups: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from slm_fast import ops  # it imports this module

    found = ops.key_search(
        query,
        keys,
        bias,
        mask,
        top_k=top_k,
        weighting=weighting,
        temperature=temperature,
        min_similarity=min_similarity,
        num_groups=num_groups,
        shift=shift,
        backend=backend or None,
    )
    return tuple(t.contiguous() for t in found)


@key_search.register_fake
def _(query, keys, bias, mask, shift, top_k, *settings):
    shape = (query.shape[0], top_k)
    indices = query.new_empty(shape, dtype=torch.int32)
    return indices, query.new_empty(shape), query.new_empty(shape)


# ---- mixture


@torch.library.custom_op("slm_fast::mixture_", mutates_args=("y",))
def mixture_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    indices: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    u: Tensor | None,
    max_rank: int,
    backend: str,
) -> None:
    """Without gradients: in place."""
    routing = (start, rank, scaling, indices, weights, cu_seqlens)
    autograd.mixture_forward(_select(x, backend), y, x, A, B, routing, max_rank, u)


@mixture_.register_fake
def _(*args):
    return None


@torch.library.custom_op("slm_fast::mixture", mutates_args=())
def mixture(
    y: Tensor,
    x: Tensor,
    weights: Tensor,
    A_owned: Tensor | None,
    B_owned: Tensor | None,
    u: Tensor | None,
    A: Tensor,
    B: Tensor,
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor | None,
    max_rank: int,
    owned_begin: int,
    owned_end: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """With gradients: a new y, and the unweighted u for the backward."""
    out = y.contiguous().clone()
    routing = (start, rank, scaling, indices, weights, cu_seqlens)
    saved = autograd.mixture_forward(_select(x, backend), out, x, A, B, routing, max_rank, u, save_u=True)
    saved = _copy_of_given(saved, u)
    num_tokens, columns = x.shape[:-1].numel(), indices.shape[1] * max_rank
    return out, x.new_zeros(num_tokens, columns, dtype=torch.float32) if saved is None else saved


@mixture.register_fake
def _(
    y, x, weights, A_owned, B_owned, u, A, B, start, rank, scaling, indices, cu_seqlens, max_rank, *settings
):
    columns = indices.shape[1] * max_rank
    saved = x.new_empty(x.shape[:-1].numel(), columns, dtype=torch.float32)
    return torch.empty_like(y, memory_format=torch.contiguous_format), saved


@torch.library.custom_op("slm_fast::mixture_backward", mutates_args=())
def mixture_backward(
    dy: Tensor,
    x: Tensor,
    saved: Tensor,
    A: Tensor,
    B: Tensor,
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    indices: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    max_rank: int,
    owned_begin: int,
    owned_end: int,
    backend: str,
    needs: list[bool],
    given_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chosen, routing = _select(x, backend), (start, rank, scaling, indices, weights, cu_seqlens)
    owned = (owned_begin, owned_end)
    grads = autograd.mixture_backward(
        chosen, dy, x, saved, A, B, routing, max_rank, owned, tuple(needs), given_u
    )
    return _kept(grads, needs, x)


@mixture_backward.register_fake
def _(
    dy,
    x,
    saved,
    A,
    B,
    start,
    rank,
    scaling,
    indices,
    weights,
    cu,
    max_rank,
    begin,
    end,
    backend,
    needs,
    given,
):
    return _fake_grads(x, A, B, weights, saved, end - begin, needs)


def _mixture_context(ctx, inputs, output):
    y, x, weights, A_owned, B_owned, u, A, B, start, rank, scaling, indices, cu_seqlens, *ctx.settings = (
        inputs
    )
    ctx.save_for_backward(x, output[1], A, B, start, rank, scaling, indices, weights, cu_seqlens)
    ctx.u_shape = None if u is None else u.shape
    ctx.grad_dtypes = tuple(None if p is None else p.dtype for p in (A_owned, B_owned))


def _mixture_gradients(ctx, dy, _):
    needs_y, needs_x, needs_w, needs_A, needs_B, needs_u = ctx.needs_input_grad[:6]
    own = ctx.u_shape is None
    needs = [needs_x and own, needs_A and own, needs_B, needs_w, needs_u]
    grads = mixture_backward(dy, *ctx.saved_tensors, *ctx.settings, needs, not own)
    leaves = autograd.leaf_grads(grads, needs, ctx.grad_dtypes, ctx.u_shape)
    return (dy if needs_y else None, *leaves, *(None,) * 11)


mixture.register_autograd(_mixture_gradients, setup_context=_mixture_context)


# ---- fused linear


@torch.library.custom_op("slm_fast::fused_linear", mutates_args=())
def fused_linear(
    x: Tensor,
    weights: Tensor,
    A_owned: Tensor | None,
    B_owned: Tensor | None,
    u: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    entries: list[Tensor],
    cu_seqlens: Tensor | None,
    max_rank: int | None,
    owned_begin: int,
    owned_end: int,
    backend: str,
    save_u: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the unweighted u for the backward if `save_u`. entries: (row_entry, scaling) of a resident pool;
    with max_rank (start, rank, scaling, indices)."""
    chosen, routing = _select(x, backend), (*entries, weights, cu_seqlens)
    y, saved = autograd.fused_linear_forward(chosen, x, weight, bias, A, B, routing, u, save_u, max_rank)
    saved = _copy_of_given(saved, u)
    if save_u and saved is None:
        saved = x.new_zeros(x.shape[0], _num_columns(A, entries, max_rank), dtype=torch.float32)
    return y, saved if save_u else _empty(x)


def _num_columns(A: Tensor, entries: list[Tensor], max_rank: int | None) -> int:
    return dispatch.num_columns(A, None if max_rank is None else entries, max_rank)


@fused_linear.register_fake
def _(x, weights, A_owned, B_owned, u, weight, bias, A, B, entries, cu_seqlens, max_rank, *rest):
    saved = _empty(x)
    if rest[-1]:
        saved = x.new_empty(x.shape[0], _num_columns(A, entries, max_rank), dtype=torch.float32)
    return x.new_empty(x.shape[0], weight.shape[0]), saved


@torch.library.custom_op("slm_fast::fused_linear_backward", mutates_args=())
def fused_linear_backward(
    dy: Tensor,
    x: Tensor,
    saved: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    entries: list[Tensor],
    max_rank: int | None,
    owned_begin: int,
    owned_end: int,
    backend: str,
    needs: list[bool],
    given_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = autograd.fused_linear_backward(
        _select(x, backend),
        dy,
        x,
        saved,
        weight,
        A,
        B,
        (*entries, weights, cu_seqlens),
        (owned_begin, owned_end),
        tuple(needs),
        given_u,
        max_rank,
    )
    return _kept(grads, needs, x)


@fused_linear_backward.register_fake
def _(dy, x, saved, weight, A, B, weights, cu_seqlens, entries, rank, begin, end, backend, needs, given):
    return _fake_grads(x, A, B, weights, saved, end - begin, needs)


def _fused_linear_context(ctx, inputs, output):
    x, weights, A_owned, B_owned, u, weight, bias, A, B, entries, cu_seqlens, *settings, _ = inputs
    ctx.save_for_backward(x, output[1], weight, A, B, weights, cu_seqlens, *entries)
    ctx.settings, ctx.u_shape = settings, None if u is None else u.shape
    ctx.grad_dtypes = tuple(None if p is None else p.dtype for p in (A_owned, B_owned))


def _fused_linear_gradients(ctx, dy, _):
    needs_x, needs_w, needs_A, needs_B, needs_u = ctx.needs_input_grad[:5]
    given_u = ctx.u_shape is not None
    needs = [needs_x, needs_A and not given_u, needs_B, needs_w, needs_u]
    tensors, entries = ctx.saved_tensors[:7], list(ctx.saved_tensors[7:])
    grads = fused_linear_backward(dy, *tensors, entries, *ctx.settings, needs, given_u)
    leaves = autograd.leaf_grads(grads, needs, ctx.grad_dtypes, ctx.u_shape)
    return (*leaves, *(None,) * 4, [None] * len(entries), *(None,) * 6)


fused_linear.register_autograd(_fused_linear_gradients, setup_context=_fused_linear_context)


@torch.library.custom_op("slm_fast::stacked_linear", mutates_args=())
def stacked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slabs: list[Tensor],
    sizes: list[int],
    slots: list[int],
    entries: list[Tensor],
    cu_seqlens: Tensor | None,
    u: Tensor,
    max_rank: int | None,
    backend: str,
) -> Tensor:
    """sizes, slots: of each part its features and whether it has a slab."""
    own = iter(slabs)
    B = [next(own) if slot else size for size, slot in zip(sizes, slots, strict=True)]
    routing = (*entries, cu_seqlens)
    return autograd.stacked_linear_forward(_select(x, backend), x, weight, bias, B, routing, u, max_rank)


@stacked_linear.register_fake
def _(x, weight, *rest):
    return x.new_empty(x.shape[0], weight.shape[0])


# ---- the ops that make u for those above
#
# The compiler has to know the number of splits, and thus the backend: both are chosen while it traces.
# routing: (start, rank, scaling, indices, weights), empty if the columns of u are the slab rows.


def _routing(routing: list[Tensor], cu_seqlens: Tensor | None) -> tuple | None:
    return (*routing, cu_seqlens) if routing else None


def _fake_u(x: Tensor, A: Tensor, routing: list[Tensor], max_rank: int, *leading: int) -> Tensor:
    columns = dispatch.num_columns(A, routing or None, max_rank)
    return x.new_empty(*leading, x.shape[0], columns, dtype=torch.float32)


@torch.library.custom_op("slm_fast::norm_shrink", mutates_args=())
def norm_shrink(
    x: Tensor,
    A_owned: list[Tensor],
    weight: Tensor,
    eps: float,
    A: list[Tensor],
    routing: list[Tensor],
    cu_seqlens: Tensor | None,
    max_rank: int,
    owned_begin: int,
    owned_end: int,
    splits: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    routing = _routing(routing, cu_seqlens)
    return autograd.norm_shrink_forward(backend, x, weight, eps, A, routing, max_rank, splits)


@norm_shrink.register_fake
def _(x, A_owned, weight, eps, A, routing, cu_seqlens, max_rank, begin, end, splits, backend):
    return x.new_empty(x.shape), _fake_u(x, A[0], routing, max_rank, len(A), splits)


@torch.library.custom_op("slm_fast::norm_shrink_backward", mutates_args=())
def norm_shrink_backward(
    dh: Tensor,
    du: Tensor,
    x: Tensor,
    h: Tensor,
    u: Tensor,
    weight: Tensor,
    eps: float,
    A: list[Tensor],
    routing: list[Tensor],
    cu_seqlens: Tensor | None,
    max_rank: int,
    owned_begin: int,
    owned_end: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """dx, empty if not needed, and the dA of each slab, none if not needed."""
    routing, owned = _routing(routing, cu_seqlens), (owned_begin, owned_end)
    dx, dA = autograd.norm_shrink_backward(
        backend, dh, du, x, h, u, weight, eps, A, routing, max_rank, owned, tuple(needs)
    )
    return dx.contiguous() if needs[0] else _empty(x), dA if needs[1] else []


@norm_shrink_backward.register_fake
def _(dh, du, x, h, u, weight, eps, A, routing, cu_seqlens, max_rank, begin, end, backend, needs):
    dA = [slab.new_empty(end - begin, slab.shape[1], dtype=torch.float32) for slab in A]
    return x.new_empty(x.shape) if needs[0] else _empty(x), dA if needs[1] else []


def _norm_shrink_context(ctx, inputs, output):
    x, A_owned, weight, ctx.eps, A, routing, cu_seqlens, *ctx.settings, _, ctx.backend = inputs
    ctx.save_for_backward(x, *output, weight, cu_seqlens, *A, *routing)
    ctx.sizes, ctx.grad_dtypes = (len(A), len(routing)), [p.dtype for p in A_owned]


def _norm_shrink_gradients(ctx, dh, du):
    x, h, u, weight, cu_seqlens, *rest = ctx.saved_tensors
    linears, num_routing = ctx.sizes
    A, routing = rest[:linears], rest[linears:]
    needs = [ctx.needs_input_grad[0], any(ctx.needs_input_grad[1])]
    dx, dA = norm_shrink_backward(
        dh, du, x, h, u, weight, ctx.eps, A, routing, cu_seqlens, *ctx.settings, ctx.backend, needs
    )
    dA = autograd.slab_leaf_grads(dA, needs[1], ctx.grad_dtypes)
    return dx if needs[0] else None, dA, None, None, [None] * linears, [None] * num_routing, *(None,) * 6


norm_shrink.register_autograd(_norm_shrink_gradients, setup_context=_norm_shrink_context)


@torch.library.custom_op("slm_fast::silu_mul_shrink", mutates_args=())
def silu_mul_shrink(
    gate: Tensor,
    up: Tensor,
    A_owned: Tensor | None,
    A: Tensor,
    routing: list[Tensor],
    cu_seqlens: Tensor | None,
    max_rank: int,
    owned_begin: int,
    owned_end: int,
    splits: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    routing = _routing(routing, cu_seqlens)
    return autograd.silu_mul_shrink_forward(backend, gate, up, A, routing, max_rank, splits)


@silu_mul_shrink.register_fake
def _(gate, up, A_owned, A, routing, cu_seqlens, max_rank, begin, end, splits, backend):
    return gate.new_empty(gate.shape), _fake_u(gate, A, routing, max_rank, splits)


@torch.library.custom_op("slm_fast::silu_mul_shrink_backward", mutates_args=())
def silu_mul_shrink_backward(
    dh: Tensor,
    du: Tensor,
    gate: Tensor,
    up: Tensor,
    h: Tensor,
    A: Tensor,
    routing: list[Tensor],
    cu_seqlens: Tensor | None,
    max_rank: int,
    owned_begin: int,
    owned_end: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    routing, owned = _routing(routing, cu_seqlens), (owned_begin, owned_end)
    grads = autograd.silu_mul_shrink_backward(
        backend, dh, du, gate, up, h, A, routing, max_rank, owned, tuple(needs)
    )
    return _kept(grads, needs, gate)


@silu_mul_shrink_backward.register_fake
def _(dh, du, gate, up, h, A, routing, cu_seqlens, max_rank, begin, end, backend, needs):
    dA = A.new_empty(end - begin, A.shape[1], dtype=torch.float32)
    grads = (gate.new_empty(gate.shape), up.new_empty(up.shape), dA)
    return tuple(g if need else _empty(gate) for g, need in zip(grads, needs, strict=True))


def _silu_mul_shrink_context(ctx, inputs, output):
    gate, up, A_owned, A, routing, cu_seqlens, *ctx.settings, _, ctx.backend = inputs
    ctx.save_for_backward(gate, up, output[0], A, cu_seqlens, *routing)
    ctx.grad_dtype = None if A_owned is None else A_owned.dtype


def _silu_mul_shrink_gradients(ctx, dh, du):
    gate, up, h, A, cu_seqlens, *routing = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = silu_mul_shrink_backward(
        dh, du, gate, up, h, A, routing, cu_seqlens, *ctx.settings, ctx.backend, needs
    )
    dgate, dup, dA = (g if need else None for g, need in zip(grads, needs, strict=True))
    dA = None if dA is None else dA.to(ctx.grad_dtype)
    return dgate, dup, dA, None, [None] * len(routing), *(None,) * 6


silu_mul_shrink.register_autograd(_silu_mul_shrink_gradients, setup_context=_silu_mul_shrink_context)
