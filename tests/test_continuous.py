"""Continuous batching: every request's tokens are those that it gets alone, whatever it is packed with."""

import copy
import inspect
import threading
import traceback

import pytest
import torch
from conftest import clustered_embeddings, tiny_model

continuous = pytest.importorskip("slm_fast.continuous", exc_type=ImportError)

from transformers import GenerationConfig  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402

from slm_fast import unpatch_model  # noqa: E402
from slm_fast.fast_forward import FastPath  # noqa: E402
from slm_fast.layers import MixtureLinear, Packing, RoutingState  # noqa: E402

PAGE = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"


def batching(**options) -> ContinuousBatchingConfig:
    """Small pages, so that short prompts fill some."""
    return ContinuousBatchingConfig(**{PAGE: 4, "num_blocks": 64, "max_batch_tokens": 32} | options)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]


def alone(model, prompt: list[int], max_new_tokens: int, **source) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **source
    )
    return out[0, len(prompt) :].tolist()


def tokens(results: dict) -> list[list[int]]:
    return [output.generated_tokens for output in results.values()]


def running_threads() -> int:
    return sum(not thread.daemon for thread in threading.enumerate())


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama")
    model.base_model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def managers(monkeypatch):
    """The managers that were made, each with the blocks that its requests held, and its steps' sizes."""
    made = []
    init, step = continuous.RoutedManager.__init__, continuous.RoutedManager._generation_step

    def record(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)
        self.steps, self.blocks = [], {}

    def recorded_step(self):
        inputs = self.batch_processor.inputs_and_outputs
        self.steps.append({f.state.request_id: f.query_length for f in inputs.requests_in_batch})
        step(self)
        cache = self.batch_processor.cache
        groups = (
            cache.group_cache_managers
            if hasattr(cache, "group_cache_managers")
            else cache.cache_allocators.values()
        )
        for group in groups:
            for request_id, blocks in group.block_table.items():
                self.blocks[request_id] = list(blocks)

    monkeypatch.setattr(continuous.RoutedManager, "__init__", record)
    monkeypatch.setattr(continuous.RoutedManager, "_generation_step", recorded_step)
    return made


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_every_request_gets_the_tokens_that_it_gets_alone(family, managers):
    model = tiny_model(family)
    inputs = prompts(7, 1, 12, 40, 3, 4, 9, 2)
    query = torch.cat([clustered_embeddings(t, 4)[:3] for t in range(3)])[: len(inputs)]
    results = model.generate_batch(
        inputs, embeddings=query, max_new_tokens=6, do_sample=False, continuous_batching_config=batching()
    )
    assert list(results) == [f"req_{i}" for i in range(8)]
    for row, (prompt, got) in enumerate(zip(inputs, tokens(results), strict=True)):
        assert got == alone(model, prompt, 6, embeddings=query[row : row + 1]), row
    (manager,) = managers
    assert max(map(len, manager.steps)) > 3  # requests did share steps
    assert len([step for step in manager.steps if step.get("req_3", 0) > 1]) > 1  # more than fits in a step
    assert not manager._mixtures  # nothing is kept of a request that is finished
    assert model.state.routing is None and model.state.packing is None


@pytest.mark.skipif(PAGE != "page_size", reason="older releases name another attention function")
def test_decoding_steps_take_the_fast_path(model, monkeypatch):
    steps, step = [], RoutingState.step

    def record(self, pool, rows, num_tokens):
        steps.append(num_tokens)
        return step(self, pool, rows, num_tokens)

    monkeypatch.setattr(RoutingState, "step", record)
    model.generate_batch(prompts(4, 7, 3), adapter_names=["task0", "__base__", "task1"], max_new_tokens=3)
    assert 14 in steps and steps.count(3) == 2 * 2  # two steps, two layers


