"""What calls cost: a quantized layer in Python beside `nn.Linear`, in C++ beside its own kernel;
and `quantize_model` beside the codecs.

    python bench/overhead.py [--seconds 4] [--output bench/results/overhead.md]

One thread: on a busy machine two of them measure how long one waits for the other. A call runs one
row through a square layer, float32; the first size is one of SmolLM2, the second so small that
nothing but the call is left. `quantize_model` runs on SmolLM2-135M; the codecs alone are
`torch.ops.quantal.quantize` over the same weights with the same settings, results kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import subprocess
import time
from collections.abc import Callable

import pairs
import torch
from torch import nn

import quantal
from quantal import QuantizationConfig, QuantizedLinear, replace

OPTIONS = {"support": "extended"}
METHODS = {
    "NF4 + double quantization": QuantizationConfig(
        "bnb_nf4", compute_dtype=torch.float32, backend_options=OPTIONS
    ),
    "HQQ 4-bit g64": QuantizationConfig(
        "hqq", bits=4, group_size=64, compute_dtype=torch.float32, backend_options=OPTIONS
    ),
    "MLX 4-bit g64": QuantizationConfig(
        "mlx_int4", compute_dtype=torch.float32, backend_options=OPTIONS
    ),
    "LLM.int8, weights only": QuantizationConfig(
        "bnb_int8", compute_dtype=torch.float32, backend_options=OPTIONS
    ),
}
CALL_LIMIT, QUANTIZE_LIMIT, CPP_LIMIT = 1.5, 1.2, 2.0
PROGRAM = pathlib.Path(__file__).parents[1] / "build/release/bench/call_overhead"
#: Calls in one timed sample.
CALLS = 50


def repeated(layer: nn.Module, x: torch.Tensor, grad: bool) -> Callable[[], None]:
    def calls() -> None:
        with torch.set_grad_enabled(grad):
            for _ in range(CALLS):
                layer(x)

    return calls


def call_rows(seconds: float) -> list[list[str]]:
    rows = []
    for size in (576, 64):
        for name, config in METHODS.items():
            torch.manual_seed(0)
            dense = nn.Linear(size, size).requires_grad_(False)
            packed = QuantizedLinear.from_linear(dense, config)
            for grad in (False, True):
                x = torch.randn(1, size, requires_grad=grad)
                pair = pairs.measure(
                    repeated(packed, x, grad), repeated(dense, x, grad), seconds=seconds
                )
                ratio = 1 / pair.ratio
                limit = ("yes" if ratio <= CALL_LIMIT else "NO") if size == 576 else "-"
                rows.append(
                    [
                        f"{size} x {size}",
                        name,
                        "x requires grad" if grad else "no grad",
                        f"{pair.ours / CALLS * 1e6:.1f}",
                        f"{pair.rival / CALLS * 1e6:.1f}",
                        f"{ratio:.2f}x",
                        limit,
                    ]
                )
                print(rows[-1], flush=True)
    return rows


def cpp_rows() -> list[list[str]]:
    """bench/call_overhead.cpp."""
    if not PROGRAM.exists():
        raise SystemExit(f"overhead: {PROGRAM} is missing: run `make bench-programs`")
    out = subprocess.run([str(PROGRAM)], check=True, stdout=subprocess.PIPE, text=True).stdout
    found = [json.loads(line) for line in out.splitlines()]
    return [
        [
            row["form"],
            row["dtype"],
            f"{row['call_us']:.1f}",
            f"{row['kernel_us']:.1f}",
            f"{row['overhead_us']:.1f}",
            "yes" if row["overhead_us"] < CPP_LIMIT else "NO",
        ]
        for row in found
    ]


def codecs_alone(model: nn.Module, work: list, give_back: bool = True) -> list:
    """What `quantize_model` cannot do without: codes of all layers, kept; and, if asked, the dense
    weights freed and their memory given back to the system as often as it does."""
    packed, freed = [], 0
    for name, spec in work:
        layer = model.get_submodule(name)
        packed.append(torch.ops.quantal.quantize(layer.weight.detach(), spec))
        if give_back:
            freed += layer.weight.numel() * layer.weight.element_size()
            layer.weight = None
            if freed >= replace.TRIM_BYTES:
                freed = replace._return_free_memory()
    if give_back:
        replace._return_free_memory()
    return packed


def quantize_rows(seconds: float) -> list[list[str]]:
    dense, _ = quantal.load_gguf(pairs.smollm2_gguf(), dtype=torch.float32)
    rows = []
    for name, config in METHODS.items():
        adapter = quantal.create_quantization_adapter(quantal.Backend.CPU, config)
        done = adapter.quantize_model(copy.deepcopy(dense))
        work = [(n, m._spec) for n, m in done.named_modules() if isinstance(m, QuantizedLinear)]
        model: list[nn.Module] = []
        kept: list = []  # until the clock stands: freeing results is no part of either side

        def fresh(model: list[nn.Module] = model, kept: list = kept) -> None:
            model.clear(), kept.clear()
            replace._return_free_memory()  # neither side begins with memory that the other left
            model.append(copy.deepcopy(dense))

        def ours(adapter=adapter, model: list[nn.Module] = model) -> None:
            adapter.quantize_model(model[0])

        def codecs(work=work, model: list[nn.Module] = model, kept: list = kept) -> None:
            kept.append(codecs_alone(model[0], work))

        pair = pairs.measure(
            ours, codecs, seconds=5 * seconds, min_pairs=9, between=fresh, clock=time.process_time
        )
        fresh()
        start = time.process_time()
        kept.append(codecs_alone(model[0], work, give_back=False))
        alone = time.process_time() - start
        ratio = 1 / pair.ratio
        rows.append(
            [
                name,
                f"{pair.ours:.3f}",
                f"{alone:.3f}",
                f"{pair.rival:.3f}",
                f"{(pair.ours - pair.rival) / len(work) * 1e3:.2f}",
                f"{ratio:.2f}x",
                "yes" if ratio <= QUANTIZE_LIMIT else "NO",
            ]
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="per row of the tables")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--only", choices=("calls", "cpp", "quantize"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    page = pairs.heading("What the Python face costs", "python bench/overhead.py").replace(
        pairs.FIGURE, "- figure: median of interleaved pair ratios in one process (quantal / rival)"
    )
    if args.only in (None, "calls"):
        page += "\n## A call with one row, bias, float32\n\n" + pairs.grid(
            ["layer", "method", "mode", "quantal us", "nn.Linear us", "ratio", "<= 1.5x"],
            call_rows(args.seconds),
        )
        page += (
            "\nAt 64 x 64 next to nothing is computed: the ratio is that of the calls themselves "
            "and has no limit.\n"
        )
    if args.only in (None, "cpp"):
        page += "\n## A call from C++ with one row, 576 x 576\n\n" + pairs.grid(
            ["method", "activations", "call us", "kernel us", "difference us", "< 2 us"],
            cpp_rows(),
        )
        page += "\nThe kernel alone runs on the same buffers in turn with `quantal::Linear`.\n"
    if args.only in (None, "quantize"):
        page += "\n## quantize_model on SmolLM2-135M, float32\n\n" + pairs.grid(
            [
                "method",
                "quantize_model s",
                "codecs alone s",
                "and memory given back s",
                "ms more per layer",
                "ratio",
                "<= 1.2x",
            ],
            quantize_rows(args.seconds),
        )
        page += (
            "\nProcessor time, 210 layers. The ratio is to the codecs over the same weights with "
            "their results kept, the dense weights freed and that memory given back to the system, "
            "which every replacement has to do: without it memory would hold both models. Each run "
            "has a fresh copy of the model and no free memory of the run before. The rest is a "
            "module, a row of the report with an error from samples, and a checksum for each "
            "layer. Memory during `quantize_model`: [memory.md](memory.md).\n"
        )
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
