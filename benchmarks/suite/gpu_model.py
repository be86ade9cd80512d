"""A whole model on a GPU: LLaMA-2-7B's shape with random weights, bf16, every row its own mixture.

Decoding is one step behind a prompt over a static cache, again and again at the same place, as a CUDA graph
where a name does not say "eager" (PEFT's adapters by row cannot be captured: `peft` is eager). `frozen` is
transformers' own code in a graph: what a mixture must be compared with; `frozen eager` is what `generate`
runs by default. Contenders share the base's weights but for the engine, whose q, k, v and gate, up are one
tensor each. All are held against an fp32 copy as in `contenders.py`; a peer that is wrong has no time.
"""

import copy
from collections.abc import Callable, Iterator

import bench_training
import contenders as common
import gpu_timing
import torch
import transformers
from bench_prefill import operations_share
from contenders import RANK, TARGETS, TOP_K
from scaling_shapes import Batch, Pool, count_training, of_config
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from suite.cases import Case, contenders_of
from suite.machine import dtype_name

PROMPT, CONTEXT, ENTRIES = 128, 256, 12  # tokens; tokens of the cache; of the pool
SHAPE = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
NAME = "llama-2-7b"
WIDE_LAYERS = 4  # of the model that is trained
OURS = "on"
EAGER = " eager"


def make_base(device: str, vocab_size: int = 32000, **shape) -> LlamaForCausalLM:
    """Made where it stays; the same at every call."""
    transformers.set_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, **(SHAPE | shape))
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


