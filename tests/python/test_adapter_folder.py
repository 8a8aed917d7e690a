"""Adapter folders: PEFT's files, and which base they belong to."""

import os

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard

import quantal
from conftest import tiny_llama
from qlora_support import METHODS, lora, quantized, randomize_lora
from quantal import compare_adapter_base, load_adapter, save_adapter
from ranks import run_ranks

FILES = ["adapter_config.json", "adapter_model.safetensors", "quantal_base.json"]


def trained(**kwargs):
    model = get_peft_model(quantized(METHODS["hqq4"]), lora(**kwargs))
    randomize_lora(model)
    return model


@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save"])
def test_plain_peft_reads_it(tmp_path, tokens, kind):
    kwargs = {"dora": {"use_dora": True}, "modules_to_save": {"modules_to_save": ["lm_head"]}}
    model = trained(**kwargs.get(kind, {}))
    expected = model(tokens).logits
    save_adapter(model, tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == FILES
    assert os.listdir(tmp_path) == ["adapter"]
    for load in (PeftModel.from_pretrained, load_adapter):
        again = load(quantized(METHODS["hqq4"]), str(tmp_path / "adapter"))
        assert torch.equal(again(tokens).logits, expected)


def test_another_base_is_named(tmp_path):
    save_adapter(trained(), tmp_path / "a")
    assert str(compare_adapter_base(tmp_path / "a", quantized(METHODS["hqq4"]))) == "same base"
    with pytest.warns(UserWarning, match="same model, other codec .*bnb 4-bit"):
        load_adapter(quantized(METHODS["nf4"]), tmp_path / "a")
    with pytest.raises(quantal.ConfigError, match="same model, other codec"):
        load_adapter(quantized(METHODS["nf4"]), tmp_path / "a", on_other_codec="error")
    other = tiny_llama()
    other.lm_head.weight.data.add_(1)
    with pytest.raises(quantal.ConfigError, match="different model .*lm_head"):
        load_adapter(other, tmp_path / "a")
    with pytest.warns(UserWarning, match="different model"):
        load_adapter(other, tmp_path / "a", on_different_model="warn")


def _save_sharded(rank, world, folder):
    model = trained()
    base = model.get_base_model()
    for block in base.model.layers:
        fully_shard(block)
    fully_shard(base)
    save_adapter(model, folder)


def test_ranks_write_one_folder(tmp_path, tokens):
    run_ranks(3, _save_sharded, tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == FILES
    again = load_adapter(quantized(METHODS["hqq4"]), tmp_path / "adapter")
    assert torch.equal(again(tokens).logits, trained()(tokens).logits)


def test_replaces_adapters_and_nothing_else(tmp_path):
    model = trained()
    save_adapter(model, tmp_path / "a")
    randomize_lora(model, seed=6)
    save_adapter(model, tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
    again = load_adapter(quantized(METHODS["hqq4"]), tmp_path / "a")
    for (_, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(quantal.ConfigError, match="is no adapter folder"):
        save_adapter(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text() == "x"


def test_bad_input(tmp_path):
    with pytest.raises(quantal.ConfigError, match="has no adapter 'default'"):
        save_adapter(tiny_llama(), tmp_path / "a")
    save_adapter(trained(), tmp_path / "a")
    with pytest.raises(quantal.ConfigError, match="on_other_codec is 'stop', expected one of"):
        load_adapter(tiny_llama(), tmp_path / "a", on_other_codec="stop")
    (tmp_path / "a" / "quantal_base.json").write_text("{")
    with pytest.raises(quantal.CorruptError, match="quantal_base.json is no JSON"):
        load_adapter(tiny_llama(), tmp_path / "a")
    (tmp_path / "a" / "quantal_base.json").unlink()
    with pytest.raises(quantal.CorruptError, match="has no quantal_base.json"):
        compare_adapter_base(tmp_path / "a", tiny_llama())
    load_adapter(quantized(METHODS["nf4"]), tmp_path / "a")  # a folder of plain PEFT
