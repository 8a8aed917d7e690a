"""The loss of a causal language model without the logits of a whole batch.

Logits are tokens x vocabulary: at 135 million parameters, 49152 words and 4096 tokens they take
0.8 GB in float32 and as much again for their gradient, more than the model. Here the output layer
runs over a few hundred tokens at a time and only one loss per token is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import _check
from ._errors import ConfigError, ShapeError, UnsupportedError

#: Tokens whose logits are in memory at once: 13 MB in float32 with a vocabulary of 49152, and four
#: times as much while their gradient is computed. More make the product no faster on a CPU.
CHUNK_TOKENS = 64
#: Label that no loss is computed for, as in torch.nn.functional.cross_entropy.
IGNORE = -100

Head = Callable[[torch.Tensor], torch.Tensor]


def _losses(head: Head, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(
        head(hidden).float(), labels, ignore_index=IGNORE, reduction="none"
    )


def _chunks(chunk: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(t.split(chunk) for t in tensors), strict=True)


def _rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.reshape(-1, t.shape[-1]) for t in tensors]


def _words(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.reshape(-1) for t in tensors]


def _plain_losses(
    head: Head, hidden: torch.Tensor, labels: torch.Tensor, chunk: int
) -> torch.Tensor:
    losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    for h, y, loss in _chunks(chunk, *_rows(hidden), *_words(labels, losses)):
        loss.copy_(_losses(head, h, y))
    return losses


class _FrozenHead(torch.autograd.Function):
    """Losses, and already in the forward pass the gradient of each by its own row of `hidden`: the
    backward pass multiplies rows by numbers, and no product of the head is computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Head, chunk: int):
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        gradient = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        for h, g, y, loss in _chunks(chunk, *_rows(hidden, gradient), *_words(labels, losses)):
            with torch.enable_grad():
                row = h.detach().requires_grad_(True)
                value = _losses(head, row, y)
                g.copy_(torch.autograd.grad(value.sum(), row)[0])
            loss.copy_(value.detach())
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, weight: torch.Tensor):  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * weight[..., None]).to(gradient.dtype), None, None, None


class _TrainedHead(torch.autograd.Function):
    """Losses; the backward pass computes each chunk's logits again, because the gradient by the
    head's parameters depends on the weight of every token."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Head, chunk: int, *trained: Any
    ):
        ctx.head, ctx.chunk, ctx.trained = head, chunk, trained
        kind = hidden.device.type
        enabled = torch.is_autocast_enabled(kind)
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled)
        ctx.save_for_backward(hidden, labels)
        return _plain_losses(head, hidden, labels, chunk)

    @staticmethod
    def backward(ctx: Any, weight: torch.Tensor):  # type: ignore[override]
        hidden, labels = ctx.saved_tensors
        gradient = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        sums: list[Any] = [torch.zeros_like(p) for p in ctx.trained]
        parts = *_rows(hidden, gradient), *_words(labels, weight)
        for h, g, y, w in _chunks(ctx.chunk, *parts):
            with torch.enable_grad(), ctx.autocast:
                row = h.detach().requires_grad_(True)
                value = _losses(ctx.head, row, y)
                first, *rest = torch.autograd.grad(value, (row, *ctx.trained), w)
            g.copy_(first)
            for total, part in zip(sums, rest, strict=True):
                total.add_(part)
        return gradient, None, None, None, *sums


@_check.arguments(
    hidden=_check.tensor,
    head=_check.function,
    labels=_check.tensor,
    chunk_tokens=_check.integer,
)
def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: nn.Module | Head,
    labels: torch.Tensor,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """``cross_entropy(head(hidden).float(), labels, reduction="none")``, a chunk at a time.

    hidden   [..., features], what enters the output layer
    head     the output layer, or a function; parameters of a module that ask for gradients get them
    labels   [...] word of each row; -100: no loss (0)
    returns  [...] float32 losses

    Losses and gradients are those of the whole product up to the order in which it sums over
    features. Memory: `chunk_tokens` rows of logits and their gradient, and one copy of `hidden`.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ShapeError(
            f"chunked_loss: labels have shape {list(labels.shape)}, expected "
            f"{list(hidden.shape[:-1])}"
        )
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens is {chunk_tokens}, expected at least 1")
    parameters = head.parameters() if isinstance(head, nn.Module) else ()
    return _dispatch(hidden, labels, head, chunk_tokens, parameters)


