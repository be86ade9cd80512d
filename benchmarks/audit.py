"""Kernel audit: compile every kernel variant of the plan tables, no GPU needed, and judge the machine code.

For each row of `slm_fast/plans/<architecture>.json` the real launchers of `kernels/*.py` run on meta tensors.
Triton's own launch path specialises each launch as it would on the card and hands it over instead of
compiling it, so no list of variants can drift from the code. Every distinct variant is then compiled for its
architecture, disassembled with the tools that Triton ships, and refused when it

 * spills, has a stack or local memory, or needs more registers or shared memory than a block can have;
 * claims a matrix product and issues no tensor-core instruction, or, for 16-bit tiles of 64 rows and more,
   not the warp-group ones (HGMMA on sm_90, UTC*MMA on sm_100);
 * reads a tile of activations, weights or factors in pieces below 16 bytes though the sizes allow them;
 * uses atomics (results would depend on the order of blocks), or PDL where the plan has none, or none where
   it has.

Features that are not multiples of 16 (no published model has them) make Triton read element by element; such
variants must compile, fit and launch, and what they spill is printed, not refused.

`csrc/cuda/*.cu` is compiled by nvcc, where there is one, and held to the same rules. A kernel of `kernels/`
that no row reaches is a failure. Bytes, operations and floor times are printed by `roofline.py`.

    python benchmarks/audit.py [--quick] [--arch 90] [--op mixture] [--json FILE]
"""

import argparse
import ast
import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import roofline
import torch

