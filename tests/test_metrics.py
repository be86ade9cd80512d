import pytest

from slm_fast.continual.metrics import DEFINITIONS, single_task_reference, summarize

MATRIX = [[0.9, 0.2, None], [0.7, 0.8, 0.1], [0.8, 0.6, 0.5]]


def test_forward_transfer_against_single_task_learning():
    summary = summarize(MATRIX, single=[0.5, 0.7, 0.6])
    assert summary["forward_transfer_single"] == pytest.approx(((0.8 - 0.7) + (0.5 - 0.6)) / 2)
    assert summary["forward_transfer"] is None and set(summary) == set(DEFINITIONS)
    assert summarize(MATRIX, [0.0, 0.1, 0.0])["forward_transfer_single"] is None
    assert summarize([[0.5]], single=[0.5])["forward_transfer_single"] is None
    assert summarize([[None, None], [0.5, None]], single=[0.5, 0.5])["forward_transfer_single"] is None


def test_whose_diagonal_is_the_single_task_reference():
    oracle, alone = [[0.5, None], [0.4, 0.6]], [[0.7, None], [0.7, 0.8]]
    both = {"slm": MATRIX, "oracle": oracle, "per_task": alone}
    assert single_task_reference(both, "zero") == single_task_reference(both, "retrieved")
    assert single_task_reference(both, "zero") == ("per_task", [0.7, 0.8])
    assert single_task_reference({"oracle": oracle}, "zero") == ("oracle", [0.5, 0.6])
    unfinished = {"per_task": [[None, None], [0.7, 0.8]], "oracle": oracle}
    assert single_task_reference(unfinished, "zero") == ("oracle", [0.5, 0.6])
    none = (None, None)
    assert single_task_reference(unfinished, "retrieved") == none  # the oracle started from other tasks
    assert single_task_reference({"slm": MATRIX}, "zero") == none
    assert single_task_reference({"oracle": None}, "zero") == none
