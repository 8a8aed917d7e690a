"""Adapters over a base that is read later. Imports PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .. import _core
from .._errors import UnsupportedError
from .._packed import PackedWeight, whole_tensor
from .._peft_layers import _PLAIN_INITS, packed_weight_norm
from ..linear import PackedLinear
from ._gather import gathered
from ._rows import local_rows


@torch.no_grad()
def set_magnitudes(model: nn.Module) -> None:
    """Sets every magnitude of DoRA over a linear layer to the row norms of ``W + scaling B A``, as
    PEFT does when it attaches them. Collective. Where statistics lie by row each rank decodes its
    own rows only."""
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        base = layer.get_base_layer()
        for name, dora in layer.lora_magnitude_vector.items():
            if name not in layer.lora_A:
                raise UnsupportedError(
                    f"load_sharded: DoRA over a {type(base).__name__}, expected a linear layer"
                )
            a = whole_tensor(layer.lora_A[name].weight)
            b = layer.lora_B[name].weight
            set_one = _set_packed if isinstance(base, PackedWeight) else _set_dense
            set_one(base, dora.weight, a, b, layer.scaling[name])


def refuse_inits(model: Any) -> None:
    """Raises where adapters were computed from weights that are not there."""
    for config in getattr(model, "peft_config", {}).values():
        init = getattr(config, "init_lora_weights", True)
        if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
            raise UnsupportedError(
                f"load_sharded: init_lora_weights is {init!r}, expected True or one of "
                f"{', '.join(_PLAIN_INITS)}: weights are not read yet when adapters are attached"
            )


def _set_dense(base: Any, magnitude: Any, a: Any, b: Any, scaling: float) -> None:
    """A dense layer: its rows are where those of B are."""
    target, begin, end = local_rows(magnitude)
    weight, first, last = local_rows(base.weight)
    if (begin, end) != (first, last):
        weight = whole_tensor(base.weight)[begin:end]
    change = whole_tensor(b)[begin:end].float() @ a.float()
    target.copy_((weight.float() + scaling * change).norm(dim=1))


def _set_packed(base: Any, magnitude: Any, a: Any, b: Any, scaling: float) -> None:
    target, begin, end = local_rows(magnitude)
    _, first, last = local_rows(base.codes)
    own, b_begin, b_end = local_rows(b)
    by_row = _core.layout(base._spec)["row_runs"] and base._storage is torch.uint8
    if by_row and (begin, end) == (first, last) == (b_begin, b_end):
        if begin == end:
            return
        spec = [*base._spec]
        spec[1] = end - begin
        parts = local_rows(base.codes)[0], local_rows(base.stats)[0], base.shared
        target.copy_(packed_weight_norm(PackedLinear.from_packed(spec, *parts), a, own, scaling))
        return
    b = whole_tensor(b)
    with gathered(base):
        target.copy_(packed_weight_norm(base, a, b, scaling)[begin:end])
