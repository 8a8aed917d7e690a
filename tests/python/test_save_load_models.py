"""Dense models, shared weights, models that are there already, tokenizers."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import quantal
from conftest import hqq, tiny_llama
from quantal import (
    Backend,
    ConfigError,
    CorruptError,
    PackedLinear,
    QuantizationConfig,
    QuantizedEmbedding,
    create_quantization_adapter,
)
from save_load_support import adapter_for, form, load_quietly, logits, quantized

# ---------------------------------------------------------------------- dense models

SUFFIXES = ["", ".safetensors", ".pt", ".pth", ".bin", ".npz", ".gguf"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_fallback_adapter_saves_and_loads_every_kind(suffix, tied, tmp_path):
    with pytest.warns(UserWarning, match="bitsandbytes"):
        adapter = create_quantization_adapter(Backend.CPU, QuantizationConfig())
    assert isinstance(adapter, quantal.FallbackAdapter)
    model = tiny_llama(tied=tied)
    adapter.save_quantized_model(model, tmp_path / f"m{suffix}")
    assert (tmp_path / f"m{suffix}").is_dir() == (suffix == "")
    loaded = adapter.load_quantized_model(tmp_path / f"m{suffix}", model.config)
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_fallback_adapter_reads_what_torch_and_safetensors_wrote(tmp_path):
    model, adapter = tiny_llama(), adapter_for(QuantizationConfig("none"))
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    torch.save({"model": model.state_dict()}, tmp_path / "wrapped.pth")
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    model.save_pretrained(tmp_path / "folder", max_shard_size="100KB")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    for name in ("plain.pth", "wrapped.pth", "plain.safetensors", "folder", "pickled"):
        loaded = adapter.load_quantized_model(tmp_path / name, model.config)
        assert torch.equal(logits(loaded), logits(model)), name


# ---------------------------------------------------------------------- tied weights


def test_packed_embeddings_stay_tied(tmp_path):
    model, adapter = quantized(form("mlx_int4"), tied=True)
    layer = PackedLinear.from_linear(model.lm_head, form("mlx_int4"))
    table = QuantizedEmbedding.from_packed(layer._spec, *layer._buffers_packed)
    model.set_input_embeddings(table)
    model.set_output_embeddings(layer)
    assert model.lm_head.codes is model.model.embed_tokens.codes
    adapter.save_quantized_model(model, tmp_path / "m")
    names = load_file(tmp_path / "m" / "model.safetensors")
    assert "model.embed_tokens.scales" in names and not any("lm_head" in n for n in names)
    loaded = load_quietly(adapter, tmp_path / "m")
    assert isinstance(loaded.model.embed_tokens, QuantizedEmbedding)
    assert loaded.lm_head.codes is loaded.model.embed_tokens.codes
    assert loaded.lm_head.stats is loaded.model.embed_tokens.stats
    assert torch.equal(logits(loaded), logits(model))
    assert quantal.model_digest(loaded) == quantal.model_digest(model)


def test_files_of_tied_models_may_have_either_or_both(tmp_path):
    model, adapter = quantized(hqq(), tied=True)
    adapter.save_quantized_model(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    table = tensors.pop("model.embed_tokens.weight")
    both = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    for names in (["lm_head.weight"], list(both), ["model.embed_tokens.weight"]):
        save_file({**tensors, **{name: both[name] for name in names}}, file)
        loaded = adapter.load_quantized_model(tmp_path / "m")
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(logits(loaded), logits(model)), names
    save_file(tensors, file)
    with pytest.raises(CorruptError, match="1 missing: model.embed_tokens.weight"):
        adapter.load_quantized_model(tmp_path / "m")


class Shared(nn.Module):
    """Two layers of one weight, one module under two names, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)
        self.b.weight = self.a.weight
        self.c = self.again = nn.Linear(64, 64)
        self.register_buffer("offset", torch.ones(64))

    def forward(self, x):
        return self.again(self.c(self.b(self.a(x)))) + self.offset


