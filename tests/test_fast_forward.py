import copy
import inspect
import io

import pytest
import tokenizers
import torch
import transformers
from conftest import clustered_embeddings, tiny_base, tiny_model
from test_model import merged

from slm_fast import dispatch, fast_forward, get_slm_model, patch_model, unpatch_model
from slm_fast.config import SLMConfig
from slm_fast.cpu_linear import LayerTail, LinearGroup
from slm_fast.fast_forward import FastDecoderLayer, FastHead, FastPath
from slm_fast.layers import default_pool

FAMILIES = ("llama", "mistral", "qwen2")


def family_model(family: str, dtype=torch.float32, **config):
    """tiny_model, and the same for Qwen2, whose q, k and v have biases."""
    if family != "qwen2":
        return tiny_model(family, dtype=dtype, **config)
    transformers.set_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
    )
    base = transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen2Config(num_key_value_heads=2, pad_token_id=0, **sizes), dtype=dtype
    ).eval()
    for layer in base.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            torch.nn.init.normal_(getattr(layer.self_attn, name).bias)
    settings = dict(
        r=4, top_k=2, entries_per_task=2, target_modules="all-linear", weighting="softmax", temperature=4.0
    )
    model = get_slm_model(base, SLMConfig(**(settings | config)))
    for t in range(3):
        model.add_task(f"task{t}", embeddings=clustered_embeddings(t), progress=False)
    for factors in model.pool.factors:
        torch.nn.init.normal_(factors.B, std=0.1)
    return model


@pytest.fixture
def calls(monkeypatch):
    """The groups of linears that ran."""
    seen = []

    def record(kind):
        real = kind.__call__

        def call(self, *args, **kwargs):
            seen.append(self)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__call__", call)

    record(LinearGroup), record(LayerTail)
    return seen


@pytest.fixture
def slow(monkeypatch):
    """Runs a function without the fast path."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(FastPath, "backend", lambda *_: None)
            return function()

    return run


def left_padded(rows=3, length=7):
    ids = torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, :row], mask[row, :row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def routing_of(model, rows=3):
    return model.pool.search(torch.stack([clustered_embeddings(t)[0] for t in range(rows)]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", ["o_proj"], ["q_proj", "down_proj"]], ids=str)
def test_logits_are_those_of_the_ordinary_layers(family, targets, calls, slow):
    model = family_model(family, target_modules=targets)
    inputs, routing = left_padded(), routing_of(model)

    def run(**options):
        with torch.no_grad():
            return model(**inputs, routing=routing, **options)

    got, want = run(output_hidden_states=True), slow(lambda: run(output_hidden_states=True))
    assert len(calls) == 2 * 2 + 1  # two layers and the head
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-5)
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    step = inputs | {"input_ids": inputs["input_ids"][:, :1], "attention_mask": torch.ones(3, 8).long()}
    logits = []
    for out in (got, want):
        cache = out.get("past_key_values", None) or out.get("cache")
        name = "past_key_values" if "past_key_values" in out else "cache"
        with torch.no_grad():
            logits.append(model(**step, routing=routing, **{name: cache}).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_generation_gives_the_same_tokens(family, options, calls, slow):
    model = family_model(family)
    inputs, routing = left_padded(), routing_of(model)

    options = {"do_sample": False, "max_new_tokens": 8} | options

    def run():
        transformers.set_seed(0)
        return model.generate(**inputs, routing=routing, **options)

    got = run()
    assert len(calls) >= 8 * 5
    assert torch.equal(got, slow(run))
    base = model.generate(**inputs, adapter_names=["__base__"] * 3, **options)
    assert got.shape != base.shape or not torch.equal(got, base)  # the mixtures matter


def test_streaming_and_log_probabilities(calls, slow):
    model = family_model("llama")
    inputs, routing = left_padded(), routing_of(model)
    row = {name: value[1:2] for name, value in inputs.items()}

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    out = model.generate(
        **row, routing=routing.rows([1]), max_new_tokens=6, do_sample=False, streamer=streamer
    )
    assert streamer.ended and streamer.tokens == out.flatten().tolist()

    def scored():
        settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
        found = model.generate(**inputs, routing=routing, output_scores=True, output_logits=True, **settings)
        return model.base_model.compute_transition_scores(
            found.sequences, found.scores, normalize_logits=True
        ), torch.stack(found.logits)

    got, want = scored(), slow(scored)
    assert calls and got[0].shape == (3, 6) and bool((got[0] < 0).all())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def syllables() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the small models' 96 tokens, one or two letters each; it splits texts into letters."""
    letters = "abcdefghijklmnopqrst"
    words = ["<pad>", *letters, *(a + b for a in letters for b in letters)][:96]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@pytest.mark.parametrize("routed", [True, False])
