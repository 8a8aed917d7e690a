"""A QLoRA step on SmolLM2-135M with FSDP2 on two ranks over gloo: quantal beside bitsandbytes NF4
and beside an unquantized base, time and memory of a rank.

    python bench/fsdp_step_speed.py [--output bench/results/fsdp_step_speed.md]

bitsandbytes' 4-bit parameters are no floats, which fully_shard refuses: its users name them in
ignored_params, so every rank holds the whole base. All sides: the same LoRA (r = 16 on q_proj and
v_proj), bfloat16 mixed precision, gradient checkpointing (non-reentrant), AdamW. quantal's rows
have quantal's attention, and one of them also the loss and the heap of train.py; the others have
the loss and the default attention of transformers. A side runs in processes of its own, since peak
memory is a property of a process; sides take turns, round by round, and ratios are those within a
round.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
import warnings
from typing import Any

import pairs
import torch
import torch.distributed as dist
from torch import nn

from quantal_train import heap

MB = 1e6
RIVALS = ("bitsandbytes NF4, whole on every rank", "bf16, unquantized")
#: quantal's rows: arguments of its config.
METHODS: dict[str, dict[str, Any]] = {
    "NF4 + double quantization": {"method": "bnb_nf4"},
    "HQQ 4-bit g64": {"method": "hqq", "bits": 4, "group_size": 64},
    "MLX 4-bit g64": {"method": "mlx_int4"},
    "NF4 + double quantization, as train.py": {"method": "bnb_nf4"},
}
#: With train.py's loss, which makes no logits of the whole batch, and its heap.
AS_PROGRAM = "as train.py"
NOTE = """Two ranks, one thread each, batch 2 x 256 per rank. Times are medians of the steps of a
process, ratios medians over rounds. Peak: resident memory of the rank that has most, while it
steps (VmHWM, reset after the first step) and over the whole run (loading included). Base: bytes of
the frozen weights of the linear layers that a rank keeps; whole: those of the model. Moved: bytes
that all-gathers bring together in a step, as counted: blocks twice (forward and backward), the
root, embeddings among it, once.

Attention: quantal's in its four rows (`attn_implementation="quantal"`, which train.py chooses on
such a machine), transformers' default, torch's, in the others. LoRA: the same PEFT adapters, which
quantal adds in one step with its product. Units: the blocks and the root; quantal gathers each
block while the one before it computes. Loss: transformers' own, whose logits are most of the
peak, but for the row "as train.py": `quantal.chunked_loss` and the heap that train.py starts itself
with. bitsandbytes in that heap, one run: {heap}."""


def lora(model: nn.Module) -> nn.Module:
    from train_step_speed import with_lora

    model = with_lora(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def lora_and_attention(model: nn.Module) -> nn.Module:
    model.set_attn_implementation("quantal")
    return lora(model)


def quantal_model(method: str, folder: str) -> nn.Module:
    import quantal
    from quantal import fsdp

    config = quantal.QuantizationConfig(
        compute_dtype=torch.bfloat16, backend_options={"support": "extended"}, **METHODS[method]
    )
    return fsdp.load_sharded(
        folder, config=config, attach=lora_and_attention, mixed_precision=torch.bfloat16
    )


def fully_sharded(model: nn.Module) -> nn.Module:
    """Blocks and root, as people write it; 4-bit parameters stay whole on every rank."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    ignored = {p for p in model.parameters() if not p.is_floating_point()}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.get_submodule("base_model.model.model.layers"):
        fully_shard(block, mp_policy=policy, ignored_params=ignored)
    fully_shard(model, mp_policy=policy, ignored_params=ignored)
    return model


