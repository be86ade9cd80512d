import copy

import pytest
import torch
from conftest import DIM, clustered_embeddings

from slm_fast import KnowledgePool, SLMConfig


def make_pool(num_tasks=2, **config) -> KnowledgePool:
    pool = KnowledgePool(SLMConfig(**(dict(r=3, top_k=2) | config)), {"a": (8, 6), "b": (6, 8)})
    for t in range(num_tasks):
        query = clustered_embeddings(t)
        pool.add_task(f"t{t}", query[:2], queries=query)
    return pool


def test_routes_to_the_right_task():
    pool = make_pool(3)
    for t in range(3):
        mass, names = pool.task_mass(pool.search(clustered_embeddings(t, 20)))
        assert names == ["t0", "t1", "t2"]
        assert (mass.argmax(-1) == t).all()
        torch.testing.assert_close(mass.sum(-1), torch.ones(20))


def test_restriction_to_tasks():
    pool = make_pool(3)
    query = clustered_embeddings(0, 4)
    assert set(pool.search(query, "t2").indices.flatten().tolist()) == {4, 5}
    routing = pool.search(query, ["t1", None, "t2", "t0"])
    assert set(routing.indices[0].tolist()) == {2, 3} and set(routing.indices[2].tolist()) == {4, 5}
    with pytest.raises(ValueError, match="unknown task 'x'"):
        pool.search(query, "x")
    with pytest.raises(ValueError, match="tasks has 1 rows, the batch has 4"):
        pool.search(query, ["t1"])


def test_top_k_larger_than_the_pool():
    routing = make_pool(1, top_k=5).search(clustered_embeddings(0, 3))
    assert routing.indices.shape == (3, 5)
    assert (routing.weights[:, 2:] == 0).all() and (routing.indices[:, 2:] == 0).all()
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(3))


def test_min_similarity_falls_back_to_the_frozen_model():
    pool = make_pool(2, metric="grouped_cosine", num_groups=1, min_similarity=0.9)
    near, far = clustered_embeddings(0, 1), -clustered_embeddings(0, 1) - clustered_embeddings(1, 1)
    routing = pool.search(torch.cat([near, far]))
    assert routing.weights[0].sum() > 0.99 and (routing.weights[1] == 0).all()


def test_batch_mixing_shares_one_mixture():
    pool = make_pool(2, mixing="batch")
    query = torch.cat([clustered_embeddings(0, 3), clustered_embeddings(1, 1)])
    routing = pool.search(query)
    assert routing.num_rows == 4
    assert all(torch.equal(routing.weights[0], row) for row in routing.weights)
    own = make_pool(2).search(query)
    assert set(routing.indices[3].tolist()) != set(own.indices[3].tolist())
    averaged = make_pool(2).search(query.mean(0, keepdim=True))
    assert torch.equal(routing.indices[0], averaged.indices[0])


def test_slots_and_rows_are_reused():
    pool = make_pool(4)
    capacity = pool.factors[0].A.shape[0]
    before = pool.search(clustered_embeddings(1, 2))
    for factors in pool.factors:
        factors.A.fill_(5.0)
    pool.remove_task("t1")
    assert "t1" not in pool.tasks and pool.num_entries == 6
    with pytest.raises(ValueError, match="stale"):
        pool.check_routing(before)
    assert not set(pool.search(clustered_embeddings(1, 9)).indices.flatten().tolist()) & {2, 3}
    info = pool.add_task("t9", clustered_embeddings(9)[:2], queries=clustered_embeddings(9))
    assert sorted(info.slots) == [2, 3]
    assert pool.factors[0].A.shape[0] == capacity
    rows = torch.cat([torch.arange(int(pool.start[s]), int(pool.start[s]) + 3) for s in info.slots])
    assert (pool.factors[0].A[rows].abs() < 1).all() and (pool.factors[0].B[rows] == 0).all()
    others = [r for r in range(24) if r not in rows.tolist()]
    assert (pool.factors[0].A[others] == 5.0).all()
    with pytest.raises(ValueError, match="stale"):
        pool.check_routing(before)


def test_adding_does_not_make_older_routings_stale():
    pool = make_pool(2)
    routing = pool.search(clustered_embeddings(0, 2))
    pool.add_task("new", clustered_embeddings(5)[:2], queries=clustered_embeddings(5))
    pool.check_routing(routing)


