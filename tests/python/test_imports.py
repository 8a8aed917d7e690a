"""imports: the registry, stand-ins, and the report of what runs here."""

import copy
import importlib.util
import os
import subprocess
import sys
import types

import pytest
import torch

import imports
import quantal
from imports import (
    ImportRegistry,
    ImportResult,
    check_import_availability,
    get_module,
    report_import_status,
    suppress_output,
    validate_imports,
)
from quantal import _core

HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None


def fail():
    raise ImportError("no such package")


def test_import_is_remembered_per_backend_a_failure_is_not():
    registry, calls = ImportRegistry(), []

    def load():
        calls.append(1)
        if len(calls) == 1:
            raise ImportError("not yet")
        return types.SimpleNamespace(answer=42)

    registry.register("thing", load)
    first = registry.get("thing", "cpu")
    assert not first.success and str(first.error) == "not yet" and first.module is None
    second = registry.get("thing", "cpu")
    assert second.success and second.module.answer == 42 and not second.fallback_used
    assert registry.get("thing", "cpu") is second and len(calls) == 2
    assert registry.get("thing", "cuda").module is not second.module
    registry.register("thing", lambda: "another")
    assert registry.get("thing", "cpu").module == "another"


def test_messages():
    registry = ImportRegistry()
    assert str(registry.get("none").error) == "No import registered for 'none'"
    registry.register("gpu", lambda: 1, backends=["cuda"])
    assert str(registry.get("gpu", "cpu").error) == (
        "Import 'gpu' is not supported on backend 'cpu'"
    )
    assert registry.get("gpu", "CUDA").module == registry.get("gpu").module == 1
    registry.register("checked", lambda: 1, validator=lambda module: module == 2)
    assert str(registry.get("checked").error) == "Validation failed for 'checked'"
    registry.register("stand-in", fail, fallback=lambda: "dummy")
    result = registry.get("stand-in")
    assert result == ImportResult(
        True, "dummy", None, True, ["Using fallback for 'stand-in': no such package"]
    )
    registry.register("broken", fail, fallback=fail)
    assert str(registry.get("broken").error) == (
        "Import 'broken' failed: no such package\nFallback also failed: no such package"
    )


def test_a_stand_in_is_not_availability():
    registry = ImportRegistry()
    registry.register("a", fail, fallback=lambda: "dummy")
    registry.register("b", lambda: 1, backends=["cuda"])
    assert not registry.check_availability("a") and not registry.check_availability("c")
    assert registry.check_availability("b") and not registry.check_availability("b", "cpu")
    assert registry.names() == ["a", "b"]


def test_availability_imports_nothing():
    registry = ImportRegistry()
    registry.register("json", fail, package="json")
    registry.register("absent", lambda: 1, package="no.such.package")
    assert registry.check_availability("json") and not registry.check_availability("absent")


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    if importlib.util.find_spec("flash_attn").origin is None:
        assert not check_import_availability("flash_attn")


@pytest.mark.parametrize(
    "arguments, kind",
    [
        ((5, fail), TypeError),
        (("a", "b"), TypeError),
        (("a", fail, 5), TypeError),
        (("a", fail, None, 5), TypeError),
        (("a", fail, None, None, "cuda"), TypeError),
        (("a", fail, None, None, ["tpu"]), ValueError),
        (("a", fail, None, None, [5]), TypeError),
    ],
    ids=str,
)
def test_registering_nonsense(arguments, kind):
    registry = ImportRegistry()
    with pytest.raises(kind):
        registry.register(*arguments)
    assert registry.names() == []


@pytest.mark.parametrize("backend, kind", [("tpu", ValueError), (5, TypeError)])
def test_unknown_backends(backend, kind):
    for function in (get_module, check_import_availability):
        with pytest.raises(kind):
            function("hqq", backend)
    with pytest.raises(kind):
        report_import_status(backend)
    with pytest.raises(kind):
        validate_imports(["hqq"], backend)
    for wrong in (None, 5, "hqq"):
        with pytest.raises(TypeError, match="list of names"):
            validate_imports(wrong)
    for function in (get_module, check_import_availability):
        with pytest.raises(TypeError, match="name"):
            function(None)


