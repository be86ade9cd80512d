import json
import os
from dataclasses import replace

import pytest
import torch
from tiny_runner import Killed, dying, kept, make_tasks, new_runner
from transformers import AutoModel, AutoTokenizer

from slm_fast import SLMConfig, get_slm_model
from slm_fast.continual.methods import SLM
from slm_fast.continual.metrics import merge_tasks, summarize
from slm_fast.continual.runner import ContinualRunner, write_reports
from slm_fast.model import SLMModel
from slm_fast.trainer import SLMTrainer, default_arguments


@pytest.fixture
def make_runner(tmp_path):
    return lambda folder="run", *args, **options: new_runner(tmp_path / folder, *args, **options)


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


def test_a_whole_run(minilm, tmp_path):
    base, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
    config = SLMConfig(target_modules="all-linear", r=4, entries_per_task=2, encoder_name_or_path=minilm)
    model = get_slm_model(base, config, tokenizer=tokenizer)
    training = dict(num_train_epochs=4, learning_rate=5e-3, use_cpu=True, per_device_train_batch_size=4)
    args, tasks = default_arguments("unused", **training), make_tasks("colour", "size", "mood")
    settings = dict(evaluate="all", max_length=32, progress=False)
    runner = ContinualRunner(model, tasks, args, output_dir=tmp_path / "run", **settings).fit()
    report = runner.report("test", requests=6)
    slm, oracle, seq = (report["methods"][m] for m in ("slm", "oracle", "seq"))
    assert slm["average_accuracy"] > 0.85
    assert oracle["average_accuracy"] > 0.85
    assert slm["ratio_to_oracle"] == pytest.approx(slm["average_accuracy"] / oracle["average_accuracy"])
    assert all(value is not None for row in slm["matrix"] for value in row)
    assert slm["forward_transfer"] is not None and seq["forward_transfer"] is None
    assert runner.state["before"] == [pytest.approx(1 / len(task.labels)) for task in tasks]
    assert seq["matrix"][0][1:] == [None, None] and None not in seq["matrix"][2]
    assert min(report["routing"]["accuracy"].values()) > 0.85
    assert len(report["routing"]["mass"][0]) == 6
    assert sum(report["routing"]["mass"][0]) == pytest.approx(1.0, abs=1e-4)
    assert {r["expected_task"] for r in report["requests"]} == {"colour", "size", "mood"}
    # the base model is patched with the engine's own pool again
    answers = runner.model.predict([e.text for e in tasks[0].test])
    assert sum(a.answer == e.target for a, e in zip(answers, tasks[0].test, strict=True)) >= 3
    data, page = write_reports([report], tmp_path / "out", "test", 1.0)
    assert json.loads(data.read_text())["runs"][0]["tasks"] == ["colour", "size", "mood"]
    assert "colour" in page.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> ContinualRunner:
    return new_runner(tmp_path_factory.mktemp("whole") / "run", ("slm", "oracle")).fit()


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        pytest.param(SLMTrainer, "training_step", 9, id="in training"),
        pytest.param(SLM, "learn", 2, id="between tasks"),
        pytest.param(SLM, "save", 2, id="before saving"),
        pytest.param(ContinualRunner, "_score", 5, id="before measuring"),
    ],
)
def test_an_interrupted_run_is_continued_with_the_same_bits(whole, make_runner, monkeypatch, owner, name, at):
    interrupted = make_runner("cut", ("slm", "oracle"))
    monkeypatch.setattr(owner, name, dying(getattr(owner, name), at))
    with pytest.raises(Killed):
        interrupted.fit()
    monkeypatch.undo()
    assert [len(interrupted.state["rows"][method]) for method in ("slm", "oracle")] == [1, 1]
    resumed = make_runner("cut", ("slm", "oracle")).fit()
    assert resumed.state["rows"] == whole.state["rows"] and kept(resumed, "slm") == kept(whole, "slm")
    assert resumed.final == whole.final and resumed.routing_report() == whole.routing_report()


