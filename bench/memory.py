"""Peak anonymous memory while a model is quantized, sampled in a fresh process.

    python bench/memory.py [--output bench/results/memory.md]

The figure is peak RssAnon during `quantize_model` minus its value after imports and model
construction; the limit that the project sets itself is the largest layer + 100 MB.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import threading
import time

import pairs

CASES = [
    ("HQQ 4-bit g64", {"method": "hqq", "bits": 4, "group_size": 64}),
    ("HQQ 8-bit g128", {"method": "hqq", "bits": 8, "group_size": 128}),
    ("NF4 + double quantization", {"method": "bnb_nf4"}),
]
MODELS = {"SmolLM2-135M, float32": None, "4 linears of 4096 x 4096, bf16": (4, 4096)}


def anonymous_bytes() -> int:
    with open("/proc/self/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


class PeakSampler(threading.Thread):
    """Samples RssAnon every millisecond until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = anonymous_bytes()
        self.running = True

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.001)


def child(model_name: str, config: dict) -> dict:
    import torch
    from torch import nn

    import quantal

    size = MODELS[model_name]
    if size is None:
        model, _ = quantal.load_gguf(pairs.smollm2_gguf(), dtype=torch.float32)
    else:
        count, width = size
        model = nn.Sequential(
            *[nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(count)]
        )
    largest = max(
        p.numel() * p.element_size()
        for name, m in model.named_modules()
        if type(m) is nn.Linear and name != "lm_head"  # stays dense
        for p in m.parameters()
    )
    adapter = quantal.create_quantization_adapter(
        quantal.Backend.CPU,
        quantal.QuantizationConfig(backend_options={"support": "extended"}, **config),
    )
    before = anonymous_bytes()
    sampler = PeakSampler()
    sampler.start()
    adapter.quantize_model(model)
    sampler.running = False
    sampler.join()
    return {
        "growth": sampler.peak - before,
        "after": anonymous_bytes() - before,
        "largest": largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], json.loads(args.child[1]))))
        return
    rows = []
    for model in MODELS:
        for name, config in CASES:
            out = subprocess.run(
                [sys.executable, __file__, "--child", model, json.dumps(config)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            got = json.loads(out.splitlines()[-1])
            limit = got["largest"] + 100e6
            rows.append(
                [
                    model,
                    name,
                    f"{got['largest'] / 1e6:.1f}",
                    f"{got['growth'] / 1e6:+.1f}",
                    f"{got['after'] / 1e6:+.1f}",
                    "yes" if got["growth"] <= limit else "NO",
                ]
            )
            print(rows[-1], flush=True)
    page = pairs.table(
        "Memory while a model is quantized",
        "python bench/memory.py",
        [
            "model",
            "method",
            "largest layer MB",
            "peak growth MB",
            "after MB",
            "<= largest layer + 100 MB",
        ],
        rows,
        "Anonymous memory (RssAnon), sampled every millisecond, one fresh process per row.",
    )
    page = page.replace(pairs.FIGURE + "\n", "")
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
