"""Weights that find differences: heavy tails, zero and constant blocks, ties, subnormals."""

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_weight(rows: int, cols: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A [rows, cols] matrix whose rows take turns through the kinds above."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator) * 0.05
    kinds = [
        lambda row: row,
        lambda row: row / (torch.rand(cols, generator=generator) + 1e-2),
        lambda row: torch.zeros(cols),
        lambda row: torch.full((cols,), 0.0371),
        lambda row: torch.linspace(-1, 1, cols),
        lambda row: row * 1e-38,
        lambda row: row.abs() + 0.01,
        lambda row: torch.where(torch.arange(cols) == seed % cols, torch.tensor(40.0), row),
    ]
    for r in range(rows):
        if r % 3 == 2:  # two thirds stay normal
            w[r] = kinds[(r // 3 + seed) % len(kinds)](w[r])
    return w.to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes (a view as integers: NaN patterns and -0 count)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype and values; -0 and +0 are the same value."""
    return a.dtype == b.dtype and torch.equal(a, b)
