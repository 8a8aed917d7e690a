"""PEFT: LoRA over quantized layers, without a change on the user's side.

PEFT has no registry for foreign layer types. Its dispatcher for plain layers is wrapped, so that a
quantized layer gets a LoRA layer whose merge writes packed codes, and so is the wrapper behind
``modules_to_save``, which gets a dense copy to train. Everything else of PEFT is used as it is.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

import torch
from torch import nn

from ._packed import PackedWeight

_installed = False


def install() -> bool:
    """Wraps PEFT's dispatcher, once; False where PEFT is not installed."""
    global _installed
    if _installed or importlib.util.find_spec("peft") is None:
        return _installed
    from peft.tuners.lora import model as lora_model

    _wrap_dispatcher(lora_model)
    _wrap_modules_to_save()
    _installed = True
    return True


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


class _OnImport:
    """Installs the hook when PEFT is imported after quantal, without importing it itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None):
        if name != "peft.tuners.lora.model" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            install()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install_lazily() -> None:
    """Installs now if PEFT is loaded, else as soon as it is."""
    if "peft.tuners.lora.model" in sys.modules:
        install()
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())
