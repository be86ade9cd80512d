import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slm_fast.cli import main as slm_fast

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


def test_a_search_is_judged_by_exact_scores():
    from suite import search

    keys = search.make_keys(200, 16, "cpu")
    query = search.make_queries(keys, 3)
    checked = search.Checked(query, keys)
    right = (query.double() @ keys.double().T).topk(search.TOP_K).indices
    assert checked.exact(right) is None and checked.recall(right) == 1.0
    worse = right.clone()
    worse[1, 2] = (query[1] @ keys.T).argmin()
    assert checked.exact(worse) == "wrong top 4 for 1 queries" and checked.recall(worse) == pytest.approx(
        11 / 12
    )
    twice = right.clone()
    twice[0] = right[0, :1]
    assert checked.exact(twice) is not None
    missing = right.clone()
    missing[2, 3] = -1  # as FAISS says that it found too few
    assert checked.recall(missing) < 1.0


@pytest.mark.parametrize("peers", [(), ("faiss flat", "faiss hnsw", "faiss ivf")], ids=["alone", "faiss"])
def test_search_cases_are_right(peers):
    from suite import search

    if peers:
        pytest.importorskip("faiss")
    for cold in (False, True):
        case = search.Problem(300, 384, "cpu", cold=cold, peers=peers).case(5)
        names = [contender.name for contender in case.contenders]
        assert names == ["slm_fast", "slm_fast, no codes", "torch", *peers]
        assert (case.copies > 1) == cold and case.warm is True and case.skipped == {}
        for contender in case.contenders:
            found = contender.run(case.copies - 1)
            assert contender.check is None or contender.check(found) is None


def test_mixture_cases_are_right():
    from suite import mixture

    kinds = set()
    for case in mixture.cases(True, "cpu"):
        kinds.add(case.axes["kind"])
        assert not case.skipped
        for contender in case.contenders:
            assert contender.check(contender.run(0)) is None, (case.name, contender.name)
    assert kinds == {"update", "flat", "layer", "step"}
    ours, right = case.contenders[0], case.contenders[0].run(0)
    for wrong in range(4):  # y, dx, dA, dB of a step
        broken = [t * 1.001 if i == wrong else t for i, t in enumerate(right)]
        assert "wrong result" in ours.check(broken)


@pytest.mark.parametrize(("popularity", "distinct"), [("distinct", 16), ("identical", 2), ("zipf", None)])
def test_copies_touch_more_than_the_caches_and_nothing_twice(popularity, distinct):
    from suite import machine, mixture

    case = mixture.update_case(8, 1, 32, 8, 2, popularity, "cpu")
    assert distinct is None or case.axes["distinct"] == distinct
    touched = 2 * case.axes["distinct"] * 8 * mixture.FEATURES * 4
    assert case.copies * touched >= 2 * machine.cache_bytes("cpu")
    assert case.axes["entries"] % case.copies == 0
    for contender in case.contenders[:2]:
        first, last = contender.run(0).clone(), contender.run(case.copies - 1)
        assert contender.check(first) is None and contender.check(last) is not None  # other entries


@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf", "identical"])
def test_popularity(popularity):
    from suite import mixture

    pool = mixture.Pool(64, 2, 8, "cpu")
    indices, weights = pool.pick(32, 2, popularity)
    assert indices.shape == weights.shape == (32, 2) and torch.allclose(weights.sum(1), torch.ones(32))
    assert all(len(set(row)) == 2 for row in indices.tolist())
    distinct = indices.unique().numel()
    assert distinct == {"distinct": 64, "identical": 2}.get(popularity, distinct)
    if popularity == "zipf":
        assert distinct < pool.pick(32, 2, "uniform")[0].unique().numel()
    spread = pool.pick(8, 2, "distinct", among=4)[0]
    assert sorted(spread.unique().tolist()) == [0, 16, 32, 48]


