"""What only a machine with a GPU can prove, in one command: build, GPU tests, sanitizer, benchmarks.

Uses the Python that runs it and installs nothing. A step that fails or runs out of time is recorded, makes
the exit status 1, and does not stop the others. The results are `<card>.json` in the output folder, written
after every step; what a step printed is in a log beside it (or in build/). While it runs, the benchmark of
ops writes `<card>_ops.json`, which becomes part of `<card>.json` at its end; so do the sections of the suite.
A tool that is not there is named and its step skipped; with --require that is a failure.

    make gpu-check                 or   python3 benchmarks/gpu_check.py [--quick] [--output DIR]
    where tools must be there, as in CI:    --require nvcc,sanitizer
    where a command may take ten minutes:   --steps build,tests --limit 570, then --steps build,bench
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("build", "tests", "kernels", "sanitizer", "model", "search", "mixture", "bench")
TOOLS = ("nvcc", "sanitizer")
LIMITS = {
    "build": 300,
    "gpu tests": 420,
    "large tests": 200,
    "kernel tests": 420,
    "memcheck": 120,
    "racecheck": 120,
    "memcheck mixture": 240,
    "memcheck fused_linear": 240,
    "model": 400,
    "search": 120,
    "mixture": 120,
    "bench": 540,
}
QUICK_BENCH = 150  # seconds
WORKERS = 14  # processes with tests, at most: most of the time goes into compiling variants
# Their kernels run on the device where there is one; those marked `gpu` run before.
KERNEL_TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "mixture",
        "fused_linear",
        "segment_linear",
        "norm_shrink",
        "silu_mul_shrink",
        "compiled",
        "cuda_search",
    )
]
SEARCH = """
import torch
from slm_fast import cuda_search
if (reason := cuda_search.available()) is not None:
    raise SystemExit(reason)
for num_queries, num_keys, dim, dtype in ((9, 1000, 96, torch.bfloat16), (3, 6000, 100, torch.float32)):
    query = torch.randn(num_queries, dim, device="cuda")
    keys = torch.randn(num_keys, dim, device="cuda").to(dtype)
    _, _, scores = cuda_search.key_search(query, keys, None, None, 4, "softmax", 1.0, None, 1, None)
    assert scores.isfinite().all()
torch.cuda.synchronize()
print("searched without a fault of its own")
"""
# Tests of sizes at which every mask counts, and what the names of their kernels have in common.
MEMCHECKED = [
    f"tests/test_gpu.py::test_bf16_odd_sizes[{op}-(12,1,8,3)]"
    for op in ("mixture", "segment_linear", "fused_linear")
]
KERNELS = ("mixture", "fused_linear")
REFUSED = re.compile(r"[Dd]evice not supported|not supported on this device|error 999|Failed to initialize")


@dataclass
class Outcome:
    """How a command ended: its exit status, None if it ran out of time."""

    status: int | None
    seconds: float
    output: str


@dataclass
class Result:
    """A line of the table. status: "ok", "failed", "timed out" or "skipped"."""

    name: str
    status: str
    seconds: float
    detail: str = ""

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "timed out")


def run(command: list[str], limit: float, log: Path, **environment: str) -> Outcome:
    """Run a command from the repository's root; what it prints goes to the end of `log`. Its whole process
    group is ended when the time is up, or when this process is."""
    begin = time.monotonic()
    with log.open("ab") as sink:
        sink.write(f"\n$ {shlex.join(command)}\n".encode())
        sink.flush()
        start = sink.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment() | environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            status = process.wait(max(limit, 0.1))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_group(process)
    with log.open("rb") as printed:
        printed.seek(start)
        output = printed.read().decode(errors="replace")
    return Outcome(status, time.monotonic() - begin, output)


def end_group(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None and number == signal.SIGTERM:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def child_environment() -> dict[str, str]:
    """This one, with the package importable, tools beside this Python and nvcc found, nothing interpreted."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SLM_FAST_BACKEND")}
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return environment | {
        "PATH": os.pathsep.join(filter(None, folders)),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }


def find_tool(name: str) -> str | None:
    return shutil.which(name, path=child_environment()["PATH"])


