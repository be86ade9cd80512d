import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_ops import DTYPES, assert_close, name_of, needs_cpu

from slm_fast import dispatch
from slm_fast.cpu_linear import LayerTail, LinearGroup, Rotation, step_routing
from slm_fast.factors import Factors

pytestmark = needs_cpu
RANKS = (8, 3, 12, 1)
EPS = 1e-5


class Case:
    """Inputs of one call; the middle row has no weights, the last linear of several has no factors."""

    def __init__(
        self,
        lengths=(1,) * 8,
        sizes=(63, 100),
        in_features=100,
        prologue="none",
        dtype=torch.float32,
        factor_dtype=torch.float32,
        top_k=2,
        bias=True,
        seed=0,
    ):
        g = torch.Generator().manual_seed(seed)

        def randn(*shape, dtype=dtype):
            return torch.randn(*shape, generator=g).to(dtype)

        self.prologue, self.dtype, self.top_k = prologue, dtype, top_k
        num_rows, num_tokens, total = len(lengths), sum(lengths), sum(RANKS)
        self.x, self.x2 = randn(num_tokens, in_features), None
        if prologue == "silu_mul":
            self.x2 = randn(num_tokens, in_features)
        self.residual = randn(num_tokens, sizes[0]) if len(sizes) == 1 else None
        self.norm_weight = randn(in_features) if prologue == "rms_norm" else None
        self.linears = []
        for i, n in enumerate(sizes):
            A = randn(total, in_features, dtype=torch.float32) / in_features**0.5
            pair = (A.to(factor_dtype), randn(total, n, dtype=factor_dtype))
            weight = (randn(n, in_features, dtype=torch.float32) / in_features**0.5).to(dtype)
            has_factors = i == 0 or i < len(sizes) - 1
            self.linears.append((weight, randn(n) if bias else None, pair if has_factors else None))
        self.rank = torch.tensor(RANKS, dtype=torch.int32)
        self.start = (self.rank.cumsum(0) - self.rank).int()
        self.scaling = torch.rand(len(RANKS), generator=g) + 0.5
        self.indices = torch.randint(len(RANKS), (num_rows, top_k), generator=g).int()
        self.weights = torch.randn(num_rows, top_k, generator=g)
        self.weights[num_rows // 2 : num_rows // 2 + 1] = 0
        self.bounds = torch.tensor((0, *lengths)).cumsum(0).int()
        self.cu_seqlens = None if len(set(lengths)) <= 1 else self.bounds
        self.row_of_token = torch.repeat_interleave(torch.arange(num_rows), torch.tensor(lengths).long())

    def group(self):
        settings = {"prologue": self.prologue, "eps": EPS, "norm_weight": self.norm_weight}
        return LinearGroup(self.linears, **settings)

    def routing(self, **replaced):
        args = {name: getattr(self, name) for name in ("start", "rank", "scaling", "indices", "weights")}
        args |= {"cu_seqlens": self.cu_seqlens, "total_rank": sum(RANKS), "num_tokens": len(self.x)}
        return step_routing(**args | replaced)

    def run(self, tokens=slice(None), routing=None, out=None):
        x2, residual = (None if t is None else t[tokens] for t in (self.x2, self.residual))
        return self.group()(self.x[tokens], x2, residual=residual, routing=routing, out=out)

    def oracle(self, dtype):
        """The formula in `dtype`, with the roundings of transformers' modules."""
        x, picks = self.x.to(dtype), self.row_of_token
        if self.prologue == "rms_norm":
            scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
            x = self.norm_weight.to(dtype) * (x.float() * scale).to(dtype)
        if self.prologue == "silu_mul":
            x = F.silu(x) * self.x2.to(dtype)
        out = []
        for weight, bias, pair in self.linears:
            y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
            for e, (start, rank) in enumerate(zip(self.start.tolist(), RANKS, strict=True)):
                chosen = (self.weights * (self.indices == e)).sum(1)[picks, None] * self.scaling[e]
                if pair is not None:
                    A, B = (t[start : start + rank].to(dtype) for t in pair)
                    y = y + (x @ A.T * chosen.to(dtype)) @ B
            out.append(y if self.residual is None else y + self.residual.to(dtype))
        return out

    def verify(self):
        out = [torch.full((len(self.x), len(w)), torch.nan, dtype=self.dtype) for w, _, _ in self.linears]
        got = self.run(routing=self.routing(), out=tuple(out))
        wanted, same = self.oracle(torch.float32), self.oracle(self.dtype)
        for y, want, same_dtype in zip(got, wanted, same, strict=True):
            assert_close(y, want, same_dtype, self.dtype)
        return got

    def verify_rows(self, got):
        """Rows without weights equal the call without a pool; a token alone equals itself in the batch."""
        base, without = self.run(), ~self.weights.any(1)[self.row_of_token]
        for y, frozen in zip(got, base, strict=True):
            assert torch.equal(y[without], frozen[without])
        for t in {0, len(self.x) // 2, len(self.x) - 1}:
            row = self.row_of_token[t : t + 1]
            alone = self.routing(
                indices=self.indices[row], weights=self.weights[row], cu_seqlens=None, num_tokens=1
            )
            for y, one in zip(got, self.run(slice(t, t + 1), alone), strict=True):
                assert torch.equal(y[t], one[0])


@pytest.mark.parametrize("prologue", ["none", "rms_norm", "silu_mul"])
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=name_of)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 8, 17, 64])
def test_prologues_dtypes_and_tokens(prologue, dtypes, num_tokens):
    case = Case((1,) * num_tokens, prologue=prologue, dtype=dtypes[0], factor_dtype=dtypes[1])
    got = case.verify()
    if num_tokens:
        case.verify_rows(got)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("in_features", [1, 7, 32, 100, 577])
