"""The torch operators ``torch.ops.quantal.*``: loading, gradients, typed errors."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import is_grad_enabled
from torch.compiler import is_compiling

from . import _core
from ._dtypes import widest_float
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
        grad_bias = _sum_rows(grad, ctx.bias_dtype)
    return None, None, None, grad_bias, None


def _sum_rows(grad, dtype):
    return grad.flatten(0, -2).sum(0).to(dtype)


def _setup_int8(ctx, inputs, output) -> None:
    _setup_linear(ctx, inputs[:-1], output)


def _int8_backward(ctx, grad):
    return *_linear_backward(ctx, grad), None


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
    "quantal::linear_int8_activations", _linear_backward, setup_context=_setup_linear
)
torch.library.register_autograd("quantal::linear_int8", _int8_backward, setup_context=_setup_int8)
torch.library.register_autograd(
    "quantal::linear_grad_input", _grad_input_backward, setup_context=_setup_grad_input
)

#: Skips the autograd keys of the dispatcher, where the registered gradients are Python code.
_below_autograd = torch._C._AutoDispatchBelowAutograd


# Overloads, found once: looking one up costs as much as a small product.
_linear = torch.ops.quantal.linear.default
_linear_out = torch.ops.quantal.linear.out
_linear_int8_activations_out = torch.ops.quantal.linear_int8_activations.out
_linear_int8 = torch.ops.quantal.linear_int8.default
_linear_int8_activations = torch.ops.quantal.linear_int8_activations.default
_linear_grad_input = torch.ops.quantal.linear_grad_input.default
_quantize = torch.ops.quantal.quantize.default
_sampled_error = torch.ops.quantal.sampled_error.default
_byte_sums = torch.ops.quantal.byte_sums.default


class _EagerLinear(torch.autograd.Function):
    """The gradient of ``quantal::linear`` and of the products that round activations, in eager
    mode; compiled graphs use the registered ones.

    The packed buffers come in a tuple and hang on ctx instead of going through save_for_backward.
    They are frozen, so nothing is lost, and a checkpointed block whose last layer this is need not
    compute it again (non-reentrant checkpointing stops where the last saved tensor is back). Under
    FSDP2 they are the unsharded parameters, whose storage is freed after forward and filled again
    before backward."""

    @staticmethod
    def forward(ctx, x, bias, packed):
        codes, stats, shared, spec, product, *settings = ctx.packed = packed
        ctx.bias_dtype = None if bias is None else bias.dtype
        with _below_autograd():
            return product(x, codes, stats, shared, bias, spec, *settings)

    @staticmethod
    def backward(ctx, grad):
        codes, stats, shared, spec = ctx.packed[:4]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            if is_grad_enabled() and grad.requires_grad:  # differentiated once more
                grad_x = _linear_grad_input(grad, codes, stats, shared, spec)
            else:
                with _below_autograd():
                    grad_x = _linear_grad_input(grad, codes, stats, shared, spec)
        if ctx.needs_input_grad[1]:
            grad_bias = _sum_rows(grad, ctx.bias_dtype)
        return grad_x, grad_bias, None


_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _kind_of(
    tensor: torch.Tensor,
    buffers: Buffers | None,
    spec: Spec,
    width: int,
    out: tuple[torch.Tensor, int] | None = None,
) -> type:
    """Class of the failure of an operator, found by looking at its arguments again; a `tensor` on
    the meta device stands for what is expected; `out` with its expected last dimension."""
    layout = _core.layout(list(spec))  # raises the typed error of a bad spec itself
    if buffers is not None:
        for buffer, name in zip(buffers, ("codes", "stats", "shared"), strict=True):
            if buffer.dtype != torch.uint8:
                return DtypeError
            if tuple(buffer.shape) != tuple(layout[name]):
                return ShapeError
    place = tensor.device if buffers is None else buffers[0].device
    others = [*(buffers or ()), *(() if tensor.is_meta else (tensor,)), *(out[:1] if out else ())]
    if any(t.device != place for t in others):
        return DeviceError
    if tensor.dtype not in _WEIGHT_DTYPES:
        return DtypeError
    if tensor.dim() < 1 or tensor.shape[-1] != width:
        return ShapeError
    if out is not None:
        if out[0].dtype != tensor.dtype:
            return DtypeError
        if out[0].shape != (*tensor.shape[:-1], out[1]):
            return ShapeError
    quantizes = buffers is None  # by the CPU's rules, wherever the weight is
    if (tensor.is_cpu or quantizes) and not tensor.is_meta and not torch.isfinite(tensor).all():
        return UnsupportedError
    if out is not None and not out[0].is_contiguous():
        return ShapeError
    return QuantalError if place.type in ("cpu", "meta") else DeviceError


def cuda_status() -> str:
    """``on: <file>`` where the CUDA kernels are in use, else why they are not (docs/cuda.md)."""
    return torch.ops.quantal.cuda_status()


@contextlib.contextmanager
def _typed(
    tensor: torch.Tensor,
    buffers: Buffers | None,
    spec: Spec,
    width: int,
    out: tuple[torch.Tensor, int] | None = None,
) -> Iterator[None]:
    try:
        yield
    except QuantalError:
        raise
    except RuntimeError as error:
        message = str(error).split("\nException raised from")[0]
        raise _kind_of(tensor, buffers, spec, width, out)(message) from error


def quantize(weight: torch.Tensor, spec: Spec) -> Buffers:
    """Quantizes [..., cols] into the buffers (codes, stats, shared) of `spec`."""
    try:
        return _quantize(weight.detach(), spec)
    except RuntimeError:
        with _typed(weight, None, spec, int(spec[2])):
            raise


def sampled_error(weight: torch.Tensor, buffers: Buffers, spec: Spec) -> float:
    """``||W - deq(W)|| / ||W||`` of evenly spaced rows, about 2^13 values."""
    try:
        return _sampled_error(weight.detach(), *buffers, spec)
    except RuntimeError:
        with _typed(weight, buffers, spec, int(spec[2])):
            raise


def byte_sums(codes: torch.Tensor, stats: torch.Tensor) -> tuple[int, int]:
    """Sums, by words of 64 bits, of the bytes of two tensors of any dtype on the CPU."""
    return _byte_sums(codes, stats)


def dequantize(
    codes: torch.Tensor,
    stats: torch.Tensor,
    shared: torch.Tensor,
    spec: Spec,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The exact values as a matrix [rows, cols] of `dtype`."""
    try:
        return torch.ops.quantal.dequantize(codes, stats, shared, spec, dtype)
    except RuntimeError:
        expected = torch.empty(int(spec[1]), int(spec[2]), dtype=dtype, device="meta")
        with _typed(expected, (codes, stats, shared), spec, int(spec[2])):
            raise


