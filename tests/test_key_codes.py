import copy
import dataclasses
import os
import pickle
import subprocess
import sys

import pytest
import torch
from test_ops_key_search import DTYPES, name_of, search_case

from slm_fast import KnowledgePool, SLMConfig, dispatch, ops
from slm_fast.pool import CODED_SLOTS
from slm_fast.reference import KeyCodes

pytestmark = pytest.mark.skipif(dispatch.available()["cpu"] is not None, reason="extension not built")
BACKENDS = ["cpu", "reference"]


def same_bits(found, want):
    return all(
        torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(found, want, strict=True)
    )


def plain_codes(codes):
    """[P, D] int64."""
    rows = codes.codes.permute(0, 3, 2, 4, 1).flatten(2).flatten(0, 1)
    return rows[: codes.num_keys, : codes.dim].long() - 128


def check_codes(query, keys, bias=None, mask=None, threads=(1, 2), **options):
    """A search with codes against one without, bit for bit, on one thread and on two."""
    codes, before = ops.key_codes(keys, backend="cpu"), torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            want = ops.key_search(query, keys, bias, mask, **options, backend="cpu")
            found = ops.key_search(query, keys, bias, mask, **options, codes=codes, backend="cpu")
            assert same_bits(found, want)
            # Without a backend, plain tensors go straight to the extension.
            assert same_bits(ops.key_search(query, keys, bias, mask, **options, codes=codes), want)
            assert same_bits(ops.key_search(query, keys, bias, mask, **options), want)
    finally:
        torch.set_num_threads(before)
    return want


@pytest.mark.parametrize("key_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("num_keys", [0, 1, 31, 32, 33, 100, 1000, 1025, 5000])
def test_sizes(num_keys, key_dtype):
    for dim in (0, 1, 7, 33, 100, 384):
        for num_queries in (0, 1, 2, 16, 17, 70):
            query, keys = search_case(num_queries, num_keys, dim, key_dtype)
            for top_k in (1, 4, 64) if num_queries in (1, 17) else (4,):
                check_codes(query, keys, top_k=top_k)


def test_wide_keys():
    for key_dtype in DTYPES:
        query, keys = search_case(3, 1100, 2688, key_dtype)
        check_codes(query, keys, top_k=4)


@pytest.mark.parametrize("masked", ["none", "shared", "per_query", "all", "few"])
@pytest.mark.parametrize("biased", ["none", "small", "large"])
def test_masks_and_bias(masked, biased):
    query, keys = search_case(19, 2100, 48)
    g = torch.Generator().manual_seed(1)
    bias = {
        "none": None,
        "small": torch.randn(2100, generator=g),
        "large": 1e4 * torch.randn(2100, generator=g),
    }
    mask = {
        "none": None,
        "shared": torch.rand(2100, generator=g) < 0.5,
        "per_query": torch.rand(19, 2100, generator=g) < 0.2,
        "all": torch.zeros(2100, dtype=torch.bool),
        "few": torch.arange(2100) % 1000 == 3,
    }[masked]
    for top_k in (1, 4, 64):
        options = {"weighting": "similarity", "temperature": 0.7, "min_similarity": 3.0, "top_k": top_k}
        check_codes(query, keys, bias[biased], mask, **options)


@pytest.mark.parametrize("bias", [torch.inf, -torch.inf, torch.nan])
def test_bias_that_is_not_finite(bias):
    query, keys = search_case(3, 200, 16)
    biases = torch.zeros(200)
    biases[::7] = bias
    check_codes(query, keys, biases, top_k=5)


def test_transforms_of_the_query():
    query, keys = search_case(9, 200, 48)
    check_codes(query, keys, top_k=5, num_groups=4)
    check_codes(query, keys, top_k=5, shift=torch.linspace(-2, 2, 48))


def test_ties_and_near_duplicates():
    query, keys = search_case(17, 3000, 65)
    _, _, scores = check_codes(query, keys[:300].repeat(10, 1), top_k=25)
    assert (scores[:, :9] == scores[:, :1]).all() and (scores[:, 10:] < scores[:, :1]).all()
    for spread in (1e-2, 1e-4, 1e-6):
        check_codes(query, keys[:750].repeat_interleave(4, 0) + spread * keys, top_k=4)
    check_codes(torch.ones(2, 8), torch.ones(5000, 8), top_k=6)
    check_codes(query.round(), keys.round(), top_k=64)


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_norms_of_all_sizes(order):
    query, keys = search_case(5, 2500, 40)
    exponents = torch.linspace(-44, 37, 2500)
    if order == "random":
        exponents = exponents[torch.randperm(2500, generator=torch.Generator().manual_seed(0))]
    keys = keys * (10 ** (exponents if order != "descending" else exponents.flip(0)).double())[:, None]
    keys = keys.clamp(-3e38, 3e38).float()
    for scale in (1.0, 1e-38, 1e-44, 1e-12, 1e12, 1e37):
        check_codes(query * scale, keys, top_k=4)
        check_codes(query * scale, keys, torch.linspace(-1, 1, 2500), top_k=64)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-12, 1e12, 1e30])
