"""What the scaling model counts: a model's shape, a pool, and the bytes that each of them takes, and the
bytes and operations of each phase. Nothing here is measured.
"""

import math
from dataclasses import dataclass, replace

SLOT_BYTES = 4 + 4 + 4 + 1 + 8 + 8 + 8  # of a slot: start, rank, scaling, active, two versions, task
SEARCHED_BYTES = 8 + 1  # of a key that is searched: its task's number, whether its task is found by it
DIRECTION_BYTES, QUANTILES = 1 << 20, 1001  # of a task's statistics; `task_statistics`
CODE_BYTES = 12  # of a key beside its codes: scale and two norms
GROUP, BLOCK = 16, 32  # queries that share a pass over the codes, keys of a block of them (csrc/cpu)
LEARNT_BYTES = 4 * 4  # of a number that is learnt: fp32, its gradient, AdamW's two moments
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3")
BERT = ("bert", "roberta", "xlm-roberta", "camembert")
T5 = ("t5", "mt5")

Pairs = list[tuple[int, int]]


def total(pairs: Pairs) -> int:
    return sum(i + o for i, o in pairs)


def area(pairs: Pairs) -> int:
    return sum(i * o for i, o in pairs)


@dataclass(frozen=True)
class Shape:
    """A model, with its adapted linears.

    key_value, query: widths of k and v, and of q (0: hidden).  gated: gate, up and down, else two linears a
    feed-forward.  decoder: layers with cross-attention beside those of the encoder, `layers`.
    embeddings: rows of tables that the head does not share.  vocab: 0 without a head, nothing is generated.
    """

    name: str
    hidden: int
    inter: int
    layers: int
    key_value: int
    vocab: int
    gated: bool = True
    query: int = 0
    decoder: int = 0
    embeddings: int = 0

    @property
    def attention(self) -> int:
        """Width of q, and of the scores' products together."""
        return self.query or self.hidden

    @property
    def linears(self) -> Pairs:
        """(in_features, out_features) of a layer."""
        h, q, kv, i = self.hidden, self.attention, self.key_value, self.inter
        feed_forward = [(h, i), (h, i), (i, h)] if self.gated else [(h, i), (i, h)]
        return [(h, q), (h, kv), (h, kv), (q, h), *feed_forward]

    @property
    def decoder_linears(self) -> Pairs:
        """Of a decoder's layer; the last two make keys and values of what the encoder read."""
        h, q, kv = self.hidden, self.attention, self.key_value
        return [*self.linears, (h, q), (q, h), (h, kv), (h, kv)]

    @property
    def read(self) -> Pairs:
        """The linears that a prompt's tokens pass."""
        return self.layers * self.linears + self.decoder * self.decoder_linears[-2:]

    @property
    def step(self) -> Pairs:
        """The linears that a new token passes."""
        return self.decoder * self.decoder_linears[:-2] if self.decoder else self.layers * self.linears

    @property
    def all_linears(self) -> Pairs:
        return self.layers * self.linears + self.decoder * self.decoder_linears

    @property
    def features(self) -> int:
        """Numbers of an entry of rank 1: in + out of every linear."""
        return total(self.all_linears)

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """Of the linears and the head."""
        return area(self.all_linears) + self.head

    @property
    def numbers(self) -> int:
        """Weights and embeddings; norms and biases are not counted."""
        return self.weights + self.embeddings * self.hidden

    @property
    def causal(self) -> bool:
        """Whether a token of the prompt looks back only."""
        return bool(self.vocab) and not self.decoder

    def cache(self, tokens: int, size: int) -> int:
        """Bytes of the keys and values of `tokens` tokens, prompts and answers: those that a step reads."""
        return 2 * self.key_value * (self.decoder or self.layers) * tokens * size if self.vocab else 0


SHAPES = {
    "minilm": Shape("all-MiniLM-L6-v2", 384, 1536, 6, 384, 0, gated=False, embeddings=30522 + 512 + 2),
    "smol": Shape("SmolLM2-135M", 576, 1536, 30, 192, 49152),
    "wide": Shape("four layers, 1,024 wide", 1024, 2816, 4, 1024, 8192, embeddings=8192),
    "7b": Shape("two layers of LLaMA-2-7B", 4096, 11008, 2, 4096, 32000, embeddings=32000),
    "llama7b": Shape("LLaMA-2-7B", 4096, 11008, 32, 4096, 32000, embeddings=32000),
    "llama70b": Shape("LLaMA-2-70B", 8192, 28672, 80, 1024, 32000, embeddings=32000),
}


