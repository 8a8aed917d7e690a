"""Configuration: the dataclass of the public API. Every decision about it is made in C++."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from . import _check, _core
from ._dtypes import parse_dtype
from ._errors import ConfigError, DtypeError
from .backend import Backend, cuda_has_bf16


class QuantizationMethod(enum.Enum):
    """Quantization methods. ``QuantizationMethod("HQQ")`` and ``("hqq")`` are the same.

    ``QuantizationMethod(name)`` also takes the names of ``register_adapter``; iteration lists the
    built-in methods only."""

    BNB_NF4 = "bnb_nf4"
    BNB_INT8 = "bnb_int8"
    HQQ = "hqq"
    MLX_INT4 = "mlx_int4"
    MLX_INT8 = "mlx_int8"
    QUANTO_INT2 = "quanto_int2"
    QUANTO_INT4 = "quanto_int4"
    QUANTO_INT8 = "quanto_int8"
    NONE = "none"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> QuantizationMethod:
        if not isinstance(value, str):
            expected = "a QuantizationMethod or its name"
            raise _check.wrong_type("QuantizationMethod", "value", value, expected)
        name = _core.parse_method(value)  # raises ConfigError listing the legal names
        return next((m for m in cls if m.value == name), None) or _custom_method(cls, name)


_CUSTOM_METHODS: dict[str, QuantizationMethod] = {}


def _custom_method(cls: type[QuantizationMethod], name: str) -> QuantizationMethod:
    """What stands for a method of ``register_adapter``: like a member, but not listed as one."""
    if name not in _CUSTOM_METHODS:
        method: Any = object.__new__(cls)
        method._name_, method._value_ = name.upper(), name
        _CUSTOM_METHODS[name] = method
    return _CUSTOM_METHODS[name]


class _UnsetBits(int):
    """The default 4 of `bits` while nobody asked for it: a method may imply another width."""

    def __repr__(self) -> str:
        return f"{int(self)}"

    def __deepcopy__(self, memo: Any) -> _UnsetBits:
        return self

    def __reduce__(self):
        return _UnsetBits, (int(self),)


_DTYPE_FIELDS = ("compute_dtype", "storage_dtype")


def _dtype_text(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


@dataclass(repr=False)
class QuantizationConfig:
    """How to quantize. Methods and dtypes may be given as strings.

    method           what to quantize with; a method that names its width implies ``bits``
    bits             width; None means unset, then it is the method's, or 4
    group_size       codes per scale; 0 or None: one group per row (HQQ)
    compute_dtype    of products; None: the adapter chooses by backend
    storage_dtype    under which packed bytes are stored: a view, never a conversion
    double_quant     bitsandbytes NF4 and FP4: scales are quantized again; None means unset (True)
    quant_type       bitsandbytes: "nf4" or "fp4"
    skip_modules     patterns of layers that stay dense; an empty list skips nothing
    layer_configs    {pattern: settings of the layers that match}; None as settings skips them
    backend_options  "support", "fallback" and settings of single dialects (docs/policy.md)
    block_size       bitsandbytes: used instead of group_size
    quant_zero, quant_scale  HQQ: zeros and scales in 8 bits, as older files have them

    Settings that no config may have raise ConfigError (a ValueError); what will not work on a
    backend is told by ``validate_quantization_config``. ``note`` is a remark of whoever made the
    config: ``get_recommended_config`` says there when even its choice does not fit.
    """

    method: QuantizationMethod = QuantizationMethod.BNB_NF4
    bits: int = _UnsetBits(4)
    group_size: int = 64
    compute_dtype: torch.dtype | None = None
    storage_dtype: torch.dtype | None = None
    double_quant: bool = True
    quant_type: str = "nf4"
    skip_modules: list[str] = field(default_factory=lambda: ["lm_head"])
    layer_configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    backend_options: dict[str, Any] = field(default_factory=dict)
    block_size: int | None = None
    quant_zero: bool | None = None
    quant_scale: bool = False

    note: ClassVar[str] = ""
    #: Whether `double_quant` was given; validation says nothing about what is only the default.
    _double_quant_given: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.method = QuantizationMethod(self.method)
        if self.bits is None:
            self.bits = _UnsetBits(4)
        if self.group_size is None:
            self.group_size = 0
        for name, usual in (("double_quant", True), ("quant_type", "nf4"), ("quant_scale", False)):
            if getattr(self, name) is None:
                setattr(self, name, usual)
        for name in ("bits", "group_size", "block_size"):
            setattr(self, name, _as_int(getattr(self, name)))
        for name in _DTYPE_FIELDS:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, _as_dtype(name, value))
        self._check_collections()
        _core.normalize_config(self.to_json())  # raises ConfigError naming the member

    def _check_collections(self) -> None:
        where = "QuantizationConfig"
        _check.names(where, "skip_modules", self.skip_modules)
        self.skip_modules = list(self.skip_modules)
        for name in ("layer_configs", "backend_options"):
            value = _check.instance(where, name, getattr(self, name), Mapping, "a dict")
            setattr(self, name, dict(value))
            for key in value:
                _check.text(where, f"key of {name}", key)

    @property
    def bits_set(self) -> bool:
        """Whether `bits` was given; False while it is only the default."""
        return not isinstance(self.bits, _UnsetBits)

    @property
    def double_quant_set(self) -> bool:
        """Whether `double_quant` was given; False while it is only the default."""
        return self._double_quant_given or self.double_quant is not True

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; unset bits and double_quant are None."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["method"] = QuantizationMethod(self.method).value
        out["bits"] = self.bits if self.bits_set else None
        out["double_quant"] = self.double_quant if self.double_quant_set else None
        for name in _DTYPE_FIELDS:
            out[name] = _plain(out[name])
        out["skip_modules"] = list(self.skip_modules)
        out["layer_configs"] = {
            name: {k: _plain(v) for k, v in settings.items()}
            if isinstance(settings, Mapping)
            else _plain(settings)
            for name, settings in self.layer_configs.items()
        }
        out["backend_options"] = {k: _plain(v) for k, v in self.backend_options.items()}
        return out

    def to_json(self) -> str:
        """``to_dict`` as text; ``from_json`` is its inverse."""
        return json.dumps(self.to_dict(), default=_refuse)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantizationConfig:
        """A config with these members; what is missing keeps its default.

        Raises ConfigError for an unknown member, naming the nearest one."""
        where = f"{cls.__name__}.from_dict"
        values = dict(_check.instance(where, "values", values, Mapping, "a dict"))
        for name in ("bits", "double_quant"):
            if values.pop(f"{name}_set", True) is False:
                values[name] = None
        _refuse_unknown(cls, values)
        config = cls(**values)
        config._remember_double_quant(values.get("double_quant") is not None)
        return config

    @classmethod
    def from_json(cls, text: str) -> QuantizationConfig:
        """The config that ``to_json`` wrote, or any JSON object with its members."""
        _check.instance(f"{cls.__name__}.from_json", "text", text, (str, bytes), "JSON text")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"config: text is not JSON, expected an object ({error})") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config: JSON is a {type(values).__name__}, expected an object")
        return cls.from_dict(values)

    def _remember_double_quant(self, given: bool) -> None:
        self.__dict__["_double_quant_given"] = given

    def __repr__(self) -> str:
        """The members that differ from their defaults, after the method."""
        default = {f.name: _default(f) for f in dataclasses.fields(self)}
        parts = [f"method={getattr(self.method, 'name', self.method)}"]
        given = {"bits": self.bits_set, "double_quant": self.double_quant_set}
        for name, usual in default.items():
            value = getattr(self, name)
            if name != "method" and given.get(name, value != usual):
                parts.append(f"{name}={value!r}")
        return f"QuantizationConfig({', '.join(parts)})"


def _refuse_unknown(cls: type, values: Iterable[str]) -> None:
    """Raises ConfigError if a name is no member; the nearest one is found in C++."""
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = {str(name): None for name in values if name not in known}
    if unknown:
        _core.normalize_config(json.dumps(unknown))


def _remember_arguments(init: Any) -> Any:
    """`init` of the dataclass, which refuses unknown keywords by their nearest name and notes
    whether `double_quant` was given."""
    names = [f.name for f in dataclasses.fields(QuantizationConfig)]

    @functools.wraps(init)
    def wrapper(self: QuantizationConfig, *args: Any, **kwargs: Any) -> None:
        try:
            _refuse_unknown(type(self), kwargs)
        except ConfigError as error:
            raise TypeError(f"QuantizationConfig: {error}") from None
        positional = len(args) > names.index("double_quant")
        given = kwargs.get("double_quant") is not None or positional
        # dataclasses.replace passes every member, asked for or not.
        self._remember_double_quant(given and len(args) + len(kwargs) < len(names))
        init(self, *args, **kwargs)

    return wrapper


QuantizationConfig.__init__ = _remember_arguments(QuantizationConfig.__init__)  # type: ignore[method-assign]


def _default(f: dataclasses.Field) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _as_int(value: Any) -> Any:
    """An int of another library as an int; anything else as it is, for C++ to refuse by name."""
    if isinstance(value, int) or not hasattr(value, "__index__"):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def _as_dtype(name: str, value: Any) -> torch.dtype:
    if not isinstance(value, str | torch.dtype):
        raise _check.wrong_type("QuantizationConfig", name, value, "a torch.dtype or its name")
    try:
        return parse_dtype(value)
    except DtypeError as error:
        raise DtypeError(f"QuantizationConfig: {name}: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return _dtype_text(value) if isinstance(value, torch.dtype) else _as_int(value)


def _refuse(value: Any) -> Any:
    raise ConfigError(
        f"config: a setting is {_check._actual(value)}, expected a number, text, boolean, list or "
        "dict"
    )


class ConfigIssue(str):
    """One finding of validation: its message, with ``id``, ``severity`` ("error": not quantized as
    asked; "warning": works, but look) and ``remedy``."""

    id: str
    severity: str
    remedy: str

    def __new__(cls, message: str, id: str = "", severity: str = "", remedy: str = ""):
        issue = super().__new__(cls, message)
        issue.id, issue.severity, issue.remedy = id, severity, remedy
        return issue

    def __getnewargs__(self):
        return str(self), self.id, self.severity, self.remedy


def _linear_shapes(model: Any) -> list[tuple[str, int, int]]:
    """(name, out_features, in_features) of each linear layer of a module, or of listed shapes."""
    if isinstance(model, nn.Module):
        modules = model.named_modules()
        return [(n, m.out_features, m.in_features) for n, m in modules if type(m) is nn.Linear]
    where = "validate_quantization_config"
    expected = "an nn.Module, a list of shapes (out_features, in_features), or {name: shape}"
    if isinstance(model, str | bytes) or not isinstance(model, Iterable):
        raise _check.wrong_type(where, "model", model, expected)
    pairs = model.items() if isinstance(model, Mapping) else (("", shape) for shape in model)
    shapes: list[tuple[str, int, int]] = []
    for name, shape in pairs:
        if isinstance(shape, str | bytes) or not isinstance(shape, Iterable):
            raise _check.wrong_type(where, "shape of a layer", shape, expected)
        sizes = [_check.integer(where, "size of a layer", size) for size in shape]
        if len(sizes) != 2:
            raise ConfigError(f"{where}: shape is {sizes}, expected (out_features, in_features)")
        shapes.append((_check.text(where, "name of a layer", name), sizes[0], sizes[1]))
    return shapes


def validate_quantization_config(
    config: QuantizationConfig, backend: Backend | str, model: Any = None
) -> list[ConfigIssue]:
    """Everything about `config` that will not work as asked on `backend`; empty if nothing.

    model  an nn.Module, a list of weight shapes (out_features, in_features) or {name: shape}: then
           group sizes are tried on every layer, and patterns on every name

    Each finding is a string with ``id``, ``severity`` and ``remedy``; docs/policy.md lists the ids.
    """
    where = "validate_quantization_config"
    _check.instance(where, "config", config, QuantizationConfig, "a QuantizationConfig")
    layers = None if model is None else _linear_shapes(model)
    found = _core.validate(config.to_json(), Backend(backend).value, layers, cuda_has_bf16())
    return [ConfigIssue(i["message"], i["id"], i["severity"], i["remedy"]) for i in found]


def get_recommended_config(
    backend: Backend | str, model_size_b: float = 7.0, available_memory_gb: float = 16.0
) -> QuantizationConfig:
    """A config for a model of `model_size_b` billion parameters whose weights fit into
    `available_memory_gb`; where even 4 bits do not, ``config.note`` says so.

    It looks at weights alone; ``quantal.plan`` counts everything from the headers of a model."""
    where = "get_recommended_config"
    size = _check.real(where, "model_size_b", model_size_b)
    memory = _check.real(where, "available_memory_gb", available_memory_gb)
    text = _core.recommended_config(Backend(backend).value, size, memory, cuda_has_bf16())
    config = QuantizationConfig.from_json(text)
    config.note = _core.memory_note(text, size, memory)  # type: ignore[misc]
    return config
