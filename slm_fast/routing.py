"""Which pool entries answer each row of a batch, and with what weight."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    """Picked entries of every row. Tensors only, so it pickles, moves and scatters like any batch.

    indices: [B, K] int32, slots of the pool.  weights: [B, K] fp32, 0 = not used.  scores: [B, K] fp32, in
    the metric's units (-inf on picks that do not exist).  pool_version: [B] int64, the pool's version when it
    was made.
    """

    indices: Tensor
    weights: Tensor
    scores: Tensor
    pool_version: Tensor

    @classmethod
    def make(
        cls, indices: Tensor, weights: Tensor, scores: Tensor | None = None, pool_version: int = 0
    ) -> "Routing":
        """Build a routing by hand. Raises ValueError on shapes that do not belong together."""
        indices = torch.as_tensor(indices).int()
        weights = torch.as_tensor(weights, dtype=torch.float32)
        if indices.ndim != 2 or indices.shape != weights.shape:
            raise ValueError(
                f"indices and weights must be [B, K], got {list(indices.shape)} and {list(weights.shape)}"
            )
        if not weights.isfinite().all():
            raise ValueError("routing weights must be finite")
        scores = torch.zeros_like(weights) if scores is None else scores.float()
        version = torch.full((indices.shape[0],), pool_version, dtype=torch.int64, device=indices.device)
        return cls(indices, weights, scores, version)

    @property
    def num_rows(self) -> int:
        return self.indices.shape[0]

    def dense(self, num_entries: int) -> Tensor:
        """The weights as a matrix over all slots: [B, num_entries] fp32, what `ops.fused_linear` takes."""
        slots = torch.arange(num_entries, dtype=self.indices.dtype, device=self.indices.device)
        picked = self.indices[:, :, None] == slots
        return torch.where(picked, self.weights[:, :, None], 0.0).sum(1)

    def to(self, device) -> "Routing":
        return Routing(*(t.to(device) for t in self))

    def rows(self, index) -> "Routing":
        """The routing of some rows: a slice, a list of row numbers or a mask."""
        return Routing(*(t[index] for t in self))

    def repeat_interleave(self, repeats: int) -> "Routing":
        return Routing(*(t.repeat_interleave(repeats, 0) for t in self))

    @classmethod
    def cat(cls, parts: "list[Routing]") -> "Routing":
        """The rows of several routings; those with fewer picks than others get ones that do not exist."""
        width = max(part.indices.shape[1] for part in parts)
        return cls(*(torch.cat(tensors) for tensors in zip(*(p.padded(width) for p in parts), strict=True)))

    def padded(self, width: int) -> "Routing":
        """With picks of weight 0 behind the others, up to `width` of them."""
        missing = width - self.indices.shape[1]
        if missing <= 0:
            return self
        return self._replace(
            indices=F.pad(self.indices, (0, missing)),
            weights=F.pad(self.weights, (0, missing)),
            scores=F.pad(self.scores, (0, missing), value=-torch.inf),
        )
