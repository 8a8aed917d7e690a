"""Merging adapters into packed weights, with a report of what survives, and into full precision."""

import copy
import json

import pytest
import torch
from peft import get_peft_model
from torch import nn

from conftest import hqq, nf4, tiny_llama
from qlora_support import (
    ALL,
    METHODS,
    VARIANTS,
    every_method,
    first_layer,
    lora,
    packed_bytes,
    packed_layers,
    quantized,
    randomize_lora,
    same_bytes,
)
from quantal import (
    ConfigError,
    QuantizedLinear,
    UnsupportedError,
    create_quantization_adapter,
    dequantize_model,
    merge_report,
    merge_to_full_precision,
    prepare_model_for_training,
)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merging_rounds_once_however_many_adapters(dora):
    def merged(*calls):
        model = get_peft_model(quantized(nf4()), lora(use_dora=dora), adapter_name="one")
        model.add_adapter("two", lora(use_dora=dora))
        randomize_lora(model, "one", seed=1)
        randomize_lora(model, "two", seed=2)
        before = packed_bytes(model)
        for names in calls:
            model.merge_adapter(names)
        return model, before

    with pytest.warns(UserWarning, match="additionally merging"):
        one_by_one, before = merged(["one"], ["two"])
    together, _ = merged(["one", "two"])
    assert same_bytes(packed_bytes(one_by_one), packed_bytes(together))
    assert first_layer(one_by_one).merged_adapters == ["one", "two"]
    assert merge_report(one_by_one) == merge_report(together)
    one_by_one.unmerge_adapter()
    assert same_bytes(packed_bytes(one_by_one), before)


@every_method
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_is_the_quantized_sum_and_unmerge_exact(method, variant, safe, tokens):
    model = get_peft_model(quantized(method), lora(ALL, **VARIANTS[variant])).eval()
    randomize_lora(model)
    expected, before = model(tokens).logits, packed_bytes(model)
    layer = first_layer(model)
    w, delta = layer.base_layer.dequantize_weights(), layer.get_delta_weight("default").detach()
    wanted = w + delta
    if variant == "dora":
        magnitude = layer.lora_magnitude_vector["default"].weight.detach()
        wanted = (magnitude / wanted.norm(dim=1))[:, None] * wanted
    model.merge_adapter(safe_merge=safe)
    fresh = copy.deepcopy(layer.base_layer)
    fresh.quantize_weights(wanted)
    difference = (fresh.dequantize_weights() - layer.base_layer.dequantize_weights()).norm()
    assert difference <= 1e-2 * wanted.norm()  # a sum rounded otherwise may move single codes
    assert layer.base_layer.relative_error(wanted) < 0.15
    model.unmerge_adapter()
    assert same_bytes(packed_bytes(model), before)
    assert torch.equal(model(tokens).logits, expected)


def test_report_says_what_survived():
    model = get_peft_model(quantized(METHODS["mlx4"]), lora(ALL))
    randomize_lora(model)
    layer = first_layer(model)
    base = layer.base_layer
    w = base.dequantize_weights().double()
    target = w + layer.get_delta_weight("default").detach().double()
    codes = codes_of(base)
    model.merge_adapter()
    report = merge_report(model)
    assert len(report.layers) == 14
    row = next(r for r in report.layers if r.name == "model.layers.0.self_attn.q_proj")
    d, e = target - w, base.dequantize_weights().double() - w
    surviving = float((e * d).sum() / (d * d).sum())
    assert row.codes == 64 * 64
    assert row.codes_changed == int((codes_of(base) != codes).sum()) > 0
    assert row.delta_norm == pytest.approx(float(d.norm()), rel=1e-5)
    assert row.surviving == pytest.approx(surviving, rel=1e-4)
    noise = float((e - surviving * d).norm() / d.norm())
    assert row.noise == pytest.approx(noise, rel=1e-3)
    assert 0.3 < report.surviving < 1.2 and report.codes == sum(r.codes for r in report.layers)
    assert report.to_text().splitlines()[-1].startswith("all")
    assert json.loads(report.to_json())["codes_changed"] == report.codes_changed


