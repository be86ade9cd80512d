"""Baselines of continual learning on the budget of the engine's entries, all told whose head to use.

Each trains one LoRA with the rank of all entries of a task together (`finetune`: the base itself), with the
engine's training arguments and seeds. One routing serves all rows.
"""

import copy
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler
from transformers import TrainingArguments

from slm_fast.answers import Prediction
from slm_fast.config import CONFIG_NAME, SLMConfig
from slm_fast.continual.method import Method, shared
from slm_fast.continual.tasks import Example, Task
from slm_fast.layers import is_plain
from slm_fast.model import SLMModel
from slm_fast.pool import KnowledgePool
from slm_fast.routing import Routing
from slm_fast.storage import read_index
from slm_fast.trainer import Collator, EncodedDataset, SLMTrainer, encode_dataset


def one_lora(config: SLMConfig) -> SLMConfig:
    """One entry in place of the M that a task gets: rank M * r, and a scaling of 1 / M as in their mean.

    `route_in_prefill` goes with it: it says which linears have a mixture and what heads read.
    """
    entries = config.entries_per_task
    lora = dict(r=config.r * entries, scaling=config.scaling / entries, entries_per_task=1, top_k=1)
    lora |= dict(route_in_prefill=config.route_in_prefill)
    return SLMConfig(**shared(config) | lora | dict(metric="grouped_cosine", num_groups=1))


class Sequential(Method):
    """Trains one LoRA on each task in turn. A task's entry is the LoRA as it was after that task."""

    name, label = "seq", "one LoRA, sequential, told the task's head"
    told = True
    from_previous = True  # whether a task's entry starts as the previous task's

    @contextmanager
    def open(self) -> Iterator[None]:
        with self.runner.base_model() as base:
            self.model = self.wrap(base, one_lora(self.runner.model.slm_config), self.runner.model.encoder)
            yield

    def learn(self, stage: int) -> int:
        self.add(self.tasks[stage])
        if stage and self.from_previous:
            self.model.pool.copy_entries(self.tasks[stage - 1].name, self.tasks[stage].name)
        return self.fit(stage)

    def add(self, task: Task, rank: int | None = None) -> None:
        """An entry, whose key is never searched, and a head for a task."""
        self.model.pool.add_task(
            task.name,
            torch.ones(1, 1),
            rank=rank,
            labels=task.labels,
            hidden_size=None if task.labels is None else self.model.config.hidden_size,
            generator=torch.Generator().manual_seed(self.seed(task)),
        )

    def fit(self, stage: int) -> int:
        """Train the stage's entry; the number of steps."""
        return self.run_trainer(stage, lambda args: self.trainer(stage, args)).state.global_step

    def trainer(self, stage: int, args: TrainingArguments, **options) -> "BaselineTrainer":
        task = self.learnt_at(stage)[-1]
        options |= dict(task=task.name, routing=self.routing(task), max_length=self.runner.max_length)
        held_out = {task.name: self.split(task)[1] for task in self.learnt_at(stage)}
        if None not in held_out.values():
            options["held_out"] = held_out
        return BaselineTrainer(self.model, args, self.rows(stage), penalty=self.penalty, **options)

    def rows(self, stage: int) -> dict[str, Sequence[Example]]:
        """What a stage trains on, by task."""
        return {self.tasks[stage].name: self.split(self.tasks[stage])[0]}

    def penalty(self) -> Tensor | float:
        """What is added to the loss of every batch."""
        return 0.0

    def routing(self, task: Task) -> Routing:
        """Where all rows of a task go, as one row: the newest entry."""
        return self.model.pool.fixed_routing(self.model.pool.task_names()[-1:])

    def answers(self, task: Task) -> list[Prediction]:
        routing = self.routing(task).repeat_interleave(len(task.test))
        return self.predict(task, task=task.name, routing=routing)


