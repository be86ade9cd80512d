import pytest
import torch
from conftest import DIM, TINY, clustered_embeddings, tiny_base, tiny_model

from slm_fast import Routing, SLMConfig, get_slm_model
from slm_fast.reference import dense_offset


def merged(model, routing: Routing, row: int, family: str, **options):
    """A plain Hugging Face model with one row's mixture merged into its weights, in fp32."""
    base = tiny_base(family, **options)
    pool = model.pool
    with torch.no_grad():
        for name, factors in zip(pool.modules_shape, pool.factors, strict=True):
            tables = (factors.A, factors.B, pool.start, pool.rank, pool.scaling)
            base.get_submodule(name).weight += dense_offset(
                *tables, routing.indices[row], routing.weights[row]
            )
    return base


def mixed_queries(rows: int) -> torch.Tensor:
    return torch.cat([clustered_embeddings(b % 3, 12)[b : b + 1] for b in range(rows)])


def run(model, family, ids, mask, **kwargs):
    extra = {"decoder_input_ids": ids[:, :3]} if family == "t5" else {}
    return model(input_ids=ids, attention_mask=mask, **extra, **kwargs)


def output(out):
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("family", TINY)
def test_each_row_equals_the_merged_model(family, backend):
    model = tiny_model(family, backend=backend)
    ids = torch.randint(1, 96, (5, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    routing = model.route(embeddings=mixed_queries(5))
    assert len({tuple(r.tolist()) for r in routing.indices}) > 1
    with torch.no_grad():
        mixed = output(run(model, family, ids, mask, routing=routing))
        for row in range(5):
            alone = output(
                run(merged(model, routing, row, family), family, ids[row : row + 1], mask[row : row + 1])
            )
            keep = mask[row].bool() if family != "t5" else slice(None)
            torch.testing.assert_close(mixed[row][keep], alone[0][keep], rtol=1e-4, atol=1e-4)
        frozen = output(run(tiny_base(family), family, ids, mask))
    assert (mixed - frozen).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "mistral", "t5"])
@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=False),
        dict(do_sample=False, num_beams=3),
        dict(do_sample=False, num_beams=4, num_return_sequences=2),
        dict(do_sample=False, use_cache=False),
    ],
    ids=["greedy", "beams", "beams-return2", "no-cache"],
)
def test_generation_equals_the_merged_model_row_by_row(family, options):
    model = tiny_model(family)
    ids = torch.randint(3, 96, (4, 6), generator=torch.Generator().manual_seed(2))
    query = mixed_queries(4)
    options = options | dict(max_new_tokens=6, min_new_tokens=6, pad_token_id=0)
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), embeddings=query, **options)
    per_row = options.get("num_return_sequences", 1)
    routing = model.route(embeddings=query)
    for row in range(4):
        one = ids[row : row + 1]
        alone = merged(model, routing, row, family).generate(
            input_ids=one, attention_mask=torch.ones_like(one), **options
        )
        assert torch.equal(tokens[row * per_row : (row + 1) * per_row], alone)


def test_32_rows_with_32_mixtures_give_each_rows_own_tokens():
    model = tiny_model(num_tasks=8)
    generator = torch.Generator().manual_seed(4)
    indices = torch.stack([torch.randperm(16, generator=generator)[:2] for _ in range(32)])
    first = torch.rand(32, 1, generator=generator)
    routing = Routing.make(indices, torch.cat([first, 1 - first], 1), pool_version=model.pool.version)
    ids = torch.randint(3, 96, (32, 6), generator=generator)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    together = model.generate(ids, attention_mask=torch.ones_like(ids), routing=routing, **options)
    assert len({tuple(row.tolist()) for row in together[:, 6:]}) > 8
    with torch.no_grad():
        logits = model(input_ids=ids, routing=routing).logits
        for row in range(32):
            one, mine = ids[row : row + 1], routing.rows(slice(row, row + 1))
            alone = model.generate(one, attention_mask=torch.ones_like(one), routing=mine, **options)
            assert torch.equal(together[row], alone[0])
            expected = merged(model, routing, row, "llama")(one).logits
            torch.testing.assert_close(logits[row], expected[0], rtol=0, atol=1e-4)


def test_sampled_return_sequences_and_generation_config():
    model = tiny_model()
    ids = torch.randint(3, 96, (3, 4))
    settings = dict(max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    out = model.generate(ids, embeddings=mixed_queries(3), do_sample=True, num_return_sequences=2, **settings)
    assert out.shape == (6, 8)
    from transformers import GenerationConfig

    config = GenerationConfig(num_beams=3, do_sample=False, **settings)
    by_config = model.generate(ids, embeddings=mixed_queries(3), generation_config=config)
    by_keyword = model.generate(ids, embeddings=mixed_queries(3), num_beams=3, do_sample=False, **settings)
    assert torch.equal(by_config, by_keyword)


def test_padding_side_does_not_matter():
    model = tiny_model()
    short = torch.randint(3, 96, (1, 4))
    query = mixed_queries(1)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    alone = model.generate(short, attention_mask=torch.ones_like(short), embeddings=query, **options)[:, 4:]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)
    both = torch.cat([padded, torch.randint(3, 96, (1, 7))])
    mask = (torch.arange(7) >= torch.tensor([[3], [0]])).long()
    out = model.generate(both, attention_mask=mask, embeddings=mixed_queries(2), **options)[:1, 7:]
    assert torch.equal(alone, out)


