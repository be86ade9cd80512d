import json
import subprocess
import sys

import pytest

from slm_fast.cli import main

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["route", "--model", "{tmp}", "a text"], "holds no saved pool"),
        (["learn", "--data", "{tmp}/none/at/all"], "none/at/all"),
        (["generate", "--model", "{model}", "--task", "nope", "a"], "unknown task 'nope'"),
        (["generate", "--model", "{model}", "  "], "is empty"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(learnt, tmp_path, capsys, arguments, message):
    filled = [a.format(tmp=tmp_path, model=learnt / "slm") for a in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("slm-fast: ") and message in error[-1]


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
