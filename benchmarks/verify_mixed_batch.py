"""A mixed batch against its rows alone and against merged weights: a LLaMA-architecture model in fp32.

    python benchmarks/verify_mixed_batch.py

Prints how many of 32 rows, each with a mixture of its own, give the tokens that the row gives alone (greedy),
the largest difference between a row's logits and those of the model with that mixture merged into it, and how
far both are from the merged model in fp64: that is what fp32 itself costs.
"""

import argparse
import copy
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


@torch.no_grad()
def merged_logits(model, target, routing: Routing, row: int, inputs: dict) -> torch.Tensor:
    """Logits of `target`, the engine or a copy of its base, with one row's mixture merged into it."""
    pool = model.pool
    base = target.base_model if target is model else target
    originals = {name: base.get_submodule(name).weight.clone() for name in pool.modules_shape}
    for name, factors in zip(pool.modules_shape, pool.factors, strict=True):
        tables = (factors.A, factors.B, pool.start, pool.rank, pool.scaling)
        offset = dense_offset(*tables, routing.indices[row], routing.weights[row])
        base.get_submodule(name).weight.add_(offset.to(originals[name].dtype))
    logits = target(**inputs).logits[0]
    for name, weight in originals.items():
        base.get_submodule(name).weight.copy_(weight)
    return logits


def largest(difference: torch.Tensor, kept: torch.Tensor) -> float:
    return float(difference[kept].abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="smollm2", help="folder, hub id, GGUF file or smollm2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--entries", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--scale", type=float, default=0.03, help="standard deviation of B; trained: 0.01")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    base, tokenizer = load_base(args.base)
    exact = copy.deepcopy(base).double()
    model = get_slm_model(
        base, SLMConfig(target_modules="all-linear", entries_per_task=4), tokenizer=tokenizer
    )
    for task in range(args.entries // 4):
        query = torch.randn(8, 32, generator=generator)
        model.add_task(f"task{task}", embeddings=query, progress=False)
    for factors in model.pool.factors:
        factors.B.copy_(args.scale * torch.randn(factors.B.shape, generator=generator))
    routing = random_routing(args.rows, args.entries, args.top_k, generator, model.pool.version)
    tokenizer.padding_side = "left"
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(args.rows)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    options = dict(max_new_tokens=args.new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)

    together = model.generate(**inputs, routing=routing, **options)
    with torch.no_grad():
        logits = model(**inputs, routing=routing).logits
        frozen = model(**inputs, adapter_names=["__base__"] * args.rows).logits
    same, worst, engine_error, merged_error = 0, 0.0, 0.0, 0.0
    for row in range(args.rows):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = model.generate(**one, routing=routing.rows(slice(row, row + 1)), **options)
        same += bool(torch.equal(alone[0], together[row]))
        merged = merged_logits(model, model, routing, row, one | {"adapter_names": ["__base__"]})
        truth = merged_logits(model, exact, routing, row, one)
        kept = one["attention_mask"][0].bool()
        worst = max(worst, largest(merged - logits[row], kept))
        engine_error = max(engine_error, largest(logits[row] - truth, kept))
        merged_error = max(merged_error, largest(merged - truth, kept))
    distinct = len({tuple(row.tolist()) for row in together[:, inputs["input_ids"].shape[1] :]})
    result = {
        "rows": args.rows,
        "rows_with_the_tokens_of_the_row_alone": same,
        "distinct_answers": distinct,
        "largest_logit_difference_to_merged_weights": worst,
        "engine_error_against_fp64": engine_error,
        "merged_error_against_fp64": merged_error,
        "largest_logit": float(logits.abs().max()),
        "relative_difference_to_merged_weights": worst / float(logits.abs().max()),
        "largest_logit_change_by_the_mixtures": float((logits - frozen).abs().max()),
    }
    for name, value in result.items():
        print(f"{name.replace('_', ' '):45s} {value}")
    print(json.dumps(result))
    if same != args.rows:
        raise SystemExit("a row of the mixed batch differs from the row alone")
    if worst > 1e-4 * result["largest_logit"] or engine_error > 2 * merged_error + 1e-4:
        raise SystemExit("the mixed batch differs from the merged model")


if __name__ == "__main__":
    main()
