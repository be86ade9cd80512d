"""transformers' continuous batching with every request's own mixture: `generate_batch` and `routed_manager`.

A step packs the tokens of many requests into one sequence [1, T]. Requests are routed once, before they are
queued; at a step the layers see the mixtures of its requests and where each one's tokens begin (`Packing`).
transformers shares the cache blocks of equal prompts; here a block's hash also covers the request's picked
entries, their weights and the pool's version, so that only requests with the same mixture share. transformers
turns errors into empty outputs or log lines; here they reach the caller.

Read in 5.17 and 5.24 of transformers, which differ in how they name and hash blocks. It runs on a CPU too.
CUDA graphs, compiled steps, asynchronous batching and tensor parallelism are refused by name.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm

from slm_fast.layers import Packing
from slm_fast.resident import uploaded
from slm_fast.router import SOURCES
from slm_fast.routing import Routing

RELEASES = "transformers 5.17 to 5.24"
try:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.continuous_api import (
        ContinuousBatchingManager,
        OutputRouter,
    )
    from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
    from transformers.generation.continuous_batching.utils import WorkloadHints

    from slm_fast.salted_cache import Mixture, SaltedCache
except ImportError as error:
    raise ImportError(
        f"generate_batch needs the continuous batching of {RELEASES}; this is {transformers.__version__}"
    ) from error

if TYPE_CHECKING:
    from slm_fast.model import SLMModel

MARKS = ("mark_complete_blocks", "mark_shareable_blocks_as_complete")  # one of them, by release
NEEDED = {
    PagedAttentionCache: ("search_prefix_match",),
    ContinuousBatchingManager: ("_create_batch_processor", "_generation_step", "_handle_critical_error"),
    OutputRouter: ("deliver", "deliver_batch", "fail_and_deliver"),
}
CHILD = "__child#"  # between a request's id and the number of one of its further return sequences
CPU_TOKENS = 512  # of a step, where the config names none: transformers would size for a GPU's memory
CPU_REQUESTS = 64  # that a CPU's cache has room for at once
NEW_TOKENS = 20  # as `generate` without any length


def check_release() -> None:
    """Raise ImportError where transformers' own interface is not one that this module knows."""
    missing = [
        f"{cls.__name__}.{name}" for cls, names in NEEDED.items() for name in names if not hasattr(cls, name)
    ]
    if not any(hasattr(PagedAttentionCache, name) for name in MARKS):
        missing.append(f"PagedAttentionCache.{MARKS[0]}")
    if missing:
        raise ImportError(
            f"generate_batch knows the continuous batching of {RELEASES}; {transformers.__version__} has no "
            + ", ".join(missing)
        )


