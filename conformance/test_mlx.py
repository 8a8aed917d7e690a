"""MLX against mlx 0.32.4 and mlx-lm 0.29.1 on the CPU, both directions: tensors of single layers,
and folders with settings of their own per layer. Whole models with logits are in test_models.py."""

import json
import math

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from weights import DTYPES, random_weight, same_bits, same_values

from quantal import _core
from quantal.testing import dequantize_tensors, quantize_tensors

BITS = [1, 2, 3, 4, 5, 6, 8]
GROUPS = [32, 64, 128]
DTYPE_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
MODES = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
SHAPES = [(64, 256), (40, 640), (7, 128), (24, 1408)]
MLX_DTYPES = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}
TORCH_DTYPES = {mlx: torch_ for torch_, mlx in MLX_DTYPES.items()}


def to_mlx(tensor):
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.contiguous().view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.contiguous().numpy())


def to_torch(array):
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(numpy.array(array.view(mx.int16))).view(torch.bfloat16)
    return torch.from_numpy(numpy.array(array))


def upstream(weight, **settings):
    """What mx.quantize makes of a torch matrix, by the names of a layer."""
    parts = mx.quantize(to_mlx(weight), **settings)
    return {n: to_torch(p) for n, p in zip(("weight", "scales", "biases"), parts, strict=False)}


def upstream_values(tensors, dtype, **settings):
    biases = to_mlx(tensors["biases"]) if "biases" in tensors else None
    return to_torch(
        mx.dequantize(
            to_mlx(tensors["weight"]),
            to_mlx(tensors["scales"]),
            biases,
            dtype=MLX_DTYPES[dtype],
            **settings,
        )
    )


def check_layer(weight, bits, group_size, mode):
    settings = {"bits": bits, "group_size": group_size, "mode": mode}
    theirs = upstream(weight, **settings)
    ours = quantize_tensors(weight, "mlx", **settings)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert same_bits(ours[name], tensor), (name, settings)
    values = upstream_values(ours, weight.dtype, **settings)
    facts = {**settings, "dtype": str(weight.dtype).removeprefix("torch.")}
    decoded = dequantize_tensors(theirs, "mlx", weight.dtype, settings=json.dumps(facts))
    # A group whose byte has wrapped can decode to NaN; NaN equals NaN here.
    torch.testing.assert_close(decoded, values, rtol=0, atol=0, equal_nan=True)


def weights_for(dtype, seed):
    """Matrices of every shape; and one that reaches far up and down the exponents."""
    for index, shape in enumerate(SHAPES):
        yield random_weight(*shape, dtype, 10 * seed + index)
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(-40, 5, (32, 256), generator=generator).float()
    yield (torch.randn(32, 256, generator=generator) * 10.0**spread).to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_tensors_are_equal(dtype, bits):
    for seed, group in enumerate(GROUPS):
        for weight in weights_for(dtype, seed):
            check_layer(weight, bits, group, "affine")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floating_tensors_are_equal(dtype, mode):
    group, bits = MODES[mode]
    for seed in range(4):
        for weight in weights_for(dtype, 50 + seed):
            check_layer(weight, bits, group, mode)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_scales_around_every_power_of_two(mode):
    """The exponent of a group is an exact ceil(log2): 2^k, its neighbours above and below."""
    group, bits = MODES[mode]
    most = 6.0 if bits == 4 else 448.0
    powers = 2.0 ** torch.arange(-148, 119, dtype=torch.float64)
    near = torch.stack([powers * (1 + j * 2.0**-23) for j in (-1, 0, 1, 2, 3, 22, 23, 45)], 1)
    peaks = (near.flatten() * most).float()
    peaks = peaks[torch.isfinite(peaks)]
    weight = torch.linspace(-1, 1, group).repeat(len(peaks), 1) * peaks[:, None]
    check_layer(weight, bits, group, mode)


