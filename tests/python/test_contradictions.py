"""Where the earlier tool's documents contradict each other or its code: what quantal chose."""

import dataclasses
import pathlib
import warnings

import pytest
import torch
from torch import nn

import quantal
import quantization_wrapper
from conftest import GOLDEN, hqq
from imports import get_module
from quantal.model_loader import LoadingStrategy
from quantization_wrapper import (
    Backend,
    QuantizationAdapter,
    QuantizationConfig,
    QuantizedLinear,
    create_quantization_adapter,
    get_recommended_config,
    validate_quantization_config,
)


@pytest.mark.parametrize("backend", list(Backend))
def test_hqq_runs_on_every_backend_without_data(backend):
    """No calibration, no particular architecture."""
    adapter = create_quantization_adapter(backend, QuantizationConfig("hqq"))
    assert type(adapter).__name__ == "HQQAdapter"
    model = adapter.quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)))
    assert isinstance(model[0], QuantizedLinear) and isinstance(model[2], QuantizedLinear)


def test_double_quantization_is_on_by_default():
    config = QuantizationConfig("bnb_nf4")
    assert config.double_quant is True
    layer = create_quantization_adapter("cuda", config).create_quantized_linear(4096, 4096)
    plain = dataclasses.replace(config, double_quant=False)
    more = create_quantization_adapter("cuda", plain).create_quantized_linear(4096, 4096)
    assert layer.packed_bytes() < more.packed_bytes()


def test_mlx_models_may_be_safetensors():
    adapter = create_quantization_adapter("mlx", QuantizationConfig("mlx_int4"))
    adapter.load_quantized_model(GOLDEN / "checkpoints" / "mlx-4bit")
    assert adapter.load_report.layout == "mlx mlx-lm"
    folder = pathlib.Path(quantal.__file__).parent
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    assert "not yet supported for MLX" not in sources


def test_sequential_loading_is_low_memory():
    assert LoadingStrategy("sequential") is LoadingStrategy.LOW_MEMORY


@pytest.mark.parametrize("method", ["hqq", "quanto_int2", "quanto_int4", "quanto_int8"])
def test_cpus_have_hqq_and_quanto(method):
    config = QuantizationConfig(method, bits=8 if method == "hqq" else None)
    assert validate_quantization_config(config, "cpu") == []
    assert not create_quantization_adapter("cpu", config).report.fallback


@pytest.mark.parametrize(
    "method, backend",
    [("bnb_nf4", "cpu"), ("bnb_int8", "cpu"), ("bnb_nf4", "mps"), ("bnb_int8", "mps")]
    + [(f"quanto_int{bits}", "mlx") for bits in (2, 4, 8)],
)
def test_pairs_that_the_documents_lack_run_on_request(method, backend):
    adapter = create_quantization_adapter(
        backend, QuantizationConfig(method, compute_dtype="float32"), support="extended"
    )
    model = adapter.quantize_model(nn.Sequential(nn.Linear(128, 64)))
    x = torch.randn(2, 128)
    weight = model[0].dequantize_weights(torch.float32)
    assert torch.allclose(model(x), x @ weight.T + model[0].bias, atol=1e-4)


def test_recommendation_and_field_order_are_those_of_the_document():
    assert get_recommended_config("mps", 7.0, 16.0).method.name == "MLX_INT4"
    names = [field.name for field in dataclasses.fields(QuantizationConfig)]
    assert names[7:10] == ["skip_modules", "layer_configs", "backend_options"]


def test_three_methods_make_an_adapter():
    assert QuantizationAdapter.__abstractmethods__ <= {
        "create_quantized_linear",
        "quantize_model",
        "prepare_model_for_training",
    }


@pytest.mark.parametrize("module", ["quantization_wrapper", "backend_manager", "imports"])
def test_modules_have_two_paths(module):
    import importlib

    outer, inner = importlib.import_module(module), importlib.import_module(f"quantal.{module}")
    assert outer.__all__ and all(getattr(outer, n) is getattr(inner, n) for n in inner.__all__)
    assert quantization_wrapper.Backend is Backend


def test_messages_about_missing_packages_never_come_from_quantizing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("bnb_nf4", "bnb_int8", "hqq", "quanto_int8"):
            adapter = create_quantization_adapter("cuda", QuantizationConfig(method))
            adapter.quantize_model(nn.Sequential(nn.Linear(64, 64)))
        create_quantization_adapter("cpu", hqq()).create_quantized_linear(64, 64)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ImportError, match="bitsandbytes.nn is not avail"),
    ):
        _ = get_module("bitsandbytes", "cpu").nn
