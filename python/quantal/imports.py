"""Other packages: which are there, and what they are needed for. quantal's formats need none.

``report_import_status`` shows quantal's own engine beside them. The registry imports a package on
request, with a stand-in where that is useful; a stand-in never counts as the package.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from . import _check, _core, _ops
from ._custom import registered_adapters
from .backend import Backend, machine

logger = logging.getLogger("quantal")

_ALL = tuple(backend.value for backend in Backend)


@dataclass
class ImportResult:
    """Outcome of an import. `fallback_used`: `module` is a stand-in, not the package."""

    success: bool
    module: Any = None
    error: Exception | None = None
    fallback_used: bool = False
    warnings: list[str] = field(default_factory=list)


@dataclass
class _Entry:
    import_func: Callable[[], Any]
    fallback: Callable[[], Any] | None
    validator: Callable[[Any], bool] | None
    backends: tuple[str, ...]
    package: str | None


def _backend_name(backend: Backend | str | None) -> str | None:
    return None if backend is None else Backend(backend).value


class ImportRegistry:
    """Packages by name, each with a way to import it and, where useful, a stand-in."""

    def __init__(self) -> None:
        self._registry: dict[str, _Entry] = {}
        self._found: dict[str, ImportResult] = {}

    def register(
        self,
        name: str,
        import_func: Callable[[], Any],
        fallback: Callable[[], Any] | None = None,
        validator: Callable[[Any], bool] | None = None,
        backends: Iterable[str] | None = None,
        *,
        package: str | None = None,
    ) -> None:
        """Adds or replaces a package.

        import_func  returns the module; raises what it likes if there is none
        fallback     makes a stand-in for where the import fails
        validator    False means that the module is not what it should be
        backends     names of the backends where it is of use; None or "all": everywhere
        package      name to look for where only availability is asked, so that nothing is imported
        """
        where = "ImportRegistry.register"
        _check.text(where, "name", name)
        for what, function in (("fallback", fallback), ("validator", validator)):
            if function is not None and not callable(function):
                raise _check.wrong_type(where, what, function, "a function")
        if not callable(import_func):
            raise _check.wrong_type(where, "import_func", import_func, "a function")
        if backends is not None:
            _check.names(where, "backends", backends)
        if package is not None:
            _check.text(where, "package", package)
        listed = tuple(_ALL if backends is None or "all" in (backends := list(backends)) else ())
        names = listed or tuple(Backend(name).value for name in backends or ())
        self._registry[name] = _Entry(import_func, fallback, validator, names, package)
        for key in [k for k in self._found if k.rpartition("_")[0] == name]:
            del self._found[key]

    def names(self) -> list[str]:
        """Registered names, sorted."""
        return sorted(self._registry)

    def get(self, name: str, backend: Backend | str | None = None) -> ImportResult:
        """Imports a package, or says why not. Success is remembered; a failure is tried again."""
        chosen = _backend_name(backend)
        key = f"{name}_{chosen or 'all'}"
        if key not in self._found:
            result = self._import(_check.text("ImportRegistry.get", "name", name), chosen)
            if not result.success or result.fallback_used:
                return result
            self._found[key] = result
        return self._found[key]

    def _import(self, name: str, backend: str | None) -> ImportResult:
        entry = self._registry.get(name)
        if entry is None:
            return ImportResult(False, error=ImportError(f"No import registered for '{name}'"))
        if backend is not None and backend not in entry.backends:
            text = f"Import '{name}' is not supported on backend '{backend}'"
            return self._stand_in(name, entry, ImportError(text), text)
        try:
            module = entry.import_func()
            if entry.validator is not None and not entry.validator(module):
                raise ImportError(f"Validation failed for '{name}'")
        except Exception as error:  # a broken package may raise anything while it is imported
            return self._stand_in(name, entry, error, f"Using fallback for '{name}': {error}")
        return ImportResult(True, module)

    @staticmethod
    def _stand_in(name: str, entry: _Entry, error: Exception, text: str) -> ImportResult:
        if entry.fallback is None:
            return ImportResult(False, error=error)
        try:
            return ImportResult(True, entry.fallback(), fallback_used=True, warnings=[text])
        except Exception as second:  # whatever a registered function raises is reported
            message = f"Import '{name}' failed: {error}\nFallback also failed: {second}"
            return ImportResult(False, error=ImportError(message))

    def check_availability(self, name: str, backend: Backend | str | None = None) -> bool:
        """Whether the package itself is there and of use on the backend; stand-ins do not count."""
        chosen = _backend_name(backend)
        entry = self._registry.get(_check.text("check_availability", "name", name))
        if entry is None or (chosen is not None and chosen not in entry.backends):
            return False
        if entry.package is not None:
            return _is_installed(entry.package)
        result = self.get(name, backend)
        return result.success and not result.fallback_used


def _is_installed(package: str) -> bool:
    """Whether there is code to import: a folder of that name beside the program is no package."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


