import pytest
import torch
import torch.nn.functional as F
from test_compiled import BACKENDS
from test_ops import assert_close, popularity
from test_ops_key_search import name_of
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from slm_fast import dispatch, ops, reference

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
        self.dtype, self.factor_dtype = dtype, factor_dtype or dtype
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
        self.routing = None if resident else (start, rank, scaling, indices, weights, cu_seqlens)
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

    def route(self):
        return None if self.routing is None else tuple(self.on_device(*self.routing))

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
        weight = self.weight.to(dtype)
        return reference.norm_shrink(*inputs, weight, EPS, A, self.routing, max_rank=self.max_rank)

    def forward(self, plan, splits=None):
        inputs, A = self.on_device(*self.inputs), self.on_device(*self.A)
        (weight,) = self.on_device(self.weight)
        options = {"max_rank": self.max_rank, "plan": plan, "splits": splits}
        return norm_shrink.norm_shrink_fwd(*inputs, weight, EPS, A, self.route(), **options)

    def backward(self, plan, u, h=None, needs=(True, True)):
        weight, dh, du, *inputs = self.on_device(self.weight, self.dh, self.du, *self.inputs)
        options = {"max_rank": self.max_rank, "plan": plan, "owned": self.owned, "needs": needs, "h": h}
        A = self.on_device(*self.A)
        dx, dA = norm_shrink.norm_shrink_bwd(dh, du, *inputs, weight, EPS, u, A, self.route(), **options)
        return [dx], dA

    def op(self, inputs, A, A_owned, backend):
        """(h, u) of the public op; the weight is cast along with the inputs."""
        weight, owned = self.weight.to(inputs[0]), {"A_owned": A_owned, "owned": self.owned}
        return ops.norm_shrink(*inputs, weight, EPS, A, self.route(), **owned, backend=backend)

    def plain(self, inputs):
        """h as transformers makes it."""
        norm = LlamaRMSNorm(len(self.weight), EPS).to(DEVICE).requires_grad_(False)
        norm.weight.copy_(self.weight)
        return norm(*inputs)

    def masked(self):
        """The columns that are 0 whatever h is: [T, C] bool."""
        ones = torch.ones(len(self.dh), 1), torch.ones(len(self.A[0]), 1)
        return reference.rank_space(*ones, self.routing, self.max_rank) == 0

    def train(self, backend, exact=False, wanted=(True, True)):
        """[h, u, gradients of the inputs, dA ...] of the public op, in fp32 if `exact`; wanted: inputs, A."""

        def make(t):
            return (t.float() if exact else t).detach().to(DEVICE)

        inputs = [make(t).requires_grad_(wanted[0]) for t in self.inputs]
        A, dh = [make(slab) for slab in self.A], make(self.dh)
        A_owned = [torch.nn.Parameter(slab[slice(*self.owned)]) for slab in A] if wanted[1] else None
        h, u = self.op(inputs, A, A_owned, backend)
        du = self.du.masked_fill(self.masked(), torch.nan).to(DEVICE).view(u.shape)
        torch.autograd.backward([h, u], [dh, du])
        return [h.detach(), u.detach(), *(t.grad for t in (*inputs, *(A_owned or ())))]

    def verify_public(self, op):
        """gpu against reference, with gradients and without."""
        got, want, same = self.train("gpu"), self.train("reference", exact=True), self.train("reference")
        for g, w, s in zip(got, want, same, strict=True):
            assert g.dtype == s.dtype and g.shape == s.shape
            assert_close(g, w, s, self.dtype)
        inputs, A = self.on_device(*self.inputs), self.on_device(*self.A)
        h, u = self.op(inputs, A, None, "gpu")
        splits = dispatch.shrink_splits(op, "gpu", inputs[0], u.shape[-1])
        few = h.shape[0] <= 16  # tokens: what a compiler is told; a plan for more may have other splits
        assert splits > 1 and (u.shape[-3] == splits if few else u.shape[-3] > 1)
        assert_close(h, want[0], same[0], self.dtype)
        assert_close(u.sum(-3, keepdim=True), want[1], same[1], self.dtype)

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


def check_given_splits(case):
    """Exactly as many as are asked for, those beyond the blocks 0."""
    want = case.forward(PLAN)
    for splits, filled in ((1, 1), (2, 2), (5, 2)):
        h, u = case.forward(plan_with(splits=3), splits=splits)
        assert torch.equal(h, want[0]) and u.shape[-3] == splits
        assert_close(u.sum(-3), want[1].sum(-3))
        assert all(part.any() == (i < filled) for i, part in enumerate(u.unbind(-3)))


@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
def test_given_splits(resident):
    check_given_splits(Case(in_features=1000, resident=resident))


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
    assert torch.autograd.gradcheck(
        lambda x, *A: reference.norm_shrink(x, weight, EPS, list(A), case.routing, max_rank=2), (x, *A)
    )


