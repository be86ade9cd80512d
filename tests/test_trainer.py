import math

import pytest
import torch
from conftest import clustered_embeddings, tiny_model
from transformers import AutoModel, AutoTokenizer, TrainingArguments

from slm_fast import Routing, SLMConfig, get_slm_model
from slm_fast.continual.tasks import Example
from slm_fast.trainer import TASK_WEIGHTS, Collator, LengthGroupedSampler, SLMTrainer

COLOURS = ["red", "blue", "green"]
TOPICS = {
    "colour": [
        Example(f"the {noun} is {c}", c) for c in COLOURS for noun in ("car", "house", "sky", "hat", "cup")
    ],
    "size": [
        Example(f"it was a very {s} {noun}", s)
        for s in ("big", "small")
        for noun in ("dog", "tree", "shop", "train")
    ],
}


def arguments(folder, **options):
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=5e-3,
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    return TrainingArguments(**(settings | options))


@pytest.fixture
def model(minilm):
    base, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
    config = SLMConfig(target_modules="all-linear", r=4, entries_per_task=2, encoder_name_or_path=minilm)
    return get_slm_model(base, config, tokenizer=tokenizer)


def learn(model, name, folder, **options):
    rows = TOPICS[name]
    if name not in model.pool.tasks:
        labels = list(dict.fromkeys(r.target for r in rows))
        model.add_task(name, [r.text for r in rows], labels=labels, progress=False)
    trainer = SLMTrainer(model, arguments(folder, **options), rows, task=name, max_length=32)
    trainer.train()
    return trainer


def snapshot(model, name):
    pool = model.pool
    rows = pool.rows_of(pool.task(name).slots)
    tensors = [t[rows].clone() for f in pool.factors for t in (f.A, f.B)]
    return (
        tensors
        + [pool.keys[pool.task(name).slots].clone()]
        + [p.clone() for p in pool.head(name).parameters()]
    )


def test_learns_and_earlier_entries_stay_bit_identical(model, tmp_path):
    base = {k: v.clone() for k, v in model.base_model.state_dict().items()}
    trainer = learn(model, "colour", tmp_path, max_steps=30)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] / 2
    colour = snapshot(model, "colour")
    learn(model, "size", tmp_path, weight_decay=0.5, max_steps=30)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(model, "colour"), colour, strict=True))
    assert any(bool((t != 0).any()) for t in snapshot(model, "size")[1:2])
    assert all(torch.equal(base[k], v) for k, v in model.base_model.state_dict().items())
    predictions = model.predict([e.text for rows in TOPICS.values() for e in rows])
    right = [p.answer == e.target for p, e in zip(predictions, sum(TOPICS.values(), []), strict=True)]
    assert sum(right) / len(right) > 0.9
    assert predictions[0].task == "colour" and predictions[-1].task == "size"


def test_optimizer_holds_only_the_task(model, tmp_path):
    learn(model, "colour", tmp_path, max_steps=1)
    trainer = learn(model, "size", tmp_path, max_steps=1)
    held = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    pool = model.pool
    per_task = sum(2 * 4 * (i + o) for i, o in pool.modules_shape.values())
    head = sum(p.numel() for p in pool.head("size").parameters())
    assert held == per_task + head
    assert not any(p.requires_grad for p in model.parameters())


def test_encoder_runs_once_per_text(model, tmp_path):
    seen = []
    original = model.encoder._encode
    model.encoder._encode = lambda texts: seen.extend(texts) or original(texts)
    learn(model, "size", tmp_path, num_train_epochs=3, max_steps=-1)
    assert sorted(seen) == sorted(e.text for e in TOPICS["size"])


def test_resumes_with_the_same_bits(model, tmp_path, minilm):
    options = dict(max_steps=6, save_strategy="steps", save_steps=3)
    learn(model, "colour", tmp_path / "a", **options)
    whole = snapshot(model, "colour")
    folder = tmp_path / "a" / "checkpoint-3"
    names = {p.name for p in folder.iterdir()}
    assert TASK_WEIGHTS in names and "slm_config.json" in names
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    base, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
    again = get_slm_model(base, model.slm_config, tokenizer=tokenizer)
    rows = TOPICS["colour"]
    again.add_task("colour", [r.text for r in rows], labels=COLOURS, progress=False)
    trainer = SLMTrainer(again, arguments(tmp_path / "b", **options), rows, task="colour", max_length=32)
    trainer.train(resume_from_checkpoint=str(folder))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(again, "colour"), whole, strict=True))
    again.add_task("other", [r.text for r in rows], labels=COLOURS, progress=False)
    with pytest.raises(OSError, match="not a checkpoint of task 'other'"):
        SLMTrainer(again, arguments(tmp_path / "c"), rows, task="other").train(
            resume_from_checkpoint=str(folder)
        )
    (folder / TASK_WEIGHTS).write_bytes(b"broken")
    with pytest.raises(OSError, match=TASK_WEIGHTS):
        trainer.train(resume_from_checkpoint=str(folder))
    assert not any(p.requires_grad for p in again.parameters())


