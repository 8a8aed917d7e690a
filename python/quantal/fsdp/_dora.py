"""DoRA over a sharded base: magnitudes that start as the norms of rows. Imports PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .. import _core
from .._packed import PackedWeight, whole_tensor
from .._peft_layers import packed_weight_norm
from ..linear import PackedLinear
from ._gather import gathered
from ._rows import local_rows


@torch.no_grad()
def set_magnitudes(model: nn.Module) -> None:
    """Sets every magnitude of DoRA over a packed layer to the row norms of ``W + scaling B A``, as
    PEFT does when it attaches them. Collective. Where statistics lie by row each rank decodes its
    own rows only."""
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        base = layer.get_base_layer()
        if not isinstance(base, PackedWeight):
            continue
        for name, dora in layer.lora_magnitude_vector.items():
            a = whole_tensor(layer.lora_A[name].weight)
            b = layer.lora_B[name].weight
            _set_magnitude(base, dora.weight, a, b, layer.scaling[name])


def _set_magnitude(base: Any, magnitude: Any, a: Any, b: Any, scaling: float) -> None:
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
