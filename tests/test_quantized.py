"""Quantised bases: linears keep weight and kernel, and every row's mixture is added to what they give."""

import copy
import warnings

import pytest
import torch
import transformers
from conftest import clustered_embeddings
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from slm_fast import SLMConfig, get_slm_model, patch_model, unpatch_model
from slm_fast.fast_forward import FastHead
from slm_fast.layers import MixtureLinear, default_pool, target_linears
from slm_fast.model import SLMModel
from slm_fast.reference import dense_offset

LOADED = ("bnb-int8", "bnb-fp4", "bnb-nf4", "bnb-nf4-double", "torchao-int8")  # by `from_pretrained`
CONVERTED = ("torchao-int8-dynamic", "torchao-int4", "torchao-float8", "gptq")  # in place
KINDS = LOADED + CONVERTED
INFERENCE = ("torchao-int8-dynamic",)  # without a backward pass
ROUNDED = (
    "bnb-int8",
    "torchao-int8-dynamic",
)  # inputs too: the last bit of one may move an output by a level
NUM_LINEARS = 2 * 7


class GPTQLinear(nn.Module):
    """The interface of GPTQ's linears: sizes, packed 4-bit buffers, and neither parameters nor `weight`.

    qweight: [in_features / 8, out_features] int32.  scales: [groups, out_features] fp16.
    g_idx: [in_features], the group of an input.
    """

    def __init__(self, linear: nn.Linear, group_size: int = 32) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float().T  # [in_features, out_features]
        g_idx = torch.arange(self.in_features) // group_size
        scales = weight.view(-1, group_size, self.out_features).abs().amax(1).div(7).half()
        levels = (weight / scales[g_idx].float()).round().add(8).clamp(0, 15).int()
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        packed = (levels.view(-1, 8, self.out_features) << shifts[:, None]).sum(1, dtype=torch.int32)
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", g_idx.int())
        bias = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach().half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        levels = ((self.qweight[:, None] >> shifts[:, None]) & 15).view(self.in_features, -1) - 8
        weight = levels.to(x.dtype) * self.scales[self.g_idx].to(x.dtype)
        y = x.reshape(-1, x.shape[-1]) @ weight
        y = y if self.bias is None else y + self.bias.to(x.dtype)
        return y.view(*x.shape[:-1], -1)


