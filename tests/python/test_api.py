"""The documented interface: snippets of the public document, policy, reports."""

import argparse
import copy
import json
import pickle

import pytest
import torch
from torch import nn

import quantal
from backend_manager import Backend, BackendManager
from conftest import hqq, nf4, tiny_llama
from imports import report_import_status
from quantization_wrapper import (
    FallbackAdapter,
    HQQAdapter,
    QuantizationAdapter,
    QuantizationConfig,
    QuantizationMethod,
    QuantizedLinear,
    create_quantization_adapter,
    get_recommended_config,
    replace_linear_with_quantized,
    validate_quantization_config,
)


def test_dataclass_has_the_documented_order_and_defaults():
    config = QuantizationConfig()
    assert config.method is QuantizationMethod.BNB_NF4
    assert (config.bits, config.bits_set, config.group_size) == (4, False, 64)
    positional = QuantizationConfig(
        QuantizationMethod.HQQ, 8, 128, torch.float16, None, False, "fp4", ["head"], {}, {}
    )
    assert positional.group_size == 128 and positional.skip_modules == ["head"]
    assert positional.quant_type == "fp4" and positional.bits_set


def test_config_accepts_strings_and_survives_json_copy_and_pickle():
    config = QuantizationConfig("hqq", bits=None, compute_dtype="bfloat16")
    assert config.method is QuantizationMethod.HQQ and config.compute_dtype is torch.bfloat16
    config.layer_configs = {"layers.0": {"bits": 8, "compute_dtype": torch.float16}}
    again = QuantizationConfig.from_json(json.dumps(config.to_dict()))
    assert again.to_dict() == config.to_dict() and not again.bits_set
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config and not twin.bits_set
    assert repr(QuantizationConfig("hqq")) == "QuantizationConfig(method=HQQ)"
    assert repr(QuantizationConfig("hqq", bits=4)) == "QuantizationConfig(method=HQQ, bits=4)"


def test_config_refuses_bad_settings_by_name():
    with pytest.raises(ValueError, match="Unsupported bit width: 7. Supported: 2, 4, 8, 16"):
        QuantizationConfig(bits=7)
    with pytest.raises(quantal.ConfigError, match="group_size"):
        QuantizationConfig.from_dict({"group_sizes": 64})
    with pytest.raises(ValueError, match="bnb_nf4"):
        QuantizationConfig(method="nf5")
    with pytest.raises(TypeError, match="float3"):
        QuantizationConfig(compute_dtype="float3")


def test_cpu_example_of_the_document_quantizes(model, tokens):
    config = QuantizationConfig(
        method=QuantizationMethod.HQQ, bits=8, group_size=128, compute_dtype=torch.float32
    )
    adapter = create_quantization_adapter(Backend.CPU, config)
    dense = model(tokens).logits
    quantized = adapter.quantize_model(model)
    assert quantized is model and isinstance(adapter, HQQAdapter)
    error = (quantized(tokens).logits - dense).norm() / dense.norm()
    assert 0 < error < 0.02


def test_cuda_example_builds_on_a_host_without_the_device(model):
    config = QuantizationConfig(
        method=QuantizationMethod.BNB_NF4,
        bits=4,
        double_quant=True,
        quant_type="nf4",
        compute_dtype=torch.bfloat16,
    )
    adapter = create_quantization_adapter(Backend.CUDA, config)
    layer = adapter.quantize_model(model).model.layers[0].self_attn.q_proj
    assert layer.compute_dtype is torch.bfloat16 and layer.dialect == "bnb"
    assert layer.codes.device.type == "cpu"


def test_recommendation_follows_the_document():
    config = get_recommended_config(backend=Backend.MPS, model_size_b=7.0, available_memory_gb=16.0)
    assert config.method is QuantizationMethod.MLX_INT4
    assert get_recommended_config("cuda", 7.0, 8.0).method is QuantizationMethod.BNB_NF4
    assert get_recommended_config("cpu", 7.0, 64.0).method is QuantizationMethod.NONE
    assert "70" in get_recommended_config("cuda", 70.0, 8.0).note


def test_validation_lists_the_documented_issues():
    issues = validate_quantization_config(QuantizationConfig(), Backend.MPS)
    assert any("bitsandbytes quantization is only supported on CUDA" in i for i in issues)
    assert all(i.severity in ("error", "warning") and i.id for i in issues)
    config = QuantizationConfig("mlx_int4", compute_dtype=torch.bfloat16)
    assert any("bfloat16" in i for i in validate_quantization_config(config, "mps"))
    assert validate_quantization_config(hqq(8, 128), Backend.CPU) == []