def test_mixtures_differ_within_a_step_and_base_rows_are_the_frozen_model(model):
    prompt = prompts(6)[0]
    names = ["task0", "__base__", "task1.0", "task2"]
    results = model.generate_batch(
        [prompt] * 4,
        adapter_names=names,
        max_new_tokens=8,
        do_sample=False,
        continuous_batching_config=batching(),
    )
    expected = [alone(model, prompt, 8, adapter_names=[name]) for name in names]
    assert tokens(results) == expected
    assert len({tuple(row) for row in expected}) == 4
    frozen = model.base_model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    assert expected[1] == frozen[0, 6:].tolist()


def test_tokens_equal_the_unpatched_model_with_the_mixture_merged(model):
    inputs, routing = prompts(5, 9), model.route(embeddings=clustered_embeddings(1, 2))
    got = model.generate_batch(
        inputs, routing=routing, max_new_tokens=6, do_sample=False, continuous_batching_config=batching()
    )
    for row, prompt in enumerate(inputs):
        merged = unpatch_model(copy.deepcopy(model.base_model))
        for name, index in model.pool.module_index.items():
            factors, pool = model.pool.factors[index], model.pool
            for slot, weight in zip(
                routing.indices[row].tolist(), routing.weights[row].tolist(), strict=True
            ):
                span = slice(int(pool.start[slot]), int(pool.start[slot] + pool.rank[slot]))
                delta = factors.B[span].T @ factors.A[span]
                merged.get_submodule(name).weight.data += weight * float(pool.scaling[slot]) * delta
        ids = torch.tensor([prompt])
        assert (
            tokens(got)[row]
            == merged.generate(ids, max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
        )


def test_more_requests_than_a_step_or_the_cache_holds(model):
    inputs = prompts(*[3 + i % 9 for i in range(20)])
    names = [["task0", "task1", "task2", "__base__"][i % 4] for i in range(20)]
    limits = [2 + i % 5 for i in range(20)]
    small = batching(num_blocks=12, max_batch_tokens=8, max_requests_per_batch=3)
    results = model.generate_batch(
        inputs, adapter_names=names, max_new_tokens=limits, do_sample=False, continuous_batching_config=small
    )
    for prompt, name, limit, got in zip(inputs, names, limits, tokens(results), strict=True):
        assert got == alone(model, prompt, limit, adapter_names=[name])


def test_the_default_sizes_and_lengths_are_those_of_generate(model):
    inputs = prompts(4, 11)
    results = model.generate_batch(inputs, adapter_names=["task0", "task1"], do_sample=False)
    for prompt, name, got in zip(inputs, ["task0", "task1"], tokens(results), strict=True):
        ids = torch.tensor([prompt])
        assert got == model.generate(ids, adapter_names=[name], do_sample=False)[0, len(prompt) :].tolist()
    results = model.generate_batch(inputs, adapter_names=["task0", "task1"], max_length=13, do_sample=False)
    assert [len(output.generated_tokens) for output in results.values()] == [9, 2]


def test_the_model_keeps_its_configs(model):
    before = model.base_model.generation_config.to_dict()
    config, options = GenerationConfig(max_new_tokens=2, do_sample=False), batching()
    model.base_model.train()
    model.generate_batch(
        prompts(3), adapter_names=["task0"], generation_config=config, continuous_batching_config=options
    )
    assert model.base_model.training
    model.base_model.eval()
    assert model.base_model.generation_config.to_dict() == before and config.eos_token_id is None
    assert options.use_cuda_graph is None and model.config._attn_implementation == "sdpa"


def test_an_end_of_sequence_token_ends_its_request_alone(model):
    inputs = prompts(5, 6)
    long = [alone(model, prompt, 8, adapter_names=["task0"]) for prompt in inputs]
    end = next(t for t in long[0] if t not in long[1])
    got = model.generate_batch(
        inputs, adapter_names=["task0"] * 2, max_new_tokens=8, do_sample=False, eos_token_id=end
    )
    assert tokens(got) == [long[0][: long[0].index(end) + 1], long[1]]


def test_return_sequences_share_their_prompts_mixture(model):
    inputs = prompts(5, 9)
    got = model.generate_batch(
        inputs,
        adapter_names=["task0", "task1"],
        max_new_tokens=4,
        do_sample=True,
        temperature=1e-5,
        num_return_sequences=3,
        continuous_batching_config=batching(),
    )
    assert list(got)[:3] == ["req_0__child#0", "req_0__child#1", "req_0"] and len(got) == 6
    for row, name in enumerate(["task0", "task1"]):
        assert tokens(got)[3 * row : 3 * row + 3] == [alone(model, inputs[row], 4, adapter_names=[name])] * 3


def test_prompts_from_texts(model):
    class Tokenizer:
        pad_token = "<pad>"

        def __call__(self, texts):
            return {"input_ids": [[3 + ord(c) % 90 for c in text] for text in texts]}

    model.tokenizer, model.encoder = Tokenizer(), None
    with pytest.raises(ValueError, match="no input"):
        model.generate_batch(adapter_names=["task0"])
    with pytest.raises(ValueError, match="prompts"):
        model.generate_batch(adapter_names=["task0"])
    model.tokenizer = None


# ---- prefix sharing


def test_equal_mixtures_share_blocks_and_others_do_not(model, managers):
    prompt = prompts(13)[0]
    names = ["task0", "task0", "task1", "__base__", "__base__"]
    one_by_one = batching(max_requests_per_batch=1)
    with model.continuous_batching_context_manager(
        continuous_batching_config=one_by_one, do_sample=False, max_new_tokens=5
    ) as manager:
        results = []
        for name in names:
            manager.add_request(prompt, adapter_names=[name])
            results.append(manager.get_result(timeout=30).generated_tokens)
        prefills = [max(s.get(f"req_{i}", 0) for s in manager.steps) for i in range(5)]
        blocks = dict(manager.blocks)
    assert results == [alone(model, prompt, 5, adapter_names=[name]) for name in names]
    assert results[0] != results[2] != results[3]
    assert prefills == [13, 1, 13, 13, 1]  # three full pages of 4 were found where the mixture is the same
    assert blocks["req_0"][:3] == blocks["req_1"][:3] and blocks["req_3"][:3] == blocks["req_4"][:3]
    pages = [set(blocks[f"req_{i}"][:3]) for i in (0, 2, 3)]
    assert len(set.union(*pages)) == 9


def test_weights_and_the_pools_version_are_part_of_what_is_shared():
    model = tiny_model("llama", num_tasks=2)
    prompt = prompts(9)[0]
    routing = model.route(embeddings=clustered_embeddings(0, 1))
    other = routing._replace(weights=routing.weights.flip(-1))
    expected = [alone(model, prompt, 3, routing=r) for r in (routing, other, routing)]
    with model.continuous_batching_context_manager(
        continuous_batching_config=batching(), do_sample=False, max_new_tokens=3
    ) as manager:
        got = []
        for r in (routing, other, routing, None, routing):
            if r is None:  # the same entries with other factors
                with model.training_task("task0"), torch.no_grad():
                    for factors in model.pool.factors:
                        torch.nn.init.normal_(factors.B_owned, std=0.3)
                continue
            manager.add_request(prompt, routing=r)
            got.append(manager.get_result(timeout=30).generated_tokens)
    expected.append(alone(model, prompt, 3, routing=routing))
    assert got == expected
    assert got[2] != got[3]


def test_transformers_alone_would_share_them(model, monkeypatch):
    """The salt does it: without, the second mixture reads the first one's blocks."""
    prompt = prompts(13, seed=1)[0]
    monkeypatch.setattr(continuous.Mixture, "salt", lambda self: [])
    with model.continuous_batching_context_manager(
        continuous_batching_config=batching(), do_sample=False, max_new_tokens=5
    ) as manager:
        results = []
        for name in ("task0", "task1"):
            manager.add_request(prompt, adapter_names=[name])
            results.append(manager.get_result(timeout=30).generated_tokens)
    assert results[1] != alone(model, prompt, 5, adapter_names=["task1"])


def test_blocks_that_are_hashed_without_the_salt_are_an_error(model, monkeypatch):
    monkeypatch.setattr(continuous.SaltedCache, "_salted", lambda self, state: state)
    with pytest.raises(RuntimeError, match="shares cache blocks in a way that is not known here"):
        model.generate_batch(prompts(9), adapter_names=["task0"], continuous_batching_config=batching())
    options = batching(allow_block_sharing=False)
    model.generate_batch(prompts(9), adapter_names=["task0"], continuous_batching_config=options)


def test_salts():
    def salt(*args):
        return tuple(continuous.Mixture(*args).salt())

    base = salt([1, 2], [0.5, 0.5], 3)
    others = [
        salt([2, 1], [0.5, 0.5], 3),
        salt([1, 2], [0.5, 0.25], 3),
        salt([1, 2], [0.5, 0.5], 4),
        salt([1], [0.5], 3),
        salt([1, 2], [0.0, 0.0], 3),
    ]
    assert len({base, *others}) == 6
    assert salt([1, 2, 0], [0.5, 0.5, 0.0], 3) == base  # picks without weight do not count
    assert salt([0], [0.0], 1) == salt([5, 6], [0.0, 0.0], 2)  # the frozen model is always the same


# ---- arrivals


def test_requests_arrive_while_others_run(model, managers):
    inputs, names = prompts(6, 9, 3), ["task0", "task1", "__base__"]
    with model.continuous_batching_context_manager(
        continuous_batching_config=batching(), do_sample=False, max_new_tokens=12
    ) as manager:
        ids, outputs = [manager.add_request(inputs[0], adapter_names=[names[0]], streaming=True)], {}
        for output in manager:
            outputs[output.request_id] = output
            if len(ids) < 3 and len(outputs[ids[0]].generated_tokens) > 2 * len(ids):
                name = names[len(ids)]
                ids.append(manager.add_request(inputs[len(ids)], f"mine-{name}", adapter_names=[name]))
            if len(outputs) == 3 and all(o.is_finished() for o in outputs.values()):
                break
    assert ids == ["req_0", "mine-task1", "mine-__base__"]
    for row, request_id in enumerate(ids):
        assert outputs[request_id].generated_tokens == alone(
            model, inputs[row], 12, adapter_names=[names[row]]
        )
    assert any(len(step) > 1 for step in managers[0].steps)


def test_a_cancelled_request_is_forgotten(model):
    expected = alone(model, prompts(4)[0], 3, adapter_names=["task1"])
    with model.continuous_batching_context_manager(
        continuous_batching_config=batching(), do_sample=False, max_new_tokens=100
    ) as manager:
        gone = manager.add_request(prompts(4)[0], adapter_names=["task0"], streaming=True)
        manager.get_result(timeout=30)
        manager.cancel_request(gone)
        kept = manager.add_request(prompts(4)[0], adapter_names=["task1"], max_new_tokens=3)
        output = next(output for output in manager if output.request_id == kept)
        assert output.generated_tokens == expected
        assert not manager._mixtures


def test_an_entry_that_is_removed_while_a_request_waits_is_an_error():
    model = tiny_model("llama", num_tasks=2)
    with pytest.raises(RuntimeError, match="stale") as caught:
        with model.continuous_batching_context_manager(
            continuous_batching_config=batching(), do_sample=False, max_new_tokens=200
        ) as manager:
            manager.add_request(prompts(4)[0], adapter_names=["task0"], streaming=True)
            for output in manager:
                if len(output.generated_tokens) == 2:
                    model.remove_task("task0")
    assert isinstance(caught.value.__cause__, ValueError)


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_names": ["task0"]}, "adapter_names has 1 rows, the batch has 2"),
        ({"adapter_names": ["task0", "nobody"]}, "unknown adapter 'nobody'"),
        ({}, "say how to route"),
        ({"embeddings": torch.full((2, 24), torch.nan)}, "finite"),
        ({"adapter_names": ["task0"] * 2, "max_new_tokens": [1]}, "max_new_tokens has 1 rows"),
        ({"adapter_names": ["task0"] * 2, "max_new_tokens": 0}, "room for a new token"),
        ({"adapter_names": ["task0"] * 2, "nonsense": 1}, "unexpected keyword arguments: nonsense"),
        ({"adapter_names": ["task0"] * 2, "num_beams": 2}, "no beams"),
        (
            {"adapter_names": ["task0"] * 2, "continuous_batching_config": batching(use_cuda_graph=True)},
            "does not support use_cuda_graph=True",
        ),
    ],
)
def test_bad_arguments_raise_and_leave_no_trace(model, options, message):
    threads = running_threads()
    with pytest.raises(ValueError, match=message):
        model.generate_batch(prompts(4, 5), **options)
    assert running_threads() == threads and model.config._attn_implementation == "sdpa"