class Check:
    """A run: where results go, and the time that is left."""

    def __init__(
        self,
        folder: Path,
        card: str,
        log: Path,
        limit: float | None = None,
        required: Sequence[str] = (),
        **description,
    ) -> None:
        self.path, self.log, self.required = folder / f"{card}.json", log, required
        self.partial = folder / f"{card}_ops.json"
        self.end = None if limit is None else time.monotonic() + limit
        self.results: list[Result] = []
        self.record = {"card": card, "steps": {}}
        with contextlib.suppress(OSError, ValueError):  # what an earlier command left: other steps
            earlier = json.loads(self.path.read_text(encoding="utf8"))
            self.record |= earlier if earlier.get("card") == card else {}
        self.record |= description
        self.write()

    def write(self) -> None:
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf8")
        partial.replace(self.path)

    def add(self, result: Result, **sections) -> None:
        self.results.append(result)
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.record["steps"][result.name] = asdict(result) | {"date": when}
        self.record |= sections
        self.write()
        print(f"{result.name}: {result.status} after {result.seconds:.0f} s. {result.detail}", flush=True)

    def without(self, tool: str) -> str:
        """The status of a step that one of `TOOLS` did not do."""
        return "failed" if tool in self.required else "skipped"

    def limit(self, name: str, seconds: float | None = None) -> float:
        """Seconds that a step may take; 0: there is no time left for it."""
        allowed = LIMITS[name] if seconds is None else seconds
        return allowed if self.end is None else min(allowed, max(self.end - time.monotonic(), 0))

    def command(
        self, name: str, command: list[str], judge: Callable[[Outcome], tuple[str, str]], **environment: str
    ) -> None:
        """Run one command as a step; `judge` says (status, detail) of one that ended in time."""
        if (limit := self.limit(name)) <= 0:
            self.add(Result(name, "timed out", 0.0, "no time was left for it"))
            return
        outcome = run(command, limit, self.log, **environment)
        status, detail = judge(outcome)
        if outcome.status is None:
            status, detail = "timed out", f"ended after {limit:.0f} s; {detail}".rstrip("; ")
        self.add(Result(name, status, round(outcome.seconds, 1), detail))
        if status == "failed":
            print(last_lines(outcome.output, 25), flush=True)


def last_lines(text: str, count: int) -> str:
    return "\n".join(line[:300] for line in text.rstrip().splitlines()[-count:])


# The steps.


def extension(check: Check) -> tuple[bool, str]:
    """(whether the extension is as good as it can be here, what it is)."""
    code = "from slm_fast import _C; print('CUDA', _C.has_cuda)"
    outcome = run([sys.executable, "-c", code], 120, check.log)
    if outcome.status != 0:
        return False, last_lines(outcome.output, 1)
    if "CUDA True" in outcome.output:
        return True, "built with CUDA"
    if find_tool("nvcc"):
        return False, "built without CUDA though nvcc is there"
    return "nvcc" not in check.required, "built without nvcc; CuPy compiles the key search at first use"


def build(check: Check, quick: bool) -> None:
    ready, detail = extension(check)
    if ready:
        check.add(Result("build", "ok", 0.0, f"nothing to do, {detail}"))
        return

    def judge(outcome):
        if outcome.status != 0:
            return "failed", ""
        ready, detail = extension(check)
        return ("ok" if ready else "failed"), detail

    check.command("build", [sys.executable, "setup.py", "build_ext", "--inplace"], judge)


def counts(output: str) -> dict[str, int]:
    """Tests by outcome: as pytest sums up, or, where it was ended before, from the lines of the tests."""
    summaries = re.findall(r"^=* ?(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", output, re.M)
    if summaries:
        found = dict(reversed(part.split()) for part in summaries[-1].split(", "))
        return {name: int(found[name]) for name in found if name not in ("warnings", "warning", "deselected")}
    outcomes = re.findall(r"^(?:tests/.* |\[gw\d+\].* )(PASSED|FAILED|SKIPPED|ERROR)(?: |$)", output, re.M)
    return {name.lower(): outcomes.count(name) for name in sorted(set(outcomes))}


def judge_tests(outcome: Outcome) -> tuple[str, str]:
    """All must pass, and some must run: a device that no kernel runs on skips every test."""
    found = counts(outcome.output)
    failures = re.findall(r"^(?:FAILED|ERROR) (tests/\S+.*)$", outcome.output, re.M)
    detail = ", ".join(f"{number} {name}" for name, number in found.items()) or "no test ran"
    detail = "; ".join([detail, *(failure[:200] for failure in failures[:10])])
    good = outcome.status == 0 and found.get("passed", 0) > 0
    return ("ok" if good else "failed"), detail


def pytest_command(several: bool, *args: str) -> list[str]:
    """pytest, in several processes where it can."""
    command = [sys.executable, "-m", "pytest", "-v", "-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout"):
        command.append("--timeout=200")
    if several and importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(WORKERS, (os.cpu_count() or 1) - 2)))]
    return [*command, *args]


