"""The tables of README.md, written from the files in `benchmarks/results/`.

    python benchmarks/readme_tables.py [--check]

What lies between `<!-- results: NAME -->` and `<!-- end -->` is what `TABLES[NAME]` makes of its files, rows
that lose included, and under it the files, their machine and the command. `--check` writes nothing, names the
blocks that differ and exits with 1 if there are any; a block that is not known or not closed exits with 2.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from slm_fast.continual.tables import comparison, mean_over_runs, measured, percent, probe_table, spread

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"<!-- results: (?P<name>[^>]*?) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)
MISSING = "-"


# Reading and writing.


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf8"))


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(result: dict) -> str:
    found = result["machine"]
    threads = found.get("threads") or result["threads"]
    counted = f"{found['cores']} cores, {threads} thread{'s' * (threads != 1)}"
    return f"{counted}, {found['isa']}, torch {found['torch']}"


def caption(commands: dict[str, str]) -> str:
    """The line under a table. commands: of its result files, which are of one machine."""
    results = {name: load(name) for name in commands}
    machines = {machine(result) for result in results.values()}
    if len(machines) > 1:
        raise ValueError(f"{', '.join(commands)} are of several machines: {'; '.join(sorted(machines))}")
    files = " and ".join(f"`{name}.json`" for name in commands)
    made = dict.fromkeys(results[name].get("command", command) for name, command in commands.items())
    return f"{files}; {machines.pop()}; {' and '.join(f'`{command}`' for command in made)}"


def captioned(header: Sequence[str], rows: Iterable[Sequence[str]], commands: dict[str, str]) -> str:
    return f"{table(header, rows)}\n\n{caption(commands)}"


def command(script: str, records: Sequence[dict], *options: str) -> str:
    """The command that measures `records`: their values of `options`."""
    parts = [f"python benchmarks/{script}.py"]
    for option in options:
        parts += [f"--{option}", *dict.fromkeys(str(record[option]) for record in records)]
    return " ".join(parts)


# The tables.


def five_tasks() -> str:
    """Accuracy after the last task, by task, in the mean over the orders."""
    runs = load("continual")["runs"]
    tasks = runs["bert5"][0]["tasks"]
    told = "slm_fast, told the task"
    methods = [
        ("slm_fast, no task id, `twin_share=1/3`", "bert5_shared", "slm"),
        ("slm_fast, no task id", "bert5", "slm"),
        (told, "bert5", "oracle"),
        (
            "the authors' retrieval on the same weights, averaged over batches of one task",
            "bert5_batch",
            "batch",
        ),
        (
            "one LoRA trained on all tasks at once, told the task's head, which starts at zero",
            "bert5_joint",
            "joint",
        ),
        ("the same, heads that start at a probe, as ours do", "bert5_joint_probe", "joint"),
    ]
    rows = []
    for title, protocol, method in methods:
        if protocol not in runs:
            continue
        found = [run["methods"][method] for run in runs[protocol]]
        last = [
            dict(zip(r["tasks"], f["matrix"][-1], strict=True))
            for r, f in zip(runs[protocol], found, strict=True)
        ]
        forgotten = [f["forgetting"] for f in found]
        scores = [percent(mean(scores[task] for scores in last)) for task in tasks]
        average = percent(mean(f["average_accuracy"] for f in found))
        forgetting = MISSING if None in forgotten else percent(mean(forgotten), 2)
        rows.append([title, *scores, average, forgetting, str(len(found))])
    header = ["after the last task, %", *tasks, "average", "forgetting", "orders"]
    made = f"python benchmarks/bench_continual.py {' '.join(runs)}"
    return captioned(header, rows, {"continual": made})


def baselines() -> str:
    """Every method through the same runner, in the mean over the seeds that were run."""
    runs = load("continual")["runs"]["bert5_baselines"]
    header, rows = comparison(mean_over_runs([run | {"methods": measured(run)} for run in runs]))
    seeds = ", ".join(str(run["settings"]["seeds"]["run"]) for run in runs)
    made = "python benchmarks/bench_continual.py bert5_baselines"
    return f"{captioned(header, rows, {'continual': made})}, seeds {seeds}"


def probes() -> str:
    """Tasks that were never learnt, before and after learning five others, with the calibrated floor."""
    (run,) = load("continual")["runs"]["bert5_probes"]
    header, rows = probe_table(run["probes"])
    made = "python benchmarks/bench_continual.py bert5_probes"
    return captioned(header, rows, {"continual": made})


def few_examples() -> str:
    """Accuracy, told the task, learnt from a few texts a class from both starts; with spreads over draws."""
    rows = [
        [found["task"], found["start"], *(percent(spread(found[when])) for when in ("before", "after"))]
        for found in load("transfer")["results"]
    ]
    header = ["%", "new entries start from", "before the first step", "learnt"]
    made = "python benchmarks/bench_transfer.py --pool RUN/slm"
    return captioned(header, rows, {"transfer": made})


def of_benchmark(name: str, benchmark: str) -> dict:
    return next(found for found in load(name)["results"] if found["benchmark"] == benchmark)


def routing_means(found: dict) -> list[str]:
    """Over the tasks; then the same with tasks of equal labels as one."""
    return [percent(mean(found[key].values())) for key in ("accuracy", "merged")]


COST = {"hubs": "hubs", "bytes": "MB", "milliseconds": "ms a search"}
OF_FIVE = "python benchmarks/bench_routing.py --benchmark bert5 --backbone smollm2 --pool RUN/slm"


def costs(retrievals: list[dict], encoding: float) -> tuple[list[str], list[list[str]]]:
    """A header, and cells for each way to retrieve: the skewness of how often keys are picked (not in older
    results), the size of keys and statistics, a query's time, and with encoding its text: by the encoder of
    all, or of the row."""
    titles = {key: title for key, title in COST.items() if all(key in found for found in retrievals)}
    rows = []
    for found in retrievals:
        cells = {"bytes": f"{found['bytes'] / 1e6:.1f}", "milliseconds": f"{found['milliseconds']:.2f}"}
        cells |= {"hubs": f"{found['hubs']:.2f}"} if "hubs" in titles else {}
        whole = found.get("encoding", encoding) + found["milliseconds"]
        rows.append([*(cells[key] for key in titles), f"{whole:.1f}"])
    return [*titles.values(), "with encoding"], rows


def routing_of_five_tasks() -> str:
    """The share of test texts, of each task, whose largest mass is on it, and what is answered rightly so."""
    retrievals = of_benchmark("routing_bert5", "bert5")["retrievals"]
    titles, cells = costs(retrievals, load("routing_bert5")["milliseconds"]["encoding"])
    rows = []
    for found, cost in zip(retrievals, cells, strict=True):
        means = [*routing_means(found), *(percent(mean(found[key].values())) for key in ("mass", "final"))]
        shares = map(percent, found["accuracy"].values())
        rows.append([found["retrieval"], *shares, *means, *cost])
    tasks = retrievals[0]["accuracy"]
    header = ["routing accuracy, %", *tasks, "mean", "yelp = amazon", "mass", "answers", *titles]
    made = {"routing_bert5": OF_FIVE}
    return captioned(header, rows, made)


def coverage() -> str:
    """The calibrated floor: own texts kept, and the share of each probe's texts on the frozen model."""
    floors = of_benchmark("routing_bert5", "bert5")["floors"]
    rows = [
        [f"{found['coverage']:.2f}", percent(mean(found["kept"].values()))]
        + [percent(share, 0) for share in found["frozen"].values()]
        for found in floors
    ]
    header = ["`coverage`", "own texts kept, %", *floors[0]["frozen"]]
    made = {"routing_bert5": OF_FIVE}
    return captioned(header, rows, made)


