"""Products with one quantized matrix while gradients are recorded, beside torch bf16 and
bitsandbytes, on the CPU.

    python bench/grad_speed.py [--quick] [--output bench/results/grad_speed.md]

Three things are timed, each as a user of autograd reaches it: the forward product of an x that
requires its gradient, the same with its backward pass, and the backward pass of 512 rows alone
(the gradient of the input). bitsandbytes runs what its Linear4bit runs under autograd: dequantize,
then a dense product, once more in the backward pass.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable

import forward_rivals
import limits
import pairs
import peers_candidate
import torch
from forward_speed import settle

import quantal

SHAPES = [(4096, 4096), (14336, 4096)]
QUICK_SHAPES = [(1024, 1024)]
FORMS: dict[str, type[peers_candidate.Candidate]] = {
    "NF4, double quantization": peers_candidate.Nf4Double,
    "HQQ 4-bit g64": peers_candidate.Hqq4,
    "MLX 4-bit g64": peers_candidate.Mlx4,
}
RIVALS = {
    "torch bf16": forward_rivals.torch_bf16,
    "bitsandbytes": forward_rivals.bitsandbytes_training,
}
FEW, MANY = (1, 4, 16), 512
#: Rival time / ours that this project wants, by rows of x.
GOALS = {m: {"bitsandbytes": 5.0} for m in FEW} | {MANY: {"torch bf16": 0.9, "bitsandbytes": 1.3}}

Product = Callable[[torch.Tensor], torch.Tensor]
Work = Callable[[Product], Callable[[], object]]


def forward(x: torch.Tensor) -> Work:
    return lambda product: lambda: product(x)


def forward_and_backward(x: torch.Tensor, grad: torch.Tensor) -> Work:
    return lambda product: lambda: torch.autograd.grad(product(x), x, grad)


def backward(x: torch.Tensor, grad: torch.Tensor) -> Work:
    """The backward pass alone: the graph is built once and kept."""

    def prepare(product: Product) -> Callable[[], object]:
        y = product(x)
        return lambda: torch.autograd.grad(y, x, grad, retain_graph=True)

    return prepare


def works(rows: int, cols: int) -> list[tuple[int, str, int, Work]]:
    """(rows of x, what is done, products in it, how)."""
    found: list[tuple[int, str, int, Work]] = []
    for m in (*FEW, MANY):
        x = torch.randn(m, cols).to(torch.bfloat16).requires_grad_(True)
        grad = torch.randn(m, rows).to(torch.bfloat16)
        if m == MANY:
            found.append((m, "backward", 1, backward(x, grad)))
        else:
            found.append((m, "forward", 1, forward(x)))
            found.append((m, "forward + backward", 2, forward_and_backward(x, grad)))
    return found


def measure_form(
    form: str,
    weight: torch.Tensor,
    rivals: dict[str, Product],
    seconds: float,
    top: limits.Limits,
) -> list[list[str]]:
    layer = FORMS[form]().quantize(weight).layer
    rows, cols = weight.shape
    found = []
    for m, what, products, work in works(rows, cols):
        ours = work(lambda x: quantal.functional.linear(x, layer))
        taken = {
            name: pairs.measure(ours, work(product), seconds, between=settle)
            for name, product in rivals.items()
        }
        best = min(pair.ours for pair in taken.values())
        speed = 2 * m * rows * cols * products / best / 1e9
        goals = GOALS[m]
        met = all(taken[name].ratio >= goal for name, goal in goals.items())
        found.append(
            [
                f"{rows}x{cols}",
                str(m),
                what,
                form,
                f"{best * 1e3:.2f}",
                f"{speed:.0f}",
                f"{speed / top.bf16:.0%}",
                *(f"**{taken[name].ratio:.2f}x**" for name in rivals),
                ", ".join(f"{goal}x {name}" for name, goal in goals.items()),
                "yes" if met else "NO",
            ]
        )
        print(found[-1], flush=True)
    return found


HEADER = [
    "weight",
    "rows of x",
    "what",
    "form",
    "ms",
    "GFLOP/s",
    "of the limit",
    *(f"{name} / ours" for name in RIVALS),
    "goal",
    "result",
]
NOTES = """\
Limits in the same run: {limits}; the limit of a row is the dense product. A product counts
2 * rows of x * weights operations. x and its gradient are bf16 and in fresh memory on all sides,
caches evicted before each call. bitsandbytes is `matmul_4bit` on NF4 with double quantization,
with x requiring its gradient: `MatMul4Bit`, which dequantizes the matrix for each product.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape, short runs")
    parser.add_argument("--seconds", type=float, default=0.4, help="of one pair of candidates")
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    seconds = 0.1 if args.quick else args.seconds
    torch.manual_seed(0)
    top = limits.measure()
    rows: list[list[str]] = []
    for shape in QUICK_SHAPES if args.quick else SHAPES:
        weight = (torch.randn(*shape) * 0.02).to(torch.bfloat16)
        rivals = {name: make(weight) for name, make in RIVALS.items()}
        for form in FORMS:
            rows += measure_form(form, weight, rivals, seconds, top)
    page = pairs.table(
        "Products with a quantized matrix under autograd on the CPU",
        "python bench/grad_speed.py" + (" --quick" if args.quick else ""),
        HEADER,
        rows,
        NOTES.format(limits=top.line()).replace("\n", " "),
    )
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
