import contextlib
import copy
import pickle
import random
import threading

import pytest
import torch
from conftest import clustered_embeddings, tiny_model

from slm_fast import KnowledgePool, Routing, SLMConfig, SLMModel, dispatch, ops, patch_model
from slm_fast.layers import default_pool
from slm_fast.resident import ResidentPool

MODULES = {"a": (8, 6), "b": (5, 7)}
ROW_BYTES = 4 * (8 + 6 + 5 + 7)


def make_pool(num_tasks=6, ranks=(3, 2), fill=True, **config) -> KnowledgePool:
    """Tasks t0, t1, ... of two entries each: entry 2t and 2t + 1."""
    settings = dict(r=max(ranks), metric="grouped_cosine", num_groups=1)
    pool = KnowledgePool(SLMConfig(**(settings | config)), MODULES)
    for t in range(num_tasks):
        pool.add_task(f"t{t}", clustered_embeddings(t)[:2], rank=list(ranks), scaling=1 + t / 10)
    if fill:
        for factors in pool.factors:
            torch.nn.init.normal_(factors.B)
    return pool


def picking(*rows, pool=None) -> Routing:
    """Each row's entries in equal parts."""
    width = max(map(len, rows))
    indices = torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])
    return Routing.make(indices, (indices >= 0) / width, pool_version=pool.version if pool else 0)


def run(pool, routing, seed=0) -> list[torch.Tensor]:
    """The mixtures of all linears for three tokens a row, read from `pool` as a layer does."""
    generator, out = torch.Generator().manual_seed(seed), []
    indices, weights = torch.where(routing.weights != 0, routing.indices, 0), routing.weights
    for factors, (num_in, num_out) in zip(pool.factors, MODULES.values(), strict=True):
        x = torch.randn(3 * routing.num_rows, num_in, generator=generator)
        tables = (factors.A, factors.B, pool.start, pool.rank, pool.scaling)
        y = x.new_zeros(len(x), num_out)
        out.append(ops.mixture(y, x, *tables, indices, weights, max_rank=pool.max_rank))
    return out


def check(resident: ResidentPool, *rows) -> None:
    """The lease's mixtures are exactly those of the pool."""
    routing = picking(*rows)
    with resident.acquire(routing) as lease:
        assert torch.equal(lease.routing.weights, routing.weights)
        assert not lease.routing.indices[routing.weights == 0].any()
        for got, want in zip(run(lease.pool, lease.routing), run(resident.pool, routing), strict=True):
            assert torch.equal(got, want) and (want.any() or not routing.weights.any())


def kept(resident: ResidentPool) -> set[int]:
    """The entries in slots; asking changes nothing."""
    return {key[0] for key in resident._key if key is not None}


def counts(resident: ResidentPool) -> tuple[int, ...]:
    return tuple(resident.stats()[name] for name in ("hits", "misses", "evictions", "overflows"))


def test_hits_misses_evictions_and_overflow_give_the_pools_mixtures():
    resident = ResidentPool(make_pool(), 4)
    check(resident, [0, 1], [3])
    assert counts(resident) == (0, 3, 0, 0)
    assert resident.bytes_copied == (3 + 2 + 2) * ROW_BYTES
    check(resident, [3, 0], [0, 4])
    assert counts(resident) == (2, 4, 0, 0) and kept(resident) == {0, 1, 3, 4}
    check(resident, [5, 6, 7], [8])
    assert counts(resident) == (2, 8, 4, 0) and kept(resident) == {5, 6, 7, 8}
    before = resident.bytes_copied
    check(resident, [0, 1, 2], [3, 5, 5])
    assert counts(resident) == (2, 8, 4, 1) and kept(resident) == {5, 6, 7, 8}
    assert resident.bytes_copied == before + (3 + 2 + 3 + 2) * ROW_BYTES  # entry 5 has a slot
    check(resident, [], [5])
    check(resident, [])
    assert counts(resident) == (3, 8, 4, 1)


