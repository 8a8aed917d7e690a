"""Correctness of libquantal_cuda.so against float32 bits and float64 sums (forms.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import forms
import torch
from library import Library, Quantized, Weight

HALVES = (torch.bfloat16, torch.float16)
INT8_UNIT = 6.200124e-05


@dataclass
class Outcome:
    """One check: its largest error as a share of what is allowed; bits count as 0 or infinity."""

    name: str
    ratio: float

    @property
    def passed(self) -> bool:
        return self.ratio <= 1  # False for NaN


def on_device(w: forms.Packed, device: torch.device) -> Weight:
    """The buffers of a matrix on a device."""
    return Weight(w.spec, w.codes.to(device), w.stats.to(device), w.shared.to(device))


def _poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def _bits(actual: torch.Tensor, expected: torch.Tensor) -> float:
    same = actual.cpu().view(torch.uint8).equal(expected.cpu().contiguous().view(torch.uint8))
    return 0.0 if same else math.inf


def dequantize(library: Library, device: torch.device, rows: int, cols: int) -> Iterator[Outcome]:
    """Bits of every form in every type."""
    for form in (*forms.FORMS, forms.INT8):
        w = forms.make(form, rows, cols, seed=11)
        for dtype in (torch.float32, *HALVES):
            out = _poisoned(rows, cols, dtype=dtype, device=device)
            library.dequantize(on_device(w, device), out)
            yield Outcome(f"dequantize {form.name} {dtype}", _bits(out, w.values.to(dtype)))


def _product_ratio(
    y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
) -> float:
    """Largest error over 8 sqrt(depth) 2^-24 sum |x||w| and half a unit of y."""
    a, b = x.double().cpu(), w.double()
    exact, size = a @ b.t(), a.abs() @ b.t().abs()
    if bias is not None:
        exact, size = exact + bias.double().cpu(), size + bias.double().cpu().abs()
    unit = 2.0**-11 if y.dtype == torch.float16 else 2.0**-8
    bound = 8 * math.sqrt(w.shape[1]) * 2.0**-24 * size + unit * exact.abs() + 2.0**-25
    return float(((y.double().cpu() - exact).abs() / bound).nan_to_num(math.inf).max())


def _product(
    library: Library, name: str, weight: Weight, dense: torch.Tensor, m: int, dtype: torch.dtype
) -> float:
    """Error of one product of random activations as a share of what is allowed."""
    transposed = name.endswith("transposed")
    depth, width = dense.shape if transposed else reversed(dense.shape)
    device = weight.codes.device
    bias = None if transposed else torch.randn(width, device=device)
    x = torch.randn(m, depth, device=device).to(dtype)
    y = _poisoned(m, width, dtype=dtype, device=device)
    library.matmul(name, weight, x, y, bias)
    return _product_ratio(y, x, dense.t() if transposed else dense, bias)


def products(library: Library, device: torch.device, rows: int, cols: int) -> Iterator[Outcome]:
    """Every form by the kernel of few rows and by tiles, forward and transposed."""
    for number, form in enumerate(forms.FORMS):
        w = forms.make(form, rows, cols, seed=12)
        weight = on_device(w, device)
        dtype = HALVES[number % 2]
        dense = w.values.to(dtype).float()
        for name, inputs in (
            ("small_matmul", (1, 8, 9, 16, 32)),
            ("tile_matmul", (5, 64, 200)),
            ("tile_matmul_transposed", (5, 200)),
        ):
            for m in inputs:
                ratio = _product(library, name, weight, dense, m, dtype)
                yield Outcome(f"{name} {form.name} {dtype} m={m}", ratio)


def large_tiles(library: Library, device: torch.device) -> Iterator[Outcome]:
    """Widths at which tiles of 128 outputs are taken, for each way to decode."""
    for name in ("NF4 nested", "HQQ 4 bits", "HQQ 3 bits", "Q4_K"):
        form = next(form for form in forms.FORMS if form.name == name)
        dtype = forms.TYPES.get(form.value, torch.bfloat16)
        dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        for kernel, rows, cols in (
            ("tile_matmul", 12296, 256),
            ("tile_matmul_transposed", 264, 12288),
        ):
            w = forms.make(form, rows, cols, seed=16)
            weight, dense = on_device(w, device), w.values.to(dtype).float()
            for m in (5, 200):
                ratio = _product(library, kernel, weight, dense, m, dtype)
                yield Outcome(f"{kernel} {name} {rows} x {cols} m={m}", ratio)


def _int8_reference(w: forms.Packed, x: torch.Tensor, threshold: float) -> torch.Tensor:
    """LLM.int8 in float32 operations of the CPU's order; outliers in double."""
    scales = w.stats.view(torch.float32).flatten()
    half = x.half().float()
    outlier = half.abs() >= threshold if threshold > 0 else torch.zeros_like(half, dtype=torch.bool)
    inliers = torch.where(outlier, torch.zeros_like(half), half)
    top = inliers.abs().amax(1)
    q = (inliers * ((1 / top) * 127)[:, None]).round()
    columns = outlier.any(0)
    q[:, columns] = 0
    codes = (w.values * 127 / scales[:, None]).round()
    sums = (q.double() @ codes.double().t()).float()
    y = sums * (top[:, None] * scales) * torch.tensor(INT8_UNIT, dtype=torch.float32)
    if not columns.any():
        return y.to(x.dtype)
    extra = x.double()[:, columns] @ w.values.to(x.dtype).double()[:, columns].t()
    return (y.to(x.dtype).double() + extra).to(x.dtype)


