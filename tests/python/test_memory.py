"""Memory: no dense copy of a quantized layer survives, and quantizing needs little of its own."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import quantal
from conftest import CONFIGS, hqq, tiny_llama
from quantal import QuantizedLinear, create_quantization_adapter

MB = 1 << 20


def storages(model) -> dict[int, int]:
    """{address: bytes} of every storage that a tensor reachable from the model holds."""
    found: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, (list, tuple, set)):
            for each in value:
                visit(each)
        elif hasattr(value, "__dict__"):
            visit(vars(value))

    visit(model)
    return found


@pytest.mark.parametrize("name", ["hqq4", "nf4-double"])
def test_no_dense_copy_survives(name):
    model = tiny_llama(hidden=128)
    dense = sum(storages(model).values())
    linear = sum(
        m.weight.numel() * 4
        for n, m in model.named_modules()
        if type(m) is torch.nn.Linear and n != "lm_head"
    )
    create_quantization_adapter("cpu", CONFIGS[name]).quantize_model(model)
    packed = sum(m.packed_bytes() for m in model.modules() if isinstance(m, QuantizedLinear))
    after = storages(model)
    assert sum(after.values()) == dense - linear + packed
    assert packed < linear / 5


def test_dense_weights_are_freed_one_by_one():
    import weakref

    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    weights = [weakref.ref(m.weight) for m in model]
    alive = []
    adapter = create_quantization_adapter("cpu", hqq())
    original = adapter.quantize_linear

    def quantize_linear(linear, choice):
        alive.append(sum(w() is not None for w in weights))
        return original(linear, choice)

    adapter.quantize_linear = quantize_linear
    adapter.quantize_model(model)
    assert alive == [4, 3, 2, 1]


_PROGRAM = """
import json, re, sys, threading, time
import torch
from torch import nn
from quantal import QuantizationConfig, create_quantization_adapter

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

size, count, method = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
config = QuantizationConfig(method, bits=4, compute_dtype="float32",
                            backend_options={"support": "extended"})
adapter = create_quantization_adapter("cpu", config)
adapter.quantize_model(nn.Sequential(nn.Linear(64, 64)))  # threads and kernels are up
model = nn.Sequential(*(nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
                        for _ in range(count)))
start = peak = anonymous()
running = True

def sample():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=sample)
thread.start()
adapter.quantize_model(model)
running = False
thread.join()
print(json.dumps({"growth": peak - start, "left": anonymous() - start}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("method", ["hqq", "bnb_nf4"])
def test_quantizing_grows_memory_by_at_most_a_layer_and_100_mb(method):
    size, count = 4096, 6
    command = [sys.executable, "-c", _PROGRAM, str(size), str(count), method]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout)
    layer = size * size * 2
    assert result["growth"] <= layer + 100 * MB
    assert result["left"] < 0  # what the allocator keeps aside, less than before


_LOAD_PROGRAM = """
import json, re, sys, threading, time
import torch
from transformers import LlamaForCausalLM
from quantal import PackedLinear, QuantizationConfig, create_quantization_adapter

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

adapter = create_quantization_adapter("cpu", QuantizationConfig("none"))
start = peak = anonymous()
running = True

def sample():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=sample)
thread.start()
model = adapter.load_quantized_model(sys.argv[1])
running = False
thread.join()
layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
state = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
print(json.dumps({"growth": peak - start, "packed": sum(state.values()),
                  "dense": sum(m.in_features * m.out_features * 2 for m in layers),
                  "largest": max(state.values())}))
"""


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    """128 M weights in bfloat16: a copy of them would not fit below the limit."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        vocab_size=4096,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    torch.manual_seed(1)
    block = torch.randn(1 << 22).mul_(0.02).bfloat16()
    weights = {n: block[: t.numel()].view(t.shape).clone() for n, t in model.state_dict().items()}
    del weights["lm_head.weight"]
    folder = tmp_path_factory.mktemp("dense")
    save_file(weights, folder / "model.safetensors")
    config.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("dialect", ["bnb", "hqq", "mlx", "quanto"])
def test_loading_grows_memory_by_at_most_the_model_a_tensor_and_100_mb(
    dialect, dense_folder, tmp_path
):
    bits = 8 if dialect == "hqq" else 4
    quantal.convert(dense_folder, tmp_path / "m", dialect, bits=bits)
    command = [sys.executable, "-c", _LOAD_PROGRAM, str(tmp_path / "m")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout)
    assert result["growth"] <= result["packed"] + result["largest"] + 100 * MB
    assert result["packed"] + result["largest"] + 100 * MB < result["dense"] + result["packed"]
