"""Benchmarks of continual learning as data: tasks, orders, hyper-parameters and scoring.

    tasks = load_benchmark("bert5", order="4")

Orders have the numbers of their papers. Every benchmark has the published hyper-parameters (`paper`, from the
paper and its released code) and those that suit the small default model (`ours`); what was not published is
None in `paper`, and taken from `ours`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from slm_fast.continual.sources import load_source
from slm_fast.continual.tables import Table
from slm_fast.continual.tasks import Task

SCORES = {
    "bertscore": "BERTScore F1 of all-MiniLM-L6-v2's last layer",
    "first_word": "accuracy (first word)",
}
TRAINING = {  # hyper-parameters that a task can have of its own, and their names in TrainingArguments
    "epochs": "num_train_epochs",
    "learning_rate": "learning_rate",
    "batch_size": "per_device_train_batch_size",
}
EXTRA = ("sst2", "mnli", "rte", "cb", "qqp", "wic", "copa", "boolq", "imdb", "multirc")
INTENTS = ("clinc150", "banking77", "trec6", "hwu64")
INSTRUCTIONS = ("finance", "history", "science_aux", "medical", "medquad", "pubmedqa")


@dataclass(frozen=True)
class Hyperparameters:
    """Names of the options of `slm-fast learn`. None: not published.

    per_task: {task: {name of `TRAINING`: value}} where a task's differ.
    key_learning: settings of `SLMConfig` for the keys of the methods "batch" and "paper".
    """

    base: str | None = None
    encoder: str | None = None
    target: str | None = None
    rank: int | None = None
    entries: int | None = None
    top_k: int | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    max_length: int | None = None
    per_task: dict[str, dict[str, float]] = field(default_factory=dict)
    key_learning: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """A protocol. `sources` names a task's entry in `sources.SOURCES` where it differs from the task's name.

    scoring: what the score of a task's text is, where "accuracy" or "token F1" does not say enough.
    generates: label names are text to generate even if the caller does not say so.
    """

    description: str
    orders: dict[str, tuple[str, ...]]
    ours: Hyperparameters
    paper: Hyperparameters = Hyperparameters()
    sources: dict[str, str] = field(default_factory=dict)
    scoring: dict[str, str] = field(default_factory=dict)
    generates: bool | None = None

    def hyperparameters(self, whose: str = "ours", given: Iterable[str] = ()) -> dict:
        """Values by name: `whose` "ours", or "paper", which takes ours for those that were not published.

        given: names that the caller sets for all tasks, so that `per_task` does not have them.
        """
        if whose not in ("ours", "paper"):
            raise ValueError(f'hyper-parameters are "ours" or "paper", got {whose!r}')
        if whose == "paper" and self.paper == Hyperparameters():
            raise ValueError('the paper has no hyper-parameters for this benchmark: take "ours"')
        published = asdict(self.paper) if whose == "paper" else {}
        values = asdict(self.ours) | {name: v for name, v in published.items() if v not in (None, {})}
        given = set(given)
        own = {
            task: {n: v for n, v in of.items() if n not in given} for task, of in values["per_task"].items()
        }
        return values | {"per_task": {task: of_task for task, of_task in own.items() if of_task}}


def _keys(epochs: int, batch_size: int) -> dict[str, float]:
    """How the authors' scripts learn keys, 4 a task in 6 groups; the batch is that of their two processes.

    Theirs falls to a tenth of the learning rate after some epochs, which is left out.
    """
    return dict(num_groups=6, key_learning_rate=1e-3, key_epochs=epochs, key_batch_size=batch_size)


def _orders(first: int, *orders: str) -> dict[str, tuple[str, ...]]:
    return {str(number): tuple(order.split()) for number, order in enumerate(orders, first)}


# What suits all-MiniLM-L6-v2, and SmolLM2-135M with smaller batches.
SMALL = Hyperparameters(
    base="minilm",
    encoder="minilm",
    target="all-linear",
    rank=8,
    entries=4,
    top_k=4,
    epochs=1,
    learning_rate=2e-3,
    batch_size=16,
    max_length=128,
)

BENCHMARKS = {
    "bert5": Benchmark(
        "The paper's BERT setting: five text-classification tasks, its orders 4-7.",
        _orders(
            4,
            "ag yelp amazon yahoo dbpedia",
            "yelp yahoo amazon dbpedia ag",
            "dbpedia yahoo ag amazon yelp",
            "yelp ag dbpedia amazon yahoo",
        ),
        ours=SMALL,
        paper=Hyperparameters(
            base="bert-base-uncased",
            encoder="sentence-transformers/nli-mpnet-base-v2",
            target="attention.output.dense",
            rank=12,
            entries=4,
            top_k=4,
            epochs=5,
            learning_rate=2e-4,
            batch_size=32,
            max_length=450,
            key_learning=_keys(3, 8),
        ),
    ),
    "t5_fewshot": Benchmark(
        "The paper's T5 setting: 16 rows a class, LFPT5's draws 0-2 (the seed), label words as text. The "
        "orders are LFPT5's of four tasks without yahoo, which makes two of its three the same. Of the "
        "paper's training only that of the keys was published.",
        _orders(1, "dbpedia amazon ag", "amazon ag dbpedia"),
        ours=replace(SMALL, base="smollm2", epochs=20, batch_size=8, max_length=256),
        paper=Hyperparameters(base="google-t5/t5-large", entries=4, key_learning=_keys(3, 8)),
        sources={name: f"fewshot16/{name}" for name in ("ag", "amazon", "dbpedia")},
        scoring=dict.fromkeys(("ag", "amazon", "dbpedia"), "exact match of the label word"),
        generates=True,
    ),
    "llama3": Benchmark(
        "The paper's LLaMA setting: finance sentiment, history multiple choice, medical answers. Order 1 is "
        "the one of the authors' checkpoint, order 2 is ours.",
        _orders(1, "finance history medical", "medical finance history"),
        ours=replace(SMALL, base="smollm2", batch_size=8, max_length=512),
        paper=Hyperparameters(
            base="meta-llama/Llama-2-7b-chat-hf",
            encoder="sentence-transformers/nli-roberta-base-v2",
            target="o_proj",
            rank=8,
            entries=4,
            top_k=2,
            epochs=6,  # medical's in the authors' scripts, which do not have finance's
            learning_rate=2e-4,  # medical's too; history was tried with 1e-3 and 1e-4
            batch_size=128,
            max_length=512,
            per_task={"history": dict(epochs=3, batch_size=64)},
            key_learning=_keys(2, 32),
        ),
        sources={name: f"llama3/{name}" for name in ("finance", "history", "medical")},
        scoring={"medical": "token F1 (the paper: BERTScore and a judge model)"},
    ),
    "seq15": Benchmark(
        "The 15 tasks of Progressive Prompts (its orders 8-10) and O-LoRA (its orders 4-6, used here).",
        _orders(
            4,
            "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia ag multirc yahoo",
            "multirc boolq wic mnli cb copa qqp rte imdb sst2 dbpedia ag yelp amazon yahoo",
            "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia ag yahoo multirc boolq wic",
        ),
        ours=SMALL,
    ),
    "all25": Benchmark(
        "All 25 data sets of the data folder as one stream: bert5, GLUE, SuperGLUE and IMDB, intents and "
        "questions, instructions. Without finance_full (finance with more rows) and fewshot16 (other draws).",
        {"1": ("ag", "yelp", "amazon", "dbpedia", "yahoo", *EXTRA, *INTENTS, *INSTRUCTIONS)},
        ours=replace(SMALL, base="smollm2", batch_size=8, max_length=256),
    ),
}


def find_benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def tasks_in_order(name: str, order: str | None = None) -> tuple[str, ...]:
    """The names of a benchmark's tasks, by default in its first order."""
    orders = find_benchmark(name).orders
    if order is not None and order not in orders:
        raise ValueError(f"{name} has the orders {', '.join(orders)}, got {order!r}")
    return next(iter(orders.values())) if order is None else orders[order]


