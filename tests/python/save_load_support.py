"""What the tests of saving and loading share: a form of layers of every kind."""

import warnings

import torch
from torch import nn

import quantal
from conftest import EXTENDED, tiny_llama
from quantal import QuantizationConfig, create_quantization_adapter

IDS = torch.tensor([[1, 5, 200, 37, 99, 255, 0, 64, 128, 3, 77, 11]])


def form(method, **settings) -> QuantizationConfig:
    options = {**EXTENDED, **settings.pop("backend_options", {})}
    settings.setdefault("group_size", 32)
    return QuantizationConfig(
        method, compute_dtype=torch.float32, backend_options=options, **settings
    )


#: A form of every kind, by dialect.
FORMS = {
    "bnb": {
        "nf4": form("bnb_nf4", double_quant=False),
        "nf4-double": form("bnb_nf4", double_quant=True),
        "fp4": form("bnb_nf4", quant_type="fp4", double_quant=False),
        "int8": form("bnb_int8", bits=8),
    },
    "hqq": {
        "4": form("hqq", bits=4),
        "8-axis0": form("hqq", bits=8, backend_options={"axis": 0}),
        "3": form("hqq", bits=3),
        "2": form("hqq", bits=2),
        "1": form("hqq", bits=1),
    },
    "mlx": {
        "4": form("mlx_int4"),
        "8": form("mlx_int8", bits=8),
        "mxfp4": form("mlx_int4", backend_options={"mode": "mxfp4"}),
    },
    "quanto": {
        "2": form("quanto_int2", bits=2),
        "4": form("quanto_int4"),
        "8": form("quanto_int8", bits=8),
    },
}


def adapter_for(config) -> quantal.QuantizationAdapter:
    return create_quantization_adapter("cpu", config)


def quantized(config, **kwargs) -> tuple[nn.Module, quantal.QuantizationAdapter]:
    adapter = adapter_for(config)
    return adapter.quantize_model(tiny_llama(**kwargs)), adapter


def load_quietly(adapter, *args, **kwargs) -> nn.Module:
    """Without the warning that the file's settings win."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapter.load_quantized_model(*args, **kwargs)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits
