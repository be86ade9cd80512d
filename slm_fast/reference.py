"""Every op of the engine in plain PyTorch: the specification, the fallback on any device, and the tests'
oracle.

Ragged pools: entries may have different ranks, so the factors of all entries are stacked along the rank.
`A: [total_rank, in_features]` and `B: [total_rank, out_features]` (B is kept rank-major: row j of an entry is
column j of PEFT's `lora_B`); entry `i` owns the rows `start[i] : start[i] + rank[i]` of both.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TOP_K = 64
WEIGHTINGS = ("similarity", "softmax", "uniform")
CODE_KEYS = 32  # keys whose codes lie together


def group_normalize(x: Tensor, num_groups: int) -> Tensor:
    """L2-normalise each of the `num_groups` equal slices of the last dimension: [..., D] -> [..., D]."""
    grouped = x.unflatten(-1, (num_groups, -1))
    return F.normalize(grouped, dim=-1, eps=1e-12).flatten(-2)


def transform_query(query: Tensor, num_groups: int | None = None, shift: Tensor | None = None) -> Tensor:
    """phi(q): `group_normalize(q, num_groups)`, q - shift, or q itself: [B, D] -> [B, D]; shift: [D]."""
    if num_groups is not None:
        return group_normalize(query, num_groups)
    return query if shift is None else query - shift


def mixture_weights(scores: Tensor, valid: Tensor, weighting: str, temperature: float) -> Tensor:
    """Weights of the picked entries, fp32, summing to 1 over the valid picks of a row (0 where there is
    none).

        similarity: w = max(s, 0) / sum(max(s, 0)); a sum below 1e-6 falls back to uniform
        softmax:    w = exp(s / temperature) / sum(exp(s / temperature))

    Args: scores: [B, K] fp32.  valid: [B, K] bool, False on picks that do not exist.
    """
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    uniform = valid.float() / count
    if weighting == "uniform":
        return uniform
    if weighting == "softmax":
        best = scores.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
        best = torch.where(best.isfinite(), best, torch.zeros_like(best))
        numerator = torch.exp((scores - best) / temperature).masked_fill(~valid, 0.0)
        return numerator / numerator.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    clamped = scores.clamp(min=0.0).masked_fill(~valid, 0.0)
    total = clamped.sum(-1, keepdim=True)
    return torch.where(total < 1e-6, uniform, clamped / total.clamp(min=1e-6))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the `top_k` keys with the highest score for every query, and their mixture weights.

        score[b, p] = <phi(query[b]), keys[p]> + bias[p],   phi: see `transform_query`

    Ties break by the lower index. Masked entries are never picked. Picks that do not exist (fewer than
    `top_k` allowed entries) have index 0, weight 0 and score -inf. A row whose best score is below
    `min_similarity` keeps its picks and gets all weights 0, so that it uses the frozen model.

    Args: query: [B, D] fp32.  keys: [P, D] fp32/bf16/fp16.  bias: [P] fp32.  mask: [P] or [B, P] bool, True =
    allowed.
    Returns indices [B, top_k] int32, weights [B, top_k] fp32, scores [B, top_k] fp32.  Source: SLM (ICLR
    2024), DTKR.
    """
    scores = transform_query(query.float(), num_groups, shift) @ keys.float().T
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    top, indices = scores.sort(dim=-1, descending=True, stable=True)
    top, indices = top[:, :top_k], indices[:, :top_k]
    missing = top_k - top.shape[1]
    if missing > 0:
        top = F.pad(top, (0, missing), value=-torch.inf)
        indices = F.pad(indices, (0, missing))
    valid = top > -torch.inf
    weights = mixture_weights(top, valid, weighting, temperature)
    if min_similarity is not None:
        weights = weights.masked_fill(top[:, :1] < min_similarity, 0.0)
    return indices.masked_fill(~valid, 0).int(), weights, top


