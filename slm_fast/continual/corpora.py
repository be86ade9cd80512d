"""Real text that every installation has: docstrings of installed packages, and a small chat corpus.

Nothing is downloaded, and no documented module is imported (numpy apart: its random generators are compiled).
The source files are parsed with `ast`. Only prose is kept, the summary and the paragraph after it.

    documentation_tasks   classification, one task a package: which part of the package does a text document?
    chat_tasks            generation with answers of one to four tokens, for a small chat model
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from slm_fast.continual.tasks import Example, Task

MIN_WORDS, MAX_WORDS = 8, 80
MIN_ROWS = 40  # a label with fewer texts is dropped
MAX_TEXTS = 150  # per label: no more files of the label are read then
MAX_RATIO = 3  # the largest label of a task has at most this many times the rows of its smallest

# Files of each label, as patterns below the package's folder. "import:" marks a module to look at live.
# The packages that slm_fast itself needs come first, so optional ones never change the tasks before them.
SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "python-stdlib": {
        "text processing": (
            "string.py re/*.py re.py textwrap.py difflib.py pprint.py gettext.py locale.py argparse.py "
            "optparse.py "
            "codecs.py tokenize.py shlex.py cmd.py html/*.py encodings/*.py getopt.py reprlib.py"
        ).split(),
        "internet": (
            "http/*.py urllib/*.py ftplib.py smtplib.py imaplib.py poplib.py nntplib.py telnetlib.py "
            "socket.py "
            "socketserver.py ssl.py xmlrpc/*.py ipaddress.py webbrowser.py wsgiref/*.py cgi.py smtpd.py"
        ).split(),
        "email": ("email/*.py", "email/mime/*.py", "mailbox.py", "mailcap.py", "quopri.py"),
        "concurrency": (
            "asyncio/*.py threading.py multiprocessing/*.py concurrent/futures/*.py queue.py subprocess.py "
            "selectors.py sched.py contextvars.py _threading_local.py"
        ).split(),
        "file formats": (
            "zipfile.py zipfile/*.py tarfile.py gzip.py bz2.py lzma.py csv.py json/*.py plistlib.py "
            "configparser.py "
            "xml/*/*.py wave.py aifc.py pickle.py shelve.py netrc.py tomllib/*.py dbm/*.py sqlite3/*.py"
        ).split(),
        "files and folders": (
            "pathlib.py pathlib/*.py os.py shutil.py glob.py tempfile.py fileinput.py posixpath.py ntpath.py "
            "genericpath.py filecmp.py fnmatch.py stat.py linecache.py _pyio.py zipapp.py"
        ).split(),
        "dates and numbers": (
            "datetime.py _pydatetime.py calendar.py decimal.py _pydecimal.py fractions.py statistics.py "
            "random.py "
            "numbers.py zoneinfo/*.py _strptime.py colorsys.py heapq.py bisect.py"
        ).split(),
        "testing and debugging": (
            "unittest/*.py doctest.py pdb.py bdb.py trace.py traceback.py cProfile.py profile.py pstats.py "
            "timeit.py "
            "inspect.py dis.py tracemalloc.py warnings.py logging/*.py"
        ).split(),
    },
    "numpy": {
        "linear algebra": ("linalg/*.py", "matrixlib/*.py", "_core/einsumfunc.py"),
        "random numbers": ("import:numpy.random",),
        "polynomials": ("polynomial/*.py", "lib/_polynomial_impl.py"),
        "masked arrays": ("ma/*.py",),
        "array functions": (
            "_core/fromnumeric.py _core/numeric.py _core/shape_base.py lib/_function_base_impl.py "
            "lib/_shape_base_impl.py lib/_arraysetops_impl.py lib/_twodim_base_impl.py "
            "lib/_nanfunctions_impl.py "
            "lib/_index_tricks_impl.py lib/_stride_tricks_impl.py lib/_arraypad_impl.py "
            "lib/_histograms_impl.py"
        ).split(),
        "strings and records": (
            "_core/strings.py",
            "_core/defchararray.py",
            "_core/records.py",
            "lib/recfunctions.py",
        ),
        "types and objects": ("_core/_add_newdocs.py", "_core/_add_newdocs_scalars.py", "_core/_dtype*.py"),
    },
    "torch": {
        "layers": ("nn/modules/*.py", "nn/functional.py"),
        "optimisers": ("optim/*.py",),
        "distributions": ("distributions/*.py",),
        "tensor functions": (
            "_torch_docs.py",
            "_tensor_docs.py",
            "functional.py",
            "special/*.py",
            "linalg/*.py",
        ),
        "distributed": (
            "distributed/*.py",
            "distributed/fsdp/*.py",
            "distributed/tensor/*.py",
            "distributed/rpc/*.py",
        ),
        "graph capture": ("fx/*.py", "fx/passes/*.py", "fx/experimental/*.py", "export/*.py"),
        "data and profiling": (
            "utils/data/*.py",
            "utils/data/datapipes/*/*.py",
            "profiler/*.py",
            "utils/*.py",
        ),
        "quantisation": ("ao/quantization/*.py", "ao/nn/*/*/*.py", "ao/nn/*/*/*/*.py", "ao/pruning/*.py"),
    },
    "transformers": {
        "tokenizers": ("tokenization*.py", "models/*/tokenization_*.py"),
        "models": ("models/*/modeling_*.py",),
        "images and audio": (
            "image_*.py audio_utils.py video_*.py models/*/image_processing_*.py "
            "models/*/feature_extraction_*.py "
            "models/*/processing_*.py"
        ).split(),
        "generation": ("generation/*.py", "generation/*/*.py", "cache_utils.py", "cli/serv*.py"),
        "training": (
            "trainer*.py",
            "training_args*.py",
            "optimization.py",
            "data/*.py",
            "loss/*.py",
            "integrations/*.py",
        ),
        "pipelines": ("pipelines/*.py",),
        "quantisation": ("quantizers/*.py", "utils/quantization_config.py"),
    },
    "sympy": {
        "calculus": ("integrals/*.py", "series/*.py", "calculus/*.py", "concrete/*.py"),
        "physics": ("physics/*.py", "physics/*/*.py"),
        "number theory": ("ntheory/*.py", "crypto/*.py"),
        "groups": ("combinatorics/*.py",),
        "geometry": ("geometry/*.py", "vector/*.py", "diffgeom/*.py"),
        "polynomials": ("polys/*.py",),
        "matrices": ("matrices/*.py", "matrices/expressions/*.py", "tensor/*.py", "tensor/array/*.py"),
        "printing": ("printing/*.py", "parsing/*.py", "codegen/*.py"),
    },
    "networkx": {
        "shortest paths and flows": ("algorithms/shortest_paths/*.py", "algorithms/flow/*.py"),
        "centrality": ("algorithms/centrality/*.py", "algorithms/link_analysis/*.py"),
        "communities": (
            "algorithms/community/*.py",
            "algorithms/assortativity/*.py",
            "algorithms/components/*.py",
        ),
        "generators": ("generators/*.py",),
        "graph classes": ("classes/*.py",),
        "reading and drawing": ("readwrite/*.py", "readwrite/*/*.py", "drawing/*.py", "convert*.py"),
        "trees and matching": (
            "algorithms/tree/*.py algorithms/traversal/*.py algorithms/dag.py algorithms/matching.py "
            "algorithms/bipartite/*.py algorithms/lowest_common_ancestors.py"
        ).split(),
    },
    "scipy": {
        "optimisation": ("optimize/*.py",),
        "statistics": ("stats/*.py",),
        "signals": ("signal/*.py", "signal/windows/*.py"),
        "sparse matrices": (
            "sparse/*.py",
            "sparse/linalg/*.py",
            "sparse/csgraph/*.py",
            "sparse/linalg/*/*.py",
        ),
        "interpolation": ("interpolate/*.py",),
        "geometry and images": ("spatial/*.py", "spatial/transform/*.py", "ndimage/*.py"),
        "linear algebra": ("linalg/*.py",),
        "special functions": ("special/*.py", "fft/*.py", "integrate/*.py"),
    },
    "scikit-learn": {
        "linear models": ("linear_model/*.py", "svm/*.py"),
        "ensembles and trees": ("ensemble/*.py", "ensemble/*/*.py", "tree/*.py"),
        "clustering": ("cluster/*.py", "cluster/*/*.py", "mixture/*.py"),
        "metrics": ("metrics/*.py", "metrics/*/*.py"),
        "preprocessing": (
            "preprocessing/*.py",
            "impute/*.py",
            "feature_selection/*.py",
            "feature_extraction/*.py",
        ),
        "model selection": ("model_selection/*.py", "pipeline.py", "compose/*.py", "calibration.py"),
        "data sets": ("datasets/*.py",),
        "decomposition": (
            "decomposition/*.py",
            "manifold/*.py",
            "covariance/*.py",
            "cross_decomposition/*.py",
        ),
    },
}
IMPORT_NAMES = {"scikit-learn": "sklearn"}
DOC_CALLS = {"add_docstr", "_add_docstr", "add_docstr_all", "add_newdoc", "add_newdoc_for_scalar_type"}


# From a docstring to prose

_SECTION = re.compile(
    r"(args?|arguments|parameters?|params|returns?|yields?|raises|examples?|usage|notes?|references?|"
    r"see also|attributes|keyword ar\w+|inputs?|outputs?|shape|warnings?|todo|methods|members)"
    r"\s*:{1,2}\s*\S{0,20}",
    re.IGNORECASE,
)
_SIGNATURE = re.compile(r"[\w.*]+\s*\(.*\)(\s*->.*)?")
_RULE = re.compile(r"[-=~^*#+_]{3,}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(\[])")
_LEFTOVER = re.compile(
    r"[{}|\\<>@$\x00]|::|https?:|\*\*|`|==|:\w+:|\.\. |>>>"
    r"|User Guide ?\.|reference see| (as|is|by|are)$"
)
_FIELD = re.compile(r"\w+ ?\(.{0,160}?\) ?:")
_MARKUP = (
    (re.compile(r"</?\w+>"), " "),
    (re.compile(r"\s*\[\w+\]_"), ""),
    (re.compile(r":math:`([\w\s=+\-,.()]{1,24})`"), r"\1"),
    (re.compile(r":math:`[^`]*`"), "\x00"),
    (re.compile(r"\[`~?([^\]`]+)`\](\([^)]*\)|_)?"), r"\1"),
    (re.compile(r"\[([^\]`]+)\](\([^)]*\)|_)"), r"\1"),
    (re.compile(r":[\w:+-]+:`([^`<]*?)\s*<[^`]*>`"), r"\1"),
    (re.compile(r":[\w:+-]+:`~[\w.]*?(\w+)`"), r"\1"),
    (re.compile(r":[\w:+-]+:`[!.]?([^`]*)`"), r"\1"),
    (re.compile(r"``([^`]*)``"), r"\1"),
    (re.compile(r"`([^`<]*?)\s*<[^`]*>`_{1,2}"), r"\1"),
    (re.compile(r"`~?([^`]*)`_{0,2}"), r"\1"),
    (re.compile(r"(?<![\w)])\*{1,2}(\w[^*]*?)\*{1,2}(?!\w)"), r"\1"),
)


_NOT_PROSE = ("-", "*", "#", "|", "+", ":", "[", "<", "..", "=")


def prose(docstring: str) -> str | None:
    """The summary and the first paragraph as plain sentences, 8 to 80 words in all, or None."""
    words: list[str] = []
    for paragraph in _paragraphs(docstring)[:2]:
        for pattern, replacement in _MARKUP:
            paragraph = pattern.sub(replacement, paragraph)
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            if not sentence or sentence[-1] == ":" or _LEFTOVER.search(sentence):
                continue
            new = (sentence if sentence[-1] in ".!?)\"'" else f"{sentence}.").split()
            if len(words) + len(new) > MAX_WORDS:
                return _finish(words)
            words += new
    return _finish(words)


def _finish(words: list[str]) -> str | None:
    plain = sum(bool(re.fullmatch(r"[(\"']?[A-Za-z][a-z'-]*[).,;:\"'?!]*", word)) for word in words)
    return " ".join(words) if len(words) >= MIN_WORDS and plain >= 0.7 * len(words) else None


def _paragraphs(docstring: str) -> list[str]:
    """Prose paragraphs up to the first section, doctest or field list."""
    paragraphs: list[str] = []
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    for number, block in enumerate(blocks):
        lines = block.split("\n")
        first = lines[0].strip()
        if len(lines) > 1 and _RULE.fullmatch(lines[1].strip()):
            if number:
                break
            continue
        if number == 0 and _SIGNATURE.fullmatch(" ".join(block.split())):
            continue
        kept = []
        for line in lines:
            if _SECTION.fullmatch(line.strip()) or line.lstrip().startswith((">>>", ":param", "@", ".. ")):
                break
            kept.append(line)
        is_prose = first and not lines[0].startswith((" ", "\t")) and not first.startswith(_NOT_PROSE)
        if kept and is_prose and not _FIELD.match(first.replace("`", "")):
            paragraphs.append("\n".join(kept))
        if len(kept) < len(lines):
            break
    return paragraphs


# From packages to prose


def _docstrings(source: str) -> Iterator[str]:
    """The docstrings of a source file, those that it attaches to compiled names included."""
    stack: list[ast.stmt] = list(reversed(ast.parse(source).body))
    while stack:
        node = stack.pop()
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if is_function or isinstance(node, ast.ClassDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring and not (node.name.startswith("__") or "test" in node.name.lower()):
                yield docstring
        call = getattr(node, "value", None)
        if (
            isinstance(call, ast.Call)
            and getattr(call.func, "id", getattr(call.func, "attr", "")) in DOC_CALLS
        ):
            constants = [part.value for part in ast.walk(call) if isinstance(part, ast.Constant)]
            yield max((value for value in constants if isinstance(value, str)), key=len, default="")
        for field in () if is_function else ("orelse", "body"):
            body = getattr(node, field, None)
            stack.extend(reversed(body) if isinstance(body, list) else ())


def _live_docstrings(module_name: str) -> Iterator[str]:
    module = importlib.import_module(module_name)
    for name in sorted(set(dir(module))):
        value = getattr(module, name)
        if name.startswith("_") or inspect.ismodule(value) or not callable(value):
            continue
        yield value.__doc__ or ""
        if inspect.isclass(value):
            for member_name, member in sorted(vars(value).items()):
                if callable(member) and not member_name.startswith("_"):
                    yield member.__doc__ or ""


def _package_folder(package: str) -> Path | None:
    if package == "python-stdlib":
        folder = Path(sysconfig.get_path("stdlib"))
        return folder if (folder / "string.py").is_file() else None
    spec = importlib.util.find_spec(IMPORT_NAMES.get(package, package))
    locations = spec.submodule_search_locations if spec else None
    return Path(locations[0]) if locations else None


def _label_texts(folder: Path, patterns: tuple[str, ...], label: str) -> Iterator[str]:
    live = [pattern.removeprefix("import:") for pattern in patterns if pattern.startswith("import:")]
    paths = {
        path for pattern in patterns if not pattern.startswith("import:") for path in folder.glob(pattern)
    }
    paths = sorted(path for path in paths if not path.name.startswith("test") and "conftest" not in path.name)
    random.Random(label).shuffle(paths)  # a label that is full before its last file still covers all of them
    for module_name in live:
        yield from filter(None, map(prose, _live_docstrings(module_name)))
    for path in paths:
        try:
            docstrings = list(_docstrings(path.read_text(encoding="utf8")))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        yield from filter(None, map(prose, docstrings))


def text_key(text: str) -> str:
    """What makes two texts the same: letters and digits, with identifiers left out when enough words remain.

    "Constructs a BertTokenizer ..." and "Constructs a GPT2Tokenizer ..." are one text.
    """
    words = [word for word in text.split() if not re.search(r"\w[A-Z0-9_.]\w|\d", word)]
    kept = " ".join(words) if len(words) >= MIN_WORDS - 2 else text
    return re.sub(r"[^a-z0-9]", "", kept.lower())


@functools.cache
def _corpus() -> dict[str, dict[str, list[str]]]:
    """package -> label -> texts, in the order of SOURCES; no text in two packages or under two labels."""
    corpus: dict[str, dict[str, list[str]]] = {}
    seen: set[str] = set()
    for package, groups in SOURCES.items():
        folder = _package_folder(package)
        if folder is None:
            continue
        found: dict[str, dict[str, str]] = {}
        for label, patterns in groups.items():
            texts = found[label] = {}
            for text in _label_texts(folder, tuple(patterns), label):
                key = text_key(text)
                if key not in seen:
                    texts.setdefault(key, text)
                if len(texts) == MAX_TEXTS:
                    break
        labels_of = Counter(key for texts in found.values() for key in texts)
        corpus[package] = {
            label: [text for key, text in texts.items() if labels_of[key] == 1]
            for label, texts in found.items()
        }
        seen.update(labels_of)
    return corpus


# Tasks


def documentation_tasks(
    max_train: int | None = 600,
    max_test: int | None = 300,
    seed: int = 0,
    *,
    packages: list[str] | None = None,
) -> list[Task]:
    """Which part of the package does this text document? One task for each package that is installed.

    Two thirds of a label's texts are for training. No text occurs twice, in one task or in two.
    """
    corpus = _corpus()
    for package in packages or ():
        if package not in corpus:
            raise ValueError(f"no documentation of {package!r}, only of {', '.join(corpus)}")
    tasks = []
    for package in corpus if packages is None else packages:
        rows = {label: [Example(text, label) for text in texts] for label, texts in corpus[package].items()}
        task = _balanced_task(package, rows, seed)
        if task is not None:
            tasks.append(task.subset(max_train, max_test, seed))
    return tasks


def _balanced_task(name: str, rows: dict[str, list[Example]], seed: int) -> Task | None:
    rows = {label: examples for label, examples in rows.items() if len(examples) >= MIN_ROWS}
    if len(rows) < 2:
        return None
    limit = MAX_RATIO * min(map(len, rows.values()))
    train, test = [], []
    for label, examples in rows.items():
        chosen = list(examples)
        random.Random(f"{seed}/{name}/{label}").shuffle(chosen)
        chosen = chosen[:limit]
        cut = len(chosen) * 2 // 3
        train += chosen[:cut]
        test += chosen[cut:]
    random.Random(f"{seed}/{name}/train").shuffle(train)
    random.Random(f"{seed}/{name}/test").shuffle(test)
    return Task(name, train, test, labels=list(rows), source="installed documentation")


# Tasks for a chat model

CHAT_TOPICS = (
    "ai",
    "coding",
    "emotion",
    "literature",
    "money",
    "movies",
    "psychology",
    "science",
    "sports",
    "trivia",
)
CHAT_PACKAGES = {  # package -> answer; only packages that slm_fast needs itself
    "python-stdlib": "python",
    "numpy": "numpy",
    "torch": "torch",
    "transformers": "transformers",
    "sympy": "sympy",
    "networkx": "networkx",
}
AREA_PACKAGE = "sympy"
AREA_ANSWERS = {"number theory": "numbers"}  # the other labels of the package are one word already
SHORT_WORDS = 28  # keeps prompt, answer and chat template within 64 tokens, mostly


def chat_tasks(max_train: int | None = 300, max_test: int | None = 120, seed: int = 0) -> list[Task]:
    """Generation tasks with one-word answers, which a frozen chat model does not give.

        chat-topic     a line of the chatterbot corpus -> its topic (only when chatterbot-corpus is installed)
        docs-package   a documentation text -> the package it comes from
        maths-area     a documentation text of sympy -> its area of mathematics

    No documentation text is in two of them.
    """
    package_rows: dict[str, list[Example]] = {}
    area_rows: dict[str, list[Example]] = {}
    for package, answer in CHAT_PACKAGES.items():
        for label, texts in _corpus().get(package, {}).items():
            short = [text for text in texts if len(text.split()) <= SHORT_WORDS]
            areas = len(short) * 3 // 4 if package == AREA_PACKAGE else 0
            for text in short[:areas]:
                prompt, area = (
                    f"Which area of mathematics is this about?\n{text}",
                    AREA_ANSWERS.get(label, label),
                )
                area_rows.setdefault(area, []).append(Example(prompt, area))
            for text in short[areas:]:
                prompt = f"Which Python package does this describe?\n{text}"
                package_rows.setdefault(answer, []).append(Example(prompt, answer))
    tasks = [_chat_topic_task("chat-topic", seed, "What is the topic of this line of a chat?\n")]
    tasks += [
        _balanced_task("docs-package", package_rows, seed),
        _balanced_task("maths-area", area_rows, seed),
    ]
    small = [task.subset(max_train, max_test, seed) for task in tasks if task is not None]
    return [replace(task, labels=None) for task in small]


def chat_topics(seed: int = 0) -> Task | None:
    """A line of the chatterbot corpus -> its topic, with labels; None where it is not installed."""
    return _chat_topic_task("chat", seed, "")


def _chat_topic_task(name: str, seed: int, prompt: str) -> Task | None:
    """Lines of a conversation stay on one side: no reply is tested whose question was trained on."""
    conversations = _conversations()
    if not conversations:
        return None
    topics_of: dict[str, set[str]] = {}
    for topic, lines in conversations:
        for line in lines:
            topics_of.setdefault(text_key(line), set()).add(topic)
    random.Random(f"{seed}/chat-topic").shuffle(conversations)
    sides: tuple[list[Example], list[Example]] = ([], [])
    seen: set[str] = set()
    count: Counter[str] = Counter()
    for topic, lines in conversations:
        side = count[topic] % 3 == 2  # every third conversation of a topic is for testing
        count[topic] += 1
        for line in lines:
            key = text_key(line)
            if len(topics_of[key]) == 1 and key not in seen:
                seen.add(key)
                sides[side].append(Example(prompt + line, topic))
    train, test = (_cap_per_target(rows) for rows in sides)
    return Task(name, train, test, labels=list(CHAT_TOPICS), source="chatterbot-corpus")


def _cap_per_target(rows: list[Example]) -> list[Example]:
    limit = MAX_RATIO * min(Counter(row.target for row in rows).values())
    count: Counter[str] = Counter()
    kept = []
    for row in rows:
        count[row.target] += 1
        if count[row.target] <= limit:
            kept.append(row)
    return kept


def _conversations() -> list[tuple[str, list[str]]]:
    """(topic, lines of prose of 3 to 28 words) of every conversation of the installed chatterbot corpus."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or importlib.util.find_spec("yaml") is None:
        return []
    import yaml

    folder = Path(spec.submodule_search_locations[0]) / "data" / "english"
    conversations = []
    for topic in CHAT_TOPICS:
        path = folder / f"{topic}.yml"
        data = yaml.load(
            path.read_text(encoding="utf8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
        for turns in data["conversations"]:
            lines = [" ".join(str(turn).split()) for turn in turns if "```" not in str(turn)]
            lines = [line for line in lines if 3 <= len(line.split()) <= SHORT_WORDS]
            if lines:
                conversations.append((topic, lines))
    return conversations