def routing_of_25_tasks() -> str:
    retrievals = of_benchmark("routing_all25", "all25")["retrievals"]
    titles, cells = costs(retrievals, load("routing_all25")["milliseconds"]["encoding"])
    rows = []
    for found, cost in zip(retrievals, cells, strict=True):
        worst = min(found["accuracy"], key=found["accuracy"].get)
        lowest = f"{worst} {percent(found['accuracy'][worst])}"
        mass = percent(mean(found["mass"].values()))
        rows.append([found["retrieval"], *routing_means(found), lowest, mass, *cost])
    header = ["routing accuracy, %", "mean of 25", "equal labels as one", "lowest", "mass", *titles]
    made = {"routing_all25": "python benchmarks/bench_routing.py --benchmark all25"}
    return captioned(header, rows, made)


def step_cells(record: dict, bound: str) -> list[str]:
    """Times of the contenders, what the pool adds, by how much that is uncertain, and the bound beside it."""
    times, quartiles = record["milliseconds"], record["quartiles"]
    noise = sum(quartiles[name] / times[name] for name in ("on", "off")) / 2
    added = [f"{record['added_percent']:+.1f}%", f"{percent(noise)}%", f"{record[bound]:.1f}%"]
    shown = [milliseconds(times[name]) for name in ("frozen", "off", "on", "peft", "dense")]
    return [*shown[:3], *added, *shown[3:]]


