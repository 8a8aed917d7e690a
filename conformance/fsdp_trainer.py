"""transformers.Trainer with accelerate's FSDP plugin over a quantized model; run by
test_fsdp_trainer.py under torchrun. Prints one line of JSON.

    torchrun --nproc_per_node 2 conformance/fsdp_trainer.py 1|2 original|flat FOLDER

accelerate switches FSDP on only where it found an accelerator. Its state is set here to what it
would be there, with the device "cpu"; its code and transformers' run as they are.
"""

import contextlib
import json
import os
import sys
import warnings

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from quantal import (
    QuantizationConfig,
    create_quantization_adapter,
    fsdp,
    prepare_model_for_training,
)
from quantal._packed import PackedWeight

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Counting(torch.utils.data.Dataset):
    """Sequences that count upwards."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict:
        tokens = (torch.arange(16) + 5 * i) % 64
        return {"input_ids": tokens, "labels": tokens}


def build(method: str) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
    )
    settings = QuantizationConfig(
        method, compute_dtype=torch.float32, backend_options={"support": "extended"}
    )
    return create_quantization_adapter("cpu", settings).quantize_model(LlamaForCausalLM(config))


def packed(model) -> list[torch.Tensor]:
    """Packed bytes in the order of layers, gathered where they are sharded."""
    layers = [m for m in model.modules() if isinstance(m, PackedWeight)]
    return [t.detach().clone() for layer in layers for t in layer._whole_bytes()]


def plugin_of(version: int, model, original: bool):
    if version == 2:
        return FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        )
    return FullyShardedDataParallelPlugin(
        fsdp_version=1,
        auto_wrap_policy=fsdp.wrap_policy(model),
        use_orig_params=original,
        sync_module_states=False,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )


def pretend_accelerator(plugin) -> Accelerator:
    accelerator = Accelerator(cpu=True)
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
        state["device"] = torch.device("cpu")
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def main() -> None:
    warnings.simplefilter("ignore")
    version, original, folder = int(sys.argv[1]), sys.argv[2] == "original", sys.argv[3]
    torch.set_num_threads(1)
    model = build("bnb_nf4" if version == 1 else "hqq")
    if version == 1:
        model = fsdp.convert_storage_(model.to(torch.bfloat16), torch.bfloat16)
    before = packed(model)
    torch.manual_seed(0)
    model = get_peft_model(
        prepare_model_for_training(model, False), LoraConfig(r=4, target_modules=TARGETS)
    )
    fsdp.verify_gathers(model)
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=2e-2,
        logging_steps=1,
        save_steps=12,
        report_to=[],
        disable_tqdm=True,
    )
    rank = arguments.process_index  # sets up accelerate's state
    pretend_accelerator(plugin_of(version, model, original))
    trainer = Trainer(model, arguments, train_dataset=Counting())
    trainer.train()
    wrapped = trainer.model_wrapped
    whole = contextlib.nullcontext()
    if version == 1:
        whole = FullyShardedDataParallel.summon_full_params(wrapped, writeback=False)
    with whole:
        after = packed(wrapped)
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if rank == 0:
        result = {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "same": same,
            "wrapped": [c.__name__ for c in type(wrapped).__mro__],
            "files": sorted(os.listdir(os.path.join(folder, "checkpoint-12"))),
        }
        print("RESULT " + json.dumps(result), flush=True)
    # Threads of gloo release Python objects while the interpreter ends, which aborts one process in
    # six here: this does not wait for its end.
    torch.distributed.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
