import copy
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, StaticCache

ROOT = Path(__file__).parents[1]
counts_tokens = pytest.mark.skipif(
    not hasattr(StaticCache(LlamaConfig(num_hidden_layers=1), 1).layers[0], "cumulative_length"),
    reason="an older transformers, with whose cache no step is measured",
)


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_a_search_is_judged_by_exact_scores():
    from suite import search

    keys = search.make_keys(200, 16, "cpu")
    query = search.make_queries(keys, 3)
    checked = search.Checked(query, keys)
    right = (query.double() @ keys.double().T).topk(search.TOP_K).indices
    assert checked.exact(right) is None and checked.recall(right) == 1.0
    worse = right.clone()
    worse[1, 2] = (query[1] @ keys.T).argmin()
    assert checked.exact(worse) == "wrong top 4 for 1 queries" and checked.recall(worse) == pytest.approx(
        11 / 12
    )
    twice = right.clone()
    twice[0] = right[0, :1]
    assert checked.exact(twice) is not None
    missing = right.clone()
    missing[2, 3] = -1  # as FAISS says that it found too few
    assert checked.recall(missing) < 1.0


@pytest.mark.parametrize("peers", [(), ("faiss flat", "faiss hnsw", "faiss ivf")], ids=["alone", "faiss"])
def test_search_cases_are_right(peers):
    from suite import search

    if peers:
        pytest.importorskip("faiss")
    for cold in (False, True):
        case = search.Problem(300, 384, "cpu", cold=cold, peers=peers).case(5)
        names = [contender.name for contender in case.contenders]
        assert names == ["slm_fast", "slm_fast, no codes", "torch", *peers]
        assert (case.copies > 1) == cold and case.warm is True
        assert case.skipped == ({} if peers else dict.fromkeys(search.PEERS, "not asked for"))
        for contender in case.contenders:
            found = contender.run(case.copies - 1)
            assert contender.check is None or contender.check(found) is None


def searches(monkeypatch, quick, available=1 << 40):
    """{(keys, queries, kind of the case): what is left out} of the section's list on a CPU."""
    from suite import search
    from suite.cases import Case

    class Listed:
        def __init__(self, num_keys, dim, device, dtype=torch.float32, cold=False, peers=(), reason=""):
            self.sizes, self.cold = (num_keys, dim, dtype), cold
            self.skipped = {name: reason for name in search.PEERS if name not in peers}

        def case(self, count):
            return Case("search", *search.named(*self.sizes, count, self.cold), [], skipped=self.skipped)

    monkeypatch.setattr(search, "Problem", Listed)
    monkeypatch.setattr(search, "refresh_case", lambda keys: Case("search", "", {"kind": "refresh"}, []))
    monkeypatch.setattr(search, "available_bytes", lambda device: available)
    found = [(case.axes, case.skipped) for case in search.cases(quick, "cpu") if "keys" in case.axes]
    return {(a["keys"], a["queries"], a["cache"], a["dim"]): skipped for a, skipped in found}


def test_every_size_and_peer_that_a_search_leaves_out_is_named(monkeypatch):
    from suite import search

    full, graphs = searches(monkeypatch, False), set(search.PEERS[1:])
    sizes = {(keys, count, "hot", 384) for keys in search.SIZES for count in (1, 4, 16, 64, 256)}
    assert full.keys() == sizes | {(1000, 1, "cold", 384), (100, 1, "hot", 2688)}
    left = {key[:2] for key, skipped in full.items() if "slm_fast" in skipped}
    assert left == {(1_000_000, 256), (10_000_000, 64), (10_000_000, 256)}
    assert "256,000,000 scores" in full[1_000_000, 256, "hot", 384]["slm_fast"]
    for (keys, count, cache, dim), skipped in full.items():
        if (keys, count) not in left:
            built = 1000 <= keys <= 100_000 and cache == "hot" and dim == 384
            assert set(skipped) == (set() if built else graphs)
    quick = searches(monkeypatch, True)
    assert [key for key, skipped in quick.items() if not skipped] == [
        (10_000, n, "hot", 384) for n in (1, 16)
    ]
    short = searches(monkeypatch, False, available=8 << 30)
    assert {key[0] for key, skipped in short.items() if "memory" in str(skipped)} == {10_000_000}
    assert short[10_000_000, 1, "hot", 384] == {"slm_fast": "needs 12.3 GB of memory, 8.59 GB are free"}


