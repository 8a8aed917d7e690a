"""Builds the CUDA kernels, checks them against float64 and times them beside torch; one call.

    python bench/cuda/check.py [--output FOLDER] [--quick] [--library PATH] [--checks-only]

Needs a GPU of compute capability 8.0 or above, torch with CUDA, nvcc and g++; nothing of quantal
has to be installed. Writes FOLDER/cuda_check.md: the device, the checks, and a table of times with
least bytes, FLOPs and their shares of the copy bandwidth and of the bfloat16 rate of the same run.
Exits with 1 if a check fails; times are measured only where all pass.

--device cpu runs the checks with a library that executes kernels on the CPU (the tests build one).
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time

import checks
import torch
from library import ROOT, Library, build, build_emulated


def check_all(
    library: Library, reference: Library, device: torch.device, quick: bool
) -> list[checks.Outcome]:
    """Runs the checks and prints those that fail."""
    outcomes = list(checks.all_checks(library, reference, device, quick))
    for outcome in outcomes:
        if not outcome.passed:
            print(f"FAILED {outcome.name}: {outcome.ratio:.3g} times what is allowed")
    print(f"{sum(o.passed for o in outcomes)} of {len(outcomes)} checks passed")
    return outcomes


def checks_table(outcomes: list[checks.Outcome]) -> list[str]:
    """Largest ratio by kernel."""
    worst: dict[str, float] = {}
    for outcome in outcomes:
        kernel = outcome.name.split()[0]
        ratio = float("inf") if outcome.ratio != outcome.ratio else outcome.ratio
        worst[kernel] = max(worst.get(kernel, 0.0), ratio)
    lines = ["| checked | largest error / allowed |", "|---|---|"]
    return lines + [f"| {kernel} | {ratio:.3g} |" for kernel, ratio in worst.items()]


def speed_table(library: Library, quick: bool) -> list[str]:
    """Measures, and writes the rows with their shares."""
    import speed

    found = speed.limits()
    lines = [
        f"Copy bandwidth {found.copy / 1e12:.2f} TB/s (read + written), bfloat16 product of 8192^3 "
        f"{found.gemm / 1e12:.0f} TFLOP/s, both in this run.",
        "",
        "| what | path | us | MB | GFLOP | share of copy | share of product | torch bf16 / this |",
        "|---|---|---|---|---|---|---|---|",
    ]
    dense: dict[str, float] = {}
    measured = speed.measure(library, quick)
    for row in measured:
        if row.path == "torch bf16":
            dense[row.what] = row.seconds
        ratio = f"{dense[row.what] / row.seconds:.2f}" if row.what in dense else ""
        lines.append(
            f"| {row.what} | {row.path} | {row.seconds * 1e6:.1f} | {row.moved / 1e6:.1f} | "
            f"{row.flop / 1e9:.1f} | {row.moved / row.seconds / found.copy:.0%} | "
            f"{row.flop / row.seconds / found.gemm:.0%} | {ratio} |"
        )
    hqq = [row for row in measured if row.what.startswith("quantize, HQQ 4 bits")][-1]
    rows, cols = (int(n) for n in hqq.what.rsplit(", ", 1)[1].split(" x "))
    seconds = hqq.seconds * 70e9 / (rows * cols)
    lines += ["", f"HQQ, 70 billion weights at the rate of the last such row: {seconds:.0f} s."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("OUT", str(ROOT / "build" / "cuda_check"))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(default))
    parser.add_argument("--library", type=pathlib.Path, help="use this one instead of building")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--checks-only", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("check: torch sees no CUDA device")
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    torch.manual_seed(0)
    path, name = args.library, "the CPU, emulated"
    if args.device == "cuda":
        name = torch.cuda.get_device_name(0)
        if path is None:
            major, minor = torch.cuda.get_device_capability(0)
            begin = time.monotonic()
            path = build(args.output / "objects", f"{major}{minor}{'a' if major >= 9 else ''}")
            print(f"built {path} in {time.monotonic() - begin:.0f} s")
    if path is None:
        sys.exit("check: --device cpu needs --library")
    library = reference = Library(path.resolve())
    library.probe(0)
    if args.device == "cuda":
        reference = Library(build_emulated(args.output / "emulated"))
    outcomes = check_all(library, reference, device, quick=args.device == "cpu")
    good = all(outcome.passed for outcome in outcomes)
    lines = [f"# CUDA kernels on {name}", "", f"torch {torch.__version__}.", ""]
    lines += checks_table(outcomes)
    if good and args.device == "cuda" and not args.checks_only:
        lines += ["", *speed_table(library, args.quick)]
    if args.device == "cuda":
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "cuda_check.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
