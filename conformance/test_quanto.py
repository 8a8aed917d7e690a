"""qint2, qint4, qint8 and float8 against optimum-quanto 0.2.7 on the CPU, both directions."""

import json

import pytest
import torch
from optimum.quanto import (
    AbsmaxOptimizer,
    HqqOptimizer,
    MaxOptimizer,
    QuantizedModelForCausalLM,
    freeze,
    qint2,
    qint4,
    qint8,
    qtypes,
    quantization_map,
    quantize,
    quantize_weight,
    requantize,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from weights import DTYPES, random_weight, same_bits, same_values

from quantal import QuantizedLinear
from quantal.testing import dequantize_tensors, quantize_tensors

QBITS = [qint2, qint4]
SHAPES = [(24, 256), (9, 384), (64, 160), (40, 144), (7, 64), (2, 320)]
ACTIVATION_SCALES = {"input_scale", "output_scale"}


def method_of(qtype):
    return "quanto_" + qtype.name[1:]


def state_of(tensor, prefix="weight."):
    out = {}
    tensor.save_to_state_dict(out, prefix, False)
    return out


def groups_of(shape, axis):
    length = shape[1] if axis == 0 else shape[0]
    return [None, *(g for g in (16, 32, 64, 96, 128) if length % g == 0)]


def theirs_of(weight, qtype, axis, group, zeropoint=False, optimizer=None):
    scale, shift = (optimizer or MaxOptimizer())(weight, qtype, axis, group, zeropoint)
    return quantize_weight(weight, qtype, axis, scale, shift, group, optimized=False)


def ours_of(weight, qtype, axis, group, mode="exact_group"):
    return quantize_tensors(weight, method_of(qtype), axis=axis, group_size=group or 0, mode=mode)


def assert_same_tensors(ours, theirs):
    """Equal keys and bits. The sign of a zero scale or shift is left out: where a group holds +0
    and -0, the smallest is either, depending on the vector width that torch uses."""
    ours = {k: v for k, v in ours.items() if k not in ACTIVATION_SCALES}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        same = same_values if tensor.is_floating_point() else same_bits
        assert ours[name].shape == tensor.shape, name
        assert same(ours[name], tensor), name


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("qtype", QBITS, ids=str)
@pytest.mark.parametrize("zeropoint", [False, True], ids=["shift", "zeropoint"])
def test_max_optimizer(zeropoint, qtype, dtype, axis):
    mode = "exact_group,zeropoint" if zeropoint else "exact_group"
    for seed, shape in enumerate(SHAPES):
        for group in groups_of(shape, axis):
            weight = random_weight(*shape, dtype, seed)
            theirs = theirs_of(weight, qtype, axis, group, zeropoint)
            ours = ours_of(weight, qtype, axis, group, mode)
            assert_same_tensors(ours, state_of(theirs))
            values = dequantize_tensors(
                state_of(theirs), "quanto", dtype, weight_shape=shape, settings=settings_of(qtype)
            )
            assert same_values(values, theirs.dequantize()), (shape, group)


def settings_of(qtype):
    return json.dumps({"weights": qtype.name, "activations": "none"})


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qint8(dtype, axis):
    for seed, shape in enumerate([*SHAPES, (1, 96), (33, 1)]):
        weight = random_weight(*shape, dtype, 50 + seed)
        scale = AbsmaxOptimizer()(weight, qint8, axis)
        theirs = quantize_weight(weight, qint8, axis, scale)
        ours = quantize_tensors(weight, "quanto_int8", axis=axis)
        assert_same_tensors(ours, state_of(theirs))
        values = dequantize_tensors(ours, "quanto", dtype)
        assert same_values(values, theirs.dequantize()), shape


@pytest.mark.parametrize("qtype", QBITS, ids=str)
def test_single_rows(qtype):
    """An axis of size 1: upstream makes every weight its own group."""
    for dtype in DTYPES:
        weight = random_weight(1, 96, dtype, 7)
        theirs = theirs_of(weight, qtype, 0, None)
        ours = quantize_tensors(weight, method_of(qtype))
        assert_same_tensors(ours, state_of(theirs))
        assert ours["weight._scale"].shape == (1, 96)


@pytest.mark.parametrize("qtype", QBITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hqq_optimizer(dtype, qtype):
    """Means are sums of torch in float32 upstream: at most 1 code in 10,000 differs."""
    differing = total = 0
    for seed, shape in enumerate([(64, 256), (128, 512), (40, 384)]):
        for axis in (0, -1):
            for group in groups_of(shape, axis):
                weight = random_weight(*shape, dtype, 80 + seed)
                # Constant groups, where the mean decides between 0 / 0 and 1e-9 / 0, decode alike.
                weight += torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1e-2
                theirs = theirs_of(weight, qtype, axis, group, optimizer=HqqOptimizer())
                ours = ours_of(weight, qtype, axis, group, "hqq,exact_group")
                state = state_of(theirs)
                assert same_values(ours["weight._scale"], state["weight._scale"])
                name = "weight._data._data"
                differing += int((ours[name] != state[name]).sum())
                total += state[name].numel()
                settings = {"weight_shape": shape, "settings": settings_of(qtype)}
                values = dequantize_tensors(ours, "quanto", dtype, **settings)
                errors = [
                    float((v.double() - weight.double()).abs().mean())
                    for v in (values, theirs.dequantize())
                ]
                assert errors[0] <= errors[1] * 1.001, (shape, axis, group)
    assert differing * 10000 <= total, f"{differing} of {total} bytes differ"


@pytest.mark.parametrize("name", ["qfloat8_e4m3fn", "qfloat8_e5m2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float8_is_read_and_written_back(dtype, name):
    for axis in (0, -1):
        for seed, shape in enumerate([*SHAPES, (1, 96)]):
            weight = random_weight(*shape, dtype, 60 + seed)
            scale = AbsmaxOptimizer()(weight, qtypes[name], axis)
            theirs = quantize_weight(weight, qtypes[name], axis, scale)
            state = state_of(theirs)
            values = theirs.dequantize()
            # Defect upstream: rows of zeros are 0 / 0. They are zeros here.
            expected = torch.where(values.isnan(), torch.zeros_like(values), values)
            assert same_values(dequantize_tensors(state, "quanto", dtype), expected)
            back = QuantizedLinear.from_upstream(state, "quanto").to_upstream()
            assert back.keys() == state.keys()
            for key, tensor in state.items():
                assert same_bits(back[key], tensor), key


def linear_of(shape, dtype, seed):
    linear = torch.nn.Linear(shape[1], shape[0], dtype=dtype)
    linear.weight.data = random_weight(*shape, dtype, seed)
    return torch.nn.Sequential(linear)


def tinygemm_shift(scale, shift):
    """Defect upstream: on a CPU, bfloat16 qint4 modules in groups of 128 are kept for a kernel that
    stores the middle of the range, so that what is saved was rounded twice."""
    half = 8 * scale
    return half - (half - shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("qtype", [*QBITS, qint8], ids=str)
def test_modules(qtype, dtype):
    """quantize() and freeze() with their own choice of groups; requantize() loads our tensors."""
    for seed, shape in enumerate([(32, 256), (40, 192), (16, 160), (24, 144), (8, 128), (8, 64)]):
        model = linear_of(shape, dtype, 20 + seed)
        ours = quantize_tensors(model[0].weight.data, method_of(qtype), prefix="0.", group_size=64)
        quantize(model, weights=qtype)
        freeze(model)
        state = model.state_dict()
        bias = state.pop("0.bias")
        assert ours.keys() == state.keys()
        stored = dict(ours)
        if qtype == qint4 and dtype == torch.bfloat16 and shape[1] == 256:
            stored["0.weight._shift"] = tinygemm_shift(
                ours["0.weight._scale"], ours["0.weight._shift"]
            )
        for name, tensor in state.items():
            same = same_values if tensor.is_floating_point() else same_bits
            assert same(stored[name], tensor), name

        fresh = linear_of(shape, dtype, 0)
        requantize(fresh, {**stored, "0.bias": bias}, quantization_map(model))
        assert same_values(fresh[0].weight.dequantize(), model[0].weight.dequantize())
        settings = json.dumps(quantization_map(model)["0"])
        values = dequantize_tensors(
            stored, "quanto", dtype, prefix="0.", settings=settings, weight_shape=shape
        )
        assert same_values(values, fresh[0].weight.dequantize())


def small_llama(dtype):
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    return LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("weights", ["qint2", "qint4", "qint8", "qfloat8"])
def test_model_folder(weights, tmp_path):
    """save_pretrained, through our packed form, from_pretrained: bitwise equal tensors."""
    # Upstream crashes in the bfloat16 product of its int8 weights (_weight_int8pack_mm).
    dtype = torch.bfloat16 if weights == "qint4" else torch.float32
    model = small_llama(dtype)
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if hasattr(m, "weight")}
    quantized = QuantizedModelForCausalLM.quantize(model, weights=weights, exclude="lm_head")
    quantized.save_pretrained(tmp_path)
    before = QuantizedModelForCausalLM.from_pretrained(str(tmp_path))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    qmap = json.loads((tmp_path / "quanto_qmap.json").read_text())
    rewritten = dict(tensors)
    for name, entry in qmap.items():
        prefix = name + "."
        layer = QuantizedLinear.from_upstream(
            tensors, "quanto", prefix, settings=json.dumps(entry), weight_shape=shapes[name]
        )
        for key, tensor in layer.to_upstream(prefix).items():
            assert same_bits(tensor, tensors[key]), key
            rewritten[key] = tensor
        entry["weight_shape"] = list(shapes[name])  # our key in the map, ignored upstream
    save_file(rewritten, path, metadata={"format": "pt"})
    (tmp_path / "quanto_qmap.json").write_text(json.dumps(qmap))
    again = QuantizedModelForCausalLM.from_pretrained(str(tmp_path))
    assert quantization_map(again._wrapped) == quantization_map(before._wrapped)
    states = [m._wrapped.state_dict() for m in (before, again)]
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert same_bits(states[1][key], tensor), key
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, before(ids).logits)
