"""What to load, and how: the settings of model_loader."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field

import torch

from . import _check
from ._dtypes import parse_dtype
from ._errors import ConfigError
from .backend import Backend, is_available
from .config import QuantizationConfig, QuantizationMethod


class LoadingStrategy(enum.Enum):
    """How a model comes into memory. ``"sequential"`` is another name of ``LOW_MEMORY``."""

    FULL = "full"  #: on its device
    LOW_MEMORY = "low_memory"  #: rank 0 in host memory, other ranks without memory
    UNIFIED_MEMORY = "unified_memory"  #: where device and host share memory
    STREAMING = "streaming"  #: dense weights stay mapped files, read where they are used

    @classmethod
    def _missing_(cls, value: object) -> LoadingStrategy:
        names = {member.value: member for member in cls} | {"sequential": cls.LOW_MEMORY}
        if not isinstance(value, str):
            raise _check.wrong_type("LoadingStrategy", "value", value, "a LoadingStrategy or name")
        if value.lower() not in names:
            raise ConfigError(f"loading_strategy is '{value}', expected one of {', '.join(names)}")
        return names[value.lower()]


_FLAGS = ["low_memory", "offload_to_cpu", "offload_to_disk", "use_safetensors"]
_FLAGS += ["use_fast_tokenizer", "use_cache", "trust_remote_code", "verbose"]


@dataclass
class ModelLoadingConfig:
    """What to load, and how.

    model_name           name on the hub or a folder
    quantization_config  None: the model as it is
    device               None: that of the backend where this machine has it, else the CPU
    low_memory           as ``loading_strategy=LoadingStrategy.LOW_MEMORY``
    offload_to_cpu       the model stays in host memory, whatever the device
    offload_to_disk      dense weights stay in their files, mapped
    max_memory           {device: size} for transformers, which then places the layers
    loading_workers      kept for older programs: layers are quantized one after the other, each by
                         all threads
    attn_implementation  a name of transformers, "quantal" included, or "auto" as in ``load_model``
    skip_modules         where the quantization config does not say
    llama_pro_path       a folder ``...blk_exp-<layers>-<expanded layers>`` with expanded weights
    """

    model_name: str
    backend: Backend
    loading_strategy: LoadingStrategy = LoadingStrategy.FULL
    quantization_config: QuantizationConfig | None = None
    dtype: torch.dtype = torch.float16
    device: str | int | torch.device | None = None
    low_memory: bool = False
    offload_to_cpu: bool = False
    offload_to_disk: bool = False
    max_memory: dict[str, str] | None = None
    loading_workers: int = -1
    use_safetensors: bool = True
    use_fast_tokenizer: bool = True
    use_cache: bool = False
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    skip_modules: list[str] = field(default_factory=lambda: ["lm_head"])
    quant_method: str | None = None
    llama_pro_path: str | None = None
    rank: int = 0
    world_size: int = 1
    verbose: bool = False

    def __post_init__(self) -> None:
        where = "ModelLoadingConfig"
        self.model_name = os.fspath(
            _check.instance(where, "model_name", self.model_name, (str, os.PathLike), "a str")
        )
        _check.path(where, "model_name", self.model_name)
        self._check_members(where)
        self.backend = Backend(self.backend)
        self.loading_strategy = LoadingStrategy(self.loading_strategy)
        self.dtype = parse_dtype(self.dtype)
        rank = _check.integer(where, "rank", self.rank)
        size = _check.integer(where, "world_size", self.world_size)
        if not 0 <= rank < size:
            raise ConfigError(f"{where}: rank is {rank} of {size}, expected 0 <= rank < world_size")
        if self.quantization_config is not None:
            expected = "a QuantizationConfig or None"
            value = self.quantization_config
            _check.instance(where, "quantization_config", value, QuantizationConfig, expected)
        self._choose_device()
        if self.low_memory:
            self.loading_strategy = LoadingStrategy.LOW_MEMORY
        shared = self.backend in (Backend.MPS, Backend.MLX)
        if shared and self.loading_strategy is LoadingStrategy.FULL:
            self.loading_strategy = LoadingStrategy.UNIFIED_MEMORY
        if self.quantizes and self.quant_method is None:
            assert self.quantization_config is not None
            self.quant_method = self.quantization_config.method.value.split("_")[0]

    def _check_members(self, where: str) -> None:
        for name in _FLAGS:
            _check.flag(where, name, getattr(self, name))
        _check.dtype(where, "dtype", self.dtype)
        _check.names(where, "skip_modules", self.skip_modules)
        _check.text(where, "attn_implementation", self.attn_implementation)
        _check.optional(_check.mapping)(where, "max_memory", self.max_memory)
        _check.optional(_check.text)(where, "quant_method", self.quant_method)
        _check.optional(_check.path)(where, "llama_pro_path", self.llama_pro_path)
        workers = _check.integer(where, "loading_workers", self.loading_workers)
        if workers < -1 or workers == 0:
            raise ConfigError(
                f"{where}: loading_workers is {workers}, expected -1 (chosen) or at least 1"
            )

    def _choose_device(self) -> None:
        if self.device is not None:
            self.device = _check.device("ModelLoadingConfig", "device", self.device)
            return
        torch_has_it = self.backend in (Backend.CUDA, Backend.MPS) and is_available(self.backend)
        self.device = torch.device(self.backend.value if torch_has_it else "cpu")

    @property
    def quantizes(self) -> bool:
        """Whether the model is to be quantized."""
        config = self.quantization_config
        return config is not None and config.method is not QuantizationMethod.NONE
