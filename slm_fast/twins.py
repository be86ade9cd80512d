"""Near-duplicate tasks: which they are, and rows that share their weight with those of their task."""

from collections.abc import Iterable

import torch
from torch import Tensor

from slm_fast.routing import Routing
from slm_fast.task_statistics import module_key


def near_duplicates(pool, name: str, among: Iterable[str] | None = None) -> list[str]:
    """The tasks (of `among`) of which each could hold the texts of task `name`, and the other way round, in
    the order of their names: in the mean those lie no farther away than a share `coverage` of a task's own.
    The tasks' statistics say so, whatever was learnt first; without statistics there are none."""
    known = pool.metric.tasks if pool.metric is not None and pool.metric.has_statistics else {}
    coverage, found = pool.config.coverage, []
    if module_key(name) not in known:
        return found
    own = known[module_key(name)]
    for other in sorted(pool.tasks if among is None else among):
        if other != name and module_key(other) in known:
            its = known[module_key(other)]
            if own.holds(its, coverage) and its.holds(own, coverage):
                found.append(other)
    return found


def twins(pool, name: str) -> list[str]:
    """The near-duplicates of task `name` that have its labels."""
    labels = set(pool.task(name).labels or ())
    alike = [other for other, info in pool.tasks.items() if labels and set(info.labels or ()) == labels]
    return near_duplicates(pool, name, alike)


def share_with_twins(pool, query: Tensor, routing: Routing, free: Tensor) -> Routing:
    """The routing of queries [B, D] after the best task t of every `free` row gave a share s, the config's
    `twin_share`, to its twins:

        w'[j] = s_u M v_u[j],   s_u = s / n * min(1, N_u / N_t)   for the entries j of each of the n twins u
        w'[i] = (1 - sum_u s_u) M v_t[i]                          for those of t

    M: the row's weight on t and its twins; v_u: the weights of a search among the entries of u alone; N: the
    texts that a task was learnt from, for a twin of few texts knows less. Other entries keep their weights.
    Rows whose best task has no twin stay as they are, with picks of weight 0 behind theirs where others of
    the batch got more.
    """
    made: list[tuple[Tensor, Routing]] = []
    for name, members in pool.rows_by_task(routing, free & (routing.weights[:, 0] != 0)):
        if others := pool.twins(name):
            made.append((members, _shared(pool, query[members], routing.rows(members), [name, *others])))
    if not made:
        return routing
    routing = routing.padded(max(part.indices.shape[1] for _, part in made))
    indices, weights, scores = (tensor.clone() for tensor in routing[:3])
    for members, part in made:
        part = part.padded(indices.shape[1])
        indices[members], weights[members], scores[members] = part[:3]
    return routing._replace(indices=indices, weights=weights, scores=scores)


def _shared(pool, query: Tensor, routing: Routing, names: list[str]) -> Routing:
    """Rows with one best task, the first of the names, and its twins, the others: its entries come first."""
    count = [int(pool.metric.tasks[module_key(name)].count) for name in names]
    shares = [pool.config.twin_share / (len(names) - 1) * min(1.0, c / count[0]) for c in count[1:]]
    slots = torch.tensor([slot for name in names for slot in pool.task(name).slots])
    inside = torch.isin(routing.indices, slots.to(routing.indices))
    mass = torch.where(inside, routing.weights, 0.0).sum(1, keepdim=True)
    parts = []
    for name, share in zip(names, [1 - sum(shares), *shares], strict=True):
        found = pool.search_among(query, name)
        parts.append(found._replace(weights=share * mass * found.weights))
    parts.append(routing._replace(weights=torch.where(inside, 0.0, routing.weights)))
    indices, weights, scores = (torch.cat(tensors, 1) for tensors in list(zip(*parts, strict=True))[:3])
    order = (weights == 0).int().argsort(dim=1, stable=True)[:, : int((weights != 0).sum(1).max())]
    return routing._replace(
        indices=indices.gather(1, order), weights=weights.gather(1, order), scores=scores.gather(1, order)
    )
