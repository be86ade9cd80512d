"""Storage of the low-rank factors of one linear, for all entries of a pool."""

import torch
from torch import Tensor, nn


def grown(buffer: Tensor, capacity: int, pinned: bool = False) -> Tensor:
    """A zero-extended copy of `buffer` with `capacity` rows."""
    out = buffer.new_zeros(capacity, *buffer.shape[1:], pin_memory=pinned)
    out[: buffer.shape[0]] = buffer
    return out


class Factors(nn.Module):
    """The stacked factors of all entries for one linear: A [capacity, in_features], B [capacity,
    out_features].

    Rows that are being learnt are also `A_owned` and `B_owned`, parameters that share the buffers' storage:
    the optimiser writes straight into the pool, and rows of other tasks are plain buffers that nothing can
    move.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("A", torch.zeros(0, in_features, dtype=dtype))
        self.register_buffer("B", torch.zeros(0, out_features, dtype=dtype))
        self.A_owned: nn.Parameter | None = None
        self.B_owned: nn.Parameter | None = None
        self.owned = (0, 0)

    def own(self, begin: int, end: int) -> None:
        self.owned = (begin, end)
        self.A_owned = nn.Parameter(self.A[begin:end])
        self.B_owned = nn.Parameter(self.B[begin:end])

    def disown(self) -> None:
        self.owned = (0, 0)
        self.A_owned = self.B_owned = None

    def grow(self, capacity: int, pinned: bool = False) -> None:
        self.A, self.B = grown(self.A, capacity, pinned), grown(self.B, capacity, pinned)
        self._tie()

    def _tie(self) -> None:
        if self.A_owned is not None:
            begin, end = self.owned
            self.A_owned.data, self.B_owned.data = self.A[begin:end], self.B[begin:end]

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._tie()  # copying and unpickling clone parameters

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._tie()
        return self