def step_header(first: str, bound: str) -> list[str]:
    ours = ["slm_fast, pool off", "pool on", "added", "noise", bound]
    return [first, "frozen model", *ours, "PEFT `adapter_names`", "the authors' method"]


def decoding_on(*names: str) -> str:
    rows, commands = [], {}
    for name in names:
        records = load(name)["results"]
        commands[name] = command("bench_decode", records, "model", "targets", "rows")
        for record in (r for r in records if r["targets"] == "all"):
            title = f"{record['model']}, {record['rows']} row{'s' * (record['rows'] != 1)}"
            rows.append([title, *step_cells(record, "floor_percent")])
    return captioned(step_header("ms a step", "floor"), rows, commands)


def decoding() -> str:
    """All linears adapted, a table for each machine."""
    machines = ("cpu_decode_smol", "cpu_decode_7b"), ("cpu_avx2_decode_smol", "cpu_avx2_decode_7b")
    return "\n\n".join(decoding_on(*names) for names in machines)


def prefill() -> str:
    records = load("cpu_prefill_smol")["results"]
    rows = []
    for record in records:
        linears = {"all": "all linears"}.get(record["targets"], f"`{record['targets']}`")
        title = f"{record['model']}, {record['rows']} x {record['tokens']} tokens, {linears}"
        rows.append([title, *step_cells(record, "share_percent")])
    made = {"cpu_prefill_smol": command("bench_prefill", records, "model", "targets", "rows", "tokens")}
    return captioned(step_header("ms a batch", "operations"), rows, made)


def memory_of(name: str) -> str:
    records = load(name)["results"]
    titles = {
        "frozen": "frozen model",
        "off": "slm_fast, pool off",
        "on": "slm_fast, pool on",
        "peft": "PEFT `adapter_names`",
        "dense": "the authors' method",
    }
    rows = []
    for record in records:
        for key, found in record["contenders"].items():
            above, pool, peak, loading = (found[k] for k in ("above_frozen", "pool", "peak", "loading_peak"))
            cells = [f"{size / 1e6:,.0f}" for size in (above, peak, loading)]
            over = [f"{pool / 1e6:,.0f}", f"{100 * (above / pool - 1):+.1f}%"] if pool else [MISSING] * 2
            title = f"{record['model']}, {record['rows']} rows, {titles[key]}"
            rows.append([title, cells[0], *over, *cells[1:], f"{found['tokens_per_second']:,.1f}"])
    header = [
        "MB resident",
        "above the frozen model",
        "pool",
        "over the pool",
        "peak",
        "while loading",
        "tokens/s",
    ]
    made = {name: command("bench_memory", records, "model", "targets", "rows")}
    return captioned(header, rows, made)


def memory() -> str:
    return "\n\n".join(map(memory_of, ("cpu_memory_smol", "cpu_avx2_memory_7b")))


