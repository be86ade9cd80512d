"""The ways of learning tasks in order that a `ContinualRunner` compares, by name: `METHODS`."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slm_fast.answers import Prediction
from slm_fast.config import CONFIG_NAME, SLMConfig
from slm_fast.continual.baselines import EWC, Finetune, Joint, OLoRA, PerTask, Replay, Sequential
from slm_fast.continual.method import Method, shared
from slm_fast.continual.tasks import Task
from slm_fast.encoder import Encoder
from slm_fast.model import SLMModel
from slm_fast.pool import KnowledgePool
from slm_fast.routing import Routing
from slm_fast.trainer import SLMTrainer


class SLM(Method):
    """The engine: entries of its own for every task, one query at a time, no task id."""

    name, label = "slm", "SLM, no task id"
    settled = True

    @property
    def independent(self) -> bool:
        return self.model.slm_config.init == "zero"

    @contextmanager
    def open(self) -> Iterator[None]:
        if (self.folder / CONFIG_NAME).is_file():
            self.model.load_pool(self.folder)
        yield

    def learn(self, stage: int) -> int:
        task, runner, model = self.tasks[stage], self.runner, self.model
        texts = [example.text for example in task.train]
        options = dict(seed=self.seed(task), progress=runner.progress)
        answers = [example.target for example in task.train]
        model.add_task(task.name, texts, answers=answers, labels=task.labels, **options)
        train, held_out = self.split(task)
        settings = dict(task=task.name, max_length=runner.max_length)
        try:
            trainer = self.run_trainer(
                stage, lambda args: SLMTrainer(model, args, train, held_out, **settings)
            )
        except BaseException:  # half learnt; its checkpoint on disk is continued
            model.remove_task(task.name)
            raise
        return trainer.state.global_step

    def answers(self, task: Task) -> list[Prediction]:
        return self.predict(task)


class Oracle(SLM):
    """The same trained model, told the task: its difference to "slm" is what retrieval costs."""

    name, label = "oracle", "SLM, told the task"
    told, needs, own_stages = True, "slm", False

    def measured(self, stage: int) -> list[int]:
        return self.newest(stage)

    def answers(self, task: Task) -> list[Prediction]:
        return self.predict(task, task=task.name)


class Batch(Method):
    """The authors' retrieval on the weights of "slm": their keys, scores averaged over a task's batches."""

    name, label = "batch", "SLM, the paper's retrieval, batch-averaged"
    note = "all rows of a batch come from one task and share a mixture; keys of its own for the same entries"
    needs = "slm"
    settled = True
    trained_parameters = 0

    def __init__(self, runner, options: dict | None = None) -> None:
        super().__init__(runner, options)
        self.config, self.encoder = papers_retrieval(self.model)

    @contextmanager
    def open(self) -> Iterator[None]:
        path = self.folder / "keys.safetensors"
        saved = load_file(path) if path.is_file() else {}
        self.keys = {task.name: saved[task.name] for task in self.tasks if task.name in saved}
        yield

    def has_learnt(self, stage: int) -> bool:
        return self.tasks[stage].name in self.keys

    def learn(self, stage: int) -> int:
        task = self.tasks[stage]
        query = self.encoder([example.text for example in task.train], self.runner.progress)
        pool = key_pool(self.config, {})
        self.keys[task.name] = pool.learn_keys(query, self.config.key_method, self.seed(task))
        return 0

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / "keys.safetensors.tmp"
        save_file(self.keys, temporary)
        os.replace(temporary, self.folder / "keys.safetensors")

    def answers(self, task: Task) -> list[Prediction]:
        query = self.encoder([example.text for example in task.test], self.runner.progress)
        size = self.runner.predicting["batch_size"]
        return self.predict(task, routing=batch_routing(self.model, self.config, self.keys, query, size))


class Paper(SLM):
    """The authors' SLM: their keys, metric and weights in training too, scores averaged over batches."""

    name, label = "paper", "the paper's SLM, batch-averaged"
    note = "all rows of a test batch come from one task and share a mixture; in training each row has its own"

    def __init__(self, runner, options: dict | None = None) -> None:
        super().__init__(runner, options)
        self.retrieval = papers_retrieval(self.model)

    @contextmanager
    def open(self) -> Iterator[None]:
        with self.runner.base_model() as base:
            self.model = self.wrap(base, *self.retrieval)
            yield

    def answers(self, task: Task) -> list[Prediction]:
        pool, size = self.model.pool, self.runner.predicting["batch_size"]
        keys = {info.name: pool.keys[info.slots].cpu() for info in pool.tasks.values()}
        query = self.model.encoder([example.text for example in task.test], self.runner.progress)
        return self.predict(task, routing=batch_routing(self.model, pool.config, keys, query, size))


def papers_retrieval(model: SLMModel) -> tuple[SLMConfig, Encoder]:
    """The paper's settings for entries of the model's sizes, and the model's encoder with its last layer, as
    it is if it has no name. Asked for before "slm" learns, its queries are made by the passes of that."""
    encoder = model.encoder.on(model.base_model, in_prefill=False)
    settings = shared(model.slm_config) | {"encoder_name_or_path": encoder.name_or_path}
    if model.slm_config.route_in_prefill:  # which left out some linears; a query of the last layer cannot
        settings["target_modules"] = list(model.pool.modules_shape)
    config = SLMConfig.paper(**settings)
    return config, encoder if encoder.name_or_path is None else encoder.with_layers(config.query_layers)


def key_pool(config: SLMConfig, keys: dict[str, Tensor]) -> KnowledgePool:
    """A pool of keys without factors to speak of, which averages scores over a batch."""
    pool = KnowledgePool(replace(config, r=1, mixing="batch"), {"none": (1, 1)})
    for name, of_task in keys.items():
        pool.add_task(name, of_task, generator=torch.Generator())
    return pool


def batch_routing(
    model: SLMModel, config: SLMConfig, keys: dict[str, Tensor], query: Tensor, batch_size: int
) -> Routing:
    """The model's entries for queries [N, D]: consecutive batches share the picks of their averaged scores.

    keys: {task: [M, D]}, one for each of the task's entries, in their order.
    """
    pool = key_pool(config, keys)
    found = Routing.cat([pool.search(part) for part in query.split(batch_size)])
    slots = torch.tensor([slot for name in keys for slot in model.pool.task(name).slots])
    return Routing.make(slots[found.indices.long()], found.weights, found.scores, model.pool.version)


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        SLM,
        Oracle,
        Batch,
        Paper,
        Sequential,
        Finetune,
        Replay,
        EWC,
        OLoRA,
        PerTask,
        Joint,
    )
}
ALIASES = {"sequential": "seq"}


def method_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names of `METHODS` that are meant, once each. Raises ValueError on unknown and missing ones."""
    found = tuple(dict.fromkeys(ALIASES.get(name, name) for name in names))
    if unknown := [name for name in found if name not in METHODS]:
        raise ValueError(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if not found:
        raise ValueError(f"methods is empty; there are {', '.join(METHODS)}")
    for name in found:
        if METHODS[name].needs not in (None, *found):
            raise ValueError(f"{name} needs {METHODS[name].needs} among the methods, got {', '.join(found)}")
    return found
