"""Loading a language model by name or folder, quantized on the way.

Weights come from mapped safetensors files: what is quantized is read once, layer by layer, and
never lies in memory as a whole.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import re
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from . import _check
from ._errors import ConfigError, DeviceError, IoError
from ._loading import assign_tensor, dtype_keyword, parameters_on_meta
from ._loading_config import LoadingStrategy, ModelLoadingConfig
from ._model_attention import AUTO, set_attention
from ._model_files import (
    is_quantized_on_disk,
    mapped_tensors,
    model_size_b,
    size_in_name,
    weight_files,
)
from .adapters import QuantizationAdapter, create_quantization_adapter
from .backend import Backend, BackendManager, detect_backend, is_available
from .config import QuantizationConfig, QuantizationMethod, get_recommended_config

logger = logging.getLogger("quantal")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "model_loader: transformers is not installed, expected it for building models by name; "
            "install with: pip install transformers"
        ) from error
    return transformers


# ------------------------------------------------------------------ loaders


class ModelLoader(ABC):
    """Loads one model as its config says."""

    def __init__(self, config: ModelLoadingConfig) -> None:
        self.config = _check.instance(
            type(self).__name__, "config", config, ModelLoadingConfig, "a ModelLoadingConfig"
        )
        self._validate_config()

    @abstractmethod
    def _validate_config(self) -> None:
        """Raises or warns about settings that this loader cannot use."""

    @abstractmethod
    def load_model(self) -> nn.Module:
        """The model, in evaluation mode."""

    def load_tokenizer(self) -> Any:
        """The tokenizer; its padding token is that of the end if it has none."""
        tokenizer = _transformers().AutoTokenizer.from_pretrained(
            self.config.model_name,
            use_fast=self.config.use_fast_tokenizer,
            trust_remote_code=self.config.trust_remote_code,
        )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = tokenizer.eos_token_id
        return tokenizer

    def _get_model_files(self) -> list[str]:
        """Safetensors files of the weights; raises IoError if there are none."""
        files = weight_files(self.config.llama_pro_path or self.config.model_name)
        if not files:
            raise IoError(f"Could not find model weights for {self.config.model_name}")
        return files

    def _get_loading_workers(self, param_count: int) -> int:
        """What older programs pass to their thread pools; quantal's kernels thread themselves."""
        if self.config.loading_workers != -1:
            return self.config.loading_workers
        if self.config.backend is Backend.CUDA and torch.cuda.is_available():
            if self.config.quant_method == "bnb":
                return 1
            memory = torch.cuda.get_device_properties(0).total_memory / 1e9
            return 8 if memory > 79 else 4 if memory > 39 else 2
        return 4 if self.config.backend in (Backend.MPS, Backend.MLX) else 2

    def _create_model_config(self) -> Any:
        """The transformers config with the settings of this loader."""
        config = _transformers().AutoConfig.from_pretrained(
            self.config.model_name, trust_remote_code=self.config.trust_remote_code
        )
        config.use_cache = self.config.use_cache
        config._attn_implementation = self._attention()
        if self.config.llama_pro_path:
            name = pathlib.Path(self.config.llama_pro_path).name
            layers = re.search(r"blk_exp-(\d+)-(\d+)", name)
            if layers is None:
                raise ConfigError(
                    f"llama_pro_path is '{name}', expected a folder ...blk_exp-<layers>-<expanded>"
                )
            config.num_hidden_layers = int(layers[2])
        return config

    def _empty_model(self) -> Any:
        """The model without memory for its parameters."""
        with parameters_on_meta():
            return _transformers().AutoModelForCausalLM.from_config(
                self._create_model_config(),
                **dtype_keyword(self.config.dtype),
                trust_remote_code=self.config.trust_remote_code,
            )

    def _whole_model(self, **kwargs: Any) -> Any:
        """The model as transformers loads it."""
        try:
            return _transformers().AutoModelForCausalLM.from_pretrained(
                self.config.model_name,
                **dtype_keyword(self.config.dtype),
                attn_implementation=self._attention(),
                trust_remote_code=self.config.trust_remote_code,
                use_safetensors=self.config.use_safetensors or None,
                **kwargs,
            )
        except OSError as error:
            raise IoError(
                f"Could not find model weights for {self.config.model_name}: {error}"
            ) from error

    def _attention(self) -> str | None:
        """What transformers is told; None: it chooses, and `_choose_attention` behind it."""
        name = self.config.attn_implementation
        return None if name == AUTO else name

    def _choose_attention(self, model: Any) -> Any:
        """The model with the attention that was asked for."""
        set_attention(type(self).__name__, model, self.config.attn_implementation)
        return model

    def _device(self) -> torch.device:
        host = self.config.offload_to_cpu
        host = host or self.config.loading_strategy is LoadingStrategy.LOW_MEMORY
        return torch.device("cpu") if host else torch.device(self.config.device or "cpu")

    def _log_loading_info(self) -> None:
        config = self.config
        if config.rank == 0 and config.verbose:
            method = config.quantization_config.method if config.quantization_config else "none"
            logger.info(
                "loading %s: backend %s, strategy %s, quantization %s",
                config.model_name,
                config.backend,
                config.loading_strategy.value,
                method,
            )

    def _is_empty_rank(self) -> bool:
        low = self.config.loading_strategy is LoadingStrategy.LOW_MEMORY
        return low and self.config.rank > 0


