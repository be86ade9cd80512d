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


@pytest.mark.parametrize("name", [p.stem for p in RESULTS.glob("cpu_*.json")])
def test_every_result_file_is_no_worse_than_itself(tool, name):
    lines, bad = tool.compare(load(name), load(name))
    assert not bad and lines and all(line.startswith("      ") for line in lines)
    assert len(lines) >= len(load(name)["results"])


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
    assert tool.main([str(path), str(tmp_path / "none.json")]) == 2
    one = load(DECODE)
    one["results"] = one["results"][:1]
    lines, _ = tool.compare(load(DECODE), one)
    assert sum("only before" in line for line in lines) == 2 * (len(load(DECODE)["results"]) - 1)
