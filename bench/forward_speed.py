"""One token through a quantized linear layer against bf16 `nn.Linear` and bitsandbytes, on the CPU.

    python bench/forward_speed.py [--output bench/results/forward_speed.md]

Weights rotate through enough copies that they come from memory, as in a model larger than the
cache.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib

import pairs
import torch
from torch import nn

import quantal

SHAPES = [(4096, 4096), (14336, 4096)]
ROTATE_BYTES = 256 << 20


def quantized(linear: nn.Linear, method: str, **config) -> nn.Module:
    options = {"support": "extended"}
    adapter = quantal.create_quantization_adapter(
        quantal.Backend.CPU,
        quantal.QuantizationConfig(
            method=method,
            compute_dtype=torch.bfloat16,
            skip_modules=[],
            backend_options=options,
            **config,
        ),
    )
    return adapter.quantize_model(nn.Sequential(linear))[0]


def copies(layer: nn.Module) -> list[nn.Module]:
    import copy

    size = sum(
        t.numel() * t.element_size() for t in itertools.chain(layer.parameters(), layer.buffers())
    )
    return [layer] + [copy.deepcopy(layer) for _ in range(max(1, ROTATE_BYTES // size))]


def rotating(layer: nn.Module, x: torch.Tensor):
    layers = copies(layer)
    with torch.no_grad():
        for each in layers:  # bitsandbytes converts its weight on the first call
            each(x)
    cycle = itertools.cycle(layers)

    @torch.no_grad()
    def run():
        return next(cycle)(x)

    return run


def bitsandbytes_layer(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
    )
    new.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=new,
    )
    return new.to("cpu").eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--rows", default="1,16,512", help="rows of activations, comma separated")
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for (out_features, in_features), m in itertools.product(SHAPES, map(int, args.rows.split(","))):
        linear = nn.Linear(
            in_features, out_features, bias=False, dtype=torch.bfloat16
        ).requires_grad_(False)
        x = torch.randn(m, in_features, dtype=torch.bfloat16)
        dense = rotating(linear, x)
        cases = [
            ("NF4 + double quantization", quantized(_copy(linear), "bnb_nf4")),
            ("HQQ 4-bit g64", quantized(_copy(linear), "hqq", bits=4, group_size=64)),
            ("HQQ 8-bit g128", quantized(_copy(linear), "hqq", bits=8, group_size=128)),
        ]
        theirs = rotating(bitsandbytes_layer(linear), x)
        for name, layer in cases:
            ours = rotating(layer, x)
            dense_pair = pairs.measure(ours, dense, args.seconds)
            cells = [
                f"{out_features}x{in_features}",
                str(m),
                name,
                f"{dense_pair.ours * 1e3:.2f}",
                f"**{dense_pair.ratio:.2f}x**",
            ]
            if "NF4" in name:
                pair = pairs.measure(ours, theirs, args.seconds)
                cells.append(f"**{pair.ratio:.2f}x**")
            else:
                cells.append("-")
            rows.append(cells)
            print(cells, flush=True)
    page = pairs.table(
        "A quantized linear layer against bf16 nn.Linear and bitsandbytes on the CPU",
        "python bench/forward_speed.py",
        [
            "weight",
            "rows of x",
            "method",
            "quantal ms",
            "bf16 nn.Linear / ours",
            "bitsandbytes NF4 / ours",
        ],
        rows,
        "bf16 activations, cold weights (copies rotate through 256 MiB). bitsandbytes runs its "
        "inference path without gradient, NF4 with double quantization.",
    )
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


def _copy(linear: nn.Linear) -> nn.Linear:
    import copy

    return copy.deepcopy(linear)


if __name__ == "__main__":
    main()
