"""Linears that read the same input as one product: each block is what the linear's own call gives."""

import pytest
import torch
from conftest import DEVICE, KERNEL_DTYPES
from test_fused_linear import VARIANTS as ALL_VARIANTS
from test_fused_linear import Linear
from test_ops import assert_close
from test_ops_key_search import name_of
from test_segment_linear import Segments

from slm_fast import dispatch, ops, plan

pytestmark = pytest.mark.skipif(
    dispatch.available()["gpu"] is not None, reason=str(dispatch.available()["gpu"])
)
VARIANTS = {name: ALL_VARIANTS[name] for name in ("two_launch", "chain", "tma")}
LAYOUTS = {
    "qkv": (96, 32, 32),
    "uneven": (100, 36),  # tiles that end inside a block
    "k_without": (64, -32, 48),  # negative: a linear without a mixture
    "first_without": (-40, 64),
    "four": (32, -7, 5, 64),
    "one": (64,),
}


class Stack:
    """Linears of the given sizes that share input, routing and ranks, each with slabs of its own."""

    def __init__(self, layout="qkv", resident=True, dtype=torch.float32, bias=True, splits=2, **options):
        self.kind, self.resident = (Linear if resident else Segments), resident
        sizes = LAYOUTS[layout] if isinstance(layout, str) else layout
        self.linears = [
            self.kind(out_features=abs(size), dtype=dtype, bias=bias, seed=i, **options)
            for i, size in enumerate(sizes)
        ]
        self.mixed = [size > 0 for size in sizes]
        first = self.linears[0]
        shared = ("x", "cu_seqlens", "bounds", "scaling", "weights")
        shared += ("row_entry",) if resident else ("start", "rank", "indices")
        for linear in self.linears[1:]:
            for name in shared:
                setattr(linear, name, getattr(first, name))
        self.x, self.dtype = first.x, dtype
        self.max_rank = None if resident else max(first.rank.tolist(), default=0)
        names = ("row_entry",) if resident else ("start", "rank")
        names += ("scaling", "weights") if resident else ("scaling", "indices", "weights")
        self.routing = tuple(getattr(first, name) for name in (*names, "cu_seqlens"))
        self.weight = torch.cat([linear.weight for linear in self.linears])
        self.bias = torch.cat([linear.bias for linear in self.linears]) if bias else None
        self.B = [c.B if m else c.B.shape[1] for c, m in zip(self.linears, self.mixed, strict=True)]
        slabs = [linear.A for linear, mixed in zip(self.linears, self.mixed, strict=True) if mixed]
        norm = self.x.new_ones(self.x.shape[1])
        routing = None if resident else self.routing
        with torch.no_grad():  # only the ranks of u matter here: x is not normalised again
            _, u = ops.norm_shrink(
                self.x, norm, 1e-6, slabs, routing, max_rank=self.max_rank, backend="reference"
            )
        scale = torch.rand(splits, 1, 1, generator=torch.Generator().manual_seed(9)).to(DEVICE)
        self.u = u[:, :1] * (scale / scale.sum())

    def forward(self, backend="gpu", **changes):
        args = {name: getattr(self, name) for name in ("x", "weight", "bias", "B", "routing", "u")}
        return ops.stacked_linear(**args | {"max_rank": self.max_rank} | changes, backend=backend)

    def one_by_one(self, backend="gpu"):
        """Each linear's own call, with the same u; the frozen linear where it has no mixture."""
        out, us = [], iter(self.u)
        for linear, mixed in zip(self.linears, self.mixed, strict=True):
            changes = {"u": next(us)} if mixed else {"weights": torch.zeros_like(linear.weights)}
            out.append(linear.forward(backend, **changes))
        return torch.cat(out, -1)

    def exact(self):
        """In fp32 by the plain formula."""
        first = self.linears[0]
        rows = torch.tensor(first.bounds).diff()
        row = torch.repeat_interleave(torch.arange(len(rows)), rows).to(DEVICE)
        weights, scaling = first.weights, first.scaling
        u, out, us = self.u.sum(1), [], iter(range(len(self.u)))
        for linear, mixed in zip(self.linears, self.mixed, strict=True):
            y = torch.nn.functional.linear(self.x.float(), linear.weight.float())
            y = y if linear.bias is None else y + linear.bias.float()
            if mixed and self.resident:
                owner, c = first.row_entry.long(), u[next(us)]
                y = (
                    y
                    + c * ((weights * scaling)[:, owner.clamp(min=0)] * (owner >= 0))[row] @ linear.B.float()
                )
            elif mixed:
                own, update = u[next(us)], torch.zeros_like(y)
                for t, b in enumerate(row.tolist()):
                    for k, i in enumerate(first.indices[b].tolist()):
                        n, begin = int(first.rank[i]), int(first.start[i])
                        c = own[t, k * self.max_rank :][:n] * weights[b, k] * scaling[i]
                        update[t] += c @ linear.B[begin : begin + n].float()
                y = y + update
            out.append(y)
        return torch.cat(out, -1)

    def verify(self, **changes):
        got, exact = self.forward(**changes), self.exact()
        plain = self.forward("reference")
        assert_close(plain, exact, plain if self.dtype != torch.float32 else None)
        assert_close(got, exact, plain)
        assert torch.equal(got, self.one_by_one())


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    monkeypatch.setattr(dispatch, "find_plan", lambda *args: VARIANTS[request.param])
    return request.param


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(dispatch, "find_plan", lambda *args: VARIANTS["two_launch"])


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "gathered"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name_of)
def test_variants(variant, dtype, resident):
    Stack(dtype=dtype, resident=resident).verify()


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "gathered"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, resident, small):
    Stack(layout, resident, bias=layout != "qkv").verify()