def test_a_fused_linear_reads_the_slots():
    pool = make_pool()
    resident, routing = ResidentPool(pool, 3), picking([1, 5], [2, 1], [], pool=pool)
    with resident.acquire(picking([0, 2, 4])):  # of rank 3, 1 and 5 of rank 2
        pass
    x, weight = torch.randn(3, 8), torch.randn(6, 8)
    with resident.acquire(routing) as lease:
        out = [
            ops.fused_linear(
                x,
                weight,
                None,
                p.factors[0].A[: p.num_rows],
                p.factors[0].B[: p.num_rows],
                p.row_entry[: p.num_rows],
                p.scaling,
                r.dense(len(p.scaling)),
                backend="reference",
            )
            for p, r in ((pool, routing), (lease.pool, lease.routing))
        ]
    torch.testing.assert_close(*out, rtol=0, atol=1e-5)
    assert not torch.equal(out[0], x @ weight.T)


def test_the_least_recently_used_entry_goes_first():
    resident = ResidentPool(make_pool(), 3)
    for entry in (0, 1, 2, 0):
        check(resident, [entry])
    check(resident, [3])
    assert kept(resident) == {0, 2, 3}
    check(resident, [2])
    check(resident, [4])
    assert kept(resident) == {2, 3, 4}


def test_held_entries_stay_until_their_last_lease_ends():
    resident = ResidentPool(make_pool(), 2)
    first, second = resident.acquire(picking([0])), resident.acquire(picking([0, 1]))
    want = run(resident.pool, picking([0]))
    overflow = resident.acquire(picking([2]))
    assert overflow.pool is not first.pool and kept(resident) == {0, 1}
    second.release()
    second.release()  # does nothing
    check(resident, [2])
    check(resident, [3])
    assert kept(resident) == {0, 3} and resident.overflows == 1
    for got, expected in zip(run(first.pool, first.routing), want, strict=True):
        assert torch.equal(got, expected)
    first.release()
    check(resident, [4, 5])
    assert kept(resident) == {4, 5} and resident.overflows == 1
    for got, expected in zip(
        run(overflow.pool, overflow.routing), run(resident.pool, picking([2])), strict=True
    ):
        assert torch.equal(got, expected)


def test_a_lease_is_released_after_an_error():
    resident = ResidentPool(make_pool(), 1)
    with pytest.raises(KeyError), resident.acquire(picking([0])):
        raise KeyError
    check(resident, [1])
    assert resident.overflows == 0