def test_empty_batches_and_empty_prompts(model):
    assert model.generate_batch([], adapter_names=[]) == {}
    with pytest.raises(ValueError, match="got 0 tokens"):
        model.generate_batch([[5, 6], []], adapter_names=["task0"] * 2)


@pytest.mark.parametrize("step", [0, 3])
def test_an_exception_in_a_step_reaches_the_caller(model, step, monkeypatch):
    """In the prefill and while decoding; with its type and traceback, and the model works afterwards."""
    inputs, calls = prompts(4, 7), []
    forward = MixtureLinear.forward

    def failing(self, x):
        calls.append(x)
        if len(calls) > 14 * step:
            raise ArithmeticError("of this layer")
        return forward(self, x)

    threads = running_threads()
    with monkeypatch.context() as patched:
        patched.setattr(MixtureLinear, "forward", failing)
        patched.setattr(FastPath, "backend", lambda *_: None)
        with pytest.raises(RuntimeError, match="ArithmeticError: of this layer") as caught:
            model.generate_batch(inputs, adapter_names=["task0", "task1"], max_new_tokens=8)
    cause = caught.value.__cause__
    assert isinstance(cause, ArithmeticError)
    assert "failing" in [frame.name for frame in traceback.extract_tb(cause.__traceback__)]
    assert running_threads() == threads
    assert model.state.routing is None and model.state.packing is None
    assert model.config._attn_implementation == "sdpa" and not model.base_model.training
    got = model.generate_batch(inputs, adapter_names=["task0", "task1"], max_new_tokens=8, do_sample=False)
    assert tokens(got)[0] == alone(model, inputs[0], 8, adapter_names=["task0"])


