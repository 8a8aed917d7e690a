"""What modules with a packed weight share: buffers, the exact weight, strict state."""

from __future__ import annotations

import array
import functools
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from . import _check, _core, _ops
from ._dtypes import bytes_of, dtype_name, parse_dtype, tensor_bytes, tensor_from
from ._errors import DtypeError, ShapeError, UnsupportedError
from ._lazy import LazyWeight

#: State of a packed module, in order.
BUFFERS = ("codes", "stats", "shared", "spec")
#: Dtypes that packed bytes may be seen as; see quantal.fsdp.convert_storage_.
STORAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
#: Types of tensors that are what they look like, whole and here.
_PLAIN = (torch.Tensor, nn.Parameter)
_Module = TypeVar("_Module", bound="PackedWeight")


def checked_spec(where: str, spec: Any) -> list[int]:
    """The integers of a spec; what they mean is checked in C++."""
    if isinstance(spec, str | bytes) or not isinstance(spec, Iterable):
        raise _check.wrong_type(where, "spec", spec, "a list of integers")
    return [_check.integer(where, "an entry of spec", value) for value in spec]


def checked_parts(where: str, spec: Any, parts: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a spec says (``_core.describe``), after a look at the buffers that go with it."""
    spec = checked_spec(where, spec)
    layout = _core.layout(spec)  # raises the typed error of a bad spec
    for name, buffer in parts.items():
        if buffer.dtype != torch.uint8:
            raise DtypeError(f"{where}: {name} is {buffer.dtype}, expected torch.uint8")
        if tuple(buffer.shape) != tuple(layout[name]):
            raise ShapeError(
                f"{where}: {name} has shape {list(buffer.shape)}, expected {list(layout[name])}"
            )
    return _core.describe(spec)


@functools.lru_cache(maxsize=256)
def _described(spec: tuple[int, ...]) -> tuple[tuple[int, int], dict[str, Any]]:
    """Shape and attributes of layers of a spec. A model has thousands and a handful of forms."""
    said = _core.describe(list(spec))
    attributes = {name: said[name] for name in ("bits", "group_size", "dialect")}
    attributes["value_dtype"] = parse_dtype(said["value_dtype"])
    return (said["rows"], said["cols"]), attributes


def _frozen(data: torch.Tensor) -> nn.Parameter:
    """A parameter without gradient; one that is a parameter stays the same object, which tied
    layers share."""
    if type(data) is torch.Tensor or not isinstance(data, nn.Parameter):
        return nn.Parameter(data, requires_grad=False)
    return data


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP shards, on every rank (a collective call); others as they
    are."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def view_bytes(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes seen as `dtype`: a view by row where rows are whole elements, else a flat one, padded
    with zeros at the end."""
    data = data.detach().contiguous()
    size = dtype.itemsize
    if data.shape[-1] % size == 0 and data.data_ptr() % size == 0:
        return data.view(dtype)
    flat = data.reshape(-1)
    padded = flat.new_zeros((flat.numel() + size - 1) // size * size)
    padded[: flat.numel()] = flat
    return padded.view(dtype)


def _byte_sums(codes: torch.Tensor, stats: torch.Tensor) -> tuple[Any, Any]:
    """Sums that change with the bytes of each; None for those that are not all here. On a device
    other than the CPU they stay there, so that nothing waits for them."""
    if type(codes) in _PLAIN and type(stats) in _PLAIN and codes.is_cpu and stats.is_cpu:
        return _ops.byte_sums(codes, stats)
    return _byte_sum(codes), _byte_sum(stats)


def _byte_sum(data: torch.Tensor) -> torch.Tensor | None:
    """The same sum in torch's operators."""
    if data.is_meta or type(data).__name__ == "DTensor":
        return None
    flat = data.detach().reshape(-1).view(torch.uint8)
    if flat.numel() % 8:  # zeros at the end change nothing, whatever pads a view of another dtype
        flat = nn.functional.pad(flat, (0, 8 - flat.numel() % 8))
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    return flat.view(torch.int64).sum()  # at the speed of memory; wraps


class PackedWeight(nn.Module):
    """A [rows, cols] weight kept as packed codes and statistics.

    ``codes`` [rows, code_bytes] and ``stats`` are frozen uint8 parameters, ``shared`` and ``spec``
    small buffers; ``spec`` (16 integers) says what the bytes mean and is checked when a state dict
    is loaded. ``weight`` stands for the exact decoded values: reading its shape, dtype or device
    decodes nothing, using it decodes for that one use, writing it raises.
    """

    codes: nn.Parameter
    stats: nn.Parameter
    shared: torch.Tensor
    spec: torch.Tensor
    _rows: int
    _cols: int
    _spec: list[int]
    value_dtype: torch.dtype
    bits: int
    group_size: int
    dialect: str
    #: What ``codes`` and ``stats`` are viewed as; never a conversion of values.
    _storage: torch.dtype = torch.uint8
    #: Set while adapters are attached to a model whose weights are read later.
    _awaits_weights: bool = False

    def _init_packed(
        self,
        spec: list[int],
        device: torch.device | str | None,
        buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Zero-filled buffers of this form, or those that are given and known to fit."""
        if buffers is not None:
            self._set_facts(spec)
            # Past nn.Module's look at every name and value: nothing can stand there already.
            own, (codes, stats, shared) = self.__dict__, buffers
            parameters, held = own["_parameters"], own["_buffers"]
            codes = parameters["codes"] = _frozen(codes)
            stats = parameters["stats"] = _frozen(stats)
            held["shared"] = shared
            held["spec"] = torch.frombuffer(array.array("q", spec), dtype=torch.int64)
            own["_sums"] = _byte_sums(codes, stats)
            return
        self._set_spec(spec)
        layout = _core.layout(self._spec)
        for name in ("codes", "stats"):
            data = torch.zeros(layout[name], dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))
        shared = torch.zeros(layout["shared"], dtype=torch.uint8, device=device)
        self.register_buffer("shared", shared)
        self.register_buffer("spec", torch.tensor(self._spec, dtype=torch.int64))

    def _set_spec(self, spec: list[int]) -> None:
        self._set_facts(checked_spec(type(self).__name__, spec))

    def _set_facts(self, spec: list[int]) -> None:
        """What `spec`, a list of integers, says about this layer."""
        shape, attributes = _described(tuple(spec))
        if shape != (self._rows, self._cols):
            raise ShapeError(
                f"{type(self).__name__}: spec is for {list(shape)}, expected "
                f"{[self._rows, self._cols]}"
            )
        own = self.__dict__
        own["_spec"] = list(spec)
        own.update(attributes)

    def _set_buffers(self, codes: torch.Tensor, stats: torch.Tensor, shared: torch.Tensor) -> None:
        for name, data in (("codes", codes), ("stats", stats)):
            if data.dtype is not self._storage:
                data = view_bytes(data, self._storage)
            setattr(self, name, _frozen(data))
        self.shared = shared
        self.accept_bytes()

    @property
    def _buffers_packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """codes, stats and shared as uint8. Raises where a rank holds only a part of them."""
        try:  # past nn.Module.__getattr__, which costs as much as a small product
            parameters: dict[str, Any] = self._parameters
            codes, stats = parameters["codes"], parameters["stats"]
            shared: Any = self._buffers["shared"]
        except KeyError:  # FSDP1 hangs plain tensors on the module
            codes, stats, shared = self.codes, self.stats, self.shared
        if self._awaits_weights:
            raise UnsupportedError(
                f"{type(self).__name__}: weights are not read yet, expected adapters that start "
                "without them while load_sharded attaches (init_lora_weights=True, not one that is "
                "computed from the weights such as pissa or olora)"
            )
        if self._storage is not torch.uint8:
            return self._bytes_of("codes", codes), self._bytes_of("stats", stats), shared
        if type(codes).__name__ == "DTensor":
            self._refuse_part("codes")
        return codes, stats, shared

    def _bytes_of(self, name: str, data: torch.Tensor) -> torch.Tensor:
        """The uint8 matrix behind a parameter that is stored under another dtype."""
        if type(data).__name__ == "DTensor":
            self._refuse_part(name)
        if data.dtype is not self._storage:
            raise DtypeError(
                f"{type(self).__name__}: {name} were converted to {data.dtype}, which destroys "
                f"packed bytes; expected storage_dtype {self._storage} to equal the dtype that the "
                "model is cast to (param_dtype of FSDP's mixed precision)"
            )
        rows, columns = _core.layout(self._spec)[name]
        flat = data.detach().reshape(-1).view(torch.uint8)
        if flat.numel() < rows * columns:
            self._refuse_part(name)
        return flat[: rows * columns].view(rows, columns)

    def _is_whole(self, name: str, data: torch.Tensor) -> bool:
        """Whether these bytes are all there; FSDP keeps parts, and frees storage, between uses."""
        if type(data).__name__ == "DTensor" or data.is_meta:
            return False
        rows, columns = _core.layout(self._spec)[name]
        size = rows * columns
        return tensor_bytes(data) >= size and data.untyped_storage().size() >= size

    def _refuse_part(self, name: str) -> None:
        raise UnsupportedError(
            f"{type(self).__name__}: {name} are sharded and this rank holds a part of them, "
            "expected the whole (use the layer inside the forward of its FSDP unit, or "
            "quantal.fsdp.gathered(layer) on all ranks)"
        )

    # ------------------------------------------------------------------ the weight

    @property
    def weight(self) -> torch.Tensor:
        dense = self.__dict__.get("_dense")
        if dense is not None:  # an adapter is being merged
            return dense
        spec, dtype = self._spec, self.value_dtype
        whole = self._storage is torch.uint8 and type(self.codes).__name__ != "DTensor"
        whole = whole and not self._awaits_weights
        buffers = self._buffers_packed if whole else None

        def decode() -> torch.Tensor:
            return _ops.dequantize(*(buffers or self._buffers_packed), spec, dtype)

        shape = self._rows, self._cols
        return LazyWeight(decode, shape, dtype, self.codes.device, self.codes)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            if isinstance(value, LazyWeight) and value._source is self.codes:
                return  # tying what is tied already
            raise UnsupportedError(
                f"{type(self).__name__}: weight cannot be assigned, expected "
                "layer.quantize_weights(tensor)"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Nothing to reset: random initialisation of packed codes has no meaning."""

    @_check.arguments("QuantizedLinear.quantize_weights", weights=_check.tensor)
    def quantize_weights(self, weights: torch.Tensor) -> None:
        """Replaces the codes and statistics by those of a dense [rows, cols]."""
        expected = (self._rows, self._cols)
        if tuple(weights.shape) != expected:
            raise ShapeError(
                f"{type(self).__name__}: weights have shape {list(weights.shape)}, expected "
                f"{list(expected)}"
            )
        device = self.codes.device if self.codes.device.type != "meta" else weights.device
        self._set_buffers(*_ops.quantize(weights.to(device), self._spec))

    @_check.arguments(
        "dequantize_weights",
        dtype=_check.optional(_check.dtype),
        out=_check.optional(_check.tensor),
    )
    def dequantize_weights(
        self, dtype: torch.dtype | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The exact decoded values [rows, cols]: a new dense tensor, or `out` (contiguous; its
        dtype rules)."""
        if out is not None:
            if dtype is not None and parse_dtype(dtype) != out.dtype:
                raise DtypeError(f"dequantize_weights: out is {out.dtype}, expected {dtype}")
            return _ops.dequantize_out(out, self._buffers_packed, self._spec)
        return _ops.dequantize(
            *self._buffers_packed, self._spec, parse_dtype(dtype or self.value_dtype)
        )

    def _dequantize_rows(self, rows: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Exact values of some rows; needs statistics by row (``_row_runs``)."""
        codes, stats, shared = self._buffers_packed
        part = [*self._spec]
        codes, stats = codes[rows], stats[rows]
        part[1] = codes.shape[0]
        return _ops.dequantize(codes, stats, shared, part, dtype)

    @property
    def _row_runs(self) -> bool:
        return _core.layout(self._spec)["row_runs"]

    def packed_bytes(self) -> int:
        """Bytes of codes, statistics, shared tables and the spec."""
        return sum(map(tensor_bytes, (self.codes, self.stats, self.shared, self.spec)))

    # ------------------------------------------------------------------ damage

    def accept_bytes(self) -> None:
        """Takes the packed bytes as they are for right.

        Called wherever quantal or a state dict sets them. After writing into ``codes`` or ``stats``
        by other means, call it yourself: a save refuses bytes that changed unnoticed."""
        self.__dict__["_sums"] = _byte_sums(self.codes, self.stats)

    def bytes_changed(self) -> bool:
        """Whether something wrote into the packed bytes in place since they were set: a tool that
        averages parameters, for one. Bytes on the meta device or sharded ones are not looked at."""
        known = self.__dict__.get("_sums", (None, None))
        for before, now in zip(known, _byte_sums(self.codes, self.stats), strict=True):
            if before is not None and now is not None and int(before) != int(now):
                return True
        return False

    # ------------------------------------------------------------------ upstream's tensors

    @classmethod
    @_check.arguments(
        "from_upstream",
        tensors=_check.mapping,
        dialect=_check.text,
        prefix=_check.text,
        settings=_check.text,
        weight_shape=_check.is_a((tuple, list), "a tuple of sizes"),
    )
    def from_upstream(
        cls: type[_Module],
        tensors: dict[str, torch.Tensor],
        dialect: str,
        prefix: str = "",
        *,
        settings: str = "{}",
        weight_shape: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> _Module:
        """A layer from the tensors of one layer as the upstream package writes them.

        settings      JSON with what the dialect keeps outside of the tensors: mlx {"bits",
                      "group_size", "mode"}, quanto {"weights": "qint4"}
        weight_shape  of the dense weight, where tensors do not tell (quanto with groups)
        """
        for name, part in tensors.items():
            _check.text("from_upstream", "name of a tensor", name)
            _check.tensor("from_upstream", f"tensor '{name}'", part)
        parts = {n: (dtype_name(t.dtype), list(t.shape), bytes_of(t)) for n, t in tensors.items()}
        spec, codes, stats, shared = _core.import_layer(
            dialect, prefix, parts, settings, list(weight_shape)
        )
        buffers = [tensor_from(b, "u8", [r, c]) for r, c, b in (codes, stats)]
        buffers.append(tensor_from(shared, "u8", [len(shared)]))
        return cls.from_packed(spec, *buffers, **kwargs)  # type: ignore[attr-defined]

    @_check.arguments("to_upstream", prefix=_check.text)
    def to_upstream(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors of this layer (without its bias) as the upstream package names them."""
        exported = _core.export_layer(self._spec, *map(bytes_of, self._buffers_packed), prefix)
        return {n: tensor_from(t.data, t.dtype, t.shape) for n, t in exported.items()}

    # ------------------------------------------------------------------ state

    def _whole_bytes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """codes, stats and shared as uint8, gathered from all ranks where they are sharded."""
        if type(self.codes).__name__ != "DTensor":
            return self._buffers_packed
        codes, stats = whole_tensor(self.codes), whole_tensor(self.stats)
        if self._storage is not torch.uint8:
            codes, stats = self._bytes_of("codes", codes), self._bytes_of("stats", stats)
        return codes, stats, self.shared

    def _apply(self, fn, recurse=True):
        """Moves and casts of the module reach packed bytes as bytes, whatever they are seen as."""
        storage = self._storage
        seen = [self._parameters.get(name) for name in ("codes", "stats")]
        plain = [p for p in seen if p is not None and type(p).__name__ != "DTensor"]
        if storage is torch.uint8 or len(plain) < 2 or any(p.dtype is not storage for p in plain):
            return super()._apply(fn, recurse)
        shapes = [p.shape for p in plain]
        for p in plain:
            p.data = p.data.view(torch.uint8)
        super()._apply(fn, recurse)
        for name, shape in zip(("codes", "stats"), shapes, strict=True):
            p = self._parameters[name]
            p.data = p.data.view(storage).view(shape)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """State dicts hold bytes, whatever a layer sees them as."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._storage is torch.uint8:
            return
        for name in ("codes", "stats"):
            data = destination.get(prefix + name)
            if data is not None and self._is_whole(name, data):
                destination[prefix + name] = self._bytes_of(name, data)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        stored = state_dict.get(prefix + "spec")
        if stored is not None and stored.tolist() != self._spec:
            errors.append(
                f'spec of "{prefix[:-1]}" is {stored.tolist()}, expected {self._spec}: the '
                "state dict was written by a layer of another form"
            )
            state_dict = {
                k: v for k, v in state_dict.items() if k not in {prefix + n for n in BUFFERS}
            }
            strict = False
        state_dict = self._with_storage(state_dict, prefix)
        self.__dict__.pop("_row_squares", None)  # norms of the bytes that were there
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )
        self.accept_bytes()

    def _with_storage(self, state_dict, prefix):
        """The state dict with the bytes of this layer seen as the layer sees them."""
        seen = {}
        for name in ("codes", "stats"):
            data = state_dict.get(prefix + name)
            if data is not None and type(data).__name__ != "DTensor":
                if data.dtype is torch.uint8 and self._storage is not torch.uint8:
                    seen[prefix + name] = view_bytes(data, self._storage)
        return {**state_dict, **seen} if seen else state_dict