def test_a_copy_that_fails_leaves_the_slots_usable(monkeypatch):
    resident = ResidentPool(make_pool(), 2)
    check(resident, [0, 1])
    with monkeypatch.context() as patch:
        patch.setattr(resident.slabs, "load", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resident.acquire(picking([1, 2]))
    assert kept(resident) == {1}
    check(resident, [0, 1])
    check(resident, [2, 3])
    assert resident.overflows == 0


@pytest.mark.parametrize("change", ["train", "copy", "remove", "load", "write"])
def test_stale_factors_are_never_served(change):
    pool = make_pool()
    resident = ResidentPool(pool, 4)
    check(resident, [0, 4])
    lease = resident.acquire(picking([0]))
    held = run(lease.pool, lease.routing)
    if change == "train":
        pool.own("t0")
        with pytest.raises(ValueError, match="'t0' is being trained"):
            resident.acquire(picking([0]))
        with torch.no_grad():
            for factors in pool.factors:
                factors.B_owned += 1
        pool.disown()
    elif change == "copy":
        pool.copy_entries("t1", "t0")
    elif change == "remove":
        pool.remove_task("t0")
        with pytest.raises(ValueError, match="entry 0, which is not in the pool"):
            resident.acquire(picking([4, 0]))
        pool.add_task("again", clustered_embeddings(0)[:2], rank=[2, 3])
        assert sorted(pool.task("again").slots) == [0, 1]
        for factors in pool.factors:
            factors.B[pool.start[0] : pool.start[0] + pool.rank[0]] = 2
    elif change == "load":
        pool.load_state_dict(
            {name: t * 2 if "factors" in name else t for name, t in pool.state_dict().items()}
        )
    else:
        for factors in pool.factors:
            factors.B.mul_(2)
        resident.forget()
    for got, want in zip(run(lease.pool, lease.routing), held, strict=True):
        assert torch.equal(got, want)  # a running request keeps what it began with
    check(resident, [0, 4])
    lease.release()
    before = resident.misses
    check(resident, [0, 4])
    assert resident.misses == before


def test_only_the_trained_task_is_copied_again():
    pool = make_pool()
    resident = ResidentPool(pool, 4)
    check(resident, [0, 4])
    pool.own("t2")
    pool.disown()
    check(resident, [0, 4])
    assert counts(resident)[:2] == (1, 3)


def test_entries_of_a_larger_rank_make_new_slots():
    pool = make_pool()
    resident = ResidentPool(pool, memory=6 * 3 * ROW_BYTES + 1)
    assert resident.num_slots == 6
    lease = resident.acquire(picking([0, 1]))
    want = run(lease.pool, lease.routing)
    pool.add_task("wide", clustered_embeddings(9)[:1], rank=7)
    check(resident, [12, 0])
    assert resident.num_slots == 2 and resident.slabs.max_rank == 7
    for got, expected in zip(run(lease.pool, lease.routing), want, strict=True):
        assert torch.equal(got, expected)
    lease.release()  # of the old slots: the new ones are not touched
    assert resident._held == [0, 0]
    check(resident, [12, 3])


def test_the_factors_dtype_is_followed():
    pool = make_pool()
    resident = ResidentPool(pool, 2)
    check(resident, [0, 1])
    pool.to(torch.bfloat16)
    check(resident, [0, 1])
    assert resident.slabs.factors[0].A.dtype == torch.bfloat16 and pool.keys.dtype == torch.float32


def test_ten_thousand_entries_and_one_more():
    pool = make_pool(0, ranks=(2,))
    pool.add_task("many", torch.randn(10_000, 24), rank=2)
    for factors in pool.factors:
        torch.nn.init.normal_(factors.B)
    resident = ResidentPool(pool, 16)
    rng = random.Random(0)
    for _ in range(20):
        check(resident, *[[rng.randrange(10_000) for _ in range(2)] for _ in range(8)])
    assert resident.overflows == 0 and resident.evictions > 200
    slabs = resident.slabs
    pointers = [t.data_ptr() for f in slabs.factors for t in (f.A, f.B)]
    before = resident.stats()
    pool.add_task("one", torch.randn(1, 24), rank=2)  # the pool's own tables grow
    for factors in pool.factors:
        torch.nn.init.normal_(factors.B[20_000:20_002])
    assert resident.stats() == before and resident.slabs is slabs
    check(resident, [10_000, 7])
    assert resident.slabs is slabs
    assert pointers == [t.data_ptr() for f in slabs.factors for t in (f.A, f.B)]
    assert resident.bytes_copied - before["bytes_copied"] <= 2 * 2 * ROW_BYTES


def test_threads_share_the_slots():
    pool = make_pool(20)
    resident = ResidentPool(pool, 12)
    batches = [[rng.sample(range(40), 2) for _ in range(3)] for rng in map(random.Random, range(25))]
    wanted = [run(pool, picking(*rows)) for rows in batches]
    errors = []

    def serve(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(40):
                b = rng.randrange(len(batches))
                with resident.acquire(picking(*batches[b])) as lease:
                    for got, want in zip(run(lease.pool, lease.routing), wanted[b], strict=True):
                        assert torch.equal(got, want)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not any(resident._held) and sorted(resident._idle) == list(range(12))
    assert resident.evictions > 0 and resident.misses - resident.evictions == 12


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(slots=0), "slots must be at least 1, got 0"),
        (dict(memory=3 * ROW_BYTES - 1), f"a slot of {3 * ROW_BYTES} bytes, got {3 * ROW_BYTES - 1}"),
        (dict(), "give one of slots and memory, got slots=None"),
        (dict(slots=2, memory=10**6), "give one of slots and memory, got slots=2"),
    ],
    ids=str,
)
def test_bad_sizes(sizes, message):
    pool = make_pool()
    with pytest.raises(ValueError, match=message):
        ResidentPool(pool, **sizes)
    assert not pool.factors_on_host


