"""The public ops: arguments are checked here, once; `dispatch` picks the backend; `reference` specifies."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_fast import autograd, compiled, dispatch, reference  # noqa: F401 (compiled registers custom ops)
from slm_fast.reference import MAX_TOP_K, KeyCodes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_SLABS = 4  # linears behind one norm
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
    codes: KeyCodes | None = None,
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
    shift: [D] fp32.  codes: `key_codes(keys)`, with which the cpu backend reads a quarter of the bytes of
    fp32 keys and finds the same, bit for bit; the others do not look at them. Codes of other keys, or of keys
    that have changed since, give wrong picks.
    Returns indices [B, top_k] int32, weights [B, top_k] fp32, scores [B, top_k] fp32.
    Raises ValueError on wrong shapes, dtypes or devices, NaN or infinite queries, top_k outside 1..64,
    temperature <= 0, and num_groups together with shift. The gpu backend does not wait for the device to look
    at the queries: a row that is not finite gets index 0 and NaN weights and scores.
    Source: SLM (ICLR 2024), DTKR.
    """
    if num_groups is None and backend is None and dispatch.search_tensors is not None:
        found = dispatch.search_tensors(
            query, keys, bias, mask, shift, codes, top_k, weighting, temperature, min_similarity
        )
        if found is not None:  # what it refuses is refused, or searched, below
            return found
    device = query.device
    num_queries, dim = _matrix("query", query)
    num_keys, _ = _matrix("keys", keys)
    if query.dtype != torch.float32:
        raise ValueError(f"query must be float32, got {query.dtype}")
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
    if codes is not None:
        _check_codes(codes, num_keys, dim, device)
    chosen = dispatch.select(query, backend)
    if chosen != "reference":
        keys = keys.contiguous()
        bias = None if bias is None else bias.contiguous()
        mask = None if mask is None else mask.contiguous()
        options = (top_k, weighting, temperature, min_similarity)
        if chosen == "gpu":
            query, shift = query.detach().contiguous(), None if shift is None else shift.contiguous()
            return dispatch.key_search_gpu(query, keys, bias, mask, *options, num_groups, shift)
        if num_groups is not None or shift is not None:
            query = reference.transform_query(query.detach(), num_groups, shift)
        return dispatch.key_search_cpu(query.contiguous(), keys, bias, mask, *options, codes)
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


def _check_codes(codes: KeyCodes, num_keys: int, dim: int, device: torch.device) -> None:
    if codes.num_keys != num_keys or codes.dim != dim:
        wanted, got = [num_keys, dim], [codes.num_keys, codes.dim]
        raise ValueError(f"codes must be those of keys of shape {wanted}, got those of {got}")
    if codes.device != device:
        raise ValueError(f"codes must be on {device}, got {codes.device}")


def key_codes(
    keys: Tensor,
    *,
    out: KeyCodes | None = None,
    rows: list[int] | None = None,
    backend: str | None = None,
) -> KeyCodes:
    """Quantise `keys` for `key_search`: D (rounded up to eights) + 12 bytes a key.

    With the codes c and scale s of a key k, and a query q as 8-bit integers d with a scale t, a search
    computes <d, c> in integers and knows

        |<q, k> - t s <d, c>| <= |q| |k - s c| + |q - t d| max(|k|, |s c|)

    plus what rounding may add to the fp32 score of its own. Keys whose bound lies below the `top_k`-th best
    lower bound are no picks; the others are scored as without codes. The margin is about 2% of |q| |k| (1.5
    where the processor has AVX-512-VNNI), so that few keys are left among many unlike ones.

    Args: keys: [P, D] fp32/bf16/fp16.  out: codes of the same number of keys, written in place and returned.
    rows: the keys whose codes in `out` are to be written; None: all.
    Returns `KeyCodes`, which has the layout.
    Raises ValueError on wrong shapes, dtypes or devices, rows outside the keys, and rows without out.
    """
    num_keys, dim = _matrix("keys", keys)
    _check("keys", keys, (num_keys, dim), FLOATS, keys.device)
    if out is not None:
        _check_codes(out, num_keys, dim, keys.device)
    elif rows is not None:
        raise ValueError("rows need out")
    if rows and not 0 <= min(rows) <= max(rows) < num_keys:
        raise ValueError(f"rows must be in 0..{num_keys - 1}, got {min(rows)}..{max(rows)}")
    out = KeyCodes.zeros(num_keys, dim, keys.device) if out is None else out
    which = None if rows is None else torch.tensor(rows, dtype=torch.int64, device=keys.device)
    if dispatch.select(keys, backend) == "cpu":
        dispatch.key_codes_cpu(keys.detach().contiguous(), which, out)
    else:
        which = torch.arange(num_keys, device=keys.device) if which is None else which
        reference.key_codes(keys.detach(), which, out)
    return out


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

    A row whose weights are all 0 keeps the bits of `y`. x and y share no memory, or are the same tensor.
    Gradients flow to y, x, weights (0 for a weight that is 0) and to `A_owned`, `B_owned`: the parameters
    that are views of the rows owned[0]:owned[1] of A and B.

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
    plain = u is None and A_owned is None and B_owned is None and owned == (0, 0)
    if plain and _at_once(backend, y, x, weights):
        routing = (start, rank, scaling, indices, weights, cu_seqlens)
        if dispatch.mixture_tensors(y, x, A, B, *routing):
            return y  # what it does not take is refused, or added, below
    _check_mixture(y, x, A, B, start, rank, scaling, indices, weights, cu_seqlens, A_owned, B_owned, owned)
    max_rank = _largest(rank, max_rank)
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