def test_stop_strings_end_each_row_where_its_merged_model_stops(routed, calls):
    model, tokenizer = tiny_model("llama"), syllables()
    inputs, routing = left_padded(), routing_of(model)
    source = {"routing": routing} if routed else {"adapter_names": ["__base__"] * 3}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    free = model.generate(**inputs, **source, **options)[:, 7:]
    tokens = [tokenizer.convert_ids_to_tokens(row) for row in free.tolist()]
    # from within a token of row 0 to the next one's end, two tokens of row 1, nothing of row 2
    strings = [tokens[0][2][-1] + tokens[0][3], tokens[1][5] + tokens[1][6]]
    stops = {"stop_strings": strings, "tokenizer": tokenizer}
    out, lengths = model.generate(**inputs, **source, **stops, **options), []
    for row in range(3):
        alone = merged(model, routing, row, "llama") if routed else tiny_base("llama")
        given = {name: value[row : row + 1] for name, value in inputs.items()}
        want = alone.generate(**given, **stops, **options)[0]
        lengths.append(len(want) - 7)
        assert torch.equal(out[row, : len(want)], want) and not out[row, len(want) :].any()
    assert calls and lengths == [4, 7, 8] and out.shape[1] - 7 == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_without_weights_are_the_model_without_a_pool(dtype, calls):
    model = tiny_model("llama", dtype=dtype)
    inputs, routing = left_padded(), routing_of(model)
    routing.weights[1] = 0
    with torch.no_grad():
        got = model(**inputs, routing=routing).logits
        with model.state.use(None):
            frozen = model.base_model(**inputs).logits
    assert len(calls) == 2 * 5
    assert torch.equal(got[1], frozen[1]) and not torch.equal(got[0], frozen[0])


def test_a_row_gives_the_same_bits_in_any_batch():
    model = tiny_model("llama", dtype=torch.bfloat16)
    ids, routing = torch.randint(1, 96, (3, 1)), routing_of(model)
    with torch.no_grad():
        batch = model(input_ids=ids, routing=routing).logits
        for row in range(3):
            alone = model(input_ids=ids[row : row + 1], routing=routing.rows(slice(row, row + 1))).logits
            assert torch.equal(alone[0], batch[row])


def test_half_precision_is_as_near_as_the_ordinary_layers(slow):
    exact, model = tiny_model("llama"), tiny_model("llama", dtype=torch.bfloat16)
    model.base_model.load_state_dict(exact.base_model.state_dict())
    exact.base_model.load_state_dict({k: v.float() for k, v in model.base_model.state_dict().items()})
    inputs, routing = left_padded(), routing_of(model)
    with torch.no_grad():
        want = exact(**inputs, routing=routing).logits[:, -1]
        run = lambda: model(**inputs, routing=routing).logits[:, -1].float()  # noqa: E731
        got, ordinary = run(), slow(run)
    assert (got - want).abs().max() <= 2 * (ordinary - want).abs().max() + 1e-2 * want.abs().max()


