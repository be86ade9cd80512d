import dataclasses
import json
import math

import pytest
import torch
from conftest import clustered_embeddings, tiny_model
from transformers import AutoModel, AutoTokenizer, TrainingArguments

from slm_fast import Routing, SLMConfig, get_slm_model
from slm_fast.continual.tasks import Example
from slm_fast.linear_probe import linear_probe
from slm_fast.trainer import (
    TASK_WEIGHTS,
    Collator,
    LengthGroupedSampler,
    SLMTrainer,
    default_arguments,
    encode_dataset,
)

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
    original = model.encoder.encode
    model.encoder.encode = lambda texts: seen.extend(texts) or original(texts)
    learn(model, "size", tmp_path, num_train_epochs=3, max_steps=-1)
    assert sorted(seen) == sorted(e.text for e in TOPICS["size"])


@pytest.mark.parametrize("penalty", [0.0, 0.5], ids=["plain", "feature_penalty"])
def test_resumes_with_the_same_bits(model, tmp_path, minilm, penalty):
    model.slm_config.feature_penalty = penalty
    options = dict(max_steps=6, save_strategy="steps", save_steps=3)
    learn(model, "colour", tmp_path / "a", **options)
    whole = snapshot(model, "colour")
    folder = tmp_path / "a" / "checkpoint-3"
    names = {p.name for p in folder.iterdir()}
    assert TASK_WEIGHTS in names and "slm_config.json" in names
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    assert json.loads((folder / "slm_config.json").read_text())["tasks"][0]["name"] == "colour"
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