def test_tiny_and_huge(scale):
    query, keys = search_case(5, 1500, 100)
    for factors in ((1.0, scale), (scale, 1.0), (scale, scale), (scale, 1 / max(scale, 1e-37))):
        check_codes(query * factors[0], keys * factors[1], top_k=4)


def test_flushed_subnormals():
    query, keys = search_case(5, 1500, 100)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        for exponent in range(-44, 0, 2):
            check_codes(query * 10.0**exponent, keys, threads=[1], top_k=4)  # only this thread flushes
            check_codes(query, keys * 10.0**exponent, threads=[1], top_k=4)
    finally:
        torch.set_flush_denormal(False)


def test_zeros():
    query, keys = search_case(5, 1500, 33)
    query[2] = 0
    keys[torch.rand(1500, generator=torch.Generator().manual_seed(0)) < 0.7] = 0
    check_codes(query, keys, top_k=4)
    check_codes(query, -keys.abs() * query[0].sign(), top_k=4)
    check_codes(query, torch.zeros(1500, 33), top_k=4)


def test_one_large_value_a_key():
    """The codes of all other values are 0 then."""
    query, keys = search_case(9, 2000, 64)
    keys[:, 5] *= 1e4
    check_codes(query, keys, top_k=4)
    query[:, 5] = 0
    check_codes(query, keys, top_k=4)


def test_the_error_bound_is_needed_and_tight():
    """The best key scores only by what its codes lose, all of it: seven tenths of the bound miss it.

    The query loses nothing: it is 63 (or 127) of its scale everywhere, see `coded_query`.
    """
    query = torch.ones(1, 64)
    query[:, 32:] = -1
    code = torch.randint(-120, 120, (64,), generator=torch.Generator().manual_seed(0)).float()
    code[0] = 127
    lost = 0.45 * query[0]
    lost[0] = 0
    coded = 127 * query[0]  # a key that its codes describe exactly
    keys = torch.stack([code + lost, coded * ((query[0] @ (code + 0.9 * lost)) / (query[0] @ coded))])
    indices, _, scores = check_codes(query, keys, top_k=2)
    assert indices.tolist() == [[0, 1]]
    assert ops.key_search(query, keys, top_k=1, codes=ops.key_codes(keys))[0].tolist() == [[0]]
    wrong = ops.key_codes(keys)
    wrong.bounds[0, 1] *= 0.7
    assert ops.key_search(query, keys, top_k=1, codes=wrong)[0].tolist() == [[1]]


