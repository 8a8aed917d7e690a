"""Quantized linear layers: the interface, and quantal's own layer."""

from __future__ import annotations

import copy
import functools
import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from . import _check, _core, _ops
from ._dtypes import dtype_name, parse_dtype, widest_float
from ._errors import ConfigError, ShapeError, UnsupportedError
from ._packed import PackedWeight, checked_parts
from .config import QuantizationConfig

_CONFIG = _check.optional(_check.is_a(QuantizationConfig, "a QuantizationConfig or None"))
_SHAPE: dict[str, _check.Rule] = {
    "in_features": _check.size,
    "out_features": _check.size,
    "bias": _check.flag,
    "config": _CONFIG,
}
#: Elements that an error measurement or a conversion decodes at a time.
CHUNK_ELEMENTS = 1 << 20
#: What nn.Module.__init__ gives every module: values, and containers, which each has for itself.
_FRESH = nn.Module().__dict__
#: Whether autocast is on for any device; costs nothing where it is not.
_any_autocast = torch._C._is_any_autocast_enabled


def default_config() -> QuantizationConfig:
    """The config of layers that were built without one, each its own."""
    config = copy.copy(_checked_default())  # a tenth of the time of building one
    own = vars(config)
    own.update({n: v.copy() for n, v in own.items() if isinstance(v, (list, dict))})
    return config


@functools.cache
def _checked_default() -> QuantizationConfig:
    return QuantizationConfig()


def plan_layer(
    config: QuantizationConfig, name: str, out_features: int, in_features: int
) -> _core.Choice:
    """What policy does with one layer of a (resolved) config."""
    return _core.LayerRules(config.to_json()).choose(name, out_features, in_features)