def of_config(config, name: str) -> Shape:
    """The shape that a Hugging Face config describes. ValueError for other families than those above."""
    kind = config.model_type
    if kind in LLAMA:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Shape(
            name,
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            head_dim * (config.num_key_value_heads or heads),
            config.vocab_size,
            query=head_dim * heads,
            embeddings=0 if config.tie_word_embeddings else config.vocab_size,
        )
    if kind in BERT:
        sizes = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.hidden_size
        tables = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
        return Shape(name, *sizes, 0, gated=False, embeddings=tables)
    if kind in T5:
        width = config.d_kv * config.num_heads
        return Shape(
            name,
            config.d_model,
            config.d_ff,
            config.num_layers,
            width,
            config.vocab_size,
            gated=config.is_gated_act,
            query=width,
            decoder=config.num_decoder_layers,
            embeddings=0 if config.tie_word_embeddings else config.vocab_size,
        )
    raise ValueError(f"{name}: shapes are known of {', '.join(LLAMA + BERT + T5)}; this is a {kind}")


def find(name: str) -> Shape:
    """One of `SHAPES`, or of the config of a folder or hub name. SystemExit says why there is none."""
    if name in SHAPES:
        return SHAPES[name]
    from transformers import AutoConfig

    try:
        return of_config(AutoConfig.from_pretrained(name), name)
    except (OSError, ValueError) as error:
        known = f"no shape for {name!r}; names: {', '.join(SHAPES)}, or a Hugging Face folder or hub name"
        raise SystemExit(f"{known}\n{error}") from None


def doubled(count: int, first: int) -> int:
    """The room for `count` that doubling from `first` on makes."""
    return first * 2 ** max(0, math.ceil(math.log2(count / first)))


