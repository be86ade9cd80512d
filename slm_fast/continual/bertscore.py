"""BERTScore of generated answers with a local encoder: no judge model, no download."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_fast.encoder import Encoder


@functools.cache
def _encoder(model: str) -> Encoder:
    return Encoder(model, query_layers=[-1], max_length=512)


@torch.no_grad()
def token_embeddings(texts: Sequence[str], model: str, batch_size: int = 32) -> list[Tensor]:
    """The normalised last-layer embeddings of every text's tokens but special ones: [tokens, H] each."""
    encoder, found = _encoder(model), []
    for lo in range(0, len(texts), batch_size):
        part = list(texts[lo : lo + batch_size])
        encoded = encoder.tokenizer(
            part,
            padding=True,
            truncation=True,
            max_length=encoder.max_length,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        special = encoded.pop("special_tokens_mask")
        (states,), mask = encoder._hidden_states(encoder.layers, **encoded)
        kept = mask.bool().cpu() & ~special.bool()
        found += [F.normalize(s.float().cpu()[k], dim=-1) for s, k in zip(states, kept, strict=True)]
    return found


def bert_scores(predictions: Sequence[str], targets: Sequence[str], model: str = "minilm") -> list[float]:
    """BERTScore F1 of every prediction, in [-1, 1]: greedy matching by cosine, no idf weights, not rescaled.

        P = mean over the prediction's tokens of max_j cos(p_i, t_j),  R = mean over the target's of max_i
        F1 = 2 P R / (P + R)

    model: a sentence encoder's folder, hub id, or "minilm"; its last layer is used. An empty text scores 0,
    two empty ones 1. Source: Zhang et al., ICLR 2020. Values of other models do not compare.
    """
    texts = list(dict.fromkeys([*predictions, *targets]))
    embedded = dict(zip(texts, token_embeddings(texts, model), strict=True))
    return [_f1(embedded[p], embedded[t]) for p, t in zip(predictions, targets, strict=True)]


def _f1(prediction: Tensor, target: Tensor) -> float:
    if not len(prediction) or not len(target):
        return float(len(prediction) == len(target))
    cosine = prediction @ target.T
    precision, recall = float(cosine.amax(1).mean()), float(cosine.amax(0).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
