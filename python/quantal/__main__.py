"""``python -m quantal``: what quantal can do here."""

from __future__ import annotations

import argparse

from .backend import Backend, detect_backend
from .imports import report_import_status


def main(arguments: list[str] | None = None) -> None:
    """Prints the report of ``report_import_status``."""
    parser = argparse.ArgumentParser(prog="python -m quantal", description=__doc__)
    names = [backend.value for backend in Backend]
    parser.add_argument(
        "--backend", choices=names, help="default: the best one of this machine", type=str.lower
    )
    chosen = parser.parse_args(arguments).backend
    print(report_import_status(chosen or detect_backend()))


if __name__ == "__main__":
    main()
