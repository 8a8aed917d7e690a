"""LoftQ: LoRA factors that begin as the low-rank part of the quantization error."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from . import _core
from ._dtypes import bytes_of
from ._errors import ConfigError, ShapeError, UnsupportedError
from ._packed import PackedWeight

_PREFIX = "base_model.model."
Source = nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike
_Read = Callable[[str], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class LoftqLayer:
    """``||W - Q||`` and ``||W - (Q + scaling B A)||``, both relative to ``||W||``."""

    name: str
    error_before: float
    error_after: float


@torch.no_grad()
def initialize_loftq(
    model: Any, source: Source, adapter_name: str = "default", *, iterations: int = 1
) -> list[LoftqLayer]:
    """Sets the LoRA factors of a quantized PeftModel so that base plus adapter come closest to the
    weights before quantization (LoftQ, Li et al. 2023). Returns the error of each layer before and
    after.

    source      those weights: the dense model, its state dict, or its folder or file (safetensors,
                GGUF), read one tensor at a time
    iterations  1: the base stays as it is and ``scaling B A`` is the best rank-r approximation of
                ``W - Q`` (singular value decomposition). More: ``W - scaling B A`` is quantized
                again and the factors are fitted to the new rest; the base changes, so save it too.

    PEFT's ``init_lora_weights="loftq"`` quantizes and decomposes a dense model by means of
    bitsandbytes; this works for every format and after quantization. Attach the adapters with
    PEFT's default initialisation first. DoRA's magnitudes are set to match.
    """
    if iterations < 1:
        raise ConfigError(f"initialize_loftq: iterations is {iterations}, expected >= 1")
    read = _reader(source)
    done = [
        _fit(name, layer, read(name), adapter_name, iterations)
        for name, layer in _layers(model, adapter_name)
    ]
    if not done:
        raise ConfigError(
            f"initialize_loftq: model has no quantized layer with an adapter {adapter_name!r}, "
            "expected a PeftModel over quantized layers"
        )
    return done


def _layers(model: Any, adapter_name: str) -> Iterator[tuple[str, Any]]:
    from ._peft_layers import QuantizedLoraLinear

    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLoraLinear) and adapter_name in layer.lora_A:
            if isinstance(layer.get_base_layer(), PackedWeight):
                yield name.removeprefix(_PREFIX), layer


def _reader(source: Source) -> _Read:
    if isinstance(source, str | os.PathLike):
        return _file_reader(os.fspath(source))
    tensors = source.state_dict() if isinstance(source, nn.Module) else source

    def read(name: str) -> torch.Tensor:
        weight = tensors.get(f"{name}.weight")
        if weight is None:
            raise ConfigError(f"initialize_loftq: source has no tensor {name}.weight")
        return weight.detach().float()

    return read


def _file_reader(path: str) -> _Read:
    file = _core.ModelSource.open(path)
    shapes = {name: shape for name, shape, _, _ in file.tensors}

    def read(name: str) -> torch.Tensor:
        key = f"{name}.weight"
        if key not in shapes:
            raise ConfigError(f"initialize_loftq: source has no tensor {key} (file={path})")
        weight = torch.empty(shapes[key])
        file.read(key, "f32", bytes_of(weight))
        return weight

    return read


def _low_rank(rest: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] with ``scaling B A`` the best rank-r approximation of `rest`."""
    u, s, vh = torch.linalg.svd(rest, full_matrices=False)
    root = (s[:r] / scaling).sqrt()
    a, b = torch.zeros(r, rest.shape[1]), torch.zeros(rest.shape[0], r)
    a[: len(root)], b[:, : len(root)] = root[:, None] * vh[:r], u[:, :r] * root
    return a, b


def _fit(
    name: str, layer: Any, weight: torch.Tensor, adapter_name: str, iterations: int
) -> LoftqLayer:
    from ._peft_layers import reset_magnitude

    base = layer.get_base_layer()
    if layer.merged:
        raise ConfigError(f"initialize_loftq: {name} is merged, expected unmerge_adapter first")
    if tuple(weight.shape) != (base._rows, base._cols):
        raise ShapeError(
            f"initialize_loftq: {name}.weight has shape {list(weight.shape)}, expected "
            f"[{base._rows}, {base._cols}]"
        )
    if not torch.isfinite(weight).all():
        raise UnsupportedError(f"initialize_loftq: {name}.weight is not finite")
    r, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
    total = weight.norm().clamp_min(torch.finfo(torch.float32).tiny)
    rest = weight - base.dequantize_weights(torch.float32)
    before = float(rest.norm() / total)
    a, b = _low_rank(rest, r, scaling)
    for _ in range(iterations - 1):
        base.quantize_weights(weight - scaling * (b @ a))
        rest = weight - base.dequantize_weights(torch.float32)
        a, b = _low_rank(rest, r, scaling)
    for factor, values in ((layer.lora_A[adapter_name], a), (layer.lora_B[adapter_name], b)):
        factor.weight.copy_(values)
    reset_magnitude(layer, adapter_name)
    return LoftqLayer(name, before, float((rest - scaling * (b @ a)).norm() / total))
