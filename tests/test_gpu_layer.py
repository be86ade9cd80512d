"""The GPU path of decoder layers, on the card or interpreted, against the layers' own forward."""

import copy

import pytest
import torch
from conftest import DEVICE
from test_fast_forward import FAMILIES, family_model, left_padded, routing_of

from slm_fast import dispatch, ops, unpatch_model
from slm_fast.fast_forward import FastPath
from slm_fast.gpu_layer import GpuLayer
from slm_fast.layers import Packing

pytest.importorskip("triton")

OPS = ("fused_linear", "segment_linear", "mixture")
CHECK = dict(rtol=0, atol=2e-5)


def gpu_model(family="llama", **config):
    return family_model(family, backend="gpu", **config).to(DEVICE)


def on_device(batch):
    return {name: t.to(DEVICE) for name, t in batch.items()}


@pytest.fixture
def ran(monkeypatch):
    """The calls of ops whose launches the GPU path saves."""
    seen = []

    def record(name):
        real = getattr(ops, name)

        def call(*args, **kwargs):
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(ops, name, call)

    for name in ("norm_shrink", "silu_mul_shrink", "stacked_linear", "rotary_", *OPS):
        record(name)
    return seen


def choose(monkeypatch, op):
    monkeypatch.setattr(dispatch, "linear_op", lambda *_: op)


def own_layers(monkeypatch, function):
    """Without the fast path, in plain PyTorch."""
    with monkeypatch.context() as patch:
        patch.setattr(FastPath, "backend", lambda *_: None)
        patch.setenv("SLM_FAST_BACKEND", "reference")
        return function()


CASES = [(family, "all-linear", op) for family in FAMILIES for op in OPS]
CASES += [("llama", targets, op) for targets in (["o_proj"], ["q_proj", "down_proj"]) for op in OPS[::2]]


@pytest.mark.parametrize("family,targets,op", CASES, ids=str)
def test_prefill_and_decoding_are_those_of_the_ordinary_layers(family, targets, op, ran, monkeypatch):
    model, inputs = gpu_model(family, target_modules=targets), on_device(left_padded())
    plain = copy.deepcopy(model)
    plain.pool.config.backend = "reference"
    choose(monkeypatch, op)
    routing = routing_of(plain.cpu()).to(DEVICE)
    plain.to(DEVICE)
    step = {"input_ids": inputs["input_ids"][:, 2:3], "attention_mask": torch.ones(3, 8).long().to(DEVICE)}

    def run(model):
        with torch.no_grad():
            out = model(**inputs, routing=routing, use_cache=True)
            name = "past_key_values" if "past_key_values" in out else "cache"
            return out.logits, model(**step, routing=routing, **{name: out[name]}).logits

    got, calls = run(model), list(ran)
    want = own_layers(monkeypatch, lambda: run(plain))
    assert calls.count("rotary_") == 2 * 2  # two layers, two calls
    if targets == "all-linear":
        stacked = op != "mixture"
        assert calls.count("norm_shrink") == 2 * 2 * 2 and calls.count("silu_mul_shrink") == 2 * 2
        assert calls.count("stacked_linear") == (2 * 2 * 2 if stacked else 0)
        assert calls.count(op) == 2 * 2 * (2 if stacked else 7)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **CHECK)


def test_linears_of_which_some_have_a_bias_run_one_by_one(ran):
    model, inputs = gpu_model("qwen2"), on_device(left_padded())
    model.base_model.model.layers[0].self_attn.q_proj.base_layer.bias = None
    logits(model, **inputs, routing=routing_of(model))
    assert ran.count("rotary_") == 1  # the other layer


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_the_frozen_model(ran, monkeypatch):
    model, inputs = gpu_model("qwen2"), on_device(left_padded())
    got = logits(model.base_model, **inputs)
    assert ran == ["rotary_"] * 2
    with monkeypatch.context() as patch:
        patch.setattr(FastPath, "backend", lambda *_: None)
        torch.testing.assert_close(got, logits(model.base_model, **inputs), **CHECK)


