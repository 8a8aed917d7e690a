"""Quantize a model by command-line flags; setup_quantization is what a training script calls.

    python examples/setup_quantization.py --quantize hqq --q_bits 8 --q_group_size 128
    python examples/setup_quantization.py --model FOLDER --quantize hqq --save OUT

Without --model a small Llama with random weights is quantized, to try the flags.
"""

from __future__ import annotations

import argparse
import pathlib

import torch

from backend_manager import BackendManager
from quantization_wrapper import (
    QuantizationAdapter,
    QuantizationConfig,
    QuantizationMethod,
    create_quantization_adapter,
    validate_quantization_config,
)


def setup_quantization(
    args: argparse.Namespace, backend_manager: BackendManager
) -> QuantizationAdapter:
    """The adapter that the flags ask for; findings of validation are printed.

    args  quantize, q_bits, q_group_size, q_compute_dtype, q_skip_modules, q_double_quant, as
          add_quantization_flags defines them; None where the method or the backend decides
    """
    dense = args.q_skip_modules.split(",") if args.q_skip_modules else ["lm_head"]
    config = QuantizationConfig(
        method=QuantizationMethod(args.quantize),
        bits=args.q_bits,
        group_size=args.q_group_size,
        compute_dtype=getattr(torch, args.q_compute_dtype) if args.q_compute_dtype else None,
        skip_modules=[] if dense == ["none"] else dense,
        double_quant=args.q_double_quant,
    )
    for issue in validate_quantization_config(config, backend_manager.backend):
        print(f"Warning: {issue}")
    return create_quantization_adapter(backend_manager.backend, config)


def add_quantization_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that setup_quantization reads."""
    group = parser.add_argument_group("quantization")
    group.add_argument(
        "--quantize",
        choices=[method.value for method in QuantizationMethod],
        default="none",
        type=str.lower,
        help="method (default: %(default)s)",
    )
    group.add_argument(
        "--q_bits", type=int, help="width; default: the one that the method names, else 4"
    )
    group.add_argument(
        "--q_group_size", type=int, default=64, help="weights per scale (default: %(default)s)"
    )
    group.add_argument(
        "--q_compute_dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of products; default: the best one of the backend",
    )
    group.add_argument(
        "--q_skip_modules",
        metavar="NAMES",
        help='layers that stay dense, separated by commas, or none; default, also of "": lm_head',
    )
    group.add_argument(
        "--q_double_quant",
        action=argparse.BooleanOptionalAction,
        help="bitsandbytes: quantize the scales too; default: where the method has it",
    )


def load_dense(path: str | None) -> torch.nn.Module:
    """A model of a folder, of the hub or of a GGUF file; a small one without a path."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if path is None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    if pathlib.Path(path).suffix == ".gguf":
        from quantal import load_gguf

        return load_gguf(path)[0]
    return AutoModelForCausalLM.from_pretrained(path)


def main(arguments: list[str] | None = None) -> None:
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder, name on the hub, or GGUF file")
    parser.add_argument("--backend", help="cuda, mps, mlx or cpu; default: the best one here")
    parser.add_argument("--save", metavar="FOLDER", help="write the quantized model there")
    add_quantization_flags(parser)
    args = parser.parse_args(arguments)
    try:
        manager = BackendManager(args.backend, verbose=False)
        adapter = setup_quantization(args, manager)
    except ValueError as error:
        parser.error(str(error))
    model = adapter.quantize_model(load_dense(args.model))
    print(f"{type(adapter).__name__} on {manager.backend}")
    print(adapter.report.to_text())
    if args.save:
        adapter.save_quantized_model(model, args.save)
        print(f"saved to {args.save}")


if __name__ == "__main__":
    main()
