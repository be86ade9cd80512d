"""The runner of `make gpu-check`, with real small processes; what needs a GPU is what it runs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_check

    return gpu_check


@pytest.fixture
def check(gpu_check, tmp_path):
    return gpu_check.Check(tmp_path, "a_card", tmp_path / "a_card.log")


def python(code):
    return [sys.executable, "-c", code]


def by_status(outcome):
    return ("ok" if outcome.status == 0 else "failed"), outcome.output.strip()


def recorded(check):
    return json.loads(check.path.read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_refuses_without_a_gpu(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path)}
    run = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "sees no CUDA device" in run.stderr
    assert not list(tmp_path.iterdir())


def test_steps_that_pass_fail_and_take_too_long(gpu_check, check, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(gpu_check.LIMITS, "fine", 20)
    monkeypatch.setitem(gpu_check.LIMITS, "broken", 20)
    monkeypatch.setitem(gpu_check.LIMITS, "slow", 1.5)
    late = tmp_path / "late"

    def fine(check, quick):
        check.command("fine", python("print('hello')"), by_status)

    def broken(check, quick):
        assert recorded(check)["steps"]["fine"]["status"] == "ok"
        check.command("broken", python("raise SystemExit('no good')"), by_status)

    def slow(check, quick):  # its child must end with it
        child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(late)!r}).touch()"
        code = f"import subprocess, sys; print('begun', flush=True); subprocess.run({python(child)!r})"
        check.command("slow", python(code), by_status)

    def raises(check, quick):
        raise ValueError("unforeseen")

    def last(check, quick):
        check.command("fine", python("import os; print(os.environ['A'])"), by_status, A="given")

    begin = time.monotonic()
    assert not gpu_check.perform(check, [fine, broken, slow, raises, last], False)
    assert time.monotonic() - begin < 4
    gpu_check.report(check, False)
    *table, line = capsys.readouterr().out.strip().splitlines()
    summary = json.loads(line)
    assert not summary["ok"] and summary["file"] == str(check.path)
    steps = recorded(check)["steps"]
    statuses = {name: step["status"] for name, step in steps.items()}
    assert statuses == {"fine": "ok", "broken": "failed", "slow": "timed out", "raises": "failed"}
    assert summary["steps"] == statuses and len(table) >= 5
    assert steps["fine"]["detail"] == "given" and steps["broken"]["detail"] == "no good"
    assert "ended after 2 s; begun" in steps["slow"]["detail"]
    assert steps["raises"]["detail"] == "ValueError: unforeseen"
    log = check.log.read_text()
    assert "hello" in log and "no good" in log and "begun" in log
    time.sleep(max(0.0, 5.0 - (time.monotonic() - begin)))
    assert not late.exists()


def test_all_good(gpu_check, check):
    def fine(check, quick):
        check.add(gpu_check.Result("fine", "ok", 0.1))
        check.add(gpu_check.Result("tool", "skipped", 0.0, "not installed"))

    assert gpu_check.perform(check, [fine], False)


def test_a_killed_run_leaves_what_was_done(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_check
from pathlib import Path
folder = Path({str(tmp_path)!r})
check = gpu_check.Check(folder, "a_card", folder / "log")
gpu_check.perform(check, [
    lambda check, quick: check.add(gpu_check.Result("first", "ok", 1.0), bench={{"results": [1]}}),
    lambda check, quick: os.kill(os.getpid(), signal.SIGKILL),
], False)
"""
    assert subprocess.run(python(code), capture_output=True).returncode == -9
    left = json.loads((tmp_path / "a_card.json").read_text())
    assert left["steps"]["first"]["status"] == "ok" and left["bench"] == {"results": [1]}


def test_a_later_command_adds_its_steps(gpu_check, check, tmp_path):
    check.add(gpu_check.Result("build", "ok", 1.0), bench={"results": []})
    later = gpu_check.Check(tmp_path, "a_card", check.log)
    later.add(gpu_check.Result("tests", "failed", 1.0))
    assert set(recorded(later)["steps"]) == {"build", "tests"} and recorded(later)["bench"] == {"results": []}
    assert [result.name for result in later.results] == ["tests"]


def test_no_time_left(gpu_check, tmp_path):
    check = gpu_check.Check(tmp_path, "a_card", tmp_path / "log", limit=0.0)
    check.command("build", python("print('ran')"), by_status)
    gpu_check.bench(check, True)
    assert [result.status for result in check.results] == ["timed out"] * 2
    assert not check.log.exists()
    check = gpu_check.Check(tmp_path, "a_card", tmp_path / "log", limit=1.0)
    check.command("build", python("import time; time.sleep(20)"), by_status)
    assert check.results[0].status == "timed out" and check.results[0].seconds < 5


def test_steps_are_chosen_by_name(gpu_check):
    assert gpu_check.choose_steps("bench, build") == ["build", "bench"]
    with pytest.raises(Exception, match="unknown: tets; known: build, tests"):
        gpu_check.choose_steps("build,tets")


