"""The earlier tool's known weaknesses, W1 to W29: what it got wrong is right here.

One test per weakness, small on purpose; where a whole file of tests is about the same thing, the
docstring names it.
"""

import importlib.util
import json
import os
import pickle
import warnings

import pytest
import torch
from torch import nn

import quantal
from conftest import GOLDEN, hqq, tiny_llama
from quantal.error_handling import detect_oom_error
from quantal.model_loader import size_in_name
from quantal.quantization_error_handler import QuantizationErrorHandler
from quantization_wrapper import (
    Backend,
    FallbackAdapter,
    QuantizationConfig,
    QuantizationMethod,
    QuantizedLinear,
    create_quantization_adapter,
    get_recommended_config,
    replace_linear_with_quantized,
    validate_quantization_config,
)

METHODS = [m.value for m in QuantizationMethod if m is not QuantizationMethod.NONE]
#: ||logits - dense logits|| / ||dense logits|| that the tiny model may show.
ERROR = {"bnb_nf4": 0.3, "bnb_int8": 0.03, "hqq": 0.3, "mlx_int4": 0.3, "mlx_int8": 0.03}
ERROR |= {"quanto_int2": 1.0, "quanto_int4": 0.3, "quanto_int8": 0.03}


def make(method, **settings):
    settings.setdefault("compute_dtype", "float32")
    config = QuantizationConfig(method, **settings)
    return create_quantization_adapter("cpu", config, support="extended")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "MLX quantization requires")
        yield


