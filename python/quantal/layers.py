"""Layers by the names that earlier programs know; each is quantal's own packed layer.

``isinstance(layer, BNBLinear4bit)`` holds for every packed layer of that form, whoever made it.
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABCMeta
from typing import Any, ClassVar

from torch import nn

from . import _check
from .adapters import create_quantization_adapter
from .backend import Backend
from .config import QuantizationConfig, QuantizationMethod
from .linear import PackedLinear

_CONFIG = "a QuantizationConfig or None"


class _Form(ABCMeta):
    """Recognizes packed layers by dialect and width."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        form: Any = cls.__dict__.get("FORM")
        if form is None or not isinstance(instance, PackedLinear):
            return False
        dialect, widths = form
        return instance.dialect == dialect and (not widths or instance.bits in widths)


class _NamedLayer(PackedLinear, metaclass=_Form):
    """A packed layer of one form. ``layer`` is the layer itself, as earlier programs reach it."""

    #: Dialect and widths; no widths: all.
    FORM: ClassVar[tuple[str, tuple[int, ...]]]

    def _init(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: QuantizationConfig | None,
        method: QuantizationMethod,
        bits: int | None,
    ) -> None:
        config = config if config is not None else QuantizationConfig()
        _check.instance(type(self).__name__, "config", config, QuantizationConfig, _CONFIG)
        # None is unset: the method implies the width.
        config = dataclasses.replace(config, method=method, bits=bits)  # type: ignore[arg-type]
        PackedLinear.__init__(self, in_features, out_features, bias, config)

    @property
    def layer(self) -> PackedLinear:
        return self


class BNBLinear4bit(_NamedLayer):
    """bitsandbytes' NF4 or FP4, with the config's ``double_quant``, ``quant_type`` and
    ``compute_dtype``; `bnb_module` is not used."""

    FORM = ("bnb", (4,))

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: QuantizationConfig | None = None,
        bnb_module: Any = None,
    ) -> None:
        self._init(in_features, out_features, bias, config, QuantizationMethod.BNB_NF4, None)


class BNBLinear8bit(_NamedLayer):
    """bitsandbytes' LLM.int8 weights; `bnb_module` is not used."""

    FORM = ("bnb", (8,))

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: QuantizationConfig | None = None,
        bnb_module: Any = None,
    ) -> None:
        self._init(in_features, out_features, bias, config, QuantizationMethod.BNB_INT8, None)


class HQQLinearWrapper(_NamedLayer):
    """HQQ with the config's bits; `hqq_module` is not used."""

    FORM = ("hqq", ())

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: QuantizationConfig | None = None,
        hqq_module: Any = None,
    ) -> None:
        bits = getattr(config, "bits", None)
        self._init(in_features, out_features, bias, config, QuantizationMethod.HQQ, bits)

    @property
    def linear_layer(self) -> PackedLinear:
        """The layer itself, by the name that earlier programs use."""
        return self


class MLXLinearWrapper(_NamedLayer):
    """MLX's affine form with 4 or 8 bits. ``quantized`` tells whether it holds weights yet."""

    FORM = ("mlx", ())

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: QuantizationConfig | None = None,
    ) -> None:
        eight = isinstance(config, QuantizationConfig) and (
            config.method is QuantizationMethod.MLX_INT8 or int(config.bits) == 8
        )
        method = QuantizationMethod.MLX_INT8 if eight else QuantizationMethod.MLX_INT4
        self._init(in_features, out_features, bias, config, method, None)

    @property
    def quantized(self) -> bool:
        """Whether weights have been quantized into the layer."""
        return bool(self.stats.any())


class MLXModelWrapper(nn.Module):
    """A torch model quantized in MLX's format. ``pytorch_model`` and ``mlx_model`` are that model,
    ``save_mlx`` writes the folder that mlx-lm loads."""

    @_check.arguments("MLXModelWrapper", pytorch_model=_check.module)
    def __init__(self, pytorch_model: nn.Module, config: QuantizationConfig) -> None:
        super().__init__()
        self._adapter = create_quantization_adapter(Backend.MLX, config, fallback="error")
        self.pytorch_model = self._adapter.quantize_model(pytorch_model)
        self.config = config

    @property
    def mlx_model(self) -> nn.Module:
        """The model whose layers hold MLX's form; the same object as ``pytorch_model``."""
        return self.pytorch_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the quantized model."""
        return self.pytorch_model(*args, **kwargs)

    @_check.arguments(path=_check.path)
    def save_mlx(self, path: str | os.PathLike) -> None:
        """A folder with ``config.json`` and safetensors, in MLX's layout."""
        self._adapter.save_quantized_model(self.pytorch_model, path)


__all__ = [
    "BNBLinear4bit",
    "BNBLinear8bit",
    "HQQLinearWrapper",
    "MLXLinearWrapper",
    "MLXModelWrapper",
]
