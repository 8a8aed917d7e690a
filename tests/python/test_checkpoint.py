"""Saving and loading whole models; files that upstream wrote."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import quantal
from conftest import CONFIGS, GOLDEN, hqq, nf4, tiny_llama
from quantal import ConfigError, CorruptError, QuantizedLinear, create_quantization_adapter

IDS = torch.tensor([[1, 5, 200, 37, 99, 255, 0, 64, 128, 3, 77, 11]])


def save(config, folder, **kwargs):
    adapter = create_quantization_adapter("cpu", config)
    model = adapter.quantize_model(tiny_llama(**kwargs))
    adapter.save_quantized_model(model, folder)
    return model, adapter


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_round_trip_keeps_every_byte(config, tied, tmp_path):
    model, adapter = save(config, tmp_path / "saved_model", tied=tied, bias=True)
    loaded = adapter.load_quantized_model(tmp_path / "saved_model", model.config)
    assert quantal.model_digest(loaded) == quantal.model_digest(model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    layer = loaded.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantizedLinear) and layer.compute_dtype is torch.float32


def test_digest_sees_one_changed_bit(model):
    create_quantization_adapter("cpu", hqq()).quantize_model(model)
    before = quantal.model_digest(model)
    layer = model.model.layers[1].mlp.down_proj
    layer.codes[3, 2] ^= 1
    assert quantal.model_digest(model) != before
    layer.codes[3, 2] ^= 1
    assert quantal.model_digest(model) == before


def test_model_config_may_be_a_dictionary_or_absent(tmp_path):
    model, adapter = save(hqq(), tmp_path / "m")
    for config in (None, model.config.to_dict()):
        loaded = adapter.load_quantized_model(tmp_path / "m", config)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_adapter_of_another_method_reads_what_the_file_says(tmp_path):
    model, _ = save(nf4(), tmp_path / "m")
    loaded = create_quantization_adapter("cpu", hqq()).load_quantized_model(tmp_path / "m")
    assert loaded.model.layers[0].mlp.up_proj.dialect == "bnb"
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_saved_config_names_method_and_dense_modules(tmp_path):
    save(hqq(), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "hqq" and "lm_head" in quantization["skip_modules"]


def test_model_of_ones_own_round_trips(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64))
    adapter = create_quantization_adapter("cpu", hqq())
    adapter.quantize_model(model)
    adapter.save_quantized_model(model, tmp_path / "m")
    empty = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64))
    loaded = adapter.load_quantized_model(tmp_path / "m", model=empty)
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), model(x))


def test_foreign_folder_is_not_overwritten(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep")
    with pytest.raises(quantal.QuantalError, match="mine"):
        save(hqq(), folder)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_adapters_must_be_saved_apart(tmp_path):
    from peft import LoraConfig, get_peft_model

    adapter = create_quantization_adapter("cpu", hqq())
    model = adapter.quantize_model(tiny_llama())
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for each in (wrapped, model):
        with pytest.raises(ConfigError, match="LoRA"):
            adapter.save_quantized_model(each, tmp_path / "m")


def test_nothing_to_load_lists_what_was_looked_for(tmp_path):
    adapter = create_quantization_adapter("cpu", hqq())
    with pytest.raises(OSError, match="No checkpoint found"):
        adapter.load_quantized_model(tmp_path)


def test_loading_is_strict(tmp_path):
    from safetensors.torch import save_file

    _, adapter = save(hqq(), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    whole = load_file(file)
    missing = {k: v for k, v in whole.items() if k != "model.norm.weight"}
    save_file(missing, file)
    with pytest.raises(CorruptError, match="model.norm.weight"):
        adapter.load_quantized_model(tmp_path / "m")
    save_file({**whole, "model.extra": torch.zeros(2)}, file)
    with pytest.raises(CorruptError, match="model.extra"):
        adapter.load_quantized_model(tmp_path / "m")
    save_file({**whole, "model.norm.weight": torch.zeros(65)}, file)
    with pytest.raises(CorruptError, match="65") as error:
        adapter.load_quantized_model(tmp_path / "m")
    assert error.value.tensor == "model.norm.weight"


@pytest.mark.parametrize(
    "name", ["bnb-nf4", "bnb-nf4-double", "bnb-fp4-f16", "bnb-nf4-storage-bf16", "hqq-transformers"]
)
def test_folders_that_upstream_wrote(name):
    adapter = create_quantization_adapter("cpu", CONFIGS["hqq4"])
    model = adapter.load_quantized_model(GOLDEN / "checkpoints" / name)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    logits = load_file(GOLDEN / "vectors" / "checkpoint_logits.safetensors")[name]
    torch.testing.assert_close(model.float()(IDS).logits[0], logits, rtol=1e-4, atol=1e-5)


def test_dense_parameters_have_the_dtype_of_the_file(tmp_path):
    """Norms of float32 beside weights of 16 bits, as GGUF files have them: the model must run."""
    path = GOLDEN / "checkpoints" / "gguf" / "tiny-f16.gguf"
    adapter = create_quantization_adapter("cpu", hqq())
    with pytest.warns(UserWarning, match="settings of the file"):
        model = adapter.load_quantized_model(path)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model(IDS % 64).logits.isfinite().all()
    # What was stored in several types on purpose stays so: then config.json names none.
    model.model.norm.float()
    adapter.save_quantized_model(model, tmp_path / "mixed")
    assert "torch_dtype" not in json.loads((tmp_path / "mixed" / "config.json").read_text())
    with pytest.warns(UserWarning, match="settings of the file"):
        again = adapter.load_quantized_model(tmp_path / "mixed")
    assert quantal.model_digest(again) == quantal.model_digest(model)
