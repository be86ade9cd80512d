"""How a prompt and its completion become tokens, the same in training and in answering."""

import logging

from torch import Tensor

logger = logging.getLogger(__name__)

IGNORED = -100  # the label of a token that is not to be learnt


def prompt_text(tokenizer, prompt: str) -> str:
    """The prompt as the model expects it: through the tokenizer's chat template where it has one."""
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return prompt + "\n"


def encode_prompts(tokenizer, prompts: list[str], max_length: int, seq2seq: bool) -> dict[str, Tensor]:
    """Padded prompts for `generate`: on the left for decoder-only models, else on the right."""
    side = tokenizer.padding_side
    tokenizer.padding_side = "right" if seq2seq else "left"
    try:
        if seq2seq:
            return tokenizer(
                prompts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
        rows = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
        if max(map(len, rows)) > max_length:
            logger.warning("prompts longer than max_length=%d tokens are cut at their start", max_length)
        return tokenizer.pad({"input_ids": [row[-max_length:] for row in rows]}, return_tensors="pt")
    finally:
        tokenizer.padding_side = side


def _prompt_ids(tokenizer, prompt: str) -> list[int]:
    special = not getattr(tokenizer, "chat_template", None)
    ids = tokenizer(prompt_text(tokenizer, prompt), add_special_tokens=special)["input_ids"]
    return ids[:-1] if special and ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_example(
    tokenizer, prompt: str, completion: str, max_length: int, seq2seq: bool
) -> dict[str, list[int]]:
    """One training example; the loss is on the completion. A long prompt is cut at its start."""
    eos = [tokenizer.eos_token_id]
    if seq2seq:
        source = tokenizer(prompt, truncation=True, max_length=max_length)["input_ids"]
        labels = tokenizer(text_target=completion, truncation=True, max_length=max_length)["input_ids"]
        return {"input_ids": source, "labels": labels}
    source = _prompt_ids(tokenizer, prompt)
    target = tokenizer(completion, add_special_tokens=False)["input_ids"][: max_length - 1] + eos
    source = source[-(max_length - len(target)) :] if len(target) < max_length else []
    return {"input_ids": source + target, "labels": [IGNORED] * len(source) + target}
