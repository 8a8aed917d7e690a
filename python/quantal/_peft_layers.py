"""PEFT's LoRA layers over packed weights. Importing this imports PEFT; ``_peft.install`` does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from . import _ops
from ._dtypes import widest_float
from ._errors import UnsupportedError
from ._low_rank import lora_product
from ._packed import PackedWeight

#: Ways of PEFT to start an adapter that leave the base as it is.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")


@contextlib.contextmanager
def _decoded(base: PackedWeight) -> Iterator[None]:
    """Inside, ``base.weight`` is a float32 parameter of the exact values, which may be written."""
    dense = nn.Parameter(base.dequantize_weights(torch.float32), requires_grad=False)
    base.__dict__["_dense"] = dense
    try:
        yield
    finally:
        del base.__dict__["_dense"]


def _is_decoded(base: PackedWeight) -> bool:
    return base.__dict__.get("_dense") is not None


class _Saved:
    """The state of a layer, to be put back. It holds the parameters themselves, not copies: a merge
    makes new ones."""

    def __init__(self, base: PackedWeight) -> None:
        self.buffers = base._buffers_packed
        bias = getattr(base, "bias", None)
        self.bias = None if bias is None else bias.detach().clone()

    def restore(self, base: PackedWeight) -> None:
        device = base.codes.device
        if self.buffers[0].device == device:
            base._set_buffers(*self.buffers)
        else:  # the layer moved meanwhile
            base._set_buffers(*(b.detach().to(device) for b in self.buffers))
        if self.bias is not None:
            base.bias.data = self.bias.to(device)  # type: ignore[union-attr]
        base.__dict__.pop("_merged", None)


class _MergesPacked:
    """``merge`` decodes, adds and quantizes again, which rounds; ``unmerge`` puts the saved bytes
    back, which is exact. However many adapters are merged, in one call or several, they are added
    to the saved values and rounded once."""

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if not isinstance(base, PackedWeight) or _is_decoded(base):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
            return
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.scaling]
        if not names:
            return
        current, merged = _Saved(base), list(self.merged_adapters)
        facts = base.__dict__.get("_merged")
        before = self.__dict__.get("_before_merge") or current
        before.restore(base)
        self.merged_adapters.clear()
        try:
            with _decoded(base):
                super().merge(safe_merge=safe_merge, adapter_names=merged + names)  # type: ignore[misc]
                target = base.weight.detach()
            _requantize(base, before, target)
        except BaseException:
            current.restore(base)
            self.merged_adapters[:] = merged
            if facts is not None:
                base.__dict__["_merged"] = facts
            raise
        self._before_merge = before

    def unmerge(self: Any) -> None:
        base = self.get_base_layer()
        packed = isinstance(base, PackedWeight) and not _is_decoded(base)
        saved = self.__dict__.get("_before_merge") if packed else None
        if saved is None:
            super().unmerge()  # type: ignore[misc]
            return
        del self._before_merge
        self.merged_adapters.clear()
        saved.restore(base)


def _requantize(base: PackedWeight, before: _Saved, target: torch.Tensor) -> None:
    """Quantizes `target` into `base` and keeps what survived for ``merge_report``. A change of
    nothing keeps the bytes."""
    if not torch.equal(target, base.dequantize_weights(torch.float32)):
        base.quantize_weights(target)
    after = base._buffers_packed
    base.__dict__["_merged"] = _ops.merge_survival(before.buffers, after, base._spec, target)


class QuantizedLoraLinear(_MergesPacked, lora_layer.Linear):  # type: ignore[misc,name-defined]
    """LoRA over packed codes."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """PEFT's, in one step where one plain adapter is all there is to add (``_low_rank``)."""
        y = None if args or kwargs else lora_product(self, x)
        return super().forward(x, *args, **kwargs) if y is None else y

    @property
    def lora_variants(self) -> dict:
        return {**super().lora_variants, ("use_dora",): PackedDora}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any
    ) -> None:
        base: Any = self.get_base_layer()
        init = config.init_lora_weights
        writes = isinstance(init, str) and init.lower() not in _PLAIN_INITS
        packed = isinstance(base, PackedWeight) and not base.codes.is_meta
        if not writes or not packed:
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
            return
        if init == "loftq":
            raise UnsupportedError(
                "LoraConfig: init_lora_weights is 'loftq', expected True: LoftQ needs the weights "
                "before quantization. Attach the adapters, then call "
                "quantal.initialize_loftq(model, source) with the dense model or its folder"
            )
        values = base.dequantize_weights(torch.float32)
        with _decoded(base):
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
            rest = base.weight.detach()
        if not torch.equal(rest, values):
            base.quantize_weights(rest)
            reset_magnitude(self, adapter_name)


class QuantizedLoraEmbedding(_MergesPacked, lora_layer.Embedding):  # type: ignore[misc,name-defined]
    """LoRA over a packed embedding."""