def _largest(rank: Tensor, max_rank: int | None) -> int:
    if max_rank is None:
        max_rank = int(rank.max()) if rank.numel() else 0
    return max_rank


def _at_once(backend: str | None, *leaves: Tensor) -> bool:
    """Whether `dispatch.mixture_tensors` may be asked: no gradients, and no other backend than the CPU's."""
    return (
        dispatch.mixture_tensors is not None
        and backend in (None, "auto", "cpu")
        and not torch.compiler.is_compiling()
        and not _needs_grad(*leaves)
    )


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
    residual: Tensor | None = None,
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
    u, and to x through the linear alone.  residual: like y, added to it, before it is rounded where no
    gradients are wanted.
    Raises ValueError on mismatched shapes, dtypes or devices, and if gradients of the linear are wanted.
    Source: SLM (ICLR 2024), JARe.
    """
    num_entries = scaling.numel()
    total_rank, in_features = _matrix("A", A)[0], x.shape[-1]
    out_features = _check_linear(x, weight, bias)
    num_rows, num_tokens, device = _matrix("weights", weights)[0], x.shape[:-1].numel(), x.device
    _check("A", A, (total_rank, in_features), FLOATS, device)
    _check("B", B, (total_rank, out_features), (A.dtype,), device)
    _check("row_entry", row_entry, (total_rank,), INT32, device)
    _check("scaling", scaling, (num_entries,), FP32, device)
    _check("weights", weights, (num_rows, num_entries), FP32, device)
    _check_rows(num_tokens, num_rows, cu_seqlens, device)
    _check_owned(A_owned, B_owned, owned, total_rank, in_features, out_features, device)
    if u is not None:
        _check("u", u, (u.shape[0], num_tokens, total_rank), FP32, device)
    residual = _flat_residual(residual, x, out_features)
    flat = x.reshape(num_tokens, in_features)
    grad = _needs_grad(x, weights, A_owned, B_owned, u, residual)
    leaves, frozen = (flat, weights, A_owned, B_owned, u), (weight, bias, A, B)
    if torch.compiler.is_compiling():
        y, _ = torch.ops.slm_fast.fused_linear(
            *leaves, *frozen, [row_entry, scaling], cu_seqlens, None, *owned, backend or "", grad
        )
    elif grad:
        routing, chosen = (row_entry, scaling, cu_seqlens), dispatch.select(x, backend)
        y = autograd.FusedLinearFunction.apply(*leaves, *frozen, routing, None, owned, chosen)
    else:
        routing, chosen = (row_entry, scaling, weights, cu_seqlens), dispatch.select(x, backend)
        y, _ = autograd.fused_linear_forward(chosen, flat, *frozen, routing, u, False, residual=residual)
        residual = None
    return (y if residual is None else y + residual).view(*x.shape[:-1], out_features)


def _flat_residual(residual: Tensor | None, x: Tensor, out_features: int) -> Tensor | None:
    if residual is None:
        return None
    _check("residual", residual, (*x.shape[:-1], out_features), (x.dtype,), x.device)
    return residual.reshape(-1, out_features)


def segment_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    residual: Tensor | None = None,
    max_rank: int | None = None,
    A_owned: Tensor | None = None,
    B_owned: Tensor | None = None,
    owned: tuple[int, int] = (0, 0),
    backend: str | None = None,
) -> Tensor:
    """A frozen linear and the mixture of a pool of any size.

        y[t] = W x[t] + bias + sum_k weights[b, k] * scaling[i] * B[i]^T (A[i] x[t]),   i = indices[b, k]

    On a GPU one kernel computes both. A tile of tokens expands the entries of its own rows alone: of one row
    after the other where rows are long (prefill, training), of all tokens at once where they are short
    (decoding). Elsewhere the linear and `mixture` run in turn. A row whose weights are all 0 gets exactly
    what the linear alone computes in the same kernel. Gradients flow as in `mixture`, never to the linear.

    Args: x: [..., in_features].  weight: [out_features, in_features], bias: [out_features] or None, of x's
    dtype, fp32/bf16/fp16.  residual: as in `fused_linear`.  The others: as in `mixture`; with u given, x gets
    its gradient through the linear alone.
    Raises ValueError as `mixture` does, and if gradients of the linear are wanted.
    Source: SLM (ICLR 2024), JARe.
    """
    out_features = _check_linear(x, weight, bias)
    residual = _flat_residual(residual, x, out_features)
    if (chosen := dispatch.select(x, backend)) != "gpu":
        y, pool = F.linear(x, weight, bias), (A, B, start, rank, scaling)
        y = y if residual is None else y + residual.view(y.shape)
        owns = {"A_owned": A_owned, "B_owned": B_owned, "owned": owned}
        routing = (indices, weights, cu_seqlens)
        return mixture(y, x, *pool, *routing, u=u, max_rank=max_rank, **owns, backend=backend)
    num_tokens, in_features, device = x.shape[:-1].numel(), x.shape[-1], x.device
    total_rank = _matrix("A", A)[0]
    _check("A", A, (total_rank, in_features), FLOATS, device)
    _check("B", B, (total_rank, out_features), (A.dtype,), device)
    _check_routing(num_tokens, start, rank, scaling, indices, weights, cu_seqlens, device)
    _check_owned(A_owned, B_owned, owned, total_rank, in_features, out_features, device)
    max_rank = _largest(rank, max_rank)
    if u is not None:
        _check("u", u, (u.shape[0], num_tokens, indices.shape[1] * max_rank), FP32, device)
    flat = x.reshape(num_tokens, in_features)
    leaves, frozen = (flat, weights, A_owned, B_owned, u), (weight, bias, A, B)
    grad = _needs_grad(x, weights, A_owned, B_owned, u, residual)
    if torch.compiler.is_compiling():
        entries = [start, rank, scaling, indices]
        y, _ = torch.ops.slm_fast.fused_linear(
            *leaves, *frozen, entries, cu_seqlens, max_rank, *owned, backend or "", grad
        )
    elif grad:
        routing = (start, rank, scaling, indices, cu_seqlens)
        y = autograd.FusedLinearFunction.apply(*leaves, *frozen, routing, max_rank, owned, chosen)
    else:
        routing = (start, rank, scaling, indices, weights, cu_seqlens)
        y, _ = autograd.fused_linear_forward(chosen, flat, *frozen, routing, u, False, max_rank, residual)
        residual = None
    return (y if residual is None else y + residual).view(*x.shape[:-1], out_features)


def stacked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    B: Sequence[Tensor | int],
    routing: tuple,
    u: Tensor,
    *,
    max_rank: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linears that read the same input (q, k, v or gate, up) as one product of their stacked weights, each
    with its own mixture, whose rank-space vectors came with the input.

        y_i[t] = W_i x[t] + bias_i + sum_c coefficient[b, c] * u_i[t, c] * B_i[c],   y = [y_1 | y_2 | ...]

    coefficient is weight * scaling of the entry that owns column c, as in `fused_linear` and `mixture`. A
    linear without a mixture, and a row whose weights are all 0, get exactly what the same kernel gives the
    frozen linears. Inference only.

    Args: x: [..., in_features], weight: [sum of out_i, in_features] whose rows may lie apart, bias: [sum of
    out_i] or None: one dtype, fp32/bf16/fp16.  B: 1 to 4 in the order of the weights, a slab [total_rank,
    out_i] each, or the number out_i for a linear without a mixture; one slab at least, all of one dtype.
    routing: (row_entry, scaling, weights, cu_seqlens) as in `fused_linear` where max_rank is None, else
    (start, rank, scaling, indices, weights, cu_seqlens) as in `mixture`.
    u: [slabs, splits, T, columns] fp32, as `norm_shrink` makes it with x.
    Returns [..., sum of out_i].
    Raises ValueError on mismatched shapes, dtypes or devices, if gradients are wanted, and on indices outside
    the pool as `mixture` does.
    Source: SLM (ICLR 2024), JARe.
    """
    out_features, num_tokens, device = _check_linear(x, weight, bias), x.shape[:-1].numel(), x.device
    B = list(B)
    slabs = [part for part in B if not isinstance(part, int)]
    if not 1 <= len(B) <= MAX_SLABS or not slabs:
        raise ValueError(f"B must have 1 to {MAX_SLABS} members, a slab at least, got {len(B)}")
    total_rank = _matrix("B", slabs[0])[0]
    for slab in slabs:
        _check("B", slab, (total_rank, _matrix("B", slab)[1]), FLOATS, device)
        _check("B", slab, tuple(slab.shape), (slabs[0].dtype,), device)
    sizes = [part if isinstance(part, int) else part.shape[1] for part in B]
    if sum(sizes) != out_features:
        raise ValueError(f"weight has {out_features} rows, the linears have {' + '.join(map(str, sizes))}")
    if max_rank is None:
        row_entry, scaling, weights, cu_seqlens = routing
        _check("row_entry", row_entry, (total_rank,), INT32, device)
        _check("scaling", scaling, (scaling.numel(),), FP32, device)
        _check("weights", weights, (_matrix("weights", weights)[0], scaling.numel()), FP32, device)
        _check_rows(num_tokens, weights.shape[0], cu_seqlens, device)
        columns = total_rank
    else:
        _check_routing(num_tokens, *routing, device)
        columns = routing[3].shape[1] * max_rank
    _check("u", u, (len(slabs), u.shape[1] if u.dim() == 4 else 1, num_tokens, columns), FP32, device)
    if _needs_grad(x, u, *slabs, *routing):
        raise ValueError("stacked_linear has no gradient: call it under no_grad")
    flat = x.reshape(num_tokens, x.shape[-1])
    if torch.compiler.is_compiling():
        slots = [0 if isinstance(part, int) else 1 for part in B]
        *entries, cu_seqlens = routing
        y = torch.ops.slm_fast.stacked_linear(
            flat, weight, bias, slabs, sizes, slots, entries, cu_seqlens, u, max_rank, backend or ""
        )
    else:
        chosen = dispatch.select(x, backend)
        y = autograd.stacked_linear_forward(chosen, flat, weight, bias, B, routing, u, max_rank)
    return y.view(*x.shape[:-1], out_features)


