"""transformers.Trainer and accelerate's FSDP plugin, both versions, as they are."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("fsdp_trainer.py")


@pytest.mark.parametrize(
    ("version", "parameters", "kind"),
    [
        (2, "original", "FSDPModule"),
        (1, "original", "FullyShardedDataParallel"),
        (1, "flat", "FullyShardedDataParallel"),
    ],
)
def test_trainer_with_an_fsdp_plugin(version, parameters, kind, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [str(SCRIPT), str(version), parameters, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    lines = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert result["same"]  # packed bytes after training and all gathers were verified
    assert kind in result["wrapped"]
    assert result["losses"][-1] < 0.95 * result["losses"][0]
    saved = "adapter_model.safetensors" if version == 2 else "pytorch_model_fsdp_0"
    assert saved in result["files"]
