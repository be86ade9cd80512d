import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from slm_fast import SLMConfig
from slm_fast.loading import load_base
from slm_fast.pool import KnowledgePool

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "benchmarks" / "results" / "suite_cpu_avx2.json"
RECORDS = json.loads(SUITE.read_text())["results"]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("tasks", [16, 18])  # 64 entries fill their slots and slabs, 72 do not
def test_bytes_are_those_of_a_real_pool(tasks):
    import scaling_shapes as scaling

    shape = replace(scaling.SHAPES["minilm"], hidden=24, inter=40, layers=2, key_value=24)
    linears = {f"{layer}.{i}": pair for layer in range(2) for i, pair in enumerate(shape.linears)}
    pool = KnowledgePool(SLMConfig(r=3), linears)
    counted = scaling.Pool(4 * tasks, rank=3, per_task=4, dim=600, size=4, states=1)
    for task in range(tasks):
        queries = torch.randn(620, 600, generator=torch.Generator().manual_seed(task))
        pool.add_task(str(task), queries[:4], queries=queries)
    assert nbytes(t for f in pool.factors for t in (f.A, f.B)) == counted.factors(shape)
    assert nbytes(pool.metric.buffers()) == pytest.approx(counted.statistics, rel=0.01)
    slots = {n: b for n, b in pool.named_buffers() if not n.startswith(("factors.", "metric.", "row_entry"))}
    before = nbytes(slots.values()) + pool._index_codes().nbytes
    assert before == pytest.approx(counted.index, rel=0.02)
    pool.remove_task("0")
    labels = [f"l{n % 32}" for n in range(620)]  # as many as codes come in
    queries = torch.randn(620, 600, generator=torch.Generator().manual_seed(0))
    pool.add_task("0", queries[:4], queries=queries, answers=labels)
    slots = {name: pool.get_buffer(name) for name in slots}
    more = nbytes(slots.values()) + pool._index_codes().nbytes - before
    more += nbytes((pool.metric.tasks["task:0"].label_offsets, pool.metric.tasks["task:0"].label_scale))
    assert more == 32 * counted.of_a_label


def test_shapes_are_the_models():
    import scaling_shapes as scaling

    shape, (base, _) = scaling.SHAPES["minilm"], load_base("minilm")
    config = base.config
    assert scaling.of_config(config, shape.name) == shape
    assert shape.numbers == pytest.approx(sum(p.numel() for p in base.parameters()), rel=0.01)
    layers = [
        module
        for path, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layer" in f".{path}" and "pooler" not in path
    ]
    assert shape.features == sum(m.in_features + m.out_features for m in layers)
    assert shape.weights == sum(m.weight.numel() for m in layers)
    # SmolLM2-135M by the bytes of a real pool of 64 entries of rank 8 in bf16
    (record,) = (r for r in RECORDS if r["axes"].get("kind") == "memory" and r["axes"]["model"] == "smol")
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
    from scaling_features import Speed, search_features

    machine = {"cpu": "any", "threads": 2, "isa": "avx2", "cache_bytes": 32 << 20, "memory_bytes": 1 << 40}
    usual, records = Speed(20e9, 100e9, 32 << 20, 2), []
    sizes = [
        (keys, queries) for keys in (100, 1000, 10_000, 100_000, 1_000_000) for queries in (1, 4, 16, 64)
    ]
    constants = [8.0, 9.0, 1.0, 1.1, 2.4, 0.5]
    for i, (keys, queries) in enumerate(sizes):
        pace = {"read_bytes_per_second": 20e9 / slow(i), "float32_operations_per_second": 100e9 / slow(i)}
        seconds = slow(i) * float(numpy.array(constants) @ search_features(keys, 384, queries, usual))
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
    assert machine.speed == scaling.Speed(20e9, 100e9, 32 << 20, 2)
    assert machine.search(scaling.Pool(100_000, dim=384)) == pytest.approx(
        next(p.seconds for p in points if p.name == "100000 1") / 1.5 ** (12 % 3 == 0), rel=0.02
    )