def test_setup_quantization_of_the_document():
    args = argparse.Namespace(
        quantize="hqq",
        q_bits=4,
        q_group_size=64,
        q_compute_dtype="float32",
        q_skip_modules="lm_head,embed",
        q_double_quant=True,
    )
    method_map = {
        "bnb_nf4": QuantizationMethod.BNB_NF4,
        "hqq": QuantizationMethod.HQQ,
        "none": QuantizationMethod.NONE,
    }
    config = QuantizationConfig(
        method=method_map.get(args.quantize, QuantizationMethod.NONE),
        bits=args.q_bits,
        group_size=args.q_group_size,
        compute_dtype=getattr(torch, args.q_compute_dtype),
        skip_modules=args.q_skip_modules.split(",") if args.q_skip_modules else ["lm_head"],
        double_quant=args.q_double_quant,
    )
    manager = BackendManager("cpu", verbose=False)
    assert isinstance(create_quantization_adapter(manager.backend, config), HQQAdapter)


def test_unsupported_pair_falls_back_with_reason_and_remedies(model):
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="cpu"):
        adapter = create_quantization_adapter(Backend.CPU, QuantizationConfig())
    assert isinstance(adapter, FallbackAdapter) and adapter.report.fallback
    assert adapter.report.reason
    with pytest.warns(UserWarning, match="No quantization applied"):
        assert adapter.quantize_model(model) is model
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert "dense" in adapter.report.to_text()


@pytest.mark.filterwarnings("ignore")
def test_support_and_fallback_change_the_decision():
    config = QuantizationConfig()
    extended = create_quantization_adapter("cpu", config, support="extended")
    assert type(extended).__name__ == "BitsAndBytesAdapter"
    nearest = create_quantization_adapter("cpu", config, fallback="nearest")
    assert isinstance(nearest, HQQAdapter)
    changed = {s["what"] for s in nearest.report.substitutions}
    assert "method" in changed
    with pytest.raises(NotImplementedError, match="cpu"):
        create_quantization_adapter("cpu", config, fallback="error")
    with pytest.raises(ValueError, match="extended"):
        create_quantization_adapter("cpu", config, support="everything")


def test_every_method_is_built():
    assert quantal.available_methods() == list(QuantizationMethod)
    adapter = create_quantization_adapter("mps", QuantizationConfig("mlx_int4"))
    assert isinstance(adapter, quantal.MLXAdapter)


def test_direct_construction_agrees_with_the_factory():
    with pytest.raises(ValueError, match="only supported on CUDA"):
        quantal.BitsAndBytesAdapter(Backend.CPU, QuantizationConfig())
    assert quantal.BitsAndBytesAdapter("cpu", nf4()).backend is Backend.CPU
    assert quantal.HQQAdapter("cpu").create_quantized_linear(64, 64).dialect == "hqq"
    with pytest.raises(ValueError, match="method is bnb_nf4, expected hqq"):
        quantal.HQQAdapter("cpu", QuantizationConfig())
    for bits, text in ((2, "bitsandbytes doesn't support 2-bit quantization"), (8, "has 4 bits")):
        with pytest.raises(ValueError, match=text):
            quantal.BitsAndBytesAdapter("cuda", QuantizationConfig("bnb_nf4", bits=bits))
    with pytest.warns(UserWarning, match="No quantization support for cpu, using fallback"):
        assert quantal.FallbackAdapter("cpu", QuantizationConfig()).report.reason
    with pytest.warns(UserWarning, match="although HQQAdapter would"):
        quantal.FallbackAdapter("cpu", hqq())


class MyQuantizedLinear(quantal.PackedLinear):
    def __init__(self, in_features, out_features, bias, config):
        super().__init__(in_features, out_features, bias, config)


class MyCustomAdapter(QuantizationAdapter):
    def _validate_backend_support(self):
        pass

    def create_quantized_linear(self, in_features, out_features, bias=True):
        return MyQuantizedLinear(in_features, out_features, bias, self.config)

    def quantize_model(self, model, **kwargs):
        return replace_linear_with_quantized(model, self)


def test_custom_adapter_of_the_document_runs():
    model = tiny_llama(bias=True)
    bias = model.model.layers[0].self_attn.q_proj.bias.detach().clone()
    adapter = MyCustomAdapter(Backend.CPU, hqq())
    quantized = adapter.quantize_model(model)
    layer = quantized.model.layers[0].self_attn.q_proj
    assert type(layer) is MyQuantizedLinear and torch.equal(layer.bias, bias)
    assert type(quantized.lm_head) is nn.Linear
    adapter.prepare_model_for_training(quantized)
    assert not any(p.requires_grad for p in quantized.parameters())


def test_layer_configs_match_whole_components():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(64, 64) for _ in range(24))})
    config = hqq(layer_configs={"layers.2": {"bits": 8}, "layers.99": {"bits": 8}})
    adapter = create_quantization_adapter("cpu", config)
    adapter.quantize_model(model)
    assert [i for i, m in enumerate(model["layers"]) if m.bits == 8] == [2]
    assert any("layers.99" in p for p in adapter.report.unmatched_patterns)


