"""The kernel that fuses a frozen linear with a resident pool: on CUDA if there is one, else interpreted."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, KERNEL_DTYPES, distinct_rows
from test_ops import TINY, assert_close
from test_ops_key_search import name_of

from slm_fast import dispatch, ops, reference

pytestmark = pytest.mark.skipif(
    dispatch.available()["gpu"] is not None, reason=str(dispatch.available()["gpu"])
)


def small_plan(kernel="two_launch", splits=3, chain=False, tma=False):
    tile = {"BLOCK_T": 16, "BLOCK_C": 16, "num_warps": 4, "num_stages": 2}
    blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_C": 64 if kernel == "inline" else 16}
    return {
        "kernel": kernel,
        "pdl": False,
        "splits": splits,
        "shrink": tile | {"BLOCK_K": 32},
        "linear": blocks | {"GROUP_M": 2, "TMA": tma, "CHAIN": chain, "num_warps": 4, "num_stages": 2},
        "factors": tile | {"BLOCK_N": 32},
        "coefficients": tile,
        "weights": tile,
    }


VARIANTS = {
    "inline": small_plan("inline"),
    "two_launch": small_plan(),
    "chain": small_plan(chain=True),
    "tma": small_plan(chain=True, tma=True),
}


class Verified:
    """A case whose `forward` and `train` are to give what its `oracle` does."""

    def verify(self, backend="gpu", phases=("forward", "backward")):
        assert phases and set(phases) <= {"forward", "backward"}
        want = self.oracle()
        low = min((self.x_dtype, self.factor_dtype), key=lambda d: -TINY[d])
        same = self.oracle(low) if low != torch.float32 else [None] * len(want)
        if "forward" in phases:
            assert_close(self.forward(backend), want[0], same[0], low)
        if "backward" in phases:
            got = self.train(backend)
            assert len(got) == len(want)
        else:  # the forward pass that keeps what a backward one reads
            got = [self.forward(backend, x=self.x.clone().requires_grad_()).detach()]
        for g, w, s in zip(got, want, same, strict=False):
            assert_close(g, w, s, low)


class Linear(Verified):
    """Inputs of one call; row 1 has no weights, slab rows between the entries belong to nobody."""

    def __init__(
        self,
        lengths=(3, 0, 5, 20),
        ranks=(8, 3, 12),
        in_features=104,
        out_features=64,
        dtype=torch.float32,
        factor_dtype=None,
        bias=True,
        gap=2,
        seed=0,
    ):
        g = torch.Generator().manual_seed(seed)
        factor_dtype = factor_dtype or dtype
        owners = [-1] * gap
        for entry, r in enumerate(ranks):
            owners += [entry] * r + [-1] * gap
        num_rows, num_entries, num_tokens = len(lengths), len(ranks), sum(lengths)
        self.row_entry = torch.tensor(owners, dtype=torch.int32)
        self.A = (torch.randn(len(owners), in_features, generator=g) / in_features**0.5).to(factor_dtype)
        self.B = (torch.randn(len(owners), out_features, generator=g) / len(owners or [0]) ** 0.5).to(
            factor_dtype
        )
        self.scaling = torch.rand(num_entries, generator=g) + 0.5
        self.weights = torch.randn(num_rows, num_entries, generator=g)
        if num_rows > 1:
            self.weights[1] = 0
        if num_entries > 1:
            self.weights[:, 1] = 0
        bounds = torch.tensor((0, *lengths)).cumsum(0).int()
        self.cu_seqlens = None if len(set(lengths)) <= 1 else bounds
        self.bounds = bounds.tolist()
        self.x = torch.randn(num_tokens, in_features, generator=g).to(dtype)
        self.weight = (torch.randn(out_features, in_features, generator=g) / in_features**0.5).to(dtype)
        self.bias = torch.randn(out_features, generator=g).to(dtype) if bias else None
        self.dy = torch.randn(num_tokens, out_features, generator=g).to(dtype)
        self.owned = (gap + ranks[0] if ranks else 0, len(owners))
        self.x_dtype, self.factor_dtype = dtype, factor_dtype
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(DEVICE))

    def forward(self, backend="gpu", **changes):
        args = {name: getattr(self, name) for name in ("x", "weight", "bias", "A", "B", "row_entry")}
        args |= {name: getattr(self, name) for name in ("scaling", "weights", "cu_seqlens")}
        return ops.fused_linear(**args | changes, backend=backend)

    def train(self, backend="gpu"):
        """[out, dx, dweights, dA, dB] through ops.fused_linear."""
        x, weights = self.x.clone().requires_grad_(), self.weights.clone().requires_grad_()
        rows = slice(*self.owned)
        A_owned, B_owned = torch.nn.Parameter(self.A[rows]), torch.nn.Parameter(self.B[rows])
        owned = {"A_owned": A_owned, "B_owned": B_owned, "owned": self.owned}
        out = self.forward(backend, x=x, weights=weights, **owned)
        out.backward(self.dy)
        return [out.detach(), x.grad, weights.grad, A_owned.grad, B_owned.grad]

    def oracle(self, dtype=torch.float32):
        """The same by autograd of the plain formula, computed in `dtype`."""
        x, A, B, weights = (
            t.detach().to(dtype).requires_grad_() for t in (self.x, self.A, self.B, self.weights)
        )
        lengths = torch.tensor(self.bounds[1:]) - torch.tensor(self.bounds[:-1])
        row = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(DEVICE)
        onehot = F.one_hot(self.row_entry.long() + 1, len(self.scaling) + 1)[:, 1:].to(dtype)
        coefficient = ((weights * self.scaling.to(dtype)) @ onehot.T)[row]
        out = F.linear(x, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        out = out + (x @ A.T * coefficient) @ B
        grads = torch.autograd.grad(out, (x, weights, A, B), self.dy.to(dtype))
        rows = slice(*self.owned)
        dweights = torch.where(self.weights == 0, 0.0, grads[1].float())
        return [out.detach(), grads[0], dweights, grads[2][rows], grads[3][rows]]


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    monkeypatch.setattr(dispatch, "find_plan", lambda *args: VARIANTS[request.param])
    return request.param


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name_of)
def test_variants(variant, dtype):
    Linear(dtype=dtype).verify()


@pytest.mark.parametrize("dtypes", [(a, b) for a in KERNEL_DTYPES for b in KERNEL_DTYPES], ids=name_of)
def test_dtypes(dtypes):
    Linear(dtype=dtypes[0], factor_dtype=dtypes[1]).verify()


@pytest.mark.parametrize("sizes", [(1, 1), (1, 100), (63, 1), (7, 300), (300, 63), (100, 424)], ids=name_of)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_sizes(sizes, bias):
    Linear(in_features=sizes[0], out_features=sizes[1], bias=bias).verify()


@pytest.mark.parametrize("ranks", [(1,), (3,) * 4, (12,) * 3, (48, 1), (8,) * 12], ids=name_of)
def test_ranks(variant, ranks):
    Linear(lengths=(4, 4, 4), ranks=ranks, in_features=40).verify()


@pytest.mark.parametrize("lengths", [(), (0, 0), (1,), (150,), (63, 0, 1, 20), (0, 0, 17)], ids=name_of)
def test_lengths(lengths):
    case = Linear(lengths=lengths, in_features=40)
    if sum(lengths):
        case.verify()
    else:
        assert case.forward().shape == (0, 64)


@pytest.mark.parametrize("backend", ["reference", "gpu"])
def test_empty_pool_is_the_linear(backend):
    case = Linear(ranks=(), gap=0)
    assert_close(case.forward(backend), F.linear(case.x, case.weight, case.bias))


def test_reference_agrees():
    Linear().verify("reference")
    if DEVICE == "cpu":
        Linear().verify("cpu")


def test_rows_without_weights_get_what_an_empty_pool_gives(variant):
    case = Linear(lengths=(4, 4, 4))
    case.x[0] = 0  # sums of exactly 0
    case.weight[3] = torch.nan
    empty = case.forward(A=case.A[:0], B=case.B[:0], row_entry=case.row_entry[:0])
    case.A[0] = torch.inf  # a row that nobody owns
    case.weights[0] = 0
    got = case.forward()
    bits = torch.int32
    assert torch.equal(got[:8].view(bits), empty[:8].view(bits))
    assert not torch.equal(got[8:], empty[8:])


@pytest.mark.parametrize("name", ["inline", "two_launch"])
def test_a_bad_entry_spoils_only_its_own_rows(monkeypatch, name):
    monkeypatch.setattr(dispatch, "find_plan", lambda *args: VARIANTS[name])
    case = Linear(lengths=(4, 4, 4))
    case.A[2:10] = torch.nan  # entry 0
    case.weights[2, 0] = 0
    got = case.forward()
    assert got[:4].isnan().all() and got[4:].isfinite().all()


def test_every_row_of_the_tables_runs(monkeypatch):
    """Each plan of each architecture, its tiles as they are, gives the reference's result."""
    rows = distinct_rows("fused_linear")
    assert len(rows) >= 10
    for row in rows:
        phase, dtype = row["phase"], torch.float32 if row["dtype"] == "float" else torch.float16
        plans = {phase: row["plan"]}
        monkeypatch.setattr(
            dispatch, "find_plan", lambda op, phase, *args, plans=plans: plans.get(phase, small_plan())
        )
        Linear((2, 0, 20), ranks=(12, 12), in_features=136, dtype=dtype).verify(phases=[phase])


