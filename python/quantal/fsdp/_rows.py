"""One packed layer of a sharded model from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import _core
from .._dtypes import tensor_from
from .._errors import ShapeError
from .._packed import PackedWeight, view_bytes
from ._agree import Agreement


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """(this rank's part, first row, end) of a tensor that is cut along its first dimension."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        rows = tensor.shape[0] if tensor.dim() else 1
        return tensor.detach(), 0, rows
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    dtensor: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(
        dtensor.shape, dtensor.device_mesh, placements
    )
    local = dtensor.to_local().detach()
    if tuple(local.shape) != tuple(shape) or any(offset[1:]):
        raise ShapeError(
            f"load_sharded: this rank holds {list(local.shape)} of {list(tensor.shape)}, expected "
            f"{list(shape)}, rows of the first dimension"
        )
    begin = min(offset[0], dtensor.shape[0])
    return local, begin, begin + shape[0]


def store_whole(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Puts this rank's part of `whole` (uint8, all rows) into a parameter of any storage dtype."""
    local, begin, end = local_rows(parameter)
    part = whole if parameter.dtype is torch.uint8 else view_bytes(whole, parameter.dtype)
    store(local, part[begin:end])


def store(local: torch.Tensor, part: torch.Tensor) -> None:
    """Copies bytes."""
    if local.numel():
        local.view(torch.uint8).copy_(
            part.reshape(local.shape[0], -1).view(torch.uint8)
            if local.dim() > 1
            else part.view(torch.uint8)
        )


class _HeldRows(NamedTuple):
    """The rows of packed bytes that this rank's part of a parameter touches."""

    local: torch.Tensor
    rows: tuple[int, int]
    skip: int  #: bytes of the first row that are another rank's

    def store(self, read: Any) -> None:
        """Copies the bytes of `rows`; a flat view may have zeros behind the last one."""
        if not self.local.numel():
            return
        target = self.local.reshape(-1).view(torch.uint8)
        own = tensor_from(read, "u8", [len(read)])[self.skip :][: target.numel()]
        target[: own.numel()].copy_(own)
        target[own.numel() :].zero_()


def _held_rows(parameter: torch.Tensor, shape: Sequence[int]) -> _HeldRows:
    """`shape`: [rows, bytes of a row], which a parameter of a wider dtype may be a flat view of."""
    local, begin, end = local_rows(parameter)
    if parameter.dim() == len(shape):
        return _HeldRows(local, (begin, end), 0)
    rows, width = shape
    first, end = begin * local.element_size(), end * local.element_size()
    row = min(rows, first // width)
    last = min(rows, -(-end // width)) if first < end else row
    return _HeldRows(local, (row, last), first - row * width)


class RowQuantizer:
    """Fills packed layers: reads this rank's rows, or quantizes them."""

    def __init__(self, reader: Any, agreement: Agreement) -> None:
        self.reader, self.agreement = reader, agreement

    def read_packed(self, name: str, layer: PackedWeight) -> None:
        """A layer that is packed in the file: reads this rank's rows and no others."""
        layout = _core.layout(layer._spec)
        codes = _held_rows(layer.codes, layout["codes"])
        stats = _held_rows(layer.stats, layout["stats"])
        read = self.reader.read_layer_rows(name, codes.rows, stats.rows)
        codes.store(read[0])
        stats.store(read[1])
        _store_shared(layer, tensor_from(read[2], "u8", list(layout["shared"])))

    def quantize(self, name: str, layer: PackedWeight) -> None:
        """A layer whose weight is dense in the file: reads and quantizes this rank's rows."""
        local, begin, end = local_rows(layer.codes)
        layout = _core.layout(layer._spec)
        codes, stats, shared = self.reader.quantize_rows(
            name, layer._spec, begin, end, self._exchange
        )
        store(local, tensor_from(codes, "u8", [end - begin, layout["codes"][1]]))
        _store_shared(layer, tensor_from(shared, "u8", list(layout["shared"])))
        if not layout["row_runs"]:
            store_whole(layer.stats, tensor_from(stats, "u8", list(layout["stats"])))
            return
        own = tensor_from(stats, "u8", [end - begin, layout["stats"][1]])
        local, first, last = local_rows(layer.stats)
        if layer.stats.dim() == 2 and (first, last) == (begin, end):
            store(local, own)
            return
        # Stored flat under a wider dtype, and cut elsewhere: small enough to be seen whole.
        whole = torch.zeros(*layout["stats"], dtype=torch.uint8)
        whole[begin:end] = own
        store_whole(layer.stats, self.agreement.sum_bytes(whole))

    def _exchange(self, memory: memoryview) -> None:
        if len(memory):
            self.agreement.sum_bytes(torch.frombuffer(memory, dtype=torch.uint8))


def _store_shared(layer: PackedWeight, shared: torch.Tensor) -> None:
    with torch.no_grad():
        layer.shared.copy_(shared)
