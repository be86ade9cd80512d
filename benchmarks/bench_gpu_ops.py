"""GPU ops against the frozen linear and against PyTorch, at LLaMA-2-7B's shapes, in bf16.

First the card's two ceilings: bandwidth of a copy, rate of a large bf16 product. Then groups of contenders:
each is held against the fp32 formula (at most twice the error of the same formula in bf16, plus tiny), then
captured in a CUDA graph of several layers' weights, checked again after a replay over NaN, and timed in turns
with the others: median, spread (distance of the quartiles) and, from the pairs of each round, what it adds
to the frozen linear. "frozen again" is the noise. A wrong result has no time. The last line is JSON.

    PYTHONPATH=. python benchmarks/bench_gpu_ops.py [--quick] [--budget SECONDS] [--json FILE]
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gpu_timing
import gpu_workloads as workloads
import torch
from gpu_workloads import Batch, Contender
from roofline import RESIDENT, ROW, targets

from slm_fast import dispatch, ops

O_PROJ, DOWN = (4096, 4096), (11008, 4096)  # in_features, out_features
DECODING, PREFILL = (1, 8, 16, 64), (4096, 16384)
NUM_KEYS, DIM, SEARCH_TOP_K = 1_000_000, 768, 4
SEARCH_TARGET = 80.0  # percent of the copy bandwidth, at one query
FROZEN, AGAIN = "frozen", "frozen again"


@dataclass(frozen=True)
class Group:
    """Contenders of one problem; the first is what the others are compared with. `make` builds them late."""

    name: str
    make: Callable[[], tuple[list[Contender], int]]  # and the number of layers in a graph
    rounds: int
    key_bytes: int = 0  # read by one call, where bandwidth is the question
    target: float | None = None  # percent of the copy bandwidth


def decode_group(rows: int, shape: tuple[int, int], rounds: int, l2: int) -> Group:
    def make():
        layers = workloads.copies(2 * shape[0] * shape[1], l2, least=8)
        batch, target = Batch(rows, 1, *shape, layers=layers), targets(rows)
        return [
            workloads.forward(batch, "frozen"),
            workloads.forward(batch, "mixture", target=target["gather"]),
            workloads.forward(batch, "mixture", given_u=True, target=target["gather"]),
            workloads.forward(batch, "fused_linear", target=target["fused"]),
            workloads.forward(batch, "fused_linear", given_u=True, target=target["fused"]),
            workloads.forward(batch, "segment_linear", target=target["fused"]),
            workloads.forward(batch, "segment_linear", given_u=True, target=target["fused"]),
        ], layers

    return Group(f"decode {rows} rows {shape[0]}->{shape[1]}", make, rounds)


def prefill_group(tokens: int, shape: tuple[int, int], rounds: int) -> Group:
    def make():
        batch, target = Batch(tokens // ROW, ROW, *shape, layers=3), targets(tokens)["fused"]
        contenders = [workloads.forward(batch, "frozen"), workloads.forward(batch, "mixture", target=target)]
        for op in ("segment_linear", "fused_linear"):
            contenders.append(workloads.forward(batch, op, target=target))
            contenders.append(workloads.forward(batch, op, given_u=True, target=target))
        return contenders, 3

    return Group(f"prefill {tokens} tokens {shape[0]}->{shape[1]}", make, rounds)


def backward_group(tokens: int, shape: tuple[int, int], rounds: int) -> Group:
    def make():
        picks = workloads.OWNED // workloads.RANK  # rows are restricted to the entries of the running task
        batch = Batch(tokens // ROW, ROW, *shape, layers=2, picks=picks)
        target = targets(tokens)["backward"]
        trained = ("mixture", "segment_linear", "fused_linear")
        owned = [workloads.backward(batch, op, target=target) for op in trained]
        return [workloads.backward(batch, "frozen"), *owned], 2

    return Group(f"backward {tokens} tokens {shape[0]}->{shape[1]}", make, rounds)


def shrink_group(op: str, tokens: int, rounds: int, l2: int) -> Group:
    features, linears = (O_PROJ[0], 3) if op == "norm_shrink" else (DOWN[0], 1)
    rows, length = (tokens, 1) if tokens < ROW else (tokens // ROW, ROW)

    def make():
        layers = 2 if tokens >= ROW else workloads.copies(2 * RESIDENT * features * linears, l2)
        batch = Batch(rows, length, features, layers=layers, linears=linears)
        return [workloads.shrink(batch, op, kind) for kind in ("plain", "gather", "resident")], layers

    return Group(f"{op} {tokens} tokens {features} x{linears}", make, rounds)


def search_group(num_queries: int, rounds: int) -> Group:
    def make():
        return search_contenders(num_queries), 1

    name = f"key_search {NUM_KEYS} x {DIM}, {num_queries} queries"
    return Group(name, make, rounds, NUM_KEYS * DIM * 2, SEARCH_TARGET if num_queries == 1 else None)


def search_contenders(
    num_queries: int, num_keys: int = NUM_KEYS, dim: int = DIM, device: str = "cuda"
) -> list[Contender]:
    generator = torch.Generator(device).manual_seed(0)
    query = torch.randn(num_queries, dim, generator=generator, device=device)
    keys = torch.randn(num_keys, dim, generator=generator, device=device).to(torch.bfloat16)
    exact = query @ keys.float().T
    best = exact.topk(SEARCH_TOP_K).values

    def ours(_):
        indices, _, scores = ops.key_search(query, keys, top_k=SEARCH_TOP_K, backend="gpu")
        return scores, indices

    def in_torch(_):
        return (query.to(keys.dtype) @ keys.T).topk(SEARCH_TOP_K)

    def contender(name, run, dtype=torch.bfloat16, **options):
        def picked(results):  # the scores, and the exact ones of the keys that were found
            return [results[0].float(), exact.gather(1, results[1].long())]

        def plain(_, dtype):
            return [best, best] if dtype == torch.float32 else picked(in_torch(0))

        return Contender(name, run, plain, dtype, results=picked, **options)

    contenders = [contender("torch", in_torch), contender("slm_fast", ours, torch.float32)]
    return [*contenders, contender("faiss", faiss_search(query, keys), graph=False)]


def faiss_search(query: torch.Tensor, keys: torch.Tensor) -> Callable:
    """An exact search of FAISS on the GPU over fp16 keys; raises at its first call where there is none."""
    made = []

    def index():
        import faiss

        if not hasattr(faiss, "StandardGpuResources"):
            raise RuntimeError("FAISS is installed without its GPU part")
        import faiss.contrib.torch_utils  # noqa: F401 (indexes take tensors from here on)

        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = True
        made.append(faiss.StandardGpuResources())
        made.append(faiss.GpuIndexFlatIP(made[0], keys.shape[1], config))
        for chunk in keys.split(100_000):
            made[1].add(chunk.float())
        return made[1]

    return lambda _: (made[1] if made else index()).search(query, SEARCH_TOP_K)


def groups(quick: bool, l2: int) -> Iterator[Group]:
    """Most wanted first: what the time does not suffice for is left out."""
    rounds = 10 if quick else 40
    shapes = (O_PROJ,) if quick else (O_PROJ, DOWN)
    decoding, prefill = ((1, 64), PREFILL[:1]) if quick else (DECODING, PREFILL)
    for shape in shapes:
        yield from (decode_group(rows, shape, rounds, l2) for rows in decoding)
        yield from (prefill_group(tokens, shape, rounds) for tokens in prefill)
        yield from (backward_group(tokens, shape, rounds) for tokens in prefill)
        if shape == O_PROJ:
            yield from (search_group(queries, rounds) for queries in ((1,) if quick else (1, 8, 64)))
    for tokens in (64,) if quick else (*DECODING, *PREFILL):
        yield from (shrink_group(op, tokens, rounds, l2) for op in ("norm_shrink", "silu_mul_shrink"))


def ready(contender: Contender, layers: int) -> Callable[[], object]:
    """What to time: raises unless the results are right, in a call of their own and from the graph."""
    if not contender.graph:
        check(contender, contender.run(0), 0)
        return lambda: [contender.run(layer) for layer in range(layers)]
    if contender.prepare is not None:
        contender.prepare()
    check(contender, contender.run(0), 0)
    replay = gpu_timing.Captured(contender.run, layers, contender.prepare)
    for tensor in (t for results in replay.results for t in results if t.is_floating_point()):
        tensor.fill_(torch.nan)
    replay()
    for layer in sorted({0, layers - 1}):
        check(contender, replay.results[layer], layer)
    return replay


def check(contender: Contender, results: Sequence, layer: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if reason := contender.judge(results, layer):
        raise RuntimeError(f"{reason}, layer {layer}")


def measure(group: Group, bandwidth: float, clock: gpu_timing.Clock = gpu_timing.device_clock) -> list[dict]:
    """A record of each contender: its time, or why it has none."""
    contenders, layers = group.make()
    calls, records = {}, {}
    for contender in contenders:
        records[contender.name] = {"group": group.name, "contender": contender.name}
        try:
            calls[contender.name] = ready(contender, layers)
        except Exception as error:  # one failure must not end the run: its words are the finding
            records[contender.name]["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        finally:
            contender.wanted.clear()
    base = contenders[0].name
    if base == FROZEN and base in calls:
        calls[AGAIN] = calls[base]
        records[AGAIN] = {"group": group.name, "contender": AGAIN}
    samples = gpu_timing.interleave(calls, group.rounds, clock=clock) if calls else {}
    by_name = {contender.name: contender for contender in contenders}
    for name, taken in samples.items():
        target = by_name[name].target if name in by_name else None
        records[name] |= timing(taken, samples.get(base), layers, target)
        if group.key_bytes:
            records[name] |= share_of_bandwidth(records[name], group, bandwidth)
    return list(records.values())


def timing(taken: list[float], base: list[float] | None, layers: int, target: float | None) -> dict:
    seconds = statistics.median(taken) / layers
    record = {"microseconds": round(1e6 * seconds, 3), "spread": round(gpu_timing.spread(taken), 4)}
    if base is None:
        return record
    low, middle, high = gpu_timing.quartiles(gpu_timing.ratios(taken, base))
    record |= {"ratio": round(middle, 4), "added_percent": round(100 * (middle - 1), 2)}
    record["added_quartiles"] = [round(100 * (low - 1), 2), round(100 * (high - 1), 2)]
    return (
        record if target is None else record | {"target_percent": target, "met": 100 * (middle - 1) <= target}
    )


def share_of_bandwidth(record: dict, group: Group, bandwidth: float) -> dict:
    rate = group.key_bytes / (record["microseconds"] * 1e-6)
    share = 100 * rate / bandwidth
    result = {"gb_per_second": round(rate / 1e9, 1), "bandwidth_percent": round(share, 1)}
    if group.target is not None and record["contender"] == "slm_fast":
        result |= {"target_percent": group.target, "met": share >= group.target}
    return result


def line(record: dict) -> str:
    head = f"{record['group']:42}{record['contender']:26}"
    if "error" in record:
        return f"{head} {record['error'].splitlines()[0][:80]}"
    if "microseconds" not in record:
        return head
    text = f"{head}{record['microseconds']:11.2f} us  +-{100 * record['spread']:4.1f}%"
    if "ratio" in record and record["ratio"] != 1:
        text += f"  {record['added_percent']:+8.1f}%"
    if "bandwidth_percent" in record:
        text += f"  {record['gb_per_second']:8.1f} GB/s, {record['bandwidth_percent']:.0f}% of a copy"
    if "target_percent" in record:
        text += f"  (target {record['target_percent']:g}%: {'met' if record['met'] else 'MISSED'})"
    return text


def write(path: Path | None, result: dict) -> None:
    """The file is replaced as a whole, so that a killed run leaves what was measured."""
    if path is not None:
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
        partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute: few sizes, few rounds")
    parser.add_argument("--budget", type=float, help="seconds after which no group is begun")
    parser.add_argument("--json", type=Path, help="write the results there after every group")
    args = parser.parse_args()
    if (reason := dispatch.available()["gpu"]) is not None or not torch.cuda.is_available():
        raise SystemExit(f"no GPU to measure: {reason or 'torch sees no CUDA device'}")
    torch.set_float32_matmul_precision("highest")
    begin, budget = time.perf_counter(), args.budget or (60 if args.quick else 420)
    result: dict = {"machine": gpu_timing.machine(), "results": [], "left_out": [], "complete": False}
    bandwidth, rate = gpu_timing.copy_bandwidth(), gpu_timing.matmul_rate()
    result["ceilings"] = {"copy_bytes_per_second": bandwidth, "bf16_operations_per_second": rate}
    print(f"{result['machine']['card']}: copy {bandwidth / 1e12:.2f} TB/s, bf16 {rate / 1e12:.0f} TFLOP/s")
    write(args.json, result)
    for group in groups(args.quick, gpu_timing.l2_bytes()):
        if time.perf_counter() - begin > budget:
            result["left_out"].append(group.name)
            continue
        try:
            records = measure(group, bandwidth)
        except Exception as error:
            words = f"{type(error).__name__}: {str(error).strip()[:300]}"
            records = [{"group": group.name, "contender": "all", "error": words}]
        print("\n".join(line(record) for record in records), flush=True)
        result["results"] += records
        result["seconds"] = round(time.perf_counter() - begin, 1)
        write(args.json, result)
        gc.collect()
        torch.cuda.empty_cache()
    result["complete"] = not result["left_out"]
    write(args.json, result)
    print(json.dumps(result))
    raise SystemExit(any("error" in r and r["contender"] != "faiss" for r in result["results"]))


if __name__ == "__main__":
    main()
