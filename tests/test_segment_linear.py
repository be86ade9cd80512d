"""The fused kernel with gathered entries: on CUDA if there is one, else interpreted."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, KERNEL_DTYPES, clustered_embeddings, distinct_rows, tiny_model
from test_fused_linear import VARIANTS as ALL_VARIANTS
from test_fused_linear import Verified, small_plan
from test_ops import Case, assert_close
from test_ops_key_search import name_of

from slm_fast import dispatch, ops

pytestmark = pytest.mark.skipif(
    dispatch.available()["gpu"] is not None, reason=str(dispatch.available()["gpu"])
)
VARIANTS = {name: ALL_VARIANTS[name] for name in ("two_launch", "chain", "tma")}
POOL = ("A", "B", "start", "rank", "scaling", "indices", "weights", "cu_seqlens")


class Segments(Verified, Case):
    """Inputs of one call; row 1 has no weights, and the rows after the first entry are owned."""

    def __init__(self, lengths=(3, 0, 5, 66), in_features=104, out_features=64, bias=True, **options):
        dtype = options.pop("dtype", torch.float32)
        options = {"factor_dtype": dtype} | options
        super().__init__(
            lengths, in_features=in_features, out_features=out_features, x_dtype=dtype, **options
        )
        g = torch.Generator().manual_seed(1)
        self.weight = (torch.randn(out_features, in_features, generator=g) / in_features**0.5).to(dtype)
        self.bias = torch.randn(out_features, generator=g).to(dtype) if bias else None
        self.to(DEVICE)

    def forward(self, backend="gpu", **changes):
        args = {name: getattr(self, name) for name in ("x", "weight", "bias", *POOL)} | changes
        return ops.segment_linear(**args, backend=backend)

    def train(self, backend="gpu", **changes):
        """[out, dx, dweights, dA, dB] through ops.segment_linear."""
        x, weights = self.x.clone().requires_grad_(), self.weights.clone().requires_grad_()
        rows = slice(*self.owned)
        A_owned, B_owned = torch.nn.Parameter(self.A[rows]), torch.nn.Parameter(self.B[rows])
        owned = {"A_owned": A_owned, "B_owned": B_owned, "owned": self.owned}
        out = self.forward(backend, x=x, weights=weights, **owned, **changes)
        out.backward(self.dy)
        return [out.detach(), x.grad, weights.grad, A_owned.grad, B_owned.grad]

    def oracle(self, dtype=torch.float32):
        """The same by autograd of the plain formula, computed in `dtype`."""
        x, A, B, weights = (
            t.detach().to(dtype).requires_grad_() for t in (self.x, self.A, self.B, self.weights)
        )
        out = F.linear(x, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        updates = []
        for b, picks in enumerate(self.indices.tolist()):
            segment = slice(self.bounds[b], self.bounds[b + 1])
            update = out[segment]
            for k, i in enumerate(picks):
                rows = slice(int(self.start[i]), int(self.start[i] + self.rank[i]))
                scale = (weights[b, k] * self.scaling[i]).to(dtype)
                update = update + (x[segment] @ A[rows].T * scale) @ B[rows]
            updates.append(update)
        out = torch.cat(updates)
        dx, dA, dB, dweights = torch.autograd.grad(out, (x, A, B, weights), self.dy.to(dtype))
        rows = slice(*self.owned)
        return [out.detach(), dx, torch.where(self.weights == 0, 0.0, dweights.float()), dA[rows], dB[rows]]


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    monkeypatch.setattr(dispatch, "find_plan", lambda *args: VARIANTS[request.param])
    return request.param


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name_of)
def test_variants(variant, dtype):
    Segments(dtype=dtype).verify()


@pytest.mark.parametrize("dtypes", [(a, b) for a in KERNEL_DTYPES for b in KERNEL_DTYPES], ids=name_of)
def test_dtypes(dtypes):
    Segments(dtype=dtypes[0], factor_dtype=dtypes[1]).verify()


@pytest.mark.parametrize("sizes", [(1, 1), (63, 1), (7, 300), (300, 63)], ids=name_of)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_sizes(sizes, bias):
    Segments(in_features=sizes[0], out_features=sizes[1], bias=bias).verify()


@pytest.mark.parametrize("ranks", [(1, 1), (3,) * 4, (2, 12, 1, 48, 3, 8)], ids=name_of)
@pytest.mark.parametrize("top_k", [1, 2], ids=name_of)
def test_ranks(variant, ranks, top_k):
    Segments(lengths=(20, 20, 20), ranks=ranks, top_k=top_k, in_features=40).verify()


@pytest.mark.parametrize("top_k", [4, 8], ids=name_of)
def test_many_picks(variant, top_k):
    Segments(lengths=(5,) * 6, ranks=(3,) * 8, top_k=top_k, in_features=40).verify()


@pytest.mark.parametrize("lengths", [(1,), (150,), (1,) * 40, (63, 0, 1, 20), (0, 0, 17)], ids=name_of)
def test_lengths(variant, lengths):
    Segments(lengths=lengths, in_features=40).verify()


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=name_of)
def test_no_tokens(lengths):
    assert Segments(lengths=lengths).forward().shape == (0, 64)


@pytest.mark.parametrize("backend", ["reference", None])
def test_other_backends_agree(backend):
    Segments().verify(backend)


def test_tokens_outside_all_rows_get_the_linear_alone(variant):
    case = Segments(lengths=(20, 20))
    bounds = torch.tensor([7, 18, 33], dtype=torch.int32, device=DEVICE)
    out = case.forward(cu_seqlens=bounds)
    plain = case.forward(weights=torch.zeros_like(case.weights))
    outside = [*range(7), *range(33, 40)]
    assert torch.equal(out[outside], plain[outside])
    alone = case.forward(x=case.x[7:18], **{n: getattr(case, n)[:1] for n in ("indices", "weights")})
    assert torch.equal(out[7:18], alone)
    grads = case.train(cu_seqlens=bounds)
    assert_close(grads[1][outside], case.dy[outside] @ case.weight)
    assert all(g.isfinite().all() for g in grads)


def test_rows_without_weights_get_what_the_linear_gives(variant):
    case = Segments(lengths=(20, 20, 20))
    case.x[0] = 0  # sums of exactly 0
    case.weights[0] = 0
    case.weights[2] = 1
    plain = case.forward(weights=torch.zeros_like(case.weights))
    case.A[case.start[case.indices[0, 0]]] = torch.inf  # picked by a row without weights
    case.indices[2] = (case.indices[0, 0] + 1) % 4
    got = case.forward()
    assert torch.equal(got[:40].view(torch.int32), plain[:40].view(torch.int32))
    assert got.isfinite().all() and not torch.equal(got[40:], plain[40:])


def test_a_wrong_index_spoils_only_its_own_row(variant):
    case = Segments(lengths=(20, 20, 20))
    case.weights[:] = 1
    case.indices[1, 0] = 99
    got = case.forward()
    assert got[20:40].isnan().all() and got[:20].isfinite().all() and got[40:].isfinite().all()


def test_a_row_does_not_depend_on_its_batch(variant):
    case = Segments(lengths=(1, 0, 17, 5), dtype=torch.float16)
    out = case.forward()
    for row in range(4):
        segment = slice(case.bounds[row], case.bounds[row + 1])
        one = {name: getattr(case, name)[row : row + 1] for name in ("indices", "weights")}
        assert torch.equal(case.forward(x=case.x[segment], cu_seqlens=None, **one), out[segment])


def test_repetitions_give_the_same_bits():
    case = Segments()
    first = case.train()
    for _ in range(20 if DEVICE == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(case.train(), first, strict=True))


def test_given_rank_space_vectors(variant):
    case = Segments(ranks=(8, 8, 8, 8))
    row = torch.repeat_interleave(torch.arange(4), torch.tensor((3, 0, 5, 66))).to(DEVICE)
    slab = case.start[case.indices[row].long()][:, :, None] + torch.arange(8, device=DEVICE)
    whole = (case.x @ case.A.T).gather(1, slab.flatten(1).long())
    u = torch.stack([0.25 * whole, 0.75 * whole])
    x, u, weights = (t.clone().requires_grad_() for t in (case.x, u, case.weights))
    B_owned = torch.nn.Parameter(case.B[slice(*case.owned)])
    out = case.forward(x=x, u=u, weights=weights, B_owned=B_owned, owned=case.owned)
    out.backward(case.dy)
    want = case.oracle()
    assert_close(out.detach(), want[0])
    assert_close(weights.grad, want[2])
    assert_close(B_owned.grad, want[4])
    assert torch.equal(u.grad[0], u.grad[1])
    assert_close(x.grad, case.dy @ case.weight)
    through_u = torch.zeros_like(case.x @ case.A.T).scatter_add(1, slab.flatten(1).long(), u.grad[0])
    assert_close(x.grad + through_u @ case.A, want[1])
    got = case.forward(u=u.detach())
    assert_close(got, want[0])
    assert torch.equal(case.forward(u=u.detach().mT.contiguous().mT), got)


def test_every_row_of_the_tables_runs(monkeypatch):
    """Each plan for long rows, its tiles as they are, gives the reference's result."""
    rows = [row for row in distinct_rows("fused_linear") if row.get("max_tokens", 4096) > 64]
    assert len(rows) >= 10
    for row in rows:
        phase, dtype = row["phase"], torch.float32 if row["dtype"] == "float" else torch.float16
        plans = {phase: row["plan"]}
        monkeypatch.setattr(
            dispatch, "find_plan", lambda op, phase, *args, plans=plans: plans.get(phase, small_plan())
        )
        Segments((2, 0, 20), ranks=(12, 12), in_features=136, dtype=dtype).verify(phases=[phase])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("x", torch.randn(74, 9), "weight must have shape"),
        ("weight", torch.randn(64, 104).half(), "weight must be float32"),
        ("bias", torch.randn(63), "bias must have shape"),
        ("A", torch.randn(32, 9), "A must have shape"),
        ("B", torch.randn(32, 65), "B must have shape"),
        ("indices", torch.zeros(4, 2), "indices must be int32"),
        ("weights", torch.ones(4, 3), "weights must have shape"),
        ("u", torch.zeros(1, 74, 3), "u must have shape"),
        ("weight", torch.randn(64, 104, requires_grad=True), "frozen"),
        ("owned", (2, 50), "owned"),
    ],
)
def test_rejects(field, value, message):
    value = value.to(DEVICE).detach().requires_grad_(value.requires_grad) if hasattr(value, "to") else value
    with pytest.raises(ValueError, match=message):
        Segments().forward(**{field: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_layers_take_it_for_long_rows_and_for_decoding(monkeypatch, dtype):
    model = tiny_model("llama", backend="gpu", dtype=dtype).to(DEVICE)
    routing = model.pool.search(torch.stack([clustered_embeddings(t)[0] for t in range(2)]).to(DEVICE))
    called = set()
    for name in ("segment_linear", "fused_linear", "mixture"):
        real = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *args, real=real, name=name, **kw: called.add(name) or real(*args, **kw)
        )
    half = dtype == torch.float16
    for length in (64, 3):
        ids = torch.randint(1, 96, (2, length), device=DEVICE)
        called.clear()
        with torch.no_grad():
            got = model(input_ids=ids, routing=routing).logits
            assert called == {
                "segment_linear" if half else "mixture"
            }  # in fp32 the library's product is the faster one
            model.pool.config.backend = "reference"
            want = model(input_ids=ids, routing=routing).logits
            model.pool.config.backend = "gpu"
        torch.testing.assert_close(got, want, rtol=0, atol=5e-3 if half else 1e-5)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [(8, 8, 8), (12, 1, 48)], ids=str)
