import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from slm_fast import SLMConfig
from slm_fast.loading import load_base
from slm_fast.pool import KnowledgePool

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("tasks", [16, 18])  # 64 entries fill their slots and slabs, 72 do not
def test_bytes_are_those_of_a_real_pool(tasks):
    import scaling

    shape = replace(scaling.SHAPES["minilm"], hidden=24, inter=40, layers=2, key_value=24)
    linears = {f"{layer}.{i}": pair for layer in range(2) for i, pair in enumerate(shape.linears)}
    pool = KnowledgePool(SLMConfig(r=3), linears)
    counted = scaling.Pool(4 * tasks, rank=3, per_task=4, dim=600, size=4)
    for task in range(tasks):
        queries = torch.randn(520, 600, generator=torch.Generator().manual_seed(task))
        pool.add_task(str(task), queries[:4], queries=queries)
    assert nbytes(t for f in pool.factors for t in (f.A, f.B)) == counted.factors(shape)
    assert nbytes(pool.metric.buffers()) == pytest.approx(counted.statistics, rel=0.01)
    slots = {n: b for n, b in pool.named_buffers() if not n.startswith(("factors.", "metric.", "row_entry"))}
    assert nbytes(slots.values()) + pool._index_codes().nbytes == pytest.approx(counted.index, rel=0.02)


def test_shapes_are_the_models():
    import scaling

    shape, (base, _) = scaling.SHAPES["minilm"], load_base("minilm")
    layers = [
        module
        for path, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layer" in f".{path}" and "pooler" not in path
    ]
    assert shape.features == sum(m.in_features + m.out_features for m in layers)
    assert shape.weights == sum(m.weight.numel() for m in layers)
    # SmolLM2-135M by the bytes of a real pool of 64 entries of rank 8 in bf16
    results = json.loads((ROOT / "benchmarks" / "results" / "suite_cpu_avx2.json").read_text())["results"]
    (record,) = (r for r in results if r["axes"].get("kind") == "memory" and r["axes"]["model"] == "smol")
    assert record["contenders"]["on"]["pool_bytes"] == 64 * 8 * 2 * scaling.SHAPES["smol"].features


def test_constants_are_found_and_none_is_negative():
    import scaling

    features = numpy.random.default_rng(0).uniform(0.1, 10.0, (12, 3))
    true = numpy.array([2.0, 0.0, 0.5])
    points = [scaling.Point("p", str(i), tuple(row), float(row @ true)) for i, row in enumerate(features)]
    assert scaling.fit(points) == pytest.approx(true, abs=1e-6)
    checked = scaling.check(points)
    assert len(checked) == 12 and max(abs(c.error) for c in checked) < 1e-6
    odd = [*points, scaling.Point("p", "odd", tuple(features[0]), 5 * points[0].seconds)]
    assert abs(scaling.check(odd)[-1].error) > 0.5  # a point does not vouch for itself
    lower = [replace(p, seconds=p.features[0] * 3 - 0.05 * p.features[1]) for p in points]
    assert (scaling.fit(lower) >= 0).all()


def a_result(slow):
    """Of a machine that is `slow(case)` times slower while a case is measured: searches, one case untimed."""
    import scaling

    machine = {
        "cpu": "any",
        "threads": 2,
        "isa": "avx2",
        "cache_bytes": 32 << 20,
        "core_cache_bytes": 1 << 20,
    }
    usual, records = scaling.Speed(20e9, 100e9, 32 << 20, 1 << 20), []
    sizes = [
        (keys, queries) for keys in (100, 1000, 10_000, 100_000, 1_000_000) for queries in (1, 4, 16, 64)
    ]
    constants = {scaling.SEARCH[0]: [9.0, 4.0], scaling.SEARCH[1]: [30.0, 0.5, 3.0, 0.6, 0.4, 1.0]}
    for i, (keys, queries) in enumerate(sizes):
        pace = {"read_bytes_per_second": 20e9 / slow(i), "float32_operations_per_second": 100e9 / slow(i)}
        phase, features = scaling.search_features(keys, 384, queries, usual)
        seconds = slow(i) * float(numpy.array(constants[phase]) @ features)
        axes = {"keys": keys, "dim": 384, "queries": queries, "cache": "hot"}
        records.append({"section": "search", "case": f"{keys} {queries}", "axes": axes, "ours": "slm_fast"})
        records[-1] |= {"pace": pace, "contenders": {"slm_fast": {"seconds": seconds}}}
    records.append({"section": "model", "case": "memory", "axes": {}, "ours": "on", "contenders": {"on": {}}})
    ceilings = {"operations_per_second": {"float32": 120e9}}
    return {"machine": machine, "ceilings": ceilings, "results": records}


def test_points_are_judged_at_the_pace_of_their_minute():
    import scaling

    points = [*scaling.points(a_result(lambda i: 1.5 if i % 3 == 0 else 1.0))]
    checked = scaling.check(points)
    assert len(checked) == 20 and max(abs(c.error) for c in checked) < 0.02
    result = a_result(lambda i: 1.5 if i % 3 == 0 else 1.0)
    for record in result["results"][:-1]:
        record["pace"] = result["results"][1]["pace"]
    assert max(abs(c.error) for c in scaling.check([*scaling.points(result)])) > 0.2
    machine = scaling.Machine.of(result, points)
    assert machine.speed == scaling.Speed(20e9, 100e9, 32 << 20, 1 << 20)
    assert machine.search(scaling.Pool(100_000, dim=384)) == pytest.approx(
        next(p.seconds for p in points if p.name == "100000 1") / 1.5 ** (12 % 3 == 0), rel=0.02
    )


def test_a_contender_that_failed_is_no_point():
    import scaling

    result = a_result(lambda i: 1.0)
    axes = {"kind": "decode", "model": "smol", "rows": 1, "distinct": 2}
    record = {"section": "model", "case": "decode, smol, 1 rows", "axes": axes, "ours": "on"}
    record["pace"] = result["results"][0]["pace"]
    record["contenders"] = {"on": {"seconds": 0.02}, "off": {"error": "wrong"}}
    result["results"].append(record)
    assert [p.name for p in scaling.points(result)][20:] == ["decode, smol, 1 rows, pool on"]


def test_what_fits_grows_with_memory_and_shrinks_with_the_model():
    import scaling

    pool = scaling.Pool(4)
    smol, large = scaling.SHAPES["smol"], scaling.SHAPES["llama7b"]
    count = scaling.tasks_that_fit(smol, 24e9, pool)
    assert replace(pool, entries=4 * count).memory(smol) <= 24e9 * 1.0001
    assert replace(pool, entries=4 * (count + 1)).memory(smol) > 24e9 * 0.9999
    assert scaling.tasks_that_fit(large, 24e9, pool) < count < scaling.tasks_that_fit(smol, 48e9, pool)
    assert scaling.tasks_that_fit(large, 1e6, pool) == 0


@pytest.mark.parametrize("size,words", [(512, "512 B"), (40e6, "40 MB"), (1.5e12, "1.5 TB")])
def test_amounts(size, words):
    import units

    assert units.amount(size) == words