def test_bad_routings_and_pools():
    pool = make_pool()
    resident = ResidentPool(pool, 2)
    for entry in (12, 1000):
        with pytest.raises(ValueError, match=f"entry {entry}, which is not in the pool"):
            resident.acquire(picking([0, entry]))
    assert resident.slabs is None or not kept(resident)
    pool.own("t1")
    with pytest.raises(ValueError, match="'t1' is being trained"):
        ResidentPool(pool, 2)
    empty = ResidentPool(make_pool(0), 2)
    with empty.acquire(picking([], [])) as lease:
        assert lease.routing.indices.tolist() == [[], []]
    with pytest.raises(ValueError, match="entry 0, which is not in the pool"):
        empty.acquire(picking([0]))


def test_copies_have_slots_of_their_own():
    resident = ResidentPool(make_pool(), 3)
    check(resident, [0, 1])
    for other in (copy.deepcopy(resident), pickle.loads(pickle.dumps(resident))):
        assert other.pool is not resident.pool and other.settings == resident.settings
        check(other, [0, 5])
        assert counts(other) == (0, 2, 0, 0)
    assert counts(resident) == (0, 2, 0, 0)


class Stream:
    """Stands for a CUDA stream: what was asked of it, in order."""

    def __init__(self, name: str) -> None:
        self.name, self.log = name, []

    def wait_stream(self, other) -> None:
        self.log.append(f"all of {other.name}")

    def wait_event(self, event) -> None:
        self.log.append(event)

    def record_event(self) -> str:
        return f"event of {self.name}"


def test_a_slot_is_overwritten_when_all_streams_that_read_it_are_done(monkeypatch):
    resident = ResidentPool(make_pool(), 2)
    check(resident, [0, 1])
    copies, one, two = (Stream(name) for name in ("copies", "one", "two"))
    first, second = resident.acquire(picking([0])), resident.acquire(picking([0]))
    first._stream, second._stream, resident._stream = one, two, copies
    second.release()
    first.release()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: one)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(resident.slabs, "load", lambda slots, entries: copies.log.append(list(entries)))
    resident.acquire(picking([0]))
    assert not copies.log and not one.log
    resident.acquire(picking([2])).release()
    assert copies.log == ["all of one", [2]] and one.log == ["event of copies"]
    resident._held, resident._idle = [0, 0], dict.fromkeys((0, 1))
    resident.acquire(picking([3]))
    assert copies.log[2:] == ["all of one", "event of two", "event of one", [3]]


# ---- in a model


def names(*rows):
    return [f"task{t}.{m}" if t is not None else "__base__" for t, m in rows]


