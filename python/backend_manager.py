"""The names of the documented module `backend_manager`; all of them live in `quantal.backend`."""

from quantal.backend import (
    Backend,
    BackendCapabilities,
    BackendManager,
    detect_backend,
    get_backend_manager,
    get_device,
)

__all__ = [
    "Backend",
    "BackendCapabilities",
    "BackendManager",
    "detect_backend",
    "get_backend_manager",
    "get_device",
]
