"""The problems of test_gpu.py, small and on any device: what needs a GPU to run is at least right."""

import pytest
import torch
from conftest import DEVICE
from gpu_problem import OPS, Problem, forward, verify

from slm_fast import dispatch

pytestmark = pytest.mark.skipif(
    dispatch.available()["gpu"] is not None, reason=str(dispatch.available()["gpu"])
)


@pytest.mark.parametrize("lengths", [(1,) * 3, (3, 0, 5)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_problems_are_right(op, lengths):
    verify(Problem(op, lengths, ranks=(8, 3, 12), features=(64, 48)))


@pytest.mark.parametrize("op", OPS)
def test_redrawn_inputs_and_the_tail(op):
    problem = Problem(op, (2,) * 4, ranks=(8, 3, 12), features=(64, 48))
    before, places = forward(problem), {n: t for n, t in problem.values.items() if torch.is_tensor(t)}
    problem.redraw()
    assert all(problem.values[name] is place for name, place in places.items())
    after = forward(problem)
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    for got, want in zip(forward(problem.tail(2)), after, strict=True):
        torch.testing.assert_close(got, want.narrow(-2, 4, 4), rtol=2e-3, atol=2e-3)
    problem.redraw(weights=False)
    if op == "mixture":
        assert torch.equal(forward(problem)[0], problem.values["y"])
    verify(problem)
    assert problem.values["x"].device.type == DEVICE
