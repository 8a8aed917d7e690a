"""GGUF against gguf 0.19.0 and, unless a run leaves it out (llamacpp.py), against ggml and
llama.cpp."""

import ctypes
import importlib.metadata
import importlib.util
import pathlib
import pydoc_data.topics

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from llamacpp import VERSION, needs_llama_cpp
from models import load
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from weights import DTYPES, random_weight

import quantal
from quantal.testing import dequantize_packed, options, quantize_packed, quantize_tensors

EXACT = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
SEARCHED = ["Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]
DECODED = [*EXACT, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]


def kind(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def ours(weight: torch.Tensor, mode: str) -> np.ndarray:
    """Blocks, [rows, bytes of a row]."""
    return quantize_tensors(weight, "gguf", mode=mode)["weight"].numpy()


def wide(weight: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(weight.float().numpy())


# ------------------------------------------------------------------ blocks


def usable(weight: torch.Tensor) -> torch.Tensor:
    """Without rows where the writers differ: scales below 3e-39 (undefined upstream), and blocks of
    negative zeros, for which gguf's Python writer stores +0 where the C code stores -0."""
    rows = weight.float().abs().amax(1) > 1e-30
    return weight[rows]


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_32_equal_the_python_writer(mode, dtype):
    for seed in range(6):
        weight = usable(random_weight(48, 256, dtype, seed))
        assert np.array_equal(ours(weight, mode), gguf_quantize(wide(weight), kind(mode))), seed


@pytest.mark.parametrize("mode", [*EXACT, *SEARCHED])
def test_the_package_decodes_our_blocks_to_our_values(mode):
    for seed in range(3):
        weight = random_weight(32, 512, torch.float32, seed)
        packed = quantize_packed(weight, options("gguf", mode=mode), "gguf")
        theirs = gguf_dequantize(ours(weight, mode), kind(mode))
        assert np.array_equal(dequantize_packed(packed).numpy(), theirs), seed


# ------------------------------------------------------------------ files


def small_llama(tmp_path: pathlib.Path, **settings) -> pathlib.Path:
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
        **settings,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of a GGUF file."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", [*EXACT, *SEARCHED])
def test_the_package_reads_our_file_bit_for_bit(mode, tied, tmp_path):
    dense = small_llama(tmp_path, tie_word_embeddings=tied)
    quantal.convert(dense, tmp_path / "x.gguf", "gguf", mode=mode)
    weights = load_file(dense / "model.safetensors")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == len(weights)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in weights.items():
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
        if weight.ndim == 1:
            assert np.array_equal(tensor.data, wide(weight)), name
            continue
        if "embed" in name or "lm_head" in name:
            assert np.array_equal(gguf_dequantize(tensor.data, tensor.tensor_type), wide(weight))
            continue
        assert tensor.tensor_type == kind(mode)
        expected = ours(weight, mode)
        if "q_proj" in name or "k_proj" in name:
            expected = interleaved(expected, 4 if "q_proj" in name else 2)
        assert np.array_equal(tensor.data, expected), name
    values = {k: f.contents() for k, f in reader.fields.items()}
    assert values["llama.block_count"] == 2
    assert values["llama.attention.head_count_kv"] == 2
    assert values["llama.vocab_size"] == 320


@pytest.mark.parametrize("mode", EXACT)
def test_transformers_loads_our_file(mode, tmp_path):
    dense = small_llama(tmp_path, tie_word_embeddings=False)
    quantal.convert(dense, tmp_path / "x.gguf", "gguf", mode=mode)
    quantal.convert(tmp_path / "x.gguf", tmp_path / "back", "dense", dense_dtype=torch.float32)
    ours_ = load_file(tmp_path / "back" / "model.safetensors")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf").state_dict()
    for name, tensor in ours_.items():
        assert torch.equal(theirs[name].float(), tensor.float()), name


def test_rewriting_keeps_every_byte_and_pair(smollm2, tmp_path):
    quantal.convert(smollm2, tmp_path / "x.gguf", "gguf")
    before, after = gguf.GGUFReader(smollm2), gguf.GGUFReader(tmp_path / "x.gguf")
    tensors = {t.name: t for t in after.tensors}
    assert len(tensors) == len(before.tensors)
    for tensor in before.tensors:
        assert tensors[tensor.name].tensor_type == tensor.tensor_type
        assert np.array_equal(tensors[tensor.name].data, tensor.data), tensor.name
    for key, field in before.fields.items():
        if not key.startswith("GGUF."):
            assert after.fields[key].contents() == field.contents(), key
            assert after.fields[key].types == field.types, key


# ------------------------------------------------------------------ ggml and llama.cpp


@pytest.fixture(scope="session")
def ggml():
    """ggml's own library, through ctypes."""
    assert importlib.metadata.version("llama-cpp-python") == VERSION
    spec = importlib.util.find_spec("llama_cpp")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "lib"
    library = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return library


def ggml_quantize(ggml, weight: np.ndarray, mode: str) -> np.ndarray:
    elements, size = gguf.GGML_QUANT_SIZES[kind(mode)]
    rows, cols = weight.shape
    out = np.zeros((rows, cols // elements * size), np.uint8)
    ggml.ggml_quantize_chunk(
        int(kind(mode)), weight.ctypes.data, out.ctypes.data, 0, rows, cols, None
    )
    return out


@needs_llama_cpp
@pytest.mark.parametrize("mode", EXACT)
def test_blocks_of_32_equal_ggml(ggml, mode):
    for seed in range(6):
        # Subnormal scales are undefined in ggml: their inverse is infinite.
        weight = random_weight(48, 256, torch.float32, 50 + seed)
        magnitudes = weight.abs().amax(1)
        weight = weight[(magnitudes == 0) | (magnitudes > 1e-30)]
        assert np.array_equal(ours(weight, mode), ggml_quantize(ggml, wide(weight), mode)), seed


def weights_of(what: str, smollm2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    normal = torch.randn(256, 1536, generator=generator) * 0.02
    if what == "normal":
        return normal
    if what == "heavy tails":
        return normal / (torch.rand(256, 1536, generator=generator) + 0.02)
    reader = gguf.GGUFReader(smollm2)
    block = {"real ffn_down": 7, "real ffn_down of the last block": 29}[what]
    tensor = next(t for t in reader.tensors if t.name == f"blk.{block}.ffn_down.weight")
    return torch.from_numpy(gguf_dequantize(tensor.data, tensor.tensor_type))


def squared_error(blocks: np.ndarray, mode: str, weight: torch.Tensor) -> float:
    values = gguf_dequantize(blocks, kind(mode)).astype(np.float64)
    return float(((values - weight.double().numpy()) ** 2).sum())


@needs_llama_cpp
@pytest.mark.parametrize("mode", SEARCHED)
@pytest.mark.parametrize(
    "what", ["normal", "heavy tails", "real ffn_down", "real ffn_down of the last block"]
)
def test_searched_errors_are_at_most_ggmls(ggml, smollm2, what, mode):
    """The squared error is at most 1.02 times that of ggml without an importance matrix."""
    weight = weights_of(what, smollm2)
    theirs = squared_error(ggml_quantize(ggml, wide(weight), mode), mode, weight)
    actual = squared_error(ours(weight, mode), mode, weight)
    print(f"{mode} {what}: {actual / theirs:.4f} of ggml's squared error")
    assert actual <= 1.02 * theirs


@needs_llama_cpp
@pytest.mark.parametrize("mode", DECODED)
def test_values_equal_ggmls(ggml, mode):
    """Random blocks as ggml decodes them."""
    elements, size = gguf.GGML_QUANT_SIZES[kind(mode)]
    weight = random_weight(16, 512, torch.float32, 4)
    blocks = ggml_quantize(ggml, wide(weight), mode)

    class Traits(ctypes.Structure):
        _fields_ = [
            ("name", ctypes.c_char_p),
            ("block", ctypes.c_int64),
            ("interleave", ctypes.c_int64),
            ("size", ctypes.c_size_t),
            ("quantized", ctypes.c_bool),
            ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ]

    ggml.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    traits = ggml.ggml_get_type_traits(int(kind(mode))).contents
    assert (traits.block, traits.size) == (elements, size)
    values = np.zeros((16, 512), np.float32)
    traits.to_float(blocks.ctypes.data, values.ctypes.data, values.size)
    assert np.array_equal(gguf_dequantize(blocks, kind(mode)), values)


#: What is written of SmolLM2: rows of 576 weights are no whole super-blocks, so "+" gives them a
#: type with blocks of 32 as llama.cpp does.
MODELS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K+", "Q6_K+", "F32", "F16", "BF16"]
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(scope="session", params=MODELS)
def written(request, smollm2, tmp_path_factory):
    """SmolLM2 in one type, by quantal, as (type, path)."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    if request.param in DENSE:
        folder = path.parent / "dense"
        quantal.convert(smollm2, folder, "dense", dense_dtype=DENSE[request.param])
        quantal.convert(folder, path, "dense", layout="gguf")
    else:
        quantal.convert(smollm2, path, "gguf", mode=request.param)
    return request.param, path


def text() -> str:
    return pydoc_data.topics.topics["assignment"][:6000]


@needs_llama_cpp
def test_llama_cpp_loads_and_generates(written):
    from llama_cpp import Llama

    mode, path = written
    model = Llama(str(path), n_ctx=256, verbose=False, n_threads=2)
    out = model.create_completion("The capital of France is", max_tokens=12, temperature=0.0)
    # Q4_0 made from Q4_1 has forgotten it; its blocks are those of ggml.
    assert mode == "Q4_0" or out["choices"][0]["text"].strip().startswith("Paris")
    assert out["usage"]["completion_tokens"] >= 1
    chat = model.create_chat_completion(
        [{"role": "user", "content": "Say hello."}], max_tokens=8, temperature=0.0
    )
    assert chat["choices"][0]["message"]["content"].strip()


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    losses = torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:])
    return float(losses.exp())


@needs_llama_cpp
def test_perplexity_agrees_with_llama_cpp(written):
    """Of 384 tokens, ours from packed weights in float32. llama.cpp rounds activations to 8 bits
    per block where weights are quantized: the two agree within 2 %, without that (F32, F16) within
    0.1 %; beside bfloat16 weights it rounds activations to bfloat16, which is within 0.5 %."""
    from llama_cpp import Llama

    mode, path = written
    model = Llama(str(path), n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=2)
    ids = model.tokenize(text().encode(), add_bos=False)[:384]
    model.eval(ids)
    theirs = perplexity(torch.from_numpy(np.array(model.scores[: len(ids)])), torch.tensor(ids))
    with torch.no_grad():
        logits = load(path).float()(torch.tensor([ids])).logits[0]
    actual = perplexity(logits, torch.tensor(ids))
    print(f"{mode}: perplexity {actual:.4f} here, {theirs:.4f} in llama.cpp")
    bound = {"F32": 0.001, "F16": 0.001, "BF16": 0.005}.get(mode, 0.02)
    assert abs(actual / theirs - 1) < bound