def logits(model, *rows, length=70):
    ids = torch.randint(1, 96, (len(rows), length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids.to(model.device), adapter_names=names(*rows)).logits


@pytest.mark.parametrize("backend", [None, "reference"] + ["gpu"] * dispatch.interpreting(), ids=str)
def test_a_model_gives_the_same_logits(backend):
    plain, model = (tiny_model(num_tasks=4, backend=backend or "auto") for _ in range(2))
    model.keep_resident(3)
    resident = model.state.resident
    batches = [
        [(0, 0), (None, 0), (1, 1)],
        [(1, 1), (2, 0), (2, 1)],
        [(0, 0), (0, 1), (1, 0), (1, 1), (3, 0)],  # does not fit
        [(None, 0), (None, 0), (None, 0)],
    ]
    for batch in batches[1:] if backend == "gpu" else batches:
        length = 8 if backend == "gpu" else 70
        assert torch.equal(logits(model, *batch, length=length), logits(plain, *batch, length=length))
        assert model.state.lease is None and not any(resident._held)
    assert resident.overflows == 1 and resident.misses > 0


def test_decoding_takes_the_ordinary_layers_and_gives_the_same_tokens():
    plain, model = (tiny_model(num_tasks=4) for _ in range(2))
    model.keep_resident(3)
    ids = torch.randint(3, 96, (3, 6), generator=torch.Generator().manual_seed(2))
    for rows in ([(0, 0), (1, 1), (None, 0)], [(2, 0), (2, 1), (3, 0)]):
        options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=2, pad_token_id=0)
        got, want = (m.generate(ids, adapter_names=names(*rows), **options) for m in (model, plain))
        assert torch.equal(got, want)
    assert counts(model.state.resident) == (0, 5, 2, 0)


def test_keep_resident_none_turns_it_off():
    plain, model = tiny_model(), tiny_model()
    model.keep_resident(memory=10**6)
    assert model.pool.factors_on_host and model.state.resident.num_slots > 6
    model.keep_resident()
    assert model.state.resident is None and not model.pool.factors_on_host
    assert torch.equal(logits(model, (0, 0), (2, 1)), logits(plain, (0, 0), (2, 1)))
    model.keep_resident(2)
    with model.training_task("task1"):
        for sizes in ({}, {"slots": 2}):
            with pytest.raises(ValueError, match="'task1' is being trained"):
                model.keep_resident(**sizes)
        with pytest.raises(ValueError, match="'task1' is being trained"):
            logits(model, (0, 0))
    assert model.state.routing is None and model.state.lease is None


def test_scopes_nest_and_survive_errors():
    model = tiny_model()
    model.keep_resident(2)
    resident = model.state.resident
    outer, inner = (model.pool.fixed_routing(names(*rows)) for rows in ([(2, 1)], [(2, 1), (1, 0)]))
    with model.state.use(outer):
        lease = model.state.lease
        assert torch.equal(model.state.dense(2), lease.routing.dense(2)) and model.state.dense(2).any()
        with model.state.use(None):
            assert model.state.lease is None
            with pytest.raises(IndexError), model.state.use(inner):
                assert sorted(resident._held) == [1, 2]
                model.base_model(torch.full((2, 5), 10_000))
        assert model.state.lease is lease and sorted(resident._held) == [0, 1]
    assert not any(resident._held) and model.state.lease is None


@pytest.mark.parametrize("length", [1, 70])
def test_a_running_batch_keeps_what_it_began_with(length):
    model = tiny_model()
    model.keep_resident(2)
    ids = torch.randint(1, 96, (1, length))
    with torch.no_grad(), model.state.use(model.pool.fixed_routing(["task0"])):
        before = model.base_model(ids).logits
        model.remove_task("task0")
        model.add_task("new", embeddings=clustered_embeddings(0), progress=False)
        assert sorted(model.pool.task("new").slots) == [0, 1]
        assert torch.equal(model.base_model(ids).logits, before)
    assert not torch.equal(model(input_ids=ids, adapter_names=["new"]).logits, before)


def test_another_pool_gets_slots_too():
    model, other = tiny_model(), tiny_model(num_tasks=5)
    model.keep_resident(2)
    assert model.state.resident.pool is model.pool
    model.repatch(other.pool)
    assert model.state.resident.pool is other.pool and model.state.resident.num_slots == 2
    assert torch.equal(logits(model, (4, 0), (4, 1)), logits(tiny_model(num_tasks=5), (4, 0), (4, 1)))
    assert model.state.resident.misses == 2


