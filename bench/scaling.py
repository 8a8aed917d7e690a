"""How time grows with rows, columns and groups of a matrix, and what a second thread is worth to
its products and to every quantizer.

    python bench/scaling.py [--quick] [--output bench/results/scaling.md]

NF4 with double quantization. A size is timed in turn with the base, 4096 x 4096 in groups of 64:
the figure is time per byte / that of the base. Threads: the same call with one thread in turn with
two; quantizing for every dialect.
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
from peers_candidate import Candidate

BASE = (4096, 4096, 64)
QUICK_BASE = (1024, 1024, 64)
#: Factors of the base that are measured.
FACTORS = {"rows": (1 / 4, 1 / 2, 2, 4), "columns": (1 / 4, 1 / 2, 2, 4), "groups": (2, 4, 16)}
AXES = {name: i for i, name in enumerate(FACTORS)}
#: Time per byte may exceed that of the base by so much; below 1 is better than linear.
LINEAR = 1.25
#: Time of one thread / time of two that this project wants where memory is not the limit.
THREADS_GOAL = 1.8
BANDWIDTH_BOUND = ("forward, 1 row", "decode to bf16")
QUANTIZERS: dict[str, Candidate] = {
    "NF4": form("bnb_nf4", group_size=64, double_quant=False),
    "NF4, double quantization": form("bnb_nf4", group_size=64, double_quant=True),
    "FP4": form("bnb_nf4", quant_type="fp4", group_size=64, double_quant=False),
    "LLM.int8": form("bnb_int8", bits=8),
    "HQQ 4-bit g64": form("hqq", bits=4, group_size=64, value_dtype=torch.bfloat16),
    "HQQ 4-bit g64, axis 0": form("hqq", bits=4, group_size=64, axis=0, value_dtype=torch.bfloat16),
    "HQQ 4-bit g64, no solver": form(
        "hqq", bits=4, group_size=64, optimize=False, value_dtype=torch.bfloat16
    ),
    "MLX 4-bit g64": form("mlx", bits=4, group_size=64, mode="affine"),
    "MLX 8-bit g64": form("mlx", bits=8, group_size=64, mode="affine"),
    "MLX mxfp4": form("mlx", bits=4, group_size=32, mode="mxfp4"),
    "Quanto qint2 g128": form("quanto_int2", bits=2, group_size=128),
    "Quanto qint4 g128": form("quanto_int4", bits=4, group_size=128),
    "Quanto qint8, per row": form("quanto_int8", bits=8),
    **{
        f"GGUF {mode}": form("gguf", bits=0, group_size=0, mode=mode)
        for mode in "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K".split()
    },
}


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
            linear = max(found.values()) <= LINEAR
            cells = [f"{n}: {ratio:.2f}" for n, ratio in found.items()]
            rows.append([name, axis, ", ".join(cells), "yes" if linear else "NO"])
            print(rows[-1], flush=True)
    return rows


def with_threads(call: Callable[[], object], threads: int) -> Callable[[], object]:
    def run() -> None:
        torch.set_num_threads(threads)
        call()

    return run


def quantizing(base: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    weight = (torch.randn(*base[:2]) * 0.02).to(torch.bfloat16)
    return {
        name: lambda candidate=candidate: candidate.quantize(weight)
        for name, candidate in QUANTIZERS.items()
    }


def thread_rows(calls: dict[str, Callable[[], object]], seconds: float) -> list[list[str]]:
    rows = []
    for name, call in calls.items():
        pair = pairs.measure(with_threads(call, 2), with_threads(call, 1), seconds, between=settle)
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
the limit, time per byte grows by what the bytes shrink. Quantizing, almost all bytes are those of
the dense matrix, and what a group costs (a scale, its reciprocal, its code of the second level) is
paid less often: time per byte falls. A call from sleeping threads and cold caches takes some 80 us
before a weight is read, a good share of a product with one row of a small matrix.
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
        ["what", "over", "size: time per byte", f"at most {LINEAR}x"],
        scaling_rows(base, seconds),
    )
    works = {name: work.call for name, work in make_works(*base).items()}
    threads, quantizers = (
        pairs.section(
            f"Two threads, {title}{shape}",
            ["what", "1 thread ms", "2 threads ms", "1 thread / 2", f">= {THREADS_GOAL}x"],
            thread_rows(calls, seconds),
        )
        for title, calls in (("", works), ("quantizing ", quantizing(base)))
    )
    page = "\n".join([heading, scaled, NOTES, threads, quantizers])
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
