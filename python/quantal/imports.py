"""Which optional packages are there; quantal needs none of them, all its formats are its own."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType

from . import _core
from .backend import Backend


@dataclass
class ImportResult:
    """Outcome of looking for a package. `fallback_used`: quantal's own implementation stands in."""

    success: bool
    module: ModuleType | None = None
    error: str | None = None
    fallback_used: bool = False
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Known:
    package: str
    methods: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("cuda", "mps", "mlx", "cpu")


_KNOWN = {
    "bitsandbytes": _Known("bitsandbytes", ("bnb_nf4", "bnb_int8")),
    "hqq": _Known("hqq", ("hqq",)),
    "mlx": _Known("mlx", ("mlx_int4", "mlx_int8"), ("mlx", "mps")),
    "quanto": _Known("optimum.quanto", ("quanto_int2", "quanto_int4", "quanto_int8")),
    "peft": _Known("peft"),
    "transformers": _Known("transformers"),
    "wandb": _Known("wandb"),
    "flash_attn": _Known("flash_attn", (), ("cuda",)),
}


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def check_import_availability(name: str, backend: Backend | str | None = None) -> bool:
    """Whether the real package is installed and of use on the backend; stand-ins do not count."""
    known = _KNOWN.get(name)
    if known is None or not _is_installed(known.package):
        return False
    return backend is None or Backend(backend).value in known.backends


def get_module(name: str, backend: Backend | str | None = None) -> ModuleType:
    """Imports a registered package; raises ImportError saying why not."""
    known = _KNOWN.get(name)
    if known is None:
        raise ImportError(f"No import registered for '{name}'")
    if backend is not None and Backend(backend).value not in known.backends:
        raise ImportError(f"Import '{name}' is not supported on backend '{Backend(backend)}'")
    return importlib.import_module(known.package)


def validate_imports(
    names: list[str], backend: Backend | str | None = None
) -> dict[str, ImportResult]:
    """The outcome for each name; nothing is imported."""
    built = set(_core.built_methods())
    out = {}
    for name in names:
        known = _KNOWN.get(name)
        if known is None:
            out[name] = ImportResult(False, error=f"No import registered for '{name}'")
            continue
        found = check_import_availability(name, backend)
        own = [m for m in known.methods if m in built]
        absent = [m for m in known.methods if m not in built]
        notes = [f"not quantized by this version of quantal: {', '.join(absent)}"] if absent else []
        if own:
            notes.insert(0, f"quantal's own implementation serves {', '.join(own)}")
        error = None if found else f"package '{known.package}' is not installed or not of use here"
        out[name] = ImportResult(found, None, error, bool(own) and not found, notes)
    return out


def report_import_status(backend: Backend | str = Backend.CPU) -> str:
    """A readable table of the optional packages and of the methods that run without them."""
    lines = ["Import Status Report", "=" * 50, f"Backend: {Backend(backend)}", ""]
    for name, result in validate_imports(list(_KNOWN), backend).items():
        status = "✓ Available" if result.success else "✗ Not Available"
        lines.append(f"{name:<14} {status}{' (fallback)' if result.fallback_used else ''}")
        lines.extend(f"    ⚠ {note}" for note in result.warnings)
    lines += ["", f"Methods of this build: {', '.join(_core.built_methods())}"]
    return "\n".join(lines)


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Swallows what Python code prints to standard output and error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
