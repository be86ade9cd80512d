"""From what a caller says about a batch's rows to their routing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slm_fast.encoder import make_encoder
from slm_fast.pool import KnowledgePool
from slm_fast.routing import Routing

SOURCES = ("texts", "embeddings", "routing", "adapter_names")


class Router:
    """A pool and the encoder of its queries, as `make_encoder` takes it: loaded when a text comes first."""

    def __init__(self, pool: KnowledgePool, encoder=None) -> None:
        self.pool, self.encoder = pool, encoder

    def queries(self, texts: Sequence[str] | None, embeddings=None, progress: bool = False) -> Tensor:
        """[B, D] fp32 embeddings. Raises ValueError unless exactly one source is given and is finite."""
        if (texts is None) == (embeddings is None):
            raise ValueError("pass either texts= or embeddings=")
        if embeddings is None:
            self.encoder = make_encoder(self.pool.config, self.encoder)
            return self.encoder(texts, progress)
        query = torch.as_tensor(embeddings).detach().float()
        if query.ndim != 2 or query.shape[0] == 0:
            raise ValueError(f"embeddings must be [B, D] with at least one row, got {list(query.shape)}")
        if not bool(query.isfinite().all()):
            raise ValueError("embeddings must be finite, got NaN or infinity")
        return query

    def resolve(
        self,
        num_rows: int,
        device: torch.device,
        *,
        texts: Sequence[str] | None = None,
        embeddings: Tensor | None = None,
        routing: Routing | None = None,
        adapter_names: Sequence[str] | None = None,
        task: str | Sequence[str | None] | None = None,
    ) -> Routing | None:
        """The routing of a call's rows; None, the frozen model, where the pool is empty and nothing is named.

        Raises ValueError unless exactly one source is given and has `num_rows` rows. Inside a compiled graph
        only `routing=` is known, and its entries are not checked against the pool.
        """
        if isinstance(task, str):
            self.pool.task(task)
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


def num_rows(args: tuple, kwargs: dict) -> int:
    """Rows of the batch that a call carries. Raises ValueError when it has no input or is empty."""
    for name in ("input_ids", "inputs_embeds", "inputs", "decoder_input_ids"):
        if kwargs.get(name) is not None:
            rows = kwargs[name].shape[0]
            break
    else:
        if not args or args[0] is None:
            raise ValueError("no input: pass input_ids=")
        rows = args[0].shape[0]
    if rows == 0:
        raise ValueError("the batch is empty: it needs at least one row")
    return rows
