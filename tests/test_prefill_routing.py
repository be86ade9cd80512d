"""`route_in_prefill`: rows are routed by the pass that answers them, as their encoder would route them."""

import pytest
import torch
from conftest import tiny_model
from test_backbone_encoder import TEXTS, fill, texts_of, tokenizer
from test_backbone_encoder import base_of as zero_padded_base
from test_step_graphs import graphs  # noqa: F401
from torch import nn
from transformers import DynamicCache

from slm_fast import SLMConfig, SLMModel, get_slm_model
from slm_fast.backbone_encoder import BackboneEncoder, backbone_of, layer_list
from slm_fast.cli import _settings
from slm_fast.layers import target_linears
from slm_fast.prompts import Prompt, encode_texts
from slm_fast.trainer import encode_dataset

CHAT = "{% for m in messages %}w80 w81 w82 {{ m['content'] }} w83{% endfor %}"
FAMILIES = ["llama", "bert", "t5"]
MIXED = [text for task in range(3) for text in texts_of(task, 3)] + ["w1 w40 w80 w2", "w91 w91"]
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def base_of(family: str):
    """As in real models, padding has states of its own."""
    base = zero_padded_base(family)
    base.get_input_embeddings().weight.data[0].normal_(generator=torch.Generator().manual_seed(5))
    return base


def model_of(family: str, labels=None, chat=None, side="right", **config) -> SLMModel:
    """Three tasks, queries of the layers 1 and 2 of four, random factors in the others."""
    settings = dict(r=4, top_k=2, entries_per_task=2, target_modules="all-linear", query_layers=[1, 2])
    settings |= dict(encoder_name_or_path="backbone", route_in_prefill=True)
    words = tokenizer(chat_template=chat, padding_side=side)
    model = get_slm_model(base_of(family), SLMConfig(**(settings | config)), tokenizer=words)
    for task in range(3):
        names = labels[task] if labels else None
        model.add_task(f"task{task}", texts=texts_of(task), labels=names, progress=False)
    fill(model.pool)
    for head in model.pool.heads.values():
        nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(3))
    return model


def padded(model: SLMModel, texts: list[str], side: str) -> dict[str, torch.Tensor]:
    words = model.tokenizer
    rows = [
        encode_texts(model.base_model, words, [text], 64, in_prefill=True)["input_ids"][0].tolist()
        for text in texts
    ]
    words.padding_side, before = side, words.padding_side
    inputs = dict(words.pad({"input_ids": rows}, return_tensors="pt"))
    words.padding_side = before
    if model.is_seq2seq:
        inputs["decoder_input_ids"] = torch.zeros(len(texts), 1, dtype=torch.long)
    return inputs


@pytest.fixture
def searched(monkeypatch):
    """The queries that pools were searched for."""
    from slm_fast.pool import KnowledgePool

    seen, search = [], KnowledgePool.search

    def spy(pool, query, tasks=None):
        seen.append(query)
        return search(pool, query, tasks)

    monkeypatch.setattr(KnowledgePool, "search", spy)
    return seen


def no_pass_of_its_own(model, monkeypatch):
    def forbidden(texts):
        raise AssertionError("the encoder ran")

    model.encoder._cache.clear()
    monkeypatch.setattr(model.encoder, "encode", forbidden)


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.base_model.modules())


