"""Products of few rows with many quantized matrices in turn, as the layers of a model, on the CPU.

    python bench/rotation.py [--rows 1,4] [--output bench/results/rotation.md]

Each call takes the next of so many copies of a matrix that all together exceed every cache, so
weights come from memory while threads stay awake (bench/forward_speed.py times single calls of
sleeping threads). Reading as many bytes, by torch's sum of int64 over as large tensors, is a
candidate too: its ratio is the share of the read bandwidth of the same seconds.
"""

from __future__ import annotations

from collections.abc import Callable

import forward_rivals
import forward_speed
import pairs
import peers_candidate
import torch

#: Bytes of all copies of a matrix: several times the last cache.
ROTATED = 160 << 20
RIVALS = {
    "NF4, double quantization": ["bitsandbytes NF4", "ggml Q4_0", "ggml Q4_K"],
    "MLX 4-bit g64": ["ggml Q4_0"],
    "HQQ 4-bit g64": ["ggml Q4_0"],
    "Q4_0": ["bitsandbytes NF4", "ggml Q4_0"],
    "Q4_K": ["ggml Q4_K"],
    "Q5_K": ["ggml Q5_K"],
    "Q6_K": ["ggml Q6_K"],
    "Q8_0": ["ggml Q8_0"],
    **dict.fromkeys(forward_speed.INT8_FORMS, ["ggml Q4_K"]),
    "Q8_0, int8 activations": ["ggml Q8_0"],
}


def copies_of(nbytes: int) -> int:
    return max(3, -(-ROTATED // nbytes))


class Ours:
    """Copies of one quantized matrix."""

    def __init__(self, candidate: peers_candidate.Candidate, weight: torch.Tensor) -> None:
        self.candidate = candidate
        handle = candidate.quantize(weight)
        self.nbytes = candidate.nbytes(handle)
        self.handles = [handle]
        for _ in range(copies_of(self.nbytes) - 1):
            self.handles.append(candidate.quantize(weight))

    def __call__(self, x: torch.Tensor) -> None:
        for handle in self.handles:
            self.candidate.matmul(handle, x)


class Reading:
    """As many bytes as the copies have, in as many tensors."""

    def __init__(self, nbytes: int, copies: int) -> None:
        self.tensors = [torch.ones(nbytes // 8, dtype=torch.int64) for _ in range(copies)]

    def __call__(self) -> None:
        for tensor in self.tensors:
            tensor.sum()


def measure_form(
    form: str,
    weight: torch.Tensor,
    rivals: dict[str, tuple[list[forward_rivals.Product], torch.dtype]],
    ms: list[int],
    seconds: float,
) -> list[list[str]]:
    ours = Ours(forward_speed.FORMS[form](), weight)
    reading = Reading(ours.nbytes, len(ours.handles))
    rows, cols = weight.shape
    found = []
    for m in ms:
        x = torch.randn(m, cols).to(torch.bfloat16)
        read = pairs.measure(lambda x=x: ours(x), reading, seconds)
        times = {}
        for name in RIVALS.get(form, []):
            if name not in rivals:
                continue
            products, dtype = rivals[name]
            theirs = x.to(dtype)

            def all_of_them(
                products: list[forward_rivals.Product] = products, theirs: torch.Tensor = theirs
            ) -> None:
                for product in products:
                    product(theirs)

            pair = pairs.measure(lambda x=x: ours(x), all_of_them, seconds)
            times[name] = pair.ratio * len(ours.handles) / len(products)
        each = read.ours / len(ours.handles)
        row = [
            f"{rows}x{cols}",
            str(m),
            form,
            f"{each * 1e3:.3f}",
            f"{ours.nbytes / each / 1e9:.1f}",
            f"{read.ratio:.0%}",
            f"{2 * m * rows * cols / each / 1e9:.0f}",
            *(f"**{times[n]:.2f}x**" if n in times else "-" for n in rivals),
        ]
        print(" | ".join(row), flush=True)
        found.append(row)
    return found


def copies_of_rivals(
    weight: torch.Tensor, makers: dict[str, tuple[Callable, torch.dtype]], used: set[str]
) -> dict[str, tuple[list[forward_rivals.Product], torch.dtype]]:
    # All of them have 4 bits a weight or more.
    copies = copies_of(weight.numel() // 2)
    return {
        name: ([make(weight) for _ in range(copies)], dtype)
        for name, (make, dtype) in makers.items()
        if name in used
    }


@torch.no_grad()
def main() -> None:
    args = forward_speed.arguments(__doc__, seconds=0.8, rows="1,4")
    torch.manual_seed(0)
    makers = forward_rivals.forward_rivals()
    used = {name for form in args.forms for name in RIVALS.get(form, [])}
    rows: list[list[str]] = []
    for out_features, in_features in forward_speed.SHAPES:
        weight = (torch.randn(out_features, in_features) * 0.02).to(torch.bfloat16)
        rivals = copies_of_rivals(weight, makers, used)
        for form in args.forms:
            rows += measure_form(form, weight, rivals, args.rows, args.seconds)
    page = pairs.table(
        "Products of few rows with many matrices in turn on the CPU",
        "python bench/rotation.py",
        [
            "weight",
            "rows of x",
            "form",
            "ms",
            "GB/s packed",
            "of reading",
            "GFLOP/s",
            *(f"{n} / ours" for n in makers if n in used),
        ],
        rows,
        "Copies of each matrix, 160 MB and more together, take turns, so weights come from memory; "
        "threads stay awake. 'Of reading': time of torch's sum of int64 over as many bytes in as "
        "many tensors, interleaved, to ours. bf16 activations (ggml takes float32 and rounds them "
        "to 8 bits), results into buffers that are kept (quantal and ggml), bitsandbytes on its "
        "packed inference path, ggml in its interleaved layout.",
    )
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