def test_report_counts_bytes_and_explains_what_stays_dense(model):
    adapter = create_quantization_adapter("cpu", hqq())
    adapter.quantize_model(model)
    report = adapter.report.to_dict()
    rows = {e["name"]: e for e in report["entries"]}
    parameters = sum(e["parameters"] for e in report["entries"])
    assert parameters == sum(p.numel() for p in tiny_llama().parameters())
    layer = model.model.layers[0].mlp.up_proj
    row = rows["model.layers.0.mlp.up_proj"]
    assert row["bytes_before"] == 64 * 128 * 4 and row["bytes_after"] == layer.packed_bytes()
    assert 0.03 < row["relative_error"] < 0.15
    assert "lm_head" in rows["lm_head"]["reason"]
    assert "Embedding" in rows["model.embed_tokens"]["reason"]
    text = adapter.report.to_text()
    assert "lm_head" in text and max(map(len, text.splitlines())) <= 100


def test_skip_modules_argument_and_root_layer():
    adapter = create_quantization_adapter("cpu", hqq())
    model = replace_linear_with_quantized(tiny_llama(), adapter, skip_modules=[])
    assert isinstance(model.lm_head, QuantizedLinear)
    root = replace_linear_with_quantized(nn.Linear(64, 32), adapter)
    assert isinstance(root, QuantizedLinear) and root.out_features == 32


def test_tied_head_stays_dense_with_its_reason():
    adapter = create_quantization_adapter("cpu", hqq(skip_modules=[]))
    model = adapter.quantize_model(tiny_llama(tied=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reason = {e["name"]: e["reason"] for e in adapter.report.entries}["lm_head"]
    assert "model.embed_tokens" in reason


def test_two_layers_that_share_a_weight_share_its_bytes():
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    create_quantization_adapter("cpu", hqq()).quantize_model(model)
    assert model[0].codes is model[1].codes
    assert not torch.equal(model[0].bias, model[1].bias)


def test_backend_manager_and_capabilities(monkeypatch):
    monkeypatch.setenv("FSDP_BACKEND", "CPU")
    manager = BackendManager.from_env(verbose=False)
    assert manager.backend is Backend.CPU and str(manager.backend) == "cpu"
    assert manager.get_distributed_backend() == "gloo" and manager.supports_quantization(8)
    assert manager.supports_quantization(4) and manager.get_memory_info()["total_memory"] > 0
    assert manager.get_optimal_batch_size(7.0, 4096) == 1
    with pytest.raises(ValueError, match="exceeds the recommended limit for cpu"):
        manager.validate_model_size(13)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="Backend 'cuda' is not available on this system"):
            BackendManager("cuda", verbose=False)


def test_import_report_names_stand_ins():
    text = report_import_status(backend="cuda")
    assert "Import Status Report" in text and "Backend: cuda" in text
    assert "bitsandbytes" in text and "bnb_nf4, bnb_int8" in text


def test_compatibility_matrix_is_the_documented_one():
    table = quantal.compatibility_matrix_markdown()
    assert "| CPU     | ✗       | ✗        | ✓   |" in table


@pytest.mark.parametrize("kind", ["GptOss", "Llama4Text"])
def test_fused_experts_are_reported_by_name_with_their_bytes(kind):
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, num_local_experts=4)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    adapter = create_quantization_adapter("cpu", hqq())
    adapter.quantize_model(model)
    rows = {e["name"]: e for e in adapter.report.entries if "gate_up_proj" in e["name"]}
    fused = {n: p for n, p in model.named_parameters() if "gate_up_proj" in n and p.dim() == 3}
    assert len(fused) == 2
    for name, parameter in fused.items():
        assert rows[name]["bytes_after"] == parameter.nbytes and rows[name]["method"] == "dense"
        assert str(list(parameter.shape)) in rows[name]["reason"]
    everything = sum(p.nbytes for p in model.parameters())
    reported = sum(e["bytes_after"] for e in adapter.report.entries)
    assert reported == pytest.approx(everything, abs=256 * 200), "nothing is left out"
    assert "experts.gate_up_proj" in adapter.report.to_text()


def test_a_layer_is_never_quantized_twice(model):
    adapter = create_quantization_adapter("cpu", hqq())
    digest = quantal.model_digest(adapter.quantize_model(model))
    again = create_quantization_adapter("cpu", hqq(8)).quantize_model(model)
    assert again is model and quantal.model_digest(model) == digest
    assert all(layer.bits == 4 for layer in model.modules() if isinstance(layer, QuantizedLinear))


def test_signatures_are_the_documented_ones():
    import inspect

    order = ["in_features", "out_features", "bias", "config"]
    assert list(inspect.signature(QuantizedLinear).parameters) == order
    assert list(inspect.signature(QuantizationAdapter).parameters) == ["backend", "config"]
    assert inspect.isabstract(QuantizedLinear)
