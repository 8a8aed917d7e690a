"""The planner: bytes of a model on a machine, from shapes and headers alone. C++ counts them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from . import _check, _core
from ._dtypes import dtype_name, parse_dtype
from ._errors import ConfigError
from ._loading import build_model
from ._packed import BUFFERS, PackedWeight
from ._parts import is_transformers, module_names
from .backend import Backend
from .config import QuantizationConfig
from .training import adapter_parameters


@dataclasses.dataclass(frozen=True)
class PlanLayer:
    """One tensor or quantized layer. Bytes are of the whole model, ``rank_bytes`` those of rank 0.

    method            what it becomes: "hqq 4-bit g64", "dense bf16"; ``reason`` why dense
    unit              block that FSDP gathers it with; "" is the root
    stored_bytes      as it lies in the file or module now; file_bytes: as it would be saved
    bytes             in memory: codes_bytes + stats_bytes + shared_bytes + 128 for the spec
    """

    name: str
    method: str
    reason: str
    unit: str
    shape: list[int]
    quantized: bool
    parameters: int
    stored_bytes: int
    codes_bytes: int
    stats_bytes: int
    shared_bytes: int
    bytes: int
    rank_bytes: int
    file_bytes: int
    adapter_parameters: int
    adapter_rank_parameters: int


@dataclasses.dataclass(frozen=True)
class PlanPhase:
    """Memory of one rank at the peak of a phase: ``total``, the sum of ``parts``; ``host_bytes``
    lie beside it in host memory."""

    name: str
    total: int
    host_bytes: int
    parts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class PlanRule:
    """Weight bytes of the whole model beside the documented rule of thumb: ``rule_gigabytes`` is
    ``bytes_per_parameter`` times the parameters, rounded to whole billions."""

    width: str
    method: str
    bytes_per_parameter: float
    rule_gigabytes: float
    exact_bytes: int
    quantized_parameters: int
    quantized_bytes: int


@dataclasses.dataclass(frozen=True)
class PlanCandidate:
    """A config that was weighed. ``relative_error`` is that of normally distributed weights."""

    label: str
    config: QuantizationConfig
    relative_error: float
    resident_bytes: int
    peak_bytes: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What ``quantal.plan`` found. ``print(plan)`` shows all of it; docs/plan.md defines each term.

    label, config    what was planned; ``recommended`` where the planner chose it
    fits             whether the largest phase fits; True where memory is not known
    usable_bytes     of the memory given; 0: not known
    peak_bytes       of ``peak_phase``; ``phases`` has all
    largest_batch    sequences of a rank that still fit; 0: none, or memory is not known
    resident_bytes   of the weights, whole model; ``rank_bytes``: the share of rank 0
    file_bytes       of the tensors, saved in the default layout
    """

    source: str
    label: str
    config: QuantizationConfig
    adapter: str
    recommended: bool
    fits: bool
    verdict: str
    usable_bytes: int
    peak_bytes: int
    peak_phase: str
    largest_batch: int
    parameters: int
    adapter_parameters: int
    stored_bytes: int
    resident_bytes: int
    rank_bytes: int
    file_bytes: int
    options: dict[str, Any]
    sizes: dict[str, Any]
    phases: list[PlanPhase]
    rules: list[PlanRule]
    candidates: list[PlanCandidate]
    substitutions: list[dict[str, str]]
    unmatched_patterns: list[str]
    notes: list[str]
    layers: list[PlanLayer]
    _json: str = dataclasses.field(repr=False, compare=False)
    _text: str = dataclasses.field(repr=False, compare=False)

    def phase(self, name: str) -> PlanPhase:
        """ "load", "resident", "forward"; with mode "qlora" also "backward" and "optimizer"."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        known = ", ".join(p.name for p in self.phases)
        raise ConfigError(f"plan: phase is {name!r}, expected one of {known}")

    def to_text(self) -> str:
        """A report for a terminal, at most 100 columns."""
        return self._text

    def to_json(self) -> str:
        return self._json

    def to_dict(self) -> dict[str, Any]:
        """The plain values of ``to_json``."""
        return json.loads(self._json)

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Plan({self.source!r}, {self.label}: {self.verdict})"


def _answer(text: str, report: str) -> Plan:
    values = json.loads(text)
    for name, cls in (("phases", PlanPhase), ("rules", PlanRule), ("layers", PlanLayer)):
        values[name] = [cls(**one) for one in values[name]]
    values["config"] = QuantizationConfig.from_dict(values["config"])
    values["candidates"] = [
        PlanCandidate(**{**one, "config": QuantizationConfig.from_dict(one["config"])})
        for one in values["candidates"]
    ]
    return Plan(**values, _json=text, _text=report)


# ---------------------------------------------------------------------- outline of a module


class _Outline:
    """Names, shapes and types of a module, each weight once. Values are never looked at.

    A linear layer that shares the weight of an embedding stays dense, and counts there."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: list[_core.OutlineTensor] = []
        self.trained = adapter_parameters(model)
        self.owners: dict[int, str] = {}  # id of a parameter: name of its tensor
        self.dense_users = {
            id(p)
            for m in model.modules()
            if type(m) is not nn.Linear
            for p in m.parameters(recurse=False)
        }

    def run(self) -> list[_core.OutlineTensor]:
        seen: set[int] = set()
        for name, module in module_names(self.model).items():
            if id(module) in seen:
                continue
            seen.add(id(module))
            if isinstance(module, PackedWeight):
                self._packed(name, module)
            self._parameters(name, module)
            self._buffers(name, module)
        return self.tensors

    def _add(self, name: str, kind: str, tensor: torch.Tensor, **facts: Any) -> None:
        dtype = dtype_name(tensor.dtype)
        self.tensors.append(_core.OutlineTensor(name, kind, list(tensor.shape), dtype, **facts))

    def _packed(self, name: str, module: PackedWeight) -> None:
        tied = self.owners.setdefault(id(module.codes), name)
        shape = [module._rows, module._cols]
        self.tensors.append(
            _core.OutlineTensor(
                name,
                "packed",
                shape,
                dtype_name(module.value_dtype),
                list(module._spec),
                tied_to="" if tied == name else tied,
            )
        )

    def _parameters(self, name: str, module: nn.Module) -> None:
        for part, parameter in module.named_parameters(recurse=False):
            if isinstance(module, PackedWeight) and part in BUFFERS:
                continue
            full = f"{name}.{part}" if name else part
            linear = type(module) is nn.Linear and part == "weight"
            linear = linear and id(parameter) not in self.trained
            first = self.owners.setdefault(id(parameter), full)
            if first == full:
                dense = id(parameter) in self.dense_users or not linear
                trainable = id(parameter) in self.trained
                self._add(full, "dense" if dense else "linear", parameter, trainable=trainable)
            elif linear:
                self._add(full, "linear", parameter, tied_to=first)

    def _buffers(self, name: str, module: nn.Module) -> None:
        for part, buffer in module.named_buffers(recurse=False):
            if isinstance(module, PackedWeight) and part in BUFFERS:
                continue
            full = f"{name}.{part}" if name else part
            saved = part not in module._non_persistent_buffers_set
            if self.owners.setdefault(id(buffer), full) == full:
                self._add(full, "buffer", buffer, saved=saved)


