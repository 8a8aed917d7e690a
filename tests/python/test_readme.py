"""The README tells the truth: its example is the tested file, its matrix the generated one."""

import pathlib
import re
import subprocess
import sys

import pytest

import quantal

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_example_is_the_file():
    block = re.search(r"```python\n(.*?)```", README, re.S)
    assert block, "README has no Python example"
    assert block.group(1) == (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")


def test_example_runs(tmp_path):
    out = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    assert "trainable params" in out.stdout
    assert re.search(r"^loss \d", out.stdout, re.M)
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.parametrize("options", [[], ["--method", "hqq", "--dora"]], ids=["nf4", "hqq-dora"])
def test_qlora_example_runs(options, tmp_path):
    script = ROOT / "examples" / "qlora.py"
    out = subprocess.run(
        [sys.executable, str(script), "--steps", "4", "--output", str(tmp_path), *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    for line in ("reloaded, same logits: True", "unmerged, same logits: True"):
        assert line in out.stdout
    assert "base untouched: True" in out.stdout and "of the update survives" in out.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_matrix_is_generated():
    assert quantal.compatibility_matrix_markdown().strip() in README


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
