"""Conversion between dialects and containers, tensor by tensor, in C++."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import _check, _core
from ._dtypes import dtype_name, parse_dtype
from ._errors import ConfigError
from .checkpoint import parse_size


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """What became of one layer.

    source, target   forms: "gguf Q4_1", "mlx 4-bit, group 32"
    codes            every code was copied
    statistics       scales and offsets are the same numbers; else within statistics_ulp
    values           dequantized weights are equal when both are rounded to values_dtype
    lossless         all three
    relative_error   ||w' - w|| / ||w|| of dequantized weights (0 in a plan)
    """

    name: str
    source: str
    target: str
    codes: bool
    statistics: bool
    statistics_ulp: float
    values: bool
    values_dtype: str
    lossless: bool
    note: str
    relative_error: float


@dataclasses.dataclass(frozen=True)
class ConvertReport:
    """Layers of a conversion, the layout of the target, the number of dense tensors copied."""

    layout: str
    layers: list[ConvertedLayer]
    copied: int
    measured: bool
    lossless: bool
    text: str

    def __str__(self) -> str:
        return self.text


def _set_option(options: _core.QuantizeOptions, name: str, value: Any) -> None:
    try:
        setattr(options, name, value)
    except TypeError:  # an integer that C++ has no room for
        raise ConfigError(f"convert: {name} is {value}, expected a smaller number") from None


def _options(to: str, settings: dict[str, Any]) -> _core.ConvertOptions:
    options = _core.ConvertOptions()
    options.to = to
    quantize = options.quantize
    for name in ("bits", "group_size", "mode", "quant_type", "double_quant", "axis"):
        if settings.get(name) is not None:
            _set_option(quantize, name, settings[name])
    options.quantize = quantize
    if settings["value_dtype"] is not None:
        options.value_dtype = dtype_name(parse_dtype(settings["value_dtype"]))
    options.layout = settings["layout"]
    options.max_shard_bytes = parse_size(settings["max_shard_size"])
    options.overwrite = settings["overwrite"]
    options.lossless_only = settings["lossless_only"]
    if settings["dense_dtype"] is not None:
        options.dense_dtype = dtype_name(parse_dtype(settings["dense_dtype"]))
    options.skip_modules = list(settings["skip_modules"])
    return options


def _progress_argument(where: str, name: str, value: Any) -> None:
    if not callable(value) and not isinstance(value, bool):
        raise _check.wrong_type(where, name, value, "True, False or a function")


def _report(values: dict[str, Any]) -> ConvertReport:
    layers = [ConvertedLayer(**layer) for layer in values.pop("layers")]
    return ConvertReport(layers=layers, **values)


@_check.arguments(
    path=_check.source,
    to_path=_check.path,
    to=_check.text,
    **{name: _check.optional(_check.integer) for name in ("bits", "group_size", "axis")},
    **{name: _check.optional(_check.text) for name in ("mode", "quant_type")},
    **{name: _check.optional(_check.dtype) for name in ("value_dtype", "dense_dtype")},
    **{name: _check.flag for name in ("lossless_only", "overwrite", "plan")},
    double_quant=_check.optional(_check.flag),
    skip_modules=_check.names,
    layout=_check.text,
    progress=_progress_argument,
)
def convert(
    path: str | os.PathLike,
    to_path: str | os.PathLike,
    to: str,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    quant_type: str | None = None,
    double_quant: bool | None = None,
    axis: int | None = None,
    value_dtype: torch.dtype | str | None = None,
    dense_dtype: torch.dtype | str | None = None,
    skip_modules: Iterable[str] = ("lm_head",),
    layout: str = "",
    max_shard_size: int | str | None = None,
    lossless_only: bool = False,
    overwrite: bool = False,
    plan: bool = False,
    progress: bool | Callable[[int, int, str], None] = False,
) -> ConvertReport:
    """Converts a model file or folder to another dialect or container.

    path, to_path  any file or folder that quantal reads; where to write
    to             "bnb", "hqq", "mlx", "quanto", "gguf", or "dense" to decode
    bits, group_size, mode, quant_type, double_quant, axis, value_dtype
                   form of the target; what is not given stays as the source has it. mode: GGUF
                   block type ("Q4_K"), or MLX's "mxfp4" ...
    dense_dtype    of weights that are decoded: by "dense", and embeddings that the target does not
                   pack; not given: that of the model by its config.json
    skip_modules   linear layers of a dense source that stay dense
    layout, max_shard_size, overwrite  as in ``save_quantized_model``
    lossless_only  raise UnsupportedError, naming the first layer, instead of quantizing again
    plan           state what would be preserved and write nothing
    progress       True: show a progress bar (needs tqdm). A function is called with (done, total,
                   name) before each layer or tensor, and once with done == total

    Codes are copied and statistics rewritten where both forms mean the same; docs/convert.md lists
    what every edge preserves. Memory grows by at most three times the largest tensor, and the
    target appears whole or not at all.
    """
    if progress and plan:
        raise ConfigError("convert: progress is True with plan=True, expected one of them")
    options = _options(to, locals())
    if plan:
        return _report(_core.plan_convert(os.fspath(path), options, os.fspath(to_path)))
    if callable(progress) or not progress:
        call = progress or None
        return _report(_core.convert(os.fspath(path), os.fspath(to_path), options, call))
    from tqdm.auto import tqdm

    with tqdm(desc="converting", unit="tensor") as bar:

        def show(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name)
            bar.update(done - bar.n)

        return _report(_core.convert(os.fspath(path), os.fspath(to_path), options, show))
