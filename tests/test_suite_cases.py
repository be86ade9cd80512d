from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


class Recorded:
    """A clock that says how long calls took: `seconds[name]` in turn."""

    name = "recorded"

    def __init__(self, seconds):
        self.seconds = {name: iter(values) for name, values in seconds.items()}

    def pause(self):
        pass

    def __call__(self, run, first, repeats):
        return next(self.seconds[run(first)])


def a_case(**options):
    from suite.cases import Case, Contender

    ours = Contender("ours", lambda i: "ours", lambda found: None if found == "ours" else "wrong")
    peer = Contender("peer", lambda i: "peer", scale=options.pop("scale", 1.0))
    return Case("section", "case", {"rows": 1}, [ours, peer, *options.pop("more", ())], "ours", **options)


def test_medians_quantiles_and_ratios_are_by_pairs():
    from suite.cases import Effort, measure

    ours = [1.0, 1.0, 2.0, 4.0, 8.0, 16.0]  # the first sample sets the repetitions
    clock = Recorded({"ours": ours, "peer": [9.0] + [3 * value for value in ours[1:]]})
    record = measure(a_case(), Effort(5, 5, 0.0), clock)
    found = record["contenders"]
    assert found["ours"]["seconds"] == 4.0 and found["peer"]["seconds"] == 12.0
    assert found["ours"]["low"] == pytest.approx(1.8) and found["ours"]["high"] == pytest.approx(9.6)
    assert [found["peer"][key] for key in ("ratio_low", "ratio", "ratio_high")] == [3.0, 3.0, 3.0]
    assert found["peer"]["rounds"] == 5 and record["clock"] == "recorded"


def test_a_part_of_the_work_counts_for_the_whole():
    from suite.cases import Effort, measure

    clock = Recorded({"ours": [2.0] * 4, "peer": [1.0] * 4})
    found = measure(a_case(scale=8.0), Effort(3, 3, 0.0), clock)["contenders"]["peer"]
    assert (found["seconds"], found["ratio"]) == (8.0, 4.0)


def test_a_wrong_result_has_no_time():
    from suite.cases import Contender, Effort, measure

    def broken(i):
        raise RuntimeError("no such kernel")

    wrong = Contender("wrong", lambda i: "else", lambda found: "wrong result")
    more = (wrong, Contender("broken", broken))
    clock = Recorded({"ours": [1.0] * 4, "peer": [1.0] * 4})
    case = a_case(more=more, skipped={"absent": "not installed"})
    found = measure(case, Effort(3, 3, 0.0), clock)["contenders"]
    assert found["wrong"] == {"error": "wrong result"} and found["absent"] == {"error": "not installed"}
    assert found["broken"] == {"error": "RuntimeError: no such kernel"}
    case.ours = "wrong"
    with pytest.raises(RuntimeError, match="section, case: wrong result; nothing is timed"):
        measure(case, Effort(3, 3, 0.0), clock)


def test_inputs_take_turns():
    from suite.cases import Case, Contender, Effort, measure

    seen = []
    case = Case("s", "c", {}, [Contender("slm_fast", seen.append)], copies=3)
    measure(case, Effort(4, 4, 0.0), None)
    assert set(seen) == {0, 1, 2} and max(seen.count(i) for i in (1, 2)) > 1


def test_the_peak_of_a_call_is_measured():
    from suite.cases import Case, Contender, Effort, measure

    calls = [Contender("slm_fast", lambda i: torch.ones(1 << 22).sum(), lambda found: None)]
    calls.append(Contender("nothing", lambda i: None))
    found = measure(Case("s", "c", {}, calls), Effort(2, 2, 0.0))["contenders"]
    assert 0.9 * (1 << 24) < found["slm_fast"]["peak_bytes"] < 1.3 * (1 << 24)
    assert found["nothing"]["peak_bytes"] < 1 << 20


def test_where_there_is_no_peak_there_is_none(monkeypatch, tmp_path):
    from suite import memory

    monkeypatch.setattr(memory, "PROCESS", tmp_path / "none")
    with memory.Peak("wall") as peak:
        torch.ones(1 << 20)
    assert peak.bytes is None
    with memory.Peak("recorded") as peak:
        pass
    assert peak.bytes is None


def test_the_peak_on_cuda_is_the_allocators(monkeypatch):
    from suite import memory

    done, peaks = [], iter([500])
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(memory.torch.cuda, name, lambda name=name: done.append(name))
    monkeypatch.setattr(memory.torch.cuda, "memory_allocated", lambda: 300)
    monkeypatch.setattr(memory.torch.cuda, "max_memory_allocated", lambda: next(peaks))
    with memory.Peak("events") as peak:
        done.append("call")
    assert peak.bytes == 200
    assert done == ["synchronize", "reset_peak_memory_stats", "call", "synchronize"]


def test_rates_are_shares_of_the_dtypes_ceiling():
    from suite import machine, page

    ceilings = {"copy_bytes_per_second": 1e9}
    ceilings["operations_per_second"] = {"float32": 1e11, "bfloat16": 4e11}
    record = {"ours": "o", "axes": {}, "bytes": 10**6, "operations": 10**9, "contenders": {}}
    record["contenders"]["o"] = {"seconds": 0.02}
    for dtype, share, floor in (("float32", 0.5, 1e-2), ("bfloat16", 0.125, 2.5e-3), ("int8", None, 1e-3)):
        found = machine.rates(record | {"dtype": dtype}, ceilings)
        assert found["bytes_per_second"] == pytest.approx(5e7) and found["bytes_share"] == pytest.approx(0.05)
        assert found["operations_per_second"] == pytest.approx(5e10)
        assert found["operations_share"] == (None if share is None else pytest.approx(share))
        assert page.floor(record | {"dtype": dtype}, ceilings) == pytest.approx(floor)
    assert machine.rates_line(record | {"dtype": "float32"}, ceilings) == (
        "0.1 GB/s (5% of memory's), 50.0 GFLOP/s (50% of products')"
    )
    slow = {"operations_per_second": {"float32": 1e11, "bfloat16": 1e9}}
    assert machine.product_rate(slow, "bfloat16") == 1e11  # widened
    assert machine.product_rate({"operations_per_second": {"bfloat16": 1e9}}, "float32") is None


