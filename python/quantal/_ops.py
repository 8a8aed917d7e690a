"""The torch operators ``torch.ops.quantal.*``: loading, gradients, typed errors."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

import torch

from . import _core
from ._errors import DeviceError, DtypeError, QuantalError, ShapeError, UnsupportedError

_LIBRARY = "quantal_ops.so"
Spec = Sequence[int]
Buffers = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _load() -> None:
    if hasattr(torch.ops.quantal, "linear"):  # a program that links quantal::torch has them already
        return
    torch.ops.load_library(str(pathlib.Path(__file__).with_name(_LIBRARY)))


def _setup_linear(ctx, inputs, output) -> None:
    x, codes, stats, shared, bias, spec = inputs
    ctx.save_for_backward(codes, stats, shared)
    ctx.spec = spec
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad):
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.quantal.linear_grad_input(grad, *ctx.saved_tensors, ctx.spec)
    return grad_x, *_bias_gradient(ctx, grad)


def _bias_gradient(ctx, grad):
    """Gradients of all inputs after x: only a bias can have one."""
    grad_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return None, None, None, grad_bias, None


def _setup_grad_input(ctx, inputs, output) -> None:
    _, codes, stats, shared, spec = inputs
    ctx.save_for_backward(codes, stats, shared)
    ctx.spec = spec


def _grad_input_backward(ctx, grad):
    codes, stats, shared = ctx.saved_tensors
    grad = torch.ops.quantal.linear(grad, codes, stats, shared, None, ctx.spec)
    return grad, None, None, None, None


_load()
torch.library.register_autograd("quantal::linear", _linear_backward, setup_context=_setup_linear)
torch.library.register_autograd(
    "quantal::linear_grad_input", _grad_input_backward, setup_context=_setup_grad_input
)

#: Skips the autograd keys of the dispatcher, where the registered gradients are Python code.
_below_autograd = torch._C._AutoDispatchBelowAutograd


class _EagerLinear(torch.autograd.Function):
    """The gradient of ``quantal::linear`` in eager mode; compiled graphs use the registered one.

    The packed buffers hang on ctx instead of going through save_for_backward. They are frozen, so
    nothing is lost, and a checkpointed block whose last layer this is need not compute it again
    (non-reentrant checkpointing stops where the last saved tensor is back)."""

    @staticmethod
    def forward(ctx, x, codes, stats, shared, bias, spec):
        ctx.buffers = codes, stats, shared
        ctx.spec = spec
        ctx.bias_dtype = None if bias is None else bias.dtype
        with _below_autograd():
            return torch.ops.quantal.linear(x, codes, stats, shared, bias, spec)

    @staticmethod
    def backward(ctx, grad):
        grad_x = None
        if ctx.needs_input_grad[0]:
            product = torch.ops.quantal.linear_grad_input
            if torch.is_grad_enabled() and grad.requires_grad:  # differentiated once more
                grad_x = product(grad, *ctx.buffers, ctx.spec)
            else:
                with _below_autograd():
                    grad_x = product(grad, *ctx.buffers, ctx.spec)
        return grad_x, *_bias_gradient(ctx, grad)


_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _kind_of(tensor: torch.Tensor, buffers: Buffers | None, spec: Spec, width: int) -> type:
    """Class of the failure of an operator, found by looking at its arguments again."""
    layout = _core.layout(list(spec))  # raises the typed error of a bad spec itself
    if buffers is not None:
        for buffer, name in zip(buffers, ("codes", "stats", "shared"), strict=True):
            if buffer.dtype != torch.uint8:
                return DtypeError
            if tuple(buffer.shape) != tuple(layout[name]):
                return ShapeError
    if tensor.device.type not in ("cpu", "meta"):
        return DeviceError
    if tensor.dtype not in _WEIGHT_DTYPES:
        return DtypeError
    if tensor.dim() < 1 or tensor.shape[-1] != width:
        return ShapeError
    if tensor.device.type != "meta" and not torch.isfinite(tensor).all():
        return UnsupportedError
    return QuantalError


@contextlib.contextmanager
def _typed(tensor: torch.Tensor, buffers: Buffers | None, spec: Spec, width: int) -> Iterator[None]:
    try:
        yield
    except QuantalError:
        raise
    except RuntimeError as error:
        message = str(error).split("\nException raised from")[0]
        raise _kind_of(tensor, buffers, spec, width)(message) from error


def quantize(weight: torch.Tensor, spec: Spec) -> Buffers:
    """Quantizes [..., cols] into the buffers (codes, stats, shared) of `spec`."""
    with _typed(weight, None, spec, int(spec[2])):
        return torch.ops.quantal.quantize(weight.detach(), spec)


def dequantize(
    codes: torch.Tensor,
    stats: torch.Tensor,
    shared: torch.Tensor,
    spec: Spec,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The exact values as a matrix [rows, cols] of `dtype`."""
    with _typed(codes, (codes, stats, shared), spec, -1):
        return torch.ops.quantal.dequantize(codes, stats, shared, spec, dtype)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    stats: torch.Tensor,
    shared: torch.Tensor,
    bias: torch.Tensor | None,
    spec: Spec,
) -> torch.Tensor:
    """``x @ W.T + bias`` from packed codes, differentiable in x and bias."""
    if torch.compiler.is_compiling():
        return torch.ops.quantal.linear(x, codes, stats, shared, bias, spec)
    try:
        trained = x.requires_grad or (bias is not None and bias.requires_grad)
        if trained and torch.is_grad_enabled():
            return _EagerLinear.apply(x, codes, stats, shared, bias, spec)
        with _below_autograd():
            return torch.ops.quantal.linear(x, codes, stats, shared, bias, spec)
    except RuntimeError:
        with _typed(x, (codes, stats, shared), spec, int(spec[2])):
            raise


def linear_int8(
    x: torch.Tensor,
    codes: torch.Tensor,
    stats: torch.Tensor,
    shared: torch.Tensor,
    bias: torch.Tensor | None,
    spec: Spec,
    threshold: float,
) -> torch.Tensor:
    """The product of LLM.int8: activations rounded to int8 by row, entries of at least `threshold`
    through dequantized weights. Not differentiable."""
    with _typed(x, (codes, stats, shared), spec, int(spec[2])):
        return torch.ops.quantal.linear_int8(x, codes, stats, shared, bias, spec, threshold)