def test_a_problem_says_why_its_peers_take_no_part(monkeypatch):
    from suite import search

    keys = search.make_keys(40, 16, "cpu")
    monkeypatch.setattr(search, "make_keys", lambda *_: keys)
    on_cuda = search.Problem(40, 16, "cuda", peers=search.PEERS[:1], reason="too many").skipped
    assert (
        on_cuda == dict.fromkeys(search.PEERS, on_cuda["faiss flat"]) and "has flat" in on_cuda["faiss ivf"]
    )
    monkeypatch.setattr(search, "available_bytes", lambda device: 0)
    half = search.Problem(40, 16, "cpu", dtype=torch.float16).skipped
    assert "float16" in half["torch"] and "memory" in half["faiss flat"]


def test_a_case_that_is_left_out_costs_nothing_and_is_compared_with_nothing():
    import compare
    from suite import command, page
    from suite.cases import FULL, Case, measure

    case = Case(
        "search", "a", {"keys": 7, "queries": 1, "cache": "hot", "dim": 384}, [], skipped={"slm_fast": "no"}
    )
    begin = time.perf_counter()
    record = measure(case, FULL)
    assert time.perf_counter() - begin < 0.5 and "pace" not in record
    assert record["contenders"] == {"slm_fast": {"error": "no"}}
    assert list(command.lines(record, {"copy_bytes_per_second": 1.0, "operations_per_second": {}}))[
        1
    ].endswith("no")
    assert compare.of_suite({"results": [record]}, None) == {}
    (plot,) = (plot for plot in page.PLOTS if plot.file == "search_keys")
    assert page.chosen([record], plot) == []


def test_mixture_cases_are_right():
    from suite import mixture

    kinds = set()
    for case in mixture.cases(True, "cpu"):
        kinds.add(case.axes["kind"])
        assert not case.skipped
        for contender in case.contenders:
            assert contender.check(contender.run(0)) is None, (case.name, contender.name)
    assert kinds == {"update", "flat", "layer", "step", "layer step"}
    names = [contender.name for contender in case.contenders]
    assert names == ["frozen", "slm_fast", "torch", "dense", "peft"]
    for contender in case.contenders[1:]:
        right = contender.run(0)
        for wrong in range(4):  # y, dx, dA, dB of a step
            broken = [t * 1.001 if i == wrong else t for i, t in enumerate(right)]
            assert "wrong result" in contender.check(broken), contender.name


def test_full_mode_has_prefill_of_popular_entries_and_layers_of_many_tokens(monkeypatch):
    from suite import mixture

    built = []
    for name in ("update_case", "layer_case", "step_case", "layer_step_case", "flat_case"):
        monkeypatch.setattr(mixture, name, lambda *args, name=name: built.append((name, *args)))
    list(mixture.cases(False, "cpu"))
    prefill = {args[4:7:2] for args in built if args[0] == "update_case" and args[2] == 128 and args[1] == 8}
    assert prefill == {*((8, popularity) for popularity in mixture.POPULARITY), (64, "distinct")}
    assert {args[3] for args in built if args[0] == "layer_case"} == {1, 128}
    assert len({args for args in built if args[0] == "update_case"}) == sum(
        a[0] == "update_case" for a in built
    )
    monkeypatch.undo()
    for case in (mixture.layer_case(3, "cpu", 16), mixture.update_case(2, 8, 16, 64, 2, "identical", "cpu")):
        for contender in case.contenders:
            assert contender.check(contender.run(0)) is None, (case.name, contender.name)


@pytest.mark.parametrize(("popularity", "distinct"), [("distinct", 16), ("identical", 2), ("zipf", None)])
def test_copies_touch_more_than_the_caches_and_nothing_twice(popularity, distinct):
    from suite import machine, mixture

    case = mixture.update_case(8, 1, 32, 8, 2, popularity, "cpu")
    assert distinct is None or case.axes["distinct"] == distinct
    touched = 2 * case.axes["distinct"] * 8 * mixture.FEATURES * 4
    assert case.copies * touched >= 2 * machine.cache_bytes("cpu")
    assert case.axes["entries"] % case.copies == 0
    for contender in case.contenders[:2]:
        first, last = contender.run(0).clone(), contender.run(case.copies - 1)
        assert contender.check(first) is None and contender.check(last) is not None  # other entries


