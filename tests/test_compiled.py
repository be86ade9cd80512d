import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, clustered_embeddings, tiny_model
from test_fused_linear import Linear
from test_ops import Case
from test_segment_linear import Segments
from torch.library import opcheck

from slm_fast import dispatch, ops
from slm_fast.fast_forward import FastPath

BACKENDS = [
    name
    for name, reason in dispatch.available().items()
    if reason is None and not (name == "cpu" and DEVICE == "cuda")
]
slm = torch.ops.slm_fast


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("splits", [0, 1, 2], ids=["from_x", "given_u", "given_splits"])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (3, 0, 9)], ids=str)
def test_mixture_ops(backend, splits, lengths):
    case = Case(lengths, (3, 12, 8), in_features=20, out_features=12).to(DEVICE)
    pool = (case.A, case.B, case.start, case.rank, case.scaling, case.indices)
    u = torch.randn(splits, sum(lengths), 24, device=DEVICE) if splits else None
    opcheck(
        slm.mixture_.default, (case.y.clone(), case.x, *pool, case.weights, case.cu_seqlens, u, 12, backend)
    )
    rows = slice(*case.owned)
    leaves = [t.clone().requires_grad_() for t in (case.y, case.x, case.weights, case.A[rows], case.B[rows])]
    if splits:  # then x and A get no gradient from here
        leaves = [t.detach().requires_grad_(i in (0, 2, 4)) for i, t in enumerate(leaves)]
        u.requires_grad_()
    opcheck(slm.mixture.default, (*leaves, u, *pool, case.cu_seqlens, 12, *case.owned, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("splits", [0, 1, 2], ids=["from_x", "given_u", "given_splits"])
def test_fused_linear_ops(backend, splits):
    case = Linear(in_features=20, out_features=12)
    u = torch.randn(splits, *case.x.shape[:1], len(case.A), device=DEVICE) if splits else None
    frozen = (case.weight, case.bias, case.A, case.B, [case.row_entry, case.scaling], case.cu_seqlens, None)
    args = (case.x, case.weights, None, None, u, *frozen, 0, 0, backend, False)
    opcheck(slm.fused_linear.default, args)
    rows = slice(*case.owned)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.weights, case.A[rows], case.B[rows])]
    if splits:
        leaves[2] = leaves[2].detach()
        u.requires_grad_()
    opcheck(slm.fused_linear.default, (*leaves, u, *frozen, *case.owned, backend, True))


@pytest.mark.skipif("gpu" not in BACKENDS, reason="elsewhere the linear and the mixture are two ops")
@pytest.mark.parametrize("splits", [0, 1, 2], ids=["from_x", "given_u", "given_splits"])
def test_segment_linear_ops(splits):
    case = Segments((3, 0, 9), in_features=20, out_features=12)
    max_rank = int(case.rank.max())
    u = None
    if splits:
        u = torch.randn(splits, len(case.x), case.indices.shape[1] * max_rank, device=DEVICE)
    entries = [case.start, case.rank, case.scaling, case.indices]
    frozen = (case.weight, case.bias, case.A, case.B, entries, case.cu_seqlens, max_rank)
    opcheck(slm.fused_linear.default, (case.x, case.weights, None, None, u, *frozen, 0, 0, "gpu", False))
    rows = slice(*case.owned)
    leaves = leaves_of(case.x, case.weights, case.A[rows], case.B[rows])
    if splits:
        leaves[2] = leaves[2].detach()
        u.requires_grad_()
    opcheck(slm.fused_linear.default, (*leaves, u, *frozen, *case.owned, "gpu", True))


