"""The one place that knows the backends: which can run here, which one runs a call, and the raw calls.

`cpu` is the compiled extension, `reference` plain PyTorch on any device. SLM_FAST_BACKEND forces one.
"""

import functools
import math
import os

import torch
from torch import Tensor

try:
    from slm_fast import _C
except ImportError as error:
    _C, _import_error = None, str(error)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WEIGHTING_CODES = {"similarity": 0, "softmax": 1, "uniform": 2}


@functools.cache
def _probe() -> dict[str, str | None]:
    if _C is None:
        return {"cpu": f"the extension is not built: {_import_error}", "reference": None}
    _C.isa()  # raises ValueError when SLM_FAST_ISA asks for what this processor lacks
    return {"cpu": None, "reference": None}


def available() -> dict[str, str | None]:
    """Each known backend and None if it can run here, or the reason why it cannot."""
    return dict(_probe())


def select(x: Tensor, backend: str | None = None) -> str:
    """The backend that runs an op on `x`: `backend`, else SLM_FAST_BACKEND, else the best for x's device.

    Raises ValueError when an explicit choice is unknown, missing, or cannot run on x's device.
    """
    choice = backend or os.environ.get("SLM_FAST_BACKEND")
    on_cpu = x.device.type == "cpu"
    if not choice or choice == "auto":
        return "cpu" if on_cpu and _probe()["cpu"] is None else "reference"
    known = _probe()
    if choice not in known:
        raise ValueError(f"unknown backend {choice!r}; known: {', '.join(known)}")
    if known[choice] is not None:
        raise ValueError(f"backend {choice!r} cannot run: {known[choice]}; known: {', '.join(known)}")
    if choice == "cpu" and not on_cpu:
        raise ValueError(f"backend 'cpu' cannot run on a tensor on {x.device}; known: {', '.join(known)}")
    return choice


def _ptr(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def key_search_cpu(
    query: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    weighting: str,
    temperature: float,
    min_similarity: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.key_search` in the extension; contiguous tensors, fp32 query and bias, bool mask."""
    num_queries, dim = query.shape
    num_keys = keys.shape[0]
    indices = torch.empty(num_queries, top_k, dtype=torch.int32)
    weights = torch.empty(num_queries, top_k, dtype=torch.float32)
    scores = torch.empty(num_queries, top_k, dtype=torch.float32)
    _C.key_search(
        query.data_ptr(),
        keys.data_ptr(),
        DTYPE_CODES[keys.dtype],
        _ptr(bias),
        _ptr(mask),
        num_keys if mask is not None and mask.dim() == 2 else 0,
        num_queries,
        num_keys,
        dim,
        top_k,
        WEIGHTING_CODES[weighting],
        temperature,
        -math.inf if min_similarity is None else min_similarity,
        indices.data_ptr(),
        weights.data_ptr(),
        scores.data_ptr(),
        torch.get_num_threads(),
    )
    return indices, weights, scores


def mixture_forward_cpu(
    y: Tensor,
    x: Tensor,
    num_tokens: int,
    A: Tensor,
    B: Tensor,
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    indices: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    u: Tensor | None,
) -> None:
    """Add the mixture to `y` in place; `u [T, top_k * max_rank]`, if given, receives the unweighted A x."""
    num_rows, top_k = indices.shape
    _C.mixture_forward(
        x.data_ptr(),
        y.data_ptr(),
        DTYPE_CODES[x.dtype],
        A.data_ptr(),
        B.data_ptr(),
        DTYPE_CODES[A.dtype],
        start.data_ptr(),
        rank.data_ptr(),
        scaling.data_ptr(),
        start.shape[0],
        A.shape[0],
        indices.data_ptr(),
        weights.data_ptr(),
        _ptr(cu_seqlens),
        num_tokens,
        num_rows,
        top_k,
        A.shape[1],
        B.shape[1],
        _ptr(u),
        0 if u is None else u.shape[1],
        torch.get_num_threads(),
    )


def mixture_backward_cpu(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    A: Tensor,
    B: Tensor,
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    indices: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    owned: tuple[int, int],
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB, dweights), None unless `needs` asks for it; dA and dB: the slab rows `owned`, in fp32."""
    num_rows, top_k = indices.shape
    num_owned = owned[1] - owned[0]
    dx = torch.empty_like(x) if needs[0] else None
    dA = torch.empty(num_owned, A.shape[1], dtype=torch.float32) if needs[1] else None
    dB = torch.empty(num_owned, B.shape[1], dtype=torch.float32) if needs[2] else None
    dweights = torch.empty(num_rows, top_k, dtype=torch.float32) if needs[3] else None
    _C.mixture_backward(
        dy.data_ptr(),
        x.data_ptr(),
        u.data_ptr(),
        DTYPE_CODES[x.dtype],
        A.data_ptr(),
        B.data_ptr(),
        DTYPE_CODES[A.dtype],
        start.data_ptr(),
        rank.data_ptr(),
        scaling.data_ptr(),
        start.shape[0],
        A.shape[0],
        indices.data_ptr(),
        weights.data_ptr(),
        _ptr(cu_seqlens),
        x.shape[0],
        num_rows,
        top_k,
        A.shape[1],
        B.shape[1],
        u.shape[1],
        _ptr(dx),
        _ptr(dA),
        _ptr(dB),
        owned[0],
        owned[1],
        _ptr(dweights),
        torch.get_num_threads(),
    )
    return dx, dA, dB, dweights


def cuda_devices() -> str:
    """The devices that the extension's own CUDA runtime finds, or why it finds none."""
    if _C is None or not _C.has_cuda:
        return "none: built without CUDA; put nvcc on the PATH and install again"
    try:
        devices = _C.cuda_devices()
    except RuntimeError as error:
        return f"none: {error}"
    return ", ".join(
        f"{name} (sm_{major}{minor}, {memory / 2**30:.0f} GiB)" for name, (major, minor), memory in devices
    )


def cpu_info() -> dict[str, str | None]:
    """Instruction set in use and how the extension was built; empty when it is not."""
    return {} if _C is None else {"isa": _C.isa(), **_C.build_info()}
