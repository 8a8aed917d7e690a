"""What this machine can do at best, measured in the process that measures everything else."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

READ_BYTES = 512 << 20
GEMM_SIZE = 2048


@dataclass
class Limits:
    """Medians with torch's threads; GB/s and GFLOP/s. A copy counts bytes read and written."""

    read: float
    copy: float
    bf16: float
    int8: float

    def line(self) -> str:
        return (
            f"read {self.read:.1f} GB/s, copy {self.copy:.1f} GB/s read + written, "
            f"bf16 product {GEMM_SIZE}^3 {self.bf16:.0f} GFLOP/s, "
            f"int8 product {GEMM_SIZE}^3 {self.int8:.0f} GOP/s"
        )


def _median(call: Callable[[], object], repeats: int = 7) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure() -> Limits:
    source = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    target = torch.zeros_like(source)
    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE).to(torch.bfloat16)
    out = torch.empty_like(a)
    p, q = torch.randint(-127, 128, (2, GEMM_SIZE, GEMM_SIZE), dtype=torch.int8)
    q = q.t().contiguous().t()
    return Limits(
        read=READ_BYTES / _median(source.sum) / 1e9,
        copy=2 * READ_BYTES / _median(lambda: target.copy_(source)) / 1e9,
        bf16=2 * GEMM_SIZE**3 / _median(lambda: torch.mm(a, b.t(), out=out)) / 1e9,
        int8=2 * GEMM_SIZE**3 / _median(lambda: torch._int_mm(p, q)) / 1e9,
    )
