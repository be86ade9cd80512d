import pytest
import torch
from conftest import TINY, clustered_embeddings, tiny_base, tiny_model

from slm_fast import KnowledgePool, SLMConfig, patch_model, unpatch_model
from slm_fast.layers import MixtureLinear, default_pool, target_linears


@pytest.mark.parametrize(
    ("family", "suffix", "count"),
    [("llama", "o_proj", 2), ("bert", "attention.output.dense", 2), ("roberta", "attention.output.dense", 2),
     ("t5", "o", 6)],
)  # fmt: skip
def test_default_targets_are_the_papers(family, suffix, count):
    found = target_linears(tiny_base(family), None)
    assert len(found) == count and all(name.endswith(suffix) for name in found)


@pytest.mark.parametrize(("family", "count"), [("llama", 14), ("bert", 12), ("t5", 32)])
def test_all_linear_leaves_the_heads_alone(family, count):
    base = tiny_base(family)
    found = target_linears(base, "all-linear")
    assert len(found) == count and not any("lm_head" in n or "pooler" in n for n in found)


def test_default_targets_of_the_siblings():
    from transformers import AutoModel, ElectraConfig, MT5Config

    small = dict(
        num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=20
    )
    assert target_linears(AutoModel.from_config(ElectraConfig(embedding_size=16, **small)), None)
    mt5 = MT5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=20)
    assert all(name.endswith(".o") for name in target_linears(AutoModel.from_config(mt5), None))


def test_unknown_target_is_named():
    with pytest.raises(ValueError, match="w_proj match no linear.*o_proj"):
        target_linears(tiny_base("llama"), ["o_proj", "w_proj"])


@pytest.mark.parametrize("family", TINY)
def test_patching_is_undone_exactly(family):
    base = tiny_base(family)
    modules, weights = dict(base.named_modules()), {k: v.clone() for k, v in base.state_dict().items()}
    pool = default_pool(base, SLMConfig(target_modules="all-linear"))
    patch_model(base, pool)
    assert sum(isinstance(m, MixtureLinear) for m in base.modules()) == len(pool.modules_shape)
    assert not any(p.requires_grad for p in base.parameters())
    with pytest.raises(ValueError, match="patched already"):
        patch_model(base, pool)
    assert unpatch_model(base) is base
    assert all(p.requires_grad for p in base.parameters())
    assert dict(base.named_modules()) == modules
    assert all(torch.equal(weights[k], v) for k, v in base.state_dict().items())


def test_a_pool_for_another_model_changes_nothing():
    base = tiny_base("llama")
    for modules in (
        {"model.layers.7.self_attn.o_proj": (32, 32)},
        {"model.layers.0.self_attn.o_proj": (64, 32)},
    ):
        with pytest.raises(ValueError, match="made for another base model"):
            patch_model(base, KnowledgePool(SLMConfig(), modules))
        assert not any(isinstance(m, MixtureLinear) for m in base.modules())


def test_rows_must_divide():
    model = tiny_model()
    layer = next(m for m in model.modules() if isinstance(m, MixtureLinear))
    with (
        model.state.use(model.route(embeddings=clustered_embeddings(0, 2))),
        pytest.raises(ValueError, match="3 rows.*multiple of the routing's 2"),
    ):
        layer(torch.randn(3, 5, 32))


def test_state_is_restored_after_an_error():
    model = tiny_model()
    inputs = torch.randint(1, 96, (2, 5))
    with pytest.raises(IndexError):
        model(input_ids=torch.full((2, 5), 10_000), embeddings=clustered_embeddings(0, 2))
    assert model.state.routing is None
    frozen = tiny_base("llama")(inputs).logits
    torch.testing.assert_close(model.base_model(inputs).logits, frozen, rtol=0, atol=1e-5)
