"""Whole models: prefill, decoding, time to first token, memory and a training step.

Contenders are those of `contenders.py`, verified against an fp32 copy, but for `frozen fp32`, which is one;
a peer that is wrong has no time. While decoding and in prefill `dense` answers one row, its time counts for
all. SmolLM2-135M, all linears, every row its own mixture; in full mode also two layers of LLaMA-2-7B's shape.
On a GPU the cases of `gpu_model.py`. "first token" cases begin with texts, see `first_token.py`.
"""

import copy
import gc
from collections.abc import Iterator

import bench_decode
import bench_memory
import bench_prefill
import bench_training
import contenders as common
import torch
from contenders import ENTRIES, RANK, TOP_K
from torch import nn

from slm_fast.loading import packaged_model
from suite import first_token, gpu_model
from suite.cases import Case, Effort, clock_of, contenders_of, measure, measured, reason_of, target
from suite.machine import dtype_name, natural_dtype

OURS = "on"


def read_bytes(base: nn.Module, added: int) -> int:
    """Of one step: every weight once (embeddings as the rows looked up, nearly nothing), and the entries."""
    embedding = base.get_input_embeddings().weight
    tied = base.get_output_embeddings().weight is embedding
    weights = sum(p.nbytes for p in base.parameters()) - (0 if tied else embedding.nbytes)
    return weights + added


def decode_case(name: str, base: nn.Module, rows: int) -> Case:
    """In bf16. Where the CPU does not multiply bf16, the frozen model in fp32 takes part too."""
    wrong: dict[str, str] = {}
    model, routing, decoders = bench_decode.verified(base, "all", ENTRIES[name], rows, wrong)
    if natural_dtype() != base.dtype:
        exact = copy.deepcopy(base).to(torch.float32)
        decoders["frozen fp32"] = bench_decode.Decoder(exact, rows, base.config.vocab_size)
        decoders["frozen fp32"].read_prompt()
    distinct, features = common.distinct_entries(routing), common.factor_features(model)
    size = read_bytes(base, distinct * RANK * features * 2)
    weights = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear))
    operations = 2 * rows * (weights + TOP_K * RANK * features)
    axes = {"kind": "decode", "model": name, "rows": rows, "entries": ENTRIES[name], "distinct": distinct}
    axes["dtype"] = dtype_name(base.dtype)
    runs, case_name = contenders_of(decoders, rows, wrong), f"decode, {name}, {rows} rows"
    # Every call lengthens the cache: none may have more of them.
    return Case("model", case_name, axes, runs, OURS, size, operations, dtype=axes["dtype"], warm=False)


def prefill_case(name: str, base: nn.Module, rows: int, tokens: int) -> Case:
    """To the logits of the last token: the first answer's."""
    wrong: dict[str, str] = {}
    model, routing, calls = bench_prefill.verified(base, "all", ENTRIES[name], rows, tokens, wrong)
    head = base.get_output_embeddings()
    linears = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear) and m is not head)
    mixture = TOP_K * RANK * common.factor_features(model)
    attention = base.config.num_hidden_layers * base.config.hidden_size * tokens
    operations = 2 * rows * (tokens * (linears + mixture + attention) + head.weight.numel())
    axes = {"kind": "prefill", "model": name, "rows": rows, "tokens": tokens}
    axes["dtype"] = dtype_name(base.dtype)
    entries = common.distinct_entries(routing) * RANK * common.factor_features(model)
    size = read_bytes(base, entries * base.dtype.itemsize)
    case_name = f"prefill, {name}, {rows} x {tokens} tokens"
    runs = contenders_of(calls, rows, wrong)
    return Case("model", case_name, axes, runs, OURS, size, operations, dtype=axes["dtype"])


def step_case(name: str, rows: int, tokens: int, contenders: tuple[str, ...]) -> Case:
    """A training step, fp32."""
    base = bench_training.make_base(name, torch.float32)
    ids = bench_training.make_ids(base, rows, tokens)
    return gpu_model.training_case(name, {"model": name, "dtype": "fp32"}, base, ids, contenders)


def memory_record(name: str, rows: int, rounds: int, repeats: int) -> dict:
    """Resident bytes above the frozen model's, of processes of their own; see `bench_memory.py`.
    `peak_bytes` is all of such a process."""
    found = bench_memory.measure(name, "all", rows, rounds, repeats)
    numbers = {
        key: {"memory_bytes": c["above_frozen"], "peak_bytes": c["peak"], "pool_bytes": c["pool"]}
        for key, c in found["contenders"].items()
    }
    axes = {"kind": "memory", "model": name, "rows": rows}
    record = {"section": "model", "case": f"memory, {name}, {rows} rows", "axes": axes, "ours": OURS}
    return record | {"bytes": None, "operations": None, "clock": "none", "contenders": numbers}


def first_tokens(device: str, counts: tuple[int, ...], effort: Effort) -> Iterator[dict]:
    """On a GPU; one record that says why where the models' packages, or GGUF's, are not installed."""
    try:
        packaged_model("minilm")
        base = common.make_base("smol").to(device)
    except (OSError, ImportError) as error:
        axes, skipped = {"kind": "first_token", "model": "smol"}, {OURS: reason_of(error)}
        case = Case("model", "first token, smol", axes, [], OURS, skipped=skipped)
        yield measure(case, effort, clock_of(device))
        return
    yield from first_token.records(base, counts, effort)


def records(quick: bool, device: str, effort: Effort) -> Iterator[dict]:
    """`bench_gpu_ops.py` measures the linears of a model on a GPU."""
    if device != "cpu":
        yield from map(tokens_per_second, measured(gpu_model.cases(quick, device), device, effort))
        yield from first_tokens(device, (1,) if quick else (1, 8), effort)
        return
    for name in ("smol",) if quick else ("smol", "7b"):
        base = common.make_base(name)
        counts = (8,) if quick else (1, 8) if name == "7b" else (1, 8, 16, 32)
        yield from map(
            tokens_per_second, measured((decode_case(name, base, rows) for rows in counts), device, effort)
        )
        base = base.to(natural_dtype())
        sizes = ((1, 128),) if quick or name == "7b" else ((1, 128), (1, 512), (8, 32), (8, 128))
        yield from map(
            tokens_per_second, measured((prefill_case(name, base, *size) for size in sizes), device, effort)
        )
        if name == "smol":
            yield from first_token.records(base, (1,) if quick else (1, 8), effort)
            gc.collect()
        if not quick:
            yield memory_record(name, 16, 10, 1)
    contenders = ("frozen", "engine", "peft", "dense")
    yield tokens_per_second(measure(step_case("wide", *((4, 32) if quick else (8, 128)), contenders), effort))


def tokens_per_second(record: dict) -> dict:
    """The record, with the tokens that each contender reads or makes in a second."""
    tokens = record["axes"]["rows"] * record["axes"].get("tokens", 1)
    for found in record["contenders"].values():
        if "seconds" in found:
            found["tokens_per_second"] = tokens / found["seconds"]
    return record


def targets(records: list[dict], ceilings: dict) -> list[dict]:
    """Of the training step alone; decoding and prefill have their targets in their own scripts."""
    rows = []
    for record in records:
        if record["axes"]["kind"] == "step" and "ratio" in record["contenders"]["peft"]:
            reached = 1 / record["contenders"]["peft"]["ratio"]
            rows.append(target(f"model, {record['case']}: ours / PEFT", reached, "<=", 1.05))
    return rows
