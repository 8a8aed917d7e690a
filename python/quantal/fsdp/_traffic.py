"""How many bytes all-gathers move."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from .._dtypes import tensor_bytes

#: Functions of torch.distributed that FSDP gathers with, by version and backend.
_FUNCTIONS = ("all_gather_single", "all_gather_into_tensor", "all_gather")


@dataclasses.dataclass
class GatherTraffic:
    """What all-gathers produced on this rank.

    calls    number of all-gathers
    bytes    of their results: all ranks' parts, this rank's own among them
    dtypes   bytes by dtype of the buffer; FSDP2 sends a unit of mixed dtypes as uint8
    """

    calls: int = 0
    bytes: int = 0
    dtypes: Counter = dataclasses.field(default_factory=Counter)

    def _add(self, result: Any) -> None:
        tensors = result if isinstance(result, list) else [result]
        self.calls += 1
        for t in tensors:
            self.bytes += tensor_bytes(t)
            self.dtypes[t.dtype] += tensor_bytes(t)


@contextlib.contextmanager
def count_gathers() -> Iterator[GatherTraffic]:
    """Counts the all-gathers of tensors of this process inside the block:

    with count_gathers() as traffic:
        model(batch).loss.backward()
    print(traffic.bytes)
    """
    traffic = GatherTraffic()
    originals = {name: getattr(dist, name) for name in _FUNCTIONS if hasattr(dist, name)}
    inside = False

    def counting(original: Any) -> Any:
        def call(output: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # one function calls another
                return original(output, *args, **kwargs)
            inside = True
            try:
                traffic._add(output)
                return original(output, *args, **kwargs)
            finally:
                inside = False

        return call

    for name, original in originals.items():
        setattr(dist, name, counting(original))
    try:
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def unit_bytes(unit: torch.nn.Module, param_dtype: torch.dtype | None = None) -> int:
    """Bytes of one all-gather of an FSDP2 unit: every parameter that the unit itself holds, padded
    to equal shares, floats in `param_dtype` (None: their own)."""
    from torch.distributed.fsdp import FSDPModule

    inner: set[int] = set()
    for child in unit.modules():
        if child is not unit and isinstance(child, FSDPModule):
            inner.update(map(id, child.parameters()))
    total = 0
    for p in unit.parameters():
        if id(p) in inner:
            continue
        sharded: Any = p
        ranks = sharded.device_mesh.size(sharded.device_mesh.ndim - 1)
        rows = -(-p.shape[0] // ranks) * ranks
        cast = param_dtype if param_dtype is not None and p.dtype.is_floating_point else p.dtype
        total += rows * (p.numel() // max(1, p.shape[0])) * cast.itemsize
    return total