from slm_fast import plan

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90, 100)
KB = 1024
# Shared memory of a block. sm_80's table also serves 8.6, 8.9 and 12.0, which have less than an A100.
SHARED_LIMIT = {"sm_80": 99 * KB, "sm_90": 227 * KB, "sm_100": 227 * KB}
REGISTERS = 65536  # of a multiprocessor
TENSOR_MEMORY = 512  # columns, sm_100
TENSOR = r"HMMA|HGMMA|UTC[A-Z]*MMA"
WARP_GROUP = {"sm_90": "HGMMA", "sm_100": r"UTC[A-Z]*MMA"}
ELEMENTS = ("x_ptr", "y_ptr", "gate_ptr", "A_ptr", "A0_ptr", "B_ptr")  # of activations and of factors
WIDE = re.compile(r"LDG\.\S*(128|256)|LDGSTS\.\S*128|UTMALDG\S*")
DTYPES = {
    "half": [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
    "float": [(torch.float32, torch.float32)],
}


# Which launches a row makes.


@dataclass(frozen=True)
class Case:
    """One way to call the launchers with a row's plan: dtypes, sizes, ragged rows or equal ones."""

    dtype: torch.dtype
    factor_dtype: torch.dtype
    features: int
    varlen: bool
    biases: tuple[bool, ...] = (False, True)
    linears: tuple[int, ...] = (1, 2, 3, 4)  # that read what one norm writes

    def x(self, *shape):
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def factors(self, *shape):
        return torch.empty(shape, dtype=self.factor_dtype, device="meta")

    def cu_seqlens(self, rows):
        return ints(rows + 1) if self.varlen else None


def ints(*shape):
    return torch.empty(shape, dtype=torch.int32, device="meta")


def floats(*shape):
    return torch.empty(shape, dtype=torch.float32, device="meta")


def cases(row: dict, quick: bool) -> list[Case]:
    """Everything that may vary at run time under a row; `quick` keeps a plain and a ragged way."""
    pairs = [pair for kind in ([row["dtype"]] if "dtype" in row else DTYPES) for pair in DTYPES[kind]]
    if not quick:
        return [Case(*pair, n, varlen) for pair in pairs for n in (4096, 100) for varlen in (False, True)]
    return [
        Case(*pair, 4096, varlen=False, biases=(False,), linears=(3,))
        if pair[0] == pair[1] != torch.float32
        else Case(*pair, 4096, varlen=True, biases=(True,), linears=(2,))
        for pair in pairs
        if pair[0] != torch.float16
    ]


@dataclass(frozen=True)
class Sizes:
    """Sizes that a row's conditions admit. Kernels are not specialised on them."""

    tokens: int
    top_k: int
    max_rank: int
    columns: int  # slab rows of a resident pool
    rows: int = 4
    entries: int = 24

    @staticmethod
    def of(row: dict) -> "Sizes":
        top_k, max_rank = (2, 8) if row.get("max_columns", 48) <= 16 else (4, 12)
        return Sizes(row.get("max_tokens", 4096), top_k, max_rank, min(row.get("max_columns", 96), 96))

    def gather_routing(self, case: Case):
        picks = ints(self.rows, self.top_k), floats(self.rows, self.top_k)
        entries = ints(self.entries), ints(self.entries), floats(self.entries)
        return *entries, *picks, case.cu_seqlens(self.rows)

    def resident_routing(self, case: Case):
        weights = floats(self.rows, self.entries)
        return ints(self.columns), floats(self.entries), weights, case.cu_seqlens(self.rows)


def launch_mixture(row, case):
    """With its own shrink, for training, and behind a kernel that made u."""
    from slm_fast.kernels.mixture import mixture_bwd, mixture_fwd

    sizes = Sizes.of(row)
    routing, settings = sizes.gather_routing(case), {"max_rank": sizes.max_rank, "plan": row["plan"]}
    x = case.x(sizes.tokens, case.features)
    A = case.factors(sizes.entries * sizes.max_rank, case.features)
    u = floats(sizes.tokens, sizes.top_k * sizes.max_rank)
    if row["phase"] == "backward":
        mixture_bwd(x, x, u, A, A, routing, owned=(0, 4 * sizes.max_rank), needs=(True,) * 4, **settings)
        return
    mixture_fwd(x, x, A, A, routing, **settings)
    mixture_fwd(x, x, A, A, routing, save_u=True, **settings)
    mixture_fwd(x, x, A, A, routing, u=floats(8 if sizes.tokens <= 256 else 1, *u.shape), **settings)


def launch_fused_linear(row, case):
    """Inline or with its own shrink, for training, behind a given u, of several linears; with and without a
    bias or a residual. Of a resident pool, and with gathered entries: a row's, or each token's own."""
    from slm_fast.kernels.fused_linear import fused_linear_bwd, fused_linear_fwd, stacked_linear_fwd

    sizes = Sizes.of(row)
    x, weight = case.x(sizes.tokens, case.features), case.x(case.features, case.features)
    A = case.factors(sizes.columns, case.features)
    decoding = sizes.tokens <= 64
    gathering = replace(sizes, rows=sizes.tokens) if decoding else sizes
    kinds = [
        (sizes.resident_routing(case), None, sizes.columns),
        (gathering.gather_routing(case), sizes.max_rank, sizes.top_k * sizes.max_rank),
    ]
    splits = 8 if decoding else 1  # of a u that comes from a launch before
    for routing, max_rank, columns in kinds:
        u, settings = floats(sizes.tokens, columns), {"plan": row["plan"], "max_rank": max_rank}
        given_u = floats(splits, *u.shape)
        if row["phase"] == "backward":
            settings |= {"owned": (0, sizes.columns), "needs": (True,) * 4}
            fused_linear_bwd(x, x, u, weight, A, A, routing, **settings)
            continue
        for bias in (case.x(case.features) if given else None for given in case.biases):
            fused_linear_fwd(x, weight, bias, A, A, routing, **settings)
            fused_linear_fwd(x, weight, bias, A, A, routing, save_u=True, **settings)
            fused_linear_fwd(x, weight, bias, A, A, routing, u=given_u, **settings)
        for given in (None, given_u):
            residual = case.x(sizes.tokens, case.features)
            fused_linear_fwd(x, weight, None, A, A, routing, u=given, residual=residual, **settings)
        for linears in set(case.linears) - {1}:
            stacked = case.x(linears * case.features, case.features)
            for bias in (case.x(len(stacked)) if given else None for given in case.biases):
                us = floats(linears, splits, *u.shape)
                stacked_linear_fwd(x, stacked, bias, [A] * linears, routing, us, **settings)


def shrink_settings(row, case):
    """(sizes, keyword arguments, slab rows, rank columns) of a gathered and of a resident pool."""
    sizes = Sizes.of(row)
    gathered = {"routing": sizes.gather_routing(case), "max_rank": sizes.max_rank, "plan": row["plan"]}
    resident = {"routing": None, "max_rank": 1, "plan": row["plan"]}
    yield sizes, gathered, sizes.entries * sizes.max_rank, sizes.top_k * sizes.max_rank
    yield sizes, resident, sizes.columns, sizes.columns


def launch_norm_shrink(row, case):
    """In front of 1 to 4 linears, gathered or resident; backward with h kept or written again."""
    from slm_fast.kernels.norm_shrink import norm_shrink_bwd, norm_shrink_fwd

    for sizes, settings, slab_rows, columns in shrink_settings(row, case):
        x, weight = case.x(sizes.tokens, case.features), case.x(case.features)
        for linears in case.linears:
            A = [case.factors(slab_rows, case.features)] * linears
            if row["phase"] == "forward":
                norm_shrink_fwd(x, weight, 1e-6, A, **settings)
                continue
            u = floats(linears, sizes.tokens, columns)
            for h in (None, x):
                norm_shrink_bwd(
                    x, u, x, weight, 1e-6, u, A, owned=(0, 16), needs=(True, True), h=h, **settings
                )


def launch_silu_mul_shrink(row, case):
    """Gathered or resident; backward with h kept or written again."""
    from slm_fast.kernels.silu_mul_shrink import silu_mul_shrink_bwd, silu_mul_shrink_fwd

    for sizes, settings, slab_rows, columns in shrink_settings(row, case):
        x, A = case.x(sizes.tokens, case.features), case.factors(slab_rows, case.features)
        if row["phase"] == "forward":
            silu_mul_shrink_fwd(x, x, A, **settings)
            continue
        u = floats(sizes.tokens, columns)
        for h in (None, x):
            silu_mul_shrink_bwd(x, u, x, x, A, owned=(0, 16), needs=(True, True), h=h, **settings)


def launch_rotary(row, case):
    """Of queries and keys that lie side by side."""
    from slm_fast.kernels.rotary import rotary_fwd

    for head in (64, 128):
        q, k = case.x(64, 6 * head).split([4 * head, 2 * head], 1)
        rotary_fwd(q, k, case.x(8, head), case.x(8, head), plan=row["plan"])


def launch_nothing(row, case):
    """`linear` rows choose between the two ops above; they launch nothing themselves."""


LAUNCHES = {
    "mixture": launch_mixture,
    "fused_linear": launch_fused_linear,
    "norm_shrink": launch_norm_shrink,
    "silu_mul_shrink": launch_silu_mul_shrink,
    "rotary": launch_rotary,
    "linear": launch_nothing,
}


class OfflineDriver:
    """Stands where Triton asks for the current GPU."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


def use_architecture(arch: int):
    from triton.runtime import driver

    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    driver.set_active(OfflineDriver(arch))


def record(arch: int, ops, quick: bool) -> dict[str, list[str]]:
    """Distinct variants of an architecture's table, as Triton serialises them: the rows that launch each."""
    import triton

    use_architecture(arch)
    launched: dict[str, list[str]] = {}
    label = ""

    def take(*, compile, **_):
        rows = launched.setdefault(compile["specialization_data"], [])
        if label not in rows:
            rows.append(label)
        return True  # do not compile

    triton.knobs.runtime.jit_cache_hook = take
    try:
        for row in plan.load(plan.architecture_of(divmod(arch, 10)))["rows"]:
            if row["op"] not in LAUNCHES:
                raise SystemExit(f"no launches known for op {row['op']!r}: add them to LAUNCHES")
            if ops is None or row["op"] in ops:
                label = row_label(row)
                for case in cases(row, quick):
                    LAUNCHES[row["op"]](row, case)
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    return launched


def row_label(row: dict) -> str:
    limits = [f"{key[4]}<={row[key]}" for key in ("max_tokens", "max_columns") if key in row]
    return " ".join([row["op"], row["phase"], row.get("dtype", ""), *limits]).replace("  ", " ")


def kernels_of_package() -> set[str]:
    """Names of all kernels in kernels/: jitted functions called _*_kernel."""
    names = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf8")).body:
            if isinstance(node, ast.FunctionDef) and re.fullmatch(r"_\w+_kernel", node.name):
                names.add(node.name)
    return names


# What the compiler made of a variant.


def tool(name: str, *arguments) -> str:
    from triton import knobs

    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def resources(cubin: str) -> dict[str, dict]:
    """registers, stack and local bytes of every function in a cubin."""
    text = tool("cuobjdump", "--dump-resource-usage", cubin)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    names = ("registers", "stack", "static_shared", "local")
    return {name: dict(zip(names, map(int, numbers), strict=True)) for name, *numbers in found}


def instructions(sass: str) -> dict:
    """Counts of the opcodes that matter."""
    codes = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M))

    def count(pattern):
        return sum(n for code, n in codes.items() if re.match(pattern, code))

    tensor = Counter()
    for code, n in codes.items():
        if match := re.match(TENSOR, code):
            tensor[match[0]] += n
    return {
        "tensor": dict(tensor),
        "wide_loads": sum(n for code, n in codes.items() if WIDE.match(code)),
        "loads": count(r"LDG\.|LDG$|LDGSTS|UTMALDG"),
        "local_accesses": count(r"LDL|STL"),
        "atomics": count(r"(RED|ATOM|ATOMG|UTMAREDG)(\.|$)"),
        "instructions": sum(codes.values()),
    }


