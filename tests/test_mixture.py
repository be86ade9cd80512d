"""The Triton mixture kernels: on a CUDA device where there is one, else interpreted on CPU tensors."""

import pytest
import torch
from conftest import DEVICE, KERNEL_DTYPES, distinct_rows
from test_ops import TINY, Case, assert_close
from test_ops_key_search import name_of

from slm_fast import dispatch, ops, reference

pytestmark = pytest.mark.skipif(
    dispatch.available()["gpu"] is not None, reason=str(dispatch.available()["gpu"])
)
PAIRS = [(a, b) for a in KERNEL_DTYPES for b in KERNEL_DTYPES]


def case_of(*args, **options):
    return Case(*args, **options).to(DEVICE)


def routing_of(case):
    return (case.start, case.rank, case.scaling, case.indices, case.weights, case.cu_seqlens)


def small_plan(kernel="two_pass", splits=3):
    """Tiles that no table has, smaller than every tensor of the tests, so that all loops and masks run."""
    tile = {"BLOCK_T": 16, "BLOCK_C": 16, "num_warps": 4, "num_stages": 2}
    return {
        "kernel": kernel,
        "pdl": False,
        "splits": splits,
        "one_pass": {"BLOCK_C": 16, "BLOCK_K": 32, "BLOCK_N": 32, "num_warps": 4},
        "shrink": tile | {"BLOCK_K": 32},
        "expand": tile | {"BLOCK_N": 32},
        "factors": tile | {"BLOCK_N": 32},
        "coefficients": tile,
        "weights": tile,
    }


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(dispatch, "find_plan", lambda *args, **kwargs: small_plan())


def verify_forward(case, kernel):
    from slm_fast.kernels import mixture

    y = case.y.clone()
    max_rank = int(case.rank.max())
    mixture.mixture_fwd(
        y, case.x, case.A, case.B, routing_of(case), max_rank=max_rank, plan=small_plan(kernel)
    )
    low = min((case.x_dtype, case.factor_dtype), key=lambda d: -TINY[d])
    same = case.oracle(low)[0] if low != torch.float32 else None
    assert_close(y, case.oracle()[0], same, low)
    return y


@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
@pytest.mark.parametrize("kernel", ["one_pass", "two_pass"])
def test_forward_dtypes(kernel, dtypes):
    verify_forward(case_of((3, 0, 5, 40), x_dtype=dtypes[0], factor_dtype=dtypes[1]), kernel)


@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
def test_gradients_dtypes(small_tiles, dtypes):
    case_of(x_dtype=dtypes[0], factor_dtype=dtypes[1]).verify("gpu")


@pytest.mark.parametrize(
    "ranks", [(1,) * 3, (3,) * 3, (8,) * 3, (12,) * 3, (48,) * 3, (2, 12, 1, 48, 3, 8)], ids=name_of
)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name_of)
def test_ranks(ranks, dtype):
    case_of(ranks=ranks, top_k=3, x_dtype=dtype, factor_dtype=dtype).verify("gpu")


@pytest.mark.parametrize(
    "sizes", [(1, 1), (1, 100), (63, 1), (7, 1000), (1000, 63), (100, 1200)], ids=name_of
)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name_of)
def test_sizes(sizes, dtype):
    case_of(in_features=sizes[0], out_features=sizes[1], x_dtype=dtype, factor_dtype=dtype).verify("gpu")


def test_vocabulary_sized_output(monkeypatch):
    wide = small_plan()
    wide["shrink"]["BLOCK_K"] = wide["expand"]["BLOCK_N"] = wide["factors"]["BLOCK_N"] = 1024
    monkeypatch.setattr(dispatch, "find_plan", lambda *args: wide)
    case_of(lengths=(2, 1, 3), in_features=32001, out_features=32001).verify("gpu")


@pytest.mark.parametrize("kind", ["distinct", "uniform", "zipf", "identical"])
@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_popularity_and_top_k(kind, top_k):
    case_of(lengths=(1,) * 12, ranks=(3,) * 8, top_k=top_k, kind=kind).verify("gpu")


