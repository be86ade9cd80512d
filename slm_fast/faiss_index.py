"""FAISS behind the interface of `ops.key_search`, for pools beyond about a million keys.

An exact flat index: it holds a second copy of the keys, 4 P (D + 1) bytes. FAISS is imported when the first
index is built, never with this module.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_fast import ops, reference

RESCORED_VALUES = 1 << 24  # key values gathered at a time: 64 MiB
TEMP_MEMORY = 64 << 20  # FAISS reserves 1.5 GiB of a GPU by default, far more than a flat search needs
ROUNDING = 4e-6  # of an fp32 inner product, in units of the product of the norms


def load_faiss(device: torch.device):
    """The faiss module for keys on `device`. Raises ImportError that says what to install, ValueError."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"FAISS searches keys on cpu or cuda, got {device}; set faiss_above=None")
    package = "faiss-cpu" if device.type == "cpu" else "faiss-gpu-cu12"
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"faiss_above needs FAISS: pip install {package} (cannot import faiss: {error})"
        ) from error
    if device.type == "cuda":
        if not hasattr(faiss, "StandardGpuResources"):
            raise ImportError(
                f"faiss_above with keys on {device} needs a GPU build of FAISS, this one is for the CPU: "
                f"pip uninstall -y faiss-cpu && pip install {package}"
            )
        import faiss.contrib.torch_utils  # noqa: F401 (takes CUDA tensors, works on torch's current stream)
    return faiss


class FaissIndex:
    """Exact inner-product search over the allowed keys; `search` is `ops.key_search` with them as the mask.

    The bias is one more dimension: <[phi(q), 1], [key, bias]>. FAISS proposes more candidates than asked
    for; they are scored again, one by one, because FAISS's own scores depend on the size of the batch. A row
    where a key outside the candidates may tie with the last pick goes through `ops.key_search`.

    Args: keys: [P, D] fp32/bf16/fp16, finite, kept by reference and not to be changed.  bias: [P] fp32.
    allowed: [P] bool; other keys are not in the index.
    Raises ImportError when faiss, or a GPU build of it for keys on a CUDA device, is missing.
    """

    def __init__(self, keys: Tensor, bias: Tensor, allowed: Tensor) -> None:
        if keys.ndim != 2 or bias.shape != keys.shape[:1] or allowed.shape != keys.shape[:1]:
            raise ValueError(
                f"keys, bias and allowed must be [P, D], [P] and [P], got {list(keys.shape)}, "
                f"{list(bias.shape)} and {list(allowed.shape)}"
            )
        faiss = load_faiss(keys.device)
        self.keys, self.bias, self.allowed = keys.detach(), bias.detach(), allowed
        self.slots = allowed.nonzero()[:, 0]  # by FAISS's numbers
        added = torch.cat([self.keys[self.slots].float(), self.bias[self.slots, None]], 1)
        self.largest_norm = added.norm(dim=1).max() if len(added) else added.new_zeros(())
        self._lock = threading.Lock()  # FAISS's GPU resources serve one thread at a time
        if keys.is_cuda:
            with torch.cuda.device(keys.device):  # whose current stream FAISS takes
                self._resources = faiss.StandardGpuResources()
                self._resources.setTempMemory(TEMP_MEMORY)
                config = faiss.GpuIndexFlatConfig()
                config.device = keys.device.index
                self._index = faiss.GpuIndexFlatIP(self._resources, added.shape[1], config)
                self._index.add(added)
        else:
            self._index = faiss.IndexFlatIP(added.shape[1])
            self._index.add(added.numpy())

    @torch.no_grad()
    def search(
        self,
        query: Tensor,
        *,
        top_k: int,
        weighting: str = "softmax",
        temperature: float = 1.0,
        min_similarity: float | None = None,
        num_groups: int | None = None,
        shift: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices [B, top_k] int32, weights and scores [B, top_k] fp32, as `ops.key_search` defines them.

        Raises ValueError on the arguments that `ops.key_search` refuses.
        """
        options = dict(
            top_k=top_k, weighting=weighting, temperature=temperature, min_similarity=min_similarity
        )
        transform = dict(num_groups=num_groups, shift=shift)
        # A search among no keys checks the arguments, and is the answer where no key is allowed.
        nothing = ops.key_search(query, self.keys[:0], **options, **transform, backend="reference")
        if not len(self.slots) or not len(query):
            return nothing
        features = reference.transform_query(query.detach(), **transform)
        count = min(max(32, 2 * top_k), len(self.slots))
        last, candidates = self._candidates(features, count)
        unsure = (candidates < 0).any(1)  # scores that are not finite
        slots = self.slots[candidates.clamp(min=0)].sort(dim=1).values
        scores, order = self._score(features, slots).sort(dim=1, descending=True, stable=True)
        indices, scores = slots.gather(1, order)[:, :top_k].int(), scores[:, :top_k]
        if count < len(self.slots):
            norm = torch.linalg.vector_norm(features, dim=1).square().add(1).sqrt()
            unsure |= ~(last < scores[:, -1] - ROUNDING * self.largest_norm * norm)
        missing = (0, top_k - scores.shape[1])
        indices = F.pad(indices, missing)
        scores = F.pad(scores, missing, value=-torch.inf)
        weights = reference.mixture_weights(scores, scores > -torch.inf, weighting, temperature)
        if min_similarity is not None:
            weights = weights.masked_fill(scores[:, :1] < min_similarity, 0.0)
        if bool(unsure.any()):
            exact = ops.key_search(features[unsure], self.keys, self.bias, self.allowed, **options)
            indices[unsure], weights[unsure], scores[unsure] = exact
        return indices, weights, scores

    def _candidates(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """FAISS's score of the last of the `count` best keys [B], and all their FAISS numbers [B, count]."""
        extended = torch.cat([features, features.new_ones(len(features), 1)], 1)
        with self._lock:
            if extended.is_cuda:
                with torch.cuda.device(extended.device):
                    scores, numbers = self._index.search(extended, count)
            else:
                scores, numbers = map(torch.from_numpy, self._index.search(extended.numpy(), count))
        return scores[:, -1], numbers

    def _score(self, features: Tensor, slots: Tensor) -> Tensor:
        """<features[b], keys[slots[b, c]]> + bias: [B, C] fp32, summed in fp64."""
        rows = max(1, RESCORED_VALUES // (slots.shape[1] * features.shape[1]))
        parts = [
            (self.keys[s].float() * f[:, None]).sum(-1, dtype=torch.float64) + self.bias[s]
            for f, s in zip(features.split(rows), slots.split(rows), strict=True)
        ]
        return torch.cat(parts).float()
