"""model_loader: strategies, devices, quantizing on the way, what a name says about a size."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import quantal
from conftest import hqq, nf4, tiny_llama
from quantal import (
    Backend,
    BackendManager,
    ConfigError,
    DeviceError,
    IoError,
    QuantizationConfig,
    QuantizedLinear,
    create_quantization_adapter,
)
from quantal.model_loader import (
    CPUModelLoader,
    CUDAModelLoader,
    LoadingStrategy,
    MLXModelLoader,
    ModelLoaderFactory,
    ModelLoadingConfig,
    MPSModelLoader,
    QuantizedModelLoader,
    StandardModelLoader,
    get_recommended_loader_config,
    load_model_and_tokenizer,
    model_size_b,
    size_in_name,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(path)
    return path


def config(folder, quantization=None, **kwargs):
    kwargs.setdefault("dtype", torch.float32)
    return ModelLoadingConfig(str(folder), "cpu", quantization_config=quantization, **kwargs)


def test_strategies():
    values = [s.value for s in LoadingStrategy]
    assert values == ["full", "low_memory", "unified_memory", "streaming"]
    assert LoadingStrategy("sequential") is LoadingStrategy.LOW_MEMORY
    with pytest.raises(ConfigError, match="expected one of full, low_memory"):
        LoadingStrategy("lazy")
    with pytest.raises(TypeError):
        LoadingStrategy(None)


def test_config_defaults():
    made = ModelLoadingConfig("m", Backend.CPU)
    assert (made.dtype, made.device.type, made.loading_workers) == (torch.float16, "cpu", -1)
    assert made.skip_modules == ["lm_head"] and made.attn_implementation == "sdpa"
    assert (made.rank, made.world_size, made.quant_method) == (0, 1, None)
    assert ModelLoadingConfig("m", "mps").loading_strategy is LoadingStrategy.UNIFIED_MEMORY
    assert ModelLoadingConfig("m", "mlx").device.type == "cpu"
    low = ModelLoadingConfig("m", "cpu", low_memory=True)
    assert low.loading_strategy is LoadingStrategy.LOW_MEMORY
    for method, name in (("bnb_nf4", "bnb"), ("hqq", "hqq"), ("quanto_int4", "quanto")):
        quantization = QuantizationConfig(method)
        assert ModelLoadingConfig("m", "cpu", quantization_config=quantization).quant_method == name
    if not torch.cuda.is_available():
        assert ModelLoadingConfig("m", "cuda").device.type == "cpu"


@pytest.mark.parametrize(
    "kwargs, kind",
    [
        ({"model_name": None}, TypeError),
        ({"backend": "tpu"}, ValueError),
        ({"loading_strategy": "lazy"}, ValueError),
        ({"dtype": "float3"}, TypeError),
        ({"device": "nowhere"}, ValueError),
        ({"rank": 2}, ValueError),
        ({"rank": -1}, ValueError),
        ({"world_size": "two"}, TypeError),
        ({"quantization_config": {"method": "hqq"}}, TypeError),
    ],
    ids=str,
)
def test_config_refuses_nonsense(kwargs, kind):
    with pytest.raises(kind):
        ModelLoadingConfig(**({"model_name": "m", "backend": "cpu"} | kwargs))


def test_standard_loader(folder, tokens):
    model = StandardModelLoader(config(folder)).load_model()
    assert torch.equal(model(tokens).logits, tiny_llama()(tokens).logits)
    assert model.config.use_cache is False
    with pytest.warns(UserWarning, match="doesn't support quantization, ignoring"):
        StandardModelLoader(config(folder, hqq()))


@pytest.mark.parametrize("strategy", LoadingStrategy)
@pytest.mark.parametrize("quantization", [hqq(), nf4()], ids=["hqq", "nf4"])
def test_quantizing_on_the_way_gives_the_same_model(folder, tokens, quantization, strategy):
    loader = QuantizedModelLoader(config(folder, quantization, loading_strategy=strategy))
    model = loader.load_model()
    expected = create_quantization_adapter("cpu", quantization).quantize_model(tiny_llama())
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert loader.adapter.report.entries and not model.training
    assert type(model.lm_head) is nn.Linear


def test_dtype_of_what_stays_dense(folder):
    model = QuantizedModelLoader(config(folder, hqq(), dtype=torch.bfloat16)).load_model()
    assert model.lm_head.weight.dtype is model.model.norm.weight.dtype is torch.bfloat16
    expected = create_quantization_adapter("cpu", hqq()).quantize_model(tiny_llama().bfloat16())
    layer, same = (m.model.layers[0].mlp.up_proj for m in (model, expected))
    assert torch.equal(layer.codes, same.codes), "weights are cast before they are quantized"


@pytest.mark.parametrize("name", ["auto", "quantal", "sdpa", "eager"])
def test_attention(folder, tokens, name, tmp_path):
    dense = StandardModelLoader(config(folder, attn_implementation=name)).load_model()
    quantized = CPUModelLoader(config(folder, hqq(), attn_implementation=name)).load_model()
    quantal.save_model(quantized, tmp_path / "again")
    again = CPUModelLoader(config(tmp_path / "again", hqq(), attn_implementation=name)).load_model()
    heads = dense.config
    sizes = heads.num_attention_heads, heads.num_key_value_heads, heads.head_dim
    refused = quantal._core.attention_gain_refusal(*sizes, "f32", False)
    expected = {"auto": "sdpa" if refused else "quantal"}.get(name, name)
    for model in (dense, quantized, again):
        assert model.config._attn_implementation == expected
    torch.testing.assert_close(again(tokens).logits, quantized(tokens).logits)


def test_skip_modules_of_the_loader(folder):
    model = QuantizedModelLoader(config(folder, hqq(), skip_modules=["mlp"])).load_model()
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(model.lm_head, QuantizedLinear)
    own = hqq(skip_modules=["self_attn"])
    model = QuantizedModelLoader(config(folder, own, skip_modules=["mlp"])).load_model()
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_empty_ranks_have_the_structure_and_no_memory(folder):
    loader = QuantizedModelLoader(config(folder, hqq(), low_memory=True, rank=1, world_size=2))
    model = loader.load_model()
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert all(p.is_meta for p in model.parameters())
    dense = StandardModelLoader(config(folder, low_memory=True, rank=1, world_size=2)).load_model()
    assert all(p.is_meta for p in dense.parameters())


def test_tied_models_and_shards(tmp_path, tokens):
    model = tiny_llama(tied=True)
    model.save_pretrained(tmp_path / "m", max_shard_size="200KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    loaded = QuantizedModelLoader(config(tmp_path / "m", hqq())).load_model()
    expected = create_quantization_adapter("cpu", hqq()).quantize_model(model)
    assert torch.equal(loaded(tokens).logits, expected(tokens).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    first = sorted((tmp_path / "m").glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(IoError, match="1 shards are missing"):
        QuantizedModelLoader(config(tmp_path / "m", hqq())).load_model()
    (tmp_path / "m" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(IoError, match="index is damaged"):
        QuantizedModelLoader(config(tmp_path / "m", hqq())).load_model()


def test_torch_files_are_read_too(tmp_path, tokens):
    tiny_llama().save_pretrained(tmp_path / "m", safe_serialization=False)
    if list((tmp_path / "m").glob("*.safetensors")):
        pytest.skip("this transformers writes safetensors alone")
    made = config(tmp_path / "m", hqq(), use_safetensors=False)
    expected = create_quantization_adapter("cpu", hqq()).quantize_model(tiny_llama())
    model = QuantizedModelLoader(made).load_model()
    assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_what_is_quantized_already_is_loaded_as_it_is(tmp_path, tokens):
    adapter = create_quantization_adapter("cpu", hqq())
    saved = adapter.quantize_model(tiny_llama())
    adapter.save_quantized_model(saved, tmp_path / "m")
    model = QuantizedModelLoader(config(tmp_path / "m", hqq())).load_model()
    assert torch.equal(model(tokens).logits, saved(tokens).logits)


def test_weights_that_are_not_there(tmp_path, folder):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text((folder / "config.json").read_text())
    for loader in (
        StandardModelLoader(config(tmp_path / "m")),
        QuantizedModelLoader(config(tmp_path / "m", hqq())),
    ):
        with pytest.raises(RuntimeError, match="Could not find model weights for") as error:
            loader.load_model()
        assert isinstance(error.value, IoError)
        with pytest.raises(IoError, match="Could not find model weights"):
            loader._get_model_files()


def test_truncated_weights_name_the_file(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(IoError, match="model.safetensors"):
        QuantizedModelLoader(config(tmp_path / "m", hqq())).load_model()


MEASURE = """
import sys, threading, time
from quantal import QuantizationConfig
from quantal.model_loader import ModelLoadingConfig, QuantizedModelLoader