def test_a_bad_request_is_an_error_and_the_others_go_on(model):
    expected = alone(model, prompts(4)[0], 3, adapter_names=["task1"])
    with model.continuous_batching_context_manager(
        continuous_batching_config=batching(), do_sample=False, max_new_tokens=3
    ) as manager:
        with pytest.raises(ValueError, match="unknown adapter"):
            manager.add_request([5, 6], adapter_names=["nobody"])
        bad = manager.add_request([5, 6], adapter_names=["task0"], nonsense=1)
        with pytest.raises(RuntimeError, match=f"{bad} failed: ValueError: .*nonsense") as caught:
            manager.get_result(timeout=30)
        assert isinstance(caught.value.__cause__, ValueError)
        good = manager.add_request(prompts(4)[0], "good", adapter_names=["task1"], max_new_tokens=3)
        assert next(manager.request_id_iter(good)).generated_tokens == expected
        assert not manager._mixtures


def test_a_request_that_cannot_fit_the_cache_is_an_error(model):
    with pytest.raises(RuntimeError, match="failed"):
        model.generate_batch(
            prompts(40), adapter_names=["task0"], continuous_batching_config=batching(num_blocks=4)
        )


def test_a_failed_manager_takes_no_requests(model, monkeypatch):
    def failing(self, rows, num_tokens):
        raise ArithmeticError("of this step")

    monkeypatch.setattr(continuous.RoutedManager, "_packed", failing)
    with pytest.raises(RuntimeError, match="continuous batching failed") as caught:
        with model.continuous_batching_context_manager(continuous_batching_config=batching()) as manager:
            manager.add_request(prompts(4)[0], adapter_names=["task0"])
            manager._generation_thread.join()
    assert isinstance(caught.value.__cause__, ArithmeticError)
    with model.continuous_batching_context_manager(continuous_batching_config=batching()) as manager:
        manager.add_request(prompts(4)[0], adapter_names=["task0"])
        manager._generation_thread.join()
        with pytest.raises(RuntimeError, match="takes no more requests") as caught:
            manager.add_request(prompts(4)[0], adapter_names=["task0"])
        assert isinstance(caught.value.__cause__, ArithmeticError)


