"""A packed linear layer and its LoRA adapter in one step, ``x W^T + bias + scaling (x A^T) B^T``.

PEFT casts x to the adapter's dtype, multiplies twice, scales, adds and casts back: eight passes
over the activations, as many in backward, each rounded where the adapter is bfloat16 (as FSDP2's
mixed precision hands it over). The operators read x, A and B as they are and add to the product
where it lies; sums are float32, the result and each gradient are rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as nn_module

from . import _ops
from .linear import PackedLinear

_add = torch.ops.quantal.add_low_rank_.default
_backward = torch.ops.quantal.low_rank_backward_.default
_below_autograd = _ops._below_autograd
_any_autocast = torch._C._is_any_autocast_enabled
_hooks_of_saving = torch._C._autograd._top_saved_tensors_default_hooks
#: Types of tensors that are what they look like, whole and here.
_PLAIN = (torch.Tensor, nn.Parameter)
_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


# ---------------------------------------------------------------------- the product


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _values(x, seen, a, b, bias, base, scaling):
    """The product, and ``scaling seen A^T`` [rows, rank], which the gradient needs."""
    codes, stats, shared, spec, dtype = base
    bias = None if bias is None else _cast(bias, dtype)
    with _below_autograd():
        y = _cast(_ops._linear(_cast(x, dtype), codes, stats, shared, bias, spec), x.dtype)
        return y, _add(y, seen, a, b, scaling)


class _Keep(torch.autograd.Function):
    """Saves what the gradient of an adapter needs ahead of the product.

    Non-reentrant checkpointing computes a block again up to its last saved tensor. Where that is
    saved here, the product of the block's last layer is not part of it."""

    @staticmethod
    def forward(ctx, seen, a, b, keeper):
        ctx.save_for_backward(seen, a, b)
        keeper.append(ctx)
        return seen.view_as(seen)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


class _EagerLoraLinear(torch.autograd.Function):
    """`dropped` is what the adapter sees where that is not x; `keeper` holds the ctx of a _Keep, or
    nothing. The packed buffers hang on ctx, as those of ``_ops._EagerLinear`` do, with its
    reasons."""

    @staticmethod
    def forward(ctx, x, dropped, a, b, bias, base, scaling, keeper):
        seen = x if dropped is None else dropped
        y, t = _values(x, seen, a, b, bias, base, scaling)
        if not keeper:
            ctx.save_for_backward(seen, t, a, b)
        ctx.keeper = keeper
        ctx.base, ctx.scaling, ctx.drops = base, scaling, dropped is not None
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, grad):
        if ctx.keeper:
            seen, a, b = ctx.keeper[0].saved_tensors
            t = None  # computed again where it is needed
        else:
            seen, t, a, b = ctx.saved_tensors
        codes, stats, shared, spec, dtype = ctx.base
        for_x, for_dropped, for_a, for_b, for_bias = ctx.needs_input_grad[:5]
        of_bias = _ops._sum_rows(grad, ctx.bias_dtype) if for_bias else None
        if is_grad_enabled():  # to be differentiated once more
            of_x = _ops._linear_grad_input(grad.to(dtype), codes, stats, shared, spec)
            low, of_a, of_b = _differentiable(grad, seen, a, b, ctx.scaling)
            of_x = of_x.to(grad.dtype)
            pair = (of_x, low) if ctx.drops else (of_x + low, None)
            return *pair, of_a, of_b, of_bias, None, None, None
        grad = grad.contiguous()
        of_x = of_dropped = of_a = of_b = None
        with _below_autograd():
            if for_x:
                wide = _cast(grad, dtype)
                of_x = _ops._linear_grad_input(wide, codes, stats, shared, spec)
                of_x = _cast(of_x, grad.dtype)
            if for_dropped:
                of_dropped = torch.zeros(seen.shape, dtype=seen.dtype)
            into = of_dropped if ctx.drops else of_x
            if for_a or for_b or into is not None:
                if t is None:
                    t = _low(seen, a, b, ctx.scaling)
                of_a, of_b = _backward(into, grad, seen, t, a, b, ctx.scaling)
        return of_x, of_dropped, of_a, of_b, of_bias, None, None, None


def _low(seen, a, b, scaling):
    """``scaling seen A^T``, from a product with nothing to add to."""
    return _add(seen.new_empty((*seen.shape[:-1], 0)), seen, a, b[:0], scaling)


