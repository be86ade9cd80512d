"""The tuner's search, its judgement and the table that it writes: real kernels, interpreted; the clock alone
is made up."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import DEVICE
from gpu_problem import DTYPE

from slm_fast import dispatch, plan

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(
    dispatch.available()["gpu"] is not None, reason=str(dispatch.available()["gpu"])
)
SMALL = {"features": ((64, 48), (96, 64)), "tokens": (1, 4)}
TILE = {"BLOCK_T": 16, "BLOCK_C": 16, "num_warps": 4, "num_stages": 2}
TWO_PASS = {
    "kernel": "two_pass",
    "pdl": False,
    "splits": 1,
    "shrink": TILE | {"BLOCK_K": 64},
    "expand": TILE | {"BLOCK_N": 64},
}
SHRINK = {
    "splits": 1,
    "pdl": False,
    "forward": TILE | {"BLOCK_K": 64, "BLOCK_S": 256},
    "backward": TILE | {"BLOCK_N": 64, "BLOCK_S": 256},
    "factors": TILE | {"BLOCK_T": 32, "BLOCK_N": 32},
    "coefficients": TILE,
}


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def tune(benchmarks):
    import tune

    return tune


@pytest.fixture
def grid(tune, monkeypatch):
    """A grid of few values, to be filled by a test."""
    import tile_grid

    small = {part: {} for part in tile_grid.GRID if isinstance(tile_grid.GRID[part], dict)}
    small |= {"splits": (), "pdl": ()}
    monkeypatch.setattr(tile_grid, "GRID", small)
    return small


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A function that makes rows the package's table of this device, and loads it."""
    name = plan.architecture_of(torch.cuda.get_device_capability()) if DEVICE == "cuda" else "sm_90"
    plans = json.loads((plan.FOLDER / f"{name}.json").read_text())

    def make(*rows):
        named = {(row["op"], row["phase"]) for row in rows}
        others = [row for row in plans["rows"] if (row["op"], row["phase"]) not in named]
        written = {"architecture": name, "rows": [*copy.deepcopy(rows), *others]}
        (tmp_path / f"{name}.json").write_text(json.dumps(written))
        monkeypatch.setattr(plan, "FOLDER", tmp_path)
        clear()
        return plan.load(name)

    def clear():
        plan.load.cache_clear()
        plan.find.cache_clear()

    yield make
    monkeypatch.undo()
    clear()


def row(op, phase="forward", settings=None, **conditions):
    return {"op": op, "phase": phase, "dtype": "half", **conditions, "tuned": None, "plan": settings}


def clock(cost, seen):
    """A made-up measure: `cost` of a plan. Each trial must really run, and be right."""

    def measure(trials):
        times = {}
        for name, trial in trials.items():
            assert trial.fault() is None
            times[name] = [cost(trial.plan)] * 5
            seen.append(trial.plan)
        return times

    return measure


def tuner_of(tune, table, cost, seen=None, said=None):
    say = said.append if said is not None else lambda text: None
    measure = clock(cost, [] if seen is None else seen)
    return tune.Tuner(table, "A Card", measure, device=DEVICE, dtype=DTYPE, say=say, **SMALL)


def test_finds_the_cheapest_plan(tune, grid, table):
    grid["shrink"] = {"BLOCK_K": (32, 64, 128)}
    grid["expand"] = {"BLOCK_N": (16, 32, 64)}
    grid["splits"] = (1, 2)
    loaded = table(row("mixture", settings=TWO_PASS))
    mine, others = loaded["rows"][0], copy.deepcopy(loaded["rows"][1:])

    def cost(p):
        return 1 + abs(p["shrink"]["BLOCK_K"] - 32) + abs(p["expand"]["BLOCK_N"] - 32) + p["splits"]

    tuner_of(tune, loaded, cost).tune_row(mine)
    assert mine["tuned"] == "A Card"
    want = copy.deepcopy(TWO_PASS)
    want["shrink"]["BLOCK_K"] = want["expand"]["BLOCK_N"] = 32
    assert mine["plan"] == want
    assert loaded["rows"][1:] == others


def test_a_small_or_doubtful_gain_changes_nothing(tune, grid, table):
    grid["expand"] = {"BLOCK_N": (16, 32, 64)}
    loaded = table(row("mixture", settings=TWO_PASS))

    def measure(
        trials,
    ):  # 16: faster by too little; 32: faster in the median, slower in a quarter of the rounds
        def samples(p):
            n = p["expand"]["BLOCK_N"]
            return {16: [0.998] * 8, 32: [0.9] * 5 + [1.1] * 3, 64: [1.0] * 8}[n]

        return {name: samples(trial.plan) for name, trial in trials.items()}

    tuner = tune.Tuner(loaded, "A Card", measure, device=DEVICE, dtype=DTYPE, say=lambda text: None, **SMALL)
    tuner.tune_row(loaded["rows"][0])
    assert loaded["rows"][0]["plan"] == TWO_PASS and loaded["rows"][0]["tuned"] == "A Card"