def load_benchmark(
    name: str,
    order: str | None = None,
    data: str | Path | None = None,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
    *,
    tasks: Sequence[str] | None = None,
    generates: bool | None = None,
    per_task: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Task]:
    """A benchmark's tasks in an order (by default its first), each from the data folder or from the Hub.

    Args:
        data: the folder, by default the one that SLM_FAST_DATA names.  max_train, max_test: rows of a task.
        tasks: only these of them.
        generates: see `sources.load_source`; None leaves it to the benchmark.
        per_task: hyper-parameters of single tasks, as `Benchmark.hyperparameters` has them.
    Raises ValueError on unknown names, and one OSError that says of all missing tasks where they are not.
    """
    benchmark, names = find_benchmark(name), tasks_in_order(name, order)
    if unknown := [task for task in tasks or () if task not in names]:
        raise ValueError(f"{name} has no task {unknown[0]!r}, only {', '.join(names)}")
    options = dict(max_train=max_train, max_test=max_test, seed=seed)
    options["generates"] = benchmark.generates if generates is None else generates
    own = {task: _training(task, names, values) for task, values in (per_task or {}).items()}
    found, missing = [], []
    for task in (name for name in names if tasks is None or name in tasks):
        try:
            found.append(load_source(benchmark.sources.get(task, task), data, name=task, **options))
        except OSError as error:
            missing.append(error)
    if missing:
        lines = "".join(f"\n  {error}" for error in missing)
        raise OSError(
            f"{len(missing)} of the {len(found) + len(missing)} tasks of {name} are missing:{lines}"
        )
    return [replace(task, training=own.get(task.name, {})) for task in found]


def _training(task: str, names: Sequence[str], values: Mapping[str, float]) -> dict[str, float]:
    """A task's hyper-parameters by the names of `TrainingArguments`."""
    if task not in names:
        raise ValueError(f"per_task has no task {task!r} among {', '.join(names)}")
    if unknown := [name for name in values if name not in TRAINING]:
        raise ValueError(f"a task can have its own {', '.join(TRAINING)}, got {unknown[0]!r} for {task!r}")
    return {TRAINING[name]: value for name, value in values.items()}


def score_names(tasks: list[Task], scoring: dict[str, str] | None = None) -> dict[str, str]:
    """What the score of every task is: the benchmark's `scoring` of text, else the task's metric."""
    names = {task.name: SCORES.get(task.metric, task.metric.replace("_", " ")) for task in tasks}
    told = {t.name: scoring[t.name] for t in tasks if t.labels is None and t.name in (scoring or ())}
    return names | {name: text for name, text in told.items() if names[name] not in SCORES.values()}


def task_table(tasks: list[Task], scoring: dict[str, str] | None = None) -> Table:
    """A line per task: rows, kind of answer, score and source."""
    scores = score_names(tasks, scoring)
    header = ["task", "train", "test", "answers", "score", "source"]
    rows = [
        [
            task.name,
            f"{len(task.train):,}",
            f"{len(task.test):,}",
            f"{len(task.labels)} labels" if task.labels is not None else "text",
            scores[task.name],
            task.source,
        ]
        for task in tasks
    ]
    return header, rows


def answer_tokens(tokenizer, tasks: list[Task], limit: int = 128) -> int:
    """Tokens that hold the longest answer of the tasks' training rows and its end, at most `limit`."""
    answers = {row.target for task in tasks if task.labels is None for row in task.train}
    lengths = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
    return min(limit, max(lengths, default=0) + 1)
