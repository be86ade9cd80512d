import copy
import math

import pytest
import torch
from conftest import DIM, clustered_embeddings

from slm_fast import KnowledgePool, SLMConfig
from slm_fast.keys import TEMPERATURES


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
    assert statistics.mean.dtype == torch.float64 and statistics.V.dtype == torch.int8
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


def learnt(pool: KnowledgePool, name: str) -> list[torch.Tensor]:
    """Everything that a pool holds of a task."""
    slots, head = pool.task(name).slots, pool.head(name)
    rows = pool.rows_of(slots)
    held = [t[rows] for f in pool.factors for t in (f.A, f.B)]
    held += [pool.keys[slots], pool.rank[slots], pool.scaling[slots]]
    return held + ([] if head is None else [head.weight, head.bias])


def trained_pool(*tasks: int) -> KnowledgePool:
    """Tasks of mixed ranks, every other one with a head, with factors that look trained."""
    pool = KnowledgePool(SLMConfig(r=3, top_k=2), {"a": (8, 6), "b": (6, 8)})
    for t in tasks:
        generator = torch.Generator().manual_seed(t)
        labels = dict(labels=["x", "y"], hidden_size=4) if t % 2 else {}
        options = dict(rank=[2, 3], scaling=0.5 + t, generator=generator, **labels)
        query = clustered_embeddings(t)
        pool.add_task(f"t{t}", query[:2], queries=query, **options)
        rows = pool.rows_of(pool.task(f"t{t}").slots)
        for factors in pool.factors:
            factors.B[rows] = torch.randn(factors.B[rows].shape, generator=generator)
    return pool


def test_tasks_of_other_pools_are_as_if_learnt_here():
    together, first, second = trained_pool(0, 1, 2), trained_pool(0, 2), trained_pool(3, 1)
    second.task("t1").max_length = 40
    first.take_task(second, "t1")
    assert first.task("t1").max_length == 40
    assert first.task_names() == ["t0", "t2", "t1"] and first.task("t1").labels == ["x", "y"]
    for t in range(3):
        ours, theirs = learnt(first, f"t{t}"), learnt(together, f"t{t}")
        assert all(map(torch.equal, ours, theirs))
        query = clustered_embeddings(t, 7)
        routing, wanted = first.search(query), together.search(query)
        torch.testing.assert_close(routing.weights, wanted.weights)
        named = [
            [pool.names[i] for i in r.indices.flatten().tolist()]
            for pool, r in ((first, routing), (together, wanted))
        ]
        assert named[0] == named[1]
    learnt(second, "t1")[1].zero_()
    assert torch.equal(learnt(first, "t1")[1], learnt(together, "t1")[1])  # a copy
    first.remove_task("t1")
    again = trained_pool(0, 2)
    assert torch.equal(first.metric.cholesky(), again.metric.cholesky())


def test_a_part_of_a_pool_is_a_pool():
    part = trained_pool(0, 1, 2).only(["t2", "t1"])
    whole = trained_pool(2, 1)
    assert part.task_names() == whole.task_names() == ["t2", "t1"]
    assert torch.equal(part.metric.cholesky(), whole.metric.cholesky())
    query = clustered_embeddings(1, 5)
    assert all(map(torch.equal, part.search(query)[:3], whole.search(query)[:3]))


def test_tasks_of_pools_that_do_not_fit_are_refused():
    pool, other = trained_pool(0), trained_pool(0, 1)
    with pytest.raises(ValueError, match="already has a task 't0'"):
        pool.take_task(other, "t0")
    with pytest.raises(ValueError, match="unknown task 'x'"):
        pool.take_task(other, "x")
    with pytest.raises(ValueError, match="'t0' comes from a pool for other linears"):
        KnowledgePool(SLMConfig(), {"a": (8, 6)}).take_task(other, "t0")
    cosine = KnowledgePool(SLMConfig(metric="grouped_cosine"), pool.modules_shape)
    with pytest.raises(ValueError, match="with metric='whitened', this one has 'grouped_cosine'"):
        cosine.take_task(other, "t0")
    with pytest.raises(ValueError, match=f"with query_dim={DIM}, this one has 12"):
        KnowledgePool(SLMConfig(), pool.modules_shape, 12).take_task(other, "t0")
    assert pool.task_names() == ["t0"] and not cosine.tasks


