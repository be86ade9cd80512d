import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from test_ops_key_search import DTYPES, check_search, name_of, search_case

from slm_fast import dispatch, ops

TINY = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# The gpu backend has test_mixture.py and test_fused_linear.py.
BACKENDS = [name for name, reason in dispatch.available().items() if reason is None and name != "gpu"]
SIZES = [(1, 1), (1, 100), (63, 1), (7, 1000), (1000, 63), (100, 3424)]
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="extension not built")


def assert_close(got, want32, same_dtype=None, dtype=torch.float32):
    """At most twice the error of same-dtype torch against fp32, plus tiny, relative to the largest value."""
    scale = want32.float().abs().max().clamp(min=1e-6) if want32.numel() else 1.0
    allowed = 0.0
    if want32.numel() and same_dtype is not None:
        allowed = 2 * (same_dtype.float() - want32.float()).abs().max() / scale
    assert got.isfinite().all()
    if want32.numel():
        error = (got.float() - want32.float()).abs().max() / scale
        assert error <= allowed + TINY[dtype], f"error {error:.2e}, allowed {allowed + TINY[dtype]:.2e}"


def popularity(kind, num_rows, num_entries, top_k, generator):
    if kind == "identical":
        return torch.arange(top_k).expand(num_rows, top_k).int().contiguous()
    if kind == "distinct":
        return ((torch.arange(num_rows * top_k) % num_entries).view(num_rows, top_k)).int()
    probabilities = torch.ones(num_entries)
    if kind == "zipf":
        probabilities = 1 / torch.arange(1, num_entries + 1).float()
    picks = torch.multinomial(probabilities.expand(max(num_rows, 1), -1), top_k, generator=generator)
    return picks[:num_rows].int()


