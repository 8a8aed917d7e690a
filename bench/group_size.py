"""Group sizes of HQQ 4-bit: time of a product, error and bytes, against groups of 32.

    python bench/group_size.py [--output bench/results/group_size.md]

The tip "smaller groups for better quality, larger for speed" of docs/api.md, measured.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import pathlib
from collections.abc import Callable

import pairs
import torch
from torch import nn

import quantal

SHAPE = (4096, 4096)
SIZES = (32, 64, 128, 256)
ROTATE_BYTES = 256 << 20


def quantized(linear: nn.Linear, group_size: int) -> nn.Module:
    config = quantal.QuantizationConfig(
        method="hqq",
        bits=4,
        group_size=group_size,
        compute_dtype=torch.bfloat16,
        skip_modules=[],
        backend_options={"support": "extended"},
    )
    adapter = quantal.create_quantization_adapter(quantal.Backend.CPU, config)
    return adapter.quantize_model(nn.Sequential(linear))[0]


def rotating(layer: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Calls with copies that together exceed the cache, as in a model."""
    tensors = itertools.chain(layer.parameters(), layer.buffers())
    size = sum(t.numel() * t.element_size() for t in tensors)
    copies = [layer] + [copy.deepcopy(layer) for _ in range(max(1, ROTATE_BYTES // size))]
    cycle = itertools.cycle(copies)

    @torch.no_grad()
    def run() -> torch.Tensor:
        return next(cycle)(x)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=6.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    linear = nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.bfloat16)
    weight = linear.weight.detach().clone()

    def layer(size: int) -> nn.Module:
        dense = nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.bfloat16)
        dense.weight.data.copy_(weight)
        return quantized(dense, size)

    layers = {size: layer(size) for size in SIZES}
    rows = []
    for m in (1, 16, 512):
        x = torch.randn(m, SHAPE[1], dtype=torch.bfloat16)
        base = rotating(layers[SIZES[0]], x)
        for size in SIZES[1:]:
            pair = pairs.measure(rotating(layers[size], x), base, args.seconds)
            error = layers[size].relative_error(weight)
            per = layers[size].packed_bytes() / weight.numel()
            rows.append([str(m), str(size), f"{pair.ours * 1e3:.2f}", f"**{pair.ratio:.2f}x**"])
            rows[-1] += [f"{error:.4f}", f"{per:.4f}"]
            print("  ".join(rows[-1]), flush=True)
    first = layers[SIZES[0]]
    note = (
        f"Groups of 32 themselves: error {first.relative_error(weight):.4f}, "
        f"{first.packed_bytes() / weight.numel():.4f} bytes per weight. bf16 activations, cold "
        "weights (copies rotate through 256 MiB)."
    )
    columns = ["rows of x", "group size", "ms", "time of groups of 32 / ours"]
    columns += ["relative error", "bytes per weight"]
    page = pairs.table(
        f"Group sizes of HQQ 4-bit, {SHAPE[0]} x {SHAPE[1]}, on the CPU",
        "python bench/group_size.py",
        columns,
        rows,
        note,
    )
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
