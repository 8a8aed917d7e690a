"""Devices: which there are, what they can do, and which one a program runs on.

Facts come from torch, everything that is concluded from them from the C++ library.
"""

from __future__ import annotations

import enum
import importlib.util
import logging
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from . import _check, _core
from ._dtypes import parse_dtype

logger = logging.getLogger("quantal")
logger.addHandler(logging.NullHandler())  # nothing is printed unless the program asks for it


class Backend(enum.Enum):
    """A device family. ``Backend("CUDA")`` and ``Backend("cuda")`` are the same."""

    CUDA = "cuda"
    MPS = "mps"
    MLX = "mlx"
    CPU = "cpu"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> Backend:
        if not isinstance(value, str):
            raise _check.wrong_type("Backend", "value", value, "a Backend or its name")
        name = _core.parse_backend(value)  # raises ConfigError listing the legal names
        return next(b for b in cls if b.value == name)


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


def _capabilities(values: dict[str, Any]) -> BackendCapabilities:
    can = BackendCapabilities(**values)
    can.distributed_backend = can.distributed_backend or None
    if can.max_model_size is not None and can.max_model_size == int(can.max_model_size):
        can.max_model_size = int(can.max_model_size)
    return can


def _collectives() -> list[str]:
    if not torch.distributed.is_available():
        return []
    found = {
        "nccl": torch.distributed.is_nccl_available(),
        "gloo": torch.distributed.is_gloo_available(),
    }
    return [name for name, there in found.items() if there]


def _has_mlx() -> bool:
    try:
        return importlib.util.find_spec("mlx.core") is not None
    except ImportError:
        return False


def machine() -> _core.Machine:
    """What torch says about this machine, now."""
    facts = _core.Machine()
    facts.cpu_bf16 = _core.probe_machine().cpu_bf16
    facts.collectives = _collectives()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        facts.cuda_devices = torch.cuda.device_count()
        facts.cuda_compute = 10 * major + minor
        facts.cuda_bf16 = torch.cuda.is_bf16_supported()
        facts.cuda_name = torch.cuda.get_device_name()
    facts.mps = torch.backends.mps.is_available()
    facts.mlx = facts.mps and _has_mlx()
    return facts


