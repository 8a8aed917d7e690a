"""Replacing the linear layers of a model, one at a time, each dense weight freed at once."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import _core
from ._dtypes import tensor_bytes
from .linear import QuantizedLinear
from .report import Report

if TYPE_CHECKING:
    from .adapters import QuantizationAdapter


def _dense_users(model: nn.Module) -> dict[int, str]:
    """Parameters (by id) that a module other than nn.Linear holds: quantizing a linear layer that
    shares one would add a copy instead of saving one."""
    users: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                users.setdefault(id(parameter), name)
    return users


def _set_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _linear_names(model: nn.Module) -> list[list[str]]:
    """Names of each plain nn.Linear, those of a module that is used twice together."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            names.setdefault(id(module), []).append(name)
    return list(names.values())


def _rules(adapter: QuantizationAdapter, skip_modules: Iterable[str] | None) -> _core.LayerRules:
    config = adapter.config
    if skip_modules is not None:
        config = dataclasses.replace(config, skip_modules=list(skip_modules))
    return _core.LayerRules(config.to_json())


def _dense_reason(linear: nn.Linear, choice: _core.Choice, users: dict[int, str]) -> str:
    if not choice.quantize:
        return choice.reason
    holder = users.get(id(linear.weight))
    return "" if holder is None else f"shares its weight with {holder or 'the model'}"


def _measure(layer: nn.Module, weight: torch.Tensor) -> float:
    if not isinstance(layer, QuantizedLinear) or weight.device.type == "meta":
        return 0.0
    return layer.relative_error(weight)


def _parameter_bytes(module: nn.Module) -> int:
    return sum(map(tensor_bytes, [*module.parameters(), *module.buffers()]))


def _report_others(model: nn.Module, report: Report, covered: set[int]) -> None:
    """Rows for everything that is not a linear layer, tied parameters once."""
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in covered]
        if not own or isinstance(module, QuantizedLinear):
            continue
        covered.update(map(id, own))
        count, size = sum(p.numel() for p in own), sum(map(tensor_bytes, own))
        reason = f"{type(module).__name__}, not a linear layer"
        report.add(name, "dense", reason, parameters=count, bytes_before=size, bytes_after=size)


def replace_linear_with_quantized(
    model: nn.Module,
    adapter: QuantizationAdapter,
    skip_modules: Iterable[str] | None = None,
    *,
    progress: bool = False,
) -> nn.Module:
    """Replaces, in place, each ``nn.Linear`` of `model` by the adapter's quantized layer.

    skip_modules  replaces the config's list: whole dotted components, globs or ``re:`` patterns; an
                  empty list skips nothing
    progress      show a progress bar (needs tqdm)

    Weights are quantized one layer at a time and freed, so memory never holds both models. A model
    that is itself an ``nn.Linear`` is returned as a new layer; else `model` itself. What was done
    stands in ``adapter.report``.
    """
    rules = _rules(adapter, skip_modules)
    report = adapter.report
    report.entries.clear()
    users = _dense_users(model)
    tied: dict[int, tuple[weakref.ref, nn.Module]] = {}
    covered: set[int] = set()
    groups = _linear_names(model)
    for names in _progress(groups, progress):
        linear = model.get_submodule(names[0])
        weight = linear.weight
        size = _parameter_bytes(linear)
        count = sum(p.numel() for p in linear.parameters())
        choice = rules.choose(names[0], *weight.shape)
        reason = _dense_reason(linear, choice, users)
        if reason:
            if id(weight) in users or id(weight) in covered:
                size -= tensor_bytes(weight)
                count -= weight.numel()
            covered.update(map(id, linear.parameters()))
            report.add(
                names[0], "dense", reason, parameters=count, bytes_before=size, bytes_after=size
            )
            continue
        known = tied.get(id(weight))
        if known is not None and known[0]() is weight:
            layer: nn.Module = adapter.tie_quantized_linear(known[1], linear)
        else:
            layer = adapter.quantize_linear(linear, choice)
            tied[id(weight)] = weakref.ref(weight), layer
        report.add(
            names[0],
            choice.method,
            parameters=count,
            bytes_before=size,
            bytes_after=_parameter_bytes(layer),
            relative_error=_measure(layer, weight),
        )
        del linear, weight
        for name in names:
            if name == "":
                model = layer
            else:
                _set_module(model, name, layer)
        del layer
    _report_others(model, report, covered)
    report.unmatched_patterns = rules.unmatched()
    return model


def _progress(items: list, show: bool) -> Iterable:
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc="quantizing", unit="layer")
