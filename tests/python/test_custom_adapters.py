"""Adapters of one's own, by class and by the name of register_adapter."""

import copy
import json
import logging
import pickle

import pytest
import torch
from torch import nn

import quantal
from conftest import hqq, tiny_llama
from quantal import _custom
from quantization_wrapper import (
    FallbackAdapter,
    QuantizationAdapter,
    QuantizationConfig,
    QuantizationMethod,
    QuantizedLinear,
    create_quantization_adapter,
    replace_linear_with_quantized,
    validate_quantization_config,
)


class IntLinear(QuantizedLinear):
    """Symmetric integers of any width up to 8, one scale per row."""

    def __init__(self, in_features, out_features, bias=True, config=None):
        super().__init__(in_features, out_features, bias, config)
        self.top = 2 ** (int(self.config.bits) - 1) - 1
        self.register_buffer("q", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features, 1))

    def quantize_weights(self, weights):
        self.scale.copy_(weights.abs().amax(1, keepdim=True) / self.top)
        self.q.copy_((weights / self.scale).round())

    def dequantize_weights(self):
        return self.q * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize_weights(), self.bias)


class RowAdapter(QuantizationAdapter):
    def create_quantized_linear(self, in_features, out_features, bias=True):
        return IntLinear(in_features, out_features, bias, self.config)

    def quantize_model(self, model, **kwargs):
        return replace_linear_with_quantized(model, self, **kwargs)


@pytest.fixture
def row_int(monkeypatch):
    """The name row_int, registered for one test."""
    monkeypatch.setattr(_custom, "_classes", {})
    quantal.register_adapter("row_int", RowAdapter)
    return "row_int"


def test_configs_and_the_factory_know_the_name(row_int):
    config = QuantizationConfig(row_int, bits=8)
    assert config.method is QuantizationMethod("row_int") and config.method.value == "row_int"
    assert isinstance(config.method, QuantizationMethod)
    assert config.method not in list(QuantizationMethod), "only built-in methods are listed"
    assert repr(config) == "QuantizationConfig(method=ROW_INT, bits=8)"
    for twin in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        QuantizationConfig.from_json(config.to_json()),
    ):
        assert twin == config and twin.method is config.method
    for backend in ("cuda", "mps", "mlx", "cpu"):
        adapter = create_quantization_adapter(backend, config)
        assert type(adapter) is RowAdapter and adapter.report.adapter == "RowAdapter"
        assert not adapter.report.fallback and adapter.config.bits == 8
        assert validate_quantization_config(config, backend) == []
    assert quantal.registered_adapters() == {"row_int": RowAdapter}
    assert "  registered here: row_int\n" in quantal.report_import_status()


def test_an_unknown_name_lists_the_methods():
    with pytest.raises(ValueError, match="'row_floats', expected one of bnb_nf4, .*, none"):
        QuantizationConfig("row_floats")


def test_patterns_and_widths_of_layers_count(row_int, tokens):
    config = QuantizationConfig(
        row_int,
        bits=8,
        skip_modules=["lm_head", "gate_proj", "nowhere"],
        layer_configs={
            "model.layers.0": {"bits": 4},
            "*.1.*.q_proj": {"bits": 16},
            "*.1.*.v_proj": {"method": "hqq", "bits": 8},
        },
        compute_dtype="float32",
    )
    adapter = create_quantization_adapter("cpu", config)
    with pytest.warns(UserWarning, match="skip_modules: nowhere"):
        model = adapter.quantize_model(tiny_llama())
    first, second = model.model.layers
    assert first.self_attn.q_proj.top == 7 and second.self_attn.k_proj.top == 127
    assert type(second.self_attn.q_proj) is nn.Linear
    assert second.self_attn.v_proj.dialect == "hqq" and second.self_attn.v_proj.bits == 8
    assert type(first.mlp.gate_proj) is nn.Linear and type(model.lm_head) is nn.Linear
    assert adapter.report.unmatched_patterns == ["skip_modules: nowhere"]
    assert adapter.config.bits == 8, "the config of the adapter is its own again"
    by_name = {entry["name"]: entry["method"] for entry in adapter.report.entries}
    assert by_name["model.layers.0.self_attn.q_proj"] == "IntLinear"
    expected = tiny_llama()(tokens).logits
    assert (model(tokens).logits - expected).norm() / expected.norm() < 0.3


def test_saved_models_are_loaded_by_their_adapter(row_int, tmp_path, tokens):
    layers = {"model.layers.0": {"bits": 4}}
    config = QuantizationConfig(row_int, bits=8, layer_configs=layers, compute_dtype="float32")
    adapter = create_quantization_adapter("cpu", config)
    model = adapter.quantize_model(tiny_llama())
    adapter.save_quantized_model(model, tmp_path / "m")
    logits = model(tokens).logits
    other = create_quantization_adapter("cpu", QuantizationConfig(row_int, bits=2))
    for reader in (adapter, other, create_quantization_adapter("cpu", hqq())):
        loaded = reader.load_quantized_model(tmp_path / "m")
        assert torch.equal(loaded(tokens).logits, logits)
    loaded = quantal.load_model(tmp_path / "m")
    assert type(loaded.model.layers[0].mlp.up_proj) is IntLinear
    assert loaded.model.layers[0].mlp.up_proj.top == 7
    adapter.save_quantized_model(model, tmp_path / "m.pth")  # a state dict, which names no adapter
    again = adapter.load_quantized_model(tmp_path / "m.pth", model.config)
    assert torch.equal(again(tokens).logits, logits)