def _dispatch(hidden, labels, head: Head, chunk: int, parameters) -> torch.Tensor:
    trained = [p for p in parameters if p.requires_grad]
    if torch.is_grad_enabled() and trained:
        return _TrainedHead.apply(hidden, labels, head, chunk, *trained)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _FrozenHead.apply(hidden, labels, head, chunk)
    return _plain_losses(head, hidden, labels, chunk)


# ---------------------------------------------------------------------- a whole model


def _output_layer(model: Any) -> nn.Module:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if not isinstance(head, nn.Module):
        raise UnsupportedError(
            f"chunked_loss: {type(model).__name__} has no output layer that "
            "get_output_embeddings() names, expected one (use chunked_cross_entropy)"
        )
    return head


@contextlib.contextmanager
def _losses_as_output(head: nn.Module, labels: torch.Tensor, chunk: int) -> Iterator[list]:
    """Inside, calling `head` returns losses [batch, tokens] in the place of logits. The module's
    own hooks run as ever, so that FSDP gathers and frees its parameters."""
    own, seen = head.forward, []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[:-1] != labels.shape:
            raise ShapeError(
                f"chunked_loss: the output layer gets {list(hidden.shape[:-1])} rows, expected "
                f"those of labels {list(labels.shape)}"
            )
        losses = _dispatch(hidden, labels, own, chunk, head.parameters())
        seen.append(losses.detach())
        return losses

    had = "forward" in head.__dict__
    head.forward = forward  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        if had:
            head.forward = own  # type: ignore[method-assign]
        else:
            del head.__dict__["forward"]


@_check.arguments(
    model=_check.module,
    input_ids=_check.tensor,
    labels=_check.tensor,
    chunk_tokens=_check.integer,
)
def token_losses(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    **inputs: Any,
) -> torch.Tensor:
    """Loss of every position of a causal language model: [batch, tokens] float32, the last one 0.

    Position t predicts ``labels[:, t + 1]``; -100 means no loss (0). ``inputs`` go to the model
    (attention_mask, position_ids ...). Works on any model of transformers, with PEFT adapters and
    under FSDP, as it is: only the call of its output layer is another one meanwhile. A model that
    changes its logits afterwards (soft caps, scales) raises UnsupportedError.
    """
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens is {chunk_tokens}, expected at least 1")
    following = torch.full_like(labels, IGNORE)
    following[:, :-1] = labels[:, 1:]
    with _losses_as_output(_output_layer(model), following, chunk_tokens) as seen:
        out = model(input_ids=input_ids, use_cache=False, **inputs).logits
    if len(seen) != 1 or out.shape != seen[0].shape or not _same(out.detach(), seen[0]):
        raise UnsupportedError(
            f"chunked_loss: {type(model).__name__} changes what its output layer returns (a soft "
            "cap, a scale), expected logits as they are (use the model's own loss)"
        )
    return out


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@_check.arguments(
    model=_check.module, labels=_check.tensor, num_items=_check.optional(_check.integer)
)
def chunked_loss(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    num_items: int | None = None,
    **inputs: Any,
) -> torch.Tensor:
    """Mean loss of the next token, as ``model(input_ids, labels=labels).loss``, without the logits
    of the batch.

    num_items  what the sum is divided by; None: the number of predicted tokens. Give the count of a
               whole step where gradients are accumulated, so that every token weighs the same
    """
    losses = token_losses(model, input_ids, labels, chunk_tokens=chunk_tokens, **inputs)
    count = int((labels[:, 1:] != IGNORE).sum()) if num_items is None else num_items
    return losses.sum() / max(count, 1)


__all__ = ["CHUNK_TOKENS", "chunked_cross_entropy", "chunked_loss", "token_losses"]
