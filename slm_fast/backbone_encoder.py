"""Queries from the frozen base model's own first layers: `encoder="backbone"`, no second model."""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_fast.config import SLMConfig
from slm_fast.encoder import MAX_QUERY_DIM, Encoder, choose_layers
from slm_fast.fast_forward import restore_classes, shared_twin
from slm_fast.layers import MixtureLinear
from slm_fast.loading import load_tokenizer, with_pad_token
from slm_fast.pool import KnowledgePool
from slm_fast.prompts import encode_texts

LAYER_LISTS = ("layers", "encoder.layer", "block")  # of a LLaMA's, a BERT's and a T5's backbone


class BackboneEncoder(Encoder):
    """Turns texts into queries with the first layers of `base`, in eval mode, without any mixture.

        q = concat_l normalise(mean_t normalise(h_l[t])),   h_0: embeddings,   h_l: states after layer l

    Every token counts alike, since a first token's states can be a hundred times as long as the others'. One
    layer alone keeps its mean as it is. Texts go in as they are, without a chat template. A query costs
    `cost`, a share of its text's prefill. The pass runs on a twin that shares the base's parameters and has
    neither its mixtures nor its hooks, so that it may run in a thread beside the model.

    With `in_prefill` texts go in as the base gets them to answer (`prompts.encode_texts`), so that queries
    are those of a `PrefillScope`; of longer texts where they are cut to `max_length` tokens there, too.

    Args:
        base: a LLaMA-, BERT- or T5-like model, patched or not.
        tokenizer: of the base; a copy is used. None loads it by the base's own name.
        query_layers: see `SLMConfig`; "auto": see `auto_layers`.

    Raises ValueError where `base` has no known list of layers, and on first use where a module's forward was
    replaced.
    """

    def __init__(
        self,
        base: nn.Module,
        tokenizer=None,
        *,
        query_layers: list[int] | str = "auto",
        max_length: int = 256,
        batch_size: int = 32,
        in_prefill: bool = False,
    ) -> None:
        super().__init__(query_layers=query_layers, max_length=max_length, batch_size=batch_size)
        self.model, self.name_or_path, self.in_prefill = base, "backbone", in_prefill
        self._tokenizer = None if tokenizer is None else self._private(tokenizer)
        backbone = backbone_of(base)
        config, self.num_layers = backbone.config, len(layer_list(backbone)[1])
        self.layers = self.layers_of(query_layers)
        self._limit_length(config)
        self._frozen: tuple[list[int], nn.Module, dict[int, Tensor]] | None = None  # see `_twin`

    def layers_of(self, query_layers: list[int] | str) -> list[int]:
        hidden_size = backbone_of(self.model).config.hidden_size
        if query_layers == "auto":
            return auto_layers(self.num_layers, hidden_size)
        return choose_layers(query_layers, self.num_layers, hidden_size)

    @property
    def cost(self) -> float:
        """Layers that a query runs through, as a share of the base's."""
        return max(*self.layers, 1) / self.num_layers

    @property
    def tokenizer(self):
        if self._tokenizer is None:
            self._tokenizer = self._private(base_tokenizer(self.model))
        return self._tokenizer

    def settings(self) -> dict:
        """As `Encoder.settings`, with the layers themselves: "auto" may choose others one day."""
        return super().settings() | {"query_layers": self.layers}

    def on(self, base: nn.Module, in_prefill: bool) -> "BackboneEncoder":
        """This encoder, or, for another model or setting than its own, one of those with the same layers."""
        if base is self.model and in_prefill == self.in_prefill:
            return self
        settings = {"query_layers": self.layers, "max_length": self.max_length, "in_prefill": in_prefill}
        return BackboneEncoder(base, self._tokenizer, **settings, batch_size=self.batch_size)

    def keep_in(self, folder: str | Path) -> "Encoder":
        """As `Encoder.keep_in`; raises ValueError with `in_prefill`: a chat template may change queries."""
        if self.in_prefill:
            raise ValueError("queries of prompts (route_in_prefill) are not kept on disk")
        return super().keep_in(folder)

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_frozen": None}

    def _private(self, tokenizer):
        """A copy for a thread of its own, that pads and cuts at the end where texts go in as they are."""
        tokenizer = with_pad_token(copy.deepcopy(tokenizer))
        if not self.in_prefill:
            tokenizer.padding_side = tokenizer.truncation_side = "right"
        return tokenizer

    def _tokenized(self, texts: list[str]) -> dict[str, Tensor]:
        if not self.in_prefill:
            return super()._tokenized(texts)
        return encode_texts(self.model, self.tokenizer, texts, self.max_length, in_prefill=True)

    def pooled(self, states: list[Tensor], attention_mask: Tensor) -> Tensor:
        states = [F.normalize(state.float(), dim=-1) for state in states]
        return super().pooled(states, attention_mask)

    def _hidden_states(self, input_ids: Tensor, attention_mask: Tensor, **_) -> tuple[list[Tensor], Tensor]:
        twin, seen = self._twin()
        device = next(twin.parameters()).device
        input_ids, mask = input_ids.to(device), attention_mask.to(device)
        try:
            with torch.autocast(device.type, enabled=False):
                last = twin(input_ids=input_ids, attention_mask=mask)[0]
            states = [last if layer == self.num_layers else seen[layer] for layer in self.layers]
        finally:
            seen.clear()
        return states, mask

    def _twin(self) -> tuple[nn.Module, dict[int, Tensor]]:
        """The layers that a query needs, and where a pass leaves their states; kept while the base has the
        same tensors."""
        backbone = backbone_of(self.model)
        tensors = [*map(id, backbone.parameters()), *map(id, backbone.buffers())]
        if self._frozen is None or self._frozen[0] != tensors:
            twin, seen = frozen_twin(backbone, max(*self.layers, 1)), {}
            layers = layer_list(twin)[1]
            layers[0].register_forward_pre_hook(lambda _, inputs: seen.update({0: inputs[0]}))
            for index in set(self.layers) - {0}:
                layers[index - 1].register_forward_hook(_keep(seen, index))
            self._frozen = tensors, twin, seen
        return self._frozen[1:]


