"""Ranks that fail together: an error on one of them is raised on all, and nobody waits forever."""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed as dist

from .._errors import InternalError, QuantalError

#: Attribute of exceptions that every rank raises.
_AGREED = "_quantal_agreed"


def _portable(error: BaseException) -> bytes:
    """The error itself where it travels, else its text."""
    try:
        return pickle.dumps(error)
    except Exception:
        return pickle.dumps(InternalError(f"{type(error).__name__}: {error}"))


class Agreement:
    """Keeps ranks in step. Every call is collective.

    group     that exchanges bytes
    everyone  that fails together; default: the same
    """

    def __init__(self, group: Any, device: str, everyone: Any = None) -> None:
        self.group, self.device = group, device
        self.everyone = group if everyone is None else everyone

    def check(self, error: BaseException | None = None) -> None:
        """Raises on every rank if any of them passes an error: that one on its own rank, on the
        others one of the same kind that names the rank. An error that was agreed on inside of an
        exchange is only passed on."""
        if getattr(error, _AGREED, False):
            raise error  # type: ignore[misc]
        failed = torch.tensor([0 if error is None else 1], device=self.device)
        dist.all_reduce(failed, group=self.everyone)
        if int(failed.item()) == 0:
            return
        said: list[Any] = [None] * dist.get_world_size(self.everyone)
        mine = None if error is None else _portable(error)
        dist.all_gather_object(said, mine, group=self.everyone)
        if error is not None:
            setattr(error, _AGREED, True)
            raise error
        rank, data = next((r, d) for r, d in enumerate(said) if d is not None)
        other = pickle.loads(data)
        if isinstance(other, QuantalError):
            other.args = (f"{other} (on rank {rank})", *other.args[1:])
        setattr(other, _AGREED, True)
        raise other

    def sum_bytes(self, data: torch.Tensor) -> torch.Tensor:
        """All-reduces a uint8 tensor, in place, in which ranks filled parts of their own."""
        self.check()
        moved = data.to(self.device)
        dist.all_reduce(moved, group=self.group)
        if moved is not data:
            data.copy_(moved)
        return data
