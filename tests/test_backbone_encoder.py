"""`encoder="backbone"`: queries from the first layers of the frozen base model itself."""

import copy
import json
import logging
import pickle
import threading

import pytest
import torch
import transformers
from conftest import tiny_base, word_tokenizer
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

from slm_fast import SLMConfig, SLMModel, fast_forward, get_slm_model, patch_model, unpatch_model
from slm_fast.backbone_encoder import BackboneEncoder, auto_layers, backbone_of, layer_list
from slm_fast.cli import main
from slm_fast.loading import load_base

FAMILIES = ["llama", "qwen2", "bert", "roberta", "t5"]
LAYERS = [0, 1, 3]
WORDS = ["[PAD]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(93))]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w3 w2 w1"]


def tokenizer(**options) -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS, **options)


def base_of(family: str, num_layers: int = 4, dtype=torch.float32):
    """A random model of four layers."""
    transformers.set_seed(0)
    sizes = dict(vocab_size=96, pad_token_id=0, initializer_range=0.2)
    if family == "t5":
        sizes |= dict(d_model=32, d_ff=64, d_kv=8, num_layers=num_layers, num_heads=4)
        return (
            transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0, **sizes))
            .to(dtype)
            .eval()
        )
    sizes |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=num_layers, num_attention_heads=4)
    config, cls = {
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
        "bert": ("BertConfig", "BertModel"),
        "roberta": ("RobertaConfig", "RobertaModel"),
    }[family]
    if family in ("llama", "qwen2"):
        sizes |= dict(num_key_value_heads=2)
    return getattr(transformers, cls)(getattr(transformers, config)(**sizes)).to(dtype).eval()


def slm_of(family: str, encoder="backbone", dtype=torch.float32, **config) -> SLMModel:
    """A model that routes with its own hidden states: three tasks, random factors."""
    settings = dict(r=4, top_k=2, entries_per_task=2, target_modules="all-linear", query_layers=LAYERS)
    base = base_of(family, dtype=dtype)
    model = get_slm_model(base, SLMConfig(**(settings | config)), encoder=encoder, tokenizer=tokenizer())
    for task in range(3):
        model.add_task(f"task{task}", texts=texts_of(task), progress=False)
    fill(model.pool)
    return model


def texts_of(task: int, count: int = 12) -> list[str]:
    """Texts of thirty words that belong to the task."""
    generator = torch.Generator().manual_seed(task)
    words = 30 * task + torch.randint(30, (count, 6), generator=generator)
    return [" ".join(f"w{word}" for word in row) for row in words.tolist()]


def fill(pool) -> None:
    generator = torch.Generator().manual_seed(7)
    for factors in pool.factors:
        factors.B.copy_(0.3 * torch.randn(factors.B.shape, generator=generator))


