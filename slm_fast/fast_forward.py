"""The fast path of LLaMA-like models: `patch_model`, `unpatch_model`, `fast_forward`.

A patched model keeps its modules, parameters, signature, outputs, caches and `generate`; `forward` and
`generate` also take `texts=`, `embeddings=`, `routing=` or `adapter_names=`, one item for each row. Its
targeted linears become `MixtureLinear`s; the linears of its decoder layers run fused:

    q, k, v = linears(rms_norm(x));  x = x + o_proj(attention(rope(q), rope(k), v))
    gate, up = linears(rms_norm(x));  x = x + down_proj(silu(gate) * up)

with every row's mixture added inside: on the CPU when decoding (and in prefill, in bf16 on processors with
AMX) as two calls that read the weights once (`cpu_layer`), on a GPU as five products with shared rank-space
vectors (`gpu_layer`). Attention, cache and mask are transformers' own. Whatever this path does not know
(training, hooks on inner modules, other attention functions) goes through the layer's own forward, with the
same mixtures.
"""

import contextlib
import copy
import functools
import inspect
import os
import weakref

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slm_fast import dispatch
from slm_fast.cpu_layer import CpuLayer
from slm_fast.cpu_linear import LinearGroup
from slm_fast.gpu_layer import GpuLayer
from slm_fast.huge_pages import to_huge_pages
from slm_fast.layers import MixtureLinear, RoutingState, is_dense, is_plain, replace_linears, restore_linears
from slm_fast.pool import KnowledgePool
from slm_fast.router import SOURCES, Router, rows_of
from slm_fast.step_graphs import CACHE_NAMES, StepGraphs

# Layers whose forward is the one above. Their attentions differ in what they pass on beside it.
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
MOST_TOKENS = 64  # of a step that is bound by the bytes of the weights; PyTorch is faster on more
UNHEARD = ("output_capturing_hook", "slm_fast_query_hook")  # hooks that change nothing


def patch_model(
    base: nn.Module, pool: KnowledgePool, state: RoutingState | None = None, *, encoder=None
) -> RoutingState:
    """Give `base` the pool's mixtures, in place: `base(..., texts=[...])`, `base.generate(..., routing=...)`.

    Without such an argument the rows get what `use(routing)` of the returned state says, by default nothing:
    the frozen model. `encoder` embeds `texts=`, see `get_slm_model`; by default the one that the pool's
    config names. "backbone" loads the tokenizer by the base's name; a `BackboneEncoder` brings its own. All
    parameters are frozen. Quantised linears (quantise first, then patch) keep their own kernels and get the
    mixture added. On the CPU the parameters of decoder layers and head move to huge pages
    (`SLM_FAST_HUGE_PAGES=0` leaves them where they are). Raises ValueError when `base` is patched already or
    lacks a linear of the pool's shape; nothing is changed then.
    """
    state = RoutingState() if state is None else state
    replace_linears(base, pool, state)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    for module in base.modules():
        if type(module).__name__ in LAYERS:
            module.__class__ = _fast_class(FastDecoderLayer, type(module))
            module.fast = FastPath(pool, state)
    if is_dense(head) and any(isinstance(module, FastDecoderLayer) for module in base.modules()):
        head.__class__ = _fast_class(FastHead, nn.Linear)
        head.fast = FastPath(pool, state)
    fast = [module for module in base.modules() if isinstance(module, FastDecoderLayer | FastHead)]
    to_huge_pages([parameter for module in fast for parameter in module.parameters()])
    base.__class__ = _fast_class(FastModel, type(base))
    base.mixtures = state, Router(pool, encoder, base)
    return state


def unpatch_model(base: nn.Module) -> nn.Module:
    """Put the original linears and layers back, in place, and make trainable again what was so before."""
    restore_classes(base)
    restore_linears(base)
    return base


def restore_classes(base: nn.Module) -> None:
    """Give the modules that `patch_model` swapped the classes that they had before, in place."""
    for module in base.modules():
        if isinstance(module, Swapped):
            module.__class__ = type(module).original
            for name in ("fast", "mixtures", "graphs", "cuda_graphs"):
                module.__dict__.pop(name, None)