def dequantize_out(out: torch.Tensor, buffers: Buffers, spec: Spec) -> torch.Tensor:
    """`dequantize` into a contiguous `out` [rows, cols] of its own dtype; an empty one is resized.
    No gradients."""
    _check_out(out, (out,))
    if out.numel() == 0:
        out.resize_(int(spec[1]), int(spec[2]))
    try:
        torch.ops.quantal.dequantize.out(*buffers, spec, out=out)
    except RuntimeError:
        expected = torch.empty(int(spec[1]), int(spec[2]), dtype=out.dtype, device="meta")
        with _typed(expected, buffers, spec, int(spec[2]), (out, int(spec[2]))):
            raise
    return out


def _needs_gradient(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def _product(
    product: Callable[..., torch.Tensor],
    typed: Callable[..., contextlib.AbstractContextManager[None]],
    x: torch.Tensor,
    codes: torch.Tensor,
    stats: torch.Tensor,
    shared: torch.Tensor,
    bias: torch.Tensor | None,
    spec: Spec,
    *settings: float,
) -> torch.Tensor:
    """`product` with its gradient in eager mode; its errors are given their class by `typed`."""
    if is_compiling():
        return product(x, codes, stats, shared, bias, spec, *settings)
    try:
        if _needs_gradient(x, bias):
            packed = codes, stats, shared, spec, product, *settings
            return _EagerLinear.apply(x, bias, packed)
        with _below_autograd():
            return product(x, codes, stats, shared, bias, spec, *settings)
    except RuntimeError:
        with typed(x, (codes, stats, shared), spec, int(spec[2])):
            raise


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    stats: torch.Tensor,
    shared: torch.Tensor,
    bias: torch.Tensor | None,
    spec: Spec,
) -> torch.Tensor:
    """``x @ W.T + bias`` from packed codes, differentiable in x and bias."""
    return _product(_linear, _typed, x, codes, stats, shared, bias, spec)


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
    through dequantized weights.

    The gradient passes the rounding straight through: ``dx = dy @ W`` with the dequantized W, exact
    for the outlier columns and bitsandbytes' choice for the others."""
    return _product(_linear_int8, _typed, x, codes, stats, shared, bias, spec, threshold)


