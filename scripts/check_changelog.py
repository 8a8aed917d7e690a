#!/usr/bin/env python3
"""Checks that CHANGELOG.md and the version of CMakeLists.txt agree.

The newest released entry must be the project's version, entries must be in falling order with a
date, and each must have a "Format" heading, which says whether stored bytes changed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"^## \[([^\]]+)\](?: - (\S+))?$", re.MULTILINE)


def problems(changelog: str, cmake: str) -> list[str]:
    """What is wrong; empty if nothing is."""
    found = re.search(r"project\(quantal VERSION ([0-9.]+)", cmake)
    if found is None:
        return ["CMakeLists.txt: no 'project(quantal VERSION ...)'"]
    version = found.group(1)
    entries = list(ENTRY.finditer(changelog))
    released = [e for e in entries if e.group(1) != "Unreleased"]
    if not released:
        return ["CHANGELOG.md: no released entry"]
    bad = []
    if released[0].group(1) != version:
        bad.append(
            f"CHANGELOG.md: newest entry is {released[0].group(1)}, CMakeLists.txt has {version}"
        )
    ends = [e.start() for e in entries[1:]] + [len(changelog)]
    numbers = []
    for entry, end in zip(entries, ends, strict=True):
        name, date = entry.groups()
        if "\n### Format\n" not in changelog[entry.end() : end]:
            bad.append(f"CHANGELOG.md: entry {name} has no 'Format' heading")
        if name == "Unreleased":
            continue
        if date is None or not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
            bad.append(f"CHANGELOG.md: entry {name} has date {date}, expected YYYY-MM-DD")
        if not re.fullmatch(r"\d+(\.\d+)*", name):
            bad.append(f"CHANGELOG.md: entry '{name}' is not a version")
            continue
        numbers.append(tuple(int(part) for part in name.split(".")))
    if numbers != sorted(numbers, reverse=True):
        bad.append("CHANGELOG.md: versions are not in falling order")
    return bad


def main() -> int:
    """Prints the problems; exit code 1 if there are any."""
    bad = problems(
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"),
    )
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
