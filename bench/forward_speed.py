"""Products with one quantized matrix beside every rival that is installed, on the CPU.

    python bench/forward_speed.py [--rows 1,4,16,512] [--output bench/results/forward_speed.md]

Times are wall times of single calls with the caches evicted before each (weights come from memory,
as in a model larger than the cache), quantal and the rival in turn. The limits of the machine are
measured in the same run. Writes a table and a picture beside it.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import forward_plot
import forward_rivals
import limits
import pairs
import peers_candidate
import torch

SHAPES = [(4096, 4096), (14336, 4096)]
FORMS: dict[str, type[peers_candidate.Candidate]] = {
    "NF4, double quantization": peers_candidate.Nf4Double,
    "MLX 4-bit g64": peers_candidate.Mlx4,
    "HQQ 4-bit g64": peers_candidate.Hqq4,
    "Q4_0": peers_candidate.Q40,
    "Q4_K": peers_candidate.Q4K,
    "Q5_K": peers_candidate.Q5K,
    "Q6_K": peers_candidate.Q6K,
    "HQQ 8-bit g64": peers_candidate.Hqq8,
    "Q8_0": peers_candidate.Q80,
    "MLX 3-bit g64": peers_candidate.Mlx3,
    "Quanto 2-bit g128": peers_candidate.QuantoInt2,
}
#: The same forms with activations that are rounded to int8 (docs/performance.md).
INT8_FORMS: dict[str, type[peers_candidate.Candidate]] = {
    "HQQ 4-bit g64, int8 activations": peers_candidate.Hqq4Int8,
    "MLX 4-bit g64, int8 activations": peers_candidate.Mlx4Int8,
    "Q4_0, int8 activations": peers_candidate.Q40Int8,
    "Q4_K, int8 activations": peers_candidate.Q4KInt8,
    "NF4, int8 activations": peers_candidate.Nf4DoubleInt8,
    "Q8_0, int8 activations": peers_candidate.Q80Int8,
}
FORMS |= INT8_FORMS
#: Rivals of each form, beside torch bf16: those that store as many bits.
RIVALS = {
    "NF4, double quantization": ["bitsandbytes NF4", "torch int4", "ggml Q4_0", "ggml Q4_K"],
    "MLX 4-bit g64": ["ggml Q4_0"],
    "Q4_0": ["bitsandbytes NF4", "ggml Q4_0"],
    **{name: [f"ggml {name}"] for name in ("Q4_K", "Q5_K", "Q6_K", "Q8_0")},
    **dict.fromkeys(INT8_FORMS, ["ggml Q4_0", "ggml Q4_K"]),
    "Q8_0, int8 activations": ["ggml Q8_0"],
}
_FLUSH = torch.ones(12 << 20, dtype=torch.int64)


def settle() -> None:
    """Evicts the caches and lets the threads of every library fall asleep."""
    _FLUSH.sum()
    time.sleep(0.003)


@dataclass
class Row:
    """One line of the table; `speed` is GB/s of packed bytes for one row of x, else GFLOP/s."""

    shape: str
    m: int
    form: str
    milliseconds: float
    speed: float
    share: float  # of the limit: bytes read, or the machine's dense product, bfloat16 or int8
    rivals: dict[str, float]  # rival time / ours


def measure_form(
    form: str,
    weight: torch.Tensor,
    products: dict[str, tuple[Callable, torch.dtype]],
    ms: list[int],
    seconds: float,
    top: limits.Limits,
) -> list[Row]:
    candidate = FORMS[form]()
    handle = candidate.quantize(weight)
    rows, cols = weight.shape
    found = []
    for m in ms:
        x = torch.randn(m, cols).to(torch.bfloat16)
        names = [n for n in ["torch bf16", *RIVALS.get(form, [])] if n in products]
        ratios, ours = {}, []
        for name in names:
            product, dtype = products[name]
            theirs = x.to(dtype)
            pair = pairs.measure(
                lambda x=x: candidate.matmul(handle, x),
                lambda product=product, theirs=theirs: product(theirs),
                seconds,
                between=settle,
            )
            ratios[name] = pair.ratio
            ours.append(pair.ours)
        best = sorted(ours)[len(ours) // 2]
        if m == 1:
            speed = candidate.nbytes(handle) / best / 1e9
            share = speed / top.read
        else:
            speed = 2 * m * rows * cols / best / 1e9
            share = speed / (top.int8 if form in INT8_FORMS else top.bf16)
        found.append(Row(f"{rows}x{cols}", m, form, best * 1e3, speed, share, ratios))
        print(found[-1], flush=True)
    return found


def cells(row: Row, names: list[str]) -> list[str]:
    unit = "GB/s" if row.m == 1 else "GFLOP/s"
    ratios = [f"**{row.rivals[n]:.2f}x**" if n in row.rivals else "-" for n in names]
    return [
        row.shape,
        str(row.m),
        row.form,
        f"{row.milliseconds:.2f}",
        f"{row.speed:.1f} {unit}" if row.m == 1 else f"{row.speed:.0f} {unit}",
        f"{row.share:.0%}",
        *ratios,
    ]


@dataclass
class Arguments:
    seconds: float
    rows: list[int]
    forms: list[str]
    output: pathlib.Path | None


def arguments(description: str | None, seconds: float, rows: str) -> Arguments:
    """Those of the command line; `seconds` and `rows` are their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=seconds, help="of one pair of candidates")
    parser.add_argument("--rows", default=rows, help="rows of x, comma separated")
    parser.add_argument("--forms", default="all", help="semicolon separated beginnings of names")
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    wanted = tuple(args.forms.split(";"))
    forms = [f for f in FORMS if args.forms == "all" or f.startswith(wanted)]
    return Arguments(args.seconds, list(map(int, args.rows.split(","))), forms, args.output)


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__, seconds=0.6, rows="1,4,16,512")
    torch.manual_seed(0)
    top = limits.measure()
    rows: list[Row] = []
    rivals = forward_rivals.forward_rivals()
    for out_features, in_features in SHAPES:
        weight = (torch.randn(out_features, in_features) * 0.02).to(torch.bfloat16)
        used = {"torch bf16", *itertools.chain(*(RIVALS.get(f, []) for f in args.forms))}
        products = {n: (make(weight), t) for n, (make, t) in rivals.items() if n in used}
        for form in args.forms:
            rows += measure_form(form, weight, products, args.rows, args.seconds, top)
    names = [n for n in rivals if any(n in r.rivals for r in rows)]
    page = pairs.table(
        "Products with a quantized matrix on the CPU",
        "python bench/forward_speed.py",
        [
            "weight",
            "rows of x",
            "form",
            "ms",
            "speed",
            "of the limit",
            *(f"{n} / ours" for n in names),
        ],
        [cells(row, names) for row in rows],
        f"Limits in the same run: {top.line()}. Speed is packed bytes per second for one row of x, "
        "else 2 * rows * weights per second; the limit is the read bandwidth or the dense product, "
        "that of int8 (torch._int_mm) for forms with int8 activations. "
        "bf16 activations (ggml takes float32 and rounds them to 8 bits), caches evicted before "
        "each call, results into a buffer that is kept (quantal and ggml). bitsandbytes on its "
        "packed inference path, ggml in its interleaved layout. A limit is a median too: a share "
        "above 100% says that the machine was slower while the limit was taken.",
    )
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")
        exact = [row for row in rows if row.form not in INT8_FORMS]
        if exact:
            picture = args.output.with_suffix(".svg")
            picture.write_text(forward_plot.svg(exact, top), encoding="utf-8")


if __name__ == "__main__":
    main()
