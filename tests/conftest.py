import importlib.util
import os
from pathlib import Path

# As `make test` does: PyTorch's own products depend on the batch with more threads. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy  # noqa: E402
import torch  # noqa: E402

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():  # the kernels run interpreted; decided before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM  # noqa: E402

from slm_fast import SLMConfig, get_slm_model, plan  # noqa: E402
from slm_fast.loading import packaged_model  # noqa: E402

# Where the kernels' tests run, and in which dtypes: the interpreter has no bf16 products.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def exact_dot(self, a, b, d, *_):
    """The interpreter's product. A row of it depends on nothing but the row, as on tensor cores: in fp32 its
    last bit would also depend on where BLAS finds it in a tile, on some processors."""
    product = numpy.matmul(a.data.astype(numpy.float64), b.data.astype(numpy.float64))
    return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


if DEVICE == "cpu" and importlib.util.find_spec("triton"):
    from triton.runtime import interpreter

    interpreter.InterpreterBuilder.create_dot = exact_dot


def distinct_rows(op: str) -> list[dict]:
    """The plan tables' rows for an op, one of those whose tiles are the same where the tests run: the
    interpreter knows no stages or dependent launches."""
    unseen = () if DEVICE == "cuda" else ("num_stages", "pdl")

    def seen(value):
        if not isinstance(value, dict):
            return value
        return {name: seen(part) for name, part in value.items() if name not in unseen}

    found = {}
    for path in sorted(plan.FOLDER.glob("sm_*.json")):
        for row in plan.load(path.stem)["rows"]:
            if row["op"] == op:
                row = row | {
                    "plan": row["plan"] | {"pdl": row["plan"].get("pdl", False) and DEVICE == "cuda"}
                }
                found.setdefault(str((row["phase"], row["dtype"], seen(row["plan"]))), row)
    return list(found.values())


DIM = 24  # query size of the small models' precomputed embeddings

TINY = {
    "llama": (AutoModelForCausalLM, "LlamaConfig", dict(num_key_value_heads=2)),
    "mistral": (AutoModelForCausalLM, "MistralConfig", dict(num_key_value_heads=2, head_dim=8)),
    "bert": (AutoModel, "BertConfig", {}),
    "roberta": (AutoModel, "RobertaConfig", dict(max_position_embeddings=64)),
    "t5": (AutoModelForSeq2SeqLM, "T5Config", {}),
}


def tiny_base(family: str, dtype=torch.float32):
    """A small randomly initialised model of a real architecture, the same at every call."""
    auto, config_name, options = TINY[family]
    transformers.set_seed(0)
    if family == "t5":
        options = dict(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
    else:
        options = options | dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
        )
    config = getattr(transformers, config_name)(**options | dict(vocab_size=96, pad_token_id=0))
    return auto.from_config(config, dtype=dtype).eval()


def clustered_embeddings(task: int, count: int = 40, dim: int = DIM) -> torch.Tensor:
    """Queries of a task: points around its own centre."""
    generator = torch.Generator().manual_seed(100 + task)
    centre = torch.randn(dim, generator=generator) * 2
    return centre + 0.5 * torch.randn(count, dim, generator=generator)


def word_tokenizer(words: list[str], cls=transformers.PreTrainedTokenizerFast, **options):
    """A tokenizer whose tokens are `words`, which hold [PAD], [EOS] and [UNK]."""
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")
    return cls(tokenizer_object=tokenizer, **special, **options)


def tiny_model(family: str = "llama", num_tasks: int = 3, fill: bool = True, dtype=torch.float32, **config):
    """A small SLM model with `num_tasks` tasks and random factors, so that every mixture does something."""
    settings = dict(
        r=4, top_k=2, entries_per_task=2, target_modules="all-linear", weighting="softmax", temperature=4.0
    )
    model = get_slm_model(tiny_base(family, dtype), SLMConfig(**(settings | config)))
    for t in range(num_tasks):
        model.add_task(f"task{t}", embeddings=clustered_embeddings(t), progress=False)
    if fill:
        generator = torch.Generator().manual_seed(7)
        for factors in model.pool.factors:
            factors.B.copy_(0.1 * torch.randn(factors.B.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def minilm() -> str:
    try:
        return str(packaged_model("minilm"))
    except OSError as error:
        pytest.skip(f"needs the packaged MiniLM: {error}")


@pytest.fixture(scope="session")
def benchmark_data() -> Path:
    path = Path(os.environ.get("SLM_FAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"needs the benchmark data: no folder {path}; set SLM_FAST_DATA")
    return path
