"""Tasks from the Hugging Face Hub, or from folders that `datasets` can read or wrote."""

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from slm_fast.continual.tasks import Example, Task, answer_metric, split_rows
from slm_fast.prompts import Prompt

TEXT_COLUMNS = (
    "text",
    "sentence",
    "content",
    "review",
    "question",
    "question_title",
    "query",
    "utterance",
    "title",
)
LABEL_COLUMNS = ("label", "label_text", "labels", "topic", "intent", "category", "class")
CONVERTED = "refs/convert/parquet"  # the Hub's copy of a data set without its script
TEST_SPLITS = ("test", "validation", "validation_matched")  # the first that has labelled rows is tested on


def load_hub_task(
    name: str | Path,
    *,
    config: str | Sequence[str] | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    task_name: str | None = None,
    template: str | None = None,
    system: str | None = None,
    pattern: str | None = None,
    labels: Mapping | None = None,
    generation: bool = False,
    max_rows: int | None = None,
    seed: int = 0,
) -> Task:
    """A task of the Hub, of a folder that `datasets` reads, or of a `save_to_disk` folder, NAME/CONFIG too.

    Columns that are not named are looked for under the usual names. The test part is the first of
    `TEST_SPLITS` that has labels (the Hub hides some as -1), else a fifth of "train". Several configs are
    joined; without a split "train" all splits together are divided.

    Args:
        template: the text as a format of the columns, instead of one `text_column`.
        system: a format of the columns too: what to do with the text, and the text a `Prompt`.
        pattern: a regular expression for the text column, whose named groups become columns.
        labels: the column's values -> label names, in the order of the classes; other rows are left out.
        generation: the label column is the answer to generate, and no class.
        max_rows: of a split with more rows that many are kept, drawn with `seed`; `source` says so.
    """
    splits = _load_splits(str(name), config)
    if "train" not in splits:
        splits = {"train": [part for parts in splits.values() for part in parts]}
    first = splits["train"][0]
    if template is None or pattern is not None:
        text_column = _find_column(first, text_column, TEXT_COLUMNS, "text_column", name)
    if pattern is None or label_column is None:
        label_column = _find_column(first, label_column, LABEL_COLUMNS, "label_column", name)

    def rows(split: str) -> list[Example]:
        parts = [_draw(part, max_rows, seed) for part in splits.get(split, ())]
        return [
            example
            for part in parts
            for example in _rows(part, text_column, label_column, template, system, pattern, labels)
        ]

    train = rows("train")
    test = next((found for split in TEST_SPLITS if (found := rows(split))), [])
    if not test:
        train, test = split_rows(train, stratify=not generation)
    if not train or not test:
        raise ValueError(f"{name} has {len(train)} rows to train on and {len(test)} to test on")
    large = max_rows is not None and any(len(part) > max_rows for parts in splits.values() for part in parts)
    source = f"hub:{name}" + (f", {max_rows:,} rows drawn from a split" if large else "")
    task = Task(task_name or Path(str(name)).name, train, test, source=source)
    if generation:
        task.metric = answer_metric(test)
        return task
    known = {row.target for row in train}
    for row in test:
        if row.target not in known:
            raise ValueError(f"{name}: test label {row.target!r} does not occur in training")
    names = list(labels.values()) if labels else getattr(first.features[label_column], "names", sorted(known))
    task.labels = [label for label in names if label in known]
    return task


def _load_splits(name: str, config: str | Sequence[str] | None) -> dict[str, list]:
    """Split name -> its part in every config."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "loading a dataset needs the package datasets: pip install 'slm_fast[train]'"
        ) from error
    splits: dict[str, list] = {}
    for one in [config] if config is None or isinstance(config, str) else config:
        folder = Path(name, one or "")
        if is_saved_dataset(folder):
            data = datasets.load_from_disk(folder)
        else:
            data = _load_dataset(name, one)
        for split, part in (data if isinstance(data, dict) else {"train": data}).items():
            splits.setdefault(split, []).append(part)
    return splits


def _load_dataset(name: str, config: str | None):
    """`datasets.load_dataset`; of a data set that is a script, which datasets 4 refuses, the Hub's own copy.

    That copy has a folder a config, "default" where there is one. Splits of which one's name begins with the
    other's, "validation" and "validation_matched", come as one from it.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config)
    except RuntimeError as error:
        if "script" not in str(error).lower():
            raise
        try:
            return datasets.load_dataset(name, data_dir=config or "default", revision=CONVERTED)
        except (OSError, ValueError) as second:
            raise OSError(f"{error}; its copy at {CONVERTED}: {second}") from error


def is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "state.json", "dataset_dict.json"))


def _find_column(split, wanted: str | None, usual: tuple[str, ...], argument: str, name: str | Path) -> str:
    for column in (wanted,) if wanted else usual:
        if column in split.column_names:
            return column
    found = ", ".join(split.column_names)
    raise ValueError(
        f"{name} has no column {wanted or ' or '.join(usual)} but {found}: name it with {argument}="
    )


def _draw(split, max_rows: int | None, seed: int):
    if max_rows is None or len(split) <= max_rows:
        return split
    return split.select(sorted(random.Random(seed).sample(range(len(split)), max_rows)))


def _rows(
    split,
    text_column: str | None,
    label_column: str,
    template: str | None,
    system: str | None,
    pattern: str | None,
    labels: Mapping | None,
) -> list[Example]:
    names = None if pattern else getattr(split.features[label_column], "names", None)
    rows = []
    for row in split:
        if pattern is not None:
            match = re.search(pattern, row[text_column], re.DOTALL)
            if match is None:
                raise ValueError(f"column {text_column} does not match {pattern}: {row[text_column][:80]!r}")
            row = row | {group: found.strip() for group, found in match.groupdict().items()}
        try:
            label = row[label_column]
            text = row[text_column] if template is None else template.format_map(row)
            asked = None if system is None else system.format_map(row)
        except KeyError as error:
            raise ValueError(f"there is no column {error}, only {', '.join(row)}") from error
        if text is None or label is None or label == -1 or (labels and label not in labels):
            continue
        if labels:
            label = labels[label]
        elif names and isinstance(label, int):
            label = names[label]
        text = Prompt(str(text), asked) if asked else str(text)
        rows.append(Example(text, str(label)))
    return rows
