"""How CPU benchmarks take times, measure memory's speed, name their machine and report."""

import json
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from slm_fast import dispatch


def interleaved(contenders: dict[str, Callable], rounds: int, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of each call; the contenders take turns, in ever another order.

    warm: right after a call of the same that is not timed, for calls shorter than what the contender before
    leaves in the caches.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            if warm:
                contenders[name]()
            begin = time.perf_counter()
            contenders[name]()
            samples[name].append(time.perf_counter() - begin)
    return samples


def read_bandwidth() -> float:
    """Bytes per second that all threads read from memory, the fastest of several passes."""
    buffer = torch.ones(1 << 28, dtype=torch.float32)
    regions, threads, times = [(buffer.data_ptr(), 4 * buffer.numel())], torch.get_num_threads(), []
    for _ in range(5):
        begin = time.perf_counter()
        dispatch._C.read_memory(regions, threads)
        times.append(time.perf_counter() - begin)
    return 4 * buffer.numel() / min(times)


def machine() -> dict:
    found = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    found |= {"torch": torch.__version__, "transformers": transformers.__version__}
    return found | {"threads": torch.get_num_threads(), **dispatch.cpu_info()}


def report(result: dict, path: Path | None) -> None:
    """Write the result to `path`, if there is one, and print it as the last line."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    print(json.dumps(result))
