"""What a run shows and keeps: progress bar, JSON lines, TensorBoard."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

import torch

from quantal import ConfigError


def resident_bytes() -> tuple[int, int]:
    """(now, peak) of this process: of the accelerator where one is used, else in host memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    fields = {"VmRSS": 0, "VmHWM": 0}
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key in fields:
                    fields[key] = 1024 * int(value.split()[0])
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak
    return fields["VmRSS"], fields["VmHWM"]


def _summary_writer(mode: str, folder: str) -> Any:
    """TensorBoard's writer, or None."""
    if mode == "off":
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if mode == "auto":
            return None
        raise ConfigError(
            "--tensorboard is on and tensorboard is not installed, expected `pip install "
            "tensorboard`, or --tensorboard off"
        ) from error
    return SummaryWriter(folder)


class Monitor:
    """Of rank 0; the other ranks have one that does nothing."""

    def __init__(self, args: argparse.Namespace, main: bool, first: int, last: int) -> None:
        self.main, self.started, self.tokens = main, time.monotonic(), 0
        self.bar: Any = None
        self.file: Any = None
        self.writer: Any = None
        if not main:
            return
        from tqdm import tqdm

        os.makedirs(args.output_dir, exist_ok=True)
        self.path = os.path.join(args.output_dir, "metrics.jsonl")
        keep_until(self.path, first)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self.writer = _summary_writer(
            args.tensorboard, os.path.join(args.output_dir, "tensorboard")
        )
        often = 0.1 if sys.stderr.isatty() else 10.0
        self.bar = tqdm(
            total=last, initial=first, unit="step", desc="train", mininterval=often, smoothing=0.1
        )

    def step(self, step: int, values: dict[str, float]) -> None:
        """One optimizer step: loss, lr, grad_norm, tokens, seconds, memory."""
        if not self.main:
            return
        self.tokens += int(values["tokens"])
        rate = self.tokens / max(1e-9, time.monotonic() - self.started)
        self._write(step, {**values, "tokens_per_s": values["tokens"] / values["seconds"]})
        self.bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {rate:.0f} tok/s, {values['peak_bytes'] / 1e9:.2f} GB",
            refresh=False,
        )
        self.bar.update(1)

    def note(self, step: int, values: dict[str, Any], text: str) -> None:
        """Something that happens now and then: an evaluation, a sample, a checkpoint."""
        if self.main:
            self._write(step, values)
            self.bar.write(f"step {step}: {text}", file=sys.stdout)
            sys.stdout.flush()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.writer is not None:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self.writer.add_scalar(key, value, step)
                else:
                    self.writer.add_text(key, str(value), step)

    def close(self) -> None:
        if self.main:
            self.bar.close()
            self.file.close()
            if self.writer is not None:
                self.writer.close()


def keep_until(path: str, step: int) -> None:
    """Drops lines after `step`, which a run that goes on from there writes again."""
    if not os.path.exists(path):
        return
    kept = [line for line in read_lines(path) if line["step"] <= step]
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
    os.replace(f"{path}.new", path)


def read_lines(path: str) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that was cut by the end of a process is left out."""
    lines = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                lines.append(value)
    return lines
