"""Saving and loading through the adapters: every dialect, every layout, what wins, what is told."""

import json
import logging
import pathlib
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, LlamaForSequenceClassification

import quantal
from conftest import GOLDEN, hqq, nf4, tiny_llama
from quantal import (
    ConfigError,
    CorruptError,
    PackedLinear,
    QuantizationConfig,
)
from save_load_support import FORMS, adapter_for, form, load_quietly, logits, quantized, same_bits

CASES = [(d, name) for d, forms in FORMS.items() for name in forms]
FORM_NAMES = [f"{d}-{name}" for d, name in CASES]
LAYOUTS = [(d, n, layout) for d, n in CASES for layout in quantal.file_layouts(d)]


# ---------------------------------------------------------------------- every dialect


@pytest.mark.parametrize("dialect, name, layout", LAYOUTS, ids=["-".join(one) for one in LAYOUTS])
def test_every_layout_gives_the_same_model(dialect, name, layout, tmp_path):
    model, adapter = quantized(FORMS[dialect][name], bias=True)
    path = tmp_path / ("m.pth" if "single" in layout else "m")
    try:
        adapter.save_quantized_model(model, path, layout=layout)
    except quantal.UnsupportedError:  # a layout may say that it cannot hold such layers
        assert not path.exists() and layout in ("guide", "single", "hqq", "quanto")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the settings are the same, nothing is told
        loaded = adapter.load_quantized_model(path, model.config)
    assert adapter.load_report.layout == f"{dialect} {layout}" and adapter.load_report.fits
    assert adapter.load_report.settings == []
    assert torch.equal(logits(loaded), logits(model))
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, PackedLinear)}
    assert len(layers) == 14 and {m.dialect for m in layers.values()} == {dialect}
    for name, layer in layers.items():
        for mine, theirs in zip(
            layer._buffers_packed, model.get_submodule(name)._buffers_packed, strict=True
        ):
            assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("dialect, name", CASES, ids=FORM_NAMES)
def test_shards_give_the_same_model(dialect, name, tmp_path):
    model, adapter = quantized(FORMS[dialect][name], hidden=128)
    adapter.save_quantized_model(model, tmp_path / "m", max_shard_size="100KB")
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    largest = 256 * 128 * 4  # the head alone is larger than a shard
    assert len(shards) >= 3 and all(s.stat().st_size < largest + 10000 for s in shards)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {s.name for s in shards}
    loaded = adapter.load_quantized_model(tmp_path / "m")
    assert quantal.model_digest(loaded) == quantal.model_digest(model)
    assert torch.equal(logits(loaded), logits(model))


SINGLES = [
    ("bnb", ".safetensors"),
    ("hqq", ".safetensors"),
    ("mlx", ".safetensors"),
    ("mlx", ".npz"),
    ("quanto", ".safetensors"),
    ("bnb", ".pt"),
    ("hqq", ".pt"),
    ("quanto", ".pth"),
]


