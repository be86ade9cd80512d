"""Linears that read the same input in one call of the CPU extension, with all that comes before and after.

Made for decoding, 1 to 64 tokens a step, where reading the weights is the cost, and in bf16 on AMX tiles for
any number of tokens. Inference only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from slm_fast import dispatch
from slm_fast.factors import Factors
from slm_fast.ops import FLOATS, _check, _check_routing, _matrix

PROLOGUES = {"none": 0, "rms_norm": 1, "silu_mul": 2}
MAX_LINEARS = 4
CPU = torch.device("cpu")
_data_ptr = Tensor.data_ptr


def step_routing(
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    total_rank: int,
    indices: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    num_tokens: int,
):
    """A step's mixture, checked and sorted once for all groups of linears. It copies what it reads.

    Args: start, rank: [P] int32, the rows of an entry in slabs of `total_rank` rows.  scaling: [P] fp32.
    indices: [rows, K] int32.  weights: [rows, K] fp32.  cu_seqlens: [rows + 1] int32; None shares the
    `num_tokens` tokens out equally.
    Raises ValueError on wrong shapes or dtypes, indices outside the pool and entries outside the slabs.
    """
    _check_routing(num_tokens, start, rank, scaling, indices, weights, cu_seqlens, CPU)
    start, rank, scaling = start.contiguous(), rank.contiguous(), scaling.contiguous()
    indices, weights = indices.contiguous(), weights.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    return dispatch._C.StepRouting(
        start.data_ptr(),
        rank.data_ptr(),
        scaling.data_ptr(),
        start.shape[0],
        total_rank,
        indices.data_ptr(),
        weights.data_ptr(),
        _pointer(cu_seqlens),
        num_tokens,
        *indices.shape,
    )


def _contiguous(name: str, x: Tensor, shape: tuple[int, ...], dtypes: tuple) -> None:
    _check(name, x, shape, dtypes, CPU)
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(x.stride())}")


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _slabs_of(factors: Factors | tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    """Where the slabs A and B are found at any time; empty without factors."""
    if factors is None:
        return {}
    if isinstance(factors, Factors):
        return factors._buffers  # a plain dict: a module's attributes are ten times slower to read
    return {"A": factors[0], "B": factors[1]}


class Rotation:
    """The angles of a step's rotary position embedding, for all layers: see `csrc/cpu/linear_group.h`.

    Args: cos, sin: [rows or 1, tokens, head_size] in the weights' dtype.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[-1] % 2 or cos.dtype is not sin.dtype:
            raise ValueError(
                f"cos and sin must be [rows or 1, tokens, even], got {list(cos.shape)} {cos.dtype} and "
                f"{list(sin.shape)} {sin.dtype}"
            )
        self.given, self.dtype, (_, _, self.head_size) = (cos, sin), cos.dtype, cos.shape
        self._held = cos, sin = cos.contiguous(), sin.contiguous()
        self.num_angles = cos.shape[0] * cos.shape[1]
        self.arguments = (cos.data_ptr(), sin.data_ptr(), self.num_angles, self.head_size, 2)


class LinearGroup:
    """1 to 4 frozen linears that read the same input, with what comes before and after them.

        h = x                                     prologue "none"
          = norm_weight * rms(x)                  prologue "rms_norm", rounded where LlamaRMSNorm rounds
          = silu(x) * x2                          prologue "silu_mul"
        y_i[t] = W_i h[t] + bias_i + sum_k weights[b, k] * scaling[e] * B_i[e]^T (A_i[e] h[t]) + residual[t]

    with e = indices[b, k] and b the row of token t. Sums are in fp32 and rounded once, at the end;
    on AMX tiles coefficient times A x is rounded to bf16 for rows of 16 tokens and more. A row has the same
    bits whatever the other rows and the number of threads; a row without picks has the bits of a call without
    routing. Not differentiable.

    Args: linears: (weight [out_features, in_features], bias [out_features] or None, factors) of each; weights
    and biases have one dtype, fp32/bf16/fp16.  factors: None, (A [total_rank, in_features], B [total_rank,
    out_features]) of one dtype, any of the three, or a `Factors`, whose slabs may be replaced between calls.
    norm_weight: [in_features], for "rms_norm".
    Raises ValueError on wrong shapes, dtypes, devices and on tensors that are not contiguous.
    """

    def __init__(
        self,
        linears: Sequence[tuple[Tensor, Tensor | None, Factors | tuple[Tensor, Tensor] | None]],
        *,
        prologue: str = "none",
        eps: float = 1e-6,
        norm_weight: Tensor | None = None,
    ) -> None:
        if prologue not in PROLOGUES:
            raise ValueError(f"prologue must be one of {', '.join(PROLOGUES)}, got {prologue!r}")
        if not 1 <= len(linears) <= MAX_LINEARS:
            raise ValueError(f"linears must have 1..{MAX_LINEARS} members, got {len(linears)}")
        if (norm_weight is not None) != (prologue == "rms_norm"):
            raise ValueError(f"norm_weight goes with prologue 'rms_norm', got {prologue!r}")
        first = linears[0][0]
        self.in_features, self.dtype = _matrix("weight", first)[1], first.dtype
        self.out_features = [_matrix("weight", weight)[0] for weight, _, _ in linears]
        self._prologue, self._eps, self._norm_weight = prologue, eps, norm_weight
        self._weights = [(weight, bias) for weight, bias, _ in linears]
        self._slabs = [_slabs_of(factors) for _, _, factors in linears]
        self._places = [(slabs, name) for slabs in self._slabs if slabs for name in ("A", "B")]
        self._frozen = [t for pair in self._weights for t in pair if t is not None]
        self._frozen += [] if norm_weight is None else [norm_weight]
        self._takes_x2 = prologue == "silu_mul"
        self._x_shape: torch.Size | None = None
        self._build()

    def _build(self) -> None:
        """Check all tensors and make the C++ object, which holds addresses only."""
        _check("weight", self._weights[0][0], self._weights[0][0].shape, FLOATS, CPU)
        linears = []
        for (weight, bias), slabs, out_features in zip(
            self._weights, self._slabs, self.out_features, strict=True
        ):
            _contiguous("weight", weight, (out_features, self.in_features), (self.dtype,))
            if bias is not None:
                _contiguous("bias", bias, (out_features,), (self.dtype,))
            factors = (0, 0, 0, 0)
            if slabs:
                A, B = slabs["A"], slabs["B"]
                total_rank = _matrix("A", A)[0]
                _contiguous("A", A, (total_rank, self.in_features), FLOATS)
                _contiguous("B", B, (total_rank, out_features), (A.dtype,))
                factors = (A.data_ptr(), B.data_ptr(), dispatch.DTYPE_CODES[A.dtype], total_rank)
            linears.append((weight.data_ptr(), _pointer(bias), out_features, *factors))
        if self._norm_weight is not None:
            _contiguous("norm_weight", self._norm_weight, (self.in_features,), (self.dtype,))
        code, norm_weight = dispatch.DTYPE_CODES[self.dtype], _pointer(self._norm_weight)
        self._group = dispatch._C.LinearGroup(
            code, self.in_features, PROLOGUES[self._prologue], self._eps, norm_weight, linears
        )
        slabs = [(place, place[0][place[1]]) for place in self._places]  # alive as long as C++ has addresses
        self._known = [t.data_ptr() for t in self._frozen], slabs

    def __call__(
        self,
        x: Tensor,
        x2: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        routing=None,
        rotation: "Rotation | None" = None,
        out: tuple[Tensor, ...] | None = None,
    ) -> Sequence[Tensor]:
        """y_i [T, out_features] of each linear.

        Args: x, and x2 for "silu_mul": [T, in_features] in the weights' dtype, contiguous.  residual: as the
        output of the only linear.  routing: from `step_routing`, for T tokens.  rotation: of the first two
        outputs.  out: a tuple to write to and return, which shares no memory with x; a decoder that keeps it
        saves a third of the call's overhead.
        Raises ValueError on anything else.
        """
        dtype = self.dtype
        if x.shape != self._x_shape:
            self._fit(x)
        x_shape = self._x_shape
        if x.dtype is not dtype or not x.is_cpu or not x.is_contiguous():
            _contiguous("x", x, x_shape, (dtype,))
        if (x2 is None) is self._takes_x2:
            raise ValueError(f"x2 goes with prologue 'silu_mul', got {self._prologue!r}")
        if x2 is not None:
            _contiguous("x2", x2, x_shape, (dtype,))
        if residual is not None:
            _contiguous("residual", residual, self._out_shapes[0], (dtype,))
        if rotation is not None and (rotation.dtype is not dtype or x_shape[0] % rotation.num_angles):
            raise ValueError(
                f"rotation has {rotation.num_angles} angles in {rotation.dtype} for {x_shape[0]} tokens in "
                f"{dtype}"
            )
        if out is None:
            out = [torch.empty(shape, dtype=dtype) for shape in self._out_shapes]
        elif out is not self._checked_out:
            self._check_out(out)
        self.current(routing).forward(
            x.data_ptr(),
            0 if x2 is None else x2.data_ptr(),
            x_shape[0],
            list(map(_data_ptr, out)),
            0 if residual is None else residual.data_ptr(),
            routing,
            rotation.arguments if rotation is not None else None,
            torch.get_num_threads(),
        )
        return out

    def current(self, routing):
        """The C++ object, made again where a weight moved or, with a routing, a slab was replaced."""
        weights, slabs = self._known
        if list(map(_data_ptr, self._frozen)) != weights or (
            routing is not None and any(at[name] is not slab for (at, name), slab in slabs)
        ):
            self._build()
        return self._group

    def _fit(self, x: Tensor) -> None:
        """Shapes for the number of tokens of x: kept, since a decoder's calls repeat them."""
        num_tokens = _matrix("x", x)[0]
        _check("x", x, (num_tokens, self.in_features), (self.dtype,), CPU)
        self._x_shape = x.shape
        self._out_shapes = [(num_tokens, n) for n in self.out_features]
        self._checked_out = None

    def _check_out(self, out: tuple[Tensor, ...]) -> None:
        if len(out) != len(self._out_shapes):
            raise ValueError(f"out must have {len(self._out_shapes)} members, got {len(out)}")
        for y, shape in zip(out, self._out_shapes, strict=True):
            _contiguous("out", y, shape, (self.dtype,))
        self._checked_out = out if type(out) is tuple else None


class LayerTail:
    """What follows the attention in a decoder layer, in one parallel region:

        x = residual + out(attended);  y = x + down(gate_up(x))

    Args: LinearGroups of 1, 2 and 1 linears: `out` without prologue, `gate_up` with one or none, `down` with
    "silu_mul".
    """

    def __init__(self, out: LinearGroup, gate_up: LinearGroup, down: LinearGroup) -> None:
        self.groups = out, gate_up, down

    def __call__(self, attended: Tensor, residual: Tensor, routing=None) -> Tensor:
        """y [T, hidden]. attended: [T, in_features of out].  residual: [T, hidden].

        Raises ValueError on other shapes or dtypes, on groups that do not fit together, and on inputs that
        are not contiguous.
        """
        out, gate_up, down = self.groups
        num_tokens = residual.shape[0]
        for name, x, group in (("attended", attended, out), ("residual", residual, gate_up)):
            if (
                x.shape != (num_tokens, group.in_features)
                or x.dtype is not out.dtype
                or not (x.is_cpu and x.is_contiguous())
            ):
                _contiguous(name, x, (num_tokens, group.in_features), (out.dtype,))
        y = torch.empty_like(residual)
        dispatch._C.forward_tail(
            out.current(routing),
            gate_up.current(routing),
            down.current(routing),
            attended.data_ptr(),
            residual.data_ptr(),
            num_tokens,
            y.data_ptr(),
            routing,
            torch.get_num_threads(),
        )
        return y