def fast_forward(model: nn.Module, *args, pool: KnowledgePool | None = None, encoder=None, **kwargs):
    """`model(*args, **kwargs)` with every row's mixture, whether the model is patched or not.

    Takes what a patched model's forward takes. A model that is not patched stays as it is: a twin that
    shares its parameters is patched with `pool` instead, and kept for the next call.
    Raises ValueError when `model` is not patched and `pool` is missing, or is patched with another pool.
    """
    if isinstance(model, FastModel):
        if pool is not None and pool is not model.mixtures[1].pool:
            raise ValueError("the model is patched with another pool")
        return model(*args, **kwargs)
    if pool is None:
        raise ValueError("the model is not patched: pass pool=, or call patch_model(model, pool) first")
    tensors = [*map(id, model.parameters()), *map(id, model.buffers())]
    known = _twins.get(model)
    if known is None or known[0] is not pool or known[1] != tensors:
        twin = shared_twin(model, {})
        trainable = [p for p in model.parameters() if p.requires_grad]
        patch_model(twin, pool, encoder=encoder)
        for parameter in trainable:  # of the caller's model
            parameter.requires_grad_(True)
        known = _twins[model] = pool, tensors, twin
    twin = known[2]
    if twin.training != model.training:
        twin.train(model.training)
    return twin(*args, **kwargs)


_twins: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()


def shared_twin(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of the tree of modules that holds the same parameters and buffers.

    Raises ValueError where a module's forward was replaced.
    """
    if "forward" in module.__dict__:
        raise ValueError(
            f"the forward of a {type(module).__name__} was replaced from outside; its twin would miss that"
        )
    if module not in made:
        twin = made[module] = copy.copy(module)
        twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        children = module._modules.items()
        twin._modules = {
            name: child if child is None else shared_twin(child, made) for name, child in children
        }
    return made[module]


@functools.cache
def _fast_class(mixin: type, original: type) -> type:
    """`original` with the mixin's forward. It keeps its name, by which transformers finds things."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    names |= {"mixin": mixin, "original": original}
    if mixin is FastModel:
        names["forward"] = _routed_forward(original)
    return type(original.__name__, (mixin, original), names)


def _rebuilt(mixin: type, original: type) -> nn.Module:
    cls = _fast_class(mixin, original)
    return cls.__new__(cls)


class Swapped:
    """What `_fast_class` puts in front of a module's own class, its `original`."""

    mixin: type
    original: type

    def __reduce_ex__(self, protocol):
        return _rebuilt, (self.mixin, self.original), self.__dict__


def _routed_forward(original: type):
    """`original.forward` that also takes the arguments that route rows, as its signature says."""

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        with self.routed(args, kwargs):
            return original.forward(self, *args, **kwargs)

    parameters = list(inspect.signature(original.forward).parameters.values())
    rest = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in SOURCES]
    forward.__signature__ = inspect.Signature(parameters + added + rest)
    return forward


