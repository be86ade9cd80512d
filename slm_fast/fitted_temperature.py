"""temperature="auto": what held-out texts of a task lose among the tasks known, at every temperature."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slm_fast.keys import TEMPERATURES, learn_keys
from slm_fast.label_keys import has_label_keys, label_index
from slm_fast.task_statistics import common_labels, label_means, module_key


@torch.no_grad()
def held_out_losses(pool, query: Tensor, answers: Sequence[str] | None = None) -> Tensor | None:
    """What held-out queries of a new task lose on the question whose they are, among the tasks there are:

        mean over the queries of -log softmax_t(max over the keys of t of score / temperature)[new]

    by the label keys of a task that has some, else by those of its entries, at every one of
    `TEMPERATURES`. None where no temperature is fitted, there is no other task, or too few queries.
    """
    num_keys, part = pool.config.entries_per_task, len(query) // 5
    fitted = pool.config.temperature == "auto" and pool.tasks
    if not fitted or not part or len(query) - part < num_keys:
        return None
    pool.fresh_index()
    query = query.to(pool.keys)
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(0)).to(query.device)
    held_out, rest = query[order[:part]], query[order[part:]]
    metric = pool.metric.only([*pool.tasks])
    metric.update("", rest)
    labels = common_labels(answers) if has_label_keys(pool.config) else []
    if labels:
        own = label_means(rest, [answers[n] for n in order[part:].tolist()], labels)
        of_task = torch.zeros(len(own), dtype=torch.int64, device=own.device)
        mine = metric.index_labels(own, rest.mean(0, keepdim=True), of_task)
    else:
        own = learn_keys(rest, num_keys, metric, pool.config, "group_avg")
        mine = metric.index(own)
    entries = pool.searched[: pool.num_slots].nonzero().flatten()
    *others, number = label_index(pool, metric)
    keys, bias = map(torch.cat, zip(mine, metric.index(pool.keys[entries]), others, strict=True))
    new = torch.full((len(own),), pool.num_taken, device=own.device)
    task = torch.cat([new, pool.slot_task[entries], number])
    _, number = task.unique(return_inverse=True)
    scores = metric.transform(held_out) @ keys.T + bias
    best = scores.new_full((part, len(pool.tasks) + 1), -torch.inf)
    best.scatter_reduce_(1, number.expand(part, -1), scores, "amax")
    best = (best - best[:, number[:1]]).cpu()
    return torch.stack([(best / temperature).logsumexp(1).mean() for temperature in TEMPERATURES])


def keep_losses(pool, name: str, losses: Tensor | None) -> None:
    """Give the task, if it has statistics, losses that were measured against all others that are here."""
    pool.fitted = None
    if pool.metric.has_statistics:
        others = [other for other in pool.tasks if other != name and losses is not None]
        pool.metric.tasks[module_key(name)].keep_losses(losses, [pool.identity(o) for o in others])


def drop_losses(pool) -> None:
    """Leave no losses that were measured against a task that is not here."""
    if pool.metric is None or not pool.metric.has_statistics:
        return
    pool.fitted = None
    measured = [task for task in pool.metric.tasks.values() if len(task.losses)]
    here = {pool.identity(name) for name in pool.tasks} if measured else set()
    for task in measured:
        if not here.issuperset(task.against.tolist()):
            task.keep_losses(None)