class StandardModelLoader(ModelLoader):
    """Loads a model as it is, dense, by means of transformers; warns where a quantization config
    was given."""

    def _validate_config(self) -> None:
        if self.config.quantizes:
            _check.warn(
                "StandardModelLoader doesn't support quantization, ignoring quantization config"
            )

    def load_model(self) -> nn.Module:
        """The dense model; without memory on ranks above 0 with ``LOW_MEMORY``."""
        self._log_loading_info()
        if self._is_empty_rank():
            return self._empty_model()
        if self.config.max_memory is not None:
            model = self._whole_model(device_map="auto", max_memory=self.config.max_memory)
        else:
            model = self._whole_model().to(self._device())
        model.config.use_cache = self.config.use_cache
        return self._choose_attention(model)


class QuantizedModelLoader(ModelLoader):
    """Loads a model and quantizes it on the way, or loads one that is quantized already.

    ``adapter`` is what policy chose; its report tells what was done. No other package is needed.
    """

    adapter: QuantizationAdapter

    def _validate_config(self) -> None:
        if self.config.quantization_config is None:
            raise ConfigError("QuantizedModelLoader requires quantization_config")

    def load_model(self) -> nn.Module:
        """The quantized model, its dense tensors in ``config.dtype``."""
        if not self.config.quantizes:
            return StandardModelLoader(self.config).load_model()
        self._log_loading_info()
        config = self.config
        assert config.quantization_config is not None
        self.adapter = create_quantization_adapter(
            config.backend, self._with_skips(config.quantization_config)
        )
        if is_quantized_on_disk(config.model_name):
            model: Any = self.adapter.load_quantized_model(config.model_name)
        else:
            model = self._quantize()
        if not self._is_empty_rank():
            model = self._place(model)
        model.config.use_cache = config.use_cache
        return self._choose_attention(model).eval()

    def _with_skips(self, config: QuantizationConfig) -> QuantizationConfig:
        """The loader's own list counts where the config has the usual one."""
        if config.skip_modules != QuantizationConfig().skip_modules:
            return config
        return dataclasses.replace(config, skip_modules=list(self.config.skip_modules))

    def _quantize(self) -> Any:
        model = self._empty_model()
        if not self._is_empty_rank() and not self._map_weights(model):
            model = self._whole_model()  # names in the files are not those of the model
        if _has_memory(model):
            with _in_dtype(self.adapter, self.config.dtype):
                return self.adapter.quantize_model(model)
        return self.adapter.quantize_model(model)

    def _map_weights(self, model: Any) -> bool:
        """Gives parameters the bytes of their mapped files; False if they are not all there."""
        files = weight_files(self.config.llama_pro_path or self.config.model_name)
        expected = model.state_dict(keep_vars=True)
        for name, tensor in mapped_tensors(files):
            if name in expected and expected[name].shape == tensor.shape:
                assign_tensor(model, name, tensor)
        model.tie_weights()
        return bool(files) and not any(p.is_meta for p in model.parameters())

    def _place(self, model: Any) -> Any:
        keep = self.config.offload_to_disk
        keep = keep or self.config.loading_strategy is LoadingStrategy.STREAMING
        for parameter in {id(p): p for p in model.parameters()}.values():
            if not keep and parameter.is_floating_point():
                # A copy even where nothing changes: the file may go away.
                parameter.data = parameter.data.to(self.config.dtype, copy=True)
        return model.to(self._device())


