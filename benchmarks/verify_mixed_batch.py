"""A mixed batch against its rows alone and against merged weights: a LLaMA-architecture model in fp32.

    python benchmarks/verify_mixed_batch.py

Prints how many of 32 rows, each with a mixture of its own, give the tokens that the row gives alone (greedy),
and the largest difference between a row's logits and those of the model with that mixture merged into it.
"""

import argparse
import json

import torch

from slm_fast import Routing, SLMConfig, get_slm_model
from slm_fast.loading import load_base
from slm_fast.reference import dense_offset

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "def add(a, b):",
    "Once upon a time, there was a",
]


def random_routing(
    num_rows: int, num_entries: int, top_k: int, generator: torch.Generator, version: int
) -> Routing:
    """A different mixture for every row."""
    indices = torch.stack([torch.randperm(num_entries, generator=generator)[:top_k] for _ in range(num_rows)])
    weights = torch.rand(num_rows, top_k, generator=generator) + 0.1
    return Routing.make(indices, weights / weights.sum(-1, keepdim=True), pool_version=version)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="smollm2", help="folder, hub id, GGUF file or smollm2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--entries", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=12)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    base, tokenizer = load_base(args.base)
    model = get_slm_model(
        base, SLMConfig(target_modules="all-linear", entries_per_task=4), tokenizer=tokenizer
    )
    for task in range(args.entries // 4):
        query = torch.randn(8, 32, generator=generator)
        model.add_task(f"task{task}", embeddings=query, progress=False)
    for factors in model.pool.factors:
        factors.B.copy_(0.02 * torch.randn(factors.B.shape, generator=generator))
    routing = random_routing(args.rows, args.entries, args.top_k, generator, model.pool.version)
    tokenizer.padding_side = "left"
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(args.rows)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    options = dict(max_new_tokens=args.new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)

    together = model.generate(**inputs, routing=routing, **options)
    with torch.no_grad():
        logits = model(**inputs, routing=routing).logits
        frozen = model(**inputs, adapter_names=["__base__"] * args.rows).logits
    same, worst = 0, 0.0
    originals = {name: base.get_submodule(name).weight.clone() for name in model.pool.modules_shape}
    pool = model.pool
    for row in range(args.rows):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = model.generate(**one, routing=routing.rows(slice(row, row + 1)), **options)
        same += bool(torch.equal(alone[0], together[row]))
        with torch.no_grad():
            for name, factors in zip(pool.modules_shape, pool.factors, strict=True):
                tables = (factors.A, factors.B, pool.start, pool.rank, pool.scaling)
                base.get_submodule(name).weight += dense_offset(
                    *tables, routing.indices[row], routing.weights[row]
                )
            merged = model(**one, adapter_names=["__base__"]).logits
            for name, weight in originals.items():
                base.get_submodule(name).weight.copy_(weight)
        kept = one["attention_mask"][0].bool()
        worst = max(worst, float((merged[0] - logits[row])[kept].abs().max()))
    distinct = len({tuple(row.tolist()) for row in together[:, inputs["input_ids"].shape[1] :]})
    result = {
        "rows": args.rows,
        "rows_with_the_tokens_of_the_row_alone": same,
        "distinct_answers": distinct,
        "largest_logit_difference_to_merged_weights": worst,
        "largest_logit_change_by_the_mixtures": float((logits - frozen).abs().max()),
    }
    for name, value in result.items():
        print(f"{name.replace('_', ' '):45s} {value}")
    print(json.dumps(result))
    if same != args.rows or worst > 1e-4:
        raise SystemExit("the mixed batch differs from its rows alone or from the merged model")


if __name__ == "__main__":
    main()
