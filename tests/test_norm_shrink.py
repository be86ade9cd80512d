import pytest
import torch
from test_ops import assert_close, popularity
from test_ops_key_search import name_of
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from slm_fast import dispatch, reference

pytest.importorskip("triton")
if not (dispatch.interpreting() or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)
from slm_fast.kernels import norm_shrink  # noqa: E402

DEVICE = "cpu" if dispatch.interpreting() else "cuda"
DTYPES = [torch.float32, torch.float16]
TILES = {"num_warps": 4, "num_stages": 2}
PLAN = {
    "splits": 1,
    "pdl": False,
    "forward": {"BLOCK_T": 16, "BLOCK_C": 16, "BLOCK_K": 512, "BLOCK_S": 512} | TILES,
    "backward": {"BLOCK_T": 16, "BLOCK_C": 16, "BLOCK_N": 512, "BLOCK_S": 512} | TILES,
    "factors": {"BLOCK_T": 32, "BLOCK_C": 32, "BLOCK_N": 512} | TILES,
    "coefficients": {"BLOCK_T": 32, "BLOCK_C": 32} | TILES,
}
EPS = 1e-5
INTEGER = {torch.float32: torch.int32, torch.float16: torch.int16}


def plan_with(plan=PLAN, splits=1, **forward):
    """A plan with other splits and other tiles of the forward."""
    return plan | {"splits": splits, "forward": plan["forward"] | forward}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody wrote is NaN; few programs, for the interpreter's sake."""
    monkeypatch.setattr(norm_shrink, "PROGRAMS", 4)
    empty, empty_like = torch.empty, torch.empty_like

    def nan(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: nan(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: nan(empty_like(*args, **kwargs)))


class Case:
    """Inputs of one call; row 1 has no weights, and the slab rows after the first entry are owned."""

    def __init__(
        self,
        lengths=(3, 0, 5, 20),
        ranks=(8, 8, 8, 8),
        top_k=2,
        in_features=100,
        linears=2,
        dtype=torch.float32,
        factor_dtype=None,
        resident=False,
        kind="uniform",
    ):
        g = torch.Generator().manual_seed(0)
        self.dtype, self.factor_dtype, self.resident = dtype, factor_dtype or dtype, resident
        rank = torch.tensor(ranks, dtype=torch.int32)
        num_rows, num_tokens = len(lengths), sum(lengths)
        weights = torch.randn(num_rows, top_k, generator=g)
        if num_rows > 1:
            weights[1] = 0
        bounds = torch.tensor((0, *lengths)).cumsum(0).int()
        cu_seqlens = None if len(set(lengths)) <= 1 else bounds
        indices = popularity(kind, num_rows, len(ranks), top_k, g)
        scaling = torch.rand(len(ranks), generator=g) + 0.5
        start = (rank.cumsum(0) - rank).int()
        self.routing = (start, rank, scaling, indices, weights, cu_seqlens)
        self.max_rank = max(ranks)
        num_columns = sum(ranks) if resident else top_k * self.max_rank
        self.owned = (ranks[0] if len(ranks) > 1 else 0, sum(ranks))
        self.inputs = self.make_inputs(num_tokens, in_features, g)
        self.A = [
            (torch.randn(sum(ranks), in_features, generator=g) / in_features**0.5).to(self.factor_dtype)
            for _ in range(linears)
        ]
        self.dh = torch.randn(num_tokens, in_features, generator=g).to(dtype)
        self.du = torch.randn(linears, num_tokens, num_columns, generator=g)

    def make_inputs(self, num_tokens, in_features, g):
        scale = torch.rand(num_tokens, 1, generator=g) * 10
        self.weight = (torch.randn(in_features, generator=g) + 1).to(self.dtype)
        return [(torch.randn(num_tokens, in_features, generator=g) * scale).to(self.dtype)]

    def on_device(self, *tensors):
        return [None if t is None else t.to(DEVICE) for t in tensors]

    def oracle(self, dtype):
        """[h, u, gradients of the inputs, dA ...] by autograd of the reference in `dtype`; u's are masked."""
        inputs = [t.detach().to(dtype, copy=True).requires_grad_() for t in self.inputs]
        wide = torch.promote_types(dtype, self.factor_dtype)
        A = [slab.to(wide, copy=True).requires_grad_() for slab in self.A]
        h, u = self.reference(inputs, A, dtype)
        u = u.reshape(self.du.shape)
        h.backward(self.dh.to(dtype), retain_graph=True)
        u.backward(self.du.to(u.dtype))
        grads = [slab.grad if slab.grad is not None else torch.zeros_like(slab) for slab in A]
        grads = [grad[slice(*self.owned)] for grad in grads]
        return [t.detach() for t in (h, u, *(t.grad for t in inputs), *grads)]

    def reference(self, inputs, A, dtype):
        return reference.norm_shrink(
            inputs[0],
            self.weight.to(dtype),
            EPS,
            A,
            self.routing,
            max_rank=self.max_rank,
            resident=self.resident,
        )

    def forward(self, plan):
        inputs, A = self.on_device(*self.inputs), self.on_device(*self.A)
        (weight,) = self.on_device(self.weight)
        options = {"max_rank": self.max_rank, "plan": plan, "resident": self.resident}
        return norm_shrink.norm_shrink_fwd(*inputs, weight, EPS, A, self.on_device(*self.routing), **options)

    def backward(self, plan, u, h=None, needs=(True, True)):
        weight, dh, du, *inputs = self.on_device(self.weight, self.dh, self.du, *self.inputs)
        options = {"max_rank": self.max_rank, "plan": plan, "resident": self.resident}
        routing, A = self.on_device(*self.routing), self.on_device(*self.A)
        dx, dA = norm_shrink.norm_shrink_bwd(
            dh, du, *inputs, weight, EPS, u, A, routing, owned=self.owned, needs=needs, h=h, **options
        )
        return [dx], dA

    def verify(self, plan=PLAN):
        h, parts = self.forward(plan)
        parts = parts.view(len(self.A), -1, *self.du.shape[1:])
        u = parts.sum(1)
        grads, dA = self.backward(plan, u)
        want = self.oracle(torch.float32)
        same = self.oracle(self.dtype)
        dtypes = [self.dtype, torch.float32, *(self.dtype for _ in grads), *(torch.float32 for _ in dA)]
        for g, w, s, d in zip((h, u, *grads, *dA), want, same, dtypes, strict=True):
            assert g.dtype == d
            assert_close(g.cpu(), w, s, self.dtype)
        return h, parts


@pytest.mark.parametrize("linears", [1, 2, 3, 4])
@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_linears(linears, resident, dtype):
    Case(linears=linears, resident=resident, dtype=dtype).verify()


@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
@pytest.mark.parametrize(
    ("in_features", "dtype"),
    [(n, d) for d in DTYPES for n in (7, 63, 1000, 3424) if n < 3424 or d == DTYPES[1]],
)
def test_sizes(in_features, dtype, resident):
    case = Case((4, 3, 7), (3, 8), in_features=in_features, resident=resident, linears=1, dtype=dtype)
    _, u = case.verify(plan_with(splits=3))
    assert u.shape[1] == {7: 1, 63: 1, 1000: 2, 3424: 3}[in_features]


def test_one_feature():
    # h is +-weight whatever x is, but for eps: dx is the difference of two terms that are nearly equal.
    case = Case(in_features=1, linears=1)
    h, u = case.forward(PLAN)
    want = case.oracle(torch.float32)
    (dx,), dA = case.backward(PLAN, u.sum(1))
    for got, expected in zip((h, u, *dA), (want[0], want[1][:, None], *want[3:]), strict=True):
        assert_close(got.cpu(), expected)
    term = case.weight * case.dh / case.inputs[0].abs()
    assert ((dx.cpu() - want[2]).abs() <= 1e-5 * term.abs().max()).all()


@pytest.mark.parametrize(
    "ranks", [(1,) * 3, (3,) * 3, (12,) * 3, (48,) * 3, (2, 12, 1, 48, 3, 8)], ids=name_of
)
@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
def test_ranks(ranks, resident):
    Case(lengths=(4, 3, 10), ranks=ranks, top_k=3, resident=resident).verify()


@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("kind", ["distinct", "identical"])
def test_popularity_and_top_k(kind, top_k):
    Case(lengths=(1,) * 5, ranks=(3,) * 8, top_k=top_k, kind=kind, linears=1).verify()


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("lengths", [(1,), (40,), (17, 0, 1, 20), (0, 0, 5), (6,) * 3], ids=name_of)
def test_lengths(lengths, block):
    plan = plan_with(BLOCK_T=block, BLOCK_K=128, BLOCK_S=128)
    Case(lengths=lengths, linears=1, ranks=(3, 8)).verify(plan)


@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=name_of)
def test_no_tokens(lengths, resident):
    case = Case(lengths=lengths, resident=resident)
    h, u = case.forward(PLAN)
    assert h.shape == (0, 100) and u.shape == (2, 1, 0, 32 if resident else 16)
    (dx,), dA = case.backward(PLAN, u.sum(1))
    assert dx.shape == (0, 100) and not any(grad.any() for grad in dA)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("factor_dtype", DTYPES, ids=name_of)
