"""Whole models: dense ones to begin with, weights as the upstream packages decode them, checks."""

import contextlib
import io
import json
from pathlib import Path

import bitsandbytes.functional as bnb
import gguf
import mlx.core as mx
import mlx.nn
import numpy
import torch
from gguf.quants import dequantize as gguf_dequantize
from hqq.core.quantize import HQQLinear
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_mlx
from mlx_lm.utils import quantize_model, save_config, save_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import no_init_weights
from weights import same_bits

import quantal

IDS = torch.arange(3, 43)[None] * 7 % 512

#: The documented layouts are ours, the rest is upstream's; any adapter loads any of them.
METHODS = {"bnb": "bnb_nf4", "hqq": "hqq", "mlx": "mlx_int4", "quanto": "quanto_int4"}


def llama(seed: int, dtype=torch.float32, **settings) -> LlamaForCausalLM:
    """Two layers of random weights."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **settings})).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def blank(config: LlamaConfig) -> LlamaForCausalLM:
    """A dense model whose weights are anything."""
    with no_init_weights():
        return LlamaForCausalLM(config).eval()


def dense_folder(path: Path, seed: int, dtype=torch.float32, **settings) -> Path:
    llama(seed, dtype, **settings).save_pretrained(path / "dense")
    return path / "dense"


def adapter(dialect: str = "mlx", compute_dtype=torch.float32, **settings):
    config = quantal.QuantizationConfig(
        settings.pop("method", METHODS[dialect]), compute_dtype=compute_dtype, **settings
    )
    return quantal.create_quantization_adapter("cpu", config, support="extended")


def load(path: Path, compute_dtype=torch.float32) -> torch.nn.Module:
    return adapter(compute_dtype=compute_dtype).load_quantized_model(path)


def save(model: torch.nn.Module, path: Path, **settings) -> None:
    adapter().save_quantized_model(model, path, **settings)


# ------------------------------------------------------------------ weights as upstream decodes


def torch_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of a model of bitsandbytes, hqq or optimum-quanto by the names of the dense model."""
    values = {n: t for n, t in model.state_dict().items() if torch.is_tensor(t)}
    for path, module in model.named_modules():
        name, kind = f"{path}.weight", type(module).__name__
        if isinstance(module, HQQLinear):  # its state has the packed tensors instead
            values = {n: t for n, t in values.items() if not n.startswith(f"{path}.")}
            if module.bias is not None:
                values[f"{path}.bias"] = module.bias
        if kind == "Linear4bit":
            values[name] = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif kind == "Linear8bitLt":
            state, weight = module.state, module.weight
            codes = weight.data if state.CB is None else state.CB
            scale = weight.SCB if state.SCB is None else state.SCB
            values[name] = bnb.int8_vectorwise_dequant(codes, scale)
        elif isinstance(module, HQQLinear):
            values[name] = module.dequantize()
        elif hasattr(getattr(module, "weight", None), "dequantize") and kind.startswith("Q"):
            values[name] = module.weight.dequantize()
    return {n: t.detach() for n, t in values.items()}


def mlx_to_torch(array: mx.array) -> torch.Tensor:
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(numpy.array(array.view(mx.int16))).view(torch.bfloat16)
    return torch.from_numpy(numpy.array(array))


def mlx_values(model: mlx.nn.Module) -> dict[str, torch.Tensor]:
    values = {n: mlx_to_torch(t) for n, t in tree_flatten(model.parameters())}
    dtype = {n: t for n, t in tree_flatten(model.parameters())}["model.norm.weight"].dtype
    for path, module in model.named_modules():
        if hasattr(module, "bits"):
            decoded = mx.dequantize(
                module.weight,
                module.scales,
                module.get("biases"),
                group_size=module.group_size,
                bits=module.bits,
                mode=module.mode,
                dtype=dtype,
            )
            values[f"{path}.weight"] = mlx_to_torch(decoded)
    return values


def gguf_values(reader: gguf.GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Tensors of a GGUF file by the names and in the order of rows of the dense model."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    theirs = {names.get_name(n, try_suffixes=(".weight",)): n for n in blank(config).state_dict()}
    values = {}
    for tensor in reader.tensors:
        name = theirs[tensor.name]
        value = gguf_dequantize(tensor.data, tensor.tensor_type)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if (count := heads.get(name.split(".")[-2])) is not None:
            rows = value.reshape(count, value.shape[0] // count // 2, 2, -1)
            value = rows.swapaxes(1, 2).reshape(value.shape)
        values[name] = torch.from_numpy(numpy.array(value, order="C"))
    return values


# ------------------------------------------------------------------ folders of mlx-lm


def mlx_folder(dense: Path, path: Path, group=64, bits=4, mode="affine", predicate=None):
    """The quantized model and the folder that mlx-lm writes of it."""
    model, config = load_mlx(dense)
    with contextlib.redirect_stdout(io.StringIO()):  # prints bits per weight
        model, config = quantize_model(
            model, config, group, bits, mode=mode, quant_predicate=predicate
        )
    mx.eval(model.parameters())
    path.mkdir()
    save_model(path, model)
    save_config(config, config_path=path / "config.json")
    return model


# ------------------------------------------------------------------ checks


@torch.no_grad()
def check_logits(ours: torch.nn.Module, weights: dict[str, torch.Tensor], ids=IDS) -> None:
    """Logits of `ours` against a dense float32 model that holds upstream's decoded weights: both
    are sums of the same products in another order."""
    config = type(ours.config).from_dict({**ours.config.to_dict(), "torch_dtype": "float32"})
    dense = blank(config)
    if config.tie_word_embeddings:
        weights = {"lm_head.weight": weights["model.embed_tokens.weight"], **weights}
    dense.load_state_dict(
        {n: weights[n].float().reshape(t.shape) for n, t in dense.state_dict().items()}
    )
    expected, actual = dense(ids).logits, ours(ids).logits.float()
    difference = float((actual - expected).abs().max() / expected.abs().max())
    print(f"largest difference of logits: {difference:.2g} of the largest logit")
    assert difference <= 2e-5


def check_same_tensors(theirs: dict, ours: dict) -> None:
    """Equal names, dtypes, shapes and bytes, or equal values where an entry is no tensor."""
    assert not set(theirs) ^ set(ours)
    for name, value in theirs.items():
        if torch.is_tensor(value):
            assert same_bits(value.detach(), ours[name].detach()), name
        elif isinstance(value, dict):
            check_same_tensors(value, ours[name])
        else:
            assert value == ours[name], name


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files of a folder."""
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def check_same_files(theirs: Path, ours: Path) -> None:
    check_same_tensors(tensors_in(theirs), tensors_in(ours))


def json_of(path: Path) -> dict:
    return json.loads(path.read_text())
