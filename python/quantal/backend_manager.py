"""The names of the documented module `backend_manager`, from where they live in quantal."""

from .backend import (
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