class PerTask(Sequential):
    """A LoRA for each task, and the right one for every row: nothing is forgotten or transferred."""

    name, label = "per_task", "one LoRA per task, told the task"
    from_previous = False
    independent = settled = True

    def routing(self, task: Task) -> Routing:
        return self.model.pool.fixed_routing([task.name])


class Joint(Sequential):
    """One LoRA and a head per task, trained on the rows of all tasks at once."""

    name, label = "joint", "one LoRA, all tasks at once, told the task's head"
    note = "as many epochs over all tasks' rows; a batch holds rows of one task"
    last_only = independent = True

    def learnt_at(self, stage: int) -> list[Task]:
        """All, in an order that does not depend on theirs; the last one's entry serves all rows."""
        return sorted(self.tasks, key=lambda task: task.name)

    def learn(self, stage: int) -> int:
        *others, last = self.learnt_at(stage)
        for task in others:
            self.add(task, rank=1)  # for its head
        self.add(last)
        return self.fit(stage)

    def rows(self, stage: int) -> dict[str, Sequence[Example]]:
        return {task.name: self.split(task)[0] for task in self.learnt_at(stage)}


class Replay(Sequential):
    """Sequential LoRA that sees a share of every earlier task's rows again, through their own heads."""

    name, label = "replay", "one LoRA, sequential with replay, told the task's head"
    note = "replayed rows come on top of the task's own; a batch holds rows of one task"
    defaults = {"share": 0.01}

    def rows(self, stage: int) -> dict[str, Sequence[Example]]:
        rows, share = super().rows(stage), self.options["share"]
        for task in self.tasks[:stage] if share else ():
            count = max(1, round(share * len(task.train)))
            rows[task.name] = task.subset(count, seed=self.runner.seed).train
        return rows


class EWC(Sequential):
    """Elastic weight consolidation (Kirkpatrick et al., 2017) of the LoRA.

        loss + lambda / 2 * sum_t sum_i F_t[i] (theta[i] - theta_t[i])^2

    over earlier tasks t: theta_t is the LoRA after task t, F_t the mean, over a sample of the task's rows, of
    the squared gradient of a row's loss. The sum over t is kept as F = sum_t F_t around the mean of the
    theta_t weighted by F_t: a constant apart.
    """

    name, label = "ewc", "one LoRA, sequential with EWC, told the task's head"
    defaults = {"lambda": 1e5, "rows": 256}

    @contextmanager
    def open(self) -> Iterator[None]:
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        with super().open():
            if count := len(self.model.pool.tasks):
                saved = load_file(self._file(count), str(self.model.device))
                for name, tensor in saved.items():
                    kind, parameter = name.split(".", 1)
                    (self.fisher if kind == "fisher" else self.anchor)[parameter] = tensor
            yield

    def _file(self, num_tasks: int) -> Path:
        return self.folder / f"fisher-{num_tasks}.safetensors"

    def penalty(self) -> Tensor | float:
        parameters = entry_parameters(self.model.pool)
        moved = {name: parameters[name] - anchor for name, anchor in self.anchor.items()}
        total = sum((fisher * moved[name].square()).sum() for name, fisher in self.fisher.items())
        return self.options["lambda"] / 2 * total

    def run_trainer(self, *args) -> "BaselineTrainer":
        trainer = super().run_trainer(*args)
        rows = list(trainer.train_dataset)
        rows = random.Random(self.runner.seed).sample(rows, min(len(rows), self.options["rows"]))
        self.model.eval()
        with trainer.learning():
            parameters = entry_parameters(self.model.pool)
            squares = [torch.zeros_like(p) for p in parameters.values()]
            for row in rows:
                loss = trainer.row_loss(row)
                grads = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
                for square, grad in zip(squares, grads, strict=True):
                    square.addcmul_(grad, grad, value=1 / len(rows))
        for (name, parameter), square in zip(parameters.items(), squares, strict=True):
            theta = parameter.detach().clone()
            total = self.fisher.get(name, 0) + square
            self.anchor[name] = self.anchor.get(name, theta).lerp(theta, square / total.clamp(min=1e-30))
            self.fisher[name] = total
        return trainer

    def save(self) -> None:
        """The Fisher matrix goes first: the pool's index says which of its files counts."""
        count = len(self.model.pool.tasks)
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {f"fisher.{name}": t for name, t in self.fisher.items()}
        save_file(kept | {f"anchor.{name}": t for name, t in self.anchor.items()}, self._file(count))
        super().save()
        self._file(count - 1).unlink(missing_ok=True)


