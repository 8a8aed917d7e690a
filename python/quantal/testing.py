"""Single layers as upstream tensors, for comparisons with the upstream packages."""

from __future__ import annotations

from typing import Any

import torch

from . import _check, _core, _ops
from ._dtypes import dtype_name
from ._errors import ConfigError
from .linear import PackedLinear, follow_weight_dtype

_ALIASES = {"blocksize": "group_size", "compute_dtype": "value_dtype"}


Packed = tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]


def options(method: str, **settings: Any) -> _core.QuantizeOptions:
    """Options of a quantizer.

    method    a method of the public API ("bnb_nf4", "hqq" ...), or the name of a dialect ("mlx",
              "gguf") for widths and modes beyond its methods
    settings  members of QuantizeOptions: bits, group_size, double_quant, quant_type, axis,
              optimize, round_zero, quant_zero, quant_scale, mode, value_dtype (a torch dtype; all
              but HQQ take the weight's own)
    """
    _check.text("testing.options", "method", method)
    out = _core.QuantizeOptions()
    if method not in _core.dialects() or method == "hqq":
        out.method = method
    for name, value in settings.items():
        name = _ALIASES.get(name, name)
        if not hasattr(out, name):
            raise ConfigError(f"testing.options: {name!r} is not known to QuantizeOptions")
        setattr(out, name, dtype_name(value) if isinstance(value, torch.dtype) else value)
    return out


def quantize_packed(
    weight: torch.Tensor, settings: _core.QuantizeOptions, dialect: str | None = None
) -> Packed:
    """(spec, codes, stats, shared) of a matrix; `dialect` overrules that of the method."""
    if dialect is not None and dialect != "hqq":
        settings.value_dtype = dtype_name(weight.dtype)
    else:
        settings = follow_weight_dtype(settings, weight.dtype)
    spec = _core.make_spec(weight.shape[0], weight.shape[1], settings, dialect)
    return (spec, *_ops.quantize(weight, spec))


def dequantize_packed(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The exact values of `quantize_packed`'s result, as `dtype`."""
    spec, codes, stats, shared = packed
    return _ops.dequantize(codes, stats, shared, spec, dtype)


def quantize_tensors(
    weight: torch.Tensor, method: str, *, prefix: str = "", **settings: Any
) -> dict[str, torch.Tensor]:
    """Quantizes a matrix and returns the tensors that the upstream package would store.

    The arguments are those of `options`."""
    dialect = method if method in _core.dialects() else None
    packed = quantize_packed(weight, options(method, **settings), dialect)
    return PackedLinear.from_packed(*packed).to_upstream(prefix)


def dequantize_tensors(
    tensors: dict[str, torch.Tensor],
    dialect: str,
    dtype: torch.dtype = torch.float32,
    *,
    prefix: str = "",
    settings: str = "{}",
    weight_shape: tuple[int, ...] = (),
) -> torch.Tensor:
    """The exact values, as `dtype`, of one layer's upstream tensors.

    dialect   "bnb", "hqq", "mlx" or "quanto"
    settings, weight_shape  what some dialects keep outside of the tensors (LayerFacts)
    """
    layer = PackedLinear.from_upstream(
        tensors, dialect, prefix, settings=settings, weight_shape=weight_shape
    )
    return layer.dequantize_weights(dtype)
