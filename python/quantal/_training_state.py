"""The tensors of adapter training, by name: what a checkpoint holds and where it goes back to."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from ._errors import ConfigError, CorruptError, UnsupportedError

MODEL, OPTIMIZER, RNG = "model/", "optimizer/", "rng/"
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if type(parameter).__name__ == "FlatParameter":
            raise UnsupportedError(
                "checkpoint: the model is wrapped by FSDP1, expected a plain model, DDP or FSDP2 "
                "(fully_shard); FSDP1 has checkpoints of its own"
            )
        found[_plain(name.removeprefix("module."))] = parameter
    if not found:
        raise ConfigError("checkpoint: no parameter of the model asks for gradients, expected some")
    return found


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters, without their graph; writing into them writes the model."""
    return {MODEL + name: p.detach() for name, p in _trained(model).items()}


def _shape_dtype(tensor: torch.Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def tensor_facts(tensors: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    """[shape, dtype] by name."""
    return {name: _shape_dtype(tensor) for name, tensor in tensors.items()}


def staged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in host memory that the training does not touch."""
    return {name: _host_copy(tensor) for name, tensor in tensors.items()}


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    if not hasattr(tensor, "placements"):
        return tensor.detach().to("cpu", copy=True)
    placed: Any = tensor.detach()
    local = placed.to_local().detach().to("cpu", copy=True)
    # A part in host memory of a mesh of accelerators, as FSDP's offload has it; from_local would
    # move it there.
    return type(placed)(local, placed._spec, requires_grad=False)


def check_names(targets: dict[str, torch.Tensor], stored: dict[str, Any], path: str) -> None:
    """Raises ConfigError unless the model's trained parameters are those of the checkpoint."""
    saved = {name for name in stored if name.startswith(MODEL)}
    wrong = sorted(saved ^ targets.keys())
    if wrong:
        side = "lacks" if wrong[0] in targets else "has an extra"
        raise ConfigError(
            f"checkpoint: it {side} {wrong[0].removeprefix(MODEL)}, expected the {len(targets)} "
            f"trained parameters of this model ({len(wrong)} names differ; file={path})",
            path,
            wrong[0],
        )
    for name, tensor in targets.items():
        if list(stored[name]) != _shape_dtype(tensor):
            raise ConfigError(
                f"checkpoint: {name.removeprefix(MODEL)} is {_words(stored[name])}, expected "
                f"{_words(_shape_dtype(tensor))} (file={path})",
                path,
                name,
            )


def _words(facts: list[Any]) -> str:
    return f"{facts[1]} {list(facts[0])}"


# ---------------------------------------------------------------------- optimizer


@dataclasses.dataclass
class OptimizerFacts:
    """``tensors`` by name of parameter and key; ``groups``: settings, names and numbers (JSON)."""

    tensors: dict[str, torch.Tensor]
    groups: dict[str, Any]


def optimizer_facts(model: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerFacts:
    """The state of any optimizer of torch.optim, by names instead of positions."""
    names = {id(p): name for name, p in _trained(model).items()}
    tensors: dict[str, torch.Tensor] = {}
    groups, numbers = [], {}
    for group in optimizer.param_groups:
        settings = {k: v for k, v in group.items() if k != "params"}
        members = [names.get(id(p), "") for p in group["params"]]
        if "" in members:
            raise ConfigError(
                "checkpoint: the optimizer holds a parameter that the model does not train, "
                "expected an optimizer of this model's trained parameters"
            )
        groups.append({"settings": _json(settings), "parameters": members})
        for p, name in zip(group["params"], members, strict=True):
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{OPTIMIZER}{name}/{key}"] = value.detach()
                else:
                    numbers[f"{name}/{key}"] = value
    kind = type(optimizer).__name__
    return OptimizerFacts(tensors, {"class": kind, "groups": groups, "numbers": numbers})


def _json(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in settings.items()}


def optimizer_templates(
    model: nn.Module, optimizer: torch.optim.Optimizer, manifest: dict[str, Any], path: str
) -> dict[str, torch.Tensor]:
    """Empty tensors for the optimizer's state: sharded like the parameter they belong to where they
    have its shape."""
    kind = manifest["optimizer"]["class"]
    if kind != type(optimizer).__name__:
        raise ConfigError(
            f"checkpoint: optimizer is {type(optimizer).__name__}, expected {kind} (file={path})",
            path,
        )
    trained = _trained(model)
    found: dict[str, torch.Tensor] = {}
    on_device = {
        id(p)
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for p in group["params"]
    }
    for name, facts in manifest["tensors"].items():
        if not name.startswith(OPTIMIZER):
            continue
        parameter, _, _ = name.removeprefix(OPTIMIZER).rpartition("/")
        if parameter not in trained:
            raise CorruptError(f"checkpoint: {name} belongs to no parameter (file={path})", path)
        p, (shape, dtype) = trained[parameter], facts
        kind = getattr(torch, str(dtype), None)
        if not isinstance(kind, torch.dtype):
            raise CorruptError(f"checkpoint: dtype of {name} is {dtype!r} (file={path})", path)
        if list(shape) == list(p.shape):
            found[name] = torch.zeros_like(p.detach(), dtype=kind)
        else:
            device = p.device if id(p) in on_device else "cpu"
            found[name] = torch.zeros(shape, dtype=kind, device=device)
    return found


def adopt_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Gives the optimizer the loaded tensors and the settings of its groups."""
    trained = _trained(model)
    if len(facts["groups"]) != len(optimizer.param_groups):
        raise ConfigError(
            f"checkpoint: optimizer has {len(optimizer.param_groups)} groups, expected "
            f"{len(facts['groups'])}"
        )
    optimizer.state.clear()
    for name, tensor in tensors.items():
        parameter, _, key = name.removeprefix(OPTIMIZER).rpartition("/")
        optimizer.state[trained[parameter]][key] = tensor
    for name, value in facts["numbers"].items():
        parameter, _, key = name.rpartition("/")
        optimizer.state[trained[parameter]][key] = value
    for group, stored in zip(optimizer.param_groups, facts["groups"], strict=True):
        settings = stored["settings"]
        for key, value in settings.items():
            group[key] = tuple(value) if isinstance(value, list) else value


# ---------------------------------------------------------------------- random generators


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def rng_tensors(rank: int) -> dict[str, torch.Tensor]:
    """States of the generators of this process: torch (CPU and the current device), numpy and
    Python."""
    state: Any = np.random.get_state()
    _, keys, position, has_gauss, gauss = state
    found = {
        "torch": torch.get_rng_state(),
        "numpy": _tensor(keys.tobytes()),
        "numpy-rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
    }
    version, words, rest = random.getstate()
    found["python"] = torch.tensor(words, dtype=torch.int64)
    found["python-rest"] = torch.tensor(
        [float(version), rest is not None, rest or 0.0], dtype=torch.float64
    )
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return {f"{RNG}{rank}/{name}": tensor for name, tensor in found.items()}


def load_rng(tensors: dict[str, torch.Tensor], rank: int) -> None:
    """Sets the generators to states of ``rng_tensors``; nothing for an empty dictionary."""
    states = {n.removeprefix(f"{RNG}{rank}/"): t for n, t in tensors.items()}
    if not states:
        return
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy-rest"].tolist()
    keys = np.frombuffer(states["numpy"].numpy().tobytes(), dtype=np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    version, has_next, following = states["python-rest"].tolist()
    words = tuple(int(w) for w in states["python"].tolist())
    random.setstate((int(version), words, following if has_next else None))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
