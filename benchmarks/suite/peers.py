"""The LoRA kernels of serving systems, where they are installed with a GPU: updates of decoding rows.

They know one adapter a row, so a row's mixture is an adapter of rank K r: factors side by side, weights
folded into B, as for PEFT. Building it is not timed. A peer whose interface has changed is listed with its
error.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from suite.cases import reason_of


def folded(pool, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(A [rows, K r, in_features], B [rows, out_features, K r]) of every row's own adapter."""
    A, B = (t.view(pool.entries, pool.rank, -1)[indices.long()] for t in (pool.A, pool.B))
    B = (B * weights[..., None, None]).to(pool.B.dtype)
    return A.flatten(1, 2).contiguous(), B.flatten(1, 2).mT.contiguous()


def vllm_update(
    pool, x: Tensor, y: Tensor, picks: Sequence[Tensor], weights: Tensor
) -> Callable[[int], Tensor]:
    """vLLM's shrink and expand."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    adapters = [folded(pool, indices, weights) for indices in picks]
    rows, rank, out = len(x), adapters[0][0].shape[1], y.clone()
    u = torch.empty(1, rows, rank, dtype=torch.float32, device=x.device)
    meta = LoRAKernelMeta.make(rows, rows, x.device)
    meta.prepare_tensors(torch.arange(rows, dtype=torch.int32, device=x.device))
    try:
        args = meta.meta_args(rows)
    except TypeError:  # newer ones also ask whether to specialise on the number of adapters
        args = meta.meta_args(rows, False)

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
    rows, rank, device = len(x), adapters[0][0].shape[1], x.device
    each = torch.arange(rows + 1, dtype=torch.int32, device=device)
    values = dict(
        use_cuda_graph=False,
        bs=rows,
        num_segments=rows,
        seg_lens=torch.ones(rows, dtype=torch.int32, device=device),
        seg_indptr=each,
        max_len=1,
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


UPDATES = {"vllm": vllm_update, "sglang": sglang_update}


def installed_updates(*args) -> Iterator[tuple[str, Callable | None, str]]:
    """(name, its update, "") of every peer that is installed; (name, None, why) where it cannot be built."""
    for name, make in UPDATES.items():
        if importlib.util.find_spec(name) is None:
            continue
        try:
            yield name, make(*args), ""
        except Exception as error:  # interfaces that are not public change; that is a finding
            yield name, None, reason_of(error)