def test_modules_and_stand_ins():
    assert get_module("transformers").__name__ == "transformers"
    assert check_import_availability("peft") and check_import_availability("lora", "mps")
    with pytest.raises(ImportError, match="No import registered for 'nothing'"):
        get_module("nothing")
    with pytest.warns(UserWarning, match="'bitsandbytes' is not supported on backend 'cpu'"):
        module = get_module("bitsandbytes", "cpu")
    with pytest.raises(ImportError) as error:
        _ = module.Linear4bit
    assert str(error.value) == (
        "bitsandbytes.Linear4bit is not available. Please install bitsandbytes or use a different "
        "quantization method."
    )
    copy.copy(module)
    assert not check_import_availability("bitsandbytes", "cpu")
    with pytest.warns(UserWarning, match="'mlx' is not supported on backend 'cuda'"):
        mlx = get_module("mlx", "cuda")
    with pytest.raises(ImportError, match=r"mlx\.core.*pip install mlx mlx-lm"):
        _ = mlx.core
    results = validate_imports(["peft", "nothing", "mlx"], "cpu")
    assert [(r.success, r.fallback_used) for r in results.values()] == [
        (True, False),
        (False, False),
        (True, True),
    ]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_absent_wandb_does_nothing(caplog, capsys):
    with pytest.warns(UserWarning, match="Using fallback for 'wandb'"):
        wandb = get_module("wandb")
    assert wandb.init(project="x") is None and wandb.log({"loss": 1}) is None
    assert "wandb not available, logging disabled" in caplog.text
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="is installed")
def test_absent_flash_attention_says_what_to_do():
    with pytest.warns(UserWarning):
        flash = get_module("flash_attn", "cuda")
    with pytest.raises(RuntimeError, match="install flash-attn or disable flash attention"):
        flash.flash_attn_varlen_func()


def test_report_tells_engine_and_packages():
    report = report_import_status(backend="cuda")
    lines = report.splitlines()
    assert lines[:3] == ["Import Status Report", "=" * 50, "Backend: cuda"]
    assert f"quantal {quantal.__version__} on torch {torch.__version__}" in report
    active = _core.engine_status(quantal.backend.machine())[0]["engines"]["cpu"]
    engines = next(line for line in lines if line.startswith("  cuda: "))
    assert engines.endswith(f"cpu: {active}")
    for title, bits in (("bitsandbytes", "4, 8"), ("HQQ", "1, 2, 3, 4, 5, 6, 8"), ("GGUF", "8")):
        row = next(line for line in lines if line.startswith(f"  {title} "))
        assert row.endswith(f"{bits} bits")
    assert max(map(len, lines)) <= 100
    for name in ("bitsandbytes", "hqq", "mlx", "quanto", "gguf"):
        row = next(i for i, line in enumerate(lines) if line.startswith(f"{name:20} "))
        assert ("✓ Available" in lines[row]) == check_import_availability(name, "cuda")
        assert lines[row].endswith("needed for nothing: quantal has these formats itself")
    transformers = next(line for line in lines if line.startswith("transformers "))
    assert f"✓ Available {__import__('transformers').__version__} " in transformers
    assert "Backend: not specified" in report_import_status()


def test_report_survives_a_wrong_kernel_set():
    code = "from imports import report_import_status; print(report_import_status())"
    environment = {**__import__("os").environ, "QUANTAL_CPU": "mmx"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert "mmx" in run.stdout and "expected" in run.stdout


def test_report_imports_no_package():
    code = (
        "import sys, quantal; quantal.report_import_status('cuda'); "
        "bad = {'bitsandbytes', 'hqq', 'mlx', 'wandb', 'peft'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_module_prints_the_report(monkeypatch):
    monkeypatch.setattr(_core, "custom_methods", list)  # what other tests registered
    run = subprocess.run(
        [sys.executable, "-m", "quantal", "--backend", "MPS"], capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stderr == ""
    assert run.stdout == report_import_status("mps") + "\n"
    wrong = subprocess.run(
        [sys.executable, "-m", "quantal", "--backend", "tpu"], capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "cuda" in wrong.stderr


def test_suppress_output(capsys):
    with suppress_output():
        print("hidden")
        print("hidden too", file=sys.stderr)
    print("seen")
    assert capsys.readouterr() == ("seen\n", "")
    with pytest.raises(ValueError), suppress_output():
        raise ValueError
    print("seen again")
    assert capsys.readouterr().out == "seen again\n"


def test_top_level_module_has_every_name():
    for name in imports.__all__:
        assert getattr(imports, name) is getattr(quantal.imports, name)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, "off: QUANTAL_CUDA=1 turns them on, no GPU has run them yet (docs/cuda.md)"),
        ("0", "off: QUANTAL_CUDA=1 turns them on"),
        ("yes", "QUANTAL_CUDA is 'yes', expected 0 or 1"),
    ],
)
def test_report_says_why_the_cuda_kernels_are_not_in_use(setting, expected):
    assert f"CUDA kernels: {expected}" in report_in_a_process(QUANTAL_CUDA=setting)


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_report_names_a_torch_without_cuda():
    assert "CUDA kernels: torch is a build without CUDA" in report_in_a_process(QUANTAL_CUDA="1")


def report_in_a_process(**settings):
    env = {k: v for k, v in os.environ.items() if not k.startswith("QUANTAL_CUDA")}
    env |= {k: v for k, v in settings.items() if v is not None}
    code = "import quantal; print(quantal.report_import_status())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    )
    return done.stdout
