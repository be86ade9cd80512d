"""Prefill on the CPU: 8 prompts of 512 tokens, every row its own mixture.

Contenders, verification and turns as in `bench_decode.py`. "share" is the mixture's part of the operations,
K r (in + out) multiply-adds a token beside in x out; the lm_head reads the last token alone in both.
The last line is JSON.

    python benchmarks/bench_prefill.py [--quick] [--model smol 7b] [--json FILE]
"""

import argparse
from pathlib import Path

import contenders as common
import torch
from contenders import ENTRIES, RANK, TARGETS, TOP_K
from cpu_timing import interleaved, machine, report
from torch import nn


def operations_share(base: nn.Module, model, tokens: int) -> float:
    """Multiply-adds of the mixture over the frozen model's: its linears and its causal attention."""
    mixture = common.factor_features(model) * TOP_K * RANK
    head = base.get_output_embeddings()
    linears = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear) and m is not head)
    config = base.config
    attention = (
        config.num_hidden_layers * config.num_attention_heads * base.model.layers[0].self_attn.head_dim
    )
    return mixture / (linears + head.weight.numel() / tokens + attention * tokens)


def verified(
    base: nn.Module, kind: str, entries: int, rows: int, tokens: int, wrong: common.Wrong = None
) -> tuple:
    """(model, routing, {name: prefill}) of all contenders, which were right, but for those that `wrong`,
    where given, has got."""
    model, routing, forwards = common.make_contenders(base, TARGETS[kind], entries, rows, wrong)
    prompt = common.make_prompt(base.config.vocab_size, rows, tokens)

    def call(key, forward, ids):
        @torch.inference_mode()
        def run():
            return forward(input_ids=ids, logits_to_keep=1).logits[:, -1]

        return run

    calls = {
        key: call(key, forward, prompt[:1] if key == "dense" else prompt) for key, forward in forwards.items()
    }
    exact = []
    for r in (routing, None):
        exact.append(call("exact", common.exact_forward(model, r), prompt)())
    common.verify(common.answers(calls, wrong), *exact, wrong)
    return model, routing, calls


def measure(name: str, base: nn.Module, kind: str, rows: int, tokens: int, rounds: int) -> dict:
    model, _, calls = verified(base, kind, ENTRIES[name], rows, tokens)
    record = common.summary(interleaved(calls, rounds, warm=False), rows)
    share = 100 * operations_share(base, model, tokens)
    return {"model": name, "targets": kind, "rows": rows, "tokens": tokens, **record, "share_percent": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="smol alone, 2 x 128 tokens, within a minute")
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()
    if args.quick:
        args.model, args.targets, args.rows, args.tokens, args.rounds = ["smol"], ["all"], 2, 128, 3
    print(f"{torch.get_num_threads()} threads; ms a batch")
    common.print_header(f"{'tokens':>9}", "share")
    results = []
    for name in args.model:
        base = common.make_base(name)
        for kind in args.targets:
            results.append(measure(name, base, kind, args.rows, args.tokens, args.rounds))
            size = f"{args.rows} x{args.tokens:4}"
            common.print_record(results[-1], f"{size:>9}", results[-1]["share_percent"], 0)
    report({"machine": machine(), "results": results}, args.json)


if __name__ == "__main__":
    main()
