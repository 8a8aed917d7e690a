"""Decoding of whole matrices into a kept buffer, every dialect and width, beside the copy bandwidth
of the machine.

    python bench/decode_speed.py [--quick] [--output bench/results/decode_speed.md]

`layer.dequantize_weights(out=...)` to bf16, weights cold. The limit is a plain copy that reads and
writes as many bytes, run in turn with the decoding. bench/quantize_speed.py has the rivals, whose
calls return fresh memory; here bitsandbytes decodes into a kept buffer too.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import pathlib
from collections.abc import Callable

import limits
import pairs
import torch
from forward_speed import settle
from peers_candidate import Candidate

SHAPES = [(4096, 4096), (14336, 4096)]
QUICK_SHAPES = [(1024, 1024)]
#: Share of the copy bandwidth that this project wants.
GOAL = 0.8


def form(method: str, **settings: object) -> Candidate:
    return type("Form", (Candidate,), {"method": method, "settings": settings})()


FORMS: dict[str, Candidate] = {
    "NF4": form("bnb_nf4", group_size=64, double_quant=False),
    "NF4, double quantization": form("bnb_nf4", group_size=64, double_quant=True),
    "FP4": form("bnb_nf4", quant_type="fp4", group_size=64, double_quant=False),
    "LLM.int8": form("bnb_int8", bits=8),
    # Without the solver, which changes values but not the work of decoding.
    **{
        f"HQQ {bits}-bit g64": form(
            "hqq", bits=bits, group_size=64, optimize=False, value_dtype=torch.bfloat16
        )
        for bits in (8, 4, 3, 2, 1)
    },
    "Quanto qint2 g128": form("quanto_int2", bits=2, group_size=128),
    "Quanto qint4 g128": form("quanto_int4", bits=4, group_size=128),
    "Quanto qint8, per row": form("quanto_int8", bits=8),
    **{
        f"MLX {bits}-bit g64": form("mlx", bits=bits, group_size=64, mode="affine")
        for bits in (2, 3, 4, 5, 6, 8)
    },
    "MLX mxfp4": form("mlx", bits=4, group_size=32, mode="mxfp4"),
    "MLX nvfp4": form("mlx", bits=4, group_size=16, mode="nvfp4"),
    "MLX mxfp8": form("mlx", bits=8, group_size=32, mode="mxfp8"),
    **{
        f"GGUF {mode}": form("gguf", bits=0, group_size=0, mode=mode)
        for mode in "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K IQ4_NL".split()
    },
}


def bitsandbytes_decoders(weight: torch.Tensor) -> dict[str, Callable[[], object]]:
    """By form: decoding into a buffer that is kept. On the CPU `dequantize_4bit` refuses its `out`:
    this calls the C function that it ends in."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    import bitsandbytes.functional as bnb
    from bitsandbytes.cextension import lib

    out = torch.empty_like(weight)
    shape = [ctypes.c_longlong(n) for n in (64, *weight.shape)]

    def decoder(quant_type: str, double: bool) -> Callable[[], object]:
        codes, state = bnb.quantize_4bit(
            weight, blocksize=64, compress_statistics=double, quant_type=quant_type
        )
        call = getattr(lib, f"cdequantize_blockwise_cpu_{quant_type}_bf16")

        def decode() -> torch.Tensor:
            absmax = state.absmax
            if double:
                absmax = bnb.dequantize_blockwise(absmax, state.state2).add_(state.offset)
            call(bnb.get_ptr(codes), bnb.get_ptr(absmax), bnb.get_ptr(out), *shape)
            return out

        if not torch.equal(decode(), bnb.dequantize_4bit(codes, state)):
            raise SystemExit("decode_speed: bitsandbytes decodes otherwise than its own function")
        return decode

    return {
        "NF4": decoder("nf4", False),
        "NF4, double quantization": decoder("nf4", True),
        "FP4": decoder("fp4", False),
    }


def copier(nbytes: int) -> Callable[[], object]:
    """A copy that reads and writes `nbytes` together."""
    source = torch.ones(nbytes // 2 // 8, dtype=torch.int64)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def measure_form(
    name: str, weight: torch.Tensor, rival: Callable[[], object] | None, seconds: float
) -> list[str]:
    candidate = FORMS[name]
    handle = candidate.quantize(weight)
    decoded = candidate.dequantize(handle)
    nbytes = candidate.nbytes(handle) + decoded.numel() * decoded.element_size()
    ours = lambda: candidate.dequantize(handle)  # noqa: E731
    copying = pairs.measure(ours, copier(nbytes), seconds, between=settle)
    beside = "-"
    if rival is not None:
        pair = pairs.measure(ours, rival, seconds, between=settle)
        beside = f"**{pair.ratio:.2f}x**"
    cells = [
        f"{weight.shape[0]}x{weight.shape[1]}",
        name,
        f"{copying.ours * 1e3:.2f}",
        f"{nbytes / copying.ours / 1e9:.1f}",
        f"{copying.ratio:.0%}",
        "yes" if copying.ratio >= GOAL else "NO",
        beside,
    ]
    print(cells, flush=True)
    return cells


HEADER = [
    "weight",
    "form",
    "ms",
    "GB/s read + written",
    "of a copy",
    f">= {GOAL:.0%}",
    "bitsandbytes, kept buffer / ours",
]
NOTES = """\
bf16, caches evicted before each call. GB/s counts packed bytes read and decoded bytes written; a
copy moves as many bytes, half of them written, in turn with the decoding. A long copy in the same
run: {copy:.1f} GB/s read + written.
"""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape, short runs")
    parser.add_argument("--seconds", type=float, default=0.3, help="of one pair")
    parser.add_argument("--forms", default="", help="comma separated beginnings of names")
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    seconds = 0.1 if args.quick else args.seconds
    torch.manual_seed(0)
    top = limits.measure()
    rows = []
    for shape in QUICK_SHAPES if args.quick else SHAPES:
        weight = (torch.randn(*shape) * 0.02).to(torch.bfloat16)
        rivals = bitsandbytes_decoders(weight)
        for name in FORMS:
            if name.startswith(tuple(args.forms.split(","))):
                rows.append(measure_form(name, weight, rivals.get(name), seconds))
    page = pairs.table(
        "Decoding into a kept buffer on the CPU",
        "python bench/decode_speed.py" + (" --quick" if args.quick else ""),
        HEADER,
        rows,
        NOTES.format(copy=top.copy).replace("\n", " "),
    )
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
