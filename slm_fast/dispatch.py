"""The one place that knows the backends: which can run here, which one runs a call, and the raw calls.

`cpu` is the compiled extension, `gpu` the Triton kernels and the CUDA key search, `reference` plain PyTorch
on any device. SLM_FAST_BACKEND forces one. With TRITON_INTERPRET=1, `gpu` runs the Triton kernels on CPU
tensors too, one program after the other, when it is asked for by name.
"""

import contextlib
import functools
import importlib.util
import math
import operator
import os

import torch
from torch import Tensor

from slm_fast import plan
from slm_fast.reference import KeyCodes

try:
    from slm_fast import _C
except ImportError as error:
    _C, _import_error = None, str(error)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WEIGHTING_CODES = {"similarity": 0, "softmax": 1, "uniform": 2}
_getenv = os.environ.get if _C is None else _C.getenv  # a microsecond, or a quarter, where nothing is set
# `ops.key_search`, and `ops.mixture` without gradients, of plain tensors in one call. For other classes,
# layouts, types and shapes the former gives None, the latter False. None where torch has no DLPack table.
search_tensors = mixture_tensors = None
if _C is not None and _C.use_tensors(Tensor, torch.get_num_threads):
    search_tensors, mixture_tensors = _C.search_tensors, _C.mixture_tensors
SHORT_ROW, SHORT_BATCH = 4, 64  # tokens: of a row that decodes, of a tile that gathers for each token
LONG_ROW = 64  # tokens of a row from which on a tile of the fused kernel meets few rows


@functools.cache
def _probe() -> dict[str, str | None]:
    if _C is not None:
        _C.isa()  # raises ValueError when SLM_FAST_ISA asks for what this processor lacks
    cpu = f"the extension is not built: {_import_error}" if _C is None else None
    return {"cpu": cpu, "gpu": _gpu_missing(), "reference": None}


def interpreting() -> bool:
    """Whether Triton interprets kernels on CPU tensors; it decides when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _gpu_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'slm_fast[gpu]'"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors)"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0, {torch.cuda.get_device_name()} has {capability}"
    return None


def available() -> dict[str, str | None]:
    """Each known backend and None if it can run here, or the reason why it cannot."""
    return dict(_probe())


def select(x: Tensor, backend: str | None = None) -> str:
    """The backend that runs an op on `x`: `backend`, else SLM_FAST_BACKEND, else the best for x's device.

    Raises ValueError when an explicit choice is unknown, missing, or cannot run on x's device.
    """
    return _select(x.device.type, backend)


@torch.compiler.assume_constant_result
def _select(device: str, backend: str | None) -> str:
    choice = backend or _getenv("SLM_FAST_BACKEND")
    if not choice or choice == "auto":
        return _best(device)
    on_cpu, on_cuda, known = device == "cpu", device == "cuda", _probe()
    if choice not in known:
        raise ValueError(f"unknown backend {choice!r}; known: {', '.join(known)}")
    if known[choice] is not None:
        raise ValueError(f"backend {choice!r} cannot run: {known[choice]}; known: {', '.join(known)}")
    runs = {"cpu": on_cpu, "gpu": on_cuda or (on_cpu and interpreting()), "reference": True}
    if not runs[choice]:
        raise ValueError(f"backend {choice!r} cannot run on a tensor on {device}; known: {', '.join(known)}")
    return choice


@functools.cache
def _best(device: str) -> str:
    if device == "cuda" and _probe()["gpu"] is None:
        return "gpu"
    return "cpu" if device == "cpu" and _probe()["cpu"] is None else "reference"


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
    codes: KeyCodes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.key_search` in the extension; contiguous tensors, fp32 query and bias, bool mask."""
    num_queries, dim = query.shape
    num_keys = keys.shape[0]
    indices = torch.empty(num_queries, top_k, dtype=torch.int32)
    weights = torch.empty(num_queries, top_k, dtype=torch.float32)
    scores = torch.empty_like(weights)
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
        0 if codes is None else codes.codes.data_ptr(),
        0 if codes is None else codes.bounds.data_ptr(),
        torch.get_num_threads(),
    )
    return indices, weights, scores


def key_codes_cpu(keys: Tensor, rows: Tensor | None, out: KeyCodes) -> None:
    """`reference.key_codes` in the extension; contiguous keys; all of them without `rows`."""
    if rows is not None and not len(rows):
        return
    _C.key_codes(
        keys.data_ptr(),
        DTYPE_CODES[keys.dtype],
        *keys.shape,
        _ptr(rows),
        0 if rows is None else len(rows),
        out.codes.data_ptr(),
        out.bounds.data_ptr(),
        torch.get_num_threads(),
    )


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


@functools.cache
def _architecture(device: str) -> str:
    return plan.architecture_of(torch.cuda.get_device_capability(device)) if "cuda" in device else "sm_90"