@pytest.mark.parametrize(
    "dialect, name, suffix", [(d, n, s) for d, s in SINGLES for n in FORMS[d]], ids=str
)
def test_single_files(dialect, name, suffix, tmp_path):
    """The suffix chooses the layout; safetensors and npz files hold config.json too."""
    model, adapter = quantized(FORMS[dialect][name], bias=True)
    path = tmp_path / f"m{suffix}"
    adapter.save_quantized_model(model, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix in (".safetensors", ".npz"):
        loaded = adapter.load_quantized_model(path)
    else:
        loaded = adapter.load_quantized_model(path, model.config)
    assert adapter.load_report.settings == []
    assert quantal.model_digest(loaded) == quantal.model_digest(model)
    assert torch.equal(logits(loaded), logits(model))


def test_size_limits_are_read_and_refused(tmp_path):
    model, adapter = quantized(hqq())
    for size in ("12 parsecs", "MB", "-5", -5):
        with pytest.raises(ConfigError):
            adapter.save_quantized_model(model, tmp_path / "m", max_shard_size=size)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("dialect, name", CASES, ids=FORM_NAMES)
def test_saving_after_loading_needs_no_source(dialect, name, tmp_path):
    model, adapter = quantized(FORMS[dialect][name])
    adapter.save_quantized_model(model, tmp_path / "first")
    loaded = adapter.load_quantized_model(tmp_path / "first")
    first = load_file(tmp_path / "first" / "model.safetensors")
    shutil.rmtree(tmp_path / "first")
    adapter.save_quantized_model(loaded, tmp_path / "second")
    second = load_file(tmp_path / "second" / "model.safetensors")
    assert set(first) == set(second)
    for key, tensor in first.items():
        assert same_bits(tensor, second[key]), key
    again = adapter.load_quantized_model(tmp_path / "second")
    assert torch.equal(logits(again), logits(model))


def test_nothing_of_the_source_is_kept(tmp_path):
    """A loaded model holds the packed bytes and its dense tensors, nothing else."""
    model, adapter = quantized(nf4())
    adapter.save_quantized_model(model, tmp_path / "m")
    loaded = adapter.load_quantized_model(tmp_path / "m")
    sizes = [
        sum(
            t.untyped_storage().nbytes()
            for t in {id(t): t for t in m.state_dict().values()}.values()
        )
        for m in (model, loaded)
    ]
    assert sizes[0] == sizes[1]
    texts = loaded.__dict__["_quantal_texts"]
    assert sum(map(len, texts.values())) < 1000


# ---------------------------------------------------------------------- upstream's files

GOLDEN_LOGITS = load_file(GOLDEN / "vectors" / "checkpoint_logits.safetensors")
FOLDERS = sorted(name for name in GOLDEN_LOGITS if " " not in name)


@pytest.mark.parametrize("name", FOLDERS)
def test_upstream_files_load_and_are_written_again(name, tmp_path):
    source = GOLDEN / "checkpoints" / name
    target = tmp_path / ("again.gguf" if name.endswith(".gguf") else "again")
    adapter = adapter_for(hqq())
    model = load_quietly(adapter, source)
    report = adapter.load_report
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert bool(packed) == ("dense" not in name and "f16.gguf" not in name)
    adapter.save_quantized_model(model, target, layout=report.layout)
    again = load_quietly(adapter, target)
    assert quantal.model_digest(again) == quantal.model_digest(model)
    assert adapter.load_report.layout == report.layout
    torch.testing.assert_close(logits(model.float())[0], GOLDEN_LOGITS[name], rtol=1e-4, atol=1e-5)
    if (source / "model.safetensors").exists():
        theirs = load_file(source / "model.safetensors")
        ours = load_file(target / "model.safetensors")
        assert set(theirs) == set(ours)
        for key, tensor in theirs.items():
            if "norm" not in key and "embed" not in key and "lm_head" not in key:
                assert same_bits(tensor, ours[key]), key


SINGLE = {
    "layout-bnb-single/model.pth": ("bnb-int8", "bnb"),
    "layout-quanto-single/quanto_model.pth": ("layout-quanto-dir", "quanto"),
}


@pytest.mark.parametrize("name", list(SINGLE))
def test_single_files_need_a_config_and_take_every_kind(name):
    logits_of, dialect = SINGLE[name]
    source, folder = GOLDEN / "checkpoints" / name, GOLDEN / "checkpoints" / "bnb-nf4"
    adapter = adapter_for(hqq())
    with pytest.raises(ConfigError, match="model_type"):
        adapter.load_quantized_model(source)
    values = json.loads((folder / "config.json").read_text())
    for config in (
        folder,
        str(folder / "config.json"),
        values,
        AutoConfig.from_pretrained(folder),
    ):
        model = load_quietly(adapter, source, config)
        assert model.model.layers[0].mlp.up_proj.dialect == dialect
        expected = GOLDEN_LOGITS[logits_of]
        torch.testing.assert_close(logits(model.float())[0], expected, rtol=1e-4, atol=1e-5)
    assert "quantization_config" in values, "the caller's dictionary is not changed"
    with pytest.raises(ConfigError, match="model_config is a int"):
        adapter.load_quantized_model(source, 7)


def test_model_class_is_the_one_that_the_config_names(tmp_path):
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config).eval()
    adapter = adapter_for(hqq(skip_modules=["score"]))
    adapter.save_quantized_model(adapter.quantize_model(model), tmp_path / "m")
    loaded = adapter.load_quantized_model(tmp_path / "m")
    assert type(loaded) is LlamaForSequenceClassification
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz", ".gguf"])
def test_content_decides_not_the_suffix(suffix, tmp_path):
    model, adapter = tiny_llama(), adapter_for(QuantizationConfig("none"))
    adapter.save_quantized_model(model, tmp_path / f"m{suffix}")
    (tmp_path / f"m{suffix}").rename(tmp_path / "weights.dat")
    loaded = adapter.load_quantized_model(tmp_path / "weights.dat", model.config)
    assert torch.equal(logits(loaded), logits(model))


# ---------------------------------------------------------------------- whose settings


@pytest.mark.parametrize("config", [hqq(), form("mlx_int4"), form("quanto_int8"), form("none")])
def test_an_adapter_of_another_method_loads_by_content(config, tmp_path):
    model, writer = quantized(form("bnb_nf4", quant_type="fp4", double_quant=False))
    writer.save_quantized_model(model, tmp_path / "m")
    adapter = adapter_for(config)
    with pytest.warns(UserWarning, match=rf"method bnb_nf4 \(config: {config.method.value}\)"):
        loaded = adapter.load_quantized_model(tmp_path / "m")
    assert torch.equal(logits(loaded), logits(model))
    layer = loaded.model.layers[0].mlp.up_proj
    assert layer.dialect == "bnb" and layer.config.method.value == "bnb_nf4"
    assert layer.config.quant_type == "fp4" and layer.config.double_quant is False
    assert adapter.config.method is config.method, "the adapter's own config stays"
    found = adapter.load_report.settings
    assert [s["what"] for s in found] == ["method"] and "14 layers" in found[0]["reason"]
    assert adapter.report.substitutions[-1] == found[0]
    adapter.save_quantized_model(loaded, tmp_path / "again")
    again = load_quietly(adapter, tmp_path / "again")
    assert quantal.model_digest(again) == quantal.model_digest(model)


