"""A torch model as files see it: packed layers, dense tensors, and which of them are one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from . import _core
from ._packed import BUFFERS, PackedWeight


def weight_name(module: str) -> str:
    """Full name of the weight of a module."""
    return f"{module}.weight" if module else "weight"


def split_name(name: str) -> tuple[str, str]:
    """(module, field) of a tensor name."""
    module, _, field = name.rpartition(".")
    return module, field


def module_names(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name; one that is registered twice has two names."""
    return dict(model.named_modules(remove_duplicate=False))


def is_transformers(model: nn.Module) -> bool:
    """Whether the model's config is one of transformers'."""
    return hasattr(getattr(model, "config", None), "to_diff_dict")


def ties_by_config(model: nn.Module) -> bool:
    """Whether the model's own config says that its output layer is its embedding."""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def _dense_state(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """State tensors that are no part of a packed weight."""
    packed = {
        f"{name}.{part}" if name else part
        for name, module in modules.items()
        if isinstance(module, PackedWeight)
        for part in BUFFERS
    }
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in packed}


@dataclasses.dataclass
class SavedParts:
    """What of a model goes to a file, each byte once; `tied` names the others."""

    layers: dict[str, PackedWeight]
    tensors: dict[str, torch.Tensor]
    tied: dict[str, str]
    dense: list[str]  # linear modules that are not packed


def saved_parts(model: nn.Module) -> SavedParts:
    """Weights that share memory are saved once, where the loaded model shares them again: a
    transformers model that ties its embeddings, or any module that is not transformers'."""
    share = not is_transformers(model) or ties_by_config(model)
    modules = module_names(model)
    out = SavedParts({}, {}, {}, [n for n, m in modules.items() if type(m) is nn.Linear])
    seen: dict[Any, str] = {}
    for name, module in modules.items():
        if not isinstance(module, PackedWeight):
            continue
        first = seen.setdefault(id(module.codes), name)
        if first != name and share:
            out.tied[weight_name(name)] = weight_name(first)
        else:
            out.layers[name] = module
    for name, tensor in _dense_state(model, modules).items():
        key: Any = id(tensor)  # sharded tensors have no memory of their own
        if not hasattr(tensor, "full_tensor"):
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        first = seen.setdefault(key, name) if tensor.numel() else name
        if first != name and share:
            out.tied[name] = first
        else:
            out.tensors[name] = tensor
    return out


def packable_shape(module: nn.Module) -> list[int] | None:
    """[rows, columns] of a weight that a file may keep packed; None for other modules."""
    if isinstance(module, nn.Linear):
        return [module.out_features, module.in_features]
    if isinstance(module, nn.Embedding):
        return [module.num_embeddings, module.embedding_dim]
    return None


def weight_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shapes of all weights that may be packed, by module."""
    shapes = {name: packable_shape(module) for name, module in module_names(model).items()}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def model_parts(model: nn.Module, stored_ties: dict[str, str]) -> _core.ModelParts:
    """What a file has to fill. `stored_ties` are those that a file states."""
    modules = module_names(model)
    tensors = {name: list(t.shape) for name, t in _dense_state(model, modules).items()}
    owners: dict[str, int] = {n: id(t) for n, t in _dense_state(model, modules).items()}
    for name, module in modules.items():
        if isinstance(module, PackedWeight):
            tensors[weight_name(name)] = [module._rows, module._cols]
            owners[weight_name(name)] = id(module.codes)
    first: dict[int, str] = {}
    tied = {
        name: first[owner]
        for name, owner in owners.items()
        if first.setdefault(owner, name) != name
    }
    for alias, name in stored_ties.items():
        if alias in tensors and name in tensors and alias != name:
            tied[alias] = tied.get(name, name)
    parts = _core.ModelParts()
    parts.tensors = tensors
    parts.linears = {n for n, m in modules.items() if isinstance(m, nn.Linear)}
    parts.embeddings = {n for n, m in modules.items() if isinstance(m, nn.Embedding)}
    parts.tied = tied
    return parts