@pytest.mark.parametrize("key_method", ["group_avg", "kmeans", "paper"])
@pytest.mark.parametrize("metric", ["whitened", "grouped_cosine"])
def test_training_sees_no_other_task(key_method, metric):
    config = SLMConfig(metric=metric, num_groups=4, key_method=key_method, min_similarity=1e9)
    alone, among = (KnowledgePool(config, {"a": (8, 6)}) for _ in range(2))
    query = clustered_embeddings(5, 30)
    for t in range(4):
        other = clustered_embeddings(t)
        among.add_task(f"t{t}", among.learn_keys(other, key_method), queries=other)
    for pool in (alone, among):
        pool.add_task("new", pool.learn_keys(query, key_method, seed=3), queries=query)
    ours, theirs = (pool.search_for_training(query, "new") for pool in (among, alone))
    assert torch.equal(ours.indices - among.task("new").slots[0], theirs.indices)
    assert torch.equal(ours.weights, theirs.weights) and (ours.weights > 0).all()
    assert (ours.pool_version == among.version).all()
    among.check_routing(ours)


def by_tasks(scores, tasks, temperature):
    """One row's weights by hand."""
    best = {t: max(s for s, of in zip(scores, tasks, strict=True) if of == t) for t in set(tasks)}
    total = sum(math.exp(s / temperature) for s in best.values())
    return [math.exp(best[t] / temperature) / total / tasks.count(t) for t in tasks]


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 8])
def test_weights_by_tasks_by_hand(top_k):
    pool = KnowledgePool(SLMConfig(r=1, top_k=top_k, temperature=40.0), {"a": (8, 6)})
    for t in range(3):
        query = clustered_embeddings(t)
        pool.add_task(f"t{t}", query[:2], queries=query)
    query = torch.cat([clustered_embeddings(t, 5) for t in range(3)] + [torch.zeros(1, DIM)])
    routing = pool.search(query)
    several = 0
    for scores, weights, indices in zip(
        *(x.tolist() for x in (routing.scores, routing.weights, routing.indices)), strict=True
    ):
        real = [n for n, s in enumerate(scores) if s > -math.inf]
        tasks = [indices[n] // 2 for n in real]
        several += len(set(tasks)) > 1
        assert [weights[n] for n in real] == pytest.approx(
            by_tasks([scores[n] for n in real], tasks, 40.0), abs=1e-6
        )
        assert sum(weights) == pytest.approx(1.0)
    assert (several > 0) == (top_k > 2)  # a task's two entries come first
    told = pool.search(query, "t1")
    assert set(told.weights.flatten().tolist()) <= {0.0, 1 / min(top_k, 2)}


def test_a_task_alone_has_the_weights_of_its_training():
    pool = make_pool(3)
    for t in range(3):
        query = clustered_embeddings(t, 20)
        free, training = pool.search(query), pool.search_for_training(query, f"t{t}")
        assert torch.equal(free.weights, training.weights)
        assert torch.equal(free.indices.sort().values, training.indices.sort().values)


def test_weights_by_tasks_know_the_floor_and_no_entries_twice():
    pool = make_pool(2, min_similarity=1e9)
    assert pool.search(clustered_embeddings(0, 3)).weights.count_nonzero() == 0
    assert (pool.search_for_training(clustered_embeddings(0, 3), "t0").weights == 0.5).all()
    assert SLMConfig().weighting == "task" and SLMConfig(key_method="kmeans").weighting == "softmax"


def test_a_fitted_temperature():
    pool = KnowledgePool(SLMConfig(r=1, temperature="auto"), {"a": (8, 6)})
    assert SLMConfig.from_dict(pool.config.to_dict()) == pool.config
    noise = torch.randn(3, 60, DIM, generator=torch.Generator().manual_seed(0))
    for t in range(3):
        query = noise[t] * torch.linspace(0, 3, 60)[:, None] + 0.1 * clustered_embeddings(t, 1)  # heavy tails
        pool.add_task(f"t{t}", query[:4], queries=query)
        losses = [len(task.losses) for task in pool.metric.tasks.values()]
        assert losses == [0] + [len(TEMPERATURES)] * t
        if t == 0:
            assert pool.temperature() == pool.metric.default_temperature
    curves = torch.stack([task.losses for task in pool.metric.tasks.values()][1:]).mean(0)
    assert pool.temperature() == TEMPERATURES[int(curves.argmin())]
    assert curves.min() < curves[0] and curves.min() < curves[-1]
    # by hand: the second task's held-out fifth, searched in a pool that knows the rest of it
    query = noise[1] * torch.linspace(0, 3, 60)[:, None] + 0.1 * clustered_embeddings(1, 1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    without = KnowledgePool(SLMConfig(r=1, top_k=8), {"a": (8, 6)})
    without.take_task(pool, "t0")
    rest = query[order[12:]]
    without.add_task("t1", without.learn_keys(rest, "group_avg"), queries=rest)
    routing = without.search(query[order[:12]])
    first = routing.indices < 4
    best = torch.stack([routing.scores.where(of, -torch.inf).amax(1) for of in (first, ~first)], 1)
    losses = [
        torch.nn.functional.cross_entropy(best / t, torch.ones(12, dtype=torch.long)) for t in TEMPERATURES
    ]
    torch.testing.assert_close(pool.metric.tasks["task:t1"].losses, torch.stack(losses), rtol=1e-4, atol=1e-5)


def losses_of(pool):
    """{task: its losses}, of those that have some."""
    tasks = {name: pool.metric.tasks[f"task:{name}"] for name in pool.tasks}
    return {name: task.losses for name, task in tasks.items() if len(task.losses)}


def fitted_pool(*tasks):
    pool = KnowledgePool(SLMConfig(r=1, temperature="auto"), {"a": (8, 6)})
    for t in tasks:
        pool.add_task(f"t{t}", clustered_embeddings(t)[:4], queries=clustered_embeddings(t))
    return pool


def test_a_removed_task_takes_what_was_measured_against_it():
    pool = fitted_pool(0, 1, 2, 3)
    assert list(losses_of(pool)) == ["t1", "t2", "t3"]
    pool.remove_task("t2")
    assert list(losses_of(pool)) == ["t1"]
    assert pool.temperature() == TEMPERATURES[int(losses_of(pool)["t1"].argmin())]
    pool.remove_task("t0")
    assert not losses_of(pool) and pool.temperature() == pool.metric.default_temperature
    pool.add_task("t2", clustered_embeddings(2)[:4], queries=clustered_embeddings(2))
    assert list(losses_of(pool)) == ["t2"]


def test_a_temperature_is_fitted_once_and_again_when_losses_change(monkeypatch):
    pool, calls = fitted_pool(0, 1, 2), []
    fit = type(pool.metric).fitted_temperature
    monkeypatch.setattr(type(pool.metric), "fitted_temperature", lambda m: calls.append(1) or fit(m))
    for _ in range(3):
        pool.search(clustered_embeddings(1, 4))
    assert len(calls) == 1
    pool.add_task("t3", clustered_embeddings(3)[:4], queries=clustered_embeddings(3))
    assert pool.temperature() == fit(pool.metric) and len(calls) == 2
    pool.remove_task("t0")
    assert pool.temperature() == pool.metric.default_temperature
    pool.take_task(fitted_pool(7), "t7", clustered_embeddings(7))
    assert len(losses_of(pool)) == 1
    assert pool.temperature() == TEMPERATURES[int(losses_of(pool)["t7"].argmin())]


def test_taken_tasks_keep_losses_against_tasks_that_are_there():
    other = fitted_pool(0, 1, 2)
    whole = fitted_pool()
    whole.take_tasks(other, ["t2", "t0", "t1"])
    assert list(losses_of(whole)) == ["t2", "t1"] and whole.temperature() == other.temperature()
    assert list(losses_of(other.only(["t0", "t1"]))) == ["t1"] and not losses_of(other.only(["t1", "t2"]))
    part = fitted_pool()
    part.take_task(other, "t1")
    part.take_task(other, "t0")
    assert not losses_of(part)  # those of t1 went when t0 was not there
    part.take_task(other, "t2")
    assert torch.equal(losses_of(part)["t2"], losses_of(other)["t2"])
    namesake = KnowledgePool(other.config, other.modules_shape)
    namesake.add_task("t0", clustered_embeddings(7)[:4], queries=clustered_embeddings(7))
    namesake.take_task(other, "t1")
    assert not losses_of(namesake)


def test_a_taken_task_is_measured_again_with_its_queries():
    apart, want = fitted_pool(5, 1), fitted_pool(0, 1)
    pool = fitted_pool(0)
    pool.take_task(apart, "t1", clustered_embeddings(1))
    assert torch.equal(losses_of(pool)["t1"], losses_of(want)["t1"])
    assert pool.metric.tasks["task:t1"].against.tolist() == [pool.identity("t0")]
    alone = fitted_pool()
    alone.take_task(apart, "t1", clustered_embeddings(1))
    assert not losses_of(alone)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature="fit"),
        dict(temperature="auto", metric="grouped_cosine"),
        dict(temperature="auto", weighting="softmax"),
        dict(shrinkage="auto"),
    ],
)
def test_temperatures_that_cannot_be_fitted(wrong):
    with pytest.raises(ValueError, match="temperature|shrinkage"):
        SLMConfig(**wrong)
