"""Graphs of decoding steps, on the CPU: in the place of a CUDA graph the step runs again, or op by op."""

import copy
import gc
import inspect
import io
import logging

import pytest
import torch
import transformers
from conftest import clustered_embeddings, tiny_base, tiny_model
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig, StaticCache
from transformers.generation.utils import GenerationMixin

from slm_fast import SLMConfig, ops, patch_model, unpatch_model
from slm_fast.kept_cache import BLOCK, bucket_of
from slm_fast.layers import default_pool
from slm_fast.step_graphs import CACHE_NAMES, StepGraphs

NEW = 8  # tokens; the first is the prompt's


class Rerun:
    """In the place of `CudaGraph`: replaying runs the step again, into the outputs of the first time."""

    captured = replayed = 0

    def __init__(self, run, undo, device, share=None):
        type(self).captured += 1
        self.run, self.outputs = self.record(run), run()
        undo()

    def record(self, run):
        return run

    def replay(self):
        type(self).replayed += 1
        for out, new in zip(tree_leaves(self.outputs), tree_leaves(self.run()), strict=True):
            if isinstance(out, torch.Tensor):
                out.copy_(new)


class Recorded(Rerun):
    """Replays the operations of the first run: whatever was a number then stays what it was."""

    def __init__(self, run, undo, device, share=None):
        type(self).captured += 1
        leaves = []

        def tensors():
            self.outputs = run()
            leaves[:] = [leaf for leaf in tree_leaves(self.outputs) if isinstance(leaf, torch.Tensor)]
            return leaves

        self.ops = torch.fx.experimental.proxy_tensor.make_fx(tensors)()
        undo()
        self.outputs = run()
        undo()

    def replay(self):
        type(self).replayed += 1
        outputs = [leaf for leaf in tree_leaves(self.outputs) if isinstance(leaf, torch.Tensor)]
        for out, new in zip(outputs, self.ops(), strict=True):
            out.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """Graphs on the CPU; the class of the last ones, which counts captures and replays."""
    kind = type("Counted", (Rerun,), {})
    monkeypatch.setattr(StepGraphs, "devices", ("cpu",))
    monkeypatch.setattr(StepGraphs, "graph_class", kind)

    def compiles(self, model_kwargs, config):
        caches = [model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None]
        return not config.disable_compile and bool(caches) and caches[0].is_compileable

    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", compiles)
    return kind


