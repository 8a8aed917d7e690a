"""Saving, loading and comparing quantized models. Files and layouts are the C++ library's."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import _core
from ._dtypes import _BY_NAME, as_parts, bytes_of, tensor_from
from ._errors import ConfigError, CorruptError
from ._packed import BUFFERS, PackedWeight
from .config import QuantizationConfig
from .embedding import QuantizedEmbedding
from .linear import QuantizedLinear

#: Key of config.json under which tied tensor names of a model that is not transformers' are kept.
_TIED_KEY = "quantal_tied"


def _quantized_layers(model: nn.Module) -> dict[str, PackedWeight]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedWeight)}


def _dense_tensors(
    model: nn.Module, layers: dict[str, PackedWeight]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """State tensors that are not packed, and {name: name it shares its bytes with}."""
    packed = {f"{name}.{part}" if name else part for name in layers for part in BUFFERS}
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in packed:
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor
    return tensors, tied


def _tied_head(model: nn.Module) -> nn.Module | None:
    """The output layer of a transformers model if it shares packed bytes with the embedding."""
    if not _tied(model):
        return None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    shared = isinstance(head, PackedWeight) and head.codes is getattr(embedding, "codes", None)
    return head if shared else None


def _views(model: nn.Module) -> tuple[list, list, dict[str, str]]:
    layers = _quantized_layers(model)
    tensors, tied = _dense_tensors(model, layers)
    head = _tied_head(model)
    packed = [
        (name, (m._spec, bytes_of(m.codes), bytes_of(m.stats), bytes_of(m.shared)))
        for name, m in layers.items()
        if m is not head
    ]
    return packed, [(name, as_parts(t)) for name, t in tensors.items()], tied


def model_digest(model: nn.Module) -> str:
    """SHA-256 over the names, forms and bytes of all layers and tensors; tied tensors count once.

    Equal digests mean equal models."""
    packed, tensors, _ = _views(model)
    return _core.checkpoint_digest(packed, tensors)


def _refuse_adapters(model: nn.Module) -> None:
    if any(".lora_" in name or name.startswith("base_model.") for name, _ in model.named_modules()):
        raise ConfigError(
            "save: model carries LoRA adapters, expected the quantized base alone (save adapters "
            "with model.save_pretrained, and the base before they are attached or after unload)"
        )


def _model_config(model: nn.Module, tied: dict[str, str]) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_diff_dict"):
        values = json.loads(config.to_json_string(use_diff=True))
        values.setdefault("architectures", [type(model).__name__])
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        values.pop("dtype", None)
        if dtype is not None:
            values["torch_dtype"] = str(dtype).removeprefix("torch.")
    else:
        values = dict(config) if isinstance(config, dict) else {}
        if tied:
            values[_TIED_KEY] = tied
    values.pop("quantization_config", None)
    return values


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(size: int | str | None) -> int:
    """Bytes of 500, "500MB" or "2GiB"; 0 for None."""
    if isinstance(size, int) or size is None:
        return size or 0
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"size is {size!r}, expected bytes or a number with KB, MB, GB or GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def file_layouts(model: nn.Module | str) -> dict[str, str]:
    """Layouts that a model (or a dialect: "bnb", "hqq", "mlx", "quanto", "gguf", "dense") can be
    written in, {name: description}; the default first."""
    if isinstance(model, str):
        dialect = model
    else:
        dialect = next((m.dialect for m in _quantized_layers(model).values()), "dense")
    return dict(_core.file_layouts(dialect))


def save_model(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    layout: str = "",
    max_shard_bytes: int = 0,
    overwrite: bool = False,
) -> None:
    """Writes a folder or a single file in one of the layouts of the model's dialect.

    layout           name of ``_core.file_layouts``; empty: by the suffix of ``path`` or the
                     dialect's default
    max_shard_bytes  larger models are written in several files; 0: never

    It appears whole or not at all; what exists and was not written by quantal is refused unless
    ``overwrite``."""
    _refuse_adapters(model)
    packed, tensors, tied = _views(model)
    _core.save_checkpoint(
        os.fspath(path),
        json.dumps(_model_config(model, tied)),
        packed,
        tensors,
        dense=[n for n, m in model.named_modules() if type(m) is nn.Linear],
        layout=layout,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


# ---------------------------------------------------------------------- loading


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters created inside have shapes but no memory; buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if value is not None and value.device.type != "meta":
            value = nn.Parameter(value.to("meta"), requires_grad=value.requires_grad)
        register(module, name, value)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _build(model_config: Any, stored: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    if isinstance(model_config, str | os.PathLike):
        model_config = AutoConfig.from_pretrained(os.fspath(model_config))
    if isinstance(model_config, PretrainedConfig):
        config = type(model_config).from_dict(model_config.to_dict())
    else:
        values = dict(model_config if model_config is not None else stored)
        if "model_type" not in values:
            raise ConfigError(
                "load: config has no model_type, expected that of a transformers model (pass "
                "model= to load into a module of your own)"
            )
        values.pop("quantization_config", None)
        values.pop("quantization", None)
        config = AutoConfig.for_model(**values)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(config)


def read_tensor(stored: _core.MappedTensor) -> torch.Tensor:
    """A copy of a tensor in a mapped file."""
    tensor = torch.empty(stored.shape, dtype=_BY_NAME[stored.dtype])
    if tensor.numel():
        stored.copy_into(bytes_of(tensor))
    return tensor


def _packed_module(
    old: Any, spec: list[int], tensors: list[torch.Tensor], config: QuantizationConfig | None
) -> PackedWeight | None:
    """A packed layer in the place of `old`; None if `old` looks nothing up and multiplies
    nothing."""
    compute = config.compute_dtype if config is not None else None
    if isinstance(old, nn.Embedding):
        padding = old.padding_idx
        return QuantizedEmbedding.from_packed(
            spec, *tensors, padding_idx=padding, compute_dtype=compute
        )
    if not hasattr(old, "in_features"):
        return None
    layer = QuantizedLinear.from_packed(spec, *tensors, config=config, compute_dtype=compute)
    if getattr(old, "bias", None) is not None:
        layer.bias = nn.Parameter(torch.empty_like(old.bias, device="meta"))
    return layer


def _module_shape(module: Any) -> tuple[int, int]:
    """(rows, columns) of the weight of a linear layer or an embedding."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def _put_layers(
    model: nn.Module, layers: dict[str, Any], config: QuantizationConfig | None, path: str
) -> None:
    for name, (spec, *buffers) in layers.items():
        layout = _core.layout(spec)
        tensors = [
            tensor_from(b, "u8", list(layout[part]))
            for part, b in zip(BUFFERS, buffers, strict=False)
        ]
        old: Any = None
        with contextlib.suppress(AttributeError):
            old = model.get_submodule(name)
        layer = _packed_module(old, spec, tensors, config)
        if layer is None:
            raise CorruptError(
                f'load: file has a quantized layer "{name}", expected one of the model\'s '
                f"(file={path}, tensor={name})",
                path,
                name,
            )
        if _module_shape(old) != _module_shape(layer):
            raise CorruptError(
                f"load: layer is {list(_module_shape(layer))}, expected {list(_module_shape(old))} "
                f"(file={path}, tensor={name})",
                path,
                name,
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        if isinstance(layer, QuantizedEmbedding) and _tied(model):
            _tie_head(model, layer, config)


def _tie_head(
    model: nn.Module, embedding: QuantizedEmbedding, config: QuantizationConfig | None
) -> None:
    """Gives the output layer of a transformers model the packed bytes of its embedding."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if model.get_input_embeddings() is not embedding or head is None:  # type: ignore[operator]
        return
    layer = QuantizedLinear.from_packed(
        embedding._spec,
        *embedding._buffers_packed,
        config=config,
        compute_dtype=embedding.compute_dtype,
    )
    if head.bias is not None:
        layer.bias = nn.Parameter(torch.empty_like(head.bias, device="meta"))
    model.set_output_embeddings(layer)  # type: ignore[operator]


def _tied(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def assign_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a tensor in the place of the parameter or buffer of this name, without a copy."""
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    if child in module._parameters:
        old = module._parameters[child]
        trains = old is not None and old.requires_grad and tensor.is_floating_point()
        module._parameters[child] = nn.Parameter(tensor, requires_grad=trains)
    else:
        module._buffers[child] = tensor


def _expected_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = _quantized_layers(model)
    packed = {f"{name}.{part}" if name else part for name in layers for part in BUFFERS}
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in packed}


