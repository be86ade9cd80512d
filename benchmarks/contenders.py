"""What the whole-path benchmarks compare: the same base as frozen model, engine, PEFT and dense offsets.

frozen      the Hugging Face model as it is
off         the engine with its pool switched off
on          the engine, every row its own mixture
peft        PEFT's adapter_names, one adapter for each row
merged      PEFT with one adapter merged into the weights: the frozen model's speed, for one row's answer
dense       the authors' method: W + dW in every layer, one row at a time; one row's time, times the rows
"""

import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import transformers
from suite.cases import reason_of
from transformers import LlamaConfig, LlamaForCausalLM

from slm_fast import Routing, SLMConfig, SLMModel, get_slm_model
from slm_fast.loading import load_model
from slm_fast.reference import dense_offset

TOP_K, RANK = 2, 8
TARGETS = {"o_proj": ["o_proj"], "all": "all-linear"}
TARGET_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ENTRIES = {"smol": 64, "7b": 12}  # of the pool: two for each of 32 rows, or what a batch shares
PROMPT_SEED = 1
SHOWN = ("frozen", "off", "on", "peft", "merged")


@functools.cache
def _smol() -> torch.nn.Module:
    """Read once: a GGUF file takes long."""
    return load_model("smollm2")


def make_base(name: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """SmolLM2-135M, or two layers of LLaMA-2-7B's shape with random weights."""
    if name == "smol":
        return copy.deepcopy(_smol()).to(dtype).eval()
    return random_llama(4096, 11008, 2, 32, 32000, dtype).eval()


def random_llama(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, vocab_size: int, dtype: torch.dtype
) -> LlamaForCausalLM:
    """A LLaMA with random weights, the same at every call."""
    transformers.set_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab_size,
        dtype=dtype,
    )
    return LlamaForCausalLM(config).to(dtype)


def make_engine(base: torch.nn.Module, targets, entries: int) -> SLMModel:
    config = SLMConfig(r=RANK, top_k=TOP_K, target_modules=targets, entries_per_task=1)
    model = get_slm_model(base, config)
    generator = torch.Generator().manual_seed(0)
    for entry in range(entries):
        model.pool.add_task(f"e{entry}", torch.randn(1, 8, generator=generator), generator=generator)
    model.pool.factors.to(base.dtype)
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
    from peft import LoraConfig, get_peft_model

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
    return peft_model.to(base.dtype).eval()


def add_dense_offsets(base: torch.nn.Module, model: SLMModel, routing: Routing) -> None:
    """The authors' layers for row 0: the weight and its offset are added again at every step."""
    pool = model.pool
    for name, factors in zip(pool.modules_shape, pool.factors, strict=True):
        layer = base.get_submodule(name)
        entries = factors.A, factors.B, pool.start, pool.rank, pool.scaling
        offset = dense_offset(*entries, routing.indices[0], routing.weights[0]).to(layer.weight.dtype)
        layer.forward = lambda x, layer=layer, offset=offset: F.linear(x, layer.weight + offset, layer.bias)


def engine_forward(model: SLMModel, routing: Routing | None) -> Callable:
    def forward(**inputs):
        with model.state.use(routing):
            return model.base_model(**inputs)

    return forward


def sharing(base: torch.nn.Module) -> torch.nn.Module:
    """A copy with the same weights in memory, for those who only add something."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


Wrong = dict[str, str] | None  # {contender: why it is not timed} to be filled; None: the first one ends all


@contextmanager
def excused(name: str, wrong: Wrong) -> Iterator[None]:
    """What is raised inside becomes that contender's reason in `wrong`, where there is one."""
    try:
        yield
    except Exception as error:
        if wrong is None:
            raise
        wrong[name] = reason_of(error)


def forwards(
    base: torch.nn.Module, model: SLMModel, targets, routing: Routing, wrong: Wrong = None
) -> dict[str, Callable]:
    """Of the contenders that share the base's weights, and the engine's; `dense` answers row 0."""
    found = {"frozen": base, "off": engine_forward(model, None), "on": engine_forward(model, routing)}
    with excused("peft", wrong):
        peft_model = make_peft(sharing(base), model, targets, routing)
        names = [f"r{row}" for row in range(routing.num_rows)]
        found["peft"] = lambda **inputs: peft_model(**inputs, adapter_names=names)
    with excused("dense", wrong):
        dense = sharing(base)
        add_dense_offsets(dense, model, routing)
        found["dense"] = dense
    return found


def make_contenders(base: torch.nn.Module, targets, entries: int, rows: int, wrong: Wrong = None) -> tuple:
    """(model, routing, {name: forward}); `dense` and `merged` answer row 0."""
    model = make_engine(copy.deepcopy(base), targets, entries)
    routing = make_routing(model, rows)
    found = {}
    with excused("merged", wrong):
        merged = make_peft(copy.deepcopy(base), model, targets, routing.rows([0]))
        found["merged"] = merged.merge_and_unload()
    return model, routing, forwards(base, model, targets, routing, wrong) | found


