"""The picture of the demo: loss curve, perplexities, bytes per layer."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LABELS = {
    "reference": "reference",
    "hqq8": "HQQ 8-bit\ng128",
    "nf4": "NF4\ndouble quant",
    "hqq": "HQQ 4-bit\ng64",
    "tuned": "HQQ 4-bit\n+ LoRA",
}
COLOURS = {
    "reference": "#6b7280",
    "bf16": "#6b7280",
    "hqq8": "#0e7490",
    "nf4": "#b45309",
    "hqq": "#4f46e5",
    "tuned": "#15803d",
}
WIDTHS = {"bf16": "bf16", "hqq8": "HQQ 8-bit", "nf4": "NF4 double quant", "hqq": "HQQ 4-bit"}


def _loss(axes, losses: list[float]) -> None:
    smooth = []
    for loss in losses:
        smooth.append(loss if not smooth else 0.8 * smooth[-1] + 0.2 * loss)
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#c7d2fe", linewidth=1, label="batch")
    axes.plot(steps, smooth, color=COLOURS["hqq"], linewidth=2, label="smoothed")
    axes.set(title="QLoRA training loss", xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.legend(frameon=False)


def _perplexities(axes, report: dict) -> None:
    names = [n for n in LABELS if f"ppl_{n}" in report]
    values = [report[f"ppl_{n}"] for n in names]
    bars = axes.bar([LABELS[n] for n in names], values, color=[COLOURS[n] for n in names])
    axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.set(title="Held-out perplexity (lower is better)", ylabel="perplexity")
    axes.set_ylim(0, max(values) * 1.15)
    axes.tick_params(axis="x", labelsize=8)


def _layers(axes, per_config: dict[str, dict[str, int]]) -> None:
    layers = list(per_config["bf16"])
    width = 0.8 / len(WIDTHS)
    for k, (name, label) in enumerate(WIDTHS.items()):
        places = [i - 0.4 + (k + 0.5) * width for i in range(len(layers))]
        values = [per_config[name][layer] / 1024 for layer in layers]
        axes.bar(places, values, width, label=label, color=COLOURS[name])
    axes.set_xticks(range(len(layers)), [layer.removesuffix("_proj") for layer in layers])
    axes.set(title="Bytes per layer of one block", ylabel="KiB")
    axes.legend(frameon=False, fontsize=8)


def draw(report: dict, path: pathlib.Path) -> None:
    """Writes the picture of a report."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    _loss(axes[0], report["loss"])
    _perplexities(axes[1], report)
    _layers(axes[2], report["layer_bytes"])
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle("SmolLM2-135M-Instruct on Python's documentation topics")
    figure.savefig(path, dpi=120)
    plt.close(figure)