@pytest.mark.parametrize("chat", [None, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_query_is_the_encoders(family, side, chat, searched):
    model = model_of(family, chat=chat, side=side)
    texts = sorted(MIXED, key=len, reverse=True)  # the encoder's order
    model.encoder._cache.clear()  # a padded BERT token has another position
    want, routing = model.encoder(texts), model.route(texts)
    del searched[:]
    with torch.no_grad():
        model(**padded(model, texts, side))
    (query,) = searched
    torch.testing.assert_close(query, want, rtol=1e-4, atol=1e-5)
    if family == "bert" or (family == "t5" and side == "right"):  # the same pass of the same batch
        assert torch.equal(query, want)
    assert torch.equal(model.last_routing.indices, routing.indices)
    torch.testing.assert_close(model.last_routing.weights, routing.weights)
    plain = BackboneEncoder(model.base_model, model.tokenizer, query_layers=[1, 2])(texts)
    if side == "right":  # BERT knows where in a batch a token stands
        assert torch.allclose(plain, want, atol=1e-4) == (chat is None or family != "llama")
    assert hooks_of(model) == 0 and model.state.routing is None


def test_padding_counts_for_nothing(searched):
    model = model_of("llama")
    with torch.no_grad():
        for text in TEXTS:
            model(**padded(model, [text], "right"))
        model(padded(model, TEXTS, "left")["input_ids"], padded(model, TEXTS, "left")["attention_mask"])
    torch.testing.assert_close(torch.cat(searched[-5:-1]), searched[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_deepest_layers_and_the_embeddings(family, searched):
    """Queries of the embeddings; of the last layer, behind which only a T5's decoder has linears."""
    for layers in ([0], [0, 4]) if family == "t5" else ([0], [0, 3]):
        model = model_of(family, query_layers=layers)
        want = model.encoder(MIXED)
        with torch.no_grad():
            model(**padded(model, MIXED, "right"))
        torch.testing.assert_close(searched[-1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_is_the_passes_of_both(family):
    """The logits under the routing that was found, and of one made ahead; an explicit source still wins."""
    model = model_of(family)
    inputs = padded(model, MIXED, "right")
    with torch.no_grad():
        got = model(**inputs)[0]
        found = model.last_routing
        torch.testing.assert_close(got, model(**inputs, routing=model.route(MIXED))[0], rtol=1e-4, atol=1e-4)
        frozen = model(**inputs, adapter_names=["__base__"] * len(MIXED))[0]
        assert not torch.allclose(got, frozen, atol=1e-2)
        assert model.last_routing is found
    assert [row["task"] for row in model.explain(routing=found)][:9] == [f"task{n // 3}" for n in range(9)]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "static"],
)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generates_as_with_a_routing_made_ahead(family, options, monkeypatch):
    model = model_of(family, chat=CHAT)
    routing = model.route(MIXED)
    assert len({tuple(row) for row in routing.indices.tolist()}) > 2
    want = model.generate_text(MIXED, routing=routing, **GREEDY, **options)
    frozen = model.generate_text(MIXED, adapter_names=["__base__"] * len(MIXED), **GREEDY, **options)
    no_pass_of_its_own(model, monkeypatch)
    calls = []
    layer = layer_list(backbone_of(model.base_model))[1][0]
    layer.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape[1]))
    got = model.generate_text(MIXED, **GREEDY, **options)
    assert got == want != frozen
    assert sum(tokens > 1 for tokens in calls) == 1
    each = 3 if family == "llama" and "num_beams" in options else 1
    assert torch.equal(model.last_routing.indices, routing.repeat_interleave(each).indices)
    assert model.state.routing is None


def test_a_task_restricts(monkeypatch):
    model = model_of("llama")
    names = ["task2", None, *["task0"] * (len(MIXED) - 2)]
    want = model.generate_text(MIXED, routing=model.route(MIXED, task=names), **GREEDY)
    no_pass_of_its_own(model, monkeypatch)
    assert model.generate_text(MIXED, task=names, **GREEDY) == want
    assert model.explain(routing=model.last_routing)[0]["task"] == "task2"
    model.generate_text(MIXED, task=names, **GREEDY, num_beams=2)
    assert [r["task"] for r in model.explain(routing=model.last_routing)][:2] == ["task2"] * 2
    model.generate_text(MIXED, task="task1", **GREEDY)
    assert {row["task"] for row in model.explain(routing=model.last_routing)} == {"task1"}


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_answer_in_one_pass(family, monkeypatch):
    labels = [["a", "b"], ["c", "d", "e"], ["b", "a"]]
    model = model_of(family, labels, chat=CHAT)
    want = model.predict(MIXED, routing=model.route(MIXED), batch_size=4)
    assert len({prediction.answer for prediction in want}) > 2
    no_pass_of_its_own(model, monkeypatch)
    rows = []
    layer = layer_list(backbone_of(model.base_model))[1][0]
    layer.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    got = model.predict(MIXED, batch_size=4)
    assert rows == [4, 4, 3]
    for mine, theirs in zip(got, want, strict=True):
        assert (mine.text, mine.task, mine.answer) == (theirs.text, theirs.task, theirs.answer)
        assert mine.mass == pytest.approx(theirs.mass, abs=1e-4)
        assert [e["entry"] for e in mine.entries] == [e["entry"] for e in theirs.entries]
    told = model.predict(MIXED, task="task1")
    assert {prediction.answer for prediction in told} <= {"c", "d", "e"} and sum(rows) == 22
    inputs = padded(model, MIXED, "right")
    inputs.pop("decoder_input_ids", None)
    with torch.no_grad():
        logits = model(**inputs, task="task1").logits
        again = model(**inputs, task="task1", routing=model.last_routing).logits
    torch.testing.assert_close(logits, again, rtol=1e-4, atol=1e-4)


def test_heads_and_texts_in_one_pool(monkeypatch):
    """Whoever has no head is generated in a second pass; told such a task, in one."""
    model = model_of("llama", [["a", "b"], None, ["c", "d"]], chat=CHAT)
    model.base_model.generation_config.eos_token_id = None
    want = model.predict(MIXED, routing=model.route(MIXED), batch_size=4, max_new_tokens=3)
    told = model.predict(MIXED, routing=model.route(MIXED, task="task1"), task="task1", max_new_tokens=3)
    no_pass_of_its_own(model, monkeypatch)
    got = model.predict(MIXED, batch_size=4, max_new_tokens=3)
    assert [p.answer for p in got] == [p.answer for p in want]
    assert [p.task for p in got] == [p.task for p in want]
    tokens, layer = [], model.base_model.model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0].shape[1]))
    got = model.predict(MIXED, task="task1", max_new_tokens=3)
    assert [p.answer for p in got] == [p.answer for p in told]
    assert tokens[0] > 1 and tokens[1:] == [1, 1]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_far_texts_go_to_the_frozen_model(family):
    model = model_of(family, min_similarity="auto", coverage=0.5)
    want = model.route(MIXED)
    frozen_rows = (want.weights == 0).all(-1)
    assert 0 < int(frozen_rows.sum()) < len(MIXED)
    inputs = padded(model, MIXED, "right")
    with torch.no_grad():
        got = model(**inputs)[0]
        assert torch.equal((model.last_routing.weights == 0).all(-1), frozen_rows)
        frozen = model(**inputs, adapter_names=["__base__"] * len(MIXED))[0]
    assert torch.equal(got[frozen_rows], frozen[frozen_rows])
    assert not torch.allclose(got[~frozen_rows], frozen[~frozen_rows], atol=1e-3)


