import copy
import hashlib
import json
import pickle

import numpy
import pytest
import torch
from conftest import DIM, clustered_embeddings, tiny_base, tiny_model
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from slm_fast import KnowledgePool, SLMConfig, SLMModel
from slm_fast.fitted_temperature import held_out_losses
from slm_fast.keys import TEMPERATURES, Whitened
from slm_fast.task_statistics import TaskStatistics, common_labels, label_means

LABELS = 12
LINEARS = {"a": (8, 6)}


def intents(task: int, part: int = 0, count: int = 12) -> tuple[Tensor, list[str]]:
    """Queries of a task, and their labels: around centres of their own, which tasks have among each other's.
    Their means say little about whose they are."""
    generator = torch.Generator().manual_seed(task)
    centres = 3 * torch.randn(LABELS, DIM, generator=generator)
    centres -= centres.mean(0) * 0.98
    generator.manual_seed(1000 * part + task)
    noise = 0.5 * torch.randn(LABELS * count, DIM, generator=generator)
    return centres.repeat(count, 1) + noise, [f"l{n}" for n in range(LABELS)] * count


def labelled_pool(num_tasks: int = 4, with_answers=True, **config) -> KnowledgePool:
    pool = KnowledgePool(SLMConfig(**(dict(r=2, top_k=2) | config)), LINEARS)
    for t in range(num_tasks):
        query, answers = intents(t)
        keys = pool.learn_keys(query, "group_avg")
        pool.add_task(f"t{t}", keys, queries=query, answers=answers if with_answers else None)
    return pool


def accuracy(pool: KnowledgePool) -> float:
    """Share of new texts that find their task."""
    right = []
    for t, name in enumerate(pool.task_names()):
        mass, names = pool.task_mass(pool.search(intents(t, part=1)[0]))
        right.append((mass.argmax(1) == names.index(name)).float().mean())
    return float(torch.stack(right).mean())


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_tasks_with_labels_among_each_others_are_told_apart():
    assert accuracy(labelled_pool()) > 0.97
    assert accuracy(labelled_pool(label_keys=False)) < 0.8
    assert accuracy(labelled_pool(with_answers=False)) == accuracy(labelled_pool(label_keys=False))


def by_hand(pool: KnowledgePool, query: Tensor) -> list[dict[int, float]]:
    """{slot: weight} of every row, from the raw keys and the labels' means, in float64."""
    metric, scores = pool.metric, []
    cov, ridge = metric.covariance()
    inverse = torch.linalg.inv(cov.double() + ridge * torch.eye(DIM, dtype=torch.float64))

    def score(points: Tensor) -> Tensor:
        off = points.double() - metric.mean
        centred = query.double() - metric.mean
        return centred @ inverse @ off.T - 0.5 * (off @ inverse * off).sum(1)

    for name in pool.task_names():
        known = metric.tasks[f"task:{name}"]
        own = score(pool.keys[pool.task(name).slots])
        if len(known.label_scale):
            label = 0.5 * (score(known.means_of_labels()) + score(known.mean[None]))
            scores.append((label, own))
        else:
            scores.append((own, own))
    rows = []
    for b in range(len(query)):
        keys = [(float(s), t) for t, (searched, _) in enumerate(scores) for s in searched[b]]
        found = sorted(keys, reverse=True)[: pool.config.top_k]
        best = {t: max(s for s, u in found if u == t) for _, t in found}
        picks = []
        for t, top in best.items():
            own = scores[t][1][b]
            slots = pool.task(pool.task_names()[t]).slots
            picks += [(top + float(s - own.max()), slot, t) for s, slot in zip(own, slots, strict=True)]
        picks = sorted(picks, reverse=True)[: pool.config.top_k]
        share = {t: torch.tensor(best[t] / pool.temperature()).exp() for _, _, t in picks}
        number = {t: sum(u == t for _, _, u in picks) for t in share}
        total = sum(share.values())
        rows.append({slot: float(share[t] / total / number[t]) for _, slot, t in picks})
    return rows