def batch(rows, length=7, seed=1):
    """Left padded, every row by another number of tokens."""
    ids = torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, : row % 4], mask[row, : row % 4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def routing_of(model, rows, shift=0):
    return model.pool.search(torch.stack([clustered_embeddings((t + shift) % 3)[t] for t in range(rows)]))


def run(model, rows, routing, static=True, **options):
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options
    if static:
        settings |= {"cache_implementation": "static"}
    how = {"adapter_names": ["__base__"] * rows} if routing is None else {"routing": routing}
    transformers.set_seed(0)
    return model.generate(**batch(rows), **how, **settings)


def cache_of(out):
    return next(out[name] for name in CACHE_NAMES if out.get(name) is not None)


def memory(model):
    return model.base_model.graphs.caches.kept


def uses_kept_memory():
    return hasattr(GenerationMixin, "_prepare_static_cache")  # not in the oldest releases


needs_kept_memory = pytest.mark.skipif(
    not uses_kept_memory(), reason="this release of transformers keeps a cache of its own"
)


def test_buckets():
    assert [bucket_of(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 57, 64, 65, 129)] == [
        *(1, 2, 4, 4, 8, 8, 16, 16, 24, 64, 64, 128, 256)
    ]


@pytest.mark.parametrize("rows", [1, 3, 5, 9])
def test_tokens_are_those_without_graphs(graphs, rows):
    model = tiny_model("llama")
    routing = routing_of(model, rows)
    want = run(model, rows, routing, static=False)
    got = run(model, rows, routing)
    assert torch.equal(got, want) and (graphs.captured, graphs.replayed) == (1, NEW - 1)
    assert not torch.equal(want, run(model, rows, None, static=False))  # the mixtures matter
    if uses_kept_memory():
        assert (memory(model).rows, memory(model).length) == (bucket_of(rows), BLOCK)


def mixture(y, x, A, B, start, rank, scaling, indices, weights, cu_seqlens, *, max_rank, **_):
    """`ops.mixture` in operations on tensors, without a look at their values."""
    row = torch.arange(x.shape[0]) // (x.shape[0] // indices.shape[0])
    picked, column = indices[row].long(), torch.arange(max_rank)
    slab = start[picked][:, :, None] + column
    scale = torch.where(column < rank[picked][:, :, None], (weights[row] * scaling[picked])[:, :, None], 0.0)
    u = torch.einsum("tf,tkrf->tkr", x, A[slab]) * scale
    return y.add_(torch.einsum("tkr,tkro->to", u, B[slab]))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_ops_of_one_step_serve_the_others(graphs, monkeypatch, family):
    """Positions, routings and rows are read from tensors alone; asking for a value would raise."""
    kind = type("Counted", (Recorded,), {})
    monkeypatch.setattr(StepGraphs, "graph_class", kind)
    monkeypatch.setattr(ops, "mixture", mixture)
    monkeypatch.setenv("SLM_FAST_BACKEND", "reference")
    model = tiny_model("llama") if family == "llama" else qwen2_model()
    for rows, shift in ((3, 0), (3, 1), (4, 2)):
        routing = routing_of(model, rows, shift)
        assert torch.equal(run(model, rows, routing), run(model, rows, routing, static=False))
    assert kind.replayed == 3 * (NEW - 1) and kind.captured == (1 if uses_kept_memory() else 2)


def qwen2_model():
    """Its attention mask is a dict of masks."""
    from test_fast_forward import family_model

    return family_model("qwen2")


def test_routings_in_turn_share_a_graph(graphs):
    model = tiny_model("llama")
    routings = [routing_of(model, 3, shift) for shift in range(3)]
    want = [run(model, 3, routing, static=False) for routing in routings]
    assert not torch.equal(want[0], want[1])
    for turn in (0, 1, 2, 1, 0):
        assert torch.equal(run(model, 3, routings[turn]), want[turn])
    assert (graphs.captured, graphs.replayed) == (1, 5 * (NEW - 1))
    routings[0].weights.copy_(routings[0].weights.flip(0))  # in place: read again
    want = run(model, 3, routings[0], static=False)
    assert torch.equal(run(model, 3, routings[0]), want) and graphs.captured == 1


@needs_kept_memory
def test_rows_of_a_bucket_share_a_graph(graphs):
    model = tiny_model("llama")
    for rows in (8, 5, 7, 6, 8):
        routing = routing_of(model, rows)
        assert torch.equal(run(model, rows, routing), run(model, rows, routing, static=False))
    assert graphs.captured == 1
    addresses = [layer.keys.data_ptr() for layer in memory(model).layers]
    for rows in (1, 2, 5):  # in the first rows of the same memory
        routing = routing_of(model, rows)
        assert torch.equal(run(model, rows, routing), run(model, rows, routing, static=False))
    assert graphs.captured == 3
    assert addresses == [layer.keys.data_ptr() for layer in memory(model).layers]
    routing = routing_of(model, 9)
    assert torch.equal(run(model, 9, routing), run(model, 9, routing, static=False))
    assert graphs.captured == 4 and memory(model).rows == 16 and len(memory(model).graphs) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True},
        {"repetition_penalty": 1.5},
        pytest.param({"prefill_chunk_size": 4}, marks=needs_kept_memory),
    ],
    ids=str,
)
def test_ways_to_generate(graphs, options):
    model = tiny_model("llama")
    routing = routing_of(model, 3)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True} | options
    want, got = run(model, 3, routing, static=False, **options), run(model, 3, routing, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=0, atol=1e-5)
    assert graphs.replayed == (0 if "num_beams" in options else NEW - 1)  # transformers compiles no beams


def test_hidden_states_are_the_callers(graphs):
    model = tiny_model("llama")
    routing = routing_of(model, 3)
    options = {"return_dict_in_generate": True, "output_hidden_states": True}
    want, got = run(model, 3, routing, static=False, **options), run(model, 3, routing, **options)
    assert graphs.replayed == NEW - 1 and len(got.hidden_states) == NEW
    for mine, other in zip(got.hidden_states[1:], want.hidden_states[1:], strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def signature(model):
    return inspect.signature(model.base_model.original.forward).parameters


def cache_name(model):
    return next(name for name in CACHE_NAMES if name in signature(model))


def prefilled(model, rows=3, length=5, room=16, graphs=None):
    """A static cache after a prompt: of its own, or in the memory that `graphs` keeps."""
    base = model.base_model
    cache = StaticCache(config=base.config, max_cache_len=room)
    if graphs is not None:
        graphs.caches.prepare(cache)
        graphs.begin()
    ids = torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(2))
    base(**placed(model, cache, ids.to(base.device), 0))
    return cache


