"""Loss scaling for float16: small gradients would be zero in it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .world import World


class LossScaler:
    """Multiplies losses by a power of two and divides gradients by it; a step with an infinite
    gradient on any rank is skipped and halves it, 2000 good steps double it."""

    GROWTH_STEPS = 2000

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = 2.0**16 if enabled else 1.0
        self.good = 0

    def unscale(self, parameters: list[Any], world: World) -> bool:
        """Divides the gradients; False where one is infinite or no number, and the step is to be
        skipped."""
        if not self.enabled:
            return True
        finite = torch.ones(1)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            parameter.grad.div_(self.scale)
            gradient = parameter.grad
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            if not torch.isfinite(local).all():
                finite.zero_()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        self._adjust(bool(finite.item()))
        return bool(finite.item())

    def _adjust(self, finite: bool) -> None:
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale = max(1.0, self.scale / 2)
        elif self.good >= self.GROWTH_STEPS:
            self.scale, self.good = self.scale * 2, 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.good = float(state["scale"]), int(state["good"])