@dataclass(frozen=True, eq=False)
class KeyCodes:
    """Keys [P, D] as 8-bit codes, and what bounds the error of a score that is computed with them.

        keys[p] ~ scale[p] * code[p],   scale[p] = max |keys[p]| / 127,   code[p] = round(keys[p] / scale[p])
        bounds: scale[p], at least |keys[p] - scale[p] code[p]|, at least |keys[p]| and |scale[p] code[p]|

    codes: [ceil(P / 32), S, 2, 32, 4] uint8 with S = ceil(D / 8): four dims of a key lie together, for which
    processors have one instruction, and the dims of all its eight rows are S apart,
    code[p][e] = codes[p // 32, e % S, e // S // 4, p % 32, e // S % 4] - 128.
    bounds: [ceil(P / 32), 3, 32] fp32. What belongs to no key, or to no dim, is 0.
    """

    num_keys: int
    dim: int
    codes: Tensor
    bounds: Tensor

    def __post_init__(self) -> None:
        blocks = (self.num_keys + CODE_KEYS - 1) // CODE_KEYS
        for name, dtype, shape in (
            ("codes", torch.uint8, (blocks, (self.dim + 7) // 8, 2, CODE_KEYS, 4)),
            ("bounds", torch.float32, (blocks, 3, CODE_KEYS)),
        ):
            x = getattr(self, name)
            if x.dtype != dtype or x.shape != shape or not x.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}"
                )
        if self.codes.device != self.bounds.device:
            raise ValueError(f"bounds must be on {self.codes.device}, got {self.bounds.device}")

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.bounds.nbytes

    @classmethod
    def zeros(cls, num_keys: int, dim: int, device: torch.device) -> "KeyCodes":
        blocks = (num_keys + CODE_KEYS - 1) // CODE_KEYS
        codes = torch.zeros(blocks, (dim + 7) // 8, 2, CODE_KEYS, 4, dtype=torch.uint8, device=device)
        return cls(num_keys, dim, codes, torch.zeros(blocks, 3, CODE_KEYS, device=device))


def key_codes(keys: Tensor, rows: Tensor, out: KeyCodes) -> None:
    """Write the codes and bounds of keys[rows] to `out`. A key whose norm is outside 2^-30..2^50 has codes of
    0 and infinite bounds.

    Args: keys: [P, D] fp32/bf16/fp16.  rows: [N] int64.
    """
    keys = keys[rows].float()
    size, norm = F.pad(keys, (0, 1)).abs().amax(1, keepdim=True), keys.double().norm(dim=1, keepdim=True)
    known = (norm >= 2.0**-30) & (norm <= 2.0**50)
    scale = torch.where(known, size / 127, 0.0)
    code = torch.where(known, (keys * (size.new_tensor(127.0) / size)).round().clamp(-127, 127), 0.0)
    decoded = scale.double() * code.double()
    error = (keys - decoded).norm(dim=1, keepdim=True)
    larger = norm.maximum(decoded.norm(dim=1, keepdim=True))
    limits = torch.cat([error, larger], 1) * (1 + 2.0**-20)  # which covers the roundings
    block, place = rows // CODE_KEYS, rows % CODE_KEYS
    e, steps = torch.arange(keys.shape[1], device=keys.device), max(1, out.codes.shape[1])
    row, step = e // steps, e % steps
    out.codes[block[:, None], step, row // 4, place[:, None], row % 4] = (code + 128).to(torch.uint8)
    out.bounds[block, :, place] = torch.cat([scale, torch.where(known, limits, torch.inf).float()], 1)


def segment_bounds(num_tokens: int, num_rows: int, cu_seqlens: Tensor | None) -> list[int]:
    """Token offsets of the rows, `num_rows + 1`; without `cu_seqlens` tokens are shared equally."""
    if cu_seqlens is not None:
        return cu_seqlens.tolist()
    per_row = num_tokens // max(num_rows, 1)
    return [per_row * b for b in range(num_rows + 1)]


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
    u: Tensor | None = None,
) -> Tensor:
    """Return `y` plus every row's retrieved low-rank update; differentiable in y, x, A, B, weights and u.

        out[t] = y[t] + sum_k weights[b, k] * scaling[i] * B[i]^T (A[i] x[t]),   i = indices[b, k], b = row of
        token t

    The weights multiply the rank-space vector in fp32. A row whose weights are all 0 keeps the bits of `y`.

    Args: y: [T, out_features].  x: [T, in_features].  A: [total_rank, in_features].  B: [total_rank,
    out_features].
    start, rank: [P] int32.  scaling: [P] fp32.  indices: [rows, K] int32.  weights: [rows, K] fp32.
    cu_seqlens: [rows + 1] int32, the tokens of row b are cu_seqlens[b] : cu_seqlens[b + 1]; None shares T
        equally.
    u: [T, K * max_rank], the products A x, column k * max_rank + j for row j of pick k; x is not read then.
    Source: SLM (ICLR 2024), JARe.
    """
    bounds = segment_bounds(x.shape[0], indices.shape[0], cu_seqlens)
    starts, ranks, picks = start.tolist(), rank.tolist(), indices.tolist()
    active, compute = (weights != 0).tolist(), torch.promote_types(x.dtype, torch.float32)
    out, done = [], 0
    for b, row_picks in enumerate(picks):
        segment = slice(bounds[b], bounds[b + 1])
        used = [(k, i) for k, i in enumerate(row_picks) if active[b][k]]
        if not used:
            continue
        rows = torch.cat([torch.arange(starts[i], starts[i] + ranks[i], device=A.device) for _, i in used])
        per_rank = torch.cat([(weights[b, k] * scaling[i]).expand(ranks[i]) for k, i in used])
        if u is None:
            products = x[segment].to(compute) @ A[rows].to(compute).T
        else:
            max_rank = u.shape[-1] // indices.shape[1]
            products = torch.cat([u[segment, k * max_rank :][:, : ranks[i]] for k, i in used], -1)
        update = products * per_rank @ B[rows].to(compute)
        out += [y[done : segment.start], (y[segment].to(compute) + update).to(y.dtype)]
        done = segment.stop
    return torch.cat([*out, y[done:]]) if out else y


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
    u: Tensor | None = None,
) -> Tensor:
    """A linear and the mixture of all entries of a small pool, the routing given as a dense matrix.

        y[t] = W x[t] + bias + sum_c weights[b, e] * scaling[e] * B[c] <A[c], x[t]>,  e = row_entry[c], b =
        row of token t

    Args: x: [T, in_features].  weight: [out_features, in_features].  bias: [out_features] or None.
    A: [total_rank, in_features], B: [total_rank, out_features].  row_entry: [total_rank] int32, the entry
    that owns a slab row, -1 for none.  scaling: [P] fp32.  weights: [rows, P] fp32.  u: [T, total_rank], A x.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x, weight, bias)
    owned = row_entry >= 0
    coefficient = (weights * scaling)[:, row_entry.clamp(min=0).long()] * owned if len(scaling) else 0.0
    products = x.to(compute) @ A.to(compute).T if u is None else u
    bounds = segment_bounds(x.shape[0], weights.shape[0], cu_seqlens)
    out, done = [], 0
    for b, active in enumerate((weights != 0).any(-1).tolist()):
        if active:
            segment = slice(bounds[b], bounds[b + 1])
            update = products[segment] * coefficient[b] @ B.to(compute)
            out += [y[done : segment.start], (y[segment].to(compute) + update).to(y.dtype)]
            done = segment.stop
    return torch.cat([*out, y[done:]]) if out else y


def stacked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    B: list[Tensor | int],
    routing: tuple,
    u: Tensor,
    max_rank: int | None = None,
) -> Tensor:
    """Linears that read the same input, their weights stacked, each with its own mixture.

        y_i[t] = W_i x[t] + bias_i + sum_c coefficient[b, c] * u_i[t, c] * B_i[c],   y = [y_1 | y_2 | ...]

    Args: B: of each linear its slab [total_rank, out_i], or out_i where it has no mixture.  u: [slabs, T,
    columns].  routing: as `fused_linear` takes it where max_rank is None, else as `mixture` does.
    """
    out, begin, us = [], 0, iter(u)
    for part in B:
        size = part if isinstance(part, int) else part.shape[1]
        rows = slice(begin, begin + size)
        begin += size
        own = None if bias is None else bias[rows]
        if isinstance(part, int):
            out.append(F.linear(x, weight[rows], own))
        elif max_rank is None:
            out.append(fused_linear(x, weight[rows], own, None, part, *routing, u=next(us)))
        else:
            out.append(mixture(F.linear(x, weight[rows], own), x, part, part, *routing, u=next(us)))
    return torch.cat(out, -1)


def key_learning_loss(
    query: Tensor, keys: Tensor, num_groups: int, top_k: int, keep: Tensor | None = None
) -> Tensor:
    """Minus the mean cosine between each query's group slices and its `top_k` nearest keys of that group.

        loss = -mean over b, g, and the top_k keys m of  cos(query[b, g], keys[m, g])

    Args: query: [B, D] fp32.  keys: [M, D] fp32.  keep: [M] bool, False hides a key for this step (random
    masking).
    Source: SLM (ICLR 2024), section 3.2.
    """
    q = F.normalize(query.unflatten(-1, (num_groups, -1)), dim=-1)
    k = F.normalize(keys.unflatten(-1, (num_groups, -1)), dim=-1)
    cosine = torch.einsum("bgd,mgd->bgm", q, k)
    if keep is not None:
        cosine = cosine[..., keep]
    return -cosine.topk(min(top_k, cosine.shape[-1]), dim=-1).values.mean()


def dense_offset(
    A: Tensor, B: Tensor, start: Tensor, rank: Tensor, scaling: Tensor, indices: Tensor, weights: Tensor
) -> Tensor:
    """The mixture of ONE row as a dense weight offset [out_features, in_features]: what merging would add.

    Args: indices, weights: [K].  Only for exports and tests; the engine never builds it.
    """
    offset = torch.zeros(B.shape[1], A.shape[1], dtype=torch.float32, device=A.device)
    for i, w in zip(indices.tolist(), weights.tolist(), strict=True):
        if w != 0:
            rows = slice(int(start[i]), int(start[i] + rank[i]))
            offset += w * float(scaling[i]) * B[rows].float().T @ A[rows].float()
    return offset


def mixture_backward(
    dy: Tensor,
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
    owned: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mixture` at `dy` for x, the slab rows owned[0]:owned[1] of A and B, and weights.

        dx = A[i]^T c g,  dA[i] = c g x^T,  dB[i] = c (A[i] x) dy^T,  dweights[b, k] = scaling[i] <A[i] x, g>
        with g = B[i] dy,  c = weights[b, k] * scaling[i];  dweights is 0 where the weight is 0

    Returns dx [T, in_features] in x's dtype, and dA, dB, dweights in fp32. With a given u, the first is du =
    c g [T, K * max_rank] fp32 instead, and dA is 0.
    """
    bounds = segment_bounds(x.shape[0], indices.shape[0], cu_seqlens)
    starts, ranks, picks = start.tolist(), rank.tolist(), indices.tolist()
    active = (weights != 0).tolist()
    dx = torch.zeros_like(x if u is None else u)
    dA = torch.zeros(owned[1] - owned[0], A.shape[1], dtype=torch.float32, device=A.device)
    dB = torch.zeros(owned[1] - owned[0], B.shape[1], dtype=torch.float32, device=B.device)
    dweights = torch.zeros_like(weights, dtype=torch.float32)
    for b, row_picks in enumerate(picks):
        segment = slice(bounds[b], bounds[b + 1])
        xs, dys = x[segment].float(), dy[segment].float()
        update = torch.zeros_like(xs)
        for k, i in enumerate(row_picks):
            if not active[b][k]:
                continue
            first, last = starts[i], starts[i] + ranks[i]
            a, c = A[first:last].float(), weights[b, k] * scaling[i]
            g = dys @ B[first:last].float().T
            if u is None:
                products = xs @ a.T
                update += (g * c) @ a
            else:
                column = k * (u.shape[1] // indices.shape[1])
                products = u[segment, column : column + ranks[i]]
                dx[segment, column : column + ranks[i]] = g * c
            dweights[b, k] = scaling[i] * (products * g).sum()
            lo, hi = max(first, owned[0]), min(last, owned[1])
            if lo < hi:
                mine = slice(lo - first, hi - first)
                dB[lo - owned[0] : hi - owned[0]] += (products[:, mine] * c).T @ dys
                if u is None:
                    dA[lo - owned[0] : hi - owned[0]] += (g[:, mine] * c).T @ xs
        if u is None:
            dx[segment] = update.to(x.dtype)
    return dx, dA, dB, dweights


def fused_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    row_entry: Tensor,
    scaling: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None = None,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `fused_linear` at `dy` for x, all of A and B, weights (0 where the weight is 0) and u.

        du = c g,  dx = dy W + du A,  dA = du^T x,  dB = (c u)^T dy,  dweights[b, e] = scaling[e] <u, g>
        with g = dy B^T,  c[t, j] = weights[b, row_entry[j]] * scaling[row_entry[j]]

    dx in x's dtype, the others in fp32. With a given u, dx is dy W and dA is 0.
    """
    num_rows, num_entries = weights.shape
    bounds = torch.tensor(segment_bounds(x.shape[0], num_rows, cu_seqlens), device=x.device)
    row = torch.repeat_interleave(torch.arange(num_rows, device=x.device), bounds.diff())
    entries = torch.arange(num_entries, dtype=row_entry.dtype, device=x.device)
    of_entry = (row_entry[:, None] == entries).float() * scaling  # [total_rank, P]
    c = (weights @ of_entry.T)[row]
    xs, dys, a = x.float(), dy.float(), A.float()
    products = xs @ a.T if u is None else u
    g = dys @ B.float().T
    du = c * g
    dx = dys @ weight.float()
    if u is None:
        dx += du @ a
    dA = du.T @ xs if u is None else torch.zeros_like(a)
    per_row = (
        torch.stack([part.sum(0) for part in (products * g).split(bounds.diff().tolist())]) if len(row) else 0
    )
    dweights = torch.where(weights == 0, 0.0, per_row @ of_entry if len(row) else weights.new_zeros(()))
    return dx.to(x.dtype), dA, (c * products).T @ dys, dweights, du


def picked_columns(num_tokens: int, routing: tuple, max_rank: int) -> Iterator[tuple[slice, slice, slice]]:
    """(tokens, rank columns, slab rows) of every pick that has a weight."""
    start, rank, _, indices, weights, cu_seqlens = routing
    bounds = segment_bounds(num_tokens, indices.shape[0], cu_seqlens)
    starts, ranks, active = start.tolist(), rank.tolist(), (weights != 0).tolist()
    for b, row_picks in enumerate(indices.tolist()):
        for k, i in enumerate(row_picks):
            if active[b][k]:
                columns = slice(k * max_rank, k * max_rank + ranks[i])
                yield slice(bounds[b], bounds[b + 1]), columns, slice(starts[i], starts[i] + ranks[i])


def rank_space(h: Tensor, A: Tensor, routing: tuple | None, max_rank: int) -> Tensor:
    """u[t, c] = <A[slab row of c], h[t]>: [T, C] fp32 (fp64 of fp64), unweighted; differentiable in h and A.

    Column c is slab row c if `routing` is None, else c = pick * max_rank + offset is row start[i] + offset, i
    = indices[b, pick]. Columns beyond an entry's rank or of a pick without weight, and tokens outside all
    rows, are 0.
    """
    dtype = torch.promote_types(h.dtype, torch.float32)
    h = h.to(dtype)
    if routing is None:
        return h @ A.to(dtype).T
    u = h.new_zeros(h.shape[0], routing[3].shape[1] * max_rank)
    for tokens, columns, rows in picked_columns(h.shape[0], routing, max_rank):
        u[tokens, columns] = h[tokens] @ A[rows].to(dtype).T
    return u


def rank_space_backward(
    du: Tensor, h: Tensor, A: Tensor, routing: tuple | None, max_rank: int, owned: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Gradients of `rank_space` at `du` for h and the slab rows owned[0]:owned[1] of A, in fp32 (fp64 of
    fp64).

        dh = du A,  dA = du^T h;  du is not read where u is 0 whatever h is
    """
    dtype = torch.promote_types(h.dtype, torch.float32)
    du, h = du.to(dtype), h.to(dtype)
    begin, end = owned
    if routing is None:
        return du @ A.to(dtype), du[:, begin:end].T @ h
    dh, dA = torch.zeros_like(h), h.new_zeros(end - begin, h.shape[1])
    for tokens, columns, rows in picked_columns(h.shape[0], routing, max_rank):
        g = du[tokens, columns]
        dh[tokens] += g @ A[rows].to(dtype)
        lo, hi = max(rows.start, begin), min(rows.stop, end)
        if lo < hi:
            dA[lo - begin : hi - begin] += g[:, lo - rows.start : hi - rows.start].T @ h[tokens]
    return dh, dA


def normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x rstd [T, in], rstd [T, 1]) with rstd = rsqrt(mean(x^2) + eps), in fp32 (fp64 of fp64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * rstd, rstd


def norm_shrink(
    x: Tensor, weight: Tensor, eps: float, A: list[Tensor], routing: tuple | None, *, max_rank: int
) -> tuple[Tensor, Tensor]:
    """RMSNorm, and the rank-space vectors of the linears that read it: (h [T, in], u [linears, T, C]).

        h[t] = weight * (x[t] * rsqrt(mean(x[t]^2) + eps)).to(x.dtype);  u[l] = rank_space(h, A[l])

    Args: x: [T, in].  weight: [in].  A: slabs [total_rank, in].  routing: (start, rank, scaling, indices,
    weights, cu_seqlens) as in `mixture`, None if the columns are the slab rows.
    """
    h = weight * normalized(x, eps)[0].to(x.dtype)
    return h, torch.stack([rank_space(h, slab, routing, max_rank) for slab in A])


def norm_shrink_backward(
    dh: Tensor,
    du: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    A: list[Tensor],
    routing: tuple | None,
    *,
    max_rank: int,
    owned: tuple[int, int] = (0, 0),
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `norm_shrink` at dh [T, in] and du [linears, T, C] for x and the owned rows of each slab.

        dx = rstd * (g - xhat * mean(g * xhat)),  dA[l] = du[l]^T h
        with xhat = x * rstd,  g = weight * (dh + sum_l du[l] A[l])

    Returns dx in x's dtype, and the dA in fp32 (fp64 of fp64).
    """
    xhat, rstd = normalized(x, eps)
    h = weight * xhat.to(x.dtype)
    g, dA = dh.to(xhat.dtype), []
    for slab_du, slab in zip(du, A, strict=True):
        through_u, slab_dA = rank_space_backward(slab_du, h, slab, routing, max_rank, owned)
        g = g + through_u
        dA.append(slab_dA)
    g = weight.to(g.dtype) * g
    dx = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    return dx.to(x.dtype), dA


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads * head_size] rotated: x * cos + [-x2 | x1] * sin, in fp32 and rounded once.

    cos, sin: [angles, head_size]; token t has angle t % angles.
    """
    angles, head = cos.shape
    heads = x.float().view(x.shape[0] // angles, angles, x.shape[1] // head, head)
    half = torch.cat((-heads[..., head // 2 :], heads[..., : head // 2]), -1)
    return (heads * cos[:, None].float() + half * sin[:, None].float()).to(x.dtype).view(x.shape)


def silu_mul_shrink(
    gate: Tensor, up: Tensor, A: Tensor, routing: tuple | None, *, max_rank: int
) -> tuple[Tensor, Tensor]:
    """silu(gate) * up, and the rank-space vector of the linear that reads it: (h [T, in], u [T, C]).

    Args: gate, up: [T, in].  A: [total_rank, in].  routing: as in `norm_shrink`.
    """
    h = F.silu(gate) * up
    return h, rank_space(h, A, routing, max_rank)


def silu_mul_shrink_backward(
    dh: Tensor,
    du: Tensor,
    gate: Tensor,
    up: Tensor,
    A: Tensor,
    routing: tuple | None,
    *,
    max_rank: int,
    owned: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `silu_mul_shrink` at dh [T, in] and du [T, C] for gate, up and the owned slab rows.

        dgate = g * up * sigma * (1 + gate * (1 - sigma)),  dup = g * silu(gate),  dA = du^T h
        with sigma = sigmoid(gate),  g = dh + du A

    Returns dgate and dup in their dtype, and dA in fp32 (fp64 of fp64).
    """
    active = F.silu(gate)
    through_u, dA = rank_space_backward(du, active * up, A, routing, max_rank, owned)
    g, wide = dh.to(through_u.dtype) + through_u, gate.to(through_u.dtype)
    sigma = torch.sigmoid(wide)
    dgate = g * up * sigma * (1 + wide * (1 - sigma))
    return dgate.to(gate.dtype), (g * active).to(up.dtype), dA
