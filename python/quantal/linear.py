"""The quantized linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import _core, _ops
from ._dtypes import bytes_of, dtype_name, parse_dtype, tensor_bytes, tensor_from
from ._errors import ConfigError, ShapeError, UnsupportedError
from ._lazy import LazyWeight
from .config import QuantizationConfig

#: Elements that an error measurement or a conversion decodes at a time.
CHUNK_ELEMENTS = 1 << 20


def default_config() -> QuantizationConfig:
    """The config of layers that were built without one."""
    return QuantizationConfig()


def plan_layer(
    config: QuantizationConfig, name: str, out_features: int, in_features: int
) -> _core.Choice:
    """What policy does with one layer of a (resolved) config."""
    return _core.LayerRules(config.to_json()).choose(name, out_features, in_features)


class QuantizedLinear(nn.Linear):
    """``y = x @ W.T + bias`` with W kept as packed codes and statistics.

    ``codes`` [out_features, code_bytes] and ``stats`` are frozen uint8 parameters, ``shared`` and
    ``spec`` small buffers; ``spec`` says what the bytes mean and is checked when a state dict is
    loaded. ``weight`` stands for the exact decoded values: reading its shape, dtype or device
    decodes nothing, using it decodes for that one use, writing it raises. ``forward`` computes in
    ``compute_dtype`` and returns the dtype of its input.

    The arguments are those of ``nn.Linear`` with a config; ``spec`` (16 integers) replaces the
    config where the form is already known. A new layer holds zeros: call ``quantize_weights``.
    """

    codes: nn.Parameter
    stats: nn.Parameter
    shared: torch.Tensor
    spec: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: QuantizationConfig | None = None,
        *,
        spec: list[int] | None = None,
        compute_dtype: torch.dtype | None = None,
        bias_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        config = config if config is not None else default_config()
        if spec is None:
            choice = plan_layer(config, "", out_features, in_features)
            if not choice.quantize:
                raise ConfigError(f"QuantizedLinear: layer cannot be quantized: {choice.reason}")
            spec = _core.make_spec(out_features, in_features, choice.options)
            compute_dtype = compute_dtype or parse_dtype(choice.compute_dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.config = config
        self._set_spec(spec)
        self.compute_dtype = compute_dtype or config.compute_dtype or self.value_dtype
        layout = _core.layout(spec)
        for name in ("codes", "stats"):
            data = torch.zeros(layout[name], dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))
        shared = torch.zeros(layout["shared"], dtype=torch.uint8, device=device)
        self.register_buffer("shared", shared)
        self.register_buffer("spec", torch.tensor(spec, dtype=torch.int64))
        data = torch.zeros(out_features, dtype=bias_dtype or self.compute_dtype, device=device)
        self.register_parameter("bias", nn.Parameter(data) if bias else None)

    def _set_spec(self, spec: list[int]) -> None:
        facts = _core.describe(list(spec))
        if (facts["rows"], facts["cols"]) != (self.out_features, self.in_features):
            raise ShapeError(
                f"QuantizedLinear: spec is for [{facts['rows']}, {facts['cols']}], expected "
                f"[{self.out_features}, {self.in_features}]"
            )
        self._spec = [int(v) for v in spec]
        self.value_dtype = parse_dtype(facts["value_dtype"])
        self.bits: int = facts["bits"]
        self.group_size: int = facts["group_size"]
        self.dialect: str = facts["dialect"]

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        options: _core.QuantizeOptions | QuantizationConfig,
        *,
        config: QuantizationConfig | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """A quantized copy of `linear`, on its device; the bias is kept as it is."""
        weight = linear.weight.detach()
        if isinstance(options, QuantizationConfig):
            config = options
            choice = plan_layer(options, "", *weight.shape)
            if not choice.quantize:
                raise ConfigError(f"QuantizedLinear: layer cannot be quantized: {choice.reason}")
            options = choice.options
            compute_dtype = compute_dtype or parse_dtype(choice.compute_dtype)
        options = follow_weight_dtype(options, weight.dtype)
        spec = _core.make_spec(weight.shape[0], weight.shape[1], options)
        buffers = _ops.quantize(weight, spec)
        layer = cls.from_packed(spec, *buffers, config=config, compute_dtype=compute_dtype)
        layer.bias = linear.bias
        return layer.train(linear.training)

    @classmethod
    def from_packed(
        cls,
        spec: list[int],
        codes: torch.Tensor,
        stats: torch.Tensor,
        shared: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        config: QuantizationConfig | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """A layer around existing buffers, which it takes over without a copy."""
        facts = _core.describe(list(spec))
        layer = cls(
            facts["cols"],
            facts["rows"],
            False,
            config,
            spec=list(spec),
            compute_dtype=compute_dtype,
            device="meta",
        )
        layer._set_buffers(codes, stats, shared)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    @classmethod
    def from_upstream(
        cls,
        tensors: dict[str, torch.Tensor],
        dialect: str,
        prefix: str = "",
        *,
        settings: str = "{}",
        weight_shape: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> QuantizedLinear:
        """A layer from the tensors of one layer as the upstream package writes them.

        settings      JSON with what the dialect keeps outside of the tensors: mlx {"bits",
                      "group_size", "mode"}, quanto {"weights": "qint4"}
        weight_shape  of the dense weight, where tensors do not tell (quanto with groups)
        """
        parts = {n: (dtype_name(t.dtype), list(t.shape), bytes_of(t)) for n, t in tensors.items()}
        spec, codes, stats, shared = _core.import_layer(
            dialect, prefix, parts, settings, list(weight_shape)
        )
        buffers = [tensor_from(b, "u8", [r, c]) for r, c, b in (codes, stats)]
        buffers.append(tensor_from(shared, "u8", [len(shared)]))
        return cls.from_packed(spec, *buffers, **kwargs)

    def to_upstream(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors of this layer (without its bias) as the upstream package names them."""
        buffers = map(bytes_of, (self.codes, self.stats, self.shared))
        exported = _core.export_layer(self._spec, *buffers, prefix)
        return {n: tensor_from(t.data, t.dtype, t.shape) for n, t in exported.items()}

    def _set_buffers(self, codes: torch.Tensor, stats: torch.Tensor, shared: torch.Tensor) -> None:
        for name, data in (("codes", codes), ("stats", stats)):
            if not isinstance(data, nn.Parameter):
                data = nn.Parameter(data, requires_grad=False)
            setattr(self, name, data)  # a Parameter stays the same object: tied layers share it
        self.shared = shared

    # ------------------------------------------------------------------ the weight

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        dense = self.__dict__.get("_dense")
        if dense is not None:  # an adapter is being merged
            return dense
        buffers = self.codes, self.stats, self.shared
        spec, dtype = self._spec, self.value_dtype

        def decode() -> torch.Tensor:
            return _ops.dequantize(*buffers, spec, dtype)

        shape = (self.out_features, self.in_features)
        return LazyWeight(decode, shape, dtype, self.codes.device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise UnsupportedError(
                "QuantizedLinear: weight cannot be assigned, expected "
                "layer.quantize_weights(tensor)"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Nothing to reset: random initialisation of packed codes has no meaning."""

    def quantize_weights(self, weights: torch.Tensor) -> None:
        """Replaces the codes and statistics by those of a dense [out_features, in_features]."""
        expected = (self.out_features, self.in_features)
        if tuple(weights.shape) != expected:
            raise ShapeError(
                f"QuantizedLinear: weights have shape {list(weights.shape)}, expected "
                f"{list(expected)}"
            )
        device = self.codes.device if self.codes.device.type != "meta" else weights.device
        self._set_buffers(*_ops.quantize(weights.to(device), self._spec))

    def dequantize_weights(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The exact decoded values [out_features, in_features]; a new dense tensor."""
        dtype = dtype or self.value_dtype
        return _ops.dequantize(self.codes, self.stats, self.shared, self._spec, dtype)

    def relative_error(self, weights: torch.Tensor) -> float:
        """``||W - deq(W)|| / ||W||`` (Frobenius), decoded a slice of rows at a time."""
        rows, cols = self.out_features, self.in_features
        step = max(1, CHUNK_ELEMENTS // max(1, cols))
        if not _core.layout(self._spec)["row_runs"]:
            step = rows  # statistics are shared by rows: no slice of rows stands alone
        error = total = 0.0
        for begin in range(0, rows, step):
            end = min(rows, begin + step)
            part = [*self._spec]
            part[1] = end - begin
            stats = self.stats if step == rows else self.stats[begin:end]
            values = _ops.dequantize(self.codes[begin:end], stats, self.shared, part, torch.float32)
            dense = weights[begin:end].detach().float()
            error += float((dense - values).pow(2).sum(dtype=torch.float64))
            total += float(dense.pow(2).sum(dtype=torch.float64))
        return (error / total) ** 0.5 if total > 0 else 0.0

    def packed_bytes(self) -> int:
        """Bytes of codes, statistics, shared tables and the spec."""
        return sum(map(tensor_bytes, (self.codes, self.stats, self.shared, self.spec)))

    # ------------------------------------------------------------------ use

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        dense = self.__dict__.get("_dense")
        if dense is not None:
            return nn.functional.linear(x.to(dense.dtype), dense, self.bias).to(x.dtype)
        wide = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        y = _ops.linear(wide, self.codes, self.stats, self.shared, bias, self._spec)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.dialect} {self.bits}-bit "
            f"g{self.group_size}, compute_dtype={self.compute_dtype}"
        )

    # ------------------------------------------------------------------ state

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        stored = state_dict.get(prefix + "spec")
        if stored is not None and stored.tolist() != self._spec:
            errors.append(
                f'spec of "{prefix[:-1]}" is {stored.tolist()}, expected {self._spec}: the '
                "state dict was written by a layer of another form"
            )
            keys = ("codes", "stats", "shared", "spec")
            state_dict = {
                k: v for k, v in state_dict.items() if k not in {prefix + n for n in keys}
            }
            strict = False
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )


def follow_weight_dtype(
    options: _core.QuantizeOptions, dtype: torch.dtype
) -> _core.QuantizeOptions:
    """`options` with the value dtype of a dialect that decodes to the dtype of the weight."""
    if _core.keeps_weight_dtype(options.method):
        options.value_dtype = dtype_name(dtype)
    return options
