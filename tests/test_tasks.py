import gzip
import json
import sys
from collections import Counter

import pytest

from slm_fast.continual.hub import load_hub_task
from slm_fast.continual.tasks import (
    Example,
    Task,
    as_classification,
    as_text,
    load_jsonl_tasks,
    load_tasks,
    score,
    text_scores,
    training_of,
)
from slm_fast.prompts import Prompt
from slm_fast.trainer import default_arguments


def write_rows(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def labelled(count, labels=("red", "blue"), word="text"):
    return [{"text": f"{word} {i}", "label_text": labels[i % len(labels)]} for i in range(count)]


def test_train_and_test_files_plain_and_gzip(tmp_path):
    write_rows(tmp_path / "colour.train.jsonl.gz", labelled(6))
    write_rows(tmp_path / "colour.test.jsonl", labelled(2, word="other"))
    (task,) = load_jsonl_tasks(tmp_path)
    assert (task.name, task.kind, task.metric) == ("colour", "classification", "accuracy")
    assert task.labels == ["blue", "red"]
    assert task.train[1] == Example("text 1", "blue") and len(task.train) == 6
    assert [row.text for row in task.test] == ["other 0", "other 1"]
    assert task.source == f"jsonl:{tmp_path}"


@pytest.mark.parametrize("where", ["beside", "parent"])
def test_index_names_integer_labels_and_orders_them(tmp_path, where):
    folder = tmp_path / "group"
    folder.mkdir()
    index = {"tasks": {"colour": {"labels": ["red", "blue", "never used"]}}}
    (folder if where == "beside" else tmp_path).joinpath("index.json").write_text(json.dumps(index))
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(4)]
    write_rows(folder / "colour.train.jsonl", rows)
    write_rows(folder / "colour.test.jsonl", rows[:1])
    (task,) = load_jsonl_tasks(folder)
    assert task.labels == ["red", "blue"]
    assert [row.target for row in task.train] == ["red", "blue", "red", "blue"]


def test_integer_labels_without_an_index_become_strings(tmp_path):
    write_rows(tmp_path / "n.train.jsonl", [{"text": "a", "label": 7}, {"text": "b", "label": 3}])
    write_rows(tmp_path / "n.test.jsonl", [{"text": "c", "label": 7}])
    assert load_jsonl_tasks(tmp_path)[0].labels == ["3", "7"]


def test_one_file_is_split_the_same_way_every_time(tmp_path):
    rows = labelled(50, ("a", "b", "c", "d", "e"))
    write_rows(tmp_path / "one.jsonl", rows + rows[:5])  # five texts twice
    first, second = load_jsonl_tasks(tmp_path)[0], load_tasks(str(tmp_path), ["one"])[0]
    assert first == second
    assert len(first.train) + len(first.test) == 55 and len(first.test) in range(8, 14)
    assert set(first.labels) == {row.target for row in first.test} == {row.target for row in first.train}
    assert not {row.text for row in first.train} & {row.text for row in first.test}


def test_validation_files_are_no_tasks(tmp_path):
    for part in ("train", "test", "valid"):
        write_rows(tmp_path / f"t.{part}.jsonl", labelled(4))
    assert [task.name for task in load_jsonl_tasks(tmp_path)] == ["t"]


def test_generation_rows(tmp_path):
    rows = [
        {"instruction": "Translate.", "input": "chat", "output": "cat"},
        {"instruction": "", "input": "chien", "output": "dog"},
        {"instruction": "Greet.", "output": "hello"},
    ]
    write_rows(tmp_path / "g.train.jsonl", rows)
    write_rows(tmp_path / "g.test.jsonl", rows[:1])
    long_answer = {"prompt": "Why?", "completion": "because of many things that happened before"}
    write_rows(tmp_path / "long.train.jsonl", [long_answer])
    write_rows(tmp_path / "long.test.jsonl", [long_answer])
    short, long = load_jsonl_tasks(tmp_path)
    assert short.kind == "generation" and short.labels is None and short.metric == "accuracy"
    assert [row.text for row in short.train] == ["Translate.\nchat", "chien", "Greet."]
    assert long.train[0] == Example("Why?", long_answer["completion"]) and long.metric == "token_f1"


