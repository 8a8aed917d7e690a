"""What was measured, and what it says of the targets of docs/cuda.md: plain numbers, no device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

#: What a user of quantal gets where the package is installed, and the kernels that it chooses from.
OP = "quantal"
KERNELS = ("quantal: few rows", "quantal: tiles", "quantal: dequantize + torch")
TORCH = "torch bf16"
SOLVER = "HQQ 4 bits"  # of forms.ENCODED; it reads the weight in every round
FOUR_BITS = ("NF4 nested", "HQQ 4 bits", "MLX 4 bits")
#: Rows and columns of the linear layers of a block of Llama 70B, and how often each stands there.
LLAMA_70B = {(8192, 8192): 2, (1024, 8192): 2, (28672, 8192): 2, (8192, 28672): 1}
BLOCKS_OF_70B = 80


@dataclass
class Limits:
    """What the card reached in this run."""

    copy: float  # bytes per second, read and written
    gemm: float  # FLOP per second, bfloat16


@dataclass
class Row:
    """A measured path of one piece of work."""

    part: str  #: forward, backward, dequantize, quantize, int8
    form: str
    shape: tuple[int, int]
    m: int  #: rows of activations; 0 where there are none
    path: str
    graph: float | None = None  #: seconds of a call inside of a graph
    launched: float | None = None  #: seconds of a call launched by itself
    moved: int = 0  #: least bytes: each input read once, each output written once
    flop: int = 0
    note: str = ""

    @property
    def seconds(self) -> float | None:
        return self.graph if self.graph is not None else self.launched

    @property
    def what(self) -> str:
        rows, cols = self.shape
        ends = f", m {self.m}" if self.m else ""
        return f"{self.part}, {self.form}, {rows} x {cols}{ends}"


@dataclass
class Training:
    """One side of the QLoRA step."""

    side: str
    tokens_per_second: float | None = None
    peak: int | None = None  #: bytes that the side added to what the device held
    loss: float | None = None  #: of the last step
    note: str = ""


@dataclass
class Results:
    """Everything that a run has found so far."""

    limits: Limits | None = None
    rows: list[Row] = field(default_factory=list)
    training: list[Training] = field(default_factory=list)


@dataclass
class Verdict:
    """One target: what it asks, the worst figure, where, and "met", "missed" or "open"."""

    target: str
    figure: str
    verdict: str


# ------------------------------------------------------------------ rows by name

Work = tuple[str, str, tuple[int, int], int]


def _by_work(rows: list[Row]) -> dict[Work, dict[str, Row]]:
    found: dict[Work, dict[str, Row]] = {}
    for row in rows:
        if row.seconds is not None:
            found.setdefault((row.part, row.form, row.shape, row.m), {})[row.path] = row
    return found


def ours(paths: dict[str, Row]) -> Row | None:
    """The op where it was measured, else the best of the kernels."""
    if OP in paths:
        return paths[OP]
    kernels = [paths[name] for name in KERNELS if name in paths]
    return min(kernels, key=lambda row: row.seconds or 0.0, default=None)


def share_of_copy(row: Row, limits: Limits) -> float | None:
    return None if not row.seconds else row.moved / row.seconds / limits.copy


def ratio(rival: Row, row: Row) -> float:
    """Time of the rival over ours, of the same kind: captured where both were, else launched."""
    if rival.graph is not None and row.graph is not None:
        return rival.graph / row.graph
    if rival.launched is not None and row.launched is not None:
        return rival.launched / row.launched
    return (rival.seconds or 0.0) / (row.seconds or 1.0)


# ------------------------------------------------------------------ verdicts

Figure = tuple[float, str]  # a value and where it was found


def _worst(target: str, least: float, figures: Iterator[Figure], unit: str) -> Verdict:
    """All figures have to reach `least`; the smallest is shown."""
    found = sorted(figures)
    if not found:
        return Verdict(target, "not measured", "open")
    value, where = found[0]
    shown = f"{value:.0%}" if unit == "%" else f"{value:.2f}{unit}"
    verdict = "met" if value >= least else "missed"
    return Verdict(target, f"{shown} ({where}; smallest of {len(found)})", verdict)


def _shares(results: Results, part: str, m: int, forms: tuple[str, ...] | None) -> Iterator[Figure]:
    if results.limits is None:
        return
    for (at, form, shape, rows), paths in _by_work(results.rows).items():
        if at != part or rows != m or (forms is not None and form not in forms):
            continue
        row = ours(paths)
        share = share_of_copy(row, results.limits) if row else None
        if share is not None:
            yield share, f"{form}, {shape[0]} x {shape[1]}"


def _ratios(
    results: Results, part: str, of: Callable[[int], bool], rivals: tuple[str, ...]
) -> Iterator[Figure]:
    for (at, form, shape, m), paths in _by_work(results.rows).items():
        row = ours(paths)
        if at != part or not of(m) or row is None:
            continue
        for name in rivals:
            if name in paths:
                yield ratio(paths[name], row), f"{form}, {shape[0]} x {shape[1]}, m {m}, {name}"


def _hqq_70b(results: Results) -> Verdict:
    target = "HQQ 4 bits, group 64, solver, 70B of weights: under 60 s"
    times = {
        row.shape: row.seconds
        for row in results.rows
        if row.part == "quantize" and row.form == SOLVER and row.seconds is not None
    }
    missing = [shape for shape in LLAMA_70B if shape not in times]
    if missing:
        return Verdict(target, f"{len(missing)} of {len(LLAMA_70B)} shapes not measured", "open")
    total = BLOCKS_OF_70B * sum(times[shape] * count for shape, count in LLAMA_70B.items())
    return Verdict(
        target,
        f"{total:.1f} s ({BLOCKS_OF_70B} blocks of Llama 70B)",
        "met" if total < 60 else "missed",
    )


def _training(results: Results) -> Iterator[Verdict]:
    sides = {t.side: t for t in results.training}
    mine, dense = sides.get("quantal NF4"), sides.get("bf16 LoRA")
    rival = sides.get("bitsandbytes NF4")
    speed = "QLoRA step, seq 2048: >= 0.9x tokens/s of bf16 LoRA"
    if mine and dense and mine.tokens_per_second and dense.tokens_per_second:
        value = mine.tokens_per_second / dense.tokens_per_second
        yield Verdict(speed, f"{value:.2f}x", "met" if value >= 0.9 else "missed")
    else:
        yield Verdict(speed, "not measured", "open")
    memory = "QLoRA peak memory <= bitsandbytes + PEFT"
    if mine and rival and mine.peak and rival.peak:
        value = mine.peak / rival.peak
        yield Verdict(memory, f"{value:.2f}x", "met" if value <= 1 else "missed")
    else:
        yield Verdict(memory, "not measured", "open")


def verdicts(results: Results) -> list[Verdict]:
    """Each target of docs/cuda.md, with what is known of it so far."""
    decoded = ("bitsandbytes: dequantize + cuBLAS", KERNELS[2])
    bnb = ("bitsandbytes",)
    no_solver = tuple({row.form for row in results.rows} - {SOLVER})

    def share(part: str, m: int, forms: tuple[str, ...] | None = None) -> Iterator[Figure]:
        return _shares(results, part, m, forms)

    def against(part: str, of: Callable[[int], bool], rivals: tuple[str, ...]) -> Iterator[Figure]:
        return _ratios(results, part, of, rivals)

    return [
        _worst("m 1, 4 bits: >= 85 % of copy", 0.85, share("forward", 1, FOUR_BITS), "%"),
        _worst("m 1: >= 1.3x bitsandbytes", 1.3, against("forward", lambda m: m == 1, bnb), "x"),
        _worst("m 16, 4 bits: >= 80 % of copy", 0.80, share("forward", 16, FOUR_BITS), "%"),
        _worst(
            "m 64 .. 512: never slower than torch bf16",
            1.0,
            against("forward", lambda m: 64 <= m <= 512, (TORCH,)),
            "x",
        ),
        _worst(
            "m 64: >= 1.3x dequantize + cuBLAS",
            1.3,
            against("forward", lambda m: m == 64, decoded),
            "x",
        ),
        _worst(
            "m >= 2048, forward: >= 0.9x torch bf16",
            0.9,
            against("forward", lambda m: m >= 2048, (TORCH,)),
            "x",
        ),
        _worst(
            "m >= 2048, backward: >= 0.9x torch bf16",
            0.9,
            against("backward", lambda m: m >= 2048, (TORCH,)),
            "x",
        ),
        _worst(
            "quantize, but for HQQ's solver: >= 75 % of copy",
            0.75,
            share("quantize", 0, no_solver),
            "%",
        ),
        _worst("dequantize: >= 75 % of copy", 0.75, share("dequantize", 0), "%"),
        _hqq_70b(results),
        *_training(results),
    ]
