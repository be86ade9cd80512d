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


def test_a_clock_of_cuda_says_what_was_a_graph(monkeypatch):
    from suite import command, memory
    from suite.cases import Case, Effort, contenders_of, measure

    class Replayed:
        replay = object()

        def __call__(self):
            return "ours"

    clock = Recorded({"ours": [1.0] * 4, "peer": [1.0] * 4})
    clock.name = "events"
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(memory.torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(memory.torch.cuda, name, lambda: 7)
    runs = contenders_of({"ours": Replayed(), "peer": lambda: "peer"})
    record = measure(Case("s", "c", {}, runs, "ours"), Effort(3, 3, 0.0), clock)
    assert [record["contenders"][name]["graph"] for name in ("ours", "peer")] == [True, False]
    printed = list(command.lines(record, a_result()["ceilings"]))
    assert "graph" in printed[1] and "eager" in printed[2] and "peak 0 B" in printed[1]


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
    assert kinds == {"update", "flat", "layer", "step", "layer step"}
    names = [contender.name for contender in case.contenders]
    assert names == ["frozen", "slm_fast", "torch", "dense", "peft"]
    for contender in case.contenders[1:]:
        right = contender.run(0)
        for wrong in range(4):  # y, dx, dA, dB of a step
            broken = [t * 1.001 if i == wrong else t for i, t in enumerate(right)]
            assert "wrong result" in contender.check(broken), contender.name


def test_full_mode_has_prefill_of_popular_entries_and_layers_of_many_tokens(monkeypatch):
    from suite import mixture

    built = []
    for name in ("update_case", "layer_case", "step_case", "layer_step_case", "flat_case"):
        monkeypatch.setattr(mixture, name, lambda *args, name=name: built.append((name, *args)))
    list(mixture.cases(False, "cpu"))
    prefill = {args[4:7:2] for args in built if args[0] == "update_case" and args[2] == 128 and args[1] == 8}
    assert prefill == {(8, "distinct"), (8, "zipf"), (8, "identical"), (64, "distinct")}
    assert {args[3] for args in built if args[0] == "layer_case"} == {1, 128}
    assert len({args for args in built if args[0] == "update_case"}) == sum(
        a[0] == "update_case" for a in built
    )
    monkeypatch.undo()
    for case in (mixture.layer_case(3, "cpu", 16), mixture.update_case(2, 8, 16, 64, 2, "identical", "cpu")):
        for contender in case.contenders:
            assert contender.check(contender.run(0)) is None, (case.name, contender.name)


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


def quiet(monkeypatch, sections, commit="abc"):
    """The command with these sections on the machine of `a_result`."""
    from suite import command, machine

    monkeypatch.setattr(command, "SECTIONS", sections)
    monkeypatch.setattr(machine, "ceilings", lambda device: a_result()["ceilings"])
    monkeypatch.setattr(machine, "describe", lambda device: a_result()["machine"] | {"commit": commit})
    monkeypatch.setattr(machine, "line", lambda *_: "a machine")
    return command


class Section:
    """Of one case with that name."""

    def __init__(self, name, reason=None):
        self.name, self.reason = name, reason

    def unavailable(self, device):
        return self.reason

    def records(self, *_):
        yield a_result()["results"][0] | {"section": self.name}

    def targets(self, records, ceilings):
        return [dict(what=self.name, reached=float(len(records)), wanted="x", holds=True)]


def test_other_sections_are_kept_on_the_same_machine_commit_and_mode(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    sections = {"search": Section("search"), "mixture": Section("mixture")}

    def run(*words, commit="abc"):
        command = quiet(monkeypatch, sections, commit)
        assert command.main([*words, "--output", str(tmp_path)]) == 0
        result = json.loads((tmp_path / "suite.json").read_text())
        assert [target["what"] for target in result["targets"]] == list(result["seconds"])
        return [record["section"] for record in result["results"]]

    assert run("search", "--quick") == ["search"]
    assert run("mixture", "--quick") == ["search", "mixture"]
    assert run("search", "--quick") == ["mixture", "search"]  # its own results are new
    assert run("search") == ["search"]  # another mode
    assert run("mixture", commit="def") == ["mixture"]
    assert run("search", commit="def+") == ["search"]  # nobody knows which changes
    assert run("mixture", commit="def+") == ["mixture"]


def test_ours_has_its_rates_in_the_result_and_a_section_its_reason(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    command = quiet(monkeypatch, {"search": Section("search"), "serve": Section("serve", "no <CUDA> here")})
    assert command.main(["--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "suite.json").read_text())
    ours = result["results"][0]["contenders"]["slm_fast"]
    assert ours["bytes_share"] == pytest.approx(0.384) and "operations_per_second" in ours
    assert result["skipped"] == {"serve": "no <CUDA> here"} and "serve" not in result["seconds"]
    assert "SKIPPED: no <CUDA> here" in capsys.readouterr().out
    text = (tmp_path / "suite.html").read_text()
    assert "no &lt;CUDA&gt; here" in text and "38% of memory&#x27;s" in text


def test_serving_says_why_cuda_has_none():
    from suite import serve
    from suite.cases import QUICK

    assert serve.unavailable("cpu") is None and "CPU" in serve.unavailable("cuda")
    assert list(serve.records(True, "cuda", QUICK)) == []


def test_a_page_of_a_stored_result(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from suite import command

    for name, drawn in (
        ("nvidia_h100_80gb_hbm3", {"decode_rows_llama-2-7b"}),
        ("suite_cpu_avx2", {"search_keys", "mixture_pool", "prefill_tokens_smol_1", "prefill_tokens_smol_8"}),
    ):
        stored, folder = ROOT / "benchmarks" / "results" / f"{name}.json", tmp_path / name
        assert command.main(["--page", str(stored), "--output", str(folder)]) == 0
        assert drawn <= {path.stem for path in folder.glob("*.png")}
        assert (folder / "suite.html").is_file() and not (folder / "suite.json").exists()
    assert command.main(["--page", str(tmp_path / "none.json")]) == 2
    (tmp_path / "other.json").write_text('{"schema": 99}')
    assert command.main(["--page", str(tmp_path / "other.json")]) == 2
    assert "is no result of the suite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["search", "--page", str(stored)])


def test_first_tokens_are_drawn_over_the_load():
    pytest.importorskip("matplotlib")
    from suite import page

    (plot,) = (plot for plot in page.PLOTS if plot.section == "serve")
    records = []
    for load in (None, 0.9, 0.25):
        axes = {"arrivals": "at once"} if load is None else {"arrivals": "poisson", "load": load}
        tail = {"first_token_50": 0.1, "first_token_95": 0.4, "first_token_95_low": 0.3}
        contenders = {name: tail | {"first_token_95_high": 0.5} for name in ("transformers", "on")}
        records.append({"section": "serve", "axes": axes, "bytes": None, "contenders": contenders})
    found = page.chosen(records, plot)
    assert [record["axes"]["load"] for record in found] == [0.25, 0.9]
    figure = page.draw(plot, found, a_result()["ceilings"])
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == [f"{name}, {share}%" for name in ("transformers", "on") for share in (50, 95)]
    x, y, (below, above) = page.curve(plot, found, "on", "first_token_95")
    assert (x, y, below[0], above[0]) == ([0.25, 0.9], [400.0, 400.0], pytest.approx(100), pytest.approx(100))


def test_pools_of_all_sizes_have_a_floor():
    from suite import mixture, page

    case = mixture.flat_case(8, "cpu")
    assert case.bytes == 4 * (2 * 12 * 8 * 576 + 4 * 8 * 576) and case.operations == 4 * 8 * 2 * 8 * 576
    record = {"axes": case.axes, "bytes": case.bytes, "operations": case.operations, "dtype": case.dtype}
    record |= {"contenders": {contender.name: {} for contender in case.contenders}}
    floors = {page.floor(pool, a_result()["ceilings"]) for pool in page.of_pools([record])}
    assert len(floors) == 1 and floors.pop() == pytest.approx(case.bytes / 1e9)


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


def test_results_are_compared_by_the_command(capsys, tmp_path):
    stored = str(ROOT / "benchmarks" / "results" / "cpu_decode_smol.json")
    assert slm_fast(["bench", "compare", stored, stored, "--least", "5"]) == 0
    assert "noise" in capsys.readouterr().out
    assert slm_fast(["bench", "compare", stored, str(tmp_path / "none.json")]) == 2


def test_the_help_says_what_sections_are(capsys):
    with pytest.raises(SystemExit):
        slm_fast(["bench", "--help"])
    text = capsys.readouterr().out
    assert "[]" not in text and "compare BEFORE.json AFTER.json" in text and "keeps" in text
    for words in ("search ", "mixture ", "model ", "serve ", "quality ", "faiss", "peft", "vllm", "sglang"):
        assert f"  {words}" in text or words in text


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

    def others(base, model, targets, routing, wrong):
        return real(base, model, targets, routing, wrong) | {
            "on": gpu_model.common.engine_forward(model, routing.rows([1, 2, 0]))
        }

    monkeypatch.setattr(gpu_model.common, "forwards", others)
    case = gpu_model.decode_case(base, 3, graph=False)
    with pytest.raises(RuntimeError, match="wrong logits.*nothing is timed"):
        measure(case, effort)


@pytest.mark.parametrize("how", ["wrong", "raises", "cannot be built"])
@pytest.mark.parametrize("peer", ["peft", "dense"])
def test_a_peer_that_fails_in_a_model_has_its_words(monkeypatch, peer, how):
    from suite import gpu_model
    from suite.cases import Effort, measure

    real = gpu_model.common.forwards

    def others(base, model, targets, routing, wrong):
        found = real(base, model, targets, routing, wrong)
        good = found.pop(peer)

        def broken(**inputs):
            if how == "raises":
                raise ValueError("no such kernel")
            out = good(**inputs)
            out.logits = -out.logits
            return out

        if how == "cannot be built":
            with gpu_model.common.excused(peer, wrong):
                raise ValueError("no such adapter")
        else:
            found[peer] = broken
        return found

    monkeypatch.setattr(gpu_model.common, "forwards", others)
    base = gpu_model.make_base("cpu", **SMALL)
    for case in (gpu_model.decode_case(base, 3, graph=False), gpu_model.prefill_case(base, 3, 20)):
        found = measure(case, Effort(2, 2, 0.0))["contenders"]
        words = {"wrong": "wrong logits", "raises": "no such kernel", "cannot be built": "no such adapter"}
        assert words[how] in found[peer]["error"] and "seconds" not in found[peer]
        assert all("seconds" in numbers for name, numbers in found.items() if name != peer)


def test_logits_are_judged_without_a_broken_peer():
    import contenders

    mixed, frozen = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    good = {"frozen": frozen, "off": frozen, "on": mixed, "peft": mixed, "dense": mixed[:1]}
    contenders.verify(good, mixed, frozen)
    for name in ("on", "peft", "off", "dense"):
        with pytest.raises(SystemExit, match="nothing is timed"):
            contenders.verify(good | {name: -good[name]}, mixed, frozen)
    wrong = {}
    contenders.verify(good | {"peft": -mixed, "on": -mixed}, mixed, frozen, wrong)
    assert set(wrong) == {"peft", "on"}  # a peer that is wrong excuses nobody
    with pytest.raises(ValueError):
        contenders.answers({"peft": lambda: [].index(1)})
    with pytest.raises(SystemExit, match="frozen model"):
        contenders.verify({"on": mixed}, mixed, frozen, {})


def test_a_wrong_training_step_of_a_peer_has_its_words(monkeypatch):
    import bench_training
    from suite import gpu_model

    def halved(layer, x, A, B, picks, weights, real=bench_training.dense_mixture):
        return real(layer, x, A, B, picks, 0.5 * weights)

    monkeypatch.setattr(bench_training, "dense_mixture", halved)
    case = gpu_model.step_case("cpu", 4, 32, **SMALL)
    checks = {contender.name: contender.check for contender in case.contenders}
    assert "wrong losses or gradients" in checks["dense"](None)
    assert checks["engine"] is None and checks["peft"] is None


def test_the_first_token_begins_with_texts(minilm):
    """A small model whose tokenizer is a list of words."""
    from conftest import word_tokenizer
    from suite import first_token, gpu_model
    from suite.cases import Effort, measure

    words = ["[PAD]", "[EOS]", "[UNK]", *sorted(set(first_token.VOCABULARY))]
    tokenizer = word_tokenizer(words, padding_side="left")
    base = gpu_model.make_base("cpu", **SMALL).float()
    model = first_token.make_model(base, 16)
    case, paths = first_token.case(base, model, tokenizer, 3)
    record = measure(case, Effort(2, 2, 0.0))
    assert set(record["contenders"]) == {"frozen", "on"}
    taken = paths["on"].seconds
    assert {len(seconds) for seconds in taken.values()} == {len(taken["prefill"])} and len(taken) == 4
    assert set(paths["frozen"].seconds) == {"tokenizer", "prefill"}
    numbers = paths["on"].numbers()
    assert numbers["encoder_seconds"] > 1e-3  # it encodes at every call
    assert sum(numbers.values()) == pytest.approx(record["contenders"]["on"]["seconds"], rel=0.5)
    checks = {contender.name: contender.check for contender in case.contenders}
    frozen, mixed = paths["frozen"](), paths["on"]()
    assert checks["frozen"](frozen) is None and checks["on"](mixed) is None
    assert "wrong logits" in checks["on"](frozen) and "wrong logits" in checks["on"](mixed[[1, 2, 0]])


def test_the_first_token_routed_in_the_prefill():
    from conftest import word_tokenizer
    from suite import first_token, gpu_model
    from suite.cases import Effort, measure

    words = ["[PAD]", "[EOS]", "[UNK]", *sorted(set(first_token.VOCABULARY))]
    tokenizer = word_tokenizer(words, padding_side="left")
    base = gpu_model.make_base("cpu", **SMALL | dict(num_hidden_layers=6)).float()
    model = first_token.make_model(base, 16, tokenizer)
    case, paths = first_token.case(base, model, tokenizer, 3)
    assert case.name.endswith("routed in the prefill")
    found = measure(case, Effort(2, 2, 0.0))["contenders"]
    assert set(found) == {"frozen", "on", "in the prefill"} and all("seconds" in c for c in found.values())
    assert set(paths["in the prefill"].seconds) == {"tokenizer", "prefill"}
    check = case.contenders[2].check
    assert check(paths["in the prefill"]()) is None and "wrong logits" in check(paths["frozen"]())
    model(**tokenizer(["the river was"], return_tensors="pt"))
    assert "other entries" in check(paths["on"]())


def test_small_cases_wait_for_the_device(monkeypatch):
    import test_cases

    done = []
    monkeypatch.setattr(test_cases.torch.cuda, "synchronize", lambda: done.append("waited"))
    call = test_cases.finished(done.append, 2, "cuda")
    call(), call(), call()
    assert done == [0, "waited", 1, "waited", 0, "waited"]
    test_cases.finished(done.append, 2, "cpu")()
    assert done[-1] == 0


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
