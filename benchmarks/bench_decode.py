"""Decoding on the CPU: the engine beside the frozen model, PEFT and the authors' dense offsets.

Every row has a mixture of its own (K=2 entries of rank 8, as an adapter of rank 16 for PEFT); `contenders.py`
says who takes part. All start from the same prompt, are held against an fp32 model first (at most twice the
error that PEFT, or the frozen model, makes in bf16) and then take turns, step by step. Milliseconds per step:
median, distance of the quartiles.

"floor" is what reading the distinct entries beside the base must add: their bytes over the measured read
bandwidth. The last line is JSON.

    python benchmarks/bench_decode.py [--quick] [--model smol 7b] [--json FILE]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import contenders as common
import torch
from contenders import ENTRIES, RANK, TARGETS
from cpu_timing import interleaved, machine, read_bandwidth, report
from transformers import DynamicCache

PROMPT = 16


class Decoder:
    """A contender: a prompt that is read, then one token after the other."""

    def __init__(self, forward: Callable, rows: int, vocab: int) -> None:
        self.forward, self.cache = forward, DynamicCache()
        self.prompt = common.make_prompt(vocab, rows, PROMPT)
        self.token = self.prompt[:, :1]

    @torch.inference_mode()
    def read_prompt(self) -> torch.Tensor:
        self.forward(input_ids=self.prompt, past_key_values=self.cache, use_cache=True)
        return self().float()

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        return self.forward(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits[:, -1]


def verified(base: torch.nn.Module, kind: str, entries: int, rows: int, wrong: common.Wrong = None) -> tuple:
    """(model, routing, {name: Decoder}) of all contenders, which have read the prompt and were right, but for
    those that `wrong`, where given, has got."""
    vocab = base.config.vocab_size
    model, routing, forwards = common.make_contenders(base, TARGETS[kind], entries, rows, wrong)
    decoders = {
        key: Decoder(forward, 1 if key == "dense" else rows, vocab) for key, forward in forwards.items()
    }
    got = common.answers({key: decoder.read_prompt for key, decoder in decoders.items()}, wrong)
    exact = [Decoder(common.exact_forward(model, r), rows, vocab).read_prompt() for r in (routing, None)]
    common.verify(got, *exact, wrong)
    return model, routing, decoders


def measure(base: torch.nn.Module, kind: str, entries: int, rows: int, rounds: int, bandwidth: float) -> dict:
    model, routing, decoders = verified(base, kind, entries, rows)
    record = common.summary(interleaved(decoders, rounds), rows)
    features = common.factor_features(model)
    added_bytes = common.distinct_entries(routing) * RANK * features * 2
    floor = 1e5 * added_bytes / bandwidth / record["milliseconds"]["off"]
    return {"targets": kind, "entries": entries, "rows": rows, **record, "floor_percent": floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--entries", type=int, help="of the pool: default 64 for smol, 12 for 7b")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="smol alone, few rounds, within a minute")
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()
    if args.quick:
        args.model, args.rows, args.targets, args.rounds = ["smol"], [1, 8], ["all"], 5
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads; ms per step")
    common.print_header(f"{'rows':>5}", "floor")
    results = []
    for name in args.model:
        base = common.make_base(name)
        for kind in args.targets:
            for rows in args.rows:
                entries = args.entries or ENTRIES[name]
                found = measure(base, kind, entries, rows, args.rounds, bandwidth)
                results.append({"model": name, **found})
                common.print_record(results[-1], f"{rows:5}", results[-1]["floor_percent"], 2)
    report({"machine": machine(), "bytes_per_second": bandwidth, "results": results}, args.json)


if __name__ == "__main__":
    main()