class FailureRouter(OutputRouter):
    """Outputs that keep the exception of a failed request, and tell `finished` when a sequence is over."""

    def __init__(self, finished) -> None:
        super().__init__()
        self.finished = finished

    def deliver(self, output: GenerationOutput) -> None:
        super().deliver(output)
        self._check(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        super().deliver_batch(outputs)
        for output in outputs:
            self._check(output)

    def fail_and_deliver(self, state, error: Exception) -> None:
        state.status, state.error = RequestStatus.FAILED, f"{type(error).__name__}: {error}"
        output = state.to_generation_output()
        output.failure = error
        self.deliver(output)

    def _check(self, output: GenerationOutput) -> None:
        if output.is_finished():
            self.finished(output.request_id)


class RoutedManager(ContinuousBatchingManager):
    """transformers' manager; `add_request` and `add_requests` also take what routes rows, see `SLMModel`.

    `get_result` and iteration raise RuntimeError, from the original exception, where a request failed.
    """

    def __init__(self, slm: "SLMModel", generation_config, batching_config, hints=None) -> None:
        super().__init__(slm.base_model, generation_config, batching_config, hints)
        self.slm = slm
        self.failure: Exception | None = None  # that ended the background thread
        self.raised = False  # whether the caller has heard of it
        self.output_router = FailureRouter(self._finished)
        self._mixtures: dict[str, Mixture] = {}  # of requests that are queued or running
        self._ids = itertools.count()

    # ---- the caller's thread

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        *args,
        **kwargs,
    ) -> str:
        """Queue a request, routed by `texts=[one]` or another source of one row; returns its id.

        Raises ValueError on a bad source, an empty prompt or a taken id, RuntimeError after a failure.
        """
        (mixture,) = self._route(1, kwargs)
        return self._add(mixture, input_ids, request_id, max_new_tokens, *args, **kwargs)

    def add_requests(
        self,
        inputs: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int] | None = None,
        *args,
        **kwargs,
    ) -> list[str]:
        """Queue a request for each prompt; sources and a list of `max_new_tokens` have one item for each."""
        mixtures = self._route(len(inputs), kwargs)
        limits = per_request(max_new_tokens, len(inputs))
        ids = [f"req_{next(self._ids)}" for _ in inputs]
        order = range(len(inputs))
        if self._use_prefix_sharing:  # equal beginnings side by side, as transformers does
            order = sorted(order, key=lambda row: list(inputs[row]), reverse=True)
        for row in order:
            self._add(mixtures[row], inputs[row], ids[row], limits[row], *args, **kwargs)
        return ids

    def _route(self, num_rows: int, kwargs: dict) -> list[Mixture]:
        """The mixtures of new requests, by the sources that it takes out of `kwargs`."""
        sources = {name: kwargs.pop(name, None) for name in (*SOURCES, "task")}
        routing = self.slm._resolve(num_rows, **sources)
        version, sequences = self.slm.pool.version, self.num_return_sequences
        if routing is None:
            return [Mixture([0], [0.0], version, sequences) for _ in range(num_rows)]
        rows = zip(routing.indices.tolist(), routing.weights.tolist(), strict=True)
        return [Mixture(*row, version, sequences) for row in rows]

    def _add(self, mixture: Mixture, input_ids, request_id, max_new_tokens, *args, **kwargs) -> str:
        if request_id is None:
            request_id = f"req_{next(self._ids)}"
        if CHILD in request_id or request_id in self._mixtures:
            raise ValueError(f"the request id {request_id!r} is taken or contains {CHILD!r}")
        tokens = [int(token) for token in input_ids]
        limit = new_tokens(self.generation_config, tokens, max_new_tokens)
        if not tokens or limit < 1:
            raise ValueError(
                f"a request needs a prompt and room for a new token, got {len(tokens)} tokens and {limit} new"
            )
        self._mixtures[request_id] = mixture
        if super().add_request(tokens, request_id, limit, *args, **kwargs) is None:
            self._mixtures.pop(request_id, None)
            self.raised = True
            raise RuntimeError(
                "the manager takes no more requests: it was stopped or it failed"
            ) from self.failure
        return request_id

    def get_result(self, request_id: str | None = None, timeout: float | None = None):
        output = super().get_result(request_id, timeout)
        if output is not None and output.error is not None:
            self.raised = True
            cause = getattr(output, "failure", None)
            raise RuntimeError(f"request {output.request_id} failed: {output.error}") from cause
        if output is None and self.failure is not None and self.output_router.output_queue.empty():
            self.raised = True
            raise RuntimeError("continuous batching failed") from self.failure
        return output

    def __iter__(self):
        while self.is_running() or not self.output_router.output_queue.empty():
            output = self.get_result(timeout=0.1)
            if output is not None:
                yield output

    def request_id_iter(self, request_id: str):
        while self.is_running() or not self.output_router.output_queue.empty():
            output = self.get_result(request_id, timeout=0.1)
            if output is not None:
                yield output
                if output.is_finished():
                    return

    # ---- the background thread

    def _create_batch_processor(self):
        processor = super()._create_batch_processor()
        if not isinstance(processor.cache, SaltedCache):
            processor.cache.__class__ = SaltedCache
            processor.cache.mixture_of = self._mixture
            clear = processor.scheduler.clear_cancelled_requests

            def clear_cancelled_requests():
                states = clear()
                for state in states:
                    self._finished(state.request_id)
                return states

            processor.scheduler.clear_cancelled_requests = clear_cancelled_requests
        return processor

    def _generation_step(self) -> None:
        inputs = self.batch_processor.inputs_and_outputs
        rows = [(self._mixture(f.state.request_id), f.query_length) for f in inputs.requests_in_batch]
        with torch.cuda.stream(inputs.compute_stream):  # nothing on a CPU, where it is None
            with self.slm.state.use(*self._packed(rows, inputs.num_q_tokens)):
                super()._generation_step()

    def _packed(
        self, rows: list[tuple[Mixture, int]], num_tokens: int
    ) -> tuple[Routing | None, Packing | None]:
        """The step's mixtures and bounds; padding is a last row of the frozen model."""
        if all(mixture.is_base for mixture, _ in rows):
            return None, None
        bounds = [0, *itertools.accumulate(length for _, length in rows)]
        mixtures = [mixture for mixture, _ in rows]
        if bounds[-1] < num_tokens:
            bounds.append(num_tokens)
            mixtures.append(Mixture([0], [0.0], self.slm.pool.version))
        width = max(len(mixture.indices) for mixture in mixtures)
        indices = [m.indices + [0] * (width - len(m.indices)) for m in mixtures]
        weights = [m.weights + [0.0] * (width - len(m.weights)) for m in mixtures]
        device = self.slm.device
        routing = Routing(
            uploaded(indices, torch.int32, device),
            uploaded(weights, torch.float32, device),
            uploaded(weights, torch.float32, device),
            uploaded([mixture.version for mixture in mixtures], torch.int64, device),
        )
        if any(mixture.version != self.slm.pool.version for mixture in mixtures):
            self.slm.pool.check_routing(routing)
        return routing, Packing(uploaded(bounds, torch.int32, device), num_tokens)

    def _mixture(self, request_id: str) -> Mixture:
        return self._mixtures[request_id.partition(CHILD)[0]]

    def _finished(self, request_id: str) -> None:
        request_id = request_id.partition(CHILD)[0]
        mixture = self._mixtures.get(request_id)
        if mixture is not None:
            mixture.sequences -= 1
            if mixture.sequences == 0:
                self._mixtures.pop(request_id, None)

    def _handle_critical_error(self, error: Exception, batch_processor) -> None:
        self.failure = error
        super()._handle_critical_error(error, batch_processor)