def training_step() -> str:
    records = load("cpu_avx2_training_wide")["results"]
    titles = {
        "frozen": "frozen model, forward and backward",
        "engine": "slm_fast, a mixture for each row",
        "peft": "PEFT's LoRA, rank 16 (a mixture of two has that)",
        "peft_r": "PEFT's LoRA, rank 8",
        "dense": "the authors' dense offsets, one mixture for the batch",
        "dense_rows": "the same, a mixture for each row",
    }
    rows = []
    for record in records:
        ratios, sizes = record["over_engine"], record["memory"]
        for key, time in record["milliseconds"].items():
            cells = [milliseconds(time), f"{ratios[key]:.2f}", f"{sizes[key] / 1e6:,.0f}"]
            rows.append([titles[key], *cells])
    options = ("model", "dtype", "targets", "checkpointing", "rows", "tokens")
    made = {"cpu_avx2_training_wide": command("bench_training", records, *options)}
    header = ["a training step", "ms", "times slm_fast's", "MB above the frozen model"]
    return captioned(header, rows, made)


SUITE = "suite_cpu_avx2"


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:,.0f} us"
    return f"{1e3 * seconds:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def times(found: dict | None) -> str:
    """Of a contender: its time, what multiple of ours it is, and its recall if it does not find all."""
    if found is None or "seconds" not in found:
        return MISSING
    text = duration(found["seconds"])
    if found.get("ratio", 1.0) != 1.0:
        text += f" ({found['ratio']:.1f}x)"
    return text + (f", recall {found['recall']:.2f}" if found.get("recall", 1.0) < 0.999 else "")


def records_of(section: str) -> list[dict]:
    return [record for record in load(SUITE)["results"] if record["section"] == section]


def suite_command() -> str:
    return f"python -m benchmarks {' '.join(load(SUITE)['seconds'])}"


def timed(records: list[dict], columns: dict[str, str]) -> list[dict]:
    """The records with times. Raises ValueError where a contender has no column."""
    found = [r for r in records if any("seconds" in of for of in r["contenders"].values())]
    if unknown := {name for record in found for name in record["contenders"]} - set(columns):
        raise ValueError(f"no column for {', '.join(sorted(unknown))}")
    return found


def of_suite(section: str, columns: dict[str, str], **having) -> str:
    """Cases of a section with those axes; columns: {contender: its title}, ours first."""
    records = records_of(section)
    records = [r for r in records if all(r["axes"].get(key) in values for key, values in having.items())]
    rows = [
        [r["case"], *(times(r["contenders"].get(name)) for name in columns)] for r in timed(records, columns)
    ]
    return captioned(["case", *columns.values()], rows, {SUITE: suite_command()})


def suite_search() -> str:
    columns = {"slm_fast": "slm_fast", "slm_fast, no codes": "without codes", "torch": "PyTorch"}
    columns |= {"faiss flat": "FAISS flat", "faiss hnsw": "HNSW", "faiss ivf": "IVF"}
    return of_suite("search", columns)


def suite_mixture() -> str:
    columns = {"slm_fast": "slm_fast", "torch": "PyTorch", "dense": "dense offsets", "peft": "PEFT"}
    kinds = ("update", "layer", "step", "layer step")  # pools of all sizes are among the targets
    return of_suite("mixture", columns | {"frozen": "the linear alone"}, kind=kinds)


def suite_serve() -> str:
    """Tokens a second and latencies."""
    titles = {"transformers": "frozen, transformers", "off": "slm_fast, pool off", "on": "slm_fast"}
    rows = []
    for record in records_of("serve"):
        for name, found in record["contenders"].items():
            latencies = [duration(found[key]) for key in ("first_token_50", "first_token_95", "per_token_50")]
            rows.append([record["case"], titles[name], f"{found['tokens_per_second']:.1f}", *latencies])
    header = ["load", "", "tokens/s", "first token, median", "95%", "a further token"]
    return captioned(header, rows, {SUITE: suite_command()})


