"""Preparing a quantized model for adapter training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import _check, _peft
from ._packed import PackedWeight

_HALF = (torch.float16, torch.bfloat16)
#: Name that transformers and PEFT give their hook for gradients through a frozen embedding.
_HOOK = "make_inputs_require_grad"


@_check.arguments(
    model=_check.module,
    use_gradient_checkpointing=_check.flag,
    use_reentrant=_check.flag,
    norms_in_float32=_check.flag,
)
def prepare_model_for_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    *,
    use_reentrant: bool = False,
    norms_in_float32: bool = False,
) -> Any:
    """Freezes the base and makes gradients reach adapters through it. Returns the same object.

    use_gradient_checkpointing  switch it on where the model offers it
    use_reentrant               which of torch's two kinds of checkpointing
    norms_in_float32            turn the norms' float16 and bfloat16 parameters into float32; what
                                they return keeps the dtype of what they get

    The embeddings are made to pass gradients, which checkpointing needs; ``is_loaded_in_4bit`` or
    ``is_loaded_in_8bit`` tells Trainer and PEFT that the base is quantized, and ``num_parameters``
    counts weights instead of packed bytes. Adapters attached afterwards are all that trains; those
    that are there already keep their state, so that a second call changes nothing.
    """
    _peft.install()
    adapters = adapter_parameters(model)
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)
    if norms_in_float32:
        _widen_norms(model)
    _pass_input_gradients(model)
    if use_gradient_checkpointing and getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    _tell_quantized(model)
    return model


def adapter_parameters(model: nn.Module) -> set[int]:
    """Parameters that PEFT added, by id; none where PEFT is not in use."""
    import sys

    if "peft" not in sys.modules:
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            for name in module.adapter_layer_names:
                part = getattr(module, name, None)
                if isinstance(part, nn.Module):
                    found.update(map(id, part.parameters()))
    return found


def _widen_norms(model: nn.Module) -> None:
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for parameter in module.parameters(recurse=False):
                if parameter.dtype in _HALF:
                    parameter.data = parameter.data.float()
                    if return_input_dtype not in module._forward_hooks.values():
                        module.register_forward_hook(return_input_dtype)


def return_input_dtype(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """A forward hook: a float32 norm inside a narrower model hands on the model's dtype."""
    return output.to(args[0].dtype) if args else output


def make_inputs_require_grads(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    """A forward hook: what leaves the frozen embedding asks for gradients, so that checkpointed
    blocks behind it are recorded."""
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _pass_input_gradients(model: Any) -> None:
    getter = getattr(model, "get_input_embeddings", None)
    embeddings = getter() if getter is not None else None
    if not isinstance(embeddings, nn.Module):
        return
    hooks = embeddings._forward_hooks.values()
    if any(_HOOK in getattr(hook, "__qualname__", "") for hook in hooks):
        return
    # A function of this module, where transformers registers a closure: models stay picklable.
    handle = embeddings.register_forward_hook(make_inputs_require_grads)
    if hasattr(model, "enable_input_require_grads"):
        model._require_grads_hook = handle  # what disable_input_require_grads removes


def _tell_quantized(model: Any) -> None:
    packed = [m for m in model.modules() if isinstance(m, PackedWeight)]
    if not packed:
        return
    eight = all(m.bits == 8 for m in packed)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = eight, not eight
    if hasattr(type(model), "num_parameters"):
        # That of transformers asks for bitsandbytes where is_loaded_in_4bit is set.
        model.num_parameters = ParameterCount(model)


class ParameterCount:
    """``model.num_parameters``: weights of a model, packed ones as many as they stand for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        seen: set[int] = set()
        total = 0
        for module in self.model.modules():
            skipped = exclude_embeddings and isinstance(module, nn.Embedding)
            own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
            seen.update(map(id, own))
            if isinstance(module, PackedWeight):
                counted = not only_trainable and any(p is module.codes for p in own)
                total += module._rows * module._cols if counted and not skipped else 0
                own = [p for p in own if p is not module.codes and p is not module.stats]
            if not skipped:
                total += sum(p.numel() for p in own if p.requires_grad or not only_trainable)
        return total