def test_base_rows_are_bit_equal_to_the_frozen_model():
    model = tiny_model()
    ids = torch.randint(1, 96, (4, 20))  # more tokens than a decoding step, which has sums of its own
    with torch.no_grad():
        frozen = tiny_base("llama")(ids).logits
        mixed = model(input_ids=ids, adapter_names=["__base__", "task0", "__base__", "task1.1"]).logits
        none = model(input_ids=ids, adapter_names=["__base__"] * 4).logits
    assert torch.equal(none, frozen)
    assert torch.equal(mixed[[0, 2]], frozen[[0, 2]])
    assert not torch.equal(mixed[1], frozen[1]) and not torch.equal(mixed[3], frozen[3])


def test_frozen_dtype_is_kept():
    model = tiny_model(dtype=torch.bfloat16)
    assert model.pool.factors[0].A.dtype == torch.float32
    logits = model(input_ids=torch.randint(1, 96, (2, 5)), embeddings=mixed_queries(2)).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.parametrize("family", TINY)
def test_gradients_with_and_without_checkpointing_are_equal(family):
    ids = torch.randint(1, 96, (3, 8), generator=torch.Generator().manual_seed(3))
    grads = []
    for checkpointing in (False, True):
        model = tiny_model(family)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with model.training_task("task1"):
            # several batches with different routings before the backward pass: recomputation must see its own
            losses = []
            for rows in (slice(0, 2), slice(1, 3)):
                query = clustered_embeddings(1, 6)[rows]
                out = run(
                    model, family, ids[rows], torch.ones_like(ids[rows]), embeddings=query, task="task1"
                )
                losses.append(output(out).float().square().mean())
            sum(losses).backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 4
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


def test_only_the_task_is_trainable():
    model = tiny_model("bert")
    model.add_task("topic", embeddings=clustered_embeddings(5), labels=["a", "b"], progress=False)
    assert not any(p.requires_grad for p in model.parameters())
    with model.training_task("topic"):
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert names == {
            f"pool.factors.{m}.{s}_owned" for m in range(len(model.pool.factors)) for s in "AB"
        } | {"pool.heads.task:topic.weight", "pool.heads.task:topic.bias"}
    assert not any(p.requires_grad for p in model.parameters())


def test_classification_forward_and_loss():
    model = tiny_model("bert")
    model.add_task("topic", embeddings=clustered_embeddings(5), labels=["a", "b", "c"], progress=False)
    ids = torch.randint(1, 96, (4, 6))
    labels = torch.tensor([0, 2, 1, 1])
    out = model(input_ids=ids, embeddings=clustered_embeddings(5, 4), task="topic", labels=labels)
    assert out.logits.shape == (4, 3)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    scaled = model(
        input_ids=ids,
        embeddings=clustered_embeddings(5, 4),
        task="topic",
        labels=labels,
        num_items_in_batch=8,
    )
    torch.testing.assert_close(scaled.loss, out.loss / 2)


def test_explain_names_tasks_and_entries():
    model = tiny_model(num_tasks=3)
    rows = model.explain(routing=model.route(embeddings=mixed_queries(3)))
    assert [row["task"] for row in rows] == ["task0", "task1", "task2"]
    for t, row in enumerate(rows):
        assert row["mass"][f"task{t}"] > 0.5
        assert sum(e["weight"] for e in row["entries"]) == pytest.approx(1.0, abs=1e-5)
        assert row["entries"][0]["entry"].startswith(f"task{t}.")
    base = model.explain(routing=model.pool.fixed_routing(["__base__"]))
    assert base[0]["task"] is None and base[0]["entries"] == []


