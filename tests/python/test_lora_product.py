"""LoRA over a packed layer in one step: PEFT's numbers, its gradients, and what stays with PEFT."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import layer as lora_layer
from torch import nn
from torch.utils.checkpoint import checkpoint

from conftest import EXTENDED, hqq, nf4
from quantal import QuantizationConfig, QuantizedLinear, ShapeError, _ops
from quantal._low_rank import lora_product

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
#: Relative error in norm: a few roundings of what is stored, and float32 sums.
BOUNDS = {F32: 2e-6, F16: 2e-3, BF16: 1.5e-2}


def packed(out=45, columns=64, bias=True, config=None, compute=F32):
    dense = nn.Linear(columns, out, bias=bias)
    return QuantizedLinear.from_linear(dense, config or nf4(), compute_dtype=compute)


def adapted(base, rank=8, dropout=0.0, dtype=F32, **kwargs):
    """PEFT's layer over `base`, whose adapters, of `dtype`, do something."""
    config = LoraConfig(r=rank, lora_alpha=12, target_modules=["0"], lora_dropout=dropout, **kwargs)
    layer = get_peft_model(nn.Sequential(base), config).base_model.model[0]
    with torch.no_grad():
        for name in layer.lora_A:
            layer.lora_B[name].weight.normal_(0, 0.1)
            layer.lora_A[name].to(dtype)
            layer.lora_B[name].to(dtype)
    return layer


def in_peft(layer, x):
    """PEFT's own way over the same layer."""
    return lora_layer.Linear.forward(layer, x)


def is_fused(y):
    return type(y.grad_fn).__name__ == "_EagerLoraLinearBackward"