def _differentiable(grad, seen, a, b, scaling):
    """Gradients of ``scaling (seen A^T) B^T`` in torch's operators."""
    g = grad.reshape(-1, grad.shape[-1]).float()
    rows = seen.reshape(-1, seen.shape[-1]).float()
    wide_a, wide_b = a.float(), b.float()
    d = scaling * (g @ wide_b)
    low = (d @ wide_a).to(seen.dtype).reshape(seen.shape)
    of_b = g.T @ (scaling * (rows @ wide_a.T))
    return low, (d.T @ rows).to(a.dtype), of_b.to(b.dtype)


def _recorded(*tensors: torch.Tensor | None) -> bool:
    return is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---------------------------------------------------------------------- layers of PEFT


def _untouched(module: Any) -> bool:
    """Whether a call of `module` runs nothing but the forward of its class."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def _plain_base(layer: Any) -> PackedLinear | None:
    """The packed layer under `layer` where its product is the exact one."""
    base = layer._modules.get("base_layer")
    if type(base) is not PackedLinear or not _untouched(base):
        return None
    own = base.__dict__
    if own["int8_threshold"] is not None or own.get("_int8_activations"):
        return None
    return base if own.get("_dense") is None else None  # an adapter is being merged


def _plain_matrix(module: Any, shape: tuple[int, int]) -> torch.Tensor | None:
    """The weight of a linear layer of an adapter, whole and on the CPU."""
    if type(module) is not nn.Linear or not _untouched(module):
        return None
    parameters = module._parameters
    if parameters.get("bias") is not None:
        return None
    weight: Any = parameters.get("weight")
    if weight is None:  # FSDP1 hangs plain tensors on the module
        weight = module.weight
    plain = type(weight) in _PLAIN and weight.dtype in _ops._WEIGHT_DTYPES and weight.is_cpu
    return weight if plain and weight.shape == shape else None


def _only_adapter(layer: Any, x: Any) -> str | None:
    """The one adapter that a call of `layer` with `x` adds as plain LoRA."""
    if layer._disable_adapters or layer.merged_adapters or type(x) not in _PLAIN:
        return None
    if not x.is_cpu or x.dtype not in _ops._WEIGHT_DTYPES:
        return None
    active = layer._active_adapter
    if type(active) is not str:
        if len(active) != 1:
            return None
        (active,) = active
    if active in layer.lora_variant or type(layer.scaling.get(active)) not in (float, int):
        return None  # a tensor: PEFT's hotswapping
    return active


def _autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """That of a product of `x`, on the CPU, under autocast."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def lora_product(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """What PEFT's ``lora.Linear.forward(x)`` gives, up to rounding; None where this way does not do
    all that a call of that layer would."""
    if is_compiling() or any(_GLOBAL_HOOKS):
        return None
    name = _only_adapter(layer, x)
    base = None if name is None else _plain_base(layer)
    if base is None:
        return None
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules.get(name), modules["lora_B"]._modules.get(name)
    rank = layer.r.get(name)
    a = _plain_matrix(lora_a, (rank, layer.in_features))
    b = None if a is None else _plain_matrix(lora_b, (layer.out_features, rank))
    dropout: Any = modules["lora_dropout"]._modules.get(name)
    if a is None or b is None or not _untouched(dropout):
        return None
    if b.dtype is not a.dtype or not (x.dtype is a.dtype or layer.cast_input_dtype_enabled):
        return None  # PEFT's products refuse them
    codes, stats, shared = base._buffers_packed
    if not codes.is_cpu:
        return None
    if _any_autocast():
        expected = _autocast_dtype(x)
        if expected not in (x.dtype, base.compute_dtype):
            return None  # the base reads x as it is
        x = _cast(x, expected)
    parameters: dict[str, Any] = base._parameters
    bias = parameters["bias"] if "bias" in parameters else base.bias
    dropped = None if type(dropout) is nn.Identity else dropout(x)
    if dropped is x:
        dropped = None
    packed = codes, stats, shared, base._spec, base.compute_dtype
    return _product(x, dropped, a, b, bias, packed, layer.scaling[name])


def _product(x, dropped, a, b, bias, base, scaling):
    try:
        if _recorded(x, dropped, a, b, bias):
            keeper: list[Any] = []
            if _hooks_of_saving(False) is not None:  # a checkpoint
                if dropped is not None:
                    if dropped.requires_grad:
                        dropped = _Keep.apply(dropped, a, b, keeper)
                elif x.requires_grad:
                    x = _Keep.apply(x, a, b, keeper)
            return _EagerLoraLinear.apply(x, dropped, a, b, bias, base, scaling, keeper)
        return _values(x, x if dropped is None else dropped, a, b, bias, base, scaling)[0]
    except RuntimeError:
        codes, stats, shared, spec, _ = base
        with _ops._typed(x, (codes, stats, shared), spec, int(spec[2])):
            raise