# ------------------------------------------------------------------ stand-ins and views


class _StandIn:
    """Raises the same ImportError for any attribute."""

    def __init__(self, name: str, remedy: str) -> None:
        self.__dict__.update(_name=name, _remedy=remedy)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # questions of Python itself (copy, pickle, inspect)
            raise AttributeError(attribute)
        raise ImportError(f"{self._name}.{attribute} is not available. {self._remedy}")


class _NoWandb:
    """Accepts every call of wandb and does nothing."""

    def init(self, *args: Any, **kwargs: Any) -> None:
        logger.warning("wandb not available, logging disabled")

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return lambda *args, **kwargs: None


class _NoFlashAttention:
    """Functions of flash_attn that say what to do instead."""

    @staticmethod
    def flash_attn_func(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "Flash Attention is not available. "
            "Please install flash-attn or disable flash attention."
        )

    flash_attn_varlen_func = flash_attn_func


class _View:
    """A module with some names of its parts beside its own."""

    def __init__(self, module: ModuleType, **extra: Any) -> None:
        self.__dict__.update(_module=module, **extra)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._module, attribute)


def _import_bitsandbytes() -> Any:
    with suppress_output():
        module = importlib.import_module("bitsandbytes")
    return _View(module, Linear4bit=module.nn.Linear4bit, Params4bit=module.nn.Params4bit)


def _import_hqq() -> Any:
    quantize = importlib.import_module("hqq.core.quantize")
    names = ("HQQLinear", "HQQBackend", "BaseQuantizeConfig")
    parts = {name: getattr(quantize, name) for name in names}
    return _View(importlib.import_module("hqq"), **parts)


def _import_mlx() -> Any:
    utils = importlib.import_module("mlx.utils")
    trees = {n: getattr(utils, n) for n in ("tree_flatten", "tree_unflatten", "tree_map")}
    parts = {"mx": "mlx.core", "nn": "mlx.nn", "optimizers": "mlx.optimizers"}
    modules = {name: importlib.import_module(path) for name, path in parts.items()}
    module = importlib.import_module("mlx")
    return _View(module, mlx=module, **modules, **trees)


def _has_bitsandbytes_parts(module: Any) -> bool:
    return all(hasattr(module, n) for n in ("nn", "optim", "Linear4bit", "Params4bit"))


_OTHER_METHOD = "or use a different quantization method."


@dataclass(frozen=True)
class _Package:
    """A package that users of quantal may have."""

    module: str
    distribution: str
    needed_for: str = "nothing: quantal has these formats itself"
    backends: tuple[str, ...] = _ALL
    import_func: Callable[[], Any] | None = None
    fallback: Callable[[], Any] | None = None
    validator: Callable[[Any], bool] | None = None


