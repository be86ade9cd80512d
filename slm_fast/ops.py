"""The public ops: arguments are checked here, once; `dispatch` picks the backend; `reference` specifies."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slm_fast import dispatch, reference
from slm_fast.reference import MAX_TOP_K

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP32, INT32 = (torch.float32,), (torch.int32,)


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtypes: tuple, device: torch.device) -> None:
    """Raise ValueError unless x has this shape, dtype and device; a size that may be any is taken from x."""
    if x.dtype in dtypes and x.shape == shape and x.device == device:
        return
    if x.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} must be {wanted}, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    raise ValueError(f"{name} must be on {device}, got {x.device}")


def _matrix(name: str, x: Tensor) -> torch.Size:
    shape = x.shape
    if len(shape) != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {list(shape)}")
    return shape


def key_search(
    query: Tensor,
    keys: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    top_k: int,
    weighting: str = "softmax",
    temperature: float = 1.0,
    min_similarity: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the `top_k` keys with the highest score for every query, and their mixture weights.

        score[b, p] = <query[b], keys[p]> + bias[p]

    Ties break by the lower index; masked entries are never picked; picks that do not exist have index 0,
    weight 0 and score -inf; a row whose best score is below `min_similarity` gets all weights 0. Not
    differentiable.

    Args: query: [B, D] fp32.  keys: [P, D] fp32/bf16/fp16, finite.  bias: [P] fp32.  mask: [P] or [B, P]
    bool, True = allowed.  weighting: "similarity", "softmax" or "uniform".
    Returns indices [B, top_k] int32, weights [B, top_k] fp32, scores [B, top_k] fp32.
    Raises ValueError on wrong shapes, dtypes or devices, NaN or infinite queries, top_k outside 1..64, and
    temperature <= 0.  Source: SLM (ICLR 2024), DTKR.
    """
    device = query.device
    num_queries, dim = _matrix("query", query)
    num_keys, _ = _matrix("keys", keys)
    _check("query", query, (num_queries, dim), FP32, device)
    _check("keys", keys, (num_keys, dim), FLOATS, device)
    if bias is not None:
        _check("bias", bias, (num_keys,), FP32, device)
    if mask is not None:
        shape = (num_keys,) if mask.dim() == 1 else (num_queries, num_keys)
        _check("mask", mask, shape, (torch.bool,), device)
    if not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"top_k must be in 1..{MAX_TOP_K}, got {top_k}")
    if weighting not in reference.WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(reference.WEIGHTINGS)}, got {weighting!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if dispatch.select(query, backend) == "cpu":
        query, keys = query.contiguous(), keys.contiguous()
        bias = None if bias is None else bias.contiguous()
        mask = None if mask is None else mask.contiguous()
        return dispatch.key_search_cpu(query, keys, bias, mask, top_k, weighting, temperature, min_similarity)
    if not torch.isfinite(query).all():
        raise ValueError("query must be finite, got NaN or infinite values")
    with torch.no_grad():
        return reference.key_search(
            query,
            keys,
            bias,
            mask,
            top_k=top_k,
            weighting=weighting,
            temperature=temperature,
            min_similarity=min_similarity,
        )


def mixture(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    indices: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    A_owned: Tensor | None = None,
    B_owned: Tensor | None = None,
    owned: tuple[int, int] = (0, 0),
    backend: str | None = None,
) -> Tensor:
    """Add every row's retrieved low-rank update to `y`, in place, and return `y`.

        y[t] += sum_k weights[b, k] * scaling[i] * B[i]^T (A[i] x[t]),   i = indices[b, k], b = row of token t

    A row whose weights are all 0 keeps the bits of `y`. Gradients flow to y, x, weights (0 for a weight that
    is 0) and to `A_owned`, `B_owned`: the parameters that are views of the rows owned[0]:owned[1] of A and B.

    Args: y: [..., out_features], x: [..., in_features], one dtype, fp32/bf16/fp16.
    A: [total_rank, in_features], B: [total_rank, out_features], one dtype, any of the three.
    start, rank: [P] int32, the rows of an entry.  scaling: [P] fp32.  indices: [rows, K] int32.
    weights: [rows, K] fp32.  cu_seqlens: [rows + 1] int32, the tokens of row b are
    cu_seqlens[b]:cu_seqlens[b + 1]; None shares the tokens out equally.
    Raises ValueError on mismatched shapes, dtypes or devices and on indices outside the pool.
    Source: SLM (ICLR 2024), JARe.
    """
    _check_mixture(y, x, A, B, start, rank, scaling, indices, weights, cu_seqlens, A_owned, B_owned, owned)
    chosen = dispatch.select(x, backend)
    if torch.is_grad_enabled() and (
        y.requires_grad
        or x.requires_grad
        or weights.requires_grad
        or (A_owned is not None and A_owned.requires_grad)
        or (B_owned is not None and B_owned.requires_grad)
    ):
        return MixtureFunction.apply(
            y, x, weights, A_owned, B_owned, A, B, start, rank, scaling, indices, cu_seqlens, owned, chosen
        )
    _mixture_forward(chosen, y, x, A, B, start, rank, scaling, indices, weights, cu_seqlens, None)
    return y


def _check_mixture(y, x, A, B, start, rank, scaling, indices, weights, cu_seqlens, A_owned, B_owned, owned):
    device, x_shape = x.device, x.shape
    if len(x_shape) < 2 or x.dtype not in FLOATS:
        raise ValueError(f"x must be [..., in_features] in fp32, bf16 or fp16, got {list(x_shape)} {x.dtype}")
    total_rank, in_features = _matrix("A", A)[0], x_shape[-1]
    out_features = _matrix("B", B)[1]
    picks = _matrix("indices", indices)
    num_rows, entries = picks[0], (start.numel(),)
    _check("A", A, (total_rank, in_features), FLOATS, device)
    _check("B", B, (total_rank, out_features), (A.dtype,), device)
    _check("y", y, (*x_shape[:-1], out_features), (x.dtype,), device)
    _check("start", start, entries, INT32, device)
    _check("rank", rank, entries, INT32, device)
    _check("scaling", scaling, entries, FP32, device)
    _check("indices", indices, picks, INT32, device)
    _check("weights", weights, picks, FP32, device)
    if cu_seqlens is not None:
        _check("cu_seqlens", cu_seqlens, (num_rows + 1,), INT32, device)
    else:
        num_tokens = x_shape[:-1].numel()
        if num_tokens % max(num_rows, 1) or (num_tokens and not num_rows):
            raise ValueError(f"{num_tokens} tokens cannot be shared out equally among {num_rows} rows")
    num_owned = owned[1] - owned[0]
    if not 0 <= owned[0] <= owned[1] <= total_rank:
        raise ValueError(f"owned must be a range of the {total_rank} slab rows, got {owned}")
    if A_owned is not None:
        _check("A_owned", A_owned, (num_owned, in_features), FLOATS, device)
    if B_owned is not None:
        _check("B_owned", B_owned, (num_owned, out_features), FLOATS, device)


def _mixture_forward(backend, y, x, A, B, start, rank, scaling, indices, weights, cu_seqlens, u):
    num_tokens = x.shape[:-1].numel()
    if backend == "cpu":
        out = y.contiguous()
        dispatch.mixture_forward_cpu(
            out,
            x.contiguous(),
            num_tokens,
            A.contiguous(),
            B.contiguous(),
            start.contiguous(),
            rank.contiguous(),
            scaling.contiguous(),
            indices.contiguous(),
            weights.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            u,
        )
        if out is not y:
            y.copy_(out)
        return
    num_entries = start.shape[0]
    outside = (indices < 0) | (indices >= max(num_entries, 1))
    if outside.any() or (num_entries == 0 and weights.any()):
        raise ValueError(f"indices must lie in 0..{num_entries - 1}, got {indices.tolist()}")
    flat_x, flat_y = x.reshape(num_tokens, A.shape[1]), y.reshape(num_tokens, B.shape[1])
    out = reference.mixture(flat_y, flat_x, A, B, start, rank, scaling, indices, weights, cu_seqlens)
    y.copy_(out.view(y.shape))


class MixtureFunction(torch.autograd.Function):
    """`mixture` for training: keeps `x` and, on the cpu backend, the unweighted rank-space vectors `u`."""

    @staticmethod
    def forward(
        ctx, y, x, weights, A_owned, B_owned, A, B, start, rank, scaling, indices, cu_seqlens, owned, backend
    ):
        u = None
        if backend == "cpu":
            max_rank = int(rank.max()) if rank.numel() else 0
            u = torch.empty(x.shape[:-1].numel(), indices.shape[1] * max_rank)
        _mixture_forward(backend, y, x, A, B, start, rank, scaling, indices, weights, cu_seqlens, u)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, u, weights, A, B, start, rank, scaling, indices, cu_seqlens)
        ctx.owned, ctx.backend = owned, backend
        ctx.grad_dtypes = tuple(None if p is None else p.dtype for p in (A_owned, B_owned))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, u, weights, A, B, start, rank, scaling, indices, cu_seqlens = ctx.saved_tensors
        needs_y, needs_x, needs_w, needs_A, needs_B = ctx.needs_input_grad[:5]
        num_tokens = x.shape[:-1].numel()
        flat_dy = dy.reshape(num_tokens, B.shape[1])
        flat_x = x.reshape(num_tokens, A.shape[1])
        shared = (A, B, start, rank, scaling, indices, weights, cu_seqlens)
        if ctx.backend == "cpu":
            shared = tuple(None if t is None else t.contiguous() for t in shared)
            needs = (needs_x, needs_A, needs_B, needs_w)
            grads = dispatch.mixture_backward_cpu(
                flat_dy.contiguous(), flat_x.contiguous(), u, *shared, ctx.owned, needs
            )
        else:
            grads = reference.mixture_backward(flat_dy, flat_x, *shared, owned=ctx.owned)
        dx, dA, dB, dweights = grads
        return (
            dy if needs_y else None,
            dx.view_as(x) if needs_x else None,
            dweights if needs_w else None,
            dA.to(ctx.grad_dtypes[0]) if needs_A else None,
            dB.to(ctx.grad_dtypes[1]) if needs_B else None,
            *(None,) * 9,
        )