def coded_query(query, narrow):
    """What a search makes of a query [D]: without 8-bit products of their own, the most that four of its
    values may add up to limits the scale."""
    x = torch.nn.functional.pad(query, (0, -len(query) % 8)).view(8, -1)
    scale = x.abs().max() / 127
    if narrow:
        sums = x.view(2, 2, 2, -1).permute(1, 0, 2, 3).reshape(2, 4, -1)
        scale = torch.maximum(sums.clamp(min=0).sum(1), -sums.clamp(max=0).sum(1)).max() / 126
    return scale * (query / scale).round()


def test_what_a_query_loses():
    """The best key scores only by what the query loses as integers; all keys are exactly their codes."""
    for seed in range(20):
        for dim in (5, 64, 100, 384):
            query, noise = search_case(1, 1, dim, seed=seed)
            if seed % 4 == 1:
                query[0, seed % dim] = 1e3  # the integers of all others are 0
            if seed % 4 == 2:
                query = query.sign() * (1 + 0.01 * noise)
            for narrow in (False, True):
                known = coded_query(query[0], narrow)
                lost = query[0] - known
                best = 127 * torch.where(lost < 0, -1.0, 1.0)
                if query[0] @ best < 0:
                    continue
                other = (127 * known / known.abs().max()).round()
                other *= (query[0] @ best - 0.1 * (lost @ best)) / (query[0] @ other)
                keys = torch.cat([-torch.ones(40, dim), torch.stack([best, other])])
                indices, _, _ = check_codes(query, keys, top_k=1, threads=[1])
                assert indices.tolist() == [[40]]