def generate_batch(
    slm: "SLMModel",
    inputs: Sequence[Sequence[int]] | None,
    sources: dict,
    *,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    max_new_tokens: int | Sequence[int] | None = None,
    record_timestamps: bool = False,
    progress_bar: bool = False,
    **kwargs,
) -> dict[str, GenerationOutput]:
    """Answer prompts of any lengths, each with its own mixture; returns {request id: output} in their order.

    Takes and returns what transformers' `generate_batch` does, further options of `generate` in `kwargs`, and
    one `max_new_tokens` for each prompt or for all. Return sequences stand before their prompt's own output.
    Raises ValueError on bad arguments, and RuntimeError from the original exception where anything failed;
    the model can be used afterwards.
    """
    if inputs is None:
        texts = sources["texts"]
        if texts is None:
            raise ValueError("no input: pass the prompts' token ids, or texts=")
        if slm.pool.num_entries and all(sources[name] is None for name in SOURCES if name != "texts"):
            # routed while they are tokenised
            sources = sources | {"texts": None, "routing": slm.route_ahead(texts, task=sources["task"])}
        inputs = slm.require_tokenizer()(list(texts))["input_ids"]
    inputs = [row.tolist() if isinstance(row, Tensor) else list(row) for row in inputs]
    if not inputs:
        return {}
    routing = slm._resolve(len(inputs), **sources)
    if routing is not None:
        sources = {"routing": routing}
    config = settled(slm.base_model, generation_config, kwargs)
    limits = [
        new_tokens(config, row, n)
        for row, n in zip(inputs, per_request(max_new_tokens, len(inputs)), strict=True)
    ]
    each = config.num_return_sequences or 1
    total = len(inputs) * each
    hints = WorkloadHints(max(map(len, inputs)), max(limits), total)
    lengths = [(len(row), n) for row, n in zip(inputs, limits, strict=True)] * each
    results: dict[str, GenerationOutput] = {}
    with (
        _running(slm, config, batching_config(slm, continuous_batching_config, lengths), hints) as manager,
        tqdm(total=total, disable=not progress_bar, desc="requests", unit="request") as bar,
    ):
        ids = manager.add_requests(inputs, limits, record_timestamps=record_timestamps, **sources)
        while len(results) < total:
            output = manager.get_result(timeout=1)
            if output is None and not manager.is_running() and manager.output_router.output_queue.empty():
                raise RuntimeError("the generation thread stopped before all requests were finished")
            if output is not None and output.is_finished():
                results[output.request_id] = output
                bar.update()
    return {name: results[name] for request_id in ids for name in _sequences(request_id, each)}


@contextmanager
def routed_manager(
    slm: "SLMModel",
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    **kwargs,
) -> Iterator[RoutedManager]:
    """A running `RoutedManager`, for requests that arrive over time; see transformers' context manager.

    The model belongs to the manager's thread: do not call it inside the `with` block, at whose end a failure
    that nobody has seen is raised.
    """
    config = settled(slm.base_model, generation_config, kwargs)
    with _running(slm, config, batching_config(slm, continuous_batching_config)) as manager:
        yield manager


