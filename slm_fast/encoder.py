"""The frozen sentence encoder: texts in, queries out, computed once per text."""

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from slm_fast.config import SLMConfig
from slm_fast.loading import resolve_name
from slm_fast.query_store import QueryStore

logger = logging.getLogger(__name__)

MAX_QUERY_DIM = 4096
CACHE_BYTES = 512 << 20


def choose_layers(query_layers: list[int] | str, num_layers: int, hidden_size: int) -> list[int]:
    """The hidden states that make up a query, out of `num_layers` + 1 (0 is the embedding layer).

    "auto" takes all of them while the query stays under 4,096 values, else evenly spaced ones, always with
    the first, a middle one and the last.
    """
    total = num_layers + 1
    if query_layers == "auto":
        count = min(total, max(3, (MAX_QUERY_DIM - 1) // hidden_size))
        return sorted({round(i * (total - 1) / max(count - 1, 1)) for i in range(count)})
    layers = [layer + total if layer < 0 else layer for layer in query_layers]
    if any(not 0 <= layer < total for layer in layers):
        raise ValueError(
            f"query_layers {query_layers} are out of range: the encoder has layers 0 to {total - 1}"
        )
    return layers


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over a text's own tokens, fp32: [B, L, H], [B, L] -> [B, H]."""
    mask = attention_mask[..., None].float()
    return (hidden.float() * mask).sum(1) / mask.sum(1).clamp(min=1)


class Encoder:
    """Turns texts into queries [B, D] fp32, on the CPU, and remembers them; threads take turns.

    Args:
        source: a sentence-transformers object, a transformers model folder or hub id, a callable `list[str]
            -> [B, D]`, or None when every call passes precomputed embeddings.
        query_layers: see `SLMConfig`. One layer alone is kept as it is (the paper), several are L2-normalised
            each and concatenated.
        max_length: tokens kept of a text; longer ones are cut at the end, with a warning that counts them.
    `keep_in(folder)` remembers them on disk too.
    """

    in_prefill = False  # see `BackboneEncoder`

    def __init__(
        self,
        source=None,
        *,
        query_layers: list[int] | str = "auto",
        max_length: int = 256,
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.batch_size = batch_size
        self.max_length = max_length
        self.query_layers = query_layers
        self.device = torch.device(device)
        self.name_or_path: str | None = None
        self.model: nn.Module | None = None
        self.function: Callable | None = None
        self.num_truncated = 0
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._store: QueryStore | None = None
        self._lock = threading.Lock()
        if source is None:
            return
        if hasattr(source, "tokenizer") and hasattr(source, "encode"):
            self._take(source[0].auto_model, source.tokenizer, query_layers)
            self.name_or_path = getattr(self.model.config, "_name_or_path", None)
        elif callable(source) and not isinstance(source, nn.Module):
            if query_layers not in ("auto", [-1]):
                raise ValueError(
                    "query_layers cannot be chosen for a callable encoder: it returns finished queries"
                )
            self.function = source
        elif isinstance(source, str) or hasattr(source, "__fspath__"):
            self.name_or_path = str(source)
            folder = resolve_name(self.name_or_path)
            model = AutoModel.from_pretrained(folder, dtype=torch.float32)
            self._take(model, AutoTokenizer.from_pretrained(folder), query_layers)
        else:
            raise ValueError(
                "the encoder must be a sentence-transformers object, a model folder, a hub id or a callable, "
                f"got {type(source).__name__}"
            )

    def _take(self, model: nn.Module, tokenizer, query_layers: list[int] | str) -> None:
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.layers = self.layers_of(query_layers)
        self._limit_length(model.config)

    def layers_of(self, query_layers: list[int] | str) -> list[int]:
        """What `SLMConfig.query_layers` means for this encoder's model."""
        config = self.model.config
        return choose_layers(query_layers, config.num_hidden_layers, config.hidden_size)

    def _limit_length(self, config) -> None:
        limit = getattr(config, "max_position_embeddings", self.max_length)
        if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "mpnet", "camembert"):
            limit -= config.pad_token_id + 1  # their positions start behind the padding index
        self.max_length = min(self.max_length, limit)

    def on(self, base: nn.Module, in_prefill: bool) -> "Encoder":
        """The encoder for this base and `route_in_prefill`; only a `BackboneEncoder` depends on them."""
        return self

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def settings(self) -> dict:
        """The `SLMConfig` fields that make this encoder again; its name is None if it has none."""
        return {
            "encoder_name_or_path": self.name_or_path,
            "query_layers": self.query_layers,
            "encoder_max_length": self.max_length,
        }

    def keep_in(self, folder: str | Path) -> "Encoder":
        """Remember queries in a folder that other processes and later runs share: a `QueryStore`.

        Raises ValueError for an encoder without a name, whose queries nobody could tell from another's.
        """
        if self.name_or_path is None or self.model is None:
            raise ValueError("only an encoder with a name can keep its queries on disk, not a callable one")
        probe = [
            p.detach().flatten()[:: max(p.numel() // 8, 1)][:8].tolist() for p in self.model.parameters()
        ]
        identity = hashlib.sha256(json.dumps([self.settings(), probe]).encode()).hexdigest()
        self._store = QueryStore(folder, identity)
        return self

    def __call__(self, texts: Sequence[str], progress: bool = False) -> Tensor:
        """Queries of `texts`, [B, D] fp32. Raises ValueError on an empty batch or text and on NaN queries."""
        texts = check_texts(texts)
        with self._lock:
            return self._queries(texts, progress)

    def _queries(self, texts: list[str], progress: bool) -> Tensor:
        missing = list(dict.fromkeys(text for text in texts if text not in self._cache))
        fresh = self._store.get(missing) if self._store is not None and missing else {}
        missing = [text for text in missing if text not in fresh]
        if missing:
            missing.sort(key=len, reverse=True)
            starts = range(0, len(missing), self.batch_size)
            for lo in tqdm(starts, desc="encoding", disable=not progress or len(starts) < 2):
                part = missing[lo : lo + self.batch_size]
                encoded = dict(zip(part, self.encode(part), strict=True))
                if self._store is not None:
                    self._store.put(encoded)
                fresh.update(encoded)
        queries = torch.stack([fresh[text] if text in fresh else self._cache[text] for text in texts])
        self._remember(fresh)
        return queries

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Queries of `texts`, [B, D] fp32, of a pass of their own: no memory is asked, and none is kept."""
        if self.function is not None:
            queries = torch.as_tensor(self.function(texts)).float().cpu()
            if queries.ndim != 2 or queries.shape[0] != len(texts):
                raise ValueError(
                    f"the encoder returned {list(queries.shape)} for {len(texts)} texts, wanted [B, D]"
                )
        elif self.model is not None:
            queries = self._hidden_queries(texts)
        else:
            raise ValueError("this model has no encoder: pass embeddings= instead of texts=")
        if not bool(queries.isfinite().all()):
            bad = int((~queries.isfinite()).any(-1).nonzero()[0])
            raise ValueError(f"the encoder's query is NaN or infinite for text {texts[bad][:80]!r}")
        return queries

    def _hidden_queries(self, texts: list[str]) -> Tensor:
        encoded = self._tokenized(texts)
        return self.pooled(*self._hidden_states(**encoded)).cpu()

    def pooled(self, states: list[Tensor], attention_mask: Tensor) -> Tensor:
        """Queries [B, D] fp32 of the chosen layers' states [B, L, H] and which tokens to pool: [B, L]."""
        pooled = [mean_pool(state, attention_mask) for state in states]
        if len(pooled) > 1:
            pooled = [F.normalize(p, dim=-1) for p in pooled]
        return torch.cat(pooled, dim=-1)

    def _tokenized(self, texts: list[str]) -> dict[str, Tensor]:
        encoded = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        full = encoded["attention_mask"].sum(1) >= self.max_length
        cut = sum(
            len(self.tokenizer(texts[row], verbose=False)["input_ids"]) > self.max_length
            for row in full.nonzero().flatten().tolist()
        )
        if cut:
            if not self.num_truncated:
                logger.warning(
                    "texts longer than encoder_max_length=%d tokens are cut at the end", self.max_length
                )
            self.num_truncated += cut
        return encoded

    def _hidden_states(self, **encoded: Tensor) -> tuple[list[Tensor], Tensor]:
        """The chosen layers' states [B, L, H] of tokenised texts, and which tokens to pool: [B, L]."""
        encoded = {name: value.to(self.device) for name, value in encoded.items()}
        states = self.model(**encoded, output_hidden_states=True).hidden_states
        return [states[layer] for layer in self.layers], encoded["attention_mask"]

    def _remember(self, fresh: dict[str, Tensor]) -> None:
        for text, query in fresh.items():
            self._cache[text] = query.clone()
        if self._cache:
            limit = max(CACHE_BYTES // (4 * next(iter(self._cache.values())).numel()), 1)
            while len(self._cache) > limit:
                self._cache.popitem(last=False)


def check_texts(texts: Sequence[str]) -> list[str]:
    """A non-empty list of non-empty strings, or ValueError."""
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, got one string")
    texts = list(texts)
    if not texts:
        raise ValueError("texts is empty: a batch needs at least one row")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{row}] must be a string, got {type(text).__name__}")
        if not text.strip():
            raise ValueError(f"texts[{row}] is empty")
    return texts


def make_encoder(config: SLMConfig, encoder=None, base: nn.Module | None = None, tokenizer=None) -> Encoder:
    """The encoder given, or the one that the config names; without one only `embeddings=` can route.

    "backbone" is the frozen `base` itself, a `BackboneEncoder`; one of another model is made anew for `base`.
    """
    if isinstance(encoder, Encoder):
        return encoder if base is None else encoder.on(base, config.route_in_prefill)
    source = encoder if encoder is not None else config.encoder_name_or_path
    settings = {"query_layers": config.query_layers, "max_length": config.encoder_max_length}
    if source != "backbone":
        return Encoder(source, **settings)
    if base is None:
        raise ValueError('encoder="backbone" needs the base model whose hidden states are the queries')
    from slm_fast.backbone_encoder import BackboneEncoder

    return BackboneEncoder(base, tokenizer, **settings, in_prefill=config.route_in_prefill)
