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
    def judged(status, output, *unable):
        ran = "searched without" in output
        return gpu_check.judge_sanitizer(gpu_check.Outcome(status, 1.0, output), ran, *unable)

    done = "searched without a fault of its own\n"
    assert judged(0, done + "========= ERROR SUMMARY: 0 errors") == ("ok", "ERROR SUMMARY: 0 errors")
    races = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert judged(0, done + races)[0] == "ok"
    assert judged(9, done + "========= ERROR SUMMARY: 3 errors") == ("failed", "ERROR SUMMARY: 3 errors")
    assert judged(0, "========= ERROR SUMMARY: 0 errors")[0] == "failed"
    assert judged(0, done)[0] == "failed"
    assert judged(1, "Error: Device not supported.")[0] == "skipped"
    assert judged(1, "Error: Device not supported.", "failed")[0] == "failed"


SANITIZER = """#!/bin/sh
echo "$@" >> {calls}
case "$*" in
  *pytest*) echo "===== {passed} passed in 1.0s =====" ;;
  *) echo "searched without a fault of its own" ;;
esac
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.mark.parametrize("passed", [3, 2])
def test_the_sanitizer_watches_the_search_and_tritons_kernels(
    gpu_check, check, monkeypatch, tmp_path, passed
):
    """A sanitizer that only says what it is told to run; kernels' tests must all have run."""
    tool, calls = tmp_path / "compute-sanitizer", tmp_path / "calls"
    tool.write_text(SANITIZER.format(calls=calls, passed=passed))
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: str(tool))
    gpu_check.sanitizer(check, True)
    good = "ok" if passed == 3 else "failed"
    statuses = {result.name: result.status for result in check.results}
    assert statuses == {
        "memcheck": "ok",
        "racecheck": "ok",
        "memcheck mixture": good,
        "memcheck fused_linear": good,
    }
    lines = [line for line in calls.read_text().splitlines() if line.startswith("--tool")]
    watched = ["key_search", "key_search", "_mixture_", "_fused_linear_"]
    assert [line.split("kns=")[1].split()[0] for line in lines] == watched
    assert all(name in lines[2] for name in gpu_check.MEMCHECKED)


def test_what_the_sanitizer_watches_is_there(gpu_check):
    """The tests by their names; kernels whose names contain the words that are looked for."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += gpu_check.MEMCHECKED
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "3 tests collected" in run.stdout, run.stdout + run.stderr
    sources = "".join(path.read_text() for path in (ROOT / "slm_fast" / "kernels").glob("*.py"))
    for name in gpu_check.KERNELS:
        assert f"def _{name}_" in sources


def test_a_tool_that_is_not_there_fails_where_it_is_required(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: None)
    monkeypatch.setattr(gpu_check, "run", lambda *args: gpu_check.Outcome(0, 1.0, "CUDA False"))
    for required, status in (((), "skipped"), (("nvcc", "sanitizer"), "failed"), (("nvcc",), "skipped")):
        check = gpu_check.Check(tmp_path, "a_card", tmp_path / "log", None, required)
        assert gpu_check.extension(check)[0] == ("nvcc" not in required)
        gpu_check.sanitizer(check, True)
        assert [result.status for result in check.results] == [status] * 4
        assert {result.detail for result in check.results} == {"compute-sanitizer is not installed"}
    assert gpu_check.choose_tools(" sanitizer,nvcc") == ["sanitizer", "nvcc"]
    with pytest.raises(Exception, match="unknown: gcc; known: nvcc, sanitizer"):
        gpu_check.choose_tools("gcc")


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


def test_sections_of_the_suite_are_recorded(gpu_check, check, monkeypatch, tmp_path, capsys):
    """A suite that writes two cases of its section; in `model` it then fails."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").write_text(
        "import json, os, sys, pathlib\n"
        "path, name = pathlib.Path(sys.argv[sys.argv.index('--output') + 1]) / 'suite.json', sys.argv[1]\n"
        "cases = [{'section': name, 'case': i, 'pid': os.getpid()} for i in range(2)]\n"
        "failed = {name: 'why'} if name == 'model' else {}\n"
        "result = dict(results=cases, targets=[{'what': name + ', 1'}], seconds={name: 1.0}, failed=failed)\n"
        "path.write_text(json.dumps(result | {'schema': 1, 'quick': '--quick' in sys.argv}))\n"
        "print(*sys.argv[1:]); raise SystemExit(bool(failed))\n"
    )
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    for step in (gpu_check.model, gpu_check.search, gpu_check.mixture):
        step(check, False)
    assert "model --device cuda" in capsys.readouterr().out
    suite, steps = recorded(check)["suite"], recorded(check)["steps"]
    names = [record["section"] for record in suite["results"]]
    assert names == ["model", "model", "search", "search", "mixture", "mixture"]
    assert suite["quick"] == {"model": False, "search": True, "mixture": True}
    assert suite["failed"] == {"model": "why"} and len(suite["targets"]) == len(suite["seconds"]) == 3
    assert (steps["model"]["status"], steps["search"]["status"]) == ("failed", "ok")
    assert check.results[0].detail == "2 cases"
    before = suite["results"]
    later = gpu_check.Check(tmp_path, "a_card", check.log)
    gpu_check.model(later, True)
    suite = recorded(later)["suite"]
    assert suite["results"][:4] == before[2:] and suite["results"][4:] != before[:2]
    assert len(suite["results"]) == 6 and len(suite["targets"]) == 3 and suite["quick"]["model"]