def tests(check: Check, quick: bool) -> None:
    """What needs a GPU; then what needs most of its memory."""
    check.command("gpu tests", pytest_command(True, "-m", "gpu and not large", "tests"), judge_tests)
    if not quick:
        check.command("large tests", pytest_command(False, "-m", "gpu and large", "tests"), judge_tests)


def kernels(check: Check, quick: bool) -> None:
    files = [path for path in KERNEL_TESTS if (ROOT / path).exists()]
    check.command("kernel tests", pytest_command(True, "-m", "not gpu", *files), judge_tests)


def judge_sanitizer(outcome: Outcome, ran: bool, refused: str = "skipped") -> tuple[str, str]:
    """ran: whether what was to be watched came to its end; refused: the status where the device refuses."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", outcome.output)
    detail = summary[-1] if summary else last_lines(outcome.output, 1)
    if outcome.status == 0 and summary and ran:
        return "ok", detail
    if why := REFUSED.search(outcome.output):
        return refused, f"device refused: {why[0]}"
    return "failed", detail


def sanitizer(check: Check, quick: bool) -> None:
    """The CUDA key search, then Triton's kernels, by their tests."""
    sanitized(check, "memcheck", "memcheck", "key_search", [sys.executable, "-c", SEARCH])
    sanitized(check, "racecheck", "racecheck", "key_search", [sys.executable, "-c", SEARCH])
    for name in KERNELS:
        sanitized(check, f"memcheck {name}", "memcheck", f"_{name}_", pytest_command(False, *MEMCHECKED))


