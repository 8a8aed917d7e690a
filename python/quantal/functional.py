"""Products with a packed weight, spelled as ``torch.nn.functional.linear`` and ``torch.matmul``;
attention."""

from __future__ import annotations

import torch

from . import _attention, _check, _ops
from ._packed import PackedWeight


def _packed(where: str, weight: PackedWeight) -> PackedWeight:
    if not isinstance(weight, PackedWeight):
        raise _check.wrong_type(where, "weight", weight, "a quantized layer")
    return weight


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    activations: str = "exact",
) -> torch.Tensor:
    """``x @ W.T + bias`` in the dtype of x, W being the exact values of a quantized layer.

    activations  "int8": x is rounded to int8 in runs of columns and multiplied with the codes in
                 integers (docs/performance.md has the error); UnsupportedError for forms that have
                 no such product

    The layer's own bias and ``compute_dtype`` play no part. Differentiable in x and bias; with
    `out` (the result's shape and dtype; an empty tensor is resized) it is not, as in torch.
    """
    layer = _packed("linear", weight)
    _check.tensor("linear", "x", x)
    for name, value in (("bias", bias), ("out", out)):
        if value is not None:
            _check.tensor("linear", name, value)
    if activations != "exact" and _check.activations("linear", activations):
        if out is None:
            return _ops.linear_int8_activations(x, *layer._buffers_packed, bias, layer._spec)
        return _ops.linear_int8_activations_out(out, x, layer._buffers_packed, bias, layer._spec)
    if out is None:
        return _ops.linear(x, *layer._buffers_packed, bias, layer._spec)
    return _ops.linear_out(out, x, layer._buffers_packed, bias, layer._spec)


def matmul(
    x: torch.Tensor, weight: PackedWeight, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ W`` in the dtype of x: [..., rows] to [..., cols]. `out` as in `linear`."""
    layer = _packed("matmul", weight)
    _check.tensor("matmul", "x", x)
    if out is not None:
        _check.tensor("matmul", "out", out)
    if out is None:
        return _ops.matmul(x, *layer._buffers_packed, layer._spec)
    return _ops.matmul_out(out, x, layer._buffers_packed, layer._spec)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """``softmax(scale q k^T) v`` over the keys that a query sees, [batch, heads, queries, dim].

    q       [batch, heads, queries, dim]
    k, v    [batch, kv_heads, keys, dim]; head h reads those of head ``h // (heads // kv_heads)``
    causal  query i sees keys 0 .. keys - queries + i: the last query sees the last key
    scale   of the scores; None: 1 / sqrt(dim)
    mask    as torch's attn_mask, broadcast to [batch, heads, queries, keys]: bool, True where a key
            is seen, or numbers that are added to the scores

    By quantal's kernels where they are faster than torch's (docs/python.md): on the CPU, without a
    mask or with a bool one that is the same for all heads and one run of keys for each query. Else
    by ``torch.nn.functional.scaled_dot_product_attention``. Differentiable once where the kernels
    run. Autocast casts as it does for torch's.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        _check.tensor("attention", name, value)
    _check.flag("attention", "causal", causal)
    if scale is not None:
        scale = _check.real("attention", "scale", scale)
    if mask is not None:
        _check.tensor("attention", "mask", mask)
    return _attention.attention(q, k, v, causal, scale, mask)