def test_weights_beyond_the_largest_nvfp4_scale():
    """Where the scale saturates, distances are those of float32; far out all codes are 0."""
    peaks = 10.0 ** torch.linspace(2, 38, 64)
    weight = torch.linspace(-1, 1, 16).repeat(64, 1) * peaks[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        check_layer(weight.to(dtype), 4, 16, "nvfp4")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_scale_byte_decodes(dtype, mode):
    """All 256 scale bytes, each with all codes, in every dtype that can be asked for."""
    group, bits = MODES[mode]
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    if bits == 4:
        codes = codes[:, :128]
    count = codes.shape[1] * 8 // bits // group
    tensors = {
        "weight": codes.contiguous().view(torch.uint32),
        "scales": torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, count),
    }
    settings = {"bits": bits, "group_size": group, "mode": mode}
    theirs = upstream_values(tensors, dtype, **settings)
    facts = json.dumps({**settings, "dtype": str(dtype).removeprefix("torch.")})
    ours = dequantize_tensors(tensors, "mlx", dtype, settings=facts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_codes_and_statistics_decode(dtype, bits):
    """Any bytes, not only what a quantizer writes."""
    generator = torch.Generator().manual_seed(bits)
    packed = torch.randint(-(2**31), 2**31, (16, 8 * bits), generator=generator, dtype=torch.int64)
    tensors = {"weight": packed.to(torch.int32).view(torch.uint32)}
    for name in ("scales", "biases"):
        tensors[name] = torch.randn(16, 4, generator=generator).to(dtype)
    settings = {"bits": bits, "group_size": 64, "mode": "affine"}
    theirs = upstream_values(tensors, dtype, **settings)
    ours = dequantize_tensors(tensors, "mlx", dtype, settings=json.dumps(settings))
    assert same_values(ours, theirs)


def test_layer_modules():
    """QuantizedLinear and QuantizedEmbedding hold the tensors that quantal makes."""
    linear = mlx_nn.Linear(256, 64)
    embedding = mlx_nn.Embedding(64, 128)
    for module, group, bits, mode in (
        (linear, 64, 4, "affine"),
        (linear, 32, 6, "affine"),
        (linear, 32, 4, "mxfp4"),
        (embedding, 32, 8, "affine"),
        (embedding, 16, 4, "nvfp4"),
    ):
        theirs = dict(module.to_quantized(group_size=group, bits=bits, mode=mode).items())
        ours = quantize_tensors(
            to_torch(module.weight), "mlx", bits=bits, group_size=group, mode=mode
        )
        assert set(theirs) - {"bias"} == set(ours)
        for name, tensor in ours.items():
            assert same_bits(tensor, to_torch(theirs[name])), name


# ---------------------------------------------------------------------- folders


def dense_folder(path, dtype):
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        attention_bias=True,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    return path


def mixed(path, module):
    """Settings of a layer: some of their own, one of them dense, the rest the global ones."""
    if path.endswith("down_proj"):
        return {"group_size": 32, "bits": 8}
    if path.endswith("gate_proj"):
        return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    if path == "lm_head":
        return {"bits": 6}
    return not path.endswith("layers.1.self_attn.o_proj")


def save_with_mlx_lm(dense, path, group=64, bits=4, mode="affine", predicate=None):
    model, config = load_model(dense)
    model, config = quantize_model(model, config, group, bits, mode=mode, quant_predicate=predicate)
    path.mkdir()
    save_model(path, model)
    save_config(config, config_path=path / "config.json")
    return model


def tensors_of(model):
    return {name: to_torch(array) for name, array in tree_flatten(model.parameters())}


def rewrite(source, target, layout=""):
    """Loads a folder and saves it; only packed matrices and dense tensors lie between."""
    loaded = _core.load_checkpoint(str(source))
    dense = []
    for name, tensor in loaded["tensors"].items():
        data = bytearray(math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype])
        tensor.copy_into(data)
        dense.append((name, (tensor.dtype, tensor.shape, data)))
    layers = list(loaded["layers"].items())
    _core.save_checkpoint(str(target), loaded["config_json"], layers, dense, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["4bit", "mixed", "nvfp4", "5bit"])
def test_mlx_lm_folders_come_back(name, dtype, tmp_path):
    """mlx-lm writes, quantal loads and saves, mlx-lm loads the same bits, settings included."""
    settings = {
        "4bit": {},
        "mixed": {"predicate": mixed},
        "nvfp4": {"group": 16, "bits": 4, "mode": "nvfp4"},
        "5bit": {"group": 32, "bits": 5},
    }[name]
    theirs = save_with_mlx_lm(dense_folder(tmp_path / "dense", dtype), tmp_path / "a", **settings)
    rewrite(tmp_path / "a", tmp_path / "b")
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in "ab"]
    blocks = [dict(config["quantization"]) for config in configs]
    blocks[0] = {path: block for path, block in blocks[0].items() if block is not False}
    if name == "mixed":
        assert blocks[1].pop("lm_head") == {"group_size": 64, "bits": 6}
        assert blocks[0].pop("lm_head") == {"bits": 6}
        # `true` entries of mlx-lm say the global settings again.
        blocks[0] = {path: block for path, block in blocks[0].items() if block is not True}
    assert blocks[0] == blocks[1]
    assert configs[1]["quantization_config"] == configs[1]["quantization"]
    files = [load_file(tmp_path / d / "model.safetensors") for d in "ab"]
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[0].items():
        assert same_bits(files[1][key], tensor), key
    indexes = [
        json.loads((tmp_path / d / "model.safetensors.index.json").read_text()) for d in "ab"
    ]
    assert indexes[0]["weight_map"] == indexes[1]["weight_map"]
    assert indexes[0]["metadata"]["total_size"] == indexes[1]["metadata"]["total_size"]
    again, _ = load_model(tmp_path / "b")
    expected, actual = tensors_of(theirs), tensors_of(again)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert same_bits(actual[key], tensor), key


@pytest.mark.parametrize("layout", ["npz", "guide"])
def test_npz_folders(layout, tmp_path):
    """What quantal writes as npz is what mx.load reads, and quantal reads what mx.savez writes."""
    dense = dense_folder(tmp_path / "dense", torch.bfloat16)
    theirs = save_with_mlx_lm(dense, tmp_path / "a", 32, 4)
    rewrite(tmp_path / "a", tmp_path / "b", layout=layout)
    file = next((tmp_path / "b").glob("*.npz"))
    expected = tensors_of(theirs)
    loaded = mx.load(str(file))
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        array = loaded[key]
        if tensor.dtype == torch.bfloat16 and array.dtype != mx.bfloat16:
            array = array.view(mx.bfloat16)
        assert same_bits(to_torch(array), tensor), key
    mx.savez(str(file), **dict(tree_flatten(theirs.parameters())))
    rewrite(tmp_path / "b", tmp_path / "c")
    again, _ = load_model(tmp_path / "c")
    for key, tensor in tensors_of(again).items():
        assert same_bits(tensor, expected[key]), key
