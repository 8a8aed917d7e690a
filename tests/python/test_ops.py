"""The operators: gradients, compilation, opcheck."""

import pickle

import pytest
import torch
from torch import nn

from conftest import CONFIGS, hqq
from quantal import QuantizedLinear, _ops, _packed


def layer_of(config, rows=128, cols=72, bias=True, dtype=torch.float32):
    torch.manual_seed(1)
    return QuantizedLinear.from_linear(nn.Linear(cols, rows, bias=bias, dtype=dtype), config)


@pytest.mark.parametrize("m", [1, 5, 90])
def test_gradients_equal_those_of_the_decoded_layer(config, m):
    layer = layer_of(config)
    x = torch.randn(m, 72, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    expected = g @ layer.dequantize_weights()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, g.sum(0), rtol=1e-5, atol=1e-5)
    assert layer.codes.grad is None


def test_gradcheck_and_second_derivative():
    layer = layer_of(hqq(), rows=8, cols=64, bias=False)
    x = torch.randn(3, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    w = layer.dequantize_weights()
    torch.testing.assert_close(second, (2 * w.T @ w).sum(0).expand(3, -1), rtol=1e-3, atol=1e-3)


def test_nothing_dense_is_saved_for_backward():
    layer = layer_of(hqq(), 256, 256, bias=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = torch.randn(4, 256, requires_grad=True)
        y = layer(x)
    saved += list(y.grad_fn.packed[:3])
    assert {t.data_ptr() for t in saved} <= {
        t.data_ptr() for t in (layer.codes, layer.stats, layer.shared)
    }
    y.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["hqq4", "nf4-double", "hqq4-axis0"])
def test_opcheck(name):
    layer = layer_of(CONFIGS[name])
    x = torch.randn(3, 72, requires_grad=True)
    packed = layer.codes, layer.stats, layer.shared
    torch.library.opcheck(torch.ops.quantal.linear.default, (x, *packed, layer.bias, layer._spec))
    grad = torch.randn(3, 128, requires_grad=True)
    torch.library.opcheck(torch.ops.quantal.linear_grad_input.default, (grad, *packed, layer._spec))
    dequantize = torch.ops.quantal.dequantize.default
    torch.library.opcheck(dequantize, (*packed, layer._spec, torch.float32))
    weight = layer.dequantize_weights()
    torch.library.opcheck(torch.ops.quantal.quantize.default, (weight, layer._spec))


def test_large_results_use_released_memory_and_no_other():
    layer = layer_of(hqq(), 2048, 1024, bias=False)
    expected = layer.dequantize_weights().clone()
    first, second = layer.dequantize_weights(), layer.dequantize_weights()
    assert first.data_ptr() != second.data_ptr()
    row, address = first[7], first.data_ptr()
    del first
    third = layer.dequantize_weights()
    assert third.data_ptr() != address  # its row is still in use
    third.zero_()
    assert torch.equal(row, expected[7]) and torch.equal(second, expected)
    del row
    assert layer.dequantize_weights().data_ptr() == address
    assert torch.equal(pickle.loads(pickle.dumps(second)), expected)
    parameter = nn.Parameter(layer.dequantize_weights())
    parameter.sum().backward()
    assert torch.equal(parameter, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    layer = layer_of(hqq())
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for m in (2, 5):
        x = torch.randn(m, 72, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        y.sum().backward()
        expected = layer.dequantize_weights().sum(0).expand(m, -1)
        torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_exports():
    layer = layer_of(hqq())
    x = torch.randn(4, 72)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    dense = nn.Linear(320, 512)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            layer = QuantizedLinear.from_linear(dense, hqq())
            x = torch.linspace(-1, 1, 3 * 320).reshape(3, 320)
            results.append((layer.codes, layer.stats, layer(x)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def word_sum(data: torch.Tensor) -> int:
    """The sum of a tensor's bytes as words of 64 bits, in Python's integers."""
    raw = data.contiguous().view(torch.uint8).numpy().tobytes()
    words = (int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8))
    total = sum(words) % (1 << 64)
    return total - (1 << 64) if total >> 63 else total


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65, 127, 1000, 1 << 18, 600_013])
@pytest.mark.parametrize("offset", [0, 3])
def test_byte_sums_are_sums_of_words(count, offset):
    generator = torch.Generator().manual_seed(count)
    whole = torch.randint(0, 256, (count + offset,), dtype=torch.uint8, generator=generator)
    data = whole[offset:]
    assert _ops.byte_sums(data, whole) == (word_sum(data), word_sum(whole))
    on_a_device = _packed._byte_sum(data)  # the same sum in torch's operators
    assert int(on_a_device) == word_sum(data)


def test_byte_sums_see_bytes_of_any_dtype_and_stride():
    bits = torch.randint(-(1 << 15), 1 << 15, (6, 10), dtype=torch.int16).view(torch.bfloat16)
    assert _ops.byte_sums(bits.T, bits)[0] == word_sum(bits.T.contiguous())
    padded = torch.cat([bits.flatten(), torch.zeros(2, dtype=torch.bfloat16)])
    assert _ops.byte_sums(bits, padded) == (word_sum(bits), word_sum(bits))
    with pytest.raises(RuntimeError):
        _ops.byte_sums(bits.to("meta"), bits)