@pytest.mark.parametrize("settings", [{"mixing": "batch"}, {"twin_share": 0.3}], ids=["batch", "twins"])
def test_other_ways_to_search(settings):
    model = model_of("llama", **settings)
    want = model.generate_text(MIXED, routing=model.route(MIXED), **GREEDY)
    assert model.generate_text(MIXED, **GREEDY) == want


def test_resident_factors(monkeypatch):
    model = model_of("llama")
    want = model.generate_text(MIXED, routing=model.route(MIXED), **GREEDY)
    model.keep_resident(slots=6)
    no_pass_of_its_own(model, monkeypatch)
    assert model.generate_text(MIXED, **GREEDY) == want
    assert model.state.resident.misses > 0
    assert model.state.lease is None and not any(model.state.resident._held)
    with pytest.raises(ZeroDivisionError):
        model.base_model.lm_head.register_forward_hook(lambda *_: 1 / 0)
        model(**padded(model, MIXED, "left"))
    assert model.state.lease is None and not any(model.state.resident._held) and hooks_of(model) == 1


def test_step_graphs(graphs):  # noqa: F811
    model = model_of("llama")
    options = GREEDY | {"cache_implementation": "static"}
    want = model.generate_text(MIXED, routing=model.route(MIXED), **options)
    captured, replayed = graphs.captured, graphs.replayed
    assert captured and model.generate_text(MIXED, **options) == want
    assert graphs.captured == captured and graphs.replayed > replayed


def test_recomputation_sees_the_routing():
    found = []
    for checkpointing in (False, True):
        model = model_of("llama")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with model.training_task("task1"):
            inputs = padded(model, texts_of(1, 4), "right")
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert sum(float(grad.abs().sum()) for grad in found[0]) > 0
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-7)


def test_a_whole_graph_cannot_route():
    model = model_of("llama")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="cannot route in the prefill"):
        torch.compile(model, backend="eager", fullgraph=True)(**padded(model, MIXED, "right"))
    torch._dynamo.reset()


