"""What an accuracy matrix says: R[t][i] is the score on task i after learning tasks 0..t, or None."""

Matrix = list[list[float | None]]

EVALUATED = ("seen", "all", "last")  # what is scored after a task, see `ContinualRunner`

DEFINITIONS = {
    "average_accuracy": "mean over tasks of R[T-1][i]",
    "forgetting": "max minus last: mean over i < T-1 of max_{i<=t<T-1} R[t][i] - R[T-1][i]",
    "forgetting_first": "first minus last: mean over i < T-1 of R[i][i] - R[T-1][i]",
    "backward_transfer": "mean over i < T-1 of R[T-1][i] - R[i][i] (divided by T-1)",
    "forward_transfer": "mean over i > 0 of R[i-1][i] - b[i], b = before learning, one over the number of "
    "labels where the frozen model has no head (Lopez-Paz, 2017)",
    "forward_transfer_single": "mean over i > 0 of R[i][i] - s[i], s = task i learnt alone and told, "
    "by the method that is named as its reference",
}
SINGLE_TASK = ("per_task", "oracle")  # methods whose R[i][i] is the score of task i learnt alone and told
REFERENCE = "forward_transfer_single_reference"  # which of them `forward_transfer_single` compares with


def summarize(
    matrix: Matrix, before: list[float] | None = None, single: list[float] | None = None
) -> dict[str, float | None]:
    """All of `DEFINITIONS` for a matrix; None where the entries that a metric needs were not measured.

    before: score on each task before anything was learnt.  single: score on each task learnt alone.
    They are for the two forward transfers.
    """
    count = len(matrix)
    last = matrix[-1]
    first = [matrix[i][i] for i in range(count)]
    earlier = [[matrix[t][i] for t in range(i, count - 1)] for i in range(count - 1)]
    summary: dict[str, float | None] = dict.fromkeys(DEFINITIONS)
    if None not in last:
        summary["average_accuracy"] = sum(last) / count
        if count > 1 and None not in first:
            drops = [first[i] - last[i] for i in range(count - 1)]
            summary["forgetting_first"] = sum(drops) / (count - 1)
            summary["backward_transfer"] = -summary["forgetting_first"]
        if count > 1 and all(None not in scores for scores in earlier):
            summary["forgetting"] = sum(max(s) - last[i] for i, s in enumerate(earlier)) / (count - 1)
    ahead = [matrix[i - 1][i] for i in range(1, count)]
    summary["forward_transfer"] = _mean_gain(ahead, before)
    summary["forward_transfer_single"] = _mean_gain(first[1:], single)
    return summary


def _mean_gain(scores: list[float | None], reference: list[float] | None) -> float | None:
    """Mean of scores[i] - reference[i + 1]: the first task has nothing to transfer from."""
    if reference is None or not scores or None in scores:
        return None
    return sum(score - other for score, other in zip(scores, reference[1:], strict=True)) / len(scores)


def single_task_reference(matrices: dict[str, Matrix], init: str) -> tuple[str | None, list[float] | None]:
    """The first of `SINGLE_TASK` among the methods' matrices and its R[i][i]; (None, None) if there is none.

    init: `SLMConfig.init`; entries of "oracle" that did not start at zero were not learnt alone.
    """
    for name in SINGLE_TASK:
        matrix = matrices.get(name)
        if not matrix or (name == "oracle" and init != "zero"):
            continue
        if None not in (diagonal := [matrix[i][i] for i in range(len(matrix))]):
            return name, diagonal
    return None, None


def merge_tasks(confusion: list[list[float]], names: list[str], groups: list[set[str]]) -> dict[str, float]:
    """Routing accuracy per task when confusions inside a group (tasks that share labels) count as right."""
    allowed = {name: next((g for g in groups if name in g), {name}) for name in names}
    return {
        name: sum(value for other, value in zip(names, row, strict=True) if other in allowed[name])
        for name, row in zip(names, confusion, strict=True)
    }
