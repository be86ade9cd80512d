"""A linear's mixture against the ways in which others add adapters.

"update" cases time what is added to a finished linear: `slm_fast` (ops.mixture), `torch` (gathered factors
and batched products) and `dense` (the authors' offsets, sum_k w_k s B_k A_k, built and multiplied row by
row). "layer" cases time the linear with its mixture: `frozen` is the linear alone, the floor; `peft` its LoRA
layer with an adapter for each row; `unsloth` needs "one mixture", the first row's, for all. "step" cases are
forward and backward of the update, for one task's entries, row by row; `dense` builds every row's offset.
"layer step" cases have the linear too, as `peft` and `unsloth` have: one LoRA of rank K r for all rows, which
is the most that they can train in a batch.

Popularity says which of a pool's entries the rows of a batch pick: "distinct" (others for each row, as far as
there are enough), "uniform" or "zipf" draws, "identical" (all rows the same).
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_fast import ops, reference
from suite.cases import Case, Contender, Effort, measured, near, target
from suite.machine import cache_bytes, dtype_name
from suite.peers import LAYERS, LINEARS, UPDATES, built

FEATURES, TOP_K, RANK = 576, 2, 8  # SmolLM2-135M's width
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
POPULARITY = ("distinct", "uniform", "zipf", "identical")
FLAT = (12, 100, 1000, 10_000)  # entries of pools that a batch with the same picks must not feel


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def normal(*shape: int, device: str, seed: int = 3) -> Tensor:
    """Random numbers in the device's dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype_of(device))