def test_a_sequence_to_sequence_model_is_refused():
    with pytest.raises(ValueError, match="causal language model"):
        tiny_model("t5").generate_batch(prompts(3), adapter_names=["task0"])


def test_an_unknown_interface_is_named(model, monkeypatch):
    monkeypatch.setitem(continuous.NEEDED, continuous.OutputRouter, ("deliver", "send"))
    with pytest.raises(ImportError, match=r"5\.17 to .* has no OutputRouter\.send"):
        model.generate_batch(prompts(3), adapter_names=["task0"])


# ---- pools and layers


def test_rows_are_routed_once(model, monkeypatch):
    searches, search = [], model.pool.search
    monkeypatch.setattr(model.pool, "search", lambda *args: searches.append(args) or search(*args))
    model.generate_batch(prompts(4, 6, 3), embeddings=clustered_embeddings(0, 3), max_new_tokens=5)
    assert len(searches) == 1


def test_the_base_does_not_drop_routing_arguments(model):
    with pytest.raises(ValueError, match="adapter_names: .* SLMModel"):
        model.base_model.generate_batch(prompts(4), adapter_names=["task0"], max_new_tokens=2)


def test_an_empty_pool_is_the_frozen_model():
    model = tiny_model("llama", num_tasks=0, fill=False)
    inputs = prompts(4, 6)
    got = model.generate_batch(
        inputs, max_new_tokens=4, do_sample=False, continuous_batching_config=batching()
    )
    assert tokens(got) == [alone(model, prompt, 4) for prompt in inputs]