def test_candidates_that_fail_are_dropped_with_the_reason(tune, grid, table):
    grid["expand"] = {"BLOCK_N": (48,)}  # not a power of two: no kernel
    grid["shrink"] = {
        "BLOCK_K": (1 << 16,),
        "BLOCK_T": (128,),
    }  # too much shared memory; more than max_tokens
    loaded, said, seen = table(row("mixture", settings=TWO_PASS, max_tokens=4)), [], []
    tuner_of(tune, loaded, lambda p: 1.0 - 0.5 * (p != TWO_PASS), seen, said).tune_row(loaded["rows"][0])
    assert loaded["rows"][0]["plan"] == TWO_PASS and not seen
    text = "\n".join(said)
    assert "BLOCK_N=48: dropped" in text and "power of 2" in text
    assert "BLOCK_K=65536: dropped" in text and "shared memory" in text
    assert "BLOCK_T=128: dropped, a tile of more tokens" in text


def test_wrong_results_are_dropped_and_never_timed(tune, grid, table, monkeypatch):
    from slm_fast.kernels import mixture

    grid["expand"] = {"BLOCK_N": (32,)}
    loaded, said, seen = table(row("mixture", settings=TWO_PASS)), [], []
    expand = mixture.expand

    def broken(u, y, *args, tiles, **options):  # a kernel that is wrong in one of its tilings
        expand(2 * u if tiles["BLOCK_N"] == 32 else u, y, *args, tiles=tiles, **options)

    monkeypatch.setattr(mixture, "expand", broken)
    tuner_of(tune, loaded, lambda p: 0.5, seen, said).tune_row(loaded["rows"][0])
    assert any("BLOCK_N=32: dropped, wrong result" in line for line in said)
    assert loaded["rows"][0]["plan"] == TWO_PASS and not seen
    grid["expand"] = {"BLOCK_N": (64,)}
    loaded["rows"][0]["plan"] = tune.tile_grid.changed(TWO_PASS, "expand", "BLOCK_N", 32)
    loaded["rows"][0]["tuned"] = None
    tuner_of(tune, loaded, lambda p: 0.5, seen, said).tune_row(loaded["rows"][0])
    assert "left as it is, the plan fails" in said[-1] and loaded["rows"][0]["tuned"] is None


def test_a_kernel_is_chosen_before_its_tiles(tune, grid, table):
    grid["one_pass"], grid["expand"] = {"BLOCK_N": (32,)}, {"BLOCK_N": (32,)}
    both = TWO_PASS | {"kernel": "one_pass", "one_pass": {"BLOCK_C": 16, "BLOCK_K": 64, "BLOCK_N": 64}}
    loaded = table(row("mixture", settings=both))

    def cost(p):
        return 1.0 + (p["kernel"] == "one_pass") + p["expand"]["BLOCK_N"] / 1000

    tuner_of(tune, loaded, cost).tune_row(loaded["rows"][0])
    found = loaded["rows"][0]["plan"]
    assert (found["kernel"], found["expand"]["BLOCK_N"], found["one_pass"]["BLOCK_N"]) == ("two_pass", 32, 64)


