"""Packed bytes under another dtype: views, for rules that know floats only."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from .. import _check
from .._dtypes import parse_dtype
from .._errors import DtypeError, UnsupportedError
from .._packed import STORAGE_DTYPES, PackedWeight, view_bytes

_Model = TypeVar("_Model", bound=nn.Module)


@_check.arguments(model=_check.module, dtype=_check.dtype)
def convert_storage_(model: _Model, dtype: torch.dtype | str) -> _Model:
    """Views the packed bytes of every layer of `model`, in place, as parameters of `dtype`: uint8
    (what they are), float16, bfloat16 or float32. No value is converted and nothing is copied but
    rows whose length is no multiple of the element. Returns `model`.

    For ``FullyShardedDataParallel``, which wants one float dtype per unit, and for torch 2.11,
    whose ``fully_shard`` takes no uint8. `dtype` must be the dtype that the computation is cast
    to (``param_dtype``): any cast destroys the bytes, and a layer that finds another dtype raises
    DtypeError. Call it before the model is sharded. Tied layers stay tied.
    """
    dtype = parse_dtype(dtype)
    if dtype not in STORAGE_DTYPES:
        legal = ", ".join(str(d).removeprefix("torch.") for d in STORAGE_DTYPES)
        raise DtypeError(f"convert_storage_: dtype is {dtype}, expected one of {legal}")
    known: dict[int, nn.Parameter] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedWeight):
            continue
        if type(layer.codes).__name__ == "DTensor":
            raise UnsupportedError(
                f"convert_storage_: {name} is sharded already, expected a model before fully_shard"
            )
        old = layer.codes, layer.stats
        new = [known[id(p)] for p in old if id(p) in known]
        if len(new) < len(old):
            whole = layer._buffers_packed[:2]
            new = [nn.Parameter(view_bytes(b, dtype), requires_grad=False) for b in whole]
        layer._storage = dtype
        layer._set_buffers(new[0], new[1], layer.shared)
        known.update({id(p): n for p, n in zip(old, new, strict=True)})
        known.update({id(n): n for n in new})
    return model
