"""Builds the CUDA kernels, checks them against float64 and measures every target of docs/cuda.md
beside torch and the rivals that are installed; one call.

    python bench/cuda/check.py [--quick] [--output FOLDER] [--wheels FOLDER] [--library PATH]

Needs a GPU of compute capability 8.0 or above, torch with CUDA, g++ and, without --library, nvcc.
The step of training and the path "quantal" need quantal's own package too. Writes
FOLDER/cuda_check.md and .json after everything that it finds, so that a run that is killed leaves
what it has. Takes less than 10 minutes, --quick less than 5 (--seconds sets another limit): a part
that has used its share leaves out the rest and names it. Exits with 1 if a check fails.

--device cpu goes through all of it at tiny sizes, with a library that executes kernels on the CPU
(the tests build one): it shows that the script works, and no time of it means anything.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import checks
import peers
import qlora_step
import speed
import torch
import wheels
from library import ROOT, Library, build, build_emulated
from report import Report
from timing import ROUNDS, Budget, Timer, reason

#: Seconds of the parts, with and without --quick. The build and the checks are never cut short; the
#: parts behind them get what is left.
FULL = {"build": 150, "checks": 60, "limits": 10, "forward": 140, "weights": 45, "backward": 35,
        "training": 80, "int8": 20}  # fmt: skip
QUICK = {"build": 110, "checks": 30, "limits": 5, "forward": 55, "weights": 20, "backward": 10,
         "training": 35, "int8": 5}  # fmt: skip
MEASURED = ("forward", "weights", "backward", "training", "int8")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="default: $OUT or build/cuda_check")
    parser.add_argument("--library", type=pathlib.Path, help="use this one instead of building")
    parser.add_argument(
        "--reference", type=pathlib.Path, help="its kernels for the CPU, instead of building"
    )
    parser.add_argument("--wheels", type=pathlib.Path, help="rivals to install: wheels.py")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="fewer shapes, under 5 minutes")
    parser.add_argument("--seconds", type=float, help="of the whole run (540, --quick 270)")
    parser.add_argument("--parts", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--checks-only", action="store_true")
    args = parser.parse_args(arguments)
    if args.checks_only:
        args.parts = []
    if args.device == "cpu" and args.library is None:
        parser.error("--device cpu needs --library")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if args.wheels is not None and not any(args.wheels.glob("*.whl")):
        parser.error(f"--wheels: {args.wheels} holds no wheels")
    if args.output is None and args.device == "cuda":
        args.output = pathlib.Path(os.environ.get("OUT", str(ROOT / "build" / "cuda_check")))
    if args.seconds is None:
        args.seconds = float(sum((QUICK if args.quick else FULL).values()))
    return args


def check_all(library: Library, reference: Library, report: Report, device: torch.device) -> None:
    """Runs the checks; those that fail are named."""
    worst: dict[str, float] = {}
    count = 0
    for outcome in checks.all_checks(library, reference, device, quick=device.type == "cpu"):
        kernel = outcome.name.split()[0]
        ratio = float("inf") if outcome.ratio != outcome.ratio else outcome.ratio
        worst[kernel] = max(worst.get(kernel, 0.0), ratio)
        report.checks = [[name, f"{value:.3g}"] for name, value in worst.items()]
        count += 1
        if not outcome.passed:
            text = f"{outcome.name}: {outcome.ratio:.3g} times what is allowed"
            print(f"FAILED {text}", flush=True)
            report.failed.append(text)
    print(f"{count - len(report.failed)} of {count} checks passed", flush=True)
    report.write()


def libraries(args: argparse.Namespace, budget: Budget) -> tuple[Library, Library, pathlib.Path]:
    """The library under test, and one that runs its kernels on the CPU. Both are built at once."""
    folder = args.output or pathlib.Path(tempfile.mkdtemp(prefix="quantal-"))
    path, reference = args.library, args.reference
    with budget.part("build", args.seconds), ThreadPoolExecutor(2) as pool:
        if args.device == "cpu":
            reference = path
        if path is None:
            major, minor = torch.cuda.get_device_capability(0)
            architecture = f"{major}{minor}{'a' if major >= 9 else ''}"
            compiled = pool.submit(build, folder / "objects", architecture)
        if reference is None:
            reference = pool.submit(build_emulated, folder / "emulated").result()
        path = (compiled.result() if path is None else path).resolve()
    library = Library(path)
    library.probe(0)
    return library, Library(reference.resolve()), path


def own_package(device: torch.device, library: pathlib.Path) -> str:
    """Makes quantal's ops use the library; "" where they run on the device, else why not."""
    if device.type == "cuda":
        os.environ.setdefault("QUANTAL_CUDA", "1")
        os.environ.setdefault("QUANTAL_CUDA_LIBRARY", str(library))
    try:
        importlib.import_module("quantal")
        status = torch.ops.quantal.cuda_status()
    except ImportError:
        return "not installed"
    except Exception as error:  # another torch, another interface
        return "does not import: " + reason(error)
    return "" if device.type == "cpu" or status.startswith("on") else "does not import: " + status