@pytest.mark.parametrize("penalty", [0.0, 0.5], ids=["plain", "feature_penalty"])
def test_checkpointing_and_accumulation_give_the_same_result(model, tmp_path, minilm, penalty):
    def result(penalty, **options):
        base, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        config = dataclasses.replace(model.slm_config, feature_penalty=penalty)
        fresh = get_slm_model(base, config, tokenizer=tokenizer)
        learn(fresh, "size", tmp_path, max_steps=1, learning_rate=1e-12)  # the head is there then
        generator = torch.Generator().manual_seed(0)
        for factors in fresh.pool.factors:  # so that features differ from the frozen model's at once
            factors.B.copy_(0.1 * torch.randn(factors.B.shape, generator=generator))
        learn(
            fresh, "size", tmp_path, max_steps=3, optim="sgd", learning_rate=0.5, weight_decay=0.0, **options
        )
        return snapshot(fresh, "size")

    def same(a, b):
        return all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in zip(a, b, strict=True))

    want = result(penalty)
    assert same(want, result(penalty, gradient_checkpointing=True))
    assert same(want, result(penalty, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    assert penalty == 0.0 or not same(want, result(0.6 * penalty))


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
    of_batch = [max(lengths[i] for i in first[lo : lo + 8]) for lo in range(0, 640, 8)]
    assert of_batch[0] == max(lengths)
    early, late = sum(of_batch[1:21]), sum(of_batch[-20:])
    assert abs(early - late) < 0.2 * late  # not from long to short


def test_a_data_seed_of_0_is_one(model, tmp_path):
    rows = TOPICS["colour"]
    model.add_task("colour", [r.text for r in rows], labels=COLOURS, progress=False)
    for data_seed, seed in ((None, 3), (0, 0), (5, 5)):
        args = default_arguments(str(tmp_path), use_cpu=True, seed=3, data_seed=data_seed)
        trainer = SLMTrainer(model, args, rows, task="colour", max_length=32)
        assert trainer._get_train_sampler().seed == seed


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_every_row_is_in_one_batch(count):
    assert sorted(LengthGroupedSampler([5] * count, 8, seed=0)) == list(range(count))


@pytest.mark.parametrize("rows, penalty", [(60, 1), (640, 10)])
def test_a_probe_is_the_minimum_of_its_objective(rows, penalty):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 3
    features = 3 + torch.randn(rows, 8, generator=generator) + torch.eye(4, 8)[labels]
    weight, bias = linear_probe(features, labels, 4)
    assert weight.shape == (4, 8) and weight.dtype == bias.dtype == torch.float32
    W, b = weight.double().requires_grad_(), bias.double().requires_grad_()
    size = (features - features.mean(0)).double().square().sum(1).mean()
    logits = features.double() @ W.T + b
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss = loss + penalty * size / 2 * W.square().sum()
    grads = torch.autograd.grad(loss, (W, b))
    assert max(float(g.abs().max()) for g in grads) < 1e-2 * float(size)
    assert logits.detach().argmax(1).eq(labels).float().mean() > 0.6
    assert bias[3] < bias[:3].min()  # no row has that label

    scaled, _ = linear_probe(1000 * features, labels, 4)
    torch.testing.assert_close(1000 * scaled, weight, rtol=1e-3, atol=1e-5)


def probed(model, name):
    """The probe of a task's head on all its rows, and the head."""
    rows = TOPICS[name]
    features = features_of(model, rows, "__base__")
    head = model.pool.head(name)
    labels = torch.tensor([model.pool.task(name).labels.index(r.target) for r in rows])
    return linear_probe(features, labels, head.out_features), (head.weight, head.bias)


def test_a_head_starts_at_a_probe(model, tmp_path):
    learn(model, "size", tmp_path, learning_rate=1e-12, weight_decay=0.0)
    wanted, got = probed(model, "size")
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    trained = 2 * got[0].detach()
    got[0].data.copy_(trained)
    learn(model, "size", tmp_path, learning_rate=1e-12, weight_decay=0.0)  # one that is there stays
    torch.testing.assert_close(model.pool.head("size").weight, trained, rtol=0, atol=1e-6)


def test_a_head_may_start_at_zero(model, tmp_path):
    model.slm_config.head_init = "zero"
    learn(model, "size", tmp_path, learning_rate=1e-12, weight_decay=0.0)
    assert model.pool.head("size").weight.abs().max() < 1e-6


def features_of(model, rows, routed_to):
    encoded = model.require_tokenizer()([r.text for r in rows], padding=True, return_tensors="pt")
    model.eval()
    with torch.no_grad(), model.state.use(model.pool.fixed_routing([routed_to] * len(rows)), None):
        return model.features(**encoded)


def test_a_feature_penalty_keeps_features_near_the_frozen_models(model, minilm, tmp_path):
    moved, rows = {}, TOPICS["colour"]
    for penalty in (0.0, 1.0, 10.0):
        base, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
        config = dataclasses.replace(model.slm_config, feature_penalty=penalty)
        fresh = get_slm_model(base, config, tokenizer=tokenizer)
        learn(fresh, "colour", tmp_path, max_steps=30)
        change = features_of(fresh, rows, "colour") - features_of(fresh, rows, "__base__")
        moved[penalty] = float(change.square().sum(1).mean())
    assert 0 < moved[10.0] < moved[1.0] / 1.5 < moved[0.0] / 2


@pytest.mark.parametrize("items", [None, 7])
def test_the_loss_with_a_feature_penalty_is_its_formula(model, tmp_path, items):
    learn(model, "size", tmp_path)
    rows, routing = TOPICS["size"], model.pool.fixed_routing(["size"] * len(TOPICS["size"]))
    frozen, features = (features_of(model, rows, name) for name in ("__base__", "size"))
    labels = torch.tensor([model.pool.task("size").labels.index(r.target) for r in rows])
    encoded = model.require_tokenizer()([r.text for r in rows], padding=True, return_tensors="pt")
    options = dict(task="size", routing=routing, labels=labels, num_items_in_batch=items)
    got = model(**encoded, **options, frozen_features=frozen, feature_weight=0.3).loss
    losses = torch.nn.functional.cross_entropy(model.pool.head("size")(features), labels, reduction="none")
    wanted = (losses + 0.3 * (features - frozen).square().sum(1)).sum() / (items or len(rows))
    torch.testing.assert_close(got, wanted)
    assert not torch.isclose(got, model(**encoded, **options).loss)
    with pytest.raises(ValueError, match="a task that has a head"):
        model(**encoded, routing=routing, frozen_features=frozen, feature_weight=0.3)
    with pytest.raises(ValueError, match="go together"):
        model(**encoded, **options, frozen_features=frozen)
    with pytest.raises(ValueError, match="frozen_features must be"):
        model(**encoded, **options, frozen_features=frozen[:1], feature_weight=0.3)


def test_a_feature_penalty_is_in_the_first_steps_loss(model, tmp_path):
    """Its scale is the frozen features' variance over the training rows; dropout alone moves them here."""
    rows, losses = TOPICS["size"], {}
    for penalty in (0.0, 2.0):
        model.slm_config.feature_penalty = penalty
        learn(model, "size", tmp_path, max_steps=1, learning_rate=1e-12)
        trainer = learn(model, "size", tmp_path, max_steps=1, learning_rate=1e-12)
        losses[penalty] = trainer.state.log_history[0]["loss"]
    frozen = features_of(model, rows, "__base__")
    variance = float((frozen - frozen.mean(0)).square().sum(1).mean())
    assert trainer._feature_weight == pytest.approx(2.0 / variance, rel=1e-4)
    assert losses[2.0] > losses[0.0] + 0.01


def test_what_a_feature_penalty_cannot_go_with(model, tmp_path):
    model.slm_config.feature_penalty = 1.0
    with pytest.raises(ValueError, match="no other one can be taken"):
        learn(model, "size", tmp_path, label_smoothing_factor=0.1)
    rows = TOPICS["size"]
    plain = Collator(model.require_tokenizer(), True)

    def collator(rows):
        return {name: value for name, value in plain(rows).items() if name != "frozen_features"}

    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="data collator must keep"):
        SLMTrainer(model, args, rows, task="size", max_length=32, data_collator=collator).train()
    for wrong in (-1.0, "0.1", float("nan"), True):
        with pytest.raises(ValueError, match="feature_penalty must be a number from 0"):
            SLMConfig(feature_penalty=wrong)


def test_rows_that_are_all_the_same_have_no_feature_penalty(model, tmp_path):
    model.slm_config.feature_penalty = 0.1
    model.add_task("same", ["a text", "another"], labels=["x", "y"], progress=False)
    rows = encode_dataset([Example("a text", "x")] * 4, model, model.require_tokenizer(), "same", 32, True)
    trainer = SLMTrainer(model, arguments(tmp_path, max_steps=2), rows, task="same", max_length=32)
    trainer.train()
    assert trainer._feature_weight == 0 and not any("frozen_features" in row for row in rows)
    assert all(torch.isfinite(p).all() for p in model.pool.head("same").parameters())


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


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_logits_are_computed_where_a_row_has_a_label(family, side, tmp_path, minilm):
    model = tiny_model(family, num_tasks=1)
    model.tokenizer = AutoTokenizer.from_pretrained(minilm, padding_side=side)
    query = clustered_embeddings(4, 8)
    model.add_task("copy", embeddings=query, progress=False)
    model.encoder.function = lambda texts: torch.stack([query[int(t)] for t in texts])
    ids = torch.randint(1, 96, (8, 12), generator=torch.Generator().manual_seed(1)).tolist()
    # answers of two tokens, behind prompts of 3 to 10
    ids = [row[: 5 + n] for n, row in enumerate(ids)]
    prompts = [row[:-2] for row in ids]
    rows = [
        dict(input_ids=row, labels=[-100] * len(prompt) + row[-2:], text=str(n))
        for n, (row, prompt) in enumerate(zip(ids, prompts, strict=True))
    ]
    trainer = SLMTrainer(model, arguments(tmp_path), rows, task="copy")
    batch = trainer.data_collator([trainer.train_dataset[n] for n in (0, 3)])
    widths, results = [], []
    model.base_model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: widths.append(output.shape[1])
    )
    with trainer.learning():
        parameters = [p for p in model.parameters() if p.requires_grad]
        for kwargs in ({}, {"num_items_in_batch": torch.tensor(7)}):
            few = trainer.compute_loss(model, dict(batch), **kwargs)
            every, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True, **kwargs)
            assert outputs.logits.shape[1] == batch["labels"].shape[1]
            torch.testing.assert_close(few, every)
            results += [torch.autograd.grad(loss, parameters) for loss in (few, every)]
    for few, every in zip(results[0::2], results[1::2], strict=True):
        for a, b in zip(few, every, strict=True):
            torch.testing.assert_close(a, b)
    columns = {"right": 4, "left": 2}[side]  # two of each row, which meet where they are padded on the left
    assert widths == [columns if family == "llama" else 8, 8] * 2
