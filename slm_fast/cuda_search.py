"""Launches of the CUDA key search, csrc/cuda/key_search.cu: through the extension where it was built with
nvcc, otherwise compiled at first use by CuPy's NVRTC, from the source that the extension carries.

The numbers of a launch are computed here, in `plan`; the kernel and both ways to launch it only take them.
"""

import functools
import importlib.util
import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from slm_fast import reference

try:
    from slm_fast import _C
except ImportError as error:
    _C, _import_error = None, str(error)

logger = logging.getLogger(__name__)

KEY_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of slm::DType
LANES, WARPS, TILE_KEYS = 32, 16, 4  # as in csrc/key_search_math.h

# Up to here every block reads all keys, in one launch. An SM reads about 100 GB/s: 4,096 x 384 bf16 are 3 MB
# or 30 us, and from about 1,000 keys on slices and a second launch should take less; to be measured.
ONE_LAUNCH_KEYS = 4096
# The smallest limit among the GPUs from sm_80 on is 99 KB a block.
SHARED_BYTES = 96 * 1024


class Plan(NamedTuple):
    wide: bool  # 16-byte loads of the keys
    staged: bool  # transformed queries in shared memory; otherwise they are transformed before the launch
    queries: int  # of a block
    slices: int  # of the keys; 1 needs no merge
    row_size: int  # floats of a staged query
    shared_bytes: int