def answers(calls: dict[str, Callable[[], torch.Tensor]], wrong: Wrong = None) -> dict[str, torch.Tensor]:
    """What every contender answers, in fp32."""
    got = {}
    for name, call in calls.items():
        with excused(name, wrong):
            got[name] = call().float()
    return got


def factor_features(model: SLMModel) -> int:
    """Of all linears of the pool, in and out: the numbers of a slab row."""
    return sum(f.A.shape[1] + f.B.shape[1] for f in model.pool.factors)


def exact_copy(model: SLMModel) -> SLMModel:
    """Everything in fp32, with the reference ops."""
    exact = copy.deepcopy(model).float()
    exact.pool.config.backend = "reference"
    return exact


def exact_forward(model: SLMModel, routing: Routing | None) -> Callable:
    return engine_forward(exact_copy(model), routing)


def make_prompt(vocab: int, rows: int, length: int) -> torch.Tensor:
    return torch.randint(vocab, (32, length), generator=torch.Generator().manual_seed(PROMPT_SEED))[:rows]


def verify(
    got: dict[str, torch.Tensor],
    mixed: torch.Tensor,
    frozen: torch.Tensor,
    wrong: Wrong = None,
) -> None:
    """Raises SystemExit unless logits are as near to fp32 as PEFT's, respectively the frozen model's: at most
    twice their error, in the root mean square over a batch (single logits of a deep bf16 model are chaotic).
    With `wrong`, a contender whose logits are not gets the reason there instead.

    got: [rows, vocab] of each contender; `mixed` and `frozen` are fp32's with and without mixtures; `merged`
    and `dense` have row 0 right, `dense` no other. What follows a name's first word says how it ran. A PEFT
    whose own error is beyond four times the frozen model's is wrong, and no measure of others.
    """
    errors, plain = {}, {name for name in got if name.split()[0] in ("frozen", "off")}
    for name, logits in got.items():
        want = frozen if name in plain else mixed
        rows = 1 if name in ("merged", "dense") else len(logits)
        errors[name] = float((logits[:rows] - want[:rows]).norm() / want[:rows].norm())
    factors = {"merged": 4, "dense": 4}  # W + dW is rounded to bf16, and one row has no mean to hide in
    if "frozen" not in errors:
        raise SystemExit("the frozen model gave no logits, nothing is timed")
    most = 4 * errors["frozen"] + 1e-2
    measure = errors["peft"] if errors.get("peft", math.inf) <= most else errors["frozen"]
    allowed = {
        name: factors.get(name, 2) * (errors["frozen"] if name in plain else measure) + 1e-2
        for name in errors
    }
    allowed["peft"] = most
    bad = {name: error for name, error in errors.items() if not error <= allowed[name]}
    if bad and wrong is None:
        raise SystemExit(f"wrong logits, nothing is timed: {bad}, allowed {allowed}")
    for name, error in bad.items():
        wrong[name] = f"wrong logits: error {error:.1e}, allowed {allowed[name]:.1e}"


def summary(samples: dict[str, list[float]], rows: int) -> dict:
    """Median milliseconds and the distance of the quartiles; what the pool adds, of calls side by side."""

    def spread(values):
        low, _, high = statistics.quantiles(values, n=4)
        return 1e3 * (high - low)

    milliseconds = {name: 1e3 * statistics.median(values) for name, values in samples.items()}
    quartiles = {name: spread(values) for name, values in samples.items()}
    for found in (milliseconds, quartiles):
        found["dense"] *= rows
    pairs = [on / off for on, off in zip(samples["on"], samples["off"], strict=True)]
    added = 100 * (statistics.median(pairs) - 1)
    return {"milliseconds": milliseconds, "quartiles": quartiles, "added_percent": added}


def distinct_entries(routing: Routing) -> int:
    return routing.indices[routing.weights != 0].unique().numel()


def print_header(size: str, share: str) -> None:
    titles = [size, *(f"{name:>15}" for name in SHOWN), f"{'dense':>9}", f"{'added':>9}", f"{share:>8}"]
    print("".join([f"{'':12}", *titles, f"{'frozen/on':>9}{'peft/on':>8}{'dense/on':>9}"]))


def print_record(record: dict, size: str, share: float, digits: int) -> None:
    """A line under `print_header`: times with `digits` decimals and the ratios that are asked for."""
    ms, spread = record["milliseconds"], record["quartiles"]
    times = "".join(f"{ms[name]:8.{digits}f} +-{spread[name]:4.{max(digits - 1, 0)}f}" for name in SHOWN)
    print(
        f"{record['model']:5}{record['targets']:7}{size}{times}{ms['dense']:9.{max(digits - 1, 0)}f}"
        f"{record['added_percent']:+8.1f}%{share:7.1f}%"
        f"{ms['frozen'] / ms['on']:8.2f}x{ms['peft'] / ms['on']:7.2f}x{ms['dense'] / ms['on']:8.2f}x",
        flush=True,
    )
