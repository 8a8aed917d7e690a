"""The planner against real models: exact bytes in memory, on ranks, in files; bounds of steps."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import quantal
from conftest import EXTENDED, GOLDEN, hqq, nf4, tiny_llama
from plan_support import (
    VOCABULARY,
    peak_bytes,
    real_bytes,
    small_llama,
    state_bytes,
    tensor_bytes,
)
from quantal import QuantizationConfig, create_quantization_adapter, prepare_model_for_training
from save_load_support import FORMS, form

WORKER = pathlib.Path(__file__).with_name("plan_worker.py")
ROOT = pathlib.Path(__file__).parents[2]
#: bitsandbytes keeps the nested offset as text: as many bytes as the number has digits.
OFFSET_TEXT = 24
ALL_FORMS = [(d, f) for d, forms in FORMS.items() for f in forms]


def quantize(model, config):
    return create_quantization_adapter("cpu", config).quantize_model(model)


# ---------------------------------------------------------------------- what lies in memory


@pytest.mark.parametrize(("dialect", "name"), ALL_FORMS)
@pytest.mark.parametrize("tied", [False, True])
def test_resident_bytes_are_those_of_the_quantized_model(dialect, name, tied):
    config = FORMS[dialect][name]
    plan = quantal.plan(tiny_llama(hidden=128, tied=tied, bias=True), "cpu", config=config)
    model = quantize(tiny_llama(hidden=128, tied=tied, bias=True), config)
    assert plan.resident_bytes == real_bytes(model)
    again = quantal.plan(model, "cpu")
    assert again.label == "as stored"
    assert again.resident_bytes == plan.resident_bytes


@pytest.mark.parametrize(("dialect", "name"), ALL_FORMS)
def test_file_bytes_are_those_of_the_saved_model(dialect, name, tmp_path):
    config = FORMS[dialect][name]
    plan = quantal.plan(tiny_llama(hidden=128), "cpu", config=config)
    adapter = create_quantization_adapter("cpu", config)
    adapter.save_quantized_model(adapter.quantize_model(tiny_llama(hidden=128)), tmp_path / "m")
    real = saved_bytes(tmp_path / "m")
    if name == "nf4-double":
        assert abs(plan.file_bytes - real) <= OFFSET_TEXT * 14
    else:
        assert plan.file_bytes == real
    stored = quantal.plan(tmp_path / "m", "cpu")
    assert stored.stored_bytes == stored.file_bytes == real
    assert stored.resident_bytes == plan.resident_bytes - made_by_modules(plan)


def made_by_modules(plan) -> int:
    """Bytes of buffers that no file has, such as the frequencies of rotary embeddings."""
    return sum(row.bytes for row in plan.layers if row.file_bytes == 0 and row.method != "tied")


def saved_bytes(folder) -> int:
    """Bytes of the tensors of a folder, read by the libraries that define its files."""
    from safetensors import safe_open

    total = 0
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                total += sum(tensor_bytes(file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
        elif path.suffix == ".pt":
            with torch.serialization.safe_globals([torch.Size]):
                total += nested_bytes(torch.load(path, weights_only=True))
    return total


def nested_bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return tensor_bytes(value)
    return sum(map(nested_bytes, value.values())) if isinstance(value, dict) else 0


def test_layer_configs_and_skips_are_counted():
    config = QuantizationConfig(
        "hqq",
        bits=4,
        group_size=32,
        compute_dtype="float32",
        skip_modules=["lm_head", "o_proj"],
        layer_configs={
            "model.layers.0": {"bits": 8},
            "model.layers.1.mlp": None,
            "model.layers.9": {"bits": 2},
        },
    )
    plan = quantal.plan(tiny_llama(), "cpu", config=config)
    adapter = create_quantization_adapter("cpu", config)
    model = adapter.quantize_model(tiny_llama())
    assert plan.resident_bytes == real_bytes(model)
    assert plan.unmatched_patterns == adapter.report.unmatched_patterns
    rows = {row.name: row for row in plan.layers}
    entries = [entry for entry in adapter.report.entries if entry["name"] in rows]
    assert len(entries) == 15
    for entry in entries:
        row = rows[entry["name"]]
        assert row.quantized == (entry["method"] != "dense")
        assert not row.quantized or row.method == entry["method"]


@pytest.mark.parametrize(
    ("bits", "per_parameter", "config"),
    [
        (8, 1, form("bnb_int8", bits=8)),
        (8, 1, form("quanto_int8", bits=8, group_size=64)),
        (8, 1, form("mlx_int8", bits=8, group_size=64)),
        (8, 1, hqq(8)),
        (4, 0.5, nf4(double_quant=True)),
        (4, 0.5, nf4(double_quant=False)),
        (4, 0.5, hqq(4)),
        (4, 0.5, form("mlx_int4", group_size=64)),
        (4, 0.5, form("quanto_int4", group_size=64)),
        (2, 0.25, hqq(2)),
        (2, 0.25, form("quanto_int2", bits=2, group_size=64)),
    ],
)
def test_bytes_per_parameter_are_the_documented_ones_and_statistics(bits, per_parameter, config):
    """1, 0.5 and 0.25 byte for each parameter of a real layer; statistics are at most two float32
    per 64 weights, a header of 4 bytes per row, and per layer a table and the spec."""
    model = tiny_llama(hidden=256)
    plan = quantal.plan(model, "cpu", config=config)
    layers = [m for m in quantize(model, config).modules() if isinstance(m, quantal.PackedLinear)]
    assert len(layers) == 14
    for layer in layers:
        weights = layer.in_features * layer.out_features
        assert layer.codes.numel() == per_parameter * weights
        statistics = layer.packed_bytes() - layer.codes.numel()
        fixed = 4 * 257 + 128
        assert statistics <= 8 * weights / 64 + 4 * layer.out_features * 2 + fixed
    packed = sum(layer.packed_bytes() for layer in layers)
    assert packed == sum(row.bytes for row in plan.layers if row.quantized)


# ---------------------------------------------------------------------- kinds of models


def numbers(plan) -> tuple:
    """What does not depend on where the model came from."""
    resident = plan.resident_bytes - made_by_modules(plan)
    return plan.label, plan.sizes, resident, plan.file_bytes


def test_module_meta_module_config_dictionary_and_folder_are_planned_alike(tmp_path):
    model = small_llama(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path)
    config = hqq(compute_dtype="bfloat16")
    expected = quantal.plan(model, "cpu", config=config)
    values = model.config.to_dict()
    for same in (small_llama(torch.bfloat16).to("meta"), model.config, values, tmp_path):
        plan = quantal.plan(same, "cpu", config=config)
        assert numbers(plan) == numbers(expected)
    assert quantal.plan(str(tmp_path), "cpu").parameters == sum(
        p.numel() for p in model.parameters()
    )


def test_module_in_memory_is_loaded_dense_and_a_meta_module_is_not():
    config = hqq()
    dense = quantal.plan(small_llama(), "cpu", config=config)
    planned = quantal.plan(small_llama().to("meta"), "cpu", config=config)
    assert dense.phase("load").parts["dense"] == dense.stored_bytes
    assert planned.phase("load").total < dense.phase("load").total


def test_module_that_is_no_transformer():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8, bias=False))
    model.register_buffer("scale", torch.ones(3), persistent=False)
    plan = quantal.plan(model, "cpu", config=hqq(group_size=32))
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.file_bytes == sum(row.file_bytes for row in plan.layers)
    assert next(row for row in plan.layers if row.name == "scale").file_bytes == 0
    assert plan.resident_bytes == real_bytes(quantize(model, hqq(group_size=32)))


def test_layers_that_share_a_weight_count_once():
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": second, "c": nn.Linear(64, 64, bias=False)})
    plan = quantal.plan(model, "cpu", config=hqq())
    assert plan.parameters == 2 * 64 * 64
    assert plan.resident_bytes == real_bytes(quantize(model, hqq()))


# ---------------------------------------------------------------------- ranks


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shares_are_those_of_fully_shard(ranks, tmp_path):
    command = [sys.executable, str(WORKER)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=WORKER.parent,
        )
        for rank in range(ranks)
    ]
    results = [worker.communicate(timeout=280) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), results[0][1][-2000:]
    answer = json.loads(results[0][0])
    for config, bytes_ in answer["resident"].items():
        assert bytes_["planned"] == bytes_["real"], config
    training = answer["training"]
    assert training["planned"] == training["real"]
    if ranks > 1:  # the plan of one rank has no FSDP in it
        assert training["real_step"] <= training["planned_step"] <= 2 * training["real_step"]


# ---------------------------------------------------------------------- steps

#: dtype, attention, checkpointing, dropout, dtype of the adapters
STEPS = [
    ("float32", "sdpa", True, 0.0, "float32"),
    ("float32", "sdpa", False, 0.1, "float32"),
    ("bfloat16", "sdpa", True, 0.0, "float32"),
    ("bfloat16", "sdpa", False, 0.0, "bfloat16"),
    ("float32", "sdpa", False, 0.0, "bfloat16"),
    ("bfloat16", "sdpa", False, 0.1, "bfloat16"),
    ("float32", "eager", True, 0.0, "float32"),
    ("bfloat16", "eager", False, 0.1, "float32"),
]


@pytest.mark.parametrize(("dtype", "attention", "checkpointing", "dropout", "lora_dtype"), STEPS)
def test_training_step_stays_below_the_plan(dtype, attention, checkpointing, dropout, lora_dtype):
    """Weights, adapters and states exactly; what a step takes is at most the plan, which is at most
    twice of it."""
    settings = {
        "batch_size": 2,
        "sequence_length": 128,
        "attention": attention,
        "lora_rank": 8,
        "lora_dropout": dropout,
        "lora_dtype": lora_dtype,
        "gradient_checkpointing": checkpointing,
    }
    dtype, lora_dtype = getattr(torch, dtype), getattr(torch, lora_dtype)
    model = quantize(small_llama(dtype, attention), hqq(compute_dtype=dtype))
    plan = quantal.plan(model, "cpu", mode="qlora", **settings)
    model = prepare_model_for_training(model, use_gradient_checkpointing=checkpointing)
    lora = LoraConfig(r=8, target_modules="all-linear", lora_dropout=dropout)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(lora_dtype)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids = torch.randint(0, VOCABULARY, (2, 128))
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    step()
    optimizer.step()
    optimizer.zero_grad()
    assert plan.phase("resident").total == real_bytes(model) + state_bytes(optimizer)
    parts = ("activations", "logits", "gradients")
    planned = max(sum(plan.phase(n).parts[k] for k in parts) for n in ("forward", "backward"))
    real = peak_bytes(step)
    assert real <= planned <= 2 * real
    temporaries = plan.phase("optimizer").parts["optimizer"] - state_bytes(optimizer)
    scalars = 256
    assert peak_bytes(optimizer.step) <= temporaries + scalars
    # A model that carries its adapters is planned to the same sums.
    attached = quantal.plan(model, "cpu", mode="qlora", **settings)
    assert attached.phase("resident").total == plan.phase("resident").total
    assert attached.peak_bytes == plan.peak_bytes
    assert attached.adapter_parameters == sum(p.numel() for p in trained)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_prompt_stays_below_the_plan(dtype, attention):
    model = quantize(small_llama(dtype, attention), hqq(compute_dtype=dtype))
    plan = quantal.plan(model, "cpu", batch_size=2, sequence_length=256, attention=attention).phase(
        "forward"
    )
    ids = torch.randint(0, VOCABULARY, (2, 256))

    def prompt():
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    cache = prompt().past_key_values
    keys_and_values = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert plan.parts["cache"] == sum(map(tensor_bytes, keys_and_values))
    real = peak_bytes(prompt)
    assert real <= sum(plan.parts[k] for k in ("activations", "logits", "cache")) <= 2.5 * real


# ---------------------------------------------------------------------- headers alone


def write_llama_headers(folder: pathlib.Path) -> None:
    """The folder of a 7B Llama whose weights are a hole in the file."""
    hidden, intermediate, blocks, vocabulary = 4096, 11008, 32, 32000
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    shapes["lm_head.weight"] = [vocabulary, hidden]
    for i in range(blocks):
        block = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{block}self_attn.{name}.weight"] = [hidden, hidden]
        for name in ("gate_proj", "up_proj"):
            shapes[f"{block}mlp.{name}.weight"] = [intermediate, hidden]
        shapes[f"{block}mlp.down_proj.weight"] = [hidden, intermediate]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}{name}.weight"] = [hidden]
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    config = {"model_type": "llama", "num_attention_heads": 32, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("headers") / "llama-7b"
    write_llama_headers(folder)
    return folder


def test_seven_billion_parameters_beside_the_documented_figures(llama_7b):
    plan = quantal.plan(llama_7b, "cuda", 24, config=QuantizationConfig("bnb_nf4"))
    assert plan.parameters == 6738415616
    rules = {rule.width: rule for rule in plan.rules}
    assert [rules[w].rule_gigabytes for w in ("fp16", "int8", "int4")] == [14, 7, 3.5]
    for width, gigabytes in (("fp16", 13.48), ("int8", 7.01), ("int4", 3.88)):
        assert rules[width].exact_bytes / 1e9 == pytest.approx(gigabytes, abs=0.01)
    for words in ("~14 GB", "~7 GB", "~3.5 GB", "13.5 GB", "7.01 GB", "3.88 GB"):
        assert words in str(plan)


def test_recommendation_and_verdict(llama_7b):
    plan = quantal.plan(llama_7b, "mps", 16)
    assert plan.recommended
    assert plan.fits
    assert plan.usable_bytes == 10_400_000_000
    assert plan.peak_bytes <= plan.usable_bytes
    assert plan.config.method.value in ("hqq", "mlx_int8")
    errors = [c.relative_error for c in plan.candidates]
    assert errors == sorted(errors)
    small = quantal.plan(llama_7b, "cuda", 2)
    assert not small.fits
    assert "no config of this backend fits" in small.verdict
    assert quantal.plan(llama_7b, "cuda").recommended is False


def test_report_says_that_a_recommendation_does_not_fit():
    config = quantal.get_recommended_config("cuda", 70.0, 8.0)
    report = create_quantization_adapter("cuda", config).report
    assert report.notes == [config.note]
    assert "35.0 GB" in config.note
    assert config.note in report.to_text().replace("\n      ", " ")
    assert report.to_dict()["notes"] == [config.note]
    fits = quantal.get_recommended_config("cuda", 7.0, 8.0)
    assert create_quantization_adapter("cuda", fits).report.notes == []


def test_adapters_of_ones_own_cannot_be_planned(monkeypatch):
    monkeypatch.setattr(quantal._custom, "_classes", {})

    class Own(quantal.QuantizationAdapter):
        def create_quantized_linear(self, in_features, out_features, bias=True):
            return nn.Linear(in_features, out_features, bias)

        def quantize_model(self, model, **kwargs):
            return model

    quantal.register_adapter("unplanned", Own)
    config = QuantizationConfig("unplanned")
    with pytest.raises(quantal.UnsupportedError, match="method is 'unplanned'"):
        quantal.plan(small_llama().to("meta"), "cpu", config=config)


def test_plan_is_a_dataclass_with_plain_values(llama_7b):
    plan = quantal.plan(llama_7b, "cuda", 24, 2, "qlora", lora_targets=["q_proj", "v_proj"])
    assert dataclasses.is_dataclass(plan)
    values = json.loads(plan.to_json())
    assert values == plan.to_dict()
    assert values["peak_bytes"] == plan.peak_bytes == max(p.total for p in plan.phases)
    assert [p.name for p in plan.phases][-1] == "optimizer"
    assert plan.adapter_parameters == 32 * 2 * 16 * (4096 + 4096)
    assert repr(plan).startswith("Plan('llama-7b (safetensors, 1 file)'")
    assert all(len(line) <= 100 for line in plan.to_text().splitlines())


def test_the_page_is_true(llama_7b):
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.S)
    exec(code.group(1), {})
    text = quantal.plan(llama_7b, "cuda").to_text()
    table = re.search(r"```\n(  weights .*?)```", page, re.S)
    assert table.group(1) in text


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"mode": "train"}, quantal.ConfigError, "mode is 'train', expected inference or qlora"),
        ({"mode": None}, TypeError, "mode is None"),
        ({"backend": "tpu"}, quantal.ConfigError, "tpu"),
        ({"memory_gb": -1}, quantal.ConfigError, "memory_gb is -1"),
        ({"memory_gb": float("nan")}, quantal.ConfigError, "memory_gb is nan"),
        ({"memory_gb": "16"}, TypeError, "memory_gb is '16'"),
        ({"world_size": 0}, quantal.ConfigError, "world_size is 0"),
        ({"world_size": 1.5}, TypeError, "world_size is 1.5"),
        ({"batch_size": 0}, quantal.ConfigError, "batch_size is 0"),
        ({"batch_size": 1 << 62}, quantal.ConfigError, "batch_size"),
        ({"sequence_length": -1}, quantal.ConfigError, "sequence_length is -1"),
        ({"lora_rank": 0}, quantal.ConfigError, "lora_rank is 0"),
        ({"lora_dropout": 1.0}, quantal.ConfigError, "lora_dropout is 1.0"),
        ({"lora_dtype": "int8"}, quantal.QuantalError, "int8"),
        ({"lora_targets": "q_proj"}, TypeError, "lora_targets is 'q_proj'"),
        ({"mode": "qlora", "lora_targets": ["q_prj"]}, quantal.ConfigError, "q_prj"),
        ({"optimizer": "lion"}, quantal.ConfigError, "optimizer is 'lion'"),
        ({"attention": "flash"}, quantal.ConfigError, "attention is 'flash'"),
        ({"cpu_offload": 1}, TypeError, "cpu_offload is 1"),
        ({"config": "hqq"}, TypeError, "config is 'hqq'"),
        ({"support": "all"}, quantal.ConfigError, "support"),
        ({"fallback": "maybe"}, quantal.ConfigError, "fallback"),
    ],
)
def test_options_that_mean_nothing(settings, error, words):
    arguments = {"backend": "cpu"} | settings
    with pytest.raises(error) as caught:
        quantal.plan(small_llama().to("meta"), **arguments)
    assert words in str(caught.value)


def test_models_that_cannot_be_planned(tmp_path):
    with pytest.raises(FileNotFoundError):
        quantal.plan(tmp_path / "nowhere", "cpu")
    with pytest.raises(quantal.UnsupportedError, match="none of them the weight of a linear layer"):
        quantal.plan(nn.LayerNorm(8), "cpu")
    with pytest.raises(TypeError, match="model is 7"):
        quantal.plan(7, "cpu")
    with pytest.raises(quantal.ConfigError, match="model_type"):
        quantal.plan({"hidden_size": 8}, "cpu")


def test_unsupported_pair_is_planned_as_the_factory_decides():
    config = QuantizationConfig("bnb_nf4")
    plan = quantal.plan(small_llama(), "cpu", config=config)
    assert plan.adapter == "FallbackAdapter"
    assert plan.resident_bytes == plan.stored_bytes
    assert any("only supported on CUDA" in note for note in plan.notes)
    extended = quantal.plan(small_llama(), "cpu", config=config, support="extended")
    assert extended.resident_bytes < plan.resident_bytes
    assert dict(config.backend_options) == {}
    own = QuantizationConfig("bnb_nf4", backend_options=EXTENDED)
    assert quantal.plan(small_llama(), "cpu", config=own).label == extended.label


@pytest.mark.parametrize("name", ["bnb-nf4", "hqq-pt-4bit", "mlx-mixed", "quanto-int4", "gguf"])
def test_files_of_other_tools(name):
    path = GOLDEN / "checkpoints" / name
    path = path / "tiny-q4_1.gguf" if name == "gguf" else path
    plan = quantal.plan(path, "cpu", mode="qlora")
    assert plan.label == "as stored"
    model = quantal.load_model(path)
    frequencies = sum(tensor_bytes(b) for name, b in model.named_buffers() if "inv_freq" in name)
    assert plan.resident_bytes == real_bytes(model) - frequencies
