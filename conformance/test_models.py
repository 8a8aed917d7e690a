"""Whole models, both directions: upstream writes, quantal loads and computes what upstream's own
dequantized weights give; quantal writes, upstream loads bitwise equal tensors."""

import json
from pathlib import Path

import gguf
import mlx.core as mx
import numpy
import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from optimum.quanto import QuantizedModelForCausalLM, qint2, qint4, qint8
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from weights import same_bits

import quantal

IDS = torch.arange(3, 43)[None] * 7 % 512


def llama(seed: int, dtype=torch.float32, **settings) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=64,
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def dense_folder(tmp_path: Path, seed: int, **settings) -> Path:
    llama(seed, **settings).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def load(method: str, path: Path, **settings) -> torch.nn.Module:
    config = quantal.QuantizationConfig(method, compute_dtype=torch.float32, **settings)
    adapter = quantal.create_quantization_adapter("cpu", config, support="extended")
    return adapter, adapter.load_quantized_model(path)


@torch.no_grad()
def check_logits(ours: torch.nn.Module, weights: dict[str, torch.Tensor], dense) -> None:
    """Logits of `ours` against a dense model that holds upstream's dequantized weights."""
    state = {n: weights[n].to(t.dtype).reshape(t.shape) for n, t in dense.state_dict().items()}
    dense.load_state_dict(state)
    expected = dense(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, expected, rtol=0, atol=2e-5)


def check_same_tensors(theirs: dict, ours: dict, skip=()) -> None:
    assert set(theirs) - set(skip) == set(ours) - set(skip)
    for name in set(theirs) - set(skip):
        assert same_bits(theirs[name], ours[name]), name


# ---------------------------------------------------------------------- bitsandbytes

BNB = {
    "nf4": ("bnb_nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4-double": (
        "bnb_nf4",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "fp4": ("bnb_nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "int8": ("bnb_int8", {"load_in_8bit": True}),
}


@pytest.mark.parametrize("name", list(BNB))
def test_bitsandbytes(name, tmp_path):
    method, settings = BNB[name]
    theirs = AutoModelForCausalLM.from_pretrained(
        dense_folder(tmp_path, 1),
        quantization_config=BitsAndBytesConfig(**settings),
        dtype=torch.float32,
        device_map="cpu",
    )
    theirs.save_pretrained(tmp_path / "theirs")
    weights = dict(theirs.state_dict())
    for path, module in theirs.named_modules():
        if type(module).__name__ == "Linear4bit":
            import bitsandbytes.functional as F

            weights[f"{path}.weight"] = F.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
        elif type(module).__name__ == "Linear8bitLt":
            state = module.state
            codes = module.weight.data if state.CB is None else state.CB
            scale = module.weight.SCB if state.SCB is None else state.SCB
            weights[f"{path}.weight"] = codes.float() * scale[:, None] * 0.007874015718698502
    adapter, ours = load(method, tmp_path / "theirs")
    check_logits(ours, weights, llama(0))
    adapter.save_quantized_model(ours, tmp_path / "ours")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "ours"))
    check_same_tensors(a, b)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- HQQ


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_native_folder(bits, axis, tmp_path):
    model = llama(bits)
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    AutoHQQHFModel.quantize_model(
        model, quant_config=config, compute_dtype=torch.float32, device="cpu"
    )
    AutoHQQHFModel.save_quantized(model, str(tmp_path / "theirs"))
    weights = {n: t for n, t in model.state_dict().items() if torch.is_tensor(t)}
    for path, module in model.named_modules():
        if isinstance(module, HQQLinear):
            weights[f"{path}.weight"] = module.dequantize()
    weights["lm_head.weight"] = model.lm_head.weight
    adapter, ours = load("hqq", tmp_path / "theirs")
    check_logits(ours, weights, llama(0))
    adapter.save_quantized_model(ours, tmp_path / "ours", layout="qmodel")
    a, b = (torch.load(tmp_path / d / "qmodel.pt", weights_only=False) for d in ("theirs", "ours"))
    assert set(a) == set(b)
    for path, fields in a.items():
        assert set(fields) == set(b[path]), path
        for name, value in fields.items():
            other = b[path][name]
            same = same_bits(value.data, other.data) if torch.is_tensor(value) else value == other
            assert same, (path, name, value, other)
    again = AutoHQQHFModel.from_quantized(
        str(tmp_path / "ours"), compute_dtype=torch.float32, device="cpu"
    )
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- Quanto


@pytest.mark.parametrize("qtype", [qint2, qint4, qint8], ids=lambda q: q.name)
def test_quanto(qtype, tmp_path):
    model = llama(11)
    theirs = QuantizedModelForCausalLM.quantize(model, weights=qtype, exclude="lm_head")
    theirs.save_pretrained(tmp_path / "theirs")
    weights = {}
    for name, parameter in model.named_parameters():
        weights[name] = getattr(parameter, "dequantize", lambda p=parameter: p.data)().detach()
    adapter, ours = load(f"quanto_int{qtype.bits}", tmp_path / "theirs")
    check_logits(ours, weights, llama(0))
    adapter.save_quantized_model(ours, tmp_path / "ours")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "ours"))
    check_same_tensors(a, b)
    maps = [json.loads((tmp_path / d / "quanto_qmap.json").read_text()) for d in ("theirs", "ours")]
    assert maps[0] == maps[1]
    again = QuantizedModelForCausalLM.from_pretrained(str(tmp_path / "ours"))
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- MLX