def dots(ttir: str) -> list[dict]:
    """The matrix products that the kernel asks for."""
    pattern = (
        r"tt\.dot .*?(?:inputPrecision = (\w+) )?"
        r": tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x(\w+)>"
    )
    return [
        {"precision": precision or "ieee", "shape": (int(m), int(n), int(k)), "dtypes": (a, b)}
        for precision, m, k, a, n, b in re.findall(pattern, ttir)
    ]


@functools.cache
def tile_loads(path: str) -> set[int]:
    """Lines of the loads that walk along features, of tiles with two sides."""
    found = set()
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            source = ast.unparse(node)
            if "features" in source and "[:, None]" in source:
                found |= set(range(node.lineno, node.end_lineno + 1))
    return found


def shares(ttir: str, threads: int) -> dict[tuple[str, int], tuple[float, int]]:
    """(file, line) of each load of a two-sided tile: a thread's share in bytes, and bytes of an element."""
    locations = dict(re.findall(r"^(#loc\w*) = loc\((.*)\)$", ttir, re.M))

    def resolve(name):
        for _ in range(8):
            text = locations.get(name, "")
            if match := re.search(r'"([^"]+\.py)":(\d+)', text):
                return match[1], int(match[2])
            inner = re.search(r"#loc\w*", text)
            if not inner:
                break
            name = inner[0]
        return None

    found = {}
    pattern = r"tt\.load .*: tensor<(\d+)x(\d+)x!tt\.ptr<[a-z]+(\d+)>> loc\((#loc\w*)\)"
    for rows, columns, bits, name in re.findall(pattern, ttir):
        if place := resolve(name):
            size = int(bits) // 8
            found[place] = int(rows) * int(columns) * size / threads, size
    return found


