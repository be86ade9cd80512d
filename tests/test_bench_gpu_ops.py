"""What the GPU benchmark and the tuner time, and by what they judge it: real kernels, interpreted."""

from pathlib import Path

import pytest
import torch
from conftest import DEVICE
from gpu_problem import DTYPE

from slm_fast import dispatch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(
    dispatch.available()["gpu"] is not None, reason=str(dispatch.available()["gpu"])
)


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_result_is_right_up_to_twice_the_error_of_pytorch():
    from gpu_timing import fault

    exact = torch.randn(100)
    same = exact + 0.02 * exact.abs().max()
    allowed = 2 * 0.02 + 1e-3

    def judged(off):
        return fault([exact + off * exact.abs().max()], [exact], [same], torch.float16)

    assert judged(0.99 * allowed) is None and judged(0.0) is None
    assert "wrong result" in judged(1.01 * allowed)
    assert "wrong result" in judged(torch.nan)
    assert "wrong result" in fault([exact[:-1]], [exact], [same], torch.float16)
    assert fault([exact], [exact], [None], torch.float32) is None


def contenders(workloads):
    linears, shrinks = ("mixture", "fused_linear", "segment_linear"), ("norm_shrink", "silu_mul_shrink")
    settings = {"dtype": DTYPE, "device": DEVICE, "layers": 2}
    batch = workloads.Batch(2, 3, 64, 48, **settings)
    for op in linears:
        yield from (workloads.forward(batch, op, given_u=given) for given in (False, True))
    yield from (workloads.backward(batch, op) for op in ("frozen", *linears))
    for op in shrinks:
        batch = workloads.Batch(2, 3, 64, linears=3 if op == "norm_shrink" else 1, **settings)
        yield from (workloads.shrink(batch, op, kind) for kind in ("plain", "gather", "resident"))
        yield from (workloads.shrink_backward(batch, op, kind) for kind in ("gather", "resident"))


def test_contenders_are_right_and_judged():
    import gpu_workloads as workloads

    for contender in contenders(workloads):
        state = contender.prepare and contender.prepare()
        for layer in (0, 1):
            results = list(contender.run(layer))
            assert contender.judge(results, layer) is None, contender.name
        if "plain" not in contender.name:  # which reads nothing that a layer has of its own
            assert "wrong result" in contender.judge(contender.run(0), 1), contender.name
        results[-1] = results[-1] + 0.1 * results[-1].abs().max()
        assert "wrong result" in contender.judge(results, 1), contender.name
        assert state is None or len(state) == 2


def test_the_benchmark_times_what_is_right_alone():
    import bench_gpu_ops as bench
    from gpu_workloads import Contender

    exact = torch.ones(4)
    seconds = {"frozen": 1e-3, "ours": 1.1e-3}

    def contender(name, make):
        return Contender(
            name, lambda layer: [make()], lambda layer, dtype: [exact], torch.float32, 15.0, False
        )

    def named(name):
        def make():
            made.append(name)
            return exact.clone()

        return contender(name, make)

    def clock(call, repeats):
        call()
        return seconds[made[-1]]

    made = []
    wrong, broken = contender("wrong", lambda: 2 * exact), contender("broken", lambda: exact @ exact[:2])
    group = bench.Group("a group", lambda: ([named("frozen"), named("ours"), wrong, broken], 2), 5)
    records = {r["contender"]: r for r in bench.measure(group, 1e12, clock)}
    assert records["ours"]["microseconds"] == 550 and records["ours"]["added_percent"] == 10
    assert records["ours"]["met"] and records["frozen again"]["ratio"] == 1
    assert "wrong result" in records["wrong"]["error"] and "microseconds" not in records["wrong"]
    assert "RuntimeError" in records["broken"]["error"]
    lines = "\n".join(bench.line(record) for record in records.values())
    assert "550.00 us" in lines and "+10.0%  (target 15%: met)" in lines
    search = bench.Group("search", lambda: ([named("frozen"), named("ours")], 1), 5, key_bytes=1 << 20)
    records = {r["contender"]: r for r in bench.measure(search, 2e9, clock)}
    assert records["ours"]["bandwidth_percent"] == pytest.approx(100 * (1 << 20) / 1.1e-3 / 2e9, abs=0.06)


def test_searches_agree():
    import bench_gpu_ops as bench

    theirs, ours, faiss = bench.search_contenders(3, 500, 64, DEVICE)
    assert theirs.judge(theirs.run(0), 0) is None
    try:
        found = ours.run(0)
    except Exception as error:  # the extension is not built
        pytest.skip(str(error))
    assert ours.judge(found, 0) is None
    assert "wrong result" in ours.judge((found[0], found[1].flip(1)), 0)
    assert not faiss.graph


def test_only_real_gpus_are_measured(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    import bench_gpu_ops
    import tune

    for module, name in ((tune, "tune.py"), (bench_gpu_ops, "bench_gpu_ops.py")):
        monkeypatch.setattr("sys.argv", [name])
        with pytest.raises(SystemExit, match="no GPU .*no CUDA device"):
            module.main()
