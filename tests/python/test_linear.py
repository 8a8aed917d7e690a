"""The quantized layer as a module: weight view, state, copies, dtypes."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from conftest import CONFIGS, hqq, nf4
from quantal import (
    ConfigError,
    QuantizationConfig,
    QuantizedLinear,
    ShapeError,
    UnsupportedError,
)

#: 72 columns: groups of 64 and 128 cross rows.
SHAPES = [(48, 128), (64, 72), (128, 192)]


def make(config, rows=48, cols=128, bias=True, seed=0):
    torch.manual_seed(seed)
    dense = nn.Linear(cols, rows, bias=bias)
    return dense, QuantizedLinear.from_linear(dense, config)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_the_product_with_the_weight(config, shape):
    _, layer = make(config, *shape)
    for m in (1, 3, 70):
        x = torch.randn(m, shape[1])
        expected = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        bound = x.double().abs() @ layer.weight.double().abs().T * shape[1] ** 0.5 * 2**-20 + 1e-6
        assert ((layer(x).double() - expected).abs() <= bound).all()


def test_weight_is_close_to_the_original(config):
    dense, layer = make(config, 64, 72)
    weight = dense.weight.detach()
    error = (layer.dequantize_weights() - weight).norm() / weight.norm()
    assert 0 < error < (0.01 if layer.bits == 8 else 0.13)
    assert layer.relative_error(weight) == pytest.approx(float(error), rel=1e-3)


def test_shapes_of_inputs_and_dtypes():
    _, layer = make(hqq())
    assert layer(torch.randn(2, 3, 128)).shape == (2, 3, 48)
    assert layer(torch.randn(128)).shape == (48,)
    assert layer(torch.randn(0, 128)).shape == (0, 48)
    for dtype in (torch.float16, torch.bfloat16):
        assert layer(torch.randn(2, 128, dtype=dtype)).dtype is dtype


def test_weight_view_decodes_only_when_used(monkeypatch):
    from quantal import _ops

    _, layer = make(hqq())
    calls = []
    original = _ops.dequantize
    monkeypatch.setattr(_ops, "dequantize", lambda *a: calls.append(1) or original(*a))
    weight = layer.weight
    assert weight.shape == (48, 128) and weight.dtype is torch.float32
    assert weight.device.type == "cpu" and not weight.requires_grad
    assert weight.numel() == 48 * 128 and weight.detach().data.shape == (48, 128)
    assert not calls
    assert torch.equal(weight.sum(0), layer.dequantize_weights().sum(0))
    assert torch.equal(weight.T @ weight, layer.dequantize_weights().T @ layer.weight)
    assert len(calls) >= 4


def test_writes_through_the_weight_raise():
    _, layer = make(hqq())
    before = layer.codes.clone()
    for write in (
        lambda: layer.weight.data.normal_(),
        lambda: layer.weight.mul_(2),
        lambda: layer.weight.copy_(torch.zeros(48, 128)),
        lambda: nn.init.kaiming_uniform_(layer.weight),
        lambda: setattr(layer.weight, "data", torch.zeros(48, 128)),
        lambda: setattr(layer, "weight", nn.Parameter(torch.zeros(48, 128))),
        lambda: torch.add(torch.zeros(48, 128), 1, out=layer.weight),
    ):
        with pytest.raises(UnsupportedError, match="quantize_weights"):
            write()
    assert torch.equal(layer.codes, before)


def test_only_bytes_are_state(config):
    _, layer = make(config)
    assert set(dict(layer.named_parameters())) == {"codes", "stats", "bias"}
    assert not layer.codes.requires_grad and layer.codes.dtype is torch.uint8
    assert set(layer.state_dict()) == {"codes", "stats", "shared", "spec", "bias"}


def test_copies_and_files_keep_the_bytes(config):
    _, layer = make(config)
    x = torch.randn(5, 128)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
        layer.to("cpu"),
    ]
    fresh = QuantizedLinear(128, 48, True, config)
    fresh.load_state_dict(layer.state_dict())
    for twin in [*twins, fresh]:
        assert torch.equal(twin.codes, layer.codes) and torch.equal(twin.stats, layer.stats)
        assert torch.equal(twin(x), expected)


def test_casting_the_module_leaves_the_bytes():
    _, layer = make(hqq())
    codes, stats = layer.codes.clone(), layer.stats.clone()
    for cast in (layer.half, layer.bfloat16, layer.float):
        cast()
        assert layer.codes.dtype is torch.uint8 and torch.equal(layer.codes, codes)
        assert torch.equal(layer.stats, stats)
        assert layer(torch.randn(2, 128)).isfinite().all()


def test_state_of_another_form_is_refused():
    layer = QuantizedLinear(128, 48, True, hqq(4, 64))
    other = QuantizedLinear(128, 48, True, nf4())
    before = layer.codes.clone()
    with pytest.raises(RuntimeError, match="another form"):
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.codes, before)


def test_meta_layers_materialize():
    _, layer = make(hqq())
    with torch.device("meta"):
        empty = QuantizedLinear(128, 48, True, hqq())
    assert empty.codes.is_meta
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 128)
    assert torch.equal(empty(x), layer(x))


def test_moving_to_meta_keeps_shapes():
    _, layer = make(hqq())
    moved = copy.deepcopy(layer).to("meta")
    assert moved.weight.is_meta and moved(torch.randn(2, 128, device="meta")).shape == (2, 48)


def test_quantize_weights_replaces_and_checks():
    _, layer = make(hqq())
    weights = torch.randn(48, 128)
    layer.quantize_weights(weights)
    assert layer.relative_error(weights) < 0.13
    with pytest.raises(ShapeError, match=r"\[3, 128\], expected \[48, 128\]"):
        layer.quantize_weights(torch.zeros(3, 128))
    for bad in (float("nan"), float("inf")):
        weights[2, 5] = bad
        with pytest.raises(UnsupportedError):
            layer.quantize_weights(weights)


@pytest.mark.parametrize("name", ["hqq4", "nf4", "nf4-double", "hqq8-g128"])
def test_upstream_tensors_are_an_inverse(name):
    _, layer = make(CONFIGS[name])
    tensors = layer.to_upstream()
    again = QuantizedLinear.from_upstream(tensors, layer.dialect)
    assert torch.equal(again.codes, layer.codes) and torch.equal(again.stats, layer.stats)
    assert torch.equal(again.shared, layer.shared) and torch.equal(again.weight, layer.weight)


def test_wrong_inputs_are_typed_errors():
    _, layer = make(hqq())
    with pytest.raises(ShapeError, match="127"):
        layer(torch.randn(2, 127))
    with pytest.raises(ConfigError, match="group"):
        QuantizedLinear(128, 48, True, hqq(4, 7))
    layer.stats = nn.Parameter(layer.stats[:-1].clone(), requires_grad=False)
    with pytest.raises(ShapeError):
        layer(torch.randn(2, 128))


def test_layers_without_a_config_have_one_each():
    first, second = QuantizedLinear(64, 64), QuantizedLinear(64, 64)
    assert first.config == QuantizationConfig()
    first.config.skip_modules.append("gate")
    first.config.backend_options["fallback"] = "error"
    assert second.config == QuantizationConfig()
    assert QuantizedLinear(64, 64).config == QuantizationConfig()
    assert not second.config.bits_set