def _put_tensors(model: Any, tensors: dict[str, Any], tied: dict[str, str], path: str) -> None:
    expected = _expected_tensors(model)
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise CorruptError(
            f"load: {len(extra)} tensors are not the model's: {', '.join(extra[:8])} (file={path})",
            path,
            extra[0],
        )
    for name, stored in tensors.items():
        if list(expected[name].shape) != stored.shape:
            raise CorruptError(
                f"load: tensor has shape {stored.shape}, expected {list(expected[name].shape)} "
                f"(file={path}, tensor={name})",
                path,
                name,
            )
        assign_tensor(model, name, read_tensor(stored))
    for name, source in tied.items():
        parent, _, child = source.rpartition(".")
        parameter = getattr(model.get_submodule(parent), child)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, parameter)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    missing = [n for n, t in _expected_tensors(model).items() if t.device.type == "meta"]
    if missing:
        raise CorruptError(
            f"load: {len(missing)} tensors are missing: {', '.join(missing[:8])} (file={path})",
            path,
            missing[0],
        )


def load_model(
    path: str | os.PathLike,
    model_config: Any = None,
    config: QuantizationConfig | None = None,
    *,
    model: nn.Module | None = None,
) -> nn.Module:
    """Builds the model without memory for its weights, then puts the file's tensors in place.

    Loading is strict: missing, extra and misshapen tensors raise CorruptError naming them."""
    path = os.fspath(path)
    if model is None:
        stored = {} if model_config is not None else json.loads(_core.read_config(path))
        model = _build(model_config, stored)
    shapes = {
        name: list(_module_shape(m))
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Embedding)
    }
    loaded = _core.load_checkpoint(path, shapes)
    tied = json.loads(loaded["config_json"]).get(_TIED_KEY, {})
    _put_layers(model, loaded["layers"], config, path)
    _put_tensors(model, loaded["tensors"], tied, path)
    return model.eval()


def inspect(path: str | os.PathLike, all_tensors: bool = False) -> str:
    """A description of a model file or folder, as the command `quantal inspect` prints it."""
    return _core.inspect_text(os.fspath(path), all_tensors)