@pytest.mark.parametrize("method", METHODS)
def test_w1_w2_every_method_quantizes_from_the_weights(method, tokens):
    dense = tiny_llama()(tokens).logits
    model = make(method).quantize_model(tiny_llama())
    mlp = model.model.layers[1].mlp
    assert all(isinstance(m, QuantizedLinear) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    error = (model(tokens).logits - dense).norm() / dense.norm()
    assert 0 < error < ERROR[method]


@pytest.mark.parametrize("method", METHODS)
def test_w3_the_method_implies_its_bits(method):
    bits = {"int2": 2, "int4": 4, "int8": 8}.get(method.split("_")[-1], 4)
    layer = make(method).create_quantized_linear(256, 64, bias=False)
    assert layer.bits == bits and layer.codes.numel() == 256 * 64 * bits // 8


def test_w4_settings_of_layers_count():
    layers = {"0": {"bits": 8}, "1": None, "tyop": {"bits": 2}}
    adapter = create_quantization_adapter("cpu", hqq(skip_modules=["2"], layer_configs=layers))
    with pytest.warns(UserWarning, match="tyop"):
        model = adapter.quantize_model(nn.Sequential(*(nn.Linear(128, 64) for _ in range(4))))
    assert adapter.report.unmatched_patterns == ["layer_configs: tyop"]
    assert type(model[1]) is type(model[2]) is nn.Linear
    assert model[0].codes.numel() == 128 * 64 and model[3].codes.numel() == 128 * 64 // 2
    bytes_after = {e["name"]: e["bytes_after"] for e in adapter.report.entries}
    for name in ("0", "3"):
        size = model[int(name)].packed_bytes() + 64 * 4
        assert bytes_after[name] in (size, size - model[int(name)].spec.nbytes)
    assert bytes_after["1"] == (128 * 64 + 64) * 4


def test_w5_mlx_really_quantizes_and_writes_mlx_files(tmp_path, tokens):
    """conformance/test_mlx.py loads these folders with mlx-lm."""
    adapter = make("mlx_int4")
    model = adapter.quantize_model(tiny_llama())
    adapter.save_quantized_model(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    layer = model.model.layers[0].mlp.up_proj
    stored = layer.to_upstream("up_proj.")
    codes, scales, biases = (stored[f"up_proj.{n}"] for n in ("weight", "scales", "biases"))
    nibbles = torch.stack([codes.view(torch.int32) >> 4 * i & 15 for i in range(8)], -1)
    values = nibbles.reshape(128, -1, 64) * scales[..., None].float() + biases[..., None].float()
    assert torch.allclose(values.reshape(128, 64), layer.dequantize_weights().float(), atol=1e-6)
    again = adapter.load_quantized_model(tmp_path / "m")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("folder", ["hqq-pt-4bit", "hqq-safetensors"])
def test_w6_hqq_computes_with_its_codes_and_reads_upstream(folder):
    adapter = create_quantization_adapter("cpu", hqq())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapter.load_quantized_model(GOLDEN / "checkpoints" / folder)
    layer = next(m for m in model.modules() if isinstance(m, QuantizedLinear))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    expected = x @ layer.dequantize_weights(torch.float32).T
    assert torch.allclose(layer(x) - (0 if layer.bias is None else layer.bias), expected, atol=1e-4)


def test_w7_int8_is_within_half_a_step():
    torch.manual_seed(0)
    linear = nn.Linear(256, 64)
    layer = make("bnb_int8").quantize_model(nn.Sequential(linear))[0]
    weight = linear.weight.detach().half().float()  # what bitsandbytes quantizes
    step = weight.abs().amax(1, keepdim=True) / 127
    distance = (weight - layer.dequantize_weights(torch.float32)).abs()
    assert (distance <= step / 2 * (1 + 1e-5)).all()


def test_w8_bias_skip_lists_and_root_layers():
    model = nn.ModuleDict({n: nn.Linear(64, 64) for n in ("head", "head_proj", "o_proj")})
    bias = model["o_proj"].bias.detach().clone()
    adapter = create_quantization_adapter("cpu", hqq(skip_modules=["head"]))
    replace_linear_with_quantized(model, adapter)
    assert type(model["head"]) is nn.Linear and isinstance(model["head_proj"], QuantizedLinear)
    assert torch.equal(model["o_proj"].bias, bias)
    assert torch.equal(model["o_proj"](torch.zeros(1, 64))[0], bias)
    nothing = replace_linear_with_quantized(nn.ModuleDict({"head": nn.Linear(64, 64)}), adapter, [])
    assert isinstance(nothing["head"], QuantizedLinear), "an empty list skips nothing"
    root = replace_linear_with_quantized(nn.Linear(64, 64), adapter, [])
    assert isinstance(root, QuantizedLinear)


def test_w9_a_stand_in_is_not_availability(model):
    """tests/python/test_imports.py"""
    from imports import ImportRegistry, check_import_availability, report_import_status

    registry = ImportRegistry()
    registry.register("x", lambda: importlib.import_module("no_such_module"), fallback=dict)
    assert not registry.check_availability("x") and registry.get("x").fallback_used
    if importlib.util.find_spec("bitsandbytes") is None:
        assert not check_import_availability("bitsandbytes")
        assert "(fallback)" in report_import_status("cuda")
    config = QuantizationConfig("quanto_int4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no package is needed, so none is missed
        create_quantization_adapter("cpu", config).quantize_model(model)


def test_w10_a_missing_tensor_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = create_quantization_adapter("cpu", hqq())
    adapter.save_quantized_model(adapter.quantize_model(tiny_llama()), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="1 missing: model.norm.weight"):
        adapter.load_quantized_model(tmp_path / "m")


@pytest.mark.parametrize("method", ["quanto_int4", "bnb_nf4"])
def test_w11_only_adapters_train(method, tokens):
    from peft import LoraConfig, get_peft_model

    adapter = make(method)
    model = adapter.prepare_model_for_training(adapter.quantize_model(tiny_llama()))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_w12_the_documented_round_trip_on_a_directory(method, tmp_path, tokens):
    adapter = make(method)
    quantized_model = adapter.quantize_model(tiny_llama())
    logits = quantized_model(tokens).logits
    adapter.save_quantized_model(quantized_model, f"{tmp_path}/saved_model/")
    assert os.path.isfile(tmp_path / "saved_model" / "config.json")
    loaded_model = adapter.load_quantized_model(f"{tmp_path}/saved_model/", tiny_llama().config)
    assert torch.equal(loaded_model(tokens).logits, logits)


def test_w13_formats_convert_with_a_stated_loss(tmp_path):
    """docs/convert.md, tests/formats/transcode_test.cpp"""
    adapter = make("bnb_nf4", double_quant=False)
    adapter.save_quantized_model(adapter.quantize_model(tiny_llama()), tmp_path / "nf4")
    there = quantal.convert(tmp_path / "nf4", tmp_path / "hqq", "hqq", bits=8)
    assert not there.lossless and all(0 < n.relative_error < 0.02 for n in there.layers)
    back = quantal.convert(tmp_path / "hqq", tmp_path / "again", "bnb", bits=4, quant_type="nf4")
    assert all(0 < layer.relative_error < 0.15 for layer in back.layers)
    same = quantal.convert(tmp_path / "nf4", tmp_path / "copy", "bnb")
    assert same.lossless and all(layer.relative_error == 0 for layer in same.layers)


def test_w14_a_fallback_tells_reason_and_bytes():
    config = QuantizationConfig("bnb_nf4")
    with pytest.warns(UserWarning, match="only supported on CUDA.*'support': 'extended'"):
        adapter = create_quantization_adapter("cpu", config)
    assert isinstance(adapter, FallbackAdapter) and adapter.report.fallback
    with pytest.warns(UserWarning, match="No quantization applied"):
        adapter.quantize_model(tiny_llama())
    assert "only supported on CUDA" in adapter.report.reason
    totals = adapter.report.to_dict()["totals"]["all"]
    assert totals["bytes_after"] == totals["bytes_before"] > 0
    with pytest.raises(NotImplementedError, match="only supported on CUDA"):
        create_quantization_adapter("cpu", config, fallback="error")


def test_w15_a_bad_shape_fails_once(monkeypatch):
    """tests/python/test_error_handling.py"""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited"))
    calls = []
    handler = QuantizationErrorHandler("cpu", hqq(), False)

    class Broken(quantal.HQQAdapter):
        def quantize_model(self, model, **kwargs):
            calls.append(1)
            raise quantal.ShapeError("no")

    with pytest.raises(ValueError):
        handler.quantize_model_safe(nn.Linear(64, 64), Broken("cpu", hqq()))
    assert len(calls) == 1 and handler.stats["recovered_errors"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_w16_safe_loading_works(method, tmp_path, tokens):
    from quantal.quantization_error_handler import create_safe_quantization_adapter

    safe = create_safe_quantization_adapter("cpu", QuantizationConfig(method), make(method))
    model = safe.quantize_model(tiny_llama())
    safe.save_quantized_model(model, tmp_path / "m")
    loaded = safe.load_quantized_model(tmp_path / "m", device="cpu")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert safe.get_memory_usage(model)["quantized_bytes"] > 0


@pytest.mark.parametrize("text", ["bloom layer is wrong", "no room", "zoom"])
def test_w17_only_a_lack_of_memory_is_one(text):
    assert not detect_oom_error(RuntimeError(text))
    assert detect_oom_error(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))


def test_w18_a_recommendation_that_does_not_fit_says_so():
    """The planner's figures against real runs: tests/checkpoint, tests/python/test_plan.py"""
    assert "35.0 GB" in get_recommended_config("cuda", 70.0, 8.0).note
    assert get_recommended_config("cuda", 7.0, 8.0).note == ""


@pytest.mark.parametrize(
    "name, size", [("yi-33b", 33), ("opt-1.3b", 1.3), ("Llama-3.1-405B", 405), ("llama-3-8b", 8)]
)
def test_w19_sizes_of_names(name, size):
    assert size_in_name(name) == size


def test_w20_no_false_alarms_and_more_rules():
    """Each rule with a failing and a passing case: tests/python/test_validate.py"""
    assert validate_quantization_config(QuantizationConfig("quanto_int4"), "mps") == []
    assert validate_quantization_config(QuantizationConfig("none"), "mps") == []
    bad = QuantizationConfig("bnb_nf4", bits=8, quant_type="nf5", group_size=7)
    found = {i.id for i in validate_quantization_config(bad, "cuda")}
    assert {"method.bits", "group_size.illegal"} <= found or "quant_type.unknown" in found


def test_w21_the_cpu_computes_in_what_it_is_good_at():
    adapter = create_quantization_adapter("cpu", QuantizationConfig("hqq"))
    assert adapter.config.compute_dtype in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_w22_every_pair_works_or_says_why(method, backend):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapter = create_quantization_adapter(backend, QuantizationConfig(method))
        model = adapter.quantize_model(nn.Sequential(nn.Linear(64, 64)))
    if method == "none":
        assert isinstance(adapter, FallbackAdapter) and not told
    elif adapter.report.fallback:
        assert type(model[0]) is nn.Linear and adapter.report.reason
        assert any(str(backend) in str(w.message) for w in told)
    else:
        assert isinstance(model[0], QuantizedLinear)


def test_w24_the_quantization_state_is_plain_tensors():
    """Sharding with FSDP2: tests of the FSDP room."""
    layer = make("bnb_nf4").quantize_model(nn.Sequential(nn.Linear(128, 64)))
    state = layer.state_dict()
    assert all(isinstance(t, torch.Tensor) for t in state.values())
    with torch.device("meta"):
        empty = make("bnb_nf4").quantize_model(nn.Sequential(nn.Linear(128, 64, device="meta")))
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(state, strict=True)
    x = torch.randn(2, 128)
    assert torch.equal(empty(x), layer(x))


def test_w25_one_config_for_everything():
    from quantal.model_loader import ModelLoadingConfig

    config = QuantizationConfig("hqq", bits=3)
    loading = ModelLoadingConfig("m", "cpu", quantization_config=config)
    assert loading.quantization_config is config
    assert QuantizationConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("value", [0.0, 1.0, -0.37])
@pytest.mark.parametrize("method", METHODS)
def test_w26_constant_weights_round_trip(method, value):
    linear = nn.Linear(64, 64, bias=False)
    nn.init.constant_(linear.weight, value)
    layer = make(method).quantize_model(nn.Sequential(linear))[0]
    weight = layer.dequantize_weights(torch.float32)
    assert weight.isfinite().all() and (weight - value).abs().max() <= 0.02 * abs(value)


class _Attack:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_w27_a_malicious_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Attack()}, "evil.pth")
    with open("legacy.bin", "wb") as file:
        pickle.dump(_Attack(), file)
    for name in ("evil.pth", "legacy.bin"):
        with pytest.raises(quantal.Error):
            quantal.load_model(name, tiny_llama().config)
    assert not os.path.exists("hacked")


def test_w28_tensors_come_back_by_their_names(tmp_path):
    own = nn.ModuleDict({"a_b": nn.Linear(64, 32), "c": nn.Sequential(nn.Linear(32, 64))})
    adapter = create_quantization_adapter("cpu", hqq(group_size=32))
    adapter.save_quantized_model(adapter.quantize_model(own), tmp_path / "own")
    again = nn.ModuleDict({"a_b": nn.Linear(64, 32), "c": nn.Sequential(nn.Linear(32, 64))})
    adapter.load_quantized_model(tmp_path / "own", model=again)
    assert again["a_b"].in_features == 64 and again["c"][0].out_features == 64
    assert quantal.model_digest(again) == quantal.model_digest(own)


def test_w29_batch_sizes_follow_the_size():
    sizes = [1, 7, 13, 40, 70]
    batches = [quantal.BackendManager("cpu", False).get_optimal_batch_size(s) for s in sizes]
    assert batches == sorted(batches, reverse=True) and batches[-1] >= 1
