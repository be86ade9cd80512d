import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import clustered_embeddings

from slm_fast import SLMConfig
from slm_fast.keys import Whitened
from slm_fast.pool import KnowledgePool
from slm_fast.task_statistics import (
    NUM_QUANTILES,
    Gaussian,
    TaskStatistics,
    held_out_distances,
    leading,
    num_states,
)

LINEARS = {"a": (4, 4)}


def low_rank(count, dim=48, rank=6, seed=0, noise=0.01):
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(count, rank, generator=generator) @ torch.randn(rank, dim, generator=generator)
    return signal + noise * torch.randn(count, dim, generator=generator) + 1


@pytest.mark.parametrize("shape", [(5, 40), (200, 40), (300, 600)])
@pytest.mark.parametrize("rank", [1, 6, 1000])
def test_leading_directions_are_those_of_the_svd(shape, rank):
    centred = low_rank(*shape) - 1
    got = leading(centred, rank)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    kept = min(rank, *shape)
    want = values[:kept, None] * vectors[:kept]
    assert got.shape == want.shape
    torch.testing.assert_close(got.T @ got, want.T @ want, rtol=1e-3, atol=1e-3 * float(values[0] ** 2))
    assert torch.equal(got, leading(centred, rank))


def layered(count, states=4, units=30, seed=0):
    """Queries of several states of norm 1, in which a unit changes little from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    state = 1 + low_rank(count, units, seed=seed, noise=0.5)
    found = []
    for _ in range(states):
        state = state + 0.3 * torch.randn(state.shape, generator=generator)
        found.append(torch.nn.functional.normalize(state, dim=-1))
    return torch.cat(found, 1)


def misfit(kept, query):
    """KL divergence of the Gaussian with the kept covariance from the one with the queries' own, no means."""
    centred = query - query.mean(0)
    exact, kept = ((S + 0.1 * torch.eye(len(S))).double() for S in (centred.T @ centred, kept.scatter()))
    ratio = torch.linalg.solve(kept, exact)
    return float(ratio.trace() - torch.linalg.slogdet(ratio).logabsdet - len(ratio)) / 2


def test_the_scatter_of_few_queries_is_nearly_exact():
    query = clustered_embeddings(0, 20)
    centred = query - query.mean(0)
    kept, exact = TaskStatistics.of(query, 512), centred.T @ centred
    assert kept.V.shape[0] == 19 and kept.V.dtype == torch.int8 and int(kept.count) == 20
    assert (kept.scatter() - exact).abs().max() < 0.01 * exact.diagonal().max()


def test_the_diagonal_is_kept_whatever_the_rank():
    query = low_rank(300, noise=1.0)
    centred = query - query.mean(0)
    kept = TaskStatistics.of(query, 3)
    assert kept.V.shape == (3, 48) and kept.rest.shape == (48, 1, 1)
    torch.testing.assert_close(kept.scatter().diagonal(), centred.square().sum(0))


@pytest.mark.parametrize("rank", [1, 8, 40])
def test_what_a_unit_is_in_the_states_is_kept_whatever_the_rank(rank):
    query = layered(300)
    kept, centred = TaskStatistics.of(query, rank), query - query.mean(0)
    assert kept.V.shape == (rank, 120) and kept.rest.shape == (30, 4, 4)
    torch.testing.assert_close(kept.scatter(), kept.scatter().T)
    assert torch.linalg.eigvalsh(kept.rest).min() >= -1e-6
    assert torch.linalg.eigvalsh(kept.scatter().double()).min() >= -1e-4
    exact, got = ((S.view(4, 30, 4, 30).diagonal(0, 1, 3)) for S in (centred.T @ centred, kept.scatter()))
    assert (got - exact).abs().max() < 0.005 * exact.max()  # 8 bits


def test_states_tell_more_than_a_diagonal():
    query = layered(400)
    rotated = query @ torch.linalg.qr(torch.randn(120, 120, generator=torch.Generator().manual_seed(1))).Q
    kept, flat = TaskStatistics.of(query, 10), TaskStatistics.of(rotated, 10)
    assert num_states(rotated) == 1 and flat.rest.shape == (120, 1, 1)
    assert misfit(kept, query) < 0.2 * misfit(flat, rotated)
    assert misfit(TaskStatistics.of(query, 60), query) < 0.5 * misfit(kept, query)


