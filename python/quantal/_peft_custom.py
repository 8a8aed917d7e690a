"""PEFT's LoRA over quantized layers of one's own. Importing this imports PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as lora_layer
from peft.tuners.tuners_utils import check_adapters_to_merge

from ._errors import UnsupportedError


class CustomLoraLinear(lora_layer.Linear):
    """``base(x)`` plus PEFT's product with the adapters. ``merge`` adds them to the dequantized
    weight and quantizes again, which rounds; ``unmerge`` puts the saved state back, which is exact.
    DoRA needs the weight in each forward and is refused."""

    _state: dict[str, torch.Tensor] | None = None

    def __init__(self, base_layer: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        if config.use_dora:
            raise UnsupportedError(
                f"LoRA: use_dora is True on a {type(base_layer).__name__}, expected False for "
                "layers of an adapter of one's own (quantal's own layers have DoRA)"
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base; `safe_merge` refuses a sum that is not finite."""
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        base: Any = self.get_base_layer()
        state = self._state
        if state is None:
            state = {name: part.clone() for name, part in base.state_dict().items()}
        with torch.no_grad():
            weight = base.dequantize_weights()
            for name in names:
                weight = weight + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(f"NaNs detected in the merged weights. Adapters: {names}")
            base.quantize_weights(weight)
        self._state = state
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the base back as it was before the first merge."""
        if self._state is not None:
            self.get_base_layer().load_state_dict(self._state)
        self._state = None
        self.merged_adapters.clear()