@pytest.mark.parametrize("sizes", [(1,), (7, 577, 16), (100, 1, 33, 64)], ids=name_of)
def test_sizes(dtype, in_features, sizes):
    for prologue in ("rms_norm", "silu_mul"):
        case = Case((1,) * 5, sizes, in_features, prologue, dtype, torch.bfloat16, bias=False)
        case.verify_rows(case.verify())


@pytest.mark.parametrize("top_k", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_top_k(top_k, dtype):
    # Beyond four entries, rows pick some of them twice.
    case = Case(top_k=top_k, dtype=dtype, factor_dtype=dtype)
    case.verify_rows(case.verify())


@pytest.mark.parametrize("lengths", [(2, 0, 5), (3, 3, 3), (1, 130, 4), (0, 0)], ids=name_of)
def test_rows_of_several_tokens(lengths):
    case = Case(lengths, dtype=torch.bfloat16, factor_dtype=torch.bfloat16)
    got = case.verify()
    if sum(lengths):
        case.verify_rows(got)


def check_threads(dtype):
    case = Case((1,) * 17, (577, 100, 33), 300, "rms_norm", dtype, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(case.run(routing=case.routing()))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_threads_do_not_show(dtype):
    check_threads(dtype)


def test_picks_without_weight_are_not_read():
    case = Case(dtype=torch.bfloat16, factor_dtype=torch.bfloat16)
    want = case.run(routing=case.routing())
    for pair in (case.linears[0][2],):
        for slab in pair:
            slab[8:11] = torch.nan
    case.weights[case.indices == 1] = 0
    got = case.run(routing=case.routing())
    assert all(y.isfinite().all() for y in got)
    untouched = ~(case.indices == 1).any(1)
    assert torch.equal(got[0][untouched], want[0][untouched])


def test_non_finite_tokens_stay_alone():
    case = Case(dtype=torch.bfloat16, factor_dtype=torch.bfloat16)
    want = case.run(routing=case.routing())
    case.x[3] = torch.nan
    got = case.run(routing=case.routing())
    others = torch.arange(8) != 3
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[others], b[others]) and a[3].isnan().all()


def test_empty_pool():
    case = Case((1, 1), top_k=1)
    empty, zeros = torch.zeros(0, dtype=torch.int32), torch.zeros(2, 1)
    pool = {"start": empty, "rank": empty, "scaling": torch.zeros(0), "total_rank": 0}
    routing = case.routing(**pool, indices=zeros.int(), weights=zeros)
    want = case.run()
    case.linears = [(w, b, None if f is None else (f[0][:0], f[1][:0])) for w, b, f in case.linears]
    assert all(torch.equal(a, b) for a, b in zip(case.run(routing=routing), want, strict=True))
    with pytest.raises(ValueError, match="indices"):
        case.routing(**pool, indices=zeros.int(), weights=zeros + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_pool_that_grows(dtype):
    case = Case(sizes=(63,), dtype=dtype, factor_dtype=dtype)
    weight, bias, (A, B) = case.linears[0]
    factors = Factors(100, 63, dtype)
    factors.grow(8)
    group = LinearGroup([(weight, bias, factors)])
    few = case.routing(indices=torch.zeros_like(case.indices), total_rank=8)
    factors.A.copy_(A[:8])
    factors.B.copy_(B[:8])
    group(case.x, residual=case.residual, routing=few)
    factors.grow(sum(RANKS))
    factors.A.copy_(A)
    factors.B.copy_(B)
    (got,) = group(case.x, residual=case.residual, routing=case.routing())
    assert torch.equal(got, case.run(routing=case.routing())[0])
    weight.data = weight.clone()
    (got,) = group(case.x, residual=case.residual, routing=case.routing())
    assert torch.equal(got, case.run(routing=case.routing())[0])


def test_out_is_written_and_checked():
    case = Case()
    group, routing = case.group(), case.routing()
    want = group(case.x, routing=routing)
    out = tuple(torch.empty_like(y) for y in want)
    for _ in range(2):
        for y in out:
            y.fill_(torch.nan)
        assert group(case.x, routing=routing, out=out) is out
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
    with pytest.raises(ValueError, match="out must have shape"):
        group(case.x[:3], out=out)
    with pytest.raises(ValueError, match="out must have 2 members"):
        group(case.x, out=out[:1])
    with pytest.raises(ValueError, match="out must be float32"):
        group(case.x, out=(out[0].half(), out[1]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"x": torch.randn(8, 9)}, "x must have shape"),
        ({"x": torch.randn(100)}, "x must have two dimensions"),
        ({"x": torch.randn(8, 100).half()}, "x must be float32"),
        ({"x": torch.randn(100, 8).T}, "x must be contiguous"),
        ({"x2": torch.randn(8, 100)}, "x2 goes with"),
        ({"residual": torch.randn(8, 63)}, "residual goes with one linear"),
        ({"residual": torch.randn(8, 64)}, "residual must have shape"),
        ({"x": torch.randn(7, 100)}, "routing was made for 8 tokens, got 7"),
    ],
)
def test_call_rejects(args, message):
    case = Case()
    with pytest.raises(ValueError, match=message):
        case.group()(**{"x": case.x, "routing": case.routing()} | args)


