"""Replacing layers: which modules are found, in which order, and what the rows say."""

import copy

import pytest
import torch
from torch import nn

from conftest import hqq
from quantal import QuantizedLinear, create_quantization_adapter


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 128, bias=False)
        self.norm = nn.LayerNorm(64)


class Outer(nn.Module):
    """Layers of its own before, between and after those of its children, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.blocks = nn.ModuleList([Inner(), Inner()])
        self.again = self.blocks[1].up
        self.twice = self.blocks[0]
        self.last = nn.Linear(64, 32)
        self.table = self.same_table = nn.Parameter(torch.randn(4, 64))


@pytest.fixture
def replaced():
    torch.manual_seed(3)
    dense = Outer()
    adapter = create_quantization_adapter("cpu", hqq())
    return dense, adapter.quantize_model(copy.deepcopy(dense)), adapter.report.entries


def test_rows_come_in_the_order_of_the_modules(replaced):
    dense, _, rows = replaced
    linear = [n for n, m in dense.named_modules() if isinstance(m, nn.Linear)]
    others = [
        n
        for n, m in dense.named_modules()
        if not isinstance(m, nn.Linear) and any(True for _ in m.parameters(recurse=False))
    ]
    assert [row["name"] for row in rows] == linear + others
    assert linear == ["first", "blocks.0.up", "blocks.1.up", "last"] and others[0] == ""


def test_a_module_that_is_used_twice_is_replaced_in_both_places(replaced):
    _, model, _ = replaced
    assert isinstance(model.again, QuantizedLinear) and model.again is model.blocks[1].up
    assert model.twice is model.blocks[0] and isinstance(model.twice.up, QuantizedLinear)


def test_rows_count_every_parameter_once(replaced):
    dense, model, rows = replaced
    by_name = {row["name"]: row for row in rows}
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in dense.parameters())
    assert sum(row["bytes_before"] for row in rows) == sum(p.nbytes for p in dense.parameters())
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            bias = 0 if layer.bias is None else layer.bias.nbytes
            assert by_name[name]["bytes_after"] == layer.packed_bytes() + bias
            weight = dense.get_submodule(name).weight
            assert by_name[name]["relative_error"] == pytest.approx(
                layer.relative_error(weight), rel=0.05
            )


@pytest.mark.parametrize("training", [True, False])
def test_layers_keep_mode_and_bias(training):
    dense = Outer().train(training)
    bias = dense.first.bias
    model = create_quantization_adapter("cpu", hqq()).quantize_model(dense)
    assert model.first.training is training and model.first.bias is bias
    assert model.again.bias is None and "bias" in dict(model.again._parameters)


def test_layers_of_one_form_share_nothing():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    create_quantization_adapter("cpu", hqq()).quantize_model(model)
    model[0].spec[0] = 99
    assert model[1].spec.tolist() == model[1]._spec and model[1]._spec[0] != 99
    assert model[0].spec.device == model[0].codes.device
    first, second = map(vars, model)
    assert first["_spec"] is not second["_spec"]
    for name, value in vars(nn.Module()).items():  # as nn.Module.__init__ would have made them
        assert type(first[name]) is type(value)
        assert value is None or isinstance(value, bool) or first[name] is not second[name]
    hook = model[0].register_forward_hook(lambda *_: None)
    assert len(model[0]._forward_hooks) == 1 and len(model[1]._forward_hooks) == 0
    hook.remove()