def find_plan(
    op: str, phase: str, x: Tensor, columns: int, in_features: int, out_features: int, num_rows: int = 0
) -> dict:
    """The plan table's choice for x [tokens, features]; the interpreter knows no dependent launches.

    `num_rows` rows of few tokens, each with columns of its own, get the tiles of a short batch: those of a
    long one would meet one row after the other.
    """
    tokens = min(x.shape[0], SHORT_BATCH) if x.shape[0] <= SHORT_ROW * num_rows else x.shape[0]
    sizes = (tokens, columns, in_features, out_features)
    found = plan.find(_architecture(str(x.device)), op, phase, x.dtype == torch.float32, *sizes)
    return found if x.is_cuda else found | {"pdl": False}


def linear_op(x: Tensor, num_rows: int, columns: int, in_features: int, out_features: int) -> str:
    """The op that the plan table gives to a frozen linear with a pool of `columns` slab rows: "fused_linear",
    "segment_linear" or "mixture" (after the linear). x: [tokens, in_features] of `num_rows` rows.

    A compiler asks once for any number of tokens: it gets the answer for few.
    """
    tokens = 0 if torch.compiler.is_compiling() else x.shape[0]
    phase = "segments" if tokens >= LONG_ROW * num_rows else "forward"
    full = x.dtype == torch.float32
    return _linear_op(str(x.device), phase, full, tokens, columns, in_features, out_features)


@torch.compiler.assume_constant_result
def _linear_op(device: str, phase: str, full: bool, *sizes: int) -> str:
    return plan.find(_architecture(device), "linear", phase, full, *sizes)["kernel"]


