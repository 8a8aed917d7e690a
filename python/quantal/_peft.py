"""PEFT: LoRA over quantized layers, without a change on the user's side.

PEFT has no registry for foreign layer types. Its dispatcher for plain layers is wrapped, so that a
QuantizedLinear gets a LoRA layer whose merge writes packed codes. Everything else of PEFT's layer
(forward, DoRA and the other variants, saving) is used as it is.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

import torch
from torch import nn

from .linear import QuantizedLinear

_installed = False


def _make_layer_class() -> type:
    from peft.tuners.lora import layer as lora_layer

    class QuantizedLoraLinear(lora_layer.Linear):  # type: ignore[misc,name-defined]
        """LoRA over packed codes. ``merge`` decodes, adds and quantizes again, which rounds;
        ``unmerge`` puts the saved bytes back, which is exact."""

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            base: Any = self.get_base_layer()
            saved = _saved_state(base)
            merged = len(self.merged_adapters)
            base.__dict__["_dense"] = nn.Parameter(base.dequantize_weights(), requires_grad=False)
            try:
                super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
                dense = base.__dict__["_dense"].detach()
            finally:
                del base.__dict__["_dense"]
            if len(self.merged_adapters) > merged:
                base.quantize_weights(dense)
                if merged == 0:
                    self._before_merge = saved

        def unmerge(self) -> None:
            saved = self.__dict__.pop("_before_merge", None)
            if saved is None or not self.merged:
                super().unmerge()
                return
            base: Any = self.get_base_layer()
            self.merged_adapters.clear()
            base._set_buffers(*saved[:3])
            if saved[3] is not None:
                base.bias.data = saved[3]

    return QuantizedLoraLinear


def _saved_state(base: QuantizedLinear) -> tuple[torch.Tensor | None, ...]:
    bias = None if base.bias is None else base.bias.detach().clone()
    return base.codes.detach(), base.stats.detach(), base.shared, bias


def install() -> bool:
    """Wraps PEFT's dispatcher, once; False where PEFT is not installed."""
    global _installed
    if _installed or importlib.util.find_spec("peft") is None:
        return _installed
    from peft.tuners.lora import model as lora_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer_class = _make_layer_class()
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
        if parameter_name is None and isinstance(base, QuantizedLinear):
            return layer_class(target, adapter_name, config=config, **kwargs)
        return original(target, adapter_name, config, parameter_name=parameter_name, **kwargs)

    lora_model.dispatch_default = dispatch_default
    _installed = True
    return True


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
