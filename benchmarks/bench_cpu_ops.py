"""CPU ops against what a user would otherwise call: torch, FAISS, and autograd of the reference.

Each row is verified before it is timed; the contenders take turns; medians are shown; the last line is JSON.
    python benchmarks/bench_cpu_ops.py [--repeats 30]
"""

import argparse
import json
import os
import platform
import statistics
import time

import torch

from slm_fast import dispatch, ops, reference

try:
    import faiss
except ImportError:
    faiss = None


def interleaved(contenders, repeats, min_seconds=0.002):
    """Median seconds per call of each contender, taking turns so that noise hits all of them alike."""
    loops = {}
    for name, fn in contenders.items():
        fn()
        begin = time.perf_counter()
        fn()
        loops[name] = max(1, int(min_seconds / max(time.perf_counter() - begin, 1e-7)))
    samples = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, fn in contenders.items():
            time.sleep(0.005)  # FAISS brings its own OpenMP pool, which spins for a while after each call
            fn()
            begin = time.perf_counter()
            for _ in range(loops[name]):
                fn()
            samples[name].append((time.perf_counter() - begin) / loops[name])
    return {name: statistics.median(s) for name, s in samples.items()}


def check(name, got, want, tolerance=1e-4):
    error = (got.float() - want.float()).abs().max().item() / max(want.float().abs().max().item(), 1e-12)
    if not error <= tolerance:
        raise SystemExit(f"{name}: wrong result (relative error {error:.2g}), nothing is timed")


def bench_search(num_keys, batch, repeats, dim=384, top_k=4):
    torch.manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(batch, dim), dim=-1)
    keys = torch.nn.functional.normalize(torch.randn(num_keys, dim), dim=-1)
    codes = ops.key_codes(keys)
    indices, _, scores = ops.key_search(query, keys, top_k=top_k, codes=codes)
    want_indices, _, want_scores = reference.key_search(query, keys, top_k=top_k)
    check("key_search", scores, want_scores)
    if not torch.equal(indices, want_indices):
        raise SystemExit("key_search: wrong indices, nothing is timed")
    contenders = {
        "slm_fast": lambda: ops.key_search(query, keys, top_k=top_k, codes=codes),
        "without codes": lambda: ops.key_search(query, keys, top_k=top_k),
        "torch": lambda: (query @ keys.T).topk(top_k, dim=-1),
    }
    if faiss is not None:
        index = faiss.IndexFlatIP(dim)
        index.add(keys.numpy())
        query_np = query.numpy()
        contenders["faiss"] = lambda: index.search(query_np, top_k)
    flops = 2 * num_keys * dim * batch
    return (
        f"key_search P={num_keys} D={dim} B={batch}",
        interleaved(contenders, repeats),
        flops,
        num_keys * dim,
    )


def make_pool(num_entries, rank, in_features, out_features):
    ranks = torch.full((num_entries,), rank, dtype=torch.int32)
    start = (ranks.cumsum(0) - ranks).int()
    A = torch.randn(num_entries * rank, in_features) / in_features**0.5
    B = torch.randn(num_entries * rank, out_features)
    return A, B, start, ranks, torch.ones(num_entries)


def bench_decode(rows, repeats, features=576, top_k=2, rank=8, num_entries=100):
    torch.manual_seed(0)
    A, B, start, ranks, scaling = make_pool(num_entries, rank, features, features)
    x, y = torch.randn(rows, features), torch.randn(rows, features)
    indices = torch.stack([torch.randperm(num_entries)[:top_k] for _ in range(rows)]).int()
    weights = torch.softmax(torch.randn(rows, top_k), -1)
    A3, B3 = A.view(num_entries, rank, features), B.view(num_entries, rank, features)
    picks = indices.long()

    def gathered():
        u = torch.bmm(A3[picks].flatten(1, 2), x[:, :, None]).view(rows, top_k, rank) * weights[..., None]
        return torch.baddbmm(y[:, None], u.view(rows, 1, -1), B3[picks].flatten(1, 2)).squeeze(1)

    out = y.clone()
    args = (x, A, B, start, ranks, scaling, indices, weights)
    check("mixture", ops.mixture(y.clone(), *args), reference.mixture(y, *args))
    check("gather + bmm", gathered(), reference.mixture(y, *args))
    medians = interleaved({"slm_fast": lambda: ops.mixture(out, *args), "torch": gathered}, repeats)
    macs = rows * top_k * rank * 2 * features
    return f"mixture decode rows={rows} {features}x{features} K={top_k} r={rank}", medians, 2 * macs, 4 * macs


def bench_train(repeats, rows=32, length=128, in_features=384, out_features=1536, top_k=4, rank=8):
    torch.manual_seed(0)
    A, B, start, ranks, scaling = make_pool(top_k * 2, rank, in_features, out_features)
    owned = (top_k * rank, 2 * top_k * rank)
    A_owned, B_owned = (torch.nn.Parameter(t[owned[0] : owned[1]]) for t in (A, B))
    x = torch.randn(rows * length, in_features, requires_grad=True)
    y = torch.randn(rows * length, out_features)
    dy = torch.randn_like(y)
    indices = torch.stack([torch.randperm(top_k) + top_k for _ in range(rows)]).int()
    weights = torch.softmax(torch.randn(rows, top_k), -1)
    args = (start, ranks, scaling, indices, weights)

    def step(backend):
        x.grad = A_owned.grad = B_owned.grad = None
        out = ops.mixture(
            y.clone(), x, A, B, *args, A_owned=A_owned, B_owned=B_owned, owned=owned, backend=backend
        )
        out.backward(dy)
        return out.detach(), x.grad, A_owned.grad, B_owned.grad

    A_all, B_all = A.clone().requires_grad_(), B.clone().requires_grad_()

    def autograd():
        x.grad = A_all.grad = B_all.grad = None
        out = reference.mixture(y.clone(), x, A_all, B_all, *args)
        out.backward(dy)
        mine = slice(*owned)
        return out.detach(), x.grad, A_all.grad[mine], B_all.grad[mine]

    for got, want in zip(step("cpu"), autograd(), strict=True):
        check("mixture step", got, want)
    medians = interleaved({"slm_fast": lambda: step("cpu"), "autograd": autograd}, repeats)
    flops = 2 * rows * length * top_k * rank * (in_features + out_features) * 3
    traffic = 4 * rows * length * (3 * in_features + 4 * out_features)
    return (
        f"mixture fwd+bwd T={rows}x{length} {in_features}->{out_features} K={top_k} r={rank}",
        medians,
        flops,
        traffic,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    if dispatch.available()["cpu"] is not None:
        raise SystemExit(dispatch.available()["cpu"])
    results = [bench_search(p, b, repeats) for p in (1000, 100_000) for b in (1, 16)]
    results += [bench_decode(rows, repeats) for rows in (1, 8, 32)]
    results.append(bench_train(repeats))
    records = []
    for name, medians, flops, traffic in results:
        ours = medians["slm_fast"]
        others = "".join(
            f"  {k} {v * 1e6:9.1f} us ({v / ours:5.2f}x)" for k, v in medians.items() if v != ours
        )
        rates = f"{flops / ours / 1e9:6.1f} GFLOP/s {traffic / ours / 1e9:6.1f} GB/s"
        print(f"{name:54s} {ours * 1e6:9.1f} us {rates}{others}")
        records.append({"name": name, "seconds": medians})
    info = dispatch.cpu_info()
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps({"machine": machine | info, "threads": torch.get_num_threads(), "results": records}))


if __name__ == "__main__":
    main()
