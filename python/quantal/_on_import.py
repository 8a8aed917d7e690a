"""Actions for when another package is imported: nothing is imported for them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any


class _OnImport:
    """Runs `action` behind the import of one module."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self.module, self.action = module, action

    def find_spec(self, name: str, path: Any = None, target: Any = None):
        if name != self.module or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(module: str, action: Callable[[], None]) -> None:
    """Runs `action` now if a module is loaded, else as soon as it is; once for each module."""
    if module in sys.modules:
        action()
    elif not any(isinstance(f, _OnImport) and f.module == module for f in sys.meta_path):
        sys.meta_path.insert(0, _OnImport(module, action))  # type: ignore[arg-type]
