"""The names that earlier programs import, their order of arguments and their attributes."""

import copy
import inspect
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import quantization_wrapper
from conftest import EXTENDED, hqq, nf4, tiny_llama
from quantal import create_quantization_adapter
from quantal.linear import PackedLinear
from quantization_wrapper import (
    BNBLinear4bit,
    BNBLinear8bit,
    HQQLinearWrapper,
    MLXLinearWrapper,
    MLXModelWrapper,
    QuantizationConfig,
    QuantizedLinear,
)

NAMES = """QuantizationMethod QuantizationConfig QuantizedLinear QuantizationAdapter
BitsAndBytesAdapter HQQAdapter MLXAdapter FallbackAdapter create_quantization_adapter
validate_quantization_config get_recommended_config replace_linear_with_quantized QuantoAdapter
BNBLinear4bit BNBLinear8bit HQQLinearWrapper MLXLinearWrapper MLXModelWrapper Backend"""


def test_module_has_every_name():
    assert set(NAMES.split()) <= set(quantization_wrapper.__all__)
    for name in quantization_wrapper.__all__:
        assert hasattr(quantization_wrapper, name), name


LAYERS = [
    (BNBLinear4bit, nf4(), 4, "bnb_module"),
    (BNBLinear8bit, nf4(), 8, "bnb_module"),
    (HQQLinearWrapper, hqq(3), 3, "hqq_module"),
    (MLXLinearWrapper, QuantizationConfig("mlx_int8", compute_dtype="float32"), 8, None),
    (MLXLinearWrapper, QuantizationConfig(compute_dtype="float32"), 4, None),
]


@pytest.mark.parametrize(
    "cls, config, bits, last", LAYERS, ids=lambda v: getattr(v, "__name__", None)
)
def test_layers_are_quantal_s_own(cls, config, bits, last):
    order = ["in_features", "out_features", "bias", "config", *([last] if last else [])]
    assert list(inspect.signature(cls).parameters) == order
    layer = cls(128, 64, True, config, *([None] if last else []))
    assert isinstance(layer, QuantizedLinear) and isinstance(layer, nn.Linear)
    assert layer.layer is layer and layer.bits == bits
    torch.manual_seed(0)
    weight, x = torch.randn(64, 128), torch.randn(3, 128)
    layer.quantize_weights(weight)
    values = layer.dequantize_weights()
    assert 0 < (values - weight).norm() / weight.norm() < 0.3
    expected = x @ values.T + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is cls and torch.equal(twin.dequantize_weights(), values)
    assert cls(64, 64).bias is not None and cls(64, 64, False).bias is None


def test_attributes_of_single_layers():
    wrapper = HQQLinearWrapper(64, 64)
    assert wrapper.linear_layer is wrapper
    mlx = MLXLinearWrapper(64, 64)
    assert not mlx.quantized
    mlx.quantize_weights(torch.randn(64, 64))
    assert mlx.quantized


def test_layers_of_adapters_are_recognized():
    forms = {
        BNBLinear4bit: "bnb_nf4",
        BNBLinear8bit: "bnb_int8",
        HQQLinearWrapper: "hqq",
        MLXLinearWrapper: "mlx_int4",
    }
    layers = {}
    for cls, method in forms.items():
        config = QuantizationConfig(method, backend_options=EXTENDED)
        layers[cls] = create_quantization_adapter("cpu", config).create_quantized_linear(64, 64)
    for cls in forms:
        assert [isinstance(layer, cls) for layer in layers.values()] == [c is cls for c in forms]
        assert not isinstance(nn.Linear(4, 4), cls) and not isinstance(None, cls)
    assert all(isinstance(layer, PackedLinear) for layer in layers.values())


def test_mlx_model_wrapper(tmp_path, tokens):
    config = QuantizationConfig("mlx_int4", compute_dtype="float32")
    wrapper = MLXModelWrapper(tiny_llama(), config)
    assert wrapper.mlx_model is wrapper.pytorch_model
    logits = wrapper(tokens).logits
    assert torch.equal(logits, wrapper.pytorch_model(tokens).logits)
    wrapper.save_mlx(tmp_path / "m")
    adapter = create_quantization_adapter("mlx", config)
    again = adapter.load_quantized_model(tmp_path / "m")
    assert torch.equal(again(tokens).logits, logits)
    with pytest.raises(NotImplementedError):
        MLXModelWrapper(tiny_llama(), nf4(backend_options={}))


def test_the_library_prints_nothing():
    code = """
import torch, warnings
warnings.simplefilter("ignore")
from torch import nn
from backend_manager import BackendManager
from imports import get_module, validate_imports
from quantization_wrapper import *
manager = BackendManager("cpu")
config = get_recommended_config("cpu", 70.0, 1.0)
validate_quantization_config(config, "mps", nn.Linear(3, 5))
for method in QuantizationMethod:
    create_quantization_adapter("cpu", QuantizationConfig(method)).quantize_model(nn.Linear(64, 64))
get_module("mlx", "cpu"); validate_imports(["bitsandbytes", "hqq"], "cpu")
from quantal.error_handling import ResourceMonitor, error_handler, ErrorContext
ResourceMonitor(memory_threshold=0.0).check_resources()
with error_handler(ErrorContext("x"), reraise=False):
    raise RuntimeError("out of memory")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    handlers = logging.getLogger("quantal").handlers
    assert any(isinstance(h, logging.NullHandler) for h in handlers)


def test_adapters_of_the_library_may_be_subclassed(model):
    class Counting(quantization_wrapper.HQQAdapter):
        layers = 0

        def quantize_linear(self, linear, choice):
            self.layers += 1
            return super().quantize_linear(linear, choice)

    adapter = Counting("cpu", hqq())
    adapter.quantize_model(model)
    assert adapter.layers == 14