def test_a_file_of_an_adapter_that_is_not_registered(row_int, monkeypatch, tmp_path, tokens):
    adapter = create_quantization_adapter("cpu", QuantizationConfig(row_int, bits=8))
    model = adapter.quantize_model(tiny_llama())
    adapter.save_quantized_model(model, tmp_path / "m")
    monkeypatch.setattr(_custom, "_classes", {})
    with pytest.raises(quantal.UnsupportedError, match=r"register_adapter\('row_int', cls\)"):
        quantal.load_model(tmp_path / "m")
    by_class = RowAdapter("cpu", QuantizationConfig("hqq", bits=8))
    again = by_class.load_quantized_model(tmp_path / "m")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    "entry", [5, {}, {"name": 7}, {"name": "row_int"}, {"name": "row_int", "config": {"bits": 99}}]
)
def test_damaged_entries_are_refused(row_int, entry, tmp_path):
    adapter = create_quantization_adapter("cpu", QuantizationConfig(row_int))
    adapter.save_quantized_model(adapter.quantize_model(tiny_llama()), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["quantal_adapter"] = entry
    path.write_text(json.dumps(config))
    with pytest.raises(quantal.CorruptError, match="quantal_adapter"):
        quantal.load_model(tmp_path / "m")


class Unfinished(QuantizationAdapter):
    def quantize_model(self, model, **kwargs):
        return model


@pytest.mark.parametrize(
    "name, cls, kind, text",
    [
        ("Row", RowAdapter, ValueError, "lower-case letters"),
        ("", RowAdapter, ValueError, "lower-case letters"),
        ("hqq", RowAdapter, ValueError, "built-in"),
        (5, RowAdapter, TypeError, "expected a str"),
        ("other", RowAdapter(backend="cpu"), TypeError, "subclass of QuantizationAdapter"),
        ("other", dict, TypeError, "subclass of QuantizationAdapter"),
        ("other", Unfinished, TypeError, "create_quantized_linear"),
        ("row_int", FallbackAdapter, ValueError, "replace=True"),
    ],
    ids=str,
)
def test_registering_nonsense(row_int, name, cls, kind, text):
    with pytest.raises(kind, match=text):
        quantal.register_adapter(name, cls)
    assert quantal.registered_adapters() == {"row_int": RowAdapter}


def test_registering_again(row_int):
    quantal.register_adapter(row_int, RowAdapter)
    newer = type("RowAdapter", (RowAdapter,), {"__module__": RowAdapter.__module__})
    quantal.register_adapter(row_int, newer)
    quantal.register_adapter(row_int, FallbackAdapter, replace=True)
    assert quantal.registered_adapters() == {row_int: FallbackAdapter}


def test_an_adapter_may_refuse_a_backend(row_int):
    class Cuda(RowAdapter):
        def _validate_backend_support(self):
            if str(self.backend) != "cuda":
                raise ValueError("Cuda needs a CUDA device")

    quantal.register_adapter("cuda_only", Cuda)
    assert type(create_quantization_adapter("cuda", QuantizationConfig("cuda_only"))) is Cuda
    with pytest.raises(ValueError, match="needs a CUDA device"):
        create_quantization_adapter("cpu", QuantizationConfig("cuda_only"))


def test_the_log_names_each_layer(row_int, caplog):
    with caplog.at_level(logging.DEBUG, "quantal"):
        adapter = create_quantization_adapter("cpu", QuantizationConfig(row_int, bits=8))
        adapter.quantize_model(tiny_llama())
        create_quantization_adapter("cpu", hqq()).quantize_model(tiny_llama())
    text = caplog.text
    assert "model.layers.0.self_attn.q_proj [64, 64]: IntLinear 8-bit" in text
    assert "model.layers.1.mlp.down_proj [64, 128]: hqq 4-bit g64" in text
    assert "lm_head: dense, skip_modules pattern 'lm_head'" in text


def test_lora_trains_over_layers_of_ones_own(row_int, tokens):
    from peft import LoraConfig, get_peft_model

    adapter = create_quantization_adapter("cpu", QuantizationConfig(row_int, bits=8))
    base = adapter.prepare_model_for_training(adapter.quantize_model(tiny_llama()))
    codes = base.model.layers[0].mlp.up_proj.q.clone()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.base_layer.q, codes), "the base stays as it is"
    model.eval()
    expected = model(tokens).logits
    model.merge_adapter()
    assert not torch.equal(layer.base_layer.q, codes)
    assert (model(tokens).logits - expected).norm() / expected.norm() < 0.05
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.q, codes)
    assert torch.equal(model(tokens).logits, expected)
    merged = model.merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.up_proj, IntLinear)
    with pytest.raises(quantal.UnsupportedError, match="use_dora"):
        get_peft_model(merged, LoraConfig(use_dora=True, target_modules=["q_proj"]))
