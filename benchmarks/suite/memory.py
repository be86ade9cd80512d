"""The memory that a call takes at most, beyond what was allocated before it.

On CUDA the caching allocator's peak, which is exact for tensors and blind to the CUDA context and to what
libraries allocate by themselves; of a CUDA graph that of its capture, since a replay allocates nothing. On
Linux the growth of the process's resident memory: pages of 4 kB that the
call touched first. Blocks that fit into pages in use do not show in it, and what a first call sets up once
(buffers of libraries, stacks of threads) does: below some megabytes it is no more than an order of
magnitude. Elsewhere there is none.
"""

import ctypes
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def resident(field: str) -> int:
    """Bytes: VmRSS is now, VmHWM the peak since it was reset. Raises OSError where the system has none."""
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field}")


def reset_peak() -> None:
    """From now on VmHWM is of memory in use: what is free goes back to the system first."""
    ctypes.CDLL(None).malloc_trim(0)
    (PROCESS / "clear_refs").write_text("5")


class Peak:
    """`with Peak(clock) as peak:`, then `peak.bytes`, or None where it cannot be had.

    clock: the name of the case's; "wall" is a CPU's, "events" CUDA's.
    """

    def __init__(self, clock: str) -> None:
        self.clock, self.bytes, self.before = clock, None, None

    def __enter__(self) -> "Peak":
        if self.clock == "events":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif self.clock == "wall":
            try:
                reset_peak()
                self.before = resident("VmRSS")
            except (OSError, AttributeError, TypeError):  # no such file, libc or way to open it
                self.before = None
        return self

    def __exit__(self, *_) -> None:
        if self.before is None:
            return
        if self.clock == "events":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        else:
            self.bytes = max(0, resident("VmHWM") - self.before)
