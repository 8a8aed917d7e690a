"""HQQ at 8 and 4 bits against hqq 0.2.8.post1 on the CPU, both directions."""

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from hqq.core.utils import encode_safetensor_type
from weights import DTYPES, random_weight, same_bits, same_values

from quantal.testing import dequantize_tensors, quantize_tensors

SHAPES = [(64, 256), (40, 576), (64, 160), (24, 40)]
BITS = [8, 4]
GROUPS = [8, 16, 32, 64, 96, 128, 320]


def legal_groups(shape, axis):
    """Group sizes that divide the matrix and leave an even number of grouped rows."""
    numel = shape[0] * shape[1]
    rows = {g: g if axis == 0 else numel // g for g in GROUPS if numel % g == 0}
    return [g for g, r in rows.items() if r % 2 == 0]


def theirs_of(weight, bits, group, axis, optimize, dtype):
    """W_q and the rounded meta of hqq's quantizer."""
    codes, meta = Quantizer.quantize(
        weight,
        nbits=bits,
        group_size=group,
        axis=axis,
        optimize=optimize,
        round_zero=bits == 4,
        device="cpu",
        compute_dtype=dtype,
    )
    meta["compute_dtype"] = dtype
    return Quantizer.cpu(codes, meta)


def ours_of(weight, bits, group, axis, optimize, dtype):
    return quantize_tensors(
        weight,
        "hqq",
        bits=bits,
        group_size=group,
        axis=axis,
        optimize=optimize,
        value_dtype=dtype,
    )


def codes_of(packed, bits):
    """One code per element, in flat order of the grouped matrix."""
    flat = packed.reshape(-1).int()
    return flat if bits == 8 else torch.cat([flat >> 4, flat & 15])


def their_values(tensors):
    """What hqq decodes from our tensors."""
    meta = {name: tensors[name] for name in ("scale", "zero")}
    meta["nbits"] = int(tensors["nbits"])
    meta["group_size"] = int(tensors["group_size"])
    meta["axis"] = int(tensors["axis"])
    meta["shape"] = torch.Size(tensors["shape"].tolist())
    meta["packing"] = bytes(tensors["packing"].tolist()).decode()
    meta["compute_dtype"] = tensors["scale"].dtype
    meta["view_as_float"] = False
    return Quantizer.dequantize(tensors["W_q"], meta)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_solver_tensors_are_equal(shape, dtype, bits, axis):
    for seed, group in enumerate(legal_groups(shape, axis)):
        for weight_dtype in DTYPES:
            weight = random_weight(*shape, weight_dtype, seed)
            codes, meta = theirs_of(weight, bits, group, axis, False, dtype)
            ours = ours_of(weight, bits, group, axis, False, dtype)
            assert same_bits(ours["W_q"], codes), group
            assert same_bits(ours["scale"], meta["scale"]), group
            assert same_bits(ours["zero"], meta["zero"]), group
            assert same_values(their_values(ours), Quantizer.dequantize(codes, meta))
            assert same_values(dequantize_tensors(ours, "hqq", dtype), their_values(ours))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_with_solver_up_to_summation_order(bits, axis):
    """Means and the stopping rule depend on the order of summation, which upstream leaves to torch:
    at most 1 code in 20,000 differs, by one step, and never the final error by more than 0.1 %."""
    differing = total = 0
    for seed, shape in enumerate([(64, 256), (256, 512), (40, 576), (512, 1024)]):
        for group in legal_groups(shape, axis):
            weight = random_weight(*shape, DTYPES[seed % 3], 300 + seed)
            codes, meta = theirs_of(weight, bits, group, axis, True, torch.float32)
            ours = ours_of(weight, bits, group, axis, True, torch.float32)
            assert same_bits(ours["scale"], meta["scale"])
            distance = (codes_of(ours["W_q"], bits) - codes_of(codes, bits)).abs()
            assert distance.max() <= 1, group
            differing += int((distance != 0).sum())
            total += distance.numel()
            errors = [
                float((values.float() - weight.float()).double().square().sum())
                for values in (
                    dequantize_tensors(ours, "hqq", torch.float32),
                    Quantizer.dequantize(codes, meta),
                )
            ]
            assert errors[0] <= errors[1] * 1.001, group
    assert differing * 20000 <= total, f"{differing} of {total} codes differ"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_packages_decode_solved_tensors(dtype, bits, axis):
    for seed, shape in enumerate(SHAPES):
        for group in legal_groups(shape, axis):
            weight = random_weight(*shape, torch.float32, 400 + seed)
            ours = ours_of(weight, bits, group, axis, True, dtype)
            assert same_values(dequantize_tensors(ours, "hqq", dtype), their_values(ours)), group


def their_layer(shape, bits, group, axis, dtype, seed, optimize=False):
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = random_weight(*shape, torch.float32, seed)
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    config["weight_quant_params"]["optimize"] = optimize
    return HQQLinear(linear, quant_config=config, compute_dtype=dtype, device="cpu", del_orig=False)


@pytest.mark.parametrize("group", [64, None], ids=["group 64", "group None"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_state_dicts(dtype, bits, axis, group):
    """HQQLinear's encoded state dict and ours are the same tensors; each loads the other's."""
    layer = their_layer((64, 128), bits, group, axis, dtype, 17)
    theirs = {k: v.detach() for k, v in layer.state_dict().items()}
    ours = ours_of(layer.linear_layer.weight.data, bits, group or 0, axis, False, dtype)
    if group is None:
        # A None value has no encoding upstream; the layer itself replaces it by the row length.
        assert "group_size" in ours
        theirs["group_size"] = encode_safetensor_type(128 if axis == 1 else 64)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert same_bits(ours[name], tensor), name

    values = layer.dequantize()
    assert same_values(dequantize_tensors(theirs, "hqq", dtype), values)
    empty = HQQLinear(None, None, compute_dtype=dtype, device="cpu", initialize=False)
    empty.load_state_dict(ours)
    assert same_values(empty.dequantize(), values)


def test_view_as_float():
    weight = random_weight(64, 256, torch.float32, 23)
    codes, meta = Quantizer.quantize(
        weight,
        nbits=4,
        group_size=64,
        axis=1,
        device="cpu",
        round_zero=True,
        compute_dtype=torch.float16,
        view_as_float=True,
    )
    meta["compute_dtype"] = torch.float16
    codes, meta = Quantizer.cpu(codes, meta)
    tensors = ours_of(weight, 4, 64, 1, True, torch.float16)
    tensors.update(
        W_q=codes, scale=meta["scale"], zero=meta["zero"], view_as_float=torch.tensor(1).byte()
    )
    ours = dequantize_tensors(tensors, "hqq", torch.float16)
    assert same_values(ours, Quantizer.dequantize(codes, meta))
