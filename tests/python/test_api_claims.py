"""docs/api_claims.md is complete, and the sentences of docs/api.md that no other file proves."""

import logging
import pathlib
import re
import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import hqq, nf4, tiny_llama
from quantal._loading import parameters_on_meta
from quantization_wrapper import (
    Backend,
    QuantizationConfig,
    QuantizationMethod,
    QuantizedLinear,
    create_quantization_adapter,
    validate_quantization_config,
)

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"
TABLE = ROOT / "docs" / "api_claims.md"
METHODS = list(QuantizationMethod)

# ---------------------------------------------------------------------- the table


def sentences(page: pathlib.Path) -> list[tuple[str, str]]:
    """(heading, sentence): of the text, items of lists, rows of tables, comments of code."""
    found, heading, language = [], "", None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language == "python":
            comment = re.search(r"(?:^|\s)#\s*(.+)$", line)
            found += [(heading, "# " + comment[1].strip())] if comment else []
        elif language is not None:
            found += [(heading, line.strip())] if line.strip(" ↓") else []
        elif line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            found += [(heading, line)] if line.strip("|- :") else []
        else:
            text = re.sub(r"^(?:[-*]|\d+\.)\s+", "", line.strip())
            parts = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
            found += [(heading, part) for part in parts if part]
    return found


def table() -> list[tuple[str, str, str]]:
    """(heading, sentence, proof)"""
    rows, heading = [], ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif heading and line.startswith("| ") and line != "| sentence | proof |":
            sentence, proof = re.fullmatch(r"\| (.*) (?<!\\)\| (.*) \|", line).groups()
            rows.append((heading, sentence.replace("\\|", "|"), proof))
    return rows


def test_every_sentence_has_its_row():
    assert [row[:2] for row in table()] == [(h, s.strip()) for h, s in sentences(PAGE)]


def test_every_proof_exists():
    for _, sentence, proof in table():
        named = re.findall(r"`([^`]+)`|\]\(\.\./([^)]+)\)", proof)
        assert named or proof == "*planned*", sentence
        for test, path in named:
            if path:
                assert (ROOT / path).is_file(), path
                continue
            file, function = test.split("::")
            source = (ROOT / "tests" / "python" / file).read_text(encoding="utf-8")
            assert f"\ndef {function}(" in source, test


def test_only_the_future_is_planned():
    planned = {heading for heading, _, proof in table() if "planned" in proof}
    assert planned == {"Future Extensions"}


# ---------------------------------------------------------------------- interface


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_one_program_serves_every_method(method, tmp_path, tokens):
    config = QuantizationConfig(method, compute_dtype=torch.float32)
    adapter = create_quantization_adapter(Backend.CPU, config, support="extended")
    model = adapter.prepare_model_for_training(adapter.quantize_model(tiny_llama()))
    adapter.save_quantized_model(model, tmp_path / "m")
    loaded = adapter.load_quantized_model(tmp_path / "m", model.config)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


