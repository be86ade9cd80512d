"""Tasks as data: rows of (text, target), read from JSON lines, from the hub or from installed packages.

    classification: text -> label name, `Task.labels` fixes the order of the classes
    generation:     text = the prompt, a `Prompt` if it has two parts, target = the completion, `Task.labels`
                    is None

Anything wrong in a file raises a ValueError that names the file and the line.
"""

import gzip
import json
import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from slm_fast.prompts import Prompt

METRICS = ("accuracy", "first_word", "token_f1", "bertscore")
TEXT_METRICS = METRICS[2:]  # of answers that are longer than a few words
GENERATION_FIELDS = (("instruction", "output"), ("input", "output"), ("prompt", "completion"))
SPLIT_SEED = 0  # of the 80/20 split of data that came in one part
HELD_OUT = 0.2
MAX_ANSWERS = 20  # distinct answers of a generation task that can become labels
EXACT_WORDS = 5  # generated answers that are longer on average are scored by token F1, not by exact match


@dataclass(frozen=True)
class Example:
    text: str
    target: str

    def content(self) -> list[str]:
        """What identifies the row: text and target, and the two parts of a `Prompt`."""
        parts = [self.text.system, self.text.user] if isinstance(self.text, Prompt) else []
        return [self.text, self.target, *parts]


@dataclass
class Task:
    """Rows to learn from and to test on.

    training: arguments of its own in place of the run's, by the names of `TrainingArguments`.
    """

    name: str
    train: list[Example]
    test: list[Example]
    labels: list[str] | None = None
    source: str = ""
    metric: str = "accuracy"
    training: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")

    @property
    def kind(self) -> str:
        return "generation" if self.labels is None else "classification"

    def subset(self, max_train: int | None = None, max_test: int | None = None, seed: int = 0) -> "Task":
        """At most that many rows of each part, the same ones for the same seed.

        Classification keeps the labels' shares, and a row of every label while the limit allows it.
        """
        train = _sample(self.train, max_train, f"{seed}/{self.name}/train", stratify=self.labels is not None)
        test = _sample(self.test, max_test, f"{seed}/{self.name}/test", stratify=self.labels is not None)
        return replace(self, train=train, test=test)


@contextmanager
def training_of(tasks: Sequence[Task], args) -> Iterator[None]:
    """Inside, the `TrainingArguments` hold what all of these tasks have in `Task.training` with one value."""
    shared = dict(set.intersection(*(set(task.training.items()) for task in tasks)))
    kept = {name: getattr(args, name) for name in shared}
    try:
        for name, value in shared.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)


def _sample(rows: list[Example], limit: int | None, seed: str, *, stratify: bool) -> list[Example]:
    if limit is not None and limit < 1:
        raise ValueError(f"a part of a task needs at least 1 row, got a limit of {limit}")
    if limit is None or limit >= len(rows):
        return list(rows)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    if stratify:
        order.sort(key=_stratified_rank(rows, order).__getitem__)
    return [rows[i] for i in sorted(order[:limit])]


def _stratified_rank(rows: list[Example], order: list[int]) -> dict[int, tuple[float, int]]:
    """Where a row stands when labels take turns by their size; every label's first row leads."""
    size, taken, rank = Counter(row.target for row in rows), Counter(), {}
    for position, i in enumerate(order):
        target = rows[i].target
        rank[i] = (taken[target] / size[target], position)
        taken[target] += 1
    return rank


def split_rows(
    rows: list[Example], *, stratify: bool, seed: int = SPLIT_SEED
) -> tuple[list[Example], list[Example]]:
    """80% of the rows to learn from and 20% to test on; texts that occur twice stay on one side."""
    by_text: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_text.setdefault(row.text, []).append(i)
    groups = list(by_text.values())
    random.Random(seed).shuffle(groups)
    size = Counter(row.target if stratify else "" for row in rows)
    wanted = Counter({target: int(count * HELD_OUT + 0.5) for target, count in size.items()})
    if not stratify:
        wanted[""] = max(1, wanted[""])
    held: set[int] = set()
    for group in groups:
        need = Counter(rows[i].target if stratify else "" for i in group)
        if all(wanted[target] >= count for target, count in need.items()):
            wanted.subtract(need)
            held.update(group)
    train = [row for i, row in enumerate(rows) if i not in held]
    return train, [rows[i] for i in sorted(held)]


