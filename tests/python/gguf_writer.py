"""A small GGUF writer, enough to make test files."""

import struct

import numpy as np

_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_F32_TENSOR = 0


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value[0], str):
        body = b"".join(map(_text, value))
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + body
    body = b"".join(struct.pack("<i", v) for v in value)
    return struct.pack("<IIQ", _ARRAY, _I32, len(value)) + body


def write_gguf(path, metadata: dict, tensors: dict[str, np.ndarray]) -> None:
    """Version 3, alignment 32, float32 tensors."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += _text(key) + _value(value)
    offset, data = 0, b""
    for name, array in tensors.items():
        out += _text(name) + struct.pack("<I", array.ndim)
        out += struct.pack(f"<{array.ndim}Q", *reversed(array.shape))
        out += struct.pack("<IQ", _F32_TENSOR, offset)
        body = np.ascontiguousarray(array, dtype="<f4").tobytes()
        body += b"\0" * (-len(body) % 32)
        data += body
        offset += len(body)
    out += b"\0" * (-len(out) % 32)
    path.write_bytes(out + data)