MODEL_COLUMNS = {  # contenders of whole models, ours first
    "on": "slm_fast",
    "in the prefill": "slm_fast, query in the prefill",
    "frozen": "frozen",
    "off": "pool off",
    "merged": "merged weights",
    "peft": "PEFT",
    "dense": "dense offsets",
    "frozen fp32": "frozen, fp32",
    "on eager": "slm_fast, no graph",
    "frozen eager": "frozen, no graph",
}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def of_models(records: list[dict]) -> str:
    """Whole models' cases: times, and what multiple of ours they are, in the columns that are needed."""
    ours = {"engine": "on"}  # as training steps call it
    named = [r | {"contenders": {ours.get(n, n): of for n, of in r["contenders"].items()}} for r in records]
    records = timed(named, MODEL_COLUMNS)
    columns = {n: title for n, title in MODEL_COLUMNS.items() if any(n in r["contenders"] for r in records)}
    rows = []
    for record in records:
        dtype = record["axes"]["dtype"]
        cells = [times(record["contenders"].get(name)) for name in columns]
        rows.append([record["case"], SHORT.get(dtype, dtype), *cells])
    return table(["case", "dtype", *columns.values()], rows)


def suite_model() -> str:
    """Decoding, prefill and a training step in the suite."""
    return f"{of_models(records_of('model'))}\n\n{caption({SUITE: suite_command()})}"


def suite_targets() -> str:
    rows = [
        [row["what"], f"{row['reached']:.2f}", row["wanted"], "yes" if row["holds"] else "no"]
        for row in load(SUITE)["targets"]
    ]
    return captioned(["asked of the suite", "reached", "wanted", "holds"], rows, {SUITE: suite_command()})


GPU = "nvidia_h100_80gb_hbm3"


def gpu_caption() -> str:
    """Where it ran, of which commit ("+": with changes), in which mode, and what of the check did not end."""
    card = load(GPU)
    found, quick = card["suite"]["machine"], card["suite"]["quick"]
    where = f"{found['card']}, driver {found['driver']}, torch {found['torch']}, triton {found['triton']}"
    mode = "quick mode" if (quick if isinstance(quick, bool) else quick.get("model")) else "full mode"
    ends = {name: step["status"] for name, step in card["steps"].items() if step["status"] != "ok"}
    left = ", ".join(f"{name} {status}" for name, status in ends.items()) or "all steps ok"
    return f"`{GPU}.json`; {where}, commit {found['commit']}, {mode}; `make gpu-check` ({left})"


def gpu_models() -> str:
    """A whole model's cases on a GPU."""
    records = [record for record in load(GPU)["suite"]["results"] if record["section"] == "model"]
    return f"{of_models(records)}\n\n{gpu_caption()}"


TABLES = {
    "five tasks": five_tasks,
    "baselines": baselines,
    "never learnt": probes,
    "few examples": few_examples,
    "routing of five tasks": routing_of_five_tasks,
    "coverage": coverage,
    "routing of 25 tasks": routing_of_25_tasks,
    "training step": training_step,
    "search": suite_search,
    "mixture": suite_mixture,
    "whole models": suite_model,
    "serving": suite_serve,
    "what the suite is asked": suite_targets,
    "decoding": decoding,
    "prefill": prefill,
    "memory": memory,
    "models on a GPU": gpu_models,
}


# The blocks.


def rewritten(text: str) -> tuple[str, list[str]]:
    """`text` with its blocks as the results say, and the names of those that were different."""
    blocks = [*BLOCK.finditer(text)]
    if any("<!-- results:" in block["body"] for block in blocks) or len(blocks) != text.count(
        "<!-- results:"
    ):
        raise ValueError("a block of results has no <!-- end -->")
    if unknown := {block["name"] for block in blocks} - set(TABLES):
        raise ValueError(f"no table is called {min(unknown)!r}; there are {', '.join(TABLES)}")
    differing = []

    def replaced(block: re.Match) -> str:
        body = TABLES[block["name"]]() + "\n"
        if body != block["body"]:
            differing.append(block["name"])
        return f"<!-- results: {block['name']} -->\n{body}<!-- end -->"

    return BLOCK.sub(replaced, text), differing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a block differs")
    args = parser.parse_args(argv)
    try:
        text, differing = rewritten(README.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        print(f"readme_tables: {error}", file=sys.stderr)
        return 2
    if not args.check:
        README.write_text(text, encoding="utf8")
    for name in differing:
        print(f"{'differs' if args.check else 'rewritten'}: {name}")
    return int(args.check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
