"""Quantization and decoding speed of every dialect beside the package it comes from, on the CPU.

    python bench/quantize_speed.py [--quick] [--only bnb hqq quanto mlx gguf] [--rows FILE]
                                   [--output bench/results/quantize_speed.md]

Needs the packages of `make conformance`. Shapes: 4096 x 4096 and 14336 x 4096, bf16; --quick:
1024 x 4096 and short runs, to see that everything works. Each figure is a median of interleaved
pairs (pairs.py); what is decoded from both sides is compared in the same run.

--rows keeps every measured row in a file and skips what stands there already, so that a long run
can be taken in parts; the page is then made of all its rows.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import time

import pairs
import rivals
import torch

SHAPES = [(4096, 4096), (14336, 4096)]
QUICK_SHAPES = [(1024, 4096)]
#: By this variable torch asks for large pages for the results of every package.
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
HEADER = ["what", "rival", "quantal GB/s", "rival GB/s", "rival time / ours", "goal", "result"]


def relative_error(weight: torch.Tensor, restored: torch.Tensor) -> float:
    w = weight.float()
    return float((restored.float() - w).norm() / w.norm())


def result_of(weight: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """ "same values", or the relative errors of both."""
    if torch.equal(ours, theirs):
        return "same values"
    return f"error {relative_error(weight, ours):.6f} / {relative_error(weight, theirs):.6f}"


def row(
    name: str, case: rivals.Case, weight: torch.Tensor, pair: pairs.Pair, goal: float | None
) -> list[str]:
    gigabytes = weight.numel() * weight.element_size() / 1e9
    return [
        name,
        case.rival,
        f"{gigabytes / pair.ours:.3g}",
        f"{gigabytes / pair.rival:.3g}",
        f"**{pair.ratio:.3g}x**",
        "" if goal is None else f"{goal:g}x",
    ]


def measure_case(
    case: rivals.Case, weight: torch.Tensor, seconds: float, quick: bool
) -> tuple[list[str], list[str]]:
    """Rows of quantizing and of decoding."""
    start = time.perf_counter()
    theirs = case.quantize()
    once = time.perf_counter() - start
    least = 2 if quick or once > 10 else 3 if once > 1 else 7
    pair = pairs.measure(
        lambda: case.quantize_ours(weight), case.quantize, seconds, min_pairs=least
    )
    ours = case.quantize_ours(weight)
    decoding = pairs.measure(
        lambda: case.dequantize_ours(ours),
        lambda: case.dequantize(theirs),
        seconds,
        min_pairs=least,
    )
    result = result_of(weight, case.dequantize_ours(ours), case.to_torch(case.dequantize(theirs)))
    rows = (
        [*row(case.name, case, weight, pair, case.goal), result],
        [*row(case.name, case, weight, decoding, case.dequantize_goal), ""],
    )
    for cells in rows:
        print(cells, flush=True)
    return rows


class Rows:
    """The measured rows by section and form, in the order of measuring; kept in a file if asked."""

    def __init__(self, path: pathlib.Path | None) -> None:
        self._path = path
        self._rows: dict[tuple[str, str], list[list[str]]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                shape, name, encoded, decoded = json.loads(line)
                self._rows[shape, name] = [encoded, decoded]

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._rows

    def add(self, shape: str, name: str, rows: tuple[list[str], list[str]]) -> None:
        self._rows[shape, name] = list(rows)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([shape, name, *rows]) + "\n")

    def sections(self) -> list[str]:
        shapes = list(dict.fromkeys(shape for shape, _ in self._rows))
        pages = []
        for shape in shapes:
            rows = [pair for (where, _), pair in self._rows.items() if where == shape]
            pages.append(pairs.section(f"Quantizing, {shape}", HEADER, [pair[0] for pair in rows]))
            decoded = [pair[1][:-1] for pair in rows]
            pages.append(pairs.section(f"Decoding, {shape}", HEADER[:-1], decoded))
        return pages


def shape_title(shape: tuple[int, int]) -> str:
    """Rows taken with large pages for every package are a section of their own."""
    pages = f", {LARGE_PAGES}=1" if os.environ.get(LARGE_PAGES) == "1" else ""
    return f"{shape[0]} x {shape[1]} bf16{pages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(rivals.CASES), default=list(rivals.CASES))
    parser.add_argument("--seconds", type=float, default=2.5, help="per pair, where calls are fast")
    parser.add_argument("--rows", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    seconds = 0.3 if args.quick else args.seconds
    rows = Rows(args.rows)
    for shape in QUICK_SHAPES if args.quick else SHAPES:
        torch.manual_seed(0)
        weight = (torch.randn(*shape) * 0.02).to(torch.bfloat16)
        for name in args.only:
            for case in rivals.CASES[name](weight):
                if (shape_title(shape), case.name) in rows:
                    continue
                measured = measure_case(case, weight, seconds, args.quick)
                rows.add(shape_title(shape), case.name, measured)
    heading = pairs.heading("Quantizing and decoding on the CPU", command_of(args))
    text = "\n".join([heading, NOTES, *rows.sections()])
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


def command_of(args: argparse.Namespace) -> str:
    command = "python bench/quantize_speed.py"
    command += " --quick" if args.quick else ""
    if args.rows:  # the page has the rows of several calls
        return f"{command} --rows FILE"
    return command + (
        "" if len(args.only) == len(rivals.CASES) else f" --only {' '.join(args.only)}"
    )


NOTES = """\
GB/s counts the bf16 matrix in both directions. A result is the comparison of what both sides
decode from their own codes: the same values, or ||W - W'|| / ||W|| (quantal / rival). Conversions
of the input to what a rival takes are not timed: ggml reads and writes float32. HQQ runs the same
half-quadratic iterations with the same stopping rule. mlx quantizes on one thread. ggml is the C
library inside llama-cpp-python (ggml_quantize_chunk, dequantize_row_*), which takes rows: it is
called on as many threads as quantal uses.

Every call returns a new result, as its users get it; the one before is freed by then. quantal keeps
up to 64 MiB of freed results for the next of their size (core/result_block.h), which 4096 x 4096
fits in, and asks for larger ones in pages of 2 MiB. The packages get pages of 4 KiB from the
system, cleared, at every call, which takes longer than decoding. Into kept buffers (`out=`):
decode_speed.
"""


if __name__ == "__main__":
    main()