MLX = {
    "4bit": (64, 4, "affine"),
    "3bit": (32, 3, "affine"),
    "8bit": (64, 8, "affine"),
    "mxfp4": (32, 4, "mxfp4"),
    "mxfp8": (32, 8, "mxfp8"),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", list(MLX))
def test_mlx(name, tied, tmp_path):
    group, bits, mode = MLX[name]
    source = dense_folder(tmp_path, 5, tie_word_embeddings=tied)
    theirs, config = load_model(source)
    theirs, config = quantize_model(theirs, config, group, bits, mode=mode)
    (tmp_path / "theirs").mkdir()
    save_model(tmp_path / "theirs", theirs)
    save_config(config, config_path=tmp_path / "theirs" / "config.json")

    adapter, ours = load("mlx_int8" if bits == 8 else "mlx_int4", tmp_path / "theirs")
    with torch.no_grad():
        logits = ours(IDS).logits
    expected = numpy.array(theirs(mx.array(IDS.numpy())).astype(mx.float32))
    numpy.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=5e-4)
    adapter.save_quantized_model(ours, tmp_path / "ours")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "ours"))
    check_same_tensors(a, b)
    again, _ = load_model(tmp_path / "ours")
    assert mx.array_equal(again(mx.array(IDS.numpy())), theirs(mx.array(IDS.numpy())))


# ---------------------------------------------------------------------- conversion


@pytest.mark.parametrize("to", ["mlx", "quanto", "hqq", "bnb", "gguf", "dense"])
def test_converted_folders_load_upstream(to, tmp_path):
    """From an mlx folder to every dialect; upstream's reader computes what quantal computes."""
    source = dense_folder(tmp_path, 9)
    theirs, config = load_model(source)
    theirs, config = quantize_model(theirs, config, 32, 4)
    (tmp_path / "mlx").mkdir()
    save_model(tmp_path / "mlx", theirs)
    save_config(config, config_path=tmp_path / "mlx" / "config.json")
    target = tmp_path / ("model.gguf" if to == "gguf" else "out")
    report = quantal.convert(tmp_path / "mlx", target, to=to)
    assert report.layers
    if to == "gguf":
        reader = gguf.GGUFReader(target)
        assert {t.name for t in reader.tensors} >= {"token_embd.weight", "blk.1.ffn_up.weight"}
        return
    _, ours = load(
        {
            "mlx": "mlx_int4",
            "quanto": "quanto_int4",
            "hqq": "hqq",
            "bnb": "bnb_nf4",
            "dense": "none",
        }[to],
        target,
    )
    with torch.no_grad():
        logits = ours(IDS).logits
    if to == "mlx":
        other = numpy.array(load_model(target)[0](mx.array(IDS.numpy())).astype(mx.float32))
        other = torch.from_numpy(other)
    elif to == "quanto":
        other = QuantizedModelForCausalLM.from_pretrained(str(target))(IDS).logits
    else:
        other = AutoModelForCausalLM.from_pretrained(target, device_map="cpu", dtype=torch.float32)
        other = other(IDS).logits
    torch.testing.assert_close(logits, other.float(), rtol=0, atol=5e-4)
