"""Quantizing, saving and loading with reports, counters and retries where a retry can help."""

from __future__ import annotations

import dataclasses
import logging
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import _check
from ._dtypes import tensor_bytes
from ._errors import ConfigError
from ._packed import PackedWeight
from .adapters import QuantizationAdapter, create_quantization_adapter
from .backend import Backend, get_device
from .config import QuantizationConfig
from .error_handling import (
    ErrorContext,
    ResourceMonitor,
    detect_oom_error,
    error_handler,
    format_error_message,
    free_memory,
    get_memory_info,
    next_bits,
    with_recovery,
)

_ADAPTER = _check.is_a(QuantizationAdapter, "a QuantizationAdapter")
logger = logging.getLogger("quantal")


def _device_of(backend: Backend) -> str:
    """Device of a backend where this machine has it, else the CPU, on which quantal then runs."""
    try:
        return get_device(backend).type
    except ConfigError:
        return "cpu"


def _is_dense(entry: dict[str, Any]) -> bool:
    return entry["method"] == "dense"


class QuantizationErrorHandler:
    """Does what an adapter does, with a report in the log when it fails.

    Only a lack of memory is tried again (the layers that are quantized by then stay so); any other
    failure is raised at once. ``stats`` counts what happened.
    """

    def __init__(
        self, backend: Backend | str, config: QuantizationConfig, enable_monitoring: bool = True
    ) -> None:
        where = "QuantizationErrorHandler"
        self.backend = Backend(backend)
        self.config = _check.instance(
            where, "config", config, QuantizationConfig, "a QuantizationConfig"
        )
        self.enable_monitoring = _check.flag(where, "enable_monitoring", enable_monitoring)
        self.device = _device_of(self.backend)
        self.monitor = ResourceMonitor(self.device) if enable_monitoring else None
        self.stats = {
            "successful_quantizations": 0,
            "failed_quantizations": 0,
            "oom_errors": 0,
            "recovered_errors": 0,
        }

    def _context(self, operation: str, **facts: Any) -> ErrorContext:
        return ErrorContext(operation, backend=self.backend.value, device=self.device, **facts)

    def _note_failure(self, error: BaseException) -> None:
        self.stats["failed_quantizations"] += 1
        if detect_oom_error(error, self.device):
            self.stats["oom_errors"] += 1

    def _attempts(self, max_retries: int, run: Callable[[], Any]) -> Any:
        """`run` with retries; a success after a failure counts as recovered."""
        failures = []

        def recover(error: Exception) -> None:
            failures.append(error)
            self.stats["oom_errors"] += 1
            free_memory(self.device)

        result = with_recovery(max_retries, 2.0, recover)(run)()
        self.stats["recovered_errors"] += 1 if failures else 0
        return result

    # ------------------------------------------------------------------ quantizing

    @_check.arguments(
        model=_check.module,
        quantization_adapter=_ADAPTER,
        batch_size=_check.optional(_check.size),
        lower_bits=_check.flag,
    )
    def quantize_model_safe(
        self,
        model: nn.Module,
        quantization_adapter: QuantizationAdapter,
        batch_size: int | None = None,
        *,
        lower_bits: bool = False,
    ) -> nn.Module:
        """``quantization_adapter.quantize_model(model)``, in three tries where memory is short.

        batch_size  of the run, for the advice in the report
        lower_bits  True: if it still fails, the layers that are left get the next width of the
                    ladder 16, 8, 4; the change stands in ``quantization_adapter.report``
        """
        if self.monitor is not None:
            self.monitor.check_resources()
        size = sum(map(tensor_bytes, model.parameters())) / 1e9
        facts = {"quantization_bits": int(self.config.bits), "batch_size": batch_size}
        context = self._context("Model Quantization", model_size=size, **facts)
        try:
            with error_handler(context):
                try:
                    out = self._quantize(model, quantization_adapter)
                except Exception as error:
                    if not lower_bits or not detect_oom_error(error, self.device):
                        raise
                    out = self._quantize_lower(model, quantization_adapter, error)
        except Exception as error:
            self._note_failure(error)
            raise
        self.stats["successful_quantizations"] += 1
        return out

    def _quantize(self, model: nn.Module, adapter: QuantizationAdapter) -> nn.Module:
        """In three tries; the report keeps the layers that an earlier try quantized."""
        earlier: dict[str, dict[str, Any]] = {}

        def run() -> nn.Module:
            try:
                return adapter.quantize_model(model)
            except Exception:
                earlier.update({e["name"]: e for e in adapter.report.entries if not _is_dense(e)})
                raise

        try:
            return self._attempts(3, run)
        finally:
            names = {entry["name"] for entry in adapter.report.entries}
            adapter.report.entries[:0] = [e for name, e in earlier.items() if name not in names]

    def _quantize_lower(
        self, model: nn.Module, adapter: QuantizationAdapter, error: Exception
    ) -> nn.Module:
        """The layers that are left, with the first width for which memory is enough."""
        bits = next_bits(int(adapter.config.bits))
        while bits is not None:
            logger.warning("out of memory, using %d bits for the layers that are left", bits)
            # The least specific pattern: what layer_configs say of single layers stands.
            settings = {"*": {"bits": bits}, **adapter.config.layer_configs}
            config = dataclasses.replace(adapter.config, layer_configs=settings)
            other = create_quantization_adapter(adapter.backend, config)
            try:
                out = self._quantize(model, other)
            except Exception as failure:
                if not detect_oom_error(failure, self.device):
                    raise
                error, bits = failure, next_bits(bits)
                continue
            finally:
                done = [e for e in adapter.report.entries if not _is_dense(e)]
                adapter.report.entries[:] = done + other.report.entries
            asked, used = str(int(adapter.config.bits)), str(bits)
            change = {"what": "bits", "asked": asked, "used": used, "reason": str(error)}
            adapter.report.substitutions += [change, *other.report.substitutions]
            self.stats["recovered_errors"] += 1
            return out
        raise error

    @_check.arguments(
        layer=_check.module,
        layer_name=_check.text,
        quantization_fn=_check.function,
        strict=_check.flag,
    )
    def quantize_layer_safe(
        self,
        layer: nn.Module,
        layer_name: str,
        quantization_fn: Callable[[nn.Module], nn.Module],
        *,
        strict: bool = False,
    ) -> nn.Module:
        """``quantization_fn(layer)``, or `layer` itself, with a warning, if that fails.

        strict  True: the failure is raised"""
        try:
            out = quantization_fn(layer)
        except Exception as error:
            self._note_failure(error)
            operation = f"Layer Quantization: {layer_name}"
            facts = {"quantization_bits": int(self.config.bits)}
            logger.error("%s", format_error_message(error, self._context(operation, **facts)))
            if detect_oom_error(error, self.device):
                free_memory(self.device)
            if strict:
                raise
            _check.warn(f"layer '{layer_name}' stays as it is: {error}")
            return layer
        self.stats["successful_quantizations"] += 1
        return out

    # ------------------------------------------------------------------ files

    @_check.arguments(model=_check.module, save_path=_check.path, quantization_adapter=_ADAPTER)
    def save_quantized_model_safe(
        self,
        model: nn.Module,
        save_path: str | os.PathLike,
        quantization_adapter: QuantizationAdapter,
        **kwargs: Any,
    ) -> None:
        """``quantization_adapter.save_quantized_model``, in two tries where memory is short."""
        with error_handler(self._context("Save Quantized Model")):
            self._attempts(
                2, lambda: quantization_adapter.save_quantized_model(model, save_path, **kwargs)
            )

    @_check.arguments(
        model_path=_check.source,
        quantization_adapter=_ADAPTER,
        device=_check.optional(_check.device),
    )
    def load_quantized_model_safe(
        self,
        model_path: str | os.PathLike,
        model_class: Any,
        quantization_adapter: QuantizationAdapter,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """``quantization_adapter.load_quantized_model``, in two tries where memory is short.

        model_class  the model's config, as that function takes it
        device       where the model shall lie in the end; files are always mapped, not read whole
        """
        with error_handler(self._context("Load Quantized Model")):
            model = self._attempts(
                2,
                lambda: quantization_adapter.load_quantized_model(
                    model_path, model_class, **kwargs
                ),
            )
            return model if device is None else model.to(torch.device(device))

    # ------------------------------------------------------------------ measuring

    @_check.arguments(
        model=_check.module,
        input_shape=_check.is_a((tuple, list), "a tuple of sizes"),
        quantization_adapter=_check.optional(_ADAPTER),
        make_input=_check.optional(_check.function),
    )
    def benchmark_quantization_safe(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        quantization_adapter: QuantizationAdapter | None = None,
        num_warmup: int = 5,
        num_runs: int = 20,
        *,
        make_input: Callable[[], torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """Times ``model(input)`` without gradients; never raises for what the model does.

        make_input  the input; default: normally distributed values of `input_shape`, in the dtype
                    of the model's first floating-point parameter

        ``status`` "success" or "failed", ``error`` and ``error_type`` ("OOM" or the class),
        ``timings`` in seconds, ``mean_ms``, ``std_ms``, ``min_ms``, ``max_ms``. The device is
        waited for before and after each run, and inputs are made before the clock starts.
        """
        where = "benchmark_quantization_safe"
        runs = _check.integer(where, "num_runs", num_runs)
        warmup = _check.integer(where, "num_warmup", num_warmup)
        if runs < 1 or warmup < 0:
            raise ConfigError(f"{where}: num_runs is {runs}, num_warmup {warmup}, expected >= 1, 0")
        results: dict[str, Any] = {"status": "failed", "error": None, "timings": []}
        make = make_input or _random_input(model, input_shape)
        try:
            timings = [_timed_call(model, make()) for _ in range(warmup + runs)][warmup:]
        except Exception as error:
            oom = detect_oom_error(error, self.device)
            results |= {"error": str(error), "error_type": "OOM" if oom else type(error).__name__}
            logger.error("%s", format_error_message(error, self._context("Quantization Benchmark")))
            if oom:
                self.stats["oom_errors"] += 1
                free_memory(self.device)
            return results
        numbers = {
            "mean_ms": statistics.fmean(timings),
            "std_ms": statistics.pstdev(timings),
            "min_ms": min(timings),
            "max_ms": max(timings),
        }
        results |= {name: 1000 * seconds for name, seconds in numbers.items()}
        return results | {"status": "success", "timings": timings}

    def get_statistics(self) -> dict[str, Any]:
        """``stats`` with ``success_rate`` (0 before the first try) and ``current_memory``."""
        good, bad = (self.stats[f"{kind}_quantizations"] for kind in ("successful", "failed"))
        rate = good / (good + bad) if good + bad else 0.0
        memory = get_memory_info(self.device)
        return {**self.stats, "success_rate": rate, "current_memory": memory}


def _random_input(model: nn.Module, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if first is None else first.dtype
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return lambda: torch.randn(shape, device=device).to(dtype)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _timed_call(model: nn.Module, value: torch.Tensor) -> float:
    with torch.no_grad():
        _wait(value.device)
        start = time.perf_counter()
        model(value)
        _wait(value.device)
        return time.perf_counter() - start


@_check.arguments(model=_check.module)
def memory_usage(model: nn.Module) -> dict[str, float]:
    """Bytes of a model by kind, and bytes per parameter of its packed layers; tied tensors once."""
    packed = [m for m in model.modules() if isinstance(m, PackedWeight)]
    own = {id(t): tensor_bytes(t) for m in packed for t in m._buffers_packed}
    tensors = {id(t): tensor_bytes(t) for t in (*model.parameters(), *model.buffers())}
    total = sum(tensors.values())
    quantized = sum(size for key, size in own.items() if key in tensors)
    values = sum(m._rows * m._cols for m in {id(m.codes): m for m in packed}.values())
    return {
        "total_bytes": total,
        "quantized_bytes": quantized,
        "dense_bytes": total - quantized,
        "bytes_per_quantized_parameter": quantized / values if values else 0.0,
    }


class SafeQuantizationAdapter(QuantizationAdapter):
    """An adapter through a QuantizationErrorHandler; ``base_adapter`` does the work."""

    def __init__(self, base_adapter: QuantizationAdapter, handler: QuantizationErrorHandler):
        self.base_adapter, self.error_handler = base_adapter, handler
        super().__init__(base_adapter.backend, base_adapter.config)
        self.report = base_adapter.report

    def _validate_backend_support(self) -> None:
        self.base_adapter._validate_backend_support()

    def create_quantized_linear(
        self, in_features: int, out_features: int, bias: bool = True
    ) -> nn.Module:
        """``base_adapter.create_quantized_linear``."""
        return self.base_adapter.create_quantized_linear(in_features, out_features, bias)

    def quantize_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """kwargs  ``batch_size`` and ``lower_bits`` of quantize_model_safe"""
        return self.error_handler.quantize_model_safe(model, self.base_adapter, **kwargs)

    def prepare_model_for_training(self, model: nn.Module) -> nn.Module:
        """``base_adapter.prepare_model_for_training``."""
        return self.base_adapter.prepare_model_for_training(model)

    def save_quantized_model(
        self, model: nn.Module, save_path: str | os.PathLike, **kwargs: Any
    ) -> None:
        """``base_adapter.save_quantized_model``, in two tries where memory is short.

        kwargs  those of the base adapter"""
        handler = self.error_handler
        handler.save_quantized_model_safe(model, save_path, self.base_adapter, **kwargs)

    def load_quantized_model(
        self, model_path: str | os.PathLike, model_config: Any = None, **kwargs: Any
    ) -> nn.Module:
        """kwargs  those of the base adapter, and ``device``"""
        handler = self.error_handler
        return handler.load_quantized_model_safe(
            model_path, model_config, self.base_adapter, **kwargs
        )

    def get_memory_usage(self, model: nn.Module) -> dict[str, float]:
        """Bytes of a model: total, quantized, dense, and per quantized parameter."""
        return memory_usage(model)

    def get_statistics(self) -> dict[str, Any]:
        """Of the error handler."""
        return self.error_handler.get_statistics()


def create_safe_quantization_adapter(
    backend: Backend | str, config: QuantizationConfig, base_adapter: QuantizationAdapter
) -> SafeQuantizationAdapter:
    """`base_adapter` with error handling; `backend` and `config` are for its reports."""
    where = "create_safe_quantization_adapter"
    _check.instance(
        where, "base_adapter", base_adapter, QuantizationAdapter, "a QuantizationAdapter"
    )
    return SafeQuantizationAdapter(base_adapter, QuantizationErrorHandler(backend, config))


__all__ = [
    "QuantizationErrorHandler",
    "SafeQuantizationAdapter",
    "create_safe_quantization_adapter",
    "memory_usage",
]