def test_given_rank_space_vectors(variant):
    case = Linear()
    u = torch.stack([0.25 * case.x @ case.A.T, 0.75 * case.x @ case.A.T])
    x, u, weights = (t.clone().requires_grad_() for t in (case.x, u, case.weights))
    B_owned = torch.nn.Parameter(case.B[slice(*case.owned)])
    out = case.forward(x=x, u=u, weights=weights, B_owned=B_owned, owned=case.owned)
    out.backward(case.dy)
    want = case.oracle()
    assert_close(out.detach(), want[0])
    assert_close(weights.grad, want[2])
    assert_close(B_owned.grad, want[4])
    assert torch.equal(u.grad[0], u.grad[1])
    assert_close(x.grad + u.grad[0] @ case.A, want[1])
    inference = case.forward(u=u.detach())
    assert_close(inference, want[0])
    assert torch.equal(case.forward(u=u.detach().mT.contiguous().mT), inference)


def test_leading_dimensions():
    case = Linear(lengths=(5, 5, 5))
    want = case.forward()
    x = case.x.view(3, 5, -1).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(case.forward(x=x), want.view(3, 5, -1))


def test_a_row_does_not_depend_on_its_batch(variant):
    case = Linear(lengths=(1, 0, 17, 5), dtype=torch.float16)
    out = case.forward()
    for row in range(4):
        segment = slice(case.bounds[row], case.bounds[row + 1])
        alone = case.forward(x=case.x[segment], weights=case.weights[row : row + 1], cu_seqlens=None)
        assert torch.equal(alone, out[segment])


