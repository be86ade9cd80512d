"""A runner on a tiny random model, a tokenizer and an encoder made here, and a few made-up sentences."""

import torch
from conftest import tiny_base, word_tokenizer
from transformers import PreTrainedTokenizerFast

from slm_fast import SLMConfig, get_slm_model
from slm_fast.continual.runner import ContinualRunner
from slm_fast.continual.tasks import Example, Task
from slm_fast.trainer import default_arguments

NOUNS = ["car", "house", "sky", "hat", "cup", "dog", "tree", "shop"]
SENTENCES = {
    "colour": ("the {noun} is {label}", ["red", "blue"]),
    "size": ("what a {label} {noun} that was", ["huge", "tiny", "broad"]),
    "mood": ("I feel {label} about my {noun} today", ["glad", "sad"]),
}
WORDS = sorted({word for t, labels in SENTENCES.values() for word in t.split() + labels} | set(NOUNS))
VOCABULARY = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}


def make_tasks(*names: str, generation: tuple[str, ...] = ()) -> list[Task]:
    tasks = []
    for name in names or ("colour", "size"):
        template, labels = SENTENCES[name]
        rows = [Example(template.format(noun=noun, label=label), label) for noun in NOUNS for label in labels]
        cut = len(rows) * 3 // 4
        tasks.append(Task(name, rows[:cut], rows[cut:], None if name in generation else labels))
    return tasks


def embed(texts: list[str]) -> torch.Tensor:
    """The mean of fixed random word vectors: [B, 24]."""
    table = torch.randn(len(VOCABULARY), 24, generator=torch.Generator().manual_seed(5))
    return torch.stack([table[[VOCABULARY.get(word, 1) for word in text.split()]].mean(0) for text in texts])


def make_tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(list(VOCABULARY), model_input_names=["input_ids", "attention_mask"])


def new_runner(
    output_dir,
    methods=("slm",),
    tasks=None,
    *,
    family="bert",
    encoder=embed,
    epochs=2,
    config=None,
    **options,
) -> ContinualRunner:
    settings = dict(target_modules="all-linear", r=2, entries_per_task=2, num_groups=4)
    config = SLMConfig(**(settings | (config or {})))
    model = get_slm_model(tiny_base(family), config, encoder=encoder, tokenizer=make_tokenizer())
    training = dict(num_train_epochs=epochs, learning_rate=2e-2, save_steps=3, use_cpu=True)
    args = default_arguments("unused", per_device_train_batch_size=4, **training)
    settings = dict(methods=methods, batch_size=4, max_length=16, max_new_tokens=1, progress=False)
    return ContinualRunner(model, tasks or make_tasks(), args, output_dir=output_dir, **(settings | options))


def kept(runner: ContinualRunner, name: str) -> dict[str, bytes]:
    """All tensors on disk that a method keeps."""
    folder = runner.output_dir / name
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


class Killed(BaseException):
    pass


def dying(function, at: int):
    """The function, which raises at its call number `at`."""
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return function(*args, **kwargs)

    return call