def settings(family: str) -> dict:
    if family == "t5":
        return dict(d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Full-precision models on disk."""
    made = {}
    for family, config, auto in (
        ("llama", transformers.LlamaConfig, AutoModelForCausalLM),
        ("t5", transformers.T5Config, AutoModelForSeq2SeqLM),
    ):
        transformers.set_seed(0)
        folder = tmp_path_factory.mktemp(family)
        auto.from_config(config(vocab_size=96, pad_token_id=0, **settings(family))).save_pretrained(folder)
        made[family] = (auto, folder)
    return made


@pytest.fixture
def load(folders):
    def quantized(kind: str | None, dtype=torch.float32, family: str = "llama"):
        """A base of the kind, the same at every call; None: not quantised."""
        auto, folder = folders[family]
        options = {}
        loaded = kind in LOADED and (family, kind) != ("t5", "torchao-int8")  # transformers 5.0 cannot
        if loaded:
            pytest.importorskip("accelerate")
            options = {"quantization_config": library_config(kind, dtype), "device_map": "cpu"}
        base = auto.from_pretrained(folder, dtype=dtype, **options).eval()
        if kind == "gptq":
            for name, module in list(base.named_modules()):
                if type(module) is nn.Linear and "lm_head" not in name:
                    base.set_submodule(name, GPTQLinear(module))
        elif kind is not None and not loaded:
            with_torchao(base, kind)
        return base

    return quantized


def library_config(kind: str, dtype: torch.dtype):
    if kind == "torchao-int8":
        quantization = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "bnb-int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind[4:7],
        bnb_4bit_use_double_quant=kind.endswith("double"),
        bnb_4bit_compute_dtype=dtype,
    )


def with_torchao(base: nn.Module, kind: str, head: bool = False) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = {
        "torchao-int8": quantization.Int8WeightOnlyConfig,
        "torchao-int8-dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
        "torchao-int4": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
        ),
        "torchao-float8": quantization.Float8WeightOnlyConfig,
    }[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(
            base,
            config,
            lambda module, name: isinstance(module, nn.Linear) and (head or "lm_head" not in name),
        )


def with_tasks(base: nn.Module) -> SLMModel:
    """Three tasks of two entries each, with random factors, on all linears of a base."""
    model = get_slm_model(base, SLMConfig(r=4, top_k=2, entries_per_task=2, target_modules="all-linear"))
    for t in range(3):
        model.add_task(f"task{t}", embeddings=clustered_embeddings(t), progress=False)
    generator = torch.Generator().manual_seed(7)
    for factors in model.pool.factors:
        factors.B.copy_(0.1 * torch.randn(factors.B.shape, generator=generator))
    return model


def routing_of(model: SLMModel, base_row: int | None = None):
    """Of four rows, one of them without weights."""
    routing = model.pool.search(torch.stack([clustered_embeddings(t % 3)[t] for t in range(4)]))
    if base_row is not None:
        routing.weights[base_row] = 0
    return routing


def tokens(rows: int = 4, length: int = 20) -> torch.Tensor:
    """More than a decoding step, in which a head that is not quantised has sums of its own."""
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))


def offsets(model: SLMModel, routing, row: int) -> dict[str, torch.Tensor]:
    """{name of a linear: what a row's mixture adds to its weight}."""
    pool = model.pool
    return {
        name: dense_offset(
            f.A, f.B, pool.start, pool.rank, pool.scaling, routing.indices[row], routing.weights[row]
        )
        for name, f in zip(pool.modules_shape, pool.factors, strict=True)
    }


def frozen_values(base: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, torchao's tensors as the ordinary ones that they are made of."""
    values = {}
    for name, value in base.state_dict().items():
        parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
        values |= {f"{name}.{part}": getattr(value, part) for part in parts} or {name: value}
    return values


def with_offsets(base: nn.Module, increments: dict[str, torch.Tensor]) -> nn.Module:
    """A base that was never patched, whose linears add a dense increment."""
    for name, increment in increments.items():
        base.get_submodule(name).register_forward_hook(
            lambda _, args, y, w=increment: y + args[0] @ w.T.to(y.dtype)
        )
    return base


@pytest.mark.parametrize("kind", KINDS)
def test_linears_add_the_mixture_to_their_own_output(kind, load):
    base = load(kind)
    assert len(target_linears(base, "all-linear")) == NUM_LINEARS
    kinds = {name: type(module) for name, module in base.named_modules()}
    weight = base.model.layers[0].mlp.up_proj
    assert kind == "gptq" or weight.weight.dtype != torch.float32 or type(weight.weight) is not nn.Parameter
    model = with_tasks(base)
    assert {p.dtype for f in model.pool.factors for p in (f.A, f.B)} == {torch.float32}
    routing = routing_of(model, base_row=2)
    increments = [offsets(model, routing, row) for row in range(4)]
    seen = 0
    for name, module in base.named_modules():
        if not isinstance(module, MixtureLinear):
            continue
        assert type(module.base_layer) is kinds[name]
        assert (module.in_features, module.out_features) == model.pool.modules_shape[name]
        x = torch.randn(4, 3, module.in_features, generator=torch.Generator().manual_seed(seen))
        with torch.no_grad():
            frozen = module.base_layer(x)
            with model.state.use(routing):
                y = module(x)
        want = torch.stack([frozen[row] + x[row] @ increments[row][name].T for row in range(4)])
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(y[2], frozen[2]) and not torch.equal(y[1], frozen[1])
        seen += 1
    assert seen == NUM_LINEARS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_weights_are_the_quantised_model(kind, dtype, load):
    ids = tokens()
    with torch.no_grad():
        frozen = load(kind, dtype)(ids).logits
        model = with_tasks(load(kind, dtype))
        mixed = model(input_ids=ids, routing=routing_of(model, base_row=2)).logits
        none = model(input_ids=ids, adapter_names=["__base__"] * 4).logits
        assert mixed.dtype is frozen.dtype is dtype
        assert torch.equal(none, frozen)
        assert torch.equal(mixed[2], frozen[2])
        assert all(not torch.equal(mixed[row], frozen[row]) for row in (0, 1, 3))
        base = model.unload()
        assert torch.equal(base(ids).logits, frozen)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_gives_each_row_its_merged_tokens(kind, load):
    model, ids = with_tasks(load(kind)), tokens(length=6)
    routing = routing_of(model, base_row=2)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), routing=routing, **options)
    with torch.no_grad():
        logits = model(input_ids=ids, routing=routing).logits
    for row in range(4):
        alone, one = with_offsets(load(kind), offsets(model, routing, row)), ids[row : row + 1]
        with torch.no_grad():
            tolerance = 2e-2 if kind in ROUNDED else 1e-5
            torch.testing.assert_close(logits[row], alone(one).logits[0], rtol=0, atol=tolerance)
        if kind in ROUNDED:
            continue
        assert torch.equal(out[row], alone.generate(one, attention_mask=torch.ones_like(one), **options)[0])
    assert not any(any(layer.fast.made.values()) for layer in model.base_model.model.layers)
    frozen = model.generate(
        ids, attention_mask=torch.ones_like(ids), adapter_names=["__base__"] * 4, **options
    )
    assert torch.equal(out[2], frozen[2]) and not torch.equal(out, frozen)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in INFERENCE])
