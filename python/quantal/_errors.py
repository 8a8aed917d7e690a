"""Exception classes: one per kind of failure, each also the built-in kind that it resembles."""

from __future__ import annotations

import os


class QuantalError(RuntimeError):
    """Base class. ``code`` is the kind; ``path``, ``tensor`` and ``offset`` say where in a file."""

    code = "Internal"

    def __init__(self, message: str, path: str = "", tensor: str = "", offset: int = -1) -> None:
        super().__init__(message)
        self.path = path or None
        self.tensor = tensor or None
        self.offset = None if offset < 0 else offset

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self):
        site = (self.path or "", self.tensor or "", -1 if self.offset is None else self.offset)
        return type(self), (self.args[0], *site)


class ConfigError(QuantalError, ValueError):
    """A setting is out of its legal range or contradicts another one."""

    code = "Config"


class ShapeError(QuantalError, ValueError):
    """A size or shape does not match what an operation needs."""

    code = "Shape"


class DtypeError(QuantalError, TypeError):
    """An element type is not accepted here."""

    code = "Dtype"


class UnsupportedError(QuantalError, NotImplementedError):
    """Valid input that quantal does not handle."""

    code = "Unsupported"


class CorruptError(QuantalError, ValueError):
    """Bytes from outside contradict their own format."""

    code = "Corrupt"


class IoError(QuantalError, OSError):
    """The operating system refused to read or write."""

    code = "Io"


class NotFoundError(IoError, FileNotFoundError):
    """There is no such file, or a folder has none of the files that were looked for."""


class DeviceError(QuantalError):
    """A device or instruction set is missing."""

    code = "Device"


class InternalError(QuantalError):
    """A defect of quantal itself."""


_CLASSES = {
    cls.code: cls
    for cls in (
        ConfigError,
        ShapeError,
        DtypeError,
        UnsupportedError,
        CorruptError,
        IoError,
        DeviceError,
        InternalError,
    )
}


def make_error(code: str, message: str, path: str, tensor: str, offset: int) -> QuantalError:
    """The exception for a C++ Error; called by the extension module."""
    cls = _CLASSES.get(code, InternalError)
    if cls is IoError and _is_absent(message, path):
        cls = NotFoundError
    return cls(message, path, tensor, offset)


def _is_absent(message: str, path: str) -> bool:
    """Whether a failure to read says that nothing is there."""
    return bool(path) and (not os.path.lexists(path) or message.startswith("No checkpoint found"))
