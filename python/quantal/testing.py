"""Single layers as upstream tensors, for comparisons with the upstream packages."""

from __future__ import annotations

from typing import Any

import torch

from . import _core, _ops
from ._dtypes import dtype_name
from ._errors import ConfigError
from .linear import QuantizedLinear, follow_weight_dtype

_ALIASES = {"blocksize": "group_size", "compute_dtype": "value_dtype"}


def quantize_tensors(
    weight: torch.Tensor, method: str, *, prefix: str = "", **options: Any
) -> dict[str, torch.Tensor]:
    """Quantizes a matrix and returns the tensors that the upstream package would store.

    method   "bnb_nf4" or "hqq"
    options  members of QuantizeOptions: bits, group_size, double_quant, quant_type, axis, optimize,
             round_zero, value_dtype (a torch dtype; bitsandbytes takes the weight's own)
    """
    settings = _core.QuantizeOptions()
    settings.method = method
    for name, value in options.items():
        name = _ALIASES.get(name, name)
        if not hasattr(settings, name):
            raise ConfigError(f"quantize_tensors: option is {name!r}, which QuantizeOptions lacks")
        setattr(settings, name, dtype_name(value) if isinstance(value, torch.dtype) else value)
    settings = follow_weight_dtype(settings, weight.dtype)
    spec = _core.make_spec(weight.shape[0], weight.shape[1], settings)
    layer = QuantizedLinear.from_packed(spec, *_ops.quantize(weight, spec))
    return layer.to_upstream(prefix)


def dequantize_tensors(
    tensors: dict[str, torch.Tensor],
    dialect: str,
    dtype: torch.dtype = torch.float32,
    *,
    prefix: str = "",
) -> torch.Tensor:
    """The exact values, as `dtype`, of one layer's upstream tensors. dialect: "bnb" or "hqq"."""
    return QuantizedLinear.from_upstream(tensors, dialect, prefix).dequantize_weights(dtype)
