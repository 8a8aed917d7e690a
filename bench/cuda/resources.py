"""Registers, stack and spills of every CUDA kernel, as ptxas reports them; needs no GPU.

python bench/cuda/resources.py [--output bench/results/cuda_resources.md] [--nvcc PATH]

Compiles the sources of src/kernels/cuda for each architecture (about a minute each) and writes a
table. Exits with 1 if a kernel spills registers or needs a stack.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import pathlib
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "kernels" / "cuda"
TARGETS = {"sm_80": "arch=compute_80,code=sm_80", "sm_90a": "arch=compute_90a,code=sm_90a"}
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-ffp-contract=off", "-Xptxas=-v"]
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill "
    r"stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
#: Of kernels/cuda/quantizer.h, by number.
ENCODERS = (
    "table", "row int8", "anchored", "shifted", "rounded zero", "symmetric", "affine",
    "microscaled", "extreme", "range", "largest", "fit table", "fit super",
)  # fmt: skip
CHOICES = {
    "FloatKind": {"1": "f16", "2": "bf16"},
    "Encoder": {str(number): name for number, name in enumerate(ENCODERS)},
    "DecodePath": {"0": "general", "1": "scaled", "2": "halves"},
    "Values": {"0": "numbers", "1": "table", "2": "e4m3", "3": "e5m2"},
}


@dataclass
class Kernel:
    """Figures of a kernel by target."""

    name: str
    registers: dict[str, int] = field(default_factory=dict)
    stack: int = 0
    spilled: int = 0


def readable(mangled: str) -> str:
    """`small_matmul<4 bits, table, bf16, 1, 1>` of a mangled name."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"^void |quantal::cuda::|quantal::", "", text.strip())
    text = re.sub(r"\(\w+Args\)$", "", text)
    for kind, names in CHOICES.items():
        text = re.sub(rf"\({kind}\)(\d+)", lambda m, n=names: n[m.group(1)], text)
    text = text.replace("_kernel", "")
    text = re.sub(r"TileForm<(\w+), (\d)>", r"\1 \2", text).replace(" 4,", " 4 bits,")
    text = text.replace(" 0,", " of any width,")
    text = re.sub(r"small_matmul<(\d)", r"small_matmul<\1 bits", text)
    return text.replace("true", "transposed").replace("false", "forward")


def compile_one(nvcc: str, source: pathlib.Path, target: str) -> str:
    """What ptxas said of a source."""
    command = [nvcc, *FLAGS, f"-gencode={TARGETS[target]}", f"-I{ROOT}/src", f"-I{ROOT}/include"]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", "/dev/null"], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{source.name} for {target}: {done.stderr}")
    return done.stderr


def measure(nvcc: str, jobs: int) -> list[Kernel]:
    """All kernels, by name."""
    tasks = [(source, target) for source in sorted(SOURCES.glob("*.cu")) for target in TARGETS]
    kernels: dict[str, Kernel] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for log in pool.map(lambda task: compile_one(nvcc, *task), tasks):
            for mangled, target, stack, stores, loads, registers in ENTRY.findall(log):
                kernel = kernels.setdefault(mangled, Kernel(readable(mangled)))
                kernel.registers[target] = int(registers)
                kernel.stack = max(kernel.stack, int(stack))
                kernel.spilled = max(kernel.spilled, int(stores) + int(loads))
    return sorted(kernels.values(), key=lambda kernel: kernel.name)


def table(kernels: list[Kernel], compiler: str) -> str:
    """The report."""
    columns = " | ".join(f"registers {target}" for target in TARGETS)
    lines = [
        "# Resources of the CUDA kernels",
        "",
        f"`python bench/cuda/resources.py`, {compiler}, `{' '.join(FLAGS)}`.",
        "Registers as ptxas gives them, largest stack frame and spilled bytes of both targets.",
        "This is what the compiler says; nothing here was run on a GPU.",
        "",
        f"| kernel | {columns} | stack | spilled |",
        f"|---|{'---|' * len(TARGETS)}---|---|",
    ]
    for kernel in kernels:
        registers = " | ".join(str(kernel.registers[target]) for target in TARGETS)
        lines.append(f"| `{kernel.name}` | {registers} | {kernel.stack} | {kernel.spilled} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=ROOT / "bench/results/cuda_resources.md")
    parser.add_argument("--nvcc", default=shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    version = subprocess.run([args.nvcc, "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release [\d.]+, V([\d.]+)", version.stdout)
    kernels = measure(args.nvcc, args.jobs)
    text = table(kernels, f"nvcc {release.group(1) if release else 'unknown'}")
    pathlib.Path(args.output).write_text(text, encoding="utf-8")
    bad = [kernel.name for kernel in kernels if kernel.stack or kernel.spilled]
    print(f"{len(kernels)} kernels, {len(bad)} with a stack or spills: {args.output}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