def test_instruction_and_input_apart(tmp_path):
    rows = [
        {"instruction": "Translate.", "input": "chat", "output": "cat"},
        {"instruction": "", "input": "chien", "output": "dog"},
        {"instruction": "Greet.", "output": "hello"},
        {"prompt": "Why?", "completion": "because"},
    ]
    write_rows(tmp_path / "g.jsonl", rows)
    (task,) = load_jsonl_tasks(tmp_path, two_parts=True)
    found = {row.target: row for row in task.train + task.test}
    assert found["cat"] == Example(Prompt("chat", "Translate."), "cat")
    assert found["cat"].text.encode() == b"Translate. ### chat"
    assert all(type(found[target].text) is str for target in ("dog", "hello", "because"))
    # equality and identity know the parts
    same = [
        Example(Prompt("b", "a"), "t"),
        Example("a ### b", "t"),
        Example(Prompt("y ### b", "a ### x"), "t"),
    ]
    same.append(Example(Prompt("x ### y ### b", "a"), "t"))
    assert len(set(same)) == len({tuple(row.content()) for row in same}) == 4
    assert same[1].content() == ["a ### b", "t"]


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"text": "x", ', r"t\.train\.jsonl, line 2: invalid JSON"),
        ("[1]", r"line 2: a row must be a JSON object, got list"),
        ({"text": "x"}, r"line 2: missing fields: .* got text"),
        ({"text": 5, "label": "a"}, r"line 2: text must be a string, got int"),
        ({"text": "x", "label": 1.5}, r"line 2: a label must be a string or an integer, got float"),
        ({"text": "x", "label": None}, r"line 2: a label must be .* got NoneType"),
        ({"prompt": "p", "completion": "c"}, r"line 2: classification and generation rows in one file"),
        ({"instruction": "", "input": "", "output": "c"}, r"line 2: the prompt is empty"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, row, message):
    write_rows(tmp_path / "t.train.jsonl", [*labelled(1), row])
    write_rows(tmp_path / "t.test.jsonl", labelled(1))
    with pytest.raises(ValueError, match=message):
        load_jsonl_tasks(tmp_path)


