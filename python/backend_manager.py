"""The documented module `backend_manager`: the names of `quantal.backend_manager`."""

from quantal.backend_manager import *  # noqa: F403
from quantal.backend_manager import __all__ as __all__
