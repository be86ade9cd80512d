"""Tasks found by keys of their labels: what is searched, and from the labels found to a task's entries."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slm_fast.config import SLMConfig
from slm_fast.routing import Routing
from slm_fast.task_statistics import module_key


def checked_answers(answers: Sequence[str], count: int) -> list[str]:
    """The answers to `count` texts. Raises ValueError unless they are as many strings."""
    answers = [answers] if isinstance(answers, str) else list(answers)
    if len(answers) != count or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"answers must be {count} strings, one for each text, got {len(answers)}")
    return answers


def has_label_keys(config: SLMConfig) -> bool:
    """Whether tasks are found by them, if the metric has statistics: where rows are routed each by itself, to
    a task before its entries."""
    return config.label_keys and config.weighting == "task" and config.mixing == "instance"


def label_index(pool, metric: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Label keys as a metric searches them: c [L, D], beta [L] and the numbers of their tasks [L]; see
    `Whitened.index_labels`."""
    none = pool.keys[:0]
    labels, means, counts, numbers = [none], [none], [], []
    if metric.has_statistics and has_label_keys(pool.config):
        for number, info in pool.tasks_by_number.items():
            key = module_key(info.name)
            known = pool.metric.tasks[key] if key in pool.metric.tasks else None
            if known is not None and len(known.label_scale):
                labels.append(known.means_of_labels().to(none))
                means.append(known.mean[None].to(none))
                counts.append(len(known.label_scale))
                numbers.append(number)
    counts, numbers = (torch.tensor(n, dtype=torch.int64, device=none.device) for n in (counts, numbers))
    if not len(counts):
        return none, pool.index_bias[:0], numbers
    task = torch.arange(len(counts), device=none.device).repeat_interleave(counts)
    return *metric.index_labels(torch.cat(labels), torch.cat(means), task), numbers[task]


def with_entries(pool, features: Tensor, routing: Routing) -> Routing:
    """A search by label keys, with entries in their place: of the tasks among a row's picks the `top_k` best
    entries, where the best of a task has the task's score and the others are as far behind it as by their own
    keys. Rows that picked no label are left alone."""
    by_label = (routing.indices >= pool.num_slots).any(1)
    if not bool(by_label.any()):
        return routing
    if not bool(by_label.all()):
        rows = by_label.nonzero().flatten()
        own = with_entries(pool, features[rows], routing.rows(rows))
        return Routing(*(t.index_copy(0, rows, o) for t, o in zip(routing, own, strict=True)))
    indices, weights, scores, version = routing
    task, found = pool.index_task[indices.long()], scores > -torch.inf
    entries, rank = _entries_of(pool, task[:, 0], features, scores[:, 0])
    other = found & (task != task[:, :1])
    if bool(other.any()):
        parts, num_picks = [(entries, rank)], task.shape[1]
        for pick in range(1, num_picks):
            first = other[:, pick] & (task[:, :pick] != task[:, pick, None]).all(1)  # of its task
            rows = first.nonzero().flatten()
            if len(rows):
                more = _entries_of(pool, task[rows, pick], features[rows], scores[rows, pick])
                parts.append((torch.zeros_like(entries), torch.full_like(rank, -torch.inf)))
                for whole, own in zip(parts[-1], more, strict=True):
                    whole[rows] = own
        entries, rank = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
        rank, order = rank.sort(dim=1, descending=True, stable=True)
        entries, rank = entries.gather(1, order)[:, :num_picks], rank[:, :num_picks]
    kept = (weights != 0).any(1, keepdim=True) & (rank > -torch.inf)  # not below the floor
    return Routing(entries, kept.to(weights), rank, version)


def _entries_of(pool, number: Tensor, features: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """The `top_k` best entries of the task `number` [B] of each row, [B, top_k] int32, and their scores,
    moved so that the first has the score `best` [B]."""
    numbers = sorted(set(number.tolist()))
    slots = [slot for n in numbers for slot in pool.tasks_by_number[n].slots]
    entries, _, scores = pool.search_slots(features, slots, number if len(numbers) > 1 else None)
    behind = torch.where(scores > -torch.inf, scores - scores[:, :1], -torch.inf)
    return entries, best[:, None] + behind