@pytest.mark.parametrize("lengths", [(), (0, 0), (1,), (1000,), (63, 0, 1, 200), (0, 0, 17)], ids=name_of)
def test_lengths(lengths):
    case = case_of(lengths=lengths)
    if sum(lengths):
        case.verify("gpu")
    else:
        assert case.forward("gpu").shape == (0, 63)
        if lengths:
            assert all(not g.any() for g in case.train("gpu"))


@pytest.mark.parametrize("kernel", ["one_pass", "two_pass"])
@pytest.mark.parametrize("lengths", [(1,) * 5, (4, 4), (5, 0, 1, 17, 2)], ids=name_of)
def test_both_kernels_on_ragged_batches(kernel, lengths):
    verify_forward(case_of(lengths, (3, 12, 1, 8), 3, in_features=130), kernel)


def test_every_row_of_the_tables_runs():
    """Each plan of each architecture, its tiles as they are, gives the reference's result."""
    from slm_fast.kernels import mixture

    rows = distinct_rows("mixture")
    assert len(rows) >= 10
    for row in rows:
        dtype = torch.float32 if row["dtype"] == "float" else torch.float16
        case = case_of((2, 0, 70), (12, 8, 8), in_features=200, x_dtype=dtype, factor_dtype=dtype)
        max_rank, want = int(case.rank.max()), case.oracle()
        y = case.y.clone()
        if row["phase"] == "forward":
            mixture.mixture_fwd(
                y, case.x, case.A, case.B, routing_of(case), max_rank=max_rank, plan=row["plan"]
            )
            assert_close(y, want[0], case.oracle(dtype)[0], dtype)
        else:
            u = mixture.mixture_fwd(
                y,
                case.x,
                case.A,
                case.B,
                routing_of(case),
                max_rank=max_rank,
                plan=small_plan(),
                save_u=True,
            )
            *grads, _ = mixture.mixture_bwd(
                case.dy,
                case.x,
                u,
                case.A,
                case.B,
                routing_of(case),
                max_rank=max_rank,
                plan=row["plan"],
                owned=case.owned,
                needs=(True,) * 4,
            )
            wanted = [want[2], want[4], want[5], want[3]]
            low = case.oracle(dtype)
            for got, exact, same in zip(grads, wanted, [low[2], low[4], low[5], low[3]], strict=True):
                assert_close(got, exact, same, dtype)


