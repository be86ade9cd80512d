import pytest
import torch
from test_norm_shrink import (
    DTYPES,
    INTEGER,
    PLAN,
    Case,
    check_every_token_has_its_h,
    plan_with,
    poisoned,  # noqa: F401
)
from test_ops_key_search import name_of
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from slm_fast import reference
from slm_fast.kernels import silu_mul_shrink


class SiluCase(Case):
    """A `Case` of one linear whose inputs are gate and up."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, linears=1, **kwargs)

    def make_inputs(self, num_tokens, in_features, g):
        gate, up = torch.randn(2, num_tokens, in_features, generator=g) * 3
        return [gate.to(self.dtype), up.to(self.dtype)]

    def reference(self, inputs, A, dtype):
        options = {"max_rank": self.max_rank, "resident": self.resident}
        return reference.silu_mul_shrink(*inputs, A[0], self.routing, **options)

    def forward(self, plan):
        gate, up, A = self.on_device(*self.inputs, self.A[0])
        options = {"max_rank": self.max_rank, "plan": plan, "resident": self.resident}
        return silu_mul_shrink.silu_mul_shrink_fwd(gate, up, A, self.on_device(*self.routing), **options)

    def backward(self, plan, u, h=None, needs=(True, True)):
        dh, du, gate, up, A = self.on_device(self.dh, self.du[0], *self.inputs, self.A[0])
        options = {"max_rank": self.max_rank, "plan": plan, "resident": self.resident}
        routing = self.on_device(*self.routing)
        dgate, dup, dA = silu_mul_shrink.silu_mul_shrink_bwd(
            dh, du, gate, up, A, routing, owned=self.owned, needs=needs, h=h, **options
        )
        return [dgate, dup], [dA]


@pytest.mark.parametrize("in_features", [1, 7, 63, 1000, 3424])
@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_sizes(in_features, resident, dtype):
    case = SiluCase((4, 3, 7), (3, 8), in_features=in_features, resident=resident, dtype=dtype)
    _, u = case.verify(plan_with(splits=3))
    assert u.shape[1] == {1000: 2, 3424: 3}.get(in_features, 1)


@pytest.mark.parametrize(
    "ranks", [(1,) * 3, (3,) * 3, (12,) * 3, (48,) * 3, (2, 12, 1, 48, 3, 8)], ids=name_of
)
@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
def test_ranks(ranks, resident):
    SiluCase((4, 3, 10), ranks, 3, resident=resident).verify()


@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize("kind", ["distinct", "zipf"])
def test_popularity_and_top_k(kind, top_k):
    SiluCase((1,) * 5, (3,) * 8, top_k, kind=kind).verify()


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("lengths", [(1,), (17, 0, 1, 20), (0, 0, 5), (6,) * 3], ids=name_of)
def test_lengths(lengths, block):
    SiluCase(lengths, (3, 8)).verify(plan_with(BLOCK_T=block, BLOCK_K=128))


@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=name_of)
def test_no_tokens(lengths, resident):
    case = SiluCase(lengths, resident=resident)
    h, u = case.forward(PLAN)
    assert h.shape == (0, 100) and u.shape == (1, 0, 32 if resident else 16)
    (dgate, dup), (dA,) = case.backward(PLAN, u)
    assert dgate.shape == dup.shape == (0, 100) and not dA.any()


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=name_of
)
def test_factors_of_another_dtype(dtypes):
    SiluCase(dtype=dtypes[0], factor_dtype=dtypes[1]).verify()


def test_every_token_has_its_h():
    case = SiluCase((20, 20))
    check_every_token_has_its_h(case)


@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
def test_kept_h_and_needs(resident):
    case = SiluCase(resident=resident, dtype=torch.float16)
    h, u = case.forward(PLAN)
    grads, dA = case.backward(PLAN, u)
    kept, kept_dA = case.backward(PLAN, u, h=h)
    assert all(torch.equal(a, b) for a, b in zip(grads + dA, kept + kept_dA, strict=True))
    none, only_dA = case.backward(PLAN, u, h=h, needs=(False, True))
    assert none == [None, None] and torch.equal(only_dA[0], dA[0])
    only, none = case.backward(PLAN, u, needs=(True, False))
    assert none == [None] and all(torch.equal(a, b) for a, b in zip(grads, only, strict=True))


def test_picks_without_weight_are_not_read():
    case = SiluCase((4, 4, 4), (8, 3, 12), 3, kind="identical", dtype=torch.float16)
    case.routing[4][:, 2] = 0
    case.A[0][11:] = torch.nan
    case.du[:, :, 24:] = 0
    h, u = case.forward(PLAN)
    assert h.isfinite().all() and u.isfinite().all() and not u[..., 24:].any()
    grads, (dA,) = case.backward(PLAN, u)
    assert all(grad.isfinite().all() for grad in grads) and not dA[3:].any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_gates():
    case = SiluCase((16,))
    case.inputs[0] *= 100
    case.verify()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_h_has_the_bits_of_transformers(dtype):
    case = SiluCase((16,), (1, 1), in_features=1000, dtype=dtype)
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=8))
    with torch.no_grad():
        gate, up = case.on_device(*case.inputs)
        want = mlp.act_fn(gate) * up
    h = case.forward(PLAN)[0]
    # exp differs by an ulp between libraries: 4 ulp of h at most in fp32; an fp16 value only where that
    # crosses a rounding boundary.
    distance = (h.view(INTEGER[dtype]).int() - want.view(INTEGER[dtype]).int()).abs()
    assert distance.max() <= (4 if dtype == torch.float32 else 2)
    assert (distance == 0).float().mean() > (0.5 if dtype == torch.float32 else 0.998)


@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
def test_reference_gradients(resident):
    case = SiluCase((2, 1, 2), (2, 1), in_features=5, resident=resident)
    leaves = [t.double().requires_grad_() for t in (*case.inputs, case.A[0])]
    options = {"max_rank": 2, "resident": resident}
    assert torch.autograd.gradcheck(
        lambda gate, up, A: reference.silu_mul_shrink(gate, up, A, case.routing, **options), leaves
    )