class Pool:
    """`entries` of one rank for a linear, and what rows of a batch pick of them."""

    def __init__(self, entries: int, rank: int, features: int, device: str) -> None:
        self.entries, self.rank, self.features, self.device = entries, rank, features, device
        self.A = normal(entries * rank, features, device=device, seed=0) * features**-0.5
        self.B = normal(entries * rank, features, device=device, seed=1)
        self.ranks = torch.full((entries,), rank, dtype=torch.int32, device=device)
        self.start = (self.ranks.cumsum(0) - self.ranks).int()
        self.scaling = torch.ones(entries, device=device)

    def pick(self, rows: int, top_k: int, popularity: str, among: int | None = None) -> tuple[Tensor, Tensor]:
        """(indices, weights) [rows, top_k] of the first `among` entries, spread over the pool."""
        generator, among = torch.Generator().manual_seed(2), among or self.entries
        if popularity == "distinct":
            first = torch.arange(rows * top_k).view(rows, top_k) % among
        elif popularity == "identical":
            first = torch.arange(top_k).repeat(rows, 1) % among
        else:
            share = torch.arange(1, among + 1, dtype=torch.float64)
            share = 1 / share if popularity == "zipf" else torch.ones_like(share)
            first = torch.multinomial(share.repeat(rows, 1), top_k, generator=generator)
        indices = (first * (self.entries // among)).int()
        weights = torch.rand(rows, top_k, generator=generator).softmax(-1)
        return indices.to(self.device), weights.to(self.device)

    def arguments(self, indices: Tensor, weights: Tensor) -> tuple:
        """As `ops.mixture` takes them behind y and x."""
        return self.A, self.B, self.start, self.ranks, self.scaling, indices, weights

    def gathered(self, x: Tensor, y: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The update in plain PyTorch, decoding: gathered factors, two batched products."""
        (rows, top_k), picks = indices.shape, indices.long()
        A = self.A.view(self.entries, self.rank, -1)[picks].flatten(1, 2)
        B = self.B.view(self.entries, self.rank, -1)[picks].flatten(1, 2)
        u = torch.bmm(A, x[:, :, None]).view(rows, top_k, self.rank) * weights[..., None].to(x.dtype)
        return torch.baddbmm(y[:, None], u.view(rows, 1, -1), B).squeeze(1)

    def gathered_tokens(self, x: Tensor, y: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The same for [rows * length, features]: a product a row."""
        return row_products(self.A, self.B, self.rank, x, y, indices.long(), weights)

    def offset(self, indices: Tensor, weights: Tensor) -> Tensor:
        """[out_features, in_features] of one row, as the authors build it."""
        A, B = (t.view(self.entries, self.rank, -1)[indices.long()] for t in (self.A, self.B))
        return torch.einsum("k,kro,kri->oi", weights.to(A.dtype), B, A)


def row_products(
    A: Tensor, B: Tensor, rank: int, x: Tensor, y: Tensor, picks: Tensor, weights: Tensor
) -> Tensor:
    """y plus the update of [rows * length, features] in plain PyTorch: two batched products, one a row."""
    rows = len(picks)
    A = A.view(-1, rank, A.shape[1])[picks].flatten(1, 2)
    B = B.view(-1, rank, B.shape[1])[picks] * weights[..., None, None].to(x.dtype)
    u = torch.bmm(x.view(rows, -1, x.shape[-1]), A.mT)
    return torch.baddbmm(y.view(rows, -1, y.shape[-1]), u, B.flatten(1, 2)).view_as(y)


def copies_for(distinct: int, rank: int, device: str) -> int:
    """How many batches with other entries take turns, as a model's layers do: none is in the caches."""
    touched = 2 * distinct * rank * FEATURES * dtype_of(device).itemsize
    return max(2, math.ceil(2 * cache_bytes(device) / touched))


def exact_update(pool: Pool, x: Tensor, y: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """In fp64, in plain PyTorch."""
    A, B = pool.A.double(), pool.B.double()
    args = (A, B, pool.start, pool.ranks, pool.scaling.double(), indices, weights.double())
    return reference.mixture(y.double(), x.double(), *args).to(y.dtype)


def update_case(
    rows: int, length: int, entries: int, rank: int, top_k: int, popularity: str, device: str
) -> Case:
    """Rows of `length` tokens; one is decoding. Rows pick among `entries`; every copy has others."""
    among = {"distinct": rows * top_k, "identical": top_k}.get(popularity, entries)
    indices, weights = Pool(among, 1, 1, device).pick(rows, top_k, popularity)
    distinct = indices.unique().numel()
    copies = copies_for(distinct, rank, device) if length == 1 else 1
    pool = Pool(among * copies, rank, FEATURES, device)
    tokens = rows * length
    x, y = normal(2, tokens, FEATURES, device=device)
    right = near(exact_update(pool, x, y, indices, weights), TOLERANCE[x.dtype])
    picks = [indices + i * among for i in range(copies)]
    out = y.clone()

    def ours(i):
        return ops.mixture(out.copy_(y), x, *pool.arguments(picks[i], weights), max_rank=rank)

    def dense(i):
        return y[:length] + x[:length] @ pool.offset(picks[i][0], weights[0]).T

    gathered = pool.gathered if length == 1 else pool.gathered_tokens
    one = near(exact_update(pool, x[:length], y[:length], indices[:1], weights[:1]), TOLERANCE[x.dtype])
    contenders = [
        Contender("slm_fast", ours, right),
        Contender("torch", lambda i: gathered(x, y, picks[i], weights), right),
        Contender("dense", dense, one, scale=rows),
    ]
    skipped = {}
    for peer, run, why in built(UPDATES, device, pool, x, y, picks, weights):
        if run is None:
            skipped[peer] = why
        else:
            contenders.append(Contender(peer, run, right))
    axes = dict(rows=rows, length=length, rank=rank, top_k=top_k, popularity=popularity)
    axes |= {"distinct": distinct, "kind": "update", "entries": pool.entries}
    size = x.element_size() * (2 * distinct * rank * FEATURES + 4 * tokens * FEATURES)
    name = f"update, {rows} x {length} tokens, r={rank}, K={top_k}, {popularity}"
    operations = 4 * tokens * top_k * rank * FEATURES
    options = dict(bytes=size, operations=operations, copies=copies, dtype=dtype_name(x.dtype))
    return Case("mixture", name, axes, contenders, skipped=skipped, **options)


def flat_case(rows: int, device: str) -> Case:
    """As many picks out of pools of `FLAT` entries: contenders are the sizes, ours the smallest. The copies
    of a size are as many entries of a few pools as those of another are of many, none in the caches."""
    distinct = min(FLAT[0], rows * TOP_K)
    copies = copies_for(distinct, RANK, device)
    x, y = normal(2, rows, FEATURES, device=device)
    out, contenders = y.clone(), []
    for entries in FLAT:
        apart = entries // FLAT[0]  # batches that a pool has others for
        pools = [Pool(entries, RANK, FEATURES, device) for _ in range(math.ceil(copies / apart))]
        first, weights = pools[0].pick(rows, TOP_K, "distinct", among=FLAT[0])
        args = [pools[i % len(pools)].arguments(first + i // len(pools), weights) for i in range(copies)]
        right = near(exact_update(pools[0], x, y, first, weights), TOLERANCE[x.dtype])
        run = lambda i, args=args: ops.mixture(out.copy_(y), x, *args[i])  # noqa: E731
        contenders.append(Contender(f"{entries:,} entries", run, right))
    axes = {"rows": rows, "distinct": distinct, "kind": "flat"}
    size = x.element_size() * (2 * distinct * RANK * FEATURES + 4 * rows * FEATURES)
    options = dict(bytes=size, operations=4 * rows * TOP_K * RANK * FEATURES, dtype=dtype_name(x.dtype))
    options["copies"] = copies
    name, ours = f"pools of {FLAT[0]} to {FLAT[-1]:,} entries, {rows} rows", f"{FLAT[0]:,} entries"
    return Case("mixture", name, axes, contenders, ours, **options)


def layer_case(rows: int, device: str, length: int = 1, shared: bool = False) -> Case:
    """A linear of rows of `length` tokens. shared: all rows have the first one's mixture."""
    pool = Pool(2 * max(rows, 6), RANK, FEATURES, device)
    indices, weights = pool.pick(rows, TOP_K, "distinct")
    if shared:
        indices, weights = (t[:1].repeat(rows, 1) for t in (indices, weights))
    tokens = rows * length
    x = normal(tokens, FEATURES, device=device)
    weight = normal(FEATURES, FEATURES, device=device, seed=4) / FEATURES**0.5
    y = F.linear(x, weight)
    args = pool.arguments(indices, weights)
    right = near(exact_update(pool, x, y, indices, weights), TOLERANCE[x.dtype])

    def dense(_):
        return F.linear(x[:length], weight + pool.offset(indices[0], weights[0]))

    gathered = pool.gathered if length == 1 else pool.gathered_tokens
    one = near(exact_update(pool, x[:length], y[:length], indices[:1], weights[:1]), TOLERANCE[x.dtype])
    contenders = [
        Contender("frozen", lambda _: F.linear(x, weight), near(y, TOLERANCE[x.dtype])),
        Contender("slm_fast", lambda _: ops.mixture(F.linear(x, weight), x, *args), right),
        Contender("torch", lambda _: gathered(x, F.linear(x, weight), indices, weights), right),
        Contender("dense", dense, one, scale=rows),
    ]
    skipped = {}
    for peer, layer, why in built(LAYERS, device, pool, weight, indices, weights):
        if layer is None:
            skipped[peer] = why
        else:
            run = lambda _, layer=layer: layer(x.view(rows, length, -1)).view_as(x)  # noqa: E731
            contenders.append(Contender(peer, run, right))
    axes = {"rows": rows, "length": length, "kind": "layer", "rank": RANK, "top_k": TOP_K}
    distinct = indices.unique().numel()
    size = x.element_size() * (FEATURES**2 + 2 * distinct * RANK * FEATURES + 2 * tokens * FEATURES)
    operations = 2 * tokens * (FEATURES**2 + 2 * TOP_K * RANK * FEATURES)
    name = f"layer, {rows} rows" if length == 1 else f"layer, {rows} x {length} tokens"
    name += ", one mixture" if shared else ""
    options = dict(bytes=size, operations=operations, dtype=dtype_name(x.dtype))
    return Case("mixture", name, axes, contenders, skipped=skipped, **options)


def all_near(wanted: Sequence[Tensor], tolerance: float) -> Callable[[Sequence[Tensor]], str | None]:
    """A check of several tensors, each on its own scale."""
    checks = [near(want, tolerance) for want in wanted]

    def check(got: Sequence[Tensor]) -> str | None:
        found = (check(tensor) for check, tensor in zip(checks, got, strict=True))
        return next((reason for reason in found if reason), None)

    return check


class Learnt:
    """A task's four entries, beside which four others lie, and rows of `length` tokens that mix `top_k` of
    them with weights of their own. Forward and backward compute y, dx, and dA, dB of those entries."""

    entries = 4

    def __init__(self, rows: int, length: int, device: str, rank: int = RANK, top_k: int = 4) -> None:
        self.rank, self.top_k = rank, top_k
        self.pool = Pool(2 * self.entries, rank, FEATURES, device)
        self.owned = (self.entries * rank, 2 * self.entries * rank)
        self.x = normal(rows * length, FEATURES, device=device).requires_grad_()
        self.y, self.dy = normal(2, rows * length, FEATURES, device=device, seed=4)
        generator = torch.Generator(device).manual_seed(5)
        self.picks = torch.stack([torch.randperm(self.entries)[:top_k] for _ in range(rows)]).to(device)
        self.indices = (self.picks + self.entries).int()
        self.weights = torch.rand(rows, self.top_k, generator=generator, device=device).softmax(-1)
        A, B = (t[slice(*self.owned)].clone() for t in (self.pool.A, self.pool.B))
        self.A, self.B = torch.nn.Parameter(A), torch.nn.Parameter(B)

    def grads(self, out: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        """(out, its gradients)"""
        return out.detach(), *torch.autograd.grad(out, leaves, self.dy.to(out.dtype))

    def ours(self, y: Tensor) -> tuple[Tensor, ...]:
        pool, leaves = self.pool, (self.x, self.A, self.B)
        args = (pool.A, pool.B, pool.start, pool.ranks, pool.scaling, self.indices, self.weights)
        options = dict(A_owned=self.A, B_owned=self.B, owned=self.owned, max_rank=self.rank)
        return self.grads(ops.mixture(y, self.x, *args, **options), *leaves)

    def gathered(self, y: Tensor) -> tuple[Tensor, ...]:
        out = row_products(self.A, self.B, self.rank, self.x, y, self.picks, self.weights)
        return self.grads(out, self.x, self.A, self.B)

    def dense(self, weight: Tensor | None = None) -> tuple[Tensor, ...]:
        """The authors' offset of every row, [rows, out, in], added to the linear's weight or to y."""
        A, B = (t.view(self.entries, self.rank, -1)[self.picks].flatten(1, 2) for t in (self.A, self.B))
        scaled = B * self.weights.repeat_interleave(self.rank, 1)[..., None].to(B.dtype)
        offsets, x = torch.bmm(scaled.mT, A), self.x.view(len(self.picks), -1, FEATURES)
        if weight is None:
            out = torch.baddbmm(self.y.view_as(x), x, offsets.mT)
        else:
            out = torch.bmm(x, (weight + offsets).mT)
        return self.grads(out.view_as(self.y), self.x, self.A, self.B)

    def one_lora(self, linear: Callable, A: Tensor, B: Tensor) -> tuple[Tensor, ...]:
        """Of a linear with the entries side by side as one LoRA, which `linear` has as A, B."""
        out = linear(self.x.view(len(self.picks), -1, FEATURES))
        return self.grads(out.view_as(self.y), self.x, A, B)

    def exact_lora(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The same in fp64, in plain PyTorch."""
        X, A, B = (t.detach().double().requires_grad_() for t in (self.x, self.A, self.B.T))
        return self.grads(F.linear(X, weight.double()) + X @ A.T @ B.T, X, A, B)

    def exact(self, weight: Tensor | None = None) -> tuple[Tensor, ...]:
        """In fp64, in plain PyTorch."""
        X, A, B = (t.detach().double().requires_grad_() for t in (self.x, self.pool.A, self.pool.B))
        y = self.y.double() if weight is None else F.linear(X, weight.double())
        pool, weights = self.pool, self.weights.double()
        args = (pool.start, pool.ranks, pool.scaling.double(), self.indices, weights)
        out, dx, dA, dB = self.grads(reference.mixture(y, X, A, B, *args), X, A, B)
        return out, dx, dA[slice(*self.owned)], dB[slice(*self.owned)]


def step_case(rows: int, length: int, device: str, rank: int = RANK, top_k: int = 4) -> Case:
    """Forward and backward of the update."""
    learnt = Learnt(rows, length, device, rank, top_k)
    x = learnt.x
    right = all_near(learnt.exact(), TOLERANCE[x.dtype])
    contenders = [
        Contender("slm_fast", lambda _: learnt.ours(learnt.y.clone()), right),
        Contender("torch", lambda _: learnt.gathered(learnt.y), right),
        Contender("dense", lambda _: learnt.dense(), right),
    ]
    axes = {"rows": rows, "length": length, "kind": "step", "rank": rank, "top_k": top_k}
    size = x.element_size() * rows * length * FEATURES * 7
    operations = 12 * rows * length * top_k * rank * FEATURES
    name = f"forward and backward, {rows} x {length} tokens, r={rank}, K={top_k}"
    options = dict(bytes=size, operations=operations, dtype=dtype_name(x.dtype))
    return Case("mixture", name, axes, contenders, **options)


def layer_step_case(rows: int, length: int, device: str) -> Case:
    """Forward and backward of a frozen linear and its update."""
    learnt = Learnt(rows, length, device)
    x, top_k = learnt.x, learnt.top_k
    weight = normal(FEATURES, FEATURES, device=device, seed=6) / FEATURES**0.5
    tolerance, exact = TOLERANCE[x.dtype], learnt.exact(weight)
    right = all_near(exact, tolerance)
    plain = [
        t.to(x.dtype) for t in (x.detach().double() @ weight.double().T, learnt.dy.double() @ weight.double())
    ]
    contenders = [
        Contender("frozen", lambda _: learnt.grads(F.linear(x, weight), x), all_near(plain, tolerance)),
        Contender("slm_fast", lambda _: learnt.ours(F.linear(x, weight)), right),
        Contender("torch", lambda _: learnt.gathered(F.linear(x, weight)), right),
        Contender("dense", lambda _: learnt.dense(weight), right),
    ]
    skipped = {}
    for peer, linear, why in built(LINEARS, device, weight, learnt.A.detach(), learnt.B.detach().T):
        if linear is None:
            skipped[peer] = why
        else:
            run = lambda _, linear=linear: learnt.one_lora(*linear)  # noqa: E731
            contenders.append(Contender(peer, run, all_near(learnt.exact_lora(weight), tolerance)))
    axes = {"rows": rows, "length": length, "kind": "layer step", "rank": RANK, "top_k": top_k}
    size = x.element_size() * (2 * FEATURES**2 + rows * length * FEATURES * 7)
    operations = rows * length * FEATURES * (4 * FEATURES + 12 * top_k * RANK)
    name = f"layer, forward and backward, {rows} x {length} tokens"
    options = dict(bytes=size, operations=operations, dtype=dtype_name(x.dtype))
    return Case("mixture", name, axes, contenders, skipped=skipped, **options)


def cases(quick: bool, device: str) -> Iterator[Case]:
    """Decoding over rows, ranks, K and popularity; prefill; steps; layers; pools of all sizes."""
    decode = [
        (rows, 64, RANK, TOP_K, "distinct")
        for rows in ((1, 8, 32) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256))
    ]
    decode += [(8, 64, rank, TOP_K, "distinct") for rank in ((64,) if quick else (1, 4, 16, 32, 64))]
    decode += [(8, 64, RANK, k, "distinct") for k in ((4,) if quick else (1, 4, 8))]
    popular = ("zipf",) if quick else POPULARITY[1:]
    decode += [(32, 64, RANK, TOP_K, popularity) for popularity in popular]
    for rows, entries, rank, top_k, popularity in decode:
        yield update_case(rows, 1, entries, rank, top_k, popularity, device)
    prefill = [(8, 128, RANK, TOP_K, "distinct")]
    if not quick:
        prefill += [(rows, length, RANK, TOP_K, "distinct") for rows, length in ((1, 128), (8, 32), (8, 512))]
        prefill += [(8, 128, RANK, TOP_K, popularity) for popularity in POPULARITY[1:]]
        prefill += [(8, 128, 64, TOP_K, "distinct"), (8, 128, RANK, 4, "distinct")]
    for rows, length, rank, top_k, popularity in prefill:
        yield update_case(rows, length, 64, rank, top_k, popularity, device)
    yield flat_case(8, device)
    for rows, length in ((8, 1),) if quick else ((1, 1), (8, 1), (32, 1), (1, 128), (8, 128)):
        yield layer_case(rows, device, length)
    if device == "cuda":  # for peers with one LoRA
        yield layer_case(8, device, 128, shared=True)
    for rows, length in ((8, 128),) if quick else ((8, 32), (8, 128), (32, 128)):
        yield step_case(rows, length, device)
        yield layer_step_case(rows, length, device)
    for rank, top_k in () if quick else ((32, 4), (RANK, 1)):
        yield step_case(8, 128, device, rank, top_k)


def records(quick: bool, device: str, effort: Effort) -> Iterator[dict]:
    return measured(cases(quick, device), device, effort)


def targets(records: list[dict], ceilings: dict) -> list[dict]:
    """What the section has to reach on a CPU."""
    rows = []
    for record in records:
        axes, found = record["axes"], record["contenders"]
        if (
            axes["kind"] == "update"
            and (axes["rows"], axes["length"]) == (32, 1)
            and axes["popularity"] == "distinct"
        ):
            if (reached := found["torch"].get("ratio")) is None:
                continue
            what = "mixture, decoding, 32 distinct rows: gather and bmm / slm_fast"
            rows.append(target(what, reached, ">=", 3))
        if axes["kind"] == "flat":
            reached = max(contender.get("ratio", math.inf) for contender in found.values())
            what = f"mixture, {record['case']}: dearest / {FLAT[0]} entries"
            rows.append(target(what, reached, "<=", 1.1))
    return rows
