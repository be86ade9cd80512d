import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import tiny_base
from tiny_runner import make_tokenizer
from transformers import AutoTokenizer

from slm_fast.backbone_encoder import BackboneEncoder
from slm_fast.cli import main
from slm_fast.continual.runner import ContinualRunner
from slm_fast.model import SLMModel

ROWS = {
    "colour": ("the {noun} is {label}", ["red", "blue"]),
    "mood": ("I feel {label} about my {noun} today", ["glad", "sad"]),
}
NOUNS = ["car", "house", "sky", "hat", "cup", "dog", "tree", "shop", "boat", "lamp"]


@pytest.fixture(scope="module")
def learnt(minilm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    for name, (template, labels) in ROWS.items():
        with open(folder / f"{name}.jsonl", "w") as file:
            for label in labels:
                for noun in NOUNS:
                    row = {"text": template.format(noun=noun, label=label), "label": label}
                    file.write(json.dumps(row) + "\n")
    output = folder / "run"
    code = main(
        ["learn", "--data", str(folder), "--output", str(output), "--epochs", "6", "--learning-rate", "5e-3",
         "--batch-size", "4", "--max-length", "24", "--target", "all-linear", "--methods", "slm,oracle"]
    )  # fmt: skip
    assert code == 0
    return output


def test_learn_writes_model_and_report(learnt):
    assert (learnt / "report.html").stat().st_size > 10_000
    report = json.loads((learnt / "report.json").read_text())
    assert report["runs"][0]["methods"]["slm"]["average_accuracy"] > 0.7
    assert (learnt / "slm" / "slm_config.json").is_file()


def test_route_and_generate(learnt, capsys):
    model = str(learnt / "slm")
    texts = ["the bus is red", "I feel sad about my bike today"]
    assert main(["route", "--model", model, "--json", *texts]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["task"] for row in rows] == ["colour", "mood"]
    assert main(["route", "--model", model, texts[0]]) == 0
    assert "colour.0" in capsys.readouterr().out
    assert main(["generate", "--model", model, "--json", *texts]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers[0]["answer"] in ("red", "blue") and answers[1]["answer"] in ("glad", "sad")
    assert main(["generate", "--model", model, "--task", "mood", texts[0]]) == 0
    assert "[mood]" in capsys.readouterr().out


def test_generate_cuts_texts_where_training_did(learnt, tmp_path, capsys, monkeypatch):
    seen, predict = [], SLMModel.predict

    def predicting(model, texts, **options):
        seen.append(options["max_length"])
        return predict(model, texts, **options)

    monkeypatch.setattr(SLMModel, "predict", predicting)
    texts = ["the bus is red", "the bus is red " * 20]
    for options, length, cut in (([], 24, 1), (["--max-length", "5"], 5, 2), (["--max-length", "99"], 99, 0)):
        assert main(["generate", "--model", str(learnt / "slm"), *options, *texts]) == 0
        error = capsys.readouterr().err
        assert seen.pop() == length
        assert (f"{cut} of 2 texts cut to {length} tokens: --max-length" in error) == bool(cut)
    shutil.copytree(learnt / "slm", tmp_path / "old")
    index = json.loads((tmp_path / "old" / "slm_config.json").read_text())
    for task in index["tasks"]:
        assert task.pop("max_length") == 24
    (tmp_path / "old" / "slm_config.json").write_text(json.dumps(index))
    assert main(["generate", "--model", str(tmp_path / "old"), *texts]) == 0
    assert seen.pop() == 256 and "cut to" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["route", "--model", "{tmp}", "a text"], "holds no saved pool"),
        (["learn", "--data", "{tmp}/none/at/all"], "none/at/all"),
        (["generate", "--model", "{model}", "--task", "nope", "a"], "unknown task 'nope'"),
        (["generate", "--model", "{model}", "  "], "is empty"),
        (["learn", "--data", "{data}", "--option", "ewc=3"], "wanted METHOD.NAME=NUMBER"),
        (["learn", "--data", "{data}", "--set", "layers=3"], "wanted FIELD=VALUE, of backend, coverage"),
        (["learn", "--data", "{data}", "--set", "coverage=2"], "coverage"),
        (
            ["learn", "--data", "{data}", "--option", "seq.rate=3", "--output", "{tmp}/o"],
            "has no option 'rate'",
        ),
        (["learn", "--data", "{data}", "--early-stopping", "0", "--output", "{tmp}/o"], "epochs from 1"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(learnt, tmp_path, capsys, arguments, message):
    filled = [a.format(tmp=tmp_path, model=learnt / "slm", data=learnt.parent) for a in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("slm-fast: ") and message in error[-1]


def test_options_of_training_and_methods_arrive(learnt, tmp_path, monkeypatch):
    seen, real = [], ContinualRunner.fit

    def fit(runner):
        seen.append(runner)
        return real(runner)

    monkeypatch.setattr(ContinualRunner, "fit", fit)
    arguments = ["learn", "--data", str(learnt.parent), "--output", str(tmp_path), "--epochs", "1", "--bf16"]
    arguments += ["--batch-size", "4", "--gradient-accumulation-steps", "2", "--gradient-checkpointing"]
    arguments += ["--methods", "slm,replay", "--option", "replay.share=0.5", "--max-length", "24"]
    arguments += ["--set", "query_layers=[1,2]", "--set", "weighting=softmax"]
    assert main([*arguments, "--dtype", "bfloat16"]) == 0
    (runner,) = seen
    assert (
        runner.model.base_model.dtype == torch.bfloat16
        and runner.args.bf16
        and runner.args.gradient_checkpointing
    )
    assert runner.state["steps"]["slm"] == 2 * 2  # two tasks of 16 rows, 4 times 2 a step
    assert runner.model.encoder.layers == [1, 2] and runner.model.slm_config.weighting == "softmax"
    assert runner.methods["replay"].options == {"share": 0.5}
    assert runner.report()["settings"]["bf16"] is True


def test_runs_with_the_bases_own_layers_encode_a_text_once(learnt, tmp_path, monkeypatch):
    """By whichever seed or command."""
    passes, tokenized = [], BackboneEncoder._tokenized

    def counting(self, texts):
        passes.extend(texts)
        return tokenized(self, texts)

    monkeypatch.setattr(BackboneEncoder, "_tokenized", counting)
    monkeypatch.setattr(ContinualRunner, "cost", lambda runner: None)  # which measures passes
    monkeypatch.setattr(
        "slm_fast.loading.load_base", lambda name, dtype: (tiny_base("bert"), make_tokenizer())
    )
    common = ["learn", "--data", str(learnt.parent), "--encoder", "backbone", "--max-steps", "1"]
    common += ["--batch-size", "4", "--methods", "slm,batch", "--set", "num_groups=4"]
    for number, (seeds, queries, encoded) in enumerate(
        [("0,1", None, 40), ("0", tmp_path / "queries", 40), ("1,2", tmp_path / "queries", 0)]
    ):
        passes.clear()
        kept = [] if queries is None else ["--queries", str(queries)]
        assert main([*common, "--seeds", seeds, "--output", str(tmp_path / f"run{number}"), *kept]) == 0
        assert len(passes) == len(set(passes)) == encoded


def test_runs_are_told_apart_and_only_a_model_that_was_written_is_named(learnt, tmp_path, capsys):
    arguments = ["learn", "--data", str(learnt.parent), "--output", str(tmp_path), "--max-steps", "1"]
    assert main([*arguments, "--methods", "joint", "--seeds", "0,1", "--max-length", "8"]) == 0
    printed = capsys.readouterr().out
    assert "model:" not in printed and "report:" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["minilm, seed 0", "minilm, seed 1"]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """A data folder of two tasks of bert5 and a probe."""
    folder = tmp_path_factory.mktemp("data")
    for path, (template, labels) in {
        "bert5/ag": ("news of {label}: the {noun}", ["Sports", "World"]),
        "bert5/yelp": ("a {noun} of theirs, {label} indeed", ["negative", "positive"]),
        "extra/trec6": ("where or how many is {noun} {label}?", ["LOC", "NUM"]),
    }.items():
        (folder / path).parent.mkdir(exist_ok=True)
        for part, nouns in (("train", NOUNS[:3]), ("test", NOUNS[3:5])):
            rows = [{"text": template.format(noun=n, label=i), "label": i} for i in labels for n in nouns]
            (folder / f"{path}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


BENCHMARK = ["learn", "--benchmark", "bert5", "--tasks", "yelp,ag", "--max-length", "16"]


def test_a_benchmark_in_two_orders_with_a_probe(minilm, data_folder, tmp_path, capsys):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ["--data", str(data_folder), "--output", str(tmp_path), "--order", "4,5", "--probes", "trec6"]
    arguments += ["--methods", "slm,oracle", "--batch-size", "6", "--max-test", "4"]
    arguments += ["--min-similarity", "1e9", "--report-to", "tensorboard", "--twin-share", "0.25"]
    assert main([*BENCHMARK, *arguments]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    first, second = report["runs"]
    assert first["tasks"] == ["ag", "yelp"] and second["tasks"] == ["yelp", "ag"]
    assert first["name"] == "bert5, order 4, seed 0, minilm"
    settings = first["settings"]
    assert (settings["benchmark"], settings["order"], settings["hyper-parameters"]) == ("bert5", "4", "ours")
    assert (
        settings["batch_size"] == 6 and settings["epochs"] == 1 and settings["target_modules"] == "all-linear"
    )
    assert settings["sources"] == dict.fromkeys(("ag", "yelp"), f"jsonl:{data_folder}/bert5")
    assert settings["scores"] == {"ag": "accuracy", "yelp": "accuracy"} and settings["twin_share"] == 0.25
    assert settings["test examples"] == {"ag": 4, "yelp": 4}
    probe = first["probes"]["tasks"]["trec6"]
    assert first["probes"]["min_similarity"] == 1e9  # nothing is above it: every row has the frozen model
    assert probe["rows"] == 4 and probe["frozen_rows"] == probe["equal_rows"] == 1.0
    assert probe["score_before"] == probe["score_after"] > 0.5
    assert report["means"][0]["methods"]["slm"]["average_accuracy"]["runs"] == 2
    assert first["methods"]["slm"]["forward_transfer_single"] is not None
    for folder in ("order4-seed0", "order5-seed0"):
        assert (tmp_path / folder / "slm" / "slm_config.json").is_file()
    board = tmp_path / "order4-seed0" / "tensorboard"
    assert [str(path.relative_to(board)) for path in sorted(board.glob("*/*"))] == ["slm/1-ag", "slm/2-yelp"]
    written = events.EventAccumulator(str(board / "slm" / "1-ag"))
    written.Reload()
    assert len(written.Scalars("train/train_loss")) == 1
    assert not (tmp_path / "order5-seed0" / "tensorboard").exists()  # its training was taken over
    assert len(list((tmp_path / "trained").glob("slm-*/slm_config.json"))) == 2
    assert first["methods"]["slm"]["steps"] == second["methods"]["slm"]["steps"] > 0
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    for name in ("report.html", "report.md", "report.tex"):
        text = (tmp_path / name).read_text("utf8")
        assert "trec6" in text and (r" $\pm$ " if name == "report.tex" else " ± ") in text
    assert "Zero-shot kept, bit-equal features" in printed and "over 2 runs" in printed
    assert f"jsonl:{data_folder}/bert5" in printed and "bert5, order 5. The paper's BERT setting" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--order", "4,9"], "bert5 has the orders 4, 5, 6, 7, got '9'"),
        (["--benchmark", "bert6"], "unknown benchmark 'bert6'; known: bert5"),
        (["--data", "{tmp}/none"], "there is no data folder {tmp}/none"),
        (["--tasks", "sst2"], "bert5 has no task 'sst2'"),
        (["--probes", "ag"], "a probe must not be learnt, but 'ag' is among ag, yelp"),
        (["--probes", "nope"], "unknown task 'nope'"),
        (["--methods", "slm,nope"], "nope"),
        (["--report-to", "a_reporter"], "--report-to a_reporter: not installed, or unknown to transformers"),
    ],
)
def test_errors_of_benchmarks(minilm, data_folder, tmp_path, capsys, arguments, message):
    given = ["--data", str(data_folder), "--output", str(tmp_path / "run")]
    assert main([*BENCHMARK, *given, *(a.format(tmp=tmp_path) for a in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("slm-fast: ") and message.format(tmp=tmp_path) in error


def test_an_order_needs_a_benchmark(tmp_path, capsys):
    assert main(["learn", "--order", "4", "--output", str(tmp_path)]) == 2
    assert "--order needs --benchmark" in capsys.readouterr().err


def test_doctor_names_what_is_there_and_what_is_missing():
    out = subprocess.run(
        [sys.executable, "-m", "slm_fast.cli", "doctor"], capture_output=True, text=True, check=True
    ).stdout
    for word in (
        "slm_fast",
        "torch",
        "backend       reference: ready",
        "backend       cpu:",
        "extension",
        "triton",
    ):
        assert word in out
    assert "pip install" in out


def test_long_answers_are_scored_as_asked(minilm, tmp_path, capsys, monkeypatch):
    words = "one two three four five six seven".split()
    rows = [{"prompt": f"say {w}", "completion": " ".join([w, *words])} for w in words]
    for part in ("train", "test"):
        (tmp_path / f"long.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Stopped(Exception):
        pass

    def stop(model, tasks, *args, **options):
        raise Stopped([task.metric for task in tasks])

    monkeypatch.setattr("slm_fast.continual.runner.ContinualRunner", stop)

    def load(name, dtype):
        return tiny_base("llama").to(dtype), AutoTokenizer.from_pretrained(minilm)

    monkeypatch.setattr("slm_fast.loading.load_base", load)
    for arguments, metric in (([], "token_f1"), (["--text-metric", "bertscore"], "bertscore")):
        with pytest.raises(Stopped, match=metric):
            main(
                [
                    "learn",
                    "--data",
                    str(tmp_path),
                    "--output",
                    str(tmp_path / "run"),
                    "--base",
                    "x",
                    *arguments,
                ]
            )