def bytes_per_access(ptx: str) -> dict[tuple[str, int], int]:
    """(file, line) of each global read that PTX has: the bytes of its narrowest access."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.M))
    narrowest: dict[tuple[str, int], int] = {}
    place, inside = None, False
    for line in ptx.splitlines():
        if "inline asm" in line:
            inside = "begin" in line
        elif match := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            if not inside:  # LLVM counts on, line by line, inside inline assembly
                place = files.get(match[1]), int(match[2])
            continue
        if match := re.search(r"ld\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\s", line):
            size = int(match[1] or 1) * int(match[2]) // 8
        elif match := re.search(r"cp\.async\.c[ag]\.shared\.global.*?\], \[.*?\], (0x[0-9a-f]+|\d+)", line):
            size = int(match[1], 0)
        else:
            continue
        narrowest[place] = min(narrowest.get(place, size), size)
    return narrowest


def narrow_tiles(ttir: str, ptx: str, threads: int, mixed: bool) -> list[str]:
    """Tile loads in pieces below 16 bytes, or below a thread's share of the tile where that is less.

    `mixed`: 16-bit tiles that meet fp32 factors may go straight to the registers that the product reads them
    from, 4 elements a thread, which still fills whole sectors of 32 bytes.
    """
    share = shares(ttir, threads)
    narrow = []
    for (path, line), size in bytes_per_access(ptx).items():
        # A cached compilation names the checkout that made it; the source is the same one.
        own = ROOT / "kernels" / Path(path or "").name
        if path and Path(path).parent.name == "kernels" and line in tile_loads(str(own)):
            whole, element = share.get((path, line), (16, 4))
            wanted = min(16, whole, 8 if mixed and element == 2 else 16)
            if size < wanted:
                narrow.append(f"{Path(path).name}:{line} reads {size} bytes at a time, {wanted:g} wanted")
    return narrow


def measure(arch: int, variant: str) -> dict:
    """Compile one variant and read its machine code."""
    use_architecture(arch)
    data = json.loads(variant)
    module, name = data["name"].rsplit(".", 1)
    kernel = getattr(importlib.import_module(module), name)
    keys = list(data["signature"])
    constants = {
        keys[path[0]]: v for path, v in zip(data["constant_keys"], data["constant_vals"], strict=True)
    }
    divisible = {keys[p[0]] for p, v in zip(data["attrs_keys"], data["attrs_vals"], strict=True) if v}
    result = {
        "kernel": name,
        "arch": arch,
        "signature": data["signature"],
        "constants": {key: value for key, value in constants.items() if not key.endswith("_ptr")},
        "warps": data["options"]["num_warps"],
        "stages": data["options"]["num_stages"],
        "launch_pdl": data["options"]["launch_pdl"],
        "aligned": all(key in divisible for key in keys if key.endswith("features")),
        "walks_features": any(key.endswith("features") for key in keys),
    }
    try:
        compiled = kernel.preload(variant)
    except Exception as error:  # the compiler's own words are the finding
        return result | {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"}
    threads = 32 * compiled.metadata.num_warps
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernel.cubin")
        Path(cubin).write_bytes(compiled.asm["cubin"])
        result |= resources(cubin)[name] | instructions(tool("nvdisasm", "-c", cubin))
    ttir, ptx = compiled.asm["ttir"], compiled.asm["ptx"]
    factors = {kind for key, kind in data["signature"].items() if re.fullmatch(r"[AB]\d?_ptr", key)}
    mixed = "*fp32" in factors and any(kind in ("*bf16", "*fp16") for kind in data["signature"].values())
    return result | {
        "threads": threads,
        "shared": compiled.metadata.shared,
        "tensor_memory": compiled.metadata.tmem_size,
        "dots": dots(ttir),
        "pdl": "griddepcontrol" in ptx,
        "narrow": narrow_tiles(ttir, ptx, threads, mixed) if result["aligned"] else [],
    }


# Verdict.


def faults(m: dict) -> list[str]:
    """Why a variant is refused, one line each; none if it is not."""
    if "error" in m:
        return [f"does not compile: {m['error']}"]
    table = plan.architecture_of(divmod(m["arch"], 10))
    found = resource_faults(m, SHARED_LIMIT[table])
    if m["aligned"]:
        found += spill_faults(m)
    if m["tensor_memory"] > TENSOR_MEMORY:
        found.append(f"{m['tensor_memory']} columns of tensor memory, the limit is {TENSOR_MEMORY}")
    claims = [d for d in m.get("dots", []) if d["precision"] != "ieee" or "f32" not in d["dtypes"]]
    if claims and not m["tensor"]:
        found.append("a matrix product without tensor-core instructions")
    large = [d for d in claims if d["shape"][0] >= 64 and "f32" not in d["dtypes"]]
    wanted = WARP_GROUP.get(table)
    if large and wanted and not any(re.fullmatch(wanted, name) for name in m["tensor"]):
        found.append(f"16-bit product of {large[0]['shape']} without {wanted}")
    if m["walks_features"] and m["aligned"] and not m["wide_loads"]:
        found.append("no 128-bit global loads")
    found += m["narrow"]
    planned = bool(m["constants"].get("PDL"))
    if not m["pdl"] == m["launch_pdl"] == planned:
        found.append(f"PDL: planned {planned}, in the launch {m['launch_pdl']}, in the code {m['pdl']}")
    return found


def spill_faults(m: dict) -> list[str]:
    if not (m["local_accesses"] or m["stack"] or m["local"]):
        return []
    sizes = f"stack {m['stack']} bytes, local {m['local']} bytes"
    return [f"spills: {m['local_accesses']} accesses to local memory, {sizes}"]


def resource_faults(m: dict, shared_limit: int) -> list[str]:
    """Registers, shared memory and atomics, by which Triton's and nvcc's kernels are both judged."""
    found = []
    if m["registers"] > 255 or m["registers"] * m["threads"] > REGISTERS:
        found.append(
            f"{m['registers']} registers x {m['threads']} threads exceed a multiprocessor's {REGISTERS}"
        )
    if m["shared"] > shared_limit:
        found.append(f"{m['shared']} bytes of shared memory, the limit is {shared_limit}")
    if m["atomics"]:
        found.append(f"{m['atomics']} atomic instructions")
    return found


# CUDA sources.


def measure_cuda(arch: int, source: str) -> list[dict]:
    """Compile a .cu file with nvcc for one architecture and read every kernel in it."""
    gencode = f"arch=compute_{arch},code=sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "source.cubin")
        command = ["nvcc", "-std=c++17", "-O3", "-cubin", "-gencode", gencode, "-o", cubin, source]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            error = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"exit {run.returncode}"
            return [{"kernel": Path(source).name, "arch": arch, "error": error[:200]}]
        usage = resources(cubin)
        text = tool("nvdisasm", cubin) if usage else ""
    sections = dict(
        re.findall(r"^\t\.section\t\.(text\.\S+?|nv\.info\.\S+?),(.*?)(?=^//-{5}|\Z)", text, re.M | re.S)
    )
    measured = []
    for name, used in usage.items():
        threads = re.search(r"EIATTR_MAX_THREADS.*?\.word\s+(0x[0-9a-f]+)", sections[f"nv.info.{name}"], re.S)
        measured.append(
            {"kernel": name, "arch": arch, "threads": int(threads[1], 16) if threads else 1024}
            | used
            | {"shared": used["static_shared"]}  # dynamic shared memory is planned, and checked, at run time
            | instructions(sections[f"text.{name}"])
        )
    return measured


def cuda_faults(m: dict) -> list[str]:
    """As `faults`; a template argument `true` is a kernel's promise to read 16 bytes at a time."""
    if "error" in m:
        return [f"does not compile: {m['error']}"]
    found = resource_faults(m, 48 * KB) + spill_faults(m)
    if "Lb1E" in m["kernel"] and not m["wide_loads"]:
        found.append("no 128-bit global loads")
    return found


