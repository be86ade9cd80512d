import copy
import json
from pathlib import Path

import pytest
from test_suite_cases import a_case

from slm_fast.cli import main as slm_fast

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


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
        for keys in (1000, 100_000, 1_000_000)
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
    assert rows[-1]["reached"] == pytest.approx(1 - 0.384)  # 384 bytes a key in a microsecond, of 1 GB/s
    rows = search.targets(a_result(1.4)["results"], result["ceilings"])
    assert [row["holds"] for row in rows[:2]] == [False, False]


def test_growth_is_of_all_sizes_and_must_be_linear_at_the_bandwidth():
    """No less, and no more, which is not possible."""
    from suite import search

    def judged(factor, bend=1.0):
        records = a_result()["results"]
        records.append(copy.deepcopy(records[-1]))
        records[-1]["axes"]["keys"], records[-1]["bytes"] = 10_000_000, 3_840_000_000
        for record in records:
            record["contenders"]["slm_fast"]["seconds"] = 5e-5 + factor * record["bytes"] / 1e9
        records[2]["contenders"]["slm_fast"]["seconds"] *= bend
        skipped = records[-1] | {"bytes": None, "contenders": {"slm_fast": {"error": "no memory"}}}
        line = search.growth([*records, skipped])
        rows = search.targets(records, {"read_bytes_per_second": 1e9})[-2:]
        assert [row["reached"] for row in rows] == [
            pytest.approx(abs(line["bytes_per_second"] / 1e9 - 1)),
            line["residual"],
        ]
        json.dumps(rows)
        return line, [row["holds"] for row in rows]

    line, holds = judged(1.05)
    assert holds == [True, True] and line["residual"] == pytest.approx(0, abs=1e-6)
    assert line["seconds_per_key"] == pytest.approx(1.05 * 384e-9) and line["to_keys"] == 10_000_000
    assert judged(1.2)[1] == [False, True] and judged(0.8)[1] == [False, True]
    line, holds = judged(1.05, bend=1.5)
    assert holds[1] is False and line["residual"] > 0.1


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
    for part in ("data:image/svg+xml", "&lt;no&gt; model", "&lt;none&gt;", "100000 keys", ">2.00<", "3.00"):
        assert part in text, part
    assert "nan" not in text.split("</style>")[1].lower().split("data:image")[0]


@pytest.mark.parametrize(
    "quick, words",
    [
        (True, ", quick"),
        (False, ""),
        ({"model": False, "search": True}, ", quick: search"),
        ({"model": False}, ""),
    ],
)
def test_the_page_says_what_was_quick(tmp_path, quick, words):
    from suite import page

    text = page.write(a_result() | {"quick": quick, "results": []}, tmp_path).read_text()
    assert f"<h1>slm_fast benchmark{words}</h1>" in text


def test_results_are_compared():
    import compare

    lines, bad = compare.compare(a_result(), a_result())
    assert not bad and len(lines) == 7 and "0 of 6 compared" in lines[-1]
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
    assert [row["wanted"] for row in result["targets"]] == ["x", "<= 300"]  # the mode's time, of all sections
    assert 0 < result["targets"][1]["reached"] < 300 and (tmp_path / "suite.html").is_file()
    assert "FAILED: RuntimeError: out of luck" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_an_error(monkeypatch, capsys):
    from suite import command

    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    assert command.main(["search", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "slm-fast bench: there is no CUDA device here\n"


def test_results_are_compared_by_the_command(capsys, tmp_path):
    stored = str(ROOT / "benchmarks" / "results" / "cpu_decode_smol.json")
    assert slm_fast(["bench", "compare", stored, stored, "--least", "5"]) == 0
    assert "noise" in capsys.readouterr().out
    assert slm_fast(["bench", "compare", stored, str(tmp_path / "none.json")]) == 3


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