def test_a_result_from_before_is_added_to(gpu_check):
    """Of one section, with `quick` for it alone."""
    old = {"results": [{"section": "model", "case": "a"}], "targets": [], "seconds": {"model": 1.0}}
    old |= {"failed": {"model": "why"}, "quick": True}
    new = {"results": [{"section": "search"}], "targets": [], "seconds": {"search": 2.0}, "failed": {}}
    suite = gpu_check.merged(old, new | {"quick": True}, "search")
    assert [record["section"] for record in suite["results"]] == ["model", "search"]
    assert suite["failed"] == {"model": "why"} and suite["quick"] == {"model": True, "search": True}
    two = {"seconds": {"model": 1.0, "mixture": 1.0}, "quick": False}
    suite = gpu_check.merged(old | two, new | {"quick": True}, "search")
    assert suite["quick"] == {"model": False, "mixture": False, "search": True}


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


def test_the_workflow_warns_where_there_is_nothing_to_compare(tmp_path):
    """Its script: a warning for files without a case in common, not for others that cannot be compared."""
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "gpu.yml").read_text(encoding="utf8"))
    steps = workflow["jobs"]["check"]["steps"]
    assert any("--require nvcc,sanitizer" in step.get("run", "") for step in steps)
    (script,) = (step["run"] for step in steps if "compare.py" in step.get("run", ""))
    (tmp_path / "results").mkdir()
    stored = tmp_path / "benchmarks" / "results"
    stored.mkdir(parents=True)
    real = str(ROOT / "benchmarks")
    (tmp_path / "benchmarks" / "compare.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, {real!r})\nrunpy.run_module('compare', run_name='__main__')\n"
    )
    one, other = ({"results": [{"name": name, "seconds": {"on": 1.0, "torch": 1.0}}]} for name in "ab")
    slower = {"results": [{"name": "a", "seconds": {"on": 2.0, "torch": 1.0}}]}

    def ended(**results):
        for path in (tmp_path / "results").iterdir():
            path.unlink()
        for name, result in results.items():
            text = result if isinstance(result, str) else json.dumps(result)
            (tmp_path / "results" / f"{name}.json").write_text(text)
        environment = os.environ | {"GPU_PYTHON": sys.executable}
        return subprocess.run(
            ["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    for name in ("card", "card2"):
        (stored / f"{name}.json").write_text(json.dumps(one | {"schema": 1}))
    new = ended(new=one)
    assert new.returncode == 0 and "::warning::no stored result for new.json" in new.stdout
    assert ended().returncode == 0 and ended(card=one).returncode == 0
    empty = ended(card=other, card2=one)
    assert empty.returncode == 0 and "::warning::card.json" in empty.stdout and "name=a" in empty.stdout
    worse = ended(card=slower, card2=other)
    assert worse.returncode == 1 and "WORSE name=a" in worse.stdout and "::warning::card2" in worse.stdout
    for bad in (one | {"schema": 2}, "{"):  # nor are these compared, which is no reason to pass
        done = ended(card=bad, card2=one)
        assert done.returncode == 1 and "::warning" not in done.stdout and "compare: " in done.stdout