# ---------------------------------------------------------------------- DoRA


def _row_squares(base: PackedWeight) -> torch.Tensor:
    """Sums of squares of the rows of W; computed once for the bytes that are there."""
    if torch.compiler.is_compiling():
        return _ops.row_square_sums(base._buffers_packed, base._spec)
    key = id(base.codes), base.codes._version, base.codes.device
    known = base.__dict__.get("_row_squares")
    if known is None or known[0] != key:
        known = key, _ops.row_square_sums(base._buffers_packed, base._spec)
        base.__dict__["_row_squares"] = known
    return known[1]


@torch.no_grad()
def packed_weight_norm(
    base: PackedWeight, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Row norms of ``W + scaling B A``, float32, without W: row n of the square is
    ``|W_n|^2 + 2 scaling (W A^T)_n . B_n + scaling^2 B_n (A A^T) B_n^T``."""
    a, b = a.detach().float(), b.detach().float()
    with torch.autocast(a.device.type, enabled=False):
        wa = _ops.linear(a, *base._buffers_packed, None, base._spec)  # (W A^T)^T
        wide = widest_float(a.device)
        cross = (wa.T * b).sum(1, dtype=wide)
        gram = ((b @ (a @ a.T)) * b).sum(1, dtype=wide)
    squares = _row_squares(base) + 2 * scaling * cross + scaling * scaling * gram
    return squares.clamp_min(0).sqrt().float()


def _whole(weight: torch.Tensor, shape: tuple[int, int]) -> bool:
    """False while FSDP holds a part of it."""
    return tuple(weight.shape) == shape and type(weight).__name__ != "DTensor"


#: Attribute by which FullyShardedDataParallel holds the module of a unit.
_UNIT = "_fsdp_wrapped_module"


class PackedDoraLayer(DoraLinearLayer):  # type: ignore[misc]
    """PEFT's holder of a magnitude. Called without arguments it returns the magnitude, which is how
    the module that trains it reads one that FullyShardedDataParallel keeps in a unit of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs:
            return super().forward(*args, **kwargs)
        return self.weight.clone()


class _SeenWeight:
    """The weight of a linear layer as it is inside its next forward; FSDP holds a part outside."""

    def __init__(self, module: Any) -> None:
        self.weight: Any = None
        inner = getattr(module, _UNIT, module)
        self._handle = inner.register_forward_pre_hook(self._keep)

    def _keep(self, module: Any, args: Any) -> None:
        self._handle.remove()
        self.weight = module.weight.detach().clone()


class PackedDora(variants.DoraLinearVariant):
    """DoRA whose column norms come from packed codes: PEFT's way makes three dense matrices of the
    weight's size at each step."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        base: Any = module.get_base_layer()
        if not getattr(base, "_awaits_weights", False):
            variants.DoraLinearVariant.init(module, adapter_name, **kwargs)
            module.lora_magnitude_vector[adapter_name].__class__ = PackedDoraLayer
            return
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer: Any = PackedDoraLayer(fan_in_fan_out=False)
        layer.weight = nn.Parameter(torch.zeros(module.out_features))  # set when weights are there
        module.lora_magnitude_vector[adapter_name] = layer

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        base: Any = module.get_base_layer()
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        magnitude = module.lora_magnitude_vector[active_adapter]
        units = any(hasattr(m, _UNIT) for m in (lora_a, lora_b, magnitude))
        r = module.r[active_adapter]
        whole = units or (
            _whole(lora_a.weight, (r, module.in_features))
            and _whole(lora_b.weight, (module.out_features, r))
        )
        if not isinstance(base, PackedWeight) or _is_decoded(base) or not whole:
            return variants.DoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
        scaling = module.scaling[active_adapter]
        dropout = module.lora_dropout[active_adapter]
        if isinstance(dropout, nn.Identity) or not module.training:
            product = result
        else:
            x = dropout(x)
            product = base(x)
        bias: Any = base.bias
        if bias is not None:
            product = product - bias
        seen = (_SeenWeight(lora_a), _SeenWeight(lora_b)) if units else (lora_a, lora_b)
        change = lora_b(lora_a(x))
        norm = packed_weight_norm(base, seen[0].weight, seen[1].weight, scaling)
        scale = (magnitude() if units else magnitude.weight) / norm
        return result + (scale - 1) * product + scale * change * scaling


@torch.no_grad()
def reset_magnitude(module: Any, adapter_name: str) -> None:
    """DoRA: the magnitudes that make ``W + scaling B A`` the layer's weight, as after attaching."""
    if adapter_name not in module.lora_magnitude_vector:
        return
    magnitude = module.lora_magnitude_vector[adapter_name].weight
    a, b = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
    norm = packed_weight_norm(module.get_base_layer(), a, b, module.scaling[adapter_name])
    magnitude.copy_(norm)
