"""``attn_implementation="quantal"`` of transformers, and which models run with it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from . import _attention, _check, _core
from ._dtypes import _NAMES
from ._errors import ConfigError, DtypeError, ShapeError, UnsupportedError
from ._on_import import when_imported

NAME = "quantal"
AUTO = "auto"
_MODELING = "transformers.modeling_utils"
#: Implementations that "auto" may change: what transformers chooses itself, and its own answer.
_USUAL = ("sdpa", NAME)

_log = logging.getLogger("quantal")


# ---------------------------------------------------------------------- the functions


def _make_attention(by_torch: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function of transformers: `by_torch` is its sdpa_attention_forward."""

    def quantal_attention_forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """What sdpa_attention_forward gives: by quantal's kernels where they take it."""
        if is_causal is None:
            causal = query.shape[2] > 1 and attention_mask is None
            is_causal = causal and getattr(module, "is_causal", True)
        if not dropout and _means_the_same(query, key, attention_mask, is_causal, kwargs):
            mask = attention_mask
            if mask is not None and mask.dim() == 4 and mask.shape[3] > key.shape[2]:
                mask = mask[..., : key.shape[2]]  # as torch's
            try:
                out = _attention.by_kernels(query, key, value, bool(is_causal), scaling, mask)
            except (ShapeError, DtypeError):  # torch's to judge
                out = None
            if out is not None:
                return out.transpose(1, 2), None  # dense: the kernels write it so
        return by_torch(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )

    return quantal_attention_forward


def _means_the_same(
    query: Any, key: Any, mask: Any, is_causal: Any, kwargs: dict[str, Any]
) -> bool:
    """Whether quantal's attention is what torch's would be: torch's is_causal begins at the first
    key, ours ends at the last."""
    if is_causal and (mask is not None or query.shape[2] != key.shape[2]):
        return False
    if kwargs and (kwargs.get("output_attentions") or kwargs.get("head_mask") is not None):
        return False  # torch's warns
    return not torch.jit.is_tracing()


def _make_mask(by_torch: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function of transformers: `by_torch` is its sdpa_mask."""

    def quantal_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The mask of sdpa, or None where it says no more than that attention is causal: for a
        batch without padding whose positions are not packed transformers makes such a one in every
        training step."""
        mask = by_torch(*args, **kwargs)
        if mask is None or torch.compiler.is_compiling():
            return mask
        if not mask.is_cpu or mask.dtype is not torch.bool or mask.shape[-2] != mask.shape[-1]:
            return mask
        causal = torch.ones(mask.shape[-2:], dtype=torch.bool).tril_()
        return None if torch.equal(mask, causal.expand_as(mask)) else mask

    return quantal_mask


# ---------------------------------------------------------------------- registering


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _make_attention(sdpa_attention_forward))
    AttentionMaskInterface.register(NAME, _make_mask(sdpa_mask))


def register_attention() -> None:
    """Makes ``attn_implementation="quantal"`` known to transformers.

    ``import quantal`` sees to that as soon as transformers is imported, so that only a program that
    manipulates its registry needs this. UnsupportedError for versions below 4.53, which have no
    registry of masks."""
    try:
        _register()
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"register_attention: transformers has no registry of attentions and masks ({error}), "
            "expected transformers >= 4.53"
        ) from error


def register_lazily() -> None:
    """Registers now if transformers is loaded, else as soon as it is; older versions are left as
    they are."""

    def register() -> None:
        try:
            _register()
        except (ImportError, AttributeError) as error:
            _log.debug("attention is not registered: %s", error)

    when_imported(_MODELING, register)


# ---------------------------------------------------------------------- choosing


class Choice(NamedTuple):
    """The attention of a model."""

    name: str  #: of transformers
    reason: str  #: why "auto" did not choose "quantal"; empty if it did or was not asked

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def _heads(config: Any) -> tuple[int, int, int] | None:
    """(heads, heads of keys, values of a head); None for a config without them."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    if not (isinstance(heads, int) and isinstance(width, int) and heads > 0):
        return None
    shared = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or width // heads
    known = isinstance(shared, int) and isinstance(dim, int) and heads % shared == 0
    return (heads, shared, dim) if known else None


def _refusal(model: Any, dtype: torch.dtype | None, training: bool) -> str:
    """Why "auto" leaves a model with the attention that it has, or an empty text."""
    current = model.config._attn_implementation
    if current not in _USUAL:
        return f"it is that of its config, expected one of {', '.join(_USUAL)}"
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} has no attention that can be chosen"
    sizes = _heads(model.config)
    if sizes is None:
        return f"{type(model.config).__name__} names no heads"
    return _core.attention_gain_refusal(*sizes, _NAMES[dtype or _dtype_of(model)], training)


def _dtype_of(model: Any) -> torch.dtype:
    """Of the embeddings, which queries and keys have too."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # a model of something else than tokens
        weight = None
    return model.dtype if weight is None else weight.dtype


def set_attention(
    where: str,
    model: Any,
    implementation: str = AUTO,
    *,
    dtype: torch.dtype | None = None,
    training: bool = False,
) -> Choice | None:
    """Sets the attention of a model of transformers; None where "auto" was asked for another model.

    implementation  a name of transformers, "quantal" included, or "auto": "quantal" where the C++
                    rule finds that such heads are faster with it, else what the model has
    dtype           of queries and keys; None: that of the embeddings
    training        many positions with gradients, else the reading and generating of text
    """
    _check.text(where, "attn_implementation", implementation)
    if not _is_transformers(model):
        if implementation == AUTO:
            return None
        raise ConfigError(
            f"{where}: attn_implementation is '{implementation}', expected auto for a model that "
            "is not transformers'"
        )
    reason = ""
    if implementation == AUTO:
        reason = _refusal(model, dtype, training)
        keeps = model.config._attn_implementation
        implementation = NAME if not reason else "sdpa" if keeps == NAME else keeps
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"{where}: attn_implementation is '{implementation}', expected {AUTO}, {NAME} or a "
            f"name of transformers ({error})"
        ) from error
    choice = Choice(model.config._attn_implementation, reason)
    if implementation == NAME != choice.name:
        raise ConfigError(
            f"{where}: attn_implementation is '{NAME}', expected {choice.name}: transformers "
            f"cannot change the attention of {type(model).__name__}"
        )
    _log.debug("%s: attention %s", where, choice)
    return choice


def _is_transformers(model: Any) -> bool:
    modeling = sys.modules.get(_MODELING)
    found = modeling is not None and isinstance(model, modeling.PreTrainedModel)
    return found and hasattr(model, "_can_set_attn_implementation")