@pytest.mark.skipif(not dispatch.has_tiles(), reason="needs AMX tiles for bf16")
def test_prefill_on_tiles(calls, slow):
    """bf16 logits of long prompts are as near to fp32 as the ordinary layers'; rows do not see each other."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.pool.factors.to(torch.bfloat16)
    routing = routing_of(model, 5)
    routing.weights[2] = 0
    inputs = left_padded(5, 130)
    exact = copy.deepcopy(model).float()
    with torch.no_grad():
        want = slow(lambda: exact(**inputs, routing=routing).logits)
        got = model(**inputs, routing=routing).logits
        assert len(calls) == 5
        ordinary = slow(lambda: model(**inputs, routing=routing).logits)
        frozen = model(**inputs, adapter_names=["__base__"] * 5).logits
        alone = model(**{k: v[3:4] for k, v in inputs.items()}, routing=routing.rows([3])).logits
    seen = inputs["attention_mask"].bool()
    error, allowed = ((logits.float() - want)[seen].abs().max() for logits in (got, ordinary))
    assert error <= 2 * allowed + 1e-2 * want.abs().max()
    assert torch.equal(got[2], frozen[2]) and not torch.equal(got[1], frozen[1])
    torch.testing.assert_close(alone[0, 3:], got[3, 3:], rtol=0, atol=float(allowed))
    model.pool.factors.float()  # fp32 factors are not for tiles
    with torch.no_grad():
        model(**inputs, routing=routing)
    assert len(calls) == 3 * 5


def test_hooks_on_inner_modules_run(calls):
    model = tiny_model("llama")
    layer, seen = model.base_model.model.layers[0], []
    handle = layer.mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(**left_padded(), routing=routing_of(model))
        assert len(seen) == 1 and len(calls) == 2 + 1
        handle.remove()
        model(**left_padded(), routing=routing_of(model))
    assert len(seen) == 1 and len(calls) == 2 + 1 + 5


def test_attentions_are_recorded(calls):
    model = tiny_model("llama")
    model.base_model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**left_padded(), routing=routing_of(model), output_attentions=True)
    assert len(out.attentions) == 2 and out.attentions[0].shape == (3, 4, 7, 7)
    assert len(calls) == 1  # the head alone


def test_training_goes_through_the_ordinary_layers(calls):
    model = tiny_model("llama")
    ids = left_padded()["input_ids"]
    with model.training_task("task0"):
        routing = model.pool.search(clustered_embeddings(0)[:3], "task0")
        model(input_ids=ids, routing=routing, labels=ids).loss.backward()
        grads = [p.grad for p in model.pool.parameters() if p.grad is not None]
        assert not calls and len(grads) > 10 and all(g.isfinite().all() for g in grads)


def test_long_prompts_take_the_library(calls):
    model = tiny_model("llama")
    with torch.no_grad():
        model(input_ids=torch.randint(1, 96, (3, 22)), routing=routing_of(model))
    assert not calls


def test_a_pool_that_grew_is_seen(slow):
    model = tiny_model("llama")
    ids = torch.randint(1, 96, (2, 1))
    with torch.no_grad():
        model(input_ids=ids, routing=routing_of(model, 2))
        for t in range(3, 12):
            model.add_task(f"task{t}", embeddings=clustered_embeddings(t), progress=False)
        for factors in model.pool.factors:
            torch.nn.init.normal_(factors.B, std=0.1)
        names = ["task11", "task4"]
        run = lambda: model(input_ids=ids, adapter_names=names).logits  # noqa: E731
        torch.testing.assert_close(run(), slow(run), rtol=0, atol=1e-5)


def test_rows_must_divide():
    model = tiny_model("llama")
    with torch.no_grad(), model.state.use(routing_of(model, 2)), pytest.raises(ValueError, match="multiple"):
        model.base_model(torch.randint(1, 96, (3, 1)))


def test_patching_keeps_names_and_is_undone():
    base = tiny_base("llama")
    classes, keys = [type(m) for m in base.modules()], set(base.state_dict())
    patch_model(base, default_pool(base, SLMConfig(target_modules=["o_proj"])))
    layer = base.model.layers[0]
    assert isinstance(layer, FastDecoderLayer) and isinstance(layer, classes[4])
    assert type(layer).__name__ == "LlamaDecoderLayer" and str(type(layer)) == str(classes[4])
    assert isinstance(base.lm_head, FastHead)
    assert set(base.state_dict()) == {k.replace("o_proj.w", "o_proj.base_layer.w") for k in keys}
    unpatch_model(base)
    assert [type(m) for m in base.modules()] == classes and set(base.state_dict()) == keys
    assert not hasattr(base.model.layers[0], "fast")


def test_copies_and_pickles_run_by_themselves(calls):
    model = tiny_model("llama")
    ids, routing = torch.randint(1, 96, (3, 1)), routing_of(model)
    with torch.no_grad():
        want = model(input_ids=ids, routing=routing).logits
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert other.base_model.model.layers[0].fast.state is other.state
            assert other.base_model.model.layers[0].fast.pool is other.pool
            assert torch.equal(other(input_ids=ids, routing=routing).logits, want)
            other.base_model.model.layers[0].mlp.up_proj.weight.data.zero_()
            assert not torch.equal(other(input_ids=ids, routing=routing).logits, want)
        assert torch.equal(model(input_ids=ids, routing=routing).logits, want)
    assert len(calls) == 6 * 5


def patched_base(**config):
    """A LLaMA patched by itself, its pool's routing of three rows, and a `SLMModel` of the same."""
    model = tiny_model("llama", **config)
    base = model.unload()
    patch_model(
        base, model.pool, encoder=lambda texts: torch.stack([clustered_embeddings(len(t))[0] for t in texts])
    )
    return base, routing_of(model), model.pool