@pytest.mark.parametrize("op", ["norm_shrink", "silu_mul_shrink"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_shrinks(tune, grid, table, op, phase):
    grid["forward"], grid["backward"] = {"BLOCK_K": (32, 64)}, {"BLOCK_N": (32, 64)}
    loaded = table(row(op, phase, SHRINK))
    key = {"forward": "BLOCK_K", "backward": "BLOCK_N"}[phase]
    tuner_of(tune, loaded, lambda p: p[phase][key]).tune_row(loaded["rows"][0])
    assert loaded["rows"][0]["plan"] == tune.tile_grid.changed(SHRINK, phase, key, 32)


def test_rows_of_the_real_tables_have_shapes_that_they_serve(tune):
    for name in ("sm_80", "sm_90", "sm_100"):
        rows = plan.load(name)["rows"]
        for each in rows:
            if each["op"] not in tune.OPS or each["dtype"] != "half":
                continue
            shapes = tune.shapes_of(each, rows)
            assert shapes, tune.label(each)
            for shape in shapes:
                found = plan.find(name, each["op"], each["phase"], False, *tune.lookup(each, shape))
                assert found is each["plan"]
            for part, key, values in tune.tile_grid.steps(each["op"], each["phase"], each["plan"]):
                assert values and (key is None or key in each["plan"][part])


def test_tables_are_written_as_they_are_kept(tune, tmp_path):
    for path in sorted(plan.FOLDER.glob("sm_*.json")):
        written = tmp_path / path.name
        tune.write_table(written, json.loads(path.read_text()))
        assert written.read_text() == path.read_text()


def test_rows_share_the_time_and_are_written_one_by_one(tune, grid, table, tmp_path):
    grid["forward"] = {"BLOCK_K": (32, 64)}
    few = row("norm_shrink", settings=SHRINK, max_tokens=1)
    loaded, said = table(few, row("norm_shrink", settings=SHRINK)), []
    path = tmp_path / "out.json"
    tuner = tuner_of(tune, loaded, lambda p: p["forward"]["BLOCK_K"], said=said)
    assert tune.tune_rows(tuner, ("norm_shrink",), 0.0, path, False) == [] and not path.exists()
    done = tune.tune_rows(tuner, ("norm_shrink",), float("inf"), path, False)
    first, second = json.loads(path.read_text())["rows"][:2]
    assert len(done) >= 2 and first["tuned"] == second["tuned"] == "A Card"
    assert first["plan"]["forward"]["BLOCK_K"] == second["plan"]["forward"]["BLOCK_K"] == 32
    assert tune.tune_rows(tuner, ("norm_shrink",), float("inf"), path, False) == []


def test_linear_rows_reproduce_the_choices(benchmarks):
    import linear_choice

    f, s, m = "fused_linear", "segment_linear", "mixture"
    choices = {
        16: {16: f, 64: f, 256: f},
        64: {16: f, 64: f, 256: m},
        256: {16: f, 64: f, 256: m},
        None: {16: m, 64: f, 256: s},
    }
    rows = linear_choice.rows_of(choices, "forward", "A Card")
    assert len(rows) == 6 and all(row["tuned"] == "A Card" and row["dtype"] == "half" for row in rows)

    def chosen(tokens, columns):
        return next(r["plan"]["kernel"] for r in rows if plan.fits(r, False, tokens, columns, 8, 8))

    for bound, by_columns in choices.items():
        for columns, op in by_columns.items():
            assert chosen(bound or 5000, columns) == chosen((bound or 500) - 1, columns - 1) == op
    assert chosen(1, 9999) == f and chosen(9999, 9999) == s

    table = {
        "rows": [
            {"op": "linear", "phase": "forward", "dtype": "half", "tuned": None, "plan": {"kernel": f}},
            {"op": "linear", "phase": "forward", "tuned": None, "plan": {"kernel": m}},
            {"op": "linear", "phase": "segments", "tuned": None, "plan": {"kernel": s}},
        ]
    }
    linear_choice.replace_rows(table, "forward", rows)
    assert table["rows"][:6] == rows and len(table["rows"]) == 8 and "dtype" not in table["rows"][6]


def test_linear_is_chosen_by_measurement(benchmarks, table):
    import linear_choice

    loaded = table(
        {"op": "linear", "phase": "segments", "tuned": None, "plan": {"kernel": "segment_linear"}},
        {"op": "linear", "phase": "forward", "tuned": None, "plan": {"kernel": "mixture"}},
    )

    def measure(contenders, layers):  # fused_linear wins at one token; at more it gains too little
        times = {"mixture": 10.0, "segment_linear": 8.0}
        tokens = len(contenders[0].run(0)[0])
        times["fused_linear"] = 5.0 if tokens == 1 else 9.9
        return {c.name: [times[c.name]] * 5 for c in contenders}

    small = {
        "forward": {"at": {1: (1, 1), None: (3, 1)}, "ops": ("mixture", "fused_linear")},
        "segments": {"at": {None: (1, 64)}, "ops": ("mixture", "segment_linear", "fused_linear")},
    }
    options = {"dtype": DTYPE, "device": DEVICE, "say": lambda text: None}
    done = linear_choice.tune(
        loaded, "A Card", measure=measure, features=(64, 48), columns=(16, 32), phases=small, **options
    )
    assert done == ["linear forward", "linear segments"]
    sizes = (64, 48)
    names = [
        plan.find(loaded["architecture"], "linear", phase, False, tokens, 16, *sizes)["kernel"]
        for phase, tokens in (("forward", 1), ("forward", 3), ("segments", 64))
    ]
    assert names == ["fused_linear", "mixture", "segment_linear"]