PYTEST = """
import pytest
@pytest.mark.parametrize("i", [(1, 2), 3], ids=str)
def test_good(i): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="why not")
def test_left(): pass
"""


def test_reads_what_pytest_prints(gpu_check, tmp_path):
    (tmp_path / "tests").mkdir()
    path = tmp_path / "tests" / "test_it.py"
    path.write_text(PYTEST)
    command = [sys.executable, "-m", "pytest", "-v", "-rfEs", "-p", "no:cacheprovider", "tests/test_it.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    want = {"failed": 1, "passed": 2, "skipped": 1}
    assert gpu_check.counts(run.stdout) == want
    status, detail = gpu_check.judge_tests(gpu_check.Outcome(1, 1.0, run.stdout))
    assert status == "failed" and "tests/test_it.py::test_bad - assert 1 == 2" in detail
    cut = run.stdout[: run.stdout.index("= FAILURES")]  # as if it had been ended there
    assert gpu_check.counts(cut) == want
    distributed = "[gw0] [ 50%] PASSED tests/test_it.py::test_good[3] \n[gw1] [100%] FAILED tests/a.py::b "
    assert gpu_check.counts(distributed) == {"failed": 1, "passed": 1}
    skipped = gpu_check.Outcome(0, 1.0, "=== 3 skipped, 5 deselected in 0.1s ===")
    assert gpu_check.judge_tests(skipped) == ("failed", "3 skipped")
    passed = gpu_check.Outcome(0, 1.0, "=== 3 passed, 1 warning in 0.1s (0:00:00) ===")
    assert gpu_check.judge_tests(passed) == ("ok", "3 passed")


def test_reads_what_the_sanitizer_prints(gpu_check):
    def judged(status, output):
        return gpu_check.judge_sanitizer(gpu_check.Outcome(status, 1.0, output))

    done = "searched without a fault of its own\n"
    assert judged(0, done + "========= ERROR SUMMARY: 0 errors") == ("ok", "ERROR SUMMARY: 0 errors")
    races = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert judged(0, done + races)[0] == "ok"
    assert judged(9, done + "========= ERROR SUMMARY: 3 errors") == ("failed", "ERROR SUMMARY: 3 errors")
    assert judged(0, "========= ERROR SUMMARY: 0 errors")[0] == "failed"
    assert judged(0, done)[0] == "failed"
    assert judged(1, "Error: Device not supported.")[0] == "skipped"


def test_the_search_under_the_sanitizer_is_a_call_that_runs(gpu_check):
    """On CPU tensors, in the kernels' emulation: the script's own call of the search is right."""
    from slm_fast import cuda_search

    if cuda_search._C is None:
        pytest.skip("extension not built")
    code = gpu_check.SEARCH.replace('device="cuda"', 'device="cpu"').replace("torch.cuda.synchronize()", "")
    code = code.replace("cuda_search.available()", "None")
    run = subprocess.run(
        python(code), cwd=ROOT, env=gpu_check.child_environment(), capture_output=True, text=True
    )
    assert run.returncode == 0 and "searched without" in run.stdout, run.stderr


def test_the_models_are_recorded(gpu_check, check, monkeypatch, tmp_path, capsys):
    """A suite that writes two cases and then fails."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").write_text(
        "import sys, pathlib\n"
        "path = pathlib.Path(sys.argv[sys.argv.index('--output') + 1]) / 'suite.json'\n"
        "path.write_text('{\"results\": [1, 2]}'); print(*sys.argv[1:]); raise SystemExit(1)\n"
    )
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    gpu_check.model(check, True)
    assert "model --device cuda" in capsys.readouterr().out
    assert recorded(check)["suite"] == {"results": [1, 2]}
    assert (recorded(check)["steps"]["model"]["status"], check.results[0].detail) == ("failed", "2 cases")


def test_the_benchmark_is_recorded_even_if_it_was_ended(gpu_check, check, monkeypatch, tmp_path):
    """A benchmark that writes one result and goes on for too long."""
    measured = {"results": [{"microseconds": 1.0, "met": True}, {"error": "no"}], "left_out": ["b"]}
    script = tmp_path / "benchmarks" / "bench_gpu_ops.py"
    script.parent.mkdir()
    script.write_text(
        "import sys, time, pathlib\n"
        f"pathlib.Path(sys.argv[sys.argv.index('--json') + 1]).write_text({json.dumps(measured)!r})\n"
        "print('a line'); print('{json}', flush=True); time.sleep(20)\n"
    )
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "QUICK_BENCH", 1.5)
    gpu_check.bench(check, True)
    assert recorded(check)["bench"] == measured
    step = recorded(check)["steps"]["bench"]
    assert step["status"] == "timed out"
    assert step["detail"] == "1 measured, 1 of 1 targets met, 1 errors, 1 groups left out for lack of time"
    assert not check.partial.exists()