def test_training_sees_the_texts_of_the_keys():
    model = model_of("llama", [["a", "b"]] * 3, chat=CHAT)
    (row,) = encode_dataset(
        [{"text": "w1 w2", "label": "a"}], model, model.tokenizer, "task0", 32, quiet=True
    )
    assert row["input_ids"] == model.tokenizer("w80 w81 w82 w1 w2 w83")["input_ids"]
    long = " ".join(f"w{n}" for n in range(40))
    kept = encode_dataset([{"text": long, "label": "a"}], model, model.tokenizer, "task0", 8, quiet=True)
    assert kept[0]["input_ids"] == model.tokenizer(long + " w83")["input_ids"][-8:]
    bert = model_of("bert", [["a", "b"]] * 3, chat=CHAT)
    rows = encode_dataset([{"text": long, "label": "a"}], bert, bert.tokenizer, "task0", 8, quiet=True)
    assert rows[0]["input_ids"] == bert.tokenizer(long)["input_ids"][:8]


@pytest.mark.parametrize("family", FAMILIES)
def test_long_texts_and_prompts_of_two_parts(family, searched):
    """Cut as the prompts are, where both are cut to the same length."""
    model = model_of(family, encoder_max_length=6, chat=CHAT)
    texts = [" ".join(f"w{n}" for n in range(40)), Prompt("w1 w2", "w3"), "w3 ### w1 w2"]
    want = model.encoder(texts)
    assert not torch.allclose(want[1], want[2], atol=1e-4) or family == "bert"
    del searched[:]
    if family == "bert":
        model.predict(texts, max_length=6)
    else:
        model.generate_text(texts, max_length=6, max_new_tokens=1)
    torch.testing.assert_close(searched[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family, tmp_path):
    model = model_of(family)
    inputs = padded(model, MIXED, "right")
    with torch.no_grad():
        want, routing = model(**inputs)[0], model.last_routing
    model.save_pretrained(tmp_path)
    loaded = SLMModel.from_pretrained(base_of(family), tmp_path, tokenizer=tokenizer())
    assert loaded.slm_config.route_in_prefill and loaded.encoder.in_prefill
    assert loaded.pool.modules_shape == model.pool.modules_shape
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], want)
    assert torch.equal(loaded.last_routing.indices, routing.indices)
    plain = get_slm_model(base_of(family), SLMConfig(target_modules="all-linear"), encoder="backbone")
    with pytest.raises(ValueError, match="route_in_prefill is True, but the encoder was made with"):
        plain.load_pool(tmp_path)


def test_which_linears_are_mixed():
    def layers(family, **config) -> list[str]:
        model = get_slm_model(base_of(family), SLMConfig(**config), encoder="backbone", tokenizer=tokenizer())
        return list(model.pool.modules_shape)

    behind = dict(query_layers=[1, 2], route_in_prefill=True)
    assert layers("llama", **behind) == [f"model.layers.{n}.self_attn.o_proj" for n in (2, 3)]
    assert layers("llama", layers_to_transform=3) == ["model.layers.3.self_attn.o_proj"]
    assert layers("llama", layers_to_transform=[3], **behind) == ["model.layers.3.self_attn.o_proj"]
    assert layers("bert", **behind) == [f"encoder.layer.{n}.attention.output.dense" for n in (2, 3)]
    of_t5 = layers("t5", **behind)
    assert sum(name.startswith("encoder") for name in of_t5) == 2
    assert sum(name.startswith("decoder") for name in of_t5) == 8  # four layers of two attentions
    both = layers("t5", layers_to_transform=[3])
    assert {".".join(name.split(".")[:3]) for name in both} == {"encoder.block.3", "decoder.block.3"}
    every = target_linears(base_of("llama"), "all-linear", [0, 2])
    assert len(every) == 14 and all(name.split(".")[2] in "02" for name in every)


def test_settings_are_stored_where_they_are_not_the_defaults(tmp_path):
    assert not {"layers_to_transform", "route_in_prefill"} & set(SLMConfig().to_dict())
    config = SLMConfig(layers_to_transform=7, route_in_prefill=True)
    assert config.to_dict()["layers_to_transform"] == [7] and config.to_dict()["route_in_prefill"]
    config.save_pretrained(tmp_path)
    assert SLMConfig.from_pretrained(tmp_path) == config
    words = ["layers_to_transform=[15,16]", "route_in_prefill=true"]
    assert SLMConfig(**_settings(words)).layers_to_transform == [15, 16]
    for wrong in ([], [-1], True, 1.5, "all", [1, "2"]):
        with pytest.raises(ValueError, match="layers_to_transform must be indices"):
            SLMConfig(layers_to_transform=wrong)
    with pytest.raises(ValueError, match="route_in_prefill must be True or False"):
        SLMConfig(route_in_prefill="yes")