class OLoRA(Sequential):
    """O-LoRA (Wang et al., 2023): a LoRA per task, the earlier ones frozen, all added up.

    loss + lambda1 * sum_t |A_t A^T|^2    over earlier tasks t and all linears
    """

    name, label = "olora", "O-LoRA, told the task's head"
    defaults = {"lambda1": 0.5}
    from_previous = False

    def penalty(self) -> Tensor | float:
        overlap = [f.A[: f.owned[0]] @ f.A_owned.T for f in self.model.pool.factors]
        return self.options["lambda1"] * sum(part.square().sum() for part in overlap)

    def routing(self, task: Task) -> Routing:
        slots = torch.tensor([sorted(self.model.pool.tasks_of_slots())])
        return Routing.make(slots, torch.ones(slots.shape), pool_version=self.model.pool.version)


class Finetune(Sequential):
    """Trains all weights of a copy of the base on each task in turn."""

    name, label = "finetune", "fine-tuning of all weights, sequential, told the task's head"
    note = "trains all weights of the base, at a learning rate of its own"
    defaults = {"learning_rate": 1e-4}
    from_previous = False

    @property
    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.runner.model.base_model.parameters())

    @contextmanager
    def open(self) -> Iterator[None]:
        engine = self.runner.model
        with self.runner.base_model() as base:
            if (self.folder / CONFIG_NAME).is_file():
                folder = self._base_folder(len(read_index(self.folder)["tasks"]))
                kept = dict(dtype=base.dtype, attn_implementation=base.config._attn_implementation)
                base = type(base).from_pretrained(folder, **kept).to(base.device).eval()
            else:
                base = full_precision(copy.deepcopy(base))
        unused = dict(r=1, target_modules=[next(iter(engine.pool.modules_shape))])
        self.model = self.wrap(base, replace(one_lora(engine.slm_config), **unused), engine.encoder)
        yield

    def _base_folder(self, num_tasks: int) -> Path:
        return self.folder / f"base-{num_tasks}"

    def trainer(self, stage: int, args: TrainingArguments, **options) -> "BaselineTrainer":
        args.learning_rate = self.options["learning_rate"]
        return super().trainer(stage, args, train_base=True, **options)

    def routing(self, task: Task) -> Routing:
        return self.model.pool.fixed_routing(["__base__"])

    def save(self) -> None:
        """The base goes first: the pool's index says which of its folders counts."""
        pool = self.model.pool
        self.model.unload().save_pretrained(self._base_folder(len(pool.tasks)))
        self.model.repatch(pool)
        super().save()
        shutil.rmtree(self._base_folder(len(pool.tasks) - 1), ignore_errors=True)


def full_precision(base: nn.Module) -> nn.Module:
    """A base without its quantizer where that refuses to save weights that it has unpacked (GGUF).

    Raises ValueError where weights are still packed: those cannot be trained.
    """
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None:
        packed = [n for n, p in base.named_parameters() if not (is_plain(p) and p.is_floating_point())]
        if packed:
            raise ValueError(f"finetune trains all weights, but {packed[0]} of the base is quantised")
        if not quantizer.is_serializable():
            quantizer.remove_quantization_config(base)
    return base