@pytest.mark.parametrize("top_k", [1, 2, 4, 7])
def test_picks_and_weights_by_hand(top_k):
    """A task without labels among others, and rows between tasks, which pick entries of several."""
    pool = labelled_pool(3, top_k=top_k, temperature=40.0)
    pool.add_task("plain", clustered_embeddings(5)[:4], queries=clustered_embeddings(5))
    parts = [intents(t, part=1, count=2)[0] for t in range(3)] + [clustered_embeddings(5, 6)]
    query = torch.cat([*parts, (parts[0] + parts[1]) / 2, (parts[2][:6] + parts[3]) / 2])
    routing = pool.search(query)
    several = 0
    for b, want in enumerate(by_hand(pool, query)):
        kept = routing.scores[b] > -torch.inf
        slots, weights = routing.indices[b][kept].tolist(), routing.weights[b][kept].tolist()
        assert set(slots) == set(want)
        assert weights == pytest.approx([want[slot] for slot in slots], rel=1e-3)
        several += len({int(pool.slot_task[slot]) for slot in slots}) > 1
    assert bool(several) == (top_k > 1)
    finite = routing.scores.clamp(min=-1e9)
    assert (finite.diff(dim=1) <= 0).all() and not routing.scores.isnan().any()


def test_a_row_that_finds_its_task_is_routed_as_when_told():
    pool = labelled_pool()
    query = torch.cat([intents(t, part=1)[0] for t in range(4)])
    free = pool.search(query)
    found = (free.indices[:, 0] // 4).tolist()
    told = pool.search(query, [f"t{t}" for t in found])
    single = (free.indices // 4 == free.indices[:, :1] // 4).all(1)
    assert single.float().mean() > 0.9
    assert same(free.rows(single), told.rows(single))
    among = pool.search_among(query[:40], "t1")
    assert torch.equal(among.indices, pool.search(query[:40], "t1").indices)
    mixed = pool.search(query[:30], [None, "t3", "t1"] * 10)
    assert torch.equal(mixed.indices[::3], free.indices[:30:3])
    assert same(mixed.rows(slice(1, None, 3)), pool.search(query[1:30:3], "t3"))
    for b in (0, 50, 500):
        assert same(pool.search(query[b : b + 1]), free.rows(slice(b, b + 1)))
    assert pool.search(query[:0]).num_rows == 0
    assert pool.search(query[:3], "t2").indices.min() >= 8  # told, nothing else is looked at


def test_floors_and_faiss_go_with_them():
    query = torch.cat([intents(t, part=1, count=4)[0] for t in range(4)])
    plain = labelled_pool().search(query)
    scores = plain.scores[:, 0]
    floor = float(scores.median())
    pool = labelled_pool(min_similarity=floor)
    assert torch.equal(pool.search(query).weights.sum(1) > 0, scores >= floor)
    found = [pool.task_of_slot(int(slot)).split(".")[0] for slot in plain.indices[:, 0]]
    assert torch.equal(pool.search(query, found).weights.sum(1) > 0, scores >= floor)  # told, or not
    auto = labelled_pool(min_similarity="auto", taper=None, coverage=0.5).search(query)
    kept = auto.weights.sum(1) > 0
    assert 0.2 < kept.float().mean() < 0.8 and torch.equal(auto.weights[kept], plain.weights[kept])
    pytest.importorskip("faiss")
    by_faiss = labelled_pool(faiss_above=4).search(query)
    assert torch.equal(by_faiss.indices, plain.indices)
    torch.testing.assert_close(by_faiss.weights, plain.weights)


def test_near_duplicates_share_rows_that_a_label_has_found():
    options = dict(twin_share=0.4, coverage=1.0)
    query, answers = intents(0)
    for top_k in (1, 2, 4):
        pool = KnowledgePool(SLMConfig(r=2, top_k=top_k, **options), LINEARS)
        names = sorted(set(answers))
        for name, off in (("one", 0.0), ("two", 0.05)):
            own = query + off
            keys = pool.learn_keys(own, "group_avg")
            own = dict(labels=names, hidden_size=4, queries=own, answers=answers)
            pool.add_task(name, keys, **own)
        routing = pool.search(intents(0, part=1, count=2)[0])
        mass, _ = pool.task_mass(routing)
        torch.testing.assert_close(mass.sum(1), torch.ones(len(mass)))
        assert pool.num_label_keys == 2 * LABELS and float(mass.amin()) > 0.2
        for row, weights in zip(routing.indices, routing.weights, strict=True):
            used = row[weights != 0].tolist()
            assert len(set(used)) == len(used)


@pytest.mark.parametrize(
    "config",
    [
        dict(label_keys=False),
        dict(mixing="batch"),
        dict(weighting="softmax"),
        dict(metric="grouped_cosine"),
        dict(metric="grouped_cosine", weighting="similarity"),
    ],
)
def test_where_rows_do_not_go_to_tasks_first_there_are_none(config):
    query = torch.cat([intents(t, part=1, count=2)[0] for t in range(4)])
    pool, without = labelled_pool(**config), labelled_pool(with_answers=False, **config)
    assert pool.num_label_keys == 0 and len(pool.index_keys) == 16
    assert same(pool.search(query), without.search(query))


def test_adding_and_removing_tasks():
    query = torch.cat([intents(t, part=1, count=3)[0] for t in range(4)])
    pool, want = labelled_pool(3), labelled_pool(2)
    pool.remove_task("t2")
    assert torch.equal(pool.search(query).scores, want.search(query).scores)
    assert pool.num_label_keys == 2 * LABELS and len(pool.index_keys) == 12 + 2 * LABELS
    again, answers = intents(2)
    pool.add_task("t2", pool.learn_keys(again, "group_avg"), queries=again, answers=answers)
    three, got = labelled_pool(3).search(query), pool.search(query)  # its slots are given out anew
    assert torch.equal(three.scores, got.scores) and torch.equal(three.indices // 4, got.indices // 4)
    bare = 50 + torch.zeros(100, DIM)  # neither statistics nor labels, more entries than there are label keys
    pool.add_task("bare", bare)
    assert pool.task_of_slot(int(pool.search(bare[:1]).indices[0, 0])) == "bare"
    assert torch.equal(pool.search(query).scores, got.scores) and torch.equal(
        pool.search(query).indices, got.indices
    )
    pool.add_task("near", query[:5])
    taken = pool.search(query[:5])
    assert {pool.task_of_slot(int(slot)) for slot in taken.indices[:, 0]} == {"near"}
    again = copy.deepcopy(pool)
    again.refresh_index()
    assert same(again.search(query), pool.search(query))
    pool.remove_task("near")
    assert torch.equal(pool.search(query).indices, got.indices)  # freed slots are not picked
    pool.remove_task("bare")
    assert torch.equal(pool.search(query).indices, got.indices)
    pool.remove_task("t0")
    pool.remove_task("t1")
    pool.remove_task("t2")
    with pytest.raises(ValueError, match="no entries"):
        pool.search(query)


def test_copies_and_taken_tasks_keep_them():
    query = torch.cat([intents(t, part=1, count=3)[0] for t in range(4)])
    pool = labelled_pool()
    want = pool.search(query)
    assert same(copy.deepcopy(pool).search(query), want)
    assert same(pickle.loads(pickle.dumps(pool)).search(query), want)
    assert same(pool.only(["t0", "t1", "t2", "t3"]).search(query), want)
    assert pool.only(["t3", "t1"]).num_label_keys == 2 * LABELS
    apart = labelled_pool(1)
    for t in (1, 2, 3):
        apart.take_task(pool, f"t{t}")
    assert same(apart.search(query), want)
    assert same(pool.to(torch.bfloat16).search(query), want)


def test_a_state_dict_brings_its_labels():
    """Into a pool with as many entries, whose tasks were added without answers or have others."""
    query = torch.cat([intents(t, part=1, count=3)[0] for t in range(4)])
    pool = labelled_pool()
    want = pool.search(query)
    without, others = labelled_pool(with_answers=False), labelled_pool()
    others.metric.tasks["task:t0"].label_offsets.zero_()
    for other in (without, others):
        other.refresh_index()
        assert not torch.equal(other.search(query).scores, want.scores)
        other.load_state_dict(pool.state_dict())
        assert same(other.search(query), want) and other.num_label_keys == 4 * LABELS


def test_settings_may_change_later():
    query = torch.cat([intents(t, part=1, count=3)[0] for t in range(4)])
    pool = labelled_pool()
    for change in (dict(label_keys=False), dict(weighting="softmax"), dict(mixing="batch"), {}):
        pool.config = SLMConfig(r=2, top_k=2, temperature=5.0, **change)
        assert same(pool.search(query), labelled_pool(temperature=5.0, **change).search(query))


def test_many_tasks_are_indexed_once(monkeypatch):
    pool, solved = labelled_pool(), []
    index = Whitened.index
    monkeypatch.setattr(Whitened, "index", lambda self, keys: solved.append(len(keys)) or index(self, keys))
    pool.only(["t0", "t1", "t2", "t3"])
    assert sum(solved) == 16 + 4 * LABELS + 4


def test_a_saved_pool_and_one_of_format_5(tmp_path):
    model = tiny_model("bert", 0, weighting="task", temperature=None)
    for t in range(3):
        query, answers = intents(t)
        names = sorted(set(answers))
        model.add_task(f"t{t}", embeddings=query, answers=answers, labels=names, progress=False)
    query = torch.cat([intents(t, part=1, count=3)[0] for t in range(3)])
    want = model.route(embeddings=query)
    model.save_pretrained(tmp_path)
    loaded = SLMModel.from_pretrained(tiny_base("bert"), tmp_path)
    assert same(loaded.route(embeddings=query), want)
    stored = load_file(tmp_path / "slm_keys.safetensors")
    data = save_tensors({name: t for name, t in stored.items() if ".label_" not in name})
    (tmp_path / "slm_keys.safetensors").write_bytes(data)
    index = json.loads((tmp_path / "slm_config.json").read_text()) | {"format": 5}
    assert "label_keys" not in index["config"]
    index["files"]["slm_keys.safetensors"] = hashlib.sha256(data).hexdigest()
    (tmp_path / "slm_config.json").write_text(json.dumps(index))
    old = SLMModel.from_pretrained(tiny_base("bert"), tmp_path).pool
    model.slm_config.label_keys = False
    model.pool.refresh_index()
    assert old.num_label_keys == 0 and same(old.search(query), model.route(embeddings=query))


def test_means_of_labels():
    query = torch.arange(36.0).reshape(12, 3)
    answers = ["b", "a"] * 4 + ["a"] * 4
    assert common_labels(answers) == ["a", "b"]
    want = torch.stack([query[[1, 3, 5, 7, 8, 9, 10, 11]].mean(0), query[[0, 2, 4, 6]].mean(0)])
    torch.testing.assert_close(label_means(query, answers, ["a", "b"]), want)
    for none in (None, [], ["a"] * 8, ["a"] * 8 + ["b"] * 3, list("abcdefgh"), [*"aaaabbbb", *"cdefghijk"]):
        assert common_labels(none) == []
    assert label_means(query, answers, []).shape == (0, 3)
    many, names = intents(0)
    kept, exact = TaskStatistics.of(many, 8, names), label_means(many, names, common_labels(names))
    assert kept.label_offsets.dtype is torch.int8
    off = (kept.means_of_labels() - exact).abs().amax(1)
    assert (off <= 0.51 * kept.label_scale).all() and off.max() > 0
    assert TaskStatistics.of(many, 8).means_of_labels().shape == (0, DIM)


def test_no_single_text_is_kept():
    """Labels of few texts have no mean of their own: the task's stands for them."""
    query, answers = intents(0)
    rare = ["rare"] * 3 + ["once"] + answers[4:]
    kept = TaskStatistics.of(query, 8, rare).means_of_labels()
    assert len(kept) == LABELS + 1
    torch.testing.assert_close(kept[-1], query.mean(0))
    means = label_means(query, rare, common_labels(rare))
    torch.testing.assert_close(means[0], query[[n for n, a in enumerate(rare) if a == "l0"]].mean(0))
    gone = label_means(query, answers, ["l0", "l1", "nobody's"])  # of part of the texts
    torch.testing.assert_close(gone[2:], query.mean(0).expand(2, -1))


def test_a_label_key_scores_half_its_label_and_half_its_task():
    query, answers = intents(0)
    metric = Whitened(SLMConfig(), DIM)
    metric.update("x", query, answers)
    labels, mean = label_means(query, answers, common_labels(answers)), query.mean(0, keepdim=True)
    c, beta = metric.index_labels(labels, mean, torch.zeros(LABELS, dtype=torch.int64))
    of_label, of_task = ((query @ c.T + beta) for c, beta in (metric.index(labels), metric.index(mean)))
    torch.testing.assert_close(query @ c.T + beta, (of_label + of_task) / 2)


def test_wrong_answers_change_nothing():
    query, answers = intents(0)
    for config in ({}, dict(label_keys=False)):
        model = tiny_model("bert", 1, **config)
        for wrong in (answers[1:], [], "x", "x" * len(query), [1] * len(query), [None, *answers[1:]]):
            with pytest.raises(ValueError, match=f"answers must be {len(query)} strings"):
                model.add_task("new", embeddings=query, answers=wrong, progress=False)
        with pytest.raises(ValueError, match="answers must be 0 strings"):
            model.pool.add_task("new", query[:4], answers=answers)
        assert model.pool.task_names() == ["task0"] and len(model.pool.metric.tasks) == 1
    model.add_task("new", embeddings=query, answers=numpy.array(answers), progress=False)
    with pytest.raises(ValueError, match="label_keys must be True or False"):
        SLMConfig(label_keys="yes")


def test_a_temperature_is_fitted_to_what_is_searched():
    """Held-out texts by hand: searched in a pool that knows the rest of the new task."""
    pool = labelled_pool(2, temperature="auto")
    query, answers = intents(2)
    losses = held_out_losses(pool, query, answers)
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(0))
    part = len(query) // 5
    rest = order[part:]
    whole = labelled_pool(2, top_k=1)
    of_rest = [answers[n] for n in rest.tolist()]
    keys = whole.learn_keys(query[rest], "group_avg")
    whole.add_task("new", keys, queries=query[rest], answers=of_rest)
    scores = whole.metric.transform(query[order[:part]]) @ whole.index_keys.T + whole.index_bias
    best = [scores[:, whole.searched & (whole.index_task == t)].amax(1) for t in range(3)]
    curves = [-(torch.stack(best, 1) / t).log_softmax(1)[:, 2].mean() for t in TEMPERATURES]
    torch.testing.assert_close(losses, torch.stack(curves), rtol=1e-2, atol=1e-3)
    assert not torch.allclose(losses, held_out_losses(pool, query), rtol=1e-2)
    few, names = query[: 4 * LABELS], answers[: 4 * LABELS]  # 4 texts a label: held-out ones are missing
    assert not torch.equal(held_out_losses(pool, few, names), held_out_losses(pool, few))
    keys, apart = pool.learn_keys(query, "group_avg"), labelled_pool(2, temperature="auto")
    pool.add_task("t2", keys, queries=query, answers=answers)
    assert torch.equal(pool.metric.tasks["task:t2"].losses, losses)
    apart.take_task(pool, "t2", query, answers)
    assert torch.equal(apart.metric.tasks["task:t2"].losses, losses)
