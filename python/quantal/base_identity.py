"""Which base an adapter or a checkpoint belongs to.

An identity is a small JSON document: for every tensor of the frozen base its shape, its codec, the
SHA-256 of its bytes, and a sketch of its values that survives another codec. Two identities are
"same base", "same model, other codec" or "different model". It is the same for any number of ranks
and for any view of the packed bytes (storage dtype).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from . import _check, _core, _ops
from ._dtypes import bytes_of
from ._errors import CorruptError, UnsupportedError
from ._packed import PackedWeight, whole_tensor
from .training import adapter_parameters

FORMAT = "quantal base 1"
SAME_BASE = "same base"
OTHER_CODEC = "same model, other codec"
DIFFERENT_MODEL = "different model"

#: Numbers per sketch.
_SKETCH = 4
#: Relative distance of sketches above which they are of different weights. Quantizing the same
#: weights moves them by the quantization error (0.1 at 4 bits, 0.5 at 2); independent weights are
#: about 1.4 apart.
_SKETCH_LIMIT = 0.9
#: Rows decoded, hashed or exchanged at a time.
_BLOCK_ROWS = 1 << 15
#: Parts of module names that wrappers add.
_WRAPPERS = (
    "base_layer",
    "original_module",
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
)
#: What of a config changes what a model computes without changing a shape.
_CONFIG_KEYS = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
)


@dataclasses.dataclass(frozen=True)
class BaseTensor:
    """One tensor of a base.

    codec   dtype of a dense tensor; dialect, width, group size and a hash of the exact form else
    sha256  of the rows' hashes; also of what packed rows share
    values  hash of the values rounded to bfloat16, of dense vectors (norms, biases) only: equal
            whatever dtype of at least bfloat16's range they are kept in
    sketch  signed sums of the values of a matrix and its norm; empty where they are not to be had
    """

    shape: list[int]
    codec: str
    sha256: str
    values: str = ""
    sketch: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class BaseMatch:
    """``kind``: one of the three, in words. ``detail``: the first difference, or how many."""

    kind: str
    detail: str = ""

    @property
    def same(self) -> bool:
        return self.kind == SAME_BASE

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


@dataclasses.dataclass(frozen=True)
class BaseIdentity:
    """The identity of a base; ``digest`` stands for all of it but ``path``."""

    tensors: dict[str, BaseTensor]
    config: dict[str, Any]
    path: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes, codecs and bytes."""
        facts = [(n, t.shape, t.codec, t.sha256) for n, t in sorted(self.tensors.items())]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        tensors = {n: _sparse(dataclasses.asdict(t)) for n, t in self.tensors.items()}
        return {
            "format": FORMAT,
            "digest": self.digest,
            "path": self.path,
            "config": self.config,
            "tensors": tensors,
        }

    @classmethod
    def from_dict(cls, values: Any, where: str = "") -> BaseIdentity:
        """Of ``to_dict``; CorruptError names what is wrong, and `where` it was read from."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise CorruptError(
                f'base identity: format is {found!r}, expected "{FORMAT}" (file={where})', where
            )
        try:
            tensors = {n: BaseTensor(**t) for n, t in values["tensors"].items()}
            identity = cls(tensors, dict(values["config"]), str(values["path"]))
            digest = identity.digest
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptError(
                f"base identity: {type(error).__name__}: {error}, expected the fields of "
                f'"{FORMAT}" (file={where})',
                where,
            ) from error
        if digest != values.get("digest"):
            raise CorruptError(
                f"base identity: digest is {values.get('digest')}, expected {digest} "
                f"(file={where})",
                where,
            )
        return identity

    def compare(self, other: BaseIdentity) -> BaseMatch:
        """What `other` is to this base: the same, the same model quantized in another way (or
        kept in another dtype), or a different model."""
        match = self._compare_structure(other)
        if match is not None:
            return match
        pairs = [(n, t, other.tensors[n]) for n, t in self.tensors.items()]
        codecs = [(n, a.codec, b.codec) for n, a, b in pairs if a.codec != b.codec]
        changed = [n for n, a, b in pairs if a.codec == b.codec and a.sha256 != b.sha256]
        if not codecs and not changed:
            return BaseMatch(SAME_BASE)
        if changed:
            detail = f"{len(changed)} tensors of equal codec have other values, first {changed[0]}"
            return BaseMatch(DIFFERENT_MODEL, detail)
        for name, a, b in pairs:
            if a.values and b.values and a.values != b.values:
                return BaseMatch(DIFFERENT_MODEL, f"values of {name} differ")
        distance = _sketch_distance([(a.sketch, b.sketch) for _, a, b in pairs])
        if distance > _SKETCH_LIMIT:
            return BaseMatch(
                DIFFERENT_MODEL,
                f"weights are {distance:.2f} of their norm apart, expected at most "
                f"{_SKETCH_LIMIT} from another codec",
            )
        name, mine, theirs = codecs[0]
        return BaseMatch(
            OTHER_CODEC, f"{len(codecs)} tensors, first {name}: {theirs}, expected {mine}"
        )

    def _compare_structure(self, other: BaseIdentity) -> BaseMatch | None:
        names = sorted(self.tensors.keys() ^ other.tensors.keys())
        if names:
            side = "lacks" if names[0] in self.tensors else "has an extra"
            detail = f"it {side} {names[0]}, {len(names)} names differ"
            return BaseMatch(DIFFERENT_MODEL, detail)
        for name, mine in self.tensors.items():
            shape = other.tensors[name].shape
            if shape != mine.shape:
                detail = f"shape of {name} is {shape}, expected {mine.shape}"
                return BaseMatch(DIFFERENT_MODEL, detail)
        for key in self.config.keys() & other.config.keys():
            if self.config[key] != other.config[key]:
                detail = f"config {key} is {other.config[key]}, expected {self.config[key]}"
                return BaseMatch(DIFFERENT_MODEL, detail)
        return None


def _sparse(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v not in ("", [])}


def _sketch_distance(pairs: list[tuple[list[float], list[float]]]) -> float:
    """Root mean square distance of sketches, each relative to its matrix's norm; 0 without any."""
    squares = []
    for mine, theirs in pairs:
        if len(mine) == len(theirs) == _SKETCH + 1 and mine[-1] > 0 and theirs[-1] > 0:
            scale = (mine[-1] * theirs[-1]) ** 0.5
            squares += [((a - b) / scale) ** 2 for a, b in zip(mine[:-1], theirs[:-1], strict=True)]
    return (sum(squares) / len(squares)) ** 0.5 if squares else 0.0


