"""Static caches in memory that stays where it is from one `generate` to the next, for graphs of its steps.

The memory is that of one batch at a time. It grows when a batch needs more rows or tokens, and is made anew
while the last cache in it is still in use. A `StaticCache` that came from elsewhere is its own memory.
"""

import copy
import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

BLOCK = 256  # tokens; a kept cache is a multiple of it, so that longer prompts find the same graphs
NAMES = ("keys", "values", "cumulative_length")  # the last is in newer releases only


def bucket_of(rows: int) -> int:
    """Rows of the graph for a batch: 1, 2, 4, 8, multiples of 8 up to 64, then powers of two."""
    return -(-rows // 8) * 8 if 8 < rows <= 64 else 1 << (rows - 1).bit_length()


def is_plain_cache(cache) -> bool:
    """Whether a cache is one of full attention layers in static tensors, and nothing else."""
    return (
        type(cache) is StaticCache
        and not getattr(cache, "offloading", False)
        and all(type(layer) is StaticLayer for layer in cache.layers)
    )


class CacheMemory:
    """Keys and values of `rows` rows at fixed addresses, with the graphs that use them.

    layers: transformers' own, over all rows.  owner: a weak reference to the cache in the first rows.
    lent: the tensors of NAMES that each of its layers shares.  graphs: of `StepGraphs`, by key.
    """

    def __init__(self, layers: list[StaticLayer], rows: int, length: int) -> None:
        self.layers, self.rows, self.length = layers, rows, length
        self.graphs: dict[tuple, object] = {}
        self.lent: list[tuple[Tensor | None, ...]] = [(None, None, None)] * len(layers)
        self.owner: Callable[[], StaticCache | None] = lambda: None

    @classmethod
    def of(cls, cache: StaticCache) -> "CacheMemory":
        """The memory that a cache brings itself."""
        layers = [copy.copy(layer) for layer in cache.layers]
        memory = cls(layers, layers[0].keys.shape[0], layers[0].max_cache_len)
        memory.owner, memory.lent = weakref.ref(cache), [_tensors(layer) for layer in cache.layers]
        return memory

    def lend(self, index: int, layer: StaticLayer, keys: Tensor, values: Tensor) -> None:
        """Initialise a layer of the owner, zeroed, for its first `keys` and `values`."""
        full, count = self.layers[index], keys.shape[0]
        for first, own in ((keys, full.keys), (values, full.values)):
            shape = (self.rows, first.shape[1], self.length, first.shape[3])
            if own is None or (own.shape, own.dtype, own.device) != (shape, first.dtype, first.device):
                full = self.layers[index] = StaticLayer(max_cache_len=self.length)
                full.lazy_initialization(*(t[:1].expand(self.rows, -1, -1, -1) for t in (keys, values)))
                self.graphs = {}
                break
        for own in (full.keys, full.values):
            own[: bucket_of(count)].zero_()
        vars(layer).update(vars(full))
        layer.keys, layer.values = full.keys[:count], full.values[:count]
        for name in ("batch_size", "max_batch_size"):  # by release
            if hasattr(full, name):
                setattr(layer, name, count)
        self.lent[index] = _tensors(layer)
        if self.lent[index][2] is not None:
            self.lent[index][2].zero_()

    def settle(self, cache: StaticCache) -> bool:
        """Bring back what the owner now holds elsewhere, as reordering leaves it. False: it does not fit."""
        for layer, lent in zip(cache.layers, self.lent, strict=True):
            for name, own, now in zip(NAMES, lent, _tensors(layer), strict=True):
                if now is own:
                    continue
                if own is None or now is None or (now.shape, now.dtype) != (own.shape, own.dtype):
                    return False
                own.copy_(now)
                setattr(layer, name, own)
        return True

    def first(self, rows: int) -> StaticCache:
        """A cache over the first rows, for a graph."""
        cache = copy.copy(self.owner())
        cache.layers = [copy.copy(layer) for layer in self.layers]
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:rows], layer.values[:rows]
        return cache

    def keep_lengths(self) -> Callable[[], None]:
        """A function that puts the lengths back to what they are now."""
        kept = [(length, length.clone()) for *_, length in self.lent if length is not None]

        def undo() -> None:
            for length, value in kept:
                length.copy_(value)

        return undo


def _tensors(layer: StaticLayer) -> tuple[Tensor | None, ...]:
    return tuple(getattr(layer, name, None) for name in NAMES)


class KeptCaches:
    """Where a model's static caches lie: those that `generate` makes in `kept`, others in their own."""

    def __init__(self) -> None:
        self.kept: CacheMemory | None = None
        self.of: weakref.WeakKeyDictionary[Cache, CacheMemory] = weakref.WeakKeyDictionary()
        self.wanted = False  # whether the running `generate` decodes with graphs

    def all(self) -> list[CacheMemory]:
        found = [] if self.kept is None else [self.kept]
        return found + [memory for memory in self.of.values() if memory is not self.kept]

    def prepare(self, cache: Cache) -> None:
        """Let a new cache lie in the kept memory, if `wanted` is set before its first keys come."""
        self.wanted = False
        if not is_plain_cache(cache):
            return
        known = self.kept.length if self.kept is not None else 0
        length = -(-max(known, *(layer.max_cache_len for layer in cache.layers)) // BLOCK) * BLOCK
        for index, layer in enumerate(cache.layers):
            layer.keys, layer.values, layer.is_initialized, layer.max_cache_len = None, None, False, length
            layer.lazy_initialization = functools.partial(self._initialise, weakref.ref(cache), index)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _initialise(self, owner: Callable[[], StaticCache], index: int, keys: Tensor, values: Tensor) -> None:
        """In the place of a layer's `lazy_initialization`."""
        cache = owner()
        layer = cache.layers[index]
        del layer.lazy_initialization
        if self.wanted and cache not in self.of:
            self.of[cache] = self._free(len(cache.layers), bucket_of(keys.shape[0]), layer.max_cache_len)
            self.of[cache].owner = owner
        if cache in self.of:
            self.of[cache].lend(index, layer, keys, values)
        else:
            layer.lazy_initialization(keys, values)

    def _free(self, num_layers: int, rows: int, length: int) -> CacheMemory:
        kept = self.kept
        if kept is None or kept.owner() is not None or kept.length != length or kept.rows < rows:
            self.kept = kept = None  # its memory goes first
            layers = [StaticLayer(max_cache_len=length) for _ in range(num_layers)]
            self.kept = CacheMemory(layers, rows, length)
        return self.kept

    @torch.inference_mode(False)
    @torch.no_grad()
    def give(self, cache: Cache | None) -> None:
        """Move a cache out of the kept memory: its tensors are the caller's from now on."""
        memory = None if cache is None else self.of.get(cache)
        if memory is None or memory is not self.kept:
            return
        for layer, lent in zip(cache.layers, memory.lent, strict=True):
            for name, own in zip(NAMES, lent, strict=True):
                if own is not None and getattr(layer, name) is own:
                    setattr(layer, name, own.clone())
        del self.of[cache]
        memory.owner = lambda: None

    def find(self, cache: Cache, count: int) -> CacheMemory | None:
        """Where a cache of `count` rows lies; None if no graph can use it."""
        memory = self.of.get(cache)
        if memory is None or not memory.settle(cache):
            if not (is_plain_cache(cache) and all(layer.is_initialized for layer in cache.layers)):
                return None
            memory = self.of[cache] = CacheMemory.of(cache)
        return memory if memory.lent[0][0].shape[0] == count else None
