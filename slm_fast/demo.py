"""The demo: a BERT-type model learns four tasks and a LLaMA-type model two, with real models and real text.

Everything comes with installed packages, nothing is downloaded. Run it with `make demo`.
"""

import argparse
import sys
import time
from pathlib import Path

from slm_fast.cli import print_answers, print_run
from slm_fast.config import SLMConfig
from slm_fast.continual.corpora import chat_tasks, chat_topics, documentation_tasks
from slm_fast.continual.runner import ContinualRunner, write_reports
from slm_fast.continual.tasks import Task, load_tasks
from slm_fast.encoder import Encoder
from slm_fast.loading import load_base
from slm_fast.model import get_slm_model
from slm_fast.trainer import default_arguments

CLASSIFICATION = ("python-stdlib", "networkx", "scikit-learn", "chat")


def _run(
    name: str, base: str, tasks: list[Task], encoder: Encoder, folder: Path, config: dict, training: dict
) -> dict:
    print(f"\n=== {name}: {', '.join(task.name for task in tasks)}", flush=True)
    for task in tasks:
        kind = f"{len(task.labels)} labels" if task.labels else "generation"
        print(f"    {task.name}: {len(task.train)} train, {len(task.test)} test, {kind}; {task.source}")
    model, tokenizer = load_base(base)
    slm = get_slm_model(
        model,
        SLMConfig(encoder_name_or_path=encoder.name_or_path, **config),
        encoder=encoder,
        tokenizer=tokenizer,
    )
    arguments = default_arguments(str(folder), **training)
    report = (
        ContinualRunner(slm, tasks, arguments, output_dir=folder, max_length=96, max_new_tokens=8)
        .fit()
        .report(name)
    )
    print_run(report)
    print("\none mixed batch, every row answered by its own mixture:")
    print_answers(report["requests"])
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slm_fast.demo", description=__doc__)
    parser.add_argument("--output", default="demo_output", help="folder of the runs and the report")
    parser.add_argument(
        "--data", help="folder of JSON-lines tasks, or hub:NAME, instead of the installed text"
    )
    parser.add_argument("--tasks", help="names of the tasks, in order, separated by commas")
    parser.add_argument("--max-train", type=int, default=300, help="training texts of a classification task")
    parser.add_argument("--max-test", type=int, default=120, help="test texts of a task")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    output = Path(args.output)
    names = args.tasks.split(",") if args.tasks else None
    if args.data:
        tasks = load_tasks(args.data, names)
        labelled = [task for task in tasks if task.labels is not None]
        generated = [task for task in tasks if task.labels is None]
    else:
        labelled, generated = documentation_tasks(), chat_tasks()
        if (chat := chat_topics()) is not None:
            labelled.append(chat)
        if names:
            known = {task.name: task for task in labelled + generated}
            if unknown := [name for name in names if name not in known]:
                parser.error(f"unknown tasks {', '.join(unknown)}; there are {', '.join(known)}")
            labelled = [known[name] for name in names if known[name].labels is not None]
            generated = [known[name] for name in names if known[name].labels is None]
        else:
            labelled = [task for task in labelled if task.name in CLASSIFICATION]
            generated = generated[:2]
    labelled = [task.subset(args.max_train, args.max_test) for task in labelled]
    generated = [task.subset(2 * args.max_train // 3, args.max_test // 2) for task in generated]
    encoder = Encoder("minilm")
    runs = []
    if labelled:
        config = {"target_modules": "all-linear", "top_k": 4}
        training = {"num_train_epochs": 3, "learning_rate": 2e-3}
        runs.append(
            _run(
                "all-MiniLM-L6-v2, text classification",
                "minilm",
                labelled,
                encoder,
                output / "bert",
                config,
                training,
            )
        )
    if generated:
        config = {"target_modules": "all-linear", "top_k": 4}
        training = {"num_train_epochs": 1, "learning_rate": 2e-3, "per_device_train_batch_size": 8}
        runs.append(
            _run(
                "SmolLM2-135M-Instruct, text generation",
                "smollm2",
                generated,
                encoder,
                output / "llama",
                config,
                training,
            )
        )
    seconds = time.perf_counter() - began
    data, page = write_reports(
        runs, output, "slm_fast demo: learning tasks in sequence without forgetting", seconds
    )
    print(f"\n{seconds:.0f} s in all. Pictures and numbers: {page}  ({data})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
