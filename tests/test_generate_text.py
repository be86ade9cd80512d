"""Prompts in, completions out: rows are routed in a thread of their own while the prompts are tokenised."""

import threading

import pytest
import torch
from conftest import clustered_embeddings, tiny_model, word_tokenizer
from transformers import PreTrainedTokenizerFast

from slm_fast.encoder import make_encoder

WORDS = ["[PAD]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(93))]
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
TASK = {"w1 w2 w3": 0, "w4": 1, "w5 w6 w7 w8 w9": 2}


class WaitingEncoder:
    """Embeds a text near its task's centre, once `started` is set: only a second thread can do that."""

    def __init__(self):
        self.started, self.threads = threading.Event(), []

    def __call__(self, texts):
        self.threads.append(threading.current_thread())
        assert self.started.wait(20), "nothing was tokenised meanwhile"
        return torch.stack([clustered_embeddings(TASK[text])[0] for text in texts])


class SignallingTokenizer(PreTrainedTokenizerFast):
    def __call__(self, *args, **kwargs):
        if self.signal is not None:
            self.signal.set()
        return super().__call__(*args, **kwargs)

    signal = None


@pytest.fixture
def model():
    model = tiny_model("llama")
    model.tokenizer = word_tokenizer(WORDS, SignallingTokenizer)
    waiting = WaitingEncoder()
    model.encoder, model.waiting = make_encoder(model.slm_config, waiting), waiting
    model.tokenizer.signal = waiting.started
    model.base_model.generation_config.eos_token_id = None
    return model


def alone(model, prompt, **source):
    ids = torch.tensor([model.tokenizer(prompt + "\n")["input_ids"]])
    out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, **source)
    return model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_texts_are_routed_while_prompts_are_tokenised(model):
    got = model.generate_text(PROMPTS, max_new_tokens=4, do_sample=False)
    assert model.waiting.threads and threading.main_thread() not in model.waiting.threads
    rows = [clustered_embeddings(TASK[prompt])[:1] for prompt in PROMPTS]
    want = [alone(model, prompt, embeddings=row) for prompt, row in zip(PROMPTS, rows, strict=True)]
    assert got == want and all(want)
    others = model.generate_text(PROMPTS, texts=PROMPTS[::-1], max_new_tokens=4, do_sample=False)
    assert others == [alone(model, p, embeddings=r) for p, r in zip(PROMPTS, rows[::-1], strict=True)] != got


def test_other_sources_and_return_sequences(model):
    names = ["task0", "__base__", "task2"]
    got = model.generate_text(PROMPTS, adapter_names=names, max_new_tokens=4, do_sample=False)
    assert got == [alone(model, p, adapter_names=[n]) for p, n in zip(PROMPTS, names, strict=True)]
    assert not model.waiting.threads
    many = model.generate_text(
        PROMPTS, adapter_names=names, max_new_tokens=4, num_beams=3, num_return_sequences=2
    )
    assert len(many) == 6
    with pytest.raises(ValueError, match="got texts, adapter_names"):
        model.generate_text(PROMPTS, texts=PROMPTS, adapter_names=names, max_new_tokens=4)


def test_continuous_batching_of_texts(model):
    pytest.importorskip("slm_fast.continuous", exc_type=ImportError)
    results = model.generate_batch(texts=PROMPTS, max_new_tokens=4, do_sample=False)
    assert model.waiting.threads and threading.main_thread() not in model.waiting.threads
    for prompt, output in zip(PROMPTS, results.values(), strict=True):
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        row = clustered_embeddings(TASK[prompt])[:1]
        out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, embeddings=row)
        assert output.generated_tokens == out[0, ids.shape[1] :].tolist()


def test_errors_of_the_thread_reach_the_caller(model):
    model.waiting.started.set()
    ahead = model.route_ahead(["never heard of"])
    with pytest.raises(KeyError, match="never heard of"):
        model.generate(torch.ones(1, 3, dtype=torch.long), routing=ahead, max_new_tokens=2)
    with pytest.raises(ValueError, match="routing has 3 rows, the batch has 1"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), routing=model.route_ahead(PROMPTS))
