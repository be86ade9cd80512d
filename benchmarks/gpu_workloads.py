"""What the GPU benchmark and the tuner time: the linears of a model with a pool of low-rank entries.

A batch has one x and one routing, as the layers of a model share them, and layers with a weight and factors
of their own, enough of them that every replay of a graph reads them from HBM and not from L2. A contender is
a way to do a layer's work, and the same in plain PyTorch, in any dtype, to judge it by.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from gpu_timing import fault
from roofline import ENTRIES, OWNED, RANK, TOP_K
from torch import Tensor

from slm_fast import ops

EPS = 1e-5


@dataclass
class Layer:
    weight: Tensor | None  # [out_features, in_features]
    slabs: list[Tensor]  # A of every linear that reads x, [entries * rank, in_features]
    B: Tensor | None  # [entries * rank, out_features]


class Batch:
    """x of `rows` x `length` tokens, a routing that picks `top_k` of the first `picks` entries for each row,
    and `layers` layers; without out_features they have slabs alone, `linears` of them."""

    def __init__(
        self,
        rows: int,
        length: int,
        in_features: int,
        out_features: int | None = None,
        *,
        layers: int = 1,
        linears: int = 1,
        entries: int = ENTRIES,
        rank: int = RANK,
        top_k: int = TOP_K,
        picks: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape, scale=1.0):
            return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

        num_tokens, slab_rows = rows * length, entries * rank
        self.rows, self.length, self.max_rank, self.top_k = rows, length, rank, min(top_k, entries)
        self.x = normal(num_tokens, in_features)
        self.gate = normal(num_tokens, in_features) if out_features is None else None
        self.norm = 1 + normal(in_features, scale=0.1)
        self.rank = torch.full((entries,), rank, dtype=torch.int32, device=device)
        self.start = (self.rank.cumsum(0) - self.rank).int()
        self.row_entry = torch.arange(entries, device=device).repeat_interleave(rank).int()
        self.scaling = torch.ones(entries, device=device)
        order = torch.rand(rows, picks or entries, generator=generator, device=device).argsort(1)
        self.indices = order[:, : self.top_k].int().contiguous()
        logits = torch.randn(rows, self.top_k, generator=generator, device=device)
        self.weights = logits.softmax(-1)
        self.dense = torch.zeros(rows, entries, device=device)
        self.dense.scatter_(1, self.indices.long(), self.weights)
        self.dy = None if out_features is None else normal(num_tokens, out_features)
        self.layers = []
        for _ in range(layers):
            weight = B = None
            if out_features is not None:
                weight = normal(out_features, in_features, scale=in_features**-0.5)
                B = normal(slab_rows, out_features, scale=slab_rows**-0.5)
            slabs = [normal(slab_rows, in_features, scale=in_features**-0.5) for _ in range(linears)]
            self.layers.append(Layer(weight, slabs, B))

    @property
    def columns(self) -> int:
        """Slab rows, the rank columns of a resident pool."""
        return len(self.row_entry)

    @property
    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.start, self.rank, self.scaling

    @property
    def routing(self) -> tuple:
        """As `norm_shrink` and `silu_mul_shrink` take it."""
        return *self.entries, self.indices, self.weights, None

    def in_dtype(self, dtype: torch.dtype, layer: int) -> "Batch":
        """The same with one layer, its numbers (as they are, rounded to the batch's dtype) in another."""
        cast = copy.copy(self)
        for name in ("x", "gate", "norm", "dy"):
            value = getattr(self, name)
            setattr(cast, name, None if value is None else value.to(dtype))
        this = self.layers[layer]
        weight, B = (None if t is None else t.to(dtype) for t in (this.weight, this.B))
        cast.layers = [Layer(weight, [slab.to(dtype) for slab in this.slabs], B)]
        return cast


@dataclass
class Contender:
    """`run(layer)` does a layer's work and returns its results; `plain(layer, dtype)` makes the same ones by
    the formula. `results` picks from what `run` returns what is compared. `prepare` runs before a capture."""

    name: str
    run: Callable[[int], Sequence[Tensor]]
    plain: Callable[[int, torch.dtype], Sequence[Tensor]]
    dtype: torch.dtype
    target: float | None = None  # percent of the frozen time that may be added
    graph: bool = True
    prepare: Callable[[], object] | None = None
    results: Callable[[Sequence[Tensor]], Sequence[Tensor]] = field(default=list)
    wanted: dict = field(default_factory=dict)  # the formula's results by layer, once made

    def judge(self, got: Sequence[Tensor], layer: int) -> str | None:
        """Why the results of a layer are wrong, or None."""
        if layer not in self.wanted:
            exact = self.plain(layer, torch.float32)
            same = [None] * len(exact)
            if self.dtype != torch.float32:
                same = self.plain(layer, self.dtype)
            self.wanted[layer] = exact, same
        return fault(self.results(got), *self.wanted[layer], self.dtype)


def linear(batch: Batch, op: str, layer: int, u: Tensor | None = None, backend: str = "gpu", **owned):
    """y of a layer by an op; "frozen": without the mixture."""
    this = batch.layers[layer]
    if op == "frozen":
        return F.linear(batch.x, this.weight)
    options = {"u": u, "backend": backend, **owned}
    if op == "fused_linear":
        pool = (*this.slabs, this.B, batch.row_entry, batch.scaling, batch.dense)
        return ops.fused_linear(batch.x, this.weight, None, *pool, **options)
    pool = (*this.slabs, this.B, *batch.entries, batch.indices, batch.weights)
    options["max_rank"] = batch.max_rank
    if op == "segment_linear":
        return ops.segment_linear(batch.x, this.weight, None, *pool, **options)
    return ops.mixture(F.linear(batch.x, this.weight), batch.x, *pool, **options)


def rank_space(batch: Batch, op: str, layer: int) -> Tensor:
    """u of a layer as a norm in front would give it: [splits, T, columns], in eight parts while decoding."""
    (slab,) = batch.layers[layer].slabs
    u = batch.x.float() @ slab.float().T
    if op != "fused_linear":
        offsets = torch.arange(batch.max_rank, device=u.device)
        columns = (batch.start[batch.indices.long()][..., None] + offsets).flatten(1)
        u = u.gather(1, columns.repeat_interleave(batch.length, 0))
    splits = 8 if len(batch.x) <= 256 else 1
    return (u / splits).expand(splits, *u.shape).contiguous()


def forward(batch: Batch, op: str, *, given_u: bool = False, target: float | None = None) -> Contender:
    """A linear with its mixture; with given_u, behind a kernel that made u."""
    u = [rank_space(batch, op, i) if given_u else None for i in range(len(batch.layers))]

    def plain(layer, dtype):
        with torch.no_grad():
            return [linear(batch.in_dtype(dtype, layer), op, 0, backend="reference")]

    def run(layer):
        with torch.no_grad():
            return [linear(batch, op, layer, u[layer])]

    return Contender(op + (", u given" if given_u else ""), run, plain, batch.x.dtype, target)


def leaves(batch: Batch, op: str, layer: int) -> tuple[Batch, list[Tensor], dict]:
    """(a batch whose x is a leaf, the leaves, the parameters that a task owns as keyword arguments)."""
    batch, this = copy.copy(batch), batch.layers[layer]
    batch.x = batch.x.detach().requires_grad_()
    if op == "frozen":
        return batch, [batch.x], {}
    num_owned = min(OWNED, len(this.B))
    A_owned, B_owned = (torch.nn.Parameter(slab[:num_owned]) for slab in (*this.slabs, this.B))
    return (
        batch,
        [batch.x, A_owned, B_owned],
        {
            "A_owned": A_owned,
            "B_owned": B_owned,
            "owned": (0, num_owned),
        },
    )


def backward(batch: Batch, op: str, *, target: float | None = None) -> Contender:
    """dx, dA and dB at dy, the forward done before; "frozen": dx alone. A task owns the pool's first rows."""
    kept = []

    def one(batch, layer, backend):
        batch, inputs, owned = leaves(batch, op, layer)
        return linear(batch, op, layer, backend=backend, **owned), inputs

    def prepare():
        kept[:] = [one(batch, layer, "gpu") for layer in range(len(batch.layers))]
        return list(kept)

    def run(layer):
        y, inputs = kept[layer]
        return torch.autograd.grad(y, inputs, batch.dy, retain_graph=True)

    def plain(layer, dtype):
        cast = batch.in_dtype(dtype, layer)
        y, inputs = one(cast, 0, "reference")
        return torch.autograd.grad(y, inputs, cast.dy)

    return Contender(op, run, plain, batch.x.dtype, target, prepare=prepare)


def call_shrink(batch: Batch, op: str, kind: str, layer: int, backend: str, A_owned=None):
    """[h, u] of `norm_shrink` or `silu_mul_shrink`; kind "gather" or "resident", or "plain": [h] as PyTorch
    makes it, without a shrink."""
    slabs = batch.layers[layer].slabs
    options = {"routing": batch.routing if kind == "gather" else None, "max_rank": batch.max_rank}
    if A_owned is not None:
        options |= {"A_owned": A_owned, "owned": (0, len(A_owned[0]))}
    options["backend"] = backend
    if op == "norm_shrink":
        if kind == "plain":
            return [F.rms_norm(batch.x, batch.norm.shape, batch.norm, EPS)]
        return ops.norm_shrink(batch.x, batch.norm, EPS, slabs, **options)
    if kind == "plain":
        return [F.silu(batch.gate) * batch.x]
    if A_owned is not None:
        (options["A_owned"],) = A_owned
    return ops.silu_mul_shrink(batch.gate, batch.x, *slabs, **options)


def shrink(batch: Batch, op: str, kind: str) -> Contender:
    """h and u, or h alone where kind is "plain"."""

    def run(layer):
        with torch.no_grad():
            return call_shrink(batch, op, kind, layer, "gpu")

    def plain(layer, dtype):
        with torch.no_grad():
            return summed(call_shrink(batch.in_dtype(dtype, layer), op, kind, 0, "reference"))

    def summed(results):
        return [results[0], *(u.sum(-3) for u in results[1:])]

    return Contender(f"{op}, {kind}", run, plain, batch.x.dtype, results=summed)


def shrink_backward(batch: Batch, op: str, kind: str) -> Contender:
    """Gradients of the inputs and of the slab rows that a task owns, the forward done before."""
    num_owned = min(OWNED, batch.columns)
    columns = batch.top_k * batch.max_rank if kind == "gather" else batch.columns
    linears = len(batch.layers[0].slabs)
    dh = torch.randn_like(batch.x)
    du = torch.randn(linears, 1, len(batch.x), columns, device=dh.device)
    kept = []

    def one(batch, layer, backend):
        batch = copy.copy(batch)
        names = ("x",) if op == "norm_shrink" else ("gate", "x")
        for name in names:
            setattr(batch, name, getattr(batch, name).detach().requires_grad_())
        owned = [torch.nn.Parameter(slab[:num_owned]) for slab in batch.layers[layer].slabs]
        outputs = call_shrink(batch, op, kind, layer, backend, owned)
        return outputs, [*(getattr(batch, name) for name in names), *owned]

    def grads(outputs, inputs, **options):
        h, u = outputs
        return torch.autograd.grad([h, u], inputs, [dh.to(h.dtype), du.view(u.shape)], **options)

    def prepare():
        kept[:] = [one(batch, layer, "gpu") for layer in range(len(batch.layers))]
        return list(kept)

    def run(layer):
        return grads(*kept[layer], retain_graph=True)

    def plain(layer, dtype):
        return grads(*one(batch.in_dtype(dtype, layer), 0, "reference"))

    return Contender(f"{op}, {kind}", run, plain, batch.x.dtype, prepare=prepare)


def copies(bytes_of_layer: int, l2: int, least: int = 2, most: int = 128) -> int:
    """Layers whose parameters together are four times the L2."""
    return max(least, min(most, math.ceil(4 * l2 / bytes_of_layer)))
