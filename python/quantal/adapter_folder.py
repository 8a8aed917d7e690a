"""Adapter folders: PEFT's files, and one more that says which base the adapter was trained on.

Plain PEFT reads such a folder and ignores ``quantal_base.json``; quantal compares it with the base
that the adapter is put on.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import _check, _peft
from ._checkpoint_store import read_json, sync_folder, write_file
from ._errors import ConfigError, CorruptError, IoError, QuantalError
from .base_identity import OTHER_CODEC, BaseIdentity, BaseMatch, base_identity

#: The file beside adapter_config.json and adapter_model.safetensors.
BASE_FILE = "quantal_base.json"
_CONFIG = "adapter_config.json"
_ACTIONS = ("error", "warn", "ignore")


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in host memory, gathered where it is sharded; every rank has to call this."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.cpu()


def _adapter_state(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    names = {n: p for n, p in model.named_parameters() if f".{adapter}" in n}
    state = {n: _whole(p) for n, p in names.items()}
    return get_peft_model_state_dict(
        model, state_dict=state, adapter_name=adapter, save_embedding_layers=False
    )


@_check.arguments(
    model=_check.module,
    path=_check.path,
    base=_check.optional(_check.is_a(BaseIdentity, "a BaseIdentity")),
    adapter=_check.text,
)
@torch.no_grad()
def save_adapter(
    model: Any,
    path: str | os.PathLike,
    base: BaseIdentity | None = None,
    *,
    adapter: str = "default",
    group: Any = None,
) -> None:
    """Writes the adapter of a PEFT model as a folder of PEFT with the identity of its base.

    base   ``base_identity(model)``; measured where None
    group  with a process group, every rank of it calls this; rank 0 writes

    The folder appears whole or not at all; an older adapter folder of that name is replaced, any
    other folder is refused. Raises ConfigError where the model has no such adapter.
    """
    if adapter not in getattr(model, "peft_config", {}):
        raise ConfigError(
            f"save_adapter: model has no adapter {adapter!r}, expected one of "
            f"{', '.join(getattr(model, 'peft_config', {})) or 'those of a PEFT model'}"
        )
    base = base if base is not None else base_identity(model, group=group)
    state = _adapter_state(model, adapter)
    failure: QuantalError | None = None
    distributed = dist.is_available() and dist.is_initialized()
    if not distributed or dist.get_rank(group) == 0:
        try:
            _write_folder(model, os.path.abspath(os.fspath(path)), base, adapter, state)
        except QuantalError as error:
            failure = error
    if distributed:
        box = [failure]
        dist.broadcast_object_list(box, group=group, group_src=0)
        failure = box[0]
    if failure is not None:
        raise failure


def _write_folder(
    model: Any, path: str, base: BaseIdentity, adapter: str, state: dict[str, torch.Tensor]
) -> None:
    if os.path.exists(path) and not os.path.isfile(os.path.join(path, _CONFIG)):
        if not os.path.isdir(path) or os.listdir(path):
            raise ConfigError(
                f"save_adapter: {path} exists and is no adapter folder, expected a new name or an "
                "adapter folder to replace",
                path,
            )
    temporary, old = f"{path}.saving", f"{path}.old"
    try:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(temporary)
        _save_pretrained(model, temporary, base, adapter, state)
        write_file(os.path.join(temporary, BASE_FILE), json.dumps(base.to_dict(), indent=1) + "\n")
        for root, _, files in os.walk(temporary):
            for name in files:
                with open(os.path.join(root, name), "rb") as file:
                    os.fsync(file.fileno())
            sync_folder(root)
        if os.path.exists(path):
            os.rename(path, old)
        os.rename(temporary, path)
        sync_folder(os.path.dirname(path))
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not os.path.exists(path) and os.path.exists(old):
            os.rename(old, path)
        if isinstance(error, QuantalError):
            raise
        raise IoError(f"save_adapter: cannot write {path}: {error}", path) from error


def _save_pretrained(
    model: Any, folder: str, base: BaseIdentity, adapter: str, state: dict[str, torch.Tensor]
) -> None:
    """PEFT's own writer, the adapter in the folder itself whatever its name."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    state = {n: t.contiguous() for n, t in state.items()}
    save_file(state, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    config = model.peft_config[adapter]
    kept = config.base_model_name_or_path, config.inference_mode
    try:
        config.base_model_name_or_path = base.path or kept[0]
        config.inference_mode = True
        config.save_pretrained(folder)
    finally:
        config.base_model_name_or_path, config.inference_mode = kept


# ---------------------------------------------------------------------- loading


@_check.arguments(path=_check.source)
def read_adapter_base(path: str | os.PathLike) -> BaseIdentity | None:
    """The identity in an adapter folder; None in a folder that plain PEFT wrote."""
    file = os.path.join(os.fspath(path), BASE_FILE)
    if not os.path.exists(file):
        return None
    return BaseIdentity.from_dict(read_json(file, "adapter"), file)


@_check.arguments(path=_check.source, model=_check.module)
def compare_adapter_base(
    path: str | os.PathLike, model: nn.Module, *, group: Any = None
) -> BaseMatch:
    """What the base of `model` is to the one an adapter folder was trained on: "same base", "same
    model, other codec" or "different model". Raises CorruptError where the folder does not say."""
    stored = read_adapter_base(path)
    if stored is None:
        raise CorruptError(
            f"adapter: {os.fspath(path)} has no {BASE_FILE}, expected one that quantal saved",
            os.fspath(path),
        )
    return stored.compare(base_identity(model, group=group))


@_check.arguments(
    model=_check.module,
    path=_check.source,
    is_trainable=_check.flag,
    on_other_codec=_check.text,
    on_different_model=_check.text,
)
def load_adapter(
    model: Any,
    path: str | os.PathLike,
    *,
    is_trainable: bool = False,
    on_other_codec: str = "warn",
    on_different_model: str = "error",
    group: Any = None,
) -> Any:
    """``PeftModel.from_pretrained(model, path)`` after a look at the base; returns the PeftModel.

    on_other_codec      "error", "warn" or "ignore": same model, quantized or kept in another way
    on_different_model  the same for a base with other weights
    A folder that plain PEFT wrote says nothing about its base and is loaded as it is.
    """
    for name, value in (("other_codec", on_other_codec), ("different_model", on_different_model)):
        if value not in _ACTIONS:
            raise ConfigError(f"on_{name} is {value!r}, expected one of {', '.join(_ACTIONS)}")
    from peft import PeftModel

    _peft.install()
    stored = read_adapter_base(path)
    if stored is not None:
        match = stored.compare(base_identity(model, group=group))
        if not match.same:
            action = on_other_codec if match.kind == OTHER_CODEC else on_different_model
            _complain(action, f"adapter: base of {os.fspath(path)} is not this one: {match}", path)
    return PeftModel.from_pretrained(model, os.fspath(path), is_trainable=is_trainable)


def _complain(action: str, message: str, path: str | os.PathLike) -> None:
    if action == "error":
        raise ConfigError(message, os.fspath(path))
    if action == "warn":
        _check.warn(message)


__all__ = [
    "BASE_FILE",
    "compare_adapter_base",
    "load_adapter",
    "read_adapter_base",
    "save_adapter",
]