def test_stacked_weights_are_the_models_own(tmp_path):
    model, inputs = gpu_model("qwen2"), on_device(left_padded())
    base, routing = model.base_model, routing_of(model)
    before = {name: p.clone() for name, p in base.named_parameters()}
    same = {name: id(p) for name, p in base.named_parameters()}
    want = logits(model, **inputs, routing=routing)
    attention = base.model.layers[0].self_attn
    weights = [getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj")]
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    assert weights[0].untyped_storage().nbytes() == sum(w.nbytes for w in weights)
    for name, p in base.named_parameters():
        assert id(p) == same[name] and torch.equal(p, before[name]), name
    model.base_model.save_pretrained(tmp_path)
    again = type(unpatch_model(copy.deepcopy(base))).from_pretrained(tmp_path)
    assert {n: p.shape for n, p in again.named_parameters()}.keys() <= {
        n.replace(".base_layer", "") for n in same
    }
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, **inputs, routing=routing), want)
    model.double().float()  # every parameter moves
    assert torch.equal(logits(model, **inputs, routing=routing), want)
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    with torch.no_grad():
        weights[1].zero_()  # a write is seen: nothing holds a copy
    assert not torch.equal(logits(model, **inputs, routing=routing), want)


def test_what_the_path_leaves_to_the_ordinary_layers(ran):
    model, inputs = gpu_model(), on_device(left_padded())
    routing = routing_of(model)
    with model.training_task("task1"):
        model(**inputs, routing=routing).logits.sum().backward()
        assert "rotary_" not in ran and model.pool.factors[0].A_owned.grad is not None
    handle = model.base_model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    logits(model, **inputs, routing=routing)
    assert ran.count("rotary_") == 1  # the other layer
    handle.remove()
    logits(model, **inputs, routing=routing)
    assert ran.count("rotary_") == 3


def test_another_batch_than_the_routings_is_an_error():
    model, inputs = gpu_model(), on_device(left_padded())
    with model.state.use(routing_of(model).rows([0, 1])), pytest.raises(ValueError, match="not a multiple"):
        logits(model.base_model, **inputs)


@pytest.mark.parametrize("op", OPS)
def test_slots_of_a_resident_pool(op, monkeypatch):
    model, inputs = gpu_model(), on_device(left_padded())
    routing = routing_of(model)
    choose(monkeypatch, op)
    want = logits(model, **inputs, routing=routing)
    model.keep_resident(slots=6)
    torch.testing.assert_close(logits(model, **inputs, routing=routing), want, **CHECK)
    assert model.state.resident.overflows == 0
    model.keep_resident(slots=1)
    torch.testing.assert_close(logits(model, **inputs, routing=routing), want, **CHECK)
    assert model.state.resident.overflows == 1


def test_rows_side_by_side(monkeypatch):
    """Packed rows, each with its own mixture, get what they get alone."""
    model, lengths = gpu_model(), (3, 1, 4)
    routing, x = routing_of(model), torch.randn(sum(lengths), 32, device=DEVICE)
    layer = model.base_model.model.layers[0]
    linears = layer._linears(x[None], {"position_embeddings": (torch.ones(1, 8, 8, device=DEVICE),) * 2})
    assert isinstance(linears, GpuLayer)
    bounds = torch.tensor((0, *lengths), device=DEVICE).cumsum(0).int()
    angles = torch.randn(1, sum(lengths), 8, device=DEVICE)
    with torch.no_grad():
        with model.state.use(routing, Packing(bounds, sum(lengths))):
            heads, step = linears.heads(x, 1, angles.cos(), angles.sin())
            packed = [*heads, linears.tail(heads[0].contiguous(), x, step)]
        for row, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            own = angles[:, begin:end]
            with model.state.use(routing.rows([row])):
                heads, step = linears.heads(x[begin:end], 1, own.cos(), own.sin())
                alone = [*heads, linears.tail(heads[0].contiguous(), x[begin:end], step)]
            for a, b in zip(alone, packed, strict=True):
                torch.testing.assert_close(a, b[begin:end], **CHECK)


@pytest.mark.parametrize("op", ["fused_linear", "segment_linear"])
@pytest.mark.parametrize("backend", ["gpu", "reference"])
def test_a_linear_adds_its_residual(op, backend, monkeypatch):
    model = gpu_model()
    choose(monkeypatch, op)
    model.pool.config.backend = backend
    linear = model.base_model.model.layers[0].mlp.down_proj
    x, residual = torch.randn(3, 2, 64, device=DEVICE), torch.randn(3, 2, 32, device=DEVICE)
    for routing in (None, routing_of(model)):
        with model.state.use(routing):
            with torch.no_grad():
                torch.testing.assert_close(linear(x, residual=residual), residual + linear(x), **CHECK)
            own = residual.clone().requires_grad_()
            linear(x, residual=own).sum().backward()
            assert torch.equal(own.grad, torch.ones_like(own))