@pytest.mark.parametrize("at", [5, 9])
def test_fit_goes_on_in_the_same_process_after_an_interrupt(whole, make_runner, monkeypatch, at):
    runner = make_runner("cut", ("slm", "oracle"))
    monkeypatch.setattr(SLMTrainer, "training_step", dying(SLMTrainer.training_step, at))
    with pytest.raises(Killed):
        runner.fit()
    monkeypatch.undo()
    assert runner.model.pool.num_entries == (2 if at == 9 else 0)  # nothing half learnt
    assert runner.fit().state["rows"] == whole.state["rows"] and kept(runner, "slm") == kept(whole, "slm")


def test_a_damaged_state_is_named(make_runner, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text("{")
    with pytest.raises(OSError, match="state.json is damaged"):
        make_runner()


def test_a_finished_run_is_only_read(whole, monkeypatch):
    again = new_runner(whole.output_dir, ("slm", "oracle"))
    monkeypatch.setattr(SLM, "learn", None)
    assert again.fit().report() == whole.report()


def test_a_run_belongs_to_its_tasks_and_settings(make_runner):
    make_runner("one", tasks=make_tasks("colour")).fit()
    with pytest.raises(ValueError, match="another run: slm without oracle at its stages"):
        make_runner("one", ("slm", "oracle"), make_tasks("colour"))
    for different in (dict(tasks=make_tasks("size")), dict(tasks=make_tasks("colour"), epochs=3)):
        with pytest.raises(ValueError, match="holds another run"):
            make_runner("one", **different)


def test_a_run_belongs_to_what_its_scores_and_answers_depend_on(make_runner, tmp_path, monkeypatch):
    texts = [replace(task, labels=None, metric="token_f1") for task in make_tasks("colour")]
    make_runner("one", tasks=texts)._save_state()
    with pytest.raises(ValueError, match="holds another run"):
        make_runner("one", tasks=[replace(task, metric="bertscore") for task in texts])
    with pytest.raises(ValueError, match="holds another run"):
        make_runner("one", tasks=texts, max_new_tokens=3)
    path = tmp_path / "one" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"identity": state["identity"] | {"dtype": "torch.bfloat16"}}))
    with pytest.raises(ValueError, match="holds another run"):
        make_runner("one", tasks=texts)
    for name in ("metrics", "dtype", "max_new_tokens"):  # as runs of before were kept
        del state["identity"][name]
    path.write_text(json.dumps(state))
    assert make_runner("one", tasks=texts).state["identity"]["dtype"] == "torch.float32"


def test_bad_arguments(make_runner):
    with pytest.raises(ValueError, match="tasks is empty"):
        ContinualRunner(None, [])
    with pytest.raises(ValueError, match="distinct"):
        make_runner(tasks=make_tasks("colour", "colour"))
    with pytest.raises(ValueError, match="evaluate"):
        make_runner(evaluate="some")
    runner = make_runner()
    runner.model.add_task("mine", embeddings=torch.randn(4, 24), progress=False)
    with pytest.raises(ValueError, match="pool must be empty"):
        runner.fit()


@pytest.mark.parametrize("methods", [("slm", "oracle", "batch"), ("slm", "per_task", "paper")])
def test_no_text_is_answered_twice_with_one_mixture(make_runner, monkeypatch, methods):
    answered, predict = [], SLMModel.predict

    def counting(model, texts, **options):
        answered.extend(texts)
        return predict(model, texts, **options)

    monkeypatch.setattr(SLMModel, "predict", counting)
    monkeypatch.setattr(ContinualRunner, "cost", lambda runner: {})  # it answers on purpose
    tasks = make_tasks("colour", "size", "mood")
    runner = make_runner("run", methods, tasks).fit()
    few = len(answered)
    for method in runner.methods.values():
        monkeypatch.setattr(type(method), "settled", False)
    again = make_runner("again", methods, tasks).fit()
    assert runner.state["rows"] == again.state["rows"]
    assert few < 0.7 * (len(answered) - few)