def placed(model, cache, ids, seen):
    """Arguments as `generate` makes them, after `seen` tokens without padding."""
    positions = torch.arange(seen, seen + ids.shape[1], device=ids.device)
    mask = torch.arange(cache.layers[0].max_cache_len, device=ids.device) <= positions[:, None]
    inputs = {"input_ids": ids, cache_name(model): cache, "use_cache": True, "return_dict": True}
    inputs["position_ids"] = positions.expand(ids.shape[0], -1)
    inputs["attention_mask"] = mask.expand(ids.shape[0], 1, -1, -1)
    if "cache_position" in signature(model):
        inputs["cache_position"] = positions
    return inputs


def test_a_reordered_cache_is_brought_back(graphs):
    model, rows = tiny_model("llama"), 3
    base, routing = model.base_model, routing_of(model, rows)
    order = torch.tensor([2, 0, 0])
    ids = torch.randint(1, 96, (4, rows, 1))
    with torch.no_grad(), base.mixtures[0].use(routing):
        logits = []
        for call in (base, StepGraphs(base).begin()):
            cache = prefilled(model)
            for seen in range(4):
                logits.append(call(**placed(model, cache, ids[seen], 5 + seen)).logits)
                if seen == 1:
                    cache.reorder_cache(order)
    assert (graphs.captured, graphs.replayed) == (1, 4)
    torch.testing.assert_close(logits[4:], logits[:4], rtol=0, atol=1e-5)
    assert not torch.equal(logits[0][1], logits[0][2])


def test_a_cache_of_another_shape_is_taken_anew(graphs):
    model = tiny_model("llama")
    base, routing = model.base_model, routing_of(model, 4)
    ids = torch.randint(1, 96, (2, 4, 1))
    with torch.no_grad():
        logits = []
        for call in (base, StepGraphs(base).begin()):
            with base.mixtures[0].use(routing):
                cache = prefilled(model, rows=4)
                call(**placed(model, cache, ids[0], 5))
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[1:3].clone(), layer.values[1:3].clone()
            with base.mixtures[0].use(routing.rows([1, 2])):
                logits.append(call(**placed(model, cache, ids[1, 1:3], 6)).logits)
    assert (graphs.captured, graphs.replayed) == (2, 2)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)


def test_a_step_advances_lengths_once(graphs):
    model = tiny_model("llama")
    base, routing = model.base_model, routing_of(model, 3)
    with torch.no_grad(), base.mixtures[0].use(routing):
        call, cache = StepGraphs(base).begin(), prefilled(model)
        for seen in range(3):
            out = call(**placed(model, cache, torch.ones(3, 1).long(), 5 + seen))
            assert cache_of(out) is cache and type(out) is type(base(torch.ones(3, 1).long()))
            for layer in cache.layers:
                assert int(layer.get_seq_length()) == 6 + seen
                assert layer.keys[:, :, : 6 + seen].any(-1).all() and not layer.keys[:, :, 6 + seen :].any()
    assert (graphs.captured, graphs.replayed) == (1, 3)


def test_a_callers_cache_is_used_where_it_is(graphs):
    model = tiny_model("llama")
    routing = routing_of(model, 3)
    want = run(model, 3, routing, static=False)
    cache = StaticCache(config=model.config, max_cache_len=32)
    got = run(model, 3, routing, static=False, **{cache_name(model): cache})
    assert torch.equal(got, want) and (graphs.captured, graphs.replayed) == (1, NEW - 1)
    graphs_of = model.base_model.graphs.caches.of
    assert list(graphs_of) == [cache] and cache.layers[0].keys.shape[:1] == (3,)
    del cache
    gc.collect()
    assert not list(graphs_of)  # its graphs went with it


