import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from slm_fast import SLMConfig, get_slm_model
from slm_fast.continual.metrics import merge_tasks, summarize
from slm_fast.continual.runner import ContinualRunner, write_reports
from slm_fast.continual.tasks import Example, Task
from slm_fast.trainer import SLMTrainer, default_arguments

NOUNS = ["car", "house", "sky", "hat", "cup", "dog", "tree", "shop"]


def make_tasks() -> list[Task]:
    def task(name, template, labels):
        rows = [Example(template.format(noun=n, label=label), label) for label in labels for n in NOUNS]
        return Task(name, rows[::2], rows[1::2], labels, source="made up")

    return [
        task("colour", "the {noun} is {label}", ["red", "blue"]),
        task("size", "what a {label} {noun} that was!", ["huge", "tiny"]),
        task("mood", "I feel {label} about my {noun} today", ["glad", "sad"]),
    ]


@pytest.fixture
def make_runner(minilm, tmp_path):
    def make(folder="run", tasks=None, **options):
        base, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
        config = SLMConfig(target_modules="all-linear", r=4, entries_per_task=2, encoder_name_or_path=minilm)
        model = get_slm_model(base, config, tokenizer=tokenizer)
        args = default_arguments(
            "unused",
            num_train_epochs=12,
            learning_rate=5e-3,
            save_steps=5,
            use_cpu=True,
            per_device_train_batch_size=4,
        )
        settings = dict(output_dir=tmp_path / folder, max_length=32, progress=False) | options
        return ContinualRunner(model, tasks or make_tasks(), args, **settings)

    return make


def test_metrics_by_hand():
    matrix = [[0.9, 0.2, None], [0.7, 0.8, 0.1], [0.8, 0.6, 0.5]]
    summary = summarize(matrix, before=[0.0, 0.1, 0.0])
    assert summary["average_accuracy"] == pytest.approx(1.9 / 3)
    assert summary["forgetting"] == pytest.approx(((0.9 - 0.8) + (0.8 - 0.6)) / 2)
    assert summary["forgetting_first"] == pytest.approx(0.15)
    assert summary["backward_transfer"] == pytest.approx(-0.15)
    assert summary["forward_transfer"] == pytest.approx(((0.2 - 0.1) + (0.1 - 0.0)) / 2)
    rising = summarize([[0.5, None], [0.7, 0.6]])
    assert rising["forgetting"] == pytest.approx(-0.2) and rising["forward_transfer"] is None
    assert summarize([[0.5]])["forgetting"] is None
    confusion = [[0.8, 0.2, 0.0], [0.1, 0.9, 0.0], [0.0, 0.3, 0.7]]
    merged = merge_tasks(confusion, ["a", "b", "c"], [{"a", "b"}])
    assert merged == pytest.approx({"a": 1.0, "b": 1.0, "c": 0.7})


def test_a_whole_run(make_runner, tmp_path):
    runner = make_runner(evaluate="all").fit()
    report = runner.report("test", requests=6)
    slm, oracle, sequential = (report["methods"][m] for m in ("slm", "oracle", "sequential"))
    assert slm["average_accuracy"] > 0.85
    assert oracle["average_accuracy"] > 0.85
    assert slm["ratio_to_oracle"] == pytest.approx(slm["average_accuracy"] / oracle["average_accuracy"])
    assert all(value is not None for row in slm["matrix"] for value in row)
    assert slm["forward_transfer"] is not None
    assert sequential["matrix"][0][1:] == [None, None] and None not in sequential["matrix"][2]
    assert min(report["routing"]["accuracy"].values()) > 0.85
    assert len(report["routing"]["mass"][0]) == 6
    assert sum(report["routing"]["mass"][0]) == pytest.approx(1.0, abs=1e-4)
    assert {r["expected_task"] for r in report["requests"]} == {"colour", "size", "mood"}
    # the base model is patched with the engine's own pool again
    answers = runner.model.predict([e.text for e in make_tasks()[0].test])
    assert sum(a.answer == e.target for a, e in zip(answers, make_tasks()[0].test, strict=True)) >= 6
    data, page = write_reports([report], tmp_path / "out", "test", 1.0)
    assert json.loads(data.read_text())["runs"][0]["tasks"] == ["colour", "size", "mood"]
    assert "colour" in page.read_text()


def entries(model):
    return [t for f in model.pool.factors for t in (f.A, f.B)] + list(model.pool.heads.parameters())


@pytest.mark.parametrize("stop", ["in training", "between tasks", "before measuring"])
def test_an_interrupted_run_is_continued_with_the_same_bits(make_runner, monkeypatch, stop):
    whole = make_runner("whole", methods=("slm", "oracle")).fit()

    class Killed(BaseException):
        pass

    interrupted = make_runner("cut", methods=("slm", "oracle"))
    if stop == "in training":
        original, steps = SLMTrainer.training_step, []

        def dying_step(self, *args, **kwargs):
            steps.append(1)
            if len(steps) == 32:
                raise Killed
            return original(self, *args, **kwargs)

        monkeypatch.setattr(SLMTrainer, "training_step", dying_step)
    elif stop == "between tasks":
        learn = interrupted._learn
        interrupted._learn = lambda method, model, stage: (
            (_ for _ in ()).throw(Killed()) if stage else learn(method, model, stage)
        )
    else:
        score, calls = interrupted._score, []

        def dying_score(*args, **kwargs):
            calls.append(1)
            if len(calls) == 8:
                raise Killed
            return score(*args, **kwargs)

        interrupted._score = dying_score
    with pytest.raises(Killed):
        interrupted.fit()
    monkeypatch.undo()
    assert 0 < sum(len(r) for r in interrupted.state["rows"].values()) < 6
    with pytest.raises(ValueError, match="holds another run"):
        make_runner("cut", methods=("slm",))
    resumed = make_runner("cut", methods=("slm", "oracle")).fit()
    assert resumed.state["rows"] == whole.state["rows"]
    assert all(torch.equal(a, b) for a, b in zip(entries(resumed.model), entries(whole.model), strict=True))


def test_fit_goes_on_in_the_same_process_after_an_interrupt(make_runner):
    whole = make_runner("whole", methods=("slm",)).fit()
    runner = make_runner("cut", methods=("slm",))
    train = runner._train
    runner._train = lambda *args: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        runner.fit()
    assert runner.model.pool.num_entries == 0
    runner._train = train
    assert runner.fit().state["rows"] == whole.state["rows"]


def test_a_damaged_state_is_named(make_runner, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text("{")
    with pytest.raises(OSError, match="state.json is damaged"):
        make_runner()


def test_a_finished_run_is_only_read(make_runner):
    first = make_runner(methods=("slm",)).fit()
    again = make_runner(methods=("slm",))
    again._learn = None
    assert again.fit().report()["methods"]["slm"]["matrix"] == first.report()["methods"]["slm"]["matrix"]


def test_bad_arguments(make_runner):
    with pytest.raises(ValueError, match="tasks is empty"):
        ContinualRunner(None, [])
    with pytest.raises(ValueError, match="distinct"):
        make_runner(tasks=make_tasks()[:1] * 2)
    with pytest.raises(ValueError, match="methods must include slm"):
        make_runner(methods=("oracle",))
    with pytest.raises(ValueError, match="evaluate"):
        make_runner(evaluate="some")
    runner = make_runner("one")
    runner._save_state()
    with pytest.raises(ValueError, match="holds another run"):
        make_runner("one", tasks=make_tasks()[:2])