class Allocator:
    """CUDA's, as far as peaks go; tensors of a graph are allocated at its capture alone."""

    def __init__(self, monkeypatch):
        self.now, self.peak = 1000, 5000
        calls = dict(memory_allocated=lambda: self.now, max_memory_allocated=lambda: self.peak)
        calls |= dict(reset_peak_memory_stats=self.reset, synchronize=lambda: None)
        calls |= {name: lambda *_, **__: MagicMock() for name in ("Stream", "current_stream", "stream")}
        calls |= {name: lambda *_, **__: MagicMock() for name in ("CUDAGraph", "graph")}
        for name, call in calls.items():
            monkeypatch.setattr(torch.cuda, name, call)

    def reset(self):
        self.peak = self.now

    def call(self, most, kept=0):
        """Takes `most` bytes for a while and keeps some of them."""
        self.peak = max(self.peak, self.now + most)
        self.now += kept


def test_a_clock_of_cuda_says_what_was_a_graph(monkeypatch):
    from gpu_timing import Captured
    from suite import command
    from suite.cases import Case, Effort, contenders_of, measure

    allocator, clock = Allocator(monkeypatch), Recorded({"ours": [1.0] * 4, "peer": [1.0] * 4})
    clock.name = "events"

    class Replayed:
        def __init__(self):
            self.replay = Captured(lambda _: allocator.call(300, kept=100), 1, lambda: allocator.call(900))

        def __call__(self):
            self.replay()
            return "ours"

    def eager():
        allocator.call(70)
        return "peer"

    runs = contenders_of({"ours": Replayed(), "peer": eager})
    record = measure(Case("s", "c", {}, runs, "ours"), Effort(3, 3, 0.0), clock)
    found = [record["contenders"][name] for name in ("ours", "peer")]
    assert [(of["graph"], of["peak_bytes"]) for of in found] == [(True, 300), (False, 70)]
    ceilings = {"read_bytes_per_second": 1e9, "operations_per_second": {"float32": 1e11}}
    printed = list(command.lines(record, ceilings))
    assert "graph   peak 300 B" in printed[1] and "eager   peak 70 B" in printed[2]


@pytest.mark.parametrize(
    ("said", "clocks", "printed"),
    [
        (
            "GPU-a, 580.1, 345, 1980, 2619, 2619\nGPU-b, 580.1, 1755, 1980, 1593, 2619\n",
            [1755, 1980, 1593, 2619],
            "Card, SM 1,755 of 1,980 MHz, memory 1,593 of 2,619 MHz, driver 580.1, ",
        ),
        ("GPU-b, 580.1, 1755, [N/A], [N/A], [N/A]", [1755, None, None, None], "Card, SM 1,755 MHz, driver"),
        ("NVIDIA-SMI has\nfailed", [None] * 4, "Card, driver unknown: NVIDIA-SMI has failed, "),
        (FileNotFoundError("no nvidia-smi"), [None] * 4, "Card, driver unknown: no nvidia-smi, "),
    ],
    ids=["of its card", "not available", "failed", "absent"],
)
def test_the_machine_line_has_the_cards_clocks(monkeypatch, said, clocks, printed):
    import compare
    import gpu_timing
    from suite import machine

    smi = MagicMock(side_effect=[said] if isinstance(said, Exception) else None)
    smi.return_value.stdout = said
    monkeypatch.setattr(gpu_timing.subprocess, "run", smi)
    found = gpu_timing.driver_and_clocks("b")
    assert [found[name] for name in gpu_timing.CLOCKS] == clocks
    where = found | dict.fromkeys(("triton", "torch", "transformers", "commit"), "1")
    where |= {"device": "cuda", "card": "Card"}
    ceilings = {"copy_bytes_per_second": 1e9, "operations_per_second": {}}
    assert machine.line(where, ceilings).startswith(printed)
    older = {name: value for name, value in where.items() if name not in gpu_timing.CLOCKS}
    assert machine.line(older, ceilings).startswith("Card, driver")
    assert compare.same_machine({"machine": where}, {"machine": where | {"sm_megahertz": 7}})


def test_the_pace_is_measured_beside_a_case():
    from suite.cases import Case, Contender, Effort, measure

    case = Case("s", "c", {}, [Contender("slm_fast", lambda i: None)])
    record = measure(case, Effort(3, 3, 0.0))
    assert set(record["contenders"]) == {"slm_fast"}  # probes are none
    pace = record["pace"]
    assert 1e8 < pace["read_bytes_per_second"] < 1e13
    assert 1e9 < pace["float32_operations_per_second"] < 1e14
    assert "pace" not in measure(
        a_case(), Effort(3, 3, 0.0), Recorded({"ours": [1.0] * 4, "peer": [1.0] * 4})
    )


def test_small_cases_wait_for_the_device(monkeypatch):
    import test_cases

    done = []
    monkeypatch.setattr(test_cases.torch.cuda, "synchronize", lambda: done.append("waited"))
    call = test_cases.finished(done.append, 2, "cuda")
    call(), call(), call()
    assert done == [0, "waited", 1, "waited", 0, "waited"]
    test_cases.finished(done.append, 2, "cpu")()
    assert done[-1] == 0
