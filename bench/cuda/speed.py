"""Times of the CUDA kernels beside torch, in one run: every path is captured into a graph that
walks through several copies of its weights, larger together than the second-level cache, and graphs
are replayed in turn so that the state of the card is the same for all."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import forms
import torch
from library import Library, Quantized, Weight

ROUNDS = 7
FORMS = {form.name: form for form in forms.FORMS}


@dataclass
class Limits:
    """What the card reached in this run."""

    copy: float  # bytes per second, read and written
    gemm: float  # FLOP per second, bfloat16


@dataclass
class Row:
    """A measured path."""

    what: str
    path: str
    seconds: float
    moved: int  # least bytes: each input read once, each output written once
    flop: int


@functools.lru_cache(maxsize=4)
def _bytes(name: str, rows: int, cols: int) -> tuple[torch.Tensor, ...]:
    return forms.random_bytes(FORMS[name], rows, cols)


def _weights(name: str, rows: int, cols: int) -> list[Weight]:
    """Copies of a random matrix, more than the cache holds."""
    buffers = _bytes(name, rows, cols)
    copies = _copies(sum(t.numel() for t in buffers))
    spec = FORMS[name].spec(rows, cols)
    return [Weight(spec, *(t.to("cuda", copy=True) for t in buffers)) for _ in range(copies)]


def _graph(calls: list[Callable[[], None]]) -> torch.cuda.CUDAGraph:
    for call in calls[:2]:  # warm up outside of the capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def interleaved(paths: dict[str, list[Callable[[], None]]]) -> dict[str, float]:
    """Median seconds of one call of each path."""
    graphs = {name: _graph(calls) for name, calls in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in paths}
    for graph in graphs.values():
        graph.replay()
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3 / len(paths[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def limits() -> Limits:
    """A copy of 2 GiB and a square product of bfloat16 random numbers."""
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    copy = interleaved({"copy": [lambda: b.copy_(a)] * 4})["copy"]
    n = 8192
    x, y = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    z = torch.empty_like(x)
    gemm = interleaved({"gemm": [lambda: torch.mm(x, y, out=z)] * 4})["gemm"]
    return Limits(2 * a.numel() * 4 / copy, 2 * n**3 / gemm)


def _copies(bytes_each: int) -> int:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(32, math.ceil(4 * cache / bytes_each)))


def _int4_rival(rows: int, cols: int, x: torch.Tensor, copies: int) -> list[Callable[[], None]]:
    """torch's own int4 product (tinygemm); raises where this card or build has none."""
    packed = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randn(cols // 64, rows, 2, device="cuda", dtype=torch.bfloat16)
    weights = [torch.ops.aten._convert_weight_to_int4pack(packed, 8) for _ in range(copies)]
    return [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, 64, scales) for w in weights]