def test_wrong_routings_are_rejected():
    case = Case()
    for entry in (4, -1):
        case.indices[2, 1] = entry
        with pytest.raises(ValueError, match=f"indices must lie in 0..3, got {entry}"):
            case.routing()
    case.indices[2, 1] = 0
    with pytest.raises(ValueError, match="slab"):
        case.routing(total_rank=20)
    with pytest.raises(ValueError, match="9 tokens"):
        case.routing(num_tokens=9)
    for bounds in ([0, 8, 7], [1, 4, 8], [0, 4, 9]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens"):
            case.routing(indices=case.indices[:2], weights=case.weights[:2], cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="slabs of 30 rows, got 24"):
        case.run(routing=case.routing(total_rank=30))


W, A, B, NORM = torch.randn(4, 8), torch.randn(3, 8), torch.randn(3, 4), torch.ones(8)


@pytest.mark.parametrize(
    ("linears", "settings", "message"),
    [
        ([], {}, "linears must have"),
        ([(W, None, None)] * 5, {}, "linears must have"),
        ([(W.double(), None, None)], {}, "weight must be"),
        ([(W, None, None), (W.half(), None, None)], {}, "weight must be float32"),
        ([(W, None, None), (torch.randn(4, 9), None, None)], {}, "weight must have shape"),
        ([(torch.randn(8, 4).T, None, None)], {}, "weight must be contiguous"),
        ([(W, torch.zeros(5), None)], {}, "bias must have shape"),
        ([(W, None, (A[:, :7], B))], {}, "A must have shape"),
        ([(W, None, (A, B[:2]))], {}, "B must have shape"),
        ([(W, None, (A, B.half()))], {}, "B must be float32"),
        ([(W, None, None)], {"prologue": "layer_norm"}, "prologue must be one of"),
        ([(W, None, None)], {"prologue": "rms_norm"}, "norm_weight goes with"),
        ([(W, None, None)], {"norm_weight": NORM}, "norm_weight goes with"),
        (
            [(W, None, None)],
            {"norm_weight": NORM.half(), "prologue": "rms_norm"},
            "norm_weight must be float32",
        ),
    ],
)
def test_construction_rejects(linears, settings, message):
    with pytest.raises(ValueError, match=message):
        LinearGroup(linears, **settings)


def isa_check(isa):
    """Run in a subprocess with SLM_FAST_ISA set."""
    assert dispatch.cpu_info()["isa"] == isa
    for dtype, factor_dtype in zip(DTYPES * 3, [d for d in DTYPES for _ in range(3)], strict=True):
        for prologue in ("none", "rms_norm", "silu_mul"):
            case = Case((1, 0, 18, 1), (33, 17), 101, prologue, dtype, factor_dtype, top_k=3)
            case.verify_rows(case.verify())
        check_threads(dtype)


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "avx512", "avx2", "baseline"])
def test_every_instruction_set(isa):
    from slm_fast import _C

    if isa not in _C.isa_supported():
        pytest.skip("not supported by this processor")
    env = os.environ | {"SLM_FAST_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
    code = f"import test_cpu_linear; test_cpu_linear.isa_check({isa!r})"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


WITHOUT_OPENMP = """
import array, importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
x, out = array.array("f", range(512 * 512)), [array.array("f", [0] * 512) for _ in range(3)]
p = x.buffer_info()[0]
group = _C.LinearGroup(0, 512, 1, 1e-5, p, [(p, 0, 512, 0, 0, 0, 0)])
for threads, y in enumerate(out, 1):
    group.forward(p, 0, 1, [y.buffer_info()[0]], 0, None, None, threads)
assert out[0] == out[1] == out[2] and any(out[0])
print(_C.build_info()["thread_pool"])
"""


def test_threads_of_a_process_without_openmp():
    from slm_fast import _C

    run = subprocess.run([sys.executable, "-c", WITHOUT_OPENMP, _C.__file__], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "std::thread", run.stdout + run.stderr


def turned(y, cos, sin):
    """The formula as transformers' modelling files compute it. y: [rows, tokens, heads, size]."""
    a, b = y.chunk(2, -1)
    return y * cos[:, :, None] + torch.cat((-b, a), -1) * sin[:, :, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [2, 10, 64])
@pytest.mark.parametrize(
    ("rows", "tokens", "shared"), [(1, 1, False), (3, 1, True), (2, 5, False), (3, 30, True)]
)
def test_rotation_has_the_bits_of_pytorch(dtype, head_size, rows, tokens, shared):
    case = Case((tokens,) * rows, sizes=(2 * head_size, head_size, 3), dtype=dtype)
    g = torch.Generator().manual_seed(1)
    shape = (1 if shared else rows, tokens, head_size)
    cos, sin = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    plain = case.group()(case.x, routing=case.routing())
    got = case.group()(case.x, routing=case.routing(), rotation=Rotation(cos, sin))
    for y, want in zip(got[:2], plain[:2], strict=True):
        heads = want.view(rows, tokens, -1, head_size)
        assert torch.equal(y.view_as(heads), turned(heads, cos, sin))
    assert torch.equal(got[2], plain[2])


def test_wrong_rotations():
    case = Case((1,) * 4, sizes=(12, 12))
    cos = torch.randn(4, 1, 8)
    for rotation, message in (
        (Rotation(cos, cos), "whole heads of 8"),
        (Rotation(cos[:3, :, :4], cos[:3, :, :4]), "3 angles"),
        (Rotation(cos.half(), cos.half()), "float16 for 4 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            case.group()(case.x, rotation=rotation)
    with pytest.raises(ValueError, match="even"):
        Rotation(cos[..., :3], cos[..., :3])


def tail_cases(dtype, tokens, hidden=36, wide=100, attended=24):
    out = Case((1,) * tokens, sizes=(hidden,), in_features=attended, dtype=dtype, bias=False)
    gate_up = Case(
        (1,) * tokens, sizes=(wide, wide), in_features=hidden, prologue="rms_norm", dtype=dtype, seed=1
    )
    down = Case((1,) * tokens, sizes=(hidden,), in_features=wide, prologue="silu_mul", dtype=dtype, seed=2)
    return out, gate_up, down


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 64, 70])
def test_the_tail_of_a_layer_is_its_groups_one_by_one(dtype, tokens):
    out, gate_up, down = tail_cases(dtype, tokens)
    groups = [case.group() for case in (out, gate_up, down)]
    for routing in (None, out.routing()):
        (x,) = groups[0](out.x, residual=out.residual, routing=routing)
        gate, up = groups[1](x, routing=routing)
        (want,) = groups[2](gate, up, residual=x, routing=routing)
        got = LayerTail(*groups)(out.x, out.residual, routing)
        assert torch.equal(got, want)
    assert LayerTail(*groups)(out.x[:0], out.residual[:0]).shape == (0, 36)


def test_wrong_tails():
    out, gate_up, down = (case.group() for case in tail_cases(torch.float32, 2))
    with pytest.raises(ValueError, match="follow one another"):
        LayerTail(gate_up, out, down)(torch.zeros(2, 36), torch.zeros(2, 24))
    with pytest.raises(ValueError, match="attended"):
        LayerTail(out, gate_up, down)(torch.zeros(2, 25), torch.zeros(2, 36))
    with pytest.raises(ValueError, match="residual must be contiguous"):
        LayerTail(out, gate_up, down)(torch.zeros(2, 24), torch.zeros(36, 2).T)


LONG_ROWS = ((16,), (65,), (40, 3, 100, 16, 15), (600, 1, 70), (20,) * 40)


@pytest.mark.parametrize("lengths", LONG_ROWS, ids=str)
@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("prologue", ["none", "rms_norm", "silu_mul"])
def test_long_rows(lengths, factor_dtype, prologue):
    """Prefill in bf16: many blocks of tokens, whole rows of which are the same wherever they stand."""
    case = Case(lengths, (63, 100, 64), prologue=prologue, dtype=torch.bfloat16, factor_dtype=factor_dtype)
    got = case.verify()
    base, without = case.run(), ~case.weights.any(1)[case.row_of_token]
    for y, frozen in zip(got, base, strict=True):
        assert torch.equal(y[without], frozen[without])
    for row in {0, len(lengths) // 2, len(lengths) - 1}:
        tokens = slice(*case.bounds[row : row + 2].tolist())
        alone = case.routing(
            indices=case.indices[row : row + 1],
            weights=case.weights[row : row + 1],
            cu_seqlens=None,
            num_tokens=lengths[row],
        )
        for y, whole in zip(case.run(tokens, routing=alone), got, strict=True):
            assert torch.equal(y, whole[tokens])


def test_many_entries_of_all_ranks_in_long_rows():
    case = Case((48,) * 4, (40,), in_features=96, dtype=torch.bfloat16, factor_dtype=torch.bfloat16, top_k=3)
    case.verify()
    one = case.routing(indices=case.indices * 0 + 2, weights=torch.ones_like(case.weights))  # picked thrice
    same = case.routing(indices=case.indices[:, :1] * 0 + 2, weights=torch.full((4, 1), 3.0))
    for a, b in zip(case.run(routing=one), case.run(routing=same), strict=True):
        assert torch.equal(a, b)
