"""cuda_check.md and cuda_check.json: written again after everything that is found, so that a run
that is killed leaves what it has."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import targets
from targets import Results, Row, Training

PRODUCT_HEADER = [
    "what", "path", "us", "us, launched alone", "MB", "GFLOP", "share of copy", "share of product",
    "torch bf16 / this", "note",
]  # fmt: skip
WEIGHT_HEADER = ["what", "path", "us", "MB", "share of copy", "note"]
TRAINING_HEADER = ["side", "tokens/s", "of bf16 LoRA", "peak MiB", "last loss", "note"]
VERDICT_HEADER = ["target", "figure of this run", "verdict"]
PRODUCTS = ("forward", "backward", "int8")


def grid(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"


def product_cells(row: Row, results: Results) -> list[str]:
    """A row of the table of products."""
    copy = gemm = against = ""
    if row.seconds and results.limits:
        copy = f"{row.moved / row.seconds / results.limits.copy:.0%}"
        gemm = f"{row.flop / row.seconds / results.limits.gemm:.0%}"
    dense = next(
        (r for r in results.rows if r.what == row.what and r.path == targets.TORCH and r.seconds),
        None,
    )
    if dense is not None and row.seconds:
        against = f"{targets.ratio(dense, row):.2f}"
    return [
        row.what,
        row.path,
        _microseconds(row.graph),
        _microseconds(row.launched),
        f"{row.moved / 1e6:.1f}",
        f"{row.flop / 1e9:.1f}",
        copy,
        gemm,
        against,
        row.note,
    ]


def weight_cells(row: Row, results: Results) -> list[str]:
    """A row of the table of quantizing and dequantizing."""
    share = ""
    if row.seconds and results.limits:
        share = f"{row.moved / row.seconds / results.limits.copy:.0%}"
    megabytes = f"{row.moved / 1e6:.1f}"
    return [row.what, row.path, _microseconds(row.seconds), megabytes, share, row.note]


def training_cells(side: Training, results: Results) -> list[str]:
    """A row of the table of QLoRA steps."""
    dense = next((t for t in results.training if t.side == "bf16 LoRA"), None)
    against = ""
    if dense and dense.tokens_per_second and side.tokens_per_second:
        against = f"{side.tokens_per_second / dense.tokens_per_second:.2f}x"
    return [
        side.side,
        "" if side.tokens_per_second is None else f"{side.tokens_per_second:.0f}",
        against,
        "" if side.peak is None else f"{side.peak / 2**20:.0f}",
        "" if side.loss is None else f"{side.loss:.4f}",
        side.note,
    ]


class Report:
    """The page of a run. `folder` None: nothing is written."""

    def __init__(self, folder: pathlib.Path | None, title: str, on_gpu: bool) -> None:
        self.folder, self.title, self.on_gpu = folder, title, on_gpu
        self.results = Results()
        self.setting: list[list[str]] = []  # device, versions, rivals
        self.checks: list[list[str]] = []  # kernel, largest error
        self.failed: list[str] = []
        self.left_out: list[str] = []
        self.seconds: dict[str, float] = {}
        self.state = "running"

    def say(self, what: str, text: str) -> None:
        """A line of the table of the setting."""
        self.setting.append([what, text.replace("|", "/")])
        self.write()

    def leave_out(self, what: str) -> None:
        """Names work that the time did not allow."""
        self.left_out.append(what)

    def add(self, rows: list[Row]) -> None:
        self.results.rows += rows
        self.write()

    def lines(self) -> list[str]:
        """The page."""
        found = [f"# {self.title}", ""]
        if self.state != "complete":
            found += [f"**This run is not complete: {self.state}.**", ""]
        found += grid(["what", "of this run"], self.setting)
        if self.on_gpu:
            found += ["", "## Targets", "", *self._verdicts()]
        if self.checks:
            found += ["", "## Checks", "", *grid(["checked", "error / allowed"], self.checks)]
        found += ["", *(f"- FAILED {name}" for name in self.failed)] if self.failed else []
        products = [r for r in self.results.rows if r.part in PRODUCTS]
        if products:
            cells = [product_cells(row, self.results) for row in products]
            found += ["", "## Products", "", *grid(PRODUCT_HEADER, cells)]
        weights = [r for r in self.results.rows if r.part not in PRODUCTS]
        if weights:
            cells = [weight_cells(row, self.results) for row in weights]
            found += ["", "## Quantizing and dequantizing", "", *grid(WEIGHT_HEADER, cells)]
        if self.results.training:
            cells = [training_cells(t, self.results) for t in self.results.training]
            found += ["", "## QLoRA step", "", *grid(TRAINING_HEADER, cells)]
        if self.left_out:
            found += ["", "## Left out for time", "", *(f"- {what}" for what in self.left_out)]
        if self.seconds:
            cells = [[part, f"{seconds:.0f}"] for part, seconds in self.seconds.items()]
            found += ["", "## Time", "", *grid(["part", "seconds"], cells)]
        return found

    def _verdicts(self) -> list[str]:
        cells = [[v.target, v.figure, v.verdict] for v in targets.verdicts(self.results)]
        return grid(VERDICT_HEADER, cells)

    def write(self) -> None:
        """Both files, each replaced as a whole."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(self.folder / "cuda_check.md", "\n".join(self.lines()) + "\n")
        raw = {
            "title": self.title,
            "state": self.state,
            "setting": self.setting,
            "checks": self.checks,
            "failed": self.failed,
            "left_out": self.left_out,
            "seconds": self.seconds,
            **dataclasses.asdict(self.results),
        }
        _replace(self.folder / "cuda_check.json", json.dumps(raw, indent=1) + "\n")


def _replace(path: pathlib.Path, text: str) -> None:
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
