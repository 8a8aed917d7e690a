"""The model of a run: loaded, quantized, with adapters, sharded."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import torch
from torch import nn

import quantal
import quantal.fsdp
from quantal import ConfigError, UnsupportedError
from quantal._model_attention import Choice, set_attention
from quantal._packed import PackedWeight

from .quantization import setup_quantization
from .world import World


def dense_dtype(args: argparse.Namespace) -> torch.dtype:
    """Of weights that are not packed."""
    return torch.bfloat16 if args.precision == "bf16" else torch.float32


def compute_dtype(args: argparse.Namespace) -> torch.dtype:
    """Of the products of packed layers."""
    if args.q_compute_dtype:
        return getattr(torch, args.q_compute_dtype)
    names = {"fp32": "float32", "fp16_autocast": "float16"}
    return getattr(torch, names.get(args.precision, "bfloat16"))


def load_tokenizer(args: argparse.Namespace) -> Any:
    """Of --tokenizer or of the model itself."""
    path = args.tokenizer or args.model
    if path.endswith(".gguf"):
        from quantal import _core
        from quantal.gguf import make_tokenizer

        tokenizer = make_tokenizer(json.loads(_core.ModelSource.open(path).tokenizer_json))
        if tokenizer is None:
            raise UnsupportedError(f"tokenizer: {path} has none, expected --tokenizer FOLDER")
        return tokenizer
    if not os.path.isdir(path):
        raise ConfigError(f"tokenizer: {path} is no folder or GGUF file, expected --tokenizer PATH")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"tokenizer: {path} has none: {reason}", path) from error


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedWeight) for module in model.modules())


def load(args: argparse.Namespace, world: World) -> Any:
    """A PEFT model on a base as --model and --quantize say, sharded as --sharding_strategy says.

    Each rank reads its own rows of the file and quantizes them. A GGUF file that is to be quantized
    in another way is decoded whole first, and so is every base without sharding."""
    adapter = _adapter(args, world)
    sharded = args.sharding_strategy != "ddp"
    if sharded and not (adapter is not None and args.model.endswith(".gguf")):
        model = quantal.fsdp.load_sharded(
            args.model, None, adapter, attach=lambda base: attach(base, args), **policies(args)
        )
        _refuse_twice(adapter, args)
    else:
        model = attach(_load_whole(args, adapter, world), args)
        if sharded:
            model = quantal.fsdp.shard_model(model, **policies(args))
        elif args.use_cpu_offload:
            raise ConfigError("--use_cpu_offload needs sharding, expected full_shard")
        else:
            model = model.to(world.device)
    if adapter is not None:
        world.say(adapter.report.to_text())
    if args.attention:
        world.say(f"attention: {args.attention}")
    return model


def _adapter(args: argparse.Namespace, world: World) -> Any:
    """What quantizes; None for a base that is taken as it is."""
    if args.quantize == "none":
        return None
    args.q_compute_dtype = str(compute_dtype(args)).removeprefix("torch.")
    manager = quantal.BackendManager(world.device.type, verbose=False)
    return setup_quantization(args, manager, world.say)


def _refuse_twice(adapter: Any, args: argparse.Namespace) -> None:
    """`adapter` is one that a model was loaded through."""
    if adapter is not None and not adapter.report.entries:
        raise ConfigError(
            f"--quantize is {args.quantize}, expected none: {args.model} is quantized already "
            "(`quantal convert` writes another codec)"
        )


def _load_whole(args: argparse.Namespace, adapter: Any, world: World) -> nn.Module:
    if adapter is None:
        return quantal.load_model(args.model)
    if args.model.endswith(".gguf"):
        model, _ = quantal.load_gguf(args.model, torch.float32)
    else:
        model = quantal.load_model(args.model)
    if not is_packed(model):
        model = adapter.quantize_model(model, progress=world.main and sys.stderr.isatty())
    _refuse_twice(adapter, args)
    return model


def policies(args: argparse.Namespace) -> dict[str, Any]:
    """How the model is sharded."""
    return {
        "mixed_precision": torch.bfloat16 if args.precision == "bf16" else None,
        "offload": args.use_cpu_offload,
        "reshard_after_forward": args.sharding_strategy == "full_shard",
    }


def _set_dtypes(model: nn.Module, args: argparse.Namespace) -> None:
    """Dense parameters in one dtype, products of packed layers in another; buffers (tables of
    rotary embeddings) stay as they are."""
    dtype = dense_dtype(args)
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.compute_dtype = compute_dtype(args)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            empty = not any(parameter.stride())  # no memory yet: load_sharded fills it later
            one = parameter.data.flatten()[:1].to(dtype) if empty else None
            parameter.data = (
                parameter.data.to(dtype) if one is None else one.expand(parameter.shape)
            )


def choose_attention(model: nn.Module, args: argparse.Namespace) -> Choice | None:
    """Sets what --attn_implementation says, and there keeps what came of it."""
    names = {"bf16_autocast": torch.bfloat16, "fp16_autocast": torch.float16}
    choice = set_attention(
        "train",
        model,
        args.attn_implementation,
        dtype=names.get(args.precision, dense_dtype(args)),
        training=True,
    )
    args.attention = None if choice is None else str(choice)
    return choice


def attach(model: nn.Module, args: argparse.Namespace) -> Any:
    """A PEFT model with new adapters, the same on every rank and number of ranks."""
    from peft import LoraConfig, get_peft_model

    if args.train_type == "qlora" and not is_packed(model):
        raise ConfigError(
            "--train_type is qlora and the base is dense, expected --quantize METHOD (or "
            "--train_type lora)"
        )
    _set_dtypes(model, args)
    choose_attention(model, args)
    kind = args.gradient_checkpointing
    model = quantal.prepare_model_for_training(
        model, kind != "none", use_reentrant=kind == "reentrant"
    )
    names = args.lora_target_modules
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=names if names == "all-linear" else names.split(","),
        use_dora=args.train_type == "dora",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(args.seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"--lora_target_modules is {names}: {error}") from error


def compile_blocks(model: Any) -> None:
    for block in quantal.fsdp.decoder_blocks(model):
        block.compile()
