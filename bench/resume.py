"""SmolLM2 with each dialect: trained on 2 ranks, killed, and gone on with on 1 and on 3 ranks.

    python bench/resume.py [--output bench/results/resume.md] [--only hqq mlx_int4]

Each run is ``torchrun train.py``; the killed one gets SIGKILL on all ranks after its first
checkpoint. The adapters that come out are compared with those of an uninterrupted run on 2 ranks:
same global batch of 12 rows, same order.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pydoc_data.topics
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pairs
import torch
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).parents[1]
#: Base of a row: flags beside those of all runs.
BASES = {
    "GGUF Q4_1, as it is": "--quantize none",
    "bitsandbytes NF4, double quantization": "--quantize bnb_nf4",
    "bitsandbytes LLM.int8": "--quantize bnb_int8",
    "HQQ 4-bit g64": "--quantize hqq --q_bits 4",
    "MLX 4-bit g64": "--quantize mlx_int4",
    "MLX 8-bit g64": "--quantize mlx_int8",
    "Quanto int4 g64": "--quantize quanto_int4",
    "Quanto int8": "--quantize quanto_int8",
    "Quanto int2 g64": "--quantize quanto_int2",
}
STEPS = 4


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def command(ranks: int, output: pathlib.Path, flags: str, data: pathlib.Path) -> list[str]:
    given = f"--nproc_per_node {ranks} --master_port {free_port()} {ROOT}/train.py"
    given += f" --model {pairs.smollm2_gguf()} --data {data} --output_dir {output} {flags}"
    given += f" --global_batch 12 --context_length 48 --max_steps {STEPS} --save_steps 2 --lr 3e-4"
    given += " --lora_rank 8 --precision fp32 --threads 1 --no_plots"
    return [sys.executable, "-m", "torch.distributed.run", *given.split()]


def run(ranks: int, output: pathlib.Path, flags: str, data: pathlib.Path) -> None:
    done = subprocess.run(command(ranks, output, flags, data), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"resume: {flags} on {ranks} ranks failed\n{done.stderr[-4000:]}")


def run_and_kill(output: pathlib.Path, flags: str, data: pathlib.Path) -> None:
    """Ends all processes when the third step is done: one step after the checkpoint is lost."""
    process = subprocess.Popen(
        command(2, output, flags, data),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while len(losses(output)) < 3:
        if process.poll() is not None:
            raise SystemExit(f"resume: {flags} ended before it was killed")
        time.sleep(0.05)
    tasks = pathlib.Path(f"/proc/{process.pid}/task")
    children = [pid for t in tasks.iterdir() for pid in (t / "children").read_text().split()]
    for pid in [process.pid, *map(int, children)]:  # first the one that would end the others
        os.kill(pid, signal.SIGKILL)
    process.wait()


def losses(output: pathlib.Path) -> list[float]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("}") and '"loss"' in line]


def adapter(output: pathlib.Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """||B A - B' A'|| / ||B A|| over all layers together."""
    change = total = 0.0
    for name in a:
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            one, two = a[other].double() @ a[name].double(), b[other].double() @ b[name].double()
            change += float((one - two).pow(2).sum())
            total += float(one.pow(2).sum())
    return (change / total) ** 0.5


def measure(flags: str, data: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Cells of a row."""
    whole, killed = folder / "whole", folder / "killed"
    run(2, whole, flags, data)
    run_and_kill(killed, flags, data)
    latest = (killed / "checkpoints" / "latest").read_text().strip()
    expected, first = adapter(whole), losses(whole)
    cells = [f"{first[0]:.4f}", f"{first[-1]:.4f}", latest]
    for ranks in (2, 1, 3):
        out = folder / f"on-{ranks}"
        shutil.copytree(killed, out)
        run(ranks, out, flags, data)
        found = adapter(out)
        if all(torch.equal(expected[n], found[n]) for n in expected):
            cells.append("equal bytes")
        else:
            cells.append(f"{distance(expected, found):.1e}")
    size = sum(f.stat().st_size for f in (whole / "checkpoints").glob("*/state/*"))
    return [*cells, f"{size / 2 / 1e6:.1f} MB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output")
    parser.add_argument("--only", nargs="+", help="words that a row's flags contain")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        data = folder / "topics.jsonl"
        topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
        data.write_text("".join(json.dumps({"text": t}) + "\n" for t in topics))
        for number, (name, flags) in enumerate(BASES.items()):
            if args.only and not any(word in flags for word in args.only):
                continue
            rows.append([name, *measure(flags, data, folder / str(number))])
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
    if args.output:
        pathlib.Path(args.output).write_text(table(rows))


def table(rows: list[list[str]]) -> str:
    """The page of the results."""
    lines = [
        "# SmolLM2-135M: killed, and gone on with other numbers of ranks",
        "",
        "- command: `python bench/resume.py`",
        f"- torch {torch.__version__}, gloo on a CPU; LoRA of rank 8, all linear layers, float32",
        f"- {STEPS} steps of 12 rows of 48 tokens, the same order; 2 ranks are killed with SIGKILL "
        "after step 3, one step after the checkpoint; first and last losses are those of other "
        "texts",
        "- figure: ||BA - B'A'|| / ||BA|| of the adapter against an uninterrupted run on 2 ranks; "
        "other numbers of ranks add the gradients of 12 rows in another order, and AdamW turns "
        "rounding of elements near zero into steps of up to the learning rate",
        "",
        "| base | first loss | last loss | last good checkpoint | on 2 ranks | on 1 rank "
        "| on 3 ranks | size of a checkpoint |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


if __name__ == "__main__":
    main()
