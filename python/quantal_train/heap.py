"""The C library's heap, kept whole between steps.

torch aligns every tensor to 64 bytes. glibc's aligned allocation cuts small remainders off a larger
block, and their places in the thread caches and fast bins keep freed blocks from growing together
again: the heap of a QLoRA step on the CPU becomes two to three times what is alive in it. Both can
be switched off, but only before a process starts.
"""

from __future__ import annotations

import os
import sys

TUNABLES = ("glibc.malloc.tcache_count=0", "glibc.malloc.mxfast=0")
#: ``default`` in the environment leaves the heap as it is.
SWITCH = "QUANTAL_MALLOC"


def tuned(environment: dict[str, str]) -> dict[str, str] | None:
    """The environment in which the heap stays whole; None if it is this one, if another C library
    is in use, or if the user decided about the thread caches (``GLIBC_TUNABLES``) or against it
    (``QUANTAL_MALLOC=default``)."""
    given = environment.get("GLIBC_TUNABLES", "")
    if environment.get(SWITCH) == "default" or "glibc.malloc.tcache_count" in given:
        return None
    if not _is_glibc():
        return None
    return {**environment, "GLIBC_TUNABLES": ":".join(filter(None, (given, *TUNABLES)))}


def _is_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, OSError, ValueError):
        return False


def restart_whole() -> None:
    """Starts the running program again with a heap that stays whole, unless it has one: call it
    first, for nothing that was done before is kept."""
    environment = tuned(dict(os.environ))
    if environment is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
