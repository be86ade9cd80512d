"""From what a caller says about a batch's rows to their routing."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from slm_fast.encoder import make_encoder
from slm_fast.layers import Packing
from slm_fast.pool import KnowledgePool
from slm_fast.routing import Routing

SOURCES = ("texts", "embeddings", "routing", "adapter_names")
_worker = ThreadPoolExecutor(1, thread_name_prefix="slm_fast-routing")  # starts with the first text


class Router:
    """A pool and the encoder of its queries, as `make_encoder` takes it: loaded when a text comes first.

    base: the model that the pool belongs to, for encoder="backbone".
    """

    def __init__(self, pool: KnowledgePool, encoder=None, base: nn.Module | None = None) -> None:
        self.pool, self.encoder, self.base = pool, encoder, base

    def queries(self, texts: Sequence[str] | None, embeddings=None, progress: bool = False) -> Tensor:
        """[B, D] fp32 embeddings. Raises ValueError unless exactly one source is given and is finite."""
        if (texts is None) == (embeddings is None):
            raise ValueError("pass either texts= or embeddings=")
        if embeddings is None:
            self.encoder = make_encoder(self.pool.config, self.encoder, self.base)
            return self.encoder(texts, progress)
        query = torch.as_tensor(embeddings).detach().float()
        if query.ndim != 2 or query.shape[0] == 0:
            raise ValueError(f"embeddings must be [B, D] with at least one row, got {list(query.shape)}")
        if not bool(query.isfinite().all()):
            raise ValueError("embeddings must be finite, got NaN or infinity")
        return query

    def ahead(self, texts: Sequence[str] | None, embeddings=None, task=None, resident=None) -> Future:
        """The routing of some rows, made by a thread of its own while the caller tokenises; their entries are
        copied into the slots of `resident`, a `ResidentPool`."""

        def routed() -> Routing:
            routing = self.pool.search(self.queries(texts, embeddings), task)
            if resident is not None:
                resident.prefetch(routing)
            return routing

        return _worker.submit(routed)

    def resolve(
        self,
        num_rows: int,
        device: torch.device,
        *,
        texts: Sequence[str] | None = None,
        embeddings: Tensor | None = None,
        routing: "Routing | Future[Routing] | None" = None,
        adapter_names: Sequence[str] | None = None,
        task: str | Sequence[str | None] | None = None,
    ) -> Routing | None:
        """The routing of a call's rows; None, the frozen model, where the pool is empty and nothing is named.

        Raises ValueError unless exactly one source is given and has `num_rows` rows. Inside a compiled graph
        only `routing=` is known, and its entries are not checked against the pool.
        """
        if isinstance(task, str):
            self.pool.task(task)
        if isinstance(routing, Future):
            routing = routing.result()
        values = dict(zip(SOURCES, (texts, embeddings, routing, adapter_names), strict=True))
        given = {name: value for name, value in values.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"pass only one of {', '.join(SOURCES)}; got {', '.join(given)}")
        if not given:
            if self.pool.num_entries == 0:
                return None
            raise ValueError(
                "say how to route the rows: texts=[...], embeddings=, routing= or adapter_names=[...] "
                '("__base__" for the frozen model)'
            )
        ((name, value),) = given.items()
        rows = value.num_rows if name == "routing" else len(value)
        if rows != num_rows:
            raise ValueError(f"{name} has {rows} rows, the batch has {num_rows}")
        if name == "routing":
            if not torch.compiler.is_compiling():
                self.pool.check_routing(value)
            return value.to(device)
        if name == "adapter_names":
            return self.pool.fixed_routing(list(value))
        if self.pool.num_entries == 0:
            return None
        return self.pool.search(self.queries(texts, embeddings), task).to(device)


def rows_of(args: tuple, kwargs: dict) -> tuple[int, Packing | None]:
    """Rows of the batch that a call carries, and how they are packed, if they are.

    Where `cu_seq_lens_q` [rows + 1] int32 says so, as in transformers' batches without padding, the rows are
    the sequences side by side in a batch [1, T]. Raises ValueError when the call has no input, is empty, or
    its bounds are not ones of the batch; their values are looked at on the CPU alone.
    """
    batch, bounds = input_of(args, kwargs), kwargs.get("cu_seq_lens_q")
    if batch.shape[0] == 0:
        raise ValueError("the batch is empty: it needs at least one row")
    if bounds is None:
        return batch.shape[0], None
    if batch.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q goes with one row of packed sequences, the batch has {len(batch)}")
    if bounds.dtype is not torch.int32 or bounds.ndim != 1 or len(bounds) < 2:
        raise ValueError(
            f"cu_seq_lens_q must be [sequences + 1] int32, got {list(bounds.shape)} {bounds.dtype}"
        )
    tokens = batch.shape[1]
    if bounds.is_cpu and not torch.compiler.is_compiling():
        first, last = int(bounds[0]), int(bounds[-1])
        if first != 0 or last != tokens or bool((bounds.diff() < 0).any()):
            raise ValueError(
                f"cu_seq_lens_q must rise from 0 to the batch's {tokens} tokens, got {bounds.tolist()}"
            )
    return len(bounds) - 1, Packing(bounds.to(batch.device), tokens)


def input_of(args: tuple, kwargs: dict) -> Tensor:
    """The batch that a call carries, [rows, tokens, ...]. Raises ValueError where there is none."""
    for name in ("input_ids", "inputs_embeds", "inputs", "decoder_input_ids"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    if not args or args[0] is None:
        raise ValueError("no input: pass input_ids=")
    return args[0]
