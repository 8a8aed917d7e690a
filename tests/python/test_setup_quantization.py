"""examples/setup_quantization.py: the document's flags and its function."""

import argparse
import importlib.util
import pathlib
import subprocess
import sys
import warnings

import pytest
import torch

from backend_manager import BackendManager
from conftest import GOLDEN, tiny_llama
from quantal import load_model
from quantal_train import cli
from quantal_train.quantization import make_config

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "setup_quantization.py"


def script():
    spec = importlib.util.spec_from_file_location("setup_quantization", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(*arguments):
    parser = argparse.ArgumentParser()
    script().add_quantization_flags(parser)
    return parser.parse_args(arguments)


def setup(*arguments, backend="cpu"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return script().setup_quantization(
            parse(*arguments), BackendManager(backend, verbose=False)
        )


def test_flags_and_their_defaults():
    expected = {"quantize": "none", "q_bits": None, "q_group_size": 64, "q_compute_dtype": None}
    expected |= {"q_skip_modules": None, "q_double_quant": None}
    assert vars(parse()) == expected


@pytest.mark.parametrize(
    "flags, adapter, bits",
    [
        ("--quantize hqq", "HQQAdapter", 4),
        ("--quantize HQQ --q_bits 8 --q_group_size 128", "HQQAdapter", 8),
        ("--quantize quanto_int2 --q_compute_dtype float32", "QuantoAdapter", 2),
        ("--quantize quanto_int8", "QuantoAdapter", 8),
        ("--quantize bnb_nf4 --q_double_quant", "FallbackAdapter", 4),
        ("--quantize bnb_int8 --no-q_double_quant", "FallbackAdapter", 8),
        ("", "FallbackAdapter", 4),
    ],
)
def test_adapter_of_the_flags(flags, adapter, bits):
    made = setup(*flags.split())
    assert type(made).__name__ == adapter and made.config.bits == bits
    assert made.config.skip_modules == ["lm_head"]
    if "float32" in flags:
        assert made.config.compute_dtype is torch.float32


@pytest.mark.parametrize(
    "names, dense",
    [
        (None, ["lm_head"]),
        ("", ["lm_head"]),  # as in the document
        ("none", []),
        ("lm_head,down_proj", ["lm_head", "down_proj"]),
    ],
)
def test_layers_that_stay_dense_are_those_of_train_py(names, dense):
    flags = ["--quantize", "hqq", *([] if names is None else ["--q_skip_modules", names])]
    assert setup(*flags).config.skip_modules == dense
    training = cli.parse(["--model", "m", "--data", "d", *flags])
    assert make_config(training).skip_modules == dense


def test_findings_are_printed(capsys):
    made = setup("--quantize", "bnb_nf4", "--q_bits", "8", "--q_skip_modules", "lm_head,down_proj")
    assert made.config.skip_modules == ["lm_head", "down_proj"]
    out = capsys.readouterr().out
    assert "Warning: bitsandbytes quantization is only supported on CUDA, not cpu" in out
    assert "Warning: method bnb_nf4 has 4 bits, not 8" in out


def run(*arguments):
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_script_quantizes_saves_and_says_what_it_did(tmp_path, tokens):
    tiny_llama().save_pretrained(tmp_path / "dense")
    done = run(
        *("--model", str(tmp_path / "dense"), "--backend", "cpu", "--quantize", "hqq"),
        *("--q_bits", "8", "--q_compute_dtype", "float32", "--save", str(tmp_path / "out")),
    )
    assert done.returncode == 0, done.stderr
    assert "HQQAdapter on cpu" in done.stdout and "hqq 8-bit g64" in done.stdout
    loaded = load_model(tmp_path / "out")
    expected = tiny_llama()(tokens).logits
    assert (loaded(tokens).logits - expected).norm() / expected.norm() < 0.05


def test_script_without_a_model_and_with_a_gguf_file():
    done = run("--backend", "cpu", "--quantize", "quanto_int4")
    assert done.returncode == 0 and "quanto_int4 4-bit" in done.stdout, done.stderr
    gguf = GOLDEN / "checkpoints" / "gguf" / "tiny-q8_0.gguf"
    done = run("--backend", "cpu", "--quantize", "hqq", "--model", str(gguf))
    assert done.returncode == 0 and "hqq 4-bit" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--quantize", "nf5"], "invalid choice"),
        (["--quantize", "hqq", "--q_bits", "7"], "Unsupported bit width: 7"),
        (["--quantize", "hqq", "--q_bits", "four"], "invalid int value"),
        (["--backend", "tpu"], "expected one of"),
        (["--backend", "mps"], "not available on this system"),
        (["--quantize", "hqq", "--q_group_size", "-1"], "group_size is -1"),
    ],
)
def test_wrong_flags_are_told_in_one_line(arguments, text):
    done = run(*arguments)
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr
