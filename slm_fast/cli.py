"""The command `slm-fast`: learn tasks, show a routing, answer texts, and check the installation."""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import platform
import sys
import time
from pathlib import Path

from slm_fast.config import KEY_METHODS, METRICS, SLMConfig


def _learn(args) -> int:
    from slm_fast.continual.runner import ContinualRunner, write_reports
    from slm_fast.continual.tasks import load_tasks
    from slm_fast.loading import load_base
    from slm_fast.model import get_slm_model
    from slm_fast.trainer import default_arguments

    tasks = load_tasks(args.data, args.tasks.split(",") if args.tasks else None)
    tasks = [task.subset(args.max_train, args.max_test, args.seed) for task in tasks]
    base, tokenizer = load_base(args.base)
    config = SLMConfig(
        r=args.rank,
        target_modules=args.target if args.target == "all-linear" else args.target and args.target.split(","),
        metric=args.metric,
        key_method=args.keys,
        top_k=args.top_k,
        entries_per_task=args.entries,
        encoder_name_or_path=args.encoder,
    )
    model = get_slm_model(base, config, tokenizer=tokenizer)
    training = default_arguments(
        args.output,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        seed=args.seed,
    )
    began = time.perf_counter()
    methods = tuple(args.methods.split(","))
    runner = ContinualRunner(
        model,
        tasks,
        training,
        output_dir=args.output,
        methods=methods,
        max_length=args.max_length,
        seed=args.seed,
    )
    report = runner.fit().report(Path(str(args.base)).name)
    print_run(report)
    _, page = write_reports([report], args.output, "Continual learning", time.perf_counter() - began)
    print(f"\nreport: {page}\nmodel:  {Path(args.output) / 'slm'}")
    return 0


def print_run(report: dict) -> None:
    """Print a run's matrices, their summary and the routing accuracy."""
    from slm_fast.continual.report import format_comparison, format_matrix

    for method in report["methods"].values():
        print(f"\n{method['label']}: score on each task (column) after learning each task (row), %")
        print(format_matrix(report["tasks"], method["matrix"]))
    print()
    print(format_comparison(report["methods"]))
    accuracy = ", ".join(f"{task} {value:.1%}" for task, value in report["routing"]["accuracy"].items())
    print(f"\nrouting accuracy, one query at a time: {accuracy}")


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
    return texts


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


def _generate(args) -> int:
    model = _open_model(args)
    predictions = model.predict(_texts(args), task=args.task, max_new_tokens=args.max_new_tokens)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slm-fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    learn = commands.add_parser("learn", help="learn tasks in sequence and write a report")
    learn.add_argument(
        "--data", default="docs", help='folder of JSON lines, "docs", "chat", or hub:NAME (default: docs)'
    )
    learn.add_argument("--tasks", help="names of the tasks, in order, separated by commas")
    learn.add_argument("--base", default="minilm", help="folder, hub id, GGUF file, minilm or smollm2")
    learn.add_argument("--encoder", default="minilm", help="sentence encoder: folder, hub id or minilm")
    learn.add_argument(
        "--output", default="slm_run", help="folder of the run; an interrupted run is continued"
    )
    learn.add_argument(
        "--target", help='linears that get a mixture: names or "all-linear" (default: by architecture)'
    )
    learn.add_argument("--metric", choices=METRICS, default="whitened")
    learn.add_argument("--keys", choices=KEY_METHODS, default="group_avg")
    learn.add_argument("--methods", default="slm,oracle,sequential")
    learn.add_argument("--rank", type=int, default=8)
    learn.add_argument("--entries", type=int, default=4, help="pool entries of a task")
    learn.add_argument("--top-k", type=int, default=4)
    learn.add_argument("--epochs", type=float, default=2)
    learn.add_argument("--learning-rate", type=float, default=2e-3)
    learn.add_argument("--batch-size", type=int, default=16)
    learn.add_argument("--max-length", type=int, default=128)
    learn.add_argument("--max-train", type=int)
    learn.add_argument("--max-test", type=int)
    learn.add_argument("--seed", type=int, default=0)
    learn.set_defaults(run=_learn)

    for name, run, text in (
        ("route", _route, "show which entries answer a text"),
        ("generate", _generate, "answer texts"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--model", required=True, help="folder of a saved pool")
        command.add_argument("--base", help="base model, if it is not where the pool was trained")
        command.add_argument("--encoder", help="sentence encoder, if it is not where the pool was trained")
        command.add_argument("--json", action="store_true", help="one JSON object a line")
        command.add_argument("text", nargs="*", help="texts; without any, lines of standard input")
        command.set_defaults(run=run)
        if name == "generate":
            command.add_argument("--task", help="tell the task instead of routing freely")
            command.add_argument("--max-new-tokens", type=int, default=32)

    commands.add_parser("doctor", help="what was found, what is missing, how to get it").set_defaults(
        run=_doctor
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; user errors end with one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"slm-fast: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
