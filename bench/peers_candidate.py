"""quantal as a candidate of harnesses that time one weight matrix at a time.

One class per form, all with the interface

    quantize(weight) -> handle       weight: torch tensor (out_features, in_features)
    dequantize(handle) -> tensor     the whole weight
    matmul(handle, x) -> tensor      x @ weight.T
    nbytes(handle) -> int            bytes of codes, statistics and shared tables

Only the public Python API is called. Results of `dequantize` and `matmul` go to buffers that the
handle keeps (`out=`): a fresh 32 MB tensor costs as much as filling it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

import quantal
from quantal import testing


@dataclass
class Handle:
    """A quantized matrix and the buffers of its results."""

    layer: quantal.PackedLinear
    dense: torch.Tensor | None = None
    outputs: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict)


class Candidate:
    """What the classes share; `method` and `settings` say which form they are."""

    method: ClassVar[str]
    activations: ClassVar[str] = "exact"
    settings: ClassVar[dict[str, Any]] = {}

    def quantize(self, weight: torch.Tensor) -> Handle:
        options = testing.options(self.method, **self.settings)
        dialect = self.method if self.method in ("mlx", "gguf") else None
        packed = testing.quantize_packed(weight, options, dialect)
        return Handle(quantal.PackedLinear.from_packed(*packed))

    def dequantize(self, handle: Handle) -> torch.Tensor:
        if handle.dense is None:
            handle.dense = torch.empty(
                handle.layer.out_features, handle.layer.in_features, dtype=torch.bfloat16
            )
        return handle.layer.dequantize_weights(out=handle.dense)

    def matmul(self, handle: Handle, x: torch.Tensor) -> torch.Tensor:
        key = x.shape[0], x.dtype
        out = handle.outputs.get(key)
        if out is None:
            out = torch.empty(x.shape[0], handle.layer.out_features, dtype=x.dtype)
            handle.outputs[key] = out
        return quantal.functional.linear(x, handle.layer, out=out, activations=self.activations)

    def nbytes(self, handle: Handle) -> int:
        layer = handle.layer
        return sum(t.numel() * t.element_size() for t in (layer.codes, layer.stats, layer.shared))


class Nf4(Candidate):
    method = "bnb_nf4"
    settings: ClassVar = {"quant_type": "nf4", "group_size": 64, "double_quant": False}


class Nf4Double(Candidate):
    method = "bnb_nf4"
    settings: ClassVar = {"quant_type": "nf4", "group_size": 64, "double_quant": True}


class Fp4(Candidate):
    method = "bnb_nf4"
    settings: ClassVar = {"quant_type": "fp4", "group_size": 64, "double_quant": False}


class Int8(Candidate):
    method = "bnb_int8"
    settings: ClassVar = {"bits": 8}


class Hqq4(Candidate):
    method = "hqq"
    settings: ClassVar = {"bits": 4, "group_size": 64, "value_dtype": torch.bfloat16}


class Hqq8(Candidate):
    method = "hqq"
    settings: ClassVar = {"bits": 8, "group_size": 64, "value_dtype": torch.bfloat16}


class Mlx3(Candidate):
    method = "mlx"
    settings: ClassVar = {"bits": 3, "group_size": 64, "mode": "affine"}


class Mlx4(Candidate):
    method = "mlx"
    settings: ClassVar = {"bits": 4, "group_size": 64, "mode": "affine"}


class Mlx8(Candidate):
    method = "mlx"
    settings: ClassVar = {"bits": 8, "group_size": 64, "mode": "affine"}


class QuantoInt2(Candidate):
    method = "quanto_int2"
    settings: ClassVar = {"bits": 2, "group_size": 128}


class QuantoInt4(Candidate):
    method = "quanto_int4"
    settings: ClassVar = {"bits": 4, "group_size": 128}


class QuantoInt8(Candidate):
    method = "quanto_int8"
    settings: ClassVar = {"bits": 8}


class Q40(Candidate):
    method = "gguf"
    settings: ClassVar = {"mode": "Q4_0", "bits": 0, "group_size": 0}


class Q4K(Candidate):
    method = "gguf"
    settings: ClassVar = {"mode": "Q4_K", "bits": 0, "group_size": 0}


class Q5K(Candidate):
    method = "gguf"
    settings: ClassVar = {"mode": "Q5_K", "bits": 0, "group_size": 0}


class Q6K(Candidate):
    method = "gguf"
    settings: ClassVar = {"mode": "Q6_K", "bits": 0, "group_size": 0}


class Q80(Candidate):
    method = "gguf"
    settings: ClassVar = {"mode": "Q8_0", "bits": 0, "group_size": 0}


class Nf4DoubleInt8(Nf4Double):
    activations = "int8"


class Hqq4Int8(Hqq4):
    activations = "int8"


class Mlx4Int8(Mlx4):
    activations = "int8"


class Q40Int8(Q40):
    activations = "int8"


class Q4KInt8(Q4K):
    activations = "int8"


class Q80Int8(Q80):
    activations = "int8"