@dataclass(frozen=True)
class Pool:
    """`entries` of rank `rank`, `per_task` of them a task; queries of `dim` numbers, of `states` layers;
    factors of `size` bytes a number."""

    entries: int
    rank: int = 8
    per_task: int = 4
    dim: int = 2688  # seven states of MiniLM
    size: int = 2
    states: int = 7

    @property
    def tasks(self) -> float:
        return self.entries / self.per_task

    def factors(self, shape: Shape) -> int:
        """Bytes of A and B: with the base, or in host memory behind resident slots. Slabs double."""
        return doubled(self.entries, self.per_task) * self.rank * shape.features * self.size

    @property
    def index(self) -> int:
        """Bytes of keys and the slots' numbers, which double, of what is searched, and of its codes: in host
        memory."""
        codes = 32 * math.ceil(self.entries / 32) * (8 * math.ceil(self.dim / 8) + CODE_BYTES)
        kept = doubled(self.entries, 8) * (4 * self.dim + SLOT_BYTES)
        return kept + self.entries * (4 * (self.dim + 1) + SEARCHED_BYTES) + codes

    @property
    def statistics(self) -> int:
        """Bytes of the tasks' statistics (as many directions as there are) and of the metric."""
        rank = min(DIRECTION_BYTES // self.dim, self.dim)
        task = rank * (self.dim + 4) + self.dim * (8 + 4 * self.states) + 4 * QUANTILES
        return round(self.tasks * task + 4 * self.dim**2)

    @property
    def of_a_label(self) -> int:
        """Bytes of a label by which its task is found: of its mean in the statistics, and of its key and its
        codes, which are searched."""
        return (self.dim + 4) + 4 * (self.dim + 1) + (self.dim + CODE_BYTES) + SEARCHED_BYTES

    def learnt(self, shape: Shape) -> int:
        """Numbers that a task learns."""
        return self.per_task * self.rank * shape.features

    def of_an_entry(self, shape: Shape) -> tuple[int, int]:
        """(bytes of its factors, of its keys and codes), without room to grow."""
        return (
            self.rank * shape.features * self.size,
            9 * self.dim + CODE_BYTES + SLOT_BYTES + SEARCHED_BYTES + 4,
        )

    def memory(self, shape: Shape) -> int:
        return self.factors(shape) + self.index + self.statistics


@dataclass(frozen=True)
class Batch:
    """`rows` prompts of `tokens` tokens, then `new` ones each; a row mixes `top_k` entries, the rows
    together `distinct` ones."""

    rows: int
    tokens: int = 1
    new: int = 0
    top_k: int = 4
    distinct: int = 0

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are kept in the end."""
        return self.rows * (self.tokens + self.new)


@dataclass(frozen=True)
class Count:
    """Bytes that must move, each once, and operations (a multiply-add is two): of the frozen model, of the
    mixtures, of attention's products."""

    bytes: float
    frozen: float = 0
    mixture: float = 0
    attention: float = 0

    @property
    def operations(self) -> float:
        return self.frozen + self.mixture + self.attention


def count_search(pool: Pool, rows: int) -> Count:
    """Codes, once for each group of queries (`GROUP` of csrc/cpu); P D multiply-adds a query."""
    passes = math.ceil(rows / GROUP)
    return Count(passes * pool.entries * (pool.dim + CODE_BYTES), 2 * rows * pool.entries * pool.dim)


def count_add(pool: Pool) -> Count:
    """The metric's factor again, D^3 / 3 operations in fp64, two triangular solves a key, 2 D^2; reads metric
    and keys, writes factor, what is searched and its codes."""
    D, P = pool.dim, pool.entries
    return Count(4 * D**2 + 8 * D**2 + P * (8 * D + D + CODE_BYTES), D**3 / 3 + 2 * P * D**2)


def count_update(shape: Shape, pool: Pool, batch: Batch) -> Count:
    """Of all linears that a new token passes, a token a row: the distinct factors, x, y read and written."""
    ins, outs = (sum(pair[i] for pair in shape.step) for i in (0, 1))
    moved = batch.distinct * pool.rank * (ins + outs) + batch.rows * (ins + 2 * outs)
    return Count(pool.size * moved, 0, 2 * batch.rows * batch.top_k * pool.rank * (ins + outs))


def count_step(shape: Shape, pool: Pool, batch: Batch) -> Count:
    """The last new token of every row: weights and distinct factors once, every row's keys and values."""
    features, weights = total(shape.step), area(shape.step) + shape.head
    moved = pool.size * (weights + batch.distinct * pool.rank * features)
    scores = 4 * batch.cached * shape.attention * (shape.decoder or shape.layers)
    mixture = 2 * batch.rows * batch.top_k * pool.rank * features
    return Count(moved + shape.cache(batch.cached, pool.size), 2 * batch.rows * weights, mixture, scores)


def count_prefill(shape: Shape, pool: Pool, batch: Batch) -> Count:
    """All prompts, and the first new token's logits; attention looks back only where it is causal."""
    T, factors = batch.rows * batch.tokens, pool.rank * total(shape.read)
    first = batch.rows * (shape.head + (area(shape.step) if shape.decoder else 0))
    moved = pool.size * (shape.weights + batch.distinct * factors) + shape.cache(T, pool.size)
    scores = (2 if shape.causal else 4) * T * batch.tokens * shape.attention * shape.layers
    return Count(moved, 2 * (T * area(shape.read) + first), 2 * T * batch.top_k * factors, scores)


def count_training(shape: Shape, pool: Pool, batch: Batch) -> Count:
    """Forward, backward and AdamW for one task's factors; answers are as long as prompts.

    4 N T operations for N frozen weights (forward, input gradient), 6 T K r (in + out) for the mixture
    (forward, dx, dA and dB), attention three times (once forward, twice backward). Weights are read twice;
    of what is learnt AdamW reads four numbers and writes three, in fp32.
    """
    T = batch.rows * batch.tokens
    moved = 2 * pool.size * shape.weights + 7 * 4 * pool.learnt(shape)
    scores = 3 * (2 if shape.causal else 4) * T * batch.tokens * shape.attention
    mixture = 6 * T * batch.top_k * pool.rank * shape.features
    return Count(moved, 4 * T * shape.weights, mixture, scores * (shape.layers + shape.decoder))


def tasks_that_fit(shape: Shape, memory: float, pool: Pool) -> int:
    """The most tasks whose factors, keys and statistics fit into `memory` bytes."""

    def fits(tasks: int) -> bool:
        return replace(pool, entries=tasks * pool.per_task).memory(shape) <= memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
