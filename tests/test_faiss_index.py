import copy
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import DIM, clustered_embeddings, tiny_base
from test_ops_key_search import DTYPES, check_search, name_of, search_case

from slm_fast import KnowledgePool, SLMConfig, faiss_index, ops, reference
from slm_fast.faiss_index import FaissIndex, load_faiss
from slm_fast.storage import load_pool, save_pool

faiss = pytest.importorskip("faiss")
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not hasattr(faiss, "StandardGpuResources"),
    reason="needs a CUDA device and a GPU build of FAISS",
)


def index_case(num_queries, num_keys, dim, key_dtype=torch.float32, seed=0):
    """query, keys, bias and allowed, about a tenth of the keys not allowed."""
    query, keys = search_case(num_queries, num_keys, dim, key_dtype, seed)
    g = torch.Generator().manual_seed(seed + 1)
    return query, keys, torch.randn(num_keys, generator=g), torch.rand(num_keys, generator=g) < 0.9


def check_index(query, keys, bias, allowed, **options):
    """FAISS finds what the reference finds; the batch does not change a row's bits."""
    index = FaissIndex(keys, bias, allowed)
    found = index.search(query, **options)
    search_options = {k: v for k, v in options.items() if k not in ("num_groups", "shift")}
    transform = {k: v for k, v in options.items() if k not in search_options}
    features = reference.transform_query(query, **transform)
    check_search(found, features, keys, bias, allowed, **search_options)
    want = ops.key_search(query, keys, bias, allowed, **options, backend="reference")
    assert torch.equal(found[0], want[0]) and all(t.is_contiguous() for t in found)
    torch.testing.assert_close(found[1], want[1], rtol=1e-4, atol=1e-5)
    if len(query):
        assert all(
            torch.equal(a[-1:], b) for a, b in zip(found, index.search(query[-1:], **options), strict=True)
        )


@pytest.fixture
def no_fallback(monkeypatch):
    """Fail where FAISS's candidates do not suffice and the keys are searched again."""

    def key_search(query, keys, *args, **options):
        assert not len(keys), "searched again"
        return reference_search(query, keys, *args, **options)

    reference_search = ops.key_search
    monkeypatch.setattr(faiss_index.ops, "key_search", key_search)
    yield
    monkeypatch.undo()


@pytest.mark.parametrize("num_queries", [0, 1, 3, 70])
@pytest.mark.parametrize("num_keys", [0, 1, 63, 1000])
@pytest.mark.parametrize("dim", [1, 7, 384])
@pytest.mark.parametrize("key_dtype", DTYPES, ids=name_of)
def test_sizes(num_queries, num_keys, dim, key_dtype):
    case = index_case(num_queries, num_keys, dim, key_dtype)
    for top_k in (1, 4, 64):
        check_index(*case, top_k=top_k, temperature=2.0)


@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
@pytest.mark.parametrize("min_similarity", [None, 20.0])
@pytest.mark.parametrize("transform", ["num_groups", "shift", "none"])
def test_options(weighting, min_similarity, transform):
    query, keys, bias, allowed = index_case(25, 500, 48)
    transform = {"num_groups": {"num_groups": 4}, "shift": {"shift": torch.linspace(-2, 2, 48)}, "none": {}}[
        transform
    ]
    options = dict(weighting=weighting, temperature=0.7, min_similarity=min_similarity, top_k=5)
    check_index(query, keys, bias, allowed, **options, **transform)


def test_candidates_suffice_without_ties(no_fallback):
    query, keys, bias, allowed = index_case(70, 5000, 384)
    found = FaissIndex(keys, bias, allowed).search(query, top_k=4)
    check_search(found, query, keys, bias, allowed, top_k=4)


@pytest.mark.parametrize("num_queries", [2, 40])
@pytest.mark.parametrize("top_k", [2, 6, 64])
def test_ties_break_by_the_lower_index(num_queries, top_k):
    keys = torch.ones(5000, 8)
    keys[[40, 4000, 4999]] = 2
    allowed = torch.ones(5000, dtype=torch.bool)
    allowed[[0, 2]] = False
    found = FaissIndex(keys, torch.zeros(5000), allowed).search(torch.ones(num_queries, 8), top_k=top_k)
    others = [i for i in range(1, 200) if i not in (2, 40)]
    assert found[0].tolist() == [([40, 4000, 4999] + others)[:top_k]] * num_queries


def test_equal_keys_tie_in_any_batch():
    query, keys = search_case(41, 3000, 100)
    keys[[7, 900, 2999]] = keys[1500].clone()
    query[:] = keys[1500] + 0.1 * query
    index = FaissIndex(keys, torch.zeros(3000), torch.ones(3000, dtype=torch.bool))
    assert (index.search(query, top_k=3)[0] == torch.tensor([7, 900, 1500])).all()


