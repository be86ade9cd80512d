import pytest
import torch

from slm_fast import dispatch, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Those that run on CPU tensors; the gpu backend's search has tests/test_cuda_search.py.
BACKENDS = [name for name, reason in dispatch.available().items() if reason is None and name != "gpu"]


def name_of(value):
    return str(value).removeprefix("torch.").replace(" ", "")


def search_case(num_queries, num_keys, dim, key_dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    query, keys = torch.randn(num_queries, dim, generator=g), torch.randn(num_keys, dim, generator=g)
    return query, keys.to(key_dtype)


def check_search(found, query, keys, bias=None, mask=None, *, top_k, **options):
    """Scores against fp64; the picks must be the best up to rounding; the weights follow from the scores."""
    indices, weights, scores = found
    assert indices.dtype == torch.int32 and weights.dtype == scores.dtype == torch.float32
    exact = query.double() @ keys.double().T
    exact = exact if bias is None else exact + bias
    exact = exact if mask is None else exact.masked_fill(~mask, -torch.inf)
    exact = torch.nn.functional.pad(exact, (0, max(0, top_k - exact.shape[1])), value=-torch.inf)
    best = exact.sort(dim=-1, descending=True).values[:, :top_k]
    torch.testing.assert_close(scores.double(), best, rtol=1e-5, atol=1e-4)
    picked = exact.gather(1, indices.long()).masked_fill(best == -torch.inf, -torch.inf)
    torch.testing.assert_close(picked, best, rtol=1e-5, atol=1e-4)
    valid = scores > -torch.inf
    assert not indices[~valid].any() and not weights[~valid].any()
    weighting, temperature = options.get("weighting", "softmax"), options.get("temperature", 1.0)
    want = reference.mixture_weights(scores, valid, weighting, temperature)
    if options.get("min_similarity") is not None:
        want = want.masked_fill(scores[:, :1] < options["min_similarity"], 0.0)
    torch.testing.assert_close(weights, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_queries", [0, 1, 3, 70])
@pytest.mark.parametrize("num_keys", [0, 1, 63, 100, 1000])
@pytest.mark.parametrize("key_dtype", DTYPES, ids=name_of)
def test_key_search_sizes(backend, num_queries, num_keys, key_dtype):
    for dim in (1, 7, 100, 384):
        query, keys = search_case(num_queries, num_keys, dim, key_dtype)
        for top_k in (1, 4, min(64, max(num_keys, 1)), 64):
            check_search(ops.key_search(query, keys, top_k=top_k, backend=backend), query, keys, top_k=top_k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
@pytest.mark.parametrize("masked", ["none", "shared", "per_query", "all"])
def test_key_search_options(backend, weighting, masked):
    query, keys = search_case(9, 200, 48)
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(200, generator=g) - 5
    mask = {
        "none": None,
        "shared": torch.rand(200, generator=g) < 0.02,
        "per_query": torch.rand(9, 200, generator=g) < 0.03,
        "all": torch.zeros(200, dtype=torch.bool),
    }[masked]
    for min_similarity in (None, 3.0):
        options = {"weighting": weighting, "temperature": 0.7, "min_similarity": min_similarity, "top_k": 5}
        found = ops.key_search(query, keys, bias, mask, backend=backend, **options)
        check_search(found, query, keys, bias, mask, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", ["num_groups", "shift"])
def test_key_search_transforms_the_query(backend, transform):
    query, keys = search_case(9, 200, 48)
    query[3, :12] = 0  # a group without a direction stays 0
    if transform == "num_groups":
        options, transformed = {"num_groups": 4}, reference.group_normalize(query, 4)
    else:
        shift = torch.linspace(-2, 2, 48)
        options, transformed = {"shift": shift}, query - shift
    found = ops.key_search(query, keys, top_k=5, backend=backend, **options)
    check_search(found, transformed, keys, top_k=5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_search_ties_break_by_the_lower_index(backend):
    keys = torch.ones(5000, 8)
    keys[[40, 4000, 4999]] = 2
    indices, _, _ = ops.key_search(torch.ones(2, 8), keys, top_k=6, backend=backend)
    assert indices.tolist() == [[40, 4000, 4999, 0, 1, 2]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_search_non_contiguous(backend):
    query, keys = search_case(40, 300, 30)
    want = ops.key_search(query, keys, top_k=3, backend=backend)
    got = ops.key_search(query.T.contiguous().T, keys.T.contiguous().T, top_k=3, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="extension not built")
def test_key_search_same_bits_for_any_threads():
    query, keys = search_case(5, 9000, 65)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.key_search(query, keys, top_k=64))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 65}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"weighting": "max"}, "weighting"),
        ({"query": torch.randn(2, 7)}, "keys must have shape"),
        ({"query": torch.randn(2, 8).double()}, "query must be float32"),
        ({"query": torch.full((2, 8), torch.nan)}, "finite"),
        ({"query": torch.full((2, 8), -torch.inf)}, "finite"),
        ({"keys": torch.randn(5, 8).double()}, "keys must be"),
        ({"keys": torch.empty(5, 8, device="meta")}, "on cpu"),
        ({"bias": torch.zeros(4)}, "bias"),
        ({"mask": torch.ones(3, 5, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(5)}, "mask"),
        ({"num_groups": 3}, "num_groups"),
        ({"num_groups": 0}, "num_groups"),
        ({"num_groups": 2, "shift": torch.zeros(8)}, "exclude"),
        ({"shift": torch.zeros(7)}, "shift"),
    ],
)
def test_key_search_rejects(backend, change, message):
    args = {"query": torch.randn(2, 8), "keys": torch.randn(5, 8), "top_k": 2, "backend": backend} | change
    with pytest.raises(ValueError, match=message):
        ops.key_search(**args)