def leaves_of(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.fixture(params=["gather", "resident"])
def shrink(request):
    """(case, the list of the routing's tensors, cu_seqlens, the largest rank)"""
    case = Case((2, 0, 3), (3, 12, 8), in_features=40).to(DEVICE)
    if request.param == "resident":
        return case, [], None, 1
    return case, [case.start, case.rank, case.scaling, case.indices, case.weights], case.cu_seqlens, 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grads", [False, True], ids=["inference", "training"])
def test_norm_shrink_op(backend, grads, shrink):
    case, *routing = shrink
    weight, A = torch.randn(40, device=DEVICE), [case.A, 2 * case.A]
    settings = (weight, 1e-5, A, *routing, *case.owned)
    if not grads:
        splits = 3 if backend == "gpu" else 1
        opcheck(slm.norm_shrink.default, (case.x, [], *settings, splits, backend))
        return
    x, *A_owned = leaves_of(case.x, *(slab[slice(*case.owned)] for slab in A))
    opcheck(slm.norm_shrink.default, (x, A_owned, *settings, 1, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grads", [False, True], ids=["inference", "training"])
def test_silu_mul_shrink_op(backend, grads, shrink):
    case, *routing = shrink
    settings = (case.A, *routing, *case.owned)
    if not grads:
        splits = 3 if backend == "gpu" else 1
        opcheck(slm.silu_mul_shrink.default, (case.x, case.x + 1, None, *settings, splits, backend))
        return
    gate, up, A_owned = leaves_of(case.x, case.x + 1, case.A[slice(*case.owned)])
    opcheck(slm.silu_mul_shrink.default, (gate, up, A_owned, *settings, 1, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["inputs", "A"])
def test_shrink_backward_ops(backend, needs, shrink):
    case, *routing = shrink
    weight, A = torch.randn(40, device=DEVICE), [case.A, 2 * case.A]
    h, u = slm.norm_shrink(case.x, [], weight, 1e-5, A, *routing, *case.owned, 1, backend)
    grads, rest = (torch.randn_like(h), torch.randn_like(u)), (*routing, *case.owned, backend)
    saved = (case.x, h, u, weight, 1e-5, A)
    opcheck(slm.norm_shrink_backward.default, (*grads, *saved, *rest, list(needs)))
    h, u = slm.silu_mul_shrink(case.x, case.x, None, case.A, *routing, *case.owned, 1, backend)
    grads, saved = (torch.randn_like(h), torch.randn_like(u)), (case.x, case.x, h, case.A)
    needs = [needs[0], False, needs[1]]
    opcheck(slm.silu_mul_shrink_backward.default, (*grads, *saved, *rest, needs))


def chain_of(case, resident, backend):
    """A function of (x, weights, three A_owned, B_owned): a norm, gate and up, their product, down."""
    routing = (case.start, case.rank, case.scaling, case.indices, case.weights, None)
    options = {"owned": case.owned, "backend": backend}
    columns = {"routing": None if resident else routing, "max_rank": 8} | options
    row_entry = torch.repeat_interleave(torch.arange(2), case.rank.cpu()).int().to(DEVICE)
    frozen = torch.randn(100, 100, device=DEVICE) / 10

    def linear(h, u, weights, B_owned):
        if resident:
            pool = (case.A, case.B, row_entry, case.scaling, weights)
            return ops.fused_linear(h, frozen, None, *pool, u=u, B_owned=B_owned, **options)
        pool = (case.A, case.B, *routing[:4], weights)
        return ops.mixture(F.linear(h, frozen), h, *pool, u=u, max_rank=8, B_owned=B_owned, **options)

    def run(x, weights, A_owned, B_owned):
        pair = A_owned and A_owned[:2]
        h, u = ops.norm_shrink(x, frozen[0], 1e-5, [case.A, case.A], A_owned=pair, **columns)
        gate, up = (linear(h, part, weights, B_owned) for part in u)
        last = A_owned and A_owned[2]
        h, down = ops.silu_mul_shrink(gate, up, case.A, A_owned=last, **columns)
        return linear(h, down, weights, B_owned), u, down

    return run


@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_chain_is_one_graph_and_gives_the_same(backend, resident):
    case = Case((3, 3), (3, 8), in_features=100, out_features=100).to(DEVICE)
    run = chain_of(case, resident, backend)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        want, got = run(case.x, case.weights, None, None), compiled(case.x, case.weights, None, None)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (want[1].shape[1] > 1) == (want[2].shape[0] > 1) == (backend == "gpu")
    A, B = (slab[slice(*case.owned)] for slab in (case.A, case.B))
    results = []
    for function in (run, compiled):
        x, weights, *A_owned, B_owned = leaves_of(case.x, case.weights, A, A, A, B)
        y, u, down = function(x, weights, A_owned, B_owned)
        assert u.shape[1] == down.shape[0] == 1
        y.backward(case.dy)
        results.append([y.detach(), *(t.grad for t in (x, weights, *A_owned, B_owned))])
    for eager, traced in zip(*results, strict=True):
        assert eager.any()
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.skipif("gpu" not in BACKENDS, reason="only gpu splits")
def test_a_compiled_norm_keeps_its_splits_at_any_length():
    case = Case((5,), (3,), top_k=1, in_features=100).to(DEVICE)
    pool, weight = (case.start, case.rank, case.scaling, case.indices, case.weights), case.A[0]

    def run(x):
        return ops.norm_shrink(x, weight, 1e-5, [case.A], (*pool, None), max_rank=3, backend="gpu")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for length, splits in ((5, 4), (300, 1)):
        x = torch.randn(length, 100, device=DEVICE)
        with torch.no_grad():
            (h, u), (want_h, want_u) = compiled(x), run(x)
        assert u.shape == (1, 4, length, 3) and want_u.shape == (1, splits, length, 3)
        assert torch.equal(h, want_h)
        torch.testing.assert_close(u.sum(1), want_u.sum(1), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_search_op(backend):
    query, keys = torch.randn(3, 12, device=DEVICE), torch.randn(20, 12, device=DEVICE)
    bias, mask = torch.randn(20, device=DEVICE), torch.rand(20, device=DEVICE) < 0.5
    settings = (4, "softmax", 1.0, None)
    opcheck(slm.key_search.default, (query, keys, bias, mask, None, *settings, 3, backend))
    opcheck(slm.key_search.default, (query, keys, None, None, query[0], *settings, None, backend))


# The interpreter takes minutes over a graph with kernels, so not every model with every backend and dtype.
MODELS = [(backend, "llama", torch.float16 if backend == "gpu" else torch.float32) for backend in BACKENDS]
MODELS += [("cpu", "t5", torch.float16)] if "cpu" in BACKENDS else []
MODELS += [("gpu", "t5", torch.float16)] if "gpu" in BACKENDS and not dispatch.interpreting() else []


@pytest.mark.parametrize(("backend", "family", "dtype"), MODELS, ids=str)
def test_a_compiled_model_is_one_graph_and_gives_the_same_logits(family, backend, dtype, monkeypatch):
    model = tiny_model(family, backend=backend, dtype=dtype).to(DEVICE)
    routing = model.pool.search(torch.stack([clustered_embeddings(t)[0] for t in range(3)]).to(DEVICE))
    compiled = torch.compile(model.base_model, backend="aot_eager", fullgraph=True, dynamic=True)
    near = {"rtol": 0, "atol": 2e-5 if dtype == torch.float32 else 2e-3}
    for length in (9, 25):
        inputs = {"input_ids": torch.randint(1, 96, (3, length), device=DEVICE)}
        if family == "t5":
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :2]
        with torch.no_grad(), model.state.use(routing):
            fused, got = model.base_model(**inputs).logits, compiled(**inputs).logits
            with monkeypatch.context() as patch:  # fused layers, which a compiler does not see, add otherwise
                patch.setattr(FastPath, "backend", lambda *_: None)
                want = model.base_model(**inputs).logits
        assert torch.equal(got, want)
        torch.testing.assert_close(fused, want, **near)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_training_gives_the_same_gradients(backend):
    grads = []
    for compiled in (False, True):
        model = tiny_model("llama", backend=backend).to(DEVICE)
        model.pool.own("task1")
        base = model.base_model
        forward = torch.compile(base, backend="aot_eager", fullgraph=True) if compiled else base
        routing = model.pool.search(clustered_embeddings(1)[:3].to(DEVICE), "task1")
        ids = torch.arange(1, 19, device=DEVICE).view(3, 6)
        with model.state.use(routing):
            forward(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.pool.parameters() if p.grad is not None])
        torch._dynamo.reset()
    assert len(grads[0]) > 10 and any(g.any() for g in grads[0])
    for eager, traced in zip(*grads, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-7)