# JSON lines


def load_jsonl_tasks(
    directory: str | Path, names: Iterable[str] | None = None, *, two_parts: bool = False
) -> list[Task]:
    """The tasks of a folder: NAME.train.jsonl[.gz] and NAME.test.jsonl[.gz], or NAME.jsonl[.gz], split 80/20.

    A row is {"text", "label_text"} or {"text", "label"}, or, for generation, {"prompt", "completion"} or
    {"instruction", "input", "output"}. `index.json`, in the folder or its parent, names and orders the labels
    in tasks[NAME]["labels"]; else they are sorted. Without `names` every task comes, in alphabetical order.
    two_parts: an instruction and its input stay apart, as a `Prompt`; else they are lines of one text.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"there is no folder {directory}")
    files = _task_files(directory)
    if not files:
        raise ValueError(
            f"{directory} holds no NAME.train.jsonl[.gz], NAME.test.jsonl[.gz] or NAME.jsonl[.gz]"
        )
    names = sorted(files) if names is None else list(names)
    for name in names:
        if name not in files:
            raise ValueError(f"no task {name!r} in {directory}, which has {', '.join(sorted(files))}")
    return [_jsonl_task(name, files[name], _index_labels(directory, name), two_parts) for name in names]


def _task_files(directory: Path) -> dict[str, dict[str, Path]]:
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(directory.iterdir()):
        match = re.fullmatch(r"(.+?)(?:\.(train|test|valid|validation|dev))?\.jsonl(?:\.gz)?", path.name)
        if match and path.is_file():
            files.setdefault(match[1], {})[match[2] or "all"] = path
    return {name: parts for name, parts in files.items() if "all" in parts or "train" in parts}


def _index_labels(directory: Path, name: str) -> list[str] | None:
    for path in (directory / "index.json", directory.parent / "index.json"):
        if not path.is_file():
            continue
        try:
            tasks = json.loads(path.read_text(encoding="utf8")).get("tasks", {})
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ValueError(f"{path} must be a JSON object with a 'tasks' object: {error}") from error
        stem = name.split(".")[0]  # "ag.seed0" is a draw of the task "ag"
        for key in (f"{directory.name}/{name}", name, f"{directory.name}/{stem}", stem):
            if tasks.get(key, {}).get("labels"):
                return [str(label) for label in tasks[key]["labels"]]
    return None


def _jsonl_task(name: str, parts: dict[str, Path], labels: list[str] | None, two_parts: bool) -> Task:
    if "train" in parts:
        if "test" not in parts:
            raise ValueError(f"{parts['train']} has no {name}.test.jsonl[.gz] beside it")
        train = _read_rows(parts["train"], labels, two_parts)
        test = _read_rows(parts["test"], labels, two_parts)
        kinds, source = {train[0][2], test[0][2]}, parts["train"].parent
        if len(kinds) > 1:
            raise ValueError(f"{parts['train']} and {parts['test']} hold different kinds of rows")
        is_classification = train[0][2]
        known = {example.target for _, example, _ in train}
        for line, example, _ in test if is_classification else ():
            if example.target not in known:
                raise ValueError(
                    f"{parts['test']}, line {line}: label {example.target!r} does not occur in training"
                )
        train, test = [row[1] for row in train], [row[1] for row in test]
    else:
        rows = _read_rows(parts["all"], labels, two_parts)
        is_classification, source = rows[0][2], parts["all"]
        if len(rows) < 2:
            raise ValueError(f"{parts['all']} has 1 row, which cannot be split into train and test")
        train, test = split_rows([row[1] for row in rows], stratify=is_classification)
        if not test:
            raise ValueError(f"{parts['all']} has too few rows for each label to split off a test part")
    found = {example.target for example in train} if is_classification else set()
    ordered = [label for label in labels or () if label in found]
    ordered += sorted(found.difference(ordered))
    return Task(
        name,
        train,
        test,
        labels=ordered if is_classification else None,
        source=f"jsonl:{source}",
        metric="accuracy" if is_classification else answer_metric(test),
    )


def answer_metric(rows: list[Example]) -> str:
    """How generated answers are scored: exact match for those of a few words, else token F1."""
    words = sum(len(example.target.split()) for example in rows) / len(rows)
    return "accuracy" if words <= EXACT_WORDS else "token_f1"


def _read_rows(path: Path, labels: list[str] | None, two_parts: bool) -> list[tuple[int, Example, bool]]:
    """(line number, example, is classification) of every row of the file, all of one kind."""
    rows: list[tuple[int, Example, bool]] = []
    for line, text in _lines(path):
        where = f"{path}, line {line}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: invalid JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
        example, is_classification = _parse_row(row, labels, where, two_parts)
        if rows and rows[0][2] != is_classification:
            raise ValueError(f"{where}: classification and generation rows in one file")
        rows.append((line, example, is_classification))
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf8") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, text
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not readable as UTF-8 text: {error}") from error


def _parse_row(row: dict, labels: list[str] | None, where: str, two_parts: bool) -> tuple[Example, bool]:
    if "text" in row and ("label_text" in row or "label" in row):
        label = row.get("label_text")
        label = row.get("label") if label is None else label
        if not _string(row, "text", where).strip():
            raise ValueError(f"{where}: the text is empty")
        return Example(_string(row, "text", where), _label_name(label, labels, where)), True
    for prompt_field, target_field in GENERATION_FIELDS:
        if prompt_field in row and target_field in row:
            if target_field == "completion":
                prompt = _string(row, "prompt", where)
            else:
                parts = [_string(row, field, where) for field in ("instruction", "input") if row.get(field)]
                prompt = Prompt(parts[1], parts[0]) if two_parts and len(parts) == 2 else "\n".join(parts)
            if not prompt.strip():
                raise ValueError(f"{where}: the prompt is empty")
            return Example(prompt, _string(row, target_field, where)), False
    wanted = "text + label_text, text + label, instruction + input + output, or prompt + completion"
    raise ValueError(
        f"{where}: missing fields: a row needs {wanted}, got {', '.join(map(str, row)) or 'none'}"
    )


def _string(row: dict, field: str, where: str) -> str:
    if not isinstance(row[field], str):
        raise ValueError(f"{where}: {field} must be a string, got {type(row[field]).__name__}")
    return row[field]


def _label_name(label: object, labels: list[str] | None, where: str) -> str:
    if isinstance(label, bool) or not isinstance(label, (str, int)):
        raise ValueError(f"{where}: a label must be a string or an integer, got {type(label).__name__}")
    if isinstance(label, str) or labels is None:
        return str(label)
    if not 0 <= label < len(labels):
        raise ValueError(f"{where}: label {label} is outside the {len(labels)} labels of index.json")
    return labels[label]


def load_tasks(spec: str | Path, names: Iterable[str] | None = None) -> list[Task]:
    """Tasks by one word: "docs", "chat", a folder, "hub:NAME", or NAME when no such folder exists.

    A folder is read as JSON lines, or by `datasets` when `save_to_disk` wrote it. A folder that is called
    docs or chat can be given as a Path or as "./docs".
    """
    from slm_fast.continual.hub import is_saved_dataset, load_hub_task

    folder = Path(spec)
    if isinstance(spec, str) and spec in ("docs", "chat"):
        from slm_fast.continual import corpora

        tasks = corpora.documentation_tasks() if spec == "docs" else corpora.chat_tasks()
    elif folder.is_dir():
        if not is_saved_dataset(folder):
            return load_jsonl_tasks(folder, names)
        tasks = [load_hub_task(folder)]
    elif isinstance(spec, Path) or str(spec).startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {spec}")
    else:
        tasks = [load_hub_task(str(spec).removeprefix("hub:"))]
    if names is None:
        return tasks
    by_name = {task.name: task for task in tasks}
    for name in (names := list(names)):
        if name not in by_name:
            raise ValueError(f"no task {name!r} in {spec}, which has {', '.join(by_name)}")
    return [by_name[name] for name in names]


def same_labels(tasks: list[Task]) -> list[set[str]]:
    """For every classification task the names of those with its labels, itself among them."""
    labelled = [task for task in tasks if task.labels is not None]
    return [{other.name for other in labelled if other.labels == task.labels} for task in labelled]


# the other kind


def as_text(task: Task, prompt: str = "{text}") -> Task:
    """A classification task for a model that generates text: the answer is the label name, by exact match.

    prompt: a format of `{text}` and, if it lists them, `{labels}`, the label names joined by commas. Raises
    ValueError on another field, or without `{text}`.
    """
    if task.labels is None:
        return task
    names = ", ".join(task.labels)
    fields = {field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None}
    if "text" not in fields or not fields <= {"text", "labels"}:
        raise ValueError(f"prompt must hold {{text}}, and {{labels}} if it lists them, got {prompt!r}")

    def rows(part: list[Example]) -> list[Example]:
        return [Example(prompt.format(text=row.text, labels=names), row.target) for row in part]

    return replace(task, train=rows(task.train), test=rows(task.test), labels=None)


def as_classification(task: Task) -> Task:
    """A generation task for an encoder, which cannot answer with text: the distinct answers are the labels.

    Raises ValueError where training has more than `MAX_ANSWERS` of them (free text), or testing has others.
    """
    if task.labels is not None:
        return task
    labels = sorted({row.target for row in task.train})
    if len(labels) > MAX_ANSWERS:
        raise ValueError(
            f"task {task.name!r} has {len(labels)} different answers, a classification head takes at most "
            f"{MAX_ANSWERS}: free text needs a base model that generates"
        )
    if other := {row.target for row in task.test} - set(labels):
        raise ValueError(f"task {task.name!r}: test answer {min(other)!r} does not occur in training")
    return replace(task, labels=labels, metric="accuracy")


# scores


def score(task: Task, predictions: list[str], targets: list[str]) -> float:
    """Mean over the rows, in [0, 1], by the task's metric.

    accuracy: equal up to case and whitespace.  first_word: the first words are equal, up to case and
    punctuation, as the authors score LLaMA's answers, which may go on (they mind the case).  token_f1:
    harmonic mean of the words' precision and recall, without case, punctuation and articles (SQuAD).
    bertscore: see `bertscore.bert_scores`.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"wanted one prediction per target, got {len(predictions)} for {len(targets)}")
    if not targets:
        raise ValueError("there is nothing to score: 0 targets")
    if task.metric == "bertscore":
        from slm_fast.continual.bertscore import bert_scores

        return sum(bert_scores(predictions, targets)) / len(targets)
    row_score = {"token_f1": _token_f1, "first_word": _same_first_word}.get(task.metric, _same_answer)
    return sum(row_score(*pair) for pair in zip(predictions, targets, strict=True)) / len(targets)


def _same_answer(prediction: str, target: str) -> float:
    return float(" ".join(prediction.lower().split()) == " ".join(target.lower().split()))


def text_scores(task: Task, predictions: list[str], targets: list[str]) -> dict[str, float]:
    """The scores of a task's long answers by all of `TEXT_METRICS`, none for a task with another metric.

    BERTScore is left out where its encoder is not installed.
    """
    found = {}
    for metric in TEXT_METRICS if task.metric in TEXT_METRICS else ():
        try:
            found[metric] = score(replace(task, metric=metric), predictions, targets)
        except OSError:
            if metric == task.metric:
                raise
    return found


def _same_first_word(prediction: str, target: str) -> float:
    guess, truth = (re.sub(r"[^\w\s]", " ", text.lower()).split()[:1] for text in (prediction, target))
    return float(bool(guess) and guess == truth)


def _token_f1(prediction: str, target: str) -> float:
    guess, truth = _answer_words(prediction), _answer_words(target)
    common = sum((Counter(guess) & Counter(truth)).values())
    if not guess or not truth:
        return float(guess == truth)
    return 2 * common / (len(guess) + len(truth))


def _answer_words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
