"""The flags of quantization, and the adapter that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from quantal import (
    QuantizationConfig,
    QuantizationMethod,
    create_quantization_adapter,
    validate_quantization_config,
)

_DTYPES = ("float32", "float16", "bfloat16")


def add_quantization_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that setup_quantization reads."""
    group = parser.add_argument_group("quantization of the base")
    group.add_argument(
        "--quantize",
        choices=[method.value for method in QuantizationMethod],
        default="none",
        type=str.lower,
        help="method; none: the base as its file has it, packed or dense",
    )
    group.add_argument("--q_bits", type=int, help="width; default: that of the method, else 4")
    group.add_argument("--q_group_size", type=int, default=64, help="weights per scale")
    group.add_argument("--q_compute_dtype", choices=_DTYPES, help="default: as --precision")
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
    group.add_argument(
        "--q_support",
        choices=["extended", "documented"],
        default="extended",
        help="extended: every method runs on every device; documented: the matrix of the README",
    )


def _names(text: str | None, default: list[str]) -> list[str]:
    """Names separated by commas; unset or empty: the default, as in api.md; "none": no name."""
    if not text:
        return default
    return [] if text == "none" else [name for name in text.split(",") if name]


def make_config(args: argparse.Namespace) -> QuantizationConfig:
    """The config that the flags ask for."""
    return QuantizationConfig(
        method=QuantizationMethod(args.quantize),
        bits=args.q_bits,
        group_size=args.q_group_size,
        compute_dtype=getattr(torch, args.q_compute_dtype) if args.q_compute_dtype else None,
        skip_modules=_names(args.q_skip_modules, ["lm_head"]),
        double_quant=args.q_double_quant,
        backend_options={"support": args.q_support},
    )


def setup_quantization(
    args: argparse.Namespace, backend_manager: Any, say: Callable[[str], None] = print
) -> Any:
    """The adapter that the flags ask for; `say` gets the findings of validation."""
    config = make_config(args)
    for issue in validate_quantization_config(config, backend_manager.backend):
        say(f"Warning: {issue}")
    return create_quantization_adapter(backend_manager.backend, config, fallback="error")
