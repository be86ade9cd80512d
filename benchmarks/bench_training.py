"""A training step on the CPU (forward, backward, AdamW): the engine, PEFT and the authors' dense offsets.

frozen      forward and backward to the embeddings, nothing is learnt: what every contender pays
engine      one task's 4 entries of rank 8, 2 of them mixed for each row; other tasks' entries lie beside them
peft        PEFT's LoRA of rank 16, which a mixture of two has; one adapter for all rows
peft_r      the same of rank 8
dense       the authors' method: a mixture for the batch, W + sum_k w_k s B_k A_k built in every linear
dense_rows  what the engine learns, by that method: row by row, each with its own mixture

Learnt factors are fp32. Before anything is timed, losses and gradients are held against plain PyTorch in
fp32, with at most twice the error that it makes itself in the base's dtype: the engine's with a mixture for
each row, one for all, and a single entry, which is PEFT's adapter. Contenders then take turns; medians.
Memory is the peak of a process of its own over its second step, above the frozen model's and without the
slab rows of the pool that nobody learns. The last line is JSON.

    python benchmarks/bench_training.py [--quick] [--model smol wide] [--tokens 32 128] [--json FILE]
"""

import argparse
import copy
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import contenders as common
import torch
import torch.nn.functional as F
from bench_memory import reset_peak, resident
from contenders import RANK, TARGET_NAMES, TARGETS, TOP_K
from cpu_timing import interleaved, machine, report
from torch import Tensor

from slm_fast import Routing, SLMConfig, SLMModel, get_slm_model

CONTENDERS = ("frozen", "engine", "peft", "peft_r", "dense", "dense_rows")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TINY = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
TASK, TASKS, ENTRIES = "learnt", 4, 4  # tasks that were learnt before; entries of each
TARGET = {"peft": 1.05, "dense": 3.0, "memory": 0.1}


def make_base(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """SmolLM2-135M, or four layers of a LLaMA that is 1,024 wide, with random weights."""
    if name == "smol":
        return common.make_base("smol").to(dtype).train()
    return common.random_llama(1024, 2816, 4, 16, 8192, dtype).train()


def make_engine(base: torch.nn.Module, targets) -> SLMModel:
    """The engine on a copy of `base`, whose task's factors all differ from zero."""
    config = SLMConfig(r=RANK, top_k=TOP_K, target_modules=targets, entries_per_task=ENTRIES)
    model = get_slm_model(copy.deepcopy(base), config).to(base.device)
    generator = torch.Generator().manual_seed(0)
    for name in (*(f"old{t}" for t in range(TASKS)), TASK):
        model.pool.add_task(name, torch.randn(ENTRIES, 8, generator=generator), generator=generator)
    for factors in model.pool.factors:
        factors.B.copy_(0.02 * torch.randn(factors.B.shape, generator=generator))
    model.pool.own(TASK)
    return model.train()


def make_routing(model: SLMModel, rows: int) -> Routing:
    """Two of the task's entries for each row, with weights of its own."""
    generator = torch.Generator().manual_seed(1)
    slots = torch.tensor(model.pool.task(TASK).slots)
    picks = torch.stack([torch.randperm(ENTRIES, generator=generator)[:TOP_K] for _ in range(rows)])
    weights = torch.rand(rows, TOP_K, generator=generator).softmax(-1)
    return Routing.make(slots[picks], weights, pool_version=model.pool.version).to(model.device)


def learnt_factors(model: SLMModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of the task's A and B of every linear, as parameters."""
    pairs = zip(model.pool.modules_shape, model.pool.factors, strict=True)
    return {
        name: tuple(torch.nn.Parameter(p.detach().clone()) for p in (f.A_owned, f.B_owned))
        for name, f in pairs
    }


class Step:
    """A contender's step. losses(): what is differentiated, one after the other, before AdamW's turn.

    pool_bytes: of slab rows that are not learnt.
    """

    def __init__(self, losses: Callable, parameters: list[Tensor], pool_bytes: int = 0) -> None:
        self.losses, self.parameters, self.pool_bytes = losses, parameters, pool_bytes
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None

    def loss_and_grads(self) -> tuple[float, list[Tensor]]:
        total = 0.0
        for loss in self.losses():
            loss.backward()
            total += float(loss.detach())
        grads = [p.grad for p in self.parameters]
        self.clear()
        return total, grads

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def __call__(self) -> None:
        for loss in self.losses():
            loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.clear()


def frozen_step(base: torch.nn.Module, ids: Tensor) -> Step:
    base.requires_grad_(False)

    def losses():
        embeddings = base.get_input_embeddings()(ids).requires_grad_()
        yield base(inputs_embeds=embeddings, labels=ids).loss

    return Step(losses, [])


def engine_step(model: SLMModel, routing: Routing, ids: Tensor) -> Step:
    def losses():
        yield model(input_ids=ids, labels=ids, routing=routing).loss

    parameters = [p for p in model.parameters() if p.requires_grad]
    slabs = [t for f in model.pool.factors for t in (f.A, f.B)]
    return Step(losses, parameters, sum(t.nbytes for t in slabs) - sum(p.nbytes for p in parameters))


def peft_step(base: torch.nn.Module, targets, rank: int, ids: Tensor, start: dict | None = None) -> Step:
    """`start`: {linear: (A, B)} of one entry."""
    from peft import LoraConfig, get_peft_model

    names = list(TARGET_NAMES) if targets == "all-linear" else targets
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=names)).train()
    for name, (A, B) in (start or {}).items():
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(A)
        layer.lora_B["default"].weight.data.copy_(B.T)

    def losses():
        yield model(input_ids=ids, labels=ids).loss

    return Step(losses, [p for p in model.parameters() if p.requires_grad])


