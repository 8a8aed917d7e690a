"""The quantized embedding layer, for files whose embeddings are packed (mlx-lm, GGUF)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import _check, _ops
from ._errors import DtypeError, UnsupportedError
from ._packed import PackedWeight, checked_parts


class QuantizedEmbedding(PackedWeight, nn.Embedding):  # type: ignore[override]
    """``y = W[ids]`` with W kept as packed codes and statistics; decodes the rows it needs.

    A layer is made from existing buffers (``from_packed``, ``from_upstream``); ``forward`` returns
    ``compute_dtype``. Needs statistics that lie by row, as all formats that quantize embeddings
    have.
    """

    @_check.arguments(
        "QuantizedEmbedding",
        num_embeddings=_check.size,
        embedding_dim=_check.size,
        padding_idx=_check.optional(_check.size),
        compute_dtype=_check.optional(_check.dtype),
        device=_check.optional(_check.device),
    )
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        spec: list[int],
        padding_idx: int | None = None,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self._rows, self._cols = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._init_packed(spec, device)
        self.compute_dtype = compute_dtype or self.value_dtype
        if not self._row_runs:
            raise UnsupportedError(
                "QuantizedEmbedding: statistics are shared by rows, expected statistics by row"
            )

    @classmethod
    @_check.arguments(
        "QuantizedEmbedding.from_packed",
        codes=_check.tensor,
        stats=_check.tensor,
        shared=_check.tensor,
        padding_idx=_check.optional(_check.size),
        compute_dtype=_check.optional(_check.dtype),
    )
    def from_packed(
        cls,
        spec: list[int],
        codes: torch.Tensor,
        stats: torch.Tensor,
        shared: torch.Tensor,
        *,
        padding_idx: int | None = None,
        compute_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> QuantizedEmbedding:
        """A layer around existing buffers, which it takes over without a copy."""
        buffers = {"codes": codes, "stats": stats, "shared": shared}
        facts = checked_parts("from_packed", spec, buffers)
        layer = cls(
            facts["rows"],
            facts["cols"],
            spec=list(spec),
            padding_idx=padding_idx,
            compute_dtype=compute_dtype,
            device="meta",
        )
        layer._set_buffers(codes, stats, shared)
        return layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        """The embeddings [..., embedding_dim] of the row numbers `input` [...]."""
        if not isinstance(input, torch.Tensor):
            raise _check.wrong_type("QuantizedEmbedding", "input", input, "a torch.Tensor")
        if input.dtype not in (torch.int32, torch.int64):
            raise DtypeError(
                f"QuantizedEmbedding: input is {input.dtype}, expected torch.int64 or torch.int32"
            )
        rows = self._dequantize_rows(input.reshape(-1), self.value_dtype)
        return rows.to(self.compute_dtype).reshape(*input.shape, self.embedding_dim)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W.T``: the head of a model whose embeddings are tied."""
        if not isinstance(x, torch.Tensor):
            raise _check.wrong_type("QuantizedEmbedding.logits", "x", x, "a torch.Tensor")
        wide = x.to(self.compute_dtype)
        return _ops.linear(wide, *self._buffers_packed, None, self._spec).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {self.dialect} {self.bits}-bit "
            f"g{self.group_size}, compute_dtype={self.compute_dtype}"
        )
