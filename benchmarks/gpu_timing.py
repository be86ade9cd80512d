"""Timing on a CUDA device: layers captured in a graph, contenders that take turns, when a result is right."""

import math
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Of the largest wanted value: what a result may be off by beyond twice the error of plain PyTorch.
TINY = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
CLOCKS = {  # of a card, in MHz, as nvidia-smi names them
    "sm_megahertz": "clocks.sm",
    "sm_megahertz_max": "clocks.max.sm",
    "memory_megahertz": "clocks.mem",
    "memory_megahertz_max": "clocks.max.mem",
}
Clock = Callable[[Callable[[], object], int], float]


def deviation(got: Tensor, want: Tensor) -> float:
    """The largest difference as a share of the largest wanted value; infinite if anything is not finite."""
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return math.inf
    if not want.numel():
        return 0.0
    scale = want.float().abs().max().clamp(min=1e-6)
    return float((got.float() - want.float()).abs().max() / scale)


def fault(got: Sequence[Tensor], exact: Sequence[Tensor], same: Sequence[Tensor | None], dtype) -> str | None:
    """Why results are wrong, or None. `exact`: in fp32. `same`: plain PyTorch in `dtype`, whose error may be
    made twice; None where there is none."""
    for i, (g, w, s) in enumerate(zip(got, exact, same, strict=True)):
        allowed = TINY[dtype] + (0.0 if s is None else 2 * deviation(s, w))
        error = deviation(g, w)
        if not error <= allowed:
            return f"wrong result {i}: error {error:.1e}, allowed {allowed:.1e}"
    return None


def device_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call on the device. The call in front lets the host run ahead of the first event."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / repeats


class Captured:
    """The work of `layers` layers in one CUDA graph; a call replays it.

    `prepare` runs first, outside of the graph and on its stream: autograd runs a backward on the stream of
    its forward. What it returns, and `results`, what the work returned for each layer, keep their memory: a
    replay can be checked after the results were overwritten. `peak_bytes` is the most that the graph's
    tensors take at once: a replay allocates nothing.
    """

    def __init__(
        self,
        work: Callable[[int], Sequence[Tensor]],
        layers: int,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.state = None if prepare is None else prepare()
            for layer in range(layers):  # compiles, loads and allocates what may not be inside a capture
                work(layer)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.results = [work(layer) for layer in range(layers)]
            self.peak_bytes = torch.cuda.max_memory_allocated() - before

    def __call__(self) -> None:
        self.graph.replay()


def interleave(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    min_seconds: float = 0.002,
    clock: Clock = device_clock,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, `rounds` samples; they take turns, so that noise hits all alike."""
    repeats = {
        name: max(1, math.ceil(min_seconds / max(clock(call, 2), 1e-7))) for name, call in calls.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(clock(call, repeats[name]))
    return samples


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(samples: Sequence[float]) -> float:
    """Distance of the quartiles as a share of the median."""
    low, middle, high = quartiles(samples)
    return (high - low) / middle


def ratios(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    """Of the two samples of each round, which drift together."""
    return [ours / other for ours, other in zip(samples, base, strict=True)]


def copy_bandwidth(rounds: int = 20, num_bytes: int = 1 << 31) -> float:
    """Bytes per second of a copy on the device, bytes read and bytes written."""
    source = torch.empty(num_bytes // 4, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    samples = interleave({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return 2 * num_bytes / statistics.median(samples)


def matmul_rate(rounds: int = 20, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations per second of a large product of random numbers; a multiply-add is two."""
    a, b = (torch.randn(size, size, dtype=dtype, device="cuda") for _ in range(2))
    samples = interleave({"matmul": lambda: a @ b}, rounds)["matmul"]
    return 2 * size**3 / statistics.median(samples)


def driver_and_clocks(uuid: str) -> dict:
    """The driver and `CLOCKS`, now and at most, of the card of that UUID, or of the first one; None where a
    clock cannot be read."""
    fields = ",".join(("uuid", "driver_version", *CLOCKS.values()))
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    rows = [[value.strip() for value in line.split(",")] for line in said.splitlines()]
    rows = [row for row in rows if len(row) == 2 + len(CLOCKS)]
    if not rows:
        return {"driver": f"unknown: {' '.join(said.split())}"} | dict.fromkeys(CLOCKS)
    _, driver, *clocks = next((row for row in rows if uuid in row[0]), rows[0])
    read = [int(clock) if clock.isdecimal() else None for clock in clocks]
    return {"driver": driver} | dict(zip(CLOCKS, read, strict=True))


def machine() -> dict:
    """What the numbers were measured on; its clocks before the first of them."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "card": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": l2_bytes(),
        **driver_and_clocks(str(properties.uuid)),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def l2_bytes() -> int:
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
