"""Learns tasks one after the other, measures what is kept, and survives being killed at any point."""

import hashlib
import json
import logging
import os
import resource
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import TrainingArguments

from slm_fast.answers import Prediction
from slm_fast.continual.method import Method
from slm_fast.continual.methods import METHODS, method_names
from slm_fast.continual.metrics import DEFINITIONS, EVALUATED, merge_tasks, summarize
from slm_fast.continual.report import write_report
from slm_fast.continual.tasks import Task, same_labels, score, text_scores, training_of
from slm_fast.continual.trained import TrainedTasks
from slm_fast.model import SLMModel
from slm_fast.trainer import default_arguments

logger = logging.getLogger(__name__)


class ContinualRunner:
    """Runs a sequence of tasks through the methods of `METHODS` and reports on them.

    Args:
        model: an `SLMModel` with an empty pool (or the one that an interrupted run in `output_dir` left).
            "slm" trains it; every other method leaves it as it is.
        tasks: in the order of learning.
        args: template of the training arguments; `output_dir` is replaced for each task.
        output_dir: the run's folder; a run with the same tasks found there is continued.
        methods: names from `METHODS`; "sequential" is an older name of "seq".
        options: {method: its own settings}, see each method's `defaults`.
        evaluate: "seen" or "all" tasks after each stage, or "last": the one just learnt, and all after the
            last one. "all" gives forward transfer where no task is told.
        trained: a folder of `TrainedTasks` that several runs may share. What a task's training gives does not
            depend on its place in the order (of "slm", "paper", "per_task" and "joint"), so that a run takes
            it from there where another one was done with it, with its cost.
        max_length: tokens kept of an example.  max_new_tokens: of a generated answer.
        early_stopping: epochs without a lower loss on held-out training rows after which a task's training
            ends; its best epoch is kept. None: it trains to the end.
        holdout: the share of a task's training rows that is held out for that.
    Raises ValueError in a process of several (torchrun): a run is one process; `SLMTrainer` trains in many.
    """

    def __init__(
        self,
        model: SLMModel,
        tasks: list[Task],
        args: TrainingArguments | None = None,
        *,
        output_dir: str | os.PathLike = "slm_run",
        methods: Iterable[str] = ("slm", "oracle", "seq"),
        options: dict[str, dict] | None = None,
        evaluate: str = "seen",
        batch_size: int = 32,
        max_length: int = 256,
        max_new_tokens: int = 16,
        seed: int = 0,
        progress: bool = True,
        trained: str | os.PathLike | None = None,
        early_stopping: int | None = None,
        holdout: float = 0.1,
    ) -> None:
        if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise ValueError(f"a run is one process, not one of {processes}: SLMTrainer trains in several")
        if early_stopping is not None and not (early_stopping >= 1 and 0 < holdout < 1):
            raise ValueError(
                f"early_stopping is a number of epochs from 1, got {early_stopping}, and holdout a share "
                f"between 0 and 1, got {holdout}"
            )
        if not tasks:
            raise ValueError("tasks is empty")
        if len({task.name for task in tasks}) != len(tasks):
            raise ValueError("task names must be distinct")
        names, options = method_names(methods), options or {}
        if unused := [name for name in options if name not in names]:
            raise ValueError(f"options for {', '.join(unused)}, but the methods are {', '.join(names)}")
        if evaluate not in EVALUATED:
            raise ValueError(f"evaluate must be one of {', '.join(EVALUATED)}, got {evaluate!r}")
        self.model, self.tasks = model, tasks
        self.output_dir = Path(output_dir)
        self.args = default_arguments(str(self.output_dir)) if args is None else args
        self.args.disable_tqdm = not progress
        self.evaluate, self.seed, self.progress = evaluate, seed, progress
        self.predicting = dict(batch_size=batch_size, max_length=max_length, max_new_tokens=max_new_tokens)
        self.max_length = max_length
        self.early_stopping, self.holdout = early_stopping, holdout
        self.trained = None if trained is None else TrainedTasks(trained)
        self.methods: dict[str, Method] = {name: METHODS[name](self, options.get(name)) for name in names}
        self.final: dict[str, list[Prediction]] = {}  # answers of "slm" after the last task
        self.state = self._load_state()

    # ---- the run's state on disk

    def _load_state(self) -> dict:
        identity = {
            "tasks": [[task.name, len(task.train), len(task.test), _digest(task)] for task in self.tasks],
            "config": self.model.slm_config.to_dict(),
            "evaluate": self.evaluate,
            "seed": self.seed,
            "epochs": self.args.num_train_epochs,
            "max_steps": self.args.max_steps,
            "learning_rate": self.args.learning_rate,
            "batch_size": self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps,
            "weight_decay": self.args.weight_decay,
            "max_length": self.max_length,
        } | self.uncommon_settings()
        later = {  # runs of before do not have these
            "metrics": [task.metric for task in self.tasks],
            "dtype": str(next(self.model.base_model.parameters()).dtype),
            "max_new_tokens": self.predicting["max_new_tokens"],
        }
        identity |= later
        empty = {"identity": identity, "options": {}, "rows": {}, "seconds": {}, "steps": {}}
        empty |= {"before": None, "cost": None}
        path = self.output_dir / "state.json"
        if path.is_file():
            try:
                state = empty | json.loads(path.read_text(encoding="utf8"))
            except json.JSONDecodeError as error:
                raise OSError(f"{path} is damaged: {error}") from error
            state["identity"] = later | state["identity"]
            if state["identity"] != json.loads(json.dumps(identity)):
                raise ValueError(
                    f"{self.output_dir} holds another run (tasks or settings differ); choose a new folder"
                )
            for name, method in self.methods.items():
                done = [len(state["rows"].get(m, ())) for m in (name, method.needs)]
                if not method.own_stages and done[0] != done[1]:
                    raise ValueError(
                        f"{self.output_dir} holds another run: {method.needs} without {name} at its stages; "
                        "choose a new folder"
                    )
                if (there := state["options"].get(name, method.options)) != method.options:
                    raise ValueError(
                        f"{self.output_dir} holds a run of {name} with the options {there}, "
                        f"got {method.options}; choose a new folder"
                    )
            return state
        return empty

    def uncommon_settings(self) -> dict:
        """What tells a run's training from others', where it is not the default."""
        settings = {}
        if self.early_stopping is not None:
            settings |= {"early_stopping": self.early_stopping, "holdout": self.holdout}
        if self.args.bf16:
            settings["bf16"] = True
        return settings

    def _save_state(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        temporary = self.output_dir / "state.json.tmp"
        temporary.write_text(json.dumps(self.state, indent=1), encoding="utf8")
        os.replace(temporary, self.output_dir / "state.json")

    # ---- running

    def fit(self) -> "ContinualRunner":
        """Learn and measure everything that is not done yet."""
        slm = self.methods.get("slm") or METHODS["slm"](self)
        if not self.state["rows"] and self.model.pool.num_entries and not slm.folder.exists():
            raise ValueError("the model's pool must be empty when a run starts")
        if self.evaluate == "all" and self.state["before"] is None:  # else no forward transfer is measured
            self.state["before"] = [self._score_before(task, slm.answers(task)) for task in self.tasks]
            self._save_state()
        for method in sorted(self.methods.values(), key=lambda method: method.needs is not None):
            done = len(self.state["rows"].get(method.name, ())) == len(self.tasks)
            if method.own_stages and (method is slm or not done):  # the model of "slm" is read in any case
                with method.open():
                    self._stages(method)
        for task in self.tasks if "slm" in self.methods else ():
            if task.name not in self.final:  # the last stage was measured in an earlier process
                self.final[task.name] = slm.answers(task)
        if "slm" in self.methods and self.state["cost"] is None:
            self.state["cost"] = self.cost()
            self._save_state()
        return self

    @contextmanager
    def base_model(self) -> Iterator[nn.Module]:
        """The base without mixtures; the model gets its pool back at the end."""
        pool = self.model.pool
        try:
            yield self.model.unload()
        finally:
            self.model.repatch(pool)

    def _stages(self, method: Method) -> None:
        """Learn and measure the stages that are left, also for methods that are measured at these."""
        beside = [m for m in self.methods.values() if m.needs == method.name and not m.own_stages]
        measured, last = [method, *beside], len(self.tasks) - 1
        self.state["options"] |= {m.name: m.options for m in measured}
        self._save_state()
        for stage in range(len(self.state["rows"].get(method.name, ())), len(self.tasks)):
            skipped = method.last_only and stage < last
            if not skipped and not method.has_learnt(stage):
                with training_of(method.learnt_at(stage), self.args):
                    self._learn(method, stage)
            scores = [[None] * len(self.tasks) if skipped else self._row(m, stage) for m in measured]
            for m, row in zip(measured, scores, strict=True):
                self.state["rows"].setdefault(m.name, []).append(row)
                logger.info("%s after %s: %s", m.name, self.tasks[stage].name, row)
            self._save_state()

    def _learn(self, method: Method, stage: int) -> None:
        """Learn a stage's task, or take it from where another run has left it, at the cost it had there."""
        cost = self.trained.take(method, stage) if self.trained else None
        if cost is None:
            began = time.perf_counter()
            steps = method.learn(stage)
            cost = {"steps": steps, "seconds": time.perf_counter() - began}
            if self.trained:
                self.trained.keep(method, stage, cost)
        method.save()
        shutil.rmtree(method.checkpoints(stage), ignore_errors=True)
        self.state["steps"][method.name] = self.state["steps"].get(method.name, 0) + cost["steps"]
        self._add_seconds(method, "train", cost["seconds"])
        self._save_state()

    def _add_seconds(self, method: Method, what: str, seconds: float) -> None:
        total = self.state["seconds"].setdefault(method.name, {})
        total[what] = total.get(what, 0.0) + seconds

    # ---- measuring

    def _row(self, method: Method, stage: int) -> list[float | None]:
        """The method's row of the accuracy matrix."""
        began = time.perf_counter()
        row: list[float | None] = [None] * len(self.tasks)
        for number in method.measured(stage):
            task = self.tasks[number]
            answers = method.answers(task)
            row[number] = self._score(task, answers)
            if method.name == "slm" and stage == len(self.tasks) - 1:
                self.final[task.name] = answers
        self._add_seconds(method, "eval", time.perf_counter() - began)
        return row

    def _score_before(self, task: Task, answers: list[Prediction]) -> float:
        """The frozen model's score; that of chance for labels of which it has no head."""
        if task.labels is not None and all(prediction.answer is None for prediction in answers):
            return 1 / len(task.labels)
        return self._score(task, answers)

    def _score(self, task: Task, answers: list[Prediction]) -> float:
        return score(task, [p.answer or "" for p in answers], [example.target for example in task.test])

    def text_scores(self) -> dict[str, dict[str, float]]:
        """The final answers of "slm" to tasks of long answers, by every metric of such."""
        found = {}
        for task in self.tasks:
            answers = [prediction.answer or "" for prediction in self.final.get(task.name, ())]
            if answers and (scores := text_scores(task, answers, [row.target for row in task.test])):
                found[task.name] = scores
        return found

    def routing_report(self) -> dict:
        """Confusion of true and chosen task, routing accuracy, which tasks' texts look alike, and every
        entry's mean mass per task."""
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
        return {
            "confusion": confusion,
            "accuracy": accuracy,
            "accuracy_shared_labels": merge_tasks(confusion, names, same_labels(self.tasks)),
            "near_duplicates": {name: self.model.pool.near_duplicates(name) for name in names},
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

    @property
    def trainable(self) -> int:
        """Numbers of a task's entries, its head apart."""
        pool = self.model.pool
        rank = pool.config.r * pool.config.entries_per_task
        return rank * sum(i + o for i, o in pool.modules_shape.values())

    def cost(self, count: int = 16) -> dict:
        """What an answer and a task cost: {"milliseconds", "bytes"}.

        milliseconds: of one text by itself, medians over `count` test texts of all tasks: "encoding",
            "search", and a label, or the first token of a text, with the mixture and by the frozen model.
        bytes: of a task, in the mean: its factors, its keys, and its statistics with a share of the metric;
            and the most that this process had resident (on a GPU, allocated).
        """
        model, pool = self.model, self.model.pool
        answering = self.predicting | dict(max_new_tokens=1)
        texts = [t.test[n].text for n in range(count) for t in self.tasks if n < len(t.test)][:count]
        times: dict[str, list[float]] = {}

        def timed(what: str, call, *args, **options):
            began = time.perf_counter()
            found = call(*args, **options)
            times.setdefault(what, []).append(1e3 * (time.perf_counter() - began))
            return found

        for text in [texts[0], *texts]:  # the first call warms up
            query = timed("encoding", model.encoder.encode, [text])
            routing = timed("search", pool.search, query)
            task = model.explain(routing=routing)[0]["task"]
            frozen = pool.fixed_routing(["__base__"])
            for what, row in (("answer", routing), ("answer of the frozen model", frozen)):
                timed(what, model.predict, [text], routing=row, task=task, **answering)
        tasks = len(self.tasks)
        keys = (pool.keys[: pool.num_slots], pool.index_keys, pool.index_bias, pool.index_task)
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "milliseconds": {what: statistics.median(values[1:]) for what, values in times.items()},
            "bytes": {
                "factors of a task": self.trainable * pool.factors[0].A.element_size(),
                "keys of a task": round(sum(t.nbytes for t in keys) / tasks),
                "statistics of a task": round(sum(t.nbytes for t in pool.metric.buffers()) / tasks),
                "peak of the process": peak,
            },
        }

    def report(self, name: str = "continual learning", requests: int = 8) -> dict:
        """Everything measured, as one dict for `write_reports`."""
        config = self.model.config
        pool = self.model.pool
        methods = {}
        for method in self.methods.values():
            matrix, seconds = self.state["rows"][method.name], self.state["seconds"].get(method.name, {})
            methods[method.name] = {
                "label": method.label,
                "matrix": matrix,
                **summarize(matrix, None if method.told else self.state["before"]),
                "seconds_train": seconds.get("train"),
                "seconds_eval": seconds.get("eval"),
                "steps": self.state["steps"].get(method.name),
                "trained_parameters": method.trained_parameters if method.own_stages else None,
                "options": method.options,
            }
        if "oracle" in methods and methods["oracle"]["average_accuracy"]:
            ratio = methods["slm"]["average_accuracy"] / methods["oracle"]["average_accuracy"]
            methods["slm"]["ratio_to_oracle"] = ratio
        rank, trainable = pool.config.r * pool.config.entries_per_task, self.trainable
        steps, epochs = self.args.max_steps, self.args.num_train_epochs
        length = {"steps of a task": steps} if steps > 0 else {"epochs of a task": epochs}
        routed = {}
        if "slm" in methods:
            routed = {"routing": self.routing_report(), "requests": self.requests(requests)}
            routed["cost"] = self.state["cost"]
        return {
            "name": name,
            "tasks": [task.name for task in self.tasks],
            "metric": "/".join(sorted({task.metric for task in self.tasks})),
            "base": {
                "model": getattr(config, "_name_or_path", ""),
                "parameters": sum(p.numel() for p in self.model.base_model.parameters()),
                "trainable_per_task": trainable,
            },
            "settings": pool.config.to_dict()
            | {
                "train examples": {task.name: len(task.train) for task in self.tasks},
                "test examples": {task.name: len(task.test) for task in self.tasks},
                "epochs": None if steps > 0 else epochs,
                "learning_rate": self.args.learning_rate,
                "batch_size": self.args.per_device_train_batch_size,
                "max_length": self.max_length,
                **self.uncommon_settings(),
                "seeds": {"run": self.seed, "training": self.args.seed},
                "budget": length
                | {
                    "trained parameters of a task, heads apart": trainable,
                    "rank of one LoRA": rank,
                },
                "sources": {task.name: task.source for task in self.tasks},
            },
            "methods": methods,
            "text_scores": self.text_scores(),
            "metrics_note": DEFINITIONS,
            **routed,
            "notes": [f"{method.label}: {method.note}" for method in self.methods.values() if method.note],
        }


def _digest(task: Task) -> str:
    own = [task.training] if task.training else []
    rows = json.dumps([row.content() for row in task.train + task.test] + own)
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
