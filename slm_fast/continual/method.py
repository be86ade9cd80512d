"""What all ways of learning tasks in order have in common. `methods.METHODS` lists them."""

import copy
import math
import os
import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from slm_fast.answers import Prediction
from slm_fast.config import CONFIG_NAME, KEY_TRAINING, SLMConfig
from slm_fast.continual.tasks import Example, Task
from slm_fast.model import SLMModel, get_slm_model
from slm_fast.routing import Routing
from slm_fast.storage import read_index
from slm_fast.trainer import SLMTrainer, last_checkpoint

# Fields of the engine's config that every method takes over; the rest is how the engine retrieves, and its
# `feature_penalty`.
SHARED = ("r", "target_modules", "scaling", "entries_per_task", "top_k", "num_groups", "pooling", "backend")
SHARED += ("layers_to_transform", "head_init", "encoder_name_or_path", "encoder_max_length", *KEY_TRAINING)
TENSORBOARD = "TENSORBOARD_LOGGING_DIR"


class Method(ABC):
    """A way to learn a runner's tasks in order and to answer their texts after each of them.

    Inside `open()` a runner asks, stage by stage, to `learn`, to `save` and for `answers`. What was saved in
    `folder` is there again when another process opens it. Only "slm" changes the runner's own model.

    name, label, note: in reports; the note says where budget or training differ from the others'.
    told: whether answers are told the task, or whose head to use.
    needs: the method whose model it reads.  own_stages: False for one that is measured at those of `needs`.
    last_only: whether it learns all tasks at once, at the last stage.
    independent: whether what it learns at a stage is the same whatever was learnt before.
    settled: whether what it has learnt never changes, so that the same mixture gives a text the same answer.
    defaults: its own settings, replaced by `options`: int from 1, float from 0.
    """

    name = ""
    label = ""
    note = ""
    told = False
    needs: str | None = None
    own_stages = True
    last_only = False
    independent = False
    settled = False
    defaults: dict[str, int | float] = {}

    def __init__(self, runner, options: dict | None = None) -> None:
        self.runner = runner
        self.tasks: list[Task] = runner.tasks
        self.folder: Path = runner.output_dir / self.name
        self.model: SLMModel = runner.model
        self.options = self.defaults | (options or {})
        self.answered: dict[tuple, str | None] = {}  # by text, task and mixture
        for name, value in self.options.items():
            if name not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise ValueError(f"{self.name} has no option {name!r}; its options: {known}")
            least, kinds = (1, int) if isinstance(self.defaults[name], int) else (0, (int, float))
            if not isinstance(value, kinds) or not (math.isfinite(value) and value >= least):
                raise ValueError(f"{name} of {self.name} must be a number from {least}, got {value!r}")

    # ---- what a runner calls

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, `self.model` is there, with everything that was saved."""
        yield

    def has_learnt(self, stage: int) -> bool:
        return self.tasks[stage].name in self.model.pool.tasks

    @abstractmethod
    def learn(self, stage: int) -> int:
        """Learn the stage's task; the number of training steps."""

    def learnt_at(self, stage: int) -> list[Task]:
        """The tasks whose entries a stage adds."""
        return [self.tasks[stage]]

    def save(self) -> None:
        self.model.save_pretrained(self.folder)

    def measured(self, stage: int) -> list[int]:
        """Numbers of the tasks that are scored after a stage."""
        if self.runner.evaluate == "last":
            return self.newest(stage)
        every = self.runner.evaluate == "all" and not self.told
        return list(range(len(self.tasks) if every else stage + 1))

    def newest(self, stage: int) -> list[int]:
        """The number of the stage's task; after the last stage those of all."""
        return list(range(stage + 1)) if stage == len(self.tasks) - 1 else [stage]

    def seed(self, task: Task) -> int:
        """For what is drawn at random for a task, whatever its place in the order."""
        return zlib.crc32(f"{self.runner.seed}/{task.name}".encode())

    @abstractmethod
    def answers(self, task: Task) -> list[Prediction]:
        """Answers to the task's test texts."""

    # ---- what methods share

    def wrap(self, base, config: SLMConfig, encoder=None) -> SLMModel:
        """A model of its own, with the pool that was saved if there is one."""
        model = get_slm_model(base, config, encoder=encoder, tokenizer=self.runner.model.require_tokenizer())
        if (self.folder / CONFIG_NAME).is_file():
            model.load_pool(self.folder)
        return model

    def run_trainer(self, stage: int, make: Callable[[TrainingArguments], SLMTrainer]) -> SLMTrainer:
        """Train to the end, from the stage's last whole checkpoint if there is one."""
        args = copy.deepcopy(self.runner.args)
        args.output_dir = str(self.checkpoints(stage))
        try:
            checkpoint = last_checkpoint(args.output_dir)
        except ValueError:
            checkpoint = None
        if self.runner.early_stopping is not None:
            args.do_eval, args.eval_strategy = True, IntervalStrategy.EPOCH
            args.save_strategy, args.load_best_model_at_end = SaveStrategy.EPOCH, True
            args.metric_for_best_model, args.greater_is_better = "eval_loss", False
        transformers.set_seed(self.runner.seed)
        part = Path(self.name, f"{stage + 1}-{self.tasks[stage].name}")
        with tensorboard_folder(self.runner.output_dir / "tensorboard", part):
            trainer = make(args)
            if self.runner.early_stopping is not None:
                trainer.add_callback(EarlyStoppingCallback(self.runner.early_stopping))
            trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    @property
    def trained_parameters(self) -> int:
        """Numbers that a task's training changes, its head apart, in what was saved."""
        index = read_index(self.folder)
        rank = index["config"]["r"] * index["config"]["entries_per_task"]
        return rank * sum(
            in_features + out_features for in_features, out_features in index["modules"].values()
        )

    def split(self, task: Task) -> tuple[list[Example], list[Example] | None]:
        """The rows that a task is trained on, and those held out to stop early by; of all methods alike."""
        if self.runner.early_stopping is None:
            return task.train, None
        rows = list(task.train)
        random.Random(self.seed(task)).shuffle(rows)
        count = max(1, round(self.runner.holdout * len(rows)))
        return rows[count:], rows[:count]

    def checkpoints(self, stage: int) -> Path:
        return self.runner.output_dir / f"{self.name}-{self.tasks[stage].name}"

    def predict(
        self, test: Task, *, task: str | None = None, routing: Routing | None = None
    ) -> list[Prediction]:
        """`model.predict` on a task's test texts; none runs again with a mixture that it had before."""
        texts, model = [example.text for example in test.test], self.model
        options = self.runner.predicting | dict(task=task, progress=self.runner.progress)
        if not self.settled or model.pool.num_entries == 0:
            return model.predict(texts, routing=routing, **options)
        if routing is None:
            routing = model.route(texts, task=task, progress=self.runner.progress)
        answered = self.runner.methods.get(self.needs, self).answered
        found, keys = [], []
        for text, row in zip(texts, model.explain(routing=routing), strict=True):
            found.append(Prediction(text, None, task or row["task"], row["mass"], row["entries"]))
            mixture = tuple((entry["entry"], entry["weight"]) for entry in row["entries"])
            keys.append((text, found[-1].task, mixture))
        new = [n for n, key in enumerate(keys) if key not in answered]
        if new:
            made = model.predict([texts[n] for n in new], routing=routing.rows(new), **options)
            answered.update((keys[n], prediction.answer) for n, prediction in zip(new, made, strict=True))
        for prediction, key in zip(found, keys, strict=True):
            prediction.answer = answered[key]
        return found


@contextmanager
def tensorboard_folder(folder: Path, part: Path) -> Iterator[None]:
    """Inside, a Trainer's TensorBoard files go to a part of the folder, or of the one that the environment
    names: a part for each training, whose steps all count from 0.

    The Trainer's own choice is beside its checkpoints, which are deleted when a task has been learnt.
    """
    given = os.environ.get(TENSORBOARD)
    os.environ[TENSORBOARD] = str(Path(given or folder, part))
    try:
        yield
    finally:
        del os.environ[TENSORBOARD]
        if given is not None:
            os.environ[TENSORBOARD] = given


def shared(config: SLMConfig) -> dict:
    """The `SHARED` fields of a config."""
    return {name: getattr(config, name) for name in SHARED}
