"""Phase 2 of learning: transformers' Trainer on one task's entries, routed before the first step."""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from slm_fast.answers import evaluating
from slm_fast.linear_probe import linear_probe
from slm_fast.loading import with_pad_token
from slm_fast.model import SLMModel
from slm_fast.prompts import IGNORED, encode_example, encode_texts
from slm_fast.routing import Routing

logger = logging.getLogger(__name__)

TASK_WEIGHTS = "slm_task.safetensors"
# Batches of similar lengths, as an argument of this transformers (5.0 has the older name).
BY_NAME = "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
GROUPED = {"train_sampling_strategy": "group_by_length"} if BY_NAME else {"group_by_length": True}


class SLMTrainer(Trainer):
    """Trains the entries and the head of one task; everything else, older tasks included, cannot move.

    Args:
        model: an `SLMModel` that has the task (`model.add_task`).
        train_dataset, eval_dataset: rows with `text` and a label (`target`, `label_text` or `label`) for a
            task with a head; `text`/`target`, `prompt`/`completion` or `instruction`/`input`/`output` for
            generation; or tokenised rows (`input_ids`, `labels`) that also carry `text`. Mappings or
            `continual.tasks.Example`s.
        task: the task's name.
        max_length: tokens kept of an example.
    Every text is encoded and routed once, before training; batches carry finished routings. Without `args`
    those of `default_arguments`: batches of similar lengths, which `TrainingArguments` of one's own make with
    `train_sampling_strategy="group_by_length"`. With
    `SLMConfig.feature_penalty` the training rows of a task with a head also carry, while it lasts, the
    features that the frozen model gives them: [H] fp32 each, one more pass over all rows. Losses of an
    evaluation are without the penalty.
    Raises ValueError on an unknown task, a missing column, a label that the task does not have, and where the
    loss is one that a feature penalty cannot be added to.
    """

    def __init__(
        self,
        model: SLMModel,
        args: TrainingArguments | None = None,
        train_dataset=None,
        eval_dataset=None,
        *,
        task: str,
        max_length: int = 256,
        **kwargs,
    ) -> None:
        if not isinstance(model, SLMModel):
            raise ValueError(f"model must be an SLMModel, got {type(model).__name__}")
        self.task = task
        labels = model.pool.task(task).labels
        tokenizer = with_pad_token(kwargs.pop("processing_class", None) or model.require_tokenizer())
        args = default_arguments("trainer_output") if args is None else args
        if args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process share one routing: use torchrun or accelerate launch"
            )
        args.remove_unused_columns = False  # the collator needs the routing columns
        args.label_names = ["labels"]
        if args.ddp_broadcast_buffers is None:  # the frozen pool would travel at every step
            args.ddp_broadcast_buffers = False
        self._encoding = (model, tokenizer, task, max_length, args.disable_tqdm)
        train = encode_dataset(train_dataset, *self._encoding)
        if isinstance(eval_dataset, dict):
            evaluation = {name: encode_dataset(part, *self._encoding) for name, part in eval_dataset.items()}
        else:
            evaluation = encode_dataset(eval_dataset, *self._encoding)
        kwargs.setdefault("data_collator", Collator(tokenizer, labels is not None))
        self._batches = EpochOfBatches()
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), self._batches]
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = labels is not None or model.accepts_loss_kwargs
        self._feature_penalty = model.slm_config.feature_penalty if labels is not None else 0.0
        if self._feature_penalty and (self.label_smoother is not None or self.compute_loss_func is not None):
            raise ValueError("feature_penalty is part of the model's own loss: no other one can be taken")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train; the task's entries are parameters only while this runs.

        `resume_from_checkpoint=True` takes the last checkpoint in `args.output_dir` that was written to its
        end. Early stopping goes on waiting where it was; a training that was over takes no further step.
        Raises ValueError where there is no checkpoint, OSError on one that is damaged or of another task.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint and not is_whole(resume_from_checkpoint):
            raise OSError(f"{resume_from_checkpoint} is not a checkpoint that was written to its end")
        self.model.pool.task(self.task).max_length = self._encoding[3]
        with self.learning():
            if resume_from_checkpoint:
                state = TrainerState.load_from_json(_state_of(resume_from_checkpoint))
                if self._was_over(state):
                    return self._take_finished(resume_from_checkpoint, state)
            with self._frozen_features():
                if not resume_from_checkpoint:
                    self._start_heads()
                return super().train(resume_from_checkpoint, *args, **kwargs)

    def _was_over(self, state: TrainerState) -> bool:
        """Whether training had ended at a checkpoint with this state. Early stopping gets its counts back:
        transformers starts them at 0, and takes one more step from any checkpoint."""
        stopped = False
        for callback in self.callback_handler.callbacks:
            saved = state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, EarlyStoppingCallback) and isinstance(saved, dict):
                for name, value in saved["attributes"].items():
                    setattr(callback, name, value)
                stopped |= callback.early_stopping_patience_counter >= callback.early_stopping_patience
        return stopped or 0 < self.args.max_steps <= state.global_step

    def _take_finished(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        """What training gives from a checkpoint at which it had ended."""
        zero = ("is_local_process_zero", "is_world_process_zero")
        self.state = replace(state, **{name: getattr(self.state, name) for name in zero})
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = Path(checkpoint).with_name(Path(state.best_model_checkpoint).name)
            self.state.best_model_checkpoint = str(best)
            self._load_best_model()
        else:
            self._load_from_checkpoint(checkpoint)
        return TrainOutput(state.global_step, 0.0, {})

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Inside, what this trainer trains, and nothing else, are parameters that require gradients."""
        with self.model.training_task(self.task):
            yield

    @contextmanager
    def _frozen_features(self) -> Iterator[None]:
        """Inside, with a feature penalty, every training row has the features that the frozen model gives it,
        and the penalty its weight: 1 over their variance, 0 where they are all the same."""
        if not self._feature_penalty:
            yield
            return
        rows = by_length(self.train_dataset)
        frozen = self.model.pool.fixed_routing(["__base__"])
        with evaluating(self.model), torch.no_grad():
            features, _ = self._features([row | {"routing": frozen} for row in rows], "frozen features")
        variance = float(features.var(0, correction=0).sum())
        differ = variance > 1e-6 * float(features.square().sum(1).mean())
        self._feature_weight = self._feature_penalty / variance if differ else 0.0
        for row, feature in zip(rows, features, strict=True):
            row["frozen_features"] = feature
        try:
            yield
        finally:
            for row in rows:
                row.pop("frozen_features", None)

    @torch.no_grad()
    def _start_heads(self) -> None:
        """Start the heads that are zero at a linear probe of the features that they will read.

        It sees as many rows as the training does in one epoch, evenly spread over the dataset.
        """
        if self.model.slm_config.head_init != "probe":
            return
        rows_of: dict[str, list[dict]] = {}
        for row in self.train_dataset:
            rows_of.setdefault(row.get("task", self.task), []).append(row)
        share = min(1.0, self._rows_to_see() / len(self.train_dataset))
        untouched = bool(self._feature_penalty) and not any(
            p.any() for name, p in self._trained() if name.endswith("B_owned")
        )
        for name, rows in rows_of.items():
            head = self.model.pool.head(name)
            if head is not None and not head.weight.any():
                count = math.ceil(share * len(rows))
                rows = [rows[len(rows) * n // count] for n in range(count)]
                if untouched:  # the frozen model's features are those of before the first step
                    features = torch.stack([row["frozen_features"] for row in rows])
                    labels = torch.tensor([row["labels"] for row in rows])
                else:
                    with evaluating(self.model):
                        features, labels = self._features(by_length(rows), "head")
                device = head.weight.device
                weight, bias = linear_probe(features.to(device), labels.to(device), head.out_features)
                head.weight.copy_(weight)
                head.bias.copy_(bias)

    def _rows_to_see(self) -> int:
        args = self.args
        of_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.max_steps > 0:
            return args.max_steps * of_a_step
        return math.ceil(args.num_train_epochs * len(self.train_dataset))

    def _features(self, rows: list[dict], title: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What a head reads of encoded rows of a task, [N, H] fp32, and their labels [N]; on the CPU."""
        features, labels = [], []
        size = self.args.per_device_eval_batch_size
        for begin in tqdm(range(0, len(rows), size), title, leave=False, disable=self.args.disable_tqdm):
            batch = self._with_routing(self._prepare_inputs(self.data_collator(rows[begin : begin + size])))
            routing, _ = batch.pop("routing"), batch.pop("task")
            labels.append(batch.pop("labels").cpu())
            with self.compute_loss_context_manager(), self.model.state.use(routing, None):
                features.append(self.model.features(**batch).float().cpu())
        return torch.cat(features), torch.cat(labels)

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = encode_dataset(eval_dataset, *self._encoding)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        return super().get_test_dataloader(encode_dataset(test_dataset, *self._encoding))

    def _get_train_sampler(self, train_dataset=None):
        if any(getattr(self.args, name) != value for name, value in GROUPED.items()):
            return super()._get_train_sampler(train_dataset)
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._batches.sampler = LengthGroupedSampler(lengths, size, seed)
        return self._batches.sampler

    def compute_loss(self, model, inputs, return_outputs: bool = False, **kwargs):
        inputs = self._with_routing(inputs)
        if not return_outputs:
            inputs |= self._labelled_columns(inputs)
        return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def _labelled_columns(self, inputs: dict) -> dict:
        """What makes a decoder compute logits, [B, columns, V], where a row has a label, and nowhere else.

        They are what the loss reads. Prompts have none, and a token's logits cost V H multiply-adds: for
        SmolLM2 a quarter of what its layers cost.
        """
        labels = inputs.get("labels")
        if labels is None or labels.dim() < 2 or self.model.is_seq2seq or not self.model.keeps_logits:
            return {}
        if self.label_smoother is not None or self.compute_loss_func is not None:  # read all logits
            return {}
        columns = (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()
        return {"logits_to_keep": columns, "shift_labels": labels[:, columns + 1]} if len(columns) else {}

    def _with_routing(self, inputs: dict) -> dict:
        inputs = dict(inputs)
        frozen = inputs.pop("frozen_features", None)
        if self._feature_penalty and self.model.training:
            if frozen is None:
                raise ValueError(
                    "feature_penalty: the batch lacks frozen_features, which train() gives the rows and the "
                    "data collator must keep"
                )
            inputs |= {"frozen_features": frozen, "feature_weight": self._feature_weight}
        routing = Routing(*(inputs.pop(f"routing_{name}") for name in Routing._fields))
        return {"task": self.task} | inputs | {"routing": routing}

    # ---- saving: while training the task alone, as a pool and as parameters to resume; else the whole pool

    def _save_checkpoint(self, model, trial) -> None:
        """The trainer's state is written last, and older checkpoints are deleted after it: see `is_whole`."""
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            Path(self._get_output_dir(trial), name, TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state comes next

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        directory = Path(output_dir if output_dir is not None else self.args.output_dir)
        if not self.args.should_save:
            return
        training = self.model.pool.owner is not None
        self.model.save_pretrained(directory, [self.task] if training else None)
        if training:
            trained = {n: p.detach().contiguous() for n, p in self._trained()}
            temporary = directory / (TASK_WEIGHTS + ".tmp")
            save_file(trained, temporary, metadata={"task": self.task})
            os.replace(temporary, directory / TASK_WEIGHTS)
        torch.save(self.args, directory / "training_args.bin")

    def _trained(self):
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Put a checkpoint's parameters back. Raises OSError when it is damaged or of another task."""
        path = Path(resume_from_checkpoint) / TASK_WEIGHTS
        try:
            with safe_open(path, "pt") as file:
                owner = (file.metadata() or {}).get("task")
            saved = load_file(path)
        except Exception as error:
            raise OSError(f"{path} is missing or damaged: {error}") from error
        trained = dict(self._trained())
        if owner != self.task or {n: p.shape for n, p in trained.items()} != {
            n: t.shape for n, t in saved.items()
        }:
            raise OSError(f"{path} is not a checkpoint of task {self.task!r} of this model")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])

    def _load_best_model(self) -> None:
        logger.info("loading the best checkpoint %s", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def default_arguments(output_dir: str, **overrides) -> TrainingArguments:
    """Training arguments that suit low-rank entries; any of them can be replaced."""
    settings = dict(
        output_dir=output_dir,
        per_device_train_batch_size=16,
        num_train_epochs=2,
        learning_rate=2e-3,
        warmup_steps=0.06,
        weight_decay=0.01,
        logging_steps=20,
        save_steps=100,
        save_total_limit=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        **GROUPED,
    )
    if overrides.get("bf16") and not torch.cuda.is_available():
        settings["use_cpu"] = True  # transformers refuses bf16 where there is no GPU, unless the CPU is meant
    return TrainingArguments(**(settings | overrides))


def _state_of(checkpoint: str | Path) -> Path:
    return Path(checkpoint, TRAINER_STATE_NAME)


def is_whole(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end: a killed process leaves no state, or half of it."""
    try:
        json.loads(_state_of(checkpoint).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(output_dir: str) -> str:
    """The checkpoint with the most steps that is whole. Raises ValueError where there is none."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_whole(path)]
    if not found:
        raise ValueError(f"no whole checkpoint in {output_dir}: start without resume_from_checkpoint")
    return str(max(found, key=lambda path: int(path.name.rsplit("-", 1)[1])))


class EncodedDataset(list):
    """Rows that `encode_dataset` has tokenised and routed."""


def by_length(rows: Sequence[dict]) -> list[dict]:
    """Encoded rows, the shortest first."""
    return sorted(rows, key=lambda row: len(row["input_ids"]))


class LengthGroupedSampler(Sampler):
    """Batches of similar lengths in an order that depends on the seed and the epoch alone.

    transformers' own sampler draws from the global generator, so that a resumed epoch sees other batches, and
    goes from long to short rows, so that a training of few steps sees long ones alone. Here batches come in
    any order, but for the one with the longest row: it is the first, so that memory runs out at once.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        rows = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches = [rows[begin : begin + self.batch_size] for begin in range(0, len(rows), self.batch_size)]
        whole = len(rows) // self.batch_size  # what is left over stays at the end
        order = [0, *(1 + torch.randperm(max(0, whole - 1), generator=generator)).tolist()]
        order += range(len(order), len(batches))
        return iter([row for number in order for row in batches[number]])


class EpochOfBatches(TrainerCallback):
    """Tells the sampler its epoch. accelerate cannot where several processes resume: it lies too deep."""

    sampler: LengthGroupedSampler | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))


class Collator:
    """Pads a batch and stacks its routing."""

    def __init__(self, tokenizer, has_head: bool) -> None:
        self.tokenizer = tokenizer
        self.has_head = has_head

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        names = [name for name in self.tokenizer.model_input_names if name in rows[0]]
        inputs = [{name: row[name] for name in names} for row in rows]
        batch = dict(self.tokenizer.pad(inputs, padding=True, return_tensors="pt"))
        labels = [row["labels"] for row in rows]
        if self.has_head:
            batch["labels"] = torch.tensor(labels)
        else:
            width = max(map(len, labels))
            left = self.tokenizer.padding_side == "left"
            pads = [[IGNORED] * (width - len(row)) for row in labels]
            joined = [p + row if left else row + p for p, row in zip(pads, labels, strict=True)]
            batch["labels"] = torch.tensor(joined)
        if all("frozen_features" in row for row in rows):
            batch["frozen_features"] = torch.stack([row["frozen_features"] for row in rows])
        routing = Routing.cat([row["routing"] for row in rows])
        return batch | {f"routing_{name}": tensor for name, tensor in routing._asdict().items()}


def _fields(row, number: int) -> tuple[str, object]:
    """The text and the target of a raw row."""
    if not isinstance(row, dict):
        row = row if hasattr(row, "keys") else vars(row)
    if "text" in row:
        for name in ("target", "label_text", "label"):
            if name in row:
                return row["text"], row[name]
    if "prompt" in row and "completion" in row:
        return row["prompt"], row["completion"]
    if "output" in row and ("instruction" in row or "input" in row):
        parts = [row.get("instruction", ""), row.get("input", "")]
        return "\n".join(part for part in parts if part), row["output"]
    raise ValueError(
        f"row {number} has the columns {', '.join(row)}; wanted text and target (or label_text, label), "
        "prompt and completion, or instruction, input and output"
    )


def encode_dataset(
    dataset,
    model: SLMModel,
    tokenizer,
    task: str,
    max_length: int,
    quiet: bool,
    *,
    routing: Routing | None = None,
) -> EncodedDataset | None:
    """Tokenise and route a dataset once: rows of input_ids, labels and their routing.

    routing: one row that goes to all of them; without it they are retrieved, from the task's entries, as if
        there were no other task.
    """
    if dataset is None or isinstance(dataset, EncodedDataset):
        return dataset
    labels = model.pool.task(task).labels
    rows, texts = EncodedDataset(), []
    for number, row in enumerate(dataset):
        if isinstance(row, dict) and "input_ids" in row:
            if "text" not in row or "labels" not in row:
                raise ValueError(f"row {number} is tokenised but lacks text (for the routing) or labels")
            kept = [name for name in tokenizer.model_input_names if name in row]
            rows.append({name: list(row[name]) for name in kept} | {"labels": row["labels"]})
            texts.append(row["text"])
            continue
        text, target = _fields(row, number)
        texts.append(text)
        if labels is None:
            rows.append(encode_example(tokenizer, text, str(target), max_length, model.is_seq2seq))
            continue
        if isinstance(target, int) and 0 <= target < len(labels):
            target = labels[target]
        if target not in labels:
            raise ValueError(f"row {number}: {target!r} is not a label of task {task!r}: {', '.join(labels)}")
        in_prefill = model.slm_config.route_in_prefill
        encoded = encode_texts(model.base_model, tokenizer, [text], max_length, in_prefill)
        rows.append({"input_ids": encoded["input_ids"][0].tolist(), "labels": labels.index(target)})
    if not rows:
        raise ValueError("the dataset is empty")
    if routing is None:
        query = model.router.queries(texts, progress=not quiet)
        routing = model.pool.search_for_training(query, task)
    else:
        routing = routing.repeat_interleave(len(rows))
    for number, row in enumerate(rows):
        row["routing"] = routing.rows(slice(number, number + 1))
    return rows