class TestBadInput:
    ids = torch.randint(1, 96, (2, 5))

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            (dict(), "say how to route"),
            (dict(embeddings=torch.zeros(3, DIM)), "embeddings has 3 rows, the batch has 2"),
            (dict(adapter_names=["task0"]), "adapter_names has 1 rows, the batch has 2"),
            (dict(adapter_names=["task0", "nope"]), "unknown adapter 'nope'"),
            (dict(embeddings=torch.zeros(2, DIM), adapter_names=["task0"] * 2), "only one of"),
            (dict(embeddings=torch.full((2, DIM), float("nan"))), "finite"),
            (dict(embeddings=torch.zeros(2, DIM + 1)), rf"\[N, {DIM}\]"),
            (dict(embeddings=torch.zeros(2, DIM), task="nope"), "unknown task 'nope'"),
            (dict(embeddings=torch.zeros(2, DIM), tasks="task0"), "unexpected keyword arguments: tasks"),
            (dict(texts=["a", "b"]), "has no encoder"),
        ],
    )
    def test_forward(self, kwargs, message):
        model = tiny_model()
        with pytest.raises(ValueError, match=message):
            model(input_ids=self.ids, **kwargs)
        assert model.state.routing is None

    def test_empty_batch(self):
        model = tiny_model()
        with pytest.raises(ValueError, match="the batch is empty"):
            model(input_ids=self.ids[:0], embeddings=torch.zeros(0, DIM))
        with pytest.raises(ValueError, match="the batch is empty"):
            model.generate(input_ids=self.ids[:0], embeddings=torch.zeros(0, DIM))
        with pytest.raises(ValueError, match="no input"):
            model(embeddings=torch.zeros(1, DIM))

    def test_generate_checks_the_task(self):
        with pytest.raises(ValueError, match="unknown task 'nope'"):
            tiny_model().generate(input_ids=self.ids, adapter_names=["task0"] * 2, task="nope")

    def test_stale_routing(self):
        model = tiny_model()
        routing = model.route(embeddings=mixed_queries(2))
        model.remove_task("task0")
        with pytest.raises(ValueError, match="stale"):
            model(input_ids=self.ids, routing=routing)
        with pytest.raises(ValueError, match="stale"):
            model.explain(routing=routing)

    def test_add_task_changes_nothing_when_it_fails(self):
        model = tiny_model()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        bad = clustered_embeddings(8)
        bad[3, 3] = float("inf")
        for kwargs in (
            dict(embeddings=bad),
            dict(embeddings=clustered_embeddings(8)[:1]),
            dict(embeddings=clustered_embeddings(8), method="magic"),
            dict(embeddings=clustered_embeddings(8), labels=["a", "a"]),
            dict(embeddings=clustered_embeddings(8)[:, :5]),
            dict(),
        ):
            with pytest.raises(ValueError):
                model.add_task("new", progress=False, **kwargs)
        assert model.pool.task_names() == ["task0", "task1", "task2"]
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        with pytest.raises(ValueError, match="already has a task 'task0'"):
            model.add_task("task0", embeddings=clustered_embeddings(8), progress=False)


def test_modes_and_settings_survive():
    model = tiny_model("bert", top_k=1)
    assert not model.training and not model.base_model.training
    other = tiny_model("bert", top_k=2).pool
    model.repatch(other)
    assert model.pool is other and model.slm_config.top_k == 2
    foreign = tiny_model("llama").pool
    ids = torch.randint(1, 96, (2, 5))
    before = model(input_ids=ids, embeddings=mixed_queries(2)).last_hidden_state
    with pytest.raises(ValueError, match="another base model"):
        model.repatch(foreign)
    assert torch.equal(model(input_ids=ids, embeddings=mixed_queries(2)).last_hidden_state, before)
    pool = model.pool
    model.unload()
    with pytest.raises(ValueError, match="was unloaded"):
        model(input_ids=ids, adapter_names=["task0"] * 2)
    model.repatch(pool)
    assert torch.equal(model(input_ids=ids, embeddings=mixed_queries(2)).last_hidden_state, before)


def test_checkpointing_survives_another_pool_and_a_kept_graph():
    model = tiny_model()
    model.gradient_checkpointing_enable()
    model.repatch(tiny_model().pool)
    model.train()
    with model.training_task("task1"):
        out = model(input_ids=torch.randint(1, 96, (2, 5)), embeddings=mixed_queries(2), task="task1")
        loss = out.logits.square().mean()
        loss.backward(retain_graph=True)
        first = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        loss.backward()
        for parameter, grad in zip((p for p in model.parameters() if p.requires_grad), first, strict=True):
            torch.testing.assert_close(parameter.grad, 2 * grad)


def test_the_whole_model_moves_to_another_dtype():
    model = tiny_model().to(torch.bfloat16)
    logits = model(input_ids=torch.randint(1, 96, (2, 5)), embeddings=mixed_queries(2)).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_an_empty_pool_is_the_frozen_model():
    model = get_slm_model(tiny_base("llama"), SLMConfig())
    ids = torch.randint(1, 96, (2, 40))
    assert torch.equal(model(input_ids=ids).logits, tiny_base("llama")(ids).logits)
    torch.testing.assert_close(model(input_ids=ids[:, :5]).logits, tiny_base("llama")(ids[:, :5]).logits)
    with pytest.raises(ValueError, match="no entries yet"):
        model.route(embeddings=torch.zeros(2, DIM))