# Report.


def describe(m: dict) -> tuple[str, str, str]:
    """(dtypes, modes, tiles) of a Triton variant, short."""
    pointers = {key: kind[1:] for key, kind in m["signature"].items() if key.endswith("_ptr")}
    elements = [re.sub(r".*<(\w+)\[.*", r"\1", pointers.get(key, "")) for key in ELEMENTS]
    dtypes = "+".join(dict.fromkeys(filter(None, elements))) or "fp32"
    modes = [name for name, value in m["constants"].items() if value is True]
    tiles = [str(value) for name, value in m["constants"].items() if name.startswith("BLOCK_")]
    return dtypes, ",".join(modes), "x".join(tiles)


def print_table(arch: int, measured: list[dict]):
    print(f"\nsm_{arch}: {len(measured)} variants")
    print(
        f"{'kernel':30}{'first row':42}{'dtypes':11}{'tiles':15}{'w/s':5}{'regs':>4}{'shared':>8}"
        f"  {'tensor':14}{'wide/loads':>10}  verdict  modes"
    )
    for m in measured:
        dtypes, modes, tiles = describe(m)
        kernel = m["kernel"].removeprefix("_").removesuffix("_kernel")
        more = f" +{len(m['rows']) - 1}" if len(m["rows"]) > 1 else ""
        head = f"{kernel:30}{m['rows'][0] + more:42}{dtypes:11}{tiles:15}{m['warps']}/{m['stages']:<3}"
        odd = "" if m["aligned"] else f" odd sizes, {m.get('local_accesses', 0)} local accesses"
        print(f"{head}{numbers(m)}  {'FAIL' if m['faults'] else 'ok':7}  {modes}{odd}")