def test_what_cannot_be_built():
    def build(family="llama", encoder="backbone", **config):
        config = SLMConfig(**dict(query_layers=[1, 2], route_in_prefill=True) | config)
        return get_slm_model(base_of(family), config, encoder=encoder, tokenizer=tokenizer())

    with pytest.raises(ValueError, match=r"layers_to_transform \[4\] match no target linear.*\[0, 1, 2, 3\]"):
        build(layers_to_transform=[3, 4], route_in_prefill=False)
    with pytest.raises(ValueError, match='needs encoder="backbone"'):
        build(encoder=lambda texts: torch.zeros(len(texts), 4), query_layers="auto")
    with pytest.raises(ValueError, match='needs encoder="backbone"'):
        build(encoder=None)
    with pytest.raises(ValueError, match=r"in front of layer 2.*model\.layers\.1\.self_attn\.o_proj would"):
        build(layers_to_transform=[1, 2])
    with pytest.raises(ValueError, match=r"encoder\.block\.1"):
        build("t5", layers_to_transform=[1])
    with pytest.raises(ValueError, match="no target linear lies behind query_layers"):
        build(query_layers=[4])
    base = base_of("llama")
    other = BackboneEncoder(base_of("llama"), tokenizer(), query_layers=[1, 2], in_prefill=True)
    made = get_slm_model(base, SLMConfig(route_in_prefill=True), encoder=other)
    assert made.encoder.model is base and made.encoder.layers == [1, 2]
    with pytest.raises(ValueError, match="not of another"):
        SLMModel(base_of("llama"), made.slm_config, made.pool, other)
    with pytest.raises(ValueError, match="not kept on disk"):
        other.keep_in("nowhere")


def test_what_cannot_be_routed():
    model = model_of("llama")
    ids = torch.randint(2, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    ids[0, 0] = 0
    known = {"pad_token_id": 0, **GREEDY}
    with pytest.raises(ValueError, match="cu_seq_lens_q.*pass routing="):
        model(ids[:1], cu_seq_lens_q=torch.tensor([0, 2, 6], dtype=torch.int32))
    with torch.no_grad():
        cache = model.base_model(ids[:, :3], past_key_values=DynamicCache(config=model.config))
    cache = cache.get("cache", cache.get("past_key_values"))
    with pytest.raises(ValueError, match="the cache holds a part"):
        model(ids[:, 3:], past_key_values=cache)
    with pytest.raises(ValueError, match="has 4 tokens of a row, the batch 6"):
        model.generate(ids, **known, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="needs attention_mask="):
        model.generate(ids, **known, cache_implementation="static")
    with pytest.raises(ValueError, match="unknown task 'task9'"):
        model.generate(ids, **known, task="task9")
    with pytest.raises(ValueError, match="tasks has 5 rows"):
        model.generate(ids, **known, task=["task0"] * 5)
    with pytest.raises(ValueError, match="attention_mask is"):
        with model.prefill_scope(attention_mask=torch.ones(2, 5)):
            model.base_model.model(ids)
    pytest.importorskip("slm_fast.continuous", exc_type=ImportError)
    with pytest.raises(ValueError, match="continuous batching does not route in the prefill"):
        model.generate_batch(ids.tolist(), max_new_tokens=2)
    assert hooks_of(model) == 0 and model.state.routing is None
    t5 = model_of("t5")
    states = backbone_of(t5.base_model)(input_ids=ids)
    with pytest.raises(ValueError, match="did not run"):
        t5(encoder_outputs=states, decoder_input_ids=ids[:, :1])
    base = model.unload()
    with pytest.raises(ValueError, match="was unloaded"):
        model(ids)
    assert base(ids).logits.shape == (2, 6, 96)


def test_without_the_setting_nothing_is_routed_silently():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="say how to route"):
        model(torch.ones(1, 3, dtype=torch.long))
    assert model.last_routing is None
    empty = get_slm_model(
        base_of("llama"),
        SLMConfig(route_in_prefill=True, query_layers=[2]),
        encoder="backbone",
        tokenizer=tokenizer(),
    )
    assert empty(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 96)
    assert empty.last_routing is None