def test_a_case_of_two_points_is_left_out_as_a_whole():
    """Points by two cases that no constant explains: alone, each has its twin to learn from."""
    import scaling

    pairs = [("a", 1.0), ("a", 1.0), ("b", 2.0), ("b", 2.0)]
    points = [scaling.Point("p", f"{case}{i}", (1.0,), t, case) for i, (case, t) in enumerate(pairs)]
    alone, whole = ([abs(c.error) for c in scaling.check(points, w)] for w in (False, True))
    assert all(a < b for a, b in zip(alone, whole, strict=True))
    assert whole == pytest.approx([1.0, 1.0, 0.5, 0.5])


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
    import scaling_shapes as scaling

    pool = scaling.Pool(4)
    smol, large = scaling.SHAPES["smol"], scaling.SHAPES["llama7b"]
    count = scaling.tasks_that_fit(smol, 24e9, pool)
    assert replace(pool, entries=4 * count).memory(smol) <= 24e9 * 1.0001
    assert replace(pool, entries=4 * (count + 1)).memory(smol) > 24e9 * 0.9999
    assert scaling.tasks_that_fit(large, 24e9, pool) < count < scaling.tasks_that_fit(smol, 48e9, pool)
    assert scaling.tasks_that_fit(large, 1e6, pool) == 0


def test_every_host_of_a_fleet_holds_its_share():
    import scaling_page
    from scaling_shapes import SHAPES, Pool

    for key in ("smol", "llama7b", "llama70b"):
        for entries in scaling_page.SIZES:
            hosts = scaling_page.fleet(entries, key)
            assert Pool(-(-entries // hosts)).memory(SHAPES[key]) <= scaling_page.HOST
    assert scaling_page.fleet(16_384) == 1 and scaling_page.fleet(1_000_000) == 62


@pytest.mark.parametrize("size,words", [(512, "512 B"), (40e6, "40 MB"), (1.5e12, "1.5 TB")])
def test_amounts(size, words):
    import units

    assert units.amount(size) == words


LLAMA = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, vocab_size=50)
CONFIGS = {
    "llama": LlamaConfig(**LLAMA, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False),
    "tied": LlamaConfig(**LLAMA, num_key_value_heads=4, tie_word_embeddings=True),
    "bert": BertConfig(**LLAMA, max_position_embeddings=16),
    "t5": T5Config(
        d_model=24, d_kv=8, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=4, vocab_size=50
    ),
    "t5 gated": T5Config(
        d_model=24,
        d_kv=5,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        vocab_size=50,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
}


def made(name):
    kinds = {"bert": AutoModel, "t5": AutoModelForSeq2SeqLM, "t5 gated": AutoModelForSeq2SeqLM}
    return kinds.get(name, AutoModelForCausalLM).from_config(CONFIGS[name]).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_gives_the_models_shape(name):
    """Linears, weights and numbers of the model that the config makes; norms, biases and tables of relative
    positions are not counted."""
    import scaling_shapes

    model = made(name)
    if name.startswith("t5 gated"):  # T5 ties unless it is told not to, in some releases whatever it is told
        model.config.tie_word_embeddings = model.lm_head.weight is model.shared.weight
    shape = scaling_shapes.of_config(model.config, name)
    head = model.get_output_embeddings()
    linears = [
        m
        for path, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and m is not head and "pooler" not in path
    ]
    pairs = sorted((m.in_features, m.out_features) for m in linears)
    assert sorted(shape.all_linears) == pairs
    assert shape.weights == sum(i * o for i, o in pairs) + (head.weight.numel() if head is not None else 0)
    matrices = {id(p): p.numel() for path, p in model.named_parameters() if p.dim() > 1}
    uncounted = [m.weight for path, m in model.named_modules() if "pooler.dense" in path]
    uncounted += [m.weight for path, m in model.named_modules() if "relative_attention_bias" in path]
    assert shape.numbers == sum(matrices.values()) - sum(w.numel() for w in uncounted)


@pytest.mark.parametrize("name", ["llama", "tied", "t5 gated"])
def test_the_cache_is_as_large_as_a_models(name):
    import scaling_shapes

    model, (rows, prompt, new) = made(name), (2, 6, 3)
    ids = torch.randint(3, 50, (rows, prompt), generator=torch.Generator().manual_seed(0))
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, return_dict_in_generate=True)
    options |= {"decoder_start_token_id": 0} if name == "t5 gated" else {}
    cache = model.generate(
        ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options
    ).past_key_values
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if name == "t5 gated" else [cache]
    tensors = [t for part in parts for layer in part.layers for t in (layer.keys, layer.values)]
    # The last token was not read any more; T5's decoder began with a token of its own.
    tokens = rows * (prompt + new - (0 if name == "t5 gated" else 1))
    assert scaling_shapes.of_config(model.config, name).cache(tokens, 4) == nbytes(tensors)


def test_a_models_folder_is_a_name_and_others_are_refused(tmp_path):
    import scaling_shapes

    CONFIGS["llama"].save_pretrained(tmp_path / "llama")
    shape = scaling_shapes.find(str(tmp_path / "llama"))
    assert (shape.query, shape.key_value, shape.layers) == (32, 16, 3)
    GPT2Config().save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="this is a gpt2"):
        scaling_shapes.find(str(tmp_path / "other"))
    with pytest.raises(SystemExit, match="no shape for .*names: minilm, smol"):
        scaling_shapes.find(str(tmp_path / "none"))


