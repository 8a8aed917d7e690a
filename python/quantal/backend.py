"""Devices: which there are, what they can do, and which one a program runs on."""

from __future__ import annotations

import enum
import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from ._errors import ConfigError


class Backend(enum.Enum):
    """A device family. ``Backend("CUDA")`` and ``Backend("cuda")`` are the same."""

    CUDA = "cuda"
    MPS = "mps"
    MLX = "mlx"
    CPU = "cpu"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> Backend | None:
        lowered = str(value).lower()
        return next((b for b in cls if b.value == lowered), None)


@dataclass
class BackendCapabilities:
    """What a backend offers to training and to quantization."""

    quantization_bits: list[int] = field(default_factory=list)
    supports_distributed: bool = False
    supports_fsdp: bool = False
    supports_bfloat16: bool = False
    supports_flash_attention: bool = False
    max_model_size: float | None = None
    distributed_backend: str | None = None
    notes: list[str] = field(default_factory=list)


_CAPABILITIES = {
    Backend.CUDA: BackendCapabilities(
        [4, 8, 16], True, True, True, True, None, "nccl",
        ["Full feature support", "Requires NVIDIA GPU"],
    ),
    Backend.MPS: BackendCapabilities(
        [8, 16], True, True, False, False, 70, "gloo",
        ["No bfloat16 support", "Use float16 instead", "Limited operator support"],
    ),
    Backend.MLX: BackendCapabilities(
        [4, 8, 16], False, False, True, True, 70, None,
        ["Optimized for Apple Silicon", "Unified memory architecture", "Requires MLX library"],
    ),
    Backend.CPU: BackendCapabilities(
        [8, 16], True, True, True, False, 7, "gloo",
        ["Fallback option", "Very slow for training"],
    ),
}  # fmt: skip
_ORDER = (Backend.CUDA, Backend.MLX, Backend.MPS, Backend.CPU)
_BATCHES = {
    Backend.CUDA: {7: 4, 13: 2, 70: 1},
    Backend.MPS: {7: 2, 13: 1, 70: 1},
    Backend.MLX: {7: 8, 13: 4, 70: 2},
    Backend.CPU: {7: 1, 13: 1, 70: 1},
}


def is_available(backend: Backend) -> bool:
    """Whether tensors can be placed on this backend here."""
    if backend is Backend.CUDA:
        return torch.cuda.is_available()
    if backend is Backend.MPS:
        return torch.backends.mps.is_available()
    if backend is Backend.MLX:
        return importlib.util.find_spec("mlx") is not None and torch.backends.mps.is_available()
    return True


def detect_backend() -> Backend:
    """The best backend of this machine: CUDA, MLX, MPS, CPU."""
    return next(b for b in _ORDER if is_available(b))


class BackendManager:
    """A backend with its torch device and capabilities.

    Raises ConfigError (a ValueError) for a backend that this machine does not have.
    """

    CAPABILITIES = _CAPABILITIES

    def __init__(self, backend: Backend | str | None = None, verbose: bool = True) -> None:
        self.backend = detect_backend() if backend is None else Backend(backend)
        if not is_available(self.backend):
            available = [str(b) for b in _ORDER if is_available(b)]
            raise ConfigError(
                f"Backend '{self.backend}' is not available on this system. "
                f"Available backends: {available}"
            )
        self.device = get_device(self.backend)
        self.capabilities = _CAPABILITIES[self.backend]
        if verbose:
            print(self.describe())

    @classmethod
    def from_env(cls, verbose: bool = True) -> BackendManager:
        """The backend named by the environment variable FSDP_BACKEND, else the best one."""
        return cls(os.environ.get("FSDP_BACKEND") or None, verbose=verbose)

    def describe(self) -> str:
        """Facts about the backend, as the text that ``verbose`` prints."""
        c = self.capabilities
        lines = [
            "Backend Manager - System Information",
            f"Backend: {self.backend} (device {self.device})",
            f"PyTorch: {torch.__version__}",
            f"Quantization bits: {c.quantization_bits}",
            f"Distributed: {c.distributed_backend or 'no'}; FSDP: {c.supports_fsdp}; "
            f"bfloat16: {c.supports_bfloat16}",
            *(f"Note: {note}" for note in c.notes),
        ]
        return "\n".join(lines)

    def supports_quantization(self, bits: int) -> bool:
        return bits in self.capabilities.quantization_bits

    def get_dtype(self, prefer_bfloat16: bool = True) -> torch.dtype:
        if prefer_bfloat16 and self.capabilities.supports_bfloat16:
            return torch.bfloat16
        return torch.float16

    def get_distributed_backend(self) -> str | None:
        return self.capabilities.distributed_backend

    def validate_model_size(self, model_size_b: float) -> None:
        """Raises ConfigError for a model above the recommended size of the backend."""
        limit = self.capabilities.max_model_size
        if limit is not None and model_size_b > limit:
            raise ConfigError(
                f"Model size ({model_size_b}B parameters) exceeds the recommended limit for "
                f"{self.backend} ({limit}B parameters)"
            )

    def get_memory_info(self) -> dict[str, Any]:
        """Device memory in GB where the device can tell."""
        if self.backend is Backend.CUDA:
            free, total = torch.cuda.mem_get_info()
            return {
                "total": total / 1e9,
                "allocated": torch.cuda.memory_allocated() / 1e9,
                "reserved": torch.cuda.memory_reserved() / 1e9,
                "free": free / 1e9,
            }
        if self.backend in (Backend.MPS, Backend.MLX):
            return {"note": "memory is shared with the system"}
        return {}

    def get_optimal_batch_size(self, model_size_b: float, sequence_length: int = 2048) -> int:
        table = _BATCHES[self.backend]
        size = table[min(table, key=lambda known: abs(known - model_size_b))]
        return max(1, size // 2) if sequence_length > 2048 else size


def get_device(backend: Backend | str | None = None) -> torch.device:
    """The torch device of a backend; MLX computes beside torch, whose tensors stay on the CPU."""
    chosen = detect_backend() if backend is None else Backend(backend)
    return torch.device("cpu" if chosen is Backend.MLX else chosen.value)


def get_backend_manager(
    backend: Backend | str | None = None, verbose: bool = False
) -> BackendManager:
    return BackendManager(backend, verbose=verbose)