def test_mixed_ranks():
    pool = make_pool(0)
    pool.add_task("m", clustered_embeddings(0)[:3], rank=[1, 12, 5])
    assert pool.rank[:3].tolist() == [1, 12, 5] and pool.start[:3].tolist() == [0, 1, 13]
    with pytest.raises(ValueError, match="rank"):
        pool.add_task("n", clustered_embeddings(0)[:3], rank=[1, 2])


def test_rows_of_removed_mixed_rank_tasks_are_reused():
    pool = make_pool(1)
    for n in range(50):
        pool.add_task(f"m{n}", clustered_embeddings(0)[:2], rank=[1, 4] if n % 2 else [4, 1])
        pool.remove_task(f"m{n}")
    assert pool.factors[0].A.shape[0] <= 24 and pool.start.shape[0] <= 8


def test_only_the_factors_take_a_dtype():
    pool = make_pool(2).to(torch.bfloat16)
    assert pool.factors[0].A.dtype == torch.bfloat16
    assert pool.keys.dtype == pool.scaling.dtype == pool.index_bias.dtype == torch.float32
    statistics = pool.metric.tasks["task:t0"]
    assert statistics.mean.dtype == torch.float64 and statistics.V.dtype == torch.float16
    assert torch.equal(
        pool.search(clustered_embeddings(0, 3)).indices,
        make_pool(2).search(clustered_embeddings(0, 3)).indices,
    )


def test_growth_is_amortised():
    pool = KnowledgePool(SLMConfig(r=1, metric="grouped_cosine", num_groups=1), {"a": (4, 4)})
    copies = 0
    for n in range(300):
        before = pool.factors[0].A.data_ptr()
        pool.add_task(f"t{n}", torch.randn(1, 8))
        copies += pool.factors[0].A.data_ptr() != before
    assert pool.num_entries == 300 and copies <= 10


def test_owned_parameters_share_the_pools_storage():
    pool = make_pool(3)
    pool.own("t1")
    trainable = [n for n, p in pool.named_parameters() if p.requires_grad]
    assert trainable == [f"factors.{m}.{side}_owned" for m in range(2) for side in "AB"]
    factors = pool.factors[0]
    with torch.no_grad():
        factors.A_owned.fill_(3.0)
    begin, end = factors.owned
    assert (factors.A[begin:end] == 3.0).all() and not (factors.A[:begin] == 3.0).any()
    pool.add_task("while", clustered_embeddings(7)[:2])  # may reallocate
    pool.double().float()
    clone = copy.deepcopy(pool)
    for p in (pool, clone):
        with torch.no_grad():
            p.factors[0].B_owned.fill_(4.0)
        assert (p.factors[0].B[begin:end] == 4.0).all()
    with pytest.raises(ValueError, match="'t1' is being trained"):
        pool.own("t0")
    with pytest.raises(ValueError, match="being trained"):
        pool.remove_task("t1")
    pool.disown()
    assert not any(p.requires_grad for p in pool.parameters())


@pytest.mark.parametrize("name", ["t0", "", "../up", "a/b", "__base__", ".hidden"])
def test_bad_task_names_change_nothing(name):
    pool = make_pool(1)
    version = pool.version
    with pytest.raises(ValueError, match="task"):
        pool.add_task(name, clustered_embeddings(1)[:2])
    assert pool.version == version and pool.num_entries == 2


def test_bad_queries():
    pool = make_pool(1)
    query = clustered_embeddings(0, 3)
    query[1, 2] = torch.nan
    with pytest.raises(ValueError, match="query must be finite; row 1"):
        pool.search(query)
    with pytest.raises(ValueError, match=rf"\[N, {DIM}\], got \[3, 5\]"):
        pool.search(torch.randn(3, 5))
    with pytest.raises(ValueError, match="no entries"):
        make_pool(0).search(query)


def test_fixed_routing():
    pool = make_pool(2)
    routing = pool.fixed_routing(["t1.0", "__base__", "t0"])
    assert routing.weights.tolist() == [[1, 0], [0, 0], [0.5, 0.5]]
    assert routing.indices[0, 0] == 2 and routing.indices[2].tolist() == [0, 1]
    with pytest.raises(ValueError, match="unknown adapter 'nope'"):
        pool.fixed_routing(["nope"])


def test_labels_must_be_distinct():
    pool = make_pool(0)
    with pytest.raises(ValueError, match="distinct"):
        pool.add_task("x", clustered_embeddings(0)[:2], labels=["a", "a"], hidden_size=8)
    pool.add_task("x.y%", clustered_embeddings(0)[:2], labels=["a", "b"], hidden_size=8)
    assert pool.head("x.y%").weight.shape == (2, 8)
    pool.remove_task("x.y%")
    assert len(pool.heads) == 0
