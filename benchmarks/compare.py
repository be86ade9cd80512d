"""Two result files of one benchmark: what became slower, or larger, than the noise of both allows.

    python -m benchmarks compare BEFORE.json AFTER.json [--least 3]

Every contender that is ours is compared, peers are not. Times are compared as ratios to the frozen model, or
PyTorch, in the same run (eager calls to the eager one), so that a faster or busier machine does not count;
where a record of the suite has no such contender, to a product of as many operations at the pace that was
measured beside it. Serving counts by the time until the first token (95%) too, pools of several sizes also by
what the larger ones cost over the smallest. Memory is compared as it is, routing and accuracy by the share
that they miss.

A case is worse when that grew by more than the noise that the two runs measured, and by at least `--least`
percent. In the suite a ratio's noise is `SURE` times half the distance of its quantiles over the root of its
rounds; elsewhere it is half the distance, of ours and the reference together. The last line says how many
cases could only have shown a growth beyond `BLIND`. A case, or a contender of ours, that is gone although its
section, or its group (GPU ops) or model with its settings (other benchmarks), was run again counts as a
failure; it is only named where that was not run, or the section ran in another mode or on another device.
Results of `bench_routing.py`, `bench_layers.py`, `bench_transfer.py` and `bench_continual.py` hold no costs.

Exit status: 0 nothing is worse; 1 something is, or a section of the suite failed that did not before; 2 "no
case in common"; 3 a file cannot be read, or the files have unlike schemas.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OURS = ("slm_fast", "on", "off", "in the prefill", "engine")  # of the suite; before a comma or EAGER
EAGER = " eager"  # ends the names of what is no graph on a GPU
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
WORDS = ("benchmark", "model", "dtype", "targets", "checkpointing", "name", "group")  # of a record: what ran
SIZES = ("entries", "rows", "tokens")
KEYS = (*WORDS, *SIZES)
NOISE = 0.05  # of a time whose spread was not kept, and of memory
# Ratios of unchanged code move between two runs by less than 2.5 in 95% of 153 cases, less than 3.9 in all.
SURE = 4.0
BLIND = 0.2
SMALL = 4e6  # bytes of resident memory, below which a call's peak says nothing; see suite/memory.py


class Cost(NamedTuple):
    """Of a contender: a ratio to the reference, or bytes; infinite where it failed. group: what it is part
    of; record: the suite's case, and where it is not the first of ours its contender, without what is
    measured."""

    value: float
    noise: float
    group: str = ""
    record: str = ""


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


def words_of(record: dict, keys: tuple[str, ...]) -> str:
    return " ".join(f"{key}={record[key]}" for key in keys if key in record)


def of_benchmark(result: dict) -> dict[str, Cost]:
    """Of a benchmark that is not the suite."""
    found = {}
    for record in records(result):
        case, group = words_of(record, KEYS), words_of(record, WORDS)
        found |= {f"{case}: {name}": cost._replace(group=group) for name, cost in costs(record)}
    return found


def parts(result: dict) -> tuple[dict | None, dict]:
    """(the suite's result or None, what else has costs) of a file; a GPU check's `steps` have none."""
    if "ceilings" in result and "schema" in result:
        return result, {}
    return result.get("suite"), {key: part for key, part in result.items() if key not in ("suite", "steps")}


def key_of(record: dict) -> str:
    return f"{record['section']}, {record['case']}"


def references_of(record: dict) -> list[str]:
    """The contenders that ours can be held against in a record of the suite."""
    names = (*REFERENCES, f"frozen{EAGER}")
    return [name for name in names if "ratio" in record["contenders"].get(name, {})]


def references(result: dict | None) -> dict[str, list[str]]:
    """{case of the suite: those of its record}"""
    return {key_of(record): references_of(record) for record in (result or {}).get("results", [])}


def ours_of(record: dict) -> list[str]:
    """The contenders of a suite's record that are ours, `ours` first; the pools of a "flat" case all are."""
    ours, flat = record["ours"], record["axes"].get("kind") == "flat"
    found = [n for n in record["contenders"] if flat or n.removesuffix(EAGER).split(",")[0] in OURS]
    return [ours] * (ours in record["contenders"]) + [name for name in found if name != ours]


def record_of(record: dict, name: str) -> str:
    """As `Cost.record`."""
    return key_of(record) + ("" if name == record["ours"] else f", {name}")


def spread(found: dict, what: str = "ratio") -> float:
    """The noise of a contender's ratio to ours, or of another number with quantiles of its rounds."""
    half = (found[f"{what}_high"] - found[f"{what}_low"]) / 2 / found[what]
    return SURE * half / math.sqrt(found["rounds"])


def times(record: dict, name: str, shared: list[str]) -> Iterator[tuple[str, Cost]]:
    """(what, cost) of a contender of a suite's record; shared: references that both files have."""
    contenders, found, first = record["contenders"], record["contenders"][name], name == record["ours"]
    which, failed = "time" if first else f"time of {name}", "error" in found
    if not first and record["axes"].get("kind") == "flat":
        cost = Cost(float("inf"), 0.0) if failed else Cost(found["ratio"], spread(found))
        yield f"{which} over {record['ours']}", cost
    elif shared:
        eager = name.endswith(EAGER)
        reference = next((peer for peer in shared if peer.endswith(EAGER) == eager), shared[0])
        what, peer = f"{which} over {reference}", contenders[reference]
        if failed:
            yield what, Cost(float("inf"), 0.0)
        elif "ratio" in found:
            yield what, Cost(found["ratio"] / peer["ratio"], spread(found) + spread(peer))
        if "first_token_95" in found and "first_token_95" in peer:
            what = f"first token, 95%, {'' if first else f'of {name}, '}over {reference}"
            noise = tail_noise(found) + tail_noise(peer)
            yield what, Cost(found["first_token_95"] / peer["first_token_95"], noise)
    elif "pace" in record and record.get("operations"):
        if failed:
            yield f"{which} over a product's", Cost(float("inf"), 0.0)
        elif "seconds" in found:
            rate = record["pace"]["float32_operations_per_second"]
            noise = (found["high"] - found["low"]) / 2 / found["seconds"]  # of no pairs: with the drift
            yield f"{which} over a product's", Cost(found["seconds"] * rate / record["operations"], noise)


def tail_noise(found: dict) -> float:
    return spread(found, "first_token_95") if "first_token_95_low" in found else NOISE


def other_costs(record: dict, name: str) -> Iterator[tuple[str, Cost]]:
    """Bytes in memory, and scores by what they lose."""
    found, of = record["contenders"][name], "" if name == record["ours"] else f" of {name}"
    if found.get("memory_bytes"):
        yield f"memory{of}", Cost(found["memory_bytes"], NOISE)
    if found.get("peak_bytes") is not None:
        least = SMALL if record["clock"] == "wall" else 1.0
        size = max(found["peak_bytes"], least)
        yield f"peak memory{of}", Cost(size, NOISE + (SMALL / size / 2 if least == SMALL else 0.0))
    for share in ("average", "routing"):
        if found.get(share) is not None:
            yield f"share missed, {share}{of}", Cost(1 - found[share], NOISE)


def of_suite(result: dict | None, other: dict | None) -> dict[str, Cost]:
    """Costs of the suite's contenders that are ours. other: the result it is compared with."""
    found, known = {}, references(other)
    for record in (result or {}).get("results", []):
        key, mine = key_of(record), references_of(record)
        shared = [name for name in mine if name in known.get(key, mine)]
        for name in ours_of(record):
            for what, cost in (*times(record, name, shared), *other_costs(record, name)):
                found[f"{key}: {what}"] = cost._replace(
                    group=record["section"], record=record_of(record, name)
                )
    return found


def cases(result: dict, other: dict | None = None) -> dict[str, Cost]:
    """All costs of a file. other: the one that it is compared with; by default itself."""
    suite, rest = parts(result)
    return of_suite(suite, parts(other or result)[0]) | of_benchmark(rest)


def quick_of(suite: dict, section: str) -> bool | None:
    """Whether a section ran in quick mode: `gpu_check.py` keeps that for each section by itself."""
    quick = suite.get("quick")
    return quick.get(section) if isinstance(quick, dict) else quick


def unlike_modes(before: dict | None, after: dict | None) -> set[str]:
    """The sections whose cases need not be the same in two results of the suite; a run that begins has none
    yet, its mode counts for all of the other's."""
    a, b = before or {}, after or {}
    ran, again = (result.get("seconds", {}).keys() for result in (a, b))
    sections = ran & again or ran | again
    if a.get("machine", {}).get("device") != b.get("machine", {}).get("device"):
        return sections
    found = {section: (quick_of(a, section), quick_of(b, section)) for section in sections}
    return {section for section, quick in found.items() if None not in quick and len({*quick}) > 1}


def was_run(before: dict, after: dict) -> set[str]:
    """The groups that `after` ran, so that it must have their cases."""
    suite, rest = parts(after)
    found = {words_of(record, WORDS) for record in records(rest)}
    if suite is not None:
        found |= suite["seconds"].keys() - unlike_modes(parts(before)[0], suite)
    return found


def lost(before: dict, after: dict) -> list[str]:
    """Sections of the suite that failed in `after` and did not before."""
    old, new = (parts(result)[0] or {} for result in (before, after))
    failed = {name: why for name, why in new.get("failed", {}).items() if name not in old.get("failed", {})}
    return [f"WORSE {name} failed: {why}" for name, why in failed.items() if name in old.get("seconds", {})]


def ran(result: dict) -> set[str]:
    """The sections of the suite and the other parts with costs."""
    suite, rest = parts(result)
    return {*(suite or {}).get("seconds", {}), *(name for name, part in rest.items() if any(records(part)))}


def without_before(before: dict, after: dict) -> list[str]:
    """What `after` ran and `before` did not, or not to its end."""
    failed = (parts(before)[0] or {}).get("failed", {})
    reasons = dict.fromkeys(ran(after) - ran(before), "not run before")
    reasons |= {name: f"failed before, {why}" for name, why in failed.items()}
    return [f"UNCOMPARED {name}: {reasons[name]}" for name in sorted(reasons.keys() & ran(after))]


def same_machine(before: dict, after: dict) -> bool:
    """Whether two results are of one kind of machine and mode; what varies from run to run does not count."""
    names = ("cpu", "card", "threads", "isa", "torch", "transformers", "triton", "driver")
    before, after = (parts(result)[0] or result for result in (before, after))
    a, b = ({name: result.get("machine", {}).get(name) for name in names} for result in (before, after))
    return a == b and not unlike_modes(before, after)


class NothingInCommon(ValueError):
    """Two files without a case that both have."""


def check_schemas(before: dict, after: dict) -> None:
    """Raises ValueError where the files, or the suites' results in them, have unlike schemas."""
    for a, b in ((before, after), (parts(before)[0] or {}, parts(after)[0] or {})):
        if "schema" in a and "schema" in b and a["schema"] != b["schema"]:
            raise ValueError(f"schema {a['schema']} cannot be compared with schema {b['schema']}")


def compare(before: dict, after: dict, least: float = 0.03) -> tuple[list[str], bool]:
    """A line per case, the worst first, and whether one of them is worse, or gone. Raises ValueError where
    the files cannot be compared, `NothingInCommon` where no case is in both."""
    check_schemas(before, after)
    old, new = cases(before, after), cases(after, before)
    results, again = (parts(after)[0] or {}).get("results", []), was_run(before, after)
    there = {record_of(record, name) for record in results for name in ours_of(record)}
    # One measure of a suite's case may be gone, such as that over a peer that is not installed any more.
    gone = [name for name in sorted(old.keys() - new.keys()) if old[name].group in again]
    gone = [name for name in gone if old[name].record not in there]
    if not (both := old.keys() & new.keys()) and not gone:
        raise NothingInCommon("no case in common")
    rows, bad, blind = [], bool(gone), 0
    for name in sorted(both):
        a, b = old[name], new[name]
        grown = float("inf") if b.value == float("inf") else b.value / a.value - 1 if a.value else b.value
        if a.value == float("inf"):
            grown = 0.0 if b.value == float("inf") else -1.0
        allowed = max(least, a.noise + b.noise)
        worse = grown > allowed
        bad |= worse
        blind += allowed > BLIND
        text = "failed" if grown == float("inf") else f"{100 * grown:+.1f}% (noise {100 * allowed:.1f}%)"
        rows.append((grown - allowed, f"{'WORSE ' if worse else '      '}{name}  {text}"))
    lines = [f"WORSE {name}  is gone" for name in gone]
    lines += [line for _, line in sorted(rows, key=lambda row: -row[0])]
    lines += [f"      only before: {name}" for name in sorted(old.keys() - new.keys() - set(gone))]
    lines += [f"      only after: {name}" for name in sorted(new.keys() - both)]
    lines.append(f"      {blind} of {len(both)} compared could only have shown a growth beyond {BLIND:.0%}")
    return lines, bad


def load(path: Path) -> dict:
    """Raises OSError or ValueError where that is no result."""
    if not isinstance(result := json.loads(path.read_text(encoding="utf8")), dict):
        raise ValueError(f"{path} is no result of a benchmark")
    return result


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="slm-fast bench compare", description=__doc__, formatter_class=raw)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=3, help="percent below which nothing counts")
    args = parser.parse_args(argv)
    try:
        before, after = load(args.before), load(args.after)
        lines, bad = compare(before, after, args.least / 100)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2 if isinstance(error, NothingInCommon) else 3
    if not same_machine(before, after):
        print("the machines, or the modes, differ: ratios to the reference need not be the same on both")
    failed = lost(before, after)
    print("\n".join(failed + without_before(before, after) + lines))
    return int(bad or bool(failed))


if __name__ == "__main__":
    sys.exit(main())
