"""One rank of the tests of the planner: shards a quantized model and prints what it holds, as JSON.

Usage: plan_worker.py RANK RANKS STORE; the answer of rank 0 is one line on standard output."""

import json
import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard

import quantal
from conftest import EXTENDED
from plan_support import VOCABULARY, peak_bytes, real_bytes, small_llama, state_bytes
from quantal import QuantizationConfig, create_quantization_adapter, prepare_model_for_training
from ranks import leave

CONFIGS = {
    "hqq": QuantizationConfig("hqq", bits=4, compute_dtype="float32"),
    "nf4": QuantizationConfig("bnb_nf4", compute_dtype="float32", backend_options=EXTENDED),
    "none": QuantizationConfig("none", compute_dtype="float32"),
}


def shard(model):
    for block in model.get_decoder().layers:
        fully_shard(block)
    return fully_shard(model)


def resident(ranks: int) -> dict:
    """Bytes of a rank for every config, planned and real."""
    out = {}
    for name, config in CONFIGS.items():
        plan = quantal.plan(small_llama(), "cpu", None, ranks, config=config)
        model = create_quantization_adapter("cpu", config).quantize_model(small_llama())
        out[name] = {"planned": plan.rank_bytes, "real": real_bytes(shard(model))}
    return out


def training(ranks: int) -> dict:
    """Bytes of a rank that trains adapters."""
    model = create_quantization_adapter("cpu", CONFIGS["hqq"]).quantize_model(small_llama())
    settings = {"batch_size": 2, "sequence_length": 64, "gradient_checkpointing": False}
    plan = quantal.plan(model, "cpu", None, ranks, "qlora", lora_rank=8, **settings)
    model = prepare_model_for_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    shard(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids = torch.randint(0, VOCABULARY, (2, 64))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    step()
    optimizer.step()
    optimizer.zero_grad()
    parts = ("gather", "activations", "logits", "gradients")
    planned = max(sum(plan.phase(n).parts[k] for k in parts) for n in ("forward", "backward"))
    return {
        "planned": plan.phase("resident").total,
        "real": real_bytes(model) + state_bytes(optimizer),
        "planned_step": planned,
        "real_step": peak_bytes(step),
    }


def main() -> None:
    rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    answer = {"resident": resident(ranks), "training": training(ranks)}
    if rank == 0:
        print(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave()
