"""Folders that quantal writes load in transformers, with the layers and logits of the packages."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hqq.core.quantize import HQQLinear
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quantal

IDS = torch.arange(12)[None]
CASES = {
    "hqq4": (HQQLinear, {"method": "hqq", "bits": 4, "group_size": 64}),
    "hqq8-g128": (HQQLinear, {"method": "hqq", "bits": 8, "group_size": 128}),
    "hqq4-axis0": (HQQLinear, {"method": "hqq", "bits": 4, "backend_options": {"axis": 0}}),
    "nf4": (Linear4bit, {"method": "bnb_nf4", "double_quant": False}),
    "nf4-double": (Linear4bit, {"method": "bnb_nf4", "double_quant": True}),
    "fp4": (Linear4bit, {"method": "bnb_nf4", "double_quant": False, "quant_type": "fp4"}),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", list(CASES))
def test_transformers_loads_what_quantal_saves(name, tied, tmp_path):
    layer, settings = CASES[name]
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=tied,
    )
    adapter = quantal.create_quantization_adapter(
        "cpu",
        quantal.QuantizationConfig(compute_dtype=torch.float32, **settings),
        support="extended",
    )
    model = adapter.quantize_model(LlamaForCausalLM(config).eval())
    adapter.save_quantized_model(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="cpu", dtype=torch.float32
    )
    assert isinstance(theirs.model.layers[1].mlp.up_proj, layer)
    ours, other = model(IDS).logits, theirs(IDS).logits
    torch.testing.assert_close(other.float(), ours, rtol=0, atol=1e-5)
