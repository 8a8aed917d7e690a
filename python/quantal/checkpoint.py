"""Saving, loading and comparing quantized models. Files and layouts are the C++ library's."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from torch import nn

from . import _check, _core
from ._custom import ADAPTER_KEY
from ._dtypes import as_parts, bytes_of
from ._errors import ConfigError, CorruptError
from ._loading import TEXTS_KEY, TIED_KEY, LoadReport, load, read_tensor
from ._model_attention import AUTO
from ._packed import PackedWeight, whole_tensor
from ._parts import is_transformers, saved_parts, ties_by_config
from .config import QuantizationConfig

Texts = dict[str, bytes]


def _packed_bytes(layer: PackedWeight) -> tuple:
    return layer._spec, *map(bytes_of, layer._whole_bytes())


@_check.arguments(model=_check.module)
def model_digest(model: nn.Module) -> str:
    """SHA-256 over the names, forms and bytes of all layers and tensors; tied tensors count once.

    Equal digests mean equal models. A model that is sharded (FSDP2) has the digest that it has as
    a whole; all ranks must ask for it, and one tensor at a time is gathered."""
    parts = saved_parts(model)
    digest = _core.ModelDigest()
    for name, layer in parts.layers.items():
        digest.add_layer(name, _packed_bytes(layer))
    for name, tensor in parts.tensors.items():
        digest.add_tensor(name, as_parts(whole_tensor(tensor)))
    return digest.hex()


def _refuse_shards(model: nn.Module) -> None:
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise ConfigError(
            "save: model is sharded, expected a whole one (the base is read-only: keep its folder "
            "and save adapters; docs/fsdp.md)"
        )


def _refuse_adapters(model: nn.Module) -> None:
    if any(".lora_" in name or name.startswith("base_model.") for name, _ in model.named_modules()):
        raise ConfigError(
            "save: model carries LoRA adapters, expected the quantized base alone (save adapters "
            "with model.save_pretrained, and the base before they are attached or after unload)"
        )


def _refuse_changed_bytes(layers: Mapping[str, PackedWeight]) -> None:
    changed = [name for name, layer in layers.items() if layer.bytes_changed()]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise CorruptError(
            f"save: packed bytes of {', '.join(changed[:3])}{more} were changed in place, as tools "
            "that average parameters do; expected bytes from quantize_weights, a file or a state "
            "dict (bytes written on purpose: layer.accept_bytes())"
        )


# ---------------------------------------------------------------------- what lies beside weights


def _packed_parameters(model: nn.Module) -> set[int]:
    """Codes and statistics, by id."""
    layers = (m for m in model.modules() if isinstance(m, PackedWeight))
    return {id(p) for layer in layers for p in (layer.codes, layer.stats)}


def _model_config(model: Any, tied: dict[str, str]) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if is_transformers(model):
        values = json.loads(config.to_json_string(use_diff=True))
        values.setdefault("architectures", [type(model).__name__])
        bytes_seen_as_floats = _packed_parameters(model)
        dtypes = {
            p.dtype
            for p in model.parameters()
            if p.is_floating_point() and id(p) not in bytes_seen_as_floats
        }
        values.pop("dtype", None)
        values.pop("torch_dtype", None)
        if len(dtypes) == 1:  # loading rounds to what is said here
            values["torch_dtype"] = str(dtypes.pop()).removeprefix("torch.")
    else:
        values = dict(config) if isinstance(config, dict) else {}
    for key in (TIED_KEY, ADAPTER_KEY):
        values.pop(key, None)
    if tied and not ties_by_config(model):
        values[TIED_KEY] = tied
    values.pop("quantization_config", None)
    return values


def _tokenizer_texts(tokenizer: Any) -> Texts:
    """The files of a tokenizer: of a folder or GGUF file, or of an object that can save itself."""
    if isinstance(tokenizer, str | os.PathLike):
        _check.source("save", "tokenizer", tokenizer)
        texts = _core.read_tokenizer(os.fspath(tokenizer))
    elif hasattr(tokenizer, "save_pretrained"):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            texts = _core.read_tokenizer(folder)
    else:
        raise ConfigError(
            f"save: tokenizer is a {type(tokenizer).__name__}, expected one of transformers', a "
            "folder or a GGUF file"
        )
    if not texts:
        raise ConfigError(
            f"save: tokenizer {tokenizer!r} has no files of a tokenizer, expected tokenizer.json "
            "or a GGUF file with one"
        )
    return texts


def _beside(model: Any, tokenizer: Any) -> Texts:
    """Tokenizer and generation settings that go with a model: as given, as they were loaded, or
    from the folder that transformers read it from."""
    texts = dict(getattr(model, TEXTS_KEY, {}))
    if tokenizer is not None:
        generation = {n: t for n, t in texts.items() if n == "generation_config.json"}
        texts = _tokenizer_texts(tokenizer) | generation
    elif not texts and is_transformers(model):
        folder = getattr(model.config, "_name_or_path", "") or ""
        if os.path.isdir(folder):
            texts = _core.read_tokenizer(folder)
    generation_config: Any = getattr(model, "generation_config", None)
    if hasattr(generation_config, "to_json_string"):
        texts["generation_config.json"] = generation_config.to_json_string().encode()
    return texts


# ---------------------------------------------------------------------- saving

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(size: int | str | None) -> int:
    """Bytes of 500, "500MB" or "2GiB"; 0 for None."""
    if size is None:
        return 0
    if not isinstance(size, str):
        count = _check.integer("save", "max_shard_size", size)
        if count < 0:
            raise ConfigError(f"save: max_shard_size is {count}, expected at least 0")
        return count
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"size is {size!r}, expected bytes or a number with KB, MB, GB or GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@_check.arguments(model=_check.is_a((nn.Module, str), "an nn.Module or the name of a dialect"))
def file_layouts(model: nn.Module | str) -> dict[str, str]:
    """Layouts that a model (or a dialect: "bnb", "hqq", "mlx", "quanto", "gguf", "dense") can be
    written in, {name: description}; the default first."""
    if isinstance(model, str):
        dialect = model
    else:
        packed = (m for m in model.modules() if isinstance(m, PackedWeight))
        dialect = next((m.dialect for m in packed), "dense")
    return dict(_core.file_layouts(dialect))


@_check.arguments(
    "save",
    model=_check.module,
    path=_check.path,
    layout=_check.text,
    max_shard_bytes=_check.size,
    overwrite=_check.flag,
    config_entries=_check.optional(_check.mapping),
)
def save_model(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    layout: str = "",
    max_shard_bytes: int = 0,
    overwrite: bool = False,
    tokenizer: Any = None,
    config_entries: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder or a single file in one of the layouts of the model's dialect.

    layout           name of ``file_layouts``; empty: by the suffix of ``path`` or the dialect's
                     default
    max_shard_bytes  larger models are written in several files; 0: never
    tokenizer        a transformers tokenizer, or a folder or GGUF file that has one. None: that of
                     the file or folder that the model was loaded from. Written beside the weights,
                     or into a GGUF file
    config_entries   further members of config.json, as JSON can hold them

    It appears whole or not at all; what exists and was not written by quantal is refused unless
    ``overwrite``."""
    _refuse_adapters(model)
    _refuse_shards(model)
    parts = saved_parts(model)
    _refuse_changed_bytes(parts.layers)
    _core.save_checkpoint(
        os.fspath(path),
        json.dumps(_model_config(model, parts.tied) | dict(config_entries or {})),
        [(name, _packed_bytes(layer)) for name, layer in parts.layers.items()],
        [(name, as_parts(tensor)) for name, tensor in parts.tensors.items()],
        dense=parts.dense,
        texts=_beside(model, tokenizer),
        layout=layout,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


# ---------------------------------------------------------------------- loading


@_check.arguments(path=_check.source)
def load_model(
    path: str | os.PathLike,
    model_config: Any = None,
    config: QuantizationConfig | None = None,
    *,
    model: nn.Module | None = None,
    strict: bool = True,
    attn_implementation: str = AUTO,
) -> nn.Module:
    """Builds the model without memory for its weights, then puts the file's tensors in place.

    model_config  a transformers config, its dictionary, a path to one, or None for the config of
                  the folder or file
    config        compute_dtype and settings of layers that no file has
    model         a module to load into instead of building one
    strict        True: missing, unexpected and misshapen tensors raise CorruptError, which names
                  them all (``error.report``), before anything is changed. False: a warning names
                  them; what is missing has the values of a new module
    attn_implementation  a name of transformers, "quantal" included. "auto": "quantal" where heads
                  like the model's are faster with it on this CPU, else transformers' choice; a
                  `model` that is given keeps its own

    A model that is built here has its dense parameters in the dtype that the file's config.json
    names, as transformers does: norms of a GGUF file are float32 beside weights of float16.
    """
    loaded, _ = load(
        path,
        model_config,
        config,
        model=model,
        strict=strict,
        attn_implementation=attn_implementation,
    )
    return loaded


@_check.arguments(path=_check.source, all_tensors=_check.flag)
def inspect(path: str | os.PathLike, all_tensors: bool = False) -> str:
    """A description of a model file or folder, as the command `quantal inspect` prints it."""
    return _core.inspect_text(os.fspath(path), all_tensors)


__all__ = [
    "LoadReport",
    "file_layouts",
    "inspect",
    "load_model",
    "model_digest",
    "parse_size",
    "read_tensor",
    "save_model",
]