# ---------------------------------------------------------------------- measuring


def canonical_name(name: str) -> str:
    """The name of a parameter before PEFT, FSDP and compilation wrapped its module."""
    name = name.removeprefix("base_model.model.") if name.startswith("base_model.") else name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _local(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(the part that this rank holds, its first row)."""
    if not hasattr(tensor, "placements"):
        return tensor.detach(), 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placed: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(
        placed.shape, placed.device_mesh, placed.placements
    )
    if any(o != 0 for o in offset[1:]) or list(shape[1:]) != list(tensor.shape[1:]):
        raise UnsupportedError(
            f"base identity: a tensor is sharded by {placed.placements}, expected by rows"
        )
    return placed.to_local().detach(), int(offset[0]) if len(offset) else 0


def _row_hashes(rows: torch.Tensor) -> bytes:
    """SHA-256 of each row, one after the other."""
    if rows.dim() == 0:
        rows = rows[None]
    count = rows.shape[0]
    if count == 0 or rows.numel() == 0:
        return b""
    data = memoryview(cast(Any, bytes_of(rows))).cast("B")
    width = len(data) // count
    sha = hashlib.sha256
    return b"".join(sha(data[i * width : (i + 1) * width]).digest() for i in range(count))


def _signs(begin: int, count: int, salt: int) -> torch.Tensor:
    """[count, _SKETCH] of +1 and -1, a function of the index alone."""
    x = torch.arange(begin, begin + count, dtype=torch.int64)[:, None]
    x = x * 2654435761 + torch.arange(_SKETCH)[None, :] * 40503 + salt
    for _ in range(2):
        x = x & 0xFFFFFFFF
        x = ((x >> 16) ^ x) * 0x45D9F3B
    x = x & 0xFFFFFFFF
    return 1.0 - 2.0 * ((x >> 16) & 1).to(torch.float32)


class _Sketch:
    """Signed sums of the rows that this rank holds, and their sum of squares."""

    def __init__(self, columns: int) -> None:
        self.columns = _signs(0, columns, 77)
        self.sums = torch.zeros(_SKETCH + 1, dtype=torch.float64)

    def add(self, values: torch.Tensor, first_row: int) -> None:
        values = values.reshape(values.shape[0], -1).float().cpu()
        products = (values @ self.columns) * _signs(first_row, values.shape[0], 5)
        self.sums[:_SKETCH] += products.sum(0, dtype=torch.float64)
        self.sums[_SKETCH] += values.double().pow(2).sum()


@dataclasses.dataclass
class _Part:
    """What one rank knows of one tensor; ``rows`` of all ranks, in order, are hashed."""

    shape: list[int]
    codec: str
    rows: list[tuple[int, bytes]]  # (first row, hashes)
    shared: str
    values: list[tuple[int, bytes]]
    sums: list[float]


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(b, min(rows, b + _BLOCK_ROWS)) for b in range(0, rows, _BLOCK_ROWS))


def _is_cut(item: PackedWeight | torch.Tensor) -> bool:
    """Whether ranks hold rows of it. Packed bytes under another dtype are gathered whole: FSDP cuts
    them anywhere."""
    if isinstance(item, PackedWeight):
        return item._storage is torch.uint8 and hasattr(item.codes, "placements")
    return hasattr(item, "placements")


def _packed_rows(layer: PackedWeight, name: str) -> tuple[torch.Tensor, int]:
    """(rows of codes or statistics as bytes, the first of them)"""
    parameter = getattr(layer, name)
    if layer._storage is torch.uint8:
        local, first = _local(parameter)
        return local.cpu().contiguous(), first
    rows, columns = _core.layout(layer._spec)[name]
    whole = whole_tensor(parameter).detach().cpu().reshape(-1).view(torch.uint8)
    return whole[: rows * columns].view(rows, columns), 0


def _packed_part(layer: PackedWeight) -> _Part:
    codes, first = _packed_rows(layer, "codes")
    stats, stats_first = _packed_rows(layer, "stats")
    shared = bytes_of(_local(layer.shared)[0]).tobytes()
    form = hashlib.sha256(json.dumps(layer._spec[3:]).encode()).hexdigest()[:8]
    sketch = _Sketch(layer._cols)
    whole = codes.shape[0] == layer._rows
    if layer._row_runs or whole:
        shared_cpu = layer.shared.detach().cpu()
        for rows in _blocks(codes.shape[0]) if layer._row_runs else [slice(None)]:
            spec = list(layer._spec)
            spec[1] = codes[rows].shape[0]
            part = (codes[rows], stats[rows] if layer._row_runs else stats, shared_cpu)
            values = _ops.dequantize(*part, spec, torch.float32)
            sketch.add(values, first + (rows.start or 0))
    known = layer._row_runs or whole
    return _Part(
        [layer._rows, layer._cols],
        f"{layer.dialect} {layer.bits}-bit g{layer.group_size} {form}",
        [(first, _row_hashes(codes)), (stats_first + (1 << 40), _row_hashes(stats))],
        hashlib.sha256(shared).hexdigest(),
        [],
        sketch.sums.tolist() if known else [],
    )


def _dense_part(tensor: torch.Tensor) -> _Part:
    local, first = _local(tensor)
    local = local.cpu()
    vector = tensor.dim() == 1 and tensor.is_floating_point()
    sketch: list[float] = []
    if tensor.dim() == 2 and tensor.is_floating_point():
        sums = _Sketch(tensor.shape[1])
        for rows in _blocks(local.shape[0]):
            sums.add(local[rows], first + rows.start)
        sketch = sums.sums.tolist()
    rounded = [(first, _row_hashes(local.to(torch.bfloat16)))] if vector else []
    dtype = str(tensor.dtype).removeprefix("torch.")
    return _Part(list(tensor.shape), dtype, [(first, _row_hashes(local))], "", rounded, sketch)


def _base_tensors(model: nn.Module) -> dict[str, PackedWeight | torch.Tensor]:
    """The frozen base: packed layers by the name of their weight, dense parameters, tied ones under
    each of their names."""
    trained = adapter_parameters(model)
    found: dict[str, PackedWeight | torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        packed = isinstance(module, PackedWeight)
        if packed:
            found[canonical_name(f"{prefix}.weight")] = module  # type: ignore[assignment]
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in trained or (packed and name in ("codes", "stats")):
                continue
            if type(parameter).__name__ == "FlatParameter":
                raise UnsupportedError(
                    "base identity: the model is wrapped by FSDP1, expected the model before it is "
                    "wrapped, or FSDP2 (fully_shard)"
                )
            found[canonical_name(f"{prefix}.{name}")] = parameter
    return found


def _joined(parts: list[list[tuple[int, bytes]]]) -> str:
    """SHA-256 of the rows of all ranks; a row that several ranks hold counts once."""
    rows = {first: hashes for part in parts for first, hashes in part if hashes}
    digest = hashlib.sha256()
    for first in sorted(rows):
        digest.update(rows[first])
    return digest.hexdigest()


def _merge(parts: list[_Part], replicated: bool) -> BaseTensor:
    if replicated:
        parts = parts[:1]
    one = parts[0]
    sha = hashlib.sha256((_joined([p.rows for p in parts]) + one.shared).encode()).hexdigest()
    values = _joined([p.values for p in parts])[:32] if one.values else ""
    sketch: list[float] = []
    if all(p.sums for p in parts):
        sums = [sum(column) for column in zip(*(p.sums for p in parts), strict=True)]
        sketch = [float(f"{v:.6g}") for v in [*sums[:-1], sums[-1] ** 0.5]]
    return BaseTensor(one.shape, one.codec, sha, values, sketch)


def _gather(part: _Part, group: Any, ranks: int) -> list[_Part]:
    if ranks == 1:
        return [part]
    gathered: list[Any] = [None] * ranks
    mine = dist.get_rank(group) == 0
    dist.gather_object(part, gathered if mine else None, group=group, group_dst=0)
    return gathered if mine else [part]


@_check.arguments(
    model=_check.module, path=_check.is_a((str, os.PathLike), "a path (str or os.PathLike)")
)
@torch.no_grad()
def base_identity(
    model: nn.Module, path: str | os.PathLike = "", *, group: Any = None
) -> BaseIdentity:
    """The identity of the frozen base of `model`, adapters left out.

    path   where the base lies; kept for people, not compared
    group  with a process group initialized, every rank of it has to call this; ranks that hold rows
           (``fully_shard``) hash them, and rank 0 joins the hashes of the rows

    Every byte is read once and every packed matrix decoded once, in blocks of rows.
    """
    ranks = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    tensors: dict[str, BaseTensor] = {}
    known: dict[int, BaseTensor] = {}
    for name, item in _base_tensors(model).items():
        owner = item.codes if isinstance(item, PackedWeight) else item
        if id(owner) not in known:
            packed = isinstance(item, PackedWeight)
            part = _packed_part(item) if packed else _dense_part(item)  # type: ignore[arg-type]
            sharded = _is_cut(item)
            parts = _gather(part, group, ranks if sharded else 1)
            known[id(owner)] = _merge(parts, not sharded)
        tensors[name] = known[id(owner)]
    identity = BaseIdentity(tensors, _config_facts(model), os.fspath(path))
    if ranks > 1:
        box = [identity]
        dist.broadcast_object_list(box, group=group, group_src=0)
        identity = box[0]
    return identity


def _config_facts(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return {k: values[k] for k in _CONFIG_KEYS if values.get(k) is not None}


__all__ = [
    "DIFFERENT_MODEL",
    "OTHER_CODEC",
    "SAME_BASE",
    "BaseIdentity",
    "BaseMatch",
    "BaseTensor",
    "base_identity",
]