@pytest.mark.parametrize("name", CONFIGS)
def test_counted_operations_are_those_of_the_model(name):
    """Products of a prefill as PyTorch counts them: the mixture is not in, attention is whole."""
    import scaling_shapes
    from torch.utils.flop_counter import FlopCounterMode

    model, rows, tokens = made(name), 3, 8
    shape = scaling_shapes.of_config(model.config, name)
    count = scaling_shapes.count_prefill(shape, scaling_shapes.Pool(4), scaling_shapes.Batch(rows, tokens))
    ids = torch.ones(rows, tokens, dtype=torch.long)
    if name.startswith("t5"):
        inputs = {"decoder_input_ids": ids[:, :1]}
    else:
        inputs = {} if name == "bert" else {"logits_to_keep": 1}
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, **inputs)
    whole = 2 if shape.causal else 1  # eager products do not know what a mask leaves out
    pooler = 2 * rows * shape.hidden**2 if name == "bert" else 0
    cross = 4 * rows * (tokens + 1) * shape.attention * shape.decoder  # the first new token's
    counted = count.frozen + whole * count.attention + pooler + cross
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.02)


def test_phases_cost_what_they_must():
    import scaling_shapes as shapes

    llama, pool = shapes.SHAPES["llama7b"], shapes.Pool(10_000)
    batch = shapes.Batch(8, 512, 128, 4, 32)
    step, more = (shapes.count_step(llama, p, batch) for p in (pool, shapes.Pool(1_000_000)))
    assert step == more  # whatever the pool's size
    assert step.bytes == 2 * (llama.weights + 32 * 8 * llama.features) + 2 * 4096 * 32 * 8 * 640 * 2
    fewer = shapes.count_step(llama, pool, replace(batch, distinct=4))
    assert step.bytes - fewer.bytes == 28 * pool.of_an_entry(llama)[0]
    training, frozen = (shapes.count_training(llama, pool, replace(batch, top_k=k)) for k in (4, 0))
    assert frozen.frozen == 4 * 8 * 512 * llama.weights and frozen.mixture == 0
    assert training.mixture == 6 * 8 * 512 * 4 * 8 * llama.features
    assert training.bytes == frozen.bytes == 4 * llama.weights + 28 * 4 * 8 * llama.features
    search = shapes.count_search(pool, 17)
    assert search.bytes == 2 * shapes.count_search(pool, 16).bytes


def test_pools_of_the_memory_benchmark_are_known():
    import scaling

    contenders = pytest.importorskip("contenders", exc_type=ImportError)  # PEFT may want a newer transformers
    assert scaling.ENTRIES == contenders.ENTRIES


def test_measured_memory_is_what_is_counted():
    import scaling

    kept = scaling.memory_check([scaling.load(path) for path in (*scaling.MEMORY, SUITE)])
    assert len(kept) == 8
    for each in kept:
        assert each.error == 0 if each.name.endswith("factors") else each.error < 0
    assert all(abs(each.error) < 0.05 for each in kept if each.name.startswith("smol"))


