"""Ways to begin: LoftQ for every dialect, and the initialisations of PEFT."""

import copy

import pytest
import torch
from peft import get_peft_model

from conftest import GOLDEN, hqq, tiny_llama
from qlora_support import (
    ALL,
    METHODS,
    VARIANTS,
    every_method,
    first_layer,
    lora,
    packed_bytes,
    quantized,
    same_bytes,
)
from quantal import (
    ConfigError,
    UnsupportedError,
    create_quantization_adapter,
    initialize_loftq,
    model_digest,
)


@every_method
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_loftq_makes_up_for_the_quantization_error(method, variant, tokens):
    dense = tiny_llama()
    model = get_peft_model(quantized(method), lora(ALL, r=16, **VARIANTS[variant])).eval()
    before = packed_bytes(model)
    errors = [(model(tokens).logits - dense(tokens).logits).norm()]
    rows = initialize_loftq(model, dense)
    errors.append((model(tokens).logits - dense(tokens).logits).norm())
    assert len(rows) == 14
    assert all(row.error_after < 0.9 * row.error_before for row in rows)
    assert errors[1] < errors[0]
    assert same_bytes(packed_bytes(model), before)
    layer = first_layer(model)
    w = dense.get_submodule("model.layers.0.self_attn.q_proj").weight.detach()
    total = layer.base_layer.dequantize_weights() + layer.get_delta_weight("default").detach()
    assert rows[0].name == "model.layers.0.self_attn.q_proj"
    assert float((w - total).norm() / w.norm()) == pytest.approx(rows[0].error_after, rel=1e-3)


def test_loftq_iterations_move_base_and_adapter_together():
    dense = tiny_llama()
    errors = []
    for iterations in (1, 4):
        model = get_peft_model(quantized(METHODS["quanto4"]), lora(ALL, r=16))
        before = packed_bytes(model)
        rows = initialize_loftq(model, dense, iterations=iterations)
        errors.append(sum(row.error_after for row in rows))
        assert same_bytes(packed_bytes(model), before) == (iterations == 1)
    assert errors[1] < errors[0]


def test_loftq_reads_folders_and_state_dicts():
    folder = GOLDEN / "checkpoints" / "dense-bf16"
    from transformers import LlamaForCausalLM

    dense = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    factors = []
    for source in (folder, str(folder), dense, dense.state_dict()):
        adapter = create_quantization_adapter("cpu", hqq())
        model = get_peft_model(adapter.quantize_model(copy.deepcopy(dense)), lora())
        initialize_loftq(model, source)
        factors.append(first_layer(model).lora_A["default"].weight.detach())
    assert all(torch.equal(f, factors[0]) for f in factors)


def test_loftq_says_what_is_wrong():
    model = get_peft_model(quantized(hqq()), lora())
    with pytest.raises(ConfigError, match="q_proj.weight"):
        initialize_loftq(model, {})
    with pytest.raises(ConfigError, match="iterations is 0"):
        initialize_loftq(model, tiny_llama(), iterations=0)
    with pytest.raises(ConfigError, match="adapter 'other'"):
        initialize_loftq(model, tiny_llama(), "other")
    with pytest.raises(ValueError, match=r"has shape \[96, 96\], expected \[64, 64\]"):
        initialize_loftq(model, tiny_llama(hidden=96))
    with pytest.raises(OSError, match="no/such/folder"):
        initialize_loftq(model, "no/such/folder")
    model.merge_adapter()
    with pytest.raises(ConfigError, match="is merged"):
        initialize_loftq(model, tiny_llama())


def test_peft_loftq_on_quantized_layers_names_the_remedy():
    config = lora()
    config.init_lora_weights = "loftq"  # the constructor asks for scipy
    with pytest.raises(UnsupportedError, match="initialize_loftq"):
        get_peft_model(quantized(hqq()), config)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_inits_that_take_from_the_base_quantize_the_rest(init, dora, tokens):
    torch.manual_seed(0)
    base = quantized(METHODS["int8"])
    expected, digest = base(tokens).logits, model_digest(base)
    model = get_peft_model(base, lora(init_lora_weights=init, use_dora=dora)).eval()
    layer = first_layer(model)
    assert layer.get_delta_weight("default").norm() > 0.1
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0.02, atol=0.02)
    assert model_digest(model.unload()) != digest


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", True, False])
def test_inits_that_leave_the_base_alone(init):
    base = quantized(hqq())
    before = packed_bytes(base)
    model = get_peft_model(base, lora(init_lora_weights=init))
    assert same_bytes(packed_bytes(model.unload()), before)
