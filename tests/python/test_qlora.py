"""QLoRA over every dialect with PEFT as it is: adapters, training, files. Merging and ways to begin
have files of their own."""

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn

from conftest import hqq, nf4
from qlora_support import (
    ALL,
    LLM_INT8,
    METHODS,
    VARIANTS,
    dense_twin,
    every_method,
    first_layer,
    gradients,
    lora,
    packed_bytes,
    quantized,
    randomize_lora,
    same_bytes,
)
from quantal import (
    QuantizedLinear,
    UnsupportedError,
    merge_report,
    merge_to_full_precision,
    prepare_model_for_training,
)

# ---------------------------------------------------------------------- forward and gradients


@every_method
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits_and_gradients_equal_the_dense_reference(method, variant, tokens):
    base = quantized(method)
    models = [get_peft_model(m, lora(**VARIANTS[variant])) for m in (dense_twin(base), base)]
    for model in models:
        randomize_lora(model)
    expected, actual = (m(tokens).logits for m in models)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    wanted, grads = (gradients(m, tokens) for m in models)
    names = [n for n in grads if "lora_" in n]
    assert len(names) == (12 if variant == "dora" else 8)
    assert not any("base_layer" in n for n in grads)
    for name in names:
        torch.testing.assert_close(grads[name], wanted[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_never_decodes_a_weight(dropout, tokens, monkeypatch):
    from quantal import _ops

    reference = get_peft_model(
        dense_twin(quantized(nf4())), lora(use_dora=True, lora_dropout=dropout)
    ).train()
    model = get_peft_model(quantized(nf4()), lora(use_dora=True, lora_dropout=dropout)).train()
    for each in (reference, model):
        randomize_lora(each)
    calls = []
    original = _ops.dequantize
    monkeypatch.setattr(_ops, "dequantize", lambda *a: calls.append(1) or original(*a))
    grads = []
    for each in (reference, model):
        torch.manual_seed(11)  # of dropout
        grads.append(gradients(each, tokens))
    assert not calls
    for name in (n for n in grads[1] if "lora_" in n):
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-3, atol=1e-5)


def test_dora_norms_follow_new_codes():
    layer = first_layer(get_peft_model(quantized(hqq()), lora(use_dora=True)))
    x = torch.randn(3, 64)
    assert torch.allclose(layer(x), layer.base_layer(x), atol=1e-5)
    layer.base_layer.quantize_weights(2 * layer.base_layer.dequantize_weights())
    scale = layer.lora_magnitude_vector["default"].weight / layer.base_layer.weight.norm(dim=1)
    assert torch.allclose(scale, torch.full_like(scale, 0.5), atol=0.05)
    assert torch.allclose(layer(x), scale * layer.base_layer(x), atol=1e-4)


@every_method
def test_training_changes_adapters_and_nothing_else(method, tokens):
    model = get_peft_model(prepare_model_for_training(quantized(method)), lora(ALL)).train()
    before = packed_bytes(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert same_bytes(packed_bytes(model), before)


# ---------------------------------------------------------------------- several adapters


def test_several_adapters_switch_mix_and_go(tokens):
    model = get_peft_model(quantized(hqq()), lora(), adapter_name="one").eval()
    model.add_adapter("two", lora(ALL, r=2))
    randomize_lora(model, "one", seed=1)
    randomize_lora(model, "two", seed=2)
    logits = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        logits[name] = model(tokens).logits
    with model.disable_adapter():
        logits["__base__"] = model(tokens).logits
    assert not torch.allclose(logits["one"], logits["two"], atol=1e-3)
    names = ["two", "__base__"]
    mixed = model(tokens, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], logits[name][row], rtol=1e-4, atol=1e-5)
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    assert not torch.allclose(model(tokens).logits, logits["one"], atol=1e-3)
    model.delete_adapter("both")
    model.set_adapter("one")
    torch.testing.assert_close(model(tokens).logits, logits["one"])


# ---------------------------------------------------------------------- files, modules_to_save


@every_method
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_saved_adapter_loads_with_equal_logits(method, variant, tmp_path, tokens):
    model = get_peft_model(quantized(method), lora(**VARIANTS[variant])).eval()
    randomize_lora(model)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    saved = {p.name for p in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= saved
    loaded = PeftModel.from_pretrained(quantized(method), tmp_path).eval()
    assert torch.equal(loaded(tokens).logits, expected)
    dense = PeftModel.from_pretrained(dense_twin(quantized(method)), tmp_path).eval()
    torch.testing.assert_close(dense(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lm_head", "o_proj"])
def test_modules_to_save_train_dense_copies(name, tmp_path, tokens):
    """lm_head is dense to begin with, o_proj is quantized."""
    config = hqq()
    model = get_peft_model(
        prepare_model_for_training(quantized(config)), lora(modules_to_save=[name])
    ).train()
    before = packed_bytes(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any(f"{name}.modules_to_save.default.weight" in n for n in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_bytes(packed_bytes(model), before)
    expected = model.eval()(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(config), tmp_path).eval()
    assert torch.equal(loaded(tokens).logits, expected)
    merged = merge_to_full_precision(loaded)
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@every_method
def test_state_dict_of_a_peft_model_round_trips_strictly(method, tokens):
    model = get_peft_model(quantized(method), lora()).eval()
    randomize_lora(model)
    twin = get_peft_model(quantized(method), lora()).eval()
    state = model.state_dict()
    assert twin.load_state_dict(state, strict=True).missing_keys == []
    assert torch.equal(twin(tokens).logits, model(tokens).logits)
    state.pop(next(k for k in state if k.endswith("codes")))
    with pytest.raises(RuntimeError, match="Missing key"):
        twin.load_state_dict(state, strict=True)


# ---------------------------------------------------------------------- beside LoRA over linears


def test_lora_over_a_quantized_embedding(tokens):
    from quantal import QuantizedEmbedding

    spec_of = QuantizedLinear.from_linear(nn.Linear(64, 256, bias=False), METHODS["mlx4"])
    embedding = QuantizedEmbedding.from_packed(
        spec_of._spec, spec_of.codes, spec_of.stats, spec_of.shared, compute_dtype=torch.float32
    )
    model = get_peft_model(nn.Sequential(embedding, nn.Linear(64, 8)), lora(("0",)))
    assert type(model.base_model.model[0]).__name__ == "QuantizedLoraEmbedding"
    for n, p in model.named_parameters():
        if "lora_embedding" in n:
            nn.init.normal_(p, std=0.3)
    expected, before = model(tokens), packed_bytes(model)
    model.merge_adapter()
    assert 0 < merge_report(model).codes_changed
    assert (model(tokens) - expected).norm() < 0.3 * expected.norm()
    model.unmerge_adapter()
    assert same_bytes(packed_bytes(model), before)
    assert torch.equal(model(tokens), expected)


def test_other_methods_of_peft_run_and_never_lose_a_merge(tokens):
    """IA3 has no layer of quantal's: its forward works, its merge refuses instead of writing into a
    copy."""
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(quantized(hqq()), config)
    gradient = gradients(model, tokens)
    assert gradient and all(".ia3_l" in n for n in gradient)
    with pytest.raises(UnsupportedError, match="quantize_weights"):
        model.merge_adapter()


def test_llm_int8_trains_and_merges(tokens):
    model = get_peft_model(prepare_model_for_training(quantized(LLM_INT8)), lora(ALL)).train()
    randomize_lora(model, std=0.02)
    assert model.is_loaded_in_8bit
    exact = get_peft_model(quantized(METHODS["int8"]), lora(ALL))
    randomize_lora(exact, std=0.02)
    grads, wanted = gradients(model, tokens), gradients(exact, tokens)
    for name in (n for n in grads if "lora_" in n):
        difference = (grads[name] - wanted[name]).norm()
        assert 0 < difference < 0.1 * wanted[name].norm()  # activations are rounded, slightly
    model.merge_adapter()
    assert len(merge_report(model).layers) == 14
