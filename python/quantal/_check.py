"""Arguments of public functions: the wrong type is named before anything happens."""

from __future__ import annotations

import functools
import inspect
import numbers
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ._errors import ConfigError, NotFoundError

_Function = TypeVar("_Function", bound=Callable[..., Any])
#: Looks at one argument, (where, name, value), and raises what is wrong with it.
Rule = Callable[[str, str, Any], Any]


def _actual(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"


def wrong_type(where: str, name: str, value: Any, expected: str) -> TypeError:
    """The exception for an argument of the wrong type."""
    return TypeError(f"{where}: {name} is {_actual(value)}, expected {expected}")


def instance(
    where: str, name: str, value: Any, kind: type | tuple[type, ...], expected: str
) -> Any:
    """`value` if it is of this kind."""
    if isinstance(value, kind):
        return value
    raise wrong_type(where, name, value, expected)


def real(where: str, name: str, value: Any) -> float:
    """`value` as a float; booleans and text are no numbers."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise wrong_type(where, name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{where}: {name} is too large, expected a finite number") from None


def integer(where: str, name: str, value: Any) -> int:
    """`value` as an int of at most 64 bits; booleans are none."""
    if isinstance(value, bool | type) or not hasattr(value, "__index__"):
        raise wrong_type(where, name, value, "an integer")
    try:
        number = operator.index(value)
    except TypeError:  # a tensor of several elements
        raise wrong_type(where, name, value, "an integer") from None
    if abs(number) >= 1 << 63:
        raise ConfigError(f"{where}: {name} is too large, expected an integer of 64 bits")
    return number


def flag(where: str, name: str, value: Any) -> bool:
    """`value` if it is True or False."""
    return bool(instance(where, name, value, bool, "True or False"))


def text(where: str, name: str, value: Any) -> str:
    """`value` if it is a str."""
    return instance(where, name, value, str, "a str")


def activations(where: str, value: Any) -> bool:
    """True for "int8", False for "exact"."""
    if text(where, "activations", value) not in ("exact", "int8"):
        raise ConfigError(f"{where}: activations is {value!r}, expected 'exact' or 'int8'")
    return bool(value == "int8")


def warn(message: str) -> None:
    """A UserWarning that names the line of the caller, outside of this package."""
    folder = os.path.join(os.path.dirname(__file__), "")
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(folder):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


# ------------------------------------------------------------------ rules of whole signatures


def _positions(function: Callable, rules: dict[str, Rule]) -> list[tuple[str, Rule, int]]:
    """Each rule with the place of its argument in a call; one that has to be named has none."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    places = {p.name: i for i, p in enumerate(parameters) if p.kind in named}
    return [(name, rule, places.get(name, sys.maxsize)) for name, rule in rules.items()]


def arguments(called: str = "", /, **rules: Rule) -> Callable[[_Function], _Function]:
    """A decorator that looks at the arguments of these names before the function sees any.

    called  name of the function in messages; default: its own"""

    def decorate(function: _Function) -> _Function:
        where = called or function.__name__
        looks = _positions(function, rules)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for name, rule, position in looks:
                if position < len(args):
                    rule(where, name, args[position])
                elif name in kwargs:
                    rule(where, name, kwargs[name])
            return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def optional(rule: Rule) -> Rule:
    """`rule`, or None."""

    def check(where: str, name: str, value: Any) -> None:
        if value is not None:
            rule(where, name, value)

    return check


def is_a(kind: type | tuple[type, ...], expected: str) -> Rule:
    """Instances of `kind`; `expected` describes them."""
    return lambda where, name, value: instance(where, name, value, kind, expected)


module = is_a(nn.Module, "an nn.Module")
tensor = is_a(torch.Tensor, "a torch.Tensor")


def size(where: str, name: str, value: Any) -> None:
    """A number of rows or columns."""
    if integer(where, name, value) < 0:
        raise ConfigError(f"{where}: {name} is {value}, expected at least 0")


def function(where: str, name: str, value: Any) -> None:
    """Anything that can be called."""
    if not callable(value):
        raise wrong_type(where, name, value, "a function")


def dtype(where: str, name: str, value: Any) -> None:
    """A torch dtype or its name; parse_dtype refuses other names."""
    from ._dtypes import parse_dtype

    instance(where, name, value, (torch.dtype, str), "a torch.dtype or its name")
    parse_dtype(value)


def device(where: str, name: str, value: Any) -> torch.device:
    """A torch device or its name."""
    expected = 'a torch.device or its name, such as "cpu" or "cuda:0"'
    instance(where, name, value, (torch.device, str, int), expected)
    if isinstance(value, bool):
        raise wrong_type(where, name, value, expected)
    try:
        return torch.device(value)
    except (RuntimeError, ValueError, TypeError):
        raise ConfigError(f"{where}: {name} is {value!r}, expected {expected}") from None


def path(where: str, name: str, value: Any) -> str:
    """Text or a path object, not empty."""
    expected = "a path (str or os.PathLike)"
    instance(where, name, value, (str, os.PathLike), expected)
    text = os.fspath(value)
    if not isinstance(text, str):
        raise wrong_type(where, name, value, expected)
    if not text:
        raise ConfigError(f"{where}: {name} is empty, expected {expected}")
    if "\0" in text:
        raise ConfigError(f"{where}: {name} has a NUL character, expected {expected}")
    return text


def source(where: str, name: str, value: Any) -> None:
    """A path at which something lies."""
    text = path(where, name, value)
    if not os.path.lexists(text):
        raise NotFoundError(
            f"{where}: {name} is '{text}', where nothing is, expected a model file or folder", text
        )


def names(where: str, name: str, value: Any) -> None:
    """A list of texts, not one text; what the entries are is for the reader of the list."""
    expected = 'a list of names, such as ["lm_head"]'
    if isinstance(value, str | bytes | torch.Tensor) or not isinstance(value, Iterable):
        raise wrong_type(where, name, value, expected)


def mapping(where: str, name: str, value: Any) -> None:
    """A dictionary."""
    instance(where, name, value, Mapping, "a dict")
