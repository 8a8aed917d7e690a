"""Checksums of tensors."""

from __future__ import annotations

import ctypes
import zlib

import torch


def crc32(tensor: torch.Tensor, begin: int = 0, end: int | None = None) -> int:
    """CRC-32 of bytes [begin, end) of a tensor. Never through numpy, whose view would keep FSDP
    from resizing the storage."""
    tensor = tensor.detach().cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    end = size if end is None else min(end, size)
    if end <= begin:
        return 0
    memory = (ctypes.c_ubyte * (end - begin)).from_address(tensor.data_ptr() + begin)
    return zlib.crc32(memory)
