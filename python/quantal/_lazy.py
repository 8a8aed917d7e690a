"""A weight that looks dense and is decoded only when an operator reads it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map_only

from ._errors import UnsupportedError

_VIEWS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_REMEDY = (
    "quantal: the weight of a quantized layer is read-only, expected no write through `weight`; "
    "use layer.quantize_weights(tensor)"
)


class LazyWeight(torch.Tensor):
    """Stands for the values of a packed matrix. Shape, dtype and device cost nothing; any operator
    gets the decoded values; a write raises instead of being lost."""

    _decode: Callable[[], torch.Tensor]
    #: The codes that the values come from; two weights of one source are the same weight.
    _source: torch.Tensor | None

    @staticmethod
    def __new__(cls, decode, shape, dtype, device, source=None) -> LazyWeight:
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=False
        )
        self._decode = decode
        self._source = source
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        shape = list(self.shape)
        return f"LazyWeight(shape={shape}, dtype={self.dtype}, device='{self.device}')"

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise UnsupportedError(_REMEDY)

    def _again(self) -> LazyWeight:
        return LazyWeight(self._decode, self.shape, self.dtype, self.device, self._source)

    def __deepcopy__(self, memo) -> torch.Tensor:
        return self._decode()

    def __reduce_ex__(self, protocol):
        return self._decode().__reduce_ex__(protocol)

    def tolist(self):
        return self._decode().tolist()

    def numpy(self, *, force: bool = False):
        return self._decode().numpy(force=force)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in _VIEWS:
            return args[0]._again()
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        named.update(kwargs or {})
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(named.get(argument.name), LazyWeight):
                raise UnsupportedError(f"{_REMEDY} (operator={func})")
        args, kwargs = tree_map_only(LazyWeight, lambda w: w._decode(), (args, kwargs or {}))
        return func(*args, **kwargs)
