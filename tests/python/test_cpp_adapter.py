"""An adapter trained by the C++ example is a PEFT folder: same logits in Python."""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from conftest import GOLDEN
from quantal import Backend, QuantizationConfig, create_quantization_adapter

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = os.environ.get("QUANTAL_FINETUNE", str(ROOT / "build/release/examples/finetune"))
MODEL = GOLDEN / "checkpoints" / "dense-bf16"


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("method", ["none", "hqq", "bnb_nf4"])
def test_python_loads_the_adapter_with_equal_logits(method, kind, tmp_path):
    rows = np.random.default_rng(3).integers(0, 256, (12, 32))
    np.save(tmp_path / "ids.npy", rows)
    done = subprocess.run(
        [BINARY, "--model", MODEL, "--method", method, "--eval", tmp_path / "ids.npy"]
        + ["--train", tmp_path / "ids.npy", "--steps", "8", "--batch", "4", "--lr", "2e-2"]
        + ["--lora-r", "4", "--out", tmp_path / "adapter", "--logits", tmp_path / "logits.npy"]
        + ["--report", tmp_path / "report.json"]
        + (["--dora"] if kind == "dora" else []),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["use_dora"] is (kind == "dora")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["losses"][-1] < report["losses"][0]

    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    if method != "none":
        config = QuantizationConfig(
            method=method,
            bits=4,
            compute_dtype=torch.float32,
            backend_options={"support": "extended"},
        )
        model = create_quantization_adapter(Backend.CPU, config).quantize_model(model)
    with torch.no_grad():
        before = model(torch.from_numpy(rows[:1])).logits
        model = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        logits = model(torch.from_numpy(rows[:1])).logits
    expected = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    assert (logits - before).abs().max() > 1e-2, "the adapter changes nothing"
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
