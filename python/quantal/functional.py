"""Products with a packed weight, spelled as ``torch.nn.functional.linear`` and ``torch.matmul``."""

from __future__ import annotations

import torch

from . import _ops
from ._errors import ConfigError
from ._packed import PackedWeight


def _packed(where: str, weight: PackedWeight) -> PackedWeight:
    if not isinstance(weight, PackedWeight):
        raise ConfigError(
            f"{where}: weight is a {type(weight).__name__}, expected a quantized layer"
        )
    return weight


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ W.T + bias`` in the dtype of x, W being the exact values of a quantized layer.

    The layer's own bias and ``compute_dtype`` play no part. Differentiable in x and bias; with
    `out` (the result's shape and dtype; an empty tensor is resized) it is not, as in torch.
    """
    layer = _packed("linear", weight)
    if out is None:
        return _ops.linear(x, *layer._buffers_packed, bias, layer._spec)
    return _ops.linear_out(out, x, layer._buffers_packed, bias, layer._spec)


def matmul(
    x: torch.Tensor, weight: PackedWeight, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ W`` in the dtype of x: [..., rows] to [..., cols]. `out` as in `linear`."""
    layer = _packed("matmul", weight)
    if out is None:
        return _ops.matmul(x, *layer._buffers_packed, layer._spec)
    return _ops.matmul_out(out, x, layer._buffers_packed, layer._spec)