def a_result(ratio=3.0):
    times = {"seconds": 1e-3, "low": 0.9e-3, "high": 1.2e-3, "rounds": 5}
    ours = times | {"ratio_low": 1.0, "ratio": 1.0, "ratio_high": 1.0, "memory_bytes": 1000}
    peer = times | {"ratio_low": 0.95 * ratio, "ratio": ratio, "ratio_high": 1.05 * ratio}
    records = [
        {
            "section": "search",
            "case": f"{keys} keys",
            "axes": {"keys": keys, "queries": 1, "cache": "hot", "dim": 384},
            "ours": "slm_fast",
            "bytes": 384 * keys,
            "operations": 768 * keys,
            "clock": "wall",
            "contenders": {"slm_fast": dict(ours), "faiss flat": dict(peer), "torch": {"error": "<none>"}},
        }
        for keys in (1000, 10_000, 100_000)
    ]
    for record in records:
        for name in ("seconds", "low", "high"):
            record["contenders"]["slm_fast"][name] *= record["axes"]["keys"] / 1000
    machine = {
        "cpu": "a CPU",
        "threads": 2,
        "isa": "avx2",
        "torch": "2",
        "transformers": "5",
        "device": "cpu",
    }
    ceilings = {"read_bytes_per_second": 1e9, "copy_bytes_per_second": 1e9}
    ceilings["operations_per_second"] = {"float32": 1e11}
    result = {"schema": 1, "created": "today", "quick": True, "machine": machine | {"commit": None}}
    result |= {
        "ceilings": ceilings,
        "seconds": {"search": 1.0},
        "failed": {},
        "results": records,
        "targets": [],
    }
    return result


def test_targets_of_the_search():
    from suite import search

    result = a_result()
    rows = search.targets(result["results"], result["ceilings"])
    assert [row["holds"] for row in rows] == [True, True, False]
    assert rows[-1]["reached"] == pytest.approx(0.384)  # 384 bytes a key in a microsecond, of 1 GB/s
    rows = search.targets(a_result(1.4)["results"], result["ceilings"])
    assert [row["holds"] for row in rows[:2]] == [False, False]


def test_the_page_has_plots_tables_and_failures(tmp_path):
    pytest.importorskip("matplotlib")
    from suite import page

    result = a_result() | {"failed": {"serve": "RuntimeError: <no> model"}}
    flat = {"section": "mixture", "case": "pools", "axes": {"kind": "flat", "rows": 8}, "ours": "12 entries"}
    flat |= {"bytes": None, "operations": None, "clock": "wall", "contenders": {}}
    for count in ("12", "10,000"):
        flat["contenders"][f"{count} entries"] = {"seconds": 1e-4, "low": 1e-4, "high": 2e-4, "ratio": 1.0}
    result["results"].append(flat)
    result["targets"] = [{"what": "search", "reached": 2.0, "wanted": ">= 3", "holds": False}]
    text = page.write(result, tmp_path).read_text()
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("search_keys", "mixture_pool"))
    assert [r["axes"]["entries"] for r in page.of_pools(result["results"])] == [12, 10_000]
    for part in ("data:image/svg+xml", "&lt;no&gt; model", "&lt;none&gt;", "10000 keys", ">2.00<", "3.00"):
        assert part in text, part
    assert "nan" not in text.split("</style>")[1].lower().split("data:image")[0]


def test_results_are_compared():
    import compare

    lines, bad = compare.compare(a_result(), a_result())
    assert not bad and len(lines) == 6
    lines, bad = compare.compare(a_result(), a_result(2.0))
    assert bad and sum(line.startswith("WORSE") for line in lines) == 3
    assert "time over faiss flat" in lines[0]
    assert not compare.compare(a_result(2.0), a_result())[1]
    larger = a_result()
    larger["results"][0]["contenders"]["slm_fast"]["memory_bytes"] = 1500
    assert compare.compare(a_result(), larger)[1]


def test_a_section_that_began_to_fail_is_worse(tmp_path, capsys):
    import compare

    broken = a_result() | {"failed": {"search": "RuntimeError: wrong result"}}
    broken["results"] = broken["results"][:1]
    other = copy.deepcopy(a_result())
    other["machine"] |= {"commit": "abc", "megahertz": 1.0}
    paths = [tmp_path / f"{i}.json" for i in range(3)]
    for path, result in zip(paths, (a_result(), broken, other), strict=True):
        path.write_text(json.dumps(result))
    names = [str(path) for path in paths]
    assert compare.main(names[:2]) == 1 and "WORSE search failed" in capsys.readouterr().out
    assert compare.main([names[1], names[1]]) == 0
    assert compare.main([names[0], names[2]]) == 0 and "differ" not in capsys.readouterr().out.splitlines()[0]


def test_scores_are_compared_by_what_they_miss():
    import compare

    def learnt(routing):
        record = {"section": "quality", "case": "c", "axes": {}, "ours": "slm"}
        record["contenders"] = {"slm": {"average": None, "routing": routing}}
        return a_result() | {"results": [record]}

    assert compare.compare(learnt(0.98), learnt(0.955))[1]
    assert not compare.compare(learnt(0.98), learnt(0.98))[1]
    assert not compare.compare(learnt(0.955), learnt(0.98))[1]