def test_extremes_do_not_overflow():
    """All signs of the eight rows whose products are added up, with codes of -127 and 127 and values of a
    query that round up, all of them."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 8)
    for dim in (8, 64, 384, 2688):
        query = signs.repeat_interleave(dim // 8, 1)
        keys = torch.cat([query, torch.ones(2, dim), -torch.ones(2, dim)])
        for scale in (1.0, 1e-6, 1e6):
            indices, _, scores = check_codes(scale * query, keys, top_k=2, threads=[1])
            assert (scores[:, 0] >= 0.999 * scale * dim).all()
    ones = torch.ones(3, 8) * torch.tensor([[1.0], [-1.0], [0.5]])
    check_codes(ones, torch.randn(100, 8).sign(), top_k=64)


def isa_check(isa):
    """Run in a subprocess with SLM_FAST_ISA set."""
    assert dispatch.cpu_info()["isa"] == isa
    test_the_error_bound_is_needed_and_tight()
    test_what_a_query_loses()
    test_extremes_do_not_overflow()
    test_ties_and_near_duplicates()
    test_one_large_value_a_key()
    test_zeros()
    test_norms_of_all_sizes("random")
    test_few_keys_are_scored()
    for dim in (1, 7, 33, 100, 384, 1023):
        query, keys = search_case(19, 1100, dim)
        check_codes(query, keys, top_k=4)


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "avx512", "avx2", "baseline"])
def test_every_instruction_set(isa):
    from slm_fast import _C

    if isa not in _C.isa_supported():
        pytest.skip("not supported by this processor")
    env = os.environ | {
        "SLM_FAST_ISA": isa,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
    }
    code = f"import test_key_codes; test_key_codes.isa_check({isa!r})"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def plain_search(
    query, keys, codes=None, top_k=4, weighting="softmax", temperature=1.0, least=None, **tensors
):
    given = [tensors.get(name) for name in ("bias", "mask", "shift")]
    return dispatch.search_tensors(query, keys, *given, codes, top_k, weighting, temperature, least)


@pytest.mark.skipif(dispatch.search_tensors is None, reason="this torch has no DLPack table")
def test_what_goes_straight_to_the_extension(monkeypatch):
    query, keys = search_case(3, 100, 16)
    codes = ops.key_codes(keys)
    for key_dtype in DTYPES:
        for weighting in ("similarity", "softmax", "uniform"):
            typed = keys.to(key_dtype)
            want = ops.key_search(
                query, typed, top_k=5, weighting=weighting, temperature=0.5, min_similarity=4.0, backend="cpu"
            )
            found = plain_search(query, typed, None, 5, weighting, 0.5, 4.0)
            assert same_bits(found, want)
            for f, w in zip(found, want, strict=True):
                assert f.dtype == w.dtype and f.shape == w.shape and not f.requires_grad
    generator = torch.Generator().manual_seed(5)
    bias, shift = torch.randn(100, generator=generator), torch.randn(16, generator=generator)
    mask = torch.rand(3, 100, generator=generator) < 0.4
    for tensors in ({"bias": bias}, {"mask": mask[0].clone()}, {"mask": mask, "bias": bias}, {"shift": shift},
                    {"mask": mask, "bias": bias, "shift": shift}):  # fmt: skip
        want = ops.key_search(query, keys, top_k=4, **tensors, backend="cpu")
        assert same_bits(plain_search(query, keys, codes, **tensors), want)
        assert not same_bits(plain_search(query, keys, codes), want)
        assert same_bits(ops.key_search(query, keys, top_k=4, **tensors), want)
    for tensors in ({"bias": bias[:99]}, {"bias": bias.double()}, {"bias": bias[None]}, {"shift": shift[:15]},
                    {"mask": mask[:2]}, {"mask": mask[0, :99]}, {"mask": mask.to(torch.uint8)},
                    {"mask": mask.T.contiguous().T}, {"shift": shift.half()}, {"bias": 1.0}):  # fmt: skip
        assert plain_search(query, keys, codes, **tensors) is None
    assert plain_search(query.clone().requires_grad_(), keys, codes)[1].requires_grad is False
    assert plain_search(query[:0], keys, codes)[0].shape == (0, 4)
    wrong = [
        (query.T.contiguous().T, keys),
        (query, keys.T.contiguous().T),
        (query.double(), keys),
        (query, keys.double()),
        (query, keys.to("meta")),
        (query[0], keys),
        (query, keys[:, :15].contiguous()),
        (torch.nn.Parameter(query), keys),
        (query, None),
        (query, keys, codes, 0),
        (query, keys, codes, 65),
        (query, keys, codes, 4.0),
        (query, keys, codes, 1 << 70),
        (query, keys, codes, 4, "max"),
        (query, keys, codes, 4, None),
        (query, keys, codes, 4, "softmax", 0.0),
        (query, keys, codes, 4, "softmax", torch.nan),
        (query, keys, codes, 4, "softmax", torch.inf),
        (query, keys, codes, 4, "softmax", "1"),
        (query, keys, codes, 4, "softmax", 1.0, "0"),
        (query, keys, ops.key_codes(keys[:99])),
        (query, keys, ops.key_codes(keys[:, :15])),
        (query, keys, KeyCodes.zeros(100, 16, torch.device("meta"))),
        (query, keys, keys),
    ]
    assert all(plain_search(*arguments) is None for arguments in wrong)
    with pytest.raises(ValueError, match="query must be finite"):
        plain_search(query / 0, keys)
    monkeypatch.setenv("SLM_FAST_BACKEND", "reference")
    assert plain_search(query, keys, codes) is None
    want = ops.key_search(query, keys, top_k=4, backend="cpu")
    monkeypatch.setenv("SLM_FAST_BACKEND", "cpu")
    monkeypatch.setattr(dispatch, "search_tensors", None)
    assert same_bits(ops.key_search(query, keys, top_k=4, codes=codes), want)


def test_few_keys_are_scored():
    """Keys whose bounds keep them out are not read: here they hold NaN."""
    query, keys = search_case(4, 4000, 384)
    want = ops.key_search(query, keys, top_k=4)
    codes = ops.key_codes(keys)
    poisoned = torch.full_like(keys, torch.nan)
    scores = query @ keys.T
    near = (scores > scores.topk(4).values[:, -1:] - 0.1 * query.norm(dim=1, keepdim=True) * 20).any(0)
    assert near.float().mean() < 0.5
    early = torch.arange(4000) < 1024  # before anything is known, more keys seem good
    poisoned[near | early] = keys[near | early]
    assert same_bits(ops.key_search(query, poisoned, top_k=4, codes=codes), want)


def test_batches_do_not_matter():
    query, keys = search_case(70, 3000, 100)
    codes = ops.key_codes(keys)
    together = ops.key_search(query, keys, top_k=4, codes=codes)
    for b in (0, 15, 16, 69):
        alone = ops.key_search(query[b : b + 1], keys, top_k=4, codes=codes)
        assert same_bits(alone, [f[b : b + 1] for f in together])


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_follow_the_formula(backend):
    for num_keys, dim in ((1, 1), (33, 7), (70, 384)):
        _, keys = search_case(1, num_keys, dim)
        keys[num_keys // 2 :] *= 1e-3
        found = ops.key_codes(keys, backend=backend)
        code = plain_codes(found)
        scale, error, norm = found.bounds.transpose(0, 1).flatten(1)[:, :num_keys, None].double()
        stored = found.codes.permute(0, 3, 2, 4, 1).flatten(2).flatten(0, 1)  # [32 blocks, 8 steps]
        assert not stored[num_keys:].any() and not stored[:, dim:].any()
        decoded = scale * code
        assert ((keys - decoded).abs() <= scale * 0.5001).all()
        assert ((keys - decoded).norm(dim=1) <= error[:, 0]).all() and (
            keys.double().norm(dim=1) <= norm[:, 0]
        ).all()
        torch.testing.assert_close((keys - decoded).norm(dim=1), error[:, 0], rtol=1e-5, atol=0)
        torch.testing.assert_close(keys.double().norm(dim=1), norm[:, 0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("key_dtype", DTYPES, ids=name_of)
def test_backends_make_the_same_codes(key_dtype):
    _, keys = search_case(1, 70, 33, key_dtype)
    keys[3], keys[4], keys[5, 2], keys[6, 1] = 0, 1e-30, torch.inf, torch.nan
    a, b = (ops.key_codes(keys, backend=backend) for backend in BACKENDS)
    assert torch.equal(a.codes, b.codes)
    torch.testing.assert_close(a.bounds, b.bounds, rtol=1e-6, atol=0)
    assert a.bounds[0, 1:, 3:7].isinf().all() and not plain_codes(a)[3:7].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_codes(backend):
    _, keys = search_case(1, 100, 33)
    want, codes = ops.key_codes(keys, backend=backend), ops.key_codes(keys.roll(1, 0), backend=backend)
    rows = [99, 0, *range(20, 60)]
    before = codes.bounds.clone()
    assert ops.key_codes(keys, out=codes, rows=[], backend=backend) is codes
    assert torch.equal(codes.bounds, before)
    ops.key_codes(keys, out=codes, rows=rows, backend=backend)
    changed = torch.zeros(128, dtype=torch.bool)
    changed[rows] = True
    changed = changed.view(4, 1, 32).expand_as(before)
    assert torch.equal(codes.bounds, torch.where(changed, want.bounds, before))
    ops.key_codes(keys, out=codes, backend=backend)
    assert torch.equal(codes.codes, want.codes) and torch.equal(codes.bounds, want.bounds)


def test_other_backends_ignore_codes():
    query, keys = search_case(3, 100, 16)
    want = ops.key_search(query, keys, top_k=4, backend="reference")
    found = ops.key_search(query, keys, top_k=4, codes=ops.key_codes(keys.flip(0)), backend="reference")
    assert same_bits(found, want)


def test_rejects():
    query, keys = search_case(3, 100, 16)
    codes = ops.key_codes(keys)
    for other in (keys[:99], keys[:, :15].contiguous()):
        with pytest.raises(ValueError, match=r"codes must be those of keys of shape \[100, 16\]"):
            ops.key_search(query, keys, top_k=4, codes=ops.key_codes(other))
    with pytest.raises(ValueError, match="codes must be on cpu, got meta"):
        ops.key_search(query, keys, top_k=4, codes=KeyCodes.zeros(100, 16, torch.device("meta")))
    with pytest.raises(ValueError, match="codes must be contiguous torch.uint8"):
        dataclasses.replace(codes, codes=codes.codes[:1])
    with pytest.raises(ValueError, match="bounds must be contiguous torch.float32"):
        dataclasses.replace(codes, bounds=codes.bounds.half())
    with pytest.raises(ValueError, match="rows need out"):
        ops.key_codes(keys, rows=[1])
    for rows in ([100], [-1]):
        with pytest.raises(ValueError, match=r"rows must be in 0\.\.99"):
            ops.key_codes(keys, out=codes, rows=rows)
    with pytest.raises(ValueError, match="keys must be"):
        ops.key_codes(keys.double())


# ---- the pool


def make_pool(num_tasks=0, **config):
    settings = dict(top_k=3, entries_per_task=4) | config
    pool = KnowledgePool(SLMConfig(**settings), {"a": (8, 6)})
    for t in range(num_tasks):
        add_task(pool, t)
    return pool


def add_task(pool, t, entries=10):
    query, _ = search_case(40, 1, 48, seed=t)
    pool.add_task(f"t{t}", query[:entries], queries=query)


def check_pool(pool, coded=True):
    """Its search against one without codes, and the codes against new ones."""
    query, _ = search_case(20, 1, 48, seed=99)
    found = [pool.search(query), pool.search(query[:1]), pool.search(query, next(iter(pool.tasks)))]
    assert (pool._codes is not None) == coded
    if coded:
        want = ops.key_codes(pool.index_keys)
        assert torch.equal(pool._codes.codes, want.codes) and torch.equal(pool._codes.bounds, want.bounds)
    bare = copy.deepcopy(pool)
    bare._index_codes = lambda: None
    want = [bare.search(query), bare.search(query[:1]), bare.search(query, next(iter(pool.tasks)))]
    for a, b in zip(found, want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("metric", ["grouped_cosine", "whitened"])
def test_pool_with_codes(metric):
    config = {"metric": metric, "num_groups": 4} if metric == "grouped_cosine" else {"metric": metric}
    pool = make_pool(3, **config)
    check_pool(pool, coded=False)
    for t in range(3, 9):
        add_task(pool, t)
        if t > 5:
            check_pool(pool)
    pool.remove_task("t4")
    check_pool(pool)
    add_task(pool, 20, entries=7)
    check_pool(pool)
    query, _ = search_case(3, 1, 48, seed=5)
    pool.add_task("bare", query)  # no queries: the index changes in these slots alone
    check_pool(pool)
    assert len(pool.index_keys) >= CODED_SLOTS
    pool.refresh_index()
    check_pool(pool)


def test_pool_with_codes_is_copied_and_moved():
    pool = make_pool(9)
    check_pool(pool)
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool)), pool.only(["t1", *pool.tasks][1:])):
        assert other._codes is None
        check_pool(other)
    check_pool(pool.double())
    other = make_pool(9)
    check_pool(other)
    with torch.no_grad():
        other.keys.mul_(2)
    other.load_state_dict(pool.state_dict())
    check_pool(other)
    other.remove_task("t3")
    other.take_task(pool, "t3")
    check_pool(other)


def test_codes_are_not_saved():
    pool = make_pool(9)
    before = set(pool.state_dict())
    check_pool(pool)
    assert set(pool.state_dict()) == before


def test_pool_of_another_backend_has_no_codes():
    pool = make_pool(9, backend="reference")
    check_pool(pool, coded=False)
