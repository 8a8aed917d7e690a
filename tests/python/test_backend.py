"""Backend and BackendManager: detection, capabilities, memory, sizes."""

import logging
import os

import pytest
import torch

import backend_manager
from backend_manager import (
    Backend,
    BackendCapabilities,
    BackendManager,
    detect_backend,
    get_backend_manager,
    get_device,
)
from quantal import ConfigError, _core
from quantal import backend as backend_module


def machine(**facts):
    out = _core.Machine()
    for name, value in facts.items():
        setattr(out, name, value)
    return out


@pytest.fixture
def on_machine(monkeypatch):
    """Runs the package as if torch had reported these facts."""

    def use(**facts):
        monkeypatch.setattr(backend_module, "machine", lambda: machine(**facts))

    return use


def test_backends_by_value_name_and_case():
    assert [(b.name, b.value) for b in Backend] == [
        ("CUDA", "cuda"),
        ("MPS", "mps"),
        ("MLX", "mlx"),
        ("CPU", "cpu"),
    ]
    assert Backend("CUDA") is Backend("cuda") is Backend(Backend.CUDA)
    assert str(Backend.MLX) == "mlx" and f"{Backend.MLX}" == "mlx"
    with pytest.raises(ValueError, match="expected one of cuda, mps, mlx, cpu"):
        Backend("tpu")
    for wrong in (None, 5, b"cuda", ["cuda"]):
        with pytest.raises(TypeError, match="a Backend or its name"):
            Backend(wrong)


def test_detection_prefers_cuda_then_mlx_then_mps(on_machine):
    for facts, expected in (
        ({"cuda_devices": 1, "mps": True, "mlx": True}, Backend.CUDA),
        ({"mps": True, "mlx": True}, Backend.MLX),
        ({"mps": True}, Backend.MPS),
        ({}, Backend.CPU),
    ):
        on_machine(**facts)
        assert detect_backend() is expected
        manager = BackendManager(verbose=False)
        assert manager.backend is expected and manager.available_backends[0] is expected


def test_facts_are_those_of_torch():
    facts = backend_module.machine()
    assert (facts.cuda_devices > 0) == torch.cuda.is_available()
    assert facts.mps == torch.backends.mps.is_available()
    assert ("gloo" in facts.collectives) == torch.distributed.is_gloo_available()
    assert ("nccl" in facts.collectives) == torch.distributed.is_nccl_available()
    flags = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
    if "flags" in flags:
        assert facts.cpu_bf16 == ("avx512_bf16" in flags)


def test_devices(on_machine):
    on_machine(cuda_devices=1, mps=True, mlx=True)
    devices = {b: BackendManager(b, verbose=False).device for b in Backend}
    assert devices[Backend.CUDA] == torch.device("cuda") and devices[Backend.MPS].type == "mps"
    assert devices[Backend.MLX] == devices[Backend.CPU] == torch.device("cpu")
    assert get_device("mlx") == torch.device("cpu") and get_device().type == "cuda"


def test_unavailable_backend_lists_what_there_is(on_machine):
    on_machine(mps=True)
    for make in (BackendManager, get_backend_manager, get_device):
        with pytest.raises(ValueError) as error:
            make("cuda")
        assert isinstance(error.value, ConfigError)
        assert str(error.value) == (
            "Backend 'cuda' is not available on this system. Available backends: mps, cpu"
        )


def test_documented_capabilities():
    table = BackendManager.CAPABILITIES
    assert list(table) == list(Backend)
    assert table[Backend.CUDA] == BackendCapabilities(
        [1, 2, 3, 4, 5, 6, 8, 16],
        True,
        True,
        True,
        True,
        None,
        "nccl",
        ["Full feature support", "Requires NVIDIA GPU"],
    )
    assert not table[Backend.MPS].supports_bfloat16
    assert table[Backend.MLX].distributed_backend is None
    assert repr(table[Backend.CPU].max_model_size) == "7"
    assert BackendCapabilities() == BackendCapabilities(
        [], False, False, False, False, None, None, []
    )


def test_capabilities_tell_the_truth_here():
    manager = BackendManager("cpu", verbose=False)
    can = manager.capabilities
    assert manager.get_distributed_backend() == can.distributed_backend
    assert can.supports_distributed == torch.distributed.is_gloo_available()
    for bits in (1, 2, 3, 4, 5, 6, 8):
        assert manager.supports_quantization(bits)
        _core.LayerRules(f'{{"method": "hqq", "bits": {bits}}}').choose("a", 64, 64)
    assert manager.supports_quantization(16) and not manager.supports_quantization(7)
    emulated = [note for note in can.notes if "emulated" in note]
    assert bool(emulated) != backend_module.machine().cpu_bf16


def test_capabilities_follow_the_device(on_machine):
    on_machine(cuda_devices=1, cuda_compute=75, cuda_bf16=False, collectives=["gloo"])
    can = BackendManager("cuda", verbose=False).capabilities
    assert not can.supports_bfloat16 and not can.supports_flash_attention
    assert can.distributed_backend == "gloo" and can.supports_fsdp
    on_machine(cuda_devices=1, cuda_compute=90, cuda_bf16=True, collectives=[])
    can = BackendManager("cuda", verbose=False).capabilities
    assert can.supports_bfloat16 and can.supports_flash_attention
    assert can.distributed_backend is None and not can.supports_distributed


