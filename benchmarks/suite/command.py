"""The suite's command line: run sections, print tables, write `suite.json` and a page with plots.

    python -m benchmarks [search mixture model serve quality] [--quick] [--output FOLDER]
    python -m benchmarks compare BEFORE.json AFTER.json
    python -m benchmarks --page FILE.json [--output FOLDER]

Every case is verified before it is timed; contenders take turns; times are medians with their 20% and 80%
quantiles, ratios are to ours, pair by pair.
"""

import argparse
import datetime
import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import compare
import torch
import transformers
from units import amount, duration

from suite import machine, mixture, model, page, quality, search, serve
from suite.cases import FULL, QUICK, target

SCHEMA = 1
QUICK_SECONDS = 300  # of all sections in quick mode, on two cores
SECTIONS = {"search": search, "mixture": mixture, "model": model, "serve": serve, "quality": quality}
EPILOG = """\
sections, and how long they take in full mode on two cores:
  search   key search over pool size and queries, and a new task's metric; 7 minutes. Peers: PyTorch, faiss
  mixture  a linear's update: decoding, prefill, forward and backward; 3 minutes. Peers: PyTorch, the authors'
           dense offsets, peft; on CUDA the kernels of vllm, sglang and unsloth
  model    decoding, prefill, a training step, time to first token, memory; 25 minutes. Peers: the frozen
           model, dense offsets, peft
  serve    requests that arrive over time, on the CPU; 6 minutes. Peer: transformers' continuous batching
  quality  the continual-learning tables; hours, needs SLM_FAST_DATA. Baselines of `slm-fast learn`
Peers take part where they are installed.

%(prog)s compare BEFORE.json AFTER.json
  says what became slower, larger or worse than the noise that both measured; the status is 1 then

A run into a folder whose suite.json was measured on the same machine, commit (without changes) and mode keeps
the other sections' results; otherwise it replaces the file."""


def lines(record: dict, ceilings: dict) -> Iterator[str]:
    """A case in print."""
    yield f"{record['case']}   {machine.rates_line(record, ceilings)}".rstrip()
    for name, found in record["contenders"].items():
        text = f"  {name:22}"
        if "error" in found:
            yield text + found["error"]
            continue
        if "seconds" in found:
            text += f"{duration(found['seconds']):>10}  {duration(found['low'])} to {duration(found['high'])}"
        if "ratio" in found and name != record["ours"]:
            text += f"   {found['ratio']:.2f}x ours ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})"
        if found.get("recall", 1.0) < 1.0:
            text += f"   recall {found['recall']:.3f}"
        if "graph" in found:
            text += "   graph" if found["graph"] else "   eager"
        if found.get("peak_bytes") is not None:
            text += f"   peak {amount(found['peak_bytes'])}"
        if "first_token_seconds" in found:
            parts = ("encoder", "search", "tokenizer", "prefill")
            took = [f"{p} {duration(found[f'{p}_seconds'])}" for p in parts if f"{p}_seconds" in found]
            text += f"   first token {duration(found['first_token_seconds'])}: {', '.join(took)}"
        if "tokens_per_second" in found:
            text += f"   {found['tokens_per_second']:,.1f} tokens/s"
        if "first_token_50" in found:
            firsts, eachs = ([found[f"{n}_{s}"] for s in (50, 95)] for n in ("first_token", "per_token"))
            text += f"   first token {duration(firsts[0])}, 95% {duration(firsts[1])}"
            text += f"   then {duration(eachs[0])}, 95% {duration(eachs[1])} a token"
        if "memory_bytes" in found and "seconds" not in found:
            text += f"{found['memory_bytes'] / 1e6:+10.0f} MB"
        for share in ("average", "forgetting", "routing"):
            if found.get(share) is not None:
                text += f"   {share} {100 * found[share]:.1f}%"
        yield text


def print_targets(rows: list[dict]) -> None:
    if rows:
        width = max(len(row["what"]) for row in rows)
        print(f"\n{'target':{width}}{'reached':>10}{'wanted':>10}  holds")
    for row in rows:
        holds = "yes" if row["holds"] else "NO"
        print(f"{row['what']:{width}}{row['reached']:10.2f}{row['wanted']:>10}  {holds}")


