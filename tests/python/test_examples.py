"""The examples in Python run; those in C++ are run by ctest (examples/CMakeLists.txt)."""

import pathlib
import subprocess
import sys

from conftest import GOLDEN

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


def run(name, *arguments, cwd=None):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_validate():
    out = run("validate.py")
    assert "group_size.shape" in out and "pattern.unmatched" in out
    assert "recommended: mlx_int4" in out and "Import Status Report" in out


def test_convert(tmp_path):
    out = run("convert.py", GOLDEN / "checkpoints" / "mlx-4bit", tmp_path / "model", "hqq")
    assert "mlx 4-bit" in out and "wrote" in out
    assert (tmp_path / "model" / "config.json").is_file()


def test_plan():
    out = run("plan.py", GOLDEN / "checkpoints" / "dense-bf16", 24, 2)
    assert "backward" in out


def test_custom_adapter(tmp_path):
    out = run("custom_adapter.py", tmp_path / "model")
    assert "TernaryLinear" in out and "loaded model is the same" in out


def test_every_cpp_example_has_its_test():
    written = (EXAMPLES / "CMakeLists.txt").read_text(encoding="utf-8")
    for source in EXAMPLES.glob("*.cpp"):
        assert f"({source.stem} " in written, f"{source.name} is not built"
