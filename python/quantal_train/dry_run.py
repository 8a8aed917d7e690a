"""``--dry-run``: the memory plan of the run that the flags describe, from file headers alone."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import quantal
from quantal import UnsupportedError

from .model import compute_dtype
from .quantization import make_config


def make_plan(args: argparse.Namespace, ranks: int, device: str) -> Any:
    """The plan of one rank of `ranks`; UnsupportedError for what the planner does not count."""
    if args.optimizer == "adadelta":
        raise UnsupportedError("--dry-run: optimizer is adadelta, expected adamw, adam or sgd")
    args.q_compute_dtype = args.q_compute_dtype or str(compute_dtype(args)).split(".")[1]
    names = args.lora_target_modules
    return quantal.plan(
        args.model,
        device,
        args.memory_gb,
        1 if args.sharding_strategy == "ddp" else ranks,
        "qlora",
        config=None if args.quantize == "none" else make_config(args),
        support=args.q_support,
        fallback="error",
        batch_size=args.micro_batch,
        sequence_length=args.context_length,
        lora_rank=args.lora_rank,
        lora_targets=None if names == "all-linear" else names.split(","),
        lora_dropout=args.lora_dropout,
        lora_dtype=torch.float32,
        optimizer="sgd" if args.optimizer == "sgd" else "adamw",
        gradient_checkpointing=args.gradient_checkpointing != "none",
        loss_chunk=args.loss_chunk,
        cpu_offload=args.use_cpu_offload,
    )
