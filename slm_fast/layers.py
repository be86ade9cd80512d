"""The replaced linear layer, the holder that carries a batch's routing to it, and the surgery on a model."""

import contextlib
from collections.abc import Container
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slm_fast import dispatch, ops
from slm_fast.config import DEFAULT_TARGETS
from slm_fast.cpu_linear import step_routing
from slm_fast.factors import Factors
from slm_fast.pool import KnowledgePool
from slm_fast.resident import Lease, ResidentPool, Slabs
from slm_fast.routing import Routing


class Packing(NamedTuple):
    """Rows side by side in a batch [1, num_tokens, ...]: row b is cu_seqlens[b] : cu_seqlens[b + 1].

    cu_seqlens: [rows + 1] int32, from 0 to num_tokens.
    """

    cu_seqlens: Tensor
    num_tokens: int


class Operands(NamedTuple):
    """How the running batch's mixtures are added to a linear: an op of `ops`, and what it reads.

    op: "fused_linear", whose rank columns are the pool's first `rows` slab rows and whose routing is
    (row_entry, scaling, weights, cu_seqlens); "segment_linear" or "mixture" after the linear, which gather
    the rows' picks: (start, rank, scaling, indices, weights, cu_seqlens).
    """

    op: str
    pool: "KnowledgePool | Slabs"
    routing: tuple
    max_rank: int | None  # None: not gathered

    def slabs(self, linear: "MixtureLinear") -> tuple[Tensor, Tensor]:
        """A and B of a linear."""
        own, pool, _ = linear._shared
        factors = own if self.pool is pool else self.pool.factors[linear.index]
        if self.max_rank is not None:
            return factors.A, factors.B
        rows = self.pool.num_rows
        return factors.A[:rows], factors.B[:rows]


class RoutingState:
    """What a model's layers read: the routing of the running batch, or None for the frozen model.

    With a `ResidentPool` in `resident` a batch takes a lease, and the layers read pool and routing from it.
    """

    def __init__(self) -> None:
        self.routing: Routing | None = None
        self.last_routing: Routing | None = None  # that a `PrefillScope` found
        self.packing: Packing | None = None  # None where all rows have the same number of tokens
        self.resident: ResidentPool | None = None
        self.lease: Lease | None = None
        self.rotation = None  # of the running step, see `cpu_layer`
        self.sharded = False  # whether weights come and go, as in `sharding`
        self._made: dict[str, tuple[tuple, object]] = {}  # from the routing, once for all layers
        self.trainable: list[nn.Parameter] = []  # the base's parameters that patching froze

    def use(self, routing: Routing | None, packing: Packing | None = None) -> "RoutingScope":
        """A context in which the layers see `routing`; what they saw before comes back at its end, always."""
        return RoutingScope(self, routing, packing)

    def set(self, routing: Routing | None, packing: Packing | None = None) -> None:
        """What the layers see from now on; a lease is taken where the factors are resident."""
        lease = None
        if self.resident is not None and routing is not None:
            lease = self.resident.acquire(routing)
        self.routing, self.lease, self.packing, self._made = routing, lease, packing, {}

    def cu_seqlens(self, rows: int, num_tokens: int) -> Tensor | None:
        """Where the routing's rows begin in a batch of `rows` rows, `num_tokens` in all; None: equal parts.

        Raises ValueError on another batch than the routing was made for.
        """
        wanted = self.routing.indices.shape[0]
        if self.packing is None:
            if wanted == 0 or rows % wanted:
                raise ValueError(
                    f"the batch has {rows} rows, which is not a multiple of the routing's {wanted}"
                )
            return None
        if num_tokens != self.packing.num_tokens:
            raise ValueError(f"the batch has {num_tokens} tokens, its packing {self.packing.num_tokens}")
        return self.packing.cu_seqlens

    def operands(
        self, pool: KnowledgePool, x: Tensor, rows: int, out_features: int, plain: bool = True
    ) -> Operands:
        """For a linear, or several at once, at x [tokens, in_features] of a batch of `rows` rows; `plain`:
        one kernel may compute linear and mixture.

        Raises ValueError on another batch than the routing was made for.
        """
        routing = self.routing
        if self.lease is not None:
            pool, routing = self.lease.pool, self.lease.routing
        cu_seqlens, op = self.cu_seqlens(rows, x.shape[0]), "mixture"
        if plain:
            op = dispatch.linear_op(x, routing.indices.shape[0], pool.num_rows, x.shape[1], out_features)
        if op == "fused_linear":
            weights = self.dense(pool.scaling.shape[0])
            return Operands(
                op, pool, (pool.row_entry[: pool.num_rows], pool.scaling, weights, cu_seqlens), None
            )
        gathered = (pool.start, pool.rank, pool.scaling, *routing[:2], cu_seqlens)
        return Operands(op, pool, gathered, pool.max_rank)

    def dense(self, num_entries: int) -> Tensor:
        """The running batch's weights as a matrix [rows, num_entries], made once for all layers."""
        routing = self.routing if self.lease is None else self.lease.routing
        return self._once("dense", (num_entries,), lambda: routing.dense(num_entries))

    def step(self, pool: KnowledgePool, rows: int, num_tokens: int) -> object | None:
        """The running batch's routing as `cpu_linear.LinearGroup` takes it, made once for all layers.

        Raises ValueError on another batch than the routing was made for.
        """
        if self.routing is None:
            return None

        def make():
            entries, picks = (pool.start, pool.rank, pool.scaling), self.routing[:2]
            cu_seqlens = self.cu_seqlens(rows, num_tokens)
            return step_routing(*entries, pool.row_entry.shape[0], *picks, cu_seqlens, num_tokens=num_tokens)

        return self._once("step", (pool.version, rows, num_tokens), make)

    def _once(self, kind: str, made_of: tuple, make) -> object:
        key = (id(self.routing), *made_of)
        if kind not in self._made or self._made[kind][0] != key:
            self._made[kind] = (key, make())
        return self._made[kind][1]


