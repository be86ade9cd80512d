"""Near-duplicate tasks share the weights of their rows."""

import pytest
import torch
from conftest import clustered_embeddings, tiny_model

from slm_fast import SLMConfig
from slm_fast.answers import Prediction, head_logits
from slm_fast.task_statistics import Gaussian, TaskStatistics

XY = ["x", "y"]


def near(seed: int, count: int = 60) -> torch.Tensor:
    """Queries from the Gaussian of cluster 1, other ones for every seed."""
    centre = clustered_embeddings(1, 4000).mean(0)
    return centre + 0.5 * torch.randn(count, len(centre), generator=torch.Generator().manual_seed(seed))


def twin_model(*tasks, **config):
    """A BERT with tasks (name, queries, labels), random factors and heads."""
    settings = dict(num_tasks=0, weighting="task", temperature=6.0, entries_per_task=3, twin_share=0.25)
    model = tiny_model("bert", **(settings | config))
    generator = torch.Generator().manual_seed(3)
    for name, query, labels in tasks:
        model.add_task(name, embeddings=query, labels=labels, progress=False)
        if labels is not None:
            torch.nn.init.normal_(model.pool.head(name).weight, generator=generator)
    for factors in model.pool.factors:
        factors.B.copy_(0.1 * torch.randn(factors.B.shape, generator=generator))
    return model


def four_tasks(**config):
    others = ("far", clustered_embeddings(0, 60), XY), ("other", near(5), ["a", "b"])
    return twin_model(others[0], ("first", near(3), XY), others[1], ("second", near(4), XY), **config)


def masses(pool, routing):
    mass, names = pool.task_mass(routing)
    return [dict(zip(names, row, strict=True)) for row in mass.tolist()]


def test_mean_distance_is_the_mean_of_distances():
    generator = torch.Generator().manual_seed(0)
    V, total = torch.randn(3, 10, generator=generator), torch.full((10,), 12.0)
    gaussian = Gaussian.of(torch.randn(10, generator=generator), V, total)
    W, mean = torch.randn(2, 10, generator=generator), torch.randn(10, generator=generator)
    rest = torch.rand(10, generator=generator)
    noise = torch.randn(400_000, 10, generator=generator) * rest.sqrt()
    points = mean + torch.randn(400_000, 2, generator=generator) @ W + noise
    want = float(gaussian.distance(points).double().mean())
    assert gaussian.mean_distance(mean, W, rest) == pytest.approx(want, rel=0.01)


def test_a_task_holds_its_like_and_nothing_farther_away():
    own, like = TaskStatistics.of(near(0), 512), TaskStatistics.of(near(1), 512)
    wide = TaskStatistics.of(near(2).mean(0) + 6 * (near(2) - near(2).mean(0)), 512)
    far = TaskStatistics.of(clustered_embeddings(0, 60), 512)
    assert own.holds(like, 0.99) and like.holds(own, 0.99)
    assert wide.holds(own, 0.99) and not own.holds(wide, 0.99)
    assert not own.holds(far, 0.99) and not far.holds(own, 0.99)
    assert not TaskStatistics.of(torch.ones(1, 24), 4).holds(own, 0.99)  # one text has no distances


def test_twins_have_the_labels_and_could_hold_each_others_texts():
    pool = four_tasks().pool
    assert pool.twins("first") == ["second"] and pool.twins("second") == ["first"]
    assert pool.twins("far") == pool.twins("other") == []
    assert pool.near_duplicates("other") == ["first", "second"]  # whatever their labels
    assert pool.near_duplicates("first") == ["other", "second"] and pool.near_duplicates("far") == []
    pool.remove_task("first")
    assert pool.twins("second") == []
    pool.add_task("third", near(6)[:3], labels=XY, hidden_size=32, queries=near(6))
    assert pool.twins("second") == ["third"]


def test_order_does_not_matter():
    tasks = ("first", near(3), XY), ("second", near(4), XY), ("third", near(6), XY)
    there, back = twin_model(*tasks).pool, twin_model(*reversed(tasks)).pool
    for name in ("first", "second", "third"):
        assert there.twins(name) == back.twins(name) != []


def test_the_best_task_hands_on_its_share():
    model, plain = four_tasks(), four_tasks(twin_share=0.0)
    query = torch.cat([near(7, 8), clustered_embeddings(0, 60)[:4]])
    routing, without = model.pool.search(query), plain.pool.search(query)
    assert model.pool.num_entries == plain.pool.num_entries
    for row, (mass, before) in enumerate(
        zip(masses(model.pool, routing), masses(plain.pool, without), strict=True)
    ):
        best = model.pool.task_of_slot(int(without.indices[row, 0]))
        assert mass["far"] == pytest.approx(before["far"]) and mass["other"] == pytest.approx(before["other"])
        if best in ("first", "second"):
            twin = "second" if best == "first" else "first"
            both = before["first"] + before["second"]
            assert mass[best] == pytest.approx(0.75 * both, abs=1e-6)
            assert mass[twin] == pytest.approx(0.25 * both, abs=1e-6)
            for name in (best, twin):  # among the entries of a task: those that it picks when it is told
                slots = model.pool.task(name).slots
                picked = {
                    int(i): float(w / mass[name])
                    for i, w in zip(routing.indices[row], routing.weights[row], strict=True)
                    if int(i) in slots and w > 0
                }
                told = plain.pool.search(query[row : row + 1], name)
                want = dict(zip(told.indices[0].tolist(), told.weights[0].tolist(), strict=True))
                assert picked == pytest.approx(want)
        else:
            width = without.indices.shape[1]
            assert torch.equal(routing.weights[row, :width], without.weights[row])
            assert torch.equal(routing.indices[row, :width], without.indices[row])
            assert not routing.weights[row, width:].any()
    bests = {plain.pool.task_of_slot(int(i)) for i in without.indices[:, 0]}
    assert "far" in bests and bests & {"first", "second"}


