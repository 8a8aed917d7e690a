"""Error handling: what counts as a lack of memory, retries, reports, counters."""

import builtins
import logging
import time

import pytest
import torch
from torch import nn

from conftest import hqq, tiny_llama
from quantal import ConfigError, QuantalError, create_quantization_adapter, error_handling
from quantal.adapters import QuantizationAdapter
from quantal.error_handling import (
    BackendError,
    ConfigurationError,
    ErrorContext,
    MemoryError,
    ResourceMonitor,
    detect_oom_error,
    error_handler,
    format_error_message,
    get_memory_info,
    handle_backend_error,
    handle_import_error,
    suggest_memory_optimization,
    validate_configuration,
    with_recovery,
)
from quantal.quantization_error_handler import (
    QuantizationErrorHandler,
    create_safe_quantization_adapter,
)

OOM = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 80 bytes")


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Seconds that the code asked to wait; nobody waits for them."""
    asked = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


@pytest.mark.parametrize(
    "error",
    [
        OOM,
        builtins.MemoryError(),
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("OOM"),
    ],
    ids=repr,
)
def test_lack_of_memory_is_found(error):
    assert detect_oom_error(error)
    wrapped = QuantalError("layer failed")
    wrapped.__cause__ = error
    assert detect_oom_error(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cannot load bloom-7b"),
        RuntimeError("no room for a broom"),
        ValueError("out of memory"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        FileNotFoundError("oom.safetensors"),
    ],
    ids=repr,
)
def test_other_failures_are_not(error):
    assert not detect_oom_error(error)


def test_a_real_failed_allocation_is_found():
    with pytest.raises((RuntimeError, builtins.MemoryError)) as error:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert detect_oom_error(error.value)


def test_causes_in_a_circle_end():
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert not detect_oom_error(first)


def test_exception_classes():
    assert issubclass(MemoryError, builtins.MemoryError) and issubclass(MemoryError, QuantalError)
    assert issubclass(ConfigurationError, ValueError) and issubclass(BackendError, RuntimeError)


def test_memory_info():
    info = get_memory_info()
    assert 0 < info["available_gb"] <= info["total_gb"]
    assert info["used_gb"] == pytest.approx(info["total_gb"] - info["available_gb"])
    assert 0 <= info["percent"] <= 100
    if not torch.cuda.is_available():
        assert get_memory_info("cuda") == {}
    with pytest.raises(TypeError):
        get_memory_info(None)


def test_report_of_a_failure():
    context = ErrorContext("Model Quantization", "cuda", 14.0, 8, 4, "cpu", {"layer": "a.b"})
    try:
        raise OOM
    except RuntimeError as error:
        text = format_error_message(error, context)
    lines = text.splitlines()
    assert lines[:3] == ["=" * 60, "ERROR: Model Quantization", "=" * 60]
    for line in (
        "Exception Type: RuntimeError",
        "Backend: cuda",
        "Device: cpu",
        "Model Size: 14.0GB",
        "Quantization: 8-bit",
        "Batch Size: 4",
        "layer: a.b",
        "Memory Status:",
        "Suggested Solutions:",
        "  1. Reduce the batch size from 4 to 2",
        "Traceback:",
    ):
        assert line in lines, line
    assert "test_report_of_a_failure" in text
    shorter = format_error_message(ValueError("x"), ErrorContext("y"), include_traceback=False)
    assert "Traceback" not in shorter and "Suggested" not in shorter
    with pytest.raises(TypeError, match="ErrorContext"):
        format_error_message(OOM, "context")


def test_suggestions_follow_the_facts():
    few = suggest_memory_optimization(ErrorContext("x"), {})
    many = suggest_memory_optimization(
        ErrorContext("x", "cuda", 100.0, 16, 8), {"available_gb": 10.0}
    )
    assert not any("FSDP" in text or "batch" in text for text in few)
    assert "Use fewer bits (now 16): 8" in many
    assert any("FSDP (100.0 GB of weights, 10.0 GB available)" in text for text in many)
    assert not any(
        "fewer bits" in t
        for t in suggest_memory_optimization(ErrorContext("x", quantization_bits=4), {})
    )


def test_error_handler_logs_and_raises_again(caplog, capsys):
    with caplog.at_level(logging.ERROR, logger="quantal"):
        with pytest.raises(ValueError, match="broken"), error_handler(ErrorContext("Work")):
            raise ValueError("broken")
        with error_handler(ErrorContext("Work"), reraise=False):
            raise OOM
    assert caplog.text.count("ERROR: Work") == 2 and "Suggested Solutions" in caplog.text
    assert capsys.readouterr() == ("", "")


def test_retries_wait_longer_each_time_and_only_for_memory(waits):
    calls, recovered = [], []

    @with_recovery(max_retries=3, backoff_factor=2.0, recover_fn=recovered.append)
    def work(error):
        """Doc."""
        calls.append(error)
        raise error

    with pytest.raises(RuntimeError) as raised:
        work(OOM)
    assert raised.value is OOM and len(calls) == 3
    assert waits == [1.0, 2.0] and recovered == [OOM, OOM]
    with pytest.raises(ValueError):
        work(ValueError("bad shape"))
    assert len(calls) == 4 and len(waits) == 2
    assert work.__name__ == "work" and work.__doc__ == "Doc."


def test_retries_end_with_success(waits):
    outcomes = [OSError("busy"), 42]

    @with_recovery(2, retry_if=lambda error: isinstance(error, OSError))
    def work():
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert work() == 42 and waits == [1.0]


@pytest.mark.parametrize("arguments", [(0,), (-1,), (3, -1.0)])
def test_retries_need_sense(arguments):
    with pytest.raises(ConfigError, match="expected at least"):
        with_recovery(*arguments)
    for wrong in (None, "3", 1.5):
        with pytest.raises(TypeError):
            with_recovery(wrong)


def test_monitor_warns_once_per_level(monkeypatch, caplog):
    used = [0.5]
    monkeypatch.setattr(
        error_handling,
        "get_memory_info",
        lambda device: {"total_gb": 100.0, "available_gb": 100.0 * (1 - used[0])},
    )
    monitor = ResourceMonitor("cpu", memory_threshold=0.9, check_interval=0)
    assert monitor.check_resources() is None
    used[0] = 0.955
    assert monitor.check_resources() == "High memory usage detected on cpu: 95.5% used"
    assert monitor.check_resources() is None
    used[0] = 0.97
    assert "97.0%" in monitor.check_resources() and "97.0%" in caplog.text
    patient = ResourceMonitor(check_interval=1000.0)
    used[0] = 0.98
    assert patient.check_resources() is not None and patient.check_resources() is None


def test_remarks_about_a_run():
    assert validate_configuration({}) == []
    assert (
        validate_configuration({"batch_size": 4, "quantization_bits": 4, "dtype": "float16"}) == []
    )
    assert "256" in validate_configuration({"batch_size": 256})[0]
    assert "(3)" in validate_configuration({"quantization_bits": 3})[0]
    mps = {"dtype": torch.bfloat16, "backend": "mps"}
    assert validate_configuration(mps) == ["MPS backend doesn't support bfloat16"]
    assert len(validate_configuration({"model_size": 70})) == 1
    assert validate_configuration({"model_size": 70, "gradient_checkpointing": True}) == []
    with pytest.raises(TypeError):
        validate_configuration([])


def test_imports_with_a_fallback():
    assert handle_import_error("json").__name__ == "json"
    assert handle_import_error("no_such_module", fallback=lambda: 42) == 42
    with pytest.raises(ImportError, match="'no_such_module'.*\nInstall with: pip install it"):
        handle_import_error("no_such_module", install_cmd="pip install it")
    with pytest.raises(TypeError):
        handle_import_error(None)


def test_backends_with_a_fallback():
    assert handle_backend_error(OOM, "cuda", "CPU") == "cpu"
    with pytest.raises(BackendError, match="'mps' failed with no fallback.*use one of: cpu"):
        handle_backend_error(OOM, "mps")
    with pytest.raises(BackendError, match="no fallback available") as error:
        handle_backend_error(OOM, "cpu")
    assert "use one of" not in str(error.value) and error.value.__cause__ is OOM
    with pytest.raises(ValueError):
        handle_backend_error(OOM, "tpu")


# QuantizationErrorHandler


class Failing(QuantizationAdapter):
    """Quantizes with HQQ, after some failures."""

    def __init__(self, failures, config=None):
        super().__init__("cpu", config or hqq())
        self.base = create_quantization_adapter("cpu", self.config)
        self.failures, self.calls = list(failures), 0

    def create_quantized_linear(self, in_features, out_features, bias=True):
        return self.base.create_quantized_linear(in_features, out_features, bias)

    def quantize_model(self, model, **kwargs):
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return self.base.quantize_model(model, **kwargs)


@pytest.fixture
def handler():
    return QuantizationErrorHandler("cpu", hqq())


def test_success_is_counted(handler, model):
    adapter = create_quantization_adapter("cpu", hqq())
    assert handler.quantize_model_safe(model, adapter, batch_size=4) is model
    assert handler.stats["successful_quantizations"] == 1
    statistics = handler.get_statistics()
    assert statistics["success_rate"] == 1.0 and statistics["current_memory"]["total_gb"] > 0
    assert QuantizationErrorHandler("cpu", hqq()).get_statistics()["success_rate"] == 0.0


def test_memory_errors_are_tried_again(handler, model, waits):
    adapter = Failing([OOM, OOM])
    handler.quantize_model_safe(model, adapter)
    assert adapter.calls == 3 and waits == [1.0, 2.0]
    assert handler.stats == {
        "successful_quantizations": 1,
        "failed_quantizations": 0,
        "oom_errors": 2,
        "recovered_errors": 1,
    }


def test_other_errors_fail_at_once(handler, model, waits, caplog):
    adapter = Failing([ValueError("bad shape")] * 3)
    with pytest.raises(ValueError, match="bad shape"):
        handler.quantize_model_safe(model, adapter)
    assert adapter.calls == 1 and waits == [] and "ERROR: Model Quantization" in caplog.text
    assert handler.stats["failed_quantizations"] == 1 and handler.stats["oom_errors"] == 0
    assert handler.get_statistics()["success_rate"] == 0.0


def test_the_ladder_is_taken_on_request_only(handler):
    with pytest.raises(RuntimeError):
        handler.quantize_model_safe(tiny_llama(), Failing([OOM] * 3, hqq(8)))
    assert handler.stats["failed_quantizations"] == 1 and handler.stats["oom_errors"] == 3
    model, adapter = tiny_llama(), Failing([OOM] * 3, hqq(8))
    handler.quantize_model_safe(model, adapter, lower_bits=True)
    assert model.model.layers[0].mlp.up_proj.bits == 4
    change = adapter.report.substitutions[0]
    assert (change["what"], change["asked"], change["used"]) == ("bits", "8", "4")
    assert any(e["name"].endswith("up_proj") for e in adapter.report.entries)
    assert handler.stats["recovered_errors"] == 1
    with pytest.raises(RuntimeError):
        handler.quantize_model_safe(tiny_llama(), Failing([OOM] * 3, hqq(4)), lower_bits=True)


def test_layers(handler, caplog):
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    assert handler.quantize_layer_safe(layer, "a", lambda x: other) is other

    def fail(x):
        raise ValueError("not grouped")

    with pytest.warns(UserWarning, match="'a' stays as it is: not grouped"):
        assert handler.quantize_layer_safe(layer, "a", fail) is layer
    assert "ERROR: Layer Quantization: a" in caplog.text
    with pytest.raises(ValueError):
        handler.quantize_layer_safe(layer, "a", fail, strict=True)
    assert handler.stats["failed_quantizations"] == 2


@pytest.mark.parametrize("method", ["hqq", "bnb_nf4", "bnb_int8", "mlx_int4", "quanto_int8"])
def test_safe_adapter_saves_and_loads(method, tmp_path, tokens):
    config = hqq() if method == "hqq" else None
    if config is None:
        from quantal import QuantizationConfig

        options = {"support": "extended"}
        config = QuantizationConfig(method, compute_dtype="float32", backend_options=options)
    base = create_quantization_adapter("cpu", config)
    safe = create_safe_quantization_adapter("cpu", config, base)
    model = safe.quantize_model(tiny_llama(), batch_size=2)
    usage = safe.get_memory_usage(model)
    assert usage["total_bytes"] == usage["quantized_bytes"] + usage["dense_bytes"]
    assert 0.4 < usage["bytes_per_quantized_parameter"] < 1.3
    safe.save_quantized_model(model, tmp_path / "m")
    again = safe.load_quantized_model(tmp_path / "m", model.config, device="cpu")
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert safe.get_statistics()["successful_quantizations"] == 1
    assert safe.prepare_model_for_training(model) is model
    assert safe.create_quantized_linear(64, 64).in_features == 64
    with pytest.raises(QuantalError):
        safe.load_quantized_model(tmp_path / "nowhere")


def test_benchmark(handler):
    adapter = create_quantization_adapter("cpu", hqq())
    model = adapter.quantize_model(nn.Sequential(nn.Linear(64, 64)))
    result = handler.benchmark_quantization_safe(model, (2, 64), adapter, 1, 5)
    assert result["status"] == "success" and result["error"] is None
    assert len(result["timings"]) == 5
    assert 0 < result["min_ms"] <= result["mean_ms"] <= result["max_ms"]
    failed = handler.benchmark_quantization_safe(model, (2, 63), adapter, 0, 1)
    assert failed["status"] == "failed" and "63" in failed["error"]
    assert failed["error_type"] == "ShapeError" and failed["timings"] == []

    def full():
        raise OOM

    lacking = handler.benchmark_quantization_safe(model, (1,), adapter, make_input=full)
    assert lacking["error_type"] == "OOM"
    for wrong in ((0, 0), (-1, 1)):
        with pytest.raises(ConfigError):
            handler.benchmark_quantization_safe(model, (2, 64), adapter, *wrong)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="QuantizationConfig"):
        QuantizationErrorHandler("cpu", {})
    with pytest.raises(ValueError):
        QuantizationErrorHandler("tpu", hqq())
    with pytest.raises(TypeError, match="QuantizationAdapter"):
        create_safe_quantization_adapter("cpu", hqq(), None)
    assert QuantizationErrorHandler("cuda", hqq(), enable_monitoring=False).monitor is None
