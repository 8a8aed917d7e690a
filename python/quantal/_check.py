"""Arguments of public functions: the wrong type is named before anything happens."""

from __future__ import annotations

import numbers
import operator
from typing import Any

from ._errors import ConfigError


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
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise wrong_type(where, name, value, "an integer")
    number = operator.index(value)
    if abs(number) >= 1 << 63:
        raise ConfigError(f"{where}: {name} is too large, expected an integer of 64 bits")
    return number


def flag(where: str, name: str, value: Any) -> bool:
    """`value` if it is True or False."""
    return bool(instance(where, name, value, bool, "True or False"))


def text(where: str, name: str, value: Any) -> str:
    """`value` if it is a str."""
    return instance(where, name, value, str, "a str")
