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
_mask_runs = torch.ops.quantal.mask_runs.default
_below_autograd = _ops._below_autograd
_any_autocast = torch._C._is_any_autocast_enabled
_refusal = _core.attention_refusal
#: Attribute of a mask: (its sizes and version, runs or None).
_RUNS = "_quantal_runs"
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_TWICE = (
    "attention: is differentiated twice, expected once (torch's "
    "scaled_dot_product_attention with SDPBackend.MATH can be)"
)


# ---------------------------------------------------------------------- the operators


def _setup(ctx, inputs, output) -> None:
    q, k, v, runs, causal, scale, with_gradient = inputs
    out, lse = output
    if not with_gradient:
        raise UnsupportedError("attention: with_gradient is False, expected True for a gradient")
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, runs, out, lse)
    ctx.causal, ctx.scale = causal, scale


def _gradients(ctx, grad, _):
    found = _backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *found, None, None, None, None


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
    def forward(ctx, q, k, v, runs, causal, scale):
        with _below_autograd():
            out, lse = _forward(q, k, v, runs, causal, scale, True)
        ctx.save_for_backward(q, k, v, runs, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None, None


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


def by_kernels(q, k, v, causal: bool, scale: float | None, mask=None) -> torch.Tensor | None:
    """The result, or None where the kernels are refused or `mask` says more than one run of keys
    for each query; causal is False beside one. DtypeError, DeviceError and ShapeError for tensors
    that do not belong together."""
    if _any_autocast():
        q, k, v = _autocast(q, k, v)
    _check_alike(q, k, v)
    if not q.is_cpu or not (type(q) in _TENSORS and type(k) in _TENSORS and type(v) in _TENSORS):
        return None
    recorded = is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if is_compiling():
        if mask is not None or _compiled_refusal(q, k, v, causal, recorded):
            return None
        return _forward(q, k, v, None, causal, _scale(q, scale), recorded)[0]
    name = _NAMES.get(q.dtype)
    if name is None or _refusal(q.shape, k.shape, v.shape, name, causal, recorded):
        return None
    runs = None
    if mask is not None:
        runs = _runs_of(mask, q.shape[0], q.shape[2], k.shape[2])
        if runs is None:
            return None
    if recorded:
        return _EagerAttention.apply(q, k, v, runs, causal, _scale(q, scale))
    with _below_autograd():
        return _forward(q, k, v, runs, causal, _scale(q, scale), False)[0]


def _runs_of(mask, batch: int, queries: int, keys: int) -> torch.Tensor | None:
    """The runs of keys that queries see, if they are one for each. A mask keeps them: all layers of
    a model share it."""
    if mask.dtype is not torch.bool or not mask.is_cpu or type(mask) not in _TENSORS:
        return None
    if mask.dim() > 2 and mask.shape[-3] != 1:
        return None
    state = batch, queries, keys, None if mask.is_inference() else mask._version
    held = getattr(mask, _RUNS, None)
    if held is None or held[0] != state or state[3] is None:
        try:
            found = _mask_runs(mask.expand(batch, 1, queries, keys))
        except RuntimeError:  # other sizes: torch's to refuse
            return None
        held = state, found if found.dim() == 3 else None
        setattr(mask, _RUNS, held)
    return held[1]


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
    if mask is not None:
        _check_sizes(q, k, v, causal)
        mask, causal = _causal_part(q, k, mask, causal), False
    out = by_kernels(q, k, v, causal, scale, mask)
    return _by_torch(q, k, v, causal, scale, mask) if out is None else out


# ---------------------------------------------------------------------- torch's


def _check_sizes(q, k, v, causal: bool) -> None:
    if not is_compiling():  # the answer is about kernels
        _refusal(q.shape, k.shape, v.shape, "f32", causal, False)


def _causal_mask(q, k) -> torch.Tensor:
    """True where a query looks; torch's is_causal begins at the first key."""
    queries, keys = q.shape[2], k.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril_(keys - queries)


def _causal_part(q, k, mask, causal: bool) -> torch.Tensor:
    """A checked `mask`, where a causal attention looks too."""
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise DtypeError(f"attention: mask is {mask.dtype}, expected torch.bool or a floating type")
    scores = (*q.shape[:3], k.shape[2])
    try:
        fits = torch.broadcast_shapes(mask.shape, scores) == scores
    except RuntimeError:
        fits = False
    if not fits:
        raise ShapeError(
            f"attention: mask has shape {list(mask.shape)}, expected one that broadcasts to "
            f"{list(scores)}"
        )
    if not causal or q.shape[2] == 1:
        return mask
    seen = _causal_mask(q, k)
    return mask & seen if mask.dtype is torch.bool else mask.masked_fill(~seen, float("-inf"))


def _by_torch(q, k, v, causal: bool, scale: float | None, mask) -> torch.Tensor:
    if _any_autocast():
        q, k, v = _autocast(q, k, v)
    _check_sizes(q, k, v, causal)
    grouped = q.shape[1] != k.shape[1]
    if q.shape[2] == 1:
        if grouped and mask is None:
            # One position sees all keys: heads that share them are rows of one query, uncopied.
            rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            return scaled_dot_product_attention(rows, k, v, scale=scale).reshape(q.shape)
        causal = False
    if causal and q.shape[2] != k.shape[2]:
        mask, causal = _causal_mask(q, k), False
    sharing = {"enable_gqa": True} if grouped else {}  # no symbolic bool in a graph
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, **sharing
    )
