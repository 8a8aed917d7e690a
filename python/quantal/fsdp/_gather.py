"""What comes back from an all-gather: whole layers on demand, and a check of their bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import _check, _core
from .._dtypes import tensor_bytes
from .._errors import ConfigError, CorruptError
from .._packed import PackedWeight, whole_tensor
from ._checksum import crc32

_KEY = "_quantal_verify"


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[nn.Module]:
    """Inside, every packed layer of `module` is whole on every rank: ``weight``,
    ``dequantize_weights`` and ``to_upstream`` work. All ranks must enter it. Memory: the packed
    bytes of `module`. Bytes that are written inside are lost."""
    layers = [m for m in module.modules() if isinstance(m, PackedWeight)]
    kept = [(layer, dict(layer._parameters)) for layer in layers]
    try:
        for layer, parameters in kept:
            for name, p in parameters.items():
                if p is not None and hasattr(p, "full_tensor"):
                    layer._parameters[name] = nn.Parameter(whole_tensor(p), requires_grad=False)
        yield module
    finally:
        for layer, parameters in kept:
            layer._parameters.update(parameters)


# ---------------------------------------------------------------------- checksums


def _parts(layer: PackedWeight) -> dict[str, list[tuple[int, int]]]:
    """(length, CRC-32) of the bytes that each rank holds of codes and stats, in order of rows."""
    out = {}
    for name in ("codes", "stats"):
        p: Any = getattr(layer, name)
        if not hasattr(p, "to_local"):
            _require_whole(layer, name, p)
            out[name] = [(tensor_bytes(p), crc32(p))]
            continue
        local = p.to_local()
        group = p.device_mesh.get_group(p.device_mesh.ndim - 1)
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, (tensor_bytes(local), crc32(local)), group=group)
        out[name] = parts
    return out


def _require_whole(layer: PackedWeight, name: str, tensor: torch.Tensor) -> None:
    rows, columns = _core.layout(layer._spec)[name]
    if tensor_bytes(tensor) < rows * columns:
        raise ConfigError(
            f"verify_gathers: {name} of a layer are {tensor_bytes(tensor)} of {rows * columns} "
            "bytes, expected the whole (call it before FullyShardedDataParallel wraps the model)"
        )


class _Check:
    """A forward hook of one layer: compares the gathered bytes once, then removes itself."""

    def __init__(self, name: str, layer: PackedWeight, group: Any) -> None:
        self.name, self.group = name, group
        self.expected = _parts(layer)
        self.handle = layer.register_forward_pre_hook(self)

    def __call__(self, layer: Any, args: Any) -> None:
        self.handle.remove()
        layer.__dict__.pop(_KEY, None)
        wrong = next((text for name in self.expected if (text := self._wrong(layer, name))), "")
        if self.group is not None:  # all ranks stop, or none
            said: list[Any] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(said, wrong, group=self.group)
            wrong = next((f"{text} (seen by rank {r})" for r, text in enumerate(said) if text), "")
        if wrong:
            raise CorruptError(f"verify_gathers: {wrong}", tensor=self.name)

    def _wrong(self, layer: Any, name: str) -> str:
        whole: torch.Tensor = getattr(layer, name)
        at = 0
        for rank, (size, crc) in enumerate(self.expected[name]):
            got = crc32(whole, at, at + size)
            if got != crc:
                return (
                    f"{name} of {self.name}: bytes of rank {rank} have CRC-32 {got:#010x} after "
                    f"the all-gather, expected {crc:#010x}"
                )
            at += size
        size = tensor_bytes(whole)
        return "" if at == size else f"{name} of {self.name}: {size} bytes, expected {at}"


@_check.arguments(model=_check.module, on=_check.flag)
def verify_gathers(model: nn.Module, on: bool = True) -> int:
    """A debugging switch: the bytes of every packed layer are checked in its next forward, after
    the all-gather, against checksums that each rank makes of its share now.

    A difference raises CorruptError on all ranks, naming layer and rank. Call it on all ranks,
    before or after ``shard_model`` or ``fully_shard``, but before ``FullyShardedDataParallel``
    (ConfigError afterwards). Costs one pass over the bytes and a small exchange
    per layer, once. Returns the number of layers that wait for a check; ``on=False`` takes pending
    checks back."""
    count = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedWeight):
            continue
        pending = layer.__dict__.pop(_KEY, None)
        if pending is not None:
            pending.handle.remove()
        if on:
            group = dist.group.WORLD if dist.is_initialized() else None
            layer.__dict__[_KEY] = _Check(name, layer, group)
            count += 1
    return count
