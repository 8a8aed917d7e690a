"""Adapters: one interface over the dialects, and the factory that asks policy which one to use."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from . import _check, _core
from ._custom import ADAPTER_KEY, adapter_class, name_of, register_adapter, registered_adapters
from ._dtypes import parse_dtype
from ._errors import ConfigError, UnsupportedError
from ._loading import LoadReport, MakeLinear, load
from .backend import Backend
from .checkpoint import parse_size, save_model
from .config import QuantizationConfig, QuantizationMethod
from .linear import PackedLinear, QuantizedLinear
from .replace import replace_linear_with_quantized
from .report import Report
from .training import prepare_model_for_training


def _config(where: str, config: Any) -> QuantizationConfig:
    """A config given as such; None: the default one."""
    if config is None:
        return QuantizationConfig()
    expected = "a QuantizationConfig or None"
    return _check.instance(where, "config", config, QuantizationConfig, expected)


class QuantizationAdapter(ABC):
    """Quantizes models for one backend and config.

    An adapter of one's own implements ``create_quantized_linear`` and ``quantize_model`` and, where
    the defaults do not fit, ``_validate_backend_support`` (called on construction; raises to
    refuse) and ``prepare_model_for_training``; ``register_adapter`` gives it a name. ``report``
    tells what was done, and what policy changed; ``load_report`` what the last
    ``load_quantized_model`` found.
    """

    #: Of the last load; None before the first.
    load_report: LoadReport | None = None

    def __init__(self, backend: Backend | str, config: QuantizationConfig | None = None) -> None:
        self.backend = Backend(backend)
        self.config = _config(type(self).__name__, config)
        self.report = Report({"adapter": type(self).__name__})
        self._file_settings: list[dict[str, str]] = []
        self._validate_backend_support()

    def _validate_backend_support(self) -> None:  # noqa: B027 (a hook, empty by default)
        """Raises ConfigError if this adapter cannot be used with its backend."""

    @abstractmethod
    def create_quantized_linear(
        self, in_features: int, out_features: int, bias: bool = True
    ) -> nn.Module:
        """A layer of this adapter's kind; its weights are zero until ``quantize_weights``.

        in_features, out_features, bias  as those of ``nn.Linear``"""

    @abstractmethod
    def quantize_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Quantizes the linear layers of `model` in place and returns it; a model that is itself
        one linear layer is returned as a new layer. What was done stands in ``report``."""

    def prepare_model_for_training(self, model: nn.Module) -> nn.Module:
        """Freezes the base so that only adapters attached afterwards are trained; see
        ``quantal.prepare_model_for_training``, which has more settings."""
        return prepare_model_for_training(model)

    def quantize_linear(self, linear: nn.Linear, choice: _core.Choice) -> nn.Module:
        """The quantized replacement of one layer; the bias values are kept.

        An adapter of one's own is asked for a layer while ``self.config`` has what
        ``layer_configs`` say of it; one whose entry names a built-in method becomes quantal's."""
        if choice.options.method != QuantizationMethod.NONE.value:
            return _packed_layer(linear, choice, self.config)
        layer = self._new_layer(linear, choice)
        quantize_weights = getattr(layer, "quantize_weights", None)
        if quantize_weights is None:
            raise UnsupportedError(
                f"{type(self).__name__}: {type(layer).__name__} has no quantize_weights, which "
                "replace_linear_with_quantized needs"
            )
        quantize_weights(linear.weight.detach())
        if linear.bias is not None:
            layer.bias = linear.bias
        return layer.train(linear.training)

    def _new_layer(self, linear: nn.Linear, choice: _core.Choice) -> nn.Module:
        whole = self.config
        options, dtype = choice.options, parse_dtype(choice.compute_dtype)
        changes = {n: getattr(options, n) for n in ("bits", "double_quant", "quant_type")}
        changes["group_size"] = options.group_size
        if whole.compute_dtype is not None:
            changes["compute_dtype"] = dtype
        changes = {name: new for name, new in changes.items() if new != getattr(whole, name)}
        try:
            if changes:
                self.config = dataclasses.replace(whole, **changes)
            return self.create_quantized_linear(
                linear.in_features, linear.out_features, linear.bias is not None
            )
        finally:
            self.config = whole

    def layer_rules(self, skip_modules: Iterable[str] | None = None) -> _core.LayerRules:
        """Decides which layers are quantized. An adapter of one's own quantizes all that
        ``skip_modules`` and ``layer_configs`` leave, whatever method its config names."""
        return _layer_rules(self.config, skip_modules, name_of(type(self)) or type(self).__name__)

    def tie_quantized_linear(self, layer: nn.Module, linear: nn.Linear) -> nn.Module:
        """A layer for `linear`, whose weight `layer` was quantized from: they share the bytes."""
        if not isinstance(layer, PackedLinear):
            return layer
        return PackedLinear.from_packed(
            layer._spec,
            layer.codes,
            layer.stats,
            layer.shared,
            linear.bias,
            config=layer.config,
            compute_dtype=layer.compute_dtype,
        )

    @_check.arguments(model=_check.module, save_path=_check.path)
    def save_quantized_model(
        self,
        model: nn.Module,
        save_path: str | os.PathLike,
        *,
        layout: str = "",
        max_shard_size: int | str | None = None,
        overwrite: bool = False,
        tokenizer: Any = None,
    ) -> None:
        """Writes a folder, or a single file where `save_path` has the suffix of one.

        layout          one of ``quantal.file_layouts(model)``; default: upstream's own
        max_shard_size  bytes, or text such as "2GB": larger models are written in several files
        overwrite       replace a folder that quantal did not write
        tokenizer       a transformers tokenizer, or a folder or GGUF file that has one; None: the
                        one that lay beside the model that was loaded

        The model appears whole or not at all. Packed layers are written from their packed form,
        wherever they came from.
        """
        save_model(
            model,
            save_path,
            layout=layout,
            max_shard_bytes=parse_size(max_shard_size),
            overwrite=overwrite,
            tokenizer=tokenizer,
            config_entries=self._file_entries(),
        )

    def _file_entries(self) -> dict[str, Any]:
        """What config.json tells about this adapter: its registered name, for loading."""
        name = name_of(type(self))
        if name is None:
            return {}
        entry = {"name": name, "backend": self.backend.value, "config": self.config.to_dict()}
        return {ADAPTER_KEY: entry}

    @_check.arguments(model_path=_check.source)
    def load_quantized_model(
        self,
        model_path: str | os.PathLike,
        model_config: Any = None,
        *,
        model: nn.Module | None = None,
        strict: bool = True,
    ) -> nn.Module:
        """A model from a folder or file that quantal or an upstream package wrote.

        model_config  a transformers config, its dictionary, a path to one, or None for what the
                      folder or file says
        model         a module to load into instead of building one from the config
        strict        False: missing, unexpected and misshapen tensors are a warning, no error

        Format, method and settings are those of the file, found from its content. Where this
        adapter's config says something else a warning names the differences; ``load_report`` and
        ``report.substitutions`` keep them. ``compute_dtype`` is the adapter's.
        """
        loaded, self.load_report = load(
            model_path,
            model_config,
            self.config,
            model=model,
            strict=strict,
            make_linear=self._make_linear(),
        )
        differences = self.load_report.settings
        earlier = self._file_settings
        self.report.substitutions = [s for s in self.report.substitutions if s not in earlier]
        self.report.substitutions += differences
        self._file_settings = differences
        if differences:
            _check.warn(self.load_report.settings_text)
        return loaded

    def _make_linear(self) -> MakeLinear | None:
        """Makes layers that only this adapter can read."""
        rules = self.layer_rules()

        def make(name: str, linear: nn.Linear) -> nn.Module:
            return self._new_layer(linear, rules.choose(name, *linear.weight.shape))

        return make

    def __repr__(self) -> str:
        return f"{type(self).__name__}(backend={self.backend}, config={self.config!r})"


