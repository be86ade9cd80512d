"""An op and its inputs, its own yardstick in another dtype: what test_gpu.py runs at sizes to fill a card."""

import contextlib
import copy

import torch
from conftest import DEVICE
from test_ops import assert_close

from slm_fast import ops

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no bf16 products
LINEARS = ["mixture", "fused_linear", "segment_linear"]
SHRINKS = ["norm_shrink", "norm_shrink resident", "silu_mul_shrink", "silu_mul_shrink resident"]
OPS = LINEARS + SHRINKS
SQUARE = (4096, 4096)


class Problem:
    """An op and its inputs on the device, random; row 1 has no weights. `call` and `train` run it on any
    backend and in any dtype, so that it is its own yardstick."""

    INPUTS = {
        "mixture": ("y", "x", "weights"),
        "fused_linear": ("x", "dense"),
        "segment_linear": ("x", "weights"),
        "norm_shrink": ("x",),
        "silu_mul_shrink": ("gate", "x"),
    }

    def __init__(self, name, lengths, *, ranks=(8,) * 12, top_k=2, features=SQUARE, seed=0):
        self.op, _, resident = name.partition(" ")
        self.resident, self.seed = bool(resident), seed
        self.lengths, self.top_k, self.max_rank = lengths, min(top_k, len(ranks)), max(ranks)
        self.in_features, self.out_features = features
        self.owned = (ranks[0] if len(ranks) > 1 else 0, sum(ranks))
        self.generator = torch.Generator(DEVICE).manual_seed(seed)
        rank = torch.tensor(ranks, dtype=torch.int32)
        starts = (rank.cumsum(0) - rank).int()
        bounds = torch.tensor((0, *lengths)).cumsum(0).int()
        self.num_tokens, self.cu_seqlens = sum(lengths), None
        if len(set(lengths)) > 1:
            self.cu_seqlens = bounds.to(DEVICE)
        owners = torch.arange(len(ranks)).repeat_interleave(rank.long()).int()
        self.start, self.rank, self.row_entry = (t.to(DEVICE) for t in (starts, rank, owners))
        self.scaling = torch.rand(len(ranks), generator=self.generator, device=DEVICE) + 0.5
        linears = {"norm_shrink": 3}.get(self.op, 1)
        total, (n, m) = sum(ranks), features
        self.values = {
            "A": [self.normal(total, n, scale=n**-0.5) for _ in range(linears)],
            "B": self.normal(total, m, scale=max(total, 1) ** -0.5),
            "weight": self.normal(m, n, scale=n**-0.5),
            "norm": self.normal(n) + 1,
        }
        self.values |= {name: t for name, t in self.drawn().items()}
        self.gradients = None

    def normal(self, *shape, scale=1.0):
        return torch.randn(shape, generator=self.generator, device=DEVICE, dtype=DTYPE) * scale

    def drawn(self):
        """What changes from batch to batch."""
        rows, entries = len(self.lengths), len(self.rank)
        order = torch.rand(rows, entries, generator=self.generator, device=DEVICE).argsort(1)
        weights = torch.randn(rows, self.top_k, generator=self.generator, device=DEVICE)
        weights[1:2] = 0
        indices = order[:, : self.top_k].int().contiguous()
        dense = torch.zeros(rows, entries, device=DEVICE).scatter_(1, indices.long(), weights)
        batch = {"x": self.in_features}
        batch |= {"mixture": {"y": self.out_features}, "silu_mul_shrink": {"gate": self.in_features}}.get(
            self.op, {}
        )
        batch = {name: self.normal(self.num_tokens, size) for name, size in batch.items()}
        return batch | {"indices": indices, "weights": weights, "dense": dense}

    def redraw(self, weights=True):
        """New numbers in the same memory; without `weights` no row has any."""
        for name, value in self.drawn().items():
            self.values[name].copy_(value if weights or name in ("x", "y", "gate", "indices") else 0 * value)

    def cast(self, dtype):
        def to(value):
            if isinstance(value, list):
                return [to(v) for v in value]
            return value.to(dtype) if value.dtype == DTYPE else value

        return {name: to(value) for name, value in self.values.items()}

    def call(self, backend="gpu", values=None, A_owned=None, B_owned=None, u=None):
        """The outputs."""
        v = self.values if values is None else values
        options = {"backend": backend}
        if A_owned is not None:
            options |= {"owned": self.owned, "A_owned": A_owned if self.op == "norm_shrink" else A_owned[0]}
        routing = (self.start, self.rank, self.scaling, v["indices"], v["weights"], self.cu_seqlens)
        if self.op in ("norm_shrink", "silu_mul_shrink"):
            options |= {"routing": None if self.resident else routing, "max_rank": self.max_rank}
            if self.op == "norm_shrink":
                return list(ops.norm_shrink(v["x"], v["norm"], 1e-5, v["A"], **options))
            return list(ops.silu_mul_shrink(v["gate"], v["x"], v["A"][0], **options))
        options |= {"B_owned": B_owned, "u": u}
        pool = (v["A"][0], v["B"])
        if self.op == "fused_linear":
            resident = (self.row_entry, self.scaling, v["dense"], self.cu_seqlens)
            return [ops.fused_linear(v["x"], v["weight"], None, *pool, *resident, **options)]
        options["max_rank"] = self.max_rank
        if self.op == "segment_linear":
            return [ops.segment_linear(v["x"], v["weight"], None, *pool, *routing, **options)]
        return [ops.mixture(v["y"] * 1, v["x"], *pool, *routing, **options)]

    def train(self, backend="gpu", dtype=None):
        """The outputs, then the gradients of the inputs and of the owned factors."""
        v = self.values if dtype is None else self.cast(dtype)
        inputs = {name: v[name].detach().requires_grad_() for name in self.INPUTS[self.op]}
        rows = slice(*self.owned)
        A_owned = [torch.nn.Parameter(slab[rows]) for slab in v["A"]]
        B_owned = torch.nn.Parameter(v["B"][rows]) if self.op in LINEARS else None
        outputs = self.call(backend, v | inputs, A_owned, B_owned)
        if self.gradients is None:
            self.gradients = [self.normal(*out.shape) for out in outputs]
        torch.autograd.backward(
            outputs, [g.to(o.dtype) for g, o in zip(self.gradients, outputs, strict=True)]
        )
        leaves = [*inputs.values(), *A_owned, *([] if B_owned is None else [B_owned])]
        return [out.detach() for out in outputs] + [leaf.grad for leaf in leaves]

    def tail(self, count):
        """The last `count` rows (of equal lengths) as a problem of their own."""
        small, tokens = copy.copy(self), count * self.lengths[0]
        small.lengths, small.num_tokens, small.gradients = self.lengths[-count:], tokens, None
        small.values = dict(self.values)
        for name in ("x", "y", "gate"):
            if name in self.values:
                small.values[name] = self.values[name][-tokens:].clone()
        for name in ("indices", "weights", "dense"):
            small.values[name] = self.values[name][-count:].clone()
        return small


def forward(problem):
    """Outputs without gradients, which is other launches; partial sums of u added up."""
    with torch.no_grad():
        outputs = problem.call()
    return [outputs[0], *(u.sum(-3, keepdim=True) for u in outputs[1:])]


def verify(problem):
    got = problem.train()
    exact, same = problem.train("reference", torch.float32), problem.train("reference")
    for g, w, s in zip(got, exact, same, strict=True):
        assert_close(g, w, s, DTYPE)
    outputs = forward(problem)
    for g, w, s in zip(outputs, exact, same):  # noqa: B905 (outputs alone)
        assert_close(g, w, s, DTYPE)


@contextlib.contextmanager
def waiting_is_an_error():
    """Inside, whatever makes the host wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
