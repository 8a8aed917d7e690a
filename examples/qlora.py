"""QLoRA from start to end: quantize, start the adapters from the quantization error, train, save,
load, merge in both ways. Small sizes, half a minute on a CPU; `--folder` takes any model of
transformers.

    python examples/qlora.py [--method hqq] [--dora] [--steps 20] [--folder MODEL] [--output DIR]
"""

import argparse
import pathlib
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quantal


def dense_model(folder: str | None) -> torch.nn.Module:
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=512,
        )
    )


def quantized(folder: str | None, method: str) -> torch.nn.Module:
    config = quantal.QuantizationConfig(method, bits=None, compute_dtype=torch.float32)
    adapter = quantal.create_quantization_adapter("cpu", config, support="extended")
    return adapter.quantize_model(dense_model(folder))


def train(model: PeftModel, ids: torch.Tensor, steps: int) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    model.train()
    for step in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, steps - 1):
            print(f"step {step}: loss {loss.item():.4f}")
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="bnb_nf4", help="any method of quantal")
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", help="a model folder; default: a small random Llama")
    parser.add_argument("--output", type=pathlib.Path, help="default: a temporary folder")
    args = parser.parse_args()

    base = quantized(args.folder, args.method)
    digest = quantal.model_digest(base)

    # Freeze the base, let gradients pass the embeddings, switch checkpointing on.
    base = quantal.prepare_model_for_training(base)
    model = get_peft_model(
        base,
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", use_dora=args.dora),
    )
    model.print_trainable_parameters()

    # LoftQ: the adapters begin as the best low-rank approximation of what quantization lost.
    errors = quantal.initialize_loftq(model, dense_model(args.folder))
    before = sum(e.error_before for e in errors) / len(errors)
    after = sum(e.error_after for e in errors) / len(errors)
    print(f"LoftQ: mean error of {len(errors)} layers {before:.4f} -> {after:.4f}")

    ids = torch.arange(4)[:, None] * 11 + torch.arange(32)
    train(model, ids, args.steps)
    logits = model(input_ids=ids).logits

    # PEFT's own folder: it loads over this base, over another quantization, over a dense model.
    output = args.output or pathlib.Path(tempfile.mkdtemp())
    model.save_pretrained(output / "adapter")
    again = PeftModel.from_pretrained(quantized(args.folder, args.method), output / "adapter")
    print("reloaded, same logits:", torch.equal(again.eval()(input_ids=ids).logits, logits))

    # Into the packed codes: rounds, says what survived, and is undone exactly.
    model.merge_adapter()
    report = quantal.merge_report(model)
    print(
        f"merged into codes: {report.codes_changed / report.codes:.1%} of the codes changed, "
        f"{report.surviving:.1%} of the update survives"
    )
    model.unmerge_adapter()
    print("unmerged, same logits:", torch.equal(model(input_ids=ids).logits, logits))
    print("base untouched:", quantal.model_digest(again.unload()) == digest)

    # Into dense weights: loses nothing; PEFT and quantal are gone from the model.
    full = quantal.merge_to_full_precision(model)
    difference = (full(input_ids=ids).logits - logits).abs().max().item()
    print(f"merged in full precision: logits differ by at most {difference:.1e}")
    full.save_pretrained(output / "merged")


if __name__ == "__main__":
    main()
