"""Decoding on the CPU: the engine beside the frozen model, PEFT and the authors' dense offsets.

Every row has a mixture of its own (K=2 entries of rank 8, as a virtual adapter of rank 16 for PEFT). All
contenders start from the same prompt, are held against an fp32 model first (at most twice the error that PEFT
makes in bf16) and then take turns, step by step. Milliseconds per step: median, distance of the quartiles.

    frozen      the Hugging Face model as it is
    off         the engine with its pool switched off
    on          the engine, every row its own mixture
    peft        PEFT's adapter_names
    dense       the authors' method: W + dW in every layer, one row at a time; one row's time, times the rows

"floor" is what reading the distinct entries beside the base must add: their bytes over the measured read
bandwidth. The last line is JSON.

    python benchmarks/bench_decode.py [--quick] [--model smol 7b] [--json FILE]
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from slm_fast import Routing, SLMConfig, SLMModel, dispatch, get_slm_model
from slm_fast.layers import MixtureLinear
from slm_fast.loading import load_base
from slm_fast.reference import dense_offset

TOP_K, RANK, PROMPT = 2, 8, 16
TARGETS = {"o_proj": ["o_proj"], "all": "all-linear"}
ENTRIES = {"smol": 64, "7b": 12}  # of the pool: two for each of 32 rows, or what a batch shares


def make_base(name: str) -> torch.nn.Module:
    """SmolLM2-135M, or two layers of LLaMA-2-7B's shape with random weights."""
    if name == "smol":
        return load_base("smollm2")[0].to(torch.bfloat16).eval()
    transformers.set_seed(0)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        dtype=torch.bfloat16,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def make_engine(base: torch.nn.Module, targets, entries: int) -> SLMModel:
    config = SLMConfig(r=RANK, top_k=TOP_K, target_modules=targets, entries_per_task=1)
    model = get_slm_model(base, config)
    generator = torch.Generator().manual_seed(0)
    for entry in range(entries):
        model.pool.add_task(f"e{entry}", torch.randn(1, 8, generator=generator), generator=generator)
    model.pool.factors.to(torch.bfloat16)
    for factors in model.pool.factors:
        factors.B.copy_(0.02 * torch.randn(factors.B.shape, generator=generator))
    return model


