"""Sequences packed into one row [1, T], as in transformers' batches without padding; each has its mixture."""

import pytest
import torch
from conftest import clustered_embeddings, tiny_base, tiny_model
from test_model import merged
from transformers import DataCollatorWithFlattening

from slm_fast import SLMConfig, patch_model
from slm_fast.cpu_linear import LinearGroup
from slm_fast.layers import Packing, default_pool

LENGTHS = (5, 1, 9, 3)  # few enough for the CPU's own path; a single token among them
LONG = (40, 7, 61)  # too many for it, in fp32


def packed(lengths=LENGTHS) -> dict:
    """A batch as transformers' collator makes it, labels included."""
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(1, 96, (n,), generator=generator).tolist()} for n in lengths]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    return {k: v for k, v in batch.items() if k != "seq_idx"}


def alone(batch: dict) -> list[torch.Tensor]:
    """The ids of its sequences, [1, tokens] each."""
    return list(batch["input_ids"].split(batch["cu_seq_lens_q"].diff().tolist(), 1))


def queries(rows: int) -> torch.Tensor:
    return torch.stack([clustered_embeddings(t % 3)[t] for t in range(rows)])


def both_models(family: str):
    """A `SLMModel`, and the same base patched by itself with its pool."""
    model = tiny_model(family)
    base = tiny_base(family)
    patch_model(base, model.pool, encoder=lambda texts: queries(len(texts)))
    return model, base


def without_labels(batch: dict) -> dict:
    return {k: v for k, v in batch.items() if k != "labels"}


