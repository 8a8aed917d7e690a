"""fully_shard over quantized models: one unit per decoder block, and the root."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import _check
from .._dtypes import tensor_bytes
from .._errors import ConfigError, CorruptError
from .._packed import PackedWeight
from ._ahead import gather_ahead
from ._blocks import decoder_blocks
from ._checksum import crc32


def default_mesh() -> Any:
    """A mesh of all ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        raise ConfigError(
            "shard_model: torch.distributed is not initialized, expected a process group (start "
            "with torchrun and call torch.distributed.init_process_group, or pass mesh=)"
        )
    return init_device_mesh(mesh_device(), (dist.get_world_size(),))


def mesh_device() -> str:
    """Device type of the default process group."""
    return "cpu" if "gloo" in dist.get_backend() else torch.accelerator.current_accelerator().type  # type: ignore[union-attr]


def shard_group(mesh: Any) -> Any:
    """The process group over which parameters are cut."""
    return mesh.get_group(mesh.ndim - 1)


def mixed_precision_policy(value: Any) -> Any:
    """None, a dtype (parameters in it, gradients reduced in float32) or FSDP2's own policy."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if value is None:
        return MixedPrecisionPolicy()
    if isinstance(value, torch.dtype):
        return MixedPrecisionPolicy(param_dtype=value, reduce_dtype=torch.float32)
    if isinstance(value, MixedPrecisionPolicy):
        return value
    raise ConfigError(
        f"shard_model: mixed_precision is {value!r}, expected None, a torch.dtype or a "
        "MixedPrecisionPolicy"
    )


def offload_policy(value: Any) -> Any:
    """False, True (shards stay in host memory, pinned where there is an accelerator) or FSDP2's own
    policy."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    if value is None or value is False:
        return OffloadPolicy()
    if value is True:
        return CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())
    if isinstance(value, OffloadPolicy):
        return value
    raise ConfigError(
        f"shard_model: offload is {value!r}, expected True, False or an OffloadPolicy"
    )


def is_mesh(where: str, name: str, value: Any) -> None:
    """A DeviceMesh of one or two dimensions."""
    from torch.distributed.device_mesh import DeviceMesh

    _check.instance(where, name, value, DeviceMesh, "a torch DeviceMesh, or None for all ranks")
    if value.ndim > 2:
        raise ConfigError(
            f"{where}: {name} has {value.ndim} dimensions, expected 1 (shards) or 2 (replicas, "
            "shards)"
        )


@_check.arguments(
    model=_check.module,
    mesh=_check.optional(is_mesh),
    blocks=_check.optional(_check.names),
    check=_check.flag,
)
def shard_model(
    model: nn.Module,
    mesh: Any = None,
    *,
    mixed_precision: Any = None,
    offload: Any = None,
    reshard_after_forward: bool | int | None = None,
    blocks: Iterable[nn.Module] | None = None,
    check: bool = True,
) -> nn.Module:
    """Shards a quantized model over `mesh`, in place, with FSDP2's ``fully_shard``. Returns it.

    mesh                   a DeviceMesh, 1-D or 2-D (replicas, shards); None: all ranks
    mixed_precision        None, a dtype that parameters are gathered in (gradients are reduced in
                           float32), or a MixedPrecisionPolicy. Packed bytes are not touched by it
    offload                True: shards stay in host memory; or an OffloadPolicy
    reshard_after_forward  as in fully_shard: False keeps gathered blocks until backward is done
    blocks                 the units besides the root; None: ``decoder_blocks(model)``
    check                  compare the ranks' models first; see below

    Attach adapters before: a block is one unit with its LoRA inside. Every rank calls this with the
    same model. With `check` the ranks compare names, forms and bytes, and CorruptError on all of
    them names the first tensor that differs; trained parameters become rank 0's instead, since
    adapters start from random numbers. On CPUs each of ``decoder_blocks`` is gathered while the one
    before it computes, which FSDP2 does on streams only.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = default_mesh() if mesh is None else mesh
    policies = {
        "mesh": mesh,
        "mp_policy": mixed_precision_policy(mixed_precision),
        "offload_policy": offload_policy(offload),
    }
    if reshard_after_forward is not None:
        policies["reshard_after_forward"] = reshard_after_forward
    _check_storage(model, policies["mp_policy"])
    units = list(decoder_blocks(model) if blocks is None else blocks)
    if check:
        check_alike(model, mesh)
    for unit in units:
        fully_shard(unit, **policies)
    fully_shard(model, **policies)
    if mesh.device_type == "cpu":
        gather_ahead(model, units if blocks is None else [])
    return model


def _check_storage(model: nn.Module, policy: Any) -> None:
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedWeight) or layer._storage is torch.uint8:
            continue
        if policy.param_dtype not in (None, layer._storage):
            raise ConfigError(
                f"shard_model: packed bytes of {name} are stored as {layer._storage}, expected the "
                f"param_dtype {policy.param_dtype} of mixed precision (a cast destroys them), or "
                "uint8: quantal.fsdp.convert_storage_(model, torch.uint8)"
            )


# ---------------------------------------------------------------------- equal ranks


def _fingerprint(tensor: torch.Tensor) -> tuple:
    return str(tensor.dtype), tuple(tensor.shape), 0 if tensor.is_meta else crc32(tensor)


def _facts(model: nn.Module) -> dict[str, tuple]:
    """What must be equal on all ranks: forms and bytes of everything that is frozen, dtypes and
    shapes of what trains."""
    facts: dict[str, tuple] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PackedWeight):
            facts[f"form of {name}"] = tuple(layer._spec)
    for name, p in model.named_parameters():
        facts[name] = (str(p.dtype), tuple(p.shape)) if p.requires_grad else _fingerprint(p)
    for name, b in model.named_buffers():
        facts[name] = _fingerprint(b)
    return facts


def first_difference(facts: list[dict[str, tuple]]) -> str:
    """Names the first entry in which ranks differ; "" if there is none."""
    for name, mine in facts[0].items():
        for rank, other in enumerate(facts[1:], 1):
            if other.get(name) != mine:
                return f"{name} is {other.get(name)} on rank {rank} and {mine} on rank 0"
    for rank, other in enumerate(facts[1:], 1):
        for name in other:
            if name not in facts[0]:
                return f"{name} is on rank {rank} and not on rank 0"
    return ""


def check_alike(model: nn.Module, mesh: Any) -> None:
    """Raises CorruptError on every rank of `mesh` where models differ; trained parameters become
    those of the first rank."""
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        facts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(facts, _facts(model), group=group)
        difference = first_difference(facts)
        if difference:
            raise CorruptError(
                f"shard_model: {difference}; expected the same model on all ranks (dtype, shape "
                "and CRC-32 of the bytes)"
            )
        source = dist.get_global_rank(group, 0)
        for p in model.parameters():
            if p.requires_grad and not p.is_meta:
                dist.broadcast(p.data, source, group=group)


# ---------------------------------------------------------------------- what a rank holds


@_check.arguments(model=_check.module)
def local_base_bytes(model: nn.Module) -> int:
    """Packed bytes that this rank holds: its share of codes and statistics, and the small tables
    that every rank has. Layers that share bytes count once."""
    total = 0
    seen: set[int] = set()
    for layer in model.modules():
        if not isinstance(layer, PackedWeight) or id(layer.codes) in seen:
            continue
        seen.add(id(layer.codes))
        for p in (layer.codes, layer.stats):
            local: Any = p.to_local() if hasattr(p, "to_local") else p
            total += tensor_bytes(local)
        total += tensor_bytes(layer.shared) + tensor_bytes(layer.spec)
    return total