def entry_parameters(pool: KnowledgePool) -> dict[str, nn.Parameter]:
    """The factors of the entry that is being trained."""
    return {f"{m}.{side}": getattr(f, f"{side}_owned") for m, f in enumerate(pool.factors) for side in "AB"}


class TaskBatchSampler(BatchSampler):
    """A sampler's order cut into batches of one task each: full ones first, the rests at the end."""

    def __init__(self, sampler: Sampler, tasks: list[str], batch_size: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self.tasks = tasks  # of every row

    def __iter__(self) -> Iterator[list[int]]:
        waiting: dict[str, list[int]] = {}
        for row in self.sampler:
            batch = waiting.setdefault(self.tasks[row], [])
            batch.append(row)
            if len(batch) == self.batch_size:
                yield waiting.pop(self.tasks[row])
        yield from waiting.values()

    def __len__(self) -> int:
        return sum(math.ceil(count / self.batch_size) for count in Counter(self.tasks).values())


class BaselineTrainer(SLMTrainer):
    """Trains one task's entry on rows of several tasks, a batch of one task at a time through its own head.

    Args:
        rows: {task: its rows}.  task: the one whose entry is trained.  routing: of every row, as one row.
        penalty: added to the loss of every batch.  train_base: whether the base's weights are trained too.
        held_out: {task: rows} to evaluate on.
    Losses are means over a batch's rows or tokens, also where gradients are accumulated.
    """

    def __init__(
        self,
        model: SLMModel,
        args: TrainingArguments,
        rows: dict[str, Sequence[Example]],
        *,
        task: str,
        routing: Routing,
        max_length: int,
        penalty: Callable[[], Tensor | float],
        train_base: bool = False,
        held_out: dict[str, Sequence[Example]] | None = None,
    ) -> None:
        self.penalty, self.train_base, self.row_tasks = penalty, train_base, list(rows)
        tokenizer = model.require_tokenizer()

        def encoded(parts: dict[str, Sequence[Example]]) -> EncodedDataset:
            dataset = EncodedDataset()
            for name, part in parts.items():
                part = encode_dataset(part, model, tokenizer, name, max_length, True, routing=routing)
                dataset += [row | {"task": name} for row in part]
            return dataset

        collators = {name: Collator(tokenizer, model.pool.head(name) is not None) for name in rows}

        def collate(batch: list[dict]) -> dict:
            name = batch[0]["task"]
            return collators[name](batch) | {"task": name}

        evaluated = None if held_out is None else encoded(held_out)
        options = dict(task=task, max_length=max_length, data_collator=collate)
        super().__init__(model, args, encoded(rows), evaluated, **options)
        self.model_accepts_loss_kwargs = False

    @contextmanager
    def learning(self) -> Iterator[None]:
        base = self.model.base_model
        with super().learning():
            for name in self.row_tasks:
                if (head := self.model.pool.head(name)) is not None:
                    head.requires_grad_(True)
            base.requires_grad_(self.train_base)
            try:
                yield
            finally:
                base.requires_grad_(False)

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self._get_train_sampler(), self._train_batch_size)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._loader(rows, SequentialSampler(rows), self.args.eval_batch_size)

    def _loader(self, dataset: EncodedDataset, order: Sampler, batch_size: int) -> DataLoader:
        batches = TaskBatchSampler(order, [row["task"] for row in dataset], batch_size)
        workers = dict(
            num_workers=self.args.dataloader_num_workers, pin_memory=self.args.dataloader_pin_memory
        )
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator, **workers)
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs: bool = False, **kwargs):
        if not return_outputs:
            return super().compute_loss(model, inputs, **kwargs) + self.penalty()
        loss, outputs = super().compute_loss(model, inputs, return_outputs, **kwargs)
        return loss + self.penalty(), outputs

    def row_loss(self, row: dict) -> Tensor:
        """The loss of one encoded row, without the penalty."""
        return super().compute_loss(self.model, self._prepare_inputs(self.data_collator([row])))