def numbers(m: dict) -> str:
    if "error" in m:
        return f"{'':48}"
    tensor = " ".join(f"{n} {name}" for name, n in m["tensor"].items()) or "-"
    return f"{m['registers']:4}{m['shared']:8}  {tensor:14}{m['wide_loads']:>5}/{m['loads']:<4}"


def print_cuda_table(arch: int, measured: list[dict]):
    print(f"\nsm_{arch}, nvcc: {len(measured)} kernels")
    for m in measured:
        name = re.sub(r"^_ZN3slm\d+", "", m["kernel"]).split("EEv")[0][:58]
        print(f"{name:60}{m.get('threads', 0):5} threads {numbers(m)}  {'FAIL' if m['faults'] else 'ok'}")


def audit_triton(pool, arch, ops, quick) -> list[dict]:
    launched = record(arch, ops, quick)
    measured = list(pool.map(measure, [arch] * len(launched), launched, chunksize=2))
    for m, rows in zip(measured, launched.values(), strict=True):
        m |= {"rows": rows, "faults": faults(m)}
    return sorted(measured, key=lambda m: (m["kernel"], m["rows"][0]))


def audit_cuda(pool, arch) -> list[dict]:
    sources = sorted(str(path) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    measured = [m for found in pool.map(measure_cuda, [arch] * len(sources), sources) for m in found]
    for m in measured:
        m["faults"] = cuda_faults(m)
    return measured


def failure_lines(measured: list[dict]) -> list[str]:
    lines = []
    for m in measured:
        where = f"sm_{m['arch']} {m['kernel']}"
        if "rows" in m:
            dtypes, modes, tiles = describe(m)
            where += f" [{m['rows'][0]}; {dtypes} {tiles} {m['warps']}/{m['stages']} {modes}]"
        lines += [f"{where}: {fault}" for fault in m["faults"]]
    return lines


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="80 90 100, or a relative")
    parser.add_argument("--op", nargs="+", choices=LAUNCHES, help="rows of these ops alone")
    parser.add_argument(
        "--quick", action="store_true", help="aligned sizes, no fp16: the subset of make test"
    )
    parser.add_argument("--plans", type=Path, help="another folder of tables")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every measurement there")
    return parser.parse_args()