def check_reference_backward(case, forward, backward):
    """The written gradients are autograd's, in float64; du of masked columns is not read."""
    inputs, A = [t.double() for t in case.inputs], [slab.double() for slab in case.A]
    leaves = [t.requires_grad_() for t in (*inputs, *A)]
    h, u = forward(inputs, A)
    dh, du = case.dh.double(), case.du.double().view(u.shape)
    want = torch.autograd.grad([h, u], leaves, [dh, du])
    with torch.no_grad():
        got = backward(dh, du.masked_fill(case.masked(), torch.nan), inputs, A)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        w = w if i < len(inputs) else w[slice(*case.owned)]
        assert g.dtype == torch.float64
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
def test_reference_backward(resident):
    case = Case((2, 1, 4), (2, 3, 1), in_features=5, linears=3, resident=resident)
    case.owned, weight = (1, 4), case.weight.double()
    settings = {"routing": case.routing, "max_rank": 3}

    def forward(inputs, A):
        return reference.norm_shrink(*inputs, weight, EPS, A, **settings)

    def backward(dh, du, inputs, A):
        dx, dA = reference.norm_shrink_backward(dh, du, *inputs, weight, EPS, A, **settings, owned=case.owned)
        return dx, *dA

    check_reference_backward(case, forward, backward)


# ---- the public op


@pytest.mark.parametrize("linears", [1, 3])
@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_public_op(dtype, resident, linears):
    case = Case((3, 0, 5, 9), (8, 3, 8), linears=linears, resident=resident, dtype=dtype, in_features=1040)
    case.verify_public("norm_shrink")


@pytest.mark.parametrize("factor_dtype", DTYPES, ids=name_of)
def test_public_op_with_factors_of_another_dtype(factor_dtype):
    dtype = DTYPES[1 - DTYPES.index(factor_dtype)]
    case = Case((3, 3), (3, 8), dtype=dtype, factor_dtype=factor_dtype, in_features=1040)
    case.verify_public("norm_shrink")


