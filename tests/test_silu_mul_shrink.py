import pytest
import torch
from test_compiled import BACKENDS
from test_norm_shrink import (
    BAD_ROUTINGS,
    DTYPES,
    INTEGER,
    PLAN,
    ROUTING,
    Case,
    check_an_index_outside_the_pool,
    check_chain,
    check_every_token_has_its_h,
    check_given_splits,
    check_gradients_on_demand,
    check_leading_dimensions_and_strides,
    check_reference_backward,
    plan_with,
    poisoned,  # noqa: F401
)
from test_ops_key_search import name_of
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from slm_fast import ops, reference
from slm_fast.kernels import silu_mul_shrink

MLP = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=8))


class SiluCase(Case):
    """A `Case` of one linear whose inputs are gate and up."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, linears=1, **kwargs)

    def make_inputs(self, num_tokens, in_features, g):
        gate, up = torch.randn(2, num_tokens, in_features, generator=g) * 3
        return [gate.to(self.dtype), up.to(self.dtype)]

    def reference(self, inputs, A, dtype):
        return reference.silu_mul_shrink(*inputs, A[0], self.routing, max_rank=self.max_rank)

    def op(self, inputs, A, A_owned, backend):
        owned = {"A_owned": A_owned and A_owned[0], "owned": self.owned}
        return ops.silu_mul_shrink(*inputs, A[0], self.route(), **owned, backend=backend)

    def plain(self, inputs):
        gate, up = inputs
        return MLP.act_fn(gate) * up

    def forward(self, plan, splits=None):
        gate, up, A = self.on_device(*self.inputs, self.A[0])
        options = {"max_rank": self.max_rank, "plan": plan, "splits": splits}
        return silu_mul_shrink.silu_mul_shrink_fwd(gate, up, A, self.route(), **options)

    def backward(self, plan, u, h=None, needs=(True, True)):
        dh, du, gate, up, A = self.on_device(self.dh, self.du[0], *self.inputs, self.A[0])
        options = {"max_rank": self.max_rank, "plan": plan, "owned": self.owned, "needs": needs, "h": h}
        dgate, dup, dA = silu_mul_shrink.silu_mul_shrink_bwd(dh, du, gate, up, A, self.route(), **options)
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


@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
def test_given_splits(resident):
    check_given_splits(SiluCase(in_features=1000, resident=resident))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_gates():
    case = SiluCase((16,))
    case.inputs[0] *= 100
    case.verify()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_h_has_the_bits_of_transformers(dtype):
    case = SiluCase((16,), (1, 1), in_features=1000, dtype=dtype)
    with torch.no_grad():
        want = case.plain(case.on_device(*case.inputs))
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
    assert torch.autograd.gradcheck(
        lambda gate, up, A: reference.silu_mul_shrink(gate, up, A, case.routing, max_rank=2), leaves
    )


@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
def test_reference_backward(resident):
    case = SiluCase((2, 1, 4), (2, 3, 1), in_features=5, resident=resident)
    case.owned, settings = (1, 4), {"routing": case.routing, "max_rank": 3}

    def forward(inputs, A):
        return reference.silu_mul_shrink(*inputs, A[0], **settings)

    def backward(dh, du, inputs, A):
        return reference.silu_mul_shrink_backward(dh, du, *inputs, A[0], **settings, owned=case.owned)

    check_reference_backward(case, forward, backward)


# ---- the public op


@pytest.mark.parametrize("resident", [False, True], ids=["gather", "resident"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_public_op(dtype, resident):
    case = SiluCase((3, 0, 5, 9), (8, 3, 8), resident=resident, dtype=dtype, in_features=1040)
    case.verify_public("silu_mul_shrink")


@pytest.mark.parametrize("factor_dtype", DTYPES, ids=name_of)
def test_public_op_with_factors_of_another_dtype(factor_dtype):
    dtype = DTYPES[1 - DTYPES.index(factor_dtype)]
    case = SiluCase((3, 3), (3, 8), dtype=dtype, factor_dtype=factor_dtype, in_features=1040)
    case.verify_public("silu_mul_shrink")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_on_demand(backend):
    check_gradients_on_demand(SiluCase((4, 3), (3, 8)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_and_strides(backend):
    check_leading_dimensions_and_strides(SiluCase((5, 5, 5), (3, 8)), backend)


def test_an_index_outside_the_pool():
    check_an_index_outside_the_pool(SiluCase((4, 4, 4)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("resident", [False, True], ids=["mixture", "fused_linear"])
def test_chain_of_activation_and_linear(resident, backend):
    check_chain(SiluCase((3, 2, 4), (3, 8, 2), in_features=20), resident, (12,), backend)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gate", torch.randn(6, 8).double(), "gate must be float32"),
        ("up", torch.randn(6, 9), "up must have shape"),
        ("up", torch.randn(6, 8).half(), "up must be float32"),
        ("up", torch.randn(6, 8, device="meta"), "up must be on"),
        ("A", torch.randn(4), "A must have two dimensions"),
        ("A", torch.randn(4, 9), "A must have shape"),
        ("A", torch.randn(4, 8).double(), "A must be float32 or"),
        ("A_owned", torch.randn(1, 8), "A_owned must have shape"),
        *BAD_ROUTINGS,
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects(backend, field, value, message):
    arguments = {
        "gate": torch.randn(6, 8),
        "up": torch.randn(6, 8),
        "A": torch.randn(4, 8),
        "routing": ROUTING,
        "max_rank": 2,
        "A_owned": torch.randn(2, 8),
        "owned": (1, 3),
    }
    ops.silu_mul_shrink(**arguments, backend="reference")
    with pytest.raises(ValueError, match=message):
        ops.silu_mul_shrink(**arguments | {field: value}, backend=backend)


@pytest.mark.parametrize("backend", ["gpu", "reference"])
def test_inputs_may_be_parts_of_a_stacked_product(backend):
    case = SiluCase((4, 3), (3, 8), in_features=48)
    stacked = torch.cat(case.inputs, 1)
    parts = stacked.split(48, 1)
    got = ops.silu_mul_shrink(*parts, case.A[0], case.route(), backend=backend)
    want = ops.silu_mul_shrink(*case.inputs, case.A[0], case.route(), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