def _keep(seen: dict[int, Tensor], index: int):
    def hook(module, inputs, output) -> None:
        seen[index] = output[0] if isinstance(output, tuple) else output

    return hook


def backbone_of(base: nn.Module) -> nn.Module:
    """The part of a model that makes hidden states from its input: without a head, of a T5 the encoder."""
    seq2seq = getattr(base.config, "is_encoder_decoder", False)
    return base.get_encoder() if seq2seq else getattr(base, "base_model", base)


def layer_list(backbone: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of a backbone's layers. Raises ValueError where none of the known names is one."""
    for name in LAYER_LISTS:
        found = backbone
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList):
            return name, found
    known = ", ".join(LAYER_LISTS)
    raise ValueError(
        f'encoder="backbone" needs a list of layers ({known}); {type(backbone).__name__} has none'
    )


def frozen_twin(backbone: nn.Module, num_layers: int) -> nn.Module:
    """The first `num_layers` layers of a backbone without mixtures and hooks, in eval mode.

    It shares parameters and buffers, nothing else, with `backbone`, which stays as it is.
    """
    twin, configs = shared_twin(backbone, {}), {}
    name, layers = layer_list(twin)
    twin.set_submodule(name, layers[:num_layers])
    for name, module in list(twin.named_modules()):
        if isinstance(module, MixtureLinear):
            twin.set_submodule(name, module.base_layer)
    restore_classes(twin)
    for module in twin.modules():
        module.training = False
        module.__dict__.update({k: v for k, v in nn.Module().__dict__.items() if k.endswith("hooks")})
        if "config" in module.__dict__:
            module.config = copy.deepcopy(module.config, configs)
            module.config.use_cache = module.config.output_hidden_states = False
            attention = module.config._attn_implementation or ""
            if attention.startswith("paged|"):  # while continuous batching runs
                module.config._attn_implementation = attention.removeprefix("paged|")
    return twin


def auto_layers(num_layers: int, hidden_size: int) -> list[int]:
    """Three layers, evenly spaced up to the middle one, or the fourth if that is deeper; fewer where a query
    would exceed 4,096 values.

    Of what `benchmarks/bench_layers.py` measured, on SmolLM2-135M and MiniLM, the best within a standard
    error. Embeddings and last layers add nothing; a third of the layers loses one to three points.
    """
    depth = min(max(math.ceil(num_layers / 2), 4), num_layers)
    count = min(3, depth, max(MAX_QUERY_DIM // hidden_size, 1))
    return [math.ceil(depth * i / count) for i in range(1, count + 1)]


def base_tokenizer(base: nn.Module):
    """The tokenizer of a base model's own name. Raises ValueError where it brings none."""
    name = getattr(base.config, "_name_or_path", "")
    try:
        return load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"the base model {name!r} brings no tokenizer: pass tokenizer= ({error})") from error


def separation(
    queries: dict[str, Tensor], config: SLMConfig | None = None, folds: int = 4
) -> dict[str, float]:
    """How well queries tell tasks apart: the share of each task's that are routed to it, one at a time.

    queries: {task: [N, D]} of training texts in random order. Each of `folds` parts is routed by keys and
    statistics of the other parts. Raises ValueError where those are fewer than a task's keys.
    """
    config, parts = config or SLMConfig(), {task: query.chunk(folds) for task, query in queries.items()}
    correct = dict.fromkeys(queries, 0)
    for fold in range(folds):
        kept = {task: torch.cat(part[:fold] + part[fold + 1 :]) for task, part in parts.items()}
        pool = KnowledgePool.of_queries(config, kept)
        for task, part in parts.items():
            mass, names = pool.task_mass(pool.search(part[fold]))
            correct[task] += int((mass.argmax(-1) == names.index(task)).sum())
    return {task: count / len(queries[task]) for task, count in correct.items()}
