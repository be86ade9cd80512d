"""Routing in the prefill, `SLMConfig.route_in_prefill`: the pass that answers a batch makes its queries too.

    h_1 .. h_D: states after the first layers, which have no mixture;   D: the deepest of the encoder's layers
    q = the query that a `BackboneEncoder` makes of such states;   routing = pool.search(q)
    h_{D+1} ..: the other layers, with every row's mixture

So a row's routing is the one that the encoder gives its text where both get the same tokens (see
`prompts.encode_texts`), up to rounding, and costs no more than pooling and search. In training mode the
states, and so the query, have the base's dropout.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slm_fast.backbone_encoder import BackboneEncoder, backbone_of, layer_list
from slm_fast.config import SLMConfig
from slm_fast.encoder import Encoder
from slm_fast.layers import RoutingScope, RoutingState
from slm_fast.pool import KnowledgePool

REMEDY = "say how to route the rows instead: texts=[...], embeddings=, routing= or adapter_names=[...]"


class PrefillScope(RoutingScope):
    """A context whose first pass through the base routes its rows; what runs in it afterwards keeps that.

    The query's layers run without a mixture and are listened to by hooks, which go when the deepest one has
    run. Then the layers see the routing, and so does `state.last_routing`, until the context ends. Beams and
    return sequences of a decoder are rows of the prefill: they are equal, and so are their routings. With
    mixing="batch" the scores are averaged over the rows of the pass.

    Args: task: as in `SLMModel.route`; one for each row goes to all of its beams.  num_tokens: of every row,
    padding included.  attention_mask: [rows, tokens], for passes that get it in another form only (`generate`
    with a static cache); a pass that has none has no padding.
    Raises ValueError inside a compiled graph, on a pass that reads only a part of its rows, or none of them.
    """

    def __init__(
        self,
        state: RoutingState,
        pool: KnowledgePool,
        encoder: BackboneEncoder,
        *,
        task: str | Sequence[str | None] | None = None,
        num_tokens: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> None:
        super().__init__(state, None, None)
        if torch.compiler.is_compiling():
            raise ValueError(f"a compiled graph cannot route in the prefill; {REMEDY}")
        for name in [task] if isinstance(task, str) else task or ():
            if name is not None:
                pool.task(name)
        self.pool, self.encoder, self.task = pool, encoder, task
        self.num_tokens, self.attention_mask = num_tokens, attention_mask
        self.backbone = backbone_of(encoder.model)
        self.layers = layer_list(self.backbone)[1]
        self._seen: dict[int, Tensor] = {}
        self._hooks: list = []

    def __enter__(self) -> "PrefillScope":
        super().__enter__()
        self.state.last_routing = None
        begin = self.backbone.register_forward_pre_hook(self._listener("begin"), with_kwargs=True)
        self._hooks.append(begin)
        for layer in set(self.encoder.layers):
            if layer == 0:
                hook = self.layers[0].register_forward_pre_hook(self._listener(layer), with_kwargs=True)
            else:
                module = self.backbone if layer == len(self.layers) else self.layers[layer - 1]
                hook = module.register_forward_hook(self._listener(layer), with_kwargs=True)
            self._hooks.append(hook)
        return self

    def __exit__(self, *exception) -> None:
        self._stop_listening()
        super().__exit__(*exception)
        if self.routing is None and exception[0] is None:
            raise ValueError(f"the layers of the query did not run: nothing was routed; {REMEDY}")

    def _listener(self, layer: int | str):
        """A hook, in front of a module or behind it. `fast_forward.hooked` knows it by its name."""

        def slm_fast_query_hook(module, args, kwargs, output=None) -> None:
            if layer == "begin":
                names = inspect.signature(module.forward).parameters
                self._begin(dict(zip(names, args, strict=False)) | kwargs)
                return
            state = (args or [kwargs["hidden_states"]]) if output is None else output
            self._seen[layer] = state if isinstance(state, Tensor) else state[0]
            if layer == max(self.encoder.layers):
                self._route()

        return slm_fast_query_hook

    def _stop_listening(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._seen = {}

    def _begin(self, inputs: dict) -> None:
        """Look at what the backbone is called with."""
        cache = inputs.get("cache", inputs.get("past_key_values"))
        if cache is not None and int(cache.get_seq_length()):
            raise ValueError(f"the cache holds a part of the rows, which no query is read from; {REMEDY}")
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.attention_mask = mask
        elif mask is not None and self.attention_mask is None:
            raise ValueError("routing in the prefill needs attention_mask= [rows, tokens]")

    @torch.no_grad()
    def _route(self) -> None:
        states = [self._seen[layer] for layer in self.encoder.layers]
        self._stop_listening()
        rows, tokens = states[0].shape[:2]
        if self.num_tokens not in (None, tokens):
            raise ValueError(
                f"the first pass has {tokens} tokens of a row, the batch {self.num_tokens}: in chunks or "
                f"with guessed tokens it reads no row as it is; {REMEDY}"
            )
        mask, device = self.attention_mask, states[0].device
        if mask is None:
            mask = torch.ones(rows, tokens, device=device)
        elif rows % max(len(mask), 1) == 0:
            mask = mask.repeat_interleave(rows // max(len(mask), 1), 0).to(device)
        if mask.shape != (rows, tokens):
            raise ValueError(
                f"attention_mask is {list(mask.shape)}, the pass has {rows} rows of {tokens} tokens"
            )
        task = self.task
        if task is not None and not isinstance(task, str) and rows % max(len(task), 1) == 0:
            task = [name for name in task for _ in range(rows // len(task))]
        with torch.autocast(device.type, enabled=False):
            query = self.encoder.pooled(states, mask)
            self.routing = self.pool.search(query, task).to(device)
        self.state.set(self.routing)
        self.state.last_routing = self.routing


def modules_before_query(base: nn.Module, encoder: BackboneEncoder) -> set[str]:
    """Names of the modules of `base` that a query may depend on: all of the backbone, whose layers they are,
    but those behind the deepest of the encoder's layers. The decoder of an encoder-decoder model is none."""
    backbone = backbone_of(base)
    behind = {id(m) for layer in layer_list(backbone)[1][max(encoder.layers) :] for m in layer.modules()}
    before = {id(module) for module in backbone.modules()} - behind
    return {name for name, module in base.named_modules() if id(module) in before}


