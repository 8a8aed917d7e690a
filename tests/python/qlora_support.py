"""What the tests of adapter training share: a config of every dialect, small models, adapters."""

import pytest
import torch
from peft import LoraConfig

from conftest import EXTENDED, hqq, nf4, tiny_llama
from quantal import QuantizationConfig, create_quantization_adapter
from quantal._packed import PackedWeight


def _config(method: str, **kwargs) -> QuantizationConfig:
    options = {**EXTENDED, **kwargs.pop("backend_options", {})}
    return QuantizationConfig(
        method, compute_dtype=torch.float32, backend_options=options, **kwargs
    )


#: One form of every dialect.
METHODS = {
    "nf4": nf4(double_quant=True),
    "int8": _config("bnb_int8"),
    "hqq4": hqq(),
    "mlx4": _config("mlx_int4"),
    "quanto4": _config("quanto_int4", group_size=32),
}
#: A test of one `method` for every dialect.
every_method = pytest.mark.parametrize("method", list(METHODS.values()), ids=list(METHODS))
#: Kinds of LoRA, as arguments of `lora`.
VARIANTS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
#: LLM.int8: activations in int8, outliers apart. Its forward is not the exact product.
LLM_INT8 = _config("bnb_int8", backend_options={"int8_threshold": 1.5})
#: Every linear layer of a Llama block.
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantized(config: QuantizationConfig, hidden: int = 64):
    """A tiny quantized Llama."""
    return create_quantization_adapter("cpu", config).quantize_model(tiny_llama(hidden=hidden))


def packed_layers(model) -> dict[str, PackedWeight]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedWeight)}


def packed_bytes(model) -> dict[str, torch.Tensor]:
    """Copies of all packed bytes."""
    out = {}
    for name, layer in packed_layers(model).items():
        for part in ("codes", "stats", "shared"):
            out[f"{name}.{part}"] = getattr(layer, part).detach().clone()
    return out


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def dense_twin(model, hidden: int = 64):
    """The same model with the decoded weights in plain layers."""
    twin = tiny_llama(hidden=hidden)
    for name, layer in packed_layers(model).items():
        twin.get_submodule(name).weight.data.copy_(layer.dequantize_weights())
    return twin


def randomize_lora(model, adapter: str = "default", seed: int = 5, std: float = 0.1):
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name and f".{adapter}" in name and "magnitude" not in name:
            p.data = std * torch.randn(p.shape, generator=generator)


def lora(targets=("q_proj", "v_proj"), **kwargs) -> LoraConfig:
    kwargs.setdefault("r", 4)
    return LoraConfig(lora_alpha=8, target_modules=list(targets), **kwargs)


def gradients(model, tokens) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def first_layer(model):
    """q_proj of the first block, below PEFT."""
    return model.base_model.model.model.layers[0].self_attn.q_proj