@needs_kept_memory
def test_a_returned_cache_keeps_its_values(graphs):
    model = tiny_model("llama")
    first, second = routing_of(model, 3), routing_of(model, 3, 1)
    out = run(model, 3, first, return_dict_in_generate=True)
    cache = cache_of(out)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    part = cache.layers[1].keys[0]  # of a cache whose other parts are dropped
    assert kept[0][0].any()
    assert torch.equal(run(model, 3, second), run(model, 3, second, static=False))
    assert graphs.captured == 1  # and in the same memory
    for layer, (keys, values) in zip(cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    del out, cache, layer
    run(model, 3, second)
    assert torch.equal(part, kept[1][0][0])


@needs_kept_memory
def test_what_was_left_behind_is_not_seen(graphs):
    model = tiny_model("llama")
    routing = routing_of(model, 3)
    want = run(model, 3, routing)
    for layer in memory(model).layers:
        layer.keys.fill_(torch.nan), layer.values.fill_(torch.nan)
    assert torch.equal(run(model, 3, routing), want) and graphs.captured == 1
    assert all(layer.values.isfinite().all() for layer in memory(model).layers)  # of padded rows too


@needs_kept_memory
def test_a_returned_cache_goes_on(graphs):
    model = tiny_model("llama")
    routing = routing_of(model, 3)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "routing": routing}
    results = []
    for static in (True, False):
        kind = {"cache_implementation": "static"} if static else {}
        out = model.generate(**batch(3), **options, **kind)
        mask = torch.cat([batch(3)["attention_mask"], torch.ones(3, 4).long()], 1)
        went = {cache_name(model): cache_of(out)}
        again = model.generate(out.sequences, attention_mask=mask, **went, **options)
        results.append(again.sequences)
    assert torch.equal(*results) and results[0].shape[1] == 7 + 8 and graphs.replayed == 3 + 4 - 1


@needs_kept_memory
def test_a_cache_in_use_is_left_alone(graphs):
    """A second `generate` while the first runs, as from a logits processor."""
    model = tiny_model("llama")
    routing = routing_of(model, 3)
    inner = []

    def processor(ids, scores):
        if ids.shape[1] == 9 and not inner:
            inner.append(run(model, 2, routing.rows([1, 2])))
        return scores

    got = run(model, 3, routing, logits_processor=[processor])
    assert torch.equal(got, run(model, 3, routing, static=False))
    assert torch.equal(inner[0], run(model, 2, routing.rows([1, 2]), static=False))


@needs_kept_memory
def test_memory_grows_with_the_length(graphs):
    model = tiny_model("llama")
    routing = routing_of(model, 2)
    for new, length in ((8, BLOCK), (BLOCK, 2 * BLOCK), (8, 2 * BLOCK)):
        options = {"max_new_tokens": new, "min_new_tokens": new}
        got = run(model, 2, routing, **options)
        assert torch.equal(got, run(model, 2, routing, static=False, **options))
        assert memory(model).length == length
    assert graphs.captured == 2


def test_a_pool_that_changed_is_captured_again(graphs):
    model = tiny_model("llama")
    routing = routing_of(model, 3)
    run(model, 3, routing)
    for t in range(3, 9):  # past the slots and rows that there is room for
        model.add_task(f"task{t}", embeddings=clustered_embeddings(t), progress=False)
    for factors in model.pool.factors:
        torch.nn.init.normal_(factors.B, std=0.1)
    routing = model.pool.fixed_routing(["task8", "task0", "task5"])
    want = run(model, 3, routing, static=False)
    assert torch.equal(run(model, 3, routing), want) and graphs.captured == 2
    assert sum(len(m.graphs) for m in model.base_model.graphs.caches.all()) == 1  # the old one is gone
    for factors in model.pool.factors:  # in place: no new addresses
        factors.B.neg_()
    want = run(model, 3, routing, static=False)
    assert torch.equal(run(model, 3, routing), want) and graphs.captured == 2


def test_weights_that_moved_are_captured_again(graphs):
    model = tiny_model("llama")
    routing = routing_of(model, 3)
    run(model, 3, routing)
    head = model.base_model.lm_head
    head.weight = torch.nn.Parameter(-head.weight.detach(), requires_grad=False)
    want = run(model, 3, routing, static=False)
    assert torch.equal(run(model, 3, routing), want) and graphs.captured == 2


def test_the_frozen_model_has_its_own_graphs(graphs):
    base = tiny_base("llama")
    state = patch_model(base, tiny_model("llama").pool)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    static = {"cache_implementation": "static"}
    routing = base.mixtures[1].pool.fixed_routing(["task0", "task1", "task2"])
    frozen, mixed = base.generate(**batch(3), **settings), None
    with state.use(routing):
        mixed = base.generate(**batch(3), **settings)
    assert not torch.equal(frozen, mixed)
    for _ in range(2):
        assert torch.equal(base.generate(**batch(3), **settings, **static), frozen)
        with state.use(routing):
            assert torch.equal(base.generate(**batch(3), **settings, **static), mixed)
        named = base.generate(**batch(3), **settings, **static, adapter_names=["__base__"] * 3)
        assert torch.equal(named, frozen)
    assert graphs.captured == 3  # routed by name: one pick a row, of weight 0


