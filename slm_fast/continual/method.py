"""What all ways of learning tasks in order have in common. `methods.METHODS` lists them."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from transformers import TrainingArguments

from slm_fast.answers import Prediction
from slm_fast.config import CONFIG_NAME, SLMConfig
from slm_fast.continual.tasks import Task
from slm_fast.model import SLMModel, get_slm_model
from slm_fast.trainer import SLMTrainer, last_checkpoint

# Fields of the engine's config that every method takes over; the rest is how the engine retrieves.
SHARED = ("r", "target_modules", "scaling", "entries_per_task", "top_k", "num_groups", "pooling", "backend")
SHARED += ("encoder_name_or_path", "encoder_max_length")


class Method(ABC):
    """A way to learn a runner's tasks in order and to answer their texts after each of them.

    Inside `open()` a runner asks, stage by stage, to `learn`, to `save` and for `answers`. What was saved in
    `folder` is there again when another process opens it. Only "slm" changes the runner's own model.

    name, label, note: in reports; the note says where budget or training differ from the others'.
    told: whether answers are told the task, or whose head to use.
    needs: the method whose model it reads.  own_stages: False for one that is measured at those of `needs`.
    last_only: whether it learns all tasks at once, at the last stage.
    defaults: its own settings, replaced by `options`: int from 1, float from 0.
    """

    name = ""
    label = ""
    note = ""
    told = False
    needs: str | None = None
    own_stages = True
    last_only = False
    defaults: dict[str, int | float] = {}

    def __init__(self, runner, options: dict | None = None) -> None:
        self.runner = runner
        self.tasks: list[Task] = runner.tasks
        self.folder: Path = runner.output_dir / self.name
        self.model: SLMModel = runner.model
        self.options = self.defaults | (options or {})
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

    def save(self) -> None:
        self.model.save_pretrained(self.folder)

    def measured(self, stage: int) -> list[int]:
        """Numbers of the tasks that are scored after a stage."""
        every = self.runner.evaluate == "all" and not self.told
        return list(range(len(self.tasks) if every else stage + 1))

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
        transformers.set_seed(self.runner.seed)
        trainer = make(args)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    def checkpoints(self, stage: int) -> Path:
        return self.runner.output_dir / f"{self.name}-{self.tasks[stage].name}"

    def predict(self, task: Task, /, **routed) -> list[Prediction]:
        """`model.predict` on the task's test texts."""
        texts = [example.text for example in task.test]
        return self.model.predict(texts, **routed, **self.runner.predicting, progress=self.runner.progress)


def shared(config: SLMConfig) -> dict:
    """The `SHARED` fields of a config."""
    return {name: getattr(config, name) for name in SHARED}