def test_repetitions_give_the_same_bits():
    case = Linear()
    first = case.train()
    for _ in range(20 if DEVICE == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(case.train(), first, strict=True))


def test_reference_passes_gradcheck():
    case = Linear((3, 0, 2), (2, 3), in_features=5, out_features=4)
    inputs = [t.double().cpu().requires_grad_() for t in (case.x, case.A, case.B, case.weights)]
    with torch.no_grad():
        inputs[3][inputs[3] == 0] = 0.5

    def run(x, A, B, weights):
        weight, bias = case.weight.double().cpu(), case.bias.double().cpu()
        frozen = (case.row_entry.cpu(), case.scaling.double().cpu())
        cu_seqlens = torch.tensor(case.bounds, dtype=torch.int32)
        return reference.fused_linear(x, weight, bias, A, B, *frozen, weights, cu_seqlens)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("x", torch.randn(28, 9), "weight must have shape"),
        ("weight", torch.randn(64, 104).half(), "weight must be float32"),
        ("bias", torch.randn(63), "bias must have shape"),
        ("A", torch.randn(31, 9), "A must have shape"),
        ("B", torch.randn(31, 64).half(), "B must be float32"),
        ("row_entry", torch.zeros(30).int(), "row_entry must have shape"),
        ("weights", torch.ones(4, 2), "weights must have shape"),
        ("cu_seqlens", torch.zeros(4).int(), "cu_seqlens"),
        ("u", torch.zeros(1, 28, 30), "u must have shape"),
        ("weight", torch.randn(64, 104, requires_grad=True), "frozen"),
        ("owned", (2, 50), "owned"),
    ],
)
def test_rejects(field, value, message):
    value = value.to(DEVICE).detach().requires_grad_(value.requires_grad) if hasattr(value, "to") else value
    with pytest.raises(ValueError, match=message):
        Linear().forward(**{field: value})
