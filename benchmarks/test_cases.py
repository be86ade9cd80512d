"""The suite's small cases for pytest-benchmark: `pytest benchmarks/ --benchmark-only`.

Every case is verified first, as in the suite; times are those of ours alone, on CUDA with the launch and
the wait for its end.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from suite import mixture, search  # noqa: E402
from suite.machine import DEVICE  # noqa: E402


def timed(benchmark, case):
    (ours,) = (contender for contender in case.contenders if contender.name == case.ours)
    assert ours.check(ours.run(0)) is None
    benchmark.extra_info.update(case.axes)
    benchmark(finished(ours.run, case.copies))


def finished(run, copies, device=DEVICE):
    """A call of `run` on the next copy of the inputs, until the device has done the work."""
    turn = iter(range(1 << 40))

    def call():
        run(next(turn) % copies)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


@pytest.mark.parametrize("queries", (1, 16))
@pytest.mark.parametrize("num_keys", (1000, 10_000))
def test_search(benchmark, num_keys, queries):
    timed(benchmark, search.Problem(num_keys, search.DIM, DEVICE, peers=()).case(queries))


@pytest.mark.parametrize("rows", (1, 8, 32))
def test_mixture_decode(benchmark, rows):
    timed(benchmark, mixture.update_case(rows, 1, 64, mixture.RANK, mixture.TOP_K, "distinct", DEVICE))


@pytest.mark.parametrize("rank", (8, 64))
def test_mixture_prefill(benchmark, rank):
    timed(benchmark, mixture.update_case(8, 128, 64, rank, mixture.TOP_K, "distinct", DEVICE))


def test_layer(benchmark):
    timed(benchmark, mixture.layer_case(8, DEVICE))


def test_mixture_step(benchmark):
    timed(benchmark, mixture.step_case(8, 128, DEVICE))