def test_training_moves_the_entries_alone(kind, load):
    base, ids = load(kind), tokens(3, 8)
    model = with_tasks(base)
    before = {name: value.clone() for name, value in frozen_values(base).items()}
    factors = copy.deepcopy(model.pool.factors)
    with model.training_task("task1"):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 2 * NUM_LINEARS and {p.dtype for p in trained} == {torch.float32}
        optimizer = torch.optim.SGD(trained, lr=0.1)
        losses = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids, embeddings=clustered_embeddings(1)[:3], task="task1").loss
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad.abs().max() > 0 for p in trained)
            assert all(p.grad is None for p in base.parameters())
            optimizer.step()
            losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(torch.equal(before[name], value) for name, value in frozen_values(base).items())
    slots = model.pool.task("task1").slots
    rows = torch.isin(model.pool.row_entry, torch.tensor(slots))
    for old, new in zip(factors, model.pool.factors, strict=True):
        assert torch.equal(old.A[~rows], new.A[~rows]) and torch.equal(old.B[~rows], new.B[~rows])
        assert not torch.equal(old.B[rows], new.B[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_patching_is_undone_exactly(kind, load):
    base = load(kind)
    modules = dict(base.named_modules())
    kinds = [type(module) for module in modules.values()]
    state = {name: value.clone() for name, value in frozen_values(base).items()}
    patch_model(base, default_pool(base, SLMConfig(target_modules="all-linear")))
    assert unpatch_model(base) is base
    assert dict(base.named_modules()) == modules and [type(m) for m in base.modules()] == kinds
    assert frozen_values(base).keys() == state.keys()
    assert all(torch.equal(state[name], value) for name, value in frozen_values(base).items())


@pytest.mark.parametrize("kind", ["bnb-int8", "bnb-nf4", "torchao-int8", "gptq"])
def test_a_pool_is_saved_and_loaded(kind, load, tmp_path):
    model, ids = with_tasks(load(kind)), tokens()
    routing = routing_of(model)
    model.save_pretrained(tmp_path)
    again = SLMModel.from_pretrained(load(kind), tmp_path)
    with torch.no_grad():
        want = model(input_ids=ids, routing=routing).logits
        assert torch.equal(
            again(input_ids=ids, adapter_names=["__base__"] * 4).logits, load(kind)(ids).logits
        )
        names = ["task0", "task1", "task2", "task0"]
        torch.testing.assert_close(
            again(input_ids=ids, adapter_names=names).logits, model(input_ids=ids, adapter_names=names).logits
        )
        exact = SLMModel.from_pretrained(load(None), tmp_path)  # on the base that was quantised
        assert (exact(input_ids=ids, adapter_names=names).logits - want).isfinite().all()


@pytest.mark.parametrize("kind", ["bnb-int8", "bnb-nf4", "torchao-int8", "gptq"])
def test_t5(kind, load):
    """Its feed-forward layers look at the dtype of a weight that may be packed, or not there at all."""
    ids = tokens()
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    base = load(kind, family="t5")
    if kind == "gptq":  # transformers' own layer reads this weight
        for name, module in load(None, family="t5").named_modules():
            if name.endswith(".wo"):
                base.set_submodule(name, module)
    plain = copy.deepcopy(base) if kind == "gptq" else load(kind, family="t5")
    with torch.no_grad():
        frozen = plain(**given).logits
        model = with_tasks(base)
        mixed = model(**given, routing=routing_of(model, base_row=2)).logits
    assert torch.equal(mixed[2], frozen[2]) and not torch.equal(mixed[1], frozen[1])
    out = model.generate(input_ids=ids, routing=routing_of(model), max_new_tokens=4, do_sample=False)
    assert out.shape[0] == 4


@pytest.mark.parametrize("patched_first", [False, True])
def test_a_quantised_head_runs_by_itself(patched_first, load):
    ids = tokens(2, 3)
    want = load(None)
    with_torchao(want, "torchao-int8", head=True)
    base = load(None)
    pool = default_pool(base, SLMConfig(target_modules="all-linear"))
    if patched_first:
        patch_model(base, pool)
    with_torchao(base, "torchao-int8", head=True)
    if not patched_first:
        patch_model(base, pool)
    assert isinstance(base.lm_head, FastHead) is patched_first
    with torch.no_grad():
        assert torch.equal(base(ids).logits, want(ids).logits)


def test_linears_that_hold_no_weight_by_that_name():
    class Sizes(nn.Module):
        in_features, out_features = 64, 64

    base = nn.Sequential(nn.Linear(64, 64), GPTQLinear(nn.Linear(64, 64)), Sizes())
    assert list(target_linears(base, "all-linear")) == ["0", "1"]