def _has_memory(model: nn.Module) -> bool:
    return not any(p.is_meta for p in model.parameters())


class _in_dtype:
    """While it lasts, an adapter casts each weight to a dtype before it quantizes it."""

    def __init__(self, adapter: QuantizationAdapter, dtype: torch.dtype) -> None:
        self.adapter, self.dtype = adapter, dtype

    def __enter__(self) -> None:
        quantize, dtype = self.adapter.quantize_linear, self.dtype

        def quantize_cast(linear: nn.Linear, choice: Any) -> nn.Module:
            linear.weight.data = linear.weight.data.to(dtype)
            return quantize(linear, choice)

        self.adapter.quantize_linear = quantize_cast  # type: ignore[method-assign]

    def __exit__(self, *exception: object) -> None:
        del self.adapter.quantize_linear


class CUDAModelLoader(QuantizedModelLoader):
    """Loads for a CUDA device; raises DeviceError where there is none."""

    def _validate_config(self) -> None:
        if not is_available(Backend.CUDA):
            raise DeviceError("CUDA is not available")
        device = torch.device(self.config.device or "cuda")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"Invalid CUDA device {device}")


class MPSModelLoader(QuantizedModelLoader):
    """Loads for Apple's Metal devices, which have no bfloat16."""

    def _validate_config(self) -> None:
        if not is_available(Backend.MPS):
            raise DeviceError("MPS is not available")
        config = self.config
        quantization = config.quantization_config
        asked = (config.dtype, quantization.compute_dtype if quantization is not None else None)
        if (
            torch.bfloat16 not in asked
            or BackendManager.CAPABILITIES[Backend.MPS].supports_bfloat16
        ):
            return
        _check.warn("MPS doesn't support bfloat16, using float16 instead")
        config.dtype = torch.float16 if config.dtype is torch.bfloat16 else config.dtype
        if quantization is not None and quantization.compute_dtype is torch.bfloat16:
            config.quantization_config = dataclasses.replace(
                quantization, compute_dtype=torch.float16
            )


class MLXModelLoader(QuantizedModelLoader):
    """Loads for MLX: its formats, in torch modules on the CPU."""

    def _validate_config(self) -> None:
        if self.config.backend is not Backend.MLX:
            raise ConfigError("MLXModelLoader requires MLX backend")


