import copy
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DECODE = "cpu_decode_smol"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compare

    return compare


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


WITHOUT_COSTS = ("continual", "layers_minilm", "routing_all25", "routing_bert5", "transfer")


@pytest.mark.parametrize("name", sorted(p.stem for p in RESULTS.glob("*.json")))
def test_every_result_file_is_no_worse_than_itself(tool, name):
    result = load(name)
    if name in WITHOUT_COSTS:
        with pytest.raises(ValueError, match="no case in common"):
            tool.compare(result, result)
        return
    lines, bad = tool.compare(result, result)
    assert not bad and lines and all(line.startswith("      ") for line in lines)
    assert len(lines) >= len(result.get("suite", result)["results"]) and tool.lost(result, result) == []


def slower(factor, contender, everything=False):
    result = copy.deepcopy(load(DECODE))
    record = result["results"][0]
    for name in record["milliseconds"] if everything else (contender,):
        record["milliseconds"][name] *= factor
    return result


def test_what_is_slower_than_the_noise_is_found(tool):
    record = load(DECODE)["results"][0]
    noise = sum(record["quartiles"][n] / record["milliseconds"][n] for n in ("on", "frozen"))  # of both runs
    lines, bad = tool.compare(load(DECODE), slower(1 + noise + 0.05, "on"))
    assert bad and lines[0].startswith("WORSE ") and ": on  +" in lines[0] and "rows=1" in lines[0]
    assert sum(line.startswith("WORSE") for line in lines) == 1
    assert not tool.compare(load(DECODE), slower(1 + 0.8 * max(noise, 0.03), "on"))[1]
    assert not tool.compare(load(DECODE), slower(0.5, "on"))[1]
    assert not tool.compare(load(DECODE), slower(3.0, "peft"))[1]  # a peer's own affair
    assert not tool.compare(load(DECODE), slower(3.0, "on", everything=True))[1]  # a slower machine


def test_memory_and_failures(tool):
    before, after = load("cpu_memory_smol"), load("cpu_memory_smol")
    after["results"][0]["contenders"]["on"]["above_frozen"] *= 1.2
    assert tool.compare(before, after)[1] and not tool.compare(after, before)[1]
    gpu = {"group": "decode 1", "contender": "mixture", "ratio": 1.02, "added_quartiles": [1.0, 3.0]}
    failed = {"group": "decode 1", "contender": "mixture", "error": "wrong"}
    assert tool.compare({"bench": {"results": [gpu]}}, {"bench": {"results": [failed]}})[1]
    assert not tool.compare({"results": [failed]}, {"results": [gpu]})[1]
    assert not tool.compare({"results": [gpu]}, {"results": [gpu | {"ratio": 1.03}]})[1]
    assert tool.compare({"results": [gpu]}, {"results": [gpu | {"ratio": 1.08}]})[1]


def test_the_command(tool, tmp_path, capsys):
    path = tmp_path / "after.json"
    path.write_text(json.dumps(slower(9.0, "on")))
    assert tool.main([str(RESULTS / f"{DECODE}.json"), str(path)]) == 1
    assert "WORSE" in capsys.readouterr().out
    assert tool.main([str(RESULTS / f"{DECODE}.json")] * 2) == 0
    path.write_text("{}")
    assert tool.main([str(RESULTS / f"{DECODE}.json"), str(path)]) == 2
    assert "no case in common" in capsys.readouterr().err
    for unreadable in ("none.json", "list.json", "half.json"):
        (tmp_path / "list.json").write_text("[]")
        (tmp_path / "half.json").write_text('{"results":')
        assert tool.main([str(path), str(tmp_path / unreadable)]) == 3
        assert "no case in common" not in capsys.readouterr().err
    assert tool.main([str(RESULTS / "nvidia_h100_80gb_hbm3.json")] * 2) == 0


def test_a_case_that_is_gone_is_worse_where_the_others_of_its_group_were_run(tool):
    one = load(DECODE)
    one["results"] = one["results"][:1]
    lines, bad = tool.compare(load(DECODE), one)
    groups = [record["targets"] for record in load(DECODE)["results"]]
    same = groups.count(groups[0]) - 1
    assert bad and sum(line.startswith("WORSE") and "is gone" in line for line in lines) == 2 * same
    assert sum("only before" in line for line in lines) == 2 * (len(groups) - 1 - same)
    assert not tool.compare(one, load(DECODE))[1]
    gpu = [
        {"group": group, "contender": name, "ratio": 1.02, "added_quartiles": [1.0, 3.0]}
        for group in ("decode 1", "decode 8")
        for name in ("mixture", "fused")
    ]
    lines, bad = tool.compare({"bench": {"results": gpu}}, {"bench": {"results": gpu[:1]}})
    assert bad and lines[0] == "WORSE group=decode 1: fused  is gone"
    assert sum("only before" in line for line in lines) == 2  # a group left out for lack of time
    failed = {"group": "decode 8", "contender": "all", "error": "out of memory"}
    lines, _ = tool.compare({"bench": {"results": gpu}}, {"bench": {"results": [*gpu[:2], failed]}})
    assert sum("decode 8" in line and line.startswith("WORSE") for line in lines) == 2


