"""Decoding with real CUDA graphs, in bf16; what needs no GPU is in test_step_graphs.py."""

import contextlib

import pytest
import torch
from conftest import DEVICE, tiny_model
from gpu_problem import DTYPE, waiting_is_an_error
from test_step_graphs import NEW, batch, cache_of, placed, prefilled, routing_of
from transformers import PreTrainedModel

from slm_fast import dispatch
from slm_fast.kept_cache import bucket_of
from slm_fast.step_graphs import CudaGraph, StepGraphs

MISSING = dispatch.available()["gpu"] or (None if torch.cuda.is_available() else "torch sees no CUDA device")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


@pytest.fixture
def graphs(monkeypatch):
    """The class of the graphs, which counts captures and replays; transformers' compilation is an error."""

    class Counted(CudaGraph):
        captured = replayed = 0

        def __init__(self, *args):
            super().__init__(*args)
            Counted.captured += 1

        def replay(self):
            Counted.replayed += 1
            super().replay()

    def compiled(self, config):
        raise AssertionError("transformers would compile")

    monkeypatch.setattr(StepGraphs, "graph_class", Counted)
    monkeypatch.setattr(PreTrainedModel, "get_compiled_call", compiled)
    return Counted


@pytest.fixture
def model():
    return tiny_model("llama", dtype=DTYPE).to(DEVICE)


def routed(model, rows, shift=0):
    return routing_of(model, rows, shift).to(DEVICE)


def run(model, rows, routing, **options):
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    settings |= {"cache_implementation": "static"} | options
    inputs = {name: value.to(DEVICE) for name, value in batch(rows).items()}
    return model.generate(**inputs, routing=routing, **settings)


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_tokens_are_those_without_graphs(graphs, model, rows):
    for turn in range(3):
        routing = routed(model, rows, turn)
        want = run(model, rows, routing, disable_compile=True)
        assert torch.equal(run(model, rows, routing), want)
        assert (graphs.captured, graphs.replayed) == (1, (turn + 1) * (NEW - 1))


@pytest.mark.parametrize("rows", [1, 3, 5, 9])
def test_logits_are_those_without_graphs(graphs, model, rows):
    """Padded to a bucket, over steps and routings in turn; a graph's logits are as near to fp32 as others."""
    exact = tiny_model("llama").to(DEVICE)
    exact.base_model.load_state_dict({k: v.float() for k, v in model.base_model.state_dict().items()})
    ids, call = torch.randint(1, 96, (6, rows, 1), device=DEVICE), StepGraphs(model.base_model)
    for shift in range(2):
        logits = []
        for owner, step in ((exact, exact.base_model), (model, model.base_model), (model, call)):
            with torch.no_grad(), owner.base_model.mixtures[0].use(routed(owner, rows, shift)):
                cache = prefilled(owner, rows, graphs=call if step is call else None)
                steps = [step(**placed(owner, cache, ids[s], 5 + s)).logits.float() for s in range(6)]
            logits.append(torch.stack(steps))
            del cache
        want, ordinary, got = logits
        error, allowed = (got - want).abs().max(), (ordinary - want).abs().max()
        assert error <= 2 * allowed + 1e-2 * want.abs().max()
    assert (graphs.captured, graphs.replayed) == (1, 12) and call.caches.kept.rows == bucket_of(rows)


def test_the_host_never_waits(graphs, model):
    base, call = model.base_model, StepGraphs(model.base_model).begin()
    routings, ids = [routed(model, 3, shift) for shift in range(3)], torch.ones(3, 1, device=DEVICE).long()
    state = base.mixtures[0]
    with torch.no_grad(), state.use(routings[0]):
        cache = prefilled(model)
        inputs = [placed(model, cache, ids, 5 + s) for s in range(4)]
        call(**inputs[0])
    with torch.no_grad(), waiting_is_an_error():
        for routing, step in zip(routings, inputs[1:], strict=True):
            with state.use(routing):
                call(**step)
    assert (graphs.captured, graphs.replayed) == (1, 4)


def test_the_host_never_waits_while_generating(graphs, model, monkeypatch):
    """From the second step on; what transformers itself does between steps may wait."""
    routing, real, steps = routed(model, 5), StepGraphs.__call__, []

    def step(self, **inputs):
        steps.append(1)
        with waiting_is_an_error() if len(steps) > 1 else contextlib.nullcontext():
            return real(self, **inputs)

    monkeypatch.setattr(StepGraphs, "__call__", step)
    run(model, 5, routing)
    assert len(steps) == graphs.replayed == NEW - 1


def test_outputs_are_the_callers(graphs, model):
    out = run(model, 4, routed(model, 4), return_dict_in_generate=True, output_logits=True)
    logits = [step.clone() for step in out.logits]
    keys = [layer.keys.clone() for layer in cache_of(out).layers]
    run(model, 4, routed(model, 4, 1))
    run(model, 2, routed(model, 2, 2))  # another graph in the same memory
    assert graphs.captured == 2
    assert all(torch.equal(a, b) for a, b in zip(out.logits, logits, strict=True))
    assert all(torch.equal(a.keys, b) for a, b in zip(cache_of(out).layers, keys, strict=True))


def test_a_pool_that_grew_and_resident_slots(graphs, model):
    run(model, 4, routed(model, 4))
    model.add_task("more", embeddings=torch.randn(40, 24), progress=False)
    for factors in model.pool.factors:
        torch.nn.init.normal_(factors.B, std=0.1)
    routing = model.pool.fixed_routing(["more", "task0", "task1", "more"])
    want = run(model, 4, routing, disable_compile=True)
    assert torch.equal(run(model, 4, routing), want)
    captured = graphs.captured
    model.keep_resident(slots=6)
    for names in (["more", "task0"] * 2, ["task1", "task2"] * 2, ["task0", "more"] * 2):
        routing = model.pool.fixed_routing(names)
        want = run(model, 4, routing, disable_compile=True)
        assert torch.equal(run(model, 4, routing), want)
    assert graphs.captured == captured + 1 and model.state.resident.stats()["evictions"] > 0


def test_all_graphs_may_go(graphs, model):
    """Memory that graphs shared is not asked for again once the last of them is gone."""
    routing = routed(model, 4)
    want = run(model, 4, routing)
    model.base_model.cuda_graphs = False
    with contextlib.suppress(AssertionError):
        run(model, 4, routing)
    model.base_model.cuda_graphs = True
    assert model.base_model.graphs is None
    assert torch.equal(run(model, 4, routing), want) and graphs.captured == 2


def test_what_cannot_be_captured_runs_without(graphs, model, caplog):
    routing = routed(model, 4)
    want = run(model, 4, routing, disable_compile=True)
    mlp = type(model.base_model.model.layers[0].input_layernorm)
    real = mlp.forward
    mlp.forward = lambda self, x: real(self, x + 0 * float(x.sum() != x.sum()))  # the host waits
    try:
        model.base_model.set_attn_implementation("eager")  # the layers' own forwards
        got = run(model, 4, routing)
    finally:
        mlp.forward = real
    assert got.shape == want.shape and graphs.replayed == 0
    assert "cannot be a CUDA graph" in caplog.text
    model.base_model.set_attn_implementation("sdpa")
    assert torch.equal(run(model, 4, routing), want) and graphs.replayed == NEW - 1
