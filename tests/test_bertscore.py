import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from slm_fast.continual.benchmarks import score_names
from slm_fast.continual.bertscore import bert_scores
from slm_fast.continual.tasks import Example, Task, score

PAIRS = [
    ("the cat sat on the mat", "a cat was sitting on a rug"),
    ("the cat sat on the mat", "interest rates rose again"),
    ("take two tablets a day", "Take two tablets a day."),
]


def by_hand(minilm, prediction, target):
    model, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)

    def embed(text):
        with torch.no_grad():
            state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]
        return F.normalize(state, dim=-1)

    cosine = embed(prediction) @ embed(target).T
    p, r = cosine.max(1).values.mean(), cosine.max(0).values.mean()
    return float(2 * p * r / (p + r))


def test_bertscore_by_hand(minilm):
    predictions, targets = zip(*PAIRS, strict=True)
    got = bert_scores(predictions, targets)
    assert got == pytest.approx([by_hand(minilm, *pair) for pair in PAIRS], abs=1e-4)
    assert got[2] > 0.9 > got[0] > got[1] + 0.1
    assert bert_scores(["same words"], ["same words"]) == pytest.approx([1.0], abs=1e-5)


def test_empty_answers(minilm):
    assert bert_scores(["", "a word", ""], ["a word", "", ""]) == [0.0, 0.0, 1.0]


def test_as_the_metric_of_a_task(minilm):
    task = Task("t", [], [Example("q", target) for _, target in PAIRS], metric="bertscore")
    predictions, targets = (list(column) for column in zip(*PAIRS, strict=True))
    assert score(task, predictions, targets) == pytest.approx(sum(bert_scores(predictions, targets)) / 3)
    names = score_names(
        [task, Task("f1", [], [], metric="token_f1")], {"t": "token F1 (x)", "f1": "token F1 (x)"}
    )
    assert names["t"].startswith("BERTScore") and names["f1"] == "token F1 (x)"