class FastModel(Swapped):
    """A patched model; its `forward` is made by `_routed_forward`.

    With a static cache on a GPU `generate` decodes with CUDA graphs, see `step_graphs`, where transformers
    would compile the step: not with a `compile_config`, hooks on modules, or layers of a sliding window.
    `cuda_graphs = False` on the model or SLM_FAST_CUDA_GRAPHS=0 leaves it to transformers.
    """

    mixtures: tuple[RoutingState, Router]
    cuda_graphs = True
    graphs: StepGraphs | None = None

    def __reduce_ex__(self, protocol):
        made, of, state = super().__reduce_ex__(protocol)
        return made, of, {name: value for name, value in state.items() if name != "graphs"}

    def routed(self, args: tuple, kwargs: dict):
        """The scope of a forward pass, whose routing arguments are taken out of `kwargs`; `rows_of` says what
        the rows are. Packed sequences get no cache unless told: transformers keeps them apart only then."""
        sources = {name: kwargs.pop(name, None) for name in SOURCES}
        (state, router), packed = self.mixtures, kwargs.get("cu_seq_lens_q") is not None
        if packed and "use_cache" in inspect.signature(self.original.forward).parameters:
            kwargs.setdefault("use_cache", False)
        if all(value is None for value in sources.values()):
            if not packed or state.routing is None or state.packing is not None:
                return contextlib.nullcontext()
            sources["routing"] = state.routing
        rows, packing = rows_of(args, kwargs)
        return state.use(router.resolve(rows, next(self.parameters()).device, **sources), packing)

    def generate(self, *args, **kwargs):
        """transformers' `generate`; beams and return sequences of a row share its mixture."""
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("generate takes no packed sequences (cu_seq_lens_q): pad the rows instead")
        with torch.no_grad(), self.routed(args, kwargs):
            out = super().generate(*args, **kwargs)
        if self.graphs is not None and isinstance(out, dict):
            for name in CACHE_NAMES:
                self.graphs.caches.give(out.get(name))
        return out

    def get_compiled_call(self, compile_config):
        """What `generate` decodes with."""
        graphs = self._step_graphs() if compile_config is None else None
        return super().get_compiled_call(compile_config) if graphs is None else graphs.begin()

    def _prepare_static_cache(self, *args, **kwargs):
        cache, graphs = super()._prepare_static_cache(*args, **kwargs), self._step_graphs()
        if graphs is not None:
            graphs.caches.prepare(cache)
        return cache

    def _step_graphs(self) -> StepGraphs | None:
        if not self.cuda_graphs or os.environ.get("SLM_FAST_CUDA_GRAPHS") == "0" or not StepGraphs.fits(self):
            self.graphs = None  # and its memory
        elif self.graphs is None:
            self.graphs = StepGraphs(self)
        return None if hooked(tuple(self.modules())) else self.graphs

    def generate_batch(self, *args, **kwargs):
        """transformers' continuous batching of the frozen model; an `SLMModel` has it with mixtures."""
        given = [name for name in SOURCES if kwargs.get(name) is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: continuous batching with mixtures needs an SLMModel")
        return super().generate_batch(*args, **kwargs)


class FastPath:
    """What a fast module needs beside its own weights. What it runs with is made when first needed."""

    def __init__(self, pool: KnowledgePool, state: RoutingState) -> None:
        self.pool, self.state = pool, state
        self.made: dict[str, object] = {}  # by backend; None where the module is not one for it

    def __getstate__(self) -> dict:
        return {"pool": self.pool, "state": self.state, "made": {}}  # it holds addresses

    def backend(self, x: Tensor) -> str | None:
        """Which path x [rows, tokens, features] may take: "gpu", or "cpu" when decoding and where that is the
        fastest prefill too. None: the module's own forward."""
        learning = torch.is_grad_enabled() and (x.requires_grad or self.pool.owner is not None)
        if learning or self.state.sharded or torch.is_autocast_enabled(x.device.type):
            return None
        backend = dispatch.select(x, self.pool.backend)
        if backend == "gpu":
            return backend
        few = x.shape[0] * x.shape[1] <= MOST_TOKENS or self.has_tiles(x.dtype)
        # groups of linears read the pool itself, whatever a lease holds
        return backend if backend == "cpu" and few and self.state.lease is None else None

    def has_tiles(self, dtype: torch.dtype) -> bool:
        """Whether weights and factors are multiplied on AMX tiles, at any number of tokens."""
        factors = self.pool.factors[0].A.dtype if self.state.routing is not None else dtype
        return dtype is factors is torch.bfloat16 and dispatch.has_tiles()


def hooked(modules: tuple[nn.Module, ...]) -> bool:
    """Whether somebody listens to one of the modules. What transformers leaves on attentions to record their
    weights does not count: the attention function of this path has none to give. Nor does `PrefillScope`,
    which is gone before the first step of decoding."""
    for module in modules:
        if module._forward_pre_hooks or module._forward_hooks:
            hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            if any(getattr(hook, "__name__", "") not in UNHEARD for hook in hooks):
                return True
    return False


class FastDecoderLayer(Swapped):
    """A decoder layer whose linears run as `CpuLayer` or `GpuLayer` say."""

    fast: FastPath

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        compiling = torch.compiler.is_compiling()
        linears = None if compiling or args else self._linears(hidden_states, kwargs)
        if linears is None:
            return super().forward(hidden_states, *args, **kwargs)
        shape, attention = hidden_states.shape, self.self_attn
        x = hidden_states.reshape(-1, shape[-1]).contiguous()
        parts, step = linears.heads(x, shape[0], *kwargs["position_embeddings"])
        heads = (*shape[:2], -1, attention.head_dim)
        q, k, v = (part.view(heads).transpose(1, 2) for part in parts)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None:
            k, v = updated(cache, k, v, attention.layer_idx, kwargs)
        attend, mask = ALL_ATTENTION_FUNCTIONS["sdpa"], kwargs.get("attention_mask")
        mixed, _ = attend(attention, q, k, v, mask, dropout=0.0, scaling=attention.scaling)
        return linears.tail(mixed.reshape(x.shape[0], -1).contiguous(), x, step).view(shape)

    def _linears(self, x: Tensor, kwargs: dict) -> CpuLayer | GpuLayer | None:
        """What runs the linears of this call; None: the layer's own forward."""
        backend = self.fast.backend(x)
        if backend is None:
            return None
        if backend not in self.fast.made:
            self._build(backend)
        linears = self.fast.made[backend]
        if linears is None or (any(self.fast.hooks) and hooked(self.fast.inner)):
            return None
        cos, _ = kwargs.get("position_embeddings") or (None, None)
        fits = (
            cos is not None
            and cos.dtype is x.dtype is linears.dtype
            and cos.shape[-1] == self.self_attn.head_dim
            and self.self_attn.config._attn_implementation == "sdpa"
            and not kwargs.get("output_attentions")
            and not (torch.is_grad_enabled() and any(w.requires_grad for w in self.fast.weights))
        )
        return linears if fits else None

    def _build(self, backend: str) -> None:
        attention, mlp = self.self_attn, self.mlp
        norms = self.input_layernorm, self.post_attention_layernorm
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        linears += (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        bases = tuple(m.base_layer if isinstance(m, MixtureLinear) else m for m in linears)
        inner = self.fast.inner = (attention, mlp, mlp.act_fn, *norms, *linears, *bases)
        self.fast.hooks = [h for m in inner for h in (m._forward_pre_hooks, m._forward_hooks)]
        self.fast.weights = [p for module in (*bases, *norms) for p in module.parameters()]
        plain = all(is_dense(base) for base in bases) and len({p.dtype for p in self.fast.weights}) == 1
        stacked = bases[:3], bases[4:6]  # those have a bias each, or none
        plain = plain and all(len({base.bias is None for base in group}) == 1 for group in stacked)
        made = None
        if plain and type(mlp.act_fn).__name__.startswith("SiLU"):
            made = {"cpu": CpuLayer, "gpu": GpuLayer}[backend](
                attention, mlp, norms, self.fast.pool, self.fast.state
            )
        self.fast.made[backend] = made


class FastHead(Swapped):
    """The output embedding, without a mixture."""

    fast: FastPath

    def forward(self, x: Tensor) -> Tensor:
        if (
            torch.compiler.is_compiling()
            or x.dim() != 3
            or x.dtype != self.weight.dtype
            or not is_plain(self.weight)
            or self.fast.backend(x) != "cpu"
        ):
            return super().forward(x)
        if "cpu" not in self.fast.made:
            self.fast.made["cpu"] = LinearGroup([(self.weight, self.bias, None)])
        (y,) = self.fast.made["cpu"](x.reshape(-1, x.shape[-1]).contiguous())
        return y.view(*x.shape[:-1], -1)


@functools.cache
def _update_takes(cache_class: type) -> str:
    parameters = inspect.signature(cache_class.update).parameters
    if "cache_kwargs" in parameters:
        return "cache_kwargs"
    takes = "kwargs" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return "kwargs" if takes else ""


def updated(cache, k: Tensor, v: Tensor, layer_idx: int, kwargs: dict) -> tuple[Tensor, Tensor]:
    """All keys and values so far; releases of transformers differ in what else a cache wants to know."""
    takes = _update_takes(type(cache))
    if takes == "cache_kwargs":
        cos, sin = kwargs["position_embeddings"]
        known = {"sin": sin, "cos": cos, "cache_position": kwargs.get("cache_position")}
        return cache.update(k, v, layer_idx, known)
    return cache.update(k, v, layer_idx, **({"kwargs": kwargs} if takes == "kwargs" else {}))
