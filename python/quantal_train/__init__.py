"""The training program: ``torchrun -m quantal_train``, or ``train.py``, with flags.

The library is ``quantal``; what is here reads files and flags, prints, and calls it.
docs/training.md is the guide.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cli import main, parse

__all__ = ["main", "parse", "program"]


def program() -> None:
    """`main`, as a process of its own whose heap stays whole (heap.py)."""
    from . import heap

    heap.restart_whole()  # before torch is imported
    from .cli import program as run

    run()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import cli

    return getattr(cli, name)