def test_a_patched_base_and_its_copy():
    plain, model = tiny_model(), tiny_model()
    base = model.unload()
    state = patch_model(base, model.pool)
    state.resident = ResidentPool(model.pool, 2)
    twin = copy.deepcopy(base)
    ids = torch.arange(1, 81).view(2, 40)
    with torch.no_grad():
        want = plain(input_ids=ids, adapter_names=["task0.0", "task1.0"]).logits
        for m in (base, twin):
            assert torch.equal(m(input_ids=ids, adapter_names=["task0.0", "task1.0"]).logits, want)
    mine = twin.mixtures[0].resident
    assert mine is not state.resident and counts(mine) == counts(state.resident) == (0, 2, 0, 0)


def test_weights_get_their_gradients():
    grads = []
    for sizes in ({}, {"slots": 2}):
        model = tiny_model()
        model.keep_resident(**sizes)
        routing = model.pool.fixed_routing(names((0, 0), (1, 1)))
        routing = routing._replace(weights=routing.weights.requires_grad_())
        with model.state.use(routing):
            model.base_model(torch.arange(1, 81).view(2, 40)).logits.square().mean().backward()
        grads.append(routing.weights.grad)
    assert torch.equal(*grads) and grads[0].all()


def test_a_compiled_model_is_one_graph_that_serves_every_batch():
    model, plain = (tiny_model(num_tasks=4) for _ in range(2))
    model.keep_resident(3)
    compiled = torch.compile(model.base_model, backend="aot_eager", fullgraph=True)
    ids = torch.randint(1, 96, (2, 40))
    with torch.no_grad():
        for first, tasks in enumerate((["task0", "task0"], ["task1", "task1"], ["task2", "task3"])):
            routing = model.pool.fixed_routing(tasks)
            with (
                torch._dynamo.config.patch(error_on_recompile=first == 1),  # an overflow has other sizes
                model.state.use(routing),
                plain.state.use(routing),
            ):
                assert torch.equal(compiled(input_ids=ids).logits, plain.base_model(input_ids=ids).logits)
    assert counts(model.state.resident) == (0, 4, 1, 1)
    torch._dynamo.reset()


def test_inference_mode():
    model = tiny_model()
    model.keep_resident(2)
    with torch.inference_mode():
        got = logits(model, (0, 0), (1, 0))
    assert torch.equal(got, logits(tiny_model(), (0, 0), (1, 0)))
    logits(model, (2, 0), (2, 1))  # writes to slots that were made in inference mode
    assert model.state.resident.evictions == 2


def test_an_empty_pool_may_grow():
    base = tiny_model().unload()
    pool = default_pool(base, SLMConfig(r=4, target_modules=["o_proj"]))
    state = patch_model(base, pool)
    state.resident = ResidentPool(pool, 2)
    pool.add_task("first", clustered_embeddings(0)[:1], rank=2)
    torch.nn.init.normal_(pool.factors[0].B)
    ids = torch.arange(1, 41).view(1, 40)
    with torch.no_grad():
        frozen, mixed = (base(input_ids=ids, adapter_names=[n]).logits for n in ("__base__", "first"))
    assert not torch.equal(frozen, mixed) and state.resident.slabs.max_rank == 2


# ---- on a GPU

MISSING = dispatch.available()["gpu"] or (None if torch.cuda.is_available() else "torch sees no CUDA device")
needs_gpu = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.mark.parametrize("slots", [4, pytest.param(64, id="all fit")])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.gpu
@needs_gpu
def test_slots_on_a_gpu(slots, threads):
    pool = make_pool(20)
    wanted_pool = copy.deepcopy(pool)
    resident = ResidentPool(pool, slots)
    pool.to("cuda")
    assert pool.factors[0].A.is_pinned() and pool.keys.is_cuda
    pool.add_task("more", clustered_embeddings(0)[:40])
    assert pool.factors[0].A.is_pinned()
    errors = []

    def serve(seed: int) -> None:
        rng = random.Random(seed)
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    routing = picking(*[rng.sample(range(40), 2) for _ in range(rng.choice((1, 2, 3)))])
                    with resident.acquire(Routing(*(t.cuda() for t in routing))) as lease:
                        for factors, want in zip(
                            lease.pool.factors, dense(wanted_pool, routing), strict=True
                        ):
                            got = densified(lease.pool, factors, lease.routing)
                            torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=serve, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors and not any(resident._held)