@pytest.mark.parametrize(
    "saved, asked, told",
    [
        (hqq(4, 64), hqq(8, 64), ["bits 4 (config: 8)"]),
        (hqq(4, 64), hqq(4, 32), ["group_size 64 (config: 32)"]),
        (nf4(double_quant=True), nf4(double_quant=False), ["double_quant true (config: false)"]),
        (nf4(), nf4(quant_type="fp4"), ["quant_type nf4 (config: fp4)"]),
        (
            hqq(4, 64, backend_options={"axis": 0}),
            hqq(4, 64),
            ["form hqq 4-bit, group 64 of columns", "(config: hqq 4-bit, by row"],
        ),
        (
            hqq(skip_modules=["mlp"]),
            hqq(),
            ["skip_modules dense (config: hqq 4-bit", "skip_modules hqq (config: dense)"],
        ),
        (form("none"), hqq(), ["method dense (config: hqq 4-bit"]),
        (hqq(layer_configs={"model.layers.1": {"bits": 8}}), hqq(), ["bits 8 (config: 4)"]),
    ],
)
def test_differences_are_named(saved, asked, told, tmp_path):
    model, writer = quantized(saved)
    writer.save_quantized_model(model, tmp_path / "m")
    adapter = adapter_for(asked)
    with pytest.warns(UserWarning, match="settings of the file are used") as caught:
        loaded = adapter.load_quantized_model(tmp_path / "m")
    assert len(caught) == 1
    for text in told:
        assert text in str(caught[0].message)
    assert str(caught[0].message).count("(config:") == len(told)
    assert torch.equal(logits(loaded), logits(model))


def test_loading_twice_tells_the_last_file_only(tmp_path):
    for name, config in (("a", hqq(8, 64)), ("b", hqq())):
        model, writer = quantized(config)
        writer.save_quantized_model(model, tmp_path / name)
    adapter = adapter_for(hqq())
    load_quietly(adapter, tmp_path / "a")
    assert [s["what"] for s in adapter.report.substitutions] == ["bits"]
    adapter.load_quantized_model(tmp_path / "b")
    assert adapter.report.substitutions == [] and adapter.load_report.settings == []


def test_compute_dtype_is_the_adapters(tmp_path):
    model, writer = quantized(hqq())
    writer.save_quantized_model(model, tmp_path / "m")
    adapter = adapter_for(hqq(compute_dtype=torch.bfloat16))
    layer = adapter.load_quantized_model(tmp_path / "m").model.layers[0].mlp.up_proj
    assert layer.compute_dtype is torch.bfloat16 and layer.value_dtype is torch.float32


# ---------------------------------------------------------------------- what does not fit


@pytest.fixture
def misfit(tmp_path) -> pathlib.Path:
    """A folder with one tensor missing, one too many and one of another shape."""
    model, adapter = quantized(hqq())
    adapter.save_quantized_model(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.input_layernorm.weight"]
    for name in list(tensors):
        if name.startswith("model.layers.0.mlp.up_proj."):
            del tensors[name]
    tensors["model.norm.weight"] = torch.zeros(65)
    tensors["model.extra"] = torch.zeros(2)
    save_file(tensors, file)
    return tmp_path / "m"


def test_everything_that_does_not_fit_is_named_at_once(misfit):
    adapter = adapter_for(hqq())
    given = tiny_llama()
    before = quantal.model_digest(given)
    with pytest.raises(CorruptError) as error:
        adapter.load_quantized_model(misfit, model=given)
    for text in (
        "2 missing: model.layers.0.mlp.up_proj.weight, model.layers.1.input_layernorm.weight",
        "1 unexpected: model.extra",
        "1 misshapen: model.norm.weight [65], expected [64]",
        str(misfit),
    ):
        assert text in str(error.value)
    report = error.value.report
    assert report.misshapen == [("model.norm.weight", [65], [64])] and not report.fits
    assert "missing model.layers.0.mlp.up_proj.weight" in str(report).splitlines()
    assert quantal.model_digest(given) == before, "changed before the check"


def test_strict_false_warns_and_fills_up(misfit):
    adapter = adapter_for(hqq())
    with pytest.warns(UserWarning, match="2 missing: .*up_proj"):
        model = adapter.load_quantized_model(misfit, strict=False)
    assert adapter.load_report.unexpected == ["model.extra"]
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(model.model.norm.weight, torch.ones(64)), "as a new norm"
    dense = model.model.layers[0].mlp.up_proj
    assert type(dense) is nn.Linear and dense.weight.abs().max() > 0
    assert isinstance(model.model.layers[0].mlp.gate_proj, PackedLinear)
    assert logits(model).isfinite().all()


def test_log_names_what_a_load_found(tmp_path, caplog):
    model, adapter = quantized(hqq(8, 64))
    adapter.save_quantized_model(model, tmp_path / "m")
    with caplog.at_level(logging.INFO, logger="quantal"):
        load_quietly(adapter_for(hqq()), tmp_path / "m")
    assert any("bits: 8, not 4" in record.getMessage() for record in caplog.records)
