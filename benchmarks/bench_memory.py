"""Memory and throughput of decoding 16 rows on the CPU: engine, PEFT and the authors' dense offsets.

Each contender runs in a process of its own: it loads, decodes once, resets the peak of its resident memory
and decodes on. Reported are the highest resident memory from then on, less the frozen model's, beside the
bytes of the pool, and the peak while loading. The authors' method holds a dense offset for every linear of
one row. The last line is JSON.

    python benchmarks/bench_memory.py [--quick] [--model smol 7b] [--json FILE]
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import contenders as common
import torch
from bench_decode import Decoder
from contenders import ENTRIES, TARGETS
from cpu_timing import machine, report
from suite import memory
from suite.memory import resident

CONTENDERS = ("frozen", "off", "on", "peft", "dense")


def reset_peak() -> None:
    """Of memory in use, without what only waits for Python's collector."""
    gc.collect()
    memory.reset_peak()


def contender(name: str, base: torch.nn.Module, kind: str, entries: int, rows: int) -> tuple:
    """(forward, rows that it takes at once, bytes of the pool)"""
    if name == "frozen":
        return base, rows, 0
    targets = TARGETS[kind]
    if name in ("off", "on"):
        model = common.make_engine(base, targets, entries)
        size = sum(t.numel() * t.element_size() for f in model.pool.factors for t in (f.A, f.B))
        return (
            common.engine_forward(model, common.make_routing(model, rows) if name == "on" else None),
            rows,
            size,
        )
    # Adapters and offsets of the same sizes, without a pool that would stay in memory.
    skeleton = common.make_engine(base, targets, 2 if name == "dense" else entries)
    routing = common.make_routing(skeleton, 1 if name == "dense" else rows)
    pool, base = skeleton.pool, skeleton.unload()
    skeleton.pool = pool
    if name == "peft":
        peft_model = common.make_peft(base, skeleton, targets, routing)
        names = [f"r{row}" for row in range(rows)]
        return (lambda **inputs: peft_model(**inputs, adapter_names=names)), rows, 0
    common.add_dense_offsets(base, skeleton, routing)
    return base, 1, 0


def child(args) -> None:
    base = common.make_base(args.model[0])
    forward, at_once, pool_bytes = contender(
        args.child, base, args.targets[0], ENTRIES[args.model[0]], args.rows
    )
    decoder = Decoder(forward, at_once, base.config.vocab_size)
    del base, forward
    decoder.read_prompt()
    loading = resident("VmHWM")
    reset_peak()
    seconds = []
    for _ in range(args.rounds):
        begin = time.perf_counter()
        decoder()
        seconds.append(time.perf_counter() - begin)
    per_row = statistics.median(seconds) / at_once
    print(
        json.dumps(
            {
                "peak": resident("VmHWM"),
                "loading_peak": loading,
                "pool": pool_bytes,
                "tokens_per_second": 1 / per_row,
            }
        )
    )


def run(name: str, model: str, kind: str, rows: int, rounds: int) -> dict:
    options = ["--model", model, "--targets", kind, "--rows", str(rows), "--rounds", str(rounds)]
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, *options], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, kind: str, rows: int, rounds: int, repeats: int) -> dict:
    """Medians of several processes, which take turns."""
    found: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for _ in range(repeats):
        for name in CONTENDERS:
            found[name].append(run(name, model, kind, rows, rounds))
    medians = {
        name: {key: statistics.median(r[key] for r in records) for key in records[0]}
        for name, records in found.items()
    }
    frozen = medians["frozen"]["peak"]
    for record in medians.values():
        record["above_frozen"] = record["peak"] - frozen
    return {"model": model, "targets": kind, "rows": rows, "contenders": medians}


def print_record(record: dict) -> None:
    for name, found in record["contenders"].items():
        pool = found["pool"]
        share = f"{found['above_frozen'] / pool - 1:+8.1%}" if pool else ""
        print(
            f"{record['model']:5}{record['targets']:7}{record['rows']:5} {name:8}{found['peak'] / 1e6:9.0f}"
            f"{found['above_frozen'] / 1e6:+9.0f}{pool / 1e6:9.0f}{share:9}{found['loading_peak'] / 1e6:9.0f}"
            f"{found['tokens_per_second']:9.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["all"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="smol alone, once, within a minute")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    if args.quick:
        args.model, args.targets, args.rounds, args.repeats = ["smol"], ["all"], 3, 1
    print(
        f"MB resident\n{'':12}{'rows':>5}{'':9}"
        + "".join(f"{title:>9}" for title in ("peak", "above", "pool", "over", "loading", "tokens/s"))
    )
    results = []
    for model in args.model:
        for kind in args.targets:
            results.append(measure(model, kind, args.rows, args.rounds, args.repeats))
            print_record(results[-1])
    report({"machine": machine(), "results": results}, args.json)


if __name__ == "__main__":
    main()