def densified(pool, factors, routing) -> torch.Tensor:
    """Each row's weight increment, [rows, out, in]."""
    out = []
    for indices, weights in zip(routing.indices, routing.weights, strict=True):
        total = 0
        for i, w in zip(indices.tolist(), weights, strict=True):
            rows = slice(int(pool.start[i]), int(pool.start[i] + pool.rank[i]))
            total = total + w * pool.scaling[i] * factors.B[rows].T @ factors.A[rows]
        out.append(total)
    return torch.stack(out)


def dense(pool, routing) -> list[torch.Tensor]:
    return [densified(pool, factors, routing) for factors in pool.factors]


@pytest.mark.gpu
@needs_gpu
def test_a_model_on_a_gpu_reads_its_slots():
    plain, model = (tiny_model(num_tasks=4).to("cuda") for _ in range(2))
    model.keep_resident(3)
    assert not model.pool.factors[0].A.is_cuda
    for rows in ([(0, 0), (None, 0), (1, 1)], [(2, 0), (2, 1), (1, 1)], [(m // 2, m % 2) for m in range(5)]):
        torch.testing.assert_close(logits(model, *rows), logits(plain, *rows), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="keep_on_host"):
        model.pool.own("task0")
    model.keep_resident()
    assert model.pool.factors[0].A.is_cuda
    assert torch.equal(logits(model, (0, 0)), logits(plain, (0, 0)))


def test_an_overflow_copies_from_the_host_only_what_has_no_slot():
    resident = ResidentPool(make_pool(), slots=2)
    check(resident, [2, 5])
    before = resident.bytes_copied
    check(resident, [5, 0], [2, 1])
    assert resident.overflows == 1 and kept(resident) == {2, 5}
    assert resident.bytes_copied - before == (3 + 2) * ROW_BYTES  # entries 0 and 1


def test_prefetched_entries_are_hits():
    resident = ResidentPool(make_pool(), slots=3)
    with resident.acquire(picking([0])):
        resident.prefetch(picking([0, 1], [2, 3]))
        assert kept(resident) == {0, 1, 2} and resident.misses == 3
        copied = resident.bytes_copied
        check(resident, [1, 2])
        assert resident.bytes_copied == copied and resident.overflows == 0
        resident.prefetch(picking([1, 2], [5, 5]))  # no room but in the place of what is wanted too
        assert kept(resident) == {0, 1, 2}
    check(resident, [4, 5])
    assert len(kept(resident) & {4, 5}) == 2  # nothing is held


def test_loading_onto_slots(tmp_path):
    model = tiny_model("llama")
    query = torch.stack([clustered_embeddings(t)[0] for t in range(3)])
    ids = torch.randint(1, 96, (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(input_ids=ids, embeddings=query).logits
    model.save_pretrained(tmp_path)
    base = model.unload()
    with pytest.raises(ValueError, match="slots must be"):
        SLMModel.from_pretrained(base, tmp_path, slots=0)
    loaded = SLMModel.from_pretrained(base, tmp_path, slots=6)
    assert loaded.state.resident.num_slots == 6
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids, embeddings=query).logits, want, atol=1e-5)
    ahead = loaded.route_ahead(embeddings=query)
    assert torch.equal(ahead.result().indices, loaded.route(embeddings=query).indices)
    assert loaded.state.resident.misses and not loaded.state.resident.overflows
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids, routing=ahead).logits, want, atol=1e-5)
