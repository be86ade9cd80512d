"""Answers to routed texts: label names from the tasks' heads, generated text from the base model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from slm_fast.prompts import encode_prompts, encode_texts
from slm_fast.routing import Routing


@dataclass
class Prediction:
    """An answer: a label name or generated text, the task that the routing chose (None = the frozen model),
    and why.

    answer is None when no task with a head was chosen and the base model cannot generate text.
    """

    text: str
    answer: str | None
    task: str | None
    mass: dict[str, float]
    entries: list[dict] = field(default_factory=list)


@torch.no_grad()
def answer_all(
    model,
    results: list[Prediction],
    routing: Routing,
    batch_size: int,
    max_length: int,
    max_new_tokens: int,
    progress: bool,
) -> None:
    """Fill in the answers, in batches of similar lengths; row n of the routing belongs to result n."""
    tokenizer = model.require_tokenizer()
    order = longest_first([result.text for result in results])
    headed = [r for r in order if (t := results[r].task) and model.pool.task(t).labels is not None]
    chosen = set(headed)
    free = [r for r in order if r not in chosen] if model.can_generate else []
    groups = [("label", rows) for rows in batches(headed, batch_size)]
    groups += [("text", rows) for rows in batches(free, batch_size)]
    with evaluating(model):
        for kind, rows in tqdm(groups, desc="answering", disable=not progress or len(groups) < 2):
            part = [results[row] for row in rows]
            with model.state.use(routing.rows(rows)):
                if kind == "label":
                    answers = _labels(model, tokenizer, part, max_length)
                else:
                    answers = _texts(model, tokenizer, part, max_length, max_new_tokens)
            for result, answer in zip(part, answers, strict=True):
                result.answer = answer


@torch.no_grad()
def answer_in_prefill(
    model,
    texts: list[str],
    task: str | None,
    batch_size: int,
    max_length: int,
    max_new_tokens: int,
    progress: bool,
) -> list[Prediction]:
    """Answers to texts, routed in the pass that answers them.

    It is the prefill of `generate` where no head can be asked, else the one that makes features; texts that
    it routes to no head are generated in a second one, under the routing of the first.
    """
    tokenizer, pool = model.require_tokenizer(), model.pool
    tasks = pool.task_names() if task is None else [task]
    generates = model.can_generate and all(pool.task(name).labels is None for name in tasks)
    results: list[Prediction | None] = [None] * len(texts)
    left: list[tuple[int, Routing]] = []
    parts = batches(longest_first(texts), batch_size)
    with evaluating(model):
        for rows in tqdm(parts, desc="answering", disable=not progress or len(parts) < 2):
            part = [texts[row] for row in rows]
            inputs = encode_texts(model.base_model, tokenizer, part, max_length, in_prefill=True)
            inputs = inputs.to(model.device)
            shape = dict(num_tokens=inputs["input_ids"].shape[1], attention_mask=inputs["attention_mask"])
            with model.prefill_scope(task=task, **shape) as scope:
                if generates:
                    answers = _generated(model, tokenizer, inputs, max_new_tokens)
                else:
                    features = model.features(**inputs)
            for n, (row, found) in enumerate(zip(rows, model.explain(routing=scope.routing), strict=True)):
                chosen = task or found["task"]
                result = Prediction(texts[row], None, chosen, found["mass"], found["entries"])
                results[row] = result
                if generates:
                    result.answer = answers[n]
                elif chosen is not None and pool.task(chosen).labels is not None:
                    result.answer = _label(pool, features[n], result)
                else:
                    left.append((row, scope.routing.rows([n])))
    if left and model.can_generate:
        routing, limits = Routing.cat([part for _, part in left]), (batch_size, max_length, max_new_tokens)
        answer_all(model, [results[row] for row, _ in left], routing, *limits, progress)
    return results


def longest_first(texts: list[str]) -> list[int]:
    """The texts' numbers, by length."""
    return sorted(range(len(texts)), key=lambda row: -len(texts[row]))


def batches(rows: list[int], batch_size: int) -> list[list[int]]:
    return [rows[lo : lo + batch_size] for lo in range(0, len(rows), batch_size)]


@contextmanager
def evaluating(model) -> Iterator[None]:
    """Inside, the model is in eval mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def text_features(model, tokenizer, texts: list[str], max_length: int) -> Tensor:
    """What heads read of texts under the current routing: [B, H] fp32."""
    in_prefill = model.slm_config.route_in_prefill
    encoded = encode_texts(model.base_model, tokenizer, texts, max_length, in_prefill)
    return model.features(**encoded.to(model.device))


def _labels(model, tokenizer, part: list[Prediction], max_length: int) -> list[str]:
    features = text_features(model, tokenizer, [result.text for result in part], max_length)
    return [_label(model.pool, row, result) for row, result in zip(features, part, strict=True)]


def _label(pool, features: Tensor, result: Prediction) -> str:
    return pool.task(result.task).labels[int(head_logits(pool, features, result).argmax())]


def head_logits(pool, features: Tensor, result: Prediction) -> Tensor:
    """The logits of a row's heads, those of its task's labels, by their shares of the row's weight.

    features: [H].  Returns [number of labels] fp32.
    """
    labels = pool.task(result.task).labels
    columns = {}  # of every task with these labels: where they stand in its head
    for name in (name for name, mass in result.mass.items() if mass > 0):
        theirs = pool.task(name).labels
        if theirs is not None and set(theirs) == set(labels):
            columns[name] = [theirs.index(label) for label in labels]
    if len(columns) < 2:
        return pool.head(result.task)(features)
    total = sum(result.mass[name] for name in columns)
    return sum(
        result.mass[name] / total * pool.head(name)(features)[order] for name, order in columns.items()
    )


def _texts(model, tokenizer, part: list[Prediction], max_length: int, max_new_tokens: int) -> list[str]:
    texts = [result.text for result in part]
    prompts = encode_prompts(tokenizer, texts, max_length, model.is_seq2seq).to(model.device)
    return _generated(model, tokenizer, prompts, max_new_tokens)


def _generated(model, tokenizer, prompts: dict[str, Tensor], max_new_tokens: int) -> list[str]:
    out = model.base_model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    if not model.is_seq2seq:
        out = out[:, prompts["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
