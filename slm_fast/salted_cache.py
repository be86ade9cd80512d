"""The paged cache of transformers' continuous batching, with blocks shared by equal mixtures alone.

A block's hash covers its tokens and its predecessor's hash. Here the first block's tokens are followed by a
salt made of the request's picked entries, their weights and the pool's version.
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import transformers
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import RequestStatus


@dataclass(slots=True)
class Mixture:
    """A request's routing and what is known of its progress."""

    indices: list[int]
    weights: list[float]
    version: int  # of the pool, when the request was queued
    sequences: int = 1  # that are not finished
    salted: bool = False  # whether its first cache block was, by hash

    @property
    def is_base(self) -> bool:
        return not any(self.weights)

    def salt(self) -> list[int]:
        """What a block's hash covers beside its tokens: 8 int32. All requests of the frozen model share."""
        picks = [(i, w) for i, w in zip(self.indices, self.weights, strict=True) if w]
        indices, weights = array("i", [i for i, _ in picks]), array("f", [w for _, w in picks])
        version = array("q", [self.version] if picks else [])
        digest = hashlib.blake2b(indices.tobytes() + weights.tobytes() + version.tobytes(), digest_size=32)
        return array("i", digest.digest()).tolist()


class SaltedTokens(list):
    """Tokens whose first block, a slice from 0, ends with the salt; hashes of later blocks chain to it."""

    def __init__(self, tokens: Sequence[int], mixture: Mixture) -> None:
        super().__init__(tokens)
        self.mixture = mixture

    def __getitem__(self, index):
        part = super().__getitem__(index)
        if isinstance(index, slice) and index.start == 0 and len(part) == index.stop:
            self.mixture.salted = True
            return part + self.mixture.salt()
        return part

    def __add__(self, other):
        return SaltedTokens(super().__add__(other), self.mixture)


class SaltedCache(PagedAttentionCache):
    """A paged cache in which only requests of the same mixture share blocks.

    mixture_of: from a request id to its `Mixture`. Raises RuntimeError where a block is shared without
    its salt, as an unknown release might do.
    """

    mixture_of: Callable[[str], Mixture]

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        mixture = self.mixture_of(request_id)
        before, mixture.salted = mixture.salted, False
        found = super().search_prefix_match(request_id, SaltedTokens(prompt_ids, mixture))
        self._check(mixture, found)
        mixture.salted = before or found > 0
        return found

    def mark_complete_blocks(self, state, complete_blocks) -> None:
        super().mark_complete_blocks(self._salted(state), complete_blocks)
        self._check(self.mixture_of(state.request_id), complete_blocks, state.status)

    def mark_shareable_blocks_as_complete(self, state, num_complete_blocks) -> None:
        super().mark_shareable_blocks_as_complete(self._salted(state), num_complete_blocks)
        self._check(self.mixture_of(state.request_id), num_complete_blocks, state.status)

    def _salted(self, state) -> SimpleNamespace:
        """What the marking methods read of a request."""
        return SimpleNamespace(
            request_id=state.request_id,
            status=state.status,
            initial_tokens=SaltedTokens(state.initial_tokens, self.mixture_of(state.request_id)),
            generated_tokens=state.generated_tokens,
        )

    def _check(self, mixture: Mixture, blocks, status=None) -> None:
        if self.use_prefix_sharing and blocks and status != RequestStatus.FINISHED and not mixture.salted:
            raise RuntimeError(
                f"transformers {transformers.__version__} shares cache blocks in a way that is not known "
                "here: pass a continuous_batching_config with allow_block_sharing=False"
            )