def test_a_gpu_check_is_compared_with_its_suite_and_its_ops(tool, tmp_path, capsys):
    before, after = load("nvidia_h100_80gb_hbm3"), load("nvidia_h100_80gb_hbm3")
    for name, result in (("before", before), ("after", after)):
        ops = {"group": "decode 1", "contender": "mixture", "ratio": 1.02, "added_quartiles": [1.0, 3.0]}
        result["bench"] = {"results": [ops]}
        result["suite"]["failed"] = {} if name == "before" else {"model": "RuntimeError: wrong result"}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    lines, bad = tool.compare(before, after)
    assert not bad and sum("group=decode 1: mixture" in line for line in lines) == 1 and len(lines) == 10
    assert tool.main([str(tmp_path / f"{name}.json") for name in ("before", "after")]) == 1
    assert "WORSE model failed: RuntimeError: wrong result" in capsys.readouterr().out
    frozen = after["suite"]["results"][0]["contenders"]["frozen"]
    for end in ("", "_low", "_high"):
        frozen[f"ratio{end}"] /= 2
    lines = tool.compare(before, after)[0]
    for line, which in zip(lines, ("time of off", "time"), strict=False):
        assert line.startswith(f"WORSE model, decode, llama-2-7b, 1 rows: {which} over frozen  +100.0%")
    del after["suite"]["results"][1]
    assert any(line.startswith("WORSE") and "is gone" in line for line in tool.compare(before, after)[0])
    after["suite"]["quick"] = False
    assert not any("is gone" in line for line in tool.compare(before, after)[0])


def test_unlike_schemas_are_refused(tool, tmp_path, capsys):
    newer = load("suite_cpu_avx2") | {"schema": 2}
    path = tmp_path / "newer.json"
    path.write_text(json.dumps(newer))
    assert tool.main([str(RESULTS / "suite_cpu_avx2.json"), str(path)]) == 3
    assert "schema 1 cannot be compared with schema 2" in capsys.readouterr().err
    checked = load("nvidia_h100_80gb_hbm3")
    with pytest.raises(ValueError, match="schema 1 cannot"):
        tool.compare(checked, checked | {"suite": checked["suite"] | {"schema": 3}})


def changed(section, kind, change):
    """The suite's stored result, with one of its cases changed."""
    result = load("suite_cpu_avx2")
    found = (r for r in result["results"] if r["section"] == section and r["axes"].get("kind") == kind)
    change(next(found))
    return result


def test_latencies_pools_refreshes_and_peaks_are_compared(tool):
    def later(record):
        record["contenders"]["on"]["first_token_95"] *= 3

    def dearer(record):
        for end in ("", "_low", "_high"):
            record["contenders"]["10,000 entries"][f"ratio{end}"] *= 3

    def slow(record):
        for end in ("", "_low", "_high"):
            record["contenders"]["torch"][f"ratio{end}"] /= 3

    before = load("suite_cpu_avx2")
    for section, kind, change, words in (
        ("serve", None, later, "first token, 95%, over transformers"),
        ("mixture", "flat", dearer, "time of 10,000 entries over 12 entries"),
        ("search", "refresh", slow, "time over torch"),
    ):
        lines, bad = tool.compare(before, changed(section, kind, change))
        assert bad and words in lines[0] and sum(line.startswith("WORSE") for line in lines) == 1
        assert not tool.compare(changed(section, kind, change), before)[1]

    def with_peak(size):
        return changed("mixture", "update", lambda r: r["contenders"]["slm_fast"].update(peak_bytes=size))

    lines, bad = tool.compare(with_peak(100_000_000), with_peak(130_000_000))
    assert bad and "peak memory" in lines[0]
    assert not tool.compare(with_peak(0), with_peak(1_000_000))[1]  # below what can be told


def test_a_peer_that_is_not_installed_any_more_is_not_a_lost_case(tool):
    def without(record):
        record["contenders"]["torch"] = {"error": "not installed"}

    lines, bad = tool.compare(load("suite_cpu_avx2"), changed("search", None, without))
    assert not bad and any("time over faiss flat" in line for line in lines)


def of_ours(result):
    """(record, contender) of all of ours that the suite times, beside the first of each record."""
    for record in result["results"]:
        flat = record["axes"].get("kind") == "flat"
        for name, found in record["contenders"].items():
            ours = flat or name in ("slm_fast, no codes", "off", "on eager", "in the prefill")
            if ours and "seconds" in found and name != record["ours"]:
                yield record, name


