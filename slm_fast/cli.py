"""The command `slm-fast`: learn tasks, show a routing, answer texts, benchmark, check the installation."""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import platform
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

from slm_fast.config import HEAD_INITS, INITS, KEY_METHODS, METRICS, SLMConfig
from slm_fast.continual.metrics import EVALUATED
from slm_fast.continual.tasks import TEXT_METRICS
from slm_fast.prompts import Prompt, encode_prompts, encode_texts

# Of `learn` where neither an option nor a benchmark says otherwise.
DEFAULTS = dict(
    base="minilm",
    encoder="minilm",
    target=None,
    rank=8,
    entries=4,
    top_k=4,
    epochs=2,
    learning_rate=2e-3,
    batch_size=16,
    max_length=128,
)


def _learn(args) -> int:
    from slm_fast.continual.runner import write_reports
    from slm_fast.continual.tables import format_comparison, mean_over_runs, measured, repeated_runs
    from slm_fast.encoder import make_encoder

    args = _with_defaults(args)
    seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else [args.seed]
    runs = [(order, seed) for order in _orders(args) for seed in seeds]
    began, reports = time.perf_counter(), []
    config, encoder, memory = _config(args), None, {}  # one of the last two for all runs
    if config.encoder_name_or_path != "backbone":
        encoder = make_encoder(config)
        if args.queries:
            encoder.keep_in(args.queries)
    for order, seed in runs:
        folder = Path(args.output)
        if len(runs) > 1:
            args.trained = args.trained or str(folder / "trained")
            folder /= f"order{order}-seed{seed}" if order else f"seed{seed}"
        reports.append(_learn_once(args, order, seed, folder, encoder, memory))
        print_run(reports[-1])
        if "slm" in reports[-1]["methods"]:
            print(f"\nmodel:  {folder / 'slm'}")
    for group in repeated_runs(reports):
        print(f"\nmean ± standard deviation over {len(group)} runs")
        print(format_comparison(mean_over_runs([run | {"methods": measured(run)} for run in group])))
    title = f"Continual learning: {args.benchmark}" if args.benchmark else "Continual learning"
    _, page = write_reports(reports, args.output, title, time.perf_counter() - began)
    print(f"\nreport: {page}, with report.json, report.md and report.tex beside it")
    return 0


def _learn_once(args, order: str | None, seed: int, folder: Path, encoder, memory: dict) -> dict:
    """Learn the tasks in one order with one seed; the run's report. memory: see `Encoder.share`."""
    import torch

    from slm_fast.continual.benchmarks import BENCHMARKS, answer_tokens, score_names
    from slm_fast.continual.probes import check_probes, probe
    from slm_fast.continual.runner import ContinualRunner
    from slm_fast.loading import load_base
    from slm_fast.model import get_slm_model
    from slm_fast.trainer import default_arguments

    training = default_arguments(
        str(folder),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        seed=seed,
        report_to=_reporters(args.report_to),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=args.bf16,
    )
    base, tokenizer = load_base(args.base, getattr(torch, args.dtype))
    model = get_slm_model(base, _config(args), encoder=encoder, tokenizer=tokenizer)
    if encoder is None:  # it is the base
        model.encoder.share(memory)
        if args.queries:
            model.encoder.keep_in(args.queries)
    tasks, probes = _tasks(args, order, seed, model.can_generate)
    check_probes(probes, [task.name for task in tasks], model.can_generate)
    limits = dict(max_length=args.max_length, max_new_tokens=answer_tokens(tokenizer, tasks + probes))
    options = dict(methods=args.methods.split(","), evaluate=args.evaluate, seed=seed)
    options |= dict(output_dir=folder, trained=args.trained, options=_method_options(args.option))
    options |= dict(early_stopping=args.early_stopping, holdout=args.holdout)
    runner = ContinualRunner(model, tasks, training, **options, **limits)
    name = Path(str(args.base)).name
    if args.benchmark:
        name = f"{args.benchmark}, order {order}, seed {seed}, {name}"
    elif args.seeds:
        name = f"{name}, seed {seed}"
    report = runner.fit().report(name)
    if args.benchmark:
        report["settings"] = report["settings"] | {
            "benchmark": args.benchmark,
            "order": order,
            "hyper-parameters": args.hyperparameters,
            "scores": score_names(tasks, BENCHMARKS[args.benchmark].scoring),
        }
    if probes:
        report["probes"] = probe(model, probes, **limits)
    return report