def _config_text(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    if is_transformers(model):
        return config.to_json_string(use_diff=True)
    return json.dumps(config) if isinstance(config, dict) else "{}"


def _is_config(model: Any) -> bool:
    return isinstance(model, Mapping) or hasattr(model, "to_diff_dict")


def _module_of(model: Any) -> nn.Module:
    """A module for a config, its parameters without memory."""
    if isinstance(model, nn.Module):
        return model
    if not _is_config(model):
        raise _check.wrong_type(
            "plan",
            "model",
            model,
            "a path, an nn.Module, a transformers config or the dictionary of one",
        )
    built = build_model(dict(model) if isinstance(model, Mapping) else model, {})
    values = model if isinstance(model, Mapping) else model.to_dict()
    dtype = values.get("dtype") or values.get("torch_dtype")
    return built.to(parse_dtype(dtype)) if dtype is not None else built


def _source(model: nn.Module) -> str:
    on_meta = all(p.is_meta for p in model.parameters())
    return f"{type(model).__name__} ({'without weights' if on_meta else 'in memory'})"


# ---------------------------------------------------------------------- the function


def _bytes(memory_gb: float | None) -> int:
    if memory_gb is None:
        return 0
    value = _check.real("plan", "memory_gb", memory_gb)
    if not math.isfinite(value) or value <= 0 or value > 1e9:
        raise ConfigError(f"plan: memory_gb is {memory_gb}, expected a positive number or None")
    return round(value * 1e9)


def _texts(where: str, values: str | Iterable[str] | None) -> list[str]:
    if values is None or (isinstance(values, str) and values == "all-linear"):
        return []
    if not isinstance(values, list | tuple | set | frozenset):
        raise _check.wrong_type("plan", where, values, 'a list of names, or "all-linear"')
    return [_check.text("plan", f"name in {where}", value) for value in values]


def plan(
    model: str | os.PathLike | nn.Module | Mapping[str, Any] | Any,
    backend: Backend | str,
    memory_gb: float | None = None,
    world_size: int = 1,
    mode: str = "inference",
    *,
    config: QuantizationConfig | None = None,
    support: str | None = None,
    fallback: str | None = None,
    batch_size: int = 1,
    sequence_length: int = 2048,
    attention: str = "sdpa",
    lora_rank: int = 16,
    lora_targets: Iterable[str] | str | None = None,
    lora_dropout: float = 0.0,
    lora_dtype: torch.dtype | str = torch.float32,
    optimizer: str = "adamw",
    gradient_checkpointing: bool = True,
    loss_chunk: int = 0,
    norms_in_float32: bool = False,
    cpu_offload: bool = False,
) -> Plan:
    """How much memory a model needs on a machine, before any weight is read.

    model        a folder or file that quantal reads (only its headers are), an nn.Module (also one
                 on the meta device), a transformers config or its dictionary
    backend      what it will run on
    memory_gb    memory of one rank in 10^9 bytes; None: nothing is judged
    world_size   ranks of FSDP2
    mode         "inference" or "qlora"
    config       None: a quantized model is taken as it is; for others the most exact config that
                 fits is chosen, among the methods of the backend
    support, fallback   as in ``create_quantization_adapter``
    batch_size, sequence_length   sequences of a rank in one step; inference: prompt and answer
    attention    "sdpa" or "eager", whose scores lie in memory
    lora_targets  as PEFT's target_modules; None: every linear layer but the head
    optimizer    "adamw" or "sgd"
    loss_chunk   tokens whose logits exist at a time; 0: all
    norms_in_float32  as in ``prepare_model_for_training``
    cpu_offload  FSDP2's CPUOffloadPolicy

    Weights, adapters and optimizer states are exact, activations and gathered units are bounds
    (docs/plan.md). Raises ConfigError for options that mean nothing, UnsupportedError for a model
    without linear layers, and what ``load_quantized_model`` raises for a path.
    """
    where = "plan"
    options = _core.PlanOptions()
    options.backend = Backend(backend).value
    options.memory_bytes = _bytes(memory_gb)
    options.mode = _check.text(where, "mode", mode)
    options.attention = _check.text(where, "attention", attention)
    options.optimizer = _check.text(where, "optimizer", optimizer)
    if config is not None:
        _check.instance(where, "config", config, QuantizationConfig, "a QuantizationConfig or None")
        options.config_json = config.to_json()
    for name, value in (("support", support), ("fallback", fallback)):
        if value is not None:
            setattr(options, name, _check.text(where, name, value))
    given = locals()
    for name in ("world_size", "batch_size", "sequence_length", "lora_rank", "loss_chunk"):
        setattr(options, name, _check.integer(where, name, given[name]))
    for name in ("gradient_checkpointing", "norms_in_float32", "cpu_offload"):
        setattr(options, name, _check.flag(where, name, given[name]))
    options.lora_dropout = _check.real(where, "lora_dropout", lora_dropout)
    options.lora_dtype = dtype_name(parse_dtype(lora_dtype))
    options.lora_targets = _texts("lora_targets", lora_targets)
    if isinstance(model, str | os.PathLike):
        _check.source(where, "model", model)
        return _answer(*_core.plan_path(os.fspath(model), options))
    module = _module_of(model)
    in_memory = any(not p.is_meta for p in module.parameters())
    return _answer(
        *_core.plan_outline(
            _source(module), _config_text(module), _Outline(module).run(), in_memory, options
        )
    )
