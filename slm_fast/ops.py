"""The public ops: arguments are checked here, once; `dispatch` picks the backend; `reference` specifies."""

import torch
from torch import Tensor

from slm_fast import autograd, compiled, dispatch, reference  # noqa: F401 (compiled registers custom ops)
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
    num_groups: int | None = None,
    shift: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the `top_k` keys with the highest score for every query, and their mixture weights.

        score[b, p] = <phi(query[b]), keys[p]> + bias[p]
        phi(q) = q - shift, or each of the `num_groups` slices of q divided by its norm, or q

    Ties break by the lower index; masked entries are never picked; picks that do not exist have index 0,
    weight 0 and score -inf; a row whose best score is below `min_similarity` gets all weights 0. Not
    differentiable.

    Args: query: [B, D] fp32.  keys: [P, D] fp32/bf16/fp16, finite.  bias: [P] fp32.  mask: [P] or [B, P]
    bool, True = allowed.  weighting: "similarity", "softmax" or "uniform".  num_groups divides D.
    shift: [D] fp32.
    Returns indices [B, top_k] int32, weights [B, top_k] fp32, scores [B, top_k] fp32.
    Raises ValueError on wrong shapes, dtypes or devices, NaN or infinite queries, top_k outside 1..64,
    temperature <= 0, and num_groups together with shift. The gpu backend does not wait for the device to look
    at the queries: a row that is not finite gets index 0 and NaN weights and scores.
    Source: SLM (ICLR 2024), DTKR.
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
    if num_groups is not None and shift is not None:
        raise ValueError("num_groups and shift exclude each other")
    if num_groups is not None and (num_groups < 1 or dim % num_groups):
        raise ValueError(f"num_groups must divide the query size {dim}, got {num_groups}")
    if shift is not None:
        _check("shift", shift, (dim,), FP32, device)
    chosen = dispatch.select(query, backend)
    if chosen != "reference":
        query, keys = query.detach().contiguous(), keys.contiguous()
        bias = None if bias is None else bias.contiguous()
        mask = None if mask is None else mask.contiguous()
        options = (top_k, weighting, temperature, min_similarity)
        if chosen == "gpu":
            shift = None if shift is None else shift.contiguous()
            return dispatch.key_search_gpu(query, keys, bias, mask, *options, num_groups, shift)
        query = reference.transform_query(query, num_groups, shift).contiguous()
        return dispatch.key_search_cpu(query, keys, bias, mask, *options)
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
            num_groups=num_groups,
            shift=shift,
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
    u: Tensor | None = None,
    max_rank: int | None = None,
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
    u: [splits, T, K * max_rank] fp32, made with x by `norm_shrink` or `silu_mul_shrink`; gradients then flow
    to u, not to x and A_owned.
    max_rank: no entry has a larger one; None asks `rank`, for which a GPU has to be waited for.
    Raises ValueError on mismatched shapes, dtypes or devices and on indices outside the pool; on a GPU such
    an index makes its row NaN instead, because raising would have to wait.
    Source: SLM (ICLR 2024), JARe.
    """
    _check_mixture(y, x, A, B, start, rank, scaling, indices, weights, cu_seqlens, A_owned, B_owned, owned)
    if max_rank is None:
        max_rank = int(rank.max()) if rank.numel() else 0
    if u is not None:
        num_columns = indices.shape[1] * max_rank
        _check("u", u, (u.shape[0], x.shape[:-1].numel(), num_columns), FP32, x.device)
    grad = _needs_grad(y, x, weights, A_owned, B_owned, u)
    if torch.compiler.is_compiling():
        if not grad:
            torch.ops.slm_fast.mixture_(
                y, x, A, B, start, rank, scaling, indices, weights, cu_seqlens, u, max_rank, backend or ""
            )
            return y
        leaves, pool = (y, x, weights, A_owned, B_owned, u), (A, B, start, rank, scaling)
        out, _ = torch.ops.slm_fast.mixture(
            *leaves, *pool, indices, cu_seqlens, max_rank, *owned, backend or ""
        )
        return y.copy_(out)
    chosen = dispatch.select(x, backend)
    if grad:
        routing = (start, rank, scaling, indices, cu_seqlens)
        return autograd.MixtureFunction.apply(
            y, x, weights, A_owned, B_owned, u, A, B, routing, max_rank, owned, chosen
        )
    routing = (start, rank, scaling, indices, weights, cu_seqlens)
    autograd.mixture_forward(chosen, y, x, A, B, routing, max_rank, u)
    return y


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    row_entry: Tensor,
    scaling: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    u: Tensor | None = None,
    A_owned: Tensor | None = None,
    B_owned: Tensor | None = None,
    owned: tuple[int, int] = (0, 0),
    backend: str | None = None,
) -> Tensor:
    """A frozen linear and the mixture of a small pool in one kernel: `mixture` with all entries resident.

        y[t] = W x[t] + bias + sum_c weights[b, e] * scaling[e] * B[c] <A[c], x[t]>,  e = row_entry[c], b =
        row of token t

    over the slab rows c. Only `weights` changes between two batches. A row whose weights are all 0 gets
    exactly what an empty pool gives. Gradients flow to x, weights (0 for a weight that is 0) and to
    `A_owned`, `B_owned`, never to the linear.

    Args: x: [..., in_features].  weight: [out_features, in_features], bias: [out_features] or None, of x's
    dtype, fp32/bf16/fp16.  A: [total_rank, in_features], B: [total_rank, out_features], one dtype.
    row_entry: [total_rank] int32, the entry that owns a slab row, -1 for none.  scaling: [P] fp32.
    weights: [rows, P] fp32, see `Routing.dense`.  cu_seqlens, A_owned, B_owned, owned: as in `mixture`.
    u: [splits, T, total_rank] fp32, made with x by `norm_shrink` or `silu_mul_shrink`; gradients then flow to
    u, and to x through the linear alone.
    Raises ValueError on mismatched shapes, dtypes or devices, and if gradients of the linear are wanted.
    Source: SLM (ICLR 2024), JARe.
    """
    num_entries = scaling.numel()
    total_rank, in_features = _matrix("A", A)[0], x.shape[-1]
    out_features = _matrix("weight", weight)[0]
    num_rows, num_tokens, device = _matrix("weights", weights)[0], x.shape[:-1].numel(), x.device
    _check("x", x, tuple(x.shape), FLOATS, device)
    _check("weight", weight, (out_features, in_features), (x.dtype,), device)
    if bias is not None:
        _check("bias", bias, (out_features,), (x.dtype,), device)
    _check("A", A, (total_rank, in_features), FLOATS, device)
    _check("B", B, (total_rank, out_features), (A.dtype,), device)
    _check("row_entry", row_entry, (total_rank,), INT32, device)
    _check("scaling", scaling, (num_entries,), FP32, device)
    _check("weights", weights, (num_rows, num_entries), FP32, device)
    _check_rows(num_tokens, num_rows, cu_seqlens, device)
    _check_owned(A_owned, B_owned, owned, total_rank, in_features, out_features, device)
    if u is not None:
        _check("u", u, (u.shape[0], num_tokens, total_rank), FP32, device)
    if _needs_grad(weight, bias):
        raise ValueError("the linear is frozen here: call requires_grad_(False) on weight and bias")
    flat = x.reshape(num_tokens, in_features)
    grad = _needs_grad(x, weights, A_owned, B_owned, u)
    leaves, frozen = (flat, weights, A_owned, B_owned, u), (weight, bias, A, B)
    if torch.compiler.is_compiling():
        y, _ = torch.ops.slm_fast.fused_linear(
            *leaves, *frozen, row_entry, scaling, cu_seqlens, *owned, backend or "", grad
        )
    elif grad:
        routing, chosen = (row_entry, scaling, cu_seqlens), dispatch.select(x, backend)
        y = autograd.FusedLinearFunction.apply(*leaves, *frozen, routing, owned, chosen)
    else:
        routing, chosen = (row_entry, scaling, weights, cu_seqlens), dispatch.select(x, backend)
        y, _ = autograd.fused_linear_forward(chosen, flat, *frozen, routing, u, save_u=False)
    return y.view(*x.shape[:-1], out_features)


def _check_mixture(y, x, A, B, start, rank, scaling, indices, weights, cu_seqlens, A_owned, B_owned, owned):
    device, x_shape = x.device, x.shape
    if len(x_shape) < 2 or x.dtype not in FLOATS:
        raise ValueError(f"x must be [..., in_features] in fp32, bf16 or fp16, got {list(x_shape)} {x.dtype}")
    total_rank, in_features = _matrix("A", A)[0], x_shape[-1]
    out_features = _matrix("B", B)[1]
    picks = _matrix("indices", indices)
    entries = (start.numel(),)
    _check("A", A, (total_rank, in_features), FLOATS, device)
    _check("B", B, (total_rank, out_features), (A.dtype,), device)
    _check("y", y, (*x_shape[:-1], out_features), (x.dtype,), device)
    _check("start", start, entries, INT32, device)
    _check("rank", rank, entries, INT32, device)
    _check("scaling", scaling, entries, FP32, device)
    _check("indices", indices, picks, INT32, device)
    _check("weights", weights, picks, FP32, device)
    _check_rows(x_shape[:-1].numel(), picks[0], cu_seqlens, device)
    _check_owned(A_owned, B_owned, owned, total_rank, in_features, out_features, device)


def _check_rows(num_tokens: int, num_rows: int, cu_seqlens: Tensor | None, device: torch.device) -> None:
    if cu_seqlens is not None:
        _check("cu_seqlens", cu_seqlens, (num_rows + 1,), INT32, device)
    elif num_tokens % max(num_rows, 1) or (num_tokens and not num_rows):
        raise ValueError(f"{num_tokens} tokens cannot be shared out equally among {num_rows} rows")


def _check_owned(A_owned, B_owned, owned, total_rank, in_features, out_features, device) -> None:
    if not 0 <= owned[0] <= owned[1] <= total_rank:
        raise ValueError(f"owned must be a range of the {total_rank} slab rows, got {owned}")
    if A_owned is not None:
        _check("A_owned", A_owned, (owned[1] - owned[0], in_features), FLOATS, device)
    if B_owned is not None:
        _check("B_owned", B_owned, (owned[1] - owned[0], out_features), FLOATS, device)
