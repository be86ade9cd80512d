"""Where the benchmarks' tasks lie, in a data folder and on the Hub, and how a model that generates is asked.

A data folder holds GROUP/NAME.train.jsonl[.gz], GROUP/NAME.test.jsonl[.gz] and an index.json with the labels.
"""

import os
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from slm_fast.continual.hub import load_hub_task
from slm_fast.continual.tasks import Example, Task, as_classification, as_text, load_jsonl_tasks

HUB_ROWS = 30_000  # of a larger split on the Hub that many are drawn, unless more are asked for
CHOOSE = " Choose one of: {labels}.\n{text}"
SENTIMENT = "What is the sentiment of the following text?" + CHOOSE
TOPIC = "What is the topic of the following text?" + CHOOSE
ENTAILMENT = "What is the logical relation of sentence 1 to sentence 2?" + CHOOSE
INTENT = "What is the intent of the following request?\n{text}"

STARS = ("very negative", "negative", "neutral", "positive", "very positive")
NEWS = ("World", "Sports", "Business", "Science or Technology")
ONTOLOGY = (
    "Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation",
    "Building", "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work",
)  # fmt: skip
MOOD = {1: "Good", 0: "Bad"}
SENTENCES = "sentence 1: {premise} sentence 2: {hypothesis}"


@dataclass(frozen=True)
class Source:
    """A task's folder and file stem, its name on the Hub with the options of `load_hub_task`, and its prompt.

    local may hold `{seed}`, the draw.  hub None: nothing equal is known there.  prompt: see `as_text`.
    shots: training rows of a class that are drawn from the Hub's.  metric: of generated answers, where it is
    not the task's own.  options["system"]: what to do is kept apart from the text, see `prompts.Prompt`.
    """

    local: str
    hub: str | None
    options: dict = field(default_factory=dict)
    prompt: str = "{text}"
    shots: int | None = None
    metric: str | None = None


def _numbered(names: Iterable[str], start: int = 0) -> dict[int, str]:
    return dict(enumerate(names, start))


def _glue(config: str, template: str, **options) -> tuple[str, dict]:
    return "nyu-mll/glue", dict(config=config, template=template, **options)


def _super_glue(config: str, template: str, **options) -> tuple[str, dict]:
    return "aps/super_glue", dict(config=config, template=template, **options)


_AMAZON = "yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes"
_AMAZON_TEXT = dict(template="{review_title}. {review_text}", label_column="class_index")
_HISTORY = tuple(f"high_school_{place}_history" for place in ("european", "us", "world")) + ("prehistory",)
_FINANCE = r"### Instruction:(?P<instruction>.+?)### Human:(?P<input>.+?)### Assistant:(?P<output>.+)"
_WORDS = ("terrible", "bad", "middle", "good", "wonderful")