def test_a_resident_pool_serves_every_step(managers):
    model = tiny_model("llama")
    inputs, names = prompts(4, 9, 6, 5), ["task0", "task1", "task2", "__base__"]
    expected = [
        alone(model, prompt, 5, adapter_names=[name]) for prompt, name in zip(inputs, names, strict=True)
    ]
    model.keep_resident(slots=4)
    got = model.generate_batch(
        inputs,
        adapter_names=names,
        max_new_tokens=5,
        do_sample=False,
        continuous_batching_config=batching(max_requests_per_batch=2),
    )
    assert tokens(got) == expected
    assert model.state.resident.stats()["hits"] > 0 and model.state.lease is None


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_packed_layer_is_its_rows_one_by_one(backend):
    model = tiny_model("llama", backend=backend)
    layer = next(m for m in model.base_model.modules() if isinstance(m, MixtureLinear))
    routing = model.pool.fixed_routing(["task0", "__base__", "task1", "task2"])
    x, bounds = torch.randn(1, 11, 32), [0, 3, 7, 7, 11]
    with model.state.use(routing, Packing(torch.tensor(bounds, dtype=torch.int32), 11)), torch.no_grad():
        y = layer(x)
        with pytest.raises(ValueError, match="has 10 tokens, its packing 11"):
            layer(x[:, :10])
    for row in range(4):
        span = slice(bounds[row], bounds[row + 1])
        with model.state.use(routing.rows([row])), torch.no_grad():
            torch.testing.assert_close(y[:, span], layer(x[:, span]), atol=1e-6, rtol=1e-5)


def test_padding_at_the_end_of_a_step_belongs_to_no_request(model):
    manager = object.__new__(continuous.RoutedManager)
    manager.slm = model
    mixture = continuous.Mixture([0, 1], [0.5, 0.5], model.pool.version)
    routing, packing = manager._packed([(mixture, 3), (mixture, 1)], 8)
    assert packing.cu_seqlens.tolist() == [0, 3, 4, 8] and packing.num_tokens == 8
    assert routing.weights.tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]
