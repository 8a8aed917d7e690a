"""The figure at the end of a run, from its metrics file."""

from __future__ import annotations

import math
from typing import Any

from .monitor import read_lines


def _series(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[key]) for line in lines if key in line]
    return [s for s, _ in found], [v for _, v in found]


def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential mean, corrected for its start."""
    out, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**count))
    return out


def _loss(axes: Any, lines: list[dict[str, Any]]) -> None:
    steps, values = _series(lines, "loss")
    many = len(values) > 20
    axes.plot(steps, values, color="#9bb8d3" if many else "#1f5f99", linewidth=1, label="training")
    if many:
        axes.plot(steps, smooth(values, 0.9), color="#1f5f99", label="training, smoothed")
    at, held_out = _series(lines, "eval_loss")
    if held_out:
        axes.plot(at, held_out, "o-", color="#c0504d", markersize=4, label="held out")
    axes.set_title("loss per token (nats)")
    axes.legend(frameon=False)


def _rate(axes: Any, lines: list[dict[str, Any]]) -> None:
    steps, values = _series(lines, "lr")
    axes.plot(steps, values, color="#1f5f99")
    axes.set_title("learning rate (blue), gradient norm (red)")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.set_ylim(0, 1.1 * max(values, default=1) or 1)
    axes.tick_params(axis="y", colors="#1f5f99")
    steps, values = _series(lines, "grad_norm")
    other = axes.twinx()
    other.plot(steps, values, ".", color="#c0504d", markersize=5)
    finite = [v for v in values if math.isfinite(v)]
    other.set_ylim(0, 1.1 * max(finite, default=1) or 1)
    other.tick_params(axis="y", colors="#c0504d")
    other.spines[["top", "right"]].set_visible(False)


def _single(axes: Any, lines: list[dict[str, Any]], key: str, title: str, unit: float) -> None:
    steps, values = _series(lines, key)
    axes.plot(steps, [v / unit for v in values], color="#1f5f99")
    axes.set_title(title)
    axes.set_ylim(0, 1.1 * max(values, default=1) / unit or 1)


def draw(metrics: str, picture: str, title: str) -> bool:
    """Writes a PNG; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    lines = read_lines(metrics)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    _loss(axes[0][0], lines)
    _rate(axes[0][1], lines)
    _single(axes[1][0], lines, "tokens_per_s", "trained tokens per second, all ranks", 1)
    _single(axes[1][1], lines, "peak_bytes", "peak memory of the largest rank (GB)", 1e9)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.set_xlabel("step")
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return True