def test_states_are_seen_in_the_queries():
    assert num_states(layered(5)) == 4 and num_states(layered(5, states=7)) == 7
    assert num_states(layered(5, states=1)) == 1 and num_states(torch.zeros(2, 24)) == 1
    assert num_states(clustered_embeddings(0)) == 1
    assert num_states(layered(5)[:, :-1]) == 1  # 119 values cannot be four states
    query = layered(5)
    query[3] *= 1.1
    assert num_states(query) == 1


def test_bytes_of_a_task():
    """Less than half of those of 512 directions in fp16 with a diagonal."""
    kept = TaskStatistics.of(layered(400, states=7, units=384), Whitened(SLMConfig(), 2688).rank)
    assert kept.V.shape == (390, 2688) and kept.rest.shape == (384, 7, 7)
    assert sum(tensor.nbytes for tensor in kept.buffers()) < 0.42 * (
        2688 * (2 * 512 + 4 + 8) + 4 * NUM_QUANTILES
    )
    assert (
        Whitened(SLMConfig(), 4096).rank == 256 and Whitened(SLMConfig(statistics_rank=64), 4096).rank == 64
    )


def test_the_order_of_learning_does_not_matter():
    query = {name: layered(60, seed=n) for n, name in enumerate("abc")}
    metrics = []
    for order in ("abc", "cab"):
        metrics.append(Whitened(SLMConfig(), 120))
        for name in order:
            metrics[-1].update(name, query[name])
    for name in query:
        ours, theirs = (metric.tasks[f"task:{name}"] for metric in metrics)
        assert torch.equal(ours.V, theirs.V) and torch.equal(ours.rest, theirs.rest)
    torch.testing.assert_close(metrics[0].scatter, metrics[1].scatter)


def test_a_removed_task_of_several_states_leaves_no_trace():
    metric, want = Whitened(SLMConfig(), 120), Whitened(SLMConfig(), 120)
    for n in range(3):
        metric.update(f"{n}", layered(60, seed=n))
        if n != 1:
            want.update(f"{n}", layered(60, seed=n))
    assert metric.remove("1")
    assert torch.equal(metric.scatter, want.scatter) and torch.equal(metric.cholesky(), want.cholesky())


def test_statistics_of_format_3():
    """V in fp16, a diagonal, no scale: loaded as they are, and saved and removed like others."""
    config, generator = SLMConfig(), torch.Generator().manual_seed(0)
    metric, old = Whitened(config, 24), Whitened(config, 24)
    metric.update("new", clustered_embeddings(0, 30))
    state = metric.state_dict()
    V = torch.randn(5, 24, generator=generator).half()
    rest = torch.rand(24, generator=generator)
    scatter = V.float().T @ V.float() + torch.diag(rest)
    task = dict(
        count=torch.tensor(9), position=torch.tensor(1), mean=torch.zeros(24).double(), V=V, rest=rest
    )
    task |= dict(quantiles=torch.rand(NUM_QUANTILES).sort().values, losses=torch.zeros(0))
    state |= {f"tasks.task:old.{name}": tensor for name, tensor in task.items()}
    old.load_state_dict(state | {"scatter": metric.scatter + scatter})
    assert torch.equal(old.tasks["task:old"].V, V)
    torch.testing.assert_close(old.tasks["task:old"].scatter(), scatter)
    mean, directions, diagonal = old.tasks["task:old"].moments()
    torch.testing.assert_close(directions * 8**0.5, V.float())
    torch.testing.assert_close(diagonal * 8, rest)
    again = Whitened(config, 24)
    again.load_state_dict(old.state_dict())
    assert torch.equal(again.scatter, old.scatter) and torch.equal(again.tasks["task:old"].V, V)
    assert again.remove("old") and torch.equal(again.scatter, metric.scatter)