def _method_options(words: list[str]) -> dict[str, dict[str, int | float]]:
    """{method: {option: value}} of words like "ewc.lambda=1e4". Raises ValueError on other words."""
    options: dict[str, dict[str, int | float]] = {}
    for word in words:
        name, _, value = word.partition("=")
        method, _, option = name.partition(".")
        try:
            number = int(value) if value.lstrip("+").isdigit() else float(value)
        except ValueError:
            option = ""
        if not (method and option):
            raise ValueError(f"--option {word}: wanted METHOD.NAME=NUMBER, as in ewc.lambda=1e4")
        options.setdefault(method, {})[option] = number
    return options


def _settings(words: list[str]) -> dict:
    """{field: value} of words like "coverage=0.95"; values are JSON, or else words. Raises ValueError."""
    known, settings = {field.name for field in fields(SLMConfig)}, {}
    for word in words:
        name, found, value = word.partition("=")
        if not found or name not in known:
            raise ValueError(f"--set {word}: wanted FIELD=VALUE, of {', '.join(sorted(known))}")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def _config(args) -> SLMConfig:
    named = dict(
        r=args.rank,
        target_modules=args.target if args.target == "all-linear" else args.target and args.target.split(","),
        metric=args.metric,
        key_method=args.keys,
        init=args.init,
        head_init=args.head_init,
        top_k=args.top_k,
        entries_per_task=args.entries,
        twin_share=args.twin_share,
        min_similarity=args.min_similarity,
        temperature=args.temperature,
        encoder_name_or_path=args.encoder,
    )
    return SLMConfig(**(named | getattr(args, "key_learning", {}) | _settings(args.set)))


def _tasks(args, order: str | None, seed: int, generates: bool) -> tuple[list, list]:
    """The tasks to learn and the probes; prints what they are and where they come from."""
    from slm_fast.continual.benchmarks import BENCHMARKS, load_benchmark, task_table
    from slm_fast.continual.sources import load_source
    from slm_fast.continual.tables import format_table
    from slm_fast.continual.tasks import load_tasks

    limits = dict(max_train=args.max_train, max_test=args.max_test, seed=seed)
    names = args.tasks.split(",") if args.tasks else None
    data, scoring = None, None
    if args.benchmark:
        benchmark, data = BENCHMARKS[args.benchmark], args.data
        scoring = benchmark.scoring
        print(f"{args.benchmark}, order {order}. {benchmark.description}")
        tasks = load_benchmark(
            args.benchmark, order, data, tasks=names, generates=generates, per_task=args.per_task, **limits
        )
    else:
        tasks = [task.subset(**limits) for task in load_tasks(args.data or "docs", names)]
    probed = args.probes.split(",") if args.probes else []
    probes = [load_source(name, data, generates=generates, **limits) for name in probed]
    tasks, probes = ([_scored(task, args.text_metric) for task in part] for part in (tasks, probes))
    print(format_table(task_table(tasks + probes, scoring)), flush=True)
    return tasks, probes


def _scored(task, metric: str | None):
    """The task, with that metric if its answers are texts of more than a few words."""
    return replace(task, metric=metric) if metric and task.metric in TEXT_METRICS else task


def _with_defaults(args) -> argparse.Namespace:
    """The arguments, with the benchmark's hyper-parameters, or our defaults, where nothing was given."""
    from slm_fast.continual.benchmarks import find_benchmark

    defaults = DEFAULTS
    if args.benchmark:
        named = [name for name, value in vars(args).items() if value is not None]
        defaults = find_benchmark(args.benchmark).hyperparameters(args.hyperparameters, named)
    elif args.order:
        raise ValueError("--order needs --benchmark; --tasks gives the order of other tasks")
    given = {name: value for name, value in vars(args).items() if value is not None or name not in defaults}
    return argparse.Namespace(**(defaults | given))


def _orders(args) -> list[str | None]:
    if not args.benchmark:
        return [None]
    from slm_fast.continual.benchmarks import BENCHMARKS, tasks_in_order

    known = list(BENCHMARKS[args.benchmark].orders)
    if args.order is None or args.order == "all":
        return known if args.order else known[:1]
    for order in (orders := args.order.split(",")):
        tasks_in_order(args.benchmark, order)  # an unknown one is an error before the first run
    return orders


