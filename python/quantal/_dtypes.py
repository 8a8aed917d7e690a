"""Names of element types on both sides, and tensors as bytes."""

from __future__ import annotations

import numpy as np
import torch

from . import _core
from ._errors import DtypeError

_BY_NAME = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
    "u8": torch.uint8,
    "i8": torch.int8,
    "u16": torch.uint16,
    "i16": torch.int16,
    "u32": torch.uint32,
    "i32": torch.int32,
    "u64": torch.uint64,
    "i64": torch.int64,
    "bool": torch.bool,
    "f8e4m3": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _BY_NAME.items()}
_TORCH_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _NAMES}


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Accepts a torch dtype, "float32", "torch.float32" or "f32"."""
    if isinstance(dtype, torch.dtype):
        return dtype
    name = str(dtype).removeprefix("torch.")
    found = _TORCH_NAMES.get(name) or _BY_NAME.get(name)
    if found is None:
        legal = ", ".join(sorted(_TORCH_NAMES))
        raise DtypeError(f"dtype is {dtype!r}, expected one of {legal}")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The name that the extension module uses."""
    name = _NAMES.get(dtype)
    if name is None:
        raise DtypeError(f"dtype is {dtype}, expected one of {', '.join(map(str, _NAMES))}")
    return name


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor: shared for a contiguous CPU tensor, else a copy."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.numel() == 0:
        return np.empty(0, dtype=np.uint8)
    return tensor.reshape(-1).view(torch.uint8).numpy()


def tensor_from(buffer: _core.Buffer, dtype: str, shape: list[int]) -> torch.Tensor:
    """A tensor over the bytes of `buffer`, which it keeps alive."""
    if len(buffer) == 0:
        return torch.empty(shape, dtype=_BY_NAME[dtype])
    return torch.frombuffer(buffer, dtype=_BY_NAME[dtype]).reshape(shape)


def as_parts(tensor: torch.Tensor) -> tuple[str, list[int], np.ndarray]:
    """(dtype name, shape, bytes), as the extension module takes tensors."""
    return dtype_name(tensor.dtype), list(tensor.shape), bytes_of(tensor)


def widest_float(device: torch.device) -> torch.dtype:
    """float64 where the device has it; Metal does not."""
    return torch.float32 if device.type == "mps" else torch.float64


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements of a tensor."""
    return tensor.numel() * tensor.element_size()
