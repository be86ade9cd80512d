"""Where a new task starts: at zero, or at the mixture and the head that retrieval gives its texts."""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_fast.pool import KnowledgePool

logger = logging.getLogger(__name__)


def mean_weights(pool: KnowledgePool, query: Tensor) -> Tensor:
    """The mean weight of every slot over queries [N, D]: [slots] fp32; all 0 in an empty pool."""
    weights = torch.zeros(len(pool.start), device=pool.start.device)
    if pool.num_entries:
        routing = pool.search(query)
        weights.index_add_(0, routing.indices.flatten().long(), routing.weights.flatten())
    return weights / len(query)


def _start_head(pool: KnowledgePool, name: str, weights: Tensor) -> None:
    labels = pool.task(name).labels
    alike = [task for task in pool.tasks.values() if task.labels == labels and task.name != name]
    shares = torch.tensor([float(weights[task.slots].sum()) for task in alike])
    if labels is None or not shares.sum() > 0:
        return
    heads = [pool.head(task.name).state_dict() for task in alike]
    share = (shares / shares.sum()).tolist()
    mean = {key: sum(s * head[key] for s, head in zip(share, heads, strict=True)) for key in heads[0]}
    pool.head(name).load_state_dict(mean)


def leading_directions(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B^T A by at most `rank` directions, one a row, the largest first.

        B^T A = sum_j sigma_j u_j v_j^T;   rows of the results: sqrt(sigma_j) v_j, sqrt(sigma_j) u_j

    by QR of both factors and an SVD of the [R, R] core between them. Directions of no size are left out.
    Args: A: [R, in_features], B: [R, out_features], fp32.
    """
    q_in, r_in = torch.linalg.qr(A.T)
    q_out, r_out = torch.linalg.qr(B.T)
    u, sigma, v = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    sigma = sigma[:rank]
    count = int((sigma > sigma[0] * torch.finfo(sigma.dtype).eps * len(A)).sum())
    size = sigma[:count, None].sqrt()
    return size * (v[:count] @ q_in.T), size * (q_out @ u[:, :count]).T


@torch.no_grad()
def start_from_mixture(pool: KnowledgePool, name: str, weights: Tensor) -> None:
    """Start the M entries of task `name` where a mixture of others is, `weights` [slots] as `mean_weights`.

        sum_m 1/M * scaling * B[m] A[m] = the best approximation of rank M * r of
        sum_i weights[i] * scaling[i] * B[i] A[i],    for every linear

    Direction j of it goes to entry j mod M. Rows without a direction keep their zero start, which is all rows
    where every weight is 0. The entries have one rank and one scaling, which is not 0. The head starts at the
    mean of the heads with its labels, by their tasks' weights, if there are any.
    """
    weights = F.pad(weights, (0, len(pool.start) - len(weights)))  # the task may have made the pool grow
    _start_head(pool, name, weights)
    others, own = weights.nonzero().flatten().tolist(), pool.task(name).slots
    if not others:
        logger.info("task %r starts at zero: retrieval gives its texts the frozen model", name)
        return
    logger.info("task %r starts from the mixture of %d entries", name, len(others))

    def rows_of(slot: int) -> list[int]:
        rows = pool.rows_of([slot])
        return list(range(rows.start, rows.stop))

    sources = [row for slot in others for row in rows_of(slot)]
    targets = [row for of_rank in zip(*map(rows_of, own), strict=True) for row in of_rank]
    scaling = float(pool.scaling[own[0]])
    gain = len(own) / abs(scaling)
    coefficient = (weights * pool.scaling)[pool.row_entry[sources].long()] * (1 if scaling > 0 else -1)
    for factors in pool.factors:
        A, B = factors.A[sources].float(), factors.B[sources].float()
        A, B = leading_directions(A, coefficient[:, None].to(B.device) * B, len(targets))
        rows = targets[: len(A)]
        factors.A[rows] = (gain**0.5 * A).to(factors.A)
        factors.B[rows] = (gain**0.5 * B).to(factors.B)