def write(result: dict, folder: Path) -> None:
    """The file is replaced as a whole: a killed run leaves what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "suite.json.part"
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    partial.replace(folder / "suite.json")


def load(path: Path) -> dict:
    """A stored result of the suite, or the one in a file of `gpu_check.py`. Raises ValueError on others."""
    result = json.loads(path.read_text(encoding="utf8"))
    result = result.get("suite", result) if isinstance(result, dict) else {}
    if result.get("schema") != SCHEMA or "ceilings" not in result:
        raise ValueError(f"{path} is no result of the suite with schema {SCHEMA}")
    return result


def kept(result: dict, sections: list[str], path: Path) -> None:
    """Take the other sections of the folder's result where it is of this machine, commit and mode."""
    try:
        old = load(path)
    except (OSError, ValueError):
        return
    commit = result["machine"]["commit"]
    same = commit is not None and not commit.endswith("+") and commit == old["machine"].get("commit")
    if not (same and compare.same_machine(old, result)):
        return
    for section in (name for name in old["seconds"] if name in SECTIONS and name not in sections):
        found = [record for record in old["results"] if record["section"] == section]
        result["results"] += found
        result["seconds"][section] = old["seconds"][section]
        if section in old["failed"]:
            result["failed"][section] = old["failed"][section]
        else:
            result["targets"] += SECTIONS[section].targets(found, old["ceilings"])


def run(sections: list[str], quick: bool, device: str, folder: Path) -> dict:
    """Measure the sections; the result, which is also written to the folder after every case."""
    started = time.perf_counter()
    where, ceilings, effort = machine.describe(device), machine.ceilings(device), QUICK if quick else FULL
    print(machine.line(where, ceilings), flush=True)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"schema": SCHEMA, "created": created, "quick": quick, "machine": where, "ceilings": ceilings}
    result |= {"seconds": {}, "failed": {}, "skipped": {}, "results": [], "targets": []}
    kept(result, sections, folder / "suite.json")
    for section in sections:
        print(f"\n== {section}", flush=True)
        unavailable = getattr(SECTIONS[section], "unavailable", lambda device: None)(device)
        if unavailable is not None:
            result["skipped"][section] = unavailable
            print(f"SKIPPED: {unavailable}", flush=True)
            continue
        begin, found = time.perf_counter(), []
        try:
            for record in SECTIONS[section].records(quick, device, effort):
                found.append(record)
                if (ours := record["contenders"].get(record["ours"])) is not None:
                    ours.update(machine.rates(record, ceilings))
                result["results"].append(record)
                print("\n".join(lines(record, ceilings)), flush=True)
                write(result, folder)
            result["targets"] += SECTIONS[section].targets(found, ceilings)
        except (Exception, SystemExit) as error:  # the next section must not suffer; the status says it
            result["failed"][section] = f"{type(error).__name__}: {error}"
            print(f"FAILED: {result['failed'][section]}", flush=True)
        result["seconds"][section] = round(time.perf_counter() - begin, 1)
        write(result, folder)
        gc.collect()
    if quick and device == "cpu" and set(sections) == set(SECTIONS):
        took = time.perf_counter() - started
        result["targets"].append(target("quick mode, seconds of all sections", took, "<=", QUICK_SECONDS))
    write(result, folder)
    return result


def section_of(text: str) -> str:
    if text not in SECTIONS:
        raise argparse.ArgumentTypeError(f"no section {text!r}: choose from {', '.join(SECTIONS)}")
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slm-fast bench",
        usage="%(prog)s [SECTION ...] [options]\n       %(prog)s compare BEFORE.json AFTER.json",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = ", ".join(SECTIONS) + "; default: all"
    parser.add_argument("sections", nargs="*", type=section_of, metavar="SECTION", help=words)
    parser.add_argument("--quick", action="store_true", help="few sizes, at most five minutes on two cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=machine.DEVICE)
    parser.add_argument("--output", type=Path, default=Path("bench_output"), help="folder of the result")
    parser.add_argument(
        "--page", type=Path, metavar="FILE.json", help="measure nothing: draw that result's page and plots"
    )
    return parser


def draw(path: Path, folder: Path) -> int:
    """The page of a stored result; the exit status."""
    try:
        result = load(path)
        folder.mkdir(parents=True, exist_ok=True)
        print(page.write(result, folder))
    except (OSError, ValueError) as error:
        print(f"slm-fast bench: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.page is not None:
        if args.sections or args.quick:
            parser.error("--page measures nothing: it takes no sections and no --quick")
        return draw(args.page, args.output)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("slm-fast bench: there is no CUDA device here", file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sections = args.sections or list(SECTIONS)
    result = run(sections, args.quick, args.device, args.output)
    print_targets(result["targets"])
    written, seconds = page.write(result, args.output), result["seconds"]
    took = sum(seconds.get(section, 0.0) for section in sections)
    print(f"\n{took:.0f} s: {args.output / 'suite.json'}, {written}")
    return int(any(section in result["failed"] for section in sections))


if __name__ == "__main__":
    sys.exit(main())
