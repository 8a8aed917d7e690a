"""How time grows with rows, columns and groups of a matrix, and what a second thread is worth.

    python bench/scaling.py [--quick] [--output bench/results/scaling.md]

NF4 with double quantization. A size is timed in turn with the base, 4096 x 4096 in groups of 64:
the figure is time per byte / that of the base. Threads: the same call with one thread in turn with
two.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import pairs
import torch
from decode_speed import form
from forward_speed import settle

BASE = (4096, 4096, 64)
QUICK_BASE = (1024, 1024, 64)
#: Factors of the base that are measured.
FACTORS = {"rows": (1 / 4, 1 / 2, 2, 4), "columns": (1 / 4, 1 / 2, 2, 4), "groups": (2, 4, 16)}
AXES = {name: i for i, name in enumerate(FACTORS)}
#: Time per byte may differ from that of the base by so much, either way.
LINEAR = 1.25
#: Time of one thread / time of two that this project wants where memory is not the limit.
THREADS_GOAL = 1.8
BANDWIDTH_BOUND = ("forward, 1 row", "decode to bf16")


@dataclass
class Work:
    """One operation on one matrix, and the bytes that it cannot do without."""

    call: Callable[[], object]
    nbytes: int


def make_works(rows: int, cols: int, group_size: int) -> dict[str, Work]:
    weight = (torch.randn(rows, cols) * 0.02).to(torch.bfloat16)
    candidate = form("bnb_nf4", group_size=group_size, double_quant=True)
    handle = candidate.quantize(weight)
    packed, dense = candidate.nbytes(handle), weight.numel() * weight.element_size()
    works = {}
    for m in (1, 64, 512):
        x = torch.randn(m, cols).to(torch.bfloat16)
        name = f"forward, {m} row" + ("s" if m > 1 else "")
        works[name] = Work(lambda x=x: candidate.matmul(handle, x), packed)
    works["quantize"] = Work(lambda: candidate.quantize(weight), dense + packed)
    works["decode to bf16"] = Work(lambda: candidate.dequantize(handle), dense + packed)
    return works


def sizes(base: tuple[int, int, int], axis: str) -> list[tuple[int, int, int]]:
    found = []
    for factor in FACTORS[axis]:
        size = list(base)
        size[AXES[axis]] = int(size[AXES[axis]] * factor)
        found.append((size[0], size[1], size[2]))
    return found


def scaling_rows(base: tuple[int, int, int], seconds: float) -> list[list[str]]:
    rows = []
    of_base = make_works(*base)
    for axis in FACTORS:
        ratios: dict[str, dict[int, float]] = {name: {} for name in of_base}
        for size in sizes(base, axis):
            for name, work in make_works(*size).items():
                pair = pairs.measure(of_base[name].call, work.call, seconds, between=settle)
                growth = work.nbytes / of_base[name].nbytes
                ratios[name][size[AXES[axis]]] = pair.ratio / growth
        for name, found in ratios.items():
            linear = all(1 / LINEAR <= ratio <= LINEAR for ratio in found.values())
            cells = [f"{n}: {ratio:.2f}" for n, ratio in found.items()]
            rows.append([name, axis, ", ".join(cells), "yes" if linear else "NO"])
            print(rows[-1], flush=True)
    return rows


def with_threads(call: Callable[[], object], threads: int) -> Callable[[], object]:
    def run() -> None:
        torch.set_num_threads(threads)
        call()

    return run


def thread_rows(base: tuple[int, int, int], seconds: float) -> list[list[str]]:
    rows = []
    for name, work in make_works(*base).items():
        pair = pairs.measure(
            with_threads(work.call, 2), with_threads(work.call, 1), seconds, between=settle
        )
        met = "yes" if pair.ratio >= THREADS_GOAL else "NO"
        rows.append(
            [
                name,
                f"{pair.rival * 1e3:.2f}",
                f"{pair.ours * 1e3:.2f}",
                f"**{pair.ratio:.2f}x**",
                "- (memory)" if name in BANDWIDTH_BOUND else met,
            ]
        )
        print(rows[-1], flush=True)
    return rows


NOTES = """\
Bytes: packed ones of a product, those and the dense matrix of quantizing and decoding. Caches are
evicted before each call. Larger groups have fewer bytes but as many weights: where products are
the limit, time per byte grows by what the bytes shrink.
"""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, short runs")
    parser.add_argument("--seconds", type=float, default=0.3, help="of one pair")
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    seconds = 0.05 if args.quick else args.seconds
    base = QUICK_BASE if args.quick else BASE
    torch.manual_seed(0)
    heading = pairs.heading(
        "Time over rows, columns, groups and threads",
        "python bench/scaling.py" + (" --quick" if args.quick else ""),
    ).replace(pairs.FIGURE, "- figure: median of interleaved pair ratios in one process")
    shape = f"{base[0]} x {base[1]}"
    scaled = pairs.section(
        f"Time per byte / that of {shape}, groups of {base[2]}",
        ["what", "over", "size: time per byte", f"within {LINEAR}x"],
        scaling_rows(base, seconds),
    )
    threads = pairs.section(
        f"Two threads, {shape}",
        ["what", "1 thread ms", "2 threads ms", "1 thread / 2", f">= {THREADS_GOAL}x"],
        thread_rows(base, seconds),
    )
    page = "\n".join([heading, scaled, NOTES, threads])
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