def replaced_step(base: torch.nn.Module, factors: dict, mixture: Callable, batches: list[tuple]) -> Step:
    """Every linear computes `mixture(layer, x, A, B, picks, weights)`; batches: [(ids, picks, weights)]."""
    base.requires_grad_(False)
    current = {}
    for name, (A, B) in factors.items():
        layer = base.get_submodule(name)
        layer.forward = lambda x, layer=layer, A=A, B=B: mixture(layer, x, A, B, **current)

    def losses():
        for ids, picks, weights in batches:
            current.update(picks=picks, weights=weights)
            yield base(input_ids=ids, labels=ids).loss / len(batches)

    return Step(losses, [p for pair in factors.values() for p in pair])


def plain_mixture(layer, x: Tensor, A: Tensor, B: Tensor, picks: Tensor, weights: Tensor) -> Tensor:
    """Every row's mixture in plain PyTorch. picks, weights: [rows, K]; A: [M * r, in], B: [M * r, out]."""
    A, B = (t.view(ENTRIES, RANK, -1)[picks] for t in (A, B))
    u = torch.einsum("bti,bkri->btkr", x.to(A.dtype), A) * weights[:, None, :, None]
    return F.linear(x, layer.weight, layer.bias) + torch.einsum("btkr,bkro->bto", u, B).to(x.dtype)


def dense_mixture(layer, x: Tensor, A: Tensor, B: Tensor, picks: list[list[int]], weights: Tensor) -> Tensor:
    """The authors': the weight increments of the first row's picks, dense and added to the weight."""
    A, B = (t.view(ENTRIES, RANK, -1) for t in (A, B))
    picked = zip(picks[0], weights[0], strict=True)
    offset = sum(w * (B[i].T @ A[i]) for i, w in picked)
    return F.linear(x, layer.weight + offset.to(layer.weight.dtype), layer.bias)


def make_step(name: str, base: torch.nn.Module, targets, ids: Tensor, checkpointing: bool) -> Step:
    """A contender on a base of its own."""
    base = copy.deepcopy(base)
    if name != "engine" and checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if name == "frozen":
        return frozen_step(base, ids)
    if name.startswith("peft"):
        return peft_step(base, targets, RANK if name == "peft_r" else TOP_K * RANK, ids)
    model = make_engine(base, targets)
    routing = make_routing(model, len(ids))
    if name == "engine":
        if checkpointing:
            model.gradient_checkpointing_enable()
        return engine_step(model, routing, ids)
    picks = (routing.indices - model.pool.task(TASK).slots[0]).tolist()
    batches = [(ids, picks, routing.weights)]
    if name == "dense_rows":
        batches = [
            (ids[row, None], picks[row : row + 1], routing.weights[row, None]) for row in range(len(ids))
        ]
    return replaced_step(base, learnt_factors(model), dense_mixture, batches)


