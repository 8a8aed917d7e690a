"""torch.compile of quantized layers, alone and under LoRA: one graph, the same numbers, and nothing
of a weight's size kept for backward."""

import shutil

import pytest
import torch
from peft import get_peft_model
from torch import nn

from conftest import EXTENDED
from qlora_support import LLM_INT8, METHODS, lora, quantized, randomize_lora
from quantal import DtypeError, QuantizationConfig, QuantizedLinear, ShapeError
from quantal.functional import linear, matmul

FORMS = {
    **METHODS,
    "int8-outliers": LLM_INT8,
    "quanto2": QuantizationConfig("quanto_int2", group_size=32, compute_dtype=torch.float32),
    "mlx-bf16": QuantizationConfig(
        "mlx_int8", compute_dtype=torch.bfloat16, backend_options=EXTENDED
    ),
}


def make(name: str, rows: int = 96, cols: int = 64) -> QuantizedLinear:
    torch.manual_seed(2)
    return QuantizedLinear.from_linear(nn.Linear(cols, rows), FORMS[name])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", list(FORMS))
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_one_graph_equal_to_eager(name, dynamic):
    layer = make(name)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for m in (2, 3, 80):
        x = torch.randn(m, 5, 64)
        results = []
        for call in (layer, compiled):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad, layer.bias.grad.clone()))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