_PACKAGES = {
    "bitsandbytes": _Package(
        "bitsandbytes",
        "bitsandbytes",
        backends=("cuda",),
        import_func=_import_bitsandbytes,
        fallback=lambda: _StandIn("bitsandbytes", f"Please install bitsandbytes {_OTHER_METHOD}"),
        validator=_has_bitsandbytes_parts,
    ),
    "hqq": _Package(
        "hqq",
        "hqq",
        import_func=_import_hqq,
        fallback=lambda: _StandIn("hqq", f"Please install HQQ {_OTHER_METHOD}"),
    ),
    "quanto": _Package(
        "optimum.quanto",
        "optimum-quanto",
        fallback=lambda: _StandIn(
            "quanto", "Install with: pip install optimum-quanto, " + _OTHER_METHOD
        ),
    ),
    "mlx": _Package(
        "mlx.core",
        "mlx",
        backends=("mlx", "mps"),
        import_func=_import_mlx,
        fallback=lambda: _StandIn("mlx", "Please install MLX: pip install mlx mlx-lm"),
    ),
    "gguf": _Package("gguf", "gguf"),
    "transformers": _Package("transformers", "transformers", "models by name or config"),
    "safetensors": _Package("safetensors", "safetensors", "model_loader: weights without a copy"),
    "peft": _Package("peft", "peft", "LoRA and DoRA adapters in Python"),
    "lora": _Package("peft", "peft", "the same package as peft"),
    "dora": _Package("peft", "peft", "the same package as peft"),
    "accelerate": _Package("accelerate", "accelerate", "the Trainer of transformers"),
    "wandb": _Package("wandb", "wandb", "logging of training runs", fallback=_NoWandb),
    "flash_attn": _Package(
        "flash_attn",
        "flash-attn",
        "models that ask for it",
        backends=("cuda",),
        fallback=_NoFlashAttention,
    ),
}


def _importer(module: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(module)


def _default_registry() -> ImportRegistry:
    registry = ImportRegistry()
    for name, p in _PACKAGES.items():
        registry.register(
            name,
            p.import_func or _importer(p.module),
            p.fallback,
            p.validator,
            p.backends,
            package=p.module,
        )
    return registry


#: What the functions below use; ``registry.register`` adds to it.
registry = _default_registry()

# ------------------------------------------------------------------ functions


def get_module(name: str, backend: Backend | str | None = None) -> Any:
    """A registered package, or its stand-in with a warning; raises ImportError saying why not."""
    result = registry.get(name, backend)
    if not result.success:
        if isinstance(result.error, ImportError):
            raise result.error
        raise ImportError(f"Import '{name}' failed: {result.error}") from result.error
    for text in result.warnings:
        _check.warn(text)
    return result.module


def check_import_availability(name: str, backend: Backend | str | None = None) -> bool:
    """Whether the real package is installed and of use on the backend; stand-ins do not count."""
    return registry.check_availability(name, backend)


def validate_imports(
    required_imports: list[str], backend: Backend | str | None = None
) -> dict[str, ImportResult]:
    """Imports each package of a list; the outcomes by name."""
    where = "validate_imports"
    _check.names(where, "required_imports", required_imports)
    return {name: registry.get(name, backend) for name in required_imports}


def _version(distribution: str) -> str:
    try:
        return " " + importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _package_lines(name: str, backend: str | None) -> list[str]:
    known = _PACKAGES.get(name)
    available = registry.check_availability(name, backend)
    status = "✓ Available" if available else "✗ Not Available"
    if known is None:
        return [f"{name:20} {status}"]
    if available:
        status += _version(known.distribution)
    elif known.fallback is not None:
        status += " (fallback)"
    lines = [f"{name:20} {status:26} needed for {known.needed_for}"]
    if backend is not None and backend not in known.backends and _is_installed(known.module):
        lines.append(f"    ⚠ Import '{name}' is not supported on backend '{backend}'")
    return lines


def report_import_status(backend: Backend | str | None = None) -> str:
    """What runs here: quantal's own engine for each dialect and device, the methods of this build,
    and which other packages are there, in which version and what for. Imports none of them."""
    chosen = _backend_name(backend)
    lines = ["Import Status Report", "=" * 50, f"Backend: {chosen or 'not specified'}", ""]
    lines.append(f"quantal {_core.version} on torch {torch.__version__}; its own engine:")
    lines.append(_core.engine_text(machine()).rstrip("\n"))
    lines.append(f"  CUDA kernels: {_ops.cuda_status()}")
    if not _ops.cuda_status().startswith("on: "):
        lines.append("  tensors on a GPU: torch's operators (docs/cuda.md)")
    lines.append("  tensors on other devices: torch's operators")
    custom = list(registered_adapters())
    if custom:
        lines.append(f"  registered here: {', '.join(custom)}")
    lines += ["", "Other packages (quantizing, saving and loading need none of them):"]
    for name in registry.names():
        lines += _package_lines(name, chosen)
    return "\n".join(lines)


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Swallows what Python code prints to standard output and error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


__all__ = [
    "ImportRegistry",
    "ImportResult",
    "check_import_availability",
    "get_module",
    "registry",
    "report_import_status",
    "suppress_output",
    "validate_imports",
]