def error(got: tuple, want: tuple) -> float:
    """Of the loss or of all gradients, the larger: relative, root mean square."""
    ours, exact = (torch.cat([grad.flatten() for grad in grads]) for _, grads in (got, want))
    return max(float((ours - exact).norm() / exact.norm()), abs(got[0] - want[0]) / abs(want[0]))


def verify(
    base: torch.nn.Module, targets, ids: Tensor, checkpointing: bool, wrong: common.Wrong = None
) -> dict[str, float]:
    """Relative errors against fp32. Raises SystemExit when one is above twice that of plain PyTorch; with
    `wrong`, its contender gets the reason there instead."""
    model = make_engine(base, targets)
    if checkpointing:
        model.gradient_checkpointing_enable()
    first, own = model.pool.task(TASK).slots[0], make_routing(model, len(ids))
    shared = own.rows([0] * len(ids))
    picks = torch.full((1, 1), first, dtype=torch.int32)
    single = Routing.make(picks, [[1.0]], pool_version=model.pool.version).to(model.device)
    routings = {"own": own, "shared": shared, "single": single.rows([0] * len(ids))}

    def replaced(of: torch.nn.Module, routing: Routing, mixture: Callable) -> tuple:
        picks = routing.indices - first
        batches = [(ids, picks if mixture is plain_mixture else picks.tolist(), routing.weights)]
        return replaced_step(copy.deepcopy(of), learnt_factors(model), mixture, batches).loss_and_grads()

    # The class's own `float` refuses weights that came from a GGUF file.
    exact, errors, allowed = torch.nn.Module.float(copy.deepcopy(base)), {}, {}
    wants = {kind: replaced(exact, routing, plain_mixture) for kind, routing in routings.items()}
    for kind, routing in routings.items():
        errors[f"engine, {kind}"] = error(engine_step(model, routing, ids).loss_and_grads(), wants[kind])
        plain = error(replaced(base, routing, plain_mixture), wants[kind])
        allowed[f"engine, {kind}"] = 2 * plain + TINY[base.dtype]
    with common.excused("dense", wrong):
        errors["dense"] = error(replaced(base, shared, dense_mixture), wants["shared"])
    with common.excused("dense_rows", wrong):
        errors["dense_rows"] = error(
            make_step("dense_rows", base, targets, ids, checkpointing).loss_and_grads(), wants["own"]
        )
    with common.excused("peft", wrong):
        entry = {name: (A[:RANK], B[:RANK]) for name, (A, B) in learnt_factors(model).items()}
        loss, grads = peft_step(copy.deepcopy(base), targets, RANK, ids, entry).loss_and_grads()
        grads = [grad if number % 2 == 0 else grad.T for number, grad in enumerate(grads)]
        wanted = [grad[:RANK] for grad in wants["single"][1]]
        errors["peft"] = error((loss, grads), (wants["single"][0], wanted))
    allowed |= {"dense": 2 * allowed["engine, shared"], "dense_rows": 2 * allowed["engine, own"]}
    allowed["peft"] = allowed["engine, single"]
    bad = {name: found for name, found in errors.items() if not found <= allowed[name]}
    if bad and wrong is None:
        raise SystemExit(f"wrong losses or gradients, nothing is timed: {bad}, allowed {allowed}")
    for name, found in bad.items():
        reason = f"wrong losses or gradients, {name}: error {found:.1e}, allowed {allowed[name]:.1e}"
        wrong[name.split(",")[0]] = reason
    return errors


