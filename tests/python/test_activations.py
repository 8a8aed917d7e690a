"""Products with activations that are rounded to int8, chosen by backend_options."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import quantal
from conftest import EXTENDED, hqq, nf4, tiny_llama
from quantal import ConfigError, QuantizedLinear, UnsupportedError
from quantal.functional import linear

INT8 = {"activations": "int8"}
CONFIGS = {
    "hqq4": hqq(backend_options=INT8),
    "hqq8-g128": hqq(8, 128, backend_options=INT8),
    "hqq2-g32": hqq(2, 32, backend_options=INT8),
    "nf4-double": nf4(backend_options={**EXTENDED, **INT8}),
    "bnb_int8": quantal.QuantizationConfig(
        "bnb_int8", compute_dtype=torch.float32, backend_options={**EXTENDED, **INT8}
    ),
    "quanto_int8": quantal.QuantizationConfig(
        "quanto_int8", compute_dtype=torch.float32, backend_options=INT8
    ),
}


def make(name="hqq4", rows=48, cols=256, bias=True):
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(cols, rows, bias=bias), CONFIGS[name])


def rounded(x, run):
    """x as the product takes it."""
    runs = x.double().unflatten(-1, (-1, run))
    scale = runs.abs().amax(-1, keepdim=True).float() / 127
    return ((runs.float() / scale).round().double() * scale.double()).flatten(-2)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("m", [1, 3, 16, 33, 512])
def test_product_is_the_stated_formula(name, m):
    layer = make(name)
    assert layer.activations == "int8" and "int8 activations" in repr(layer)
    x = torch.randn(m, 256)
    run = {"hqq4": 64, "nf4-double": 64, "hqq2-g32": 32}.get(name, 128)
    weight = layer.dequantize_weights().double()
    expected = rounded(x, run) @ weight.T + layer.bias.double()
    got = layer(x).double()
    table = 0.006 if name == "nf4-double" else 0  # levels to 1/127
    assert (got - expected).norm() <= (1e-3 + table) * expected.norm()
    exact = x.double() @ weight.T + layer.bias.double()
    error = (got - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.01 + table


def test_default_is_exact():
    layer = QuantizedLinear.from_linear(nn.Linear(256, 48), hqq())
    assert layer.activations == "exact" and "int8" not in repr(layer)
    x = torch.randn(3, 256)
    before = layer(x)
    layer.activations = "int8"
    assert not torch.equal(layer(x), before)
    layer.activations = "exact"
    assert torch.equal(layer(x), before)


def test_shapes_dtypes_and_empty_inputs():
    layer = make()
    assert layer(torch.randn(2, 3, 256)).shape == (2, 3, 48)
    assert layer(torch.randn(256)).shape == (48,)
    assert layer(torch.randn(0, 256)).shape == (0, 48)
    for dtype in (torch.float16, torch.bfloat16):
        assert layer(torch.randn(2, 256, dtype=dtype)).dtype is dtype
    with pytest.raises(quantal.ShapeError):
        layer(torch.randn(2, 255))


def test_not_finite_activations_make_their_row_nan():
    layer = make()
    x = torch.randn(3, 256)
    x[1, 7] = float("inf")
    y = layer(x)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_rows_and_threads_do_not_matter():
    layer = make(rows=300)
    x = torch.randn(70, 256, dtype=torch.bfloat16)
    y = layer(x)
    for m in (0, 33, 69):
        assert torch.equal(layer(x[m : m + 1]), y[m : m + 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(layer(x), y)
    finally:
        torch.set_num_threads(threads)


def test_gradient_is_that_of_the_exact_product():
    layer = make()
    x = torch.randn(5, 256, requires_grad=True)
    seed = torch.randn(5, 48)
    layer(x).backward(seed)
    torch.testing.assert_close(x.grad, seed @ layer.dequantize_weights())


def test_compiled_graphs_have_the_same_bits():
    layer = make()
    x = torch.randn(5, 256, requires_grad=True)
    compiled = torch.compile(lambda x: layer(x) * 2, fullgraph=True)
    y = compiled(x)
    assert torch.equal(y, layer(x) * 2)
    y.sum().backward()
    packed = layer.codes, layer.stats, layer.shared
    op = torch.ops.quantal.linear_int8_activations
    torch.library.opcheck(op.default, (x, *packed, layer.bias, layer._spec))


def test_functional_and_out():
    layer = make(bias=False)
    x = torch.randn(4, 256)
    y = linear(x, layer, activations="int8")
    assert torch.equal(y, layer(x))
    out = torch.empty(4, 48)
    assert linear(x, layer, out=out, activations="int8") is out and torch.equal(out, y)
    empty = torch.empty(0)
    linear(x, layer, out=empty, activations="int8")
    assert torch.equal(empty, y)
    assert not torch.equal(linear(x, layer), y)
    with pytest.raises(ConfigError, match="activations is 'int4', expected 'exact' or 'int8'"):
        linear(x, layer, activations="int4")
    with pytest.raises(ConfigError, match="activations is 'four'"):
        layer.activations = "four"


def test_option_is_checked():
    config = hqq(backend_options={"activations": "int4"})
    issues = quantal.validate_quantization_config(config, quantal.Backend.CPU)
    assert "options.value" in [i.id for i in issues]
    with pytest.raises(ConfigError, match="activations is 'int4'"):
        QuantizedLinear.from_linear(nn.Linear(64, 8), config)
    both = {**EXTENDED, **INT8, "int8_threshold": 6.0}
    with pytest.raises(ConfigError, match="int8_threshold"):
        QuantizedLinear(64, 8, config=quantal.QuantizationConfig("bnb_int8", backend_options=both))


def test_forms_without_the_product_stay_exact_with_a_warning():
    config = hqq(backend_options={**INT8, "axis": 0})
    with pytest.warns(UserWarning, match="activations stay exact: statistics are shared by rows"):
        layer = QuantizedLinear.from_linear(nn.Linear(64, 64), config)
    assert layer.activations == "exact"
    with pytest.raises(UnsupportedError, match="statistics are shared by rows"):
        layer.activations = "int8"
    with pytest.raises(UnsupportedError, match="statistics are shared by rows"):
        linear(torch.randn(2, 64), layer, activations="int8")
    config.backend_options["fallback"] = "error"
    with pytest.raises(UnsupportedError, match="statistics are shared by rows"):
        QuantizedLinear.from_linear(nn.Linear(64, 64), config)


def test_models_keep_it_through_files_and_copies(tmp_path):
    config = hqq(backend_options=INT8)
    adapter = quantal.create_quantization_adapter("cpu", config)
    model = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.quantize_model(model)
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        expected = model(ids).logits
        dense = tiny_llama()(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, expected)
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                assert layer.activations == "int8"
        adapter.save_quantized_model(model, str(tmp_path / "model"))
        loaded = adapter.load_quantized_model(str(tmp_path / "model"), model.config)
        assert torch.equal(loaded(ids).logits, expected)
    assert (expected - dense).norm() < 0.6 * dense.norm()
