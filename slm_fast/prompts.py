"""How a prompt and its completion become tokens, the same in training and in answering."""

import logging

from torch import Tensor

logger = logging.getLogger(__name__)

IGNORED = -100  # the label of a token that is not to be learnt


class Prompt(str):
    """A prompt in two parts: `system` says what to do, `user` what to do it with.

    As a string, which is what is routed and what a head reads, it is "system ### user", as in the authors'
    code. It equals only a prompt of the same parts, and no string in one part.
    """

    def __new__(cls, user: str, system: str) -> "Prompt":
        self = super().__new__(cls, f"{system} ### {user}")
        self.user, self.system = user, system
        return self

    def __getnewargs__(self) -> tuple[str, str]:
        return self.user, self.system

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prompt) and (self.user, self.system) == (other.user, other.system)

    def __ne__(self, other: object) -> bool:  # str has one of its own
        return not self == other

    __hash__ = str.__hash__


def plain_text(prompt: str) -> str:
    """The prompt in one part: the lines of the system, then those of the user."""
    return f"{prompt.system}\n{prompt.user}" if isinstance(prompt, Prompt) else prompt


def prompt_text(tokenizer, prompt: str) -> str:
    """The prompt as the model expects it: through the tokenizer's chat template where it has one.

    A `Prompt` is a system and a user turn; where the template has no system turn (it raises, or leaves the
    system out), and without a template, it is one text, see `plain_text`.
    """
    if not getattr(tokenizer, "chat_template", None):
        return plain_text(prompt) + "\n"
    if isinstance(prompt, Prompt):
        from jinja2 import TemplateError

        try:
            text = _chat(tokenizer, system=prompt.system, user=prompt.user)
        except TemplateError:
            text = ""
        if text and prompt.system.strip() in text:
            return text
    return _chat(tokenizer, user=plain_text(prompt))


def _chat(tokenizer, **turns: str) -> str:
    messages = [{"role": role, "content": text} for role, text in turns.items()]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompts(tokenizer, prompts: list[str], max_length: int, seq2seq: bool) -> dict[str, Tensor]:
    """Padded prompts for `generate`: on the left for decoder-only models, else on the right."""
    side = tokenizer.padding_side
    tokenizer.padding_side = "right" if seq2seq else "left"
    try:
        if seq2seq:
            texts = [plain_text(prompt) for prompt in prompts]
            return tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        rows = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
        if max(map(len, rows)) > max_length:
            logger.warning("prompts longer than max_length=%d tokens are cut at their start", max_length)
        return tokenizer.pad({"input_ids": [row[-max_length:] for row in rows]}, return_tensors="pt")
    finally:
        tokenizer.padding_side = side


def encode_texts(base, tokenizer, texts: list[str], max_length: int, in_prefill: bool) -> dict[str, Tensor]:
    """Padded texts for a base whose features heads read: as they are, or, where the base generates text and
    one pass both routes and answers (`route_in_prefill`), as prompts (`encode_prompts`), since nobody knows
    before it whether a head will read them."""
    if in_prefill and getattr(base, "can_generate", bool)():
        return encode_prompts(tokenizer, texts, max_length, bool(base.config.is_encoder_decoder))
    return tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")


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
        source = tokenizer(plain_text(prompt), truncation=True, max_length=max_length)["input_ids"]
        labels = tokenizer(text_target=completion, truncation=True, max_length=max_length)["input_ids"]
        return {"input_ids": source, "labels": labels}
    source = _prompt_ids(tokenizer, prompt)
    target = tokenizer(completion, add_special_tokens=False)["input_ids"][: max_length - 1] + eos
    source = source[-(max_length - len(target)) :] if len(target) < max_length else []
    return {"input_ids": source + target, "labels": [IGNORED] * len(source) + target}
