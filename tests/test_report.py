import base64
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest

from slm_fast.continual.report import (
    forgetting_per_task,
    format_comparison,
    format_matrix,
    seen_averages,
    write_report,
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
    assert len(parser.sources) == 2 * 5  # curves, forgetting, matrices, confusion, mass
    for source in parser.sources:
        picture = base64.b64decode(source.removeprefix("data:image/svg+xml;base64,"))
        assert b"<svg" in picture and b"nan" not in picture.lower().split(b"<defs")[0]
    assert "<script>" not in page and "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "run &lt;script&gt;" in page and "a &amp; b &lt; c" in page and "A &lt;title&gt;" in page
    assert 'class="right">Yes' in page and 'class="wrong">x' in page and "width:75.0%" in page
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
