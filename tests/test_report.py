import base64
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest

from slm_fast.continual.metrics import REFERENCE
from slm_fast.continual.report import write_report
from slm_fast.continual.tables import (
    forgetting_per_task,
    format_comparison,
    format_matrix,
    latex,
    mean_over_runs,
    measured,
    repeated_runs,
    seen_averages,
)

MATRIX = [[0.9, None, 0.1], [0.8, 0.7, None], [0.6, 0.75, 0.5]]


def method(label, matrix=MATRIX, **more):
    return {"label": label, "matrix": matrix, "average_accuracy": 0.61666, "forgetting": 0.125, **more}


def full_run(count=3):
    tasks = [f"task number {i} <&>" for i in range(count)]
    matrix = [[0.9 - 0.01 * (t - i) if i <= t else None for i in range(count)] for t in range(count)]
    share = [[1.0 if i == j else 0.0 for j in range(count)] for i in range(count)]
    return {
        "name": "run <script>alert(1)</script>",
        "tasks": tasks,
        "metric": "accuracy",
        "base": {"model": "tiny", "parameters": 12345, "trainable_per_task": 67},
        "settings": {"r": 8, "query_layers": [0, 1]},
        "methods": {
            "slm": method("SLM, no task id", matrix, backward_transfer=-0.02, seconds_train=1234.5),
            "oracle": method("SLM, task id given", matrix),
            "sequential": method("one LoRA", matrix, forward_transfer=math.nan),
        },
        "metrics_note": {"forgetting": "best earlier score minus the last"},
        "routing": {
            "confusion": share,
            "mass": [[value / 2 for value in row for _ in range(2)] for row in share],
            "entry_names": [f"{task}/{k}" for task in tasks for k in range(2)],
            "accuracy": {"task": 0.983},
            "near_duplicates": {"one": ["two", "three"], "two": []},
        },
        "text_scores": {tasks[0]: {"token_f1": 0.287, "bertscore": 0.614}},
        "cost": {
            "milliseconds": {
                "encoding": 20.5,
                "search": 0.25,
                "answer": 8.0,
                "answer of the frozen model": 7.0,
            },
            "bytes": {"factors of a task": 2_600_000, "peak of the process": 10**9},
        },
        "requests": [
            {
                "text": "a & b < c",
                "answer": "Yes",
                "task": tasks[0],
                "expected": "yes",
                "routing": [{"entry": "e0", "weight": 0.75, "score": -1.5}],
            },
            {"text": "no routing", "answer": "x", "expected": "y", "routing": []},
        ],
        "notes": ["a note"],
    }


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order, and collects what a page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(page):
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_files_and_their_contents(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = {
        "title": "A <title>",
        "created": "2026-01-01",
        "seconds": 12.3,
        "environment": {"torch": "2"},
        "runs": [full_run(), full_run(15)],
    }
    json_path, html_path = write_report(result, tmp_path / "new" / "folder")
    data = json.loads(json_path.read_text("utf8"), parse_constant=lambda name: pytest.fail(name))
    assert data["schema"] == 1 and data["title"] == "A <title>"
    assert data["runs"][0]["methods"]["sequential"]["forward_transfer"] is None
    assert "schema" not in result

    page = html_path.read_text("utf8")
    parser = parse(page)
    assert len(parser.sources) == 2 * 6  # curves, forgetting, matrices, confusion, mass, cost
    for source in parser.sources:
        picture = base64.b64decode(source.removeprefix("data:image/svg+xml;base64,"))
        assert b"<svg" in picture and b"nan" not in picture.lower().split(b"<defs")[0]
    assert "<script>" not in page and "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "run &lt;script&gt;" in page and "a &amp; b &lt; c" in page and "A &lt;title&gt;" in page
    assert 'class="right">Yes' in page and 'class="wrong">x' in page and "width:75.0%" in page
    assert "<td>one</td><td>two, three</td>" in page and "<td>two</td><td></td>" not in page
    assert "<td>28.7</td><td>61.4</td>" in page and "<td>20.50 ms</td>" in page and "<td>2.60 MB</td>" in page
    text = (tmp_path / "new" / "folder" / "report.md").read_text("utf8")
    assert "| task number 1 <&> | 89.0 | 90.0 | - |" in text and "| task number 1 <&> | 0.0 | 100.0 |" in text
    tex = (tmp_path / "new" / "folder" / "report.tex").read_text("utf8")
    captions = [line for line in tex.splitlines() if line.startswith("\\caption")]
    assert sum("percent" in line for line in captions) == len(captions) - 2  # costs are in ms and MB
    assert sum(line.endswith(". Cost.}") for line in captions) == 2
    assert "<td>98.3</td>" in page and "1,234.5" in page and "12,345 parameters" in page


def test_a_minimal_run_has_no_empty_sections(tmp_path):
    result = {"runs": [{"name": "bare", "tasks": ["a", "b"], "methods": {"slm": {"average_accuracy": 0.5}}}]}
    _, html_path = write_report(result, tmp_path)
    page = html_path.read_text("utf8")
    parse(page)
    assert "50.0%" in page and "<img" not in page
    assert not any(title in page for title in ("Routing", "Settings", "Notes", "Environment", "requests"))
    write_report({}, tmp_path)


@pytest.mark.parametrize("count", [1, 2, 16])
def test_any_number_of_tasks(tmp_path, count):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    _, html_path = write_report({"runs": [full_run(count)]}, tmp_path)
    parse(html_path.read_text("utf8"))


def test_many_methods_of_which_some_are_measured_only_at_the_end(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run = full_run()
    run["methods"] |= {f"seq{i}": method(f"another {i}") for i in range(6)}
    run["methods"]["joint"] = method("joint", [[None] * 3, [None] * 3, [0.5, 0.25, 0.75]])
    run["methods"]["one"] = method("one", [[None] * 3, [None] * 3, [0.5, None, None]])
    _, html_path = write_report({"runs": [run]}, tmp_path)
    page = html_path.read_text("utf8")
    parse(page)
    assert "joint" in page and "another 5" in page


def test_pages_are_reproducible(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pages = [write_report({"runs": [full_run()]}, tmp_path / name)[1].read_text("utf8") for name in "ab"]
    assert pages[0] == pages[1]


def test_tensors_and_arrays_are_written_as_numbers(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    run = {
        "name": "t",
        "tasks": ["a"],
        "methods": {"slm": {"matrix": torch.tensor([[float("nan")]]), "forgetting": torch.tensor(0.5)}},
    }
    json_path, _ = write_report({"runs": [run]}, tmp_path)
    slm = json.loads(json_path.read_text("utf8"))["runs"][0]["methods"]["slm"]
    assert slm == {"matrix": [[None]], "forgetting": 0.5}


def test_wrong_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs name, tasks and methods, got name"):
        write_report({"runs": [{"name": "x"}]}, tmp_path)
    with pytest.raises(ValueError, match="the matrix of slm must be 2 x 2"):
        write_report(
            {"runs": [{"name": "x", "tasks": ["a", "b"], "methods": {"slm": method("m")}}]}, tmp_path
        )
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"slm_fast\[train\]"):
        write_report({"runs": [full_run()]}, tmp_path)


def test_derived_numbers():
    assert seen_averages(MATRIX) == pytest.approx([0.9, 0.75, 0.61666], abs=1e-4)
    assert forgetting_per_task(MATRIX) == pytest.approx([0.3, -0.05])
    assert forgetting_per_task([[0.5, None], [None, 0.5]]) == [None]


def test_text_tables():
    lines = format_matrix(["short", "a name that is long", "c"], MATRIX).split("\n")
    assert lines[0].split() == ["after", "learning", "short", "a", "name", "tha..", "c"]
    assert lines[1].split() == ["short", "90.0", "-", "10.0"]
    assert lines[3].split() == ["c", "60.0", "75.0", "50.0"]
    assert len({len(line) for line in lines}) == 1

    text = format_comparison({"slm": method("SLM", backward_transfer=-0.0001), "x": {"seconds_train": 3}})
    lines = text.split("\n")
    assert lines[0].split("  ")[0] == "method" and "forward" not in lines[0]
    assert lines[1].split() == ["SLM", "61.7", "12.5", "0.0", "-"]
    assert lines[2].split() == ["x", "-", "-", "-", "3.0"]


PROBES = {
    "unchanged": "same answers",
    "min_similarity": None,
    "tasks": {
        "clinc_150": {
            "rows": 30, "metric": "accuracy", "frozen_rows": 0.9, "equal_rows": 0.95,
            "score_before": 0.5, "score_after": 0.25,
        },
    },
}  # fmt: skip


def small_run(name, average, order="ab", **more):
    slm = {"label": "SLM & co", "average_accuracy": average, "seconds_train": 2.0}
    return {"name": name, "tasks": list(order), "base": {"model": "tiny"}, "methods": {"slm": slm}, **more}


def test_tables_for_papers_and_for_reading(tmp_path):
    run = small_run("order 4", 0.5, probes=PROBES, metrics_note={"average_accuracy": "mean of R[T-1][i]"})
    run["methods"]["seq"] = {"label": "one_LoRA | seq", "average_accuracy": 0.25, "forgetting": 0.1}
    json_path, html_path = write_report({"title": "T", "runs": [run]}, tmp_path)
    text = (tmp_path / "report.md").read_text("utf8")
    assert "| method | average | forgetting (max-last) | training, s |\n| --- | ---: | ---: | ---: |" in text
    assert "| SLM & co | 50.0 | - | 2.0 |\n| one_LoRA \\| seq | 25.0 | 10.0 | - |" in text
    assert "| clinc_150 | accuracy | 30 | 90.0 | 95.0 | 50.0 | 25.0 |" in text
    assert "- average accuracy: mean of R[T-1][i]" in text and "Mean over" not in text

    tex = (tmp_path / "report.tex").read_text("utf8")
    assert "\\caption{order 4. Scores in percent.}" in tex
    assert tex.count("\\begin{tabular}{l") == 2 and "\\begin{tabular}{lrrr}\n\\toprule" in tex
    assert "SLM \\& co & 50.0 & - & 2.0 \\\\\none\\_LoRA | seq & 25.0 & 10.0 & - \\\\\n\\bottomrule" in tex
    for line in tex.splitlines():
        if line.endswith("\\\\"):
            assert line.replace("\\&", "").count("&") in (3, 6)

    page = html_path.read_text("utf8")
    parse(page)
    assert "Zero-shot kept, same answers; min_similarity: no floor" in page and "<td>clinc_150</td>" in page
    assert json.loads(json_path.read_text())["runs"][0]["probes"] == PROBES


def test_latex_escapes_everything_special():
    assert latex("50% of a_b & {c} #1 $ ~ ^ ± \\") == (
        r"50\% of a\_b \& \{c\} \#1 \$ \textasciitilde{} \textasciicircum{} $\pm$ \textbackslash{}"
    )


def test_runs_in_other_orders_get_their_mean(tmp_path):
    runs = [small_run("4", 0.5), small_run("5", 0.6, order="ba"), small_run("other", 0.9, order="abc")]
    assert [[run["name"] for run in group] for group in repeated_runs(runs)] == [["4", "5"]]
    slm = mean_over_runs(runs[:2])["slm"]
    assert slm["average_accuracy"] == pytest.approx({"mean": 0.55, "std": 0.0707107, "runs": 2}, abs=1e-6)
    assert mean_over_runs(runs[:1])["slm"]["average_accuracy"] == {"mean": 0.5, "std": None, "runs": 1}
    json_path, html_path = write_report({"runs": runs}, tmp_path)
    means = json.loads(json_path.read_text("utf8"))["means"]
    assert len(means) == 1 and means[0]["runs"] == ["4", "5"]
    assert means[0]["methods"]["slm"]["seconds_train"] == {"mean": 2.0, "std": 0.0, "runs": 2}
    page = html_path.read_text("utf8")
    parse(page)
    assert "55.0 ± 7.1" in page and "over 2 runs" in page and "All runs" in page
    assert "55.0 ± 7.1" in (tmp_path / "report.md").read_text("utf8")
    assert r"55.0 $\pm$ 7.1" in (tmp_path / "report.tex").read_text("utf8")


def test_measures_that_follow_from_the_rest_of_a_run():
    run = small_run("r", 0.5, routing={"accuracy": {"a": 1.0, "b": 0.5}})
    run["methods"]["slm"]["matrix"] = [[0.5, None], [0.5, 0.75]]
    run["methods"]["oracle"] = {"matrix": [[0.5, None], [0.5, 0.5]]}
    run["methods"]["seq"] = {"matrix": [[0.5, None], [0.0, 0.25]], "forward_transfer_single": 0.125}
    methods = measured(run)
    assert methods["slm"]["routing_accuracy"] == 0.75 and "routing_accuracy" not in methods["oracle"]
    assert methods["slm"]["forward_transfer_single"] == 0.25
    assert methods["oracle"]["forward_transfer_single"] == 0.0
    assert methods["seq"]["forward_transfer_single"] == 0.125  # was there already
    assert REFERENCE not in methods["seq"] and methods["slm"][REFERENCE] == "oracle"
    run["settings"] = {"init": "retrieved"}  # the oracle's entries were not learnt alone
    assert "forward_transfer_single" not in measured(run)["slm"] and REFERENCE not in measured(run)["slm"]
    run["methods"]["per_task"] = {"matrix": [[0.5, None], [0.5, 1.0]]}  # before "oracle" as the reference
    assert measured(run)["slm"]["forward_transfer_single"] == -0.25
    assert measured(run)["slm"][REFERENCE] == "per_task"
    header = format_comparison(measured(run)).split("\n")[0]
    assert "routing accuracy" in header and "forward transfer (single-task)" in header