def test_best_checkpoint_is_loaded(model, tmp_path):
    rows = TOPICS["colour"]
    model.add_task("colour", [r.text for r in rows], labels=COLOURS, progress=False)
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
                     load_best_model_at_end=True, metric_for_best_model="loss")  # fmt: skip
    trainer = SLMTrainer(model, args, rows, rows[:6], task="colour", max_length=32)
    trainer.train()
    assert math.isfinite(trainer.state.best_metric)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_checkpointing_and_accumulation_give_the_same_result(model, tmp_path, minilm):
    results = []
    for options in (
        dict(),
        dict(gradient_checkpointing=True),
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    ):
        base, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
        base.config.hidden_dropout_prob = 0.0
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        fresh = get_slm_model(base, model.slm_config, tokenizer=tokenizer)
        learn(
            fresh, "size", tmp_path, max_steps=3, optim="sgd", learning_rate=0.5, weight_decay=0.0, **options
        )
        results.append(snapshot(fresh, "size"))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_columns_and_labels_are_checked(model, tmp_path):
    rows = TOPICS["colour"]
    model.add_task("colour", [r.text for r in rows], labels=COLOURS, progress=False)
    good = dict(text="the car is red", label="red")
    for dataset, message in [
        ([good, dict(text="x", label="pink")], "row 1: 'pink' is not a label"),
        ([dict(sentence="x", label="red")], "row 0 has the columns sentence, label"),
        ([dict(input_ids=[1, 2], labels=0)], "lacks text"),
        ([], "dataset is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            SLMTrainer(model, arguments(tmp_path), dataset, task="colour")
    with pytest.raises(ValueError, match="unknown task 'shape'"):
        SLMTrainer(model, arguments(tmp_path), [good], task="shape")
    trainer = SLMTrainer(model, arguments(tmp_path), [good, good | {"label": 1}], task="colour")
    assert [row["labels"] for row in trainer.train_dataset] == [0, 1]


def test_evaluates_raw_rows_and_several_sets(model, tmp_path):
    rows = TOPICS["colour"]
    model.add_task("colour", [r.text for r in rows], labels=COLOURS, progress=False)
    trainer = SLMTrainer(model, arguments(tmp_path), rows, {"a": rows[:4], "b": rows[4:]}, task="colour")
    both = trainer.evaluate()
    assert both["eval_a_loss"] == pytest.approx(trainer.evaluate(rows[:4])["eval_loss"], rel=1e-5)
    assert math.isfinite(both["eval_b_loss"])


def test_tokenised_rows_keep_their_attention_mask(model, tmp_path):
    rows = TOPICS["colour"]
    model.add_task("colour", [r.text for r in rows], labels=COLOURS, progress=False)
    ids = model.require_tokenizer()(rows[0].text, padding="max_length", max_length=20)
    padded = dict(ids) | {"labels": 0, "text": rows[0].text}
    trainer = SLMTrainer(model, arguments(tmp_path), [padded], task="colour")
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["attention_mask"].tolist() == [ids["attention_mask"]]


def test_batches_of_an_epoch_depend_on_the_seed_and_the_epoch_alone():
    lengths = torch.randint(4, 60, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGroupedSampler(lengths, 8, seed=3)
    first = list(sampler)
    torch.rand(5)
    assert list(sampler) == first and sorted(first) == list(range(640))
    sampler.set_epoch(1)
    assert list(sampler) != first

    def padding(order):
        batches = [[lengths[i] for i in order[lo : lo + 8]] for lo in range(0, 640, 8)]
        return sum(8 * max(batch) - sum(batch) for batch in batches)

    assert padding(first) < 0.4 * padding(list(range(640)))


def test_labels_are_padded_on_the_side_of_the_inputs():
    class Tokenizer:
        model_input_names = ["input_ids"]
        padding_side = "left"

        def pad(self, rows, padding, return_tensors):
            width = max(len(r["input_ids"]) for r in rows)
            return {
                "input_ids": torch.tensor(
                    [[0] * (width - len(r["input_ids"])) + r["input_ids"] for r in rows]
                )
            }

    routing = dict(routing=Routing.make([[0]], [[1.0]]))
    rows = [
        dict(input_ids=[5, 6, 7], labels=[-100, 6, 7]) | routing,
        dict(input_ids=[8], labels=[8]) | routing,
    ]
    batch = Collator(Tokenizer(), has_head=False)(rows)
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, 8]]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]


def test_language_model_training_lowers_the_loss(tmp_path, minilm):
    model = tiny_model("llama", num_tasks=1)
    model.tokenizer = AutoTokenizer.from_pretrained(minilm)
    query = clustered_embeddings(4, 8)
    model.add_task("copy", embeddings=query, progress=False)
    ids = torch.randint(1, 96, (8, 6), generator=torch.Generator().manual_seed(1)).tolist()
    table = {str(n): query[n] for n in range(8)}
    model.encoder.function = lambda texts: torch.stack([table[t] for t in texts])
    rows = [dict(input_ids=row, labels=row, text=str(n)) for n, row in enumerate(ids)]
    trainer = SLMTrainer(model, arguments(tmp_path, max_steps=60, learning_rate=2e-2), rows, task="copy")
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] - 0.3
