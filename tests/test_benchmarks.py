import json
import sys
from collections import Counter

import pytest

from slm_fast import SLMConfig
from slm_fast.continual.benchmarks import (
    BENCHMARKS,
    answer_tokens,
    find_benchmark,
    load_benchmark,
    score_names,
    task_table,
)
from slm_fast.continual.hub import load_hub_task
from slm_fast.continual.sources import SOURCES, load_source
from slm_fast.continual.tables import format_table
from slm_fast.continual.tasks import Example, Task, as_classification, as_text
from slm_fast.loading import PACKAGED
from slm_fast.prompts import Prompt, plain_text


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
    training = ("epochs", "learning_rate", "batch_size", "max_length")
    assert [paper[name] for name in training] == [5, 2e-4, 32, 450]
    llama = find_benchmark("llama3").hyperparameters("paper")
    assert (llama["rank"], llama["top_k"], llama["entries"]) == (8, 2, 4)
    t5, ours = (find_benchmark("t5_fewshot").hyperparameters(whose) for whose in ("paper", "ours"))
    assert t5["learning_rate"] == ours["learning_rate"]  # was not published
    assert (t5["base"], ours["base"]) == ("google-t5/t5-large", "smollm2") and ours["base"] in PACKAGED
    keys = dict(num_groups=6, key_learning_rate=1e-3, key_epochs=3, key_batch_size=8)
    assert t5["key_learning"] == paper["key_learning"] == keys and t5["entries"] == 4
    assert ours["key_learning"] == ours["per_task"] == {}
    theirs = SLMConfig.paper()
    assert all(getattr(theirs, name) == value for name, value in llama["key_learning"].items())
    assert find_benchmark("bert5").hyperparameters()["target"] == "all-linear"
    with pytest.raises(ValueError, match='"ours" or "paper", got \'theirs\''):
        find_benchmark("bert5").hyperparameters("theirs")
    for name in ("seq15", "all25"):
        with pytest.raises(ValueError, match="the paper has no hyper-parameters for this benchmark"):
            find_benchmark(name).hyperparameters("paper")


def test_hyperparameters_of_single_tasks(benchmark_data):
    llama3 = find_benchmark("llama3")
    own = llama3.hyperparameters("paper")["per_task"]
    assert own == {"history": {"epochs": 3, "batch_size": 64}}
    assert llama3.hyperparameters("paper", given=["epochs"])["per_task"] == {"history": {"batch_size": 64}}
    assert llama3.hyperparameters("paper", given=["epochs", "batch_size"])["per_task"] == {}
    limits = dict(data=benchmark_data, max_train=10, max_test=10)
    finance, history, medical = load_benchmark("llama3", **limits, per_task=own)
    assert history.training == {"num_train_epochs": 3, "per_device_train_batch_size": 64}
    assert as_classification(history).training == history.training
    assert finance.training == medical.training == load_benchmark("llama3", **limits)[1].training == {}
    with pytest.raises(ValueError, match="per_task has no task 'ag' among finance, history, medical"):
        load_benchmark("llama3", **limits, per_task={"ag": {"epochs": 1}})
    with pytest.raises(
        ValueError, match="its own epochs, learning_rate, batch_size, got 'rank' for 'history'"
    ):
        load_benchmark("llama3", **limits, per_task={"history": {"rank": 1}})


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
    assert (finance.metric, history.metric, medical.metric) == ("first_word", "first_word", "token_f1")
    assert score_names([finance, history, medical], BENCHMARKS["llama3"].scoring) == {
        "finance": "accuracy (first word)",
        "history": "accuracy (first word)",
        "medical": "token F1 (the paper: BERTScore and a judge model)",
    }
    heads = load_benchmark("llama3", data=benchmark_data, generates=False, tasks=["finance", "history"])
    assert [task.labels for task in heads] == [["negative", "neutral", "positive"], ["A", "B", "C", "D"]]
    assert {task.metric for task in heads} == {"accuracy"}
    with pytest.raises(
        ValueError, match="'medical' has 1[0-9]+ different answers, .* a base model that gener"
    ):
        load_benchmark("llama3", data=benchmark_data, generates=False)