def test_dtypes(on_machine):
    on_machine(cuda_devices=1, cuda_bf16=True, mps=True)
    assert BackendManager("cuda", verbose=False).get_dtype() is torch.bfloat16
    assert BackendManager("cuda", verbose=False).get_dtype(False) is torch.float16
    assert BackendManager("mps", verbose=False).get_dtype() is torch.float16
    assert BackendManager("cpu", verbose=False).get_dtype(prefer_bfloat16=False) is torch.float32
    with pytest.raises(TypeError, match="prefer_bfloat16"):
        BackendManager("cpu", verbose=False).get_dtype("yes")


def test_memory_of_the_system():
    info = BackendManager("cpu", verbose=False).get_memory_info()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < info["available_memory"] <= info["total_memory"] <= pages
    assert info["used_memory"] == info["total_memory"] - info["available_memory"]
    assert 0 <= info["percent_used"] <= 100
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = BackendManager("cpu", verbose=False).get_memory_info()
    assert after["allocated_memory"] - info["allocated_memory"] > held.numel() // 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_cuda_device():
    manager = BackendManager("cuda", verbose=False)
    before = manager.get_memory_info()
    held = torch.ones(64 << 20, dtype=torch.uint8, device="cuda")
    after = manager.get_memory_info()
    assert after["allocated_memory"] - before["allocated_memory"] >= held.numel()
    assert after["reserved_memory"] >= after["allocated_memory"]
    assert 0 < after["free_memory"] < after["total_memory"]


@pytest.mark.parametrize(
    "backend, sizes",
    [("cuda", (4, 2, 1)), ("mps", (2, 1, 1)), ("mlx", (8, 4, 2)), ("cpu", (1, 1, 1))],
)
def test_batch_sizes(on_machine, backend, sizes):
    on_machine(cuda_devices=1, mps=True, mlx=True)
    manager = BackendManager(backend, verbose=False)
    for model_size, expected in zip((7, 13.0, 70), sizes, strict=True):
        assert manager.get_optimal_batch_size(model_size) == expected
        assert manager.get_optimal_batch_size(model_size, 2048) == expected
        longer = manager.get_optimal_batch_size(model_size, sequence_length=4096)
        assert longer == max(1, expected // 2)


def test_model_sizes():
    manager = BackendManager("cpu", verbose=False)
    assert manager.validate_model_size(7) is None
    with pytest.raises(ValueError) as error:
        manager.validate_model_size(13)
    assert str(error.value) == (
        "Model size (13B parameters) exceeds the recommended limit for cpu (7B parameters)"
    )


@pytest.mark.parametrize("wrong", [None, "7", [7], True, 7j])
def test_sizes_must_be_numbers(wrong):
    manager = BackendManager("cpu", verbose=False)
    for function in (manager.validate_model_size, manager.get_optimal_batch_size):
        with pytest.raises(TypeError, match="model_size_b"):
            function(wrong)
    with pytest.raises(TypeError, match="sequence_length"):
        manager.get_optimal_batch_size(7, wrong)
    with pytest.raises(TypeError, match="bits"):
        manager.supports_quantization(wrong)


@pytest.mark.parametrize("bad", [0, -7, float("nan"), float("inf"), 10**400])
def test_sizes_must_be_possible(bad):
    manager = BackendManager("cpu", verbose=False)
    for function in (manager.validate_model_size, manager.get_optimal_batch_size):
        with pytest.raises(ValueError, match="model_size_b is .*expected"):
            function(bad)
    if bad == bad and bad not in (float("inf"),):
        with pytest.raises(ValueError, match="sequence_length"):
            manager.get_optimal_batch_size(7, -1 if bad == 0 else bad)
        assert not manager.supports_quantization(10**18)


def test_environment(monkeypatch):
    monkeypatch.setenv("FSDP_BACKEND", "CPU")
    assert BackendManager.from_env(verbose=False).backend is Backend.CPU
    monkeypatch.setenv("FSDP_BACKEND", "")
    assert BackendManager.from_env(verbose=False).backend is detect_backend()
    monkeypatch.setenv("FSDP_BACKEND", "tpu")
    with pytest.raises(ConfigError, match="tpu.*FSDP_BACKEND"):
        BackendManager.from_env()
    monkeypatch.delenv("FSDP_BACKEND")
    assert BackendManager.from_env(verbose=False).backend is detect_backend()


def test_verbose_logs_and_prints_nothing(capsys, caplog):
    with caplog.at_level(logging.INFO, logger="quantal"):
        manager = BackendManager("cpu")
    assert manager.verbose
    assert "Backend Manager - System Information" in caplog.text
    assert "Selected Backend: cpu" in caplog.text and torch.__version__ in caplog.text
    caplog.clear()
    BackendManager("cpu", verbose=False)
    assert caplog.text == "" and capsys.readouterr() == ("", "")
    with pytest.raises(TypeError, match="verbose"):
        BackendManager("cpu", verbose="loud")
    assert repr(manager) == "BackendManager(backend=cpu, device=cpu)"


def test_top_level_module_has_every_name():
    for name in backend_manager.__all__:
        assert getattr(backend_manager, name) is getattr(backend_module, name)