@pytest.mark.parametrize("kernel", ["one_pass", "two_pass"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name_of)
def test_rows_without_weights_keep_their_bits(monkeypatch, kernel, dtype):
    monkeypatch.setattr(dispatch, "find_plan", lambda *args: small_plan(kernel))
    case = case_of(lengths=(4, 4, 4), x_dtype=dtype, factor_dtype=dtype)
    case.weights[:] = 0
    case.y[0, 0], case.y[1, 1], case.y[2, 2] = -0.0, torch.nan, torch.inf
    case.x[0, 0] = torch.nan
    case.A[0, 0] = torch.inf
    bits = {4: torch.int32, 2: torch.int16}[case.y.element_size()]
    assert torch.equal(case.forward("gpu").view(bits), case.y.view(bits))


@pytest.mark.parametrize("kernel", ["one_pass", "two_pass"])
def test_picks_without_weight_are_not_read(monkeypatch, kernel):
    monkeypatch.setattr(dispatch, "find_plan", lambda *args: small_plan(kernel))
    case = case_of(lengths=(4, 4, 4), ranks=(8, 3, 12), top_k=3, kind="identical")
    case.weights[:, 2] = 0
    case.indices[:, 2] = 10**6
    case.A[11:], case.B[11:] = torch.nan, torch.nan
    assert case.forward("gpu").isfinite().all()
    out, _, dx, dweights, _, _ = case.train("gpu")
    assert out.isfinite().all() and dx.isfinite().all()
    assert not dweights[:, 2].any()


@pytest.mark.parametrize("kernel", ["one_pass", "two_pass"])
@pytest.mark.parametrize("index", [-1, 4, 2**31 - 1])
def test_an_index_outside_the_pool_makes_its_row_nan(monkeypatch, kernel, index):
    monkeypatch.setattr(dispatch, "find_plan", lambda *args: small_plan(kernel))
    case = case_of(lengths=(4, 4, 4))
    want = case.forward("gpu")
    case.indices[2, 1] = index
    got = case.forward("gpu")
    assert got[8:].isnan().all() and torch.equal(got[:8], want[:8])


@pytest.mark.parametrize("bounds", [[0, 2, 6], [0, 7, 5], [-3, 2, 5], [2, 3, 4]])
def test_bounds_beyond_the_tokens_are_cut(bounds):
    case = case_of(lengths=(2, 3))
    guard = torch.full((64, 63), 7.0, device=DEVICE)
    case.y = torch.cat([case.y, guard])[:5]
    case.cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    assert case.forward("gpu").shape == (5, 63)
    assert (guard == 7).all()


def test_empty_pool():
    case = case_of(lengths=(2, 2), ranks=(8,), top_k=1)
    empty = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    args = (case.A[:0], case.B[:0], empty, empty, case.scaling[:0])
    zeros = torch.zeros(2, 1, device=DEVICE)
    got = ops.mixture(case.y.clone(), case.x, *args, zeros.int(), zeros, backend="gpu")
    assert torch.equal(got, case.y)


def test_leading_dimensions_and_strides():
    case = case_of(lengths=(5, 5, 5))
    want = case.forward("gpu")
    args = (case.A, case.B, case.start, case.rank, case.scaling, case.indices, case.weights)
    x = case.x.view(3, 5, -1).transpose(0, 1).contiguous().transpose(0, 1)
    y = case.y.view(3, 5, -1).transpose(0, 1).contiguous().transpose(0, 1)
    out = ops.mixture(y, x, *args, backend="gpu")
    assert out is y and torch.equal(out.reshape_as(want), want)
    wide = torch.nn.functional.pad(case.A, (0, 3))[:, :-3]
    assert torch.equal(ops.mixture(case.y.clone(), case.x, wide, *args[1:], backend="gpu"), want)


@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
def test_a_row_does_not_depend_on_its_batch(small_tiles, dtypes):
    case = case_of((1, 0, 37, 5, 2), (2, 12, 3), 3, 40, 33, x_dtype=dtypes[0], factor_dtype=dtypes[1])
    out, _, dx = case.train("gpu")[:3]
    pool = (case.A, case.B, case.start, case.rank, case.scaling)
    for row in range(5):
        segment = slice(case.bounds[row], case.bounds[row + 1])
        x = case.x[segment].clone().requires_grad_()
        alone = ops.mixture(
            case.y[segment].clone(),
            x,
            *pool,
            case.indices[row : row + 1],
            case.weights[row : row + 1],
            backend="gpu",
        )
        alone.backward(case.dy[segment])
        assert torch.equal(alone, out[segment]) and torch.equal(x.grad, dx[segment])


def test_repetitions_give_the_same_bits():
    case = case_of((33, 0, 5, 6), (8, 12, 3), 3)
    first = case.train("gpu")
    for _ in range(20 if DEVICE == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(case.train("gpu"), first, strict=True))


@pytest.mark.parametrize("backend", ["gpu", "reference"])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (3, 0, 20)], ids=name_of)
def test_given_rank_space_vectors(backend, lengths):
    case = case_of(lengths=lengths, ranks=(3, 12, 8))
    max_rank, num_tokens = int(case.rank.max()), sum(lengths)
    u = torch.zeros(2, num_tokens, 2 * max_rank, device=DEVICE)
    for b, picks in enumerate(case.indices.tolist()):
        segment = slice(case.bounds[b], case.bounds[b + 1])
        for k, i in enumerate(picks):
            begin, r = int(case.start[i]), int(case.rank[i])
            u[1, segment, k * max_rank : k * max_rank + r] = case.x[segment] @ case.A[begin : begin + r].T
    u[0] = 0.25 * u[1]
    u[1] *= 0.75
    u, weights, y = (t.clone().requires_grad_() for t in (u, case.weights, case.y))
    B_owned = torch.nn.Parameter(case.B[slice(*case.owned)])
    out = ops.mixture(
        y * 1,
        case.x,
        case.A,
        case.B,
        *routing_of(case)[:4],
        weights,
        case.cu_seqlens,
        u=u,
        B_owned=B_owned,
        owned=case.owned,
        backend=backend,
    )
    out.backward(case.dy)
    want = case.oracle()
    for got, exact in zip(
        (out, y.grad, weights.grad, B_owned.grad), (*want[:2], want[3], want[5]), strict=True
    ):
        assert_close(got.detach(), exact)
    # The chain rule through u = A x gives the oracle's dx.
    dx = torch.zeros_like(case.x)
    for b, picks in enumerate(case.indices.tolist()):
        segment = slice(case.bounds[b], case.bounds[b + 1])
        for k, i in enumerate(picks):
            begin, r = int(case.start[i]), int(case.rank[i])
            dx[segment] += u.grad[1, segment, k * max_rank : k * max_rank + r] @ case.A[begin : begin + r]
    assert_close(dx, want[2])
    assert torch.equal(u.grad[0], u.grad[1])