def test_a_patched_model_routes_by_every_argument():
    base, routing, pool = patched_base()
    inputs = left_padded()
    with torch.no_grad():
        frozen = base(**inputs).logits
        by_routing = base(**inputs, routing=routing).logits
        by_texts = base(**inputs, texts=["abc", "a", "aa"]).logits
        by_embeddings = base(
            **inputs, embeddings=torch.stack([clustered_embeddings(t)[0] for t in (3, 1, 2)])
        ).logits
        by_name = base(**inputs, adapter_names=["__base__", "task1", "__base__"]).logits
    assert not torch.equal(by_routing, frozen)
    assert torch.equal(by_texts, by_embeddings)
    torch.testing.assert_close(by_texts[1:], by_routing[1:], rtol=0, atol=1e-6)
    assert torch.equal(by_name[[0, 2]], frozen[[0, 2]]) and not torch.equal(by_name[1], frozen[1])
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert not torch.equal(
        base.generate(**inputs, routing=routing, **settings), base.generate(**inputs, **settings)
    )
    with pytest.raises(ValueError, match="routing has 3 rows, the batch has 2"):
        base(input_ids=torch.ones(2, 4).long(), routing=routing)
    with pytest.raises(ValueError, match="pass only one of"):
        base(**inputs, routing=routing, adapter_names=["task1"] * 3)
    assert {"input_ids", "attention_mask", "texts", "routing"} <= set(
        inspect.signature(base.forward).parameters
    )
    unpatch_model(base)
    assert "texts" not in inspect.signature(base.forward).parameters and not hasattr(base, "mixtures")
    with torch.no_grad():
        torch.testing.assert_close(base(**inputs).logits, frozen, rtol=0, atol=1e-5)


def test_fast_forward_leaves_an_unpatched_model_alone():
    base, routing, pool = patched_base()
    inputs = left_padded()
    with torch.no_grad():
        want, frozen = base(**inputs, routing=routing).logits, base(**inputs).logits
        assert torch.equal(fast_forward(base, **inputs, routing=routing).logits, want)
    unpatch_model(base).requires_grad_(True)
    kinds = [type(module) for module in base.modules()]
    with torch.no_grad():
        assert torch.equal(fast_forward(base, pool=pool, **inputs, routing=routing).logits, want)
        torch.testing.assert_close(base(**inputs).logits, frozen, rtol=0, atol=1e-5)
    assert [type(module) for module in base.modules()] == kinds
    assert all(parameter.requires_grad for parameter in base.parameters())
    fast_forward(base, **inputs, pool=pool, routing=routing).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in base.parameters())
    with torch.no_grad():  # the twin follows the model's own parameters
        base.lm_head.weight.mul_(2)
        torch.testing.assert_close(fast_forward(base, pool=pool, **inputs, routing=routing).logits, 2 * want)
        base.half()
        assert fast_forward(base, pool=pool, **inputs, routing=routing).logits.dtype == torch.float16
    with pytest.raises(ValueError, match="pass pool="):
        fast_forward(base, **inputs)
    patch_model(base, pool)
    with pytest.raises(ValueError, match="another pool"):
        fast_forward(base, **inputs, pool=copy.deepcopy(pool), routing=routing)


def test_one_graph_for_all_routings_given_as_arguments():
    base, routing, _ = patched_base()
    compiled = torch.compile(base, backend="aot_eager", fullgraph=True)
    ids = torch.randint(1, 96, (3, 6))
    torch._dynamo.utils.counters.clear()
    for shift in range(3):
        other = routing.rows([(row + shift) % 3 for row in range(3)])
        with torch.no_grad():
            want, got = (
                base(input_ids=ids, routing=other).logits,
                compiled(input_ids=ids, routing=other).logits,
            )
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