@contextmanager
def _running(slm: "SLMModel", generation_config, config, hints=None) -> Iterator[RoutedManager]:
    base = slm.base_model
    training, attention = base.training, base.config._attn_implementation
    manager, finished = None, False
    try:
        manager = RoutedManager(slm, generation_config, config, hints)
        manager.start()
        yield manager
        finished = True
    finally:
        if manager is not None:
            if manager._generation_thread is not None:
                manager.stop(hard_stop=not finished)
            manager.destroy()
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)
        base.train(training)
    if manager.failure is not None and not manager.raised:
        raise RuntimeError("continuous batching failed") from manager.failure


def settled(base, generation_config: GenerationConfig | None, kwargs: dict) -> GenerationConfig:
    """The generation config as `generate` completes it. Raises ValueError on what cannot be done here."""
    check_release()
    if not hasattr(base, "generate_batch") or not base.can_generate() or base.config.is_encoder_decoder:
        raise ValueError(f"continuous batching needs a causal language model, got {type(base).__name__}")
    if getattr(base, "_device_mesh", None) is not None:
        raise ValueError("continuous batching with mixtures does not run under tensor parallelism")
    config, unknown = base._prepare_generation_config(generation_config, **kwargs)
    if unknown:
        raise ValueError(f"unexpected keyword arguments: {', '.join(sorted(unknown))}")
    if (config.num_beams or 1) > 1:
        raise ValueError(f"continuous batching has no beams, got num_beams={config.num_beams}")
    given = [c.max_length for c in (generation_config, base.generation_config) if c is not None]
    if config.max_new_tokens is None and all(n is None for n in [*given, kwargs.get("max_length")]):
        config.max_new_tokens = NEW_TOKENS
    if config.eos_token_id is None:
        config.eos_token_id = -1
    return config


def batching_config(
    slm: "SLMModel", config: ContinuousBatchingConfig | None, lengths: list[tuple[int, int]] | None = None
) -> ContinuousBatchingConfig:
    """A copy of the config, with sizes for a CPU; `lengths` are (prompt, new tokens) of all requests.

    Raises ValueError on options that mixtures do not support.
    """
    config = ContinuousBatchingConfig() if config is None else copy.copy(config)
    names = ("use_cuda_graph", "use_async_batching", "default_compile_level")
    names += ("varlen_compile_config", "decode_compile_config")
    for name in names:
        value = getattr(config, name, None)
        if any(value) if isinstance(value, tuple) else value:
            raise ValueError(f"continuous batching with mixtures does not support {name}={value}")
    config.use_cuda_graph = config.use_async_batching = False
    half = slm.base_model.dtype in (torch.float16, torch.bfloat16)
    if hasattr(config, "auto_switch_to_flash") and (slm.device.type == "cpu" or not half):
        config.auto_switch_to_flash = False
    if slm.device.type == "cpu":
        page = config.page_size if hasattr(config, "page_size") else config.block_size
        lengths = lengths or [(CPU_TOKENS, CPU_TOKENS)] * CPU_REQUESTS
        blocks = sorted((math.ceil(sum(length) / page) + 1 for length in lengths), reverse=True)
        if config.num_blocks is None:
            config.num_blocks = math.ceil(1.25 * sum(blocks[:CPU_REQUESTS])) + 1
        if config.max_batch_tokens is None:
            config.max_batch_tokens = min(max(sum(prompt for prompt, _ in lengths), CPU_REQUESTS), CPU_TOKENS)
    return config


def new_tokens(config: GenerationConfig, tokens: Sequence[int], max_new_tokens: int | None) -> int:
    """How many tokens a request may add to its prompt."""
    if max_new_tokens is not None:
        return max_new_tokens
    return config.max_length - len(tokens) if config.max_new_tokens is None else config.max_new_tokens


def per_request(max_new_tokens: int | Sequence[int] | None, num_rows: int) -> list[int | None]:
    """One limit for each request. Raises ValueError on another number of them."""
    if max_new_tokens is None or isinstance(max_new_tokens, int):
        return [max_new_tokens] * num_rows
    if len(max_new_tokens) != num_rows:
        raise ValueError(f"max_new_tokens has {len(max_new_tokens)} rows, the batch has {num_rows}")
    return list(max_new_tokens)


def _sequences(request_id: str, count: int) -> list[str]:
    """The ids of a request's return sequences, its own last, as transformers orders them."""
    return [f"{request_id}{CHILD}{i}" for i in range(count - 1)] + [request_id]
