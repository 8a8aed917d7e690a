"""Failures of long runs: what ran out, what to try, and retries where a retry can help.

Only a failed allocation counts as a lack of memory: found by type first, by whole words second.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import gc
import importlib
import logging
import math
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from . import _check
from ._errors import ConfigError, QuantalError
from .backend import Backend, BackendManager, available_backends, host_memory_info
from .config import QuantizationConfig, QuantizationMethod

logger = logging.getLogger("quantal")

_Function = TypeVar("_Function", bound=Callable[..., Any])
_RULER = "=" * 60


@dataclass
class ErrorContext:
    """What was being done when something failed.

    model_size  GB of weights"""

    operation: str
    backend: str | None = None
    model_size: float | None = None
    quantization_bits: int | None = None
    batch_size: int | None = None
    device: str | None = None
    additional_info: dict[str, Any] | None = None


class MemoryError(QuantalError, builtins.MemoryError):  # noqa: A001 (the documented name)
    """An allocation failed; also the built-in ``MemoryError``."""

    code = "Device"


class ConfigurationError(ConfigError):
    """A setting contradicts another one or the machine."""


class BackendError(QuantalError):
    """A backend failed and none is left to fall back to."""

    code = "Device"


# ------------------------------------------------------------------ memory


def get_memory_info(device: str = "cpu") -> dict[str, float]:
    """Memory of a device in GB (10^9 bytes): ``total_gb``, ``available_gb`` and, as far as the
    device tells, ``used_gb``, ``percent``, ``allocated_gb``, ``reserved_gb``; empty for a device
    that is not there."""
    _check.text("get_memory_info", "device", device)
    kind = _check.device("get_memory_info", "device", device).type
    if kind == "cuda":
        if not torch.cuda.is_available():
            return {}
        free, total = torch.cuda.mem_get_info()
        held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        sizes = {"total": total, "available": free, "allocated": held, "reserved": reserved}
        return {f"{name}_gb": size / 1e9 for name, size in sizes.items()}
    info = host_memory_info()
    names = ("total_memory", "available_memory", "used_memory")
    out = {n.replace("_memory", "_gb"): info[n] / 1e9 for n in names if n in info}  # type: ignore[operator]
    if "percent_used" in info:
        out["percent"] = float(info["percent_used"])
    if kind == "mps" and torch.backends.mps.is_available():
        out["allocated_gb"] = torch.mps.current_allocated_memory() / 1e9
        out["reserved_gb"] = torch.mps.driver_allocated_memory() / 1e9
    return out


_exception = _check.is_a(BaseException, "an exception")
_context = _check.is_a(ErrorContext, "an ErrorContext")

#: Words of allocators; whole words, so that "bloom" and "room" are not among them.
_OUT_OF_MEMORY = re.compile(
    r"\bout of memory\b|\bOOM\b|\b(?:can(?:not|'t)|unable to) allocate memory\b"
    r"|\bnot enough memory\b|\binsufficient memory\b|\bmemory allocation failed\b"
    r"|CUBLAS_STATUS_ALLOC_FAILED|\bstd::bad_alloc\b"
)


def detect_oom_error(exception: BaseException, device: str = "cpu") -> bool:
    """Whether an exception, or what caused it, is a failed allocation."""
    _exception("detect_oom_error", "exception", exception)
    _check.device("detect_oom_error", "device", device)
    seen: set[int] = set()
    cause: BaseException | None = exception
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, builtins.MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(cause, RuntimeError) and _OUT_OF_MEMORY.search(str(cause)):
            return True
        cause = cause.__cause__
    return False


def free_memory(device: str | None) -> None:
    """Gives back what nothing holds any more, here and on the device."""
    gc.collect()
    kind = torch.device(device or "cpu").type
    if kind == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    elif kind == "mps" and torch.backends.mps.is_available():
        torch.mps.synchronize()
        torch.mps.empty_cache()


@_check.arguments(context=_context, memory_info=_check.mapping)
def suggest_memory_optimization(context: ErrorContext, memory_info: dict[str, float]) -> list[str]:
    """What to change after a lack of memory, the cheapest change first."""
    out = []
    if context.batch_size is not None and context.batch_size > 1:
        half = context.batch_size // 2
        out.append(f"Reduce the batch size from {context.batch_size} to {half}")
    bits = context.quantization_bits
    if bits is not None and bits > 4:
        out.append(f"Use fewer bits (now {bits}): {next_bits(bits) or 4}")
    out.append("Switch on gradient checkpointing")
    available = memory_info.get("available_gb")
    if context.model_size and available is not None and context.model_size > available:
        size = f"{context.model_size:.1f} GB of weights, {available:.1f} GB available"
        out.append(f"Shard the model over several devices with FSDP ({size})")
    if context.backend == Backend.CUDA.value:
        out.append("Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True against fragmentation")
    elif context.backend == Backend.MPS.value:
        out.append("Close other programs: the device shares the memory of the system")
    return out


def next_bits(bits: int) -> int | None:
    """The next width of the ladder 16, 8, 4; None below."""
    return {16: 8, 8: 4}.get(bits)


# ------------------------------------------------------------------ messages


def _context_lines(context: ErrorContext) -> list[str]:
    facts = {
        "Backend": context.backend,
        "Device": context.device,
        "Model Size": None if context.model_size is None else f"{context.model_size:.1f}GB",
        "Quantization": context.quantization_bits and f"{context.quantization_bits}-bit",
        "Batch Size": context.batch_size,
    }
    facts |= context.additional_info or {}
    return [f"{name}: {value}" for name, value in facts.items() if value is not None]


@_check.arguments(exception=_exception, context=_context, include_traceback=_check.flag)
def format_error_message(
    exception: BaseException, context: ErrorContext, include_traceback: bool = True
) -> str:
    """A report of a failure: what, where, the memory then, what to try, and the traceback."""
    lines = [_RULER, f"ERROR: {context.operation}", _RULER]
    lines += [f"Exception Type: {type(exception).__name__}", f"Message: {exception}"]
    lines += _context_lines(context)
    memory = get_memory_info(context.device or "cpu")
    if memory:
        lines += ["", "Memory Status:", *(f"  {n}: {value:.2f}" for n, value in memory.items())]
    if detect_oom_error(exception, context.device or "cpu"):
        advice = suggest_memory_optimization(context, memory)
        lines += ["", "Suggested Solutions:"]
        lines += [f"  {i}. {text}" for i, text in enumerate(advice, 1)]
    if include_traceback:
        lines += ["", "Traceback:", "".join(traceback.format_exception(exception)).rstrip()]
    return "\n".join([*lines, _RULER])


@_check.arguments(context=_context, reraise=_check.flag)
@contextlib.contextmanager
def error_handler(context: ErrorContext, reraise: bool = True) -> Iterator[None]:
    """Logs a failure of its block as a report; frees memory after a lack of it.

    reraise  False: the failure ends here"""
    try:
        yield
    except Exception as error:
        logger.error("%s", format_error_message(error, context))
        if detect_oom_error(error, context.device or "cpu"):
            free_memory(context.device)
        if reraise:
            raise


# ------------------------------------------------------------------ retries


def can_change(error: BaseException) -> bool:
    """Whether a second try may end otherwise: memory may be free by then. Nothing else changes by
    waiting: a bad shape or a missing file stays one."""
    return detect_oom_error(error)


@_check.arguments(recover_fn=_check.optional(_check.function), retry_if=_check.function)
def with_recovery(
    max_retries: int = 3,
    backoff_factor: float = 2.0,
    recover_fn: Callable[[Exception], Any] | None = None,
    *,
    retry_if: Callable[[BaseException], bool] = can_change,
) -> Callable[[_Function], _Function]:
    """A decorator: up to `max_retries` calls in all, waiting 1, f, f^2 ... seconds in between.

    recover_fn  called with each failure before the next try
    retry_if    which failures are worth a retry; default: those of memory. Others raise at once"""
    tries = _check.integer("with_recovery", "max_retries", max_retries)
    factor = _check.real("with_recovery", "backoff_factor", backoff_factor)
    if tries < 1 or not 0 <= factor < math.inf:
        raise ConfigError(
            f"with_recovery: max_retries is {tries} and backoff_factor {factor}, expected at least "
            "1 and a finite number from 0"
        )

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for attempt in range(1, tries + 1):
                try:
                    return function(*args, **kwargs)
                except Exception as error:
                    if attempt == tries or not retry_if(error):
                        raise
                    logger.warning("attempt %d of %d failed: %s", attempt, tries, error)
                    if recover_fn is not None:
                        recover_fn(error)
                time.sleep(factor ** (attempt - 1))
            raise AssertionError("unreachable")

        return wrapper  # type: ignore[return-value]

    return decorate


class ResourceMonitor:
    """Warns, once per level, when memory runs short.

    memory_threshold  share of the memory in use from which it warns
    check_interval    seconds between two looks; calls in between return None"""

    def __init__(
        self, device: str = "cpu", memory_threshold: float = 0.9, check_interval: float = 10.0
    ) -> None:
        where = "ResourceMonitor"
        self.device = _check.text(where, "device", device)
        _check.device(where, "device", device)
        self.memory_threshold = _check.real(where, "memory_threshold", memory_threshold)
        self.check_interval = _check.real(where, "check_interval", check_interval)
        if not 0 <= self.memory_threshold <= 1 or not 0 <= self.check_interval < math.inf:
            raise ConfigError(
                f"{where}: memory_threshold is {memory_threshold} and check_interval "
                f"{check_interval}, expected a share from 0 to 1 and seconds from 0"
            )
        self._next_check = 0.0
        self._warned: set[int] = set()

    def check_resources(self) -> str | None:
        """The warning, which is logged too; None if there is nothing to say."""
        now = time.monotonic()
        if now < self._next_check:
            return None
        self._next_check = now + self.check_interval
        memory = get_memory_info(self.device)
        total, available = memory.get("total_gb"), memory.get("available_gb")
        if not total or available is None:
            return None
        used = 1 - available / total
        level = int(100 * used)
        if used <= self.memory_threshold or level in self._warned:
            return None
        self._warned.add(level)
        text = f"High memory usage detected on {self.device}: {100 * used:.1f}% used"
        logger.warning("%s", text)
        return text


# ------------------------------------------------------------------ settings and fallbacks


def _is_usual_width(bits: int) -> bool:
    """Whether a config of any method may have this width."""
    try:
        QuantizationConfig(QuantizationMethod.NONE, bits)
    except ConfigError:
        return False
    return True


def validate_configuration(config: dict[str, Any]) -> list[str]:
    """Remarks about the settings of a training run: batch_size, quantization_bits, dtype, backend,
    gradient_checkpointing, model_size (10^9 parameters). Unknown ones are ignored."""
    _check.instance("validate_configuration", "config", config, dict, "a dict")
    issues = []
    where = "validate_configuration"
    for name in ("batch_size", "quantization_bits"):
        if config.get(name) is not None:
            _check.integer(where, name, config[name])
    if config.get("model_size") is not None:
        _check.real(where, "model_size", config["model_size"])
    for name, kinds in (("dtype", (str, torch.dtype)), ("backend", (str, Backend))):
        if config.get(name) is not None:
            _check.instance(where, name, config[name], kinds, f"a {name} or its name")
    if config.get("gradient_checkpointing") is not None:
        _check.flag(where, "gradient_checkpointing", config["gradient_checkpointing"])
    batch_size, bits = config.get("batch_size"), config.get("quantization_bits")
    if batch_size is not None and batch_size > 128:
        issues.append(f"Very large batch size ({batch_size}) may run out of memory")
    if bits is not None and not _is_usual_width(bits):
        issues.append(f"Unusual quantization bits ({bits}), common values are 2, 4, 8 and 16")
    if str(config.get("dtype")).endswith("bfloat16") and config.get("backend"):
        kind = Backend(config["backend"])
        if not BackendManager.CAPABILITIES[kind].supports_bfloat16:
            issues.append(f"{kind.name} backend doesn't support bfloat16")
    if (config.get("model_size") or 0) > 7 and not config.get("gradient_checkpointing"):
        issues.append("Models above 7B train with less memory with gradient checkpointing")
    return issues


def handle_import_error(
    module_name: str,
    fallback: Callable[[], Any] | None = None,
    install_cmd: str | None = None,
) -> Any:
    """The module of this name, else what `fallback` makes, else ImportError with the command."""
    where = "handle_import_error"
    if not _check.text(where, "module_name", module_name):
        raise ConfigError(f"{where}: module_name is empty, expected the name of a module")
    _check.optional(_check.function)(where, "fallback", fallback)
    _check.optional(_check.text)(where, "install_cmd", install_cmd)
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        remedy = f"\nInstall with: {install_cmd}" if install_cmd else "; install it first"
        text = f"Failed to import '{module_name}': {error}{remedy}"
        if fallback is None:
            raise ImportError(text) from error
        logger.warning("%s; using the fallback", text)
        return fallback()


#: Where to go when a backend fails.
_NEXT = {"cuda": ("mps", "cpu"), "mlx": ("mps", "cpu"), "mps": ("cpu",), "cpu": ()}


def handle_backend_error(
    exception: BaseException, backend: Backend | str, fallback_backend: str | None = None
) -> str:
    """The backend to use instead of one that failed: `fallback_backend`; without one it raises
    BackendError, naming those of this machine in the order cuda, mps, cpu (mlx, mps, cpu)."""
    _exception("handle_backend_error", "exception", exception)
    name = Backend(backend).value
    if fallback_backend is not None:
        chosen = Backend(fallback_backend).value
        logger.warning("backend %s failed: %s; using %s", name, exception, chosen)
        return chosen
    here = {b.value for b in available_backends()}
    others = ", ".join(other for other in _NEXT[name] if other in here)
    remedy = f"; use one of: {others}" if others else ""
    raise BackendError(
        f"Backend '{name}' failed with no fallback available: {exception}{remedy}"
    ) from exception


__all__ = [
    "BackendError",
    "ConfigurationError",
    "ErrorContext",
    "MemoryError",
    "ResourceMonitor",
    "detect_oom_error",
    "error_handler",
    "format_error_message",
    "get_memory_info",
    "handle_backend_error",
    "handle_import_error",
    "suggest_memory_optimization",
    "validate_configuration",
    "with_recovery",
]