class CPUModelLoader(QuantizedModelLoader):
    """Loads for the CPU; every config can be loaded there."""

    def _validate_config(self) -> None:
        """Every config can be loaded on the CPU."""

    def _get_loading_workers(self, param_count: int) -> int:
        if self.config.loading_workers != -1:
            return self.config.loading_workers
        return max(1, (os.cpu_count() or 2) // 2)


_LOADERS: dict[Backend, type[ModelLoader]] = {
    Backend.CUDA: CUDAModelLoader,
    Backend.MPS: MPSModelLoader,
    Backend.MLX: MLXModelLoader,
    Backend.CPU: CPUModelLoader,
}


class ModelLoaderFactory:
    """Chooses the loader of a backend."""

    @staticmethod
    def create_loader(
        config: ModelLoadingConfig, backend_manager: BackendManager | None = None
    ) -> ModelLoader:
        """The loader for ``config.backend``, or for the backend of a manager."""
        expected = "a ModelLoadingConfig"
        _check.instance("create_loader", "config", config, ModelLoadingConfig, expected)
        if backend_manager is not None:
            expected = "a BackendManager"
            _check.instance(
                "create_loader", "backend_manager", backend_manager, BackendManager, expected
            )
            config = dataclasses.replace(config, backend=backend_manager.backend)
        return _LOADERS[config.backend](config)


def load_model_and_tokenizer(
    model_name: str,
    backend: Backend | str | None = None,
    quantization_config: QuantizationConfig | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, Any]:
    """A model and its tokenizer; `backend` None: the best one of this machine.

    kwargs are members of ModelLoadingConfig; without a ``dtype`` it is the backend's."""
    manager = BackendManager(backend, verbose=False)
    kwargs.setdefault("dtype", manager.get_dtype())
    known = {f.name for f in dataclasses.fields(ModelLoadingConfig)}
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise TypeError(
            f"load_model_and_tokenizer: '{unknown[0]}' is not known, expected members of "
            f"ModelLoadingConfig: {', '.join(sorted(known))}"
        )
    config = ModelLoadingConfig(
        model_name, manager.backend, quantization_config=quantization_config, **kwargs
    )
    loader = ModelLoaderFactory.create_loader(config)
    return loader.load_model(), loader.load_tokenizer()


# ------------------------------------------------------------------ recommendation

#: Where neither headers nor the name tell the size.
_DEFAULT_BILLIONS = 7.0


def get_recommended_loader_config(
    model_name: str,
    backend: Backend | str | None = None,
    available_memory_gb: float | None = None,
    **kwargs: Any,
) -> ModelLoadingConfig:
    """A loader config whose quantization is that of get_recommended_config.

    The size is counted from the model's headers where they are here, else read from its name, else
    7; memory is what the device, or the system, has left now."""
    where = "get_recommended_loader_config"
    _check.path(where, "model_name", model_name)
    if available_memory_gb is not None:
        _check.real(where, "available_memory_gb", available_memory_gb)
    chosen = detect_backend() if backend is None else Backend(backend)
    if available_memory_gb is None:
        manager = BackendManager(chosen if is_available(chosen) else None, verbose=False)
        memory = manager.get_memory_info()
        available_memory_gb = float(memory.get("free_memory", memory["total_memory"])) / 1e9
    size = model_size_b(os.fspath(model_name)) or _DEFAULT_BILLIONS
    quantization = get_recommended_config(chosen, size, available_memory_gb)
    if available_memory_gb < 2 * size:
        strategy = LoadingStrategy.LOW_MEMORY
    elif chosen in (Backend.MPS, Backend.MLX):
        strategy = LoadingStrategy.UNIFIED_MEMORY
    else:
        strategy = LoadingStrategy.FULL
    none = quantization.method is QuantizationMethod.NONE
    settings: dict[str, Any] = {"quantization_config": None if none else quantization}
    settings |= {"loading_strategy": strategy, **kwargs}
    return ModelLoadingConfig(model_name, chosen, **settings)


__all__ = [
    "CPUModelLoader",
    "CUDAModelLoader",
    "LoadingStrategy",
    "MLXModelLoader",
    "MPSModelLoader",
    "ModelLoader",
    "ModelLoaderFactory",
    "ModelLoadingConfig",
    "QuantizedModelLoader",
    "StandardModelLoader",
    "get_recommended_loader_config",
    "load_model_and_tokenizer",
    "model_size_b",
    "size_in_name",
]