SOURCES = {
    # the paper's BERT tasks
    "ag": Source("bert5/ag", "fancyzhx/ag_news", dict(labels=_numbered(NEWS)), TOPIC),
    "yelp": Source("bert5/yelp", "Yelp/yelp_review_full", dict(labels=_numbered(STARS)), SENTIMENT),
    "amazon": Source("bert5/amazon", _AMAZON, _AMAZON_TEXT | dict(labels=_numbered(STARS, 1)), SENTIMENT),
    "yahoo": Source(
        "bert5/yahoo",
        "community-datasets/yahoo_answers_topics",
        dict(template="{question_title}. {question_content} {best_answer}", label_column="topic"),
        TOPIC,
    ),
    "dbpedia": Source(
        "bert5/dbpedia",
        "fancyzhx/dbpedia_14",
        dict(template="{title}. {content}", labels=_numbered(ONTOLOGY)),
        TOPIC,
    ),
    # LFPT5's draws of 16 rows a class, with its label words
    "fewshot16/ag": Source(
        "fewshot16/ag.seed{seed}",
        "fancyzhx/ag_news",
        dict(labels=_numbered(("world", "sports", "business", "science"))),
        shots=16,
    ),
    "fewshot16/amazon": Source(
        "fewshot16/amazon.seed{seed}", _AMAZON, _AMAZON_TEXT | dict(labels=_numbered(_WORDS, 1)), shots=16
    ),
    "fewshot16/dbpedia": Source(
        "fewshot16/dbpedia.seed{seed}",
        "fancyzhx/dbpedia_14",
        dict(
            template="{title} {content}",
            labels=_numbered(name.lower().replace(" ", "") for name in ONTOLOGY),
        ),
        shots=16,
    ),
    # GLUE, SuperGLUE and IMDB, as O-LoRA writes them
    "sst2": Source("extra/sst2", *_glue("sst2", "{sentence}", labels=MOOD), SENTIMENT),
    "mnli": Source("extra/mnli", *_glue("mnli", SENTENCES), ENTAILMENT),
    "rte": Source(
        "extra/rte",
        *_glue(
            "rte",
            "sentence 1: {sentence1} sentence 2: {sentence2}",
            labels={1: "contradiction", 0: "entailment"},
        ),
        ENTAILMENT,
    ),
    "cb": Source("extra/cb", *_super_glue("cb", SENTENCES), ENTAILMENT),
    "qqp": Source(
        "extra/qqp",
        *_glue(
            "qqp",
            "first sentence: {question1} second sentence: {question2}",
            labels={0: "False", 1: "True"},
        ),
        "Do the two sentences have the same meaning?" + CHOOSE,
    ),
    "wic": Source(
        "extra/wic",
        *_super_glue("wic", "word: {word} {sentence1} {sentence2}"),
        "Is the word used with the same sense in both sentences?" + CHOOSE,
    ),
    "copa": Source(
        "extra/copa",
        *_super_glue(
            "copa",
            'Which sentence is the {question} of "{premise}"? Choose one between A and B. '
            "A: {choice1} B: {choice2}",
            labels={0: "A", 1: "B"},
        ),
    ),
    "boolq": Source(
        "extra/boolq",
        *_super_glue("boolq", "question: {question} passage: {passage}"),
        "According to the passage, is the answer to the question true or false?" + CHOOSE,
    ),
    "multirc": Source(
        "extra/multirc",
        *_super_glue("multirc", "paragraph: {paragraph} question: {question} answer: {answer}"),
        "According to the paragraph, is the answer true or false?" + CHOOSE,
    ),
    "imdb": Source("extra/imdb", "stanfordnlp/imdb", dict(labels=MOOD), SENTIMENT),
    # intents and questions
    "clinc150": Source("extra/clinc150", "FastFit/clinc_150", {}, INTENT),
    "banking77": Source("extra/banking77", "mteb/banking77", dict(label_column="label_text"), INTENT),
    "trec6": Source(
        "extra/trec6",
        "SetFit/TREC-QC",
        dict(label_column="label_coarse_original"),
        "What kind of answer does the question ask for?" + CHOOSE,
    ),
    "hwu64": Source("extra/hwu64", "FastFit/hwu_64", {}, INTENT),
    # instructions: finance and medical are the sets of the authors' code; theirs for history is all of MMLU
    "finance": Source(
        "instruct/finance",
        "AdiOO7/llama-2-finance",
        dict(pattern=_FINANCE, template="{instruction}\n{input}", label_column="output", generation=True),
    ),
    "history": Source(
        "instruct/history",
        "cais/mmlu",
        dict(
            config=_HISTORY,
            template="Question:{question}\n Choices:{choices}\n",
            label_column="answer",
            generation=True,
        ),
    ),
    "medical": Source(
        "instruct/medical",
        "LinhDuong/chatdoctor-200k",
        dict(template="{instruction}\n{input}", label_column="output", generation=True),
    ),
    "science_aux": Source("instruct/science_aux", None),  # a part of MMLU's auxiliary_train without a name
    "medquad": Source(
        "instruct/medquad",
        "keivalya/MedQuad-MedicalQnADataset",
        dict(template="Answer the medical question.\n{Question}", label_column="Answer", generation=True),
    ),
    "pubmedqa": Source(
        "instruct/pubmedqa",
        "qiaojin/PubMedQA",
        dict(
            config="pqa_labeled",
            template="Answer the biomedical question from the abstract with yes, no or maybe.\n"
            "Question: {question} Abstract: {context[contexts]}",
            label_column="final_decision",
            generation=True,
        ),
    ),
}
# The paper's LLaMA tasks: its prompts (history has no instruction) and its scoring.
_TWO_PARTS = dict(system="{instruction}", template="{input}")
SOURCES |= {
    "llama3/finance": replace(
        SOURCES["finance"], options=SOURCES["finance"].options | _TWO_PARTS, metric="first_word"
    ),
    "llama3/history": replace(SOURCES["history"], metric="first_word"),
    "llama3/medical": replace(SOURCES["medical"], options=SOURCES["medical"].options | _TWO_PARTS),
}