def test_peaks_of_steps_are_keys_values_and_logits():
    import scaling

    shape = scaling.SHAPES["smol"]
    peak = 18 * 32 * 30 * 2 * 192 * 2 + 2 * 32 * shape.vocab
    axes = {"kind": "decode", "model": "smol", "rows": 32, "dtype": "bfloat16"}
    record = {"case": "decode, smol, 32 rows", "axes": axes, "clock": "wall"}
    record["contenders"] = {"on": {"peak_bytes": 2 * peak}, "off": {"peak_bytes": peak}, "frozen": {}}
    small = record | {"contenders": {"on": {"peak_bytes": 1 << 20}, "off": {"error": "wrong"}}}
    on, off = scaling.peak_check({"results": [record, small, record | {"clock": "events"}]})
    assert (on.error, off.error) == (-0.5, 0.0) and off.name.endswith("pool off: peak of a step")


def test_the_model_predicts_most_of_the_stored_points():
    """Errors as docs/scaling.md has them: of phases with three points, each predicted from the others."""
    import scaling

    points = scaling.measured_points(scaling.load(SUITE))
    checked, apart = scaling.check(points), scaling.check(points, whole=True)
    assert len(checked) == sum(len(m) for m in scaling.by_phase(points).values() if len(m) > 2) > 100
    assert sum(c.within for c in checked) >= 0.75 * len(checked)
    assert sum(c.within for c in apart) >= 0.6 * len(apart)


def test_only_requests_under_load_are_not_modelled():
    """Of the timed cases; a training step has others beside it to be checked against."""
    import scaling
    import scaling_features as features

    result = scaling.load(SUITE)
    points = scaling.measured_points(result)
    served = sum(record["section"] == "serve" for record in RECORDS)
    assert scaling.unmodelled(result, points) == {"serve": served}
    found = scaling.by_phase(points)
    cold = [p for p in found[features.SEARCH] if p.axes["cache"] == "cold"]
    assert len(cold) == 1 and cold[0].features[-1] == pytest.approx(1000 * (384 + 12) / 22e9, rel=0.3)
    flat = [p for p in found[features.UPDATE] if p.axes["kind"] == "flat"]
    assert len(flat) == 4 and all(p.features == flat[0].features for p in flat)
    assert len(found[features.TRAINING]) == 4
    layers = [sum(r["axes"].get("kind") == kind for r in RECORDS) for kind in ("layer", "layer step")]
    assert [len(found[p]) for p in (features.LAYER, features.LAYER_STEP)] == [2 * n for n in layers]
    first = [p.name for p in found[features.PREFILL] if p.axes["kind"] == "first_token"]
    assert "first token, smol, 1 row of text, pool on, encoder" in first
    unlike = result | {"machine": result["machine"] | {"isa": "amx"}}
    assert len(scaling.by_phase(scaling.measured_points(unlike))[features.TRAINING]) == 1


def test_a_prompt_routed_in_the_prefill_is_a_prefill_with_half_the_mixtures():
    import scaling_features as features

    axes = {"kind": "first_token", "model": "smol", "rows": 2, "tokens": 64, "dtype": "float32"}
    found = {"on": {}, "in the prefill": {}, "frozen": {}}
    record = {"section": "model", "case": "first token", "axes": axes, "ours": "on", "contenders": found}
    speed = features.Speed(20e9, 100e9, 32 << 20, 2)
    parts = [*features.model_parts(record, speed, {"float32": 1.0})]
    encoder, on, _, inside = (part.features for part in parts)
    del found["in the prefill"]
    apart = [*features.model_parts(record, speed, {"float32": 1.0})][1].features
    assert on == inside and on[1] == apart[1] / 2 and on[0] == apart[0]
    assert encoder[0] == pytest.approx(on[0] / 2, rel=0.05) and encoder[1] == 0


