"""Two result files of one benchmark: what became slower, or larger, than the noise of both allows.

    python benchmarks/compare.py BEFORE.json AFTER.json [--least 3]

Times are compared as ratios to the frozen model, or PyTorch, in the same run, so that a faster or busier
machine does not count; memory as it is; in results of the suite routing and accuracy by the share that they
miss. A case is worse when that grew by more than the noise that the two runs measured (half the distance of
the quantiles, in other results those of ours and the reference together), and by at least `--least` percent.
Cases that only one file has are named. The exit status is 1 if anything is worse, or a section of the suite
failed that did not before, 2 if there is nothing to compare.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REFERENCES = ("frozen", "transformers", "torch", "faiss flat", "autograd")
PEERS = (
    *REFERENCES,
    "frozen again",
    "frozen eager",
    "peft",
    "peft_r",
    "merged",
    "dense",
    "dense_rows",
    "faiss",
)
KEYS = (
    "benchmark",
    "model",
    "dtype",
    "targets",
    "entries",
    "checkpointing",
    "rows",
    "tokens",
    "name",
    "group",
)
NOISE = 0.05  # of a time whose spread was not kept, and of memory


class Cost(NamedTuple):
    """Of a contender: a ratio to the reference, or bytes; infinite where it failed."""

    value: float
    noise: float


def records(result: object) -> Iterator[dict]:
    """Every dict in a result that says what a case cost."""
    if isinstance(result, list):
        for part in result:
            yield from records(part)
    elif isinstance(result, dict):
        if {"milliseconds", "seconds", "contender", "contenders"} & set(result) and set(KEYS) & set(result):
            yield result
        else:
            for part in result.values():
                yield from records(part)


def costs(record: dict) -> Iterator[tuple[str, Cost]]:
    """(contender, its cost) of a record, ours alone."""
    if "contender" in record:  # of a GPU
        if record["contender"] in PEERS or record["contender"] == "all":
            return
        if "error" in record:
            yield record["contender"], Cost(float("inf"), 0.0)
        elif "ratio" in record:
            low, high = record["added_quartiles"]
            yield record["contender"], Cost(record["ratio"], (high - low) / 200 / record["ratio"])
        return
    if "contenders" in record:
        for name, found in record["contenders"].items():
            if name not in PEERS:
                yield name, Cost(found["above_frozen"], NOISE)
        return
    times = record.get("milliseconds") or record["seconds"]
    reference = next((name for name in REFERENCES if name in times), None)
    if not isinstance(times, dict) or reference is None:
        return

    def noise(name: str) -> float:
        quartiles = record.get("quartiles", {})
        return quartiles[name] / times[name] / 2 if name in quartiles else NOISE

    for name in times:
        if name not in PEERS:
            yield name, Cost(times[name] / times[reference], noise(name) + noise(reference))


def lost(before: dict, after: dict) -> list[str]:
    """Sections of the suite that failed in `after` and did not before."""
    new = {name: why for name, why in after.get("failed", {}).items() if name not in before.get("failed", {})}
    return [f"WORSE {name} failed: {why}" for name, why in new.items() if name in before.get("seconds", {})]


def same_machine(before: dict, after: dict) -> bool:
    """Whether two results are of one kind of machine; what varies from run to run does not count."""
    names = ("cpu", "card", "threads", "isa", "torch", "transformers", "triton", "driver")
    a, b = ({name: result.get("machine", {}).get(name) for name in names} for result in (before, after))
    return a == b and before.get("quick") == after.get("quick")


def suite_cases(result: dict) -> dict[str, Cost]:
    """Of the suite: ours over a peer of the same run, bytes in memory, and scores by what they lose."""
    found = {}
    for record in result["results"]:
        case, ours = f"{record['section']}, {record['case']}", record["contenders"][record["ours"]]
        peers = [name for name in REFERENCES if "ratio" in record["contenders"].get(name, {})]
        for name in peers[:1]:
            low, ratio, high = (record["contenders"][name][f"ratio{end}"] for end in ("_low", "", "_high"))
            found[f"{case}: time over {name}"] = Cost(1 / ratio, (high - low) / 2 / ratio)
        if ours.get("memory_bytes"):
            found[f"{case}: memory"] = Cost(ours["memory_bytes"], NOISE)
        for share in ("average", "routing"):
            if ours.get(share) is not None:
                found[f"{case}: share missed, {share}"] = Cost(1 - ours[share], NOISE)
    return found


def cases(result: dict) -> dict[str, Cost]:
    if "ceilings" in result and "schema" in result:
        return suite_cases(result)
    found = {}
    for record in records(result):
        case = " ".join(f"{key}={record[key]}" for key in KEYS if key in record)
        found |= {f"{case}: {name}": cost for name, cost in costs(record)}
    return found


def compare(before: dict, after: dict, least: float = 0.03) -> tuple[list[str], bool]:
    """A line per case, the worst first, and whether one of them is worse."""
    old, new = cases(before), cases(after)
    if not (both := old.keys() & new.keys()):
        raise ValueError("the files have no case in common")
    rows, bad = [], False
    for name in both:
        a, b = old[name], new[name]
        grown = float("inf") if b.value == float("inf") else b.value / a.value - 1 if a.value else b.value
        if a.value == float("inf"):
            grown = 0.0 if b.value == float("inf") else -1.0
        allowed = max(least, a.noise + b.noise)
        worse = grown > allowed
        bad |= worse
        text = "failed" if grown == float("inf") else f"{100 * grown:+.1f}% (noise {100 * allowed:.1f}%)"
        rows.append((grown - allowed, f"{'WORSE ' if worse else '      '}{name}  {text}"))
    lines = [line for _, line in sorted(rows, key=lambda row: -row[0])]
    lines += [f"      only before: {name}" for name in sorted(old.keys() - both)]
    lines += [f"      only after: {name}" for name in sorted(new.keys() - both)]
    return lines, bad


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=3, help="percent below which nothing counts")
    args = parser.parse_args(argv)
    try:
        before, after = (json.loads(path.read_text(encoding="utf8")) for path in (args.before, args.after))
        lines, bad = compare(before, after, args.least / 100)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    if not same_machine(before, after):
        print("the machines, or the modes, differ: ratios to the reference need not be the same on both")
    failed = lost(before, after)
    print("\n".join(failed + lines))
    return int(bad or bool(failed))


if __name__ == "__main__":
    sys.exit(main())