def test_early_stopping_ends_at_the_best_epoch_of_held_out_rows(make_runner, monkeypatch):
    seen, train = {}, SLMTrainer.train

    def training(trainer, *args, **kwargs):
        done = train(trainer, *args, **kwargs)
        losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
        trainer.args.report_to, now = [], trainer.evaluate()["eval_loss"]
        seen[trainer.args.output_dir.rsplit("/", 1)[1]] = losses, now, len(trainer.train_dataset)
        return done

    monkeypatch.setattr(SLMTrainer, "train", training)
    names = ("slm", "seq", "joint")
    options = dict(epochs=30, early_stopping=1, holdout=0.25, tasks=make_tasks("colour", "size"))
    runner = make_runner("stopped", names, **options).fit()
    assert set(seen) == {"slm-colour", "slm-size", "seq-colour", "seq-size", "joint-size"}
    for losses, now, rows in seen.values():
        assert 1 < len(losses) < 30 and losses[-1] >= min(losses[:-1])  # one epoch was no better: the end
        assert now == pytest.approx(min(losses), rel=1e-4)  # the best is what was kept
        assert rows in (9, 14, 23)  # three quarters of 12, 18 and 30
    report = runner.report()
    assert report["settings"]["early_stopping"] == 1 and report["methods"]["slm"]["steps"] < 2 * 30 * 3
    with pytest.raises(ValueError, match="holds another run"):
        make_runner("stopped", names, **(options | dict(early_stopping=None)))
    with pytest.raises(ValueError, match="a share between 0 and 1, got 1"):
        make_runner("other", early_stopping=1, holdout=1)


def test_early_stopping_in_a_run_that_is_continued(make_runner, monkeypatch):
    options = dict(tasks=make_tasks("colour"), epochs=30, early_stopping=2, holdout=0.25)
    whole = make_runner("whole", **options).fit()
    for name, (owner, at) in {
        "waiting": ("training_step", whole.state["steps"]["slm"]),  # after an epoch that was no better
        "over": ("_load_best_model", 1),
    }.items():
        monkeypatch.setattr(SLMTrainer, owner, dying(getattr(SLMTrainer, owner), at))
        with pytest.raises(Killed):
            make_runner(name, **options).fit()
        monkeypatch.undo()
        resumed = make_runner(name, **options).fit()
        assert resumed.state["steps"] == whole.state["steps"] and kept(resumed, "slm") == kept(whole, "slm")


def test_costs_of_an_answer_and_of_a_task(make_runner):
    report = make_runner("run", ("slm", "oracle", "seq", "finetune")).fit().report()
    pool = make_runner("run", ("slm", "oracle", "seq", "finetune")).fit().model.pool
    times, sizes = report["cost"]["milliseconds"], report["cost"]["bytes"]
    assert set(times) == {"encoding", "search", "answer", "answer of the frozen model"}
    assert all(0 < value < 1e4 for value in times.values())
    features = sum(i + o for i, o in pool.modules_shape.values())
    assert sizes["factors of a task"] == 2 * 2 * features * 4  # two entries of rank 2, fp32
    assert sizes["keys of a task"] >= 2 * 24 * 4 and sizes["statistics of a task"] > 0
    methods = report["methods"]
    assert methods["slm"]["trained_parameters"] == methods["seq"]["trained_parameters"] == 2 * 2 * features
    assert methods["finetune"]["trained_parameters"] == report["base"]["parameters"]
    assert methods["oracle"]["trained_parameters"] is None


def test_a_run_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process, not one of 2"):
        ContinualRunner(None, make_tasks())


def test_each_training_has_a_tensorboard_folder_of_its_own(make_runner, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    places = ("slm/1-colour", "slm/2-size", "seq/1-colour", "seq/2-size")
    for given in (None, tmp_path / "board"):
        if given:
            monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(given))
        runner = make_runner(f"run-{given is None}", ("slm", "seq"), epochs=1)
        runner.args.report_to, runner.args.logging_steps = ["tensorboard"], 1
        runner.fit()
        board = given or runner.output_dir / "tensorboard"
        assert {str(path.relative_to(board)) for path in board.glob("*/*")} == set(places)
        for place in places:
            written = events.EventAccumulator(str(board / place))
            written.Reload()
            steps = [event.step for event in written.Scalars("train/loss")]
            assert steps and steps == list(range(1, len(steps) + 1))
        assert os.environ.get("TENSORBOARD_LOGGING_DIR") == (given and str(given))
