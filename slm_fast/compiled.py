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
    row_entry: Tensor,
    scaling: Tensor,
    cu_seqlens: Tensor | None,
    owned_begin: int,
    owned_end: int,
    backend: str,
    save_u: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the unweighted u for the backward if `save_u`."""
    chosen, routing = _select(x, backend), (row_entry, scaling, weights, cu_seqlens)
    y, saved = autograd.fused_linear_forward(chosen, x, weight, bias, A, B, routing, u, save_u)
    if save_u and saved is None:
        saved = x.new_zeros(x.shape[0], A.shape[0], dtype=torch.float32)
    return y, saved if save_u else _empty(x)


@fused_linear.register_fake
def _(x, weights, A_owned, B_owned, u, weight, bias, A, B, *rest):
    saved = x.new_empty(x.shape[0], A.shape[0], dtype=torch.float32) if rest[-1] else _empty(x)
    return x.new_empty(x.shape[0], weight.shape[0]), saved


@torch.library.custom_op("slm_fast::fused_linear_backward", mutates_args=())
def fused_linear_backward(
    dy: Tensor,
    x: Tensor,
    saved: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    row_entry: Tensor,
    scaling: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None,
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
        (row_entry, scaling, weights, cu_seqlens),
        (owned_begin, owned_end),
        tuple(needs),
        given_u,
    )
    return _kept(grads, needs, x)


@fused_linear_backward.register_fake
def _(dy, x, saved, weight, A, B, row_entry, scaling, weights, cu_seqlens, begin, end, backend, needs, given):
    return _fake_grads(x, A, B, weights, saved, end - begin, needs)


def _fused_linear_context(ctx, inputs, output):
    x, weights, A_owned, B_owned, u, weight, bias, A, B, row_entry, scaling, cu_seqlens, *settings, _ = inputs
    ctx.save_for_backward(x, output[1], weight, A, B, row_entry, scaling, weights, cu_seqlens)
    ctx.settings, ctx.u_shape = settings, None if u is None else u.shape
    ctx.grad_dtypes = tuple(None if p is None else p.dtype for p in (A_owned, B_owned))


def _fused_linear_gradients(ctx, dy, _):
    needs_x, needs_w, needs_A, needs_B, needs_u = ctx.needs_input_grad[:5]
    given_u = ctx.u_shape is not None
    needs = [needs_x, needs_A and not given_u, needs_B, needs_w, needs_u]
    grads = fused_linear_backward(dy, *ctx.saved_tensors, *ctx.settings, needs, given_u)
    return (*autograd.leaf_grads(grads, needs, ctx.grad_dtypes, ctx.u_shape), *(None,) * 11)


fused_linear.register_autograd(_fused_linear_gradients, setup_context=_fused_linear_context)