def _reporters(names: str | None) -> list[str]:
    """Names for the Trainer's `report_to`. Raises ValueError on one that transformers does not find."""
    from transformers.integrations import get_available_reporting_integrations

    wanted, available = names.split(",") if names else [], get_available_reporting_integrations()
    for name in wanted:
        if name not in available:
            found = ", ".join(available) or "none"
            raise ValueError(f"--report-to {name}: not installed, or unknown to transformers; found: {found}")
    return wanted


def _number_or_word(text: str) -> float | str:
    """A number, or a word that `SLMConfig` may know."""
    try:
        return float(text)
    except ValueError:
        return text


def print_run(report: dict) -> None:
    """Print a run's matrices, their summary, the routing accuracy and the probes."""
    from slm_fast.continual.tables import (
        format_comparison,
        format_matrix,
        format_table,
        measured,
        probe_table,
        probe_title,
    )

    for method in report["methods"].values():
        print(f"\n{method['label']}: score on each task (column) after learning each task (row), %")
        print(format_matrix(report["tasks"], method["matrix"]))
    print()
    print(format_comparison(measured(report)))
    if report.get("routing"):
        accuracy = ", ".join(f"{task} {value:.1%}" for task, value in report["routing"]["accuracy"].items())
        print(f"\nrouting accuracy, one query at a time: {accuracy}")
    if report.get("probes"):
        print(f"\n{probe_title(report['probes'])}")
        print(format_table(probe_table(report["probes"])))


def print_answers(answers: list[dict]) -> None:
    """Print answers with the entries that made them."""
    for answer in answers:
        entries = "  ".join(f"{e['entry']} {e['weight']:.2f}" for e in answer["routing"]) or "frozen model"
        text = " ".join(answer["text"].split())
        print(f"\n> {text[:100]}{'…' if len(text) > 100 else ''}")
        expected = f"   (expected: {answer['expected']})" if answer.get("expected") else ""
        print(f"  {answer['answer']}{expected}\n  [{answer['task'] or 'no task'}]  {entries}")


def _open_model(args):
    from slm_fast.loading import load_base
    from slm_fast.model import SLMModel
    from slm_fast.storage import read_index

    name = args.base or read_index(args.model)["base"]["name_or_path"]
    base, tokenizer = load_base(name)
    return SLMModel.from_pretrained(base, args.model, tokenizer=tokenizer, encoder=args.encoder)


def _texts(args) -> list[str]:
    texts = args.text or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("no texts: give them as arguments or one a line on standard input")
    return [Prompt(text, args.system) for text in texts] if args.system else texts


def _route(args) -> int:
    model = _open_model(args)
    texts = _texts(args)
    for text, row in zip(texts, model.explain(texts), strict=True):
        if args.json:
            print(json.dumps({"text": text} | row))
            continue
        print(f"\n> {text[:100]}")
        print("  " + "  ".join(f"{task} {mass:.3f}" for task, mass in row["mass"].items()))
        for entry in row["entries"]:
            print(f"  {entry['entry']:24s} weight {entry['weight']:.3f}  score {entry['score']:.3f}")
    return 0


def _trained_length(pool, task: str | None) -> int:
    """The tokens that training kept of an example, of the task or at most of any; 256 where none says so."""
    lengths = [info.max_length for info in pool.tasks.values() if task in (None, info.name)]
    return max((length for length in lengths if length), default=256)


def _length(model, prediction) -> int:
    """The tokens that its text would have if it were not cut."""
    text, tokenizer, whole = [prediction.text], model.require_tokenizer(), 10**9
    if prediction.task and model.pool.task(prediction.task).labels is not None:
        in_prefill = model.slm_config.route_in_prefill
        encoded = encode_texts(model.base_model, tokenizer, text, whole, in_prefill)
    else:
        encoded = encode_prompts(tokenizer, text, whole, model.is_seq2seq)
    return encoded["input_ids"].shape[1]


def _generate(args) -> int:
    model = _open_model(args)
    max_length = args.max_length or _trained_length(model.pool, args.task)
    limits = dict(max_length=max_length, max_new_tokens=args.max_new_tokens)
    predictions = model.predict(_texts(args), task=args.task, **limits)
    if cut := sum(_length(model, prediction) > max_length for prediction in predictions):
        print(f"{cut} of {len(predictions)} texts cut to {max_length} tokens: --max-length", file=sys.stderr)
    answers = [
        {"text": p.text, "answer": p.answer, "task": p.task, "routing": p.entries} for p in predictions
    ]
    if args.json:
        for answer in answers:
            print(json.dumps(answer))
    else:
        print_answers(answers)
    return 0


