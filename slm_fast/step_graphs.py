"""Decoding steps as CUDA graphs: what transformers' `generate` calls where it would compile them.

A graph is captured for a bucket of batch rows over a static cache. What differs between two steps is copied
into tensors that the graph reads: the model's tensor inputs and every row's routing. So a graph serves all
batches of its bucket, whatever their mixtures; rows that the batch lacks are copies of its first row.

The keys and values lie in memory that is kept from one `generate` to the next, of one batch at a time. A
cache that `generate` returns takes its values along; a `StaticCache` that the caller made is used where it
is. Graphs are captured again when what they hold as constants changes (the addresses and sizes of the pool's
slabs, the model's weights), never because a routing does. Whatever a graph cannot hold runs as an ordinary
call of the model: prompts, packed rows, training, entries beyond a resident pool's slots.
"""

import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.cache_utils import Cache, StaticCache

from slm_fast.kept_cache import CacheMemory, KeptCaches, bucket_of, is_plain_cache
from slm_fast.layers import RoutingState, is_plain
from slm_fast.resident import Lease, Slabs
from slm_fast.router import SOURCES
from slm_fast.routing import Routing

logger = logging.getLogger(__name__)

WARM_UPS = 2  # calls before a capture: kernels compile, libraries allocate their workspaces
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)  # among the inputs of a step
CACHE_NAMES = ("cache", "past_key_values")


class CudaGraph:
    """The launches of `run()`, recorded once. `replay` repeats them, and `outputs` hold what they wrote.

    `run` is called before it is recorded, each time followed by `undo`. `share`: a graph whose memory this
    one may use too; the two must not run at once, and what one wrote is gone when the other runs.
    """

    def __init__(
        self,
        run: Callable,
        undo: Callable[[], None],
        device: torch.device,
        share: "CudaGraph | None" = None,
    ) -> None:
        self.graph, pool = torch.cuda.CUDAGraph(), None if share is None else share.graph.pool()
        with torch.cuda.device(device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UPS):
                        run()
                        undo()
            finally:
                current.wait_stream(stream)
            # other threads, such as the one that routes the next batch, may go on meanwhile
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.outputs = run()

    def replay(self) -> None:
        self.graph.replay()