def anonymous():
    with open("/proc/self/status") as text:
        return int(text.read().split("RssAnon:")[1].split()[0]) * 1024

def load(path):
    config = QuantizationConfig("quanto_int8", compute_dtype="float32")
    made = ModelLoadingConfig(path, "cpu", dtype="float32", quantization_config=config)
    return QuantizedModelLoader(made).load_model()

load(sys.argv[1])  # imports what a model needs
before, peak, stop = anonymous(), [0], []

def watch():
    while not stop:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[2])
stop.append(1)
thread.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_quantizing_on_the_way(folder, tmp_path):
    """W23: anonymous memory grows by the packed model, a layer and what the allocator keeps, far
    less than by the dense model."""
    model = tiny_llama(hidden=2048)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    rest = sum(p.numel() for p in model.parameters()) - layers
    largest = 4 * model.model.layers[0].mlp.up_proj.weight.numel()
    model.save_pretrained(tmp_path / "m")
    command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "m")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    packed = layers + 4 * rest
    assert int(run.stdout) < packed + largest + 100e6 < 3 * (layers + rest)


def test_factory_and_backends(folder):
    loader = ModelLoaderFactory.create_loader(config(folder))
    assert type(loader) is CPUModelLoader and loader._get_loading_workers(1) >= 1
    manager = BackendManager("cpu", verbose=False)
    made = ModelLoadingConfig(str(folder), "mlx")
    assert type(ModelLoaderFactory.create_loader(made)) is MLXModelLoader
    assert type(ModelLoaderFactory.create_loader(made, manager)) is CPUModelLoader
    assert loader._get_loading_workers(1) != config(folder, loading_workers=7).loading_workers
    with pytest.raises(ConfigError, match="MLXModelLoader requires MLX backend"):
        MLXModelLoader(config(folder))
    with pytest.raises(ConfigError, match="QuantizedModelLoader requires quantization_config"):
        QuantizedModelLoader(config(folder))
    for wrong in (None, "m"):
        with pytest.raises(TypeError):
            ModelLoaderFactory.create_loader(wrong)
    with pytest.raises(TypeError, match="BackendManager"):
        ModelLoaderFactory.create_loader(config(folder), "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_devices_that_are_not_there(folder, monkeypatch):
    with pytest.raises(DeviceError, match="CUDA is not available"):
        CUDAModelLoader(ModelLoadingConfig(str(folder), "cuda"))
    with pytest.raises(DeviceError, match="MPS is not available"):
        MPSModelLoader(ModelLoadingConfig(str(folder), "mps"))
    with pytest.raises(ValueError, match="not available on this system"):
        load_model_and_tokenizer(str(folder), "cuda")
    monkeypatch.setattr("quantal.model_loader.is_available", lambda backend: True)
    with pytest.raises(ConfigError, match="Invalid CUDA device cuda:9"):
        CUDAModelLoader(ModelLoadingConfig(str(folder), "cuda", device=torch.device("cuda:9")))
    quantization = QuantizationConfig("mlx_int4", compute_dtype=torch.bfloat16)
    asked = ModelLoadingConfig(
        str(folder), "mps", dtype=torch.bfloat16, quantization_config=quantization
    )
    with pytest.warns(UserWarning, match="MPS doesn't support bfloat16, using float16 instead"):
        loader = MPSModelLoader(asked)
    assert loader.config.dtype is torch.float16
    assert loader.config.quantization_config.compute_dtype is torch.float16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MPSModelLoader(ModelLoadingConfig(str(folder), "mps"))


def test_model_and_tokenizer(folder, tmp_path, tokens):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    model, tokenizer = load_model_and_tokenizer(str(folder), "cpu", hqq(), dtype="float32")
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    dense, _ = load_model_and_tokenizer(str(folder), "cpu")
    assert dense.dtype is BackendManager("cpu", verbose=False).get_dtype()
    with pytest.raises(TypeError, match="'device_map' is not known"):
        load_model_and_tokenizer(str(folder), "cpu", device_map="auto")


@pytest.mark.parametrize(
    "name, size",
    [
        ("meta-llama/Llama-2-70b-hf", 70),
        ("codellama/CodeLlama-13b", 13),
        ("facebook/opt-1.3b", 1.3),
        ("tiiuae/falcon-33B-chat", 33),
        ("meta-llama/Llama-3.1-405B", 405),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8),
        ("mistralai/Mixtral-8x7B-v0.1", 56),
        ("HuggingFaceTB/SmolLM2-135M", 0.135),
        ("qwen2.5-0.5b-instruct", 0.5),
        ("stabilityai/stablelm_3b", 3),
        ("bigscience/bloom", None),
        ("gpt2", None),
        ("t5-v1_1-base", None),
        ("org-7b/model", None),
    ],
)
def test_sizes_in_names(name, size):
    assert size_in_name(name) == (None if size is None else pytest.approx(size))


def test_sizes_are_counted_where_the_files_are(folder, tmp_path):
    count = sum(p.numel() for p in tiny_llama().parameters())
    assert model_size_b(str(folder)) == count / 1e9
    empty = tmp_path / "model-13b"
    empty.mkdir()
    assert model_size_b(str(empty)) == 13


def test_recommended_loader_config(folder):
    made = get_recommended_loader_config("llama-7b", "cuda", 8.0)
    assert made.quantization_config.method.name == "BNB_NF4"
    assert made.loading_strategy is LoadingStrategy.LOW_MEMORY
    made = get_recommended_loader_config("llama-7b", "mps", 64.0, dtype="float16")
    assert made.quantization_config is None
    assert made.loading_strategy is LoadingStrategy.UNIFIED_MEMORY
    made = get_recommended_loader_config(str(folder), "cpu")
    assert made.quantization_config is None and made.loading_strategy is LoadingStrategy.FULL
    assert get_recommended_loader_config("some-model", "cpu", 10.0).quantization_config.bits == 8
    assert json.dumps(made.model_name)
    with pytest.raises(ValueError):
        get_recommended_loader_config("m", "cpu", -1.0)
