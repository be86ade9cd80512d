"""All linears of a decoding step in the CPU extension, against reading their bytes and against F.linear.

The weights of all layers take turns, so that they come from memory as in real decoding. Each group of
linears is verified against fp32 before anything is timed; the contenders take turns; medians are shown, and
their ratios; the last line is JSON. `read` loads the same weights and does nothing with them. F.linear does
no norms, activations and residuals; slm_fast does.
    python benchmarks/bench_cpu_linear.py [--quick] [--dtype bfloat16] [--model smollm2] [--tokens 1 8 32]
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from cpu_timing import interleaved, machine, report

from slm_fast import dispatch
from slm_fast.cpu_linear import LinearGroup, step_routing

# hidden, key-value and intermediate size, layers, vocabulary (0: no head)
MODELS = {"smollm2": (576, 192, 1536, 30, 49152), "llama2-7b": (4096, 4096, 11008, 2, 0)}
TINY = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
TOP_K, RANK, FEW_ENTRIES, EPS = 2, 8, 12, 1e-6


class Weights:
    """Matrices cut from one random buffer, each in its own memory."""

    def __init__(self, dtype):
        self.noise, self.dtype, self.all = torch.randn(1 << 22).to(dtype), dtype, []

    def __call__(self, rows, columns, scale):
        count = rows * columns
        flat = torch.empty(count, dtype=self.dtype)
        for begin in range(0, count, self.noise.numel()):
            part = flat[begin : begin + self.noise.numel()]
            torch.mul(self.noise[: part.numel()], scale, out=part)
        self.all.append(flat)
        return flat.view(rows, columns)


class Layer:
    """The four groups of a decoder layer: without factors, and with factors on all linears."""

    def __init__(self, make, pool, hidden, kv, intermediate, entries):
        sizes = [[(hidden, hidden), (kv, hidden), (kv, hidden)], [(hidden, hidden)]]
        sizes += [[(intermediate, hidden)] * 2, [(hidden, intermediate)]]
        norm = 1 + 0.1 * torch.randn(hidden).to(make.dtype)
        self.settings = [{"prologue": "rms_norm", "eps": EPS, "norm_weight": norm}, {}] * 2
        self.settings[3] = {"prologue": "silu_mul"}
        self.weights = [[make(*size, size[1] ** -0.5) for size in group] for group in sizes]
        rows = entries * RANK
        self.factors = [[(pool(rows, i, i**-0.5), pool(rows, o, 0.2)) for o, i in group] for group in sizes]
        self.plain = self.groups([False] * 4)
        self.o_only = self.groups([False, True, False, False])
        self.full = self.groups([True] * 4)

    def groups(self, adapted):
        members = [
            [(w, None, pair if on else None) for w, pair in zip(ws, pairs, strict=True)]
            for ws, pairs, on in zip(self.weights, self.factors, adapted, strict=True)
        ]
        return [LinearGroup(m, **s) for m, s in zip(members, self.settings, strict=True)]


class Model:
    def __init__(self, name, dtype, entries):
        hidden, kv, intermediate, layers, vocabulary = MODELS[name]
        self.name, self.dtype, self.hidden, self.intermediate = name, dtype, hidden, intermediate
        self.make, pool = Weights(dtype), Weights(dtype)
        self.layers = [Layer(self.make, pool, hidden, kv, intermediate, entries) for _ in range(layers)]
        self.head = self.make(vocabulary, hidden, hidden**-0.5) if vocabulary else None
        if vocabulary:
            norm = torch.ones(hidden, dtype=dtype)
            self.head_group = LinearGroup(
                [(self.head, None, None)], prologue="rms_norm", eps=EPS, norm_weight=norm
            )
        self.bytes = sum(w.numel() * w.element_size() for w in self.make.all)
        self.regions = [(w.data_ptr(), w.numel() * w.element_size()) for w in self.make.all]
        self.entry_bytes = {
            "o_only": sum(self.rank_bytes(layer.factors[1]) for layer in self.layers),
            "full": sum(self.rank_bytes(sum(layer.factors, [])) for layer in self.layers),
        }
        ranks = torch.full((entries,), RANK, dtype=torch.int32)
        self.pool = ((ranks.cumsum(0) - ranks).int(), ranks, torch.ones(entries), entries * RANK)

    def rank_bytes(self, factors):
        """Bytes of one entry in these slabs."""
        return sum(RANK * (A.shape[1] + B.shape[1]) * A.element_size() for A, B in factors)

    def route(self, tokens, entries):
        """Every token is its own row and picks the next TOP_K of `entries`."""
        indices = (torch.arange(tokens * TOP_K) % entries).view(tokens, TOP_K).int()
        weights = torch.softmax(torch.randn(tokens, TOP_K), -1)
        return (
            step_routing(*self.pool, indices, weights, num_tokens=tokens),
            indices,
            weights,
            min(entries, tokens * TOP_K),
        )

    def buffers(self, tokens):
        """What a decoder keeps from step to step: the outputs of every group."""
        groups = [*self.layers[0].plain, *([self.head_group] if self.head is not None else [])]
        return [
            tuple(torch.empty(tokens, n, dtype=self.dtype) for n in group.out_features) for group in groups
        ]

    def step(self, kind, x, out, routing=None):
        for layer in self.layers:
            qkv, o, gate_up, down = getattr(layer, kind)
            q, _, _ = qkv(x, routing=routing, out=out[0])
            (x,) = o(q, residual=x, routing=routing, out=out[1])
            gate, up = gate_up(x, routing=routing, out=out[2])
            (x,) = down(gate, up, residual=x, routing=routing, out=out[3])
        if self.head is not None:
            self.head_group(x, out=out[4])

    def torch_step(self, x, wide):
        for layer in self.layers:
            for group, h in zip(layer.weights, (x, x, x, wide), strict=True):
                for weight in group:
                    F.linear(h, weight)
        if self.head is not None:
            F.linear(x, self.head)

    def verify(self, tokens):
        layer, (routing, indices, weights, _) = self.layers[0], self.route(tokens, FEW_ENTRIES)
        for i, (group, ws, pairs) in enumerate(zip(layer.full, layer.weights, layer.factors, strict=True)):
            x, x2 = (torch.randn(tokens, group.in_features).to(self.dtype) for _ in range(2))
            x2 = x2 if i == 3 else None
            residual = torch.randn(tokens, self.hidden).to(self.dtype) if i % 2 else None
            out = group(x, x2, residual=residual, routing=routing)
            for j, y in enumerate(out):
                args = (layer.settings[i], x, x2, residual, ws[j], pairs[j], indices, weights)
                want, same = (reference(dtype, *args) for dtype in (torch.float32, self.dtype))
                scale = want.abs().max()
                error = ((y.float() - want).abs().max() / scale).item()
                allowed = (2 * (same.float() - want).abs().max() / scale).item() + TINY[self.dtype]
                if not error <= allowed:
                    raise SystemExit(
                        f"{self.name}, group {i}: error {error:.2g} > {allowed:.2g}, nothing is timed"
                    )


def reference(dtype, settings, x, x2, residual, weight, pair, indices, weights):
    x = x.to(dtype)
    if x2 is not None:
        x = F.silu(x) * x2.to(dtype)
    if "norm_weight" in settings:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
        x = settings["norm_weight"].to(dtype) * (x.float() * scale).to(dtype)
    A, B = (t.to(dtype).unflatten(0, (-1, RANK)) for t in pair)
    picks = indices.long()
    u = torch.einsum("ti,tkri->tkr", x, A[picks]) * weights.to(dtype)[..., None]
    y = F.linear(x, weight.to(dtype)) + torch.einsum("tkr,tkro->to", u, B[picks])
    return y if residual is None else y + residual.to(dtype)


def bench(model, tokens, repeats, threads):
    model.verify(tokens)
    x = torch.randn(tokens, model.hidden).to(model.dtype)
    wide = torch.randn(tokens, model.intermediate).to(model.dtype)
    out = model.buffers(tokens)
    few, distinct = model.route(tokens, FEW_ENTRIES), model.route(tokens, tokens * TOP_K)
    samples = interleaved(
        {
            "read": lambda: dispatch._C.read_memory(model.regions, threads),
            "torch": lambda: model.torch_step(x, wide),
            "slm_fast": lambda: model.step("plain", x, out),
            "o_few": lambda: model.step("o_only", x, out, few[0]),
            "full_few": lambda: model.step("full", x, out, few[0]),
            "full_distinct": lambda: model.step("full", x, out, distinct[0]),
        },
        repeats,
    )
    medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
    floors = {
        "o_few": few[3] * model.entry_bytes["o_only"],
        "full_few": few[3] * model.entry_bytes["full"],
        "full_distinct": distinct[3] * model.entry_bytes["full"],
    }
    base = medians["slm_fast"]
    extra = {name: (medians[name] / base - 1, floors[name] / model.bytes) for name in floors}
    print(
        f"{tokens:6d} {base * 1e3:9.2f} ms {model.bytes / base / 1e9:6.1f} GB/s {medians['read'] / base:6.1%}"
        f" {medians['torch'] * 1e3:9.2f} ms {medians['torch'] / base:6.2f}x"
        + "".join(f"   {e:+7.1%} ({f:6.1%})" for e, f in extra.values())
    )
    return {
        "model": model.name,
        "tokens": tokens,
        "seconds": medians,
        "bytes": model.bytes,
        "factors": floors,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, under a minute")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=None)
    args = parser.parse_args()
    if dispatch.available()["cpu"] is not None:
        raise SystemExit(dispatch.available()["cpu"])
    torch.manual_seed(0)
    dtype, threads = getattr(torch, args.dtype), torch.get_num_threads()
    tokens = args.tokens or ([1, 8] if args.quick else [1, 2, 4, 8, 16, 32, 64])
    records = []
    for name in args.model:
        model = Model(name, dtype, max(FEW_ENTRIES, max(tokens) * TOP_K))
        repeats = (5 if args.quick else 15) if name == "llama2-7b" else (11 if args.quick else 41)
        print(f"{name} {args.dtype}: {model.bytes / 1e6:.0f} MB of weights a step, {threads} threads")
        print(
            "tokens     slm_fast                   of read      F.linear"
            f"          mixture, K={TOP_K} r={RANK}, and its bytes: o_proj, {FEW_ENTRIES} entries;"
            f" all, {FEW_ENTRIES} entries; all, every row its own"
        )
        records += [bench(model, t, repeats, threads) for t in tokens]
        read = statistics.median(r["bytes"] / r["seconds"]["read"] for r in records if r["model"] == name)
        print(f"read: {read / 1e9:.1f} GB/s")
    report({"machine": machine(), "dtype": args.dtype, "results": records}, None)


if __name__ == "__main__":
    main()