def _on_device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def key_search_gpu(query: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.key_search` in the CUDA kernels; see `cuda_search.key_search` for the arguments."""
    from slm_fast import cuda_search

    return cuda_search.key_search(query, *args)


def mixture_forward_gpu(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, routing: tuple, max_rank: int, u: Tensor | None, save_u: bool
) -> Tensor | None:
    """Add the mixture to y [T, out_features] in place; the unweighted u [T, top_k * max_rank] if `save_u`.

    routing: (start, rank, scaling, indices, weights, cu_seqlens); u: [splits, T, columns] instead of A x.
    """
    from slm_fast.kernels import mixture

    columns = routing[3].shape[1] * max_rank
    found = find_plan("mixture", "forward", x, columns, A.shape[1], B.shape[1])
    with _on_device(x):
        return mixture.mixture_fwd(y, x, A, B, routing, max_rank=max_rank, plan=found, u=u, save_u=save_u)


def mixture_backward_gpu(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    A: Tensor,
    B: Tensor,
    routing: tuple,
    max_rank: int,
    owned: tuple[int, int],
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """(dx, dA, dB, dweights) as `mixture_backward_cpu`, and g = B dy [T, columns]."""
    from slm_fast.kernels import mixture

    found = find_plan("mixture", "backward", x, u.shape[1], A.shape[1], B.shape[1])
    with _on_device(x):
        return mixture.mixture_bwd(
            dy, x, u, A, B, routing, max_rank=max_rank, plan=found, owned=owned, needs=needs
        )


def fused_linear_forward_gpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    routing: tuple,
    max_rank: int | None,
    u: Tensor | None,
    save_u: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y [T, out_features], plus `residual`, unweighted u [T, columns] if `save_u`).

    max_rank: None for a resident pool, whose routing is (row_entry, scaling, weights, cu_seqlens).
    """
    from slm_fast.kernels import fused_linear

    columns = num_columns(A, None if max_rank is None else routing, max_rank)
    num_rows = 0 if max_rank is None else routing[4].shape[0]
    found = find_plan("fused_linear", "forward", x, columns, A.shape[1], B.shape[1], num_rows)
    settings = {"max_rank": max_rank, "plan": found, "u": u, "save_u": save_u, "residual": residual}
    with _on_device(x):
        return fused_linear.fused_linear_fwd(x, weight, bias, A, B, routing, **settings)


def stacked_linear_gpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    B: list[Tensor | int],
    routing: tuple,
    u: Tensor,
    max_rank: int | None,
) -> Tensor:
    """y [T, sum of the linears' features]; `reference.stacked_linear` with u [slabs, splits, T, columns]."""
    from slm_fast.kernels import fused_linear

    num_rows = 0 if max_rank is None else routing[4].shape[0]
    found = find_plan("fused_linear", "forward", x, u.shape[-1], x.shape[1], weight.shape[0], num_rows)
    with _on_device(x):
        return fused_linear.stacked_linear_fwd(x, weight, bias, B, routing, u, plan=found, max_rank=max_rank)


def fused_linear_backward_gpu(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    routing: tuple,
    max_rank: int | None,
    owned: tuple[int, int],
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """(dx, dA, dB, dweights, g = B dy [T, columns]); dx includes the frozen linear's."""
    from slm_fast.kernels import fused_linear

    columns = num_columns(A, None if max_rank is None else routing, max_rank)
    found = find_plan("fused_linear", "backward", x, columns, B.shape[1], A.shape[1])
    settings = {"max_rank": max_rank, "plan": found, "owned": owned, "needs": needs}
    with _on_device(x):
        return fused_linear.fused_linear_bwd(dy, x, u, weight, A, B, routing, **settings)


def num_columns(A: Tensor, routing: tuple | None, max_rank: int | None) -> int:
    """Rank columns of a token: top_k * max_rank where entries are gathered, else the slab rows."""
    return A.shape[0] if routing is None else routing[3].shape[1] * max_rank


def shrink_splits(op: str, backend: str, x: Tensor, columns: int) -> int:
    """The partial sums in which `norm_shrink` or `silu_mul_shrink` gives u while a compiler traces.

    It asks once for any number of tokens: it gets the answer for few.
    """
    if backend != "gpu":
        return 1
    sizes = operator.index(columns), operator.index(x.shape[1])  # no symbols of a dynamic shape
    return _shrink_splits(str(x.device), op, x.dtype == torch.float32, *sizes)


@torch.compiler.assume_constant_result
def _shrink_splits(device: str, op: str, full: bool, columns: int, in_features: int) -> int:
    from slm_fast.kernels.rank_space import split_blocks

    found = plan.find(_architecture(device), op, "forward", full, 0, columns, in_features, in_features)
    return split_blocks(in_features, found["forward"]["BLOCK_K"], found["splits"])[1]


def norm_shrink_forward_gpu(
    x: Tensor,
    weight: Tensor,
    eps: float,
    A: list[Tensor],
    routing: tuple | None,
    max_rank: int,
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    """(h [T, in_features], u [linears, splits, T, columns]); splits: None leaves them to the plan.

    routing: (start, rank, scaling, indices, weights, cu_seqlens), None if the columns are the slab rows.
    """
    from slm_fast.kernels import norm_shrink

    columns, features = num_columns(A[0], routing, max_rank), x.shape[1]
    found = find_plan("norm_shrink", "forward", x, columns, features, features)
    with _on_device(x):
        return norm_shrink.norm_shrink_fwd(
            x, weight, eps, A, routing, max_rank=max_rank, plan=found, splits=splits
        )


def norm_shrink_backward_gpu(
    dh: Tensor,
    du: Tensor,
    x: Tensor,
    h: Tensor,
    u: Tensor,
    weight: Tensor,
    eps: float,
    A: list[Tensor],
    routing: tuple | None,
    max_rank: int,
    owned: tuple[int, int],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, list[Tensor] | None]:
    """(dx, dA of each slab), None unless `needs` asks for it; du, u: [linears, T, columns]."""
    from slm_fast.kernels import norm_shrink

    found = find_plan("norm_shrink", "backward", x, du.shape[-1], x.shape[1], x.shape[1])
    settings = {"max_rank": max_rank, "plan": found, "owned": owned, "needs": needs, "h": h}
    with _on_device(x):
        return norm_shrink.norm_shrink_bwd(dh, du, x, weight, eps, u, A, routing, **settings)


def silu_mul_shrink_forward_gpu(
    gate: Tensor, up: Tensor, A: Tensor, routing: tuple | None, max_rank: int, splits: int | None
) -> tuple[Tensor, Tensor]:
    """(h [T, in_features], u [splits, T, columns]); see `norm_shrink_forward_gpu`."""
    from slm_fast.kernels import silu_mul_shrink

    columns, features = num_columns(A, routing, max_rank), gate.shape[1]
    found = find_plan("silu_mul_shrink", "forward", gate, columns, features, features)
    with _on_device(gate):
        return silu_mul_shrink.silu_mul_shrink_fwd(
            gate, up, A, routing, max_rank=max_rank, plan=found, splits=splits
        )


def silu_mul_shrink_backward_gpu(
    dh: Tensor,
    du: Tensor,
    gate: Tensor,
    up: Tensor,
    h: Tensor,
    A: Tensor,
    routing: tuple | None,
    max_rank: int,
    owned: tuple[int, int],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dgate, dup, dA), None unless `needs` = (dgate and dup, dA) asks for it; du: [T, columns]."""
    from slm_fast.kernels import silu_mul_shrink

    found = find_plan("silu_mul_shrink", "backward", gate, du.shape[-1], gate.shape[1], gate.shape[1])
    settings = {"max_rank": max_rank, "plan": found, "owned": owned, "needs": needs, "h": h}
    with _on_device(gate):
        return silu_mul_shrink.silu_mul_shrink_bwd(dh, du, gate, up, A, routing, **settings)


def rotary_gpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate q and k [T, heads * head_size] in place; cos, sin: [angles, head_size]."""
    from slm_fast.kernels import rotary

    found = find_plan("rotary", "forward", q, cos.shape[1], q.shape[1], k.shape[1])
    settings = {name: value for name, value in found.items() if name != "pdl"}
    with _on_device(q):
        rotary.rotary_fwd(q, k, cos, sin, plan=settings)


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


@functools.cache
def has_tiles() -> bool:
    """Whether the CPU ops multiply bf16 on AMX tiles."""
    return cpu_info().get("isa") == "amx"
