"""Small whole models, both directions, in every form a folder can have: upstream writes, quantal
loads and computes what upstream's own decoded weights give; quantal writes, upstream loads bitwise
equal tensors. The real model is in test_smollm2.py."""

import mlx.core as mx
import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_mlx
from models import (
    IDS,
    adapter,
    check_logits,
    check_same_files,
    check_same_tensors,
    dense_folder,
    json_of,
    llama,
    load,
    mlx_folder,
    mlx_to_torch,
    mlx_values,
    save,
    tensors_in,
    torch_values,
)
from optimum.quanto import (
    QuantizedModelForCausalLM,
    freeze,
    qfloat8,
    qint2,
    qint4,
    qint8,
    quantization_map,
    quantize,
    requantize,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    HqqConfig,
    LlamaForCausalLM,
)
from weights import DTYPES

import quantal

#: Settings of two models: with biases and an output layer of its own, and neither.
KINDS = [
    {"tie_word_embeddings": False, "attention_bias": True},
    {"tie_word_embeddings": True},
]
CPU = {"device_map": "cpu", "dtype": torch.float32}

# ---------------------------------------------------------------------- bitsandbytes

BNB = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
    "int8-skips": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "down_proj"]},
    "int8-threshold": {"load_in_8bit": True, "llm_int8_threshold": 4.5},
} | {
    f"nf4-{storage}": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": storage,
    }
    for storage in ("bfloat16", "float16", "float32", "int8")
}


def bnb_folder(path, name, seed=1, dtype=torch.float32, shards=None, **settings):
    theirs = AutoModelForCausalLM.from_pretrained(
        dense_folder(path, seed, **settings),
        quantization_config=BitsAndBytesConfig(**BNB[name]),
        device_map="cpu",
        dtype=dtype,
    )
    theirs.save_pretrained(path / "theirs", max_shard_size=shards or "5GB")
    return theirs


