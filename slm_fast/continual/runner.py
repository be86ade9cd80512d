"""Learns tasks one after the other, measures what is kept, and survives being killed at any point."""

import copy
import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from slm_fast.answers import Prediction
from slm_fast.config import CONFIG_NAME
from slm_fast.continual.metrics import DEFINITIONS, merge_tasks, summarize
from slm_fast.continual.report import write_report
from slm_fast.continual.tasks import Task, score
from slm_fast.model import SLMModel, get_slm_model
from slm_fast.trainer import SLMTrainer, default_arguments

logger = logging.getLogger(__name__)

METHODS = {
    "slm": "SLM, no task id",
    "oracle": "SLM, told the task",
    "sequential": "one LoRA, sequential, told the task's head",
}


class ContinualRunner:
    """Runs a sequence of tasks through the methods and reports on them.

    "slm" learns every task with its own entries and answers one query at a time, without a task id.
    "oracle" is the same trained model, told the task: its difference to "slm" is what retrieval costs.
    "sequential" trains one LoRA of as many parameters on each task in turn and is told whose head to use.

    Args:
        model: an `SLMModel` with an empty pool (or the one that an interrupted run in `output_dir` left).
        tasks: in the order of learning.
        args: template of the training arguments; `output_dir` is replaced for each task.
        output_dir: the run's folder; a run with the same tasks found there is continued.
        evaluate: "seen" or "all" tasks after each stage; "all" gives forward transfer.
        max_length: tokens kept of an example.  max_new_tokens: of a generated answer.
    """

    def __init__(
        self,
        model: SLMModel,
        tasks: list[Task],
        args: TrainingArguments | None = None,
        *,
        output_dir: str | os.PathLike = "slm_run",
        methods: tuple[str, ...] = ("slm", "oracle", "sequential"),
        evaluate: str = "seen",
        batch_size: int = 32,
        max_length: int = 256,
        max_new_tokens: int = 16,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if not tasks:
            raise ValueError("tasks is empty")
        if len({task.name for task in tasks}) != len(tasks):
            raise ValueError("task names must be distinct")
        unknown = [name for name in methods if name not in METHODS]
        if unknown or "slm" not in methods:
            raise ValueError(
                f"methods must include slm and be among {', '.join(METHODS)}, got {', '.join(methods)}"
            )
        if evaluate not in ("seen", "all"):
            raise ValueError(f'evaluate must be "seen" or "all", got {evaluate!r}')
        self.model, self.tasks, self.methods = model, tasks, methods
        self.output_dir = Path(output_dir)
        self.args = default_arguments(str(self.output_dir)) if args is None else args
        self.args.disable_tqdm = not progress
        self.evaluate, self.seed, self.progress = evaluate, seed, progress
        self.predicting = dict(batch_size=batch_size, max_length=max_length, max_new_tokens=max_new_tokens)
        self.max_length = max_length
        self.final: dict[str, list[Prediction]] = {}
        self.state = self._load_state()

    # ---- the run's state on disk

    def _load_state(self) -> dict:
        identity = {
            "tasks": [[task.name, len(task.train), len(task.test), _digest(task)] for task in self.tasks],
            "config": self.model.slm_config.to_dict(),
            "evaluate": self.evaluate,
            "seed": self.seed,
            "epochs": self.args.num_train_epochs,
            "learning_rate": self.args.learning_rate,
            "batch_size": self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps,
            "weight_decay": self.args.weight_decay,
            "max_length": self.max_length,
            "oracle": "oracle" in self.methods,
        }
        path = self.output_dir / "state.json"
        if path.is_file():
            try:
                state = json.loads(path.read_text(encoding="utf8"))
            except json.JSONDecodeError as error:
                raise OSError(f"{path} is damaged: {error}") from error
            if state["identity"] != json.loads(json.dumps(identity)):
                raise ValueError(
                    f"{self.output_dir} holds another run (tasks or settings differ); choose a new folder"
                )
            return state
        return {"identity": identity, "rows": {}, "seconds": {}, "before": None}

    def _save_state(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        temporary = self.output_dir / "state.json.tmp"
        temporary.write_text(json.dumps(self.state, indent=1), encoding="utf8")
        os.replace(temporary, self.output_dir / "state.json")

    # ---- running

    def fit(self) -> "ContinualRunner":
        """Learn and measure everything that is not done yet."""
        if self.state["before"] is None:
            if self.model.pool.num_entries and not (self.output_dir / "slm").exists():
                raise ValueError("the model's pool must be empty when a run starts")
            self.state["before"] = [self._score(self.model, task) for task in self.tasks]
            self._save_state()
        self._stages("slm", self.model)
        for task in self.tasks:
            if task.name not in self.final:  # the last stage was measured in an earlier process
                self.final[task.name] = self._answers(self.model, task)
        if "sequential" in self.methods and len(self.state["rows"].get("sequential", [])) < len(self.tasks):
            self._fit_sequential()
        return self

    def _fit_sequential(self) -> None:
        pool, base, config = self.model.pool, self.model.unload(), self.model.slm_config
        budget = replace(
            config,
            r=config.r * config.entries_per_task,
            scaling=config.scaling / config.entries_per_task,
            entries_per_task=1,
            top_k=1,
            weighting="uniform",
            metric="grouped_cosine",
            num_groups=1,
            min_similarity=None,
            key_method="group_avg",
        )
        try:
            model = get_slm_model(base, budget, encoder=self.model.encoder, tokenizer=self.model.tokenizer)
            self._stages("sequential", model)
        finally:
            self.model.repatch(pool)

    def _stages(self, method: str, model: SLMModel) -> None:
        folder = self.output_dir / method
        if (folder / CONFIG_NAME).is_file():
            model.load_pool(folder)
        rows = self.state["rows"].setdefault(method, [])
        seconds = self.state["seconds"].setdefault(method, {"train": 0.0, "eval": 0.0})
        for stage, task in enumerate(self.tasks):
            if stage < len(rows):
                continue
            if task.name not in model.pool.tasks:
                began = time.perf_counter()
                try:
                    self._learn(method, model, stage)
                except BaseException:
                    if task.name in model.pool.tasks:  # half learnt; its checkpoint on disk is continued
                        model.remove_task(task.name)
                    raise
                model.save_pretrained(folder)
                shutil.rmtree(self.output_dir / f"{method}-{task.name}", ignore_errors=True)
                seconds["train"] += time.perf_counter() - began
            began = time.perf_counter()
            last = stage == len(self.tasks) - 1
            others = self.tasks if self.evaluate == "all" and method == "slm" else self.tasks[: stage + 1]
            row = [self._score(model, other, latest=method == "sequential") for other in others]
            rows.append(row + [None] * (len(self.tasks) - len(row)))
            if method == "slm" and "oracle" in self.methods:
                told = [
                    self._score(model, t, told=True) if last or t is task else None
                    for t in self.tasks[: stage + 1]
                ]
                oracle = self.state["rows"].setdefault("oracle", [])
                del oracle[stage:]
                oracle.append(told + [None] * (len(self.tasks) - len(told)))
            seconds["eval"] += time.perf_counter() - began
            self._save_state()
            logger.info("%s after %s: %s", method, task.name, row)

    def _learn(self, method: str, model: SLMModel, stage: int) -> None:
        task = self.tasks[stage]
        texts = [example.text for example in task.train]
        model.add_task(task.name, texts, labels=task.labels, seed=self.seed + stage, progress=self.progress)
        if method == "sequential" and stage:
            model.pool.copy_entries(self.tasks[stage - 1].name, task.name)
        self._train(model, task, method)

    def _train(self, model: SLMModel, task: Task, method: str) -> None:
        args = copy.deepcopy(self.args)
        args.output_dir = str(self.output_dir / f"{method}-{task.name}")
        checkpoint = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
        transformers.set_seed(self.seed)
        trainer = SLMTrainer(model, args, task.train, task=task.name, max_length=self.max_length)
        trainer.train(resume_from_checkpoint=checkpoint)

    # ---- measuring

    def _answers(
        self, model: SLMModel, task: Task, told: bool = False, latest: bool = False
    ) -> list[Prediction]:
        texts = [example.text for example in task.test]
        options = dict(self.predicting, progress=self.progress)
        if latest:
            newest = model.pool.task_names()[-1]
            options["routing"] = model.pool.fixed_routing([newest] * len(texts))
        return model.predict(texts, task=task.name if told or latest else None, **options)

    def _score(self, model: SLMModel, task: Task, told: bool = False, latest: bool = False) -> float:
        predictions = self._answers(model, task, told, latest)
        if model is self.model and not told:
            self.final[task.name] = predictions  # the last stage's remain
        return score(task, [p.answer or "" for p in predictions], [example.target for example in task.test])

    def routing_report(self) -> dict:
        """Confusion of true and chosen task, routing accuracy, and every entry's mean mass per task."""
        names = [task.name for task in self.tasks]
        entries = [self.model.pool.names[s] for t in names for s in self.model.pool.task(t).slots]
        confusion, mass = [], []
        for name in names:
            answers = self.final[name]
            confusion.append([sum(p.task == other for p in answers) / len(answers) for other in names])
            totals = dict.fromkeys(entries, 0.0)
            for p in answers:
                for entry in p.entries:
                    totals[entry["entry"]] += entry["weight"] / len(answers)
            mass.append(list(totals.values()))
        accuracy = {name: confusion[i][i] for i, name in enumerate(names)}
        shared = [
            {other.name for other in self.tasks if other.labels == task.labels}
            for task in self.tasks
            if task.labels is not None
        ]
        return {
            "confusion": confusion,
            "accuracy": accuracy,
            "accuracy_shared_labels": merge_tasks(confusion, names, shared),
            "mass": mass,
            "entry_names": entries,
        }

    def requests(self, count: int = 8) -> list[dict]:
        """One mixed batch of test texts of all tasks, answered in one call, with the routing of each."""
        picked = [(t, t.test[n]) for n in range(count) for t in self.tasks if n < len(t.test)][:count]
        answers = self.model.predict([example.text for _, example in picked], **self.predicting)
        return [
            {
                "text": p.text,
                "answer": p.answer,
                "task": p.task,
                "expected": example.target,
                "expected_task": task.name,
                "routing": p.entries,
            }
            for p, (task, example) in zip(answers, picked, strict=True)
        ]

    def report(self, name: str = "continual learning", requests: int = 8) -> dict:
        """Everything measured, as one dict for `write_reports`."""
        config = self.model.config
        pool = self.model.pool
        methods = {}
        for method in self.methods:
            matrix = self.state["rows"][method]
            timing = self.state["seconds"].get(method, {})
            methods[method] = {
                "label": METHODS[method],
                "matrix": matrix,
                **summarize(matrix, self.state["before"] if method == "slm" else None),
                "seconds_train": timing.get("train"),
                "seconds_eval": timing.get("eval"),
            }
        if "oracle" in methods and methods["oracle"]["average_accuracy"]:
            ratio = methods["slm"]["average_accuracy"] / methods["oracle"]["average_accuracy"]
            methods["slm"]["ratio_to_oracle"] = ratio
        per_entry = sum(pool.config.r * (i + o) for i, o in pool.modules_shape.values())
        return {
            "name": name,
            "tasks": [task.name for task in self.tasks],
            "metric": "/".join(sorted({task.metric for task in self.tasks})),
            "base": {
                "model": getattr(config, "_name_or_path", ""),
                "parameters": sum(p.numel() for p in self.model.base_model.parameters()),
                "trainable_per_task": per_entry * pool.config.entries_per_task,
            },
            "settings": pool.config.to_dict()
            | {
                "train examples": {task.name: len(task.train) for task in self.tasks},
                "test examples": {task.name: len(task.test) for task in self.tasks},
                "epochs": self.args.num_train_epochs,
                "learning_rate": self.args.learning_rate,
                "batch_size": self.args.per_device_train_batch_size,
                "max_length": self.max_length,
                "sources": {task.name: task.source for task in self.tasks},
            },
            "methods": methods,
            "metrics_note": DEFINITIONS,
            "routing": self.routing_report(),
            "requests": self.requests(requests),
            "notes": [],
        }


def _digest(task: Task) -> str:
    rows = json.dumps([[e.text, e.target] for e in task.train + task.test])
    return hashlib.sha256(rows.encode()).hexdigest()[:16]


def write_reports(runs: list[dict], directory, title: str, seconds: float) -> tuple[Path, Path]:
    """Write report.json and report.html for one or several finished runs."""
    environment = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    result = {
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment,
        "seconds": seconds,
        "runs": runs,
    }
    return write_report(result, directory)
