"""Training that other runs take over: the same bits whatever the order, and only where nothing differs."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_runner import kept, make_tasks, new_runner

from slm_fast.continual.tasks import Example
from slm_fast.continual.trained import TrainedTasks
from slm_fast.prompts import Prompt
from slm_fast.task_statistics import TaskStatistics
from slm_fast.trainer import SLMTrainer

NAMES = ("colour", "size", "mood")
METHODS = ("slm", "oracle", "paper", "per_task", "joint")


def run(folder, order=NAMES, methods=METHODS, **options):
    settings = dict(encoder="backbone", evaluate="last", trained=folder.parent / "trained", epochs=1)
    return new_runner(folder, methods, make_tasks(*order), **(settings | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def first(folder):
    return run(folder / "first").fit()


def same_entries(ours, theirs, method):
    """Whether two runs' entries on disk are the same bits."""
    mine, other = ({k: v for k, v in kept(r, method).items() if "adapters" in k} for r in (ours, theirs))
    return bool(mine) and mine == other


@pytest.fixture
def untrained(monkeypatch):
    """Any training is an error."""

    def fail(*args, **kwargs):
        raise AssertionError("trained")

    monkeypatch.setattr(SLMTrainer, "train", fail)


def test_another_order_trains_nothing(folder, first, untrained):
    second = run(folder / "second", NAMES[::-1]).fit()
    for name in ("slm", "paper", "per_task", "joint"):
        assert same_entries(second, first, name)
    ours, theirs = second.report("second")["methods"], first.report("first")["methods"]
    for name in METHODS:
        assert ours[name]["matrix"][-1] == theirs[name]["matrix"][-1][::-1]
        assert ours[name]["steps"] == theirs[name]["steps"]
        if name != "oracle":
            assert ours[name]["seconds_train"] == pytest.approx(theirs[name]["seconds_train"])
    assert ours["slm"]["matrix"][1] == [None, ours["slm"]["matrix"][1][1], None]


@pytest.mark.parametrize("method", ["slm", "paper", "per_task", "joint"])
def test_training_by_itself_in_another_order_gives_the_same_bits(folder, first, method):
    other = run(
        folder / f"own-{method}", NAMES[::-1], tuple(dict.fromkeys(("slm", method))), trained=None
    ).fit()
    assert same_entries(other, first, method)


def test_what_training_depends_on_is_not_taken_over(folder, first):
    trained = TrainedTasks(folder / "trained")
    same = run(folder / "other", methods=("slm",))
    method = same.methods["slm"]
    assert trained.take(method, 0) is not None and method.has_learnt(0)
    for options in (dict(seed=1), dict(max_length=8), dict(epochs=2), dict(family="llama")):
        other = run(folder / "none", methods=("slm",), **options)
        assert trained.take(other.methods["slm"], 0) is None, options
    other = run(folder / "none", methods=("slm",))
    other.tasks[0].train.pop()
    assert trained.take(other.methods["slm"], 0) is None
    other = run(folder / "none", methods=("slm",))
    other.model.slm_config.init = "retrieved"
    assert trained.take(other.methods["slm"], 0) is None
    other = run(folder / "none", methods=("slm",))
    text, target = other.tasks[0].train[0].content()
    other.tasks[0].train[0] = Example(Prompt(text, "say"), target)
    in_parts = trained._place(other.methods["slm"], 0)
    other.tasks[0].train[0] = Example(f"say ### {text}", target)
    assert in_parts != trained._place(other.methods["slm"], 0)
    retrieval = run(folder / "none", methods=("slm",))
    retrieval.model.slm_config.min_similarity = 0.5
    assert trained.take(retrieval.methods["slm"], 0) is not None


def test_statistics_are_the_taking_runs_own(folder, first, untrained):
    few = run(folder / "few", methods=("slm",), config=dict(statistics_rank=2)).fit()
    assert same_entries(few, first, "slm")
    for task in few.tasks:
        statistics = few.model.pool.metric.tasks[f"task:{task.name}"]
        want = TaskStatistics.of(few.model.encoder([row.text for row in task.train]), 2)
        assert statistics.V.shape[0] == 2 and torch.equal(statistics.scatter(), want.scatter())
    for options, places in ((dict(top_k=2), 1), (dict(top_k=1), 2), (dict(key_method="kmeans"), 2)):
        found = set()
        for rank in (2, 3):
            config = dict(statistics_rank=rank, entries_per_task=2, **options)
            other = run(folder / "none", methods=("slm",), config=config)
            found.add(TrainedTasks(folder / "trained")._place(other.methods["slm"], 0))
        assert len(found) == places, options


