"""Layers of a query, chosen by what they tell apart."""

import json
import sys
from pathlib import Path

import pytest
import torch
from test_backbone_encoder import base_of, texts_of, tokenizer, wanted

from slm_fast import SLMConfig, choose_query_layers
from slm_fast.backbone_encoder import BackboneEncoder
from slm_fast.encoder import Encoder, joined
from slm_fast.query_layers import layer_sets, measure_query_layers, separation


class Telling:
    """Of eight layers the third tells the tasks apart that texts name, the seventh does it better."""

    num_layers, hidden_size = 8, 16

    def layer_means(self, texts, layers, progress):
        assert not progress
        generator = torch.Generator().manual_seed(sum(map(ord, texts[0])))
        means = torch.randn(len(texts), len(layers), 16, generator=generator)
        for layer, distance in ((3, 1.2), (7, 12.0)):
            if layer in layers:
                means[:, layer] += distance * torch.eye(16)[[int(text[0]) for text in texts]]
        return means


TEXTS = {name: [f"{number} {n}" for n in range(80)] for number, name in enumerate("abc")}


def test_the_layers_that_tell_tasks_apart_are_chosen():
    chosen = choose_query_layers(Telling(), TEXTS, progress=False)
    assert chosen == [7]
    within = choose_query_layers(Telling(), TEXTS, budget=0.5, progress=False)
    assert max(within) == 3
    found = list(measure_query_layers(Telling(), TEXTS, budget=0.5, progress=False))
    assert max(max(row.layers) for row in found) == 4 and max(row.cost for row in found) == 0.5
    assert max(row.mean for row in found if 3 not in row.layers) < 0.6
    fewer = SLMConfig(entries_per_task=30)
    assert choose_query_layers(Telling(), TEXTS, config=fewer, progress=False) == [7]


def test_the_budget_is_one_of_layers():
    for budget in (0.1, 1.2, -1.0):
        with pytest.raises(ValueError, match="a share of the 8 layers"):
            choose_query_layers(Telling(), TEXTS, budget=budget)
    with pytest.raises(ValueError, match="two or more, got 1"):
        choose_query_layers(Telling(), {"a": TEXTS["a"]})
    with pytest.raises(ValueError, match="only an encoder with a model has layers"):
        Encoder(lambda texts: torch.ones(len(texts), 4)).layer_means(["a"], [0])


def test_sets_of_layers():
    sets = layer_sets(30, 576, 30)
    assert [5, 10, 15] in sets and [0, 10, 20, 30] in sets and all([layer] in sets for layer in range(31))
    assert max(len(layers) for layers in sets) * 576 <= 4096
    assert {max(layers) for layers in layer_sets(30, 576, 7)} == set(range(8))
    assert all(len(layers) == 1 for layers in layer_sets(4, 4096, 4))


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_means_of_layers_make_up_queries(family):
    base, texts = base_of(family), texts_of(0, 40)
    encoder = BackboneEncoder(base, tokenizer(), query_layers=[1])
    means = encoder.layer_means(texts, range(5))
    assert means.shape == (40, 5, 32) and not encoder._cache
    for layers in ([1, 3], [4]):
        want = BackboneEncoder(base, tokenizer(), query_layers=layers)(texts)
        torch.testing.assert_close(joined([means[:, n] for n in layers]), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(joined([means[:, n] for n in (1, 3)])[0], wanted(base, texts[0], [1, 3]))
    tasks = {f"t{t}": texts_of(t, 40) for t in range(3)}
    chosen = choose_query_layers(encoder, tasks, budget=0.5, progress=False)
    assert SLMConfig(query_layers=chosen).query_layers == chosen and max(chosen) <= 2


def test_a_users_folder_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import bench_layers

    monkeypatch.setattr(bench_layers, "load_base", lambda name: (base_of("llama"), tokenizer()))
    for task in range(2):
        rows = [json.dumps({"text": text, "label": n % 2}) for n, text in enumerate(texts_of(task, 40))]
        (tmp_path / f"own{task}.jsonl").write_text("\n".join(rows))
    out = tmp_path / "out.json"
    words = ["bench_layers.py", "--base", "x", "--data", str(tmp_path), "--budget", "0.5", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    bench_layers.main()
    found = json.loads(out.read_text())
    assert set(found["rows"][0]["accuracy"]) == {"own0", "own1"}
    assert (
        max(found["recommended"]) <= 2 and f"query_layers={found['recommended']}" in capsys.readouterr().out
    )


def test_separation():
    """Tasks apart are told apart, equal ones are not, and a text's own query makes no keys."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 80, 16, generator=generator)
    centres = torch.eye(16)[:3] * 12
    apart = {f"t{i}": noise[i] + centres[i] for i in range(3)}
    assert separation(apart) == {"t0": 1.0, "t1": 1.0, "t2": 1.0}
    equal = separation({f"t{i}": noise[i] for i in range(3)})
    assert 0.1 < sum(equal.values()) / 3 < 0.6
    swapped = {"t0": torch.cat([apart["t0"][:60], apart["t1"][:20]]), "t1": apart["t1"], "t2": apart["t2"]}
    assert separation(swapped) == {"t0": 0.75, "t1": 1.0, "t2": 1.0}
    with pytest.raises(ValueError, match="4 keys need at least 4 texts, got 3"):
        separation({"t0": apart["t0"][:4]})