def forward(library: Library, name: str, rows: int, cols: int, m: int) -> list[Row]:
    """All paths of one product."""
    weights = _weights(name, rows, cols)
    weight_bytes = weights[0].bytes()
    dense_bytes = rows * cols * 2
    dense = [
        torch.randn(rows, cols, device="cuda").mul_(0.02).bfloat16()
        for _ in range(_copies(dense_bytes))
    ]
    x = torch.randn(m, cols, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(m, rows, device="cuda", dtype=torch.bfloat16)
    panel = torch.empty(rows, cols, device="cuda", dtype=torch.bfloat16)

    def by_panel(w) -> None:
        library.dequantize(w, panel)
        torch.mm(x, panel.t(), out=y)

    paths = {"torch bf16": [lambda d=d: torch.mm(x, d.t(), out=y) for d in dense]}
    if m <= 16:
        paths["small"] = [lambda w=w: library.matmul("small_matmul", w, x, y) for w in weights]
    paths["tiles"] = [lambda w=w: library.matmul("tile_matmul", w, x, y) for w in weights]
    paths["dequantize + torch"] = [lambda w=w: by_panel(w) for w in weights]
    try:
        paths["torch int4"] = _int4_rival(rows, cols, x, len(weights))
        paths["torch int4"][0]()
    except (RuntimeError, AttributeError):
        paths.pop("torch int4", None)
    ends = (x.numel() + y.numel()) * 2
    flop = 2 * m * rows * cols
    what = f"{name}, {rows} x {cols}, m {m}"
    return [
        Row(what, path, t, (dense_bytes if path == "torch bf16" else weight_bytes) + ends, flop)
        for path, t in interleaved(paths).items()
    ]


def backward(library: Library, name: str, rows: int, cols: int, m: int) -> list[Row]:
    """dx = g w."""
    w = _weights(name, rows, cols)[0]
    g = torch.randn(m, rows, device="cuda", dtype=torch.bfloat16)
    dx = torch.empty(m, cols, device="cuda", dtype=torch.bfloat16)
    panel = torch.randn(rows, cols, device="cuda").mul_(0.02).bfloat16()
    scratch = torch.empty_like(panel)

    def by_panel() -> None:
        library.dequantize(w, scratch)
        torch.mm(g, scratch, out=dx)

    times = interleaved(
        {
            "torch bf16": [lambda: torch.mm(g, panel, out=dx)] * 2,
            "tiles": [lambda: library.matmul("tile_matmul_transposed", w, g, dx)] * 2,
            "dequantize + torch": [by_panel] * 2,
        }
    )
    ends, flop = (g.numel() + dx.numel()) * 2, 2 * m * rows * cols
    what = f"backward, {name}, {rows} x {cols}, m {m}"
    return [
        Row(what, p, t, (rows * cols * 2 if p == "torch bf16" else w.bytes()) + ends, flop)
        for p, t in times.items()
    ]


def decode(library: Library, name: str, rows: int, cols: int) -> list[Row]:
    """Dequantizing to bfloat16."""
    weights = _weights(name, rows, cols)
    out = torch.empty(rows, cols, device="cuda", dtype=torch.bfloat16)
    times = interleaved({"dequantize": [lambda w=w: library.dequantize(w, out) for w in weights]})
    moved = weights[0].bytes() + out.numel() * 2
    return [Row(f"dequantize, {name}, {rows} x {cols}", p, t, moved, 0) for p, t in times.items()]


def quantize(library: Library, name: str, rows: int, cols: int) -> list[Row]:
    """A bfloat16 weight into its buffers; `moved` counts it once, the solver reads it again."""
    weights = [
        torch.randn(rows, cols, device="cuda").mul_(0.02).bfloat16()
        for _ in range(_copies(rows * cols * 2))
    ]
    made = [Quantized(library, name, weight) for weight in weights]
    times = interleaved({"quantize": [q.run for q in made]})
    what = f"quantize, {name}, {rows} x {cols}"
    return [Row(what, path, t, made[0].moved(), 0) for path, t in times.items()]


def measure(library: Library, quick: bool) -> list[Row]:
    """The table of docs/cuda.md's targets."""
    shapes = [(4096, 4096)] if quick else [(4096, 4096), (14336, 4096), (28672, 8192)]
    rows: list[Row] = []
    for shape in shapes:
        for name in ("NF4 nested", "HQQ 4 bits", "MLX 4 bits"):
            for m in (1, 16):
                rows += forward(library, name, *shape, m)
        for m in (4, 8, 32, 64, 128, 256, 512, 2048):
            rows += forward(library, "HQQ 4 bits", *shape, m)
        for m in (512, 2048):
            rows += backward(library, "HQQ 4 bits", *shape, m)
        for name in ("NF4 nested", "HQQ 4 bits", "HQQ 3 bits", "8 bits"):
            rows += decode(library, name, *shape)
        for name in forms.ENCODED:
            rows += quantize(library, name, *shape)
        torch.cuda.empty_cache()
    return rows