MATRIX = {  # CUDA, MPS, MLX, CPU
    "bnb_nf4": "1000",
    "bnb_int8": "1000",
    "hqq": "1111",
    "mlx_int4": "0110",
    "mlx_int8": "0110",
    "quanto_int2": "1101",
    "quanto_int4": "1101",
    "quanto_int8": "1101",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", MATRIX)
def test_factory_follows_the_matrix(method):
    config = QuantizationConfig(method)
    for backend, cell in zip(Backend, MATRIX[method], strict=True):
        adapter = create_quantization_adapter(backend, config)
        assert adapter.report.fallback is (cell == "0")
        assert bool(validate_errors(config, backend)) is (cell == "0")
        extended = create_quantization_adapter(backend, config, support="extended")
        by_option = QuantizationConfig(method, backend_options={"support": "extended"})
        assert type(extended) is type(create_quantization_adapter(backend, by_option))
        assert not extended.report.fallback
        nearest = create_quantization_adapter(backend, config, fallback="nearest")
        assert not nearest.report.fallback
        substituted = [s["what"] for s in nearest.report.substitutions]
        assert substituted.count("method") == (cell == "0")
        if cell == "0":
            option = QuantizationConfig(method, backend_options={"fallback": "error"})
            for refused, settings in ((config, {"fallback": "error"}), (option, {})):
                with pytest.raises(NotImplementedError, match="supported"):
                    create_quantization_adapter(backend, refused, **settings)


def validate_errors(config, backend):
    found = validate_quantization_config(config, backend)
    return [issue for issue in found if issue.severity == "error"]


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_the_architecture():
    names = {}
    for method in METHODS:
        config = QuantizationConfig(method)
        names[method.value] = {
            type(create_quantization_adapter(backend, config)).__name__ for backend in Backend
        }
    assert names["hqq"] == {"HQQAdapter"}
    assert names["none"] == {"FallbackAdapter"}
    assert names["mlx_int4"] == names["mlx_int8"] == {"MLXAdapter", "FallbackAdapter"}
    for method in ("quanto_int2", "quanto_int4", "quanto_int8"):
        assert names[method] == {"QuantoAdapter", "FallbackAdapter"}


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "method, per_parameter",
    [
        ("bnb_int8", 1.0),
        ("mlx_int8", 1.0),
        ("quanto_int8", 1.0),
        ("bnb_nf4", 0.5),
        ("hqq", 0.5),
        ("mlx_int4", 0.5),
        ("quanto_int4", 0.5),
        ("quanto_int2", 0.25),
    ],
)
def test_bytes_per_parameter(method, per_parameter):
    config = QuantizationConfig(method, double_quant=None)
    adapter = create_quantization_adapter("cpu", config, support="extended")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapter.quantize_model(tiny_llama(hidden=256).half())
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    weights = sum(m.in_features * m.out_features for m in layers)
    assert sum(m.codes.nbytes for m in layers) == per_parameter * weights
    # Statistics: at most a 32-bit scale and offset per group of 64, and a few tables.
    tables = sum(m.shared.nbytes + m.spec.nbytes for m in layers)
    assert sum(m.stats.nbytes for m in layers) <= weights / 64 * 8
    resident = adapter.report.to_dict()["totals"]["quantized"]["bytes_after"]
    assert resident <= (per_parameter + 8 / 64) * weights + tables
    dense = [p for n, p in model.named_parameters() if "embed" in n or "lm_head" in n]
    assert all(p.nbytes == 2 * p.numel() for p in dense)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "method, stated, resident", [("none", 14, 13.5), ("bnb_int8", 7, 7.0), ("bnb_nf4", 3.5, 3.9)]
)
def test_a_model_of_7b(method, stated, resident):
    """Llama 7B, its structure alone: parameters have shapes and no memory."""
    with parameters_on_meta():
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000)).half()
    count = sum(p.numel() for p in model.parameters())
    bits = {"none": 16, "bnb_int8": 8, "bnb_nf4": 4}[method]
    assert count * bits / 8 / 1e9 == pytest.approx(stated, rel=0.05)
    adapter = create_quantization_adapter("cuda", QuantizationConfig(method))
    adapter.quantize_model(model)
    totals = adapter.report.to_dict()["totals"]
    if method == "none":
        assert count * 2 / 1e9 == pytest.approx(resident, rel=0.01)
        return
    codes = sum(m.codes.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
    assert codes == totals["quantized"]["parameters"] * bits / 8
    # Head and embeddings stay in float16; the rest are statistics.
    assert totals["all"]["bytes_after"] / 1e9 == pytest.approx(resident, rel=0.02)


# ---------------------------------------------------------------------- troubleshooting


def test_bitsandbytes_off_cuda(model, tokens):
    config = QuantizationConfig("bnb_nf4", compute_dtype=torch.float32)
    for backend in (Backend.MPS, Backend.MLX, Backend.CPU):
        found = validate_quantization_config(config, backend)
        text = f"bitsandbytes quantization is only supported on CUDA, not {backend}"
        assert text in found
        with pytest.warns(UserWarning, match=f"{text}.*'nearest'"):
            adapter = create_quantization_adapter(backend, config)
        assert adapter.report.fallback
        with pytest.warns(UserWarning, match="using .* instead of bnb_nf4"):
            instead = create_quantization_adapter(backend, config, fallback="nearest")
        assert type(instead).__name__ in ("HQQAdapter", "MLXAdapter", "QuantoAdapter")
        assert instead.config.bits == 4


def test_bfloat16_on_mps():
    asked = QuantizationConfig("mlx_int4", compute_dtype=torch.bfloat16)
    assert "MPS backend doesn't support bfloat16" in validate_quantization_config(asked, "mps")
    with pytest.warns(UserWarning, match="MPS backend doesn't support bfloat16.*float16"):
        create_quantization_adapter("mps", asked)
    half = QuantizationConfig("mlx_int4", compute_dtype=torch.float16)
    unset = QuantizationConfig("mlx_int4")
    for config in (half, unset):
        assert validate_quantization_config(config, "mps") == []
        adapter = create_quantization_adapter("mps", config)
        assert adapter.config.compute_dtype is torch.float16
    assert unset.compute_dtype is None, "the caller's config is left alone"


def test_mlx_says_once_that_layers_are_converted(tokens):
    config = QuantizationConfig("mlx_int4", compute_dtype=torch.float32)
    adapter = create_quantization_adapter(Backend.MPS, config)
    dense = tiny_llama()(tokens).logits
    with pytest.warns(UserWarning, match="MLX quantization requires model conversion") as told:
        model = adapter.quantize_model(tiny_llama())
    assert len(told) == 1 and told[0].filename == __file__
    error = (model(tokens).logits - dense).norm() / dense.norm()
    assert 0 < error < 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.quantize_model(tiny_llama())


# ---------------------------------------------------------------------- quality


def error_of(config) -> float:
    """Relative error of the weights of one layer."""
    torch.manual_seed(1)
    linear = nn.Linear(1024, 256)
    nn.init.normal_(linear.weight)
    weight = linear.weight.detach().clone()
    adapter = create_quantization_adapter("cpu", config, support="extended")
    return adapter.quantize_model(nn.Sequential(linear))[0].relative_error(weight)


def test_bits_and_error():
    errors = {bits: error_of(hqq(bits)) for bits in (2, 4, 8)}
    assert errors[8] < 0.01 < errors[4] < 0.12 < errors[2]
    assert errors[4] / errors[8] > 10


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_smaller_groups_have_less_error(bits):
    errors = [error_of(hqq(bits, size)) for size in (32, 64, 128, 256)]
    assert errors == sorted(errors) and errors[0] < 0.85 * errors[-1]


def test_double_quantization_saves_memory_for_little_error():
    plain, double = nf4(double_quant=False), nf4(double_quant=True)
    assert error_of(double) <= 1.02 * error_of(plain)
    sizes = {}
    for config in (plain, double):
        layer = create_quantization_adapter("cpu", config).create_quantized_linear(4096, 4096)
        sizes[config.double_quant] = layer.packed_bytes()
    saved = (sizes[False] - sizes[True]) * 8 / 4096**2
    assert 0.3 < saved < 0.4, "about 0.37 bits per weight, as the QLoRA paper has it"


def test_head_and_embeddings_stay_dense(tokens):
    dense = tiny_llama()(tokens).logits
    usual, everything = hqq(3, 32), hqq(3, 32, skip_modules=[])
    errors = []
    for config in (usual, everything):
        model = create_quantization_adapter("cpu", config).quantize_model(tiny_llama())
        assert type(model.model.embed_tokens) is nn.Embedding
        assert isinstance(model.lm_head, QuantizedLinear) is (config is everything)
        errors.append(((model(tokens).logits - dense).norm() / dense.norm()).item())
    assert errors[0] < errors[1]


def test_debug_log_is_silent_unless_asked_for(caplog, capfd):
    with caplog.at_level(logging.INFO, "quantal"):
        create_quantization_adapter("cpu", hqq()).quantize_model(tiny_llama())
    assert caplog.text == "" and capfd.readouterr() == ("", "")