def test_a_resident_pool(graphs):
    model = tiny_model("llama")
    wanted = [routing_of(model, 2, shift) for shift in range(3)]
    want = [run(model, 2, routing, static=False) for routing in wanted]
    model.keep_resident(slots=4)
    for turn in (0, 1, 2, 0, 2):
        assert torch.equal(run(model, 2, wanted[turn]), want[turn])
    assert model.state.resident.stats()["evictions"] > 0 and graphs.captured == 1
    assert graphs.replayed == 5 * (NEW - 1)
    assert model.state.routing is None and model.state.lease is None
    model.keep_resident(slots=1)
    assert torch.equal(run(model, 2, wanted[0]), want[0])  # overflows: an ordinary call
    assert model.state.resident.stats()["overflows"] == 1
    assert (graphs.captured, graphs.replayed) == (1, 5 * (NEW - 1))


def test_the_state_is_as_before(graphs):
    model = tiny_model("llama")
    base, routing = model.base_model, routing_of(model, 3)
    state = base.mixtures[0]
    with torch.no_grad(), state.use(routing):
        cache = prefilled(model)
        made = state._made
        StepGraphs(base).begin()(**placed(model, cache, torch.ones(3, 1).long(), 5))
        assert state.routing is routing and state.lease is None and state._made is made
    assert graphs.captured == 1


