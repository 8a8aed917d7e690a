"""QLoRA over every dialect with PEFT as it is: adapters, merging, saving, LoftQ."""

import copy
import json

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn

from conftest import GOLDEN, hqq, nf4, tiny_llama
from qlora_support import (
    ALL,
    LLM_INT8,
    METHODS,
    dense_twin,
    gradients,
    lora,
    packed_bytes,
    packed_layers,
    quantized,
    randomize_lora,
    same_bytes,
)
from quantal import (
    ConfigError,
    QuantizationConfig,
    QuantizedLinear,
    UnsupportedError,
    create_quantization_adapter,
    dequantize_model,
    initialize_loftq,
    merge_report,
    merge_to_full_precision,
    model_digest,
    prepare_model_for_training,
)

VARIANTS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


@pytest.fixture(params=list(METHODS))
def method(request) -> QuantizationConfig:
    return METHODS[request.param]


def first_layer(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


# ---------------------------------------------------------------------- forward and gradients


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


# ---------------------------------------------------------------------- merging


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


# ---------------------------------------------------------------------- files, modules_to_save


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


# ---------------------------------------------------------------------- ways to begin


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
