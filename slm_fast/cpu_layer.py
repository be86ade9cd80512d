"""The linears of a patched decoder layer on the CPU, inference only: two calls that read their weights once.

q, k, v = linears(rms_norm(x)), q and k rotated
x = x + o_proj(attended);  gate, up = linears(rms_norm(x));  y = x + down_proj(silu(gate) * up)
"""

from collections.abc import Sequence

from torch import Tensor, nn

from slm_fast.cpu_linear import LayerTail, LinearGroup, Rotation
from slm_fast.layers import MixtureLinear, RoutingState
from slm_fast.pool import KnowledgePool


class CpuLayer:
    """What comes before and after the attention of a decoder layer, at x [T, hidden].

    Args: attention, mlp, norms: the layer's own modules; norms[0] and norms[1] stand before the first two.
    pool, state: of the mixtures.
    """

    def __init__(
        self, attention: nn.Module, mlp: nn.Module, norms, pool: KnowledgePool, state: RoutingState
    ) -> None:
        self.pool, self.state = pool, state

        def group(*modules: nn.Module, norm: nn.Module | None = None, prologue: str = "none") -> LinearGroup:
            parts = [(m.weight, m.bias, m.factors if isinstance(m, MixtureLinear) else None) for m in modules]
            if norm is None:
                return LinearGroup(parts, prologue=prologue)
            eps = norm.variance_epsilon
            return LinearGroup(parts, prologue="rms_norm", norm_weight=norm.weight, eps=eps)

        self._qkv = group(attention.q_proj, attention.k_proj, attention.v_proj, norm=norms[0])
        self._tail = LayerTail(
            group(attention.o_proj),
            group(mlp.gate_proj, mlp.up_proj, norm=norms[1]),
            group(mlp.down_proj, prologue="silu_mul"),
        )
        self.dtype = self._qkv.dtype

    def heads(self, x: Tensor, rows: int, cos: Tensor, sin: Tensor) -> tuple[Sequence[Tensor], object]:
        """q and k, rotated, and v: [T, heads * head_size] each, for a batch of `rows` rows; and the `step`
        that `tail` takes."""
        angles = self.state.rotation  # of the step, made once for all layers
        if angles is None or angles.given[0] is not cos or angles.given[1] is not sin:
            angles = self.state.rotation = Rotation(cos, sin)
        step = self.state.step(self.pool, rows, x.shape[0])
        return self._qkv(x, routing=step, rotation=angles), step

    def tail(self, attended: Tensor, x: Tensor, step: object) -> Tensor:
        """The layer's output of its input x and what its attention gave."""
        return self._tail(attended, x, step)
