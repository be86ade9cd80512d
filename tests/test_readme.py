import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme_tables

    return readme_tables


@pytest.fixture
def copy(tool, monkeypatch, tmp_path):
    """A README and results that a test may change."""
    results = tmp_path / "results"
    results.mkdir()
    for path in tool.RESULTS.glob("*.json"):
        (results / path.name).write_bytes(path.read_bytes())
    readme = tmp_path / "README.md"
    readme.write_bytes(tool.README.read_bytes())
    monkeypatch.setattr(tool, "RESULTS", results)
    monkeypatch.setattr(tool, "README", readme)
    return readme


def test_every_block_is_up_to_date(tool, capsys):
    assert tool.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_is_in_the_readme_once(tool):
    assert sorted(re.findall("<!-- results: (.*?) -->", tool.README.read_text())) == sorted(tool.TABLES)


def test_a_changed_number_is_found_and_written_back(tool, copy, capsys):
    text = copy.read_text()
    copy.write_text(text.replace("| smol, 1 row | 35.7 |", "| smol, 1 row | 35.6 |"))
    changed = copy.read_text()
    assert changed != text
    assert tool.main(["--check"]) == 1
    assert capsys.readouterr().out == "differs: decoding\n"
    assert copy.read_text() == changed
    assert tool.main([]) == 0
    assert copy.read_text() == text


def test_a_changed_result_is_found(tool, copy, capsys):
    path = tool.RESULTS / "routing_bert5.json"
    result = json.loads(path.read_text())
    result["machine"]["cores"] = 64
    path.write_text(json.dumps(result))
    assert tool.main(["--check"]) == 1
    assert capsys.readouterr().out == "differs: routing of five tasks\ndiffers: coverage\n"


@pytest.mark.parametrize(
    "block, reason",
    [
        ("<!-- results: speed of light -->\n<!-- end -->\n", "no table is called 'speed of light'"),
        ("<!-- results: memory -->\n", "has no <!-- end -->"),
        ("<!-- results: memory -->\n<!-- results: memory -->\n<!-- end -->\n", "has no <!-- end -->"),
    ],
)
def test_a_block_that_cannot_be_written_is_an_error(tool, copy, capsys, block, reason):
    copy.write_text(copy.read_text() + block)
    before = copy.read_text()
    assert tool.main([]) == 2
    assert reason in capsys.readouterr().err
    assert copy.read_text() == before


def test_results_of_two_machines_do_not_share_a_caption(tool):
    with pytest.raises(ValueError, match="of several machines"):
        tool.decoding_on("cpu_decode_smol", "cpu_avx2_decode_smol")


def test_numbers_are_those_of_the_files(tool):
    row = next(line for line in tool.decoding().splitlines() if line.startswith("| smol, 8 rows"))
    record = next(
        r for r in tool.load("cpu_decode_smol")["results"] if (r["rows"], r["targets"]) == (8, "all")
    )
    assert f"| {record['milliseconds']['frozen']:.1f} |" in row
    assert f"| {record['added_percent']:+.1f}% |" in row and f"| {record['floor_percent']:.1f}% |" in row


@pytest.mark.parametrize("section, name", [("model", "whole models"), ("mixture", "mixture")])
def test_a_contender_without_a_column_is_named(tool, copy, section, name):
    path = tool.RESULTS / f"{tool.SUITE}.json"
    result = json.loads(path.read_text())
    record = next(record for record in result["results"] if record["section"] == section)
    record["contenders"]["another"] = {"seconds": 1.0}
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="no column for another"):
        tool.TABLES[name]()