def test_bad_folders_and_names(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        load_jsonl_tasks(tmp_path / "absent")
    with pytest.raises(ValueError, match="there is no folder"):
        load_tasks("./absent")
    with pytest.raises(ValueError, match="holds no NAME"):
        load_jsonl_tasks(tmp_path)
    write_rows(tmp_path / "t.train.jsonl", labelled(2))
    with pytest.raises(ValueError, match=r"has no t\.test\.jsonl"):
        load_jsonl_tasks(tmp_path)
    write_rows(tmp_path / "t.test.jsonl", [])
    with pytest.raises(ValueError, match=r"t\.test\.jsonl is empty"):
        load_jsonl_tasks(tmp_path)
    write_rows(tmp_path / "t.test.jsonl", [*labelled(2), {"text": "x", "label_text": "green"}])
    with pytest.raises(ValueError, match=r"t\.test\.jsonl, line 3: label 'green' does not occur in training"):
        load_jsonl_tasks(tmp_path)
    with pytest.raises(ValueError, match="no task 'u' in .*, which has t"):
        load_jsonl_tasks(tmp_path, ["u"])
    (tmp_path / "t.test.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "t.test.jsonl").unlink()
    with pytest.raises(ValueError, match="not readable"):
        load_jsonl_tasks(tmp_path)


def test_label_outside_the_index(tmp_path):
    (tmp_path / "index.json").write_text('{"tasks": {"t": {"labels": ["a", "b"]}}}')
    write_rows(tmp_path / "t.jsonl", [{"text": "x", "label": 2}])
    with pytest.raises(ValueError, match=r"line 1: label 2 is outside the 2 labels"):
        load_jsonl_tasks(tmp_path)


def test_subset_is_deterministic_and_keeps_the_shares():
    train = [
        Example(f"{label}{i}", label) for label, n in (("a", 60), ("b", 30), ("c", 10)) for i in range(n)
    ]
    task = Task("t", train, train[:5], labels=["a", "b", "c"])
    small = task.subset(20, seed=3)
    assert small == task.subset(20, seed=3) and small.train != task.subset(20, seed=4).train
    assert Counter(row.target for row in small.train) == {"a": 12, "b": 6, "c": 2}
    assert small.test == task.test and small.labels == task.labels and len(task.train) == 100
    assert {row.target for row in task.subset(3).train} == {"a", "b", "c"}
    assert len(task.subset(1000, 2).test) == 2
    with pytest.raises(ValueError, match="at least 1 row"):
        task.subset(0)


def test_labels_as_text():
    rows = [Example("it {shines}", "good"), Example("it rains", "bad")]
    task = Task("mood", rows, rows[:1], labels=["bad", "good"], source="here")
    text = as_text(task, "Is it {labels}?\n{text}")
    assert text.kind == "generation" and text.metric == "accuracy" and text.source == "here"
    assert text.train == [
        Example("Is it bad, good?\nit {shines}", "good"),
        Example("Is it bad, good?\nit rains", "bad"),
    ]
    assert text.test == text.train[:1] and task.labels == ["bad", "good"]
    assert as_text(task).train == rows
    assert as_text(text, "again {text}") is text  # asks already
    for prompt in ("no text", "{labels}", "{text} {other}", "{text} {}"):
        with pytest.raises(ValueError, match="prompt must hold {text}"):
            as_text(task, prompt)


def test_few_answers_as_labels():
    rows = [Example("up?", "positive"), Example("down?", "negative")]
    task = as_classification(Task("t", rows, rows[1:], metric="token_f1"))
    assert task.labels == ["negative", "positive"] and task.metric == "accuracy"
    assert as_classification(task) is task
    with pytest.raises(ValueError, match="test answer 'sideways' does not occur in training"):
        as_classification(Task("t", rows, [Example("?", "sideways")]))
    free = [Example("why", f"because {i}") for i in range(30)]
    with pytest.raises(
        ValueError, match="task 'free' has 30 different answers, .* at most 20: free text needs"
    ):
        as_classification(Task("free", free, free))


def test_unknown_metric():
    with pytest.raises(ValueError, match="accuracy, first_word, token_f1, bertscore, got 'bleu'"):
        Task("t", [], [], metric="bleu")


def test_scores():
    task = Task("t", [], [], metric="accuracy")
    assert score(task, [" New  York ", "Rome", "oslo"], ["new york", "Paris", "Oslo"]) == pytest.approx(2 / 3)
    f1 = Task("t", [], [], metric="token_f1")
    assert score(f1, ["the Cat sat."], ["cat"]) == pytest.approx(2 / 3)
    assert score(f1, ["a dog dog"], ["dog dog cat"]) == pytest.approx(0.8)
    assert score(f1, ["", "x", ""], ["", "", "x"]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="got 1 for 2"):
        score(f1, ["x"], ["x", "y"])
    with pytest.raises(ValueError, match="nothing to score"):
        score(f1, [], [])


def test_first_words():
    """The authors' rule: punctuation becomes spaces, then the first word counts."""
    task = Task("t", [], [], metric="first_word")
    for answer, target, right in (
        ("B) because of the war", "B", 1),
        ("B", "B", 1),
        ("(B)", "B", 1),
        ("positive.", "positive", 1),
        (" Positive", "positive", 1),
        ("positive\nnegative", "positive", 1),
        ("The answer is B", "B", 0),
        ("Because", "B", 0),
        ("negative", "positive", 0),
        ("non-positive", "positive", 0),
        ("", "positive", 0),
        ("...", "positive", 0),
        ("...", "...", 0),
    ):
        assert score(task, [answer], [target]) == right, answer
    assert score(task, ["A.", "B"], ["A", "C"]) == 0.5


def test_all_scores_of_long_answers(monkeypatch):
    import slm_fast.continual.bertscore as bertscore

    monkeypatch.setattr(bertscore, "bert_scores", lambda predictions, targets: [0.25] * len(targets))
    for metric in ("token_f1", "bertscore"):
        found = text_scores(Task("t", [], [], metric=metric), ["a cat sat"], ["cat"])
        assert found == {"token_f1": pytest.approx(2 / 3), "bertscore": 0.25}
    assert text_scores(Task("t", [], [], metric="first_word"), ["B"], ["B"]) == {}

    def missing(predictions, targets):
        raise OSError("the model 'minilm' comes with a package")

    monkeypatch.setattr(bertscore, "bert_scores", missing)
    assert text_scores(Task("t", [], [], metric="token_f1"), ["cat"], ["cat"]) == {"token_f1": 1.0}
    with pytest.raises(OSError, match="minilm"):
        text_scores(Task("t", [], [], metric="bertscore"), ["cat"], ["cat"])


def test_training_arguments_of_single_tasks(tmp_path):
    args = default_arguments(str(tmp_path), num_train_epochs=6, learning_rate=1e-3)
    rows = [Example("a", "b")]
    plain, history = Task("p", rows, rows), Task("h", rows, rows, training={"num_train_epochs": 3})
    other = Task("o", rows, rows, training={"num_train_epochs": 3, "learning_rate": 0.5})
    for tasks, expected in (
        ([plain], (6, 1e-3)),
        ([history], (3, 1e-3)),
        ([other], (3, 0.5)),
        ([history, other], (3, 1e-3)),
        ([history, plain], (6, 1e-3)),
    ):
        with training_of(tasks, args):
            assert (args.num_train_epochs, args.learning_rate) == expected
        assert (args.num_train_epochs, args.learning_rate) == (6, 1e-3)
    with pytest.raises(RuntimeError, match="stopped"), training_of([other], args):
        raise RuntimeError("stopped")
    assert (args.num_train_epochs, args.learning_rate) == (6, 1e-3)


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="datasets is not installed")


def colour_split(datasets, count, word="text"):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["red", "blue"])}
    )
    rows = {"sentence": [f"{word} {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_saved_dataset_with_validation_split(tmp_path, datasets):
    parts = {"train": colour_split(datasets, 8), "validation": colour_split(datasets, 4, "held")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "colours")
    (task,) = load_tasks(tmp_path / "colours")
    assert task.name == "colours" and task.labels == ["red", "blue"]
    assert task.train[1] == Example("text 1", "blue") and len(task.test) == 4
    with pytest.raises(ValueError, match="no column body but sentence, label: name it with text_column="):
        load_hub_task(tmp_path / "colours", text_column="body")
    with pytest.raises(ValueError, match="no task 'x' in .*, which has colours"):
        load_tasks(tmp_path / "colours", ["x"])


def test_single_saved_split_is_divided(tmp_path, datasets):
    colour_split(datasets, 20).save_to_disk(tmp_path / "one")
    task = load_hub_task(tmp_path / "one", task_name="mine")
    assert task.name == "mine" and Counter(row.target for row in task.test) == {"red": 2, "blue": 2}


def test_folder_that_datasets_reads(tmp_path, datasets, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "csv"
    folder.mkdir()
    lines = [f"text {i},{'yes' if i % 2 else 'no'}" for i in range(6)]
    (folder / "train.csv").write_text("\n".join(["body,answer", *lines]) + "\n")
    (folder / "test.csv").write_text("\n".join(["body,answer", *lines[:2]]) + "\n")
    task = load_hub_task(folder, text_column="body", label_column="answer")
    assert task.labels == ["no", "yes"] and len(task.train) == 6 and len(task.test) == 2


def test_missing_datasets_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"slm_fast\[train\]"):
        load_tasks("hub:anything")
