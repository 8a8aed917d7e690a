"""Preparing a quantized model for adapter training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import _peft
from .linear import QuantizedLinear


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def prepare_model_for_training(model: Any, use_gradient_checkpointing: bool = True) -> Any:
    """Freezes the base and makes gradients reach adapters through it. Returns the same object.

    Every parameter is frozen; norms narrower than float32 become float32; where the model offers
    gradient checkpointing it is switched on (non-reentrant) and the embeddings are made to pass
    gradients; ``is_loaded_in_4bit`` or ``is_loaded_in_8bit`` tells Trainer and PEFT that the base
    is quantized. The adapters attached afterwards are all that trains.
    """
    _peft.install()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if _is_norm(module):
            for parameter in module.parameters(recurse=False):
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    if use_gradient_checkpointing and getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    widths = {m.bits for m in model.modules() if isinstance(m, QuantizedLinear)}
    if widths:
        model.is_loaded_in_4bit = 4 in widths
        model.is_loaded_in_8bit = widths == {8}
    return model
