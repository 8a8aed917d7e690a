"""The real SmolLM2-135M in every dialect, both directions: upstream quantizes and writes it,
quantal loads it and computes the logits of upstream's own decoded weights; quantal writes it,
upstream loads what quantal wrote and holds the same bits."""

import gguf
import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from llamacpp import needs_llama_cpp, quantize_file
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_mlx
from models import (
    check_logits,
    check_same_files,
    check_same_tensors,
    gguf_values,
    json_of,
    load,
    mlx_folder,
    mlx_to_torch,
    mlx_values,
    save,
    torch_values,
)
from optimum.quanto import QuantizedModelForCausalLM, qfloat8, qint2, qint4, qint8
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import quantal

IDS = torch.tensor([[504, 3575, 282, 4649, 314, 7042, 28, 260, 2629, 282, 1420, 30, 657, 314, 355]])


BNB = {
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("name", list(BNB))
def test_bitsandbytes(name, smollm2_dense, tmp_path):
    settings = {"dtype": torch.float32, "device_map": "cpu"}
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2_dense, quantization_config=BitsAndBytesConfig(**BNB[name]), **settings
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    check_logits(ours, torch_values(theirs), IDS)
    save(ours, tmp_path / "ours")
    check_same_files(tmp_path / "theirs", tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **settings)
    check_same_tensors(theirs.state_dict(), again.state_dict())
    check_same_tensors(torch_values(theirs), torch_values(again))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_hqq(bits, smollm2_dense, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_dense, dtype=torch.float32)
    AutoHQQHFModel.quantize_model(
        theirs,
        quant_config=BaseQuantizeConfig(nbits=bits, group_size=64, axis=1),
        compute_dtype=torch.float32,
        device="cpu",
    )
    AutoHQQHFModel.save_quantized(theirs, str(tmp_path / "theirs"))
    ours = load(tmp_path / "theirs")
    check_logits(ours, torch_values(theirs), IDS)
    save(ours, tmp_path / "ours", layout="qmodel")
    files = [torch.load(tmp_path / d / "qmodel.pt", weights_only=False) for d in ("theirs", "ours")]
    check_same_tensors(*files)
    again = AutoHQQHFModel.from_quantized(
        str(tmp_path / "ours"), compute_dtype=torch.float32, device="cpu"
    )
    check_same_tensors(torch_values(theirs), torch_values(again))


@pytest.mark.parametrize("qtype", [qint2, qint4, qint8, qfloat8], ids=lambda q: q.name)
def test_quanto(qtype, smollm2_dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(smollm2_dense, dtype=torch.float32)
    theirs = QuantizedModelForCausalLM.quantize(model, weights=qtype, exclude="lm_head")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    check_logits(ours, torch_values(model), IDS)
    save(ours, tmp_path / "ours")
    check_same_files(tmp_path / "theirs", tmp_path / "ours")
    theirs_map, ours_map = (json_of(tmp_path / d / "quanto_qmap.json") for d in ("theirs", "ours"))
    assert theirs_map == ours_map
    again = QuantizedModelForCausalLM.from_pretrained(str(tmp_path / "ours"))
    check_same_tensors(torch_values(model), torch_values(again._wrapped))


MLX = {
    "affine-4": (64, 4, "affine"),
    "affine-3": (32, 3, "affine"),
    "affine-8": (64, 8, "affine"),
    "mxfp4": (32, 4, "mxfp4"),
    "nvfp4": (16, 4, "nvfp4"),
    "mxfp8": (32, 8, "mxfp8"),
}


@pytest.mark.parametrize("name", list(MLX))
def test_mlx(name, smollm2_dense, tmp_path):
    theirs = mlx_folder(smollm2_dense, tmp_path / "theirs", *MLX[name])
    ours = load(tmp_path / "theirs")
    check_logits(ours, mlx_values(theirs), IDS)
    save(ours, tmp_path / "ours")
    check_same_files(tmp_path / "theirs", tmp_path / "ours")
    again, _ = load_mlx(tmp_path / "ours")
    states = [
        {n: mlx_to_torch(t) for n, t in tree_flatten(m.parameters())} for m in (theirs, again)
    ]
    check_same_tensors(*states)


#: Types that llama.cpp gives the layers, by the type of the file. Rows of 576 weights are no whole
#: super-blocks: there it takes a type with blocks of 32.
GGUF = {
    "F16": {"F16"},
    "BF16": {"BF16"},
    "Q4_0": {"Q4_0"},
    "Q4_1": {"Q4_1"},
    "Q8_0": {"Q8_0"},
    "Q2_K pure": {"Q2_K", "Q4_0"},
    "Q3_K_S": {"Q3_K", "Q4_0"},
    "IQ4_NL": {"IQ4_NL"},
    "Q4_K_M": {"Q4_K", "Q6_K", "Q5_0"},
    "Q5_K_M": {"Q5_K", "Q6_K", "Q5_1"},
    "Q6_K": {"Q6_K", "Q8_0"},
}


@needs_llama_cpp
@pytest.mark.parametrize("name", list(GGUF))
def test_gguf(name, smollm2, tmp_path):
    """llama.cpp quantizes; gguf decodes for the reference and reads what quantal writes."""
    quantize_file(smollm2, tmp_path / "theirs.gguf", *name.split())
    ours = load(tmp_path / "theirs.gguf")
    save(ours, tmp_path / "ours.gguf")
    theirs, again = (gguf.GGUFReader(tmp_path / f"{f}.gguf") for f in ("theirs", "ours"))
    kinds = {t.tensor_type.name for t in theirs.tensors if t.name.startswith("blk.")}
    assert GGUF[name] <= kinds, kinds
    about_types = ("GGUF.", "general.file_type", "general.quantization_version")  # said anew
    for key, field in theirs.fields.items():  # the tokenizer too
        if not key.startswith(about_types):
            assert again.fields[key].contents() == field.contents(), key
    written = {t.name: t for t in again.tensors}
    assert len(written) == len(theirs.tensors)
    for tensor in theirs.tensors:
        assert written[tensor.name].tensor_type == tensor.tensor_type, tensor.name
        assert (written[tensor.name].data == tensor.data).all(), tensor.name
    check_logits(ours.float(), gguf_values(theirs, ours.config), IDS)


@pytest.mark.parametrize("to", ["mlx", "hqq", "quanto", "bnb"])
def test_conversions_of_the_real_file(to, smollm2, tmp_path):
    """From Q4_1 blocks: upstream decodes what quantal wrote to the weights that quantal computes
    with. For mlx these are the weights of the file, bit for bit; back from mlx and hqq its blocks
    are byte for byte what they were."""
    report = quantal.convert(smollm2, tmp_path / to, to, layout="qmodel" if to == "hqq" else "")
    assert report.lossless == (to == "mlx"), report
    path = str(tmp_path / to)
    settings = {"dtype": torch.float32, "device_map": "cpu"}
    values = {
        "mlx": lambda: mlx_values(load_mlx(tmp_path / to)[0]),
        "hqq": lambda: torch_values(
            AutoHQQHFModel.from_quantized(path, compute_dtype=torch.float32, device="cpu")
        ),
        "quanto": lambda: torch_values(QuantizedModelForCausalLM.from_pretrained(path)._wrapped),
        "bnb": lambda: torch_values(AutoModelForCausalLM.from_pretrained(path, **settings)),
    }[to]()
    check_logits(load(tmp_path / to), values, IDS)
    if to not in ("mlx", "hqq"):
        return
    before = gguf.GGUFReader(smollm2)
    if to == "mlx":
        for name, value in gguf_values(before, load(tmp_path / to).config).items():
            assert torch.equal(values[name], value), name
    quantal.convert(tmp_path / to, tmp_path / "back.gguf", "gguf")
    after = {t.name: t for t in gguf.GGUFReader(tmp_path / "back.gguf").tensors}
    for tensor in before.tensors:
        if tensor.name == "token_embd.weight" and to == "hqq":
            continue  # hqq has no quantized embeddings
        assert after[tensor.name].tensor_type == tensor.tensor_type, tensor.name
        assert (after[tensor.name].data == tensor.data).all(), tensor.name