def build(name: str, folder: str) -> nn.Module:
    from train_step_speed import bitsandbytes_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    if name in METHODS:
        return quantal_model(name, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if name == RIVALS[0]:
        model = bitsandbytes_model(model)
    return fully_sharded(lora(model))


def loss_of(model: nn.Module, tokens: torch.Tensor, name: str) -> torch.Tensor:
    if name.endswith(AS_PROGRAM):
        import quantal

        return quantal.chunked_loss(model, tokens, tokens)
    return model(input_ids=tokens, labels=tokens).loss


def base_bytes(model: nn.Module) -> int:
    """What this rank keeps of the frozen weights of linear layers."""
    total = 0
    for name, p in model.named_parameters():
        if p.requires_grad or not name.endswith(("proj.weight", "layer.weight", "codes", "stats")):
            continue
        local: Any = p.to_local() if hasattr(p, "to_local") else p
        total += local.numel() * local.element_size()
    return total


def child(name: str, steps: int, folder: str) -> None:
    from train_step_speed import peak_mebibytes, restart_peak

    from quantal.fsdp import count_gathers

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = build(name, folder)
    tokens = torch.randint(0, 49152, (2, 256), generator=torch.manual_seed(dist.get_rank()))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    seconds, moved, whole_run = [], 0, 0.0
    for step in range(steps + 1):
        dist.barrier()
        start = time.perf_counter()
        with count_gathers() as traffic:
            loss_of(model, tokens, name).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        moved = traffic.bytes
        if step == 0:  # warms up
            whole_run = peak_mebibytes()
            restart_peak()
    result = {
        "seconds": statistics.median(seconds[1:]),
        "peak": peak_mebibytes() * 2**20,
        "whole_run": max(whole_run, peak_mebibytes()) * 2**20,
        "base": base_bytes(model),
        "moved": moved,
    }
    results: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(results, result)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # not through the end of the interpreter, where threads of gloo can abort it


def run(name: str, steps: int, folder: str, whole_heap: bool = False) -> dict[str, float]:
    """The worst rank of each figure, and the base of the whole model."""
    arguments = ("--child", name, "--steps", str(steps), "--folder", folder)
    environment = heap.tuned(dict(os.environ)) if whole_heap else None
    ranks = pairs.torchrun(__file__, 2, *arguments, environment=environment)
    out = {figure: max(rank[figure] for rank in ranks) for figure in ranks[0]}
    out["total"] = out["base"] if name == RIVALS[0] else sum(rank["base"] for rank in ranks)
    print(name, {k: round(v, 3) if v < 1e3 else f"{v / MB:.1f} MB" for k, v in out.items()})
    return out


def measure(rounds: int, steps: int, folder: str) -> dict[str, list[dict[str, float]]]:
    """Runs of every row; one of each in a round, in turned order every second round."""
    rows = [*METHODS, *RIVALS]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    for turn in range(rounds):
        for name in rows if turn % 2 == 0 else rows[::-1]:
            found[name].append(run(name, steps, folder, name.endswith(AS_PROGRAM)))
    return found


def ratio(found: dict[str, list[dict[str, float]]], rival: str, name: str, figure: str) -> str:
    runs = zip(found[rival], found[name], strict=True)
    return f"**{statistics.median(theirs[figure] / ours[figure] for theirs, ours in runs):.2f}x**"


def row_of(name: str, runs: list[dict[str, float]]) -> list[str]:
    def middle(figure: str) -> float:
        return statistics.median(run[figure] for run in runs)

    return [
        name,
        f"{1024 / middle('seconds'):.0f}",
        f"{middle('peak') / MB:.0f}",
        f"{middle('whole_run') / MB:.0f}",
        f"{middle('base') / MB:.1f} of {middle('total') / MB:.1f}",
        f"{middle('moved') / MB:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--child", choices=[*METHODS, *RIVALS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.steps, args.folder)
    from train_step_speed import load_model

    with tempfile.TemporaryDirectory() as folder:
        load_model(None).save_pretrained(folder)
        found = measure(args.rounds, args.steps, folder)
        rival = run(RIVALS[0], args.steps, folder, whole_heap=True)
    in_heap = f"{rival['peak'] / MB:.0f} MB at {1024 / rival['seconds']:.0f} tokens/s"
    rows = []
    for name, runs in found.items():
        ratios = [
            ratio(found, rival, name, figure) if name in METHODS else "-"
            for figure in ("seconds", "peak")
            for rival in RIVALS
        ]
        rows.append([*row_of(name, runs), *ratios])
    page = pairs.table(
        "A QLoRA step with FSDP2 on two ranks",
        "python bench/fsdp_step_speed.py",
        [
            "base",
            "tokens/s",
            "peak MB of a rank, stepping",
            "whole run",
            "base MB of a rank",
            "moved MB a step",
            "bitsandbytes time / ours",
            "bf16 time / ours",
            "bitsandbytes peak / ours",
            "bf16 peak / ours",
        ],
        rows,
        NOTE.format(heap=in_heap),
    ).replace(pairs.FIGURE, "- figure: median over rounds of the ratio within a round")
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