@pytest.mark.parametrize("file", ["suite_cpu_avx2", "nvidia_h100_80gb_hbm3"])
def test_every_contender_of_ours_is_compared(tool, file):
    before, after = load(file), load(file)
    changed = list(of_ours(after.get("suite", after)))
    for record, name in changed:
        for key in ("seconds", "low", "high", "ratio", "ratio_low", "ratio_high"):
            record["contenders"][name][key] *= 10
    lines, bad = tool.compare(before, after)
    worse = [line for line in lines if line.startswith("WORSE")]
    assert bad and len(worse) == len(changed) > 4
    assert all(any(f"{r['case']}: time of {name} over" in line for line in worse) for r, name in changed)
    assert not tool.compare(after, before)[1]
    for record in (found := load(file)).get("suite", found)["results"]:
        for name in ("peft", "dense", "merged", "faiss hnsw", "frozen fp32"):
            for key in ("seconds", "ratio", "ratio_low", "ratio_high"):
                if key in record["contenders"].get(name, {}):
                    record["contenders"][name][key] *= 10
    assert not tool.compare(before, found)[1]


def test_a_contender_of_ours_that_fails_or_is_gone_is_worse(tool):
    def of_decoding(change):
        result = load("suite_cpu_avx2")
        change(next(r for r in result["results"] if r["case"] == "decode, smol, 8 rows")["contenders"])
        return tool.compare(load("suite_cpu_avx2"), result)

    lines, bad = of_decoding(lambda found: found.update(off={"error": "wrong"}))
    assert bad and lines[0] == "WORSE model, decode, smol, 8 rows: time of off over frozen  failed"
    lines, bad = of_decoding(lambda found: found.pop("off"))
    assert bad and "WORSE model, decode, smol, 8 rows: time of off over frozen  is gone" in lines
    lines, bad = of_decoding(lambda found: found.pop("peft"))
    assert not bad


def test_pools_of_all_sizes_may_become_slower_together(tool):
    def slow(record):
        for found in record["contenders"].values():
            for key in ("seconds", "low", "high"):
                found[key] *= 10

    lines, bad = tool.compare(load("suite_cpu_avx2"), changed("mixture", "flat", slow))
    assert bad and "time over a product's" in lines[0]
    assert sum(line.startswith("WORSE") for line in lines) == 1


def test_modes_are_those_of_sections(tool):
    """A GPU's file of one section in quick mode, before and after `quick` was kept for each section."""
    before, after = load("nvidia_h100_80gb_hbm3"), load("nvidia_h100_80gb_hbm3")
    del after["suite"]["results"][1]
    after["suite"]["quick"], after["suite"]["seconds"]["search"] = {"model": True, "search": False}, 1.0
    assert tool.compare(before, after)[1] and tool.same_machine(before, after)
    after["suite"]["quick"]["model"] = False
    assert not tool.compare(before, after)[1] and not tool.same_machine(before, after)
    after["suite"]["quick"]["model"], after["suite"]["machine"]["device"] = True, "cpu"
    assert not tool.compare(before, after)[1]


def test_the_noise_of_a_median_shrinks_with_its_rounds(tool):
    def grown(rounds):
        before, after = load("suite_cpu_avx2"), load("suite_cpu_avx2")
        for result, ratio in ((before, 3.0), (after, 2.6)):
            contenders = result["results"][0]["contenders"]
            spread = {"ratio_low": 0.95 * ratio, "ratio": ratio, "ratio_high": 1.05 * ratio, "rounds": rounds}
            contenders["torch"] |= spread
        lines, bad = tool.compare(before, after)
        (line,) = (line for line in lines if "100 keys x 384 float32, 1 queries: time over torch" in line)
        return line.startswith("WORSE"), bad

    assert grown(40) == (True, True) and grown(4) == (False, False)  # 15.4% slower, noise 6.3% and 20%


def test_what_could_not_have_been_seen_is_counted(tool):
    lines, _ = tool.compare(load("suite_cpu_avx2"), load("suite_cpu_avx2"))
    allowed = [float(line.rpartition("noise ")[2].removesuffix("%)")) for line in lines[:-1]]
    blind = sum(noise > 20 for noise in allowed)
    assert lines[-1] == f"      {blind} of {len(allowed)} compared could only have shown a growth beyond 20%"
    assert 0 < blind < len(allowed)


def test_sections_that_the_stored_result_lacks_are_named(tool, tmp_path, capsys):
    before, after = load("nvidia_h100_80gb_hbm3"), load("nvidia_h100_80gb_hbm3")
    after["suite"]["seconds"]["search"] = 1.0
    after["bench"] = {"results": [{"group": "decode 1", "contender": "all", "error": "out of memory"}]}
    found = tool.without_before(before, after)
    assert found[0] == "UNCOMPARED bench: not run before" and found[2] == "UNCOMPARED search: not run before"
    assert found[1].startswith("UNCOMPARED model: failed before, RuntimeError: ") and len(found) == 3
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, result in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(result))
    assert tool.main([str(path) for path in paths]) == 0
    assert "UNCOMPARED search: not run before" in capsys.readouterr().out
    before["suite"]["failed"] = {}
    assert tool.without_before(before, before) == []