@pytest.mark.parametrize("lengths", [(1,) * 20, (2, 2, 2), (1, 0, 3, 1)], ids=str)
def test_short_rows_gather_for_every_token(lengths, ranks, dtype, monkeypatch):
    """More columns than a tile takes at once too; and the kernel is the one that is meant."""
    from slm_fast.kernels import fused_linear

    real, tokenwise = fused_linear._fused_linear_fwd_kernel, []

    class Noting:
        def __getitem__(self, grid):
            return lambda **args: tokenwise.append((args["TOKENWISE"], args["EARLY"])) or real[grid](**args)

    monkeypatch.setattr(fused_linear, "_fused_linear_fwd_kernel", Noting())
    case = Segments(lengths, ranks=ranks, dtype=dtype)
    case.verify()
    fits = sum(lengths) <= 16 and max(ranks) == 8 and dtype != torch.float32  # 16 columns of 16 tokens
    assert (True, fits) in tokenwise
    frozen = case.forward(weights=torch.zeros_like(case.weights))
    without = slice(case.bounds[1], case.bounds[2])
    assert torch.equal(case.forward()[without], frozen[without])
    indices = case.indices.clone()
    indices[0, 0] = 1000  # of no entry
    wrong = case.forward(indices=indices)
    assert wrong[: lengths[0]].isnan().all() and not wrong[lengths[0] :].isnan().any()


def test_decoding_plans_never_shrink_inline():
    """The inline shrink is a resident pool's: its plan rows must not reach gathered entries."""
    Segments(lengths=(1, 1, 1), ranks=(8, 3, 12), dtype=torch.float16).verify()
