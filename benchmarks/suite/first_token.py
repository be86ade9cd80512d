"""From texts to the logits of the first answer: what a user waits for.

    frozen         texts -> tokenizer -> prefill
    on             texts -> encoder -> key search -> routing; tokenizer -> prefill with every row's mixture
    in the prefill texts -> tokenizer -> prefill, whose first layers are the query, with every row's mixture

SmolLM2-135M with its own tokenizer, in bf16 on CUDA; queries by all-MiniLM-L6-v2, which runs on the CPU as in
every model and whose memory of texts is not asked. On CUDA every part ends when the device has done it. Cases
"routed in the prefill" have queries of the model's first half, mixtures in its other half and texts as
prompts; there `on` makes the query in a pass of its own, and both must find the same entries. The
logits must be those of fp32 models that get each row by itself, without padding, and for `on` the routing as
given numbers, on the reference ops: at most twice the error that the frozen model makes by single rows.
Medians of the parts go into the record: `encoder_seconds`, `search_seconds`, `tokenizer_seconds`,
`prefill_seconds`.
"""

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import contenders as common
import torch
from contenders import ENTRIES, RANK, TARGETS, TOP_K
from scaling_shapes import SHAPES, Batch, Pool, count_prefill, of_config
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from slm_fast import Routing, SLMConfig, get_slm_model
from slm_fast.loading import packaged_model, with_pad_token
from slm_fast.prompts import encode_prompts
from suite.cases import Case, Contender, Effort, clock_of, measure
from suite.machine import dtype_name

OURS, PREFILL, WORDS = "on", "in the prefill", 64  # words of a text
MAX_LENGTH = 256  # tokens of a prompt, as the encoder keeps them
VOCABULARY = (
    "the a one this that every no some river model city answer question light number house paper water "
    "history letter engine table garden reason winter machine is was has gives takes finds keeps follows "
    "of in on with from to and or but because while where which small large old new open quiet green first"
).split()


def make_texts(rows: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(VOCABULARY, k=WORDS)) for _ in range(rows)]


def make_tokenizer():
    """SmolLM2's, out of its GGUF file; `AutoTokenizer` would read that twice, which takes ten seconds."""
    path = packaged_model("smollm2")
    tokenizer = with_pad_token(PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name))
    tokenizer.padding_side = "left"
    return tokenizer


