import json
from collections import Counter

import pytest

from slm_fast.continual.benchmarks import (
    BENCHMARKS,
    answer_tokens,
    find_benchmark,
    load_benchmark,
    task_table,
)
from slm_fast.continual.hub import load_hub_task
from slm_fast.continual.sources import SOURCES, load_source
from slm_fast.continual.tables import format_table
from slm_fast.continual.tasks import Example, Task, as_text


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Saves data sets where they are looked for before the Hub is: under their names, in this folder."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLM_FAST_DATA", raising=False)

    def save(name, splits, classes=None):
        """splits: {split: rows as dicts}; classes: {column: names of its integers}."""
        parts = {}
        for split, rows in splits.items():
            part = datasets.Dataset.from_list(rows)
            for column, names in (classes or {}).items():
                part = part.cast_column(column, datasets.ClassLabel(names=names))
            parts[split] = part
        datasets.DatasetDict(parts).save_to_disk(tmp_path / name)

    return save


def write_local(folder, local, rows):
    path = folder / local
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        with open(f"{path}.{part}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def test_orders_are_the_papers_and_hold_every_task():
    assert BENCHMARKS["bert5"].orders == {
        "4": ("ag", "yelp", "amazon", "yahoo", "dbpedia"),
        "5": ("yelp", "yahoo", "amazon", "dbpedia", "ag"),
        "6": ("dbpedia", "yahoo", "ag", "amazon", "yelp"),
        "7": ("yelp", "ag", "dbpedia", "amazon", "yahoo"),
    }
    sizes = {"bert5": 5, "t5_fewshot": 3, "llama3": 3, "seq15": 15, "all25": 25}
    assert set(BENCHMARKS) == set(sizes)
    for name, benchmark in BENCHMARKS.items():
        orders = list(benchmark.orders.values())
        assert all(sorted(order) == sorted(set(orders[0])) for order in orders)
        assert len(orders[0]) == sizes[name] and len(set(orders)) == len(orders)
        assert all(benchmark.sources.get(task, task) in SOURCES for task in orders[0])
        assert set(benchmark.scoring) <= set(orders[0])


def test_hyperparameters_of_the_paper_and_ours():
    paper = find_benchmark("bert5").hyperparameters("paper")
    assert (paper["base"], paper["rank"], paper["top_k"]) == ("bert-base-uncased", 12, 4)
    assert paper["target"] == "attention.output.dense"
    llama = find_benchmark("llama3").hyperparameters("paper")
    assert (llama["rank"], llama["top_k"], llama["entries"]) == (8, 2, 4)
    t5, ours = (find_benchmark("t5_fewshot").hyperparameters(whose) for whose in ("paper", "ours"))
    assert t5["learning_rate"] == ours["learning_rate"]  # was not published
    assert find_benchmark("bert5").hyperparameters()["target"] == "all-linear"
    with pytest.raises(ValueError, match='"ours" or "paper", got \'theirs\''):
        find_benchmark("bert5").hyperparameters("theirs")


def test_a_data_folder_in_every_order_and_size(benchmark_data):
    tasks = load_benchmark("bert5", "6", benchmark_data, max_train=50, max_test=20)
    assert [task.name for task in tasks] == ["dbpedia", "yahoo", "ag", "amazon", "yelp"]
    assert all(len(task.train) == 50 and len(task.test) == 20 for task in tasks)
    assert all(task.source == f"jsonl:{benchmark_data}/bert5" for task in tasks)
    assert [len(task.labels) for task in tasks] == [14, 10, 4, 5, 5]
    assert [t.name for t in load_benchmark("bert5", data=benchmark_data, tasks=["dbpedia", "ag"])] == [
        "ag",
        "dbpedia",
    ]
    again = load_benchmark("bert5", "6", benchmark_data, 50, 20, seed=1)
    assert again[0].train != tasks[0].train


def test_few_shot_draws_are_text_and_follow_the_seed(benchmark_data):
    draws = [load_benchmark("t5_fewshot", data=benchmark_data, seed=seed) for seed in range(3)]
    for tasks in draws:
        assert [task.name for task in tasks] == ["dbpedia", "amazon", "ag"]
        assert all(task.kind == "generation" and task.metric == "accuracy" for task in tasks)
        assert set(Counter(row.target for row in tasks[2].train).values()) == {16}
    assert draws[0][2].train != draws[1][2].train != draws[2][2].train
    heads = load_benchmark("t5_fewshot", data=benchmark_data, generates=False)
    assert sorted(heads[2].labels) == ["business", "science", "sports", "world"]
    with pytest.raises(
        OSError, match="task 'fewshot16/dbpedia' is not in .*, and fancyzhx/dbpedia_14 could not"
    ):
        load_benchmark("t5_fewshot", data=benchmark_data, seed=7)


def test_kinds_of_base_models(benchmark_data):
    asked = load_benchmark("seq15", data=benchmark_data, max_train=10, max_test=10, generates=True)
    assert len(asked) == 15 and all(task.labels is None for task in asked)
    mnli = asked[0]
    assert mnli.train[0].text.startswith(
        "What is the logical relation of sentence 1 to sentence 2? Choose one"
    )
    assert "neutral, entailment, contradiction.\nsentence 1: " in mnli.train[0].text
    assert mnli.train[0].target in ("neutral", "entailment", "contradiction")

    finance, history, medical = load_benchmark("llama3", data=benchmark_data)
    assert (finance.metric, history.metric, medical.metric) == ("accuracy", "accuracy", "token_f1")
    heads = load_benchmark("llama3", data=benchmark_data, generates=False, tasks=["finance", "history"])
    assert [task.labels for task in heads] == [["negative", "neutral", "positive"], ["A", "B", "C", "D"]]
    with pytest.raises(
        ValueError, match="'medical' has 1[0-9]+ different answers, .* a base model that gener"
    ):
        load_benchmark("llama3", data=benchmark_data, generates=False)


def test_the_folder_can_come_from_the_environment(tmp_path, monkeypatch):
    write_local(
        tmp_path, "extra/trec6", [{"text": "how far?", "label": "NUM"}, {"text": "who?", "label": "HUM"}]
    )
    monkeypatch.setenv("SLM_FAST_DATA", str(tmp_path))
    assert load_source("trec6").source == f"jsonl:{tmp_path}/extra"
    monkeypatch.setenv("SLM_FAST_DATA", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="there is no data folder .*gone"):
        load_source("trec6")


def test_what_the_folder_lacks_comes_from_the_hub(tmp_path, hub):
    data = tmp_path / "data"
    names = ("World", "Sports", "Business", "Sci/Tech")
    rows = [{"text": f"news {i}", "label": i % 4} for i in range(8)]
    hub("fancyzhx/ag_news", {"train": rows, "test": rows[:4]}, {"label": list(names)})
    write_local(
        data, "bert5/yelp", [{"text": "nice", "label": "positive"}, {"text": "ugh", "label": "negative"}]
    )
    ag, yelp = load_benchmark("bert5", data=data, tasks=["ag", "yelp"])
    assert ag.source == "hub:fancyzhx/ag_news" and yelp.source == f"jsonl:{data}/bert5"
    assert ag.labels == ["World", "Sports", "Business", "Science or Technology"]
    assert ag.train[3] == Example("news 3", "Science or Technology") and len(ag.test) == 4
    table = format_table(task_table([ag, as_text(yelp)], {"yelp": "stars", "ag": "not its own"}))
    assert table.splitlines()[1].split() == [
        "ag",
        "8",
        "4",
        "4",
        "labels",
        "accuracy",
        "hub:fancyzhx/ag_news",
    ]
    assert " stars " in table.splitlines()[2]


def test_hub_rows_of_several_columns(hub):
    rows = [{"premise": f"p{i}", "hypothesis": "h", "label": i % 3} for i in range(6)]
    hidden = [row | {"label": -1} for row in rows]
    classes = {"label": ["entailment", "neutral", "contradiction"]}
    hub("nyu-mll/glue/mnli", {"train": rows, "validation_matched": rows[:3], "test": hidden}, classes)
    mnli = load_source("mnli")
    assert mnli.train[1] == Example("sentence 1: p1 sentence 2: h", "neutral")
    assert len(mnli.test) == 3 and mnli.labels == classes["label"]

    rows = [{"class_index": 1 + i % 5, "review_title": "T", "review_text": f"r{i}"} for i in range(10)]
    hub(
        "yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes",
        {"train": rows, "test": rows},
    )
    amazon = load_source("amazon")
    assert amazon.labels == ["very negative", "negative", "neutral", "positive", "very positive"]
    assert amazon.train[9] == Example("T. r9", "very positive")


def test_hub_rows_for_generation(hub):
    text = "### Instruction: Judge. ### Human: Profit rose {i}%. ### Assistant: {answer}"
    rows = [{"text": text.format(i=i, answer="positive" if i % 2 else "neutral")} for i in range(10)]
    hub("AdiOO7/llama-2-finance", {"train": rows})
    finance = load_source("finance")
    assert finance.labels is None and finance.metric == "accuracy"
    assert {len(finance.train), len(finance.test)} == {8, 2}
    whole = sorted((finance.train + finance.test), key=lambda row: row.text)
    assert whole[1].text == "Judge.\nProfit rose 1%."

    for config in (
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "prehistory",
    ):
        rows = [{"question": f"{config} {i}?", "choices": ["x", "y"], "answer": i % 2} for i in range(5)]
        hub(f"cais/mmlu/{config}", {"test": rows[:3], "dev": rows[3:]}, {"answer": ["A", "B", "C", "D"]})
    history = load_source("history")
    assert (len(history.train), len(history.test)) == (16, 4)
    asked = {row.text: row.target for row in history.train + history.test}
    assert asked["Question:prehistory 3?\n Choices:['x', 'y']\n"] == "B"


def test_few_shots_drawn_from_the_hub(hub):
    rows = [{"text": f"news {i}", "label": i % 4} for i in range(160)]
    hub(
        "fancyzhx/ag_news",
        {"train": rows, "test": rows[:20]},
        {"label": ["World", "Sports", "Business", "Sci"]},
    )
    (ag,) = load_benchmark("t5_fewshot", tasks=["ag"])
    assert Counter(row.target for row in ag.train) == dict.fromkeys(
        ("world", "sports", "business", "science"), 16
    )
    assert ag.train != load_benchmark("t5_fewshot", tasks=["ag"], seed=1)[0].train


def test_large_splits_are_drawn_and_the_source_says_so(hub):
    hub("large", {"train": [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(50)], "test": [
        {"text": "x", "label": "a"}]})  # fmt: skip
    task = load_hub_task("large", max_rows=20, seed=3)
    assert len(task.train) == 20 and task.source == "hub:large, 20 rows drawn from a split"
    assert task.train == load_hub_task("large", max_rows=20, seed=3).train
    assert task.train != load_hub_task("large", max_rows=20, seed=4).train
    assert load_hub_task("large", max_rows=50).source == "hub:large"
    assert load_hub_task("large", labels={"b": "B", "a": "A"}).labels == ["B", "A"]
    only = load_hub_task("large", labels={"a": "A"})
    assert only.labels == ["A"] and len(only.train) == 25
    with pytest.raises(ValueError, match="there is no column 'title', only text, label"):
        load_hub_task("large", template="{title} {text}")
    with pytest.raises(ValueError, match="there is no column 'answer', only text, label"):
        load_hub_task("large", pattern="t(?P<number>[0-9]+)", label_column="answer")
    numbers = load_hub_task("large", pattern="(?P<number>[0-9]*)$", template="{number}", label_column="label")
    assert numbers.train[0] == Example("0", "a")
    with pytest.raises(ValueError, match="column text does not match .*: 't0'"):
        load_hub_task("large", pattern="(?P<label>[0-9]{3})", label_column="label")


def test_what_is_nowhere(tmp_path, hub):
    with pytest.raises(
        OSError, match="'ag' is not in a data folder .none was given.*fancyzhx/ag_news could not"
    ):
        load_source("ag")
    with pytest.raises(OSError, match=f"'science_aux' is not in {tmp_path}, and nothing equal is known"):
        load_source("science_aux", tmp_path)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown benchmark 'bert'; known: bert5, "):
        load_benchmark("bert")
    with pytest.raises(ValueError, match="bert5 has the orders 4, 5, 6, 7, got '8'"):
        load_benchmark("bert5", "8")
    with pytest.raises(ValueError, match="bert5 has no task 'sst2', only ag, yelp"):
        load_benchmark("bert5", tasks=["sst2"])
    with pytest.raises(ValueError, match="unknown task 'nope'; known: ag, "):
        load_source("nope")


def test_tokens_for_the_longest_answer():
    def tokenizer(text, add_special_tokens):
        return {"input_ids": text.split()}

    text = Task("t", [Example("q", "one"), Example("q", "one two three")], [])
    assert answer_tokens(tokenizer, [text]) == 4 and answer_tokens(tokenizer, [text], limit=2) == 2
    assert answer_tokens(tokenizer, [Task("c", text.train, [], labels=["one"])]) == 1
