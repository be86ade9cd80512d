import importlib.util
from collections import Counter

import pytest

from slm_fast.continual import corpora
from slm_fast.continual.tasks import load_tasks


@pytest.fixture(scope="module")
def tasks():
    return corpora.documentation_tasks()


def test_documentation_tasks_are_large_enough(tasks):
    assert [task.name for task in tasks][:4] == ["python-stdlib", "numpy", "torch", "transformers"]
    assert len(tasks) >= 5
    for task in tasks:
        assert task.kind == "classification" and task.source == "installed documentation"
        assert 4 <= len(task.labels) <= 8
        train, test = (Counter(row.target for row in rows) for rows in (task.train, task.test))
        assert set(train) == set(test) == set(task.labels)
        assert min(train.values()) >= 25 and min(test.values()) >= 10
        assert max(train.values()) <= 3.2 * min(train.values())
        assert len(task.train) <= 600 and len(task.test) <= 300


def test_no_text_occurs_twice(tasks):
    keys = [corpora.text_key(row.text) for task in tasks for row in task.train + task.test]
    assert len(keys) == len(set(keys))


def test_texts_are_prose(tasks):
    for task in tasks:
        for row in task.train + task.test:
            assert 8 <= len(row.text.split()) <= 80
            assert not any(mark in row.text for mark in (">>>", "::", "`", ":math:", "\n", "http"))


def test_reading_the_packages_again_gives_the_same_texts(tasks, monkeypatch):
    first = dict(list(corpora._corpus().items())[:2])
    monkeypatch.setattr(corpora, "SOURCES", {name: corpora.SOURCES[name] for name in first})
    assert corpora._corpus.__wrapped__() == first


def test_the_seed_decides_the_split(tasks):
    assert corpora.documentation_tasks() == tasks
    other = corpora.documentation_tasks(seed=1)
    assert other != tasks and other[0].labels == tasks[0].labels


def test_limits_and_packages():
    torch_task, numpy_task = corpora.documentation_tasks(40, 20, packages=["torch", "numpy"])
    assert (torch_task.name, numpy_task.name) == ("torch", "numpy")
    assert len(torch_task.train) == 40 and len(torch_task.test) == 20
    assert load_tasks("docs", ["numpy"])[0].labels == numpy_task.labels
    with pytest.raises(ValueError, match="no documentation of 'absent', only of python-stdlib"):
        corpora.documentation_tasks(packages=["absent"])


def test_small_labels_are_dropped_and_large_ones_cut():
    rows = {
        name: [corpora.Example(f"{name} {i}", name) for i in range(n)] for name, n in (("a", 39), ("b", 40))
    }
    assert corpora._balanced_task("t", rows, 0) is None
    rows["c"] = [corpora.Example(f"c {i}", "c") for i in range(500)]
    task = corpora._balanced_task("t", rows, 0)
    assert task.labels == ["b", "c"]
    assert Counter(row.target for row in task.train + task.test) == {"b": 40, "c": 120}


@pytest.mark.parametrize(
    "docstring, text",
    [
        ("Add two numbers that were given by the caller", "Add two numbers that were given by the caller."),
        (
            """f(x, *, out=None) -> Tensor

            Return ``x`` as a :class:`~torch.nn.Linear` layer with *all* of `its` weights.

            Args:
                x (Tensor): the input
            """,
            "Return x as a Linear layer with all of its weights.",
        ),
        (
            """
            Compute the sum of all the elements of the array [1]_.

            The second paragraph belongs to the text. It is kept:

            And the third one does not belong to it.

            Parameters
            ----------
            a : array
            """,
            "Compute the sum of all the elements of the array. The second paragraph belongs to the text.",
        ),
        ("Constructs a [`BertModel`] from a `config` that has been given.\n>>> code()", None),
        ("Too short to be kept.", None),
        ("A sentence with :math:`\\frac{a}{b}` in it is dropped because it reads badly.", None),
        ("x (`int`, *optional*, defaults to 3): The number of layers of this model that are used.", None),
    ],
)
def test_prose(docstring, text):
    if docstring.startswith("Constructs"):
        text = "Constructs a BertModel from a config that has been given."
    assert corpora.prose(docstring) == text


def test_docstrings_of_a_source_file():
    source = '''
class A:
    """doc of A"""
    def method(self):
        """doc of method"""
        def inner():
            """not documentation"""
    def __init__(self):
        """doc of init"""
if True:
    async def function():
        """doc of function"""
add_docstr(torch.abs, r"""doc of abs""")
cross = _add_docstr(_C.cross, "doc of cross")
'''
    found = list(corpora._docstrings(source))
    assert found == ["doc of A", "doc of method", "doc of function", "doc of abs", "doc of cross"]


def test_identifiers_do_not_make_texts_different():
    first = corpora.text_key("Construct a fast BertTokenizer that is backed by the tokenizers library.")
    second = corpora.text_key("Construct a fast GPT2Tokenizer that is backed by the tokenizers library.")
    assert first == second != corpora.text_key("Construct a slow tokenizer.")


def test_chat_tasks():
    tasks = {task.name: task for task in corpora.chat_tasks()}
    assert {"docs-package", "maths-area"} <= set(tasks)
    texts = [
        row.text.split("\n", 1)[1] for name in ("docs-package", "maths-area") for row in tasks[name].train
    ]
    assert len(texts) == len(set(texts))
    for task in tasks.values():
        assert task.kind == "generation" and task.metric == "accuracy"
        assert 100 <= len(task.train) <= 300 and 50 <= len(task.test) <= 120
        assert {row.target for row in task.test} == {row.target for row in task.train}
        assert all(len(row.target.split()) == 1 and len(row.text.split()) <= 40 for row in task.train)
        assert max(Counter(row.target for row in task.test).values()) < 0.4 * len(task.test)
        assert not {row.text for row in task.train} & {row.text for row in task.test}
    assert corpora.chat_tasks() == list(tasks.values())


def test_chat_topic_needs_its_corpus(monkeypatch):
    if importlib.util.find_spec("chatterbot_corpus") is None:
        pytest.skip("chatterbot-corpus is not installed")
    names = [task.name for task in corpora.chat_tasks()]
    assert names == ["chat-topic", "docs-package", "maths-area"]
    monkeypatch.setattr(corpora, "_conversations", list)
    assert [task.name for task in load_tasks("chat")] == names[1:]