def test_factors_of_another_dtype(dtype, factor_dtype):
    Case(dtype=dtype, factor_dtype=factor_dtype).verify()


def check_every_token_has_its_h(case):
    """With cu_seqlens that leave tokens out, without rows, without columns and with an empty pool."""
    case.routing[4][:] = 1
    want, want_u = case.forward(PLAN)
    (*of_row, _), covers = case.routing, torch.tensor([21, 21, 30], dtype=torch.int32)
    case.routing = (*(t[:2] if i > 2 else t for i, t in enumerate(of_row)), covers)
    inside = slice(21, 30)
    for block in (1, 16):
        h, u = case.forward(plan_with(BLOCK_T=block))
        assert_close(h, want)
        assert u[..., inside, :].isfinite().all() and not u[..., :21, :].isfinite().any()
        assert not u[..., 30:, :].isfinite().any()
    case.du[:, :21], case.du[:, 30:] = torch.nan, torch.nan
    u = u.sum(-3).view(case.du.shape)
    grads, dA = case.backward(PLAN, u)
    case.du[:, :21], case.du[:, 30:] = 0, 0
    _, _, *want_grads = case.oracle(torch.float32)
    for got, expected in zip((*grads, *dA), want_grads, strict=True):
        assert_close(got.cpu(), expected)
    start, rank, scaling, indices, weights, _ = case.routing
    for empty in (
        (start, rank, scaling, indices[:0], weights[:0], None),
        (start, rank, scaling, indices[:0], weights[:0], covers[:1]),
        (start, rank, scaling, indices[:, :0], weights[:, :0], None),
        (start[:0], rank[:0], scaling[:0], indices, torch.zeros_like(weights), None),
    ):
        case.routing = empty
        assert torch.equal(case.forward(PLAN)[0], want)
        case.du = torch.zeros_like(case.du)[..., : empty[3].shape[1] * case.max_rank]
        grads, dA = case.backward(PLAN, case.du.to(DEVICE))
        assert all(grad.isfinite().all() for grad in grads) and not any(grad.any() for grad in dA)