def matrices(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def gradients(layer, x, run, grad):
    """Result of `run` and the gradients of x, A, B and the bias, where they have one."""
    x = x.detach().requires_grad_(x.requires_grad)
    bias = layer.base_layer.bias
    sources = [*matrices(layer), *([x] if x.requires_grad else [])]
    sources += [bias] if bias is not None and bias.requires_grad else []
    y = run(layer, x)
    return [y, *torch.autograd.grad(y, sources, grad)]


def reference(layer, x, grad):
    """The same in float64 and torch's operators, over the exact weights."""
    w = layer.base_layer.dequantize_weights(F32).double()
    a, b = (m.detach().double().requires_grad_() for m in matrices(layer))
    x = x.detach().double().requires_grad_()
    bias = layer.base_layer.bias
    sources, shift = [a, b, x], None
    if bias is not None:
        shift = bias.detach().double().requires_grad_()
        sources += [shift] if bias.requires_grad else []
    y = nn.functional.linear(x, w, shift) + layer.scaling["default"] * (x @ a.T) @ b.T
    return [y, *torch.autograd.grad(y, sources, grad.double())]


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


SHAPES = [  # rank, leading sizes, columns, rows of W
    (1, (1,), 64, 45),
    (3, (1, 5), 128, 67),
    (8, (2, 65), 64, 33),
    (16, (130,), 192, 130),
    (64, (5,), 72, 31),
]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    rank, leading, columns, out = shape
    torch.manual_seed(0)
    layer = adapted(packed(out, columns, compute=dtype), rank)
    layer.base_layer.bias.requires_grad_(True)
    x = torch.randn(*leading, columns).to(dtype).requires_grad_()
    grad = torch.randn(*leading, out).to(dtype)
    assert is_fused(layer(x))
    found = gradients(layer, x, type(layer).__call__, grad)
    theirs = gradients(layer, x, in_peft, grad)
    assert not is_fused(theirs[0])
    for mine, other, exact in zip(found, theirs, reference(layer, x, grad), strict=True):
        assert mine.dtype is other.dtype and mine.shape == other.shape
        assert error(mine, exact) < BOUNDS[dtype]
        assert error(mine, exact) < 1.1 * error(other, exact) + 5e-7  # never less exact than PEFT


@pytest.mark.parametrize("adapter", [F16, BF16], ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_adapters_of_16_bits(shape, dtype, adapter):
    """What FSDP2's mixed precision hands over: PEFT rounds x, every product and every gradient to
    the adapter's dtype on the way; here sums are float32, each gradient is rounded once."""
    rank, leading, columns, out = shape
    torch.manual_seed(0)
    layer = adapted(packed(out, columns, compute=dtype), rank, dtype=adapter)
    x = torch.randn(*leading, columns).to(dtype).requires_grad_()
    grad = torch.randn(*leading, out).to(dtype)
    found = gradients(layer, x, type(layer).__call__, grad)
    theirs = gradients(layer, x, in_peft, grad)
    assert is_fused(found[0]) and not is_fused(theirs[0])
    for mine, other, exact in zip(found, theirs, reference(layer, x, grad), strict=True):
        assert mine.dtype is other.dtype and mine.shape == other.shape
        assert error(mine, exact) < BOUNDS[mine.dtype]
        assert error(mine, exact) < 1.1 * error(other, exact) + 5e-7  # never less exact than PEFT
    # The same adapter in float32: the result to the bit, gradients that are rounded to these.
    for module in (layer.lora_A["default"], layer.lora_B["default"]):
        module.float()
    wide = gradients(layer, x, type(layer).__call__, grad)
    assert all(torch.equal(mine, w.to(mine.dtype)) for mine, w in zip(found, wide, strict=True))


def test_16_bit_adapters_without_gradients():
    torch.manual_seed(1)
    layer = adapted(packed(compute=BF16), dtype=BF16)
    x = torch.randn(5, 64).to(BF16)
    exact = reference(layer, x, torch.randn(5, 45))[0]
    with torch.no_grad():
        y = lora_product(layer, x)
        assert y.grad_fn is None and torch.equal(y, layer(x))
        assert error(y, exact) < 1.1 * error(in_peft(layer, x), exact)
    with torch.inference_mode():
        assert torch.equal(y, layer(x))


def test_matrices_of_two_dtypes_are_refused_as_by_peft():
    layer = adapted(packed())
    layer.lora_B["default"].to(BF16)
    x = torch.randn(5, 64)
    assert lora_product(layer, x) is None
    for run in (in_peft, type(layer).__call__):
        with pytest.raises(RuntimeError, match="dtype"):
            run(layer, x)


@pytest.mark.parametrize("target", [F16, BF16], ids=str)
@pytest.mark.parametrize("adapter", [F32, BF16], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_autocast(wide, adapter, target):
    """As Trainer and accelerate run bfloat16: activations are of autocast's dtype, or the base
    computes in it."""
    torch.manual_seed(1)
    layer = adapted(packed(compute=target if wide else F32), dtype=adapter)
    x = torch.randn(33, 64).to(F32 if wide else target).requires_grad_()
    grad = torch.randn(33, 45).to(target)
    with torch.autocast("cpu", target):
        found = gradients(layer, x, type(layer).__call__, grad)
        theirs = gradients(layer, x, in_peft, grad)
        with torch.no_grad():
            assert torch.equal(layer(x), found[0])
    assert is_fused(found[0]) and not is_fused(theirs[0])
    exact = reference(layer, x, grad)
    for name, mine, other in zip(("y", "a", "b", "x"), found, theirs, strict=True):
        expected = exact.pop(0)
        assert mine.dtype is other.dtype
        assert error(mine, expected) < BOUNDS[target if adapter is F32 else BF16]
        # The two gradients of x are added in autocast's dtype: one more rounding than PEFT's sum.
        limit = 1.3 if wide and name == "x" else 1.1
        assert error(mine, expected) < limit * error(other, expected) + 5e-7


def test_autocast_of_another_device():
    layer, x = adapted(packed()), torch.randn(5, 64)
    y = layer(x)
    with torch.autocast("cuda", BF16):
        found = layer(x)
    assert is_fused(found) and torch.equal(found, y)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("compute", BOUNDS, ids=str)
def test_a_base_that_computes_in_another_dtype(dtype, compute):
    torch.manual_seed(1)
    layer = adapted(packed(compute=compute, config=hqq(8)))
    x = torch.randn(7, 64).to(dtype).requires_grad_()
    grad = torch.randn(7, 45).to(dtype)
    found = gradients(layer, x, type(layer).__call__, grad)
    assert is_fused(found[0]) and found[0].dtype is dtype
    for mine, other in zip(found, gradients(layer, x, in_peft, grad), strict=True):
        assert mine.dtype is other.dtype
        assert error(mine, other.double()) < max(BOUNDS[dtype], BOUNDS[compute])


def test_without_gradients_and_without_some():
    torch.manual_seed(2)
    layer = adapted(packed())
    x = torch.randn(5, 64)
    with torch.no_grad():
        y = layer(x)
        assert y.grad_fn is None and lora_product(layer, x) is not None
        torch.testing.assert_close(y, in_peft(layer, x))
    grad = torch.randn(5, 45)
    frozen_x = gradients(layer, x, type(layer).__call__, grad)  # x has no gradient
    for mine, other in zip(frozen_x, gradients(layer, x, in_peft, grad), strict=True):
        torch.testing.assert_close(mine, other)
    for matrix in matrices(layer):  # only x has one
        matrix.requires_grad_(False)
    x.requires_grad_()
    layer(x).backward(grad)
    expected = torch.autograd.grad(in_peft(layer, x), x, grad)[0]
    torch.testing.assert_close(x.grad, expected)
    assert all(matrix.grad is None for matrix in matrices(layer))
    x.requires_grad_(False)
    assert layer(x).grad_fn is None


def test_inputs_of_any_layout():
    torch.manual_seed(3)
    layer = adapted(packed())
    wide = torch.randn(64, 6, 5)
    for x in (
        wide.permute(1, 2, 0),
        wide[:, 0, 0],
        torch.randn(3, 128)[:, ::2],
        torch.randn(0, 64),
    ):
        x = x.detach().requires_grad_()
        y = layer(x)
        assert is_fused(y)
        torch.testing.assert_close(y, in_peft(layer, x))
        found = torch.autograd.grad(y.sum(), [x, *matrices(layer)])  # an expanded gradient
        expected = torch.autograd.grad(in_peft(layer, x).sum(), [x, *matrices(layer)])
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_dropout_is_what_the_adapter_sees(dtype):
    torch.manual_seed(4)
    layer = adapted(packed(compute=dtype), dropout=0.5).train()
    x = torch.randn(33, 64).to(dtype).requires_grad_()
    grad = torch.randn(33, 45).to(dtype)
    layer.lora_dropout["default"].register_forward_hook(keep := Kept())
    torch.manual_seed(5)
    theirs = gradients(layer, x, in_peft, grad)
    keep.handle_of(layer.lora_dropout["default"])
    torch.manual_seed(5)
    found = gradients(layer, x, type(layer).__call__, grad)
    assert is_fused(found[0])
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x.detach(), 0.5)
    assert 0.3 < (dropped == 0).float().mean() < 0.7
    torch.testing.assert_close(keep.value.to(dtype), dropped)  # both draw the same
    for mine, other in zip(found, theirs, strict=True):
        assert error(mine, other.double()) < BOUNDS[dtype]
    plain = gradients(layer.eval(), x, type(layer).__call__, grad)
    assert is_fused(plain[0]) and error(plain[0], found[0].double()) > 1e-2
    assert error(plain[0], in_peft(layer, x).double()) < BOUNDS[dtype]


class Kept:
    """A hook that keeps the last result."""

    def __call__(self, module, args, output):
        self.value = output.detach()

    def handle_of(self, module):
        module._forward_hooks.clear()


def test_dropout_with_a_frozen_input():
    torch.manual_seed(6)
    layer = adapted(packed(), dropout=0.3).train()
    x, grad = torch.randn(9, 64), torch.randn(9, 45)
    both = []
    for run in (type(layer).__call__, in_peft):
        torch.manual_seed(7)
        both.append(gradients(layer, x, run, grad))
    assert is_fused(both[0][0])
    for mine, other in zip(*both, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_checkpointed_blocks(reentrant, dropout, dtype):
    torch.manual_seed(8)
    layers = [adapted(packed(64, 64), dropout=dropout, dtype=dtype).train() for _ in range(2)]
    block = nn.Sequential(layers[0], nn.SiLU(), layers[1])
    x = torch.randn(12, 64, requires_grad=True)
    weights = [m for layer in layers for m in matrices(layer)]
    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(9)
        x.grad = None
        for weight in weights:
            weight.grad = None
        run(x).square().sum().backward()
        results.append([t.grad.clone() for t in (x, *weights)])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_last_product_of_a_block_is_not_computed_again(dropout, dtype, monkeypatch):
    torch.manual_seed(8)
    layers = [adapted(packed(64, 64), dropout=dropout, dtype=dtype).train() for _ in range(3)]
    block = nn.Sequential(*layers)
    x = torch.randn(12, 64, requires_grad=True)
    products, linear = [], _ops._linear
    monkeypatch.setattr(_ops, "_linear", lambda *args: products.append(1) or linear(*args))
    y = checkpoint(block, x, use_reentrant=False)
    assert len(products) == 3
    y.sum().backward(retain_graph=True)
    assert len(products) == 5
    first = [m.grad.clone() for layer in layers for m in matrices(layer)]
    y.sum().backward()  # the graph again
    again = [m.grad for layer in layers for m in matrices(layer)]
    assert all(torch.equal(2 * one, two) for one, two in zip(first, again, strict=True))


def test_differentiated_twice():
    torch.manual_seed(10)
    for dropout in (0.0, 0.5):
        layer = adapted(packed(), dropout=dropout).train()
        x = torch.randn(4, 64, requires_grad=True)
        sources = [x, *matrices(layer)]

        def saved_elsewhere(x):
            with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
                return layer(x)  # noqa: B023

        second = []
        for run in (lambda x: in_peft(layer, x), layer, saved_elsewhere):  # noqa: B023
            torch.manual_seed(11)
            first = torch.autograd.grad(run(x).pow(3).sum(), sources, create_graph=True)
            second.append(torch.autograd.grad(sum(g.square().sum() for g in first), sources))
        for theirs, *mine in zip(*second, strict=True):
            assert theirs.abs().max() > 0
            for each in mine:
                torch.testing.assert_close(each, theirs, rtol=1e-4, atol=1e-3)


def test_16_bit_adapters_differentiated_twice():
    torch.manual_seed(10)
    layer = adapted(packed(), dtype=BF16)
    x = torch.randn(4, 64, requires_grad=True)
    second = []
    for dtype in (BF16, F32):  # the same values
        layer.to(dtype)
        sources = [x, *matrices(layer)]
        first = torch.autograd.grad(layer(x).pow(3).sum(), sources, create_graph=True)
        assert [g.dtype for g in first] == [F32, dtype, dtype]
        total = sum(g.float().square().sum() for g in first)
        second.append(torch.autograd.grad(total, sources))
    for narrow, wide in zip(*second, strict=True):
        assert narrow.dtype in (F32, BF16) and error(narrow, wide.double()) < BOUNDS[BF16]


def test_an_input_that_was_written_since_is_an_error():
    layer = adapted(packed())
    x = torch.randn(4, 64)
    y = layer(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_saves_the_input_as_it_is(dtype):
    """One tensor of the input's size and dtype, which neighbours share, and the adapter itself;
    PEFT saves copies of an input of another dtype."""
    layer = adapted(packed(compute=BF16), rank=4, dtype=dtype)
    x = torch.randn(32, 64).to(BF16).requires_grad_()

    def saved(run):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            run(x)
        own = {m.data_ptr() for m in matrices(layer)}
        return {t.data_ptr(): t.nbytes for t in kept if t.data_ptr() not in own}

    mine, theirs = saved(layer), saved(lambda x: in_peft(layer, x))
    assert mine == {x.data_ptr(): x.nbytes}
    if dtype is F32:
        assert sum(theirs.values()) >= 2 * x.nbytes


# ---------------------------------------------------------------------- what stays with PEFT


def float64_adapter(layer):
    layer.lora_A["default"].double()
    layer.lora_B["default"].double()


def two_adapters(layer):
    layer.update_layer("second", 4, lora_alpha=8, config=LoraConfig(r=4))
    nn.init.normal_(layer.lora_B["second"].weight)
    layer.set_adapter(["default", "second"])


def own_forward(module):
    original = module.forward
    module.forward = lambda x: original(x)


def scaling_as_tensor(layer):
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])


def nothing(*args):
    return None


LEFT = {
    "hook of A": lambda layer: layer.lora_A["default"].register_forward_hook(nothing),
    "pre-hook of B": lambda layer: layer.lora_B["default"].register_forward_pre_hook(nothing),
    "backward hook of A": lambda layer: layer.lora_A["default"].register_full_backward_hook(
        nothing
    ),
    "hook of the base": lambda layer: layer.base_layer.register_forward_hook(nothing),
    "hook of the dropout": lambda layer: layer.lora_dropout["default"].register_forward_hook(
        nothing
    ),
    "forward of its own": lambda layer: own_forward(layer.lora_B["default"]),
    "forward of the base": lambda layer: own_forward(layer.base_layer),
    "two adapters": two_adapters,
    "no adapter": lambda layer: layer.set_adapter([]),
    "float64 adapter": float64_adapter,
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "LLM.int8": lambda layer: layer.base_layer.__dict__.update(int8_threshold=6.0),
    "int8 activations": lambda layer: setattr(layer.base_layer, "activations", "int8"),
    "scaling as a tensor": scaling_as_tensor,
    "parametrized": lambda layer: nn.utils.parametrizations.orthogonal(layer.lora_A["default"]),
}
KINDS = {"dora": {"use_dora": True}, "bias of the adapter": {"lora_bias": True}}


def check_left_to_peft(layer, x):
    assert lora_product(layer, x) is None
    y, expected = layer(x), in_peft(layer, x)
    assert torch.equal(y, expected) and not is_fused(y)
    return y


@pytest.mark.parametrize("what", LEFT)
def test_left_to_peft(what):
    torch.manual_seed(12)
    config = QuantizationConfig("bnb_int8", compute_dtype=F32, backend_options=EXTENDED)
    layer = adapted(packed(config=config if what == "LLM.int8" else None))
    x = torch.randn(6, 64)
    assert is_fused(layer(x))
    plain = layer(x).detach()
    LEFT[what](layer)
    y = check_left_to_peft(layer, x)
    changes = what in ("two adapters", "no adapter", "disabled", "merged", "parametrized")
    if changes:
        assert not torch.allclose(y, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters_left_to_peft(kind):
    torch.manual_seed(13)
    check_left_to_peft(adapted(packed(), **KINDS[kind]), torch.randn(6, 64))


def test_calls_left_to_peft():
    torch.manual_seed(14)
    layer = adapted(packed())
    x = torch.randn(6, 64)
    with torch.autocast("cpu", BF16):
        assert check_left_to_peft(layer, x).dtype is BF16
    with torch.device("meta"), torch.no_grad():
        assert lora_product(layer, torch.empty(6, 64)) is None
    assert lora_product(layer, x.double()) is None
    assert lora_product(layer, x.as_subclass(Other)) is None
    handle = nn.modules.module.register_module_forward_hook(nothing)
    try:
        check_left_to_peft(layer, x)
    finally:
        handle.remove()
    assert lora_product(layer, x) is not None
    names = ["default", "__base__"] * 3  # other rows, other adapters
    y = layer(x, adapter_names=names)
    torch.testing.assert_close(y[::2], layer(x[::2]))
    assert torch.equal(y[1::2], layer.base_layer(x[1::2]))
    with disable_input_dtype_casting(nn.Sequential(layer)):
        assert lora_product(layer, x) is not None and lora_product(layer, x.to(BF16)) is None
        layer.to(BF16)
        assert lora_product(layer, x) is None and lora_product(layer, x.to(BF16)) is not None


class Other(torch.Tensor):
    pass


def test_compiled_graphs_keep_peft():
    layer = adapted(packed())
    x = torch.randn(6, 64)
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend=backend)(x), layer(x))
    assert any("quantal.linear" in name for names in graphs for name in names)
    assert not any("low_rank" in name for names in graphs for name in names)


def test_merging_disabling_and_switching():
    torch.manual_seed(15)
    layer = adapted(packed(config=hqq(8)))
    layer.update_layer("second", 4, lora_alpha=8, config=LoraConfig(r=4))
    nn.init.normal_(layer.lora_B["second"].weight, std=0.1)
    x = torch.randn(6, 64)
    first = layer(x)
    base = layer.base_layer(x)
    layer.set_adapter("second")
    second = layer(x)
    assert is_fused(second) and not torch.allclose(first, second)
    torch.testing.assert_close(second, in_peft(layer, x))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    assert torch.equal(layer(x), second)
    layer.merge()
    merged = layer(x)
    assert torch.equal(merged, layer.base_layer(x)) and not torch.equal(merged, base)
    assert error(merged, second.double()) < 0.02
    layer.unmerge()
    assert torch.equal(layer(x), second)


def test_an_input_of_another_width_is_a_typed_error():
    layer = adapted(packed())
    for mode in (contextlib.nullcontext(), torch.no_grad()):
        with mode, pytest.raises(ShapeError, match=r"expected last dimension 64"):
            layer(torch.randn(5, 63))
