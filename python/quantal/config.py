"""Configuration: the dataclass of the public API. Every decision about it is made in C++."""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _core
from ._dtypes import parse_dtype
from ._errors import ConfigError
from .backend import Backend


class QuantizationMethod(enum.Enum):
    """Quantization methods. ``QuantizationMethod("HQQ")`` and ``("hqq")`` are the same."""

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
        name = _core.parse_method(str(value))  # raises ConfigError listing the legal names
        return next(m for m in cls if m.value == name)


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
    """How to quantize. Methods and dtypes may be given as strings; ``bits=None`` means unset."""

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

    def __post_init__(self) -> None:
        self.method = QuantizationMethod(self.method)
        if self.bits is None:
            self.bits = _UnsetBits(4)
        if self.group_size is None:
            self.group_size = 0
        for name in _DTYPE_FIELDS:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, parse_dtype(value))
        _core.normalize_config(self.to_json())  # raises ConfigError naming the member

    @property
    def bits_set(self) -> bool:
        """Whether `bits` was given; False while it is only the default."""
        return not isinstance(self.bits, _UnsetBits)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; unset bits are None."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["method"] = self.method.value
        out["bits"] = int(self.bits) if self.bits_set else None
        for name in _DTYPE_FIELDS:
            out[name] = _dtype_text(out[name])
        out["skip_modules"] = list(self.skip_modules)
        out["layer_configs"] = {
            name: settings if settings is None else {k: _plain(v) for k, v in settings.items()}
            for name, settings in self.layer_configs.items()
        }
        out["backend_options"] = {k: _plain(v) for k, v in self.backend_options.items()}
        return out

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantizationConfig:
        known = {f.name for f in dataclasses.fields(cls)}
        values = dict(values)
        if values.pop("bits_set", True) is False:
            values["bits"] = None
        if not known.issuperset(values):
            _core.normalize_config(json.dumps({k: None for k in values if k not in known}))
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> QuantizationConfig:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"config: text is not JSON, expected an object ({error})") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config: JSON is a {type(values).__name__}, expected an object")
        return cls.from_dict(values)

    def __repr__(self) -> str:
        """The members that differ from their defaults, after the method."""
        default = {f.name: _default(f) for f in dataclasses.fields(self)}
        parts = [f"method={self.method.name}"]
        for name, usual in default.items():
            value = getattr(self, name)
            changed = self.bits_set if name == "bits" else value != usual
            if name != "method" and changed:
                parts.append(f"{name}={value!r}")
        return f"QuantizationConfig({', '.join(parts)})"


def _default(f: dataclasses.Field) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return _dtype_text(value) if isinstance(value, torch.dtype) else value


def cuda_has_bf16() -> bool:
    """What the CUDA device says, True where there is none: a plan for another machine."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()


class ConfigIssue(str):
    """One finding of validation: its message, with ``id``, ``severity`` and ``remedy``."""

    id: str
    severity: str
    remedy: str


def validate_quantization_config(
    config: QuantizationConfig, backend: Backend | str
) -> list[ConfigIssue]:
    """Everything about `config` that will not work as asked on `backend`; empty if nothing."""
    out = []
    for found in _core.validate(config.to_json(), Backend(backend).value):
        issue = ConfigIssue(found["message"])
        issue.id, issue.severity = found["id"], found["severity"]
        issue.remedy = found["remedy"]
        out.append(issue)
    return out


def get_recommended_config(
    backend: Backend | str, model_size_b: float = 7.0, available_memory_gb: float = 16.0
) -> QuantizationConfig:
    """A config whose weights fit; says so (``config.note``) where even 4 bits do not."""
    text = _core.recommended_config(
        Backend(backend).value, model_size_b, available_memory_gb, cuda_has_bf16()
    )
    config = QuantizationConfig.from_json(text)
    config.note = _core.memory_note(text, model_size_b, available_memory_gb)  # type: ignore[attr-defined]
    return config
