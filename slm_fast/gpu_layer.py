"""The linears of a patched decoder layer on a GPU, inference only: those that read the same input are one
product, and their rank-space vectors come with the norm or the activation in front of them.

    h, u = norm_shrink(x);              [q | k | v] = stacked_linear(h, u);    rotary_(q, k)
    x = x + o_proj(attention(q, k, v))
    h, u = norm_shrink(x);              [gate | up] = stacked_linear(h, u)
    h, u = silu_mul_shrink(gate, up);   y = x + down_proj(h, u)

with x added inside the product behind it. Where the plan table prefers a library's linear with `mixture`
behind it (rows of few tokens that pick from many entries), the linears run one by one with the same u.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_fast import ops
from slm_fast.layers import MixtureLinear, RoutingState
from slm_fast.pool import KnowledgePool


class StackedLinears:
    """Frozen linears that read the same input. Their weights lie in one tensor [sum of out_features,
    in_features] of which the modules' parameters are views, so that there is no second copy."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self.linears = [m.base_layer if isinstance(m, MixtureLinear) else m for m in modules]
        self.mixtures = [m for m in modules if isinstance(m, MixtureLinear)]
        self.sizes = [linear.out_features for linear in self.linears]
        self._parameters = [p for linear in self.linears for p in linear.parameters(recurse=False)]
        self._places: list[int] = []

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias), stacked again where a parameter has moved (`model.to`, another dtype)."""
        if [p.data_ptr() for p in self._parameters] != self._places:
            self._weight = _stacked([linear.weight for linear in self.linears])
            biases = [linear.bias for linear in self.linears]
            self._bias = None if biases[0] is None else _stacked(biases)
            self._places = [p.data_ptr() for p in self._parameters]
        return self._weight, self._bias


@torch.inference_mode(False)
@torch.no_grad()
def _stacked(parameters: list[nn.Parameter]) -> Tensor:
    """The values in one tensor, of which the parameters, still the same objects, become views."""
    out = torch.cat([p.detach() for p in parameters])
    for parameter, part in zip(parameters, out.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
    return out


def added(x: Tensor, linear: nn.Module, h: Tensor) -> Tensor:
    """x + linear(h)."""
    return linear(h, residual=x) if isinstance(linear, MixtureLinear) else x + linear(h)


class GpuLayer:
    """What comes before and after the attention of a decoder layer, at x [T, hidden].

    Args: attention, mlp, norms: the layer's own modules; norms[0] and norms[1] stand before the first two.
    pool, state: of the mixtures.
    """

    def __init__(
        self, attention: nn.Module, mlp: nn.Module, norms, pool: KnowledgePool, state: RoutingState
    ) -> None:
        self.norms, self.pool, self.state = norms, pool, state
        self.qkv = StackedLinears((attention.q_proj, attention.k_proj, attention.v_proj))
        self.gate_up = StackedLinears((mlp.gate_proj, mlp.up_proj))
        self.out, self.down, self.act = attention.o_proj, mlp.down_proj, mlp.act_fn

    @property
    def dtype(self) -> torch.dtype:
        return self.out.weight.dtype

    def heads(self, x: Tensor, rows: int, cos: Tensor, sin: Tensor) -> tuple[Sequence[Tensor], int]:
        """q and k, rotated, and v: [T, heads * head_size] each, for a batch of `rows` rows; and the rows, for
        `tail`."""
        q, k, v = self._linears(x, rows, self.norms[0], self.qkv)
        ops.rotary_(q, k, cos, sin, backend=self.pool.backend)
        return (q, k, v), rows

    def tail(self, attended: Tensor, x: Tensor, rows: int) -> Tensor:
        """The layer's output of its input x and what its attention gave."""
        x = added(x, self.out, attended)
        gate, up = self._linears(x, rows, self.norms[1], self.gate_up)
        if not isinstance(self.down, MixtureLinear) or self.state.routing is None:
            return added(x, self.down, self.act(gate) * up)
        mixed = self.state.operands(self.pool, gate, rows, self.down.out_features)
        A, _ = mixed.slabs(self.down)
        h, u = ops.silu_mul_shrink(gate, up, A, **self._shrink(mixed))
        return self.down(h, u, x)

    def _linears(self, x: Tensor, rows: int, norm: nn.Module, group: StackedLinears) -> Sequence[Tensor]:
        weight, bias = group.tensors()
        if not group.mixtures or self.state.routing is None:
            return F.linear(norm(x), weight, bias).split(group.sizes, -1)
        mixed = self.state.operands(self.pool, x, rows, weight.shape[0])
        slabs = [mixed.slabs(m) for m in group.mixtures]
        A = [a for a, _ in slabs]
        h, u = ops.norm_shrink(x, norm.weight, norm.variance_epsilon, A, **self._shrink(mixed))
        if mixed.op != "mixture":
            B = iter(b for _, b in slabs)
            parts = [next(B) if isinstance(m, MixtureLinear) else m.out_features for m in group.modules]
            settings = {"max_rank": mixed.max_rank, "backend": self.pool.backend}
            y = ops.stacked_linear(h, weight, bias, parts, mixed.routing, u, **settings)
            return y.split(group.sizes, -1)
        us, ys = iter(zip(slabs, u, strict=True)), []
        for module, linear in zip(group.modules, group.linears, strict=True):
            y = linear(h)
            if isinstance(module, MixtureLinear):
                (A, B), own = next(us)
                ops.mixture(
                    y, h, A, B, *mixed.routing, u=own, max_rank=mixed.max_rank, backend=self.pool.backend
                )
            ys.append(y)
        return ys

    def _shrink(self, mixed) -> dict:
        gathered = mixed.max_rank is not None
        routing = {"routing": mixed.routing, "max_rank": mixed.max_rank} if gathered else {}
        return routing | {"backend": self.pool.backend}