@pytest.mark.parametrize("kind", KINDS, ids=["untied", "tied"])
@pytest.mark.parametrize("name", list(BNB))
def test_bitsandbytes(name, kind, tmp_path):
    theirs = bnb_folder(tmp_path, name, **kind)
    ours = load(tmp_path / "theirs")
    check_logits(ours, torch_values(theirs))
    save(ours, tmp_path / "ours")
    check_same_files(tmp_path / "theirs", tmp_path / "ours")
    a, b = (
        json_of(tmp_path / d / "config.json")["quantization_config"] for d in ("theirs", "ours")
    )
    for key in ("bnb_4bit_quant_storage", "llm_int8_threshold", "load_in_4bit", "load_in_8bit"):
        assert a[key] == b[key], key
    # Upstream casts storage of 16 bits to the dtype of the model, unless it is the same.
    storage = getattr(torch, str(b["bnb_4bit_quant_storage"]))
    dtype = storage if storage in (torch.float16, torch.bfloat16) else torch.float32
    again, before = (
        AutoModelForCausalLM.from_pretrained(tmp_path / d, device_map="cpu", dtype=dtype)
        for d in ("ours", "theirs")
    )
    check_same_tensors(before.state_dict(), again.state_dict())
    assert torch.equal(again(IDS).logits, before(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["nf4-double", "fp4", "int8"])
def test_bitsandbytes_in_16_bits(name, dtype, tmp_path):
    theirs = bnb_folder(tmp_path, name, dtype=dtype)
    ours = load(tmp_path / "theirs", compute_dtype=dtype)
    expected = theirs(IDS).logits.float()
    assert ours.dtype == dtype
    difference = (ours(IDS).logits.float() - expected).abs().max() / expected.abs().max()
    assert difference <= 16 * torch.finfo(dtype).eps  # roundings of every layer
    save(ours, tmp_path / "ours")
    check_same_files(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_block_sizes(quant_type, nested, tmp_path):
    """transformers always writes blocks of 64 and reads any."""
    for block in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        made = adapter("bnb", block_size=block, quant_type=quant_type, double_quant=nested)
        model = made.quantize_model(llama(block))
        path = tmp_path / str(block)
        made.save_quantized_model(model, path)
        theirs = AutoModelForCausalLM.from_pretrained(path, **CPU)
        state = theirs.model.layers[1].mlp.down_proj.weight.quant_state
        assert (state.blocksize, state.nested, state.quant_type) == (block, nested, quant_type)
        theirs.save_pretrained(path / "again")
        check_same_tensors(tensors_in(path), tensors_in(path / "again"))
        check_logits(model, decoded(model))


def decoded(model):
    """Our own values of a model, by the names of the dense one."""
    values = {n: t for n, t in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, quantal.QuantizedLinear):
            values[f"{path}.weight"] = module.weight.detach()
    return values


@pytest.mark.parametrize("name", ["nf4-double", "int8"])
def test_sharded_folders(name, tmp_path):
    """Several files and an index, theirs and ours."""
    theirs = bnb_folder(tmp_path, name, shards="200KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = load(tmp_path / "theirs")
    check_logits(ours, torch_values(theirs))
    save(ours, tmp_path / "ours", max_shard_size="150KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    check_same_files(tmp_path / "theirs", tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **CPU)
    check_same_tensors(theirs.state_dict(), again.state_dict())


# ---------------------------------------------------------------------- HQQ


def hqq_model(seed, dtype=torch.float32, config=None, **settings):
    model = llama(seed, dtype, **settings)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=dtype, device="cpu")
    return model


def check_qmodel(theirs, path, dtype):
    """theirs -> ours -> theirs through qmodel.pt."""
    AutoHQQHFModel.save_quantized(theirs, str(path / "theirs"))
    ours = load(path / "theirs")
    check_logits(ours.float(), torch_values(theirs))
    save(load(path / "theirs"), path / "ours", layout="qmodel")
    files = [torch.load(path / d / "qmodel.pt", weights_only=False) for d in ("theirs", "ours")]
    check_same_tensors(*files)
    again = AutoHQQHFModel.from_quantized(str(path / "ours"), compute_dtype=dtype, device="cpu")
    check_same_tensors(torch_values(theirs), torch_values(again))
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("kind", KINDS, ids=["untied", "tied"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1.58, 1])
def test_hqq_native_folder(bits, axis, kind, tmp_path):
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    theirs = hqq_model(int(bits), config=config, **kind)
    check_qmodel(theirs, tmp_path, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_hqq_native_folder_in_16_bits(dtype, tmp_path):
    """Upstream decodes in the 16-bit type; in float32 our model multiplies just these values."""
    theirs = hqq_model(3, dtype, BaseQuantizeConfig(nbits=4, group_size=64, axis=1))
    check_qmodel(theirs, tmp_path, dtype)


def test_hqq_layers_of_different_forms(tmp_path):
    """A configuration per kind of layer; layers without one stay dense."""
    config = {
        "self_attn.q_proj": BaseQuantizeConfig(nbits=4, group_size=32, axis=1),
        "self_attn.v_proj": BaseQuantizeConfig(nbits=8, group_size=128, axis=0),
        "mlp.gate_proj": BaseQuantizeConfig(nbits=3, group_size=64, axis=1),
        "mlp.down_proj": BaseQuantizeConfig(nbits=2, group_size=16, axis=1),
    }
    theirs = hqq_model(4, config=config)
    assert isinstance(theirs.model.layers[0].mlp.gate_proj, HQQLinear)
    assert not isinstance(theirs.model.layers[0].mlp.up_proj, HQQLinear)
    check_qmodel(theirs, tmp_path, torch.float32)


FIRST, SECOND = ({"nbits": b, "group_size": g} for b, g in ((4, 32), (8, 64)))
HQQ = {
    "8bit": {"nbits": 8, "group_size": 128, "axis": 1},
    "4bit": {"nbits": 4, "group_size": 64, "axis": 1},
    "4bit-axis0": {"nbits": 4, "group_size": 64, "axis": 0},
    "3bit": {"nbits": 3, "group_size": 64, "axis": 1},
    "2bit": {"nbits": 2, "group_size": 16, "axis": 1},
    "1bit": {"nbits": 1, "group_size": 32, "axis": 1},
    "dynamic": {
        "dynamic_config": {
            f"{block}.{name}_proj": config
            for block, names, config in (
                ("self_attn", "qkvo", FIRST),
                ("mlp", ("gate", "up", "down"), SECOND),
            )
            for name in names
        }
    },
}


@pytest.mark.parametrize("kind", KINDS, ids=["untied", "tied"])
@pytest.mark.parametrize("name", list(HQQ))
def test_hqq_folders_of_transformers(name, kind, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(
        dense_folder(tmp_path, 6, **kind), quantization_config=HqqConfig(**HQQ[name]), **CPU
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    check_logits(ours, torch_values(theirs))
    save(ours, tmp_path / "ours")
    check_same_files(tmp_path / "theirs", tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **CPU)
    check_same_tensors(torch_values(theirs), torch_values(again))


def test_hqq_safetensors(tmp_path):
    """save_to_safetensors: files of several blocks each."""
    theirs = hqq_model(5, config=BaseQuantizeConfig(nbits=4, group_size=64, axis=1))
    AutoHQQHFModel.save_to_safetensors(theirs, str(tmp_path / "theirs"), num_blocks_per_file=1)
    ours = load(tmp_path / "theirs")
    check_logits(ours, torch_values(theirs))
    save(ours, tmp_path / "ours", layout="hqq")
    check_same_files(tmp_path / "theirs", tmp_path / "ours")


# ---------------------------------------------------------------------- Quanto

QTYPES = [qint2, qint4, qint8, qfloat8]


@pytest.mark.parametrize("kind", KINDS, ids=["untied", "tied"])
@pytest.mark.parametrize("qtype", QTYPES, ids=lambda q: q.name)
def test_quanto(qtype, kind, tmp_path):
    model = llama(11, **kind)
    theirs = QuantizedModelForCausalLM.quantize(model, weights=qtype, exclude="lm_head")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    check_logits(ours, torch_values(model))
    save(ours, tmp_path / "ours")
    check_same_files(tmp_path / "theirs", tmp_path / "ours")
    a, b = (json_of(tmp_path / d / "quanto_qmap.json") for d in ("theirs", "ours"))
    assert a == b
    again = QuantizedModelForCausalLM.from_pretrained(str(tmp_path / "ours"))
    check_same_tensors(model.state_dict(), again._wrapped.state_dict())
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_quanto_sharded_folder(tmp_path):
    model = llama(12)
    theirs = QuantizedModelForCausalLM.quantize(model, weights=qint4, exclude="*down_proj")
    theirs.save_pretrained(tmp_path / "theirs")  # has no limit to set; what it calls has
    (tmp_path / "theirs" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = load(tmp_path / "theirs")
    check_logits(ours, torch_values(model))
    save(ours, tmp_path / "ours", max_shard_size="150KB")
    check_same_files(tmp_path / "theirs", tmp_path / "ours")
    again = QuantizedModelForCausalLM.from_pretrained(str(tmp_path / "ours"))
    check_same_tensors(model.state_dict(), again._wrapped.state_dict())


@pytest.mark.parametrize("qtype", QTYPES, ids=lambda q: q.name)
def test_quanto_torch_file(qtype, tmp_path):
    """A state dict that torch.save wrote, beside config.json, and back into requantize()."""
    model = llama(13)
    quantize(model, weights=qtype)
    freeze(model)
    (tmp_path / "theirs").mkdir()
    torch.save(model.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    check_logits(ours, torch_values(model))
    save(ours, tmp_path / "ours", layout="guide")
    state = torch.load(tmp_path / "ours" / "pytorch_model.bin")
    fresh = llama(0)
    requantize(fresh, state, quantization_map(model))
    check_same_tensors(torch_values(model), torch_values(fresh))


# ---------------------------------------------------------------------- MLX


def mixed(path, module):
    """Settings of a layer: some of their own, some dense, the rest the global ones."""
    if path.endswith("down_proj"):
        return {"group_size": 32, "bits": 8}
    if path.endswith("gate_proj"):
        return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    return hasattr(module, "to_quantized") and not path.endswith("layers.1.self_attn.o_proj")


MLX = {
    "2bit": (64, 2),
    "3bit": (32, 3),
    "4bit": (64, 4),
    "5bit": (128, 5),
    "6bit": (64, 6),
    "8bit": (128, 8),
    "mxfp4": (32, 4, "mxfp4"),
    "nvfp4": (16, 4, "nvfp4"),
    "mxfp8": (32, 8, "mxfp8"),
    "mixed": (64, 4, "affine", mixed),
}
#: The largest multiple of the group sizes that divides every row.
MLX_SIZES = {"hidden_size": 256, "intermediate_size": 384}


@pytest.mark.parametrize("kind", KINDS, ids=["untied", "tied"])
@pytest.mark.parametrize("name", list(MLX))
def test_mlx(name, kind, tmp_path):
    source = dense_folder(tmp_path, 5, **kind, **MLX_SIZES)
    theirs = mlx_folder(source, tmp_path / "theirs", *MLX[name])
    ours = load(tmp_path / "theirs")
    check_logits(ours, mlx_values(theirs))
    save(ours, tmp_path / "ours")
    check_same_files(tmp_path / "theirs", tmp_path / "ours")
    again, _ = load_mlx(tmp_path / "ours")
    a, b = ({n: mlx_to_torch(t) for n, t in tree_flatten(m.parameters())} for m in (theirs, again))
    check_same_tensors(a, b)
    ids = mx.array(IDS.numpy())
    assert mx.array_equal(again(ids), theirs(ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["4bit", "mixed", "nvfp4"])
def test_mlx_in_16_bits(name, dtype, tmp_path):
    source = dense_folder(tmp_path, 5, dtype, **MLX_SIZES)
    theirs = mlx_folder(source, tmp_path / "theirs", *MLX[name])
    ours = load(tmp_path / "theirs", compute_dtype=torch.float32)
    check_logits(ours.float(), mlx_values(theirs))
    save(load(tmp_path / "theirs"), tmp_path / "ours", max_shard_size="300KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    check_same_files(tmp_path / "theirs", tmp_path / "ours")
    again, _ = load_mlx(tmp_path / "ours")
    ids = mx.array(IDS.numpy())
    assert mx.array_equal(again(ids), theirs(ids))


# ---------------------------------------------------------------------- dense


@pytest.mark.parametrize("kind", KINDS, ids=["untied", "tied"])
@pytest.mark.parametrize("shards", ["5GB", "100KB"], ids=["one", "sharded"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "torch"])
def test_dense_folders(safe, shards, kind, tmp_path):
    theirs = llama(8, torch.bfloat16, **kind)
    theirs.save_pretrained(tmp_path / "a", safe_serialization=safe, max_shard_size=shards)
    ours = load(tmp_path / "a")
    check_same_tensors(theirs.state_dict(), ours.state_dict())
    layout = "transformers" if safe else "torch"
    save(ours, tmp_path / "b", layout=layout, max_shard_size=shards)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    check_same_tensors(theirs.state_dict(), again.state_dict())


# ---------------------------------------------------------------------- single files


def test_mlx_single_files(tmp_path):
    """mlx reads the tensors of both kinds of files; what quantal keeps beside them is no tensor."""
    source = dense_folder(tmp_path, 14, torch.bfloat16, **MLX_SIZES)
    theirs = {
        n: mlx_to_torch(t)
        for n, t in tree_flatten(
            mlx_folder(source, tmp_path / "theirs", *MLX["mixed"]).parameters()
        )
    }
    ours = load(tmp_path / "theirs")
    for name in ("m.npz", "m.safetensors"):
        save(ours, tmp_path / name)
        found = {n: mlx_to_torch(t) for n, t in mx.load(str(tmp_path / name)).items()}
        if name.endswith("npz"):  # npy has no bfloat16: mlx writes two raw bytes, and reads them so
            found = {
                n: t.view(theirs[n].dtype) if t.element_size() == theirs[n].element_size() else t
                for n, t in found.items()
            }
        check_same_tensors(theirs, found)
        again = load(tmp_path / name)
        assert quantal.model_digest(again) == quantal.model_digest(ours), name


@pytest.mark.parametrize("kind", ["bnb", "hqq", "quanto"])
def test_single_safetensors_hold_upstreams_tensors(kind, tmp_path):
    if kind == "bnb":
        bnb_folder(tmp_path, "nf4-double")
    elif kind == "hqq":
        theirs = hqq_model(5, config=BaseQuantizeConfig(nbits=3, group_size=64, axis=1))
        AutoHQQHFModel.save_to_safetensors(theirs, str(tmp_path / "theirs"))
    else:
        model = llama(13)
        QuantizedModelForCausalLM.quantize(model, weights=qint4).save_pretrained(
            tmp_path / "theirs"
        )
    ours = load(tmp_path / "theirs")
    save(ours, tmp_path / "m.safetensors")
    check_same_tensors(tensors_in(tmp_path / "theirs"), load_file(tmp_path / "m.safetensors"))
    again = load(tmp_path / "m.safetensors")
    assert quantal.model_digest(again) == quantal.model_digest(ours)


def test_hqq_single_torch_file(tmp_path):
    """Each layer loads into an HQQLinear from the fields and the meta dictionary of the file."""
    theirs = hqq_model(6, config=BaseQuantizeConfig(nbits=4, group_size=64, axis=0))
    AutoHQQHFModel.save_quantized(theirs, str(tmp_path / "theirs"))
    save(load(tmp_path / "theirs"), tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=False)
    for name, module in theirs.named_modules():
        if isinstance(module, HQQLinear):
            empty = HQQLinear(
                None, None, compute_dtype=torch.float32, device="cpu", initialize=False
            )
            empty.load_state_dict({"W_q": state[f"{name}.W_q"], "meta": state[f"{name}.meta"]})
            assert torch.equal(empty.dequantize(), module.dequantize()), name


# ---------------------------------------------------------------------- conversion


def upstream_values(to, path, dtype):
    """Weights as the upstream reader of a dialect decodes them from a folder or file."""
    if to == "mlx":
        return mlx_values(load_mlx(path)[0])
    if to == "quanto":
        return torch_values(QuantizedModelForCausalLM.from_pretrained(str(path))._wrapped)
    if to == "gguf":
        return LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name).state_dict()
    if to == "hqq":  # transformers would decode in float32, whatever the folder says
        return torch_values(
            AutoHQQHFModel.from_quantized(str(path), compute_dtype=dtype, device="cpu")
        )
    return torch_values(AutoModelForCausalLM.from_pretrained(path, device_map="cpu", dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", ["mlx", "quanto", "hqq", "bnb", "gguf", "dense"])
def test_converted_models_load_upstream(to, dtype, tmp_path):
    """From an mlx folder to every dialect."""
    mlx_folder(dense_folder(tmp_path, 9, dtype), tmp_path / "mlx", 32, 4)
    target = tmp_path / ("model.gguf" if to == "gguf" else "out")
    form = {"gguf": {"mode": "Q4_1"}, "hqq": {"layout": "qmodel"}}.get(to, {})
    report = quantal.convert(tmp_path / "mlx", target, to=to, **form)
    assert report.layers
    ours = load(target)
    assert ours.dtype == (torch.float32 if to == "gguf" else dtype)
    check_logits(ours.float(), upstream_values(to, target, dtype))
