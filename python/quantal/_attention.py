"""Attention by quantal's kernels where they are faster, else by torch's.

Which of them runs is decided in C++ (``quantal/attention_choice.h``).
"""

from __future__ import annotations

import torch
from torch import is_grad_enabled
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from torch.nn.functional import scaled_dot_product_attention

from . import _core, _ops
from ._dtypes import _NAMES
from ._errors import DeviceError, DtypeError, ShapeError, UnsupportedError

_forward = torch.ops.quantal.attention.default
_backward = torch.ops.quantal.attention_backward.default
_below_autograd = _ops._below_autograd
_any_autocast = torch._C._is_any_autocast_enabled
_refusal = _core.attention_refusal
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_TWICE = (
    "attention: is differentiated twice, expected once (torch's "
    "scaled_dot_product_attention with SDPBackend.MATH can be)"
)


# ---------------------------------------------------------------------- the operators


def _setup(ctx, inputs, output) -> None:
    q, k, v, causal, scale, with_gradient = inputs
    out, lse = output
    if not with_gradient:
        raise UnsupportedError("attention: with_gradient is False, expected True for a gradient")
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.causal, ctx.scale = causal, scale


def _gradients(ctx, grad, _):
    found = _backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *found, None, None, None


def _setup_backward(ctx, inputs, output) -> None:
    pass


def _no_second_gradient(ctx, *grads):
    raise UnsupportedError(_TWICE)


torch.library.register_autograd("quantal::attention", _gradients, setup_context=_setup)
torch.library.register_autograd(
    "quantal::attention_backward", _no_second_gradient, setup_context=_setup_backward
)


class _EagerAttention(torch.autograd.Function):
    """The gradient of ``quantal::attention`` in eager mode; compiled graphs use the registered
    one."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale):
        with _below_autograd():
            out, lse = _forward(q, k, v, causal, scale, True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


# ---------------------------------------------------------------------- the choice


def _constant_refusal(*arguments) -> str:
    """A graph is compiled for the answer of its sizes."""
    return _refusal(*arguments)


# What torch.compiler.assume_constant_result does, without the import of the compiler.
_constant_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _compiled_refusal(q, k, v, causal: bool, with_gradient: bool) -> str:
    known = torch.fx.experimental.symbolic_shapes.has_static_value  # loaded where this is traced
    sizes = *q.shape, *k.shape, *v.shape
    if not all(known(size) for size in sizes):
        return "sizes are symbolic, expected those of one graph"
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    return _constant_refusal(*shapes, _NAMES[q.dtype], causal, with_gradient)


def by_kernels(q, k, v, causal: bool, scale: float | None) -> torch.Tensor | None:
    """The result, or None where the kernels are refused. DtypeError, DeviceError and ShapeError for
    tensors that do not belong together."""
    if _any_autocast():
        q, k, v = _autocast(q, k, v)
    _check_alike(q, k, v)
    if (
        not q.is_cpu
        or type(q) not in _TENSORS
        or type(k) not in _TENSORS
        or type(v) not in _TENSORS
    ):
        return None
    recorded = is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if is_compiling():
        if _compiled_refusal(q, k, v, causal, recorded):
            return None
        return _forward(q, k, v, causal, _scale(q, scale), recorded)[0]
    name = _NAMES.get(q.dtype)
    if name is None or _refusal(q.shape, k.shape, v.shape, name, causal, recorded):
        return None
    if recorded:
        return _EagerAttention.apply(q, k, v, causal, _scale(q, scale))
    with _below_autograd():
        return _forward(q, k, v, causal, _scale(q, scale), False)[0]


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check_alike(q, k, v) -> None:
    dtype, device = q.dtype, q.device
    if k.dtype is dtype and v.dtype is dtype and k.device == device and v.device == device:
        return
    for name, t in (("k", k), ("v", v)):
        if t.dtype is not dtype:
            raise DtypeError(f"attention: {name} is {t.dtype}, expected {dtype} as q")
        if t.device != device:
            raise DeviceError(f"attention: {name} is on {t.device}, expected {device} as q")


def _autocast(q, k, v):
    """As autocast has torch's attention."""
    device = q.device.type
    if q.is_meta or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return [t if t.dtype is torch.float64 else t.to(dtype) for t in (q, k, v)]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """``quantal.functional.attention``."""
    out = by_kernels(q, k, v, causal, scale) if mask is None else None
    return _by_torch(q, k, v, causal, scale, mask) if out is None else out


# ---------------------------------------------------------------------- torch's


def _by_torch(q, k, v, causal: bool, scale: float | None, mask) -> torch.Tensor:
    if _any_autocast():
        q, k, v = _autocast(q, k, v)
    _check_alike(q, k, v)
    if not is_compiling():  # the sizes; the answer is about kernels
        _core.attention_refusal(q.shape, k.shape, v.shape, "f32", causal, False)
        if mask is not None:
            _check_mask(mask, (*q.shape[:3], k.shape[2]))
    grouped = q.shape[1] != k.shape[1]
    if q.shape[2] == 1:
        if grouped and mask is None:
            # One position sees all keys: heads that share them are rows of one query, uncopied.
            rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            return scaled_dot_product_attention(rows, k, v, scale=scale).reshape(q.shape)
        causal = False
    if causal and (mask is not None or q.shape[2] != k.shape[2]):
        mask, causal = _causal_mask(q, k, mask), False
    sharing = {"enable_gqa": True} if grouped else {}  # no symbolic bool in a graph
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, **sharing
    )


def _check_mask(mask, scores: tuple[int, ...]) -> None:
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise DtypeError(f"attention: mask is {mask.dtype}, expected torch.bool or a floating type")
    try:
        fits = torch.broadcast_shapes(mask.shape, scores) == scores
    except RuntimeError:
        fits = False
    if not fits:
        raise ShapeError(
            f"attention: mask has shape {list(mask.shape)}, expected one that broadcasts to "
            f"{list(scores)}"
        )


def _causal_mask(q, k, mask) -> torch.Tensor:
    """`mask` where a query looks at keys up to its own; torch's is_causal begins at the first."""
    queries, keys = q.shape[2], k.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril_(keys - queries)
    if mask is None:
        return seen
    if mask.dtype is torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, float("-inf"))