def check_encoder(config: SLMConfig, encoder: Encoder) -> None:
    """Raise ValueError where an encoder does not make its queries of what `route_in_prefill` says."""
    if config.route_in_prefill and not isinstance(encoder, BackboneEncoder):
        raise ValueError(
            'route_in_prefill needs encoder="backbone", whose queries are states of the base itself, got '
            f"{encoder.name_or_path or type(encoder).__name__!r}"
        )
    if config.route_in_prefill != encoder.in_prefill:
        raise ValueError(
            f"route_in_prefill is {config.route_in_prefill}, but the encoder was made with "
            f"in_prefill={encoder.in_prefill}"
        )


def check_prefill(config: SLMConfig, base: nn.Module, encoder: Encoder, names: Sequence[str]) -> None:
    """Raise ValueError where `route_in_prefill` cannot be had: with this encoder, or since one of the linears
    that get a mixture, by name, would change queries."""
    check_encoder(config, encoder)
    if not config.route_in_prefill:
        return
    if encoder.model is not base:
        raise ValueError("route_in_prefill needs the encoder of this base model, not of another")
    before = modules_before_query(base, encoder)
    wrong = [name for name in names if name in before]
    if wrong:
        raise ValueError(
            f"route_in_prefill reads the query in front of layer {max(encoder.layers)}: no linear before may "
            f"have a mixture, but {wrong[0]} would ({len(wrong)} of {len(names)}). Leave layers_to_transform "
            "out, give later layers, or query_layers that are less deep"
        )