class Case:
    """Inputs of one mixture call; row 1 has no weights, and the rows after the first entry are owned."""

    def __init__(
        self,
        lengths=(3, 0, 5, 66),
        ranks=(8, 8, 8, 8),
        top_k=2,
        in_features=100,
        out_features=63,
        x_dtype=torch.float32,
        factor_dtype=torch.float32,
        kind="uniform",
        seed=0,
    ):
        g = torch.Generator().manual_seed(seed)
        self.rank = torch.tensor(ranks, dtype=torch.int32)
        self.start = (self.rank.cumsum(0) - self.rank).int()
        total = sum(ranks)
        self.A = (torch.randn(total, in_features, generator=g) / in_features**0.5).to(factor_dtype)
        self.B = (torch.randn(total, out_features, generator=g) / max(total, 1) ** 0.5).to(factor_dtype)
        self.scaling = torch.rand(len(ranks), generator=g) + 0.5
        num_rows, num_tokens = len(lengths), sum(lengths)
        self.indices = popularity(kind, num_rows, len(ranks), top_k, g)
        self.weights = torch.randn(num_rows, top_k, generator=g)
        if num_rows > 1:
            self.weights[1] = 0
        bounds = torch.tensor((0, *lengths)).cumsum(0).int()
        self.cu_seqlens = None if len(set(lengths)) <= 1 else bounds
        self.bounds = bounds.tolist()
        self.x = torch.randn(num_tokens, in_features, generator=g).to(x_dtype)
        self.y = torch.randn(num_tokens, out_features, generator=g).to(x_dtype)
        self.dy = torch.randn(num_tokens, out_features, generator=g).to(x_dtype)
        self.owned = (ranks[0] if len(ranks) > 1 else 0, total)
        self.x_dtype, self.factor_dtype = x_dtype, factor_dtype

    def to(self, device):
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        return self

    def forward(self, backend):
        return ops.mixture(
            self.y.clone(),
            self.x,
            self.A,
            self.B,
            self.start,
            self.rank,
            self.scaling,
            self.indices,
            self.weights,
            self.cu_seqlens,
            backend=backend,
        )

    def train(self, backend):
        """[out, dy, dx, dweights, dA, dB] through ops.mixture."""
        x, y, weights = (t.clone().requires_grad_() for t in (self.x, self.y, self.weights))
        rows = slice(*self.owned)
        A_owned, B_owned = torch.nn.Parameter(self.A[rows]), torch.nn.Parameter(self.B[rows])
        out = ops.mixture(
            y * 1,
            x,
            self.A,
            self.B,
            self.start,
            self.rank,
            self.scaling,
            self.indices,
            weights,
            self.cu_seqlens,
            A_owned=A_owned,
            B_owned=B_owned,
            owned=self.owned,
            backend=backend,
        )
        out.backward(self.dy)
        return [out.detach(), y.grad, x.grad, weights.grad, A_owned.grad, B_owned.grad]

    def oracle(self, dtype=torch.float32):
        """The same by autograd of the plain formula, computed in `dtype`."""
        x, y, A, B, weights = (
            t.detach().to(dtype).requires_grad_() for t in (self.x, self.y, self.A, self.B, self.weights)
        )
        out = []
        for b, picks in enumerate(self.indices.tolist()):
            segment = slice(self.bounds[b], self.bounds[b + 1])
            update = y[segment]
            for k, i in enumerate(picks):
                if self.weights[b, k] == 0:
                    continue
                rows = slice(int(self.start[i]), int(self.start[i] + self.rank[i]))
                scale = (weights[b, k] * self.scaling[i]).to(dtype)
                update = update + (x[segment] @ A[rows].T * scale) @ B[rows]
            out.append(update)
        out = torch.cat(out)
        leaves = (y, x, weights, A, B)
        grads = torch.autograd.grad(out, leaves, self.dy.to(dtype), allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True)]
        rows = slice(*self.owned)
        return [out.detach(), grads[0], grads[1], grads[2], grads[3][rows], grads[4][rows]]

    def verify(self, backend):
        want = self.oracle()
        got = self.train(backend)
        low = min((self.x_dtype, self.factor_dtype), key=lambda d: -TINY[d])
        same = self.oracle(low) if low != torch.float32 else [None] * len(want)
        for g, w, s in zip(got, want, same, strict=True):
            assert_close(g, w, s, low)
        if backend == "gpu":  # without gradients it may split the sum over in_features
            assert_close(self.forward(backend), want[0], same[0], low)
        else:
            assert torch.equal(self.forward(backend), got[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name_of)
def test_mixture_dtypes(backend, x_dtype, factor_dtype):
    Case(x_dtype=x_dtype, factor_dtype=factor_dtype).verify(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "ranks", [(1,) * 3, (3,) * 3, (8,) * 3, (12,) * 3, (48,) * 3, (2, 12, 1, 48, 3, 8)], ids=name_of
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_mixture_ranks(backend, ranks, dtype):
    Case(ranks=ranks, top_k=3, x_dtype=dtype, factor_dtype=dtype).verify(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes", [(1, 1), (1, 100), (63, 1), (7, 1000), (1000, 63), (100, 3424)], ids=name_of
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_mixture_sizes(backend, sizes, dtype):
    Case(in_features=sizes[0], out_features=sizes[1], x_dtype=dtype, factor_dtype=dtype).verify(backend)


def test_mixture_vocabulary_sized_output():
    Case(lengths=(2, 1, 3), in_features=32001, out_features=32001).verify(None)


@pytest.mark.parametrize("kind", ["distinct", "uniform", "zipf", "identical"])
@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_mixture_popularity_and_top_k(kind, top_k):
    Case(lengths=(1,) * 100, ranks=(3,) * 8, top_k=top_k, kind=kind).verify(None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(), (0, 0), (1,), (1000,), (63, 0, 1, 200)], ids=name_of)
def test_mixture_lengths(backend, lengths):
    if sum(lengths):
        Case(lengths=lengths).verify(backend)
    else:
        case = Case(lengths=lengths)
        assert case.forward(backend).shape == (0, 63)
        if lengths:
            assert all(not g.any() for g in case.train(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixture_empty_pool(backend):
    case = Case(lengths=(2, 2), ranks=(8,), top_k=1)
    empty = torch.zeros(0, dtype=torch.int32)
    args = (case.A[:0], case.B[:0], empty, empty, torch.zeros(0))
    zeros = torch.zeros(2, 1)
    assert torch.equal(
        ops.mixture(case.y.clone(), case.x, *args, zeros.int(), zeros, backend=backend), case.y
    )
    with pytest.raises(ValueError, match="indices"):
        ops.mixture(case.y.clone(), case.x, *args, zeros.int(), zeros + 1, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixture_leading_dimensions_and_strides(backend):
    case = Case(lengths=(5, 5, 5))
    want = case.forward(backend)
    args = (case.A, case.B, case.start, case.rank, case.scaling, case.indices, case.weights)
    x = case.x.view(3, 5, -1).transpose(0, 1).contiguous().transpose(0, 1)
    y = case.y.view(3, 5, -1).transpose(0, 1).contiguous().transpose(0, 1)
    assert not x.is_contiguous() and not y.is_contiguous()
    out = ops.mixture(y, x, *args, backend=backend)
    assert out is y and torch.equal(out.reshape_as(want), want)
    wide = torch.nn.functional.pad(case.A, (0, 3))[:, :-3]
    assert torch.equal(ops.mixture(case.y.clone(), case.x, wide, *args[1:], backend=backend), want)


def test_mixture_after_linear_with_a_view():
    case = Case(lengths=(5, 5, 5))
    linear = torch.nn.Linear(100, 63)
    args = (case.A, case.B, case.start, case.rank, case.scaling, case.indices, case.weights)
    grads = []
    for backend in BACKENDS:
        x = case.x.view(3, 5, -1).clone().requires_grad_()
        ops.mixture(linear(x), x, *args, backend=backend).square().sum().backward()
        grads.append(x.grad)
    for grad in grads[1:]:
        assert_close(grad, grads[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rows_without_weights_keep_their_bits(backend, dtype):
    case = Case(lengths=(4, 4, 4), x_dtype=dtype, factor_dtype=dtype)
    case.weights[:] = 0
    case.y[0, 0], case.y[1, 1], case.y[2, 2] = -0.0, torch.nan, torch.inf
    case.x[0, 0] = torch.nan
    case.A[0, 0] = torch.inf
    bits = {4: torch.int32, 2: torch.int16}[case.y.element_size()]
    assert torch.equal(case.forward(backend).view(bits), case.y.view(bits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_picks_without_weight_are_not_read(backend):
    case = Case(lengths=(4, 4, 4), ranks=(8, 3, 12), top_k=3, kind="identical")
    case.weights[:, 2] = 0
    case.A[11:], case.B[11:] = torch.nan, torch.nan
    out, _, dx, dweights, _, _ = case.train(backend)
    assert out.isfinite().all() and dx.isfinite().all()
    assert not dweights[:, 2].any()


def run_alone(case, row):
    alone = slice(case.bounds[row], case.bounds[row + 1])
    pool = (case.A, case.B, case.start, case.rank, case.scaling)
    picks, weights = case.indices[row : row + 1], case.weights[row : row + 1]
    x = case.x[alone].clone().requires_grad_()
    out = ops.mixture(case.y[alone].clone(), x, *pool, picks, weights)
    out.backward(case.dy[alone])
    return out.detach(), x.grad


@needs_cpu
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=name_of)
def test_mixture_does_not_depend_on_the_batch(dtypes):
    case = Case(
        lengths=(1, 0, 67, 5, 2, 130),
        ranks=(2, 12, 3),
        top_k=3,
        x_dtype=dtypes[0],
        factor_dtype=dtypes[1],
        in_features=101,
    )
    out, _, dx = case.train("cpu")[:3]
    for row in range(6):
        segment = slice(case.bounds[row], case.bounds[row + 1])
        alone, dx_alone = run_alone(case, row)
        assert torch.equal(alone, out[segment]) and torch.equal(dx_alone, dx[segment])
    # A token alone, as in decoding after a prefill.
    case_one = Case(
        lengths=(1,), ranks=(2, 12, 3), top_k=3, x_dtype=dtypes[0], factor_dtype=dtypes[1], in_features=101
    )
    case_one.A, case_one.B, case_one.scaling = case.A, case.B, case.scaling
    case_one.indices, case_one.weights = case.indices[5:], case.weights[5:]
    for t in range(case.bounds[5], case.bounds[6], 31):
        case_one.x, case_one.y = case.x[t : t + 1], case.y[t : t + 1]
        assert torch.equal(case_one.forward("cpu"), out[t : t + 1])


def in_longer_rows(case):
    """What rows of one token give as rows of two, both that token: other loops do those."""
    longer = copy.copy(case)
    longer.x, longer.y = (t.repeat_interleave(2, 0) for t in (case.x, case.y))
    first, second = longer.forward("cpu").unflatten(0, (-1, 2)).unbind(1)
    assert torch.equal(first, second)
    return first


@needs_cpu
@pytest.mark.parametrize("sizes", [(101, 203), (96, 24), (24, 96)])
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=name_of)
def test_rows_that_decode_do_not_depend_on_the_batch(dtypes, sizes):
    """Rows of one token, which ask for factors of rows after them: fewer of them, more, or none."""
    options = dict(ranks=(2, 12, 3, 0, 9), top_k=3, x_dtype=dtypes[0], factor_dtype=dtypes[1])
    case = Case((1,) * 9, in_features=sizes[0], out_features=sizes[1], **options)
    case.verify("cpu")
    out = case.forward("cpu")
    assert torch.equal(out[1], case.y[1])  # no weights
    for row in range(9):
        assert torch.equal(run_alone(case, row)[0], out[row : row + 1])
    assert torch.equal(in_longer_rows(case), out)


@needs_cpu
@pytest.mark.parametrize("lengths", [(300, 0, 17), (1,) * 2, (1,) * 16], ids=len)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_mixture_does_not_depend_on_threads(dtype, lengths):
    """Rows that decode are whole tasks of threads, or too few for that and cut."""
    ranks = (8, 48, 3) if len(lengths) == 3 else (200, 180, 60)
    case = Case(lengths, ranks=ranks, top_k=3, in_features=330, out_features=400, x_dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append([*case.train("cpu"), case.forward("cpu")])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def isa_check(isa):
    """Run in a subprocess with SLM_FAST_ISA set: right results, the same bits for any threads and batch."""
    assert dispatch.cpu_info()["isa"] == isa
    for x_dtype, factor_dtype in zip(DTYPES * 3, [d for d in DTYPES for _ in range(3)], strict=True):
        case = Case((1, 0, 67), (2, 12, 48), 3, x_dtype=x_dtype, factor_dtype=factor_dtype)
        case.verify("cpu")
        row, _ = run_alone(case, 2)
        assert torch.equal(row, case.forward("cpu")[case.bounds[2] :])
        decoding = Case((1,) * 8, (2, 12, 48), 3, x_dtype=x_dtype, factor_dtype=factor_dtype)
        decoding.verify("cpu")
        alone = [run_alone(decoding, b)[0] for b in range(8)]
        assert torch.equal(torch.cat(alone), decoding.forward("cpu"))
        assert torch.equal(torch.cat(alone), in_longer_rows(decoding))
    case = Case((1, 0, 1000), (2, 12, 48), 3)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(case.train("cpu"))
        for key_dtype in DTYPES:
            query, keys = search_case(33, 1500, 101, key_dtype)
            found = ops.key_search(query, keys, top_k=5, backend="cpu")
            check_search(found, query, keys, top_k=5)
            results[-1] += found
            coded = ops.key_search(query, keys, top_k=5, codes=ops.key_codes(keys), backend="cpu")
            assert all(torch.equal(a, f) for a, f in zip(coded, found, strict=True))
            for b in (0, 31, 32):
                alone = ops.key_search(query[b : b + 1], keys, top_k=5, backend="cpu")
                assert all(torch.equal(a[0], f[b]) for a, f in zip(alone, found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_cpu
@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "baseline"])
def test_every_instruction_set(isa):
    from slm_fast import _C

    if isa not in _C.isa_supported():
        pytest.skip("not supported by this processor")
    env = os.environ | {"SLM_FAST_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
    code = f"import test_ops; test_ops.isa_check({isa!r})"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@needs_cpu
@pytest.mark.slow
def test_offsets_beyond_31_bits():
    # 2^31 + 64 bf16 elements in x alone: 4.3 GB. Only the last token has a row with weights.
    in_features, num_tokens = 1 << 20, (1 << 11) + 1
    x = torch.empty(num_tokens, in_features, dtype=torch.bfloat16)
    x[-1] = 2.0**-10 * (1 + torch.arange(in_features) % 3)
    assert x.numel() > 2**31
    A = torch.ones(1, in_features, dtype=torch.bfloat16)
    A[0, ::2] = -2  # every sum of products is a multiple of 2^-10 below 2^12: exact in fp32 in any order
    pool = (
        A,
        torch.ones(1, 3, dtype=torch.bfloat16),
        torch.zeros(1).int(),
        torch.ones(1).int(),
        torch.ones(1),
    )
    indices, weights = torch.zeros(2, 1).int(), torch.tensor([[0.0], [1.0]])
    cu_seqlens = torch.tensor([0, num_tokens - 1, num_tokens], dtype=torch.int32)
    y = torch.zeros(num_tokens, 3, dtype=torch.bfloat16)
    ops.mixture(y, x, *pool, indices, weights, cu_seqlens)
    assert not y[:-1].any()
    assert torch.equal(y[-1], (x[-1].double() @ A[0].double()).bfloat16().expand(3)) and y[-1].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("x", torch.randn(6, 9), "A must have shape"),
        ("x", torch.randn(6, 8).half(), "y must be"),
        ("x", torch.randn(6, 8).double(), "x must be"),
        ("y", torch.randn(5, 4), "y must have shape"),
        ("B", torch.randn(3, 4), "B must have shape"),
        ("B", torch.randn(4, 4).half(), "B must be"),
        ("indices", torch.zeros(2, 1).long(), "indices must be int32"),
        ("indices", torch.tensor([[0], [2]], dtype=torch.int32), "indices must lie in 0..1"),
        ("indices", torch.tensor([[-1], [0]], dtype=torch.int32), "indices must lie in 0..1"),
        ("weights", torch.ones(3, 1), "weights must have shape"),
        ("scaling", torch.ones(1), "scaling"),
        ("cu_seqlens", torch.tensor([0, 6], dtype=torch.int32), "cu_seqlens"),
        ("owned", (2, 5), "owned"),
        ("A_owned", torch.randn(1, 8), "A_owned"),
    ],
)
def test_mixture_rejects(backend, field, value, message):
    args = {
        "y": torch.randn(6, 4),
        "x": torch.randn(6, 8),
        "A": torch.randn(4, 8),
        "B": torch.randn(4, 4),
        "start": torch.tensor([0, 2], dtype=torch.int32),
        "rank": torch.tensor([2, 2], dtype=torch.int32),
        "scaling": torch.ones(2),
        "indices": torch.zeros(2, 1).int(),
        "weights": torch.ones(2, 1),
    }
    with pytest.raises(ValueError, match=message):
        ops.mixture(**args | {field: value}, backend=backend)


def test_mixture_rejects_tokens_that_cannot_be_shared():
    case = Case(lengths=(5,))
    case.indices, case.weights = case.indices.repeat(2, 1), case.weights.repeat(2, 1)
    with pytest.raises(ValueError, match="5 tokens"):
        case.forward(None)


def plain_mixture(case, **changed):
    """Whether the extension takes the tensors as they are, and y after it."""
    y = changed.pop("y", case.y.clone())
    names = ("x", "A", "B", "start", "rank", "scaling", "indices", "weights", "cu_seqlens")
    return dispatch.mixture_tensors(y, *(changed.get(n, getattr(case, n)) for n in names)), y


@needs_cpu
@pytest.mark.skipif(dispatch.mixture_tensors is None, reason="this torch has no DLPack table")
def test_what_goes_straight_to_the_extension(monkeypatch):
    for x_dtype, factor_dtype in itertools.product(DTYPES, DTYPES):
        for lengths in ((3, 0, 5, 66), (1,) * 4):
            case = Case(lengths, x_dtype=x_dtype, factor_dtype=factor_dtype)
            took, y = plain_mixture(case)
            assert took and torch.equal(y, case.train("cpu")[0]) and not torch.equal(y, case.y)
    case = Case((2,) * 4)
    leading = [t.unflatten(0, (4, 2)) for t in (case.x, case.y.clone())]
    took, y = plain_mixture(case, x=leading[0], y=leading[1])
    assert took and torch.equal(y.flatten(0, 1), case.train("cpu")[0])
    none = plain_mixture(Case((0,) * 4))
    assert none[0] and none[1].shape == (0, 63)
    wrong = [
        {"x": case.x.T.contiguous().T},
        {"x": case.x.double()},
        {"x": case.x.half()},
        {"x": case.x[0]},
        {"x": case.x[:7]},
        {"x": case.x[:, :99].contiguous()},
        {"x": torch.nn.Parameter(case.x)},
        {"x": case.x.to("meta")},
        {"x": None},
        {"y": case.y[:, None].clone()},
        {"y": case.y[:, :62].contiguous()},
        {"A": case.A.half()},
        {"A": case.A[:31]},
        {"B": case.B.T.contiguous().T},
        {"start": case.start.long()},
        {"start": case.start[:3]},
        {"rank": case.rank[:3]},
        {"scaling": case.scaling.half()},
        {"indices": case.indices.long()},
        {"indices": case.indices[:3], "weights": case.weights[:3]},
        {"weights": case.weights[:, :1].contiguous()},
        {"weights": case.weights.half()},
        {"cu_seqlens": torch.tensor([0, 2, 8], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, 2, 4, 6, 8])},
    ]
    for changed in wrong:
        before = changed["y"].clone() if "y" in changed else case.y
        took, y = plain_mixture(case, **changed)
        assert took is False and torch.equal(y, before), changed
    with pytest.raises(ValueError, match=r"indices must lie in 0\.\.3"):
        plain_mixture(case, indices=case.indices + 4, weights=torch.ones_like(case.weights))
    monkeypatch.setenv("SLM_FAST_BACKEND", "reference")
    assert not plain_mixture(case)[0]
    monkeypatch.setenv("SLM_FAST_BACKEND", "cpu")
    asked = []
    monkeypatch.setattr(dispatch, "mixture_tensors", lambda *tensors: asked.append(tensors) or False)
    assert torch.equal(case.forward("cpu"), case.train("cpu")[0])
    assert len(asked) == 1  # by the former: the latter needs gradients
    case.forward("reference")
    assert len(asked) == 1


@needs_cpu
def test_cpu_backend_never_reads_out_of_bounds():
    case = Case(lengths=(2, 3))
    for bounds in ([0, 2, 6], [1, 2, 5], [0, 7, 5]):
        case.cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens"):
            case.forward("cpu")
    case.cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    case.rank[:] = 1000
    with pytest.raises(ValueError, match="slab"):
        case.forward("cpu")