class RoutingScope:
    """See `RoutingState.use`; may be entered again, as checkpointing does when a graph is kept."""

    def __init__(self, state: RoutingState, routing: Routing | None, packing: Packing | None) -> None:
        self.state, self.routing, self.packing = state, routing, packing
        self.previous: list[tuple[Routing | None, Lease | None, Packing | None]] = []

    def __enter__(self) -> None:
        before = self.state.routing, self.state.lease, self.state.packing
        self.state.set(self.routing, self.packing)
        self.previous.append(before)

    def __exit__(self, *exception) -> None:
        state, lease = self.state, self.state.lease
        (state.routing, state.lease, state.packing), state._made = self.previous.pop(), {}
        if lease is not None:
            lease.release()


class MixtureLinear(nn.Module):
    """A frozen linear plus the mixture that the current routing gives to each row.

        y[t] = W x[t] + bias + sum_k weights[b, k] * scaling[i] * B[i] A[i] x[t],   i = indices[b, k]

    The input's first dimension must be a multiple of the routing's rows: beams and return sequences of a row
    share its mixture. With a `Packing` the rows lie side by side in one sequence instead. The pool is
    referenced, not owned, so that the base model's state dict stays its own.
    """

    def __init__(self, base_layer: nn.Module, pool: KnowledgePool, index: int, state: RoutingState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._shared = (pool.factors[index], pool, state)
        self.index = index

    @property
    def factors(self) -> Factors:
        return self._shared[0]

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    def forward(self, x: Tensor, u: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """y, plus `residual` if given.  u: made with x by `ops.silu_mul_shrink`, for the same operands."""
        (factors, pool, state), base_layer = self._shared, self.base_layer
        if state.routing is None:
            return base_layer(x) if residual is None else residual + base_layer(x)
        flat = x.reshape(-1, x.shape[-1])
        mixed = state.operands(pool, flat, x.shape[0], base_layer.out_features, self._plain(flat, pool))
        A, B = mixed.slabs(self)
        settings = {"u": u, "backend": mixed.pool.backend}
        if state.lease is None and torch.is_grad_enabled():
            settings |= {"A_owned": factors.A_owned, "B_owned": factors.B_owned, "owned": factors.owned}
        if mixed.max_rank is not None:
            settings["max_rank"] = mixed.max_rank
        residual = None if residual is None else residual.reshape(len(flat), -1)
        if mixed.op == "mixture":
            y = base_layer(flat)
            y = y if residual is None else residual + y
            flat = flat if flat.dtype == y.dtype else flat.to(y.dtype)
            y = ops.mixture(y, flat, A, B, *mixed.routing, **settings)
        else:
            linear = ops.fused_linear if mixed.op == "fused_linear" else ops.segment_linear
            settings["residual"] = residual
            y = linear(flat, self.weight, self.bias, A, B, *mixed.routing, **settings)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _plain(self, x: Tensor, pool: KnowledgePool) -> bool:
        """Whether one kernel may compute linear and mixture: a frozen dense linear on a GPU."""
        return (
            dispatch.select(x, pool.backend) == "gpu"
            and is_dense(self.base_layer)
            and self.weight.dtype == x.dtype
            and not (torch.is_autocast_enabled(x.device.type) or self.weight.requires_grad)
        )


def is_plain(weight) -> bool:
    """Whether a weight holds numbers where its address says, not packed ones in a tensor class of its own."""
    return type(weight) in (Tensor, nn.Parameter)


def is_dense(module: nn.Module) -> bool:
    """Whether a module is a linear whose weight kernels may read. Others, quantised ones, run as they are."""
    return type(module) is nn.Linear and is_plain(module.weight)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module can get a mixture: it has sizes, and a weight or, as GPTQ's, packed tensors of its own
    under other names."""
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return False
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return hasattr(module, "weight") or len(own) > 0


def target_linears(
    base: nn.Module, target_modules: list[str] | str | None, layers_to_transform: list[int] | None = None
) -> dict[str, nn.Module]:
    """The linears of `base` that get a mixture, by name; see `SLMConfig` for the arguments.

    Raises ValueError when a target matches none, or a layer has none of them.
    """
    found = _targeted(base, target_modules)
    if layers_to_transform is None:
        return found
    indices = {name: layer_index(name) for name in found}
    missing = sorted(set(layers_to_transform) - set(indices.values()))
    if missing:
        known = sorted(index for index in set(indices.values()) if index is not None)
        raise ValueError(
            f"layers_to_transform {missing} match no target linear; there are some in the layers {known}"
        )
    return {name: module for name, module in found.items() if indices[name] in layers_to_transform}


def layer_index(name: str) -> int | None:
    """The first number in a module's dotted name, which is its layer's index for PEFT too."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _targeted(base: nn.Module, target_modules: list[str] | str | None) -> dict[str, nn.Module]:
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    linears = {
        name: module for name, module in base.named_modules() if _is_linear(module) and module is not head
    }
    if target_modules == "all-linear":
        backbone = getattr(base, "base_model", base)
        inside = {id(module) for module in backbone.modules()}
        return {
            name: module for name, module in linears.items() if id(module) in inside and "pooler" not in name
        }
    if target_modules is None:
        target_modules = next((t for t in DEFAULT_TARGETS if _matching(linears, t)), DEFAULT_TARGETS[0])
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    found = {name: module for target in targets for name, module in _matching(linears, target).items()}
    missing = [target for target in targets if not _matching(linears, target)]
    if missing:
        known = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise ValueError(
            f"target_modules {', '.join(missing)} match no linear of the model; it has: {', '.join(known)}"
        )
    return found


def _matching(linears: dict[str, nn.Module], target: str) -> dict[str, nn.Module]:
    return {n: m for n, m in linears.items() if n == target or n.endswith("." + target)}


def replace_linears(base: nn.Module, pool: KnowledgePool, state: RoutingState) -> None:
    """Replace the pool's linears in `base`, in place; `state.use(routing)` selects the mixtures.

    All other parameters are frozen. Raises ValueError when `base` is patched already or lacks a linear of the
    pool's shape; nothing is changed then.
    """
    if any(isinstance(module, MixtureLinear) for module in base.modules()):
        raise ValueError("the model is patched already; call unpatch_model first")
    layers = {}
    for name, shape in pool.modules_shape.items():
        try:
            layer = base.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"the pool was made for another base model: this one has no module {name!r}"
            ) from None
        if (got := (getattr(layer, "in_features", None), getattr(layer, "out_features", None))) != shape:
            raise ValueError(
                f"the pool was made for another base model: {name} is {got} here and {shape} there"
            )
        layers[name] = layer
    if state.resident is not None and state.resident.pool is not pool:
        state.resident = ResidentPool(pool, **state.resident.settings)
    state.trainable = [parameter for parameter in base.parameters() if parameter.requires_grad]
    base.requires_grad_(False)
    pool.to(next(base.parameters()).device)
    for name, layer in layers.items():
        base.set_submodule(name, MixtureLinear(layer, pool, pool.module_index[name], state))


def restore_linears(base: nn.Module) -> None:
    """Put the original linears back, in place, and make trainable again what was so before patching."""
    states = set()
    for name, module in list(base.named_modules()):
        if isinstance(module, MixtureLinear):
            base.set_submodule(name, module.base_layer)
            states.add(module._shared[2])
    for state in states:
        for parameter in state.trainable:
            parameter.requires_grad_(True)


def checkpoint_contexts(state: RoutingState):
    """The `context_fn` of checkpointing: recomputation sees the routing of its own forward pass.

    The forward pass itself gets no scope, at whose end a routing that is found in a layer would be lost.
    """

    def contexts():
        return contextlib.nullcontext(), state.use(state.routing, state.packing)

    return contexts


def module_shapes(linears: dict[str, nn.Module]) -> dict[str, tuple[int, int]]:
    return {name: (module.in_features, module.out_features) for name, module in linears.items()}


def default_pool(
    base: nn.Module, config, dtype: torch.dtype = torch.float32, *, without: Container[str] = ()
) -> KnowledgePool:
    """An empty pool for the linears of `base` that the config targets, but those named in `without`, on which
    queries depend. Raises ValueError where none is left."""
    linears = target_linears(base, config.target_modules, config.layers_to_transform)
    left = {name: module for name, module in linears.items() if name not in without}
    if linears and not left:
        raise ValueError("no target linear lies behind query_layers: choose some that are less deep")
    return KnowledgePool(config, module_shapes(left), dtype=dtype)