def sanitized(check: Check, name: str, checker: str, kernel: str, watched: list[str]) -> None:
    """A command under compute-sanitizer, which watches kernels with `kernel` in their name."""
    tool, unable = find_tool("compute-sanitizer"), check.without("sanitizer")
    if tool is None:
        check.add(Result(name, unable, 0.0, "compute-sanitizer is not installed"))
        return

    def judge(outcome: Outcome) -> tuple[str, str]:
        passed = counts(outcome.output).get("passed", 0) == len(MEMCHECKED)
        return judge_sanitizer(outcome, passed or "searched without" in outcome.output, unable)

    # PyTorch probes for things that are not there: such errors of the API are not ours.
    of_api = ["--report-api-errors", "no"] if checker == "memcheck" else []
    ours = ["--kernel-regex", f"kns={kernel}", "--error-exitcode", "9"]
    command = [tool, "--tool", checker, *of_api, *ours, *watched]
    # Without its caching allocator, PyTorch's allocations have ends that memcheck knows.
    check.command(name, command, judge, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def model(check: Check, quick: bool) -> None:
    """Whole models, as the suite measures them."""
    suite_section(check, "model", quick)


def search(check: Check, quick: bool) -> None:
    """The suite's key searches, in its quick mode."""
    suite_section(check, "search", True)


def mixture(check: Check, quick: bool) -> None:
    """The suite's mixtures of a linear, in its quick mode."""
    suite_section(check, "mixture", True)


def suite_section(check: Check, section: str, quick: bool) -> None:
    """A section of the suite; its cases take the place of earlier ones in the record's "suite"."""
    folder = ROOT / "build" / "suite" / section
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "suite.json"
    written.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks", section, "--device", "cuda", "--output", str(folder)]

    def judge(outcome: Outcome) -> tuple[str, str]:
        print("\n".join(line for line in outcome.output.splitlines() if "arning" not in line))
        measured = {}
        with contextlib.suppress(OSError, ValueError):
            measured = json.loads(written.read_text(encoding="utf8"))
            check.record["suite"] = merged(check.record.get("suite", {}), measured, section)
        cases = len(measured.get("results", []))
        return ("ok" if outcome.status == 0 else "failed"), f"{cases} cases"

    check.command(section, [*command, *(["--quick"] if quick else [])], judge)


def merged(suite: dict, measured: dict, section: str) -> dict:
    """The suite's result with one section measured anew. `quick` says it of each section."""
    kept = [record for record in suite.get("results", []) if record["section"] != section]
    aims = [target for target in suite.get("targets", []) if not target["what"].startswith(section)]
    parts = {name: suite.get(name, {}) for name in ("seconds", "failed", "quick")}
    if not isinstance(parts["quick"], dict):  # of all sections together
        parts["quick"] = dict.fromkeys(parts["seconds"], parts["quick"])
    parts = {name: {k: v for k, v in part.items() if k != section} for name, part in parts.items()}
    parts["quick"] |= {section: measured["quick"]}
    return measured | {
        "results": kept + measured["results"],
        "targets": aims + measured["targets"],
        "seconds": parts["seconds"] | measured["seconds"],
        "failed": parts["failed"] | measured["failed"],
        "quick": parts["quick"],
    }


def bench(check: Check, quick: bool) -> None:
    name, measured = "bench", {}
    limit = check.limit(name, QUICK_BENCH if quick else None)
    if limit <= 0:
        check.add(Result(name, "timed out", 0.0, "no time was left for it"))
        return
    check.partial.unlink(missing_ok=True)
    command = [sys.executable, "benchmarks/bench_gpu_ops.py", "--json", str(check.partial)]
    # Groups are begun while the budget lasts; the last one and the start of the process come on top.
    command += ["--quick", "--budget", "60"] if quick else ["--budget", str(max(30, round(limit - 120)))]
    outcome = run(command, limit, check.log)
    print("\n".join(line for line in outcome.output.splitlines() if not line.startswith("{")))
    with contextlib.suppress(OSError, ValueError):
        measured = json.loads(check.partial.read_text(encoding="utf8"))
    status = {0: "ok", None: "timed out"}.get(outcome.status, "failed")
    detail = bench_detail(measured) if measured else last_lines(outcome.output, 1)
    check.add(Result(name, status, round(outcome.seconds, 1), detail), bench=measured)
    check.partial.unlink(missing_ok=True)


def bench_detail(measured: dict) -> str:
    records = measured["results"]
    aimed = [r for r in records if "met" in r]
    parts = [f"{sum('microseconds' in r for r in records)} measured"]
    parts.append(f"{sum(r['met'] for r in aimed)} of {len(aimed)} targets met")
    parts.append(f"{sum('error' in r for r in records)} errors")
    if measured["left_out"]:
        parts.append(f"{len(measured['left_out'])} groups left out for lack of time")
    return ", ".join(parts)


# The run.


def find_card() -> dict[str, str]:
    """The card, as a file name and by its own name, and PyTorch. SystemExit with the reason without one."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"gpu-check needs PyTorch: {error} ({sys.executable}); set GPU_PYTHON") from None
    if not torch.cuda.is_available():
        raise SystemExit(f"gpu-check needs a GPU: torch {torch.__version__} sees no CUDA device")
    device = torch.cuda.get_device_name()
    card = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    return {"card": card, "device": device, "torch": torch.__version__, "cuda": torch.version.cuda}


def choose_steps(text: str) -> list[str]:
    steps = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in steps if name not in STEPS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(STEPS)}")
    return [name for name in STEPS if name in steps]


def choose_tools(text: str) -> list[str]:
    tools = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in tools if name not in TOOLS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(TOOLS)}")
    return tools


def perform(check: Check, steps: list[Callable[[Check, bool], None]], quick: bool) -> bool:
    """Run the steps, whatever happens to each; whether all were good."""
    for step in steps:
        try:
            step(check, quick)
        except Exception as error:  # the next step and the results so far must not suffer
            check.add(Result(step.__name__, "failed", 0.0, f"{type(error).__name__}: {error}"))
    return not any(result.bad for result in check.results)


def report(check: Check, good: bool) -> None:
    print(f"\n{'step':24}{'status':12}{'seconds':>8}  detail")
    for result in check.results:
        print(f"{result.name:24}{result.status:12}{result.seconds:8.0f}  {result.detail[:200]}")
    steps = {result.name: result.status for result in check.results}
    summary = {"ok": good, "card": check.record["card"], "steps": steps, "file": str(check.path)}
    print(json.dumps(summary), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=choose_steps, default=list(STEPS), help=",".join(STEPS))
    parser.add_argument(
        "--require", type=choose_tools, default=[], help=f"tools that must be there: {','.join(TOOLS)}"
    )
    parser.add_argument("--quick", action="store_true", help="a benchmark of one minute")
    parser.add_argument("--output", type=Path, help="default: $OUT, else benchmarks/results")
    parser.add_argument("--limit", type=float, help="seconds for everything together")
    args = parser.parse_args()
    description = find_card()
    card = description.pop("card")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the running step
    chosen = args.output or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    folder = (chosen or ROOT / "benchmarks" / "results").resolve()
    log = (folder if chosen else ROOT / "build") / f"{card}.log"
    for needed in (folder, log.parent):
        needed.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    check = Check(folder, card, log, args.limit, args.require, **description)
    known = {name: globals()[name] for name in STEPS}
    good = perform(check, [known[name] for name in args.steps], args.quick)
    report(check, good)
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
