"""Tensors of any device: on_device.py in a process that has one."""

import pathlib
import subprocess
import sys

import quantal

HERE = pathlib.Path(__file__).resolve().parent


def test_the_flow_on_a_device_without_kernels():
    """The library is the target quantal_test_device (tests/torch/device/test_device.cpp)."""
    arguments = [sys.executable, "-m", "pytest", "-q", str(HERE / "on_device.py")]
    done = subprocess.run(arguments, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_report_says_what_runs_where():
    text = quantal.report_import_status()
    (line,) = [line for line in text.splitlines() if "CUDA kernels" in line]
    assert "off: " in line and "QUANTAL_CUDA=1" in line
    assert "tensors on a GPU: torch's operators" in text
    assert "tensors on other devices: torch's operators" in text
