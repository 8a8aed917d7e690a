"""Quantization speed against bitsandbytes (NF4) and hqq (4-bit solver) on the CPU.

    python bench/quantize_speed.py [--size 4096] [--output bench/results/quantize_speed.md]

Needs bitsandbytes and hqq (the environment of `make conformance`).
"""

from __future__ import annotations

import argparse
import pathlib
import time

import pairs
import torch

from quantal import testing


def hqq_rival(weight: torch.Tensor, bits: int, group_size: int):
    from hqq.core.quantize import Quantizer

    def run():
        return Quantizer.quantize(
            weight,
            nbits=bits,
            group_size=group_size,
            optimize=True,
            round_zero=bits == 4,
            axis=1,
            device="cpu",
            compute_dtype=torch.float32,
        )

    return run


def relative_error(weight: torch.Tensor, restored: torch.Tensor) -> float:
    w = weight.float()
    return float((restored.float() - w).norm() / w.norm())


def nf4_rows(weight: torch.Tensor, seconds: float) -> list[list[str]]:
    import bitsandbytes.functional as bnb

    rows = []
    for double in (False, True):
        options = testing.options("bnb_nf4", group_size=64, double_quant=double)
        pair = pairs.measure(
            lambda options=options: testing.quantize_packed(weight, options),
            lambda double=double: bnb.quantize_4bit(
                weight, blocksize=64, compress_statistics=double, quant_type="nf4"
            ),
            seconds,
        )
        name = "NF4" + (" + double quantization" if double else "")
        rows.append(row(name, "bitsandbytes 0.50.2", weight, pair, "same bytes"))
    return rows


def hqq_rows(weight: torch.Tensor) -> list[list[str]]:
    from hqq.core.quantize import Quantizer

    rows = []
    for bits, group_size in ((4, 64), (8, 128)):
        options = testing.options(
            "hqq", bits=bits, group_size=group_size, value_dtype=torch.float32
        )
        rival = hqq_rival(weight, bits, group_size)
        start = time.perf_counter()
        codes, meta = rival()
        once = time.perf_counter() - start
        pair = pairs.measure(
            lambda options=options: testing.quantize_packed(weight, options),
            rival,
            seconds=3 * once,
            min_pairs=3,
            max_pairs=5,
        )
        theirs = relative_error(weight, Quantizer.dequantize(codes, meta))
        packed = testing.quantize_packed(weight, options)
        ours = relative_error(weight, testing.dequantize_packed(packed))
        name = f"HQQ {bits}-bit g{group_size}, solver"
        result = f"error {ours:.6f} / {theirs:.6f}"
        rows.append(row(name, "hqq 0.2.8.post1", weight, pair, result))
    return rows


def row(name: str, rival: str, weight: torch.Tensor, pair: pairs.Pair, result: str) -> list[str]:
    gigabytes = weight.numel() * weight.element_size() / 1e9
    speeds = [f"{gigabytes / pair.ours:.3f}", f"{gigabytes / pair.rival:.4f}"]
    cells = [name, rival, *speeds, f"**{pair.ratio:.1f}x**", result]
    print(cells, flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    weight = (torch.randn(args.size, args.size) * 0.02).to(torch.bfloat16)
    rows = nf4_rows(weight, args.seconds) + hqq_rows(weight)
    page = pairs.table(
        f"Quantizing a {args.size} x {args.size} bf16 matrix on the CPU",
        "python bench/quantize_speed.py" + (f" --size {args.size}" if args.size != 4096 else ""),
        ["what", "rival", "quantal GB/s", "rival GB/s", "rival time / ours", "result"],
        rows,
        "GB/s counts the bf16 input. The error is ||W - W'|| / ||W|| (quantal / rival); both run "
        "the same half-quadratic iterations with the same stopping rule.",
    )
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
