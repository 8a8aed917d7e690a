"""PEFT: LoRA over quantized layers, without a change on the user's side.

PEFT has no registry for foreign layer types. Its dispatcher for plain layers is wrapped, so that a
quantized layer gets a LoRA layer whose merge writes packed codes, and so is the wrapper behind
``modules_to_save``, which gets a dense copy to train. Everything else of PEFT is used as it is.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ._errors import UnsupportedError
from ._on_import import when_imported
from ._packed import PackedWeight

#: Versions of PEFT that the tests of this package have run with.
TESTED = ("0.21.0", "0.21.1", "0.21.2")
_installed = False


def install() -> bool:
    """Wraps PEFT's dispatcher, once; False where PEFT is not installed.

    Raises UnsupportedError where PEFT's internals are not the known ones; PEFT is then left as it
    is. Its own layers compute right over quantized ones, and their merge is refused."""
    global _installed
    if _installed or importlib.util.find_spec("peft") is None:
        return _installed
    changed = list(changed_internals())
    if changed:
        version = importlib.metadata.version("peft")
        raise UnsupportedError(
            f"PEFT {version}: {'; '.join(changed)}. LoRA layers cannot be made for quantized "
            f"layers, expected the internals of a tested version ({', '.join(TESTED)}): install "
            f"one of them (pip install peft=={TESTED[-1]})"
        )
    from peft.tuners.lora import model as lora_model

    _wrap_dispatcher(lora_model)
    _wrap_modules_to_save()
    _installed = True
    return True


#: What the hook and its layers rely on: module, name, parameters in this order.
_INTERNALS = (
    (
        "peft.tuners.lora.model",
        "dispatch_default",
        ("target", "adapter_name", "config", "parameter_name"),
    ),
    ("peft.tuners.lora.layer", "Linear.update_layer", ("self", "adapter_name", "r", "lora_alpha")),
    ("peft.tuners.lora.layer", "Linear.forward", ("self", "x")),
    ("peft.tuners.lora.layer", "Linear.merge", ("self", "safe_merge", "adapter_names")),
    ("peft.tuners.lora.layer", "Linear.unmerge", ("self",)),
    ("peft.tuners.lora.layer", "Embedding.merge", ("self", "safe_merge", "adapter_names")),
    ("peft.tuners.lora.layer", "Embedding.unmerge", ("self",)),
    ("peft.tuners.lora.layer", "Linear.lora_variants", None),
    (
        "peft.tuners.lora.variants",
        "DoraLinearVariant.forward",
        ("module", "active_adapter", "x", "result"),
    ),
    ("peft.tuners.tuners_utils", "check_adapters_to_merge", ("module", "adapter_names")),
    ("peft.utils.other", "ModulesToSaveWrapper.update", ("self", "adapter_name", "tied_module")),
)


def changed_internals() -> Iterator[str]:
    """What of PEFT's internals is not as this package knows it, in words."""
    for module_name, name, expected in _INTERNALS:
        try:
            found: Any = importlib.import_module(module_name)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            yield f"{module_name}.{name} is missing"
            continue
        if expected is None:
            continue
        parameters = tuple(inspect.signature(found).parameters)
        if parameters[: len(expected)] != expected:
            yield (
                f"{module_name}.{name} takes ({', '.join(parameters)}), expected "
                f"({', '.join(expected)}, ...)"
            )


def _wrap_dispatcher(lora_model: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from ._peft_custom import CustomLoraLinear
    from ._peft_layers import QuantizedLoraEmbedding, QuantizedLoraLinear
    from .linear import QuantizedLinear

    original = lora_model.dispatch_default

    @functools.wraps(original)
    def dispatch_default(
        target: nn.Module,
        adapter_name: str,
        config: Any,
        parameter_name: str | None = None,
        **kwargs: Any,
    ):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if parameter_name is None and isinstance(base, PackedWeight):
            embedding = isinstance(base, nn.Embedding)
            layer_class = QuantizedLoraEmbedding if embedding else QuantizedLoraLinear
            return layer_class(target, adapter_name, config=config, **kwargs)
        if parameter_name is None and isinstance(base, QuantizedLinear):
            return CustomLoraLinear(target, adapter_name, config=config, **kwargs)
        return original(target, adapter_name, config, parameter_name=parameter_name, **kwargs)

    lora_model.dispatch_default = dispatch_default
    _wrap_replacement(lora_model.LoraModel)


def _wrap_replacement(lora_model: Any) -> None:
    """PEFT puts adapters on the device of ``weight``, which a layer of one's own may not have."""
    from .linear import QuantizedLinear

    original = lora_model._replace_module

    @functools.wraps(original)
    def replace_module(self: Any, parent: Any, name: str, new_module: Any, child: Any) -> None:
        base = getattr(child, "base_layer", child)
        if not isinstance(base, QuantizedLinear) or hasattr(base, "weight"):
            return original(self, parent, name, new_module, child)
        held = next(iter(base.state_dict().values()), None)
        base.__dict__["weight"] = torch.empty(0, device=None if held is None else held.device)
        try:
            return original(self, parent, name, new_module, child)
        finally:
            del base.__dict__["weight"]

    lora_model._replace_module = replace_module


def _wrap_modules_to_save() -> None:
    from peft.utils.other import ModulesToSaveWrapper

    from .merge import dense_copy

    original = ModulesToSaveWrapper.update

    @functools.wraps(original)
    def update(self: Any, adapter_name: str, tied_module: Any = None, **kwargs: Any) -> None:
        packed = any(isinstance(m, PackedWeight) for m in self.original_module.modules())
        if packed and not tied_module and adapter_name not in self.modules_to_save:
            self.modules_to_save[adapter_name] = dense_copy(self.original_module)
        original(self, adapter_name, tied_module=tied_module, **kwargs)

    ModulesToSaveWrapper.update = update  # type: ignore[method-assign]


def _install_or_warn() -> None:
    """On import of PEFT or of this package, which must not fail for who trains nothing; preparing a
    model for training raises."""
    try:
        install()
    except UnsupportedError as error:
        warnings.warn(str(error), stacklevel=2)


def install_lazily() -> None:
    """Installs now if PEFT is loaded, else as soon as it is."""
    when_imported("peft.tuners.lora.model", _install_or_warn)