def check_gradients_on_demand(case, backend):
    _, _, *grads = case.train(backend)
    num_inputs = len(case.inputs)
    assert all(grad.any() for grad in grads)
    _, _, *only = case.train(backend, wanted=(True, False))
    assert all(torch.equal(a, b) for a, b in zip(only, grads[:num_inputs], strict=True))
    _, _, *only = case.train(backend, wanted=(False, True))
    assert only[:num_inputs] == [None] * num_inputs
    assert all(torch.equal(a, b) for a, b in zip(only[num_inputs:], grads[num_inputs:], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_on_demand(backend):
    check_gradients_on_demand(Case((4, 3), (3, 8)), backend)


def check_leading_dimensions_and_strides(case, backend):
    inputs, A = case.on_device(*case.inputs), case.on_device(*case.A)
    want = case.op(inputs, A, None, backend)
    inputs = [t.view(3, 5, -1).transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    A = [F.pad(slab, (0, 3))[:, :-3] for slab in A]
    assert not any(t.is_contiguous() for t in (*inputs, *A))
    h, u = case.op(inputs, A, None, backend)
    assert torch.equal(h, want[0].view(3, 5, -1)) and torch.equal(u, want[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_and_strides(backend):
    check_leading_dimensions_and_strides(Case((5, 5, 5), (3, 8)), backend)


def check_an_index_outside_the_pool(case):
    """It raises but for the GPU, which must not wait and leaves the columns 0."""
    inputs, A = case.on_device(*case.inputs), case.on_device(*case.A)
    h, u = case.op(inputs, A, None, "gpu")
    for index in (-1, 4):
        case.routing[3][2, 1] = index
        with pytest.raises(ValueError, match="indices must lie in 0..3"):
            case.op(inputs, A, None, "reference")
        got_h, got_u = case.op(inputs, A, None, "gpu")
        assert torch.equal(got_h, h) and not got_u[..., 8:, 8:].any()
        assert torch.equal(got_u[..., :8], u[..., :8]) and torch.equal(got_u[..., :8, :], u[..., :8, :])


def test_an_index_outside_the_pool():
    check_an_index_outside_the_pool(Case((4, 4, 4)))


def run_chain(case, routing, widths, given, backend):
    """[y of every linear, gradients of the inputs, weights, A_owned, B_owned] of linears behind a case.

    given: the public op makes h and u; else transformers makes h, and each linear its own u.
    """
    g = torch.Generator().manual_seed(1)
    start, rank, scaling, indices, weights, cu_seqlens = case.on_device(*routing)
    resident, rows = case.routing is None, slice(*case.owned)
    if resident:
        row_entry = torch.repeat_interleave(torch.arange(len(rank)), rank.cpu()).int().to(DEVICE)
        weights = torch.randn(len(weights), len(rank), generator=g).to(DEVICE)
        weights[1] = 0
    inputs = [t.detach().to(DEVICE).requires_grad_() for t in case.inputs]
    A, weights = case.on_device(*case.A), weights.clone().requires_grad_()
    A_owned, B_owned = [torch.nn.Parameter(slab[rows]) for slab in A], []
    h, u = case.op(inputs, A, A_owned, backend) if given else (case.plain(inputs), [None] * len(A))
    u = u.view(len(A), 1, len(h), -1) if given else u
    y, dy = [], []
    for width, slab, slab_owned, slab_u in zip(widths, A, A_owned, u, strict=True):
        weight, B, grad = (
            torch.randn(n, m, generator=g).to(DEVICE)
            for n, m in ((width, h.shape[-1]), (len(slab), width), (len(h), width))
        )
        B_owned.append(torch.nn.Parameter(B[rows]))
        owned = {"A_owned": None if given else slab_owned, "B_owned": B_owned[-1], "owned": case.owned}
        options = {"u": slab_u, **owned, "backend": backend}
        if resident:
            pool = (slab, B, row_entry, scaling, weights, cu_seqlens)
            y.append(ops.fused_linear(h, weight, None, *pool, **options))
        else:
            pool = (slab, B, start, rank, scaling, indices, weights, cu_seqlens)
            y.append(ops.mixture(F.linear(h, weight), h, *pool, **options))
        dy.append(grad)
    torch.autograd.backward(y, dy)
    return [t.detach() for t in y] + [t.grad for t in (*inputs, weights, *A_owned, *B_owned)]


def check_chain(case, resident, widths, backend):
    routing = case.routing
    case.routing = None if resident else routing
    want = run_chain(case, routing, widths, False, "reference")
    got = run_chain(case, routing, widths, True, backend)
    for g, w in zip(got, want, strict=True):
        assert w.any()
        assert_close(g, w)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("resident", [False, True], ids=["mixture", "fused_linear"])
def test_chain_of_norm_and_linears(resident, backend):
    case = Case((3, 2, 4), (3, 8, 2), linears=3, in_features=20)
    check_chain(case, resident, (12, 8, 8), backend)


def arguments():
    return {
        "x": torch.randn(6, 8),
        "weight": torch.randn(8),
        "eps": EPS,
        "A": [torch.randn(4, 8), torch.randn(4, 8)],
        "routing": ROUTING,
        "max_rank": 2,
        "A_owned": [torch.randn(2, 8), torch.randn(2, 8)],
        "owned": (1, 3),
    }


ROUTING = (
    torch.tensor([0, 2], dtype=torch.int32),
    torch.tensor([2, 2], dtype=torch.int32),
    torch.ones(2),
    torch.zeros(2, 1, dtype=torch.int32),
    torch.ones(2, 1),
    None,
)


def routing_with(position, value):
    return (*ROUTING[:position], value, *ROUTING[position + 1 :])


BAD_ROUTINGS = [
    ("routing", routing_with(0, torch.zeros(2)), "start must be int32"),
    ("routing", routing_with(1, torch.zeros(1).int()), "rank must have shape"),
    ("routing", routing_with(2, torch.ones(3)), "scaling must have shape"),
    ("routing", routing_with(3, torch.zeros(2, 1)), "indices must be int32"),
    ("routing", routing_with(4, torch.ones(2, 2)), "weights must have shape"),
    ("routing", routing_with(4, torch.ones(2, 1, device="meta")), "weights must be on"),
    ("routing", routing_with(5, torch.zeros(2).int()), "cu_seqlens must have shape"),
    (
        "routing",
        (*ROUTING[:3], torch.zeros(4, 1).int(), torch.ones(4, 1), None),
        "6 tokens cannot be shared out",
    ),
    ("owned", (2, 5), "owned must be a range of the 4 slab rows"),
]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("x", torch.randn(6, 8).double(), "x must be float32"),
        ("x", torch.randn(6, 9), "weight must have shape"),
        ("weight", torch.randn(8).half(), "weight must be float32"),
        ("weight", torch.randn(8, device="meta"), "weight must be on"),
        ("weight", torch.randn(8).requires_grad_(), "norm is frozen"),
        ("A", [], "1 to 4 slabs, got 0"),
        ("A", [torch.randn(4, 8)] * 5, "1 to 4 slabs, got 5"),
        ("A", [torch.randn(4)] * 2, "A must have two dimensions"),
        ("A", [torch.randn(4, 8), torch.randn(5, 8)], "A must have shape"),
        ("A", [torch.randn(4, 8), torch.randn(4, 8).half()], "A must be float32, got"),
        ("A", [torch.randn(4, 8).double()] * 2, "A must be float32 or"),
        ("A_owned", [torch.randn(2, 8)], "each of the 2 slabs, got 1"),
        ("A_owned", [torch.randn(2, 8), torch.randn(1, 8)], "A_owned must have shape"),
        *BAD_ROUTINGS,
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects(backend, field, value, message):
    ops.norm_shrink(**arguments(), backend="reference")
    with pytest.raises(ValueError, match=message):
        ops.norm_shrink(**arguments() | {field: value}, backend=backend)
