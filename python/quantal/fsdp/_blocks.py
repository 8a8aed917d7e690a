"""Which modules become units of FSDP."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import _check
from .._errors import ConfigError
from .._packed import PackedWeight


def _class_names(model: nn.Module) -> set[str]:
    """Classes that transformers says must stay whole: its decoder blocks."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return names


@_check.arguments(model=_check.module)
def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, outermost only: those that transformers names, else the
    members of each ``nn.ModuleList`` that hold parameters."""
    names = _class_names(model)
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            listed = isinstance(module, nn.ModuleList) and not names
            kinds = {kind.__name__ for kind in type(child).__mro__}  # FSDP2 makes a subclass
            if kinds & names or (listed and any(True for _ in child.parameters())):
                found.append(child)
            else:
                visit(child)

    visit(model)
    return found


def _is_adapter(module: nn.Module) -> bool:
    """A leaf whose parameters all train."""
    own = list(module.parameters(recurse=False))
    leaf = not any(True for child in module.children() for _ in child.parameters())
    return bool(own) and leaf and all(p.requires_grad for p in own)


@_check.arguments(model=_check.module)
def wrap_policy(model: nn.Module) -> Any:
    """An ``auto_wrap_policy`` for ``FullyShardedDataParallel``: every decoder block is a unit and,
    inside it, every module that trains (LoRA's matrices) is one of its own.

    FSDP flattens a unit into one tensor, which without ``use_orig_params`` must be frozen or
    trained as a whole and in any case has one dtype. Adapters of another dtype than the packed
    bytes are seen as (float32 beside bfloat16) compute in it, outside of mixed precision, as they
    do in PEFT without FSDP. Call ``convert_storage_`` before: FSDP takes
    no uint8. Raises ConfigError for a model without blocks, for packed bytes that are still uint8
    and for a layer that holds trained parameters beside its packed bytes."""
    from torch.distributed.fsdp.wrap import CustomPolicy

    blocks = decoder_blocks(model)
    if not blocks:
        raise ConfigError(
            f"wrap_policy: {type(model).__name__} has no decoder blocks, expected an nn.ModuleList "
            "of blocks or transformers' _no_split_modules"
        )
    for name, module in model.named_modules():
        if not isinstance(module, PackedWeight):
            continue
        _refuse_bytes(name, module)
        _refuse_mixed(name, module)
    units: dict[int, bool | dict[str, Any]] = {id(block): True for block in blocks}
    seen_as = {m._storage for m in model.modules() if isinstance(m, PackedWeight)}
    for module in model.modules():
        if _is_adapter(module):
            alike = {p.dtype for p in module.parameters(recurse=False)} <= seen_as
            units[id(module)] = alike or {"mixed_precision": None}
    return CustomPolicy(lambda module: units.get(id(module), False))


def _refuse_bytes(name: str, layer: PackedWeight) -> None:
    if not layer.codes.is_floating_point():
        raise ConfigError(
            f"wrap_policy: packed bytes of {name} are {layer.codes.dtype}, expected a float dtype: "
            "FullyShardedDataParallel flattens a unit under one float dtype (call "
            "quantal.fsdp.convert_storage_(model, dtype) before, with the dtype of the model and "
            "of MixedPrecision(param_dtype); or use quantal.fsdp.shard_model, which needs neither)"
        )


def _refuse_mixed(name: str, layer: PackedWeight) -> None:
    trained = [n for n, p in layer.named_parameters(recurse=False) if p.requires_grad]
    if trained:
        raise ConfigError(
            f"wrap_policy: {name} trains {', '.join(trained)} beside frozen packed bytes, expected "
            "trained parameters in modules of their own (freeze them, or use "
            "quantal.fsdp.shard_model)"
        )