class Step:
    """A decoding step; a call runs it, or replays its graph, and returns the logits [rows, vocab]."""

    def __init__(self, forward: Callable, config: LlamaConfig, prompt: Tensor, graph: bool) -> None:
        self.forward, self.cache = forward, StaticCache(config=config, max_cache_len=CONTEXT)
        if not hasattr(self.cache.layers[0], "cumulative_length"):
            raise RuntimeError(
                f"decoding needs the cache of transformers 5.17; this is {transformers.__version__}"
            )
        self.token, self.replay = prompt[:, :1].clone(), None
        self.position = torch.full((1, 1), prompt.shape[1], device=prompt.device)
        with torch.inference_mode():
            forward(input_ids=prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.lengths = [layer.cumulative_length for layer in self.cache.layers]
            if graph:
                self.replay = gpu_timing.Captured(lambda _: self.run(), 1)

    def run(self) -> Tensor:
        out = self.forward(
            input_ids=self.token, position_ids=self.position, past_key_values=self.cache, use_cache=True
        )
        torch._foreach_sub_(self.lengths, 1)  # the next step takes this one's place
        return out.logits[:, -1]

    def __call__(self) -> Tensor:
        if self.replay is not None:
            self.replay()
            return self.replay.results[0]
        with torch.inference_mode():
            return self.run()


def make_engine(base: nn.Module, rows: int) -> tuple:
    """(model, routing) on a copy of the base."""
    model = common.make_engine(copy.deepcopy(base), TARGETS["all"], ENTRIES).to(base.device)
    return model, common.make_routing(model, rows).to(base.device)


def exact(model, routing, call: Callable[[Callable], Tensor]) -> list[Tensor]:
    """`call`'s logits of the fp32 copy, with the mixtures and without; the copy is gone afterwards."""
    twin = copy.deepcopy(model).float()
    twin.pool.config.backend = "reference"
    return [call(common.engine_forward(twin, chosen)).float().clone() for chosen in (routing, None)]


def linears(base: nn.Module) -> int:
    """Weights of all linears, the head's too."""
    return sum(module.weight.numel() for module in base.modules() if isinstance(module, nn.Linear))


def decode_case(base: nn.Module, rows: int, graph: bool = True) -> Case:
    model, routing = make_engine(base, rows)
    prompt = common.make_prompt(base.config.vocab_size, rows, PROMPT).to(base.device)
    wanted = exact(model, routing, lambda forward: Step(forward, base.config, prompt, False)())
    wrong: dict[str, str] = {}
    found = common.forwards(base, model, TARGETS["all"], routing, wrong)
    found |= {name + EAGER: found[name] for name in ("frozen", OURS)}
    calls = {}
    for name, forward in found.items():
        captured = graph and not name.endswith(EAGER) and name != "peft"
        with common.excused(name, wrong):
            calls[name] = Step(forward, base.config, prompt[:1] if name == "dense" else prompt, captured)
    common.verify(common.answers(calls, wrong), *wanted, wrong)
    distinct = common.distinct_entries(routing)
    axes = {"kind": "decode", "model": NAME, "rows": rows, "entries": ENTRIES, "distinct": distinct}
    axes |= {"dtype": "bfloat16", "context": PROMPT}
    itemsize, added = base.dtype.itemsize, RANK * common.factor_features(model)
    size = itemsize * (linears(base) + distinct * added)
    operations = 2 * rows * (linears(base) + TOP_K * added)
    name = f"decode, {NAME}, {rows} rows"
    runs = contenders_of(calls, rows, wrong)
    return Case("model", name, axes, runs, OURS, size, operations, dtype="bfloat16")


def prefill_case(base: nn.Module, rows: int, tokens: int) -> Case:
    """Eager calls, to the logits of the last token: the first answer's."""
    model, routing = make_engine(base, rows)
    prompt = common.make_prompt(base.config.vocab_size, rows, tokens).to(base.device)

    @torch.inference_mode()
    def call(forward, ids=prompt):
        return forward(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1]

    wanted = exact(model, routing, call)
    wrong: dict[str, str] = {}
    found = common.forwards(base, model, TARGETS["all"], routing, wrong)
    calls = {
        name: lambda forward=forward, ids=prompt[:1] if name == "dense" else prompt: call(forward, ids)
        for name, forward in found.items()
    }
    common.verify(common.answers(calls, wrong), *wanted, wrong)
    head = base.get_output_embeddings().weight.numel()
    attention = base.config.num_hidden_layers * base.config.hidden_size * tokens
    each = linears(base) - head + TOP_K * RANK * common.factor_features(model) + attention
    axes = {"kind": "prefill", "model": NAME, "rows": rows, "tokens": tokens, "dtype": "bfloat16"}
    axes["mixture_operations"] = operations_share(base, model, tokens)
    size = base.dtype.itemsize * (
        linears(base) + common.distinct_entries(routing) * RANK * common.factor_features(model)
    )
    name = f"prefill, {NAME}, {rows} x {tokens} tokens"
    operations = 2 * rows * (tokens * each + head)
    runs = contenders_of(calls, rows, wrong)
    return Case("model", name, axes, runs, OURS, size, operations, dtype="bfloat16")


def step_case(device: str, rows: int, tokens: int, **shape) -> Case:
    """A training step of a few layers of that width, bf16, learnt factors in fp32."""
    base = make_base(device, **({"num_hidden_layers": WIDE_LAYERS} | shape)).train()
    ids = bench_training.make_ids(base, rows, tokens).to(device)
    axes = {"model": NAME, "layers": base.config.num_hidden_layers, "dtype": "bfloat16"}
    return training_case(f"{NAME} wide", axes, base, ids, ("frozen", "engine", "peft", "dense"))


def training_case(name: str, axes: dict, base: nn.Module, ids: Tensor, contenders: tuple[str, ...]) -> Case:
    """A step on all linears; `engine` is ours."""
    (rows, tokens), steps, wrong, entries = ids.shape, {}, {}, bench_training.ENTRIES
    bench_training.verify(base, TARGETS["all"], ids[:4, :32], False, wrong)
    for contender in contenders:
        with common.excused(contender, wrong):
            steps[contender] = bench_training.make_step(contender, base, TARGETS["all"], ids, False)
    runs = contenders_of(steps, wrong={n: reason for n, reason in wrong.items() if n in contenders})
    axes |= {"kind": "step", "rows": rows, "tokens": tokens, "targets": "all", "checkpointing": "off"}
    pool, batch = Pool(entries, RANK, entries, size=base.dtype.itemsize), Batch(rows, tokens, top_k=TOP_K)
    count, name = count_training(of_config(base.config, name), pool, batch), f"training step, {name}"
    work, dtype = (count.bytes, count.operations), dtype_name(base.dtype)
    return Case("model", f"{name}, {rows} x {tokens} tokens", axes, runs, "engine", *work, dtype=dtype)


def cases(quick: bool, device: str) -> Iterator[Case]:
    base = make_base(device)
    yield from (decode_case(base, rows) for rows in ((1, 8) if quick else (1, 8, 32)))
    sizes = ((8, 512),) if quick else ((1, 128), (1, 512), (8, 512))
    yield from (prefill_case(base, *size) for size in sizes)
    del base
    yield step_case(device, 8, 128)