class Step:
    """A graph of one decoding step and the tensors that it reads, `rows` rows each.

    tensors: {path: input}, those with a row for each of the batch's `count` rows padded to `rows`.
    constants: {path: value}.  routing: the batch's, whose rows are shared by `count` / its rows of the batch.
    """

    def __init__(
        self, rows: int, count: int, tensors: dict, constants: dict, routing: Routing | None
    ) -> None:
        def static(tensor: Tensor, padded: bool) -> Tensor:
            shape = (rows, *tensor.shape[1:]) if padded else tensor.shape
            return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)

        self.rows, self.count, self.used = rows, 0, 0
        self.padded = [_by_row(tensor, count) for tensor in tensors.values()]
        self.statics = [static(*pair) for pair in zip(tensors.values(), self.padded, strict=True)]
        self.routing = None if routing is None else Routing(*(static(t, True) for t in routing))
        self.loaded: tuple[Routing, list[int]] | None = None
        self.inputs = _nested(constants | dict(zip(tensors, self.statics, strict=True)))
        self.graph = self.leaves = self.form = None  # see `hold`

    def load(self, count: int, tensors: dict, routing: Routing | None) -> None:
        """Copy a step's inputs to where the graph reads them; the routing only if it is another."""
        known = self.count == count and self._is_loaded(routing)
        if not known:
            self.count = count
            pairs = list(zip(self.statics, self.padded, strict=True))
            self.targets = [static[:count] if padded else static for static, padded in pairs]
            for (static, padded), value in zip(pairs, tensors.values(), strict=True):
                if padded and count < self.rows:
                    static[count:] = value[:1]
            if routing is not None:
                shared = routing.repeat_interleave(count // routing.num_rows)
                for static, value in zip(self.routing, shared, strict=True):
                    static[:count] = value
                    static[count:] = value[:1]
                self.loaded = routing, _versions(routing)
        torch._foreach_copy_(self.targets, list(tensors.values()))

    def _is_loaded(self, routing: Routing | None) -> bool:
        if routing is None or self.loaded is None:
            return routing is None
        before, versions = self.loaded
        return before is routing and versions is not None and versions == _versions(routing)

    def hold(self, graph: CudaGraph) -> None:
        self.graph = graph
        self.leaves, self.form = tree_flatten(graph.outputs, is_leaf=lambda part: isinstance(part, Cache))

    def outputs(self, cache: StaticCache):
        """What the model returns for the batch that was replayed, in tensors of its own."""
        found = []
        for leaf in self.leaves:
            if isinstance(leaf, Tensor):
                leaf = (leaf[: self.count] if _by_row(leaf, self.rows) else leaf).clone()
            found.append(cache if isinstance(leaf, Cache) else leaf)
        return tree_unflatten(found, self.form)


def _by_row(tensor: Tensor, rows: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == rows


def _versions(routing: Routing) -> list[int] | None:
    """Counts of in-place writes; None where tensors do not count them."""
    return None if any(t.is_inference() for t in routing) else [t._version for t in routing]


def _flat(inputs: dict, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
    for name, value in inputs.items():
        if type(value) is dict:
            yield from _flat(value, (*path, name))
        else:
            yield (*path, name), value


def _nested(flat: dict[tuple, object]) -> dict:
    inputs = {}
    for (*path, name), value in flat.items():
        functools.reduce(lambda part, key: part.setdefault(key, {}), path, inputs)[name] = value
    return inputs


class StepGraphs:
    """The graphs of a patched model, called as the model is: `generate` asks for it by `begin`.

    Graphs share their memory, so steps must not run on two streams at once. At most `most` are held.
    """

    devices = ("cuda",)  # types of those that have graphs
    graph_class = CudaGraph
    most = 32

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.caches = KeptCaches()
        self._held: dict[str, tuple] = {}  # constants of the graphs, by what rows are mixed from
        self._checked: dict[str, tuple] = {}
        self._failed: set[tuple] = set()
        self._clock = itertools.count(1)

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether a model's static caches and its devices are such as graphs can be made for."""
        config = model.config.get_text_config(decoder=True)
        return (
            {parameter.device for parameter in model.parameters()} == {model.device}
            and model.device.type in cls.devices
            and not getattr(model.config, "is_encoder_decoder", False)
            and not any(_is_replaced(module) for module in model.modules())
            and is_plain_cache(StaticCache(config=config, max_cache_len=1))
        )

    def begin(self) -> "StepGraphs":
        """For one `generate`: what graphs hold as constants is compared again."""
        self.caches.wanted, self._checked = True, {}
        return self

    def __call__(self, *args, **inputs):
        """`model(...)`, from a graph where that is possible."""
        model = self._model()
        if len(args) == 1 and "input_ids" not in inputs:
            args, inputs = (), {"input_ids": args[0]} | inputs
        cached = [name for name in CACHE_NAMES if isinstance(inputs.get(name), Cache)]
        if len(cached) == 1 and not args and self._admits(model, inputs):
            cache = inputs.pop(cached[0])
            step = self._loaded_step(model, cached[0], cache, inputs)
            if step is not None:
                step.graph.replay()
                return step.outputs(cache)
            inputs[cached[0]] = cache
        return model(*args, **inputs)

    def _admits(self, model: nn.Module, inputs: dict) -> bool:
        """Whether a call is a decoding step of a batch whose routing graphs can read."""
        state, router = model.mixtures
        tokens = [inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None]
        return (
            len(tokens) == 1
            and tokens[0].shape[1] == 1
            and not (torch.is_grad_enabled() or model.training or router.pool.owner is not None)
            and not torch.is_autocast_enabled(tokens[0].device.type)
            and all(inputs.get(name) is None for name in (*SOURCES, "cu_seq_lens_q"))
            and state.packing is None
            and (state.lease is None or state.lease.pool is state.resident.slabs)
        )

    def _loaded_step(self, model: nn.Module, cache_name: str, cache: Cache, inputs: dict) -> Step | None:
        """The step's graph with its inputs in place; None: it has to run as an ordinary call."""
        state, router = model.mixtures
        source, routing = router.pool, state.routing
        if state.lease is not None:
            source, routing = state.lease.pool, state.lease.routing
        kind = "frozen" if routing is None else "pool" if state.lease is None else "resident"
        flat = dict(_flat(inputs))
        tensors = {path: value for path, value in flat.items() if isinstance(value, Tensor)}
        constants = {path: value for path, value in flat.items() if path not in tensors}
        ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        count = ids.shape[0]
        positions = tensors.get(("position_ids",))
        if (
            any(type(value) not in CONSTANTS for value in constants.values())
            or {t.device for t in (*tensors.values(), *(routing or ()))} != {model.device}
            or (positions is not None and positions.dim() > 2)  # rows are not their first dimension
            or (routing is not None and (routing.num_rows == 0 or count % routing.num_rows))
        ):
            return None
        memory = self.caches.find(cache, count)
        if memory is None or memory.lent[0][0].device != model.device:
            return None
        self._check(model, kind, source, router.pool.version)
        rows = min(bucket_of(count), memory.rows)
        shapes = tuple(
            (path, t.dtype, t.shape[1:] if _by_row(t, count) else t.shape, _by_row(t, count))
            for path, t in tensors.items()
        )
        picks = None if routing is None else routing.indices.shape[1]
        key = (kind, rows, memory.length, picks, cache_name, shapes, tuple(constants.items()))
        if key in self._failed:
            return None
        step = memory.graphs.get(key)
        if step is None:
            with torch.inference_mode(memory.lent[0][0].is_inference()), torch.no_grad():
                step = Step(rows, count, tensors, constants, routing)
                step.load(count, tensors, routing)
                lease = None if state.lease is None else Lease(source, step.routing, [], None)
                if not self._capture(model, state, lease, step, memory, cache_name):
                    self._failed.add(key)
                    return None
            self._make_room()
            memory.graphs[key] = step
        else:
            step.load(count, tensors, routing)
        step.used = next(self._clock)
        return step

    def _capture(
        self,
        model: nn.Module,
        state: RoutingState,
        lease: Lease | None,
        step: Step,
        memory: CacheMemory,
        cache_name: str,
    ) -> bool:
        cache, undo = memory.first(step.rows), memory.keep_lengths()

        def run():
            before = state.routing, state.lease, state._made
            state.routing, state.lease, state._made = step.routing, lease, {}
            try:
                return model(**step.inputs, **{cache_name: cache})
            finally:
                state.routing, state.lease, state._made = before

        others = (other.graph for held in self.caches.all() for other in held.graphs.values())
        try:
            step.hold(self.graph_class(run, undo, model.device, next(others, None)))
        except Exception as error:  # whatever a model's operations raise inside a capture
            undo()
            logger.warning("a decoding step cannot be a CUDA graph and runs without one: %s", error)
            return False
        return True

    def _make_room(self) -> None:
        """Drop the graphs that were not used for longest."""
        held = [(step.used, key, m.graphs) for m in self.caches.all() for key, step in m.graphs.items()]
        held.sort(key=lambda item: item[0], reverse=True)
        for _, key, graphs in held[self.most - 1 :]:
            del graphs[key]

    def _check(self, model: nn.Module, kind: str, source, version: int) -> None:
        """Drop the graphs of a kind that hold other constants than those of the pool and the model now."""
        seen = version, id(source)
        if self._checked.get(kind) == seen:
            return
        constants = _model_constants(model) + (() if kind == "frozen" else _pool_constants(source))
        if self._held.get(kind) != constants:
            for memory in self.caches.all():
                memory.graphs = {key: step for key, step in memory.graphs.items() if key[0] != kind}
            self._held[kind] = constants
        self._checked[kind] = seen


def _is_replaced(module: nn.Module) -> bool:
    """Whether somebody put another forward into a module, as accelerate does to move weights."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _model_constants(model: nn.Module) -> tuple:
    names = ("_attn_implementation", "output_attentions", "output_hidden_states", "return_dict")
    tensors = itertools.chain(model.parameters(), model.buffers())
    places = [(t.data_ptr(), t.dtype) if is_plain(t) else id(t) for t in tensors]
    return (*(getattr(model.config, name, None) for name in names), *places)


def _pool_constants(pool: "Slabs") -> tuple:
    """Of a `KnowledgePool`, or of what stands for it."""
    tables = (pool.start, pool.rank, pool.scaling, pool.row_entry)
    factors = [(f.A.data_ptr(), f.B.data_ptr(), f.A.dtype) for f in pool.factors]
    sizes = [(t.data_ptr(), t.shape[0], t.device) for t in tables]
    return (pool.num_rows, pool.max_rank, pool.backend, *sizes, *factors)
