"""Tensors in huge pages: reading all weights then costs a page walk every 2 MiB, not every 4 KiB."""

import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE, LINE = 2 << 20, 64
MOST_BYTES = 256 << 20  # that are in memory twice while they move


def moved(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values side by side in memory for which the kernel is asked for huge pages.

    Each tensor has a storage of its own; the memory goes with the last of them. Returns `tensors` where
    there is nothing to win: not all on the CPU and contiguous, less than a page together, another system than
    Linux, or `SLM_FAST_HUGE_PAGES=0`.
    """
    sizes = [t.numel() * t.element_size() for t in tensors]
    plain = all(t.is_cpu and t.layout is torch.strided and t.is_contiguous() for t in tensors)
    wanted = os.environ.get("SLM_FAST_HUGE_PAGES", "1") != "0" and hasattr(mmap, "MADV_HUGEPAGE")
    if not plain or not wanted or sum(sizes) < PAGE:
        return list(tensors)
    memory = mmap.mmap(-1, sum(sizes) + LINE * len(sizes) + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return list(tensors)
    at = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % PAGE
    out = []
    for tensor, size in zip(tensors, sizes, strict=True):
        if size == 0:
            out.append(tensor)
            continue
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=at)
        out.append(copy.view(tensor.shape).copy_(tensor))
        at += -(-size // LINE) * LINE
    return out


@torch.inference_mode(False)
@torch.no_grad()
def to_huge_pages(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Move parameters, which stay the same objects. Groups of them share a mapping, so few pages are cut.

    Those of a class of their own, as quantised weights are, stay where they are.
    """
    parameters = [p for p in parameters if type(p) is torch.nn.Parameter]
    group: list[torch.nn.Parameter] = []
    for i, parameter in enumerate(parameters):
        group.append(parameter)
        if i + 1 == len(parameters) or sum(p.nbytes for p in group) >= MOST_BYTES:
            for member, data in zip(group, moved([p.data for p in group]), strict=True):
                member.data = data
            group = []
