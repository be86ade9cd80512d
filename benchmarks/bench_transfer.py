"""Forward transfer to few examples: new entries from zero, against init="retrieved".

For every task of `--tasks` a pool that has learnt others is taken (a saved pool of five tasks, without this
one), and the task is learnt from draws of a few training texts a class, from both starts. Scores are
accuracies, told the task, before the first step and after the last, means over the draws with the sample's
standard deviation.

    python benchmarks/bench_transfer.py --pool runs/bert5/order4-seed0/slm [--tasks amazon ag] [--json FILE]
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path

import transformers
from cpu_timing import machine, report

from slm_fast.continual.sources import load_source
from slm_fast.continual.tables import format_table, percent, spread
from slm_fast.continual.tasks import Task, score
from slm_fast.encoder import Encoder
from slm_fast.loading import load_base
from slm_fast.model import SLMModel
from slm_fast.trainer import SLMTrainer, default_arguments

STARTS = ("zero", "retrieved")
MAX_LENGTH = 128


def accuracy(model: SLMModel, task: Task) -> float:
    found = model.predict([row.text for row in task.test], task=task.name, max_length=MAX_LENGTH)
    return score(task, [p.answer for p in found], [row.target for row in task.test])


def few(task: Task, draw: int, shots: int) -> Task:
    """The task with that many of its training texts a class."""
    rows = random.Random(draw).sample(task.train, len(task.train))
    of_class = {label: [row for row in rows if row.target == label][:shots] for label in task.labels}
    return replace(task, train=[row for part in of_class.values() for row in part])


def learn(
    folder: Path, encoder: Encoder, task: Task, start: str, draw: int, epochs: float
) -> tuple[float, float]:
    """Accuracy before the first step and after the last."""
    base, tokenizer = load_base("minilm")
    model = SLMModel.from_pretrained(base, folder, encoder=encoder, tokenizer=tokenizer)
    model.remove_task(task.name)
    texts = [row.text for row in task.train]
    answers = [row.target for row in task.train]
    options = dict(init=start, seed=draw, progress=False)
    model.add_task(task.name, texts, answers=answers, labels=task.labels, **options)
    before = accuracy(model, task)
    transformers.set_seed(draw)
    args = default_arguments("unused", num_train_epochs=epochs, seed=draw, save_strategy="no")
    args.disable_tqdm = True
    SLMTrainer(model, args, task.train, task=task.name, max_length=MAX_LENGTH).train()
    return before, accuracy(model, task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=Path, required=True, help="folder of a saved pool")
    parser.add_argument("--data", help="data folder, by default SLM_FAST_DATA's")
    parser.add_argument("--tasks", nargs="+", default=["amazon", "ag", "dbpedia"])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--shots", type=int, default=16, help="training texts a class")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--max-test", type=int, default=250)
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()
    rows, results, encoder = [], [], Encoder("minilm")  # a text is encoded once for all starts and draws
    for name in args.tasks:
        task = load_source(name, args.data, max_test=args.max_test, generates=False)
        for start in args.starts:
            scores = []
            for draw in range(args.draws):
                scores.append(
                    learn(args.pool, encoder, few(task, draw, args.shots), start, draw, args.epochs)
                )
            before, after = (list(values) for values in zip(*scores, strict=True))
            results.append({"task": name, "start": start, "before": before, "after": after})
            rows.append([name, start, percent(spread(before)), percent(spread(after))])
            print(*rows[-1], flush=True)
    print(format_table((["task", "start", "before, %", f"after {args.epochs:g} epochs, %"], rows)))
    settings = {name: getattr(args, name) for name in ("shots", "draws", "epochs", "max_test")}
    report({"machine": machine(), "settings": settings, "results": results}, args.json)


if __name__ == "__main__":
    main()