def norm_shrink(
    x: Tensor,
    weight: Tensor,
    eps: float,
    A: Sequence[Tensor],
    routing: tuple | None = None,
    *,
    max_rank: int | None = None,
    A_owned: Sequence[Tensor] | None = None,
    owned: tuple[int, int] = (0, 0),
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm, and the rank-space vectors of the linears that read it, so that they need no shrink.

        h[t] = weight * (x[t] * rsqrt(mean(x[t]^2) + eps)).to(x.dtype)
        u[l, 0, t, c] + u[l, 1, t, c] + ... = <A[l][slab row of c], h[t]>

    Column c is slab row c where `routing` is None, for `fused_linear(h, ..., u=u[l])`; else c = k * max_rank
    + j is row j of pick k, for `mixture(y, h, ..., u=u[l])`. Columns beyond an entry's rank and of picks
    without weight are 0; tokens of no row have an h, and a u that nobody may read. Gradients flow from h and
    u to x and to `A_owned`: the parameters that are views of the rows owned[0]:owned[1] of each slab. With
    gradients, or where no GPU kernel runs, there is one split. The norm is frozen.

    Args: x: [..., in_features], weight: [in_features], one dtype, fp32/bf16/fp16.
    A: 1 to 4 slabs [total_rank, in_features], one dtype, any of the three.
    routing: the tuple (start, rank, scaling, indices, weights, cu_seqlens), each as in `mixture`.
    max_rank: as in `mixture`.  A_owned: [owned[1] - owned[0], in_features], one for each slab.
    Returns h like x, and u [linears, splits, T, columns] fp32.
    Raises ValueError on mismatched shapes, dtypes or devices, on another number of slabs, on indices outside
    the pool (on a GPU their columns are 0), and if gradients of the norm are wanted.
    Source: SLM (ICLR 2024), JARe.
    """
    in_features, num_tokens = x.shape[-1], x.shape[:-1].numel()
    _check("x", x, tuple(x.shape), FLOATS, x.device)
    _check("weight", weight, (in_features,), (x.dtype,), x.device)
    if not 1 <= len(A) <= MAX_SLABS:
        raise ValueError(f"A must be 1 to {MAX_SLABS} slabs, got {len(A)}")
    if A_owned is not None and len(A_owned) != len(A):
        raise ValueError(f"A_owned must have a parameter for each of the {len(A)} slabs, got {len(A_owned)}")
    A, A_owned = list(A), list(A_owned or ())
    max_rank = _check_shrink(x, A, routing, max_rank, A_owned, owned)
    if _needs_grad(weight):
        raise ValueError("the norm is frozen here: call requires_grad_(False) on weight")
    flat, chosen = x.reshape(num_tokens, in_features), dispatch.select(x, backend)
    grad = _needs_grad(x, *A_owned)
    if torch.compiler.is_compiling():
        *entries, cu_seqlens = routing or (None,)
        columns = dispatch.num_columns(A[0], routing, max_rank)
        splits = 1 if grad else dispatch.shrink_splits("norm_shrink", chosen, flat, columns)
        h, u = torch.ops.slm_fast.norm_shrink(
            flat, A_owned, weight, eps, A, entries, cu_seqlens, max_rank, *owned, splits, chosen
        )
    elif grad:
        h, u = autograd.NormShrinkFunction.apply(
            flat, weight, eps, A, routing, max_rank, owned, chosen, *A_owned
        )
    else:
        h, u = autograd.norm_shrink_forward(chosen, flat, weight, eps, A, routing, max_rank)
    return h.view(x.shape), u


def silu_mul_shrink(
    gate: Tensor,
    up: Tensor,
    A: Tensor,
    routing: tuple | None = None,
    *,
    max_rank: int | None = None,
    A_owned: Tensor | None = None,
    owned: tuple[int, int] = (0, 0),
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """silu(gate) * up, and the rank-space vector of the linear that reads it, so that it needs no shrink.

        h[t] = silu(gate[t]) * up[t]
        u[0, t, c] + u[1, t, c] + ... = <A[slab row of c], h[t]>

    The columns of u, its splits and the gradients, here to gate, up and `A_owned`, are as in `norm_shrink`.

    Args: gate, up: [..., in_features], one dtype, fp32/bf16/fp16.  A: [total_rank, in_features], any of the
    three.  routing, max_rank: as in `norm_shrink`.  A_owned: [owned[1] - owned[0], in_features].
    Returns h like gate, and u [splits, T, columns] fp32.
    Raises ValueError on mismatched shapes, dtypes or devices, and on indices outside the pool (on a GPU their
    columns are 0).
    Source: SLM (ICLR 2024), JARe.
    """
    in_features, num_tokens = gate.shape[-1], gate.shape[:-1].numel()
    _check("gate", gate, tuple(gate.shape), FLOATS, gate.device)
    _check("up", up, tuple(gate.shape), (gate.dtype,), gate.device)
    max_rank = _check_shrink(gate, [A], routing, max_rank, [A_owned], owned)
    flat = (gate.reshape(num_tokens, in_features), up.reshape(num_tokens, in_features))
    grad, chosen = _needs_grad(gate, up, A_owned), dispatch.select(gate, backend)
    if torch.compiler.is_compiling():
        *entries, cu_seqlens = routing or (None,)
        columns = dispatch.num_columns(A, routing, max_rank)
        splits = 1 if grad else dispatch.shrink_splits("silu_mul_shrink", chosen, flat[0], columns)
        h, u = torch.ops.slm_fast.silu_mul_shrink(
            *flat, A_owned, A, entries, cu_seqlens, max_rank, *owned, splits, chosen
        )
    elif grad:
        h, u = autograd.SiluMulShrinkFunction.apply(*flat, A_owned, A, routing, max_rank, owned, chosen)
    else:
        h, u = autograd.silu_mul_shrink_forward(chosen, *flat, A, routing, max_rank)
    return h.view(gate.shape), u


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> None:
    """Rotary position embedding of queries and keys, in place.

        x[t, h] = x[t, h] * cos[a] + [-x2 | x1] * sin[a],   a = t % angles, x = [x1 | x2] a head's halves

    Inference only.

    Args: q: [T, query heads * head_size], k: [T, key heads * head_size], one dtype, fp32/bf16/fp16; rows may
    lie apart, as parts of a stacked product do.  cos, sin: [rows or 1, tokens, head_size] of their dtype.
    Raises ValueError on mismatched shapes, dtypes or devices, and if gradients are wanted.
    Source: RoFormer (Su et al., 2021), in the order of features that transformers uses.
    """
    num_tokens, device, head = _matrix("q", q)[0], q.device, cos.shape[-1]
    _check("q", q, (num_tokens, q.shape[1]), FLOATS, device)
    _check("k", k, (num_tokens, _matrix("k", k)[1]), (q.dtype,), device)
    _check("cos", cos, (*cos.shape[:-1], head), (q.dtype,), device)
    _check("sin", sin, tuple(cos.shape), (q.dtype,), device)
    angles = cos.shape[:-1].numel()
    if head % 2 or q.shape[1] % head or k.shape[1] % head or num_tokens % max(angles, 1):
        raise ValueError(
            f"cos must be [rows or 1, tokens, head_size], got {list(cos.shape)} for q {list(q.shape)} and k "
            f"{list(k.shape)}"
        )
    if q.stride(1) != 1 or k.stride(1) != 1:
        raise ValueError(f"rows of q and k must be contiguous, got strides {q.stride()}, {k.stride()}")
    if _needs_grad(q, k, cos, sin):
        raise ValueError("rotary_ works in place and has no gradient: call it under no_grad")
    cos, sin = cos.reshape(angles, head), sin.reshape(angles, head)
    if not torch.compiler.is_compiling() and dispatch.select(q, backend) == "gpu":
        return dispatch.rotary_gpu(q, k, cos.contiguous(), sin.contiguous())
    for x in (q, k):
        x.copy_(reference.rotary(x, cos, sin))


def _check_shrink(x, A, routing, max_rank, A_owned, owned) -> int:
    """Check slabs, their owned rows and the routing that makes their columns; returns the largest rank."""
    total_rank, in_features, device = _matrix("A", A[0])[0], x.shape[-1], x.device
    for i, slab in enumerate(A):
        _check("A", slab, (total_rank, in_features), (A[0].dtype,) if i else FLOATS, device)
    for parameter in A_owned or (None,):
        _check_owned(parameter, None, owned, total_rank, in_features, 0, device)
    if routing is None:
        return 1
    _check_routing(x.shape[:-1].numel(), *routing, device)
    return _largest(routing[1], max_rank)


def _check_mixture(y, x, A, B, start, rank, scaling, indices, weights, cu_seqlens, A_owned, B_owned, owned):
    device, x_shape = x.device, x.shape
    if len(x_shape) < 2 or x.dtype not in FLOATS:
        raise ValueError(f"x must be [..., in_features] in fp32, bf16 or fp16, got {list(x_shape)} {x.dtype}")
    total_rank, in_features = _matrix("A", A)[0], x_shape[-1]
    out_features = _matrix("B", B)[1]
    _check("A", A, (total_rank, in_features), FLOATS, device)
    _check("B", B, (total_rank, out_features), (A.dtype,), device)
    _check("y", y, (*x_shape[:-1], out_features), (x.dtype,), device)
    _check_routing(x_shape[:-1].numel(), start, rank, scaling, indices, weights, cu_seqlens, device)
    _check_owned(A_owned, B_owned, owned, total_rank, in_features, out_features, device)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """out_features of a frozen linear that reads x."""
    out_features = _matrix("weight", weight)[0]
    _check("x", x, tuple(x.shape), FLOATS, x.device)
    _check("weight", weight, (out_features, x.shape[-1]), (x.dtype,), x.device)
    if bias is not None:
        _check("bias", bias, (out_features,), (x.dtype,), x.device)
    if _needs_grad(weight, bias):
        raise ValueError("the linear is frozen here: call requires_grad_(False) on weight and bias")
    return out_features


def _check_routing(num_tokens, start, rank, scaling, indices, weights, cu_seqlens, device) -> None:
    entries, picks = (start.numel(),), _matrix("indices", indices)
    _check("start", start, entries, INT32, device)
    _check("rank", rank, entries, INT32, device)
    _check("scaling", scaling, entries, FP32, device)
    _check("indices", indices, picks, INT32, device)
    _check("weights", weights, picks, FP32, device)
    _check_rows(num_tokens, picks[0], cu_seqlens, device)


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