def peak_memory(name: str, args: dict) -> int:
    """Bytes, less `pool_bytes`, that a process of its own has resident at most during its second step."""
    options = [f"--{key}={value}" for key, value in args.items()]
    command = [sys.executable, __file__, "--child", name, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def child(args) -> None:
    base = make_base(args.model[0], DTYPES[args.dtype[0]])
    ids = make_ids(base, args.rows[0], args.tokens[0])
    step = make_step(args.child, base, TARGETS[args.targets[0]], ids, args.checkpointing[0] == "on")
    del base
    step()
    reset_peak()
    step()
    print(json.dumps({"peak": resident("VmHWM") - step.pool_bytes}))


def make_ids(base: torch.nn.Module, rows: int, tokens: int) -> Tensor:
    return common.make_prompt(base.config.vocab_size, rows, tokens)


def measure(setting: dict, contenders: list[str], rounds: int, repeats: int) -> dict:
    """Errors, median milliseconds and bytes above the frozen model's of one setting."""
    base, targets = make_base(setting["model"], DTYPES[setting["dtype"]]), TARGETS[setting["targets"]]
    ids, checkpointing = make_ids(base, setting["rows"], setting["tokens"]), setting["checkpointing"] == "on"
    errors = verify(base, targets, ids[:4, :32], checkpointing)
    steps = {name: make_step(name, base, targets, ids, checkpointing) for name in contenders}
    samples = interleaved(steps, 1 + rounds, warm=False)
    milliseconds = {name: 1e3 * statistics.median(values[1:]) for name, values in samples.items()}
    del base, steps
    peaks = {
        name: statistics.median(peak_memory(name, setting) for _ in range(repeats)) for name in contenders
    }
    memory = {name: peak - peaks["frozen"] for name, peak in peaks.items()}
    return setting | {
        "errors": errors,
        "milliseconds": milliseconds,
        "over_engine": {name: value / milliseconds["engine"] for name, value in milliseconds.items()},
        "memory": memory,
        "engine_memory_over_dense": memory["engine"] / memory["dense"],
        "samples": samples,
    }


def print_record(record: dict) -> None:
    setting = " ".join(record[key] for key in ("model", "dtype", "targets"))
    print(f"{setting}, checkpointing {record['checkpointing']}, {record['rows']} x {record['tokens']} tokens")
    for name, milliseconds in record["milliseconds"].items():
        extra, ratio = record["memory"][name] / 1e6, record["over_engine"][name]
        print(
            f"  {name:11}{milliseconds:9.0f} ms {ratio:6.2f} x engine{extra:+9.0f} MB above the frozen model"
        )
    print(
        f"  engine / peft {1 / record['over_engine']['peft']:.3f} (target: at most {TARGET['peft']}), "
        f"dense / engine {record['over_engine']['dense']:.2f} (at least {TARGET['dense']}), "
        f"memory of engine / dense {record['engine_memory_over_dense']:.2f} (at most {TARGET['memory']})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=("smol", "wide"), default=["smol", "wide"])
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: fp32, and bf16 if the CPU has it"
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--rows", nargs="+", type=int, default=[8])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128], help="of a row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3, help="processes whose peaks' median is taken")
    parser.add_argument("--quick", action="store_true", help="one small setting, within a minute")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    args, contenders = parser.parse_args(), list(CONTENDERS)
    if args.child:
        child(args)
        return
    if args.dtype is None:
        args.dtype = list(DTYPES) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ["fp32"]
    if args.quick:
        args.model, args.targets, args.checkpointing, args.dtype = ["wide"], ["all"], ["off"], args.dtype[-1:]
        args.rows, args.tokens, args.rounds, args.repeats = [4], [32], 3, 1
        contenders = ["frozen", "engine", "peft", "dense"]
    axes = ("model", "dtype", "targets", "checkpointing", "rows", "tokens")
    results = []
    for values in itertools.product(*(getattr(args, axis) for axis in axes)):
        results.append(measure(dict(zip(axes, values, strict=True)), contenders, args.rounds, args.repeats))
        print_record(results[-1])
    report({"machine": machine(), "targets": TARGET, "results": results}, args.json)


if __name__ == "__main__":
    main()