def test_distance_is_mahalanobis():
    generator = torch.Generator().manual_seed(0)
    V, total = torch.randn(3, 10, generator=generator), torch.full((10,), 12.0)
    mean, query = torch.randn(10, generator=generator), torch.randn(7, 10, generator=generator)
    gaussian = Gaussian.of(mean, V, total)
    covariance = torch.diag(gaussian.variance) + V.T @ V
    off = query - mean
    want = torch.einsum("nd,de,ne->n", off, torch.linalg.inv(covariance), off)
    torch.testing.assert_close(gaussian.distance(query), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_the_floor_keeps_its_share_of_new_texts(coverage):
    kept = TaskStatistics.of(low_rank(400, noise=1.0), 512)
    mixing = torch.Generator().manual_seed(0)
    torch.randn(400, 6, generator=mixing)
    directions = torch.randn(6, 48, generator=mixing)
    fresh = torch.randn(2000, 6) @ directions + torch.randn(2000, 48) + 1
    assert abs(float(kept.nearness(fresh, coverage).mean()) - coverage) < 0.04
    assert not kept.nearness(fresh + 20, coverage).any()
    tapered = kept.nearness(fresh, coverage, 0.5)
    assert (tapered[kept.nearness(fresh, 0.5) == 1] == 1).all() and 0.1 < (tapered < 1).float().mean() < 0.6
    assert torch.equal(tapered > 0, kept.nearness(fresh, coverage) > 0)


def test_weights_taper_in_steps():
    task = TaskStatistics.of(low_rank(400, noise=1.0), 512)
    order = torch.linspace(0, 1, NUM_QUANTILES)
    task.quantiles = 100 * order  # the share of own texts that are nearer is a hundredth of the distance
    distance = torch.tensor([-1.0, 0.0, 20.0, 20.04, 45.0, 70.0, 80.0, 94.9, 95.1, 100.0, 1e6])
    task._own = SimpleNamespace(distance=lambda query: distance)
    query = torch.zeros(len(distance), 48)
    assert (16 * task.nearness(query, 0.95, 0.2)).tolist() == [16, 16, 16, 16, 11, 6, 4, 1, 0, 0, 0]
    assert task.nearness(query, 0.95).tolist() == [1] * 8 + [0] * 3
    assert torch.equal(task.nearness(query, 0.95, 0.95), task.nearness(query, 0.95))
    assert torch.equal(task.nearness(query, 0.2, 0.5), task.nearness(query, 0.2))


def test_one_query_has_no_floor():
    assert held_out_distances(torch.ones(1, 8)).shape == (0,)
    kept = TaskStatistics.of(torch.ones(1, 8), 4)
    assert kept.nearness(torch.randn(3, 8), 0.5).tolist() == [1, 1, 1]
    same = TaskStatistics.of(torch.ones(9, 8), 4)
    assert len(same.quantiles) == NUM_QUANTILES and same.scatter().isfinite().all()
    assert not same.nearness(torch.randn(3, 8), 0.5).any() and same.nearness(torch.ones(1, 8), 0.5).all()


def make_pool(tasks, **settings):
    pool = KnowledgePool(SLMConfig(r=1, entries_per_task=2, top_k=2, **settings), LINEARS)
    for t in tasks:
        query = clustered_embeddings(t, 40)
        pool.add_task(f"task{t}", pool.learn_keys(query, "group_avg", seed=t), queries=query)
    return pool


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_a_removed_task_leaves_no_trace_in_the_routing(removed):
    pool, want = make_pool((0, 1, 2)), make_pool(t for t in (0, 1, 2) if t != removed)
    pool.remove_task(f"task{removed}")
    assert torch.equal(pool.metric.scatter, want.metric.scatter)
    assert torch.equal(pool.metric.mean, want.metric.mean)
    query = torch.cat([clustered_embeddings(t, 30) for t in range(4)])
    got, expected = pool.search(query), want.search(query)
    assert torch.equal(got.scores, expected.scores) and torch.equal(got.weights, expected.weights)
    named = [[p.names[i] for i in r.indices.flatten().tolist()] for p, r in ((pool, got), (want, expected))]
    assert named[0] == named[1]
    pool.add_task("again", torch.zeros(1, pool.query_dim), queries=clustered_embeddings(5, 40))
    assert int(pool.metric.tasks["task:again"].position) == 1 + max(
        int(s.position) for name, s in pool.metric.tasks.items() if name != "task:again"
    )


def test_statistics_survive_loading_in_their_order():
    config = SLMConfig()
    metric, again = Whitened(config, 24), Whitened(config, 24)
    for name in ("zebra", "a.b", "m"):
        metric.update(name, clustered_embeddings(len(name), 30 + len(name)))
    again.load_state_dict(dict(sorted(metric.state_dict().items())))
    assert list(again.tasks) == list(metric.tasks) == ["task:zebra", "task:a%2Eb", "task:m"]
    assert torch.equal(again.cholesky(), metric.cholesky()) and torch.equal(again.mean, metric.mean)
    metric.remove("a.b")
    again.remove("a.b")
    assert torch.equal(again.cholesky(), metric.cholesky())
    assert not metric.remove("a.b")


def test_the_metric_of_one_task_is_the_one_without_the_others():
    metric, alone = Whitened(SLMConfig(), 24), Whitened(SLMConfig(), 24)
    metric.update("first", clustered_embeddings(0, 30))
    metric.update("a.b", clustered_embeddings(1, 30))
    alone.update("a.b", clustered_embeddings(1, 30))
    before = copy.deepcopy(metric)
    only = metric.only(["a.b"])
    assert torch.equal(only.cholesky(), alone.cholesky()) and torch.equal(only.mean, alone.mean)
    assert (
        not torch.equal(only.mean, metric.mean)
        and not metric.only(["first"]).tasks.keys() & only.tasks.keys()
    )
    whole = metric.only(["first", "a.b"])
    assert torch.equal(whole.cholesky(), metric.cholesky())
    whole.update("more", clustered_embeddings(2, 30))
    assert list(metric.tasks) == list(before.tasks) and int(metric.tasks["task:a%2Eb"].position) == 1
    assert torch.equal(metric.scatter, before.scatter) and torch.equal(metric.mean, before.mean)


def test_queries_outside_all_tasks_use_the_frozen_model():
    pool = make_pool((0, 1, 2), min_similarity="auto", coverage=0.95)
    inside = torch.cat([clustered_embeddings(t, 40) for t in range(3)])
    outside = torch.cat([clustered_embeddings(t, 40) for t in (7, 8)])
    kept = pool.search(inside).weights.sum(1) > 0
    assert kept.float().mean() > 0.85
    assert pool.search(outside).weights.sum(1).count_nonzero() < 8
    assert (pool.search(outside, "task1").weights.sum(1) > 0).all()
    told = pool.search(outside, ["task1", None] * 40).weights.sum(1) > 0
    assert told[::2].all() and told[1::2].sum() < 8
    fresh = torch.cat([clustered_embeddings(t, 80)[40:] for t in range(3)])
    weights = pool.search(fresh).weights.sum(1)
    assert (weights <= 1).all() and 0.2 < ((weights > 0) & (weights < 1)).float().mean() < 0.8
    whole = (
        make_pool((0, 1, 2), min_similarity="auto", coverage=0.95, taper=None).search(fresh).weights.sum(1)
    )
    assert torch.equal(whole > 0, weights > 0) and whole[whole > 0].sub(1).abs().max() < 1e-6
    assert torch.equal(
        pool.search(inside, "task1").weights, make_pool((0, 1, 2)).search(inside, "task1").weights
    )
    pool.metric.tasks["task:task0"].quantiles.zero_()
    pool.metric.tasks["task:task0"]._own = None
    assert not (pool.search(inside[:40]).weights.sum(1) > 0).any()


@pytest.mark.parametrize(
    "settings", [{"min_similarity": "high"}, {"min_similarity": "auto", "metric": "grouped_cosine"}]
)
def test_impossible_floors(settings):
    with pytest.raises(ValueError, match="min_similarity must be a number"):
        SLMConfig(**settings)


@pytest.mark.parametrize("taper", [1.5, -0.1, "none", True])
def test_impossible_tapers(taper):
    with pytest.raises(ValueError, match="taper must be a number from 0 to 1, or None"):
        SLMConfig(taper=taper)


def test_floors_that_were_stored_without_a_taper_have_none():
    for settings in ({"min_similarity": "auto"}, {"min_similarity": 0.5}, {}):
        for taper in (None, 0.3, 0.5):
            config = SLMConfig(taper=taper, **settings)
            assert SLMConfig.from_dict(config.to_dict()) == config
    stored = SLMConfig(min_similarity="auto", taper=None).to_dict()
    assert "taper" not in stored and "taper" not in SLMConfig().to_dict()
    assert SLMConfig.from_dict(stored).taper is None