def test_a_section_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    from suite import command, machine
    from suite.cases import measured

    class Broken:
        targets = staticmethod(lambda records, ceilings: [])

        @staticmethod
        def records(*_):
            yield copy.deepcopy(a_result()["results"][0])
            raise RuntimeError("out of luck")

    class Tiny:
        targets = staticmethod(
            lambda records, ceilings: [dict(what="t", reached=1.0, wanted="x", holds=True)]
        )

        @staticmethod
        def records(quick, device, effort):
            return measured(iter([a_case()]), device, effort)

    monkeypatch.setattr(command, "SECTIONS", {"search": Broken, "mixture": Tiny})
    monkeypatch.setattr(machine, "ceilings", lambda device: a_result()["ceilings"])
    assert command.main(["--quick", "--output", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "suite.json").read_text())
    assert result["failed"] == {"search": "RuntimeError: out of luck"}
    assert [record["section"] for record in result["results"]] == ["search", "section"]
    assert {"cpu", "commit", "threads", "megahertz", "memory_bytes"} <= set(result["machine"])
    assert len(result["targets"]) == 1 and (tmp_path / "suite.html").is_file()
    assert "FAILED: RuntimeError: out of luck" in capsys.readouterr().out


def test_the_command_of_the_package(capsys):
    for words in (["bench", "--help"], ["bench", "nonsense"]):
        with pytest.raises(SystemExit) as ended:
            slm_fast(words)
        assert (ended.value.code == 0) == ("--help" in words)
    assert "usage: slm-fast bench" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        slm_fast(["doctor", "--quick"])  # options of other commands are still checked


def test_the_small_cases_run_under_pytest():
    pytest.importorskip("pytest_benchmark")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    done = subprocess.run([*command, "--benchmark-disable"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout


SMALL = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=500
)


def test_cases_of_a_model_on_a_gpu_are_right(monkeypatch):
    """On the CPU, without graphs; each verifies its contenders before it is returned."""
    from suite import gpu_model
    from suite.cases import Effort, measure

    base, effort = gpu_model.make_base("cpu", **SMALL), Effort(2, 2, 0.0)
    decode, prefill = gpu_model.decode_case(base, 3, graph=False), gpu_model.prefill_case(base, 3, 20)
    names = {"frozen", "off", "on", "peft", "dense"}
    assert set(measure(prefill, effort)["contenders"]) == names
    found = measure(decode, effort)["contenders"]
    assert set(found) == names | {"frozen eager", "on eager"} and all("seconds" in f for f in found.values())
    step = {c.name: c.run for c in decode.contenders}["on"]
    assert torch.equal(step(0), step(0))  # at the same place, not one token further
    found = measure(gpu_model.step_case("cpu", 4, 32, **SMALL), effort)["contenders"]
    assert set(found) == {"frozen", "engine", "peft", "dense"}
    real = gpu_model.common.forwards

    def others(base, model, targets, routing):
        return real(base, model, targets, routing) | {
            "on": gpu_model.common.engine_forward(model, routing.rows([1, 2, 0]))
        }

    monkeypatch.setattr(gpu_model.common, "forwards", others)
    with pytest.raises(SystemExit, match="nothing is timed"):
        gpu_model.decode_case(base, 3, graph=False)


def test_a_mixture_as_one_adapter_a_row():
    from suite import mixture, peers

    pool = mixture.Pool(16, 4, 576, "cpu")
    indices, weights = pool.pick(5, 3, "uniform")
    x, y = mixture.normal(2, 5, 576, device="cpu")
    A, B = peers.folded(pool, indices, weights)
    assert A.shape == (5, 12, 576) and B.shape == (5, 576, 12)
    got = y + torch.bmm(B, torch.bmm(A, x[:, :, None])).squeeze(2)
    torch.testing.assert_close(got, mixture.exact_update(pool, x, y, indices, weights), atol=1e-4, rtol=1e-4)


def test_a_peer_that_cannot_be_built_is_named(monkeypatch):
    from suite import peers

    def changed(*_):
        raise TypeError("meta_args() missing an argument")

    monkeypatch.setattr(
        peers, "UPDATES", {"json": lambda *_: "update", "csv": changed, "no_such_peer": changed}
    )
    found = list(peers.installed_updates())
    assert found == [("json", "update", ""), ("csv", None, "TypeError: meta_args() missing an argument")]
