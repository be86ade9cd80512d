import logging

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from slm_fast import Encoder
from slm_fast.encoder import choose_layers


def test_layer_choice():
    assert choose_layers("auto", 6, 384) == [0, 1, 2, 3, 4, 5, 6]
    layers = choose_layers("auto", 12, 768)
    assert layers[0] == 0 and layers[-1] == 12 and 6 in layers and len(layers) * 768 < 4096
    assert choose_layers("auto", 24, 2048) == [0, 12, 24]
    assert choose_layers([0, -1], 6, 384) == [0, 6]
    with pytest.raises(ValueError, match="layers 0 to 6"):
        choose_layers([7], 6, 384)


def test_queries_are_the_pooled_hidden_states(minilm):
    texts = ["A short text.", "Another text, which is a little longer than the first one."]
    query = Encoder(minilm)(texts)
    model, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
    for row, text in enumerate(texts):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        expected = torch.cat([torch.nn.functional.normalize(s.mean(1), dim=-1)[0] for s in states])
        torch.testing.assert_close(query[row], expected, rtol=1e-4, atol=1e-5)
    last = Encoder(minilm, query_layers=[-1])(texts[:1])
    torch.testing.assert_close(last, model(**tokenizer(texts[0], return_tensors="pt"))[0].mean(1).detach())


def test_every_text_is_encoded_once(minilm):
    encoder = Encoder(minilm)
    seen = []
    original = encoder.encode
    encoder.encode = lambda texts: seen.extend(texts) or original(texts)
    first = encoder(["a cat", "a dog", "a cat"])
    again = encoder(["a dog", "a bird"])
    assert sorted(seen) == ["a bird", "a cat", "a dog"]
    assert torch.equal(first[0], first[2]) and torch.equal(first[1], again[0])


def test_truncation_warns_and_counts(minilm, caplog):
    encoder = Encoder(minilm, max_length=16)
    with caplog.at_level(logging.WARNING, logger="slm_fast.encoder"):
        long = "word " * 50
        query = encoder([long, "short", " ".join(["word"] * 14)])
    assert encoder.num_truncated == 1
    assert "encoder_max_length=16" in caplog.text
    torch.testing.assert_close(query[0], Encoder(minilm, max_length=16)([long])[0], rtol=1e-4, atol=1e-5)


def test_sentence_transformers_object(minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(minilm, device="cpu")
    texts = ["What is a list?", "Soup of the day"]
    ours = Encoder(model, query_layers=[-1])(texts)
    theirs = torch.from_numpy(model.encode(texts))
    torch.testing.assert_close(torch.nn.functional.normalize(ours, dim=-1), theirs, rtol=1e-4, atol=1e-5)


def test_callable_encoder():
    encoder = Encoder(lambda texts: [[float(len(t)), 1.0] for t in texts])
    assert encoder(["abc", "de"]).tolist() == [[3.0, 1.0], [2.0, 1.0]]
    with pytest.raises(ValueError, match="callable"):
        Encoder(lambda texts: texts, query_layers=[0, 1])
    with pytest.raises(ValueError, match=r"wanted \[B, D\]"):
        Encoder(lambda texts: [1.0])(["a"])


def test_bad_input():
    encoder = Encoder(lambda texts: [[float("nan")] for _ in texts])
    with pytest.raises(ValueError, match="NaN or infinite for text 'abc'"):
        encoder(["abc"])
    bad = {
        "at least one row": [],
        r"texts\[1\] is empty": ["a", "  "],
        "one string": "abc",
        "must be a str": [3],
    }
    for message, texts in bad.items():
        with pytest.raises(ValueError, match=message):
            encoder(texts)
    with pytest.raises(ValueError, match="pass embeddings"):
        Encoder()(["abc"])
    with pytest.raises(ValueError, match="got int"):
        Encoder(3)


def counted(encoder):
    """The encoder, and the texts that it encodes from now on."""
    seen, encode = [], encoder.encode

    def counting(texts):
        seen.extend(texts)
        return encode(texts)

    encoder.encode = counting
    return encoder, seen


def test_a_text_is_encoded_once_by_all_processes(minilm, tmp_path):
    texts = [f"text number {n}" for n in range(700)]
    first, seen = counted(Encoder(minilm, query_layers=[-1], max_length=16).keep_in(tmp_path / "kept"))
    want = first(texts[:650])
    assert len(seen) == 650
    second, seen = counted(Encoder(minilm, query_layers=[-1], max_length=16).keep_in(tmp_path / "kept"))
    got = second(texts)
    assert sorted(seen) == sorted(texts[650:])
    assert torch.equal(got[:650], want) and got.dtype == torch.float32
    second(texts)
    assert len(seen) == 50  # from memory
    for options in (dict(query_layers=[-1], max_length=8), dict(query_layers=[0], max_length=16)):
        other, seen = counted(Encoder(minilm, **options).keep_in(tmp_path / "kept"))
        other(texts[:3])
        assert len(seen) == 3
    changed = Encoder(minilm, query_layers=[-1], max_length=16)
    with torch.no_grad():
        next(changed.model.parameters()).mul_(1.01)
    changed, seen = counted(changed.keep_in(tmp_path / "kept"))
    changed(texts[:3])
    assert len(seen) == 3


def test_one_pass_makes_queries_of_other_layers_too(minilm, tmp_path, monkeypatch):
    texts = [f"text number {n}" for n in range(40)]
    want = Encoder(minilm, query_layers=[-1], max_length=16)(texts)
    encoder = Encoder(minilm, max_length=16).keep_in(tmp_path)
    last = encoder.with_layers([-1])
    assert encoder.with_layers([-1]) is last and last.model is encoder.model
    assert last.settings() == encoder.settings() | {"query_layers": [-1]}
    passes, tokenized = [], Encoder._tokenized
    monkeypatch.setattr(
        Encoder, "_tokenized", lambda self, part: passes.extend(part) or tokenized(self, part)
    )
    ours = encoder(texts)
    assert torch.equal(last(texts), want) and sorted(passes) == sorted(texts)
    for again in (Encoder(minilm, max_length=16), Encoder(minilm, max_length=16).with_layers([-1])):
        assert torch.equal(again.keep_in(tmp_path)(texts), want if again.layers == [6] else ours)
    assert len(passes) == len(texts)
    last(["another"])  # by itself: the first one is not asked
    encoder(["another"])
    assert passes[len(texts) :] == ["another"] * 2


def test_queries_that_cannot_be_kept(minilm, tmp_path):
    with pytest.raises(ValueError, match="only an encoder with a name"):
        Encoder(lambda texts: torch.ones(len(texts), 4)).keep_in(tmp_path)
    (tmp_path / "queries.sqlite3").write_bytes(b"not a data base" * 100)
    with pytest.raises(OSError, match="queries.sqlite3 cannot be used"):
        Encoder(minilm).keep_in(tmp_path)