@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf", "identical"])
def test_popularity(popularity):
    from suite import mixture

    pool = mixture.Pool(64, 2, 8, "cpu")
    indices, weights = pool.pick(32, 2, popularity)
    assert indices.shape == weights.shape == (32, 2) and torch.allclose(weights.sum(1), torch.ones(32))
    assert all(len(set(row)) == 2 for row in indices.tolist())
    distinct = indices.unique().numel()
    assert distinct == {"distinct": 64, "identical": 2}.get(popularity, distinct)
    if popularity == "zipf":
        assert distinct < pool.pick(32, 2, "uniform")[0].unique().numel()
    spread = pool.pick(8, 2, "distinct", among=4)[0]
    assert sorted(spread.unique().tolist()) == [0, 16, 32, 48]


def test_serving_says_why_cuda_has_none():
    from suite import serve
    from suite.cases import QUICK

    assert "CPU" in serve.unavailable("cuda") and list(serve.records(True, "cuda", QUICK)) == []
    assert "transformers" in (serve.unavailable("cpu") or "transformers")


def test_served_tokens_are_judged_by_the_reference():
    pytest.importorskip("slm_fast.continuous", exc_type=ImportError)
    import contenders
    from suite import serve

    model = contenders.make_engine(contenders.random_llama(32, 64, 2, 4, 64, torch.float32), "all-linear", 8)
    with torch.no_grad():
        for factors in model.pool.factors:
            factors.B *= 50
    prompts = serve.make_prompts(64, 2)
    serve.verify(model, prompts)
    routing = contenders.make_routing(model, 2)
    loads, judge = serve.everything(model, routing, prompts, 4, float("inf")), serve.Judge(model, prompts, 4)
    tokens = {name: load() for name, load in loads.items()}
    frozen, mixed = (judge.check(r, torch.float32) for r in (None, routing))
    assert frozen(tokens["off"]) is None and frozen(tokens["transformers"]) is None
    assert mixed(tokens["on"]) is None
    assert "likeliest" in frozen(tokens["on"]) and "likeliest" in mixed(tokens["off"])
    assert "likeliest" in mixed(tokens["on"][::-1]) and "lengths" in mixed([row[:-1] for row in tokens["on"]])


def test_serving_is_measured_at_once_and_then_under_load(monkeypatch):
    """Of a small model; under load no time is taken."""
    pytest.importorskip("slm_fast.continuous", exc_type=ImportError)
    import contenders
    from suite import serve
    from suite.cases import Effort

    base = contenders.random_llama(32, 64, 2, 4, 64, torch.float32)
    monkeypatch.setattr(serve.common, "make_base", lambda name, dtype: base)
    monkeypatch.setattr(serve, "Effort", lambda *_: Effort(1, 1, 0.0))  # a call begins and ends a server
    records = serve.records(True, "cpu", Effort(2, 2, 0.1))
    record = next(records)
    assert record["section"] == "serve" and record["axes"]["arrivals"] == "at once"
    assert set(record["contenders"]) == set(serve.CONTENDERS)
    for found in record["contenders"].values():
        assert 0 < found["first_token_50"] <= found["first_token_95"] < found["seconds"]
        assert found["tokens_per_second"] == pytest.approx(4 * 6 / found["seconds"])
    names = dict.fromkeys(serve.CONTENDERS, {})
    monkeypatch.setattr(serve, "measure", lambda case, effort: {"axes": case.axes, "contenders": names})
    (loaded,) = records
    assert (loaded["axes"]["arrivals"], loaded["axes"]["load"]) == ("poisson", 0.5)
    assert loaded["axes"]["rate"] == pytest.approx(record["contenders"]["on"]["tokens_per_second"] / 6 / 2)
    assert serve.targets([record], {}) == []


def test_a_protocol_without_ours_is_recorded():
    from suite import quality

    joint = {"joint": {"average_accuracy": 0.7, "forgetting": None}}
    record = quality.as_record({"methods": joint, "tasks": ["a", "b"]}, "joint")
    assert record["ours"] == "joint" and record["contenders"]["joint"]["average"] == 0.7
    ours = joint | {"slm": {"average_accuracy": 0.6, "forgetting": 0.1}}
    run = {"methods": ours, "tasks": ["a"], "routing": {"accuracy": {"a": 0.9, "b": 0.7}}}
    record = quality.as_record(run, "slm")
    assert record["ours"] == "slm" and record["contenders"]["slm"]["routing"] == pytest.approx(0.8)


