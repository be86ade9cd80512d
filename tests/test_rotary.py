import pytest
import torch
from conftest import DEVICE, KERNEL_DTYPES
from test_ops import assert_close
from test_ops_key_search import name_of
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from slm_fast import ops

pytest.importorskip("triton")


def problem(rows, tokens, heads=(4, 2), head=16, dtype=torch.float32, shared=True):
    g = torch.Generator().manual_seed(rows * 100 + tokens)
    q, k = (torch.randn(rows * tokens, n * head, generator=g).to(dtype) for n in heads)
    angles = torch.randn(1 if shared else rows, tokens, head, generator=g)
    return [t.to(DEVICE) for t in (q, k, angles.cos().to(dtype), angles.sin().to(dtype))]


def expected(q, k, cos, sin):
    """What transformers computes."""
    rows, tokens, head = max(q.shape[0] // cos.shape[1], 1), *cos.shape[1:]
    parts = (x.view(rows, tokens, -1, head).transpose(1, 2) for x in (q, k))
    return [y.transpose(1, 2).reshape(rows * tokens, -1) for y in apply_rotary_pos_emb(*parts, cos, sin)]


@pytest.mark.parametrize("backend", ["gpu", "reference"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "rows,tokens,heads,head,shared",
    [
        (1, 1, (4, 2), 16, True),
        (3, 1, (1, 1), 8, False),
        (2, 5, (17, 3), 24, True),  # heads that share a block, a head size that is no power of two
        (4, 3, (32, 32), 128, False),
        (2, 7, (9, 3), 64, True),
    ],
)
def test_it_is_what_transformers_computes(rows, tokens, heads, head, shared, dtype, backend):
    q, k, cos, sin = problem(rows, tokens, heads, head, dtype, shared)
    own, exact = expected(q, k, cos, sin), expected(*(t.float() for t in (q, k, cos, sin)))
    ops.rotary_(q, k, cos, sin, backend=backend)
    for got, plain, want in zip((q, k), own, exact, strict=True):
        assert_close(got, want, plain)


@pytest.mark.parametrize("backend", ["gpu", "reference"])
def test_parts_of_a_stacked_product(backend):
    q, k, cos, sin = problem(2, 3)
    stacked = torch.cat((q, k, k), 1)
    parts = stacked.split([q.shape[1], k.shape[1], k.shape[1]], 1)
    ops.rotary_(*parts[:2], cos, sin, backend=backend)
    for got, want in zip(parts, (*expected(q, k, cos, sin), k), strict=True):
        assert_close(got, want, want)


def test_no_tokens():
    q, k, cos, sin = problem(2, 3)
    for backend in ("gpu", "reference"):
        ops.rotary_(q[:0], k[:0], cos, sin, backend=backend)


def test_errors():
    q, k, cos, sin = problem(2, 3)
    with pytest.raises(ValueError, match="for q"):
        ops.rotary_(q[:5], k[:5], cos, sin)
    with pytest.raises(ValueError, match="k must"):
        ops.rotary_(q, k.half(), cos, sin)
    with pytest.raises(ValueError, match="contiguous"):
        ops.rotary_(q[:, ::2], k[:, ::2], cos[..., ::2].contiguous(), sin[..., ::2].contiguous())
    with pytest.raises(ValueError, match="no gradient"):
        ops.rotary_(q.requires_grad_(), k, cos, sin)
