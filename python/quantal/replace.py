"""Replacing the linear layers of a model, one at a time, each dense weight freed at once."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from . import _check, _core
from ._dtypes import tensor_bytes
from .linear import PackedLinear, QuantizedLinear
from .report import Report

if TYPE_CHECKING:
    from .adapters import QuantizationAdapter

logger = logging.getLogger("quantal")
#: Freed dense weights after which memory is given back. Packed weights take the place of freed ones
#: meanwhile, so memory does not grow by this.
TRIM_BYTES = 128 << 20
_LINEARS = (nn.Linear, PackedLinear)


class _Place(NamedTuple):
    """A plain nn.Linear: its first name, and the attributes that hold it (module, name there); none
    for a model that is one itself."""

    name: str
    holders: list[tuple[nn.Module, str]]


def _occurrences(
    module: nn.Module,
    name: str = "",
    holder: tuple[nn.Module, str] | None = None,
    found: list[tuple[str, nn.Module, tuple[nn.Module, str] | None]] | None = None,
) -> list[tuple[str, nn.Module, tuple[nn.Module, str] | None]]:
    """(name, module, what holds it) of all modules, in the order of ``named_modules``; one that is
    used twice stands twice. A list costs less than generators within generators."""
    found = [] if found is None else found
    found.append((name, module, holder))
    prefix = f"{name}." if name else ""
    for child, inner in module._modules.items():
        if inner is not None:
            _occurrences(inner, prefix + child, (module, child), found)
    return found


class _Outline:
    """The plain linear layers of a model, and who else holds their parameters."""

    def __init__(self, model: nn.Module) -> None:
        places: dict[int, _Place] = {}
        #: Parameters (by id) that a module other than nn.Linear holds, and its name: quantizing a
        #: linear layer that shares one would add a copy instead of saving one.
        self.users: dict[int, str] = {}
        for name, module, holder in _occurrences(model):
            if type(module) is nn.Linear:
                place = places.setdefault(id(module), _Place(name, []))
                if holder is not None:
                    place.holders.append(holder)
            elif not isinstance(module, nn.Linear):
                for parameter in module._parameters.values():
                    if parameter is not None:
                        self.users.setdefault(id(parameter), name)
        self.places = list(places.values())


class _Walk:
    """One pass over the linear layers of a model."""

    def __init__(self, model: nn.Module, adapter: QuantizationAdapter, rules: _core.LayerRules):
        self.model, self.adapter, self.rules = model, adapter, rules
        self.report: Report = adapter.report
        outline = _Outline(model)
        self.places, self.users = outline.places, outline.users
        self.debug = logger.isEnabledFor(logging.DEBUG)
        self.visited = False
        self.covered: set[int] = set()  # ids of parameters that a row counts already
        self.tied: dict[int, tuple[weakref.ref, nn.Module]] = {}

    def visit(self, place: _Place) -> int:
        """Quantizes the layer at this place, or records why it stays dense.

        Returns the bytes of dense weights that this frees."""
        self.visited = True
        name, holders = place
        linear = cast(nn.Linear, getattr(*holders[0]) if holders else self.model)
        weight = linear.weight
        choice = self.rules.choose(name, *weight.shape)
        reason = self._dense_reason(weight, choice)
        if reason:
            self._keep(name, linear, reason)
            return 0
        layer = self._quantize(linear, weight, choice)
        packed = isinstance(layer, PackedLinear)
        method = choice.method if packed else f"{type(layer).__name__} {choice.options.bits}-bit"
        if self.debug:
            logger.debug("%s %s: %s", name or "the model", list(weight.shape), method)
        self.report._add(
            name,
            method if packed else type(layer).__name__,
            "",
            parameters=sum(p.numel() for p in linear._parameters.values() if p is not None),
            bytes_before=_module_bytes(linear),
            bytes_after=_module_bytes(layer),
            relative_error=_relative_error(layer, weight),
        )
        if not holders:
            self.model = layer
        for module, attribute in holders:
            module.add_module(attribute, layer)
        return tensor_bytes(weight)

    def _dense_reason(self, weight: torch.Tensor, choice: _core.Choice) -> str:
        holder = self.users.get(id(weight))
        shared = "" if holder is None else f"shares its weight with {holder or 'the model'}"
        if choice.quantize:
            return shared
        return f"{choice.reason}; {shared}" if shared else choice.reason

    def _keep(self, name: str, linear: nn.Linear, reason: str) -> None:
        own = [
            p for p in linear.parameters() if id(p) not in self.users and id(p) not in self.covered
        ]
        self._add_dense(name, own, reason)

    def _add_dense(self, name: str, own: list[nn.Parameter], reason: str) -> None:
        logger.debug("%s: dense, %s", name or "the model", reason)
        self.covered.update(map(id, own))
        count, size = sum(p.numel() for p in own), sum(map(tensor_bytes, own))
        self.report.add(
            name, "dense", reason, parameters=count, bytes_before=size, bytes_after=size
        )

    def _quantize(self, linear: nn.Linear, weight: torch.Tensor, choice: _core.Choice) -> nn.Module:
        known = self.tied.get(id(weight))
        if known is not None and known[0]() is weight:
            return self.adapter.tie_quantized_linear(known[1], linear)
        layer = self.adapter.quantize_linear(linear, choice)
        self.tied[id(weight)] = weakref.ref(weight), layer
        return layer

    def report_others(self) -> None:
        """Rows for everything that is not a linear layer, tied parameters once."""
        seen: set[int] = set()
        for name, module, _ in _occurrences(self.model):
            if type(module) in _LINEARS or isinstance(module, QuantizedLinear):
                continue
            if id(module) not in seen:
                seen.add(id(module))
                self._report_other(name, module)

    def _report_other(self, name: str, module: nn.Module) -> None:
        held = {id(p): (field, p) for field, p in module._parameters.items() if p is not None}
        kind = type(module).__name__
        for key, (field, p) in held.items():
            if p.dim() == 3 and key not in self.covered and _may_hold_experts(module):
                reason = f"{list(p.shape)} of {kind}, not a linear layer of its own"
                self._add_dense(f"{name}.{field}" if name else field, [p], reason)
        own = [p for key, (_, p) in held.items() if key not in self.covered]
        if own:
            self._add_dense(name, own, f"{kind}, not a linear layer")

    def report_unmatched(self) -> None:
        """Names the patterns that matched nothing: most of them are typing errors."""
        self.report.unmatched_patterns = self.rules.unmatched()
        if self.visited and self.report.unmatched_patterns:
            listed = "; ".join(self.report.unmatched_patterns)
            _check.warn(f"patterns that match no linear layer: {listed}")


def _may_hold_experts(module: nn.Module) -> bool:
    """Whether a parameter [., ., .] of this module is the [experts, rows, columns] of a mixture of
    experts that holds them in one tensor."""
    return not isinstance(module, nn.Conv1d | nn.ConvTranspose1d)


def _is_adapter(where: str, name: str, value: Any) -> None:
    from .adapters import QuantizationAdapter  # which imports this module

    _check.instance(where, name, value, QuantizationAdapter, "a QuantizationAdapter")


def _return_free_memory() -> int:
    """Gives freed memory back to the system (glibc keeps what lies between live blocks; other C
    libraries are left alone); returns 0, the bytes freed since."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass
    return 0


def _relative_error(layer: nn.Module, weight: torch.Tensor) -> float:
    if not isinstance(layer, PackedLinear) or weight.is_meta:
        return 0.0
    return layer._sampled_error(weight)


def _module_bytes(module: nn.Module) -> int:
    if module._modules:
        return sum(map(tensor_bytes, [*module.parameters(), *module.buffers()]))
    size = 0
    for held in (module._parameters, module._buffers):  # torch's walk takes longer
        for tensor in held.values():
            if tensor is not None:
                size += tensor.nbytes
    return size


@_check.arguments(
    model=_check.module,
    adapter=_is_adapter,
    skip_modules=_check.optional(_check.names),
    progress=_check.flag,
)
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
    adapter.report.entries.clear()
    walk = _Walk(model, adapter, adapter.layer_rules(skip_modules))
    freed = 0
    for place in _progress(walk.places, progress):
        freed += walk.visit(place)
        if freed >= TRIM_BYTES:
            freed = _return_free_memory()
    _return_free_memory()
    walk.report_others()
    walk.report_unmatched()
    return walk.model


def _progress(items: list, show: bool) -> Iterable:
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc="quantizing", unit="layer")