def _version(name: str) -> str | None:
    """Version of the distribution that provides an importable package, or None if there is none."""
    if importlib.util.find_spec(name) is None:
        return None
    distributions = importlib.metadata.packages_distributions().get(name)
    return importlib.metadata.version(distributions[0]) if distributions else "installed"


def _doctor(args) -> int:
    import torch

    from slm_fast import __version__, dispatch

    print(f"slm_fast      {__version__}\npython        {platform.python_version()} on {platform.machine()}")
    print(f"torch         {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"transformers  {_version('transformers')}")
    for name, reason in dispatch.available().items():
        hint = "" if reason is None else " — pip install -e . with a C++17 compiler"
        print(f"backend       {name}: {reason or 'ready'}{hint}")
    for name, value in dispatch.cpu_info().items():
        print(f"extension     {name}: {value or 'none'}")
    print(f"extension     CUDA devices: {dispatch.cuda_devices()}")
    if torch.cuda.is_available():
        print(f"cuda          torch sees {torch.cuda.get_device_name()}")
    else:
        print(
            f"cuda          torch sees no device (built for CUDA {torch.version.cuda or 'none: a CPU build'})"
        )
    extras = [
        ("triton", "gpu", "GPU mixture kernels"),
        ("cupy", "gpu", "key search where the extension was built without nvcc"),
        ("faiss", "faiss", "index for pools beyond a million keys"),
        ("accelerate", "train", "SLMTrainer"),
        ("datasets", "train", "tasks from the hub"),
        ("matplotlib", "train", "pictures in reports"),
        ("gguf", "demo", "GGUF base models"),
        ("peft", "bench", "comparison with PEFT"),
    ]
    for name, extra, use in extras:
        version = _version(name)
        print(
            f"{name:13s} {version or 'missing'}: {use}"
            + ("" if version else f" — pip install 'slm_fast[{extra}]'")
        )
    return 0


def _bench(args) -> int:
    """Run the benchmark suite, which lies beside the package in a checkout and is not installed with it."""
    folder = Path(__file__).parents[1] / "benchmarks"
    if not (folder / "suite" / "command.py").is_file():
        raise ValueError("the benchmarks are in the source tree: run slm-fast from an editable install of it")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    from suite.command import main as suite

    return suite(args.words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slm-fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    learn = commands.add_parser("learn", help="learn tasks in sequence and write a report")
    learn.add_argument(
        "--data",
        help='folder of JSON lines, "docs", "chat", or hub:NAME (default: docs); with --benchmark the data '
        "folder (default: SLM_FAST_DATA, else the Hub)",
    )
    learn.add_argument("--benchmark", help="a protocol: bert5, t5_fewshot, llama3, seq15 or all25")
    learn.add_argument(
        "--order", help='the benchmark\'s orders, separated by commas, or "all" (default: first)'
    )
    learn.add_argument(
        "--hyperparameters",
        choices=("ours", "paper"),
        default="ours",
        help="whose to take where none are given; what was not published is ours",
    )
    learn.add_argument("--tasks", help="names of the tasks, in order; with --benchmark, the ones to keep")
    learn.add_argument(
        "--probes", help="tasks that are never learnt, scored before and after: clinc150,trec6"
    )
    learn.add_argument("--base", help="folder, hub id, GGUF file, minilm or smollm2")
    learn.add_argument("--encoder", help="sentence encoder: folder, hub id, minilm or backbone")
    learn.add_argument(
        "--output", default="slm_run", help="folder of the run; an interrupted run is continued"
    )
    learn.add_argument(
        "--target", help='linears that get a mixture: names or "all-linear" (default: by architecture)'
    )
    learn.add_argument("--metric", choices=METRICS, default="whitened")
    learn.add_argument("--keys", choices=KEY_METHODS, default="group_avg")
    learn.add_argument("--init", choices=INITS, default="zero", help="where a new task's entries start")
    learn.add_argument("--head-init", choices=HEAD_INITS, default="probe", help="where its head starts")
    learn.add_argument(
        "--twin-share",
        type=float,
        default=0.0,
        help="share of a row's weight that its task hands on to near-duplicates with the same labels",
    )
    learn.add_argument(
        "--min-similarity",
        type=_number_or_word,
        help='rows whose best score is lower use the frozen model; "auto": rows unlike the task\'s own texts',
    )
    learn.add_argument(
        "--temperature",
        type=_number_or_word,
        help='of the weights; "auto" fits it to held-out training texts',
    )
    learn.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of SLMConfig, may be repeated: coverage=0.95, query_layers=[0,3,6]",
    )
    learn.add_argument(
        "--trained",
        help="folder of finished training, for commands to share (several orders or seeds: OUTPUT/trained)",
    )
    learn.add_argument("--queries", help="folder of encoded texts, for commands to share")
    learn.add_argument("--methods", default="slm,oracle,seq", help="names, separated by commas")
    learn.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="METHOD.NAME=NUMBER",
        help="of a method, may be repeated; replay.share (default 0.01), ewc.lambda (1e5), ewc.rows (256), "
        "olora.lambda1 (0.5), finetune.learning_rate (1e-4)",
    )
    learn.add_argument(
        "--evaluate",
        choices=EVALUATED,
        default="seen",
        help="tasks that are scored after each stage: those learnt so far; all, which forward transfer after "
        "Lopez-Paz needs; or the new one, and all after the last stage",
    )
    learn.add_argument("--text-metric", choices=TEXT_METRICS, help="of long answers (default: token_f1)")
    learn.add_argument("--rank", type=int)
    learn.add_argument("--entries", type=int, help="pool entries of a task")
    learn.add_argument("--top-k", type=int)
    learn.add_argument("--epochs", type=float)
    learn.add_argument("--max-steps", type=int, help="optimiser steps of a task, in place of --epochs")
    learn.add_argument("--learning-rate", type=float)
    learn.add_argument("--batch-size", type=int)
    learn.add_argument("--gradient-accumulation-steps", type=int, default=1, help="batches of a step")
    learn.add_argument(
        "--gradient-checkpointing", action="store_true", help="activations are computed again: less memory"
    )
    learn.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    learn.add_argument("--bf16", action="store_true", help="train under bf16 autocast, whatever the dtype")
    learn.add_argument(
        "--early-stopping",
        type=int,
        metavar="EPOCHS",
        help="end a task's training after so many epochs without a lower loss on held-out training rows, and "
        "keep its best epoch",
    )
    learn.add_argument("--holdout", type=float, default=0.1, help="share of training rows held out for that")
    learn.add_argument("--max-length", type=int)
    learn.add_argument("--max-train", type=int)
    learn.add_argument("--max-test", type=int)
    learn.add_argument("--seed", type=int, default=0)
    learn.add_argument("--seeds", help="several, separated by commas: a run with each, and their mean")
    learn.add_argument(
        "--report-to",
        help="the Trainer's report_to, separated by commas: tensorboard (in "
        "OUTPUT/tensorboard/METHOD/N-TASK), ...",
    )
    learn.set_defaults(run=_learn)

    for name, run, text in (
        ("route", _route, "show which entries answer a text"),
        ("generate", _generate, "answer texts"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--model", required=True, help="folder of a saved pool")
        command.add_argument("--base", help="base model, if it is not where the pool was trained")
        command.add_argument("--encoder", help="sentence encoder, if it is not where the pool was trained")
        command.add_argument(
            "--system", help="what to do with the texts, for tasks learnt with instructions: the system turn"
        )
        command.add_argument("--json", action="store_true", help="one JSON object a line")
        command.add_argument("text", nargs="*", help="texts; without any, lines of standard input")
        command.set_defaults(run=run)
        if name == "generate":
            command.add_argument("--task", help="tell the task instead of routing freely")
            command.add_argument("--max-new-tokens", type=int, default=32)
            command.add_argument(
                "--max-length", type=int, help="tokens kept of a text (default: as in training, else 256)"
            )

    bench = commands.add_parser("bench", help="what a mixture costs, against every peer", add_help=False)
    bench.set_defaults(run=_bench)
    commands.add_parser("doctor", help="what was found, what is missing, how to get it").set_defaults(
        run=_doctor
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; user errors end with one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = _parser()
    args, args.words = parser.parse_known_args(argv)
    if args.words and args.command != "bench":  # the suite has options of its own
        parser.error(f"unrecognized arguments: {' '.join(args.words)}")
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"slm-fast: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