def test_no_key_allowed():
    query, keys, bias, _ = index_case(3, 50, 8)
    indices, weights, scores = FaissIndex(keys, bias, torch.zeros(50, dtype=torch.bool)).search(
        query, top_k=2
    )
    assert not indices.any() and not weights.any() and (scores == -torch.inf).all()
    assert indices.dtype == torch.int32


def test_scores_beyond_fp32_are_searched_again():
    query, keys, bias, allowed = index_case(3, 50, 8)
    query[1] = 3e38
    found = FaissIndex(keys, bias, allowed).search(query, top_k=2)
    want = ops.key_search(query, keys, bias, allowed, top_k=2)
    assert torch.equal(found[0], want[0])
    torch.testing.assert_close(found[2], want[2], equal_nan=True)


def test_index_made_in_inference_mode():
    query, keys, bias, allowed = index_case(3, 50, 8)
    with torch.inference_mode():
        index = FaissIndex(keys * 1, bias * 1, allowed)
        index.search(query, top_k=2)
    with torch.enable_grad():
        found = index.search(query.requires_grad_(), top_k=2)
    check_search(found, query.detach(), keys, bias, allowed, top_k=2)


def test_bad_arguments():
    query, keys, bias, allowed = index_case(3, 50, 8)
    with pytest.raises(ValueError, match="keys, bias and allowed"):
        FaissIndex(keys, bias[:4], allowed)
    index = FaissIndex(keys, bias, allowed)
    with pytest.raises(ValueError, match="top_k must be in 1..64, got 65"):
        index.search(query, top_k=65)
    with pytest.raises(ValueError, match="temperature"):
        index.search(query, top_k=1, temperature=0.0)
    with pytest.raises(ValueError, match="weighting"):
        index.search(query, top_k=1, weighting="max")
    with pytest.raises(ValueError, match="num_groups must divide"):
        index.search(query, top_k=1, num_groups=3)
    with pytest.raises(ValueError, match="shape|must have"):
        index.search(query[:, :5], top_k=1)
    query[1, 2] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        index.search(query, top_k=1)


# ---- in a pool


def make_pool(num_tasks=3, faiss_above=0, **config) -> KnowledgePool:
    settings = dict(r=3, top_k=2, faiss_above=faiss_above) | config
    pool = KnowledgePool(SLMConfig(**settings), {"a": (8, 6)})
    for t in range(num_tasks):
        query = clustered_embeddings(t)
        pool.add_task(f"t{t}", query[:4], queries=query)
    return pool


def queries(num_tasks=4):
    return torch.cat([clustered_embeddings(t, 9) for t in range(num_tasks)])