class QuantizedLinear(nn.Module, ABC):
    """The interface of quantized linear layers, ``y = x @ W.T + bias``.

    A layer of one's own derives from it, calls ``super().__init__`` (which makes a bias of zeros)
    and implements the three methods below; an adapter's ``create_quantized_linear`` returns it.
    ``QuantizedLinear(...)`` itself and the functions ``from_...`` make quantal's own PackedLinear.
    """

    in_features: int
    out_features: int
    bias: Any  # a Parameter or None

    def __new__(cls, *args: Any, **kwargs: Any) -> QuantizedLinear:
        return super().__new__(PackedLinear if cls is QuantizedLinear else cls)

    @_check.arguments("QuantizedLinear", **_SHAPE)
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: QuantizationConfig | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.config = config if config is not None else default_config()
        zeros = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_parameter("bias", zeros)

    # What help() and inspect show: the constructor, not the choice of a class above.
    __new__.__signature__ = inspect.signature(__init__)  # type: ignore[attr-defined]

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W.T + bias``."""

    @abstractmethod
    def quantize_weights(self, weights: torch.Tensor) -> None:
        """Takes the values of a dense [out_features, in_features] over."""

    @abstractmethod
    def dequantize_weights(self) -> torch.Tensor:
        """The values [out_features, in_features] that the layer multiplies with."""

    # ------------------------------------------------------------------ construction

    @classmethod
    @_check.arguments(
        "QuantizedLinear.from_linear",
        linear=_check.is_a(nn.Linear, "an nn.Linear"),
        options=_check.is_a((_core.QuantizeOptions, QuantizationConfig), "a QuantizationConfig"),
        config=_CONFIG,
        compute_dtype=_check.optional(_check.dtype),
    )
    def from_linear(
        cls,
        linear: nn.Linear,
        options: _core.QuantizeOptions | QuantizationConfig,
        *,
        config: QuantizationConfig | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> PackedLinear:
        """A quantized copy of `linear`, on its device; the bias is kept as it is."""
        if isinstance(options, QuantizationConfig):
            config = options
            choice = plan_layer(options, "", *linear.weight.shape)
            if not choice.quantize:
                raise ConfigError(f"QuantizedLinear: layer cannot be quantized: {choice.reason}")
            options = choice.options
            compute_dtype = compute_dtype or parse_dtype(choice.compute_dtype)
        return PackedLinear._quantized(linear, options, config, compute_dtype)

    @classmethod
    @_check.arguments(
        "QuantizedLinear.from_packed",
        codes=_check.tensor,
        stats=_check.tensor,
        shared=_check.tensor,
        bias=_check.optional(_check.tensor),
        config=_CONFIG,
        compute_dtype=_check.optional(_check.dtype),
    )
    def from_packed(
        cls,
        spec: list[int],
        codes: torch.Tensor,
        stats: torch.Tensor,
        shared: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        config: QuantizationConfig | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> PackedLinear:
        """A layer around existing buffers, which it takes over without a copy."""
        buffers = {"codes": codes, "stats": stats, "shared": shared}
        facts = checked_parts("from_packed", spec, buffers)
        layer = PackedLinear._adopt(list(spec), (codes, stats, shared), config, compute_dtype)
        if bias is not None and tuple(bias.shape) != (facts["rows"],):
            raise ShapeError(
                f"from_packed: bias has shape {list(bias.shape)}, expected {[facts['rows']]}"
            )
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    @classmethod
    def from_upstream(
        cls, tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> PackedLinear:
        """A layer from the tensors of an upstream package; see PackedWeight.from_upstream."""
        return PackedLinear.from_upstream(tensors, *args, **kwargs)


class PackedLinear(PackedWeight, QuantizedLinear, nn.Linear):  # type: ignore[override, misc]
    """``y = x @ W.T + bias`` with W kept as packed codes and statistics.

    ``weight``, ``codes``, ``stats``, ``shared`` and ``spec`` are those of PackedWeight. ``forward``
    computes in ``compute_dtype`` and returns the dtype of its input, or autocast's inside autocast.

    The arguments are those of ``nn.Linear`` with a config; ``spec`` (16 integers) replaces the
    config where the form is already known. A new layer holds zeros: call ``quantize_weights``.
    """

    compute_dtype: torch.dtype
    int8_threshold: float | None
    _int8_activations = False

    @_check.arguments(
        "QuantizedLinear",
        **_SHAPE,
        compute_dtype=_check.optional(_check.dtype),
        bias_dtype=_check.optional(_check.dtype),
        device=_check.optional(_check.device),
    )
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: QuantizationConfig | None = None,
        *,
        spec: list[int] | None = None,
        compute_dtype: torch.dtype | None = None,
        bias_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        config = config if config is not None else default_config()
        if spec is None:
            choice = plan_layer(config, "", out_features, in_features)
            if not choice.quantize:
                raise ConfigError(f"QuantizedLinear: layer cannot be quantized: {choice.reason}")
            spec = _core.make_spec(out_features, in_features, choice.options)
            compute_dtype = compute_dtype or parse_dtype(choice.compute_dtype)
        self._init_layer((out_features, in_features), spec, config, compute_dtype, device)
        data = torch.zeros(out_features, dtype=bias_dtype or self.compute_dtype, device=device)
        self.register_parameter("bias", nn.Parameter(data) if bias else None)

    @classmethod
    def _quantized(
        cls,
        linear: nn.Linear,
        options: _core.QuantizeOptions,
        config: QuantizationConfig | None,
        compute_dtype: torch.dtype | None,
    ) -> PackedLinear:
        """`from_linear` of arguments that are known to be right."""
        weight = linear.weight
        rows, cols = weight.shape
        spec = _core.make_spec(rows, cols, follow_weight_dtype(options, weight.dtype))
        layer = cls._adopt(spec, _ops.quantize(weight, spec), config, compute_dtype)
        bias = linear.bias
        if bias is not None:
            layer.bias = bias
        layer.__dict__["training"] = linear.training  # of a module without modules in it
        return layer

    @classmethod
    def _adopt(
        cls,
        spec: list[int],
        buffers: _ops.Buffers,
        config: QuantizationConfig | None,
        compute_dtype: torch.dtype | None,
    ) -> PackedLinear:
        """A layer without bias around buffers that are known to fit `spec`."""
        layer: Any = cls.__new__(cls)
        for name, value in _FRESH.items():  # nn.Module.__init__ takes twice as long
            layer.__dict__[name] = value.copy() if hasattr(value, "copy") else value
        config = config if config is not None else default_config()
        shape = int(spec[1]), int(spec[2])
        layer._init_layer(shape, spec, config, compute_dtype, None, buffers)
        layer._parameters["bias"] = None
        return layer

    def _init_layer(
        self,
        shape: tuple[int, int],
        spec: list[int],
        config: QuantizationConfig,
        compute_dtype: torch.dtype | None,
        device: torch.device | str | None,
        buffers: _ops.Buffers | None = None,
    ) -> None:
        """All of a layer but its bias."""
        threshold = config.backend_options.get("int8_threshold")
        own = self.__dict__  # assigning to attributes of a module costs more than a small product
        own["out_features"], own["in_features"] = own["_rows"], own["_cols"] = shape
        own["config"] = config
        self._init_packed(spec, device, buffers)
        own["compute_dtype"] = compute_dtype or config.compute_dtype or self.value_dtype
        #: Outlier threshold of the product of LLM.int8; None: exact weights.
        own["int8_threshold"] = (
            None if threshold is None else _core.int8_threshold(self._spec, str(threshold))
        )
        if "activations" in config.backend_options:
            own["_int8_activations"], reason = _core.choose_activations(config.to_json(), spec)
            if reason:
                _check.warn(f"QuantizedLinear: {reason}")

    @property
    def activations(self) -> str:
        """How the product takes its input: "exact", or "int8", rounded in runs of columns and
        multiplied with the codes in integers (``backend_options={"activations": "int8"}``).
        UnsupportedError where the form of the weights has no such product."""
        return "int8" if self._int8_activations else "exact"

    @activations.setter
    def activations(self, value: str) -> None:
        int8 = _check.activations("QuantizedLinear", value)
        refusal = _core.int8_activations_refusal(self._spec) if int8 else ""
        if refusal:
            raise UnsupportedError(f"QuantizedLinear: activations is 'int8', but {refusal}")
        self._int8_activations = int8

    # ------------------------------------------------------------------ use

    @_check.arguments(weights=_check.tensor)
    def relative_error(self, weights: torch.Tensor) -> float:
        """``||W - deq(W)|| / ||W||`` (Frobenius), decoded a slice of rows at a time."""
        rows, cols = self.out_features, self.in_features
        if tuple(weights.shape) != (rows, cols):
            raise ShapeError(
                f"relative_error: weights have shape {list(weights.shape)}, expected {[rows, cols]}"
            )
        step = max(1, CHUNK_ELEMENTS // max(1, cols))
        if not self._row_runs:
            step = rows  # statistics are shared by rows: no slice of rows stands alone
        error, total, wide = 0.0, 0.0, widest_float(weights.device)
        for begin in range(0, rows, step):
            end = min(rows, begin + step)
            if step == rows:
                values = self.dequantize_weights(torch.float32)
            else:
                values = self._dequantize_rows(slice(begin, end), torch.float32)
            dense = weights[begin:end].detach().float()
            error += float((dense - values).pow(2).sum(dtype=wide))
            total += float(dense.pow(2).sum(dtype=wide))
        return (error / total) ** 0.5 if total > 0 else 0.0

    def _sampled_error(self, weights: torch.Tensor) -> float:
        """`relative_error` of evenly spaced rows: an estimate to one percent of itself that costs
        little beside the quickest codec."""
        return _ops.sampled_error(weights, self._buffers_packed, self._spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """``x @ W.T + bias``: computed in ``compute_dtype``, returned in the dtype of `x`."""
        if not isinstance(x, torch.Tensor):
            raise _check.wrong_type("QuantizedLinear", "input", x, "a torch.Tensor")
        dense = self.__dict__.get("_dense")
        if dense is not None:
            return nn.functional.linear(x.to(dense.dtype), dense, self.bias).to(x.dtype)
        dtype, parameters = self.compute_dtype, self._parameters
        bias = parameters["bias"] if "bias" in parameters else self.bias
        wide = x if x.dtype is dtype else x.to(dtype)
        if bias is not None and bias.dtype is not dtype:
            bias = bias.to(dtype)
        packed = self._buffers_packed
        if self.int8_threshold is not None:
            y = _ops.linear_int8(wide, *packed, bias, self._spec, self.int8_threshold)
        elif self._int8_activations:
            y = _ops.linear_int8_activations(wide, *packed, bias, self._spec)
        else:
            y = _ops.linear(wide, *packed, bias, self._spec)
        expected = x.dtype
        if _any_autocast() and not x.is_meta and expected is not torch.float64:
            device = x.device.type
            if torch.is_autocast_enabled(device):
                expected = torch.get_autocast_dtype(device)
        return y if y.dtype is expected else y.to(expected)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.dialect} {self.bits}-bit "
            f"g{self.group_size}, compute_dtype={self.compute_dtype}"
            f"{', int8 activations' if self._int8_activations else ''}"
        )


def follow_weight_dtype(
    options: _core.QuantizeOptions, dtype: torch.dtype
) -> _core.QuantizeOptions:
    """`options` with the value dtype of a dialect that decodes to the dtype of the weight."""
    if _core.keeps_weight_dtype(options.method):
        options.value_dtype = dtype_name(dtype)
    return options
