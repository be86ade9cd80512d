"""A frozen Hugging Face model with a knowledge pool: routing, forward, generation, answers, saving."""

import inspect
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import TransformersKwargs

from slm_fast.answers import Prediction, answer_all, answer_in_prefill
from slm_fast.backbone_encoder import backbone_of, base_tokenizer
from slm_fast.config import INITS, KEY_METHODS, SLMConfig
from slm_fast.encoder import Encoder, check_texts, make_encoder, mean_pool
from slm_fast.fast_forward import patch_model, unpatch_model
from slm_fast.label_keys import checked_answers
from slm_fast.layers import RoutingScope, checkpoint_contexts, default_pool
from slm_fast.loading import with_pad_token
from slm_fast.pool import KnowledgePool, TaskInfo
from slm_fast.prefill import PrefillScope, check_encoder, check_prefill, modules_before_query
from slm_fast.prompts import encode_prompts
from slm_fast.resident import ResidentPool
from slm_fast.router import SOURCES, Router, input_of, rows_of
from slm_fast.routing import Routing
from slm_fast.starts import mean_weights, start_from_mixture
from slm_fast.storage import check_keys, load_pool, read_index, save_pool


class SLMModel(nn.Module):
    """A frozen base model whose targeted linears add each row's own retrieved mixture.

    Rows are routed by `texts=` (or their precomputed `embeddings=`), by a finished `routing=`, or by name
    with `adapter_names=` as in PEFT ("__base__" is the frozen model). `task=` restricts the routing to a
    task's entries and, if the task has a head, makes `forward` return that head's logits and loss. With
    `SLMConfig.route_in_prefill` rows without any of these are routed by the pass that answers them, see
    `PrefillScope`; `last_routing` is what it found.
    """

    def __init__(
        self, base_model: nn.Module, config: SLMConfig, pool: KnowledgePool, encoder: Encoder, tokenizer=None
    ) -> None:
        super().__init__()
        check_prefill(config, base_model, encoder, list(pool.modules_shape))
        self.slm_config = config
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.state = patch_model(base_model, pool)
        self.unloaded = False
        self.base_model = base_model
        self.pool = pool
        signature = inspect.signature(base_model.forward).parameters
        self._forward_names = set(signature)
        if any(p.kind is p.VAR_KEYWORD for p in signature.values()):
            self._forward_names |= set(TransformersKwargs.__annotations__)
            self._forward_names |= {"past_key_values", "cache", "return_dict", "shift_labels"}
        self.train(base_model.training)

    # ---- what it is

    @property
    def config(self):
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        return next(self.base_model.parameters()).device

    @property
    def is_seq2seq(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def can_generate(self) -> bool:
        return bool(getattr(self.base_model, "can_generate", bool)())

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base scales its loss by the `num_items_in_batch` that the Trainer passes."""
        accepted = getattr(self.base_model, "accepts_loss_kwargs", not self.is_seq2seq)
        return bool(accepted) and "num_items_in_batch" in self._forward_names

    @property
    def keeps_logits(self) -> bool:
        """Whether the base can compute the logits and the loss of some columns (`logits_to_keep`) alone."""
        return {"logits_to_keep", "shift_labels"} <= self._forward_names

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are being trained, as PEFT does."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.base_model.parameters()) + trainable
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")

    # ---- tasks

    def add_task(
        self,
        name: str,
        texts: Sequence[str] | None = None,
        *,
        embeddings: Tensor | None = None,
        answers: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
        method: str | None = None,
        rank: int | None = None,
        init: str | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> TaskInfo:
        """Phase 1: make a new task's keys from its texts. With `labels` the task gets a classification head.

        answers: to the texts, one string each: names of labels, or what is to be generated. Where at least
        half of the texts have an answer that 4 or more have, the task is found by a key for each of these
        (the config's `label_keys`).  method: "group_avg", "kmeans" or "paper".  init: "zero"; or "retrieved":
        the entries start from the mixture that the texts get without them, as near as their ranks allow. None
        takes the config's. Raises ValueError on an unknown method or init, a start other than "zero" with a
        scaling of 0, too few texts, a taken name, answers that are not a string for each text or non-finite
        embeddings; nothing is changed then.
        """
        method, init = method or self.slm_config.key_method, init or self.slm_config.init
        if method not in KEY_METHODS:
            raise ValueError(f"method must be one of {', '.join(KEY_METHODS)}, got {method!r}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        if init != "zero" and self.slm_config.scaling == 0:
            raise ValueError(f"init={init!r} needs a scaling other than 0")
        if name in self.pool.tasks:
            raise ValueError(f"the pool already has a task {name!r}")
        given = texts if texts is not None else embeddings
        if answers is not None and given is not None:
            answers = checked_answers(answers, len(given))
        query = self.router.queries(texts, embeddings, progress).to(self.pool.keys.device)
        bar = (lambda steps: tqdm(steps, desc=f"keys of {name}", leave=False)) if progress else None
        keys = self.pool.learn_keys(query, method, seed, bar)
        weights = mean_weights(self.pool, query) if init == "retrieved" else None
        info = self.pool.add_task(
            name,
            keys,
            rank=rank,
            labels=list(labels) if labels is not None else None,
            hidden_size=self.config.hidden_size if labels is not None else None,
            queries=query,
            answers=answers,
            generator=torch.Generator().manual_seed(seed),
        )
        if weights is not None:
            start_from_mixture(self.pool, name, weights)
        return info

    def take_tasks(self, directory: str | Path, names: Sequence[str] | None = None) -> list[TaskInfo]:
        """Add tasks of a saved pool, by default all of them, as if they had been learnt here.

        What a task learns from a zero start does not depend on the other tasks, so pools that were trained
        apart, even on other machines, come together without loss. Only what temperature="auto" is fitted to
        does: of that comes along what was measured against tasks that come along or are here. Raises OSError
        on missing or damaged files, ValueError on another base, unknown or taken names and pools with another
        metric or encoder; nothing is changed then.
        """
        other = load_pool(self.base_model, directory)
        check_keys(self.encoder, read_index(directory))
        return self.pool.take_tasks(other, other.task_names() if names is None else names)

    def remove_task(self, name: str) -> None:
        """Forget a task: its entries can never be picked again."""
        self.pool.remove_task(name)

    def keep_resident(self, slots: int | None = None, *, memory: int | None = None) -> None:
        """Keep the factors in host memory, and `slots` entries, or `memory` bytes of them, beside the base.

        For pools larger than the GPU: entries are copied in when a batch picks them, see `ResidentPool`.
        Without arguments all factors move to the base's device, which training needs. Raises ValueError
        while a task is being trained and where not one slot fits.
        """
        if self.pool.owner is not None:
            raise ValueError(f"task {self.pool.owner!r} is being trained; finish it first")
        if slots is None and memory is None:
            self.state.resident = None
            self.pool.keep_on_host(False)
        else:
            self.state.resident = ResidentPool(self.pool, slots, memory=memory)

    @contextmanager
    def training_task(self, name: str) -> Iterator[None]:
        """Phase 2: inside, exactly the task's entries and head are trainable parameters."""
        self.pool.own(name)
        try:
            yield
        finally:
            self.pool.disown()

    # ---- routing

    @property
    def router(self) -> Router:
        return Router(self.pool, self.encoder, self.base_model)

    def route(
        self,
        texts: Sequence[str] | None = None,
        *,
        embeddings: Tensor | None = None,
        task: str | Sequence[str | None] | None = None,
        progress: bool = False,
    ) -> Routing:
        """Retrieve every text's entries and weights; `task` (one, or one per row) restricts them."""
        return self.pool.search(self.router.queries(texts, embeddings, progress), task)

    def route_ahead(
        self,
        texts: Sequence[str] | None = None,
        *,
        embeddings: Tensor | None = None,
        task: str | Sequence[str | None] | None = None,
    ) -> "Future[Routing]":
        """`route` in a thread of its own, to be passed on as `routing=`: meanwhile the caller may tokenise.

        Resident factors (`keep_resident`) are copied in at once. Errors are raised by the call that takes the
        routing. The pool must not change before.
        """
        return self.router.ahead(texts, embeddings, task, self.state.resident)

    def explain(self, texts: Sequence[str] | None = None, *, routing: Routing | None = None) -> list[dict]:
        """For each row: the task with the largest mass, the mass of every task, and the picked entries."""
        if routing is None:
            routing = self.route(texts)
        else:
            self.pool.check_routing(routing)
        mass, names = self.pool.task_mass(routing)
        of_task = self.pool.tasks_of_slots()
        rows = []
        columns = (routing.indices, routing.weights, routing.scores, mass)
        for indices, weights, scores, row_mass in zip(*(c.tolist() for c in columns), strict=True):
            entries = [
                {"entry": self.pool.names[i], "task": of_task[i], "weight": w, "score": s}
                for i, w, s in zip(indices, weights, scores, strict=True)
                if w > 0
            ]
            best = max(range(len(names)), key=row_mass.__getitem__) if entries else None
            task = None if best is None else names[best]
            rows.append({"task": task, "mass": dict(zip(names, row_mass, strict=False)), "entries": entries})
        return rows

    @property
    def last_routing(self) -> Routing | None:
        """What the last call found that routed in the prefill, for `explain(routing=...)`; None before.
        A decoder's beams and return sequences have a row each."""
        return self.state.last_routing

    def prefill_scope(self, **options) -> PrefillScope:
        """A context in which the first pass through the base routes its rows; see `PrefillScope`."""
        check_encoder(self.slm_config, self.encoder)
        return PrefillScope(self.state, self.pool, self.encoder, **options)

    @property
    def _routes_in_prefill(self) -> bool:
        return self.slm_config.route_in_prefill and self.pool.num_entries > 0

    def _scope(self, sources: dict, args: tuple, kwargs: dict) -> RoutingScope:
        """The context of a call, with the routing of its source, or the one that its prefill will find."""
        rows, packing = rows_of(args, kwargs)
        if not self._routes_in_prefill or any(sources[name] is not None for name in SOURCES):
            return self.state.use(self._resolve(rows, **sources), packing)
        self._check_loaded()
        if packing is not None:
            raise ValueError("packed sequences (cu_seq_lens_q) are not routed in the prefill: pass routing=")
        mask = kwargs.get("attention_mask")
        return self.prefill_scope(
            task=sources["task"],
            num_tokens=input_of(args, kwargs).shape[1],
            attention_mask=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
        )

    def _check_loaded(self) -> None:
        if self.unloaded:
            raise ValueError("the base model was unloaded: call repatch(pool) or load_pool(directory) first")

    def _resolve(self, num_rows: int, **sources) -> Routing | None:
        """The routing of a call. Raises ValueError unless exactly one source fits the batch's rows."""
        self._check_loaded()
        if self._routes_in_prefill and all(sources[name] is None for name in SOURCES):
            raise ValueError(
                "continuous batching does not route in the prefill, which it may run in parts: pass "
                "texts=[...], embeddings=, routing= or adapter_names=[...]"
            )
        return self.router.resolve(num_rows, self.device, **sources)

    # ---- running

    def forward(
        self,
        *args,
        texts: Sequence[str] | None = None,
        embeddings: Tensor | None = None,
        routing: Routing | None = None,
        adapter_names: Sequence[str] | None = None,
        task: str | None = None,
        labels: Tensor | None = None,
        num_items_in_batch=None,
        frozen_features: Tensor | None = None,
        feature_weight: float | None = None,
        **kwargs,
    ):
        """The base model's forward with every row's mixture; see the class for the routing arguments.

        With `frozen_features=` [B, H], what `features` gives without mixtures, and `feature_weight=` every
        row's loss of a task with a head gets weight |features - frozen_features|^2.

        With `cu_seq_lens_q=`, as in transformers' batches without padding, the rows are the sequences packed
        into a batch [1, T]; no cache is made then unless `use_cache=True` asks for it.
        """
        unknown = sorted(set(kwargs) - self._forward_names)
        if unknown:
            raise ValueError(f"unexpected keyword arguments: {', '.join(unknown)}")
        sources = {"texts": texts, "embeddings": embeddings, "routing": routing}
        sources |= {"adapter_names": adapter_names, "task": task}
        scope = self._scope(sources, args, kwargs)
        if (frozen_features is None) != (feature_weight is None):
            raise ValueError("frozen_features= and feature_weight= go together")
        with scope:
            if task is not None and self.pool.task(task).labels is not None:
                if scope.packing is not None:
                    raise ValueError(f"the head of task {task!r} takes no packed sequences (cu_seq_lens_q)")
                return self._classify(
                    task, labels, num_items_in_batch, frozen_features, feature_weight, *args, **kwargs
                )
            if frozen_features is not None:
                raise ValueError("frozen_features= goes with a task that has a head: pass task=")
            if labels is not None:
                kwargs["labels"] = labels
            if num_items_in_batch is not None and "num_items_in_batch" in self._forward_names:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return self.base_model(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        texts: Sequence[str] | None = None,
        embeddings: Tensor | None = None,
        routing: Routing | None = None,
        adapter_names: Sequence[str] | None = None,
        task: str | Sequence[str | None] | None = None,
        **kwargs,
    ):
        """The base model's `generate`, with any generation config; rows are routed as in `forward`."""
        sources = {"texts": texts, "embeddings": embeddings, "routing": routing}
        sources |= {"adapter_names": adapter_names, "task": task}
        with self._scope(sources, (inputs,), kwargs):
            return self.base_model.generate(inputs, **kwargs)

    def generate_text(
        self,
        prompts: Sequence[str],
        *,
        texts: Sequence[str] | None = None,
        max_length: int = 2048,
        **kwargs,
    ) -> list[str]:
        """The completion of every prompt; rows are routed while the prompts are tokenised, or in the prefill.

        Rows are routed by `texts`, by default the prompts, or another source of `generate`, whose options
        are taken too. Prompts go through the tokenizer's chat template where it has one; those of more than
        `max_length` tokens are cut at their start. Return sequences of a prompt stand side by side.
        """
        prompts = check_texts(prompts)
        if all(kwargs.get(name) is None for name in ("embeddings", "routing", "adapter_names")):
            if self.pool.num_entries and not (texts is None and self._routes_in_prefill):
                texts = prompts if texts is None else texts
                kwargs["routing"] = self.route_ahead(texts, task=kwargs.pop("task", None))
        elif texts is not None:
            kwargs["texts"] = texts
        tokenizer = self.require_tokenizer()
        encoded = encode_prompts(tokenizer, prompts, max_length, self.is_seq2seq).to(self.device)
        kwargs.setdefault("pad_token_id", tokenizer.pad_token_id)
        out = self.generate(encoded["input_ids"], attention_mask=encoded["attention_mask"], **kwargs)
        out = getattr(out, "sequences", out)
        if not self.is_seq2seq:
            out = out[:, encoded["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]] | None = None,
        *,
        texts: Sequence[str] | None = None,
        embeddings: Tensor | None = None,
        routing: Routing | None = None,
        adapter_names: Sequence[str] | None = None,
        task: str | Sequence[str | None] | None = None,
        **options,
    ) -> dict:
        """transformers' `generate_batch`, continuous batching, with every request's own mixture.

        Without `inputs` the prompts are the texts. For the options, the result and the errors see
        `slm_fast.continuous.generate_batch`.
        """
        from slm_fast.continuous import generate_batch

        sources = {"texts": texts, "embeddings": embeddings, "routing": routing}
        sources |= {"adapter_names": adapter_names, "task": task}
        return generate_batch(self, inputs, sources, **options)

    def continuous_batching_context_manager(self, *args, **options):
        """A running manager whose `add_request` takes routing arguments: see `slm_fast.continuous`."""
        from slm_fast.continuous import routed_manager

        return routed_manager(self, *args, **options)

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """What heads read: the backbone's pooled last hidden state under the current routing, [B, H] fp32."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = backbone_of(self.base_model)(
            input_ids=input_ids, attention_mask=attention_mask, **kwargs
        ).last_hidden_state
        pooling = self._pooling()
        if pooling == "mean":
            return mean_pool(hidden, attention_mask)
        if pooling == "first":
            return hidden[:, 0].float()
        positions = torch.arange(attention_mask.shape[1], device=hidden.device)
        last = (attention_mask * positions).argmax(-1)
        return hidden[torch.arange(len(last), device=hidden.device), last].float()

    def _pooling(self) -> str:
        if self.slm_config.pooling != "auto":
            return self.slm_config.pooling
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        bidirectional = self.is_seq2seq or self.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        return "mean" if bidirectional else "last"

    def _classify(
        self,
        task: str,
        labels: Tensor | None,
        num_items_in_batch,
        frozen_features: Tensor | None,
        feature_weight: float | None,
        *args,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """What a task's head answers; the loss is the rows' mean, or their sum / `num_items_in_batch`."""
        features = self.features(*args, **kwargs)
        logits = self.pool.head(task)(features)
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = F.cross_entropy(logits, labels, reduction=reduction)
        if frozen_features is not None:
            if frozen_features.shape != features.shape:
                wanted, got = list(features.shape), list(frozen_features.shape)
                raise ValueError(f"frozen_features must be {wanted}, got {got}")
            moved = (features - frozen_features).square().sum(-1)
            loss = loss + feature_weight * getattr(moved, reduction)()
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def predict(
        self,
        texts: Sequence[str],
        *,
        task: str | None = None,
        routing: Routing | None = None,
        batch_size: int = 32,
        max_length: int = 256,
        max_new_tokens: int = 32,
        progress: bool = False,
    ) -> list[Prediction]:
        """Answer every text by itself: a label name where the chosen task has a head, else generated text.

        The task is the one with the largest routing mass. `task=` tells it instead; `routing=` passes it
        ready-made. Texts longer than `max_length` tokens are cut. With `route_in_prefill` a text runs through
        the base once, but twice where tasks with heads are in the pool and its own has none.
        """
        texts, limits = check_texts(texts), (batch_size, max_length, max_new_tokens, progress)
        if self.pool.num_entries == 0:
            routing = self.pool.fixed_routing(["__base__"] * len(texts))
        elif routing is None and self._routes_in_prefill:
            self._check_loaded()
            return answer_in_prefill(self, texts, task, *limits)
        elif routing is None:
            routing = self.route(texts, task=task, progress=progress)
        if routing.num_rows != len(texts):
            raise ValueError(f"routing has {routing.num_rows} rows, the batch has {len(texts)}")
        results = [
            Prediction(text, None, task or row["task"], row["mass"], row["entries"])
            for text, row in zip(texts, self.explain(routing=routing), strict=True)
        ]
        answer_all(self, results, routing.to(self.device), *limits)
        return results

    def require_tokenizer(self):
        if self.tokenizer is None:
            self.tokenizer = base_tokenizer(self.base_model)
        return with_pad_token(self.tokenizer)

    # ---- training support, saving

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **options
    ) -> None:
        """Turn on checkpointing; recomputation runs under the routing of its own forward pass.

        Always non-reentrant: the re-entrant kind loses all gradients behind a frozen embedding.
        """
        kwargs = dict(activation_checkpointing_kwargs or {})
        kwargs |= {"use_reentrant": False, "context_fn": checkpoint_contexts(self.state)}
        if hasattr(self.base_model, "activation_checkpointing_enable"):  # transformers 5.24 renamed it
            self.base_model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **options)
        else:
            self.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **options
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        if hasattr(self.base_model, "activation_checkpointing_disable"):
            self.base_model.activation_checkpointing_disable()
        else:
            self.base_model.gradient_checkpointing_disable()

    def gradient_checkpointing_disable(self) -> None:
        """The older name of `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    def unload(self) -> nn.Module:
        """Give the base model back with its original linears."""
        self.unloaded = True
        return unpatch_model(self.base_model)

    def repatch(self, pool: KnowledgePool) -> None:
        """Put `pool` in place of the current one."""
        if self.pool.owner is not None:
            raise ValueError(f"task {self.pool.owner!r} is being trained")
        check_prefill(pool.config, self.base_model, self.encoder, list(pool.modules_shape))
        trainable = self.state.trainable
        unpatch_model(self.base_model)
        try:
            patch_model(self.base_model, pool, self.state)
        except ValueError:
            if not self.unloaded:
                patch_model(self.base_model, self.pool, self.state)
            raise
        self.state.trainable = trainable
        self.pool, self.slm_config, self.unloaded = pool, pool.config, False

    def load_pool(self, directory: str | Path) -> None:
        """Replace the pool by a saved one; on any error the model stays as it was."""
        self.repatch(load_pool(self.base_model, directory))

    def save_pretrained(self, directory: str | Path, tasks: Sequence[str] | None = None) -> None:
        """Write the pool and the settings, never the frozen base, to `directory`; with `tasks` a pool that
        holds these alone.

        The encoder is saved by name; one without a name (a callable) must be passed again on loading.
        Processes that save to one directory wait for each other; of several that train, one is enough.
        Raises ValueError for a task that is not there.
        """
        save_pool(self.pool, self.base_model, directory, self.encoder, tasks)

    @classmethod
    def from_pretrained(
        cls,
        base_model: nn.Module,
        directory: str | Path,
        *,
        encoder=None,
        tokenizer=None,
        slots: int | None = None,
        memory: int | None = None,
    ):
        """Load a saved pool onto its base model. `encoder` replaces the one whose name was saved.

        With `slots` or `memory` the factors never leave the host as a whole: see `keep_resident`.
        Raises OSError on missing or damaged files and ValueError on another base; `base_model` is unchanged
        then.
        """
        pool = load_pool(base_model, directory)
        encoder = make_encoder(pool.config, encoder, base_model, tokenizer)
        if slots is None and memory is None:
            return cls(base_model, pool.config, pool, encoder, tokenizer)
        resident = ResidentPool(pool, slots, memory=memory)  # checks its sizes before the base is touched
        model = cls(base_model, pool.config, pool, encoder, tokenizer)
        model.state.resident = resident
        return model


def get_slm_model(
    base_model: nn.Module,
    config: SLMConfig | None = None,
    *,
    encoder=None,
    tokenizer=None,
    dtype=torch.float32,
) -> SLMModel:
    """Wrap a Hugging Face model, in place, with an empty pool.

    Args:
        encoder: replaces `config.encoder_name_or_path`: a sentence-transformers object, a model folder or hub
            id, "backbone" for the base model itself (`BackboneEncoder`), a callable `list[str] -> [B, D]`, or
            an `Encoder`.
        tokenizer: of the base model, for `predict` and the trainer; by default loaded from the base's own
            name.
        dtype: of the pool's factors. They stay fp32 for training whatever the base's dtype is.
    """
    config = SLMConfig() if config is None else config
    encoder, without = make_encoder(config, encoder, base_model, tokenizer), set()
    check_encoder(config, encoder)
    if config.route_in_prefill and config.layers_to_transform is None:
        without = modules_before_query(base_model, encoder)
    pool = default_pool(base_model, config, dtype, without=without)
    return SLMModel(base_model, config, pool, encoder, tokenizer)
