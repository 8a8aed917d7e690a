"""The names of the documented module `imports`; all of them live in `quantal.imports`."""

from quantal.imports import (
    ImportRegistry,
    ImportResult,
    check_import_availability,
    get_module,
    report_import_status,
    suppress_output,
    validate_imports,
)

__all__ = [
    "ImportRegistry",
    "ImportResult",
    "check_import_availability",
    "get_module",
    "report_import_status",
    "suppress_output",
    "validate_imports",
]