def setting(args: argparse.Namespace, report: Report) -> dict[str, str]:
    """Versions of everything, into the report."""
    report.say("torch", torch.__version__)
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        report.say(
            "device",
            f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
            f"{properties.L2_cache_size / 2**20:.0f} MiB second-level cache, "
            f"{properties.total_memory / 2**30:.0f} GiB",
        )
    if args.wheels is not None:
        found = wheels.described(wheels.sizes(args.wheels))
        target = pathlib.Path(tempfile.mkdtemp(prefix="quantal-wheels-"))
        failed = wheels.install(args.wheels, target)
        report.say("--wheels", found + (f"; not fit: {', '.join(failed)}" if failed else ""))
    versions = peers.versions()
    for name, version in versions.items():
        report.say(name, version)
    return versions


def measure(bench: speed.Bench, args: argparse.Namespace) -> None:
    """The parts that were asked for, limits first."""
    on_gpu = args.device == "cuda"
    shares = QUICK if args.quick else FULL
    plan = speed.TINY if not on_gpu else speed.QUICK if args.quick else speed.Plan()
    with bench.budget.part("limits", shares["limits"]):
        bench.report.results.limits = found = speed.limits(bench)
    bench.report.say(
        "limits",
        f"copy {found.copy / 1e12:.2f} TB/s (read + written), bfloat16 product "
        f"{found.gemm / 1e12:.0f} TFLOP/s, both measured in this run",
    )
    items = {
        "forward": speed.products,
        "weights": speed.weights_as_bytes,
        "backward": speed.backwards,
        "int8": speed.int8s,
    }
    for part in args.parts:
        seconds = shares[part] if on_gpu else args.seconds
        if part in items:
            speed.run(bench, part, seconds, items[part](bench, plan))
            continue
        with bench.budget.part(part, seconds), torch.enable_grad():
            size = qlora_step.Size() if on_gpu else qlora_step.TINY
            sides = tuple(qlora_step.SIDES)[: 3 if args.quick else None]
            qlora_step.run(bench.timer, bench.budget, bench.report, size, bench.found, sides)
        bench.report.write()


def run(args: argparse.Namespace) -> Report:
    """Everything; the report is complete if this returns."""
    on_gpu = args.device == "cuda"
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(0) if on_gpu else "the CPU, emulated: no time means anything"
    report = Report(args.output, f"CUDA kernels on {name}", on_gpu)
    budget = Budget(args.seconds)
    report.seconds = budget.spent
    found = setting(args, report)
    library, reference, path = libraries(args, budget)
    with budget.part("checks", args.seconds):
        check_all(library, reference, report, device)
    if args.parts:
        why = own_package(device, path)
        found["quantal"] = why or "installed"
        report.say("quantal's package", found["quantal"])
        timer = Timer(device, rounds=ROUNDS if on_gpu else 1)
        bench = speed.Bench(library, timer, budget, report, found, op=not why)
        with torch.no_grad():
            measure(bench, args)
    report.state = "complete"
    report.write()
    return report


def main() -> None:
    report = run(parsed())
    print("\n".join(report.lines()))
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