def wanted(base, text: str, layers=LAYERS) -> torch.Tensor:
    """A text's query by transformers' own hidden states, the text alone."""
    ids = tokenizer()([text], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = backbone_of(base)(input_ids=ids, output_hidden_states=True).hidden_states
    means = [normalize(states[layer][0].float(), dim=-1).mean(0) for layer in layers]
    return torch.cat([normalize(mean, dim=-1) for mean in means])


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_are_the_frozen_models_hidden_states(family):
    """Alone and in a batch, of whatever padding side, the last layer's included; nothing is left behind."""
    base = base_of(family)
    want = torch.stack([wanted(base, text) for text in TEXTS])
    hooks = [dict(module._forward_hooks) for module in base.modules()]
    encoder = BackboneEncoder(base, tokenizer(padding_side="left"), query_layers=LAYERS)
    torch.testing.assert_close(encoder(TEXTS), want, rtol=1e-4, atol=1e-5)
    alone = [BackboneEncoder(base, tokenizer(), query_layers=LAYERS)([text])[0] for text in TEXTS]
    torch.testing.assert_close(torch.stack(alone), want, rtol=1e-4, atol=1e-5)
    every = BackboneEncoder(base, tokenizer(), query_layers=[-1, 2])(TEXTS)
    want = torch.stack([wanted(base, text, [4, 2]) for text in TEXTS])
    torch.testing.assert_close(every, want, rtol=1e-4, atol=1e-5)
    assert [dict(module._forward_hooks) for module in base.modules()] == hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_layers_that_are_needed_run(family):
    base, ran = base_of(family), []
    encoder = BackboneEncoder(base, tokenizer(), query_layers=[0, 2])
    encoder(TEXTS)
    twin, _ = encoder._twin()
    assert len(layer_list(twin)[1]) == 2 and len(layer_list(backbone_of(base))[1]) == 4
    for module in (*twin.modules(), *base.modules()):
        module.register_forward_hook(lambda module, *_: ran.append(module))
    encoder(["w7 w7"])
    assert [m for m in ran if m in list(layer_list(twin)[1])] == list(layer_list(twin)[1])
    assert not set(ran) & set(base.modules())
    assert set(twin.parameters()) <= set(base.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_around_changes_a_query(family):
    """Neither the running batch's mixture, training mode, autocast, hooks, nor where the model is patched."""
    model = slm_of(family)
    want = torch.stack([wanted(base_of(family), text) for text in TEXTS])
    routing = model.route(TEXTS)
    assert routing.weights.sum() > 0

    def fresh() -> torch.Tensor:
        model.encoder._cache.clear()
        query = model.encoder(TEXTS)
        assert not query.requires_grad
        return query

    model.train()
    model.encoder._frozen = None  # the twin is made again, of a model in training
    for module in model.base_model.modules():
        module.register_forward_hook(lambda module, inputs, output: 1 / 0)
    with model.state.use(routing), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fresh(), want, rtol=1e-4, atol=1e-5)
        assert model.state.routing is routing
    assert model.base_model.training
    (twin, _), pool = model.encoder._twin(), model.pool
    model.unload()
    torch.testing.assert_close(fresh(), want, rtol=1e-4, atol=1e-5)
    model.repatch(pool)
    torch.testing.assert_close(fresh(), want, rtol=1e-4, atol=1e-5)
    assert model.encoder._twin()[0] is twin


def test_every_token_counts_alike():
    """A first token whose states are a thousand times as long does not swamp the mean."""
    base = base_of("llama")
    table = base.model.embed_tokens.weight.data
    table[3] *= 1000  # w0
    query = BackboneEncoder(base, tokenizer(), query_layers=[0])(["w0 w1 w2"])[0]
    torch.testing.assert_close(query, normalize(table[[3, 4, 5]], dim=-1).mean(0))


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_bf16_base_is_pooled_in_fp32(family):
    base = base_of(family, dtype=torch.bfloat16)
    query = BackboneEncoder(base, tokenizer(), query_layers=[2])(TEXTS[2:3])
    ids = tokenizer()(TEXTS[2:3], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        state = backbone_of(base)(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
    assert query.dtype is torch.float32 and state.dtype is torch.bfloat16
    torch.testing.assert_close(query[0], normalize(state.float(), dim=-1).mean(0))


def test_the_twin_follows_the_model():
    base = base_of("llama")
    encoder = BackboneEncoder(base, tokenizer(), query_layers=LAYERS)
    before = encoder(["w1 w2"])
    base.model.embed_tokens.weight.data.normal_()
    assert not torch.allclose(encoder(["w1 w3"]), before)
    torch.testing.assert_close(encoder(["w1 w3"])[0], wanted(base, "w1 w3"), rtol=1e-4, atol=1e-5)
    assert torch.equal(encoder(["w1 w2"]), before)  # remembered
    base.double()
    torch.testing.assert_close(encoder(["w2 w3"])[0], wanted(base, "w2 w3"), rtol=1e-5, atol=1e-6)
    assert encoder._twin()[0].rotary_emb.inv_freq is base.model.rotary_emb.inv_freq
    base.model.embed_tokens = torch.nn.Embedding(96, 32, dtype=torch.float64)
    torch.testing.assert_close(encoder(["w2 w4"])[0], wanted(base, "w2 w4"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_copies_and_pickles_embed_with_their_own_weights(family):
    model = slm_of(family)
    want = model.encoder(["w1 w9"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.encoder.model is other.base_model is not model.base_model
        assert torch.equal(other.encoder(["w1 w9"]), want)
        assert torch.equal(other.route(TEXTS).weights, model.route(TEXTS).weights)
        other.encoder._cache.clear()
        for parameter in other.base_model.parameters():
            parameter.data.normal_()
        assert not torch.allclose(other.encoder(["w1 w9"]), want)
    model.encoder._cache.clear()
    assert torch.equal(model.encoder(["w1 w9"]), want)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_saved_and_loaded_by_name(family, tmp_path):
    """With its layers, so that another "auto" cannot make stored keys meaningless."""
    model = slm_of(family, query_layers="auto")
    routing = model.route(TEXTS)
    model.save_pretrained(tmp_path)
    assert SLMConfig.from_pretrained(tmp_path).encoder_name_or_path == "backbone"
    assert SLMConfig.from_pretrained(tmp_path).query_layers == auto_layers(4, 32)
    loaded = SLMModel.from_pretrained(base_of(family), tmp_path, tokenizer=tokenizer())
    assert isinstance(loaded.encoder, BackboneEncoder)
    torch.testing.assert_close(loaded.route(TEXTS).scores, routing.scores)
    assert torch.equal(loaded.route(TEXTS).indices, routing.indices)


def test_the_command_line_and_the_tokenizer_of_the_bases_name(tmp_path, capsys):
    folder = tmp_path / "base"
    base_of("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    base, words = load_base(str(folder))
    config = SLMConfig(encoder_name_or_path="backbone", entries_per_task=2)
    model = get_slm_model(base, config, tokenizer=words)
    for task in range(2):
        model.add_task(f"task{task}", texts=texts_of(task), progress=False)
    model.save_pretrained(tmp_path / "slm")
    loaded = SLMModel.from_pretrained(load_base(str(folder))[0], tmp_path / "slm")
    torch.testing.assert_close(loaded.route(TEXTS).scores, model.route(TEXTS).scores)
    assert main(["route", "--model", str(tmp_path / "slm"), "--encoder", "backbone", "--json", *TEXTS]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    want = model.explain(TEXTS)
    assert [row["task"] for row in rows] == [row["task"] for row in want]
    assert rows[0]["mass"] == pytest.approx(want[0]["mass"], abs=1e-4)


def test_each_model_embeds_with_itself():
    """A `BackboneEncoder` of another model is made anew; the one of the model is kept."""
    first, second = base_of("llama"), base_of("llama")
    second.model.embed_tokens.weight.data.normal_()
    encoder = BackboneEncoder(first, tokenizer(), query_layers=LAYERS)
    config = SLMConfig(query_layers=LAYERS, encoder_name_or_path="backbone")
    assert get_slm_model(first, config, encoder=encoder).encoder is encoder
    model = get_slm_model(second, config, encoder=encoder)
    torch.testing.assert_close(model.encoder(TEXTS)[0], wanted(second, TEXTS[0]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        get_slm_model(tiny_base("llama"), config, encoder=encoder)


def test_bases_that_were_loaded_again_share_queries(tmp_path, monkeypatch):
    """In memory and on disk, of other layers too; not those of another base, dtype or form of the text."""
    passes, tokenized = [], BackboneEncoder._tokenized

    def counting(self, texts):
        passes.extend(texts)
        return tokenized(self, texts)

    monkeypatch.setattr(BackboneEncoder, "_tokenized", counting)
    memory = {}

    def passes_of(folder=None, change=None, dtype=torch.float32, **options) -> int:
        """Texts that the encoder of a new base encodes."""
        base, settings = base_of("llama", dtype=dtype), {"query_layers": [1, 2], "max_length": 8}
        if change:
            change(base)
        encoder = BackboneEncoder(base, tokenizer(), **(settings | options))
        encoder = encoder.share(memory) if folder is None else encoder.keep_in(folder)
        last = encoder.with_layers([-1])
        passes.clear()
        query, other = encoder(TEXTS), last(TEXTS)
        if dtype is torch.float32 and not (change or options):
            torch.testing.assert_close(normalize(other[0], dim=0), wanted(base, TEXTS[0], [4]))
            torch.testing.assert_close(query[0], wanted(base, TEXTS[0], [1, 2]), rtol=1e-4, atol=1e-5)
        return len(passes)

    def others(base):
        base.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)

    for folder in (None, tmp_path):
        assert passes_of(folder) == len(TEXTS) and passes_of(folder) == 0
        assert passes_of(folder, others) == passes_of(folder, dtype=torch.bfloat16) == len(TEXTS)
        assert passes_of(folder, query_layers=[2]) == len(TEXTS)
    assert passes_of(in_prefill=True) == len(TEXTS) and passes_of(in_prefill=True) == 0


def test_patched_models_and_fast_forward():
    model = slm_of("llama")
    routing, pool = model.route(TEXTS), model.pool
    base = model.unload()
    ids = torch.randint(1, 96, (4, 5))
    with torch.no_grad():
        want = fast_forward(base, ids, pool=pool, routing=routing).logits
        encoder = BackboneEncoder(base, tokenizer(), query_layers=LAYERS)
        base.config._name_or_path = "nothing/here"
        with pytest.raises(ValueError, match="'nothing/here' brings no tokenizer"):
            fast_forward(base, ids, pool=copy.deepcopy(pool), encoder="backbone", texts=TEXTS)
        other = copy.deepcopy(pool)
        assert torch.equal(fast_forward(base, ids, pool=other, encoder=encoder, texts=TEXTS).logits, want)
        patch_model(base, pool, encoder=encoder)
        assert torch.equal(base(ids, texts=TEXTS).logits, want)
        assert base.mixtures[1].encoder is encoder
        base.mixtures[1].encoder = "backbone"
        with pytest.raises(ValueError, match="brings no tokenizer"):
            base(ids, texts=TEXTS)
    unpatch_model(base)


def test_routed_in_a_thread_while_the_model_runs():
    """The pass must not disturb the routing of the running batch, nor the batch the queries."""
    model = slm_of("llama")
    ids, busy = torch.randint(1, 96, (4, 8)), model.route(TEXTS)
    with torch.no_grad():
        want = model(ids, routing=busy).logits
    many = [" ".join(f"w{(i * j) % 93}" for j in range(1, 30)) for i in range(1, 90)]
    routing = model.route(many)
    for _ in range(3):
        model.encoder._cache.clear()
        ahead = model.route_ahead(many)
        ran = 0
        with torch.no_grad(), model.state.use(busy):
            while not ahead.done() or not ran:
                torch.testing.assert_close(model.base_model(ids).logits, want, rtol=0, atol=0)
                ran += 1
        torch.testing.assert_close(ahead.result().scores, routing.scores, rtol=1e-4, atol=1e-4)


def test_threads_share_an_encoder():
    model = slm_of("llama")
    parts = [[f"w{i} w{j} w{k}" for j in range(20) for k in range(3)] for i in range(4)]
    want = [BackboneEncoder(base_of("llama"), tokenizer(), query_layers=LAYERS)(part) for part in parts]
    got = [None] * 4

    def embed(i):
        got[i] = model.encoder(parts[i])

    threads = [threading.Thread(target=embed, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for part, query in zip(got, want, strict=True):
        torch.testing.assert_close(part, query, rtol=1e-4, atol=1e-5)


def test_continuous_batching():
    pytest.importorskip("slm_fast.continuous", exc_type=ImportError)
    model = slm_of("llama")
    model.base_model.set_attn_implementation("eager")  # which becomes one that only the manager can call
    model.base_model.generation_config.eos_token_id = None
    routing = model.route(TEXTS)
    assert len({tuple(row) for row in routing.indices.tolist()}) > 1
    model.encoder = BackboneEncoder(model.base_model, tokenizer(), query_layers=LAYERS)
    ids = [tokenizer()(text)["input_ids"] for text in TEXTS]
    want = [
        model.generate(
            torch.tensor([row]), routing=routing.rows([i]), max_new_tokens=4, do_sample=False, pad_token_id=0
        )[0, len(row) :].tolist()
        for i, row in enumerate(ids)
    ]
    with model.continuous_batching_context_manager(max_new_tokens=4, do_sample=False) as manager:
        manager.add_requests(ids[:1], adapter_names=["__base__"])
        assert manager.get_result(timeout=30) is not None
        assert model.base_model.config._attn_implementation.startswith("paged|")
        names = manager.add_requests(ids, texts=TEXTS)  # the twin is made here
        got = {}
        while len(got) < len(ids):
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                got[output.request_id] = output.generated_tokens
    assert [got[name] for name in names] == want


def test_resident_factors_and_generated_texts():
    model = slm_of("llama")
    model.base_model.generation_config.eos_token_id = None
    want = model.generate_text(TEXTS, max_new_tokens=4, do_sample=False)
    model.keep_resident(slots=6)
    model.encoder._cache.clear()
    assert model.generate_text(TEXTS, max_new_tokens=4, do_sample=False) == want and all(want)


def test_the_text_is_taken_without_its_chat_template():
    template = "{% for m in messages %}w80 w81 w82 {{ m['content'] }} w83{% endfor %}"
    plain, chat = tokenizer(), tokenizer(chat_template=template)
    base = base_of("llama")
    assert torch.equal(BackboneEncoder(base, plain)(TEXTS), BackboneEncoder(base, chat)(TEXTS))


def test_long_texts_are_cut_at_the_end_with_a_warning(caplog):
    base = base_of("llama")
    encoder = BackboneEncoder(base, tokenizer(truncation_side="left"), query_layers=LAYERS, max_length=4)
    with caplog.at_level(logging.WARNING, logger="slm_fast.encoder"):
        query = encoder(["w1 w2 w3 w4 w5 w6", "w1", "w4 w3 w2 w1"])
    assert encoder.num_truncated == 1 and "encoder_max_length=4" in caplog.text
    torch.testing.assert_close(query[0], wanted(base, "w1 w2 w3 w4"), rtol=1e-4, atol=1e-5)
    roberta = base_of("roberta")
    assert BackboneEncoder(roberta, tokenizer(), max_length=4096).max_length == 511


def test_the_callers_tokenizer_stays_as_it_is():
    given = tokenizer(padding_side="left", truncation_side="left")
    given.pad_token = None
    BackboneEncoder(base_of("llama"), given)(TEXTS)
    assert (given.padding_side, given.truncation_side, given.pad_token) == ("left", "left", None)


def test_what_cannot_be_a_backbone():
    with pytest.raises(ValueError, match="layers 0 to 4"):
        BackboneEncoder(base_of("llama"), tokenizer(), query_layers=[5])
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="GPT2Model has none"):
        BackboneEncoder(gpt2, tokenizer())
    base = base_of("llama")
    base.model.layers[0].forward = base.model.layers[0].forward
    with pytest.raises(ValueError, match="LlamaDecoderLayer was replaced"):
        BackboneEncoder(base, tokenizer())(TEXTS)


def test_auto_layers():
    assert auto_layers(30, 576) == [5, 10, 15]  # SmolLM2-135M
    assert auto_layers(6, 384) == [2, 3, 4]  # MiniLM
    assert auto_layers(32, 4096) == [16] and auto_layers(22, 2048) == [6, 11] and auto_layers(1, 8) == [1]
    encoder = BackboneEncoder(base_of("llama", num_layers=10), tokenizer())
    assert encoder.layers == [2, 4, 5] and encoder.cost == 0.5
    assert encoder(TEXTS).shape == (4, 3 * 32)