@pytest.mark.parametrize("ranks", [(1,) * 3, (3,) * 3, (12,) * 3, (2, 12, 1, 8)], ids=name_of)
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "gathered"])
def test_ranks_and_rows_of_one_length(ranks, resident, small):
    Stack((40, 24), resident, ranks=ranks, lengths=(4, 4, 4), splits=1).verify()


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "gathered"])
def test_weights_may_lie_in_wider_storage(resident, variant):
    stack = Stack(resident=resident)
    wide = torch.zeros(stack.weight.shape[0], stack.weight.shape[1] + 24, device=DEVICE)
    wide[:, :-24] = stack.weight
    wide[:, -24:] = float("nan")
    assert torch.equal(stack.forward(weight=wide[:, :-24]), stack.forward())


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "gathered"])
def test_rows_without_weights_get_the_frozen_linears(resident, small):
    stack = Stack("k_without", resident)
    out, (begin, end) = stack.forward(), stack.linears[0].bounds[2:4]
    frozen = tuple(0 * t if t is stack.linears[0].weights else t for t in stack.routing)
    none = stack.forward(routing=frozen)
    assert torch.equal(out[:, 64:96], none[:, 64:96])  # the linear without a mixture
    assert not torch.equal(out[begin:end], none[begin:end])
    lengths = Stack("k_without", resident, lengths=(3, 4, 5))  # row 1 has tokens and no weights
    frozen = tuple(0 * t if t is lengths.linears[0].weights else t for t in lengths.routing)
    assert torch.equal(lengths.forward()[3:7], lengths.forward(routing=frozen)[3:7])


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "gathered"])
def test_no_tokens_and_no_entries(resident):
    empty = Stack(resident=resident, lengths=(0, 0))
    assert empty.forward().shape == (0, 160)
    if resident:
        bare = Stack(ranks=(), gap=0)
        plain = torch.nn.functional.linear(bare.x, bare.weight, bare.bias)
        assert_close(bare.forward(), plain)


def test_the_plan_tables_serve_it():
    for resident in (True, False):
        stack = Stack((512, 128, 128), resident, in_features=128, lengths=(1, 1, 1, 1))
        assert_close(stack.forward(), stack.exact())
    for architecture in ("sm_80", "sm_90", "sm_100"):
        assert plan.find(architecture, "fused_linear", "forward", False, 16, 96, 4096, 12288)


def test_errors():
    stack = Stack("k_without")
    for changes, message in [
        ({"B": [64, 32, 48]}, "a slab at least"),
        ({"B": stack.B * 2}, "1 to 4 members"),
        ({"B": stack.B[:2]}, "weight has 144 rows, the linears have 64 \\+ 32"),
        ({"B": [stack.B[0], 32, stack.B[2].half()]}, "B must be float32"),
        ({"B": [stack.B[0], 32, stack.B[2][:-1]]}, "B must have shape"),
        ({"u": stack.u[:1]}, "u must have shape"),
        ({"u": stack.u[:, :, :-1]}, "u must have shape"),
        ({"x": stack.x.half()}, "weight must be float16"),
        ({"weight": stack.weight.requires_grad_()}, "frozen"),
        ({"u": stack.u.clone().requires_grad_()}, "no gradient"),
    ]:
        stack.weight.requires_grad_(changes.get("weight") is not None)
        with pytest.raises(ValueError, match=message):
            stack.forward(**changes)


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "gathered"])
@pytest.mark.parametrize("backend", ["gpu", "reference"])
def test_custom_op(backend, resident, small):
    stack = Stack("k_without", resident)
    slabs = [part for part in stack.B if not isinstance(part, int)]
    *entries, cu_seqlens = stack.routing
    sizes = [64, 32, 48]
    args = (stack.x, stack.weight, stack.bias, slabs, sizes, [1, 0, 1], entries, cu_seqlens, stack.u)
    torch.library.opcheck(torch.ops.slm_fast.stacked_linear, (*args, stack.max_rank, backend))


def test_one_graph_for_any_routing():
    stack, compilations = Stack(lengths=(2, 2, 2)), []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x, u, weights: stack.forward(
            "reference", x=x, u=u, routing=(*stack.routing[:2], weights, None)
        ),
        fullgraph=True,
        backend=backend,
    )
    for seed in range(3):
        weights = torch.randn(stack.routing[2].shape, generator=torch.Generator().manual_seed(seed)).to(
            DEVICE
        )
        got = compiled(stack.x, stack.u, weights)
        want = stack.forward("reference", routing=(*stack.routing[:2], weights, None))
        assert torch.equal(got, want)
    assert len(compilations) == 1
