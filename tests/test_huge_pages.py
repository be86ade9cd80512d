import copy
import mmap

import pytest
import torch
import transformers

from slm_fast import SLMConfig, patch_model
from slm_fast.huge_pages import LINE, PAGE, moved
from slm_fast.layers import default_pool

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no such pages")


def test_values_stay_and_storages_are_separate():
    given = [torch.randn(1000, 700), torch.randn(3).bfloat16(), torch.zeros(0), torch.arange(7)]
    got = moved(given)
    for old, new in zip(given, got, strict=True):
        assert torch.equal(new, old) and new.dtype is old.dtype and new.shape == old.shape
        assert new.untyped_storage().nbytes() == old.untyped_storage().nbytes()
    assert got[0].data_ptr() % PAGE == 0 and got[1].data_ptr() % LINE == 0
    assert got[1].data_ptr() - got[0].data_ptr() == -(-given[0].nbytes // LINE) * LINE
    got[0].zero_()
    assert given[0].any() and torch.equal(got[1], given[1])


def test_memory_lives_as_long_as_one_tensor():
    last = moved([torch.full((1 << 20,), float(i)) for i in range(3)])[2]
    other = [torch.randn(1 << 20) for _ in range(3)]
    assert bool((last == 2).all()) and len(other) == 3


@pytest.mark.parametrize("case", ["small", "strided", "switched off"])
def test_tensors_that_stay(case, monkeypatch):
    given = [torch.randn(1 << 20)]
    if case == "small":
        given = [torch.randn(100)]
    if case == "strided":
        given.append(torch.randn(8, 8).T)
    if case == "switched off":
        monkeypatch.setenv("SLM_FAST_HUGE_PAGES", "0")
    assert all(new is old for new, old in zip(moved(given), given, strict=True))


def test_a_patched_model_keeps_its_parameters(tmp_path):
    sizes = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=4, vocab_size=96)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    parameters = dict(base.named_parameters())
    values = {name: p.detach().clone() for name, p in parameters.items()}
    ids = torch.randint(1, 96, (2, 40))
    with torch.no_grad():
        want = base(ids).logits
        patch_model(base, default_pool(base, SLMConfig(), torch.float32))
        places = [p.data_ptr() % LINE for p in base.model.layers.parameters()]
        assert torch.equal(base(ids).logits, want) and not any(places)
    assert {id(p) for p in base.parameters()} == {id(p) for p in parameters.values()}
    assert all(torch.equal(p, values[name]) for name, p in parameters.items())
    torch.save(base.state_dict(), tmp_path / "weights.pt")
    size = sum(v.nbytes for v in values.values())
    assert size < (tmp_path / "weights.pt").stat().st_size < 1.2 * size
    twin = copy.deepcopy(base).double()
    assert twin.lm_head.weight.dtype is torch.float64 and base.lm_head.weight.dtype is torch.float32