def check_pool(pool: KnowledgePool) -> None:
    """The pool's search through FAISS is its search without it."""
    found = pool.search(queries())
    assert pool._faiss is not None
    above, pool.config.faiss_above = pool.config.faiss_above, None
    want = pool.search(queries())
    pool.config.faiss_above = above
    assert torch.equal(found.indices, want.indices) and torch.equal(found.pool_version, want.pool_version)
    torch.testing.assert_close(found.weights, want.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.scores, want.scores, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("metric", ["whitened", "grouped_cosine"])
@pytest.mark.parametrize("mixing", ["instance", "batch"])
@pytest.mark.parametrize("top_k", [2, 40])
def test_pool(metric, mixing, top_k):
    check_pool(make_pool(metric=metric, mixing=mixing, top_k=top_k, min_similarity=0.3))


def test_pool_size_decides():
    pool = make_pool(2, faiss_above=8)
    pool.search(queries())
    assert pool._faiss is None
    pool.add_task("t2", clustered_embeddings(2)[:1], queries=clustered_embeddings(2))
    check_pool(pool)


def test_index_is_kept_until_the_pool_changes():
    pool = make_pool(3)
    pool.search(queries())
    first = pool._faiss
    pool.search(queries())
    pool.own("t1")
    pool.disown()
    pool.copy_entries("t0", "t1")
    pool.search(queries())
    assert pool._faiss is first
    pool.add_task("t3", clustered_embeddings(3)[:4], queries=clustered_embeddings(3))
    check_pool(pool)
    assert set(pool.search(clustered_embeddings(3, 5)).indices.flatten().tolist()) <= {12, 13, 14, 15}
    pool.add_task("t4", clustered_embeddings(4)[:4])  # the metric stays
    check_pool(pool)
    pool.remove_task("t1")
    check_pool(pool)
    assert not set(pool.search(clustered_embeddings(1, 9)).indices.flatten().tolist()) & {4, 5, 6, 7}
    pool.add_task("t9", clustered_embeddings(9)[:4])  # in the slots of t1
    check_pool(pool)
    pool.to(torch.bfloat16)
    assert pool._faiss is None
    check_pool(pool)
    pool.load_state_dict(pool.state_dict())
    assert pool._faiss is None


def test_restricted_search_does_not_use_faiss(monkeypatch):
    pool, plain = make_pool(3), make_pool(3, faiss_above=None)
    monkeypatch.setitem(sys.modules, "faiss", None)
    for tasks in ("t2", ["t1", None] * 18):
        assert all(
            torch.equal(a, b)
            for a, b in zip(pool.search(queries(), tasks), plain.search(queries(), tasks), strict=True)
        )


def test_copies_build_their_own_index():
    pool = make_pool(3)
    pool.search(queries())
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert other._faiss is None and pool._faiss is not None
        check_pool(other)
        other.remove_task("t0")
        check_pool(other)
    check_pool(pool)


def test_saved_pool(tmp_path):
    base = tiny_base("llama")
    name, layer = next((n, m) for n, m in base.named_modules() if n.endswith("o_proj"))
    pool = KnowledgePool(SLMConfig(faiss_above=5), {name: (layer.in_features, layer.out_features)})
    for t in range(3):
        pool.add_task(f"t{t}", clustered_embeddings(t)[:4], queries=clustered_embeddings(t))
    found = pool.search(queries())
    pool.remove_task("t1")
    save_pool(pool, base, tmp_path)
    loaded = load_pool(base, tmp_path)
    assert loaded.config.faiss_above == 5 and loaded.query_dim == DIM
    check_pool(loaded)
    assert found.num_rows == loaded.search(queries()).num_rows


def test_bad_queries():
    query = queries()
    query[5, 1] = torch.nan
    with pytest.raises(ValueError, match="query must be finite; row 5"):
        make_pool().search(query)


@pytest.mark.parametrize("value", [-1, 1.5, "many"])
def test_bad_setting(value):
    with pytest.raises(ValueError, match="faiss_above"):
        SLMConfig(faiss_above=value)


# ---- with and without faiss


def test_missing_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        make_pool().search(queries())
    make_pool(faiss_above=None).search(queries())
    with pytest.raises(ImportError, match="pip install faiss-gpu"):
        load_faiss(torch.device("cuda", 0))


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="needs a CPU build of FAISS")
def test_cuda_keys_need_a_gpu_build():
    with pytest.raises(ImportError, match="cuda:1 needs a GPU build.*pip install faiss-gpu"):
        load_faiss(torch.device("cuda", 1))


def test_other_devices():
    with pytest.raises(ValueError, match="cpu or cuda, got meta"):
        load_faiss(torch.device("meta"))


SEARCH = """
from slm_fast.faiss_index import FaissIndex
generator = torch.Generator().manual_seed(0)
keys, query = torch.randn(3000, 96, generator=generator), torch.randn(40, 96, generator=generator)
index = FaissIndex(keys, torch.zeros(3000), torch.ones(3000, dtype=torch.bool))
print(index.search(query, top_k=2)[0].sum().item(), (query @ keys.T).topk(2).indices.sum().item())
"""


@pytest.mark.parametrize("imports", ["import faiss, torch", "import torch, faiss", "import torch"])
def test_import_order(imports):
    run = subprocess.run(
        [sys.executable, "-c", imports + SEARCH], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    found, want = run.stdout.split()
    assert found == want


def test_faiss_is_imported_lazily():
    code = "import slm_fast, slm_fast.faiss_index, sys; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


@gpu
@needs_gpu
@pytest.mark.parametrize("dim", [1, 7, 384])
def test_cuda_keys(dim):
    query, keys, bias, allowed = index_case(40, 3000, dim)
    index = FaissIndex(*(t.cuda() for t in (keys, bias, allowed)))
    stream = torch.cuda.Stream()
    for top_k in (1, 4, 64):
        with torch.cuda.stream(stream):  # the query is made on a stream that is not the default one
            on_gpu = query.cuda() * 1.0
            found = [t.cpu() for t in index.search(on_gpu, top_k=top_k)]
        check_search(found, query, keys, bias, allowed, top_k=top_k)


@gpu
@needs_gpu
def test_pool_moves_to_cuda():
    pool = make_pool(3)
    want = pool.search(queries())
    pool.cuda()
    assert pool._faiss is None
    found = pool.search(queries().cuda()).to("cpu")
    assert pool._faiss.keys.is_cuda and torch.equal(found.indices, want.indices)
    torch.testing.assert_close(found.weights, want.weights, rtol=1e-4, atol=1e-5)
