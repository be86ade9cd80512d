"""The benchmark of retrieval: what it calls a hub, and the model of a saved pool."""

import json
import sys
from pathlib import Path

import pytest
import torch
from test_backbone_encoder import base_of, texts_of, tokenizer

from slm_fast import SLMConfig, get_slm_model
from slm_fast.continual.benchmarks import tasks_in_order

NAMES = tasks_in_order("bert5")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import bench_routing

    monkeypatch.setattr(bench_routing, "NUM_TASKS", (5,))
    monkeypatch.setattr(bench_routing, "PROBES", ())
    return bench_routing


def test_hubs_do_not_depend_on_how_many_texts_a_task_has(bench):
    own = [torch.tensor([[2 * t, 2 * t + 1]]) for t in range(5)]
    sizes = (56, 1500, 100, 300, 7)
    perfect = [row.expand(size, -1) for row, size in zip(own, sizes, strict=True)]
    assert bench.hubs(perfect, 10) == 0
    drawn = [row.clone() for row in perfect]
    for part in drawn:
        part[: len(part) // 7, 0] = 3  # a key near everything
    few = [part[:: len(part) // 7][:7] for part in drawn]
    assert bench.hubs(few, 10) > 1 and bench.hubs(drawn, 10) == pytest.approx(bench.hubs(few, 10), abs=0.3)


@pytest.fixture
def folder(tmp_path):
    """The five tasks as data, and a pool of a base that generates, which has learnt them."""
    (tmp_path / "bert5").mkdir()
    for number, name in enumerate(NAMES):
        rows = [json.dumps({"text": text, "label": n % 2}) for n, text in enumerate(texts_of(number % 3, 8))]
        for part in ("train", "test"):
            (tmp_path / "bert5" / f"{name}.{part}.jsonl").write_text("\n".join(rows))
    return tmp_path


def saved_pool(folder, entries: int = 4, names=NAMES):
    base = base_of("llama")
    base.config._name_or_path = "some/model"
    config = SLMConfig(entries_per_task=entries, encoder_name_or_path="backbone")
    model = get_slm_model(base, config, tokenizer=tokenizer())
    for number, name in enumerate(names):
        model.add_task(name, texts_of(number % 3), progress=False)
    model.save_pretrained(folder / "pool")


def run(bench, monkeypatch, folder, *words) -> list[str]:
    """The names of the bases that a run of the benchmark loads."""
    loaded = []

    def load(name):
        loaded.append(name)
        return base_of("llama"), tokenizer()

    monkeypatch.setattr(bench, "load_base", load)
    common = ["--benchmark", "bert5", "--retrieval", "all layers, whitened", "--data", str(folder)]
    common += ["--pool", str(folder / "pool"), "--json", str(folder / "out.json")]
    monkeypatch.setattr(sys, "argv", ["bench_routing.py", *common, *words])
    bench.main()
    return loaded


def test_a_pool_is_asked_on_its_own_base(bench, minilm, folder, monkeypatch):
    saved_pool(folder)
    assert run(bench, monkeypatch, folder) == ["some/model"]
    (row,) = json.loads((folder / "out.json").read_text())["results"][0]["retrievals"]
    assert set(row["final"]) == set(NAMES) and "prefill" not in row
    assert run(bench, monkeypatch, folder, "--base", "b", "--backbone", "c") == ["c", "b"]
    *_, row = json.loads((folder / "out.json").read_text())["results"][0]["retrievals"]
    assert row["retrieval"].startswith("c's layers 2, 3, 4") and row["prefill"] == 1.0 and row["encoding"] > 0


def test_a_pool_that_does_not_fit_is_one_line(bench, minilm, folder, monkeypatch, capsys):
    for options, message in (
        (dict(entries=2), "the pool's task 'ag' has 2 entries, not 4"),
        (dict(names=("ag",)), "unknown task 'yelp'"),
    ):
        saved_pool(folder, **options)
        with pytest.raises(SystemExit):
            run(bench, monkeypatch, folder)
        assert message in capsys.readouterr().err.splitlines()[-1]