@pytest.mark.parametrize("name", ["nf4", "int8-outliers"])
def test_inductor(name):
    layer = make(name)

    def block(x):
        return nn.functional.gelu(layer(x)) * 2 + 1

    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(7, 64, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    grad, x.grad = x.grad, None
    block(x).sum().backward()
    torch.testing.assert_close(grad, x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_the_graph(dtype):
    layer = make("hqq4")

    def step(x):
        with torch.autocast("cpu", dtype=dtype):
            return layer(x)

    x = torch.randn(4, 64)
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype is dtype and torch.equal(y, step(x))


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora"])
def test_a_lora_layer_compiles_in_one_graph(variant):
    torch.manual_seed(0)
    options = {} if variant == "lora" else {f"use_{variant}": True}
    model = get_peft_model(quantized(METHODS["nf4"]), lora(**options)).eval()
    randomize_lora(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    grads = []
    for call in (layer, compiled):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        grads.append([leaf.grad] + [p.grad for p in layer.parameters() if p.grad is not None])
    assert len(grads[0]) == (4 if variant == "dora" else 3)
    for eager, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5)


def test_a_whole_model_compiles(tokens):
    model = get_peft_model(quantized(METHODS["hqq4"]), lora()).eval()
    randomize_lora(model)
    expected = model(tokens).logits
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["nf4", "int8-outliers", "mlx4"])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_backward_keeps_packed_bytes_only(name, how):
    """256 x 256 values would be 65536 numbers; the packed form has at most that many bytes."""
    layer = make(name, 256, 256)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if how == "compiled" else layer
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = torch.randn(4, 256, requires_grad=True)
        y = call(x)
    floats = [t for t in saved if t.is_floating_point()]
    assert all(t.numel() <= 4 * 256 for t in floats)
    own = {t.data_ptr() for t in (layer.codes, layer.stats, layer.shared)}
    assert {t.data_ptr() for t in saved if not t.is_floating_point()} <= own
    y.sum().backward()
    expected = layer.dequantize_weights().float().sum(0).expand(4, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- products with out=


@pytest.mark.parametrize("name", list(METHODS))
def test_products_write_into_out(name):
    layer = make(name)
    bias = layer.bias.detach()
    for m in (1, 3, 200):
        x, g = torch.randn(2, m, 64), torch.randn(2, m, 96)
        for product, args, width in ((linear, (x, layer, bias), 96), (matmul, (g, layer), 64)):
            expected = product(*args)
            assert expected.shape == (2, m, width)
            empty = torch.empty(0)
            strided = torch.zeros(2, m, 2 * width)[..., ::2]
            for out in (empty, torch.empty(2, m, width), strided):
                assert product(*args, out=out) is out
                assert torch.equal(out, expected)
    square = make(name, 64, 64)
    x = torch.randn(9, 64)
    expected = linear(x, square)
    assert torch.equal(linear(x, square, out=x), expected), "out may be the input"
    w = layer.dequantize_weights()
    x, g = torch.randn(3, 64), torch.randn(3, 96)
    torch.testing.assert_close(linear(x, layer, bias), x @ w.T + bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(matmul(g, layer), g @ w, rtol=1e-4, atol=1e-5)


def test_out_follows_torchs_rules():
    layer = make("nf4")
    x = torch.randn(3, 64)
    with pytest.raises(ValueError, match=r"out has shape \[3, 95\], expected \[3, 96\]"):
        linear(x, layer, out=torch.empty(3, 95))
    with pytest.raises(TypeError, match="out is float16, expected float32"):
        linear(x, layer, out=torch.empty(3, 96, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
        linear(x.requires_grad_(), layer, out=torch.empty(3, 96))
    with torch.no_grad():
        assert torch.equal(linear(x, layer, out=torch.empty(3, 96)), linear(x, layer))
    with pytest.raises(TypeError, match="weight is Linear.*expected a quantized layer"):
        linear(x, nn.Linear(64, 96))
    with pytest.raises(ValueError, match="last dimension 96"):
        matmul(x.detach(), layer)


def test_out_inside_a_graph():
    layer = make("hqq4")

    @torch.no_grad()
    def double(x, out):
        linear(x, layer, out=out)
        return out * 2

    x, out = torch.randn(5, 64), torch.empty(5, 96)
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, out), 2 * out) and torch.equal(out, linear(x, layer))
    packed = layer.codes, layer.stats, layer.shared
    torch.library.opcheck(
        torch.ops.quantal.linear.out, (x, *packed, None, layer._spec), {"out": torch.empty(5, 96)}
    )
    grad = torch.randn(5, 96)
    torch.library.opcheck(
        torch.ops.quantal.linear_grad_input.out,
        (grad, *packed, layer._spec),
        {"out": torch.empty(5, 64)},
    )
    torch.library.opcheck(
        torch.ops.quantal.dequantize.out, (*packed, layer._spec), {"out": torch.empty(96, 64)}
    )


def test_dequantized_into_a_given_tensor():
    layer = make("hqq4")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = torch.empty(96, 64, dtype=dtype)
        assert layer.dequantize_weights(out=out) is out
        assert torch.equal(out, layer.dequantize_weights(dtype))
    empty = torch.empty(0, dtype=torch.bfloat16)
    assert torch.equal(layer.dequantize_weights(out=empty), layer.dequantize_weights(empty.dtype))
    with pytest.raises(ShapeError, match=r"out has shape \[64, 96\], expected"):
        layer.dequantize_weights(out=torch.empty(64, 96))
    with pytest.raises(ShapeError, match="contiguous"):
        layer.dequantize_weights(out=torch.empty(64, 96).t())
    with pytest.raises(DtypeError, match="out is int64"):
        layer.dequantize_weights(out=torch.empty(96, 64, dtype=torch.int64))
    with pytest.raises(DtypeError, match="expected torch.float16"):
        layer.dequantize_weights(torch.float16, out=torch.empty(96, 64))


@pytest.mark.parametrize("name", ["nf4", "int8-outliers"])
def test_operators_pass_opcheck(name):
    layer = make(name)
    packed = layer.codes, layer.stats, layer.shared
    ops = torch.ops.quantal
    torch.library.opcheck(ops.row_square_sums.default, (*packed, layer._spec, torch.float64))
    squares = ops.row_square_sums(*packed, layer._spec, torch.float64)
    torch.testing.assert_close(squares, layer.dequantize_weights().double().square().sum(1))
    target = layer.dequantize_weights() * 1.1
    torch.library.opcheck(ops.merge_survival.default, (*packed, *packed, layer._spec, target))
    if layer.int8_threshold is not None:
        x = torch.randn(3, 64, requires_grad=True)
        torch.library.opcheck(
            ops.linear_int8.default, (x, *packed, layer.bias, layer._spec, layer.int8_threshold)
        )


def test_results_may_be_changed_in_place():
    """An activation with inplace=True after a quantized layer, as in any model."""
    for name in ("nf4", "int8-outliers"):
        layer = make(name)
        x = torch.randn(2, 3, 64, requires_grad=True)
        nn.functional.relu(layer(x), inplace=True).sum().backward()
        grad, x.grad = x.grad, None
        nn.functional.relu(layer(x)).sum().backward()
        assert torch.equal(grad, x.grad)