def _layer_rules(
    config: QuantizationConfig, skip_modules: Iterable[str] | None, custom_method: str = ""
) -> _core.LayerRules:
    if skip_modules is not None:
        _check.names("layer_rules", "skip_modules", skip_modules)
        config = dataclasses.replace(config, skip_modules=skip_modules)  # type: ignore[arg-type]
    return _core.LayerRules(config.to_json(), custom_method)


def _packed_layer(
    linear: nn.Linear, choice: _core.Choice, config: QuantizationConfig
) -> QuantizedLinear:
    _check.instance("quantize_linear", "linear", linear, nn.Linear, "an nn.Linear")
    dtype = parse_dtype(choice.compute_dtype)
    return PackedLinear._quantized(linear, choice.options, config, dtype)


class _DialectAdapter(QuantizationAdapter):
    """What the adapters over quantal's own dialects share."""

    def layer_rules(self, skip_modules: Iterable[str] | None = None) -> _core.LayerRules:
        return _layer_rules(self.config, skip_modules)

    def _file_entries(self) -> dict[str, Any]:
        return {}

    def _make_linear(self) -> None:
        return None

    #: What a config that is not given means.
    DEFAULT: ClassVar[QuantizationMethod]

    def __init__(self, backend: Backend | str, config: QuantizationConfig | None = None) -> None:
        super().__init__(backend, QuantizationConfig(self.DEFAULT) if config is None else config)

    def _validate_backend_support(self) -> None:
        kind = next(c.__name__ for c in type(self).__mro__ if c in _ADAPTERS.values())
        refusal = _core.adapter_refusal(kind, self.backend.value, self.config.to_json())
        if refusal:
            raise ConfigError(refusal)

    @_check.arguments(in_features=_check.size, out_features=_check.size, bias=_check.flag)
    def create_quantized_linear(
        self, in_features: int, out_features: int, bias: bool = True
    ) -> QuantizedLinear:
        return PackedLinear(in_features, out_features, bias, self.config)

    def quantize_linear(self, linear: nn.Linear, choice: _core.Choice) -> QuantizedLinear:
        return _packed_layer(linear, choice, self.config)

    def quantize_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Quantizes every linear layer that the config names, layer by layer.

        kwargs are those of ``replace_linear_with_quantized``: skip_modules, progress.
        """
        return replace_linear_with_quantized(model, self, **kwargs)


class BitsAndBytesAdapter(_DialectAdapter):
    """bitsandbytes NF4 and FP4, with and without double quantization, and LLM.int8."""

    DEFAULT = QuantizationMethod.BNB_NF4


class HQQAdapter(_DialectAdapter):
    """Half-quadratic quantization: 1 to 6 and 8 bits, zero points fitted to the weights."""

    DEFAULT = QuantizationMethod.HQQ


class MLXAdapter(_DialectAdapter):
    """MLX affine 4 and 8 bits; the MX formats through ``backend_options={"mode": "mxfp4"}``.

    The model that ``quantize_model`` returns is a torch model whose layers hold MLX's codes and
    scales; a warning, once per adapter, says so."""

    DEFAULT = QuantizationMethod.MLX_INT4
    _told = False

    def quantize_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """As for every adapter; the layers get MLX's form, the model stays one of torch's."""
        out = super().quantize_model(model, **kwargs)
        if not self._told:
            self._told = True
            _check.warn(
                "MLX quantization requires model conversion from PyTorch to MLX format: the layers "
                "were converted and run in torch; save_quantized_model writes the folder that "
                "mlx-lm loads"
            )
        return out


class QuantoAdapter(_DialectAdapter):
    """Quanto int2, int4 and int8; its optimizers through ``backend_options={"mode": "hqq"}``."""

    DEFAULT = QuantizationMethod.QUANTO_INT8


class FallbackAdapter(QuantizationAdapter):
    """Quantizes nothing; ``report`` says why, and what would."""

    def _validate_backend_support(self) -> None:
        if self.config.method is QuantizationMethod.NONE:
            return
        # Constructed directly, for a method that somebody asked for.
        decision = _core.decide_adapter(self.backend.value, self.config.to_json())
        refused = decision["adapter"] == type(self).__name__
        self.report = Report({**decision, "adapter": type(self).__name__})
        usual = f"FallbackAdapter quantizes nothing, although {decision['adapter']} would"
        for text in decision["warnings"] if refused else [usual]:
            _check.warn(text)

    def _file_entries(self) -> dict[str, Any]:
        return {}

    @_check.arguments(in_features=_check.size, out_features=_check.size, bias=_check.flag)
    def create_quantized_linear(
        self, in_features: int, out_features: int, bias: bool = True
    ) -> nn.Linear:
        """A dense layer with torch's own initial values."""
        return nn.Linear(in_features, out_features, bias)

    @_check.arguments(model=_check.module)
    def quantize_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Returns `model` as it is, with a warning if something else was asked for; ``report``
        lists its linear layers as dense, with the reason."""
        if self.config.method is not QuantizationMethod.NONE or self.report.reason:
            _check.warn("No quantization applied (fallback mode)")
        self.report.entries.clear()
        reason = self.report.reason or "method none"
        for name, module in model.named_modules():
            if type(module) is nn.Linear:
                count = sum(p.numel() for p in module.parameters())
                size = sum(p.numel() * p.element_size() for p in module.parameters())
                self.report.add(
                    name, "dense", reason, parameters=count, bytes_before=size, bytes_after=size
                )
        return model

    @_check.arguments(model=_check.module)
    def prepare_model_for_training(self, model: nn.Module) -> nn.Module:
        """Returns `model` as it is: a dense model is trained whole."""
        return model

    def _make_linear(self) -> None:
        return None


_ADAPTERS: dict[str, type[QuantizationAdapter]] = {
    cls.__name__: cls
    for cls in (BitsAndBytesAdapter, HQQAdapter, MLXAdapter, QuantoAdapter, FallbackAdapter)
}


def create_quantization_adapter(
    backend: Backend | str,
    config: QuantizationConfig | None = None,
    *,
    support: str | None = None,
    fallback: str | None = None,
) -> QuantizationAdapter:
    """The adapter that policy chooses for a backend and a config.

    support   "documented" (default): the documented compatibility matrix; "extended": every pair
              that quantal's kernels run. Also read from ``config.backend_options``.
    fallback  for an unsupported pair: "none" (default) gives FallbackAdapter and a warning,
              "nearest" the closest supported method, "error" raises UnsupportedError

    Every substitution is in ``adapter.report`` and, once, a warning.
    """
    where = "create_quantization_adapter"
    backend = Backend(backend)
    config = _config(where, config)
    for name, value in (("support", support), ("fallback", fallback)):
        if value is not None:
            _check.text(where, name, value)
    decision = _core.decide_adapter(backend.value, config.to_json(), support, fallback)
    cls = _ADAPTERS.get(decision["adapter"]) or adapter_class(decision["adapter"])
    if cls is None:
        raise UnsupportedError(
            f"create_quantization_adapter: {decision['adapter']} has no Python adapter, expected "
            f"one of {', '.join([*_ADAPTERS, *registered_adapters()])} (register_adapter adds some)"
        )
    for text in decision["warnings"]:
        _check.warn(text)
    resolved = QuantizationConfig.from_json(decision["config"])
    if support is not None:  # the adapter keeps the mode that it was made under
        resolved.backend_options = {**resolved.backend_options, "support": support}
    adapter = cls(backend, resolved)
    adapter.report = Report({**decision, "adapter": cls.__name__})
    if config.note:  # a remark is not part of the JSON that goes through C++
        resolved.note = config.note  # type: ignore[misc]
        adapter.report.notes = [config.note]
    return adapter


def available_methods() -> list[QuantizationMethod]:
    """Methods that this build quantizes with."""
    return [QuantizationMethod(name) for name in _core.built_methods()]


__all__ = [
    "BitsAndBytesAdapter",
    "FallbackAdapter",
    "HQQAdapter",
    "MLXAdapter",
    "QuantizationAdapter",
    "QuantoAdapter",
    "available_methods",
    "create_quantization_adapter",
    "register_adapter",
    "registered_adapters",
]
