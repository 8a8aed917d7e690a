"""The documented module `imports`: the names of `quantal.imports`."""

from quantal.imports import *  # noqa: F403
from quantal.imports import __all__ as __all__
