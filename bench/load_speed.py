"""Time to read the tensors of a saved 4-bit SmolLM2-135M, without building a model.

    python bench/load_speed.py [--output bench/results/load_speed.md]

The C++ loader that every adapter uses (load_checkpoint) reads folders that quantal wrote, warm: the
files are in the page cache. Beside it safetensors.torch.load_file reads the same file, which maps
it and decodes nothing. The project's own limit is 0.3 s.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import pairs
from safetensors.torch import load_file

import quantal
from quantal import _core

LIMIT_MS = 300
CASES = {
    "NF4": ("bnb", {"double_quant": False}),
    "NF4 + double quantization": ("bnb", {}),
    "HQQ 4-bit": ("hqq", {}),
    "MLX 4-bit": ("mlx", {}),
    "Quanto qint4": ("quanto", {}),
    "HQQ 4-bit, qmodel.pt": ("hqq", {"layout": "qmodel"}),
    "MLX 4-bit, npz": ("mlx", {"layout": "npz"}),
    "GGUF Q4_1": ("gguf", {}),
}


def measure(name: str, folder: pathlib.Path, seconds: float) -> list[str]:
    dialect, options = CASES[name]
    path = folder / (name.replace(" ", "_") + (".gguf" if dialect == "gguf" else ""))
    quantal.convert(pairs.smollm2_gguf(), path, dialect, **options)
    files = [path] if path.is_file() else sorted(path.glob("*.*"))
    megabytes = sum(f.stat().st_size for f in files) / 1e6
    safetensors = path / "model.safetensors"
    ours = lambda: _core.load_checkpoint(str(path))  # noqa: E731
    theirs = (lambda: load_file(safetensors)) if safetensors.exists() else ours
    pair = pairs.measure(ours, theirs, seconds)
    rival = f"{pair.rival * 1e3:.0f}" if safetensors.exists() else "-"
    fits = "yes" if pair.ours * 1e3 <= LIMIT_MS else "no"
    return [name, f"{megabytes:.0f}", f"{pair.ours * 1e3:.0f}", rival, fits]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="per row")
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            rows.append(measure(name, pathlib.Path(folder), args.seconds))
            print(rows[-1], flush=True)
    page = pairs.table(
        "Reading the tensors of a saved 4-bit SmolLM2-135M",
        "python bench/load_speed.py",
        ["saved as", "MB", "quantal ms", "safetensors.torch ms", f"<= {LIMIT_MS} ms"],
        rows,
        "Medians, files in the page cache, one call from opening to packed matrices of all 210 "
        "layers; dense tensors stay in the mapping. safetensors.torch maps the same file and hands "
        "out its tensors as they are; nothing is packed or checked there.",
    )
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
