"""What happened to a model: coverage, substitutions, left-overs."""

from __future__ import annotations

import json
from typing import Any

from . import _check, _core


class Report:
    """Coverage of a quantization and every substitution that policy made.

    ``entries`` has one dictionary per layer: name, method, reason, parameters, bytes_before,
    bytes_after, relative_error. ``fallback`` tells that nothing is quantized, ``reason`` why.
    ``notes`` has the config's note: that even a recommended config does not fit.
    """

    @_check.arguments("Report", decision=_check.optional(_check.mapping))
    def __init__(self, decision: dict[str, Any] | None = None) -> None:
        decision = decision or {}
        self.adapter: str = decision.get("adapter", "")
        self.substitutions: list[dict[str, str]] = list(decision.get("substitutions", []))
        self.warnings: list[str] = list(decision.get("warnings", []))
        self.entries: list[dict[str, Any]] = []
        self.unmatched_patterns: list[str] = []
        self.notes: list[str] = []

    @property
    def fallback(self) -> bool:
        """Whether the factory had to answer with FallbackAdapter, which quantizes nothing."""
        return self.adapter == "FallbackAdapter"

    @property
    def reason(self) -> str:
        """Why the method that was asked for is not the one that is used; "" if it is."""
        return "; ".join(s["reason"] for s in self.substitutions if s["what"] == "method")

    @_check.arguments(
        "Report.add",
        name=_check.text,
        method=_check.text,
        reason=_check.text,
        parameters=_check.size,
        bytes_before=_check.size,
        bytes_after=_check.size,
        relative_error=_check.real,
    )
    def add(
        self,
        name: str,
        method: str,
        reason: str = "",
        *,
        parameters: int,
        bytes_before: int,
        bytes_after: int,
        relative_error: float = 0.0,
    ) -> None:
        """A row about one layer: what became of it, and its bytes before and after."""
        self._add(name, method, reason, parameters, bytes_before, bytes_after, relative_error)

    def _add(
        self,
        name: str,
        method: str,
        reason: str,
        parameters: int,
        bytes_before: int,
        bytes_after: int,
        relative_error: float,
    ) -> None:
        """`add` of values that are known to be right."""
        self.entries.append(
            {
                "name": name,
                "method": method,
                "reason": reason,
                "parameters": parameters,
                "bytes_before": bytes_before,
                "bytes_after": bytes_after,
                "relative_error": relative_error,
            }
        )

    def _native(self) -> _core.CoverageReport:
        native = _core.CoverageReport()
        for entry in self.entries:
            native.add(*entry.values())
        for s in self.substitutions:
            native.add_substitution(s["what"], s["asked"], s["used"], s["reason"])
        native.unmatched_patterns = self.unmatched_patterns
        native.notes = self.notes
        return native

    def to_text(self) -> str:
        """A table for a terminal, at most 100 columns wide."""
        return self._native().to_text()

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return self._native().to_json()

    def to_dict(self) -> dict[str, Any]:
        """Entries, totals, totals by method, substitutions, unmatched patterns and notes."""
        return json.loads(self.to_json())

    def __str__(self) -> str:
        return self.to_text()