def make_model(base: nn.Module, entries: int, tokenizer=None):
    """The engine on a copy of the base, with keys among which texts like ours have their queries; with a
    tokenizer it routes in the prefill."""
    settings = dict(encoder_name_or_path="minilm")
    if tokenizer is not None:
        settings = dict(encoder_name_or_path="backbone", encoder_max_length=MAX_LENGTH, route_in_prefill=True)
    config = SLMConfig(r=RANK, top_k=TOP_K, target_modules=TARGETS["all"], **settings)
    model = get_slm_model(copy.deepcopy(base), config, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(0)
    queries = model.encoder(make_texts(16, seed=1)).repeat(entries // 4, 1)  # four for each entry
    queries += 0.02 * torch.randn(queries.shape, generator=generator)
    model.pool.add_task("all", queries[:entries], queries=queries, generator=generator)
    model.pool.factors.to(base.dtype)
    for factors in model.pool.factors:
        factors.B.copy_(0.02 * torch.randn(factors.B.shape, generator=generator))
    return model.to(base.device)


class FirstToken:
    """A contender: a call returns the logits [rows, vocab] and keeps how long its parts took.

    tokenize: texts -> inputs of `forward`.  model: whose encoder routes the texts first.  wait: until the
    device has done a part.
    """

    def __init__(
        self,
        forward: Callable,
        tokenize: Callable,
        texts: list[str],
        model=None,
        wait: Callable[[], object] | None = None,
    ) -> None:
        self.forward, self.tokenize, self.texts, self.model = forward, tokenize, texts, model
        self.wait = wait or (lambda: None)
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begin)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        options = {}
        if self.model is not None:
            with self.part("encoder"):
                queries = self.model.encoder.encode(self.texts)  # anew: a text that is known costs nothing
            with self.part("search"):
                options["routing"] = self.model.pool.search(queries)
        with self.part("tokenizer"):
            inputs = self.tokenize(self.texts)
        with self.part("prefill"):
            logits = self.forward(**inputs, **options, logits_to_keep=1).logits[:, -1]
        return logits

    def numbers(self) -> dict[str, float]:
        """Medians of all calls but the first, which is none of the rounds."""
        return {f"{name}_seconds": statistics.median(taken[1:]) for name, taken in self.seconds.items()}


@torch.inference_mode()
def by_rows(forward: Callable[[int], Callable], tokenize: Callable, texts: list[str]) -> Tensor:
    """[rows, vocab] fp32 logits of every text by itself; `forward(row)` answers it."""
    found = []
    for row, text in enumerate(texts):
        found.append(forward(row)(**tokenize([text]), logits_to_keep=1).logits[:, -1].float())
    return torch.cat(found)


def exact_logits(model, routing: Routing, tokenize: Callable, texts: list[str]) -> list[Tensor]:
    """Of an fp32 copy on the reference ops, with the mixtures and without."""
    exact = copy.deepcopy(model).float()
    exact.pool.config.backend = "reference"

    def answered(row: int) -> Callable:
        return common.engine_forward(exact, routing.rows([row]))

    return [by_rows(answered, tokenize, texts), by_rows(lambda _: exact.base_model, tokenize, texts)]


def work(base: nn.Module, model, routing: Routing, tokens: int) -> tuple[float, float]:
    """(bytes, operations) of `on`: the texts' pass for the query and the one that answers. MiniLM's counts
    where it is on the base's device, the tokenizer and the search do not."""
    shape, pool = of_config(base.config, "base"), Pool(4, size=base.dtype.itemsize)
    batch, entry = Batch(routing.num_rows, tokens, top_k=0), RANK * common.factor_features(model)
    passes = [count_prefill(shape, pool, batch)]
    if model.slm_config.route_in_prefill:
        passes.append(count_prefill(replace(shape, layers=shape.layers // 2, vocab=0), pool, batch))
    elif base.device.type == "cpu":  # whose texts have two tokens of its own
        passes.append(count_prefill(SHAPES["minilm"], Pool(4, size=4), replace(batch, tokens=tokens + 2)))
    moved = sum(count.bytes for count in passes) + pool.size * common.distinct_entries(routing) * entry
    mixture = 2 * batch.rows * tokens * TOP_K * entry
    return moved, sum(count.operations for count in passes) + mixture


def case(base: nn.Module, model, tokenizer, rows: int) -> tuple[Case, dict[str, FirstToken]]:
    """The case and its contenders by name."""
    texts, prefills, device = make_texts(rows), model.slm_config.route_in_prefill, base.device

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        if prefills:
            return encode_prompts(tokenizer, texts, MAX_LENGTH, False).to(device)
        return tokenizer(texts, padding=True, return_tensors="pt").to(device)

    found = model.route(texts)
    routing = Routing.make(found.indices, found.weights, pool_version=model.pool.version)
    mixed, plain = exact_logits(model, routing, tokenize, texts)
    own = by_rows(lambda _: base, tokenize, texts)
    allowed = 2 * float((own - plain).norm() / plain.norm()) + 1e-2

    def right(want: Tensor) -> Callable[[Tensor], str | None]:
        def check(got: Tensor) -> str | None:
            error = float((got.float() - want).norm() / want.norm())
            return None if error <= allowed else f"wrong logits: error {error:.1e}, allowed {allowed:.1e}"

        return check

    wait = torch.cuda.synchronize if device.type == "cuda" else None
    paths = {
        "frozen": FirstToken(base, tokenize, texts, wait=wait),
        OURS: FirstToken(model, tokenize, texts, model, wait),
    }
    contenders = [
        Contender("frozen", lambda _: paths["frozen"](), right(plain)),
        Contender(OURS, lambda _: paths[OURS](), right(mixed)),
    ]
    if prefills:
        paths[PREFILL] = FirstToken(model, tokenize, texts, wait=wait)

        def as_routed(got: Tensor) -> str | None:
            if not torch.equal(model.last_routing.indices, found.indices):
                return "other entries than those that a pass of its own finds"
            return right(mixed)(got)

        contenders.append(Contender(PREFILL, lambda _: paths[PREFILL](), as_routed))
    tokens = tokenize(texts)["input_ids"].shape[1]
    axes = {"kind": "first_token", "model": "smol", "rows": rows, "tokens": tokens}
    axes |= {"entries": model.pool.num_entries, "dtype": dtype_name(base.dtype)}
    name = f"first token, smol, {rows} {'row' if rows == 1 else 'rows'} of text"
    name += ", routed in the prefill" if prefills else ""
    moved, operations = work(base, model, routing, tokens)
    return Case("model", name, axes, contenders, OURS, moved, operations, dtype=axes["dtype"]), paths


def records(base: nn.Module, counts: tuple[int, ...], effort: Effort) -> Iterator[dict]:
    """Of a base where it is. `first_token_seconds` is `seconds` by its name."""
    tokenizer = make_tokenizer()
    for prefills in (False, True):
        model = make_model(base, ENTRIES["smol"], tokenizer if prefills else None)
        for rows in counts:
            made, paths = case(base, model, tokenizer, rows)
            record = measure(made, effort, clock_of(base.device.type))
            for name, path in paths.items():
                found = record["contenders"][name]
                if "seconds" in found:
                    found |= path.numbers() | {"first_token_seconds": found["seconds"]}
            yield record
