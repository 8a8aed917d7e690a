"""Merging adapters into quantized layers, and what of them survives; dense models again."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from typing import Any

import torch
from torch import nn

from . import _check, _core
from ._errors import ConfigError
from ._packed import PackedWeight

_PREFIX = "base_model.model."
_SUFFIX = ".base_layer"


@dataclasses.dataclass(frozen=True)
class LayerMerge:
    """One layer. D is the change that the adapters asked for, E the one that quantizing the sum
    made, both as matrices of exact values."""

    name: str
    codes: int  #: codes of the layer
    codes_changed: int  #: those that are other ones now
    delta_norm: float  #: ``||D||`` (Frobenius)
    surviving: float  #: ``<E, D> / <D, D>``: 1 all of it, 0 lost to rounding
    noise: float  #: ``||E - surviving D|| / ||D||``: what rounding added beside it


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What merging into quantized layers changed. ``surviving`` and ``noise`` of the whole weigh
    layers by ``||D||^2``."""

    layers: list[LayerMerge]

    @property
    def _native(self) -> _core.MergeReport:
        return _core.MergeReport([dataclasses.astuple(layer) for layer in self.layers])

    @property
    def codes(self) -> int:
        """Codes of all layers."""
        return self._native.codes()

    @property
    def codes_changed(self) -> int:
        """Codes that are other ones now, in all layers."""
        return self._native.codes_changed()

    @property
    def surviving(self) -> float:
        """Mean of the layers; 1 without any."""
        return self._native.surviving()

    @property
    def noise(self) -> float:
        """Root of the mean square of the layers."""
        return self._native.noise()

    def to_dict(self) -> dict[str, Any]:
        """``to_json`` as a dictionary."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """Object {codes, codes_changed, surviving, noise, layers: [fields of LayerMerge]}."""
        return self._native.to_json()

    def to_text(self) -> str:
        """A table for a terminal, the layers that kept least first."""
        return self._native.to_text()

    def __str__(self) -> str:
        return self.to_text()


def merge_report(model: nn.Module) -> MergeReport:
    """What the merges that `model` carries changed: after PEFT's ``merge_adapter``, or on the model
    that ``merge_and_unload`` returned. Layers without a merge do not appear."""
    layers = []
    for name, module in model.named_modules():
        facts = module.__dict__.get("_merged") if isinstance(module, PackedWeight) else None
        if facts is not None:
            name = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
            layers.append(LayerMerge(name, module._rows * module._cols, *facts))
    return MergeReport(layers)


# ---------------------------------------------------------------------- dense again


class DenseLinear(nn.Linear):
    """The trainable copy of a quantized layer; like that one it takes any float dtype and returns
    the dtype of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def _dense_linear(layer: Any, weight: nn.Parameter, kind: type[nn.Linear]) -> nn.Linear:
    dense = kind(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = weight
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return dense


def _dense_embedding(layer: Any, weight: nn.Parameter) -> nn.Embedding:
    dense = nn.Embedding(
        layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta"
    )
    dense.weight = weight
    return dense


def _dense(
    layer: PackedWeight,
    dtype: torch.dtype | None,
    known: dict[int, nn.Parameter],
    kind: type[nn.Linear] = nn.Linear,
) -> nn.Module:
    """A frozen dense layer of the exact values; layers that share codes share the weight."""
    weight = known.get(id(layer.codes))
    if weight is None:
        weight = nn.Parameter(layer.dequantize_weights(dtype), requires_grad=False)
        known[id(layer.codes)] = weight
    if isinstance(layer, nn.Embedding):
        return _dense_embedding(layer, weight).train(layer.training)
    return _dense_linear(layer, weight, kind).train(layer.training)


def dense_copy(module: nn.Module) -> nn.Module:
    """A deep copy in which every quantized layer is dense."""
    known: dict[int, nn.Parameter] = {}
    memo: dict[int, Any] = {}
    for part in module.modules():
        if isinstance(part, PackedWeight):
            dtype: Any = part.compute_dtype if isinstance(part, nn.Embedding) else None
            memo[id(part)] = _dense(part, dtype, known, DenseLinear)
    return copy.deepcopy(module, memo)


@_check.arguments(model=_check.module, dtype=_check.optional(_check.dtype))
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces, in place, every quantized layer by a dense one of its exact values.

    dtype  of the dense weights; None: the dtype that each layer's format decodes to

    Returns `model`, or the new layer if `model` is itself a quantized layer. Tied layers stay tied.
    """
    known: dict[int, nn.Parameter] = {}
    made: dict[int, nn.Module] = {}
    held: list[nn.Module] = []  # keeps ids unique
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, PackedWeight):
            continue
        if id(module) not in made:
            made[id(module)] = _dense(module, dtype, known)
            held.append(module)
        if name == "":
            return made[id(module)]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    _forget_quantization(model)
    return model


def _forget_quantization(model: nn.Module) -> None:
    for module in model.modules():
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            if module.__dict__.get(flag):
                setattr(module, flag, False)
        module.__dict__.pop("num_parameters", None)


def merge_to_full_precision(
    model: Any,
    adapter_names: list[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    safe_merge: bool = False,
) -> nn.Module:
    """Merges the adapters of a PeftModel into dense weights, which loses nothing to quantization,
    and returns the base model without PEFT, every layer dense.

    adapter_names  default: the active ones
    dtype          of the dense weights; None: what each layer's format decodes to. Sums are made in
                   float32 and rounded once.
    safe_merge     refuse results that are not finite

    The quantized layers are replaced in place, one at a time: the model that was given is used up.
    PEFT's ``merge_and_unload`` is the other way, back into quantized layers (``merge_report``).
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"merge_to_full_precision: model is a {type(model).__name__}, expected a PeftModel"
        )
    for layer in model.modules():
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        if not isinstance(base, PackedWeight):
            continue
        tuner: Any = layer
        if tuner.merged:
            tuner.unmerge()
        final = dtype or base.value_dtype
        _set_base(tuner, _dense(base, torch.float32, {}))
        tuner.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        merged = tuner.get_base_layer().weight
        merged.data = merged.data.to(final)
    dequantize_model(model, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged_model = model.merge_and_unload(safe_merge=safe_merge, adapter_names=adapter_names)
    _forget_quantization(merged_model)
    return merged_model


def _set_base(layer: Any, dense: nn.Module) -> None:
    """Replaces the innermost base layer (tuner layers may be nested)."""
    while hasattr(layer.base_layer, "base_layer"):
        layer = layer.base_layer
    layer.base_layer = dense
