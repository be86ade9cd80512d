"""Where numbers were measured: the machine line, and the ceilings that its memory and arithmetic set."""

import functools
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import cpu_timing
import gpu_timing
import torch

from slm_fast import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[2]
SIZE = 1024  # of the product that measures arithmetic
SMALL = 512  # of the one that measures it beside a case
LONG = 0.5  # seconds after which a ceiling is taken as it is


def commit() -> str | None:
    """The checkout's commit, "+" where files differ from it; None outside of one."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def cpuinfo(field: str) -> list[str]:
    """A field of every core, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(field)]


def cpu_name() -> str:
    return next(iter(cpuinfo("model name")), platform.processor() or platform.machine())


def cpu_megahertz() -> float | None:
    """Of the fastest core, now."""
    return max(map(float, cpuinfo("cpu MHz")), default=None)


def describe(device: str) -> dict:
    """What the result file says of the machine."""
    found = cpu_timing.machine() | {"cpu": cpu_name(), "megahertz": cpu_megahertz(), "commit": commit()}
    found |= {"python": platform.python_version(), "device": device, "memory_bytes": memory_bytes()}
    found["cache_bytes"] = cache_bytes(device)
    return found | (gpu_timing.machine() if device == "cuda" else {"core_cache_bytes": core_cache_bytes()})


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes(device: str) -> int:
    """That can be allocated now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    return memory_bytes()


def cache_bytes(device: str) -> int:
    """Of the last level: what inputs that are taken in turns must exceed."""
    if device == "cuda":
        return gpu_timing.l2_bytes()
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes) or 32 << 20


def core_cache_bytes() -> int:
    """Of the level above the last one that each CPU core has for itself, of all threads."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    size = path.read_text().strip() if path.exists() else "512K"
    return torch.get_num_threads() * int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]]


def natural_dtype() -> torch.dtype:
    """That a model has on this CPU: bf16 where it multiplies bf16, else fp32."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def _fastest(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
        if sum(times) > LONG:
            break
    return min(times)


def ceilings(device: str) -> dict:
    """bytes/s of reading (CPU) and of a copy, read and written; operations/s of a large product by dtype."""
    if device == "cuda":
        return {
            "copy_bytes_per_second": gpu_timing.copy_bandwidth(),
            "operations_per_second": {
                dtype_name(dtype): gpu_timing.matmul_rate(dtype=dtype)
                for dtype in (torch.float32, torch.float16, torch.bfloat16)
            },
        }
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    copy = 2 * 4 * source.numel() / _fastest(lambda: target.copy_(source), 5)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        rates[dtype_name(dtype)] = 2 * SIZE**3 / _fastest(lambda a=a, b=b: a @ b, 5)
    return {
        "read_bytes_per_second": cpu_timing.read_bandwidth(),
        "copy_bytes_per_second": copy,
        "operations_per_second": rates,
    }


def _probed_bytes() -> int:
    """That a probe reads: twice the last cache."""
    return 2 * cache_bytes("cpu") // 4 * 4


@functools.cache
def probes() -> dict[str, Callable[[int], object]]:
    """Calls that tell how fast the CPU is at the moment: other users of a shared one slow everything down.

    read: more than the last cache holds.  product: `SMALL` x `SMALL` fp32 matrices.
    """
    buffer, threads = torch.ones(_probed_bytes() // 4), torch.get_num_threads()
    a, b, out = torch.randn(3, SMALL, SMALL)
    return {
        "read": lambda _: dispatch._C.read_memory([(buffer.data_ptr(), buffer.nbytes)], threads),
        "product": lambda _: torch.mm(a, b, out=out),
    }


def pace(seconds: dict[str, float]) -> dict:
    """Speeds by the probes' seconds a call."""
    return {
        "read_bytes_per_second": _probed_bytes() / seconds["read"],
        "float32_operations_per_second": 2 * SMALL**3 / seconds["product"],
    }


def bandwidth(ceilings: dict) -> float:
    """Bytes/s that reading can reach: of a copy where reading alone was not measured."""
    return ceilings.get("read_bytes_per_second") or ceilings["copy_bytes_per_second"]


def product_rate(ceilings: dict, dtype: str | None) -> float | None:
    """Operations/s that products in a dtype can reach, or None where it was not measured.

    What is narrower than fp32 can be widened: a CPU whose products in bf16 are slow is held to fp32's.
    """
    rates = ceilings["operations_per_second"]
    names = {"float32": ("float32",), "float16": ("float16", "float32"), "bfloat16": ("bfloat16", "float32")}
    return max((rates[name] for name in names.get(dtype, ()) if name in rates), default=None)


def dtype_of(record: dict) -> str | None:
    """Of a record's operations; older ones have it among their axes, or not at all."""
    return record.get("dtype") or record["axes"].get("dtype")


def rates(record: dict, ceilings: dict) -> dict:
    """Bytes and operations per second of ours, and their shares of what the machine can reach: of memory's
    bandwidth, and of large products in the record's dtype (None: not measured)."""
    seconds, found = record["contenders"].get(record["ours"], {}).get("seconds"), {}
    most = {"bytes": bandwidth(ceilings), "operations": product_rate(ceilings, dtype_of(record))}
    for what, ceiling in most.items():
        if seconds and record[what]:
            found[f"{what}_per_second"] = reached = record[what] / seconds
            found[f"{what}_share"] = reached / ceiling if ceiling else None
    return found


def rates_line(record: dict, ceilings: dict) -> str:
    """Those in words; nothing where there are none."""
    found, words = rates(record, ceilings), []
    for what, unit, of in (("bytes", "GB/s", "memory's"), ("operations", "GFLOP/s", "products'")):
        if f"{what}_per_second" in found:
            share = found[f"{what}_share"]
            words.append(f"{found[f'{what}_per_second'] / 1e9:,.1f} {unit}")
            words[-1] += f" ({share:.0%} of {of})" if share is not None else ""
    return ", ".join(words)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gpu_clocks(machine: dict) -> str:
    """Those that were read, with what they are at most; older results have none."""
    text = ""
    for name, what in (("SM", "sm"), ("memory", "memory")):
        if (now := machine.get(f"{what}_megahertz")) is not None:
            most = machine[f"{what}_megahertz_max"]
            text += f", {name} {now:,}{'' if most is None else f' of {most:,}'} MHz"
    return text


def line(machine: dict, ceilings: dict) -> str:
    """The machine in words."""
    rates = ", ".join(f"{n} {r / 1e9:,.0f} GFLOP/s" for n, r in ceilings["operations_per_second"].items())
    speeds = [f"copy {ceilings['copy_bytes_per_second'] / 1e9:,.1f} GB/s", rates]
    if "read_bytes_per_second" in ceilings:
        speeds.insert(0, f"read {ceilings['read_bytes_per_second'] / 1e9:,.1f} GB/s")
    if machine["device"] == "cuda":
        where = f"{machine['card']}{gpu_clocks(machine)}, driver {machine['driver']}"
        where += f", triton {machine['triton']}"
    else:
        clock = f", {machine['megahertz']:,.0f} MHz" if machine.get("megahertz") else ""
        where = f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}{clock}"
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    return f"{where}; {versions}; commit {machine['commit'] or 'unknown'}; {', '.join(speeds)}"
