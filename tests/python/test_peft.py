"""PEFT without patches on the user's side."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from conftest import hqq, nf4, tiny_llama
from quantal import QuantizedLinear, UnsupportedError, _peft, create_quantization_adapter


def quantized(config, hidden=64):
    adapter = create_quantization_adapter("cpu", config)
    return adapter.quantize_model(tiny_llama(hidden=hidden)), adapter


def dense_twin(model, hidden=64):
    """The same model with the decoded weights in plain layers."""
    twin = tiny_llama(hidden=hidden)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            twin.get_submodule(name).weight.data.copy_(module.dequantize_weights())
    return twin


def randomize_lora(model):
    generator = torch.Generator().manual_seed(5)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)


def lora(targets=("q_proj", "v_proj"), **kwargs):
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **kwargs)


# 96 columns: groups of 64 and 128 cross rows.
@pytest.mark.parametrize(
    ("config", "hidden"),
    [(hqq(), 64), (hqq(8, 128), 96), (nf4(), 96)],
    ids=["hqq4", "hqq8-g128", "nf4"],
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_forward_and_gradients_equal_the_dense_reference(config, hidden, dora, tokens):
    base, _ = quantized(config, hidden)
    assert isinstance(base.model.layers[0].self_attn.v_proj, QuantizedLinear)
    reference = get_peft_model(dense_twin(base, hidden), lora(use_dora=dora))
    model = get_peft_model(base, lora(use_dora=dora))
    for each in (model, reference):
        randomize_lora(each)
    out = [m(tokens, labels=tokens) for m in (model, reference)]
    torch.testing.assert_close(out[0].logits, out[1].logits, rtol=1e-4, atol=1e-5)
    for each in out:
        each.loss.backward()
    grads = [
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        for m in (model, reference)
    ]
    names = [n for n in grads[0] if "lora_" in n]
    assert names and set(names) <= set(grads[1])
    for name in names:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-3, atol=1e-5)


def test_only_adapters_train_after_prepare(tokens):
    model, adapter = quantized(hqq())
    prepared = adapter.prepare_model_for_training(model)
    assert prepared is model and model.is_loaded_in_4bit and model.is_gradient_checkpointing
    model = get_peft_model(prepared, lora()).train()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_all_linear_finds_every_layer():
    model, _ = quantized(hqq())
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    wrapped = [n for n, m in model.named_modules() if type(m).__name__ == "QuantizedLoraLinear"]
    assert len(wrapped) == 14


@pytest.mark.parametrize("safe", [False, True])
def test_merge_quantizes_and_unmerge_is_exact(safe, tokens):
    base, _ = quantized(hqq(8, 128))
    model = get_peft_model(base, lora()).eval()
    randomize_lora(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    packed = layer.base_layer
    before = packed.codes.clone(), packed.stats.clone()
    expected = model(tokens).logits
    wanted = packed.dequantize_weights() + layer.get_delta_weight("default")
    layer.merge(safe_merge=safe)
    assert packed.relative_error(wanted.detach()) < 0.01
    assert not torch.equal(packed.codes, before[0])
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0.05, atol=0.05)
    layer.unmerge()
    assert torch.equal(packed.codes, before[0]) and torch.equal(packed.stats, before[1])
    assert torch.equal(model(tokens).logits, expected)


def test_merge_and_unload_leaves_quantized_layers(tokens):
    base, _ = quantized(hqq(8, 128))
    model = get_peft_model(base, lora()).eval()
    randomize_lora(model)
    expected = model(tokens).logits
    merged = model.merge_and_unload()
    assert isinstance(merged.model.layers[1].self_attn.v_proj, QuantizedLinear)
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=0.05, atol=0.05)


def test_saved_adapter_loads_with_equal_logits(tmp_path, tokens):
    base, _ = quantized(hqq())
    model = get_peft_model(base, lora()).eval()
    randomize_lora(model)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    again, _ = quantized(hqq())
    loaded = PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(loaded(tokens).logits, expected)


def test_plain_layers_keep_their_own_lora():
    model = get_peft_model(tiny_llama(), lora())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear" and isinstance(layer.base_layer, nn.Linear)


def test_hook_is_installed_in_either_order_of_imports():
    import subprocess
    import sys

    code = """
import {0}, {1}
from quantal import QuantizedLinear, QuantizationConfig
from peft import LoraConfig, get_peft_model
from torch import nn
config = QuantizationConfig("hqq", bits=4, compute_dtype="float32")
model = nn.Sequential(QuantizedLinear(64, 64, True, config))
model = get_peft_model(model, LoraConfig(target_modules=["0"]))
print(type(model.base_model.model[0]).__name__)
"""
    for order in (("peft", "quantal"), ("quantal", "peft")):
        run = subprocess.run(
            [sys.executable, "-c", code.format(*order)], capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == "QuantizedLoraLinear", order


def test_the_installed_peft_is_one_that_the_hook_knows():
    import importlib.metadata

    assert importlib.metadata.version("peft") in _peft.TESTED
    assert not list(_peft.changed_internals())
    from peft.tuners.lora import model as lora_model

    assert lora_model.dispatch_default.__wrapped__.__module__.startswith("peft.")


def test_changed_internals_of_peft_are_named_before_training(monkeypatch):
    """As a later PEFT might be: the dispatcher takes other arguments, a function is gone."""
    from peft.tuners import tuners_utils
    from peft.tuners.lora import model as lora_model

    monkeypatch.setattr(lora_model, "dispatch_default", lambda target, name, settings: None)
    monkeypatch.delattr(tuners_utils, "check_adapters_to_merge")
    monkeypatch.setattr(_peft, "_installed", False)
    message = (
        r"dispatch_default takes \(target, name, settings\), expected \(target, adapter_name, "
        r"config.*check_adapters_to_merge is missing.*pip install peft=="
    )
    model, adapter = quantized(hqq())
    with pytest.raises(UnsupportedError, match=message):
        adapter.prepare_model_for_training(model)
    with pytest.warns(UserWarning, match="expected the internals of a tested version"):
        _peft.install_lazily()
    assert not _peft._installed


def test_target_modules_by_regex_and_by_name():
    for targets, count in ((r".*layers\.1\..*(q|v)_proj", 2), (["down_proj"], 2)):
        model, _ = quantized(hqq())
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        wrapped = [m for m in model.modules() if type(m).__name__ == "QuantizedLoraLinear"]
        assert len(wrapped) == count