@functools.lru_cache(1024)
def plan(
    num_queries: int, num_keys: int, dim: int, key_size: int, aligned: bool, top_k: int, num_sms: int
) -> Plan:
    """How to launch the search. `aligned`: every key begins at a multiple of 16 bytes.

    A small pool is read by every block: queries share a block only where there are more of them than SMs. A
    large one is read once for as many queries as possible, by as many slices as run at the same time.
    """
    step = LANES * (16 // key_size)
    row_size = -(-dim // step) * step
    per_query = 4 * row_size + 8 * WARPS * top_k
    staged = per_query <= SHARED_BYTES
    wide = staged and aligned
    one_launch = num_keys <= ONE_LAUNCH_KEYS
    enough = -(-num_queries // num_sms) if one_launch else num_queries
    queries = 1
    while wide and queries < min(enough, 8) and 2 * queries * per_query <= SHARED_BYTES:
        queries *= 2
    groups = -(-num_queries // queries)
    resident = num_sms * (2 if wide and queries == 1 else 1)  # the kernel's launch bounds
    slices = 1 if one_launch else max(1, min(resident // groups, num_keys // (WARPS * TILE_KEYS)))
    shared_bytes = queries * (per_query if staged else 8 * WARPS * top_k)
    return Plan(wide, staged, queries, slices, row_size, shared_bytes)


def available() -> str | None:
    """None if the kernel can run here, or the reason why it cannot."""
    if _C is None:
        return f"the extension is not built: {_import_error}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not _C.has_cuda and importlib.util.find_spec("cupy") is None:
        return "the extension was built without nvcc and CuPy is missing: pip install 'slm_fast[gpu]'"
    return None


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def key_search(
    query: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    weighting: str,
    temperature: float,
    min_similarity: float | None,
    num_groups: int | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.key_search` on contiguous CUDA tensors, on the current stream of the query's device.

    The host never waits: instead of raising, a row whose transformed query is not finite gets index 0 and NaN
    weights and scores. CPU tensors run the kernel's emulation, for tests. CUDA tensors fall back to PyTorch,
    several times slower, where the kernel is not `available`; a warning says so once.
    """
    if query.is_cuda and (missing := available()) is not None:
        warn_of_fallback(missing)
        return _in_torch(
            query, keys, bias, mask, top_k, weighting, temperature, min_similarity, num_groups, shift
        )
    num_queries, dim = query.shape
    num_keys = keys.shape[0]
    device = query.device
    indices = torch.empty(num_queries, top_k, dtype=torch.int32, device=device)
    weights = torch.empty(num_queries, top_k, dtype=torch.float32, device=device)
    scores = torch.empty(num_queries, top_k, dtype=torch.float32, device=device)
    if num_queries == 0:
        return indices, weights, scores
    size = keys.element_size()
    aligned = dim * size % 16 == 0 and keys.data_ptr() % 16 == 0
    chosen = plan(num_queries, num_keys, dim, size, aligned, top_k, _num_sms(device))
    if not chosen.staged:
        query = reference.transform_query(query, num_groups, shift)
        num_groups = shift = None
    lists = None
    if chosen.slices > 1:
        lists = torch.empty(2, num_queries, top_k, chosen.slices, dtype=torch.int32, device=device)
    arguments = (
        query.data_ptr(),
        keys.data_ptr(),
        KEY_TYPES.index(keys.dtype),
        0 if bias is None else bias.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        num_keys if mask is not None and mask.dim() == 2 else 0,
        0 if shift is None else shift.data_ptr(),
        num_groups or 0,
        num_queries,
        num_keys,
        dim,
        top_k,
        reference.WEIGHTINGS.index(weighting),
        temperature,
        -math.inf if min_similarity is None else min_similarity,
        indices.data_ptr(),
        weights.data_ptr(),
        scores.data_ptr(),
        *chosen,
        0 if lists is None else lists[0].data_ptr(),
        0 if lists is None else lists[1].data_ptr(),
    )
    if not query.is_cuda:
        _C.key_search_emulated(*arguments)
        return indices, weights, scores
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        if _C.has_cuda:
            _C.key_search_cuda(torch.cuda.current_device(), stream, *arguments)
        else:
            _launch_with_cupy(stream, *arguments)
    return indices, weights, scores


@functools.cache
def warn_of_fallback(reason: str) -> None:
    logger.warning("key search on the GPU falls back to PyTorch, several times slower: %s", reason)


def _in_torch(query, keys, bias, mask, top_k, weighting, temperature, min_similarity, num_groups, shift):
    options = dict(weighting=weighting, temperature=temperature, min_similarity=min_similarity)
    query = reference.transform_query(query, num_groups, shift)
    indices, weights, scores = reference.key_search(query, keys, bias, mask, top_k=top_k, **options)
    bad = ~query.isfinite().all(-1, keepdim=True)
    return indices.masked_fill(bad, 0), weights.masked_fill(bad, math.nan), scores.masked_fill(bad, math.nan)


@functools.cache
def cupy_kernel(name: str):
    """One instance of the kernels, compiled for the current device by NVRTC; CuPy keeps it on disk."""
    import cupy

    module = cupy.RawModule(code=_C.cuda_source, options=("-std=c++17",), name_expressions=(name,))
    return module.get_function(name)


def _launch_with_cupy(
    stream,
    query,
    keys,
    key_type,
    bias,
    mask,
    mask_stride,
    shift,
    num_groups,
    num_queries,
    num_keys,
    dim,
    top_k,
    weighting,
    temperature,
    min_similarity,
    indices,
    weights,
    scores,
    wide,
    staged,
    queries,
    slices,
    row_size,
    shared_bytes,
    slice_indices,
    slice_scores,
):
    """What `key_search_cuda` in key_search.cu does, with the same arguments."""
    import cupy
    from numpy import float32, int32, int64

    weigh = (int32(weighting), float32(temperature), float32(min_similarity))
    merge = slices > 1
    search = cupy_kernel(f"slm::key_search_kernel<{key_type}, {queries}, {'true' if wide else 'false'}>")
    if shared_bytes > 48 * 1024:
        search.max_dynamic_shared_size_bytes = shared_bytes
    with cupy.cuda.ExternalStream(stream):
        search(
            (-(-num_queries // queries), slices),
            (WARPS * LANES,),
            (
                *map(int64, (query, keys, bias, mask, mask_stride, shift)),
                *map(int32, (num_groups, staged, row_size)),
                *map(int64, (num_queries, num_keys, dim)),
                int32(top_k),
                *weigh,
                int64(slice_indices if merge else indices),
                int64(weights),
                int64(slice_scores if merge else scores),
            ),
            shared_mem=shared_bytes,
        )
        if merge:
            cupy_kernel("slm::key_search_merge_kernel")(
                (num_queries,),
                (WARPS * LANES,),
                (
                    int64(slice_indices),
                    int64(slice_scores),
                    int32(slices),
                    int32(top_k),
                    *weigh,
                    *map(int64, (indices, weights, scores)),
                ),
                shared_mem=8 * WARPS * top_k,
            )