def test_shared_weights_of_a_model_of_ones_own(tmp_path):
    torch.manual_seed(0)
    model = Shared()
    adapter = adapter_for(hqq())
    adapter.quantize_model(model)
    assert model.a.codes is model.b.codes and model.c is model.again
    adapter.save_quantized_model(model, tmp_path / "m")
    names = [n.split(".")[0] for n in load_file(tmp_path / "m" / "model.safetensors")]
    assert names.count("a") > names.count("b") == 1, "only the bias of b"
    assert set(names) == {"a", "b", "c", "offset"}
    loaded = adapter.load_quantized_model(tmp_path / "m", model=Shared())
    assert loaded.a.codes is loaded.b.codes and loaded.c is loaded.again
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), model(x))
    assert quantal.model_digest(loaded) == quantal.model_digest(model)


# ---------------------------------------------------------------------- into a model that is there


def test_loading_into_a_model_replaces_what_it_holds(tmp_path):
    packed, adapter = quantized(hqq())
    other, writer = quantized(form("quanto_int4"))
    dense = tiny_llama()
    adapter.save_quantized_model(packed, tmp_path / "hqq")
    writer.save_quantized_model(other, tmp_path / "quanto")
    writer.save_quantized_model(dense, tmp_path / "dense")
    model = tiny_llama()
    for name, expected in (("hqq", packed), ("quanto", other), ("dense", dense), ("hqq", packed)):
        same = load_quietly(adapter, tmp_path / name, model=model)
        assert same is model and torch.equal(logits(model), logits(expected)), name
        assert quantal.model_digest(model) == quantal.model_digest(expected)


def test_a_model_that_is_one_layer(tmp_path):
    torch.manual_seed(0)
    adapter = adapter_for(hqq())
    layer = adapter.quantize_model(nn.Linear(64, 64))
    adapter.save_quantized_model(layer, tmp_path / "m")
    loaded = adapter.load_quantized_model(tmp_path / "m", model=nn.Linear(64, 64))
    x = torch.randn(2, 64)
    assert isinstance(loaded, PackedLinear) and torch.equal(loaded(x), layer(x))


def test_packed_weights_of_other_modules_are_decoded(tmp_path):
    """A module that is neither a linear layer nor an embedding cannot hold packed bytes."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(64, 64))

        def forward(self, x):
            return x @ self.weight.T

    torch.manual_seed(0)
    adapter = adapter_for(hqq())
    model = adapter.quantize_model(nn.Sequential(nn.Linear(64, 64, bias=False)))
    adapter.save_quantized_model(model, tmp_path / "m")
    loaded = adapter.load_quantized_model(tmp_path / "m", model=nn.Sequential(Plain()))
    assert adapter.load_report.decoded == ["0"] and type(loaded[0]) is Plain
    assert torch.equal(loaded[0].weight, model[0].dequantize_weights())


# ---------------------------------------------------------------------- tokenizers


@pytest.fixture
def tokenizer():
    from quantal.gguf import make_tokenizer
    from test_gguf import byte_level_facts

    return make_tokenizer(byte_level_facts())


def ids_of(tokenizer) -> list[int]:
    return tokenizer("def f(x):\n    return 2026 + x  # naïve")["input_ids"]


def test_tokenizer_goes_with_the_model(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    model, adapter = quantized(hqq())
    adapter.save_quantized_model(model, tmp_path / "a", tokenizer=tokenizer)
    loaded = adapter.load_quantized_model(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    adapter.save_quantized_model(loaded, tmp_path / "b")
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert ids_of(again) == ids_of(tokenizer) and again.chat_template == tokenizer.chat_template
    assert (tmp_path / "b" / "generation_config.json").exists()
    adapter.save_quantized_model(model, tmp_path / "c", tokenizer=tmp_path / "b")
    assert ids_of(AutoTokenizer.from_pretrained(tmp_path / "c")) == ids_of(tokenizer)


def test_tokenizer_of_the_folder_that_transformers_read(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_llama().save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    adapter = adapter_for(hqq())
    model = adapter.quantize_model(AutoModelForCausalLM.from_pretrained(tmp_path / "source"))
    adapter.save_quantized_model(model, tmp_path / "m")
    assert ids_of(AutoTokenizer.from_pretrained(tmp_path / "m")) == ids_of(tokenizer)


def test_tokenizers_that_are_none_are_refused(tmp_path):
    model, adapter = quantized(hqq())
    (tmp_path / "empty").mkdir()
    for wrong in (7, tmp_path / "empty"):
        with pytest.raises(ConfigError, match="tokenizer"):
            adapter.save_quantized_model(model, tmp_path / "m", tokenizer=wrong)
    assert not (tmp_path / "m").exists()