def make_routing(model: SLMModel, rows: int) -> Routing:
    """Entries 2b and 2b + 1 for row b, as far as there are enough; then other pairs of them."""
    entries = model.pool.num_entries
    row = torch.arange(rows)
    first = 2 * row % entries
    second = (first + 1 + 2 * row // entries) % entries
    weights = torch.tensor([0.6, 0.4]).expand(rows, TOP_K)
    return Routing.make(torch.stack([first, second], 1), weights, pool_version=model.pool.version)


@torch.no_grad()
def make_peft(base: torch.nn.Module, model: SLMModel, targets, routing: Routing) -> torch.nn.Module:
    """PEFT with an adapter for each row: the row's two entries side by side, weights folded into B."""
    names = list(TARGET_NAMES) if targets == "all-linear" else targets
    config = LoraConfig(r=TOP_K * RANK, lora_alpha=TOP_K * RANK, target_modules=names)
    peft_model = get_peft_model(base, config, adapter_name="r0")
    for row in range(1, routing.num_rows):
        peft_model.add_adapter(f"r{row}", config)
    pool = model.pool
    for name, factors in zip(pool.modules_shape, pool.factors, strict=True):
        layer = peft_model.base_model.model.get_submodule(name)
        for row in range(routing.num_rows):
            picks = [slice(int(pool.start[i]), int(pool.start[i]) + RANK) for i in routing.indices[row]]
            A = torch.cat([factors.A[p] for p in picks])
            B = torch.cat([w * factors.B[p] for p, w in zip(picks, routing.weights[row], strict=True)])
            layer.lora_A[f"r{row}"].weight.copy_(A)
            layer.lora_B[f"r{row}"].weight.copy_(B.T)
    return peft_model.to(torch.bfloat16).eval()


TARGET_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_dense_offsets(base: torch.nn.Module, model: SLMModel, routing: Routing) -> None:
    """The authors' layers for row 0: the weight and its offset are added again at every step."""
    pool = model.pool
    for name, factors in zip(pool.modules_shape, pool.factors, strict=True):
        layer = base.get_submodule(name)
        entries = factors.A, factors.B, pool.start, pool.rank, pool.scaling
        offset = dense_offset(*entries, routing.indices[0], routing.weights[0]).to(layer.weight.dtype)
        layer.forward = lambda x, layer=layer, offset=offset: F.linear(x, layer.weight + offset, layer.bias)


class Decoder:
    """A contender: a prompt that is read, then one token after the other."""

    def __init__(self, forward: Callable, rows: int, vocab: int) -> None:
        self.forward, self.cache = forward, DynamicCache()
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(vocab, (32, PROMPT), generator=generator)[:rows]
        self.token = self.prompt[:, :1]

    @torch.inference_mode()
    def read_prompt(self) -> torch.Tensor:
        self.forward(input_ids=self.prompt, past_key_values=self.cache, use_cache=True)
        return self.step().float()

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        return self.forward(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits[:, -1]


def read_bandwidth() -> float:
    """Bytes per second that a sum over a large buffer reads on all threads."""
    buffer = torch.ones(1 << 28, dtype=torch.float32)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        buffer.sum()
        times.append(time.perf_counter() - begin)
    return 4 * buffer.numel() / min(times)


def added_bytes(model: SLMModel, routing: Routing) -> int:
    """Bytes of the distinct entries that a batch picks, in all targeted linears."""
    distinct = routing.indices[routing.weights != 0].unique().numel()
    features = sum(f.A.shape[1] + f.B.shape[1] for f in model.pool.factors)
    return distinct * RANK * features * 2


def verify(contenders: dict[str, Decoder], exact: Decoder, tolerated: str) -> None:
    """Raises SystemExit unless every contender's logits are as near to fp32 as PEFT's."""
    want = exact.read_prompt()
    errors = {}
    for name, decoder in contenders.items():
        got = decoder.read_prompt()
        if name not in ("frozen", "off"):
            errors[name] = float((got - want[: got.shape[0]]).abs().max() / want.abs().max())
    allowed = 2 * errors[tolerated] + 1e-2
    if bad := {name: error for name, error in errors.items() if not error <= allowed}:
        raise SystemExit(f"wrong logits, nothing is timed: {bad}, allowed {allowed:.1e}")


def interleaved(contenders: dict[str, Decoder], rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, decoder in contenders.items():
            decoder.step()
            begin = time.perf_counter()
            decoder.step()
            samples[name].append(time.perf_counter() - begin)
    return samples


def engine_forward(model: SLMModel, routing: Routing | None) -> Callable:
    def forward(**inputs):
        with model.state.use(routing):
            return model.base_model(**inputs)

    return forward


def measure(name: str, base: torch.nn.Module, kind: str, rows: int, rounds: int, bandwidth: float) -> dict:
    targets, vocab = TARGETS[kind], base.config.vocab_size
    model = make_engine(copy.deepcopy(base), targets, ENTRIES[name])
    routing = make_routing(model, rows)
    peft_model = make_peft(copy.deepcopy(base), model, targets, routing)
    names = [f"r{row}" for row in range(rows)]
    dense = copy.deepcopy(base)
    add_dense_offsets(dense, model, routing)
    contenders = {
        "frozen": Decoder(base, rows, vocab),
        "off": Decoder(engine_forward(model, None), rows, vocab),
        "on": Decoder(engine_forward(model, routing), rows, vocab),
        "peft": Decoder(lambda **inputs: peft_model(**inputs, adapter_names=names), rows, vocab),
        "dense": Decoder(dense, 1, vocab),
    }
    exact = copy.deepcopy(model).float()
    exact.pool.config.backend = "reference"
    verify(contenders, Decoder(engine_forward(exact, routing), rows, vocab), "peft")
    del exact
    samples = interleaved(contenders, rounds)
    milliseconds = {key: 1e3 * statistics.median(values) for key, values in samples.items()}
    milliseconds["dense"] *= rows
    pairs = [on / off for on, off in zip(samples["on"], samples["off"], strict=True)]
    record = {
        "model": name,
        "targets": kind,
        "rows": rows,
        "milliseconds": milliseconds,
        "quartiles": {key: quartile_distance(values) for key, values in samples.items()},
        "added_percent": 100 * (statistics.median(pairs) - 1),
        "floor_percent": 1e5 * added_bytes(model, routing) / bandwidth / milliseconds["off"],
        "linears": sum(isinstance(m, MixtureLinear) for m in model.modules()),
    }
    return record


def quartile_distance(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return 1e3 * (high - low)


def print_record(record: dict) -> None:
    ms, spread = record["milliseconds"], record["quartiles"]
    times = "".join(f"{ms[key]:8.2f} +-{spread[key]:4.1f}" for key in ("frozen", "off", "on", "peft"))
    print(
        f"{record['model']:5}{record['targets']:7}{record['rows']:5}{times}{ms['dense']:9.1f}"
        f"{record['added_percent']:+8.1f}%{record['floor_percent']:7.1f}%"
        f"{ms['frozen'] / ms['on']:7.2f}x{ms['peft'] / ms['on']:7.1f}x{ms['dense'] / ms['on']:7.1f}x",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="smol alone, few rounds, within a minute")
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()
    if args.quick:
        args.model, args.rows, args.targets, args.rounds = ["smol"], [1, 8], ["all"], 5
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads; ms per step")
    print(
        f"{'':12}{'rows':>5}{'frozen':>15}{'off':>15}{'on':>15}{'peft':>15}{'dense':>9}{'added':>9}{'floor':>8}"
        f"{'frozen/on':>9}{'peft/on':>8}{'dense/on':>9}"
    )
    results = []
    for name in args.model:
        base = make_base(name)
        for kind in args.targets:
            for rows in args.rows:
                results.append(measure(name, base, kind, rows, args.rounds, bandwidth))
                print_record(results[-1])
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine |= {"torch": torch.__version__, "transformers": transformers.__version__, **dispatch.cpu_info()}
    result = {"machine": machine, "bytes_per_second": bandwidth, "results": results}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
