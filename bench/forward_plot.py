"""The picture of bench/forward_speed.py: a roofline and bars, as SVG without any package."""

from __future__ import annotations

import math
from typing import Any

_FONT = "font-family='sans-serif' font-size='11' fill='#374151'"
_COLOURS = [
    *("#4f46e5", "#ea580c", "#0e7490", "#15803d", "#be123c", "#6b7280"),
    *("#a855f7", "#0ea5e9", "#84cc16", "#d946ef", "#713f12", "#facc15"),
]


def _text(x: float, y: float, value: str, anchor: str = "start") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {_FONT}>{value}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' {style}/>"


def _roofline(rows: list[Any], top: Any, forms: list[str]) -> list[str]:
    """GFLOP/s over FLOP per packed byte, both logarithmic, in the box 60..440 x 40..300."""

    def place(intensity: float, speed: float) -> tuple[float, float]:
        x = 60 + 380 * (math.log2(intensity) - 1) / 11
        return x, 300 - 260 * (math.log10(speed) - 1) / 2.2

    out = [_text(60, 25, "GFLOP/s over FLOP per byte of packed weight: the two roofs and quantal")]
    for speed in (10, 30, 100, 300, 1000):
        _, y = place(2, speed)
        out += [_line(60, y, 440, y, "stroke='#e5e7eb'"), _text(55, y + 4, str(speed), "end")]
    for power in range(1, 13, 2):
        x, _ = place(2**power, 10)
        out.append(_text(x, 316, str(2**power), "middle"))
    corner = top.bf16 / top.read
    points = [place(2, 2 * top.read), place(corner, top.bf16), place(4096, top.bf16)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    out.append(f"<polyline points='{path}' fill='none' stroke='#111827' stroke-width='2'/>")
    for row in rows:
        flops = row.speed if row.m > 1 else 2 * _weights(row) / row.milliseconds / 1e6
        per_byte = _intensity(row, rows)
        x, y = place(per_byte, flops)
        colour = _COLOURS[forms.index(row.form) % len(_COLOURS)]
        out.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{colour}' fill-opacity='0.8'/>")
    for i, form in enumerate(forms):
        y = 340 + 14 * (i // 2)
        x = 60 + 200 * (i % 2)
        out.append(f"<circle cx='{x}' cy='{y - 4}' r='4' fill='{_COLOURS[i % len(_COLOURS)]}'/>")
        out.append(_text(x + 8, y, form))
    return out


def _weights(row: Any) -> int:
    rows, cols = map(int, row.shape.split("x"))
    return rows * cols


def _intensity(row: Any, rows: list[Any]) -> float:
    """FLOP per packed byte, from the line of one row of x of the same form and shape."""
    one = next(r for r in rows if (r.form, r.shape, r.m) == (row.form, row.shape, 1))
    packed = one.speed * one.milliseconds * 1e6
    return 2 * row.m * _weights(row) / packed


def _bars(rows: list[Any]) -> list[str]:
    """Rival time / ours on a logarithmic axis, one bar each, for the forms that have rivals."""
    names = list(dict.fromkeys(name for row in rows for name in row.rivals))
    out = [_text(500, 25, "time of a rival / quantal's (right of the line: quantal is faster)")]
    y = 45.0
    for row in rows:
        if len(row.rivals) < 3:
            continue
        out.append(_text(500, y + 9, f"{row.form}, {row.shape}, {row.m} row{'s' * (row.m > 1)}"))
        y += 14
        out.append(_line(720, y - 2, 720, y + 11 * len(row.rivals), "stroke='#111827'"))
        for name, ratio in row.rivals.items():
            x = 720 + 60 * max(-1.5, min(3.5, math.log2(ratio)))
            low, width = min(720.0, x), abs(x - 720)
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            out.append(
                f"<rect x='{low:.1f}' y='{y:.1f}' width='{width:.1f}' height='9' fill='{colour}'/>"
            )
            out.append(_text(615, y + 9, name, "end"))
            out.append(_text(max(720.0, x) + 4, y + 9, f"{ratio:.2f}"))
            y += 11
        y += 6
    return out


def svg(rows: list[Any], top: Any) -> str:
    forms = list(dict.fromkeys(row.form for row in rows))
    lines = sum(len(r.rivals) + 2 for r in rows if len(r.rivals) >= 3)
    height = max(420, 80 + 12 * lines)
    known = {(r.form, r.shape) for r in rows if r.m == 1}
    placed = [r for r in rows if (r.form, r.shape) in known]
    body = [*_roofline(placed, top, forms), *_bars(rows)]
    size = f"width='980' height='{height}' viewBox='0 0 980 {height}'"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' {size}>"
    paper = f"<rect width='980' height='{height}' fill='white'/>"
    return "\n".join([head, paper, *body, "</svg>"]) + "\n"
