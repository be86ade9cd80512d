"""How other systems add adapters, where they are installed; vLLM's, SGLang's and unsloth's kernels on CUDA.

They know whole adapters: a row's mixture is one of rank K r, factors side by side, weights folded into B.
vLLM and SGLang have one for each row of a batch, of a token or many, and so has PEFT's layer; unsloth has one
for all rows. Building them is not timed. A peer that is not installed, whose interface has changed or that
cannot do a case is listed with the reason.
"""

import dataclasses
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from unittest.mock import patch

import torch
from torch import Tensor, nn

from suite.cases import reason_of

ON_CUDA = ("vllm", "sglang", "unsloth")


def folded(pool, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(A [rows, K r, in_features], B [rows, out_features, K r]) of every row's own adapter."""
    A, B = (t.view(pool.entries, pool.rank, -1)[indices.long()] for t in (pool.A, pool.B))
    B = (B * weights[..., None, None]).to(pool.B.dtype)
    return A.flatten(1, 2).contiguous(), B.flatten(1, 2).mT.contiguous()


# Updates of [rows * length, features]: (pool, x, y, picks of each copy, weights) -> the call of a copy.


def vllm_update(
    pool, x: Tensor, y: Tensor, picks: Sequence[Tensor], weights: Tensor
) -> Callable[[int], Tensor]:
    """vLLM's shrink and expand, which sort tokens by their adapters."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    adapters = [folded(pool, indices, weights) for indices in picks]
    rows, tokens, rank, out = len(weights), len(x), adapters[0][0].shape[1], y.clone()
    u = torch.empty(1, tokens, rank, dtype=torch.float32, device=x.device)
    adapter_of_token = torch.arange(rows, dtype=torch.int32, device=x.device)
    meta = LoRAKernelMeta.make(rows, tokens, x.device)
    meta.prepare_tensors(adapter_of_token.repeat_interleave(tokens // rows))
    try:
        args = meta.meta_args(tokens)
    except TypeError:  # newer ones also ask whether to specialise on the number of adapters
        args = meta.meta_args(tokens, False)

    def run(i):
        A, B = adapters[i]
        lora_shrink(x, [A], u, *args, 1.0)
        lora_expand(u, [B], out.copy_(y), *args, offset_start=0, add_inputs=True)
        return out

    return run


def sglang_update(
    pool, x: Tensor, y: Tensor, picks: Sequence[Tensor], weights: Tensor
) -> Callable[[int], Tensor]:
    """SGLang's segmented products, a segment a row."""
    from sglang.srt.lora.triton_ops import sgemm_lora_a_fwd, sgemm_lora_b_fwd
    from sglang.srt.lora.utils import LoRABatchInfo

    adapters = [folded(pool, indices, weights) for indices in picks]
    rows, length, rank, device = len(weights), len(x) // len(weights), adapters[0][0].shape[1], x.device
    each = torch.arange(rows + 1, dtype=torch.int32, device=device)
    values = dict(
        use_cuda_graph=False,
        bs=rows,
        num_segments=rows,
        seg_lens=torch.full((rows,), length, dtype=torch.int32, device=device),
        seg_indptr=each * length,
        max_len=length,
        weight_indices=each[:-1].contiguous(),
        lora_ranks=torch.full((rows,), rank, dtype=torch.int32, device=device),
        scalings=torch.ones(rows, device=device),
        permutation=None,
    )
    known = {field.name for field in dataclasses.fields(LoRABatchInfo)}
    info = LoRABatchInfo(**{name: value for name, value in values.items() if name in known})
    out = y.clone()

    def run(i):
        A, B = adapters[i]
        return sgemm_lora_b_fwd(sgemm_lora_a_fwd(x, A, info), B, info, out.copy_(y))

    return run


# Linears with mixtures of rows: (pool, weight, indices, weights) -> a call of x [rows, length, in_features].


def peft_layer(pool, weight: Tensor, indices: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """PEFT's LoRA layer with an adapter for each row."""
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.ModuleDict({"linear": nn.Linear(*weight.T.shape, bias=False, device=weight.device)})
    model["linear"].weight = nn.Parameter(weight, requires_grad=False)
    rank, names = indices.shape[1] * pool.rank, [f"r{row}" for row in range(len(indices))]
    for name in names:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"])
        model = inject_adapter_in_model(config, model, adapter_name=name)
    layer = model["linear"]
    with torch.no_grad():
        for name, A, B in zip(names, *folded(pool, indices, weights), strict=True):
            layer.lora_A[name].weight.copy_(A)
            layer.lora_B[name].weight.copy_(B)
    layer.eval().requires_grad_(False)
    return lambda x: layer(x, adapter_names=names)


def unsloth_layer(pool, weight: Tensor, indices: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """unsloth's product of a linear with one LoRA. Raises ValueError where rows differ."""
    if not all(bool((t == t[:1]).all()) for t in (indices, weights)):
        raise ValueError("it has one LoRA for all rows")
    matmul_lora = unsloth_kernels()[0]
    A, B = (factor[0] for factor in folded(pool, indices[:1], weights[:1]))
    return lambda x: matmul_lora(x, weight, None, A, B, 1.0)


# Trainable ones with one LoRA: (weight, A [rank, in_features], B [out_features, rank]) -> (call, its A, B).


def peft_linear(weight: Tensor, A: Tensor, B: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.ModuleDict({"linear": nn.Linear(*weight.T.shape, bias=False)}).to(weight)
    model["linear"].weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=len(A), lora_alpha=len(A), target_modules=["linear"])
    layer = inject_adapter_in_model(config, model)["linear"].to(weight.dtype)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    down.data.copy_(A)
    up.data.copy_(B)
    return layer, down, up


def unsloth_linear(weight: Tensor, A: Tensor, B: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    apply = unsloth_kernels()[1]
    down, up = (nn.Parameter(factor.clone(memory_format=torch.contiguous_format)) for factor in (A, B))
    return lambda x: apply(x, weight, None, down, up, 1.0), down, up


def unsloth_kernels() -> tuple[Callable, Callable]:
    """(matmul_lora, LoRA_W.apply), without what its packages run when they are imported: that changes
    transformers, PEFT and the environment, with which other sections run."""
    for name in ("unsloth", "unsloth.kernels"):
        if name not in sys.modules:
            sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))
    cache = os.path.join(tempfile.gettempdir(), "unsloth_compiled_cache")  # else in the working directory
    with patch.dict(os.environ, UNSLOTH_IS_PRESENT="1", UNSLOTH_COMPILE_LOCATION=cache):
        from unsloth.kernels.fast_lora import LoRA_W
        from unsloth.kernels.utils import matmul_lora
    return matmul_lora, LoRA_W.apply


UPDATES = {"vllm": vllm_update, "sglang": sglang_update}
LAYERS = {"peft": peft_layer, "unsloth": unsloth_layer}
LINEARS = {"peft": peft_linear, "unsloth": unsloth_linear}


def built(makers: dict[str, Callable], device: str, *args) -> Iterator[tuple[str, object, str]]:
    """(name, what it made, "") of the peers of that device; (name, None, why) where it cannot be built."""
    for name, make in makers.items():
        if name in ON_CUDA and device != "cuda":
            continue
        if importlib.util.find_spec(name) is None:
            yield name, None, "not installed"
            continue
        try:
            made, why = make(*args), ""
        except Exception as error:  # interfaces that are not public change; that is a finding
            made, why = None, reason_of(error)
        yield name, made, why