def int8(library: Library, device: torch.device, rows: int, cols: int) -> Iterator[Outcome]:
    """LLM.int8: the bits without outliers, and two units of the last place with them."""
    w = forms.make(forms.INT8, rows, cols, seed=13)
    weight = on_device(w, device)
    for m in (1, 70):
        for threshold in (0.0, 6.0):
            x = torch.randn(m, cols).to(torch.float16)
            x[0, 5] = 9.0
            workspace = torch.empty(
                library.int8_workspace(m, cols), dtype=torch.uint8, device=device
            )
            y = _poisoned(m, rows, dtype=x.dtype, device=device)
            library.int8_matmul(weight, x.to(device), y, threshold, workspace)
            expected = _int8_reference(w, x, threshold)
            name = f"int8_matmul m={m} threshold={threshold}"
            if threshold == 0:
                yield Outcome(name, _bits(y, expected))
            else:
                error = (y.cpu().double() - expected.double()).abs()
                allowed = expected.double().abs() * 2.0**-9 + 1e-3
                yield Outcome(name, float((error / allowed).nan_to_num(math.inf).max()))


def norms(library: Library, device: torch.device, rows: int, cols: int) -> Iterator[Outcome]:
    """Sums of squares."""
    for form in forms.FORMS:
        w = forms.make(form, rows, cols, seed=14)
        out = _poisoned(rows, dtype=torch.float64, device=device)
        library.row_square_sums(on_device(w, device), out)
        expected = w.values.double().square().sum(1)
        error = ((out.cpu() - expected).abs() / (1e-12 * expected)).nan_to_num(math.inf).max()
        yield Outcome(f"row_square_sums {form.name}", float(error))


def quantize(
    library: Library, reference: Library, device: torch.device, rows: int, cols: int
) -> Iterator[Outcome]:
    """Bytes of every encoder as those of the library that runs kernels on the CPU."""
    for number, name in enumerate(forms.ENCODED):
        dtype = (torch.float32, *HALVES)[number % 3]
        weight = torch.randn(rows, cols).to(dtype)
        weight[1, :96] = 0
        weight[2, 64:128] *= 100
        made = Quantized(library, name, weight.to(device))
        expected = Quantized(reference, name, weight)
        for quantized in (made, expected):
            quantized.run()
        ratio = max(
            _bits(getattr(made.w, part), getattr(expected.w, part))
            for part in ("codes", "stats", "shared")
        )
        yield Outcome(f"quantize {name} {dtype}", ratio + float(made.refused.item()))
        weight[3, 5] = math.inf
        bad = Quantized(library, name, weight.to(device))
        bad.run()
        yield Outcome(f"quantize refuses {name}", 1.0 - float(bad.refused.item()))


def streams(library: Library, device: torch.device) -> Iterator[Outcome]:
    """A captured graph and a stream of its own give the bits of the default stream."""
    w = forms.make(forms.FORMS[0], 256, 512, seed=15)
    weight = on_device(w, device)
    x = torch.randn(4, 512, device=device, dtype=torch.bfloat16)
    y, again = (_poisoned(4, 256, dtype=x.dtype, device=device) for _ in range(2))
    library.matmul("small_matmul", weight, x, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        library.matmul("small_matmul", weight, x, again)
    x.copy_(torch.randn_like(x))
    library.matmul("small_matmul", weight, x, y)
    graph.replay()
    torch.cuda.synchronize()
    yield Outcome("a replayed graph", _bits(again, y))
    again.fill_(math.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        library.matmul("small_matmul", weight, x, again)
    stream.synchronize()
    yield Outcome("a stream of its own", _bits(again, y))


def all_checks(
    library: Library, reference: Library, device: torch.device, quick: bool
) -> Iterator[Outcome]:
    """Every check; `quick` for the CPU, where kernels are emulated; `reference` always is."""
    rows, cols = (24, 256) if quick else (1000, 1280)
    yield from dequantize(library, device, rows, cols)
    yield from products(library, device, rows, cols)
    yield from int8(library, device, rows, cols)
    yield from norms(library, device, rows, cols)
    yield from quantize(library, reference, device, 24, 512)
    if device.type == "cuda":
        yield from large_tiles(library, device)
        yield from streams(library, device)