def audit_all(args) -> tuple[list[dict], list[dict]]:
    """Triton's kernels and nvcc's, a table of each architecture printed as it is done."""
    triton_kernels, cuda_kernels = [], []
    has_nvcc = shutil.which("nvcc") is not None and args.op is None
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for arch in args.arch:
            triton_kernels += (measured := audit_triton(pool, arch, args.op, args.quick))
            print_table(arch, measured)
            if has_nvcc:
                cuda_kernels += (measured := audit_cuda(pool, arch))
                print_cuda_table(arch, measured)
    if not has_nvcc:
        print("\nCUDA sources: not audited (needs nvcc on the PATH and no --op)")
    return triton_kernels, cuda_kernels


def main():
    args = parse_arguments()
    begin = time.perf_counter()
    plan.FOLDER = args.plans or plan.FOLDER
    triton_kernels, cuda_kernels = audit_all(args)
    covered = {m["kernel"] for m in triton_kernels}
    missed = sorted(kernels_of_package() - covered) if args.op is None else []
    failures = failure_lines(triton_kernels + cuda_kernels)
    failures += [f"{name}: no row of the tables launches it" for name in missed]
    if args.op is None:
        print()
        roofline.report()
    print("\n".join(["", *(f"FAIL {line}" for line in failures)]))
    summary = {
        "ok": not failures,
        "variants": len(triton_kernels),
        "cuda_kernels": len(cuda_kernels),
        "kernels": sorted(covered),
        "missed": missed,
        "failures": failures,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    if args.json:
        details = {"measured": triton_kernels, "cuda": cuda_kernels}
        args.json.write_text(json.dumps(summary | details, indent=1))
    print(json.dumps(summary))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
