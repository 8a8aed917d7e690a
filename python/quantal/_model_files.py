"""Files of a language model by name or folder, and how large the model is."""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Iterator

import torch

from . import _check
from ._errors import IoError


def hub_file(model_name: str, file: str) -> str | None:
    """Path of a file of a folder or a hub repository; None if there is none."""
    folder = pathlib.Path(model_name)
    if folder.is_dir():
        return str(folder / file) if (folder / file).is_file() else None
    from transformers.utils import hub

    try:
        return hub.cached_file(model_name, file)
    except OSError:
        return None


def weight_files(model_name: str) -> list[str]:
    """Safetensors files of a model; empty if it has none."""
    index = hub_file(model_name, "model.safetensors.index.json")
    if index is None:
        single = hub_file(model_name, "model.safetensors")
        return [] if single is None else [single]
    try:
        with open(index, encoding="utf-8") as text:
            names = sorted(set(json.load(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IoError(f"model_loader: index is damaged ({error}) (file={index})", index) from None
    found = {name: hub_file(model_name, name) for name in names}
    absent = [name for name, path in found.items() if path is None]
    if absent:
        message = f"model_loader: {len(absent)} shards are missing: {', '.join(absent[:8])}"
        raise IoError(f"{message} (file={index})", index)
    return [path for path in found.values() if path is not None]


def mapped_tensors(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of safetensors files, each a view of its mapped file."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (not a dict)
                    yield name, reader.get_tensor(name)
        except SafetensorError as error:
            raise IoError(f"model_loader: {error} (file={file})", file) from None


def is_quantized_on_disk(model_name: str) -> bool:
    path = hub_file(model_name, "config.json")
    if path is None:
        return False
    with open(path, encoding="utf-8") as text:
        config = json.load(text)
    return "quantization_config" in config or "quantization" in config


_SIZE_IN_NAME = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])")


def size_in_name(model_name: str) -> float | None:
    """Parameters (10^9) that a model's name tells: 1.3 of "opt-1.3b", 56 of "8x7B", 0.135 of
    "135M"; None if it tells none."""
    base = pathlib.PurePath(_check.text("size_in_name", "model_name", model_name)).name.lower()
    found = _SIZE_IN_NAME.search(base.replace("_", "-"))
    if found is None:
        return None
    size = float(found[2]) * int(found[1] or 1)
    return size / 1000 if found[3] == "m" else size


def model_size_b(model_name: str) -> float | None:
    """Parameters (10^9): counted in the headers of a local folder, else what the name tells."""
    _check.path("model_size_b", "model_name", model_name)
    if pathlib.Path(model_name).is_dir():
        from safetensors import safe_open

        total = 0
        for file in weight_files(model_name):
            with safe_open(file, framework="pt") as reader:
                slices = (reader.get_slice(name) for name in reader.keys())  # noqa: SIM118
                total += sum(math.prod(s.get_shape()) for s in slices)
        if total:
            return total / 1e9
    return size_in_name(model_name)