def test_the_papers_prompts_and_those_of_the_stream_of_all_tasks(benchmark_data):
    finance, history, medical = load_benchmark("llama3", data=benchmark_data)
    for task, instruction in ((finance, "Analyze the sentiment of "), (medical, "If you are a doctor, ")):
        for row in task.train + task.test:
            assert row.text.system.startswith(instruction)
            assert f"{row.text}" == f"{row.text.system} ### {row.text.user}"
    assert all(type(row.text) is str and row.text.startswith("Question:") for row in history.test)
    names = ["finance", "history", "medical"]
    stream = {task.name: task for task in load_benchmark("all25", data=benchmark_data, tasks=names)}
    assert [stream[name].metric for name in names] == ["accuracy", "accuracy", "token_f1"]
    for task in (finance, history, medical):
        assert [plain_text(row.text) for row in task.test] == [row.text for row in stream[task.name].test]
        assert all(type(row.text) is str for row in stream[task.name].test)


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
    papers = load_source("llama3/finance")
    assert papers.name == "finance" and papers.metric == "first_word"
    assert sorted(papers.train + papers.test, key=lambda row: row.text)[1].text == Prompt(
        "Profit rose 1%.", "Judge."
    )
    hub(
        "LinhDuong/chatdoctor-200k",
        {
            "train": [
                {"instruction": "Be a doctor.", "input": f"pain {i}", "output": "rest"} for i in range(5)
            ]
        },
    )
    assert {row.text.system for row in load_source("llama3/medical").train} == {"Be a doctor."}
    assert {type(row.text) for row in load_source("medical").train} == {str}

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
    with pytest.raises(
        OSError,
        match=f"'science_aux' is not in {tmp_path} .instruct/science_aux.train.*, and nothing equal is known "
        "on the Hub: it comes from a data folder only",
    ):
        load_source("science_aux", tmp_path)


def test_all_missing_tasks_are_named_at_once(tmp_path, hub, monkeypatch):
    rows = [{"text": f"news {i}", "label": i % 2} for i in range(4)]
    hub("stanfordnlp/imdb", {"train": rows, "test": rows}, {"label": ["Bad", "Good"]})
    datasets = pytest.importorskip("datasets")

    def gone(name, *_, **__):
        raise FileNotFoundError(f"no {name} on this Hub")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    names = ["imdb", "clinc150", "science_aux"]
    with pytest.raises(OSError) as raised:
        load_benchmark("all25", data=tmp_path, tasks=names)
    first, clinc, science = str(raised.value).splitlines()
    assert first == "2 of the 3 tasks of all25 are missing:"
    assert (
        f"'clinc150' is not in {tmp_path} (extra/clinc150.train.jsonl[.gz]), and FastFit/clinc_150" in clinc
    )
    assert clinc.endswith("could not be loaded: no FastFit/clinc_150 on this Hub")
    assert "'science_aux'" in science and "from a data folder only" in science
    assert [task.name for task in load_benchmark("all25", data=tmp_path, tasks=["imdb"])] == ["imdb"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OSError, match=r"1 of the 1 tasks[^$]*'ag' is not in[^$]*install 'slm_fast.train"):
        load_benchmark("bert5", data=tmp_path, tasks=["ag"])


def test_data_sets_that_are_scripts_come_from_the_hubs_copy(tmp_path, hub, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"premise": f"p{i}", "hypothesis": "h", "label": i % 2} for i in range(6)]
    classes = {"label": ["entailment", "contradiction"]}
    hub("copy", {"train": rows, "validation": rows[:2]}, classes)
    calls = []

    def load(name, config=None, **options):
        calls.append((name, config, options))
        if not options:
            raise RuntimeError(f"Dataset scripts are no longer supported, but found {name}.py")
        return datasets.load_from_disk(tmp_path / "copy")

    monkeypatch.setattr(datasets, "load_dataset", load)
    cb = load_source("cb")
    assert cb.source == "hub:aps/super_glue" and cb.labels == classes["label"] and len(cb.test) == 2
    copy = {"data_dir": "cb", "revision": "refs/convert/parquet"}
    assert calls == [("aps/super_glue", "cb", {}), ("aps/super_glue", None, copy)]
    load_hub_task("old", template="{premise}")
    assert calls[-1] == ("old", None, copy | {"data_dir": "default"})

    def without_a_copy(name, config=None, **options):
        if not options:
            raise RuntimeError("Dataset scripts are no longer supported")
        raise ValueError("no such revision")

    monkeypatch.setattr(datasets, "load_dataset", without_a_copy)
    with pytest.raises(
        OSError, match="'cb' is not .*scripts are no longer.*refs/convert/parquet: no such rev"
    ):
        load_source("cb")

    def broken(name, config=None, **options):
        calls.append((name, config, options))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    calls.clear()
    with pytest.raises(OSError, match="could not be loaded: out of memory"):
        load_source("cb")
    assert len(calls) == 1


def test_a_config_of_the_hubs_copy_is_a_folder(tmp_path, monkeypatch):
    """What `datasets` makes of the copy's layout, without its revision, which a folder on disk has not."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    real = datasets.load_dataset
    for config in ("cb", "rte", "default"):
        for split in ("train", "test"):
            folder = tmp_path / "copy" / config / split
            folder.mkdir(parents=True)
            rows = [{"text": f"{config} {split} {i}", "label": i % 2} for i in range(2)]
            datasets.Dataset.from_list(rows).to_parquet(folder / "0000.parquet")

    def load(name, config=None, revision=None, **options):
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported")
        return real(str(tmp_path / "copy"), config, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for config, folder in (("cb", "cb"), (None, "default")):
        task = load_hub_task("scripted", config=config)
        assert [row.text for row in task.train + task.test] == [
            f"{folder} {split} {i}" for split in ("train", "test") for i in range(2)
        ]


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
