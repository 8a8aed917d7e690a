"""Adapters of one's own, by the name under which configs, files and the factory find them."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

from . import _check, _core
from ._errors import ConfigError, CorruptError, QuantalError, UnsupportedError

if TYPE_CHECKING:
    from .adapters import QuantizationAdapter

_log = logging.getLogger("quantal")
#: Key of config.json under which a model keeps the adapter that wrote it.
ADAPTER_KEY = "quantal_adapter"

_classes: dict[str, type[QuantizationAdapter]] = {}


def register_adapter(name: str, cls: type[QuantizationAdapter], *, replace: bool = False) -> None:
    """Makes an adapter of one's own a method that every part of quantal knows by name.

    name     of the method: lower-case letters, digits and underscores, not a built-in one
    cls      a subclass of QuantizationAdapter that takes (backend, config), all its abstract
             methods written
    replace  take another class for a name that is in use; the same class, or a new version of it
             under the same qualified name (a notebook cell run again), always may

    Afterwards ``QuantizationConfig(method=name)`` and ``QuantizationMethod(name)`` are legal,
    ``create_quantization_adapter`` answers with ``cls`` on every backend (whether it can run there
    is for ``_validate_backend_support`` to say), ``skip_modules`` and ``layer_configs`` count, and
    a folder that the adapter saved is loaded by it, whichever adapter is asked to load. The
    registration belongs to the process: the command ``quantal``, a C++ program, knows the methods
    that were registered in C++ only.

    Raises ConfigError for a name that is no identifier, is built in or is in use, TypeError for
    what is no such class.
    """
    from .adapters import QuantizationAdapter

    _check.text("register_adapter", "name", name)
    _check.flag("register_adapter", "replace", replace)
    if not (inspect.isclass(cls) and issubclass(cls, QuantizationAdapter)):
        expected = "a subclass of QuantizationAdapter"
        raise _check.wrong_type("register_adapter", "cls", cls, expected)
    if inspect.isabstract(cls):
        absent = ", ".join(sorted(cls.__abstractmethods__))
        raise TypeError(
            f"register_adapter: {cls.__name__} is abstract, expected it to write {absent}"
        )
    known = _classes.get(name)
    if known is not None and not replace and not _same_class(known, cls):
        raise ConfigError(
            f"register_adapter: name is '{name}', which {known.__module__}.{known.__qualname__} "
            "has, expected another name (or replace=True)"
        )
    _core.register_custom_method(name)  # raises ConfigError for what is no name
    _classes[name] = cls
    _log.debug("adapter %s registered as %s", cls.__qualname__, name)


def _same_class(one: type, other: type) -> bool:
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def registered_adapters() -> dict[str, type[QuantizationAdapter]]:
    """Adapters by the names of ``register_adapter``; a new dictionary."""
    return dict(_classes)


def adapter_class(name: str) -> type[QuantizationAdapter] | None:
    """The class of a registered name."""
    return _classes.get(name)


def name_of(cls: type) -> str | None:
    """The name under which a class is registered."""
    return next((name for name, known in _classes.items() if known is cls), None)


def adapter_of_file(config: dict[str, Any], path: str) -> QuantizationAdapter | None:
    """The registered adapter that wrote a file, by its config.json; None if quantal's own did.

    Raises UnsupportedError where it is not registered, CorruptError where the entry is no such
    thing."""
    entry = config.get(ADAPTER_KEY)
    if entry is None:
        return None
    from .config import QuantizationConfig

    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise CorruptError(
            f"load: {ADAPTER_KEY} in config.json has no name, expected that of an adapter "
            f"(file={path})",
            path,
        )
    cls = _classes.get(name)
    if cls is None:
        raise UnsupportedError(
            f"load: the adapter '{name}' wrote this model and is not registered here, expected "
            f"quantal.register_adapter('{name}', cls) before it is loaded (file={path})",
            path,
        )
    try:
        return cls(entry.get("backend", "cpu"), QuantizationConfig.from_dict(entry["config"]))
    except (KeyError, TypeError, QuantalError) as error:
        raise CorruptError(
            f"load: {ADAPTER_KEY} in config.json cannot be used: {error} (file={path})", path
        ) from error