def test_a_routing_written_in_place_is_read_again(graphs):
    model = tiny_model("llama")
    base, routing, ids = model.base_model, routing_of(model, 3), torch.ones(3, 1).long()
    state, call = base.mixtures[0], StepGraphs(base).begin()
    before, after = routing.rows([0, 1, 2]), routing.rows([2, 0, 1])
    with torch.no_grad():
        cache = prefilled(model)
        with state.use(before):
            base(**placed(model, cache, ids, 5))
        with state.use(after):
            want = base(**placed(model, cache, ids, 6)).logits
        cache = prefilled(model)
        with state.use(routing):  # one scope, one routing
            first = call(**placed(model, cache, ids, 5)).logits
            for tensor, value in zip(routing, after, strict=True):
                tensor.copy_(value)
            got = call(**placed(model, cache, ids, 6)).logits
    assert (graphs.captured, graphs.replayed) == (1, 2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (first - got).abs().max() > 1e-3


def test_what_graphs_cannot_hold_runs_as_it_is(graphs):
    model = tiny_model("llama")
    base, routing, ids = model.base_model, routing_of(model, 3), torch.ones(3, 1).long()
    call = StepGraphs(base).begin()

    def step(count=1, **more):
        cache = prefilled(model)
        return call(**placed(model, cache, ids.expand(-1, count), 5), **more)

    with base.mixtures[0].use(routing):
        with torch.no_grad():
            step(count=2)
            step(routing=routing)
            step(embeddings=torch.stack([clustered_embeddings(t)[0] for t in range(3)]))
            base.train()
            step()
            base.eval()
            with torch.autocast("cpu"):
                assert not call._admits(base, {"input_ids": ids})
            assert call._admits(base, {"input_ids": ids})
            step(odd=object())
            call(ids)
        step()  # with gradients
        assert graphs.captured == 0
        with torch.no_grad():
            step()
        assert graphs.captured == 1
    with torch.no_grad():
        cache = prefilled(model)
        with base.mixtures[0].use(routing_of(model, 2)), pytest.raises(ValueError, match="multiple"):
            call(**placed(model, cache, ids, 5))
    model.pool.own("task0")
    with torch.no_grad(), base.mixtures[0].use(routing):
        step()
    model.pool.disown()
    assert graphs.captured == 1


@pytest.mark.parametrize("how", ["environment", "attribute", "argument", "config", "hook"])
def test_transformers_own_compilation(graphs, monkeypatch, how):
    model = tiny_model("llama")
    base, routing, options, asked = model.base_model, routing_of(model, 3), {}, []
    want = run(model, 3, routing, static=False)

    def compiled(self, config):
        asked.append(config)
        return self.__call__

    monkeypatch.setattr(transformers.PreTrainedModel, "get_compiled_call", compiled)
    if how == "environment":
        monkeypatch.setenv("SLM_FAST_CUDA_GRAPHS", "0")
    elif how == "attribute":
        base.cuda_graphs = False
    elif how == "argument":
        options["compile_config"] = CompileConfig(backend="aot_eager")
    elif how == "config":
        base.generation_config.compile_config = CompileConfig(backend="aot_eager")
    else:
        base.model.norm.register_forward_hook(lambda *_: None)
    assert torch.equal(run(model, 3, routing, **options), want)
    assert len(asked) == 1 and (asked[0] is not None) == (how in ("argument", "config"))
    assert graphs.captured == 0


def test_other_caches_are_left_to_transformers(graphs, monkeypatch):
    asked = []

    def compiled(self, config):
        asked.append(config)
        return self.__call__

    monkeypatch.setattr(transformers.PreTrainedModel, "get_compiled_call", compiled)
    model = tiny_model("mistral")  # layers of a sliding window
    assert model.config.sliding_window
    routing = routing_of(model, 3)
    assert torch.equal(run(model, 3, routing), run(model, 3, routing, static=False))
    assert graphs.captured == 0 and len(asked) == 1
    monkeypatch.undo()
    model = tiny_model("llama")
    assert StepGraphs.devices == ("cuda",) and not StepGraphs.fits(model.base_model)


def test_without_compilation_there_is_no_kept_memory(graphs):
    model = tiny_model("llama")
    routing = routing_of(model, 3)
    want = run(model, 3, routing, static=False)
    assert torch.equal(run(model, 3, routing, disable_compile=True), want)
    assert graphs.captured == 0
    if uses_kept_memory():
        assert memory(model) is None


def test_a_capture_that_fails_is_told_once(graphs, monkeypatch, caplog):
    model = tiny_model("llama")
    routing = routing_of(model, 3)
    want = run(model, 3, routing, static=False)

    def failing(self, run, undo, device, share=None):
        graphs.captured += 1
        run()  # the lengths have advanced
        raise RuntimeError("an operation that cannot be captured")

    monkeypatch.setattr(graphs, "__init__", failing)
    with caplog.at_level(logging.WARNING, logger="slm_fast.step_graphs"):
        assert torch.equal(run(model, 3, routing), want)
        assert torch.equal(run(model, 3, routing), want)
    assert [r.message.count("cannot be captured") for r in caplog.records] == [1]
    assert (graphs.captured, graphs.replayed) == (1, 0)
    assert model.state.routing is None


def test_graphs_are_bounded(graphs, monkeypatch):
    monkeypatch.setattr(StepGraphs, "most", 2)
    model = tiny_model("llama")

    def names():
        return sorted(key[1] for m in model.base_model.graphs.caches.all() for key in m.graphs)

    rows = (8, 1, 2, 1, 4) if uses_kept_memory() else (8,)
    for count in rows:
        run(model, count, routing_of(model, count))
    assert names() == ([1, 4] if uses_kept_memory() else [8]) and graphs.captured == len(set(rows))


def test_unpatching_drops_the_graphs(graphs):
    model = tiny_model("llama")
    base = model.base_model
    want = run(model, 3, None, static=False)
    run(model, 3, routing_of(model, 3))
    base.cuda_graphs = True
    unpatch_model(base)
    assert not {"graphs", "cuda_graphs"} & vars(base).keys()
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    options = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(base.generate(**batch(3), **settings, **options), want)
    patch_model(base, default_pool(base, SLMConfig()))
    assert base.graphs is None


def test_copies_and_pickles_have_their_own(graphs):
    model = tiny_model("llama")
    routing = routing_of(model, 3)
    want = run(model, 3, routing)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.base_model.graphs is None
    assert copy.copy(model.base_model).graphs is None and model.base_model.graphs is not None
    graphs.captured = 0
    other = copy.deepcopy(model)
    other.base_model.lm_head.weight.data.neg_()
    assert not torch.equal(run(other, 3, routing), want)
    assert torch.equal(run(model, 3, routing), want) and graphs.captured == 1


def test_inference_mode(graphs):
    model = tiny_model("llama")
    routing = routing_of(model, 3)
    want = run(model, 3, routing, static=False)
    with torch.inference_mode():
        assert torch.equal(run(model, 3, routing), want)
    assert graphs.replayed == NEW - 1
    if uses_kept_memory():
        assert torch.equal(run(model, 3, routing), want) and graphs.captured == 1
        with torch.inference_mode():
            assert torch.equal(run(model, 3, routing), want)
