"""Shared models and configs. Seeds are fixed, so a failure can be repeated."""

import pathlib

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantal import QuantizationConfig, QuantizationMethod, _attention

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
EXTENDED = {"support": "extended"}


def hqq(bits: int = 4, group_size: int = 64, **kwargs) -> QuantizationConfig:
    kwargs.setdefault("compute_dtype", torch.float32)
    return QuantizationConfig(
        method=QuantizationMethod.HQQ, bits=bits, group_size=group_size, **kwargs
    )


def nf4(**kwargs) -> QuantizationConfig:
    kwargs.setdefault("compute_dtype", torch.float32)
    kwargs.setdefault("backend_options", EXTENDED)
    return QuantizationConfig(method=QuantizationMethod.BNB_NF4, bits=4, **kwargs)


#: Every form of layer: widths, groups that cross rows (72 columns), nested statistics.
CONFIGS = {
    "hqq4": hqq(),
    "hqq8-g128": hqq(8, 128),
    "hqq4-axis0": hqq(backend_options={"axis": 0}),
    "nf4": nf4(double_quant=False),
    "nf4-double": nf4(double_quant=True),
    "fp4": nf4(double_quant=False, quant_type="fp4"),
}


@pytest.fixture(params=list(CONFIGS))
def config(request) -> QuantizationConfig:
    return CONFIGS[request.param]


def tiny_llama(tied: bool = False, hidden: int = 64, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=tied,
        attention_bias=bias,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def one_thread():
    """For models that are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def kernel_calls(monkeypatch) -> list[bool]:
    """Whether quantal's kernels took each attention that they were asked for."""
    calls = []
    original = _attention.by_kernels

    def count(*arguments):
        out = original(*arguments)
        calls.append(out is not None)
        return out

    monkeypatch.setattr(_attention, "by_kernels", count)
    return calls