def codes_of(layer: QuantizedLinear) -> torch.Tensor:
    """Codes as the upstream file of mlx has them: 8 of 4 bits in a uint32."""
    packed = layer.to_upstream()["weight"].view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def test_small_changes_are_lost_to_rounding_and_the_report_tells():
    surviving = []
    for std in (0.005, 0.05, 0.3):
        model = get_peft_model(quantized(nf4()), lora(ALL))
        randomize_lora(model, std=std)
        model.merge_adapter()
        surviving.append(merge_report(model).surviving)
    assert surviving[0] < surviving[1] < surviving[2]
    assert surviving[0] < 0.5 and surviving[2] > 0.9


@every_method
def test_an_adapter_without_effect_keeps_the_bytes(method):
    model = get_peft_model(quantized(method), lora(ALL))  # B is zero
    before = packed_bytes(model)
    merged = model.merge_and_unload()
    assert same_bytes(
        packed_bytes(merged),
        {
            k.replace("base_model.model.", "").replace(".base_layer", ""): v
            for k, v in before.items()
        },
    )
    report = merge_report(merged)
    assert report.codes_changed == 0 and report.surviving == 1 and report.noise == 0


@pytest.mark.parametrize(("safe", "error"), [(True, ValueError), (False, UnsupportedError)])
def test_a_failed_merge_changes_nothing(safe, error):
    model = get_peft_model(quantized(hqq()), lora(), adapter_name="good")
    model.add_adapter("bad", lora())
    randomize_lora(model, "good")
    model.merge_adapter(["good"])
    layer, before = first_layer(model), packed_bytes(model)
    layer.lora_B["bad"].weight.data.fill_(float("nan"))
    with pytest.raises(error), pytest.warns(UserWarning, match="additionally"):
        layer.merge(safe_merge=safe, adapter_names=["bad"])
    assert layer.merged_adapters == ["good"]
    assert same_bytes(packed_bytes(model), before)
    assert len(merge_report(model).layers) == 4
    layer.unmerge()
    assert not layer.merged


def test_merged_layers_compute_without_adapters_and_reopen_when_disabled(tokens):
    model = get_peft_model(quantized(METHODS["int8"]), lora(ALL)).eval()
    with model.disable_adapter():
        base = model(tokens).logits
    randomize_lora(model)
    expected = model(tokens).logits
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0.05, atol=0.05)
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, base)
    assert not merge_report(model).layers


@every_method
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_full_precision_merge_loses_nothing(method, variant, tokens):
    model = get_peft_model(
        prepare_model_for_training(quantized(method)), lora(**VARIANTS[variant])
    ).eval()
    randomize_lora(model)
    expected = model(tokens).logits
    model.merge_adapter()  # what was merged with rounding is taken back first
    merged = merge_to_full_precision(model)
    assert type(merged).__name__ == "LlamaForCausalLM" and not packed_layers(merged)
    assert all(type(m) is nn.Linear for n, m in merged.named_modules() if n.endswith("_proj"))
    assert not merged.is_loaded_in_4bit and not merged.is_loaded_in_8bit
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    for parameter in merged.parameters():
        assert parameter.is_floating_point()


def test_full_precision_merge_in_another_dtype(tokens):
    model = get_peft_model(quantized(hqq()), lora())
    randomize_lora(model)
    layer = first_layer(model)
    wanted = layer.base_layer.dequantize_weights() + layer.get_delta_weight("default").detach()
    merged = merge_to_full_precision(model, dtype=torch.bfloat16)
    weights = {n: m.weight for n, m in merged.named_modules() if n.endswith("_proj")}
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["model.layers.0.self_attn.q_proj"], wanted.to(torch.bfloat16))
    with pytest.raises(ConfigError, match="expected a PeftModel"):
        merge_to_full_precision(tiny_llama())


def test_dequantized_model_keeps_logits_and_ties(tokens):
    model = create_quantization_adapter("cpu", hqq()).quantize_model(tiny_llama(tied=True))
    expected = model(tokens).logits
    assert dequantize_model(model) is model and not packed_layers(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    layer = QuantizedLinear.from_linear(nn.Linear(64, 32), hqq())
    dense = dequantize_model(nn.Sequential(layer, layer))
    assert dense[0] is dense[1] and torch.equal(dense[0].weight, layer.dequantize_weights())
    assert type(dequantize_model(layer, torch.float16)) is nn.Linear
