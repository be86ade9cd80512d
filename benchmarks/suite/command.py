"""The suite's command line: run sections, print tables, write `suite.json` and a page with plots.

    python -m benchmarks [search mixture model serve quality] [--quick] [--output FOLDER]

Every case is verified before it is timed; contenders take turns; times are medians with their 20% and 80%
quantiles, ratios are to ours, pair by pair. `python benchmarks/compare.py A.json B.json` compares results.
"""

import argparse
import datetime
import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import transformers
from units import duration

from suite import machine, mixture, model, page, quality, search, serve
from suite.cases import FULL, QUICK

SCHEMA = 1
SECTIONS = {"search": search, "mixture": mixture, "model": model, "serve": serve, "quality": quality}


def rates(record: dict, ceilings: dict) -> str:
    """Of ours: GB/s and GFLOP/s that it reached, and the share of the measured ceilings."""
    ours = record["contenders"][record["ours"]]
    if "seconds" not in ours or record["bytes"] is None:
        return ""
    speed = record["bytes"] / ours["seconds"]
    text = f"{speed / 1e9:.1f} GB/s ({speed / machine.bandwidth(ceilings):.0%} of memory's)"
    if record["operations"]:
        text += f", {record['operations'] / ours['seconds'] / 1e9:.1f} GFLOP/s"
    return text


def lines(record: dict, ceilings: dict) -> Iterator[str]:
    """A case in print."""
    yield f"{record['case']}   {rates(record, ceilings)}".rstrip()
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


def run(sections: list[str], quick: bool, device: str, folder: Path) -> dict:
    """Measure the sections; the result, which is also written to the folder after every case."""
    where, ceilings, effort = machine.describe(device), machine.ceilings(device), QUICK if quick else FULL
    print(machine.line(where, ceilings), flush=True)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"schema": SCHEMA, "created": created, "quick": quick, "machine": where, "ceilings": ceilings}
    result |= {"seconds": {}, "failed": {}, "results": [], "targets": []}
    for section in sections:
        print(f"\n== {section}", flush=True)
        begin, found = time.perf_counter(), []
        try:
            for record in SECTIONS[section].records(quick, device, effort):
                found.append(record)
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
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="slm-fast bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "sections", nargs="*", choices=[*SECTIONS, []], help=", ".join(SECTIONS) + " (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="few sizes, at most five minutes on two cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=machine.DEVICE)
    parser.add_argument("--output", type=Path, default=Path("bench_output"), help="folder of the result")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    result = run(args.sections or list(SECTIONS), args.quick, args.device, args.output)
    print_targets(result["targets"])
    written = page.write(result, args.output)
    print(f"\n{sum(result['seconds'].values()):.0f} s: {args.output / 'suite.json'}, {written}")
    return int(bool(result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
