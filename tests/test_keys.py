import pytest
import torch
from conftest import clustered_embeddings

from slm_fast import SLMConfig
from slm_fast.keys import GroupedCosine, Whitened, learn_keys


def test_grouped_cosine_is_the_mean_of_the_groups_cosines():
    config = SLMConfig(metric="grouped_cosine", num_groups=4)
    metric = GroupedCosine(config, 24)
    q, k = torch.randn(5, 24), torch.randn(7, 24)
    c, beta = metric.index(k)
    per_group = [torch.cosine_similarity(q[:, None, s], k[None, :, s], -1) for s in torch.arange(24).split(6)]
    torch.testing.assert_close(metric.transform(q) @ c.T + beta, sum(per_group) / 4)
    with pytest.raises(ValueError, match="not divisible"):
        GroupedCosine(config, 25)


@pytest.mark.parametrize("shrinkage", [None, 0.1, 1.0])
def test_whitened_orders_by_mahalanobis_distance(shrinkage):
    metric = Whitened(SLMConfig(shrinkage=shrinkage), 24)
    tasks = [clustered_embeddings(t, 60) for t in range(3)]
    for number, query in enumerate(tasks):
        metric.update(f"task{number}", query)
    within = torch.cat([q - q.mean(0) for q in tasks]).double()
    cov = within.T @ within / (180 - 3)
    measured, ridge = metric.covariance()
    torch.testing.assert_close(measured.double(), cov, rtol=1e-3, atol=1e-2 * float(cov.max()))  # 8 bits
    precision = torch.linalg.inv(measured.double() + ridge * torch.eye(24))
    q, keys = torch.randn(9, 24), torch.stack([t.mean(0) for t in tasks])
    c, beta = metric.index(keys)
    score = metric.transform(q) @ c.T + beta
    mean = torch.stack([t.mean(0) for t in tasks]).mean(0).double()

    def distance(points, centre):
        diff = points.double() - centre.double()
        return torch.einsum("nd,de,ne->n", diff, precision, diff)

    expected = torch.stack([(distance(q, mean) - distance(q, k)) / 2 for k in keys], 1)
    torch.testing.assert_close(score.double(), expected, rtol=1e-3, atol=1e-3)
    points = metric.embed(q)
    torch.testing.assert_close(
        (points[0] - points[1]).square().sum().double(), distance(q[:1], q[1])[0], rtol=1e-3, atol=1e-3
    )


def test_shrinkage_falls_as_texts_grow():
    ridges = []
    for count in (16, 100, 2000):
        metric = Whitened(SLMConfig(), 24)
        mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
        metric.update("task", torch.randn(count, 24, generator=torch.Generator().manual_seed(2)) @ mixing)
        cov, ridge = metric.covariance()
        ridges.append(ridge / float(cov.diagonal().mean()))
    assert ridges[0] > ridges[1] > ridges[2]
    assert all(1e-3 <= r <= 1.0 + 1e-6 for r in ridges)


@pytest.mark.parametrize("method", ["group_avg", "kmeans", "paper"])
@pytest.mark.parametrize("metric", ["whitened", "grouped_cosine"])
def test_methods_find_their_own_task(method, metric):
    config = SLMConfig(metric=metric, num_groups=4, key_method=method)
    scorer = (Whitened if metric == "whitened" else GroupedCosine)(config, 24)
    queries = [clustered_embeddings(t, 80) for t in range(3)]
    for number, query in enumerate(queries):
        scorer.update(f"task{number}", query)
    keys = torch.cat([learn_keys(query, 3, scorer, config, method, seed=1) for query in queries])
    assert keys.shape == (9, 24) and keys.isfinite().all()
    c, beta = scorer.index(keys)
    for t, query in enumerate(queries):
        best = (scorer.transform(query) @ c.T + beta).argmax(-1)
        assert (best // 3 == t).float().mean() > 0.95
    again = learn_keys(queries[0], 3, scorer, config, method, seed=1)
    assert torch.equal(again, keys[:3])


@pytest.mark.parametrize(("settings", "steps"), [({}, 20 * 3), ({"key_epochs": 2, "key_batch_size": 8}, 20)])
def test_steps_of_the_papers_key_training(settings, steps):
    config, seen = SLMConfig(num_groups=4, **settings), []

    def progress(batches):
        seen.extend(batches)
        return batches

    learn_keys(clustered_embeddings(0, 80), 3, None, config, "paper", progress=progress)
    assert len(seen) == steps and sum(map(len, seen)) == 80 * config.key_epochs


def test_learning_rate_of_the_papers_key_training():
    """AdamW's first step moves every coordinate by the learning rate."""
    query = clustered_embeddings(0, 8)

    def keys(rate):
        config = SLMConfig(num_groups=4, key_masking=0.0, top_k=3, key_epochs=1, key_learning_rate=rate)
        return learn_keys(query, 3, None, config, "paper", seed=2)

    start = keys(1e-12)
    moved = [float((keys(rate) - start).abs().mean()) for rate in (1e-3, 1e-2)]
    assert 8 < moved[1] / moved[0] < 12


def test_group_avg_averages_disjoint_parts():
    query = clustered_embeddings(0, 12)
    keys = learn_keys(query, 3, None, SLMConfig(), "group_avg")
    torch.testing.assert_close(keys.mean(0), query.mean(0))


def test_kmeans_with_repeated_points_keeps_all_keys_finite():
    config = SLMConfig(metric="grouped_cosine", num_groups=4)
    query = torch.ones(6, 24)
    query[0] *= -1
    keys = learn_keys(query, 4, GroupedCosine(config, 24), config, "kmeans")
    assert keys.isfinite().all()


def test_too_few_texts():
    with pytest.raises(ValueError, match="at least 4 texts, got 2"):
        learn_keys(torch.randn(2, 24), 4, None, SLMConfig(), "group_avg")