def cuda_has_bf16() -> bool:
    """What the CUDA device says, True where there is none: a plan for another machine."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()


def available_backends() -> list[Backend]:
    """Backends of this machine, the preferred one first: CUDA, MLX, MPS, CPU."""
    return [Backend(name) for name in _core.available_backends(machine())]


def is_available(backend: Backend | str) -> bool:
    """Whether tensors can be placed on this backend here."""
    return Backend(backend) in available_backends()


def detect_backend() -> Backend:
    """The best backend of this machine: CUDA, MLX, MPS, CPU."""
    return available_backends()[0]


class BackendManager:
    """A backend with its torch device and capabilities.

    backend  a Backend or its name; None: the best one of this machine
    verbose  log what was found, at level INFO of the logger "quantal" (nothing is printed)

    ``capabilities`` are those of this machine, ``CAPABILITIES`` what the documentation says of each
    backend. Raises ConfigError (a ValueError) for a backend that this machine does not have.
    """

    CAPABILITIES: ClassVar[dict[Backend, BackendCapabilities]] = {
        backend: _capabilities(_core.documented_capabilities(backend.value)) for backend in Backend
    }

    def __init__(self, backend: Backend | str | None = None, verbose: bool = True) -> None:
        self.verbose = _check.flag("BackendManager", "verbose", verbose)
        name = None if backend is None else Backend(backend).value
        self._native = _core.BackendManager(name, machine())
        self.backend = Backend(self._native.backend)
        self.device = torch.device(self._native.device)
        self.capabilities = _capabilities(self._native.capabilities)
        if verbose:
            logger.info("%s", self.describe())

    @classmethod
    def from_env(cls, verbose: bool = True) -> BackendManager:
        """The backend named by the environment variable FSDP_BACKEND, else the best one."""
        named = os.environ.get("FSDP_BACKEND")
        if named:  # checked where the message can name the variable
            _core.BackendManager.from_env(machine())
        return cls(named or None, verbose=verbose)

    @property
    def available_backends(self) -> list[Backend]:
        """Backends of this machine, the preferred one first."""
        return available_backends()

    def describe(self) -> str:
        """Facts about the backend, as the text that ``verbose`` logs."""
        return f"{self._native.describe()}\nPyTorch: {torch.__version__}"

    def __repr__(self) -> str:
        return f"BackendManager(backend={self.backend}, device={self.device})"

    def supports_quantization(self, bits: int) -> bool:
        """Whether a documented method of this backend has this width; 16 means no quantization."""
        return self._native.supports_quantization(
            max(-1, min(_check.integer("supports_quantization", "bits", bits), 1 << 30))
        )

    def get_dtype(self, prefer_bfloat16: bool = True) -> torch.dtype:
        """bfloat16 where it is supported and preferred, else float16 (CPU: float32)."""
        prefer = _check.flag("get_dtype", "prefer_bfloat16", prefer_bfloat16)
        return parse_dtype(self._native.get_dtype(prefer))

    def get_distributed_backend(self) -> str | None:
        """ "nccl" or "gloo"; None where there is neither."""
        return self.capabilities.distributed_backend

    def validate_model_size(self, model_size_b: float) -> None:
        """Raises ConfigError for a model above the recommended size of the backend."""
        self._native.validate_model_size(
            _check.real("validate_model_size", "model_size_b", model_size_b)
        )

    def get_memory_info(self) -> dict[str, int | float | str]:
        """Bytes of memory, as far as the device can tell.

        Every backend: ``total_memory``, ``allocated_memory`` (by this process), ``free_memory``.
        CUDA and MPS: ``reserved_memory`` too. CPU, MPS and MLX, which have the system's memory:
        ``available_memory``, ``used_memory`` and ``percent_used``; a limit on this process counts.
        """
        if self.backend is Backend.CUDA:
            free, total = torch.cuda.mem_get_info()
            return {
                "total_memory": total,
                "allocated_memory": torch.cuda.memory_allocated(),
                "reserved_memory": torch.cuda.memory_reserved(),
                "free_memory": free,
            }
        info = host_memory_info()
        if self.backend is Backend.MPS:
            info["allocated_memory"] = torch.mps.current_allocated_memory()
            info["reserved_memory"] = torch.mps.driver_allocated_memory()
        return info

    def get_optimal_batch_size(self, model_size_b: float, sequence_length: int = 2048) -> int:
        """Sequences per step to begin with, by model size (10^9 parameters) and length."""
        where = "get_optimal_batch_size"
        return self._native.get_optimal_batch_size(
            _check.real(where, "model_size_b", model_size_b),
            _check.integer(where, "sequence_length", sequence_length),
        )


def host_memory_info() -> dict[str, int | float | str]:
    """Bytes of the system's memory, less where a control group allows this process less."""
    memory = _core.host_memory()
    total, available = memory["total"], memory["available"]
    info: dict[str, int | float | str] = {"total_memory": total}
    if memory["allocated"] is not None:
        info["allocated_memory"] = memory["allocated"]
    if available is None:
        info["note"] = "this system does not tell how much memory is available"
        return info
    info |= {"free_memory": available, "available_memory": available}
    info["used_memory"] = total - available
    info["percent_used"] = round(100 * (total - available) / max(total, 1), 1)
    return info


def get_device(backend: Backend | str | None = None) -> torch.device:
    """The torch device of a backend of this machine; None: of the best one.

    MLX computes beside torch, whose tensors stay on the CPU. Raises as BackendManager does."""
    return BackendManager(backend, verbose=False).device


def get_backend_manager(
    backend: Backend | str | None = None, verbose: bool = True
) -> BackendManager:
    """``BackendManager(backend, verbose)``."""
    return BackendManager(backend, verbose=verbose)
