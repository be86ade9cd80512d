import copy
import json
import pickle

import pytest
from conftest import word_tokenizer

from slm_fast.prompts import Prompt, encode_example, encode_prompts, plain_text, prompt_text

INSTRUCTION = "Judge the sentiment. Answer negative, positive or neutral."
INPUT = "Profit rose 14 percent ."
# LLaMA-2-chat's template, as its tokenizer has it.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
REFUSES = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<model>"
)
LEAVES_OUT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% endif %}{% endfor %}<model>"
)


def tokenizer(template=None, **options):
    words = ["[PAD]", "[UNK]", "[EOS]", "[BOS]"] + sorted(set(f"{INSTRUCTION} {INPUT} good".split()))
    made = word_tokenizer(words, **options)
    made.bos_token, made.chat_template = "<s>", template
    return made


def test_llama2s_template_gives_the_papers_prompt():
    """Without the paper's space at the end, which LLaMA's tokenizer puts before the answer's first word."""
    paper = "[INST] <<SYS>>\n{instruction}\n<</SYS>>\n\n{input} [/INST] "
    expected = "<s>" + paper.format(instruction=INSTRUCTION, input=INPUT).rstrip()
    assert prompt_text(tokenizer(LLAMA2), Prompt(INPUT, INSTRUCTION)) == expected
    assert prompt_text(tokenizer(LLAMA2), INPUT) == f"<s>[INST] {INPUT} [/INST]"  # theirs for history


def test_routed_by_the_papers_text():
    prompt = Prompt(INPUT, INSTRUCTION)
    assert str.__str__(prompt) == f"{INSTRUCTION} ### {INPUT}" == f"{prompt}"
    assert json.loads(json.dumps([prompt])) == [f"{INSTRUCTION} ### {INPUT}"]


@pytest.mark.parametrize("template", [REFUSES, LEAVES_OUT])
def test_without_a_system_role_it_is_one_user_turn(template):
    made = tokenizer(template)
    assert prompt_text(made, Prompt(INPUT, INSTRUCTION)) == f"<user>{INSTRUCTION}\n{INPUT}<model>"
    assert prompt_text(made, INPUT) == f"<user>{INPUT}<model>"


def test_without_a_template_it_is_lines():
    prompt, lines = Prompt(INPUT, INSTRUCTION), f"{INSTRUCTION}\n{INPUT}"
    assert prompt_text(tokenizer(), prompt) == lines + "\n" and plain_text(prompt) == lines
    assert prompt_text(tokenizer(), INPUT) == INPUT + "\n"


@pytest.mark.parametrize("seq2seq", [False, True])
def test_tokens_of_training_and_answering_are_those_of_the_lines(seq2seq):
    made, prompt = tokenizer(), Prompt(INPUT, INSTRUCTION)
    lines = plain_text(prompt)
    trained = encode_example(made, prompt, "good", 64, seq2seq)
    assert trained == encode_example(made, lines, "good", 64, seq2seq)
    asked = encode_prompts(made, [prompt], 64, seq2seq)["input_ids"]
    assert asked.equal(encode_prompts(made, [lines], 64, seq2seq)["input_ids"])
    assert not asked.equal(encode_prompts(made, [f"{prompt}"], 64, seq2seq)["input_ids"])


def test_equal_only_to_a_prompt_of_the_same_parts():
    prompt, text = Prompt("b", "a"), "a ### b"
    assert prompt == Prompt("b", "a") and not prompt != Prompt("b", "a")
    assert prompt != text and text != prompt and prompt not in {text: 1} and text not in {prompt: 1}
    assert Prompt("y ### b", "a") != Prompt("b", "a ### y") and prompt != 3
    for again in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert again == prompt and (again.user, again.system) == ("b", "a") and f"{again}" == text
