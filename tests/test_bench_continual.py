import copy
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_continual

    return bench_continual


@pytest.fixture
def stored():
    return json.loads((BENCHMARKS / "results" / "continual.json").read_text())


def test_stored_targets_are_those_of_the_stored_runs(bench, stored):
    assert bench.targets(stored["runs"]) == stored["targets"]
    assert set(stored["runs"]) == set(stored["commands"]) <= set(bench.PROTOCOLS)


def test_a_worse_score_misses_its_targets(bench, stored):
    runs = {"seq15": copy.deepcopy(stored["runs"]["seq15_shared"])}
    before = {row["what"]: row["holds"] for row in bench.targets(runs)}
    last = runs["seq15"][0]["methods"]["slm"]["average_accuracy"]
    runs["seq15"][0]["methods"]["slm"]["average_accuracy"] = last - 0.01
    after = {row["what"]: row["holds"] for row in bench.targets(runs)}
    assert {what for what in before if before[what] != after[what]} == {
        "seq15: told the task minus no task id"
    }


def test_seeds_that_are_missing_are_run(bench, tmp_path, monkeypatch):
    asked = []

    def learn(command):
        asked.append(command)
        seeds = command[command.index("--seeds") + 1].split(",") if "--seeds" in command else [0]
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(exist_ok=True)
        runs = [{"settings": {"seeds": {"run": int(seed)}}} for seed in seeds]
        (folder / "report.json").write_text(json.dumps({"runs": runs}))
        return 0

    monkeypatch.setattr(bench, "slm_fast", learn)
    assert len(bench.run("seq15", tmp_path, None)) == len(bench.run("seq15", tmp_path, None)) == 1
    assert len(asked) == 1
    for _ in range(2):
        assert len(bench.run("seq15", tmp_path, None, "0,1,2")) == 3
    assert len(asked) == 2 and asked[1][:3] == ["learn", "--benchmark", "seq15"]
    monkeypatch.setattr(bench, "slm_fast", lambda command: 1)
    with pytest.raises(SystemExit, match="all25 failed"):
        bench.run("all25", tmp_path, None)
