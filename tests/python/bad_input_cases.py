"""Public functions and classes with one valid call each, for test_bad_input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import imports
import quantal
import quantization_wrapper as wrapper
from conftest import hqq
from quantal import error_handling, model_loader, testing
from quantal import quantization_error_handler as safe
from quantal.linear import PackedLinear

#: Values that are wrong almost everywhere, by name.
WRONG: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "true": lambda: True,
    "zero": lambda: 0,
    "negative": lambda: -3,
    "huge": lambda: 10**30,
    "real": lambda: 0.5,
    "nan": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "text": lambda: "no such thing",
    "empty": lambda: "",
    "bytes": lambda: b"x",
    "list": lambda: [],
    "dict": lambda: {},
    "object": object,
    "class": lambda: int,
    "tensor": lambda: torch.zeros(0),
    "module": lambda: nn.Linear(2, 2),
}


@dataclasses.dataclass
class Call:
    """A call that succeeds."""

    run: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64))


def packed() -> PackedLinear:
    return PackedLinear.from_linear(dense()[0], hqq(skip_modules=[]))


def adapter() -> Any:
    return quantal.create_quantization_adapter("cpu", hqq())


class Own(quantal.QuantizationAdapter):
    def create_quantized_linear(self, in_features, out_features, bias=True):
        return nn.Linear(in_features, out_features, bias)

    def quantize_model(self, model, **kwargs):
        return model


def handler() -> Any:
    return safe.QuantizationErrorHandler("cpu", hqq(), False)


def context() -> Any:
    return error_handling.ErrorContext("x")


SIZES = {"in_features": 64, "out_features": 64}


def packed_parts() -> dict[str, Any]:
    layer = packed()
    buffers = {"codes": layer.codes, "stats": layer.stats, "shared": layer.shared}
    return {"spec": list(layer._spec), **buffers}


def method(make: Callable[[], Any], name: str) -> Callable[..., Any]:
    """A method of a new object."""
    return lambda **arguments: getattr(make(), name)(**arguments)


def cases(folder: str, gguf: str, free: str) -> dict[str, Call]:
    """folder: a saved quantized model; gguf: a GGUF file; free: where nothing is yet"""
    out: dict[str, Call] = {}

    def add(name: str, run: Callable[..., Any], arguments=dict) -> None:
        assert name not in out, name
        out[name] = Call(run, arguments if callable(arguments) else lambda: dict(arguments))

    module = lambda: {"model": dense()}  # noqa: E731

    # enums and managers
    add("Backend", lambda value: quantal.Backend(value), {"value": "cpu"})
    add("QuantizationMethod", lambda value: quantal.QuantizationMethod(value), {"value": "hqq"})
    manager = {"backend": "cpu", "verbose": False}
    add("BackendManager", quantal.BackendManager, manager)
    add("BackendManager.from_env", quantal.BackendManager.from_env, {"verbose": False})
    add("get_backend_manager", quantal.get_backend_manager, manager)
    add("get_device", quantal.get_device, {"backend": "cpu"})
    add("detect_backend", quantal.detect_backend)
    new = lambda: quantal.BackendManager("cpu", False)  # noqa: E731
    for name in ("describe", "get_distributed_backend", "get_memory_info"):
        add(f"BackendManager.{name}", method(new, name))
    add("BackendManager.supports_quantization", method(new, "supports_quantization"), {"bits": 8})
    add("BackendManager.get_dtype", method(new, "get_dtype"), {"prefer_bfloat16": True})
    sizes = {"model_size_b": 7.0}
    add("BackendManager.validate_model_size", method(new, "validate_model_size"), sizes)
    batch = {**sizes, "sequence_length": 128}
    add("BackendManager.get_optimal_batch_size", method(new, "get_optimal_batch_size"), batch)

    # configuration
    config = {f.name: None for f in dataclasses.fields(quantal.QuantizationConfig)}
    config |= {"method": "hqq", "skip_modules": [], "layer_configs": {}, "backend_options": {}}
    add("QuantizationConfig", quantal.QuantizationConfig, config)
    add("QuantizationConfig.from_dict", quantal.QuantizationConfig.from_dict, {"values": {}})
    add("QuantizationConfig.from_json", quantal.QuantizationConfig.from_json, {"text": "{}"})
    add("QuantizationConfig.to_dict", method(hqq, "to_dict"))
    add("QuantizationConfig.to_json", method(hqq, "to_json"))
    check = {"config": hqq(), "backend": "cpu", "model": None}
    add("validate_quantization_config", quantal.validate_quantization_config, check)
    wanted = {"backend": "cpu", "model_size_b": 7.0, "available_memory_gb": 16.0}
    add("get_recommended_config", quantal.get_recommended_config, wanted)
    add("available_methods", quantal.available_methods)
    add("compatibility_matrix_markdown", quantal.compatibility_matrix_markdown)

    # adapters
    factory = {"backend": "cpu", "config": hqq(), "support": "extended", "fallback": "none"}
    add("create_quantization_adapter", quantal.create_quantization_adapter, factory)
    for cls in (
        quantal.BitsAndBytesAdapter,
        quantal.HQQAdapter,
        quantal.MLXAdapter,
        quantal.QuantoAdapter,
        quantal.FallbackAdapter,
    ):
        backend = "cuda" if cls is quantal.BitsAndBytesAdapter else "mps"
        add(cls.__name__, cls, {"backend": backend, "config": None})
    add("QuantizationAdapter", Own, {"backend": "cpu", "config": hqq()})
    linear = {**SIZES, "bias": True}
    for make, of in ((adapter, "adapter"), (lambda: quantal.FallbackAdapter("cpu"), "fallback")):
        add(f"{of}.create_quantized_linear", method(make, "create_quantized_linear"), linear)
        add(f"{of}.quantize_model", method(make, "quantize_model"), module)
        prepare = method(make, "prepare_model_for_training")
        add(f"{of}.prepare_model_for_training", prepare, module)
        save = {"save_path": free, "layout": "", "max_shard_size": None, "overwrite": True}
        add(
            f"{of}.save_quantized_model",
            method(make, "save_quantized_model"),
            lambda save=save: module() | save | {"tokenizer": None},
        )
    load = {"model_path": folder, "model_config": None, "model": None, "strict": True}
    add("adapter.load_quantized_model", method(adapter, "load_quantized_model"), load)
    add("adapter.layer_rules", method(adapter, "layer_rules"), {"skip_modules": None})
    add("register_adapter", quantal.register_adapter, {"name": "own", "cls": Own, "replace": True})
    add("registered_adapters", quantal.registered_adapters)
    walk = {"skip_modules": None, "progress": False}
    add(
        "replace_linear_with_quantized",
        quantal.replace_linear_with_quantized,
        lambda: module() | {"adapter": adapter()} | walk,
    )
    training = {"use_gradient_checkpointing": True, "use_reentrant": False}
    training |= {"norms_in_float32": False}
    add(
        "prepare_model_for_training",
        quantal.prepare_model_for_training,
        lambda: module() | training,
    )
    report = {"name": "a", "method": "dense", "reason": "", "parameters": 1}
    report |= {"bytes_before": 4, "bytes_after": 4, "relative_error": 0.0}
    add("Report.add", method(quantal.Report, "add"), report)
    add("Report", quantal.Report, {"decision": None})
    for name in ("to_text", "to_json", "to_dict"):
        add(f"Report.{name}", method(quantal.Report, name))

    # layers
    layer = {**SIZES, "bias": True, "config": hqq()}
    extra = {"spec": None, "compute_dtype": None, "bias_dtype": None, "device": None}
    add("QuantizedLinear", quantal.QuantizedLinear, layer)
    add("PackedLinear", quantal.PackedLinear, layer | extra)
    for cls in (wrapper.BNBLinear4bit, wrapper.BNBLinear8bit):
        add(cls.__name__, cls, layer | {"bnb_module": None})
    add("HQQLinearWrapper", wrapper.HQQLinearWrapper, layer | {"hqq_module": None})
    add("MLXLinearWrapper", wrapper.MLXLinearWrapper, layer)
    mlx = quantal.QuantizationConfig("mlx_int4")
    add(
        "MLXModelWrapper",
        wrapper.MLXModelWrapper,
        lambda: {"pytorch_model": dense(), "config": mlx},
    )
    make_from = {"config": None, "compute_dtype": None}
    add(
        "QuantizedLinear.from_linear",
        quantal.QuantizedLinear.from_linear,
        lambda: {"linear": dense()[0], "options": hqq(skip_modules=[])} | make_from,
    )
    add(
        "QuantizedLinear.from_packed",
        quantal.QuantizedLinear.from_packed,
        lambda: packed_parts() | {"bias": None} | make_from,
    )
    upstream = lambda: {"tensors": packed().to_upstream("a."), "dialect": "hqq"}  # noqa: E731
    add(
        "QuantizedLinear.from_upstream",
        quantal.QuantizedLinear.from_upstream,
        lambda: upstream() | {"prefix": "a.", "settings": "{}", "weight_shape": ()},
    )
    add("QuantizedLinear.to_upstream", method(packed, "to_upstream"), {"prefix": "a."})
    weights = lambda: {"weights": torch.zeros(64, 64)}  # noqa: E731
    add("QuantizedLinear.quantize_weights", method(packed, "quantize_weights"), weights)
    add("QuantizedLinear.dequantize_weights", method(packed, "dequantize_weights"), {"dtype": None})
    add("PackedLinear.relative_error", method(packed, "relative_error"), weights)
    add("PackedLinear.forward", method(packed, "forward"), lambda: {"x": torch.zeros(2, 64)})
    embedding = {"num_embeddings": 64, "embedding_dim": 64, "padding_idx": None}
    embedding |= {"compute_dtype": None, "device": None}
    add(
        "QuantizedEmbedding",
        quantal.QuantizedEmbedding,
        lambda: embedding | {"spec": list(packed()._spec)},
    )
    table = lambda: quantal.QuantizedEmbedding.from_packed(**packed_parts())  # noqa: E731
    add(
        "QuantizedEmbedding.from_packed",
        quantal.QuantizedEmbedding.from_packed,
        lambda: packed_parts() | {"padding_idx": None, "compute_dtype": None},
    )
    add(
        "QuantizedEmbedding.forward",
        method(table, "forward"),
        lambda: {"input": torch.zeros(2, dtype=torch.long)},
    )
    add("QuantizedEmbedding.logits", method(table, "logits"), lambda: {"x": torch.zeros(2, 64)})
    add(
        "functional.linear",
        quantal.functional.linear,
        lambda: {"x": torch.zeros(2, 64), "weight": packed(), "bias": None, "out": None},
    )
    add(
        "functional.matmul",
        quantal.functional.matmul,
        lambda: {"x": torch.zeros(2, 64), "weight": packed(), "out": None},
    )

    heads = {"q": torch.zeros(1, 2, 3, 4), "k": torch.zeros(1, 2, 3, 4)}
    heads |= {"v": torch.zeros(1, 2, 3, 4), "causal": False, "scale": None, "mask": None}
    add("functional.attention", quantal.functional.attention, heads)
    add("register_attention", quantal.register_attention, {})

    # files
    add("inspect", quantal.inspect, {"path": folder, "all_tensors": False})
    add("file_layouts", quantal.file_layouts, {"model": "hqq"})
    add("model_digest", quantal.model_digest, module)
    add("load_gguf", quantal.load_gguf, {"path": gguf, "dtype": torch.float32})
    load = {"path": folder, "model_config": None, "config": None, "model": None, "strict": True}
    load |= {"attn_implementation": "auto"}
    add("load_model", quantal.load_model, load)
    save = {"path": free, "layout": "", "max_shard_bytes": 0, "overwrite": True}
    save |= {"tokenizer": None, "config_entries": None}
    add("save_model", quantal.save_model, lambda: module() | save)
    convert = {"path": folder, "to_path": free, "to": "mlx", "plan": True, "progress": False}
    names = "bits group_size mode quant_type double_quant axis value_dtype dense_dtype"
    convert |= dict.fromkeys(names.split()) | {"max_shard_size": None, "layout": ""}
    convert |= {"skip_modules": ["lm_head"], "lossless_only": False, "overwrite": False}
    add("convert", quantal.convert, convert)
    planned = {"model": folder, "backend": "cpu", "memory_gb": None, "world_size": 1}
    planned |= {"mode": "qlora", "config": None, "support": None, "fallback": None}
    planned |= {"batch_size": 1, "sequence_length": 64, "attention": "sdpa", "lora_rank": 8}
    planned |= {"lora_targets": None, "lora_dropout": 0.0, "lora_dtype": "float32"}
    planned |= {"optimizer": "adamw", "gradient_checkpointing": True, "loss_chunk": 0}
    planned |= {"norms_in_float32": False, "cpu_offload": False}
    add("plan", quantal.plan, planned)
    add("dequantize_model", quantal.dequantize_model, lambda: module() | {"dtype": None})
    add("testing.options", testing.options, {"method": "hqq"})

    # packages
    registry = imports.ImportRegistry
    entry = {"name": "a", "import_func": dict, "fallback": None, "validator": None}
    entry |= {"backends": None, "package": None}
    add("ImportRegistry.register", method(registry, "register"), entry)
    add("ImportRegistry.names", method(registry, "names"))
    for name in ("get", "check_availability"):
        add(f"ImportRegistry.{name}", method(registry, name), {"name": "a", "backend": "cpu"})
    add("get_module", imports.get_module, {"name": "peft", "backend": "cpu"})
    availability = {"name": "peft", "backend": "cpu"}
    add("check_import_availability", imports.check_import_availability, availability)
    several = {"required_imports": ["peft"], "backend": "cpu"}
    add("validate_imports", imports.validate_imports, several)
    add("report_import_status", imports.report_import_status, {"backend": "cpu"})

    # failures
    add("get_memory_info", error_handling.get_memory_info, {"device": "cpu"})
    oom = {"exception": ValueError("x"), "device": "cpu"}
    add("detect_oom_error", error_handling.detect_oom_error, oom)
    advice = lambda: {"context": context(), "memory_info": {}}  # noqa: E731
    add("suggest_memory_optimization", error_handling.suggest_memory_optimization, advice)
    add(
        "format_error_message",
        error_handling.format_error_message,
        lambda: {"exception": ValueError("x"), "context": context(), "include_traceback": False},
    )
    add(
        "error_handler",
        lambda **arguments: error_handling.error_handler(**arguments).__enter__(),
        lambda: {"context": context(), "reraise": True},
    )
    recovery = {"max_retries": 2, "backoff_factor": 0.0, "recover_fn": None}
    recovery |= {"retry_if": lambda error: False}
    add("with_recovery", error_handling.with_recovery, recovery)
    monitor = {"device": "cpu", "memory_threshold": 0.9, "check_interval": 1.0}
    add("ResourceMonitor", error_handling.ResourceMonitor, monitor)
    monitored = method(error_handling.ResourceMonitor, "check_resources")
    add("ResourceMonitor.check_resources", monitored)
    add("validate_configuration", error_handling.validate_configuration, {"config": {}})
    for name, good in {
        "batch_size": 8,
        "quantization_bits": 4,
        "dtype": "float16",
        "backend": "cpu",
        "gradient_checkpointing": True,
        "model_size": 7,
    }.items():
        add(
            f"validate_configuration {name}",
            lambda value, name=name: error_handling.validate_configuration({name: value}),
            {"value": good},
        )
    module_import = {"module_name": "json", "fallback": None, "install_cmd": None}
    add("handle_import_error", error_handling.handle_import_error, module_import)
    failure = {"exception": ValueError("x"), "backend": "cuda", "fallback_backend": "cpu"}
    add("handle_backend_error", error_handling.handle_backend_error, failure)
    add(
        "QuantizationErrorHandler",
        safe.QuantizationErrorHandler,
        {"backend": "cpu", "config": hqq(), "enable_monitoring": False},
    )
    add("QuantizationErrorHandler.get_statistics", method(handler, "get_statistics"))
    add(
        "QuantizationErrorHandler.quantize_model_safe",
        method(handler, "quantize_model_safe"),
        lambda: (
            module() | {"quantization_adapter": adapter(), "batch_size": 1, "lower_bits": False}
        ),
    )
    add(
        "QuantizationErrorHandler.quantize_layer_safe",
        method(handler, "quantize_layer_safe"),
        lambda: {
            "layer": dense()[0],
            "layer_name": "a",
            "quantization_fn": lambda layer: layer,
            "strict": False,
        },
    )
    add(
        "QuantizationErrorHandler.save_quantized_model_safe",
        method(handler, "save_quantized_model_safe"),
        lambda: (
            module() | {"save_path": free, "quantization_adapter": adapter(), "overwrite": True}
        ),
    )
    add(
        "QuantizationErrorHandler.load_quantized_model_safe",
        method(handler, "load_quantized_model_safe"),
        lambda: {
            "model_path": folder,
            "model_class": None,
            "quantization_adapter": adapter(),
            "device": "cpu",
        },
    )
    bench = {"input_shape": (1, 64), "num_warmup": 0, "num_runs": 1, "make_input": None}
    add(
        "QuantizationErrorHandler.benchmark_quantization_safe",
        method(handler, "benchmark_quantization_safe"),
        lambda: module() | bench | {"quantization_adapter": None},
    )
    add(
        "create_safe_quantization_adapter",
        safe.create_safe_quantization_adapter,
        lambda: {"backend": "cpu", "config": hqq(), "base_adapter": adapter()},
    )
    add("memory_usage", safe.memory_usage, module)

    # loader
    add("LoadingStrategy", lambda value: model_loader.LoadingStrategy(value), {"value": "full"})
    loading = {f.name: f.default for f in dataclasses.fields(model_loader.ModelLoadingConfig)}
    loading |= {"model_name": folder, "backend": "cpu", "skip_modules": ["lm_head"]}
    add("ModelLoadingConfig", model_loader.ModelLoadingConfig, loading)
    for name in ("StandardModelLoader", "CPUModelLoader"):
        settings = lambda: model_loader.ModelLoadingConfig(folder, "cpu")  # noqa: E731
        add(name, getattr(model_loader, name), lambda settings=settings: {"config": settings()})
    add(
        "ModelLoaderFactory.create_loader",
        model_loader.ModelLoaderFactory.create_loader,
        lambda: {
            "config": model_loader.ModelLoadingConfig(folder, "cpu"),
            "backend_manager": None,
        },
    )
    size = {"model_name": "llama-7b", "backend": "cpu", "available_memory_gb": 8.0}
    add("get_recommended_loader_config", model_loader.get_recommended_loader_config, size)
    add("size_in_name", model_loader.size_in_name, {"model_name": "llama-7b"})
    add("model_size_b", model_loader.model_size_b, {"model_name": folder})
    return out
