"""The training program: ``torchrun -m quantal_train``, or ``train.py``, with flags.

The library is ``quantal``; what is here reads files and flags, prints, and calls it.
docs/training.md is the guide.
"""

from .cli import main, parse, program

__all__ = ["main", "parse", "program"]