def test_three_twins_share_in_equal_parts():
    names = ("first", "second", "third")
    pool = twin_model(*((name, near(n), XY) for n, name in enumerate(names, 3)), top_k=3).pool
    query = near(8, 5)
    for row, mass in enumerate(masses(pool, pool.search(query))):
        best = pool.task_of_slot(int(pool.search(query).indices[row, 0]))
        assert mass == pytest.approx({n: 0.75 if n == best else 0.125 for n in names}, abs=1e-6)


def test_a_twin_of_fewer_texts_gets_less():
    pool = twin_model(("first", near(3), XY), ("few", near(4, 20), XY)).pool
    query = torch.cat([near(n, 60) for n in (3, 4)])
    routing = pool.search(query)
    found = {"first": 0, "few": 0}
    for row, mass in enumerate(masses(pool, routing)):
        best = pool.task_of_slot(int(routing.indices[row, 0]))
        own = 1 - 0.25 * 20 / 60 if best == "first" else 0.75
        assert mass[best] == pytest.approx(own, abs=1e-6)
        found[best] += 1
    assert min(found.values()) > 0


def test_rows_whose_task_is_told_keep_to_it():
    pool = four_tasks().pool
    query = near(7, 3)
    assert all(mass["first"] == pytest.approx(1) for mass in masses(pool, pool.search(query, "first")))
    mixed = masses(pool, pool.search(query, ["second", None, "second"]))
    assert mixed[0]["second"] == mixed[2]["second"] == pytest.approx(1)
    assert min(mixed[1]["first"], mixed[1]["second"]) > 0.1 and mixed[0]["first"] == 0


def test_rows_of_the_frozen_model_stay_there():
    pool = four_tasks(min_similarity="auto", taper=None).pool
    routing = pool.search(torch.cat([near(7, 2), near(7, 2) + 50]))
    assert routing.weights[:2].sum(1).tolist() == pytest.approx([1, 1]) and not routing.weights[2:].any()


def test_what_a_row_has_left_of_its_weight_is_shared():
    query = near(7, 40)
    whole = four_tasks(min_similarity="auto", taper=None).pool
    tapered = four_tasks(min_similarity="auto", taper=0.0).pool
    before, after = (masses(pool, pool.search(query)) for pool in (whole, tapered))
    left = [sum(mass.values()) for mass in after]
    assert any(0.01 < share < 0.99 for share in left)
    for full, less, share in zip(before, after, left, strict=True):
        if sum(full.values()):
            assert less == pytest.approx({name: share * mass for name, mass in full.items()}, abs=1e-6)


def test_the_mixture_and_the_heads_follow_the_shares():
    model = four_tasks()
    model.remove_task("other")
    pool, query = model.pool, near(7, 4)
    routing = pool.search(query)
    ids = torch.randint(1, 96, (4, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with model.state.use(routing):
            together = model.features(ids)
        for row in range(4):
            with model.state.use(routing.rows([row])):
                assert torch.equal(model.features(ids[row : row + 1])[0], together[row])
        mass = masses(pool, routing)[0]
        best = max(mass, key=mass.get)
        assert sorted(mass.values()) == pytest.approx([0, 0.25, 0.75], abs=1e-6)
        got = head_logits(pool, together[0], Prediction("", None, best, mass))
        alike = {n: m for n, m in mass.items() if pool.task(n).labels == XY and m > 0}
        want = sum(m * pool.head(n)(together[0]) for n, m in alike.items()) / sum(alike.values())
        torch.testing.assert_close(got, want)
        alone = head_logits(pool, together[0], Prediction("", None, "first", {"first": 1.0, "second": 0.0}))
        assert torch.equal(alone, pool.head("first")(together[0]))


def test_heads_whose_labels_stand_in_another_order():
    model = twin_model(("first", near(3), XY), ("second", near(4), ["y", "x"]))
    pool, features = model.pool, torch.randn(32, generator=torch.Generator().manual_seed(0))
    assert pool.twins("first") == ["second"]
    got = head_logits(pool, features, Prediction("", None, "first", {"first": 0.75, "second": 0.25}))
    first, second = pool.head("first")(features), pool.head("second")(features)
    torch.testing.assert_close(got, 0.75 * first + 0.25 * second.flip(0))


@pytest.mark.parametrize(
    "config",
    [
        dict(twin_share=1.0),
        dict(twin_share=-0.1),
        dict(twin_share=0.3, mixing="batch"),
        dict(twin_share=0.3, metric="grouped_cosine"),
    ],
)
def test_config_errors(config):
    with pytest.raises(ValueError, match="twin_share"):
        SLMConfig(**config)