def test_labels_are_the_taking_runs_own(folder):
    """A task that was kept without them, as before there were any, gets them from its texts."""
    options = dict(methods=("slm",), trained=folder / "labels" / "trained")
    before = run(folder / "labels" / "before", config=dict(label_keys=False), **options).fit().model.pool
    assert before.num_label_keys == 0
    after = run(folder / "labels" / "after", **options).fit().model.pool
    alone = run(folder / "labels" / "alone", **options | dict(trained=None)).fit().model.pool
    assert after.num_label_keys == alone.num_label_keys > 0
    assert torch.equal(after.index_keys, alone.index_keys)
    again = run(folder / "labels" / "again", config=dict(label_keys=False), **options).fit().model.pool
    assert again.num_label_keys == 0 and torch.equal(again.index_keys, before.index_keys)


def test_a_fitted_temperature_is_the_taking_runs_own(folder, monkeypatch):
    """Whatever was trained before, and in which order."""
    config = dict(temperature="auto")
    options = dict(methods=("slm",), config=config, trained=folder / "fitted" / "trained")
    run(folder / "fitted" / "first", **options).fit()
    alone = run(folder / "fitted" / "alone", NAMES[::-1], **options | dict(trained=None)).fit().model.pool
    monkeypatch.setattr(SLMTrainer, "train", None)
    taken = run(folder / "fitted" / "second", NAMES[::-1], **options).fit().model.pool
    assert taken.temperature() == alone.temperature()
    for name in NAMES:
        ours, theirs = (pool.metric.tasks[f"task:{name}"] for pool in (taken, alone))
        assert torch.equal(ours.losses, theirs.losses) and torch.equal(ours.against, theirs.against)
        assert bool(len(ours.losses)) == (name != NAMES[-1])


def test_a_task_that_trains_longer(folder, first):
    """Its own number of epochs counts in training, in what is taken over and in what a run is."""

    def own(name, value, methods=("slm", "joint")):
        runner = run(folder / name, NAMES[:2], methods)
        runner.tasks[1].training["num_train_epochs"] = value
        return runner

    longer = own("longer", 3)
    longer.fit()
    steps = {name: method["steps"] for name, method in longer.report("r")["methods"].items()}
    per_epoch = [math.ceil(len(task.train) / 4) for task in longer.tasks]
    assert steps == {"slm": per_epoch[0] + 3 * per_epoch[1], "joint": sum(per_epoch)}
    assert longer.args.num_train_epochs == 1
    ours, theirs = kept(longer, "slm"), kept(first, "slm")
    same = {name for name in ours if "adapters" in name and ours[name] == theirs[name]}
    assert {Path(name).parts[1].split(".")[0] for name in same} == {"colour"}
    with pytest.raises(ValueError, match="another run"):
        own("longer", 2, ("slm", "joint"))._load_state()


def test_the_sequential_methods_keep_nothing(folder):
    run(folder / "seq" / "run", NAMES[:2], ("seq",)).fit()
    assert not (folder / "seq" / "trained").exists()


def test_an_encoder_without_a_name_keeps_nothing(folder):
    from tiny_runner import embed

    run(folder / "nameless" / "run", NAMES[:2], ("slm",), encoder=embed).fit()
    assert not (folder / "nameless" / "trained").exists()


def test_damaged_training_is_an_error(folder):
    run(folder / "damaged" / "run", NAMES[:1], ("slm",)).fit()
    (place,) = (folder / "damaged" / "trained").iterdir()
    assert json.loads((place / "cost.json").read_text())["steps"] > 0
    weights = next(place.glob("adapters/*/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(OSError, match="truncated or corrupted"):
        run(folder / "damaged" / "again", NAMES[:1], ("slm",)).fit()


def test_pools_that_were_trained_apart_come_together(folder, first):
    apart = run(folder / "apart", NAMES[:1], ("slm",)).fit().model
    before = list(apart.pool.tasks)
    with pytest.raises(ValueError, match="unknown task 'nope'"):
        apart.take_tasks(first.output_dir / "slm", ["size", "nope"])
    assert list(apart.pool.tasks) == before
    assert [info.name for info in apart.take_tasks(first.output_dir / "slm", NAMES[1:])] == list(NAMES[1:])
    texts = [row.text for task in first.tasks for row in task.test]
    ours, theirs = apart.predict(texts), first.model.predict(texts)
    assert [p.answer for p in ours] == [p.answer for p in theirs]
    assert torch.equal(apart.pool.metric.cholesky(), first.model.pool.metric.cholesky())
    with pytest.raises(ValueError, match="already has a task 'colour'"):
        apart.take_tasks(first.output_dir / "slm")