def test_every_token_has_its_h():
    case = Case(lengths=(20, 20), linears=1)
    check_every_token_has_its_h(case)


@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
def test_kept_h_and_needs(resident):
    case = Case(resident=resident, dtype=torch.float16)
    h, u = case.forward(PLAN)
    (dx,), dA = case.backward(PLAN, u.sum(1))
    (kept_dx,), kept_dA = case.backward(PLAN, u.sum(1), h=h)
    assert torch.equal(dx, kept_dx) and all(torch.equal(a, b) for a, b in zip(dA, kept_dA, strict=True))
    (none,), only_dA = case.backward(PLAN, u.sum(1), h=h, needs=(False, True))
    assert none is None and all(torch.equal(a, b) for a, b in zip(dA, only_dA, strict=True))
    (only_dx,), none = case.backward(PLAN, u.sum(1), needs=(True, False))
    assert none is None and torch.equal(dx, only_dx)


def test_picks_without_weight_are_not_read():
    case = Case(lengths=(4, 4, 4), ranks=(8, 3, 12), top_k=3, kind="identical", dtype=torch.float16)
    case.routing[4][:, 2] = 0
    for slab in case.A:
        slab[11:] = torch.nan
    case.du[:, :, 24:] = 0
    h, u = case.forward(PLAN)
    assert h.isfinite().all() and u.isfinite().all() and not u[..., 24:].any()
    (dx,), dA = case.backward(PLAN, u.sum(1))
    assert dx.isfinite().all() and not any(grad[3:].any() for grad in dA)


def test_u_is_what_mixture_makes():
    from slm_fast.kernels import mixture

    case = Case(ranks=(3, 12, 8), top_k=3)
    h, u = case.forward(PLAN)
    routing = case.on_device(*case.routing)
    tiles = {"BLOCK_T": 32, "BLOCK_C": 32, "BLOCK_K": 512} | TILES
    for slab, part in zip(case.on_device(*case.A), u, strict=True):
        want = mixture.shrink(h, slab, routing, num_columns=36, max_rank=12, tiles=tiles)
        assert_close(part, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("in_features", [128, 4096])
def test_h_has_the_bits_of_transformers(in_features, dtype):
    case = Case(lengths=(16,), in_features=in_features, linears=1, ranks=(1, 1), dtype=dtype)
    norm = LlamaRMSNorm(in_features, EPS).to(DEVICE, dtype)
    norm.weight.data.copy_(case.weight)

    def compare():
        with torch.no_grad():
            return case.forward(PLAN)[0], norm(case.inputs[0].to(DEVICE))

    # Sums of squares in another order move a row's rstd by an ulp; every other operation has the same bits.
    h, want = compare()
    assert (
        (h - want).abs() <= 2**-21 * want.abs() + (0 if dtype == torch.float32 else 2**-10) * want.abs()
    ).all()
    assert (h == want).all(1).sum() >= 8 if dtype == torch.float32 else (h == want).float().mean() > 0.998
    # Where the sum is exact whatever the order, so is h.
    case.inputs = [case.inputs[0].round().clamp(-16, 16)]
    h, want = compare()
    assert torch.equal(h.view(INTEGER[dtype]), want.view(INTEGER[dtype]))


@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
def test_reference_gradients(resident):
    case = Case(lengths=(2, 1, 2), ranks=(2, 1), in_features=5, linears=2, resident=resident)
    x, weight = case.inputs[0].double().requires_grad_(), case.weight.double()
    A = [slab.double().requires_grad_() for slab in case.A]
    options = {"max_rank": 2, "resident": resident}
    assert torch.autograd.gradcheck(
        lambda x, *A: reference.norm_shrink(x, weight, EPS, list(A), case.routing, **options), (x, *A)
    )
