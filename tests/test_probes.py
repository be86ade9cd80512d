import pytest
import torch
from conftest import clustered_embeddings, tiny_model, word_tokenizer

from slm_fast.continual.probes import probe
from slm_fast.continual.tasks import Example, Task, as_text
from slm_fast.encoder import make_encoder

WORDS = ["[PAD]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(93))]
FLOOR = 0.5  # cosine: the learnt tasks' own texts are above it, those of FAR are below


def embed(texts):
    """Texts that begin with w0, w1 or w2 lie around the learnt tasks' centres, others opposite to them."""
    rows = []
    for text in texts:
        task = int(text.split()[0][1:])
        centres = torch.stack([clustered_embeddings(t).mean(0) for t in range(3)])
        rows.append(centres[task] + 0.01 * len(text) if task < 3 else -centres.sum(0))
    return torch.stack(rows)


def make_model(family, **config):
    model = tiny_model(family, metric="grouped_cosine", num_groups=4, **config)
    model.tokenizer = word_tokenizer(WORDS)
    model.encoder = make_encoder(model.slm_config, embed)
    return model


def make_task(name, first):
    """Rows whose first word decides the routing and the next ones the label."""
    words = ["w20 w21 w20", "w27 w28 w27"]
    rows = [Example(f"w{first} {words[n % 2]} w{30 + n}", "ab"[n % 2]) for n in range(20)]
    return Task(name, rows[:10], rows[10:], ["a", "b"])


NEAR, FAR = make_task("near", 1), make_task("far", 9)


def frozen_answers(model, task):
    texts = [row.text for row in task.test]
    routing = model.pool.fixed_routing(["__base__"] * len(texts))
    return [p.answer for p in model.predict(texts, routing=routing, max_new_tokens=4)]


def test_answers_of_a_base_that_generates():
    model = make_model("llama", min_similarity=FLOOR)
    tasks = [as_text(task) for task in (NEAR, FAR)]
    for task in tasks:  # the frozen model's own answers are the truth: its score is 1
        task.test = [Example(r.text, a) for r, a in zip(task.test, frozen_answers(model, task), strict=True)]
    report = probe(model, tasks, max_new_tokens=4)
    assert report["unchanged"] == "same answers" and report["min_similarity"] == FLOOR
    near, far = report["tasks"]["near"], report["tasks"]["far"]
    assert far == {
        "rows": 10, "metric": "accuracy", "frozen_rows": 1.0, "equal_rows": 1.0,
        "score_before": 1.0, "score_after": 1.0,
    }  # fmt: skip
    assert near["frozen_rows"] == 0.0 and near["score_before"] == 1.0
    assert near["equal_rows"] == near["score_after"] < 1.0

    routed = probe(make_model("llama"), tasks, max_new_tokens=4)["tasks"]["far"]  # no floor
    assert routed["frozen_rows"] == 0.0 and routed["score_before"] == 1.0


def test_features_of_an_encoder():
    model = make_model("bert", min_similarity=FLOOR)
    model.train()
    report = probe(model, [NEAR, FAR], batch_size=4)
    assert report["unchanged"] == "bit-equal features" and model.training
    near, far = report["tasks"]["near"], report["tasks"]["far"]
    assert far["frozen_rows"] == far["equal_rows"] == 1.0 and far["score_before"] == far["score_after"]
    assert near["frozen_rows"] == near["equal_rows"] == 0.0
    assert far["score_before"] == 1.0  # two labels of different words are told apart by frozen features
    assert probe(model, [FAR], batch_size=3)["tasks"]["far"]["score_before"] == 1.0

    without_floor = probe(make_model("bert"), [FAR])["tasks"]["far"]
    assert without_floor["frozen_rows"] == without_floor["equal_rows"] == 0.0


def test_one_row_of_a_batch_routed_elsewhere_leaves_the_others_bit_equal():
    model = make_model("bert", min_similarity=FLOOR)
    mixed = Task("mixed", FAR.train, FAR.test[:7] + NEAR.test[:3], FAR.labels)
    result = probe(model, [mixed], batch_size=10)["tasks"]["mixed"]
    assert result["frozen_rows"] == result["equal_rows"] == pytest.approx(0.7)


def test_an_empty_pool_is_the_frozen_model():
    for family in ("bert", "llama"):
        model = make_model(family, num_tasks=0)
        task = FAR if family == "bert" else as_text(FAR)
        result = probe(model, [task], max_new_tokens=2)["tasks"]["far"]
        assert result["frozen_rows"] == result["equal_rows"] == 1.0


def test_what_cannot_be_a_probe():
    model = make_model("bert")
    with pytest.raises(ValueError, match="must not be learnt, but 'task1' is among task0, task1, task2"):
        probe(model, [make_task("task1", 9)])
    with pytest.raises(ValueError, match="probe 'far' needs labels: the base model generates no text"):
        probe(model, [as_text(FAR)])