def data_folder(data: str | Path | None = None) -> Path | None:
    """The folder named by `data`, else by SLM_FAST_DATA, else None. Raises ValueError if it is not there."""
    named = data if data is not None else os.environ.get("SLM_FAST_DATA")
    if not named:
        return None
    if not Path(named).is_dir():
        raise ValueError(f"there is no data folder {named}")
    return Path(named)


def load_source(
    key: str,
    data: str | Path | None = None,
    *,
    name: str | None = None,
    generates: bool | None = None,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
) -> Task:
    """A task of `SOURCES`: from the data folder where its files are there, else from the Hub.

    `source` says which. generates: the base model answers with text (True) or through heads (False); the
    task is turned into that kind. None keeps its own kind. Raises ValueError on an unknown name and where
    free text has no base model that generates, OSError where neither place has the task.
    """
    if key not in SOURCES:
        raise ValueError(f"unknown task {key!r}; known: {', '.join(SOURCES)}")
    source, folder = SOURCES[key], data_folder(data)
    group, stem = source.local.format(seed=seed).split("/")
    if folder is not None and any((folder / group).glob(f"{stem}.train.jsonl*")):
        (task,) = load_jsonl_tasks(folder / group, [stem], two_parts="system" in source.options)
    else:
        task = _from_hub(key, source, folder, max(HUB_ROWS, max_train or 0, max_test or 0), seed)
    task = replace(task, name=name or key.split("/")[-1]).subset(max_train, max_test, seed)
    if source.metric is not None and task.labels is None:
        task = replace(task, metric=source.metric)
    if generates is None:
        return task
    return as_text(task, source.prompt) if generates else as_classification(task)


def _from_hub(key: str, source: Source, folder: Path | None, max_rows: int, seed: int) -> Task:
    group, stem = source.local.format(seed=seed).split("/")
    missing = f"task {key!r} is not in a data folder (none was given and SLM_FAST_DATA is not set)"
    if folder is not None:
        missing = f"task {key!r} is not in {folder} ({group}/{stem}.train.jsonl[.gz])"
    if source.hub is None:
        raise OSError(f"{missing}, and nothing equal is known on the Hub: it comes from a data folder only")
    try:
        task = load_hub_task(source.hub, **source.options, max_rows=max_rows, seed=seed)
    except (OSError, RuntimeError, ImportError) as error:  # RuntimeError: a loading script
        raise OSError(f"{missing}, and {source.hub} could not be loaded: {error}") from error
    if source.shots is not None:
        task.train = _few(task.train, source.shots, seed)
    return task


def _few(rows: list[Example], shots: int, seed: int) -> list[Example]:
    """`shots` rows of every target, drawn with `seed`."""
    taken, kept = Counter(), []
    for row in random.Random(seed).sample(rows, len(rows)):
        taken[row.target] += 1
        if taken[row.target] <= shots:
            kept.append(row)
    return kept
