import logging

import pytest
import torch
from conftest import clustered_embeddings, tiny_model

from slm_fast import SLMConfig
from slm_fast.reference import dense_offset
from slm_fast.starts import mean_weights

# Queries between two tasks, so that entries of both take part.
BETWEEN = (clustered_embeddings(0) + clustered_embeddings(1)) / 2


def filled_model(**config):
    """Every entry with factors of its own, A too."""
    model = tiny_model(num_tasks=3, temperature=50.0, **config)
    generator = torch.Generator().manual_seed(8)
    for factors in model.pool.factors:
        factors.A.copy_(torch.randn(factors.A.shape, generator=generator))
    return model


def offset(pool, factors, weights):
    """Delta W of weights [slots], dense."""
    slots = torch.arange(len(weights))
    return dense_offset(factors.A, factors.B, pool.start, pool.rank, pool.scaling, slots, weights)


def truncated(dense, rank):
    u, sigma, v = torch.linalg.svd(dense.double())
    return ((u[:, :rank] * sigma[:rank]) @ v[:rank]).float()


def equal_weights(pool, name):
    weights = torch.zeros(len(pool.start))
    weights[pool.task(name).slots] = 1 / len(pool.task(name).slots)
    return weights


@pytest.mark.parametrize(
    "scaling, rank", [(1.0, None), (0.5, 1), (-2.0, 3)], ids=["same", "lower", "negative"]
)
def test_equal_weights_give_the_best_approximation(scaling, rank):
    model = filled_model(scaling=scaling)
    pool, width = model.pool, 2 * (rank or 4)
    routing = model.route(embeddings=BETWEEN)
    mean = routing.dense(len(pool.start)).mean(0)
    torch.testing.assert_close(mean_weights(pool, BETWEEN), mean)
    before = [offset(pool, factors, mean) for factors in pool.factors]
    model.add_task("fresh", embeddings=BETWEEN, init="retrieved", rank=rank, progress=False)
    for factors, dense in zip(pool.factors, before, strict=True):
        best = truncated(dense, width)
        assert (best - dense).norm() > 1e-2 * dense.norm()  # some of it does not fit
        got = offset(pool, factors, equal_weights(pool, "fresh"))
        torch.testing.assert_close(got, best, rtol=1e-4, atol=1e-5 * float(best.abs().max()))

    ids = torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    got = model(input_ids=ids, adapter_names=["fresh"] * 2).logits
    base = model.unload()
    for name, dense in zip(pool.modules_shape, before, strict=True):
        base.get_submodule(name).weight.data += truncated(dense, width)
    torch.testing.assert_close(got, base(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_directions_are_dealt_out_and_balanced():
    model = filled_model()
    pool = model.pool
    model.add_task("fresh", embeddings=BETWEEN, init="retrieved", progress=False)
    first, second = (slice(int(pool.start[s]), int(pool.start[s]) + 4) for s in pool.task("fresh").slots)
    for factors in pool.factors:
        sizes = factors.A.norm(dim=1)
        torch.testing.assert_close(sizes[first], factors.B.norm(dim=1)[first], rtol=1e-4, atol=1e-6)
        order = torch.stack([sizes[first], sizes[second]], 1).flatten()
        assert torch.equal(order, order.sort(descending=True).values)


def test_rows_without_a_direction_can_still_learn():
    model, query = filled_model(), clustered_embeddings(0)
    pool = model.pool
    assert int((mean_weights(pool, query) > 0).sum()) == 2  # entries of rank 4 each: 8 directions for 16 rows
    model.add_task("fresh", embeddings=query, init="retrieved", rank=8, progress=False)
    begin = int(pool.start[pool.task("fresh").slots[0]])
    for factors in pool.factors:
        fresh = slice(begin, begin + 16)
        assert bool((factors.A[fresh].norm(dim=1) > 0).all())
        assert int((factors.B[fresh].norm(dim=1) == 0).sum()) == 8


def test_zero_start_is_what_it_was(caplog):
    caplog.set_level(logging.INFO, "slm_fast.starts")
    retrieved, zero = (tiny_model(num_tasks=0, fill=False, init=init) for init in ("retrieved", "zero"))
    for model in (retrieved, zero):
        model.add_task("first", embeddings=clustered_embeddings(0), progress=False)
    assert "task 'first' starts at zero" in caplog.text
    retrieved.pool.config.min_similarity = 1e9  # no row gets a mixture
    for model in (retrieved, zero):
        model.add_task("second", embeddings=clustered_embeddings(1), progress=False)
    assert "task 'second' starts at zero" in caplog.text
    for ours, theirs in zip(
        retrieved.pool.state_dict().values(), zero.pool.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert all(bool((factors.B == 0).all()) for factors in zero.pool.factors)


def test_refused_inits_change_nothing():
    model = tiny_model(num_tasks=1)
    with pytest.raises(ValueError, match="init must be one of zero, retrieved, got 'warm'"):
        model.add_task("fresh", embeddings=BETWEEN, init="warm")
    with pytest.raises(ValueError, match="init must be one of"):
        SLMConfig(init="warm")
    model.slm_config.scaling = 0.0
    with pytest.raises(ValueError, match="scaling other than 0"):
        model.add_task("fresh", embeddings=BETWEEN, init="retrieved")
    assert list(model.pool.tasks) == ["task0"]


def test_a_head_starts_from_those_with_its_labels():
    model = tiny_model("bert", num_tasks=0, temperature=50.0)
    for t, labels in enumerate((["x", "y"], ["x", "y"], ["y", "x"])):
        model.add_task(f"t{t}", embeddings=clustered_embeddings(t), labels=labels, progress=False)
    heads = [model.pool.head(f"t{t}") for t in range(3)]
    for t, head in enumerate(heads):
        head.bias.data.fill_(t + 1.0)
    weights = mean_weights(model.pool, BETWEEN)
    shares = [float(weights[model.pool.task(f"t{t}").slots].sum()) for t in range(2)]
    assert min(shares) > 0.1
    first, second = (share / sum(shares) for share in shares)
    options = dict(embeddings=BETWEEN, labels=["x", "y"], progress=False)
    model.add_task("new", **options, init="retrieved")
    new = model.pool.head("new")
    torch.testing.assert_close(new.weight, first * heads[0].weight + second * heads[1].weight)
    torch.testing.assert_close(new.bias, torch.full((2,), first + 2 * second))
    model.add_task("zero", **options, init="zero")
    assert not model.pool.head("zero").bias.any()
    model.add_task("others", embeddings=BETWEEN, labels=["a", "b"], init="retrieved", progress=False)
    assert not model.pool.head("others").bias.any()


def test_a_pool_that_grows_with_the_task():
    model = tiny_model("bert", num_tasks=4)
    pool = model.pool
    assert len(pool.start) == pool.num_entries  # the next task needs more slots
    model.add_task("new", embeddings=BETWEEN, init="retrieved", progress=False)
    assert len(pool.start) > 8 and pool.num_entries == 10
    rows = pool.rows_of(pool.task("new").slots)
    assert all(factors.B[rows].any() for factors in pool.factors)
