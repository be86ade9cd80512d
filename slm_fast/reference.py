"""Every op of the engine in plain PyTorch: the specification, the fallback on any device, and the tests'
oracle.

Ragged pools: entries may have different ranks, so the factors of all entries are stacked along the rank.
`A: [total_rank, in_features]` and `B: [total_rank, out_features]` (B is kept rank-major: row j of an entry is
column j of PEFT's `lora_B`); entry `i` owns the rows `start[i] : start[i] + rank[i]` of both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TOP_K = 64
WEIGHTINGS = ("similarity", "softmax", "uniform")


def group_normalize(x: Tensor, num_groups: int) -> Tensor:
    """L2-normalise each of the `num_groups` equal slices of the last dimension: [..., D] -> [..., D]."""
    grouped = x.unflatten(-1, (num_groups, -1))
    return F.normalize(grouped, dim=-1, eps=1e-12).flatten(-2)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the `top_k` keys with the highest score for every query, and their mixture weights.

        score[b, p] = <query[b], keys[p]> + bias[p]

    Ties break by the lower index. Masked entries are never picked. Picks that do not exist (fewer than
    `top_k` allowed entries) have index 0, weight 0 and score -inf. A row whose best score is below
    `min_similarity` keeps its picks and gets all weights 0, so that it uses the frozen model.

    Args: query: [B, D] fp32.  keys: [P, D] fp32/bf16/fp16.  bias: [P] fp32.  mask: [P] or [B, P] bool, True =
    allowed.
    Returns indices [B, top_k] int32, weights [B, top_k] fp32, scores [B, top_k] fp32.  Source: SLM (ICLR
    2024), DTKR.
    """
    scores = query.float() @ keys.float().T
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
) -> Tensor:
    """Return `y` plus every row's retrieved low-rank update; differentiable in y, x, A, B and weights.

        out[t] = y[t] + sum_k weights[b, k] * scaling[i] * B[i]^T (A[i] x[t]),   i = indices[b, k], b = row of
        token t

    The weights multiply the rank-space vector in fp32. A row whose weights are all 0 keeps the bits of `y`.

    Args: y: [T, out_features].  x: [T, in_features].  A: [total_rank, in_features].  B: [total_rank,
    out_features].
    start, rank: [P] int32.  scaling: [P] fp32.  indices: [rows, K] int32.  weights: [rows, K] fp32.
    cu_seqlens: [rows + 1] int32, the tokens of row b are cu_seqlens[b] : cu_seqlens[b + 1]; None shares T
        equally.
    Source: SLM (ICLR 2024), JARe.
    """
    bounds = segment_bounds(x.shape[0], indices.shape[0], cu_seqlens)
    starts, ranks, picks = start.tolist(), rank.tolist(), indices.tolist()
    active = (weights != 0).tolist()
    out = []
    for b, row_picks in enumerate(picks):
        segment = slice(bounds[b], bounds[b + 1])
        used = [(k, i) for k, i in enumerate(row_picks) if active[b][k]]
        if not used:
            out.append(y[segment])
            continue
        rows = torch.cat([torch.arange(starts[i], starts[i] + ranks[i], device=A.device) for _, i in used])
        per_rank = torch.cat([(weights[b, k] * scaling[i]).expand(ranks[i]) for k, i in used])
        u = x[segment].float() @ A[rows].float().T * per_rank
        out.append((y[segment].float() + u @ B[rows].float()).to(y.dtype))
    return torch.cat(out) if out else y


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
    owned: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mixture` at `dy` for x, the slab rows owned[0]:owned[1] of A and B, and weights.

        dx = A[i]^T c g,  dA[i] = c g x^T,  dB[i] = c (A[i] x) dy^T,  dweights[b, k] = scaling[i] <A[i] x, g>
        with g = B[i] dy,  c = weights[b, k] * scaling[i];  dweights is 0 where the weight is 0

    Returns dx [T, in_features] in x's dtype, and dA, dB, dweights in fp32.
    """
    bounds = segment_bounds(x.shape[0], indices.shape[0], cu_seqlens)
    starts, ranks, picks = start.tolist(), rank.tolist(), indices.tolist()
    active = (weights != 0).tolist()
    dx = torch.zeros_like(x)
    dA = torch.zeros(owned[1] - owned[0], A.shape[1], dtype=torch.float32, device=A.device)
    dB = torch.zeros(owned[1] - owned[0], B.shape[1], dtype=torch.float32, device=B.device)
    dweights = torch.zeros_like(weights, dtype=torch.float32)
    for b, row_picks in enumerate(picks):
        xs, dys = x[bounds[b] : bounds[b + 1]].float(), dy[bounds[b] : bounds[b + 1]].float()
        update = torch.zeros_like(xs)
        for k, i in enumerate(row_picks):
            if not active[b][k]:
                continue
            first, last = starts[i], starts[i] + ranks[i]
            a, c = A[first:last].float(), weights[b, k] * scaling[i]
            u, g = xs @ a.T, dys @ B[first:last].float().T
            update += (g * c) @ a
            dweights[b, k] = scaling[i] * (u * g).sum()
            lo, hi = max(first, owned[0]), min(last, owned[1])
            if lo < hi:
                mine = slice(lo - first, hi - first)
                dA[lo - owned[0] : hi - owned[0]] += (g[:, mine] * c).T @ xs
                dB[lo - owned[0] : hi - owned[0]] += (u[:, mine] * c).T @ dys
        dx[bounds[b] : bounds[b + 1]] = update.to(x.dtype)
    return dx, dA, dB, dweights
