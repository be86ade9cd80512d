import pytest
import torch
from conftest import DEVICE, clustered_embeddings, tiny_model
from test_fused_linear import Linear
from test_ops import Case
from torch.library import opcheck

import slm_fast.ops  # noqa: F401  (registers the custom ops)
from slm_fast import dispatch

BACKENDS = [
    name
    for name, reason in dispatch.available().items()
    if reason is None and not (name == "cpu" and DEVICE == "cuda")
]
slm = torch.ops.slm_fast


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [False, True], ids=["from_x", "given_u"])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (3, 0, 9)], ids=str)
def test_mixture_ops(backend, given, lengths):
    case = Case(lengths, (3, 12, 8), in_features=20, out_features=12).to(DEVICE)
    pool = (case.A, case.B, case.start, case.rank, case.scaling, case.indices)
    u = torch.randn(2, sum(lengths), 24, device=DEVICE) if given else None
    opcheck(
        slm.mixture_.default, (case.y.clone(), case.x, *pool, case.weights, case.cu_seqlens, u, 12, backend)
    )
    rows = slice(*case.owned)
    leaves = [t.clone().requires_grad_() for t in (case.y, case.x, case.weights, case.A[rows], case.B[rows])]
    if given:  # then x and A get no gradient from here
        leaves = [t.detach().requires_grad_(i in (0, 2, 4)) for i, t in enumerate(leaves)]
        u.requires_grad_()
    opcheck(slm.mixture.default, (*leaves, u, *pool, case.cu_seqlens, 12, *case.owned, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [False, True], ids=["from_x", "given_u"])
def test_fused_linear_ops(backend, given):
    case = Linear(in_features=20, out_features=12)
    u = torch.randn(2, *case.x.shape[:1], len(case.A), device=DEVICE) if given else None
    frozen = (case.weight, case.bias, case.A, case.B, case.row_entry, case.scaling, case.cu_seqlens)
    args = (case.x, case.weights, None, None, u, *frozen, 0, 0, backend, False)
    opcheck(slm.fused_linear.default, args)
    rows = slice(*case.owned)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.weights, case.A[rows], case.B[rows])]
    if given:
        leaves[2] = leaves[2].detach()
        u.requires_grad_()
    opcheck(slm.fused_linear.default, (*leaves, u, *frozen, *case.owned, backend, True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_search_op(backend):
    query, keys = torch.randn(3, 12, device=DEVICE), torch.randn(20, 12, device=DEVICE)
    bias, mask = torch.randn(20, device=DEVICE), torch.rand(20, device=DEVICE) < 0.5
    settings = (4, "softmax", 1.0, None)
    opcheck(slm.key_search.default, (query, keys, bias, mask, None, *settings, 3, backend))
    opcheck(slm.key_search.default, (query, keys, None, None, query[0], *settings, None, backend))


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("llama", torch.float16), ("t5", torch.float16)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_is_one_graph_and_gives_the_same_logits(family, backend, dtype):
    model = tiny_model(family, backend=backend, dtype=dtype).to(DEVICE)
    routing = model.pool.search(torch.stack([clustered_embeddings(t)[0] for t in range(3)]).to(DEVICE))
    compiled = torch.compile(model.base_model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9):
        inputs = {"input_ids": torch.randint(1, 96, (3, length), device=DEVICE)}
        if family == "t5":
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :2]
        with torch.no_grad(), model.state.use(routing):
            want, got = model.base_model(**inputs).logits, compiled(**inputs).logits
        assert torch.equal(got, want)
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
