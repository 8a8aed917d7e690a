"""Gathers of a unit while the one before it computes.

FSDP2 overlaps them by streams of a device. CPUs have none: there it would wait for every gather
where it begins, and begin none ahead in forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _Ahead:
    """What is gathered and not yet used, over the units of one model in the order of their runs."""

    def __init__(self, units: list[Any]) -> None:
        self.following = dict(zip(units, units[1:], strict=False))
        self.pending: dict[Any, Any] = {}
        for unit in units:
            unit.register_forward_pre_hook(self._begin)

    def _begin(self, unit: nn.Module, args: Any) -> None:
        """Before a unit computes, when FSDP2 has gathered it."""
        self.pending.pop(unit, None)
        following = self.following.get(unit)
        # In backward a checkpointed unit computes again, and the next one to be used is another.
        if following is not None and torch._C._current_graph_task_id() == -1:
            self.pending[following] = following.unshard(async_op=True)

    def _end(self, root: nn.Module, args: Any, result: Any) -> None:
        """After the whole model, or an error in it: a unit that was left out is a share again."""
        while self.pending:
            unit, handle = self.pending.popitem()
            handle.wait()
            unit.reshard()


# Between graphs, as FSDP2's own hooks; what torch.compiler.disable does, without its import.
_HOOKS: Any = (_Ahead._begin, _Ahead._end)
for _hook in _HOOKS:
    _hook._torchdynamo_disable = True


def gather_ahead(root: Any, units: list[Any]) -> None:
    """For units on CPUs, which run in this order or are left out."""
    root._set_unshard_async_op(True)  # of all units inside
    root.register_forward_hook(_Ahead(units)._end, always_call=True)
