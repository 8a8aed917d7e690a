"""Times of the CUDA kernels beside torch and the rivals that are installed (timing.py says how)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import forms
import peers
import torch
from library import Library, Quantized, Weight
from report import Report
from targets import LLAMA_70B, OP, SOLVER, TORCH, Limits, Row
from timing import Budget, Call, Timer, at_most, reason

FORMS = {form.name: form for form in (*forms.FORMS, forms.INT8)}
#: Rows of activations up to which a launch may take as long as the kernel: both are timed.
FEW_ROWS = 16
SMALL_ROWS = 32  #: that small_matmul takes
SECONDS_OF_A_RIVAL = 20.0  # to quantize, compile and tune for one piece of work


@dataclass
class Bench:
    """What all pieces of work are given."""

    library: Library
    timer: Timer
    budget: Budget
    report: Report
    found: dict[str, str] = field(default_factory=dict)  #: versions of the rivals
    op: bool = False  #: quantal is installed and its ops run on the device
    late: set[str] = field(default_factory=set)  #: rivals that took too long to be made

    @property
    def device(self) -> torch.device:
        return self.timer.device


# ------------------------------------------------------------------ weights


@functools.lru_cache(maxsize=4)
def _bytes(name: str, rows: int, cols: int, device: str) -> tuple[torch.Tensor, ...]:
    return forms.random_bytes(FORMS[name], rows, cols, device)


def _weights(bench: Bench, name: str, rows: int, cols: int) -> list[Weight]:
    """Copies of a random matrix, more than the cache holds."""
    buffers = _bytes(name, rows, cols, str(bench.device))
    copies = bench.timer.copies(sum(t.numel() for t in buffers))
    spec = FORMS[name].spec(rows, cols)
    return [Weight(spec, *(t.clone() for t in buffers)) for _ in range(copies)]


def _random(bench: Bench, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=bench.device, dtype=torch.float32).mul_(0.02).to(dtype)


def _dense(bench: Bench, rows: int, cols: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        _random(bench, rows, cols, dtype=dtype) for _ in range(bench.timer.copies(rows * cols * 2))
    ]


# ------------------------------------------------------------------ measuring


def limits(bench: Bench) -> Limits:
    """A copy and a square product of bfloat16 random numbers."""
    on_gpu = bench.device.type == "cuda"
    a = torch.randn(1 << (28 if on_gpu else 12), device=bench.device)
    b = torch.empty_like(a)
    n = 8192 if on_gpu else 64
    x, y = (torch.randn(n, n, device=bench.device).bfloat16() for _ in range(2))
    z = torch.empty_like(x)
    paths: dict[str, list[Call]] = {
        "copy": [lambda: b.copy_(a)] * 4,
        "gemm": [lambda: torch.mm(x, y, out=z)] * 4,
    }
    times = bench.timer.measure(paths)
    copy, gemm = (times[name].graph for name in ("copy", "gemm"))
    if copy is None or gemm is None:
        raise RuntimeError(f"no limits: {times}")
    return Limits(2 * a.numel() * 4 / copy, 2 * n**3 / gemm)


def _measured(
    bench: Bench,
    like: Row,
    paths: dict[str, list[Call]],
    notes: dict[str, str],
    dense_bytes: int = 0,
) -> list[Row]:
    """A row for each path and for each that could not even be made."""
    times = bench.timer.measure(paths, launched=0 < like.m <= FEW_ROWS)
    rows = []
    for name, timing in times.items():
        moved = dense_bytes if name == TORCH else like.moved
        rows.append(
            Row(like.part, like.form, like.shape, like.m, name, timing.graph, timing.launched,
                moved, like.flop, timing.note)
        )  # fmt: skip
    for name, note in notes.items():
        rows.append(Row(like.part, like.form, like.shape, like.m, name, note=note))
    return rows


def _add_rivals(
    bench: Bench, work: peers.Work, paths: dict[str, list[Call]], notes: dict[str, str]
) -> None:
    for peer, missing in peers.of_form(work.form, work.x.shape[0], bench.found):
        if missing or peer.name in bench.late:
            continue  # the table of the setting says so; late ones were named when they were
        try:
            with at_most(min(SECONDS_OF_A_RIVAL, max(bench.budget.left(), 1.0))):
                calls = peer.make(work)
                calls[0]()
                bench.timer.synchronize()
            paths[peer.name] = calls
        except Exception as error:  # a rival's own
            notes[peer.name] = reason(error)
            if isinstance(error, TimeoutError):
                bench.late.add(peer.name)


def _op_calls(weights: list[Weight], name: str, x: torch.Tensor) -> list[Call]:
    """The op that users reach, linear or linear_grad_input."""
    if name == "linear":
        op = torch.ops.quantal.linear
        return [lambda w=w: op(x, w.codes, w.stats, w.shared, None, w.spec) for w in weights]
    op = torch.ops.quantal.linear_grad_input
    return [lambda w=w: op(x, w.codes, w.stats, w.shared, w.spec) for w in weights]


# ------------------------------------------------------------------ products


def forward(bench: Bench, name: str, rows: int, cols: int, m: int) -> list[Row]:
    """All paths of y = x w^T."""
    library = bench.library
    weights = _weights(bench, name, rows, cols)
    x, y = _random(bench, m, cols), _random(bench, m, rows)
    panel = _random(bench, rows, cols)
    dense = _dense(bench, rows, cols, torch.bfloat16)

    def by_panel(w: Weight) -> None:
        library.dequantize(w, panel)
        torch.mm(x, panel.t(), out=y)

    paths: dict[str, list[Call]] = {TORCH: [lambda d=d: torch.mm(x, d.t(), out=y) for d in dense]}
    if bench.op:
        paths[OP] = _op_calls(weights, "linear", x)
    if m <= SMALL_ROWS:
        paths["quantal: few rows"] = [
            lambda w=w: library.matmul("small_matmul", w, x, y) for w in weights
        ]
    paths["quantal: tiles"] = [lambda w=w: library.matmul("tile_matmul", w, x, y) for w in weights]
    paths["quantal: dequantize + torch"] = [lambda w=w: by_panel(w) for w in weights]
    notes: dict[str, str] = {}
    _add_rivals(bench, peers.Work(name, rows, cols, x, len(weights)), paths, notes)
    ends = (x.numel() + y.numel()) * 2
    like = Row("forward", name, (rows, cols), m, "", moved=weights[0].bytes() + ends,
               flop=2 * m * rows * cols)  # fmt: skip
    return _measured(bench, like, paths, notes, rows * cols * 2 + ends)


def backward(bench: Bench, name: str, rows: int, cols: int, m: int) -> list[Row]:
    """dx = g w."""
    library = bench.library
    weights = _weights(bench, name, rows, cols)
    g, dx = _random(bench, m, rows), _random(bench, m, cols)
    panel = _random(bench, rows, cols)
    dense = _dense(bench, rows, cols, torch.bfloat16)

    def by_panel(w: Weight) -> None:
        library.dequantize(w, panel)
        torch.mm(g, panel, out=dx)

    paths: dict[str, list[Call]] = {TORCH: [lambda d=d: torch.mm(g, d, out=dx) for d in dense]}
    if bench.op:
        paths[OP] = _op_calls(weights, "linear_grad_input", g)
    paths["quantal: tiles"] = [
        lambda w=w: library.matmul("tile_matmul_transposed", w, g, dx) for w in weights
    ]
    paths["quantal: dequantize + torch"] = [lambda w=w: by_panel(w) for w in weights]
    ends = (g.numel() + dx.numel()) * 2
    like = Row("backward", name, (rows, cols), m, "", moved=weights[0].bytes() + ends,
               flop=2 * m * rows * cols)  # fmt: skip
    return _measured(bench, like, paths, {}, rows * cols * 2 + ends)


def int8(bench: Bench, rows: int, cols: int, m: int) -> list[Row]:
    """LLM.int8 with a threshold of 6, float16, beside torch in float16 and bitsandbytes."""
    name = forms.INT8.name
    weights = _weights(bench, name, rows, cols)
    x, y = (_random(bench, m, n, dtype=torch.float16) for n in (cols, rows))
    workspace = torch.empty(
        bench.library.int8_workspace(m, cols), dtype=torch.uint8, device=bench.device
    )
    dense = _dense(bench, rows, cols, torch.float16)
    paths: dict[str, list[Call]] = {
        "torch f16": [lambda d=d: torch.mm(x, d.t(), out=y) for d in dense],
        "quantal: LLM.int8": [
            lambda w=w: bench.library.int8_matmul(w, x, y, 6.0, workspace) for w in weights
        ],
    }
    notes: dict[str, str] = {}
    _add_rivals(bench, peers.Work(name, rows, cols, x, len(weights)), paths, notes)
    like = Row("int8", name, (rows, cols), m, "", flop=2 * m * rows * cols,
               moved=weights[0].bytes() + (x.numel() + y.numel()) * 2)  # fmt: skip
    return _measured(bench, like, paths, notes)


# ------------------------------------------------------------------ weights as bytes


def dequantize(bench: Bench, name: str, rows: int, cols: int) -> list[Row]:
    """Dequantizing to bfloat16."""
    weights = _weights(bench, name, rows, cols)
    out = _random(bench, rows, cols)
    paths: dict[str, list[Call]] = {
        OP: [lambda w=w: bench.library.dequantize(w, out) for w in weights]
    }
    like = Row("dequantize", name, (rows, cols), 0, "", moved=weights[0].bytes() + out.numel() * 2)
    return _measured(bench, like, paths, {})


def quantize(bench: Bench, name: str, rows: int, cols: int) -> list[Row]:
    """A bfloat16 weight into its buffers; `moved` counts it once, the solver reads it again."""
    weights = _dense(bench, rows, cols, torch.bfloat16)
    made = [Quantized(bench.library, name, weight) for weight in weights]
    like = Row("quantize", name, (rows, cols), 0, "", moved=made[0].moved())
    return _measured(bench, like, {OP: [q.run for q in made]}, {})


# ------------------------------------------------------------------ what is measured

Item = tuple[str, Callable[[], list[Row]]]
SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))


@dataclass
class Plan:
    """Shapes and rows of activations; the first items are what targets are about."""

    shapes: tuple[tuple[int, int], ...] = SHAPES
    few: tuple[int, ...] = (1, 16)
    many: tuple[int, ...] = (64, 2048, 512, 128, 256, 32, 8, 4)
    back: tuple[int, ...] = (2048, 64, 512, 16, 1)
    llama: tuple[tuple[int, int], ...] = tuple(LLAMA_70B)
    encoded: tuple[str, ...] = tuple(forms.ENCODED)


QUICK = Plan(
    shapes=((4096, 4096), (28672, 8192)),
    many=(64, 512, 2048),
    back=(2048, 64),
    encoded=("NF4 nested", "MLX 4 bits", "LLM.int8"),
)
#: Where kernels are emulated: everything once, and nothing is concluded from it.
TINY = Plan(((32, 256),), (1, 16), (64,), (64,), ((32, 128),), ("NF4 nested", SOLVER))


def products(bench: Bench, plan: Plan) -> Iterator[Item]:
    """Forward, by importance: what targets name in all shapes, then the rest."""

    def item(name: str, shape: tuple[int, int], m: int) -> Item:
        what = f"forward, {name}, {shape[0]} x {shape[1]}, m {m}"
        return what, lambda: forward(bench, name, *shape, m)

    for m in plan.few:
        for shape in plan.shapes:
            for name in ("NF4 nested", "HQQ 4 bits", "MLX 4 bits"):
                yield item(name, shape, m)
    for m in plan.many:
        for shape in plan.shapes:
            yield item("HQQ 4 bits", shape, m)
    for m in (64, 2048):
        if m in plan.many:
            yield item("NF4 nested", plan.shapes[0], m)
    for name in ("8 bits", "HQQ 3 bits", "NF4"):
        yield item(name, plan.shapes[0], 1)


def backwards(bench: Bench, plan: Plan) -> Iterator[Item]:
    """dx by importance: what QLoRA does first."""

    def item(name: str, shape: tuple[int, int], m: int) -> Item:
        what = f"backward, {name}, {shape[0]} x {shape[1]}, m {m}"
        return what, lambda: backward(bench, name, *shape, m)

    yield item("NF4 nested", plan.shapes[0], plan.back[0])
    for m in plan.back:
        for shape in plan.shapes:
            yield item("HQQ 4 bits", shape, m)


def weights_as_bytes(bench: Bench, plan: Plan) -> Iterator[Item]:
    """HQQ's solver over the shapes of Llama 70B, then the other encoders and the decoders."""
    for shape in plan.llama:
        what = f"quantize, {SOLVER}, {shape[0]} x {shape[1]}"
        yield what, lambda s=shape: quantize(bench, SOLVER, *s)
    for shape in plan.shapes:
        for name in ("NF4 nested", "HQQ 4 bits", "HQQ 3 bits", "8 bits"):
            what = f"dequantize, {name}, {shape[0]} x {shape[1]}"
            yield what, lambda n=name, s=shape: dequantize(bench, n, *s)
        for name in plan.encoded:
            if name == SOLVER:
                continue
            what = f"quantize, {name}, {shape[0]} x {shape[1]}"
            yield what, lambda n=name, s=shape: quantize(bench, n, *s)


def int8s(bench: Bench, plan: Plan) -> Iterator[Item]:
    for m in (1, plan.many[0]):
        what = f"int8, {plan.shapes[0][0]} x {plan.shapes[0][1]}, m {m}"
        yield what, lambda m=m: int8(bench, *plan.shapes[0], m)


def run(bench: Bench, part: str, seconds: float, items: Iterator[Item]) -> None:
    """Measures items while time is left; each is written as it comes. One that fails, for want of
    memory say, is named and the others go on."""
    with bench.budget.part(part, seconds):
        for what, measure in items:
            if bench.budget.left() <= 0:
                bench.report.leave_out(what)
                continue
            try:
                bench.report.add(measure())
            except Exception as error:
                bench.report.leave_out(f"{what}: {reason(error)}")
            _bytes.cache_clear()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    bench.report.seconds = bench.budget.spent
    bench.report.write()