def test_the_small_cases_run_under_pytest():
    pytest.importorskip("pytest_benchmark")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    done = subprocess.run([*command, "--benchmark-disable"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout


SMALL = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=500
)


@counts_tokens
def test_cases_of_a_model_on_a_gpu_are_right(monkeypatch):
    """On the CPU, without graphs; each verifies its contenders before it is returned."""
    from suite import gpu_model
    from suite.cases import Effort, measure

    base, effort = gpu_model.make_base("cpu", **SMALL), Effort(2, 2, 0.0)
    decode, prefill = gpu_model.decode_case(base, 3, graph=False), gpu_model.prefill_case(base, 3, 20)
    names = {"frozen", "off", "on", "peft", "dense"}
    assert set(measure(prefill, effort)["contenders"]) == names
    found = measure(decode, effort)["contenders"]
    assert set(found) == names | {"frozen eager", "on eager"} and all("seconds" in f for f in found.values())
    step = {c.name: c.run for c in decode.contenders}["on"]
    assert torch.equal(step(0), step(0))  # at the same place, not one token further
    found = measure(gpu_model.step_case("cpu", 4, 32, **SMALL), effort)["contenders"]
    assert set(found) == {"frozen", "engine", "peft", "dense"}
    real = gpu_model.common.forwards

    def others(base, model, targets, routing, wrong):
        return real(base, model, targets, routing, wrong) | {
            "on": gpu_model.common.engine_forward(model, routing.rows([1, 2, 0]))
        }

    monkeypatch.setattr(gpu_model.common, "forwards", others)
    case = gpu_model.decode_case(base, 3, graph=False)
    with pytest.raises(RuntimeError, match="wrong logits.*nothing is timed"):
        measure(case, effort)


def test_cases_of_a_model_on_a_cpu_are_right(monkeypatch):
    """Of a small model in place of the section's."""
    from suite import command, model
    from suite.cases import Effort

    def small(*args):
        return model.common.random_llama(64, 128, 2, 4, 500, torch.bfloat16)

    for module, name, instead in (
        (model.common, "make_base", small),
        (model.bench_training, "make_base", lambda name, dtype: small().to(dtype).train()),
        (model.first_token, "records", lambda base, counts, effort: iter([])),
    ):
        monkeypatch.setattr(module, name, instead)
    monkeypatch.setattr(model, "prefill_case", lambda *args, made=model.prefill_case: made(*args[:2], 2, 16))
    decode, prefill, step = model.records(True, "cpu", Effort(2, 2, 0.0))
    kinds = [record["axes"]["kind"] for record in (decode, prefill, step)]
    assert kinds == ["decode", "prefill", "step"] and step["ours"] == "engine"
    names = {"frozen", "off", "on", "merged", "peft", "dense"}
    for record, contenders in (
        (decode, names),
        (prefill, names),
        (step, {"frozen", "engine", "peft", "dense"}),
    ):
        assert contenders <= set(record["contenders"]) <= contenders | {"frozen fp32"}
        for found in record["contenders"].values():
            assert found["tokens_per_second"] * found["seconds"] == pytest.approx(
                record["axes"]["rows"] * record["axes"].get("tokens", 1)
            )
        ceilings = {"read_bytes_per_second": 1e9, "operations_per_second": {"float32": 1e11}}
        assert "GFLOP/s" in next(command.lines(record, ceilings))
    (row,) = model.targets([decode, prefill, step], {})
    assert row["reached"] == pytest.approx(1 / step["contenders"]["peft"]["ratio"])


def test_a_training_steps_operations_are_counted():
    """Forward and backward as PyTorch counts them, where no weight learns and attention is whole."""
    from suite import gpu_model
    from torch.utils.flop_counter import FlopCounterMode

    base = gpu_model.make_base("cpu", **SMALL).float().requires_grad_(False)
    ids = torch.ones(4, 32, dtype=torch.long)
    case = gpu_model.training_case("wide", {}, base, ids, ())
    base.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        inputs = base.get_input_embeddings()(ids).requires_grad_()
        base(inputs_embeds=inputs).logits.sum().backward()
    features = 2 * (4 * 128 + 3 * (64 + 128))
    mixture, attention = 6 * 4 * 32 * 2 * 8 * features, 3 * 2 * 4 * 32 * 32 * 64 * 2
    assert case.operations == pytest.approx(counter.get_total_flops() - attention + mixture, rel=0.02)
    assert case.bytes > 2 * 4 * gpu_model.linears(base) and case.dtype == "float32"


STORED = json.loads((ROOT / "benchmarks" / "results" / "suite_cpu_avx2.json").read_text())


def targets_of(section, change=None):
    """{what: row} of a section's targets in the stored result; change: of a record, by its case and axes."""
    from suite import command

    records = copy.deepcopy([r for r in STORED["results"] if r["section"] == section])
    for record in records if change else ():
        change(record["axes"], record["contenders"])
    rows = command.SECTIONS[section].targets(records, STORED["ceilings"])
    return {row["what"]: row for row in rows}


def test_targets_of_the_mixture_are_of_decoding_and_of_pools():
    from suite import mixture

    decoding = "mixture, decoding, 32 distinct rows: gather and bmm / slm_fast"
    pools = "mixture, pools of 12 to 10,000 entries, 8 rows: dearest / 12 entries"
    rows = targets_of("mixture")
    assert list(rows) == [decoding, pools] and all(row["holds"] for row in rows.values())
    (record,) = (
        r for r in STORED["results"] if r["case"].startswith("update, 32 x 1") and "distinct" in r["case"]
    )
    assert rows[decoding]["reached"] == record["contenders"]["torch"]["ratio"] >= 3

    def worse(axes, contenders):
        if axes["kind"] == "flat":
            contenders["10,000 entries"] = {"error": "wrong"}
        elif "torch" in contenders:
            contenders["torch"]["ratio"] = 2.9

    rows = targets_of("mixture", worse)
    assert [row["holds"] for row in rows.values()] == [False, False] and rows[pools]["reached"] == math.inf

    def without_peer(axes, contenders):
        contenders["torch"] = {"error": "not installed"}

    assert list(targets_of("mixture", without_peer)) == [pools]
    assert mixture.targets([], {}) == []


def test_the_target_of_the_model_is_its_training_step():
    what = "model, training step, wide, 8 x 128 tokens: ours / PEFT"
    rows, records = targets_of("model"), (r for r in STORED["results"] if r["section"] == "model")
    (record,) = (record for record in records if record["axes"]["kind"] == "step")
    assert list(rows) == [what] and rows[what]["holds"] and rows[what]["wanted"] == "<= 1.05"
    assert rows[what]["reached"] == pytest.approx(1 / record["contenders"]["peft"]["ratio"])

    def change(peft):
        return lambda axes, contenders: contenders.update(peft=peft)

    assert not targets_of("model", change({"ratio": 0.9}))[what]["holds"]
    assert targets_of("model", change({"error": "not installed"})) == {}


def test_targets_of_the_stored_search():
    rows = list(targets_of("search").values())[-2:]
    assert ["growth from 100,000 to 10,000,000 keys" in row["what"] for row in rows] == [True, True]
    assert all(row["wanted"] == "<= 0.1" for row in rows)


@counts_tokens
@pytest.mark.parametrize("how", ["wrong", "raises", "cannot be built"])
@pytest.mark.parametrize("peer", ["peft", "dense"])
def test_a_peer_that_fails_in_a_model_has_its_words(monkeypatch, peer, how):
    from suite import gpu_model
    from suite.cases import Effort, measure

    real = gpu_model.common.forwards

    def others(base, model, targets, routing, wrong):
        found = real(base, model, targets, routing, wrong)
        good = found.pop(peer)

        def broken(**inputs):
            if how == "raises":
                raise ValueError("no such kernel")
            out = good(**inputs)
            out.logits = -out.logits
            return out

        if how == "cannot be built":
            with gpu_model.common.excused(peer, wrong):
                raise ValueError("no such adapter")
        else:
            found[peer] = broken
        return found

    monkeypatch.setattr(gpu_model.common, "forwards", others)
    base = gpu_model.make_base("cpu", **SMALL)
    for case in (gpu_model.decode_case(base, 3, graph=False), gpu_model.prefill_case(base, 3, 20)):
        found = measure(case, Effort(2, 2, 0.0))["contenders"]
        words = {"wrong": "wrong logits", "raises": "no such kernel", "cannot be built": "no such adapter"}
        assert words[how] in found[peer]["error"] and "seconds" not in found[peer]
        assert all("seconds" in numbers for name, numbers in found.items() if name != peer)


def test_logits_are_judged_without_a_broken_peer():
    import contenders

    mixed, frozen = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    good = {"frozen": frozen, "off": frozen, "on": mixed, "peft": mixed, "dense": mixed[:1]}
    contenders.verify(good, mixed, frozen)
    for name in ("on", "peft", "off", "dense"):
        with pytest.raises(SystemExit, match="nothing is timed"):
            contenders.verify(good | {name: -good[name]}, mixed, frozen)
    wrong = {}
    contenders.verify(good | {"peft": -mixed, "on": -mixed}, mixed, frozen, wrong)
    assert set(wrong) == {"peft", "on"}  # a peer that is wrong excuses nobody
    with pytest.raises(ValueError):
        contenders.answers({"peft": lambda: [].index(1)})
    with pytest.raises(SystemExit, match="frozen model"):
        contenders.verify({"on": mixed}, mixed, frozen, {})


def test_a_wrong_training_step_of_a_peer_has_its_words(monkeypatch):
    import bench_training
    from suite import gpu_model

    def halved(layer, x, A, B, picks, weights, real=bench_training.dense_mixture):
        return real(layer, x, A, B, picks, 0.5 * weights)

    monkeypatch.setattr(bench_training, "dense_mixture", halved)
    case = gpu_model.step_case("cpu", 4, 32, **SMALL)
    checks = {contender.name: contender.check for contender in case.contenders}
    assert "wrong losses or gradients" in checks["dense"](None)
    assert checks["engine"] is None and checks["peft"] is None


def test_the_first_token_begins_with_texts(minilm):
    """A small model whose tokenizer is a list of words."""
    from conftest import word_tokenizer
    from suite import first_token, gpu_model
    from suite.cases import Effort, measure
    from torch.utils.flop_counter import FlopCounterMode

    words = ["[PAD]", "[EOS]", "[UNK]", *sorted(set(first_token.VOCABULARY))]
    tokenizer = word_tokenizer(words, padding_side="left")
    base = gpu_model.make_base("cpu", **SMALL).float()
    model = first_token.make_model(base, 16)
    case, paths = first_token.case(base, model, tokenizer, 3)
    record = measure(case, Effort(2, 2, 0.0))
    assert set(record["contenders"]) == {"frozen", "on"}
    taken = paths["on"].seconds
    assert {len(seconds) for seconds in taken.values()} == {len(taken["prefill"])} and len(taken) == 4
    assert set(paths["frozen"].seconds) == {"tokenizer", "prefill"}
    numbers = paths["on"].numbers()
    assert numbers["encoder_seconds"] > 1e-3  # it encodes at every call
    assert sum(numbers.values()) == pytest.approx(record["contenders"]["on"]["seconds"], rel=0.5)
    checks = {contender.name: contender.check for contender in case.contenders}
    with FlopCounterMode(display=False) as counter:  # the mixtures are not in it
        frozen = paths["frozen"]()
        model.encoder.encode(paths["on"].texts)
    mixture = 2 * 3 * case.axes["tokens"] * 2 * 8 * 2 * (4 * 128 + 3 * (64 + 128))
    assert case.operations == pytest.approx(counter.get_total_flops() + mixture, rel=0.15)
    mixed = paths["on"]()
    assert checks["frozen"](frozen) is None and checks["on"](mixed) is None
    assert "wrong logits" in checks["on"](frozen) and "wrong logits" in checks["on"](mixed[[1, 2, 0]])


def test_the_first_token_routed_in_the_prefill():
    from conftest import word_tokenizer
    from suite import first_token, gpu_model
    from suite.cases import Effort, measure

    words = ["[PAD]", "[EOS]", "[UNK]", *sorted(set(first_token.VOCABULARY))]
    tokenizer = word_tokenizer(words, padding_side="left")
    base = gpu_model.make_base("cpu", **SMALL | dict(num_hidden_layers=6)).float()
    model = first_token.make_model(base, 16, tokenizer)
    case, paths = first_token.case(base, model, tokenizer, 3)
    assert case.name.endswith("routed in the prefill")
    found = measure(case, Effort(2, 2, 0.0))["contenders"]
    assert set(found) == {"frozen", "on", "in the prefill"} and all("seconds" in c for c in found.values())
    assert set(paths["in the prefill"].seconds) == {"tokenizer", "prefill"}
    check = case.contenders[2].check
    assert check(paths["in the prefill"]()) is None and "wrong logits" in check(paths["frozen"]())
    model(**tokenizer(["the river was"], return_tensors="pt"))
    assert "other entries" in check(paths["on"]())


def test_first_tokens_of_a_gpu(minilm, monkeypatch):
    """On the CPU, with a model of six layers."""
    import compare
    from conftest import word_tokenizer
    from suite import command, first_token, gpu_model, model, page
    from suite.cases import Effort

    words = ["[PAD]", "[EOS]", "[UNK]", *sorted(set(first_token.VOCABULARY))]
    base = gpu_model.make_base("cpu", **SMALL | dict(num_hidden_layers=6)).float()
    monkeypatch.setattr(model.common, "make_base", lambda name: base)
    monkeypatch.setattr(first_token, "make_tokenizer", lambda: word_tokenizer(words, padding_side="left"))
    found = list(model.first_tokens("cpu", (2,), Effort(2, 2, 0.0)))
    assert [set(record["contenders"]) for record in found] == [
        {"frozen", "on"},
        {"frozen", "on", "in the prefill"},
    ]
    assert all("first_token_seconds" in c for record in found for c in record["contenders"].values())
    waited = []
    path = first_token.FirstToken(base, None, ["a city"], wait=lambda: waited.append("device"))
    for _ in range(2):
        with path.part("tokenizer"):
            assert len(waited) == len(path.seconds.get("tokenizer", []))
    assert len(waited) == 2

    def absent(name):
        raise OSError(f"the model {name!r} comes with a package")

    monkeypatch.setattr(model, "packaged_model", absent)
    (record,) = model.first_tokens("cpu", (2,), Effort(2, 2, 0.0))
    assert "'minilm' comes with a package" in record["contenders"]["on"]["error"]
    ceilings = {"read_bytes_per_second": 1e9, "operations_per_second": {"float32": 1e11}}
    assert "comes with a package" in "".join(command.lines(record, ceilings))
    assert "comes with a package" in page.table([record], ceilings)
    assert compare.of_suite({"results": [record]}, None) == {}


def test_a_mixture_as_one_adapter_a_row():
    from suite import mixture, peers

    pool = mixture.Pool(16, 4, 576, "cpu")
    indices, weights = pool.pick(5, 3, "uniform")
    x, y = mixture.normal(2, 5, 576, device="cpu")
    A, B = peers.folded(pool, indices, weights)
    assert A.shape == (5, 12, 576) and B.shape == (5, 576, 12)
    got = y + torch.bmm(B, torch.bmm(A, x[:, :, None])).squeeze(2)
    torch.testing.assert_close(got, mixture.exact_update(pool, x, y, indices, weights), atol=1e-4, rtol=1e-4)


PACKAGES = {
    "vllm/lora/ops/triton_ops.py": """
import torch

class LoRAKernelMeta:
    @staticmethod
    def make(max_loras, max_num_tokens, device):
        meta = LoRAKernelMeta()
        meta.sizes = max_loras, max_num_tokens
        return meta

    def prepare_tensors(self, mapping):
        assert (int(mapping.max()) + 1, len(mapping)) == self.sizes and mapping.dtype == torch.int32
        self.mapping = mapping.long()

    def meta_args(self, num_tokens, specialise):
        return (self.mapping[:num_tokens],)

def lora_shrink(x, A, u, mapping, scaling):
    u[0] = scaling * torch.einsum("ti,tri->tr", x, A[0][mapping])

def lora_expand(u, B, out, mapping, offset_start, add_inputs):
    assert add_inputs and offset_start == 0
    out += torch.einsum("tr,tor->to", u[0], B[0][mapping])
""",
    "sglang/srt/lora/utils.py": """
import dataclasses

LoRABatchInfo = dataclasses.make_dataclass(
    "LoRABatchInfo", ["bs", "seg_lens", "seg_indptr", "max_len", "weight_indices", "lora_ranks", "scalings"]
)
""",
    "sglang/srt/lora/triton_ops.py": """
import torch

def sgemm_lora_a_fwd(x, weights, info):
    assert info.bs == len(info.weight_indices) and int(info.seg_indptr[-1]) == len(x)
    assert info.max_len == int(info.seg_lens.max()) and weights.shape[1] == int(info.lora_ranks[0])
    assert torch.equal(info.seg_indptr.diff(), info.seg_lens) and bool((info.scalings == 1).all())
    adapter = info.weight_indices.long().repeat_interleave(info.seg_lens.long())
    return torch.einsum("ti,tri->tr", x, weights[adapter])

def sgemm_lora_b_fwd(u, weights, info, base_output):
    adapter = info.weight_indices.long().repeat_interleave(info.seg_lens.long())
    return base_output.add_(torch.einsum("tr,tor->to", u, weights[adapter]))
""",
    "unsloth/kernels/utils.py": """
import os

assert os.environ["UNSLOTH_IS_PRESENT"]
os.environ["CHANGED_BY_UNSLOTH"] = "1"

def matmul_lora(X, W, W_quant, A, B, s, out=None):
    return X @ W.t() + s * (X @ A.t() @ B.t())
""",
    "unsloth/kernels/fast_lora.py": """
import torch
from .utils import matmul_lora

class LoRA_W(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W, W_quant, A, B, S):
        ctx.save_for_backward(X, W, A, B)
        return matmul_lora(X, W, W_quant, A, B, S)

    @staticmethod
    def backward(ctx, dY):
        X, W, A, B = ctx.saved_tensors
        batch, seq_len, hd = X.shape
        flat, X = dY.reshape(-1, dY.shape[-1]), X.reshape(-1, hd)
        dX = flat @ W + flat @ B @ A
        return dX.view(batch, seq_len, hd), None, None, (flat @ B).t() @ X, flat.t() @ (X @ A.t()), None
""",
    "unsloth/__init__.py": "raise RuntimeError('the start of unsloth changes other packages')",
    "unsloth/kernels/__init__.py": "raise RuntimeError('it patches them here too')",
}


@pytest.fixture
def other_systems(tmp_path, monkeypatch):
    """Packages with the interfaces that the peers use, in plain PyTorch, on the CPU."""
    from suite import peers

    before = set(sys.modules)
    for path, source in PACKAGES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(peers, "ON_CUDA", ())
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("vllm", "sglang", "unsloth"):
            del sys.modules[name]


@pytest.mark.parametrize("length", [1, 5], ids=["decode", "prefill"])
def test_kernels_of_serving_systems_know_the_adapter_of_every_token(other_systems, length):
    from suite import mixture

    case = mixture.update_case(3, length, 16, 8, 2, "uniform", "cpu")
    assert case.skipped == {}
    assert [c.name for c in case.contenders] == ["slm_fast", "torch", "dense", "vllm", "sglang"]
    for contender in case.contenders:
        assert contender.check(contender.run(0)) is None, contender.name


def test_unsloth_takes_part_where_rows_share_one_lora(other_systems, monkeypatch):
    import os

    from suite import mixture

    environment = dict(os.environ)
    case = mixture.layer_case(3, "cpu", 5)
    assert case.skipped == {"unsloth": "ValueError: it has one LoRA for all rows"}
    for case in (mixture.layer_case(3, "cpu", 5, shared=True), mixture.layer_step_case(3, 8, "cpu")):
        assert case.skipped == {} and case.contenders[-1].name == "unsloth"
        for contender in case.contenders:
            assert contender.check(contender.run(0)) is None, (case.name, contender.name)
    assert os.environ == environment
    asked = []
    monkeypatch.setattr(mixture, "layer_case", lambda *args, **options: asked.append((args, options)))
    for name in ("update_case", "step_case", "layer_step_case", "flat_case"):
        monkeypatch.setattr(mixture, name, lambda *_: None)
    list(mixture.cases(True, "cuda"))
    assert asked == [((8, "cuda", 1), {}), ((8, "cuda", 128), {"shared": True})]


def test_a_peer_that_cannot_be_built_is_named(monkeypatch):
    from suite import peers

    def changed(*_):
        raise TypeError("meta_args() missing an argument")

    monkeypatch.setattr(peers, "ON_CUDA", ("csv", "no_such_peer"))
    makers = {"json": lambda *_: "update", "csv": changed, "no_such_peer": changed}
    found = [("json", "update", ""), ("csv", None, "TypeError: meta_args() missing an argument")]
    assert list(peers.built(makers, "cuda")) == [*found, ("no_such_peer", None, "not installed")]
    assert list(peers.built(makers, "cpu")) == found[:1]