@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=["decoding", "prefill"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_each_sequence_has_the_logits_of_itself_alone(family, lengths, monkeypatch):
    batch, rows = packed(lengths), len(lengths)
    seen = []
    real = LinearGroup.__call__
    monkeypatch.setattr(LinearGroup, "__call__", lambda self, *a, **k: seen.append(1) or real(self, *a, **k))
    model, base = both_models(family)
    routing = model.route(embeddings=queries(rows))
    routing.weights[1] = 0
    with torch.no_grad():
        together = [m(**without_labels(batch), routing=routing) for m in (model, base)]
        assert bool(seen) is (lengths is LENGTHS)
        assert torch.equal(together[0].logits, together[1].logits) and "past_key_values" not in together[0]
        for row, (ids, logits) in enumerate(
            zip(alone(batch), together[0].logits.split(lengths, 1), strict=True)
        ):
            single = model(input_ids=ids, routing=routing.rows([row])).logits
            torch.testing.assert_close(logits, single, rtol=0, atol=1e-5)
            torch.testing.assert_close(
                logits, merged(model, routing, row, family)(ids).logits, rtol=0, atol=1e-4
            )
        frozen = model(**without_labels(batch), adapter_names=["__base__"] * rows).logits.split(lengths, 1)
    assert torch.equal(together[0].logits.split(lengths, 1)[1], frozen[1])
    assert not torch.equal(together[0].logits.split(lengths, 1)[0], frozen[0])
    assert model.state.packing is model.state.routing is None


def test_every_source_has_one_item_for_each_sequence():
    batch = without_labels(packed())
    model, base = both_models("llama")
    query = queries(4)
    with torch.no_grad():
        want = base(**batch, routing=model.route(embeddings=query)).logits
        assert torch.equal(base(**batch, embeddings=query).logits, want)
        assert torch.equal(base(**batch, texts=["a", "b", "c", "d"]).logits, want)
        assert torch.equal(model(**batch, embeddings=query).logits, want)
        named = base(**batch, adapter_names=["task0", "__base__", "task1", "task2"]).logits
        assert torch.equal(
            model(**batch, adapter_names=["task0", "__base__", "task1", "task2"]).logits, named
        )
        embeds = batch | {"input_ids": None, "inputs_embeds": base.model.embed_tokens(batch["input_ids"])}
        assert torch.equal(base(**embeds, embeddings=query).logits, want)
        model.keep_resident(slots=6)
        torch.testing.assert_close(model(**batch, embeddings=query).logits, want, rtol=0, atol=1e-5)


def test_a_routing_in_use_is_that_of_the_sequences():
    batch = without_labels(packed())
    base = tiny_base("llama")
    pool = tiny_model("llama").pool
    state = patch_model(base, pool)
    routing = pool.search(queries(4))
    with torch.no_grad():
        want = base(**batch, routing=routing).logits
        with state.use(routing):
            assert torch.equal(base(**batch).logits, want)
        with state.use(routing, Packing(batch["cu_seq_lens_q"], 18)):
            assert torch.equal(base(**batch).logits, want)
        with state.use(routing.rows([0, 1])), pytest.raises(ValueError, match="2 rows, the batch has 4"):
            base(**batch)
        assert not torch.equal(base(**batch).logits, want)  # the frozen model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_sequences_alone(checkpointing):
    batch = packed(LONG)
    grads = []
    for together in (True, False):
        model = tiny_model("llama")
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        with model.training_task("task1"):
            query = clustered_embeddings(1)[: len(LONG)]
            if together:
                loss = model(**batch, embeddings=query, task="task1").loss
            else:
                total = sum(LONG) - len(LONG)  # predicted tokens
                loss = sum(
                    model(input_ids=ids, labels=ids, embeddings=query[[row]], task="task1").loss
                    * (ids.shape[1] - 1)
                    for row, ids in enumerate(alone(batch))
                )
                loss = loss / total
            loss.backward()
            grads.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(grads[0]) == len(grads[1]) > 10
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(grad.abs().max() > 0 for grad in grads[0])


def test_a_patched_model_trains_on_packed_sequences():
    batch = packed(LONG)
    base = tiny_base("llama")
    pool = tiny_model("llama").pool
    patch_model(base, pool)
    pool.own("task0")
    routing = pool.search(clustered_embeddings(0)[: len(LONG)], "task0")
    base(**batch, routing=routing).loss.backward()
    together = [p.grad.clone() for p in pool.parameters() if p.requires_grad]
    pool.zero_grad()
    for row, ids in enumerate(alone(batch)):
        share = (ids.shape[1] - 1) / (sum(LONG) - len(LONG))
        (share * base(input_ids=ids, labels=ids, routing=routing.rows([row])).loss).backward()
    for a, p in zip(together, (p for p in pool.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    batch = without_labels(packed())
    model, exact = tiny_model("llama", dtype=dtype), tiny_model("llama")
    exact.base_model.load_state_dict({k: v.float() for k, v in model.base_model.state_dict().items()})
    with torch.no_grad():
        got, want = (m(**batch, embeddings=queries(4)).logits.float() for m in (model, exact))
    assert (got - want).abs().max() < 2e-2 * want.abs().max() + 2e-2


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(embeddings=torch.zeros(3, 24)), "embeddings has 3 rows, the batch has 4"),
            (dict(adapter_names=["task0"]), "adapter_names has 1 rows, the batch has 4"),
            (dict(cu_seq_lens_q=torch.tensor([0, 5, 6, 15, 18])), "int32, got .* torch.int64"),
            (dict(cu_seq_lens_q=torch.zeros(1, 5, dtype=torch.int32)), r"\[sequences \+ 1\] int32"),
            (dict(cu_seq_lens_q=torch.zeros(1, dtype=torch.int32)), r"\[sequences \+ 1\] int32"),
            (
                dict(cu_seq_lens_q=torch.tensor([1, 5, 6, 15, 18]).int()),
                "rise from 0 to the batch's 18 tokens",
            ),
            (
                dict(cu_seq_lens_q=torch.tensor([0, 5, 6, 15, 17]).int()),
                "rise from 0 to the batch's 18 tokens",
            ),
            (
                dict(cu_seq_lens_q=torch.tensor([0, 6, 5, 15, 18]).int()),
                "rise from 0 to the batch's 18 tokens",
            ),
            (dict(input_ids=torch.ones(2, 9, dtype=torch.int64)), "one row of packed sequences.* has 2"),
            (dict(input_ids=torch.ones(0, 18, dtype=torch.int64)), "the batch is empty"),
        ],
    )
    def test_forward(self, change, message):
        model, base = both_models("llama")
        batch = without_labels(packed()) | change
        if "embeddings" not in batch and "adapter_names" not in batch:
            batch["adapter_names"] = ["task0"] * 4
        for m in (model, base):
            with pytest.raises(ValueError, match=message):
                m(**batch)
            assert model.state.routing is None

    def test_generate(self):
        model, base = both_models("llama")
        for m in (model, base):
            with pytest.raises(ValueError, match="generate takes no packed sequences"):
                m.generate(**without_labels(packed()), adapter_names=["task0"] * 4)

    def test_heads(self):
        model = tiny_model("bert")
        model.add_task("topic", embeddings=clustered_embeddings(5), labels=["a", "b"], progress=False)
        with pytest.raises(ValueError, match="head of task 'topic' takes no packed sequences"):
            model(**without_labels(packed()), embeddings=clustered_embeddings(5)[:4], task="topic")


def test_compiled():
    base = tiny_base("llama")
    pool = tiny_model("llama").pool
    patch_model(base, pool)
    batch = without_labels(packed(LONG))
    compiled = torch.compile(base, backend="aot_eager")
    routing = pool.search(queries(3))
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**batch, routing=routing).logits,
            base(**batch, routing=routing).logits,
            rtol=0,
            atol=1e-5,
        )
    torch._dynamo.reset()


def test_the_frozen_model_is_not_routed():
    base = tiny_base("llama")
    batch = without_labels(packed(LONG))
    with torch.no_grad():
        want = base(**batch, use_cache=False).logits
        patch_model(base, default_pool(base, SLMConfig()))
        assert torch.equal(base(**batch).logits, want)