def test_reference_passes_gradcheck():
    case = Case(lengths=(3, 0, 2), ranks=(2, 3), in_features=5, out_features=4)
    inputs = [t.double().requires_grad_() for t in (case.y, case.x, case.A, case.B, case.weights)]

    def run(y, x, A, B, weights):
        return reference.mixture(
            y, x, A, B, case.start, case.rank, case.scaling, case.indices, weights, case.cu_seqlens
        )

    with torch.no_grad():
        inputs[4][inputs[4] == 0] = 0.5  # the reference treats a weight of exactly 0 as a pick not made
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.slow
def test_offsets_beyond_31_bits():
    """2^31 + 2^20 fp16 elements in x, then in y: 4.3 GB. Only the last token has a row with weights."""
    from slm_fast.kernels import mixture

    wide, num_tokens = 1 << 20, (1 << 11) + 1
    big = torch.zeros(num_tokens, wide, dtype=torch.float16, device=DEVICE)
    signs = torch.ones(1, wide, dtype=torch.float16, device=DEVICE)
    signs[0, ::2] = -1
    ones = torch.ones(1, 3, dtype=torch.float16, device=DEVICE)
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    routing = (
        zero,
        zero + 1,
        torch.ones(1, device=DEVICE),
        torch.zeros(2, 1, dtype=torch.int32, device=DEVICE),
        torch.tensor([[0.0], [1.0]], device=DEVICE),
        torch.tensor([0, num_tokens - 1, num_tokens], dtype=torch.int32, device=DEVICE),
    )
    wide_tiles = small_plan() | {
        "splits": 1,
        "shrink": {"BLOCK_T": 64, "BLOCK_C": 16, "BLOCK_K": 128, "num_warps": 4},
        "expand": {"BLOCK_T": 64, "BLOCK_C": 16, "BLOCK_N": 128, "num_warps": 4},
    }
    if DEVICE == "cpu":  # fewer and larger steps of the interpreter
        wide_tiles["shrink"]["BLOCK_K"] = wide_tiles["expand"]["BLOCK_N"] = 1 << 14
    big[-1] = torch.linspace(-1, 1, wide, device=DEVICE)
    y = torch.zeros(num_tokens, 3, dtype=torch.float16, device=DEVICE)
    mixture.mixture_fwd(y, big, signs, ones, routing, max_rank=1, plan=wide_tiles)
    want = (big[-1].double() @ signs[0].double()).item()
    assert not y[:-1].any() and abs(y[-1, 0].item() - want) <= 1e-2 * abs(want)
    x = torch.ones(num_tokens, 3, dtype=torch.float16, device=DEVICE)
    big[-1] = 0
    mixture.mixture_fwd(big, x, ones, signs, routing, max_rank=1, plan=wide_tiles)
    assert torch.equal(big[-1], 3 * signs[0]) and not big[0].any() and not big[-2].any()
