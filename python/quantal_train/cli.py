"""Flags of the training program, their checks, and its entry point."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from quantal import ConfigError, QuantalError
from quantal.chunked_loss import CHUNK_TOKENS

from .quantization import add_quantization_flags

SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
OPTIMIZERS = ("adamw", "fused_adamw", "adam", "sgd", "adadelta")
ALL_LINEAR = "all-linear"
#: Settings that decide which adapter comes out: a run goes on with the same ones only.
FIXED = (
    "train_type",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "global_batch",
    "context_length",
    "packing",
    "eval_fraction",
    "seed",
    "optimizer",
    "precision",
)


def _data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        "--model_name",
        required=True,
        metavar="PATH",
        help="HF folder, quantized folder or file, or GGUF file",
    )
    group.add_argument("--tokenizer", metavar="PATH", help="folder or GGUF; default: the model's")
    group.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help='text files (one document each) or .jsonl: {"text"}, {"prompt", "completion"} or '
        '{"messages"} per line',
    )
    group.add_argument("--eval_data", nargs="+", metavar="FILE", help="held-out files")
    group.add_argument(
        "--eval_fraction", type=float, default=0.0, help="part of the rows of --data to hold out"
    )
    group.add_argument("--context_length", type=int, default=512, help="tokens per row")
    group.add_argument(
        "--packing",
        choices=["packed", "none"],
        default="packed",
        help="packed: documents fill rows and cannot see each other; none: one document per row",
    )
    group.add_argument("--output_dir", default="output", metavar="DIR")


def _adapter_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--train_type",
        choices=["qlora", "lora", "dora"],
        default="qlora",
        help="qlora: LoRA on a packed base (required); lora: on any base; dora: with magnitudes",
    )
    group.add_argument("--lora_rank", type=int, default=64)
    group.add_argument("--lora_alpha", type=float, default=16)
    group.add_argument("--lora_dropout", type=float, default=0.1)
    group.add_argument(
        "--lora_target_modules",
        default=ALL_LINEAR,
        metavar="NAMES",
        help="separated by commas; default: %(default)s",
    )


def _training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--num_epochs", type=float, default=1.0)
    group.add_argument("--max_steps", type=int, help="optimizer steps; overrides --num_epochs")
    group.add_argument(
        "--batch_size",
        "--micro_batch",
        dest="micro_batch",
        type=int,
        default=1,
        help="rows per forward pass and rank",
    )
    group.add_argument(
        "--gradient_accumulation_steps", type=int, help="forward passes per step and rank"
    )
    group.add_argument(
        "--global_batch",
        type=int,
        help="rows per step over all ranks; default: batch_size x accumulation x ranks",
    )
    group.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    group.add_argument("--lr_scheduler", choices=SCHEDULERS, default="cosine")
    group.add_argument("--warmup_steps", type=int, default=0)
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    group.add_argument("--wd", type=float, default=0.0, help="weight decay")
    group.add_argument("--grad_norm", type=float, default=1.0, help="clipping; 0: none")
    group.add_argument("--seed", type=int, default=42)
    group.add_argument(
        "--loss_chunk",
        type=int,
        default=CHUNK_TOKENS,
        help="tokens whose logits are in memory at once; 0: the model's own loss, all at once",
    )


def _memory_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("precision, memory, sharding")
    group.add_argument(
        "--precision",
        choices=["bf16", "fp32", "bf16_autocast", "fp16_autocast"],
        help="of activations and dense weights; adapters are float32. Default: bf16, fp32 on a CPU",
    )
    group.add_argument(
        "--sharding_strategy",
        choices=["full_shard", "shard_grad_op", "ddp"],
        default="full_shard",
        help="full_shard: every rank holds its part of base, adapters, optimizer; shard_grad_op: "
        "blocks stay gathered until backward; ddp: every rank holds everything",
    )
    group.add_argument(
        "--gradient_checkpointing", choices=["non_reentrant", "reentrant", "none"],
        default="non_reentrant", help="compute blocks again in the backward pass",
    )  # fmt: skip
    group.add_argument("--use_cpu_offload", action="store_true", help="shards in host memory")
    group.add_argument(
        "--use_activation_cpu_offload", action="store_true", help="block inputs in host memory"
    )
    group.add_argument(
        "--attn_implementation",
        default="auto",
        metavar="NAME",
        help="quantal, or a name of transformers (sdpa, eager, ...); auto: quantal "
        "where it is faster than sdpa for a step of this model on this machine",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile, block by block")
    group.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    group.add_argument("--threads", type=int, help="CPU threads per rank")
    group.add_argument(
        "--timeout", type=float, default=600.0, help="seconds to wait for a rank that is silent"
    )


def _run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints and reports")
    group.add_argument("--save_steps", type=int, default=50, help="0: only at the end")
    group.add_argument("--keep_checkpoints", type=int, default=3, help="0: all")
    group.add_argument("--sync_save", action="store_true", help="wait for each checkpoint")
    group.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="auto: go on from the last good checkpoint of --output_dir; none: refuse to; PATH: of "
        "a checkpoint folder",
    )
    group.add_argument("--eval_steps", type=int, default=0, help="0: only at the end")
    group.add_argument("--sample_steps", type=int, default=0, help="0: never")
    group.add_argument("--sample_prompt", default="The", metavar="TEXT")
    group.add_argument("--sample_tokens", type=int, default=32)
    group.add_argument(
        "--tensorboard", choices=["auto", "on", "off"], default="auto", help="auto: if installed"
    )
    group.add_argument("--no_plots", action="store_true")
    group.add_argument("--dry-run", action="store_true", help="print the memory plan and stop")
    group.add_argument("--ranks", type=int, help="of --dry-run; default: those that run")
    group.add_argument(
        "--memory_gb", type=float, help="of one rank: --dry-run says whether the run fits"
    )


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of a flag; a text that says what happens without the flag stays alone."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default is False
        return action.help if unset else super()._get_help_string(action)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="LoRA, QLoRA and DoRA fine-tuning on one or many ranks (torchrun).",
        epilog="With glibc the program starts itself again with GLIBC_TUNABLES set, which halves "
        "its memory on the CPU; QUANTAL_MALLOC=default in the environment leaves that out.",
        formatter_class=_Defaults,
    )
    _data_flags(parser)
    add_quantization_flags(parser)
    _adapter_flags(parser)
    _training_flags(parser)
    _memory_flags(parser)
    _run_flags(parser)
    return parser


def _positive(args: argparse.Namespace) -> None:
    least = {
        "context_length": 2,
        "lora_rank": 1,
        "micro_batch": 1,
        "gradient_accumulation_steps": 1,
        "global_batch": 1,
        "max_steps": 1,
        "warmup_steps": 0,
        "loss_chunk": 0,
        "save_steps": 0,
        "keep_checkpoints": 0,
        "eval_steps": 0,
        "sample_steps": 0,
        "lr": 0,
        "grad_norm": 0,
        "num_epochs": 0,
        "ranks": 1,
        "memory_gb": 0,
        "timeout": 1,
    }
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and not value >= smallest:
            raise ConfigError(f"--{name} is {value}, expected at least {smallest}")
    if not 0 <= args.eval_fraction <= 0.5:
        raise ConfigError(f"--eval_fraction is {args.eval_fraction}, expected 0 to 0.5")
    if not 0 <= args.lora_dropout < 1:
        raise ConfigError(f"--lora_dropout is {args.lora_dropout}, expected 0 to below 1")


def settle_batches(args: argparse.Namespace, ranks: int) -> None:
    """Global batch and accumulation from each other; ConfigError where they contradict."""
    per_pass = args.micro_batch * ranks
    steps = args.gradient_accumulation_steps
    if args.global_batch is None:
        args.gradient_accumulation_steps = steps or 1
        args.global_batch = per_pass * args.gradient_accumulation_steps
    if args.global_batch % per_pass:
        raise ConfigError(
            f"--global_batch is {args.global_batch}, expected a multiple of {per_pass} "
            f"(--batch_size {args.micro_batch} x {ranks} ranks)"
        )
    needed = args.global_batch // per_pass
    if steps is not None and steps != needed:
        raise ConfigError(
            f"--gradient_accumulation_steps is {steps}, expected {needed} (--global_batch "
            f"{args.global_batch} / --batch_size {args.micro_batch} / {ranks} ranks)"
        )
    args.gradient_accumulation_steps = needed


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked; a wrong one ends the program with its name and what is legal."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        _positive(args)
    except ConfigError as error:
        parser.error(str(error))
    return args


def fixed_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in FIXED}


def main(arguments: list[str] | None = None) -> None:
    """The program. Errors go to stderr as one line; the exit status is then 1."""
    args = parse(arguments)
    from .run import run

    try:
        run(args)
    except QuantalError as error:
        rank = os.environ.get("RANK", "0")
        print(f"train: {error} (rank {rank})", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # a peer that is gone must not hold this process up


def program() -> None:
    """`main`, as a process of its own."""
    main()
    # Past the end of the interpreter: threads of gloo still release Python objects, and a finished
    # process that is ending would now and then be aborted by that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
