"""Quantize a model, attach LoRA adapters, save the base and load it again."""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from quantal import Backend, QuantizationConfig, QuantizationMethod, create_quantization_adapter

folder = sys.argv[1] if len(sys.argv) > 1 else "build/quickstart"
model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=1000,
    )
)

config = QuantizationConfig(
    method=QuantizationMethod.HQQ, bits=4, group_size=64, compute_dtype=torch.float32
)
adapter = create_quantization_adapter(Backend.CPU, config)
model = adapter.quantize_model(model)  # layer by layer; no full-precision copy remains
print(adapter.report.to_text())  # what became how small, and what stayed dense and why

adapter.save_quantized_model(model, folder)  # the folder loads in hqq and transformers too
model = adapter.load_quantized_model(folder, model.config)
model = get_peft_model(
    adapter.prepare_model_for_training(model),
    LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
)
model.print_trainable_parameters()
loss = model(input_ids=torch.arange(64)[None], labels=torch.arange(64)[None]).loss
loss.backward()  # QLoRA: gradients reach the adapters through the packed weights
print(f"loss {loss.item():.3f}")