def linear_int8_activations(
    x: torch.Tensor,
    codes: torch.Tensor,
    stats: torch.Tensor,
    shared: torch.Tensor,
    bias: torch.Tensor | None,
    spec: Spec,
) -> torch.Tensor:
    """`linear` with activations rounded to int8 in runs of columns (docs/performance.md).

    The gradient is that of `linear`: the rounding is passed straight through."""
    product = _linear_int8_activations
    return _product(product, _typed_int8, x, codes, stats, shared, bias, spec)


@contextlib.contextmanager
def _typed_int8(
    x: torch.Tensor,
    buffers: Buffers,
    spec: Spec,
    width: int,
    out: tuple[torch.Tensor, int] | None = None,
) -> Iterator[None]:
    """`_typed`, where the form of the weights may be the reason too."""
    try:
        with _typed(x, buffers, spec, width, out):
            yield
    except QuantalError as error:
        if type(error) is QuantalError and _core.int8_activations_refusal(list(spec)):
            raise UnsupportedError(str(error)) from error
        raise


def matmul(
    x: torch.Tensor, codes: torch.Tensor, stats: torch.Tensor, shared: torch.Tensor, spec: Spec
) -> torch.Tensor:
    """``x @ W`` from packed codes, differentiable in x."""
    with _typed(x, (codes, stats, shared), spec, int(spec[1])):
        return torch.ops.quantal.linear_grad_input(x, codes, stats, shared, spec)


def _check_out(out: torch.Tensor, operands: Sequence[torch.Tensor | None]) -> None:
    """torch's rule for out=, with torch's words."""
    if is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        raise RuntimeError(
            "functions with out=... arguments don't support automatic differentiation, but one of "
            "the arguments requires grad"
        )


def _sized(out: torch.Tensor, x: torch.Tensor, width: int) -> None:
    """An empty `out` is resized, as torch does."""
    if out.numel() == 0 and x.dim() > 0:
        out.resize_(*x.shape[:-1], width)


def _linear_into(
    product: Callable[..., None],
    typed: Callable[..., contextlib.AbstractContextManager[None]],
    out: torch.Tensor,
    x: torch.Tensor,
    buffers: Buffers,
    bias: torch.Tensor | None,
    spec: Spec,
) -> torch.Tensor:
    """`product` into `out`; its errors are given their class by `typed`."""
    _check_out(out, (x, bias, out))
    _sized(out, x, int(spec[1]))
    if is_compiling():
        product(x, *buffers, bias, spec, out=out)
        return out
    try:
        with _below_autograd():
            product(x, *buffers, bias, spec, out=out)
    except RuntimeError:
        with typed(x, buffers, spec, int(spec[2]), (out, int(spec[1]))):
            raise
    return out


def linear_out(
    out: torch.Tensor,
    x: torch.Tensor,
    buffers: Buffers,
    bias: torch.Tensor | None,
    spec: Spec,
) -> torch.Tensor:
    """`linear` into `out` [..., rows] of x's dtype; an empty one is resized. No gradients."""
    return _linear_into(_linear_out, _typed, out, x, buffers, bias, spec)


def linear_int8_activations_out(
    out: torch.Tensor,
    x: torch.Tensor,
    buffers: Buffers,
    bias: torch.Tensor | None,
    spec: Spec,
) -> torch.Tensor:
    """`linear_int8_activations` into `out`, as `linear_out`."""
    return _linear_into(_linear_int8_activations_out, _typed_int8, out, x, buffers, bias, spec)


def matmul_out(out: torch.Tensor, x: torch.Tensor, buffers: Buffers, spec: Spec) -> torch.Tensor:
    """`matmul` into `out` [..., cols] of x's dtype; an empty one is resized. No gradients."""
    _check_out(out, (x, out))
    _sized(out, x, int(spec[2]))
    with _typed(x, buffers, spec, int(spec[1]), (out, int(spec[2]))):
        torch.ops.quantal.linear_grad_input.out(x, *buffers, spec, out=out)
    return out


def row_square_sums(buffers: Buffers, spec: Spec) -> torch.Tensor:
    """Sums of squares of the exact values of each row, [rows], as `widest_float` of the device."""
    expected = torch.empty(0, int(spec[2]), device="meta")
    with _typed(expected, buffers, spec, int(spec[2])):
        return torch.ops.quantal.row_square_sums(*buffers, spec, widest_float(buffers[0].device))


def merge_survival(
    before: Buffers, after: Buffers, spec: Spec, target: torch.Tensor
) -> tuple[int, float, float, float]:
    """(codes changed, norm of the wanted change, surviving part, noise) of a matrix into which
    `target` was quantized; see quantal.MergeReport."""
    with _typed(target, before, spec, int(spec[2])):
        values = torch.ops.quantal.merge_survival(*before, *after, spec, target).tolist()
    return int(values[0]), values[1], values[2], values[3]