def run(capsys, *words):
    import scaling

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["scaling.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            scaling.main()
    return ended.value.code, capsys.readouterr().out


def test_the_page_is_what_the_stored_result_makes_of_it(capsys, monkeypatch, tmp_path):
    import scaling_page

    assert run(capsys, "check", SUITE, "--check")[0] == 0
    page = (scaling_page.DOCS / "scaling.md").read_text(encoding="utf8")
    monkeypatch.setattr(scaling_page, "DOCS", tmp_path)
    (tmp_path / "scaling.md").write_text(page.replace("How it scales", "How it scaled"))
    code, printed = run(capsys, "check", SUITE, "--check")
    assert code == 1 and "-# How it scaled" in printed and "+# How it scales" in printed
    code, printed = run(capsys, "check", SUITE, "--write")
    told = json.loads(printed.splitlines()[-1])
    assert code == 1 and told["points"] > 100  # some are beyond 15%
    assert f"time: {told['within']} of {told['points']} within 15%" in printed
    assert (told["memory_within"], told["memory_points"]) == (10, 14)
    assert (
        "memory: 10 of 14 within 15%" in printed
        and printed.count("  beyond") == 4 + told["points"] - told["within"]
    )
    assert (tmp_path / "scaling.md").read_text() == page and (
        tmp_path / "scaling.png"
    ).stat().st_size > 10_000


def test_a_card_is_slower_than_its_floors():
    import scaling_page

    rows = [line.split(" | ") for line in scaling_page.card_section() if " x " in line or " rows |" in line]
    assert len(rows) >= 3 and all(1.0 < float(row[-1].rstrip(" |")) < 10.0 for row in rows)


def lines_of(printed):
    """{what a line of `ask` begins with: the rest}"""
    return {line[:24].strip(): line[24:] for line in printed.splitlines()}


def test_ask_answers_for_a_card(capsys):
    import roofline
    import scaling_shapes

    words = ("ask", "--model", "llama7b", "--entries", 10_000, "--rows", 8, "--tokens", 512, "--card", "H100")
    code, printed = run(capsys, *words)
    lines = lines_of(printed)
    assert code == 0 and "no kernel reaches them" in printed and "does not fit into 80 GB" in printed
    assert "not counted: activations" in printed
    phases = ("key search", "adding a task", "mixture, decoding", "decoding step", "prefill", "training step")
    assert all(phase in lines for phase in phases)
    llama, pool = scaling_shapes.SHAPES["llama7b"], scaling_shapes.Pool(10_000)
    step = scaling_shapes.count_step(llama, pool, scaling_shapes.Batch(8, 512, 128, 4, 32))
    assert f"{1e3 * step.bytes / roofline.DEVICES['H100'].hbm:.3g} ms" in lines["decoding step"]
    room = 80e9 - 2 * llama.numbers - llama.cache(8 * 640, 2) - 16 * pool.learnt(llama)
    tasks = scaling_shapes.tasks_that_fit(llama, room, pool)
    assert f"tasks that fit beside the rest: {tasks:,}, with {4 * tasks:,} entries" in printed
    code, printed = run(capsys, *words, "--distinct", 4, "--dtype", "fp32")
    assert "together 4 distinct" in printed and "H100 SXM, fp32" in printed


def test_ask_answers_for_a_measured_machine(capsys):
    """A case that was measured gets about its own time; what was not is marked."""
    words = ("ask", "--model", "smol", "--entries", 64, "--rows", 8, "--tokens", 32, "--new", 1, "--top-k", 2)
    code, printed = run(capsys, *words, "--dtype", "fp32", "--suite", SUITE)
    lines = lines_of(printed)
    seconds = float(lines["prefill"].split()[3]) * {"ms": 1e-3, "s": 1.0}[lines["prefill"].split()[4]]
    (record,) = (r for r in RECORDS if r["case"] == "prefill, smol, 8 x 32 tokens")
    assert code == 0 and seconds == pytest.approx(record["contenders"]["on"]["seconds"], rel=0.15)
    assert "points within 15%" in lines["prefill"] and "of 4 points within" in lines["training step"]
    code, printed = run(capsys, *words, "--suite", SUITE)
    assert "bf16 products take" in lines_of(printed)["prefill"]
    code, printed = run(capsys, *words, "--dtype", "fp16", "--suite", SUITE)
    assert "not measured" in lines_of(printed)["prefill"]


CARD = ROOT / "benchmarks" / "results" / "nvidia_h100_80gb_hbm3.json"


def test_ask_answers_for_a_measured_card(capsys):
    """A case that was measured gets its own time where it is the only one of its phase."""
    import scaling

    suite = scaling.load(CARD)["suite"]
    words = ("ask", "--model", "llama7b", "--entries", 12, "--rows", 8, "--tokens", 512, "--top-k", 2)
    code, printed = run(capsys, *words, "--suite", CARD)
    lines, (record,) = lines_of(printed), (r for r in suite["results"] if r["axes"]["kind"] == "prefill")
    assert code == 0 and suite["machine"]["card"] in printed and "fits into 85 GB" in printed
    assert f"{1e3 * record['contenders']['on']['seconds']:.3g} ms" in lines["prefill"]
    assert "as measured, cases: 1" in lines["prefill"] and "extrapolated" not in lines["prefill"]
    assert "as measured, cases: 2; extrapolated" in lines["decoding step"]  # the cache is longer
    floors = lines_of(run(capsys, *words, "--card", "H100")[1])
    for phase in ("mixture, decoding", "training step"):  # no case
        assert "measured" not in lines[phase]
        ours, sheet = (float(found[phase].split()[3]) for found in (lines, floors))
        assert ours == pytest.approx(sheet, rel=0.2)  # by measured ceilings
    printed = run(capsys, *words, "--suite", CARD, "--dtype", "fp32")[1]
    assert "as measured" not in printed


def test_a_cards_cases_are_checked_against_each_other(capsys, tmp_path):
    code, printed = run(capsys, "check", CARD)
    told = json.loads(printed.splitlines()[-1])
    assert code == 0 and (told["within"], told["points"], told["memory_points"]) == (2, 2, 0)
    assert "unchecked: too few points" in printed and "memory:" not in printed  # a prefill of one case
    slower = json.loads(CARD.read_text())
    slower["suite"]["results"][1]["contenders"]["on"]["seconds"] *= 1.5
    (tmp_path / "card.json").write_text(json.dumps(slower))
    code, printed = run(capsys, "check", tmp_path / "card.json")
    assert code == 1 and "time: 0 of 2 within 15%" in printed


def test_memory_that_is_off_fails_the_check(capsys):
    import scaling

    points = [scaling.Checked(scaling.Point("p", "a", (1.0,), 1.0), 1.1)]
    kept = [scaling.Kept("a", 100, 110), scaling.Kept("b", 100, 120)]
    assert scaling.tell("any", [], points, kept[:1]) == 0 and scaling.tell("any", [], points, kept) == 1
    assert "memory: 1 of 2 within 15%" in capsys.readouterr().out


def test_a_cards_training_step_is_of_its_layers():
    import scaling_ask

    axes = {"kind": "step", "model": "llama-2-7b", "layers": 4, "rows": 8, "tokens": 128, "dtype": "bfloat16"}
    record = {"case": "a", "axes": axes, "ours": "engine", "contenders": {"engine": {"seconds": 1.0}}}
    other = record | {"axes": axes | {"model": "smol"}}
    failed = record | {"contenders": {"engine": {"error": "wrong"}}}
    ((phase, _, count, seconds),) = scaling_ask.card_cases({"results": [record, other, failed]})
    layers = replace(scaling_ask.SHAPES["llama7b"], layers=4)
    assert (phase, seconds) == ("training step", 1.0) and count.frozen == 4 * 8 * 128 * layers.weights


def test_files_that_cannot_answer_say_what_is_missing(capsys, tmp_path):
    path, card = tmp_path / "some.json", json.loads(CARD.read_text())["suite"]
    words = ("ask", "--model", "smol", "--entries", 64, "--suite", path)

    def told(result, *words):
        path.write_text(json.dumps(result))
        return run(capsys, *words)[0]

    assert "no case with the CPU's pace" in told(a_result(lambda i: 1.0) | {"results": []}, *words)
    assert "three points" in told(a_result(lambda i: 1.0) | {"results": []}, "check", path)
    assert "no ceilings, machine, results" in told({}, *words) and "no result" in told([], "check", path)
    assert "is of a GPU: it is checked alone" in told({"suite": card}, "check", path, "--write")
    one = card | {"results": card["results"][:1]}
    assert "three points" in told({"suite": one}, "check", path)
    empty = card | {"ceilings": {}, "results": []}
    assert "neither measured ceilings nor model cases in bf16: there is --card H100" in told(empty, *words)
    unknown = card | {"machine": {"device": "cuda", "card": "RTX 1"}}
    assert "card RTX 1: there are datasheets of A100, H100" in told(unknown, *words)


def test_ask_leaves_out_what_a_model_does_not_do(capsys):
    code, printed = run(capsys, "ask", "--model", "minilm", "--entries", 100, "--card", "A100")
    lines = lines_of(printed)
    assert code == 0 and "prefill" in lines and "decoding step" not in lines
