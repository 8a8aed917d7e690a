"""Random sizes, settings and weights of every dialect against its package, beyond the lists of the
other files: QUANTAL_SEED=n draws others (default 0), QUANTAL_SWEEP=n draws n times as many."""

import json
import math
import os
import random

import gguf
import mlx.core as mx
import numpy as np
import pytest
import test_bitsandbytes as bnb
import test_hqq as hqq
import test_mlx as mlx
import test_quanto as quanto
import torch
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from hqq.core.quantize import Quantizer
from optimum.quanto import qint2, qint4
from weights import DTYPES, random_weight, same_bits, same_values

import test_gguf as ggufs
from quantal.testing import (
    dequantize_packed,
    dequantize_tensors,
    options,
    quantize_packed,
    quantize_tensors,
)

SEED = int(os.environ.get("QUANTAL_SEED", "0"))
FACTOR = int(os.environ.get("QUANTAL_SWEEP", "1"))


def draws(dialect: str, count: int):
    """Generators of numbers, one per case; a failure names its case."""
    return pytest.mark.parametrize(
        "draw",
        [f"{dialect} {SEED} {i}" for i in range(count * FACTOR)],
    )


def numbers(draw: str) -> random.Random:
    return random.Random(draw)


def weight_of(rng: random.Random, rows: int, cols: int) -> torch.Tensor:
    return random_weight(rows, cols, rng.choice(DTYPES), rng.randrange(2**31))


@draws("bnb", 60)
def test_bitsandbytes_4_bits(draw):
    rng = numbers(draw)
    weight = weight_of(rng, rng.randint(1, 90), rng.randint(1, 700))
    block, kind, nested = rng.choice(bnb.BLOCKS), rng.choice(bnb.TYPES), rng.random() < 0.5
    theirs, ours = (make(weight, block, kind, nested) for make in (bnb.theirs_of, bnb.ours_of))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if not nested or name in ("weight", "weight.quant_map", "weight.nested_quant_map"):
            assert same_bits(ours[name], tensor), name
    for tensors in (theirs, ours):
        values = dequantize_tensors(tensors, "bnb", weight.dtype)
        assert same_values(values, bnb.flat_values(tensors))
        assert same_values(
            bnb.without_subnormals(values), bnb.without_subnormals(bnb.their_values(tensors))
        )


@draws("int8", 40)
def test_bitsandbytes_8_bits(draw):
    rng = numbers(draw)
    weight = weight_of(rng, rng.randint(1, 90), rng.randint(1, 700))
    codes, scb, _ = bnb.F.int8_vectorwise_quant(weight.to(torch.float16))
    ours = quantize_tensors(weight, "bnb_int8", bits=8)
    assert same_bits(ours["weight"], codes) and same_bits(ours["SCB"], scb)
    values = dequantize_tensors(ours, "bnb", torch.float32)
    assert same_values(values, bnb.F.int8_vectorwise_dequant(codes, scb))


@draws("hqq", 80)
def test_hqq(draw):
    rng = numbers(draw)
    bits, axis, dtype = rng.choice(hqq.BITS), rng.randrange(2), rng.choice(DTYPES)
    group = 8 * rng.randint(1, 24)
    # A matrix of whole groups, and of grouped rows that fill bytes.
    cols = rng.randint(1, 60) * 8
    step = math.lcm(group * hqq.ROWS_PER_BYTE[bits], cols) // cols
    weight = weight_of(rng, step * rng.randint(1, max(1, 96 // step)), cols)
    codes, meta = hqq.theirs_of(weight, bits, group, axis, False, dtype)
    ours = hqq.ours_of(weight, bits, group, axis, False, dtype)
    assert same_bits(ours["W_q"], codes)
    assert same_bits(ours["scale"], meta["scale"]) and same_bits(ours["zero"], meta["zero"])
    assert same_values(hqq.their_values(ours), Quantizer.dequantize(codes, meta))
    assert same_values(dequantize_tensors(ours, "hqq", dtype), hqq.their_values(ours))


@draws("quanto", 80)
def test_quanto(draw):
    rng = numbers(draw)
    qtype, axis = rng.choice([qint2, qint4]), rng.choice([0, -1])
    # Of one row along the axis there is a test of its own (test_single_rows).
    shape = [rng.randint(2, 90), rng.randint(2, 90)]
    group = rng.choice([None, 1 + rng.randrange(64)])
    if group is not None:
        shape[1 if axis == 0 else 0] = group * rng.randint(1, 6)
    weight = weight_of(rng, *shape)
    zeropoint = rng.random() < 0.3
    mode = "exact_group,zeropoint" if zeropoint else "exact_group"
    theirs = quanto.theirs_of(weight, qtype, axis, group, zeropoint)
    quanto.assert_same_tensors(
        quanto.ours_of(weight, qtype, axis, group, mode), quanto.state_of(theirs)
    )
    values = dequantize_tensors(
        quanto.state_of(theirs),
        "quanto",
        weight.dtype,
        weight_shape=tuple(shape),
        settings=quanto.settings_of(qtype),
    )
    assert same_values(values, theirs.dequantize())


@draws("quanto8", 30)
def test_quanto_8_bits(draw):
    rng = numbers(draw)
    axis = rng.choice([0, -1])
    weight = weight_of(rng, rng.randint(1, 90), rng.randint(1, 400))
    scale = quanto.AbsmaxOptimizer()(weight, quanto.qint8, axis)
    theirs = quanto.quantize_weight(weight, quanto.qint8, axis, scale)
    ours = quantize_tensors(weight, "quanto_int8", axis=axis)
    quanto.assert_same_tensors(ours, quanto.state_of(theirs))
    assert same_values(dequantize_tensors(ours, "quanto", weight.dtype), theirs.dequantize())


@draws("mlx", 80)
def test_mlx(draw):
    rng = numbers(draw)
    mode = rng.choice(["affine", "affine", "affine", *mlx.MODES])
    group, bits = mlx.MODES.get(mode) or (
        rng.choice(mlx.GROUPS),
        rng.choice(mlx.BITS),
    )
    # mlx packs whole words of 32 bits and decodes whole groups.
    cols = math.lcm(group, 32) * rng.randint(1, 12)
    mlx.check_layer(weight_of(rng, rng.randint(1, 70), cols), bits, group, mode)


@draws("mlx bytes", 30)
def test_mlx_decodes_any_bytes(draw):
    rng = numbers(draw)
    bits, group, dtype = rng.choice(mlx.BITS), rng.choice([32, 64, 128]), rng.choice(DTYPES)
    rows, groups = rng.randint(1, 40), rng.randint(1, 9)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    words = torch.randint(-(2**31), 2**31, (rows, groups * group * bits // 32), generator=generator)
    tensors = {"weight": words.to(torch.int32).view(torch.uint32)}
    for name in ("scales", "biases"):
        tensors[name] = torch.randn(rows, groups, generator=generator).to(dtype)
    settings = {"bits": bits, "group_size": group, "mode": "affine"}
    theirs = mlx.upstream_values(tensors, dtype, **settings)
    ours = dequantize_tensors(tensors, "mlx", dtype, settings=json.dumps(settings))
    assert same_values(ours, theirs)
    assert mx.array_equal(mlx.to_mlx(ours), mlx.to_mlx(theirs))


@draws("gguf", 60)
def test_gguf(draw):
    rng = numbers(draw)
    mode = rng.choice([*ggufs.EXACT, *ggufs.SEARCHED])
    block = 32 if mode in (*ggufs.EXACT, "IQ4_NL") else 256
    weight = weight_of(rng, rng.randint(1, 40), block * rng.randint(1, 20))
    weight = ggufs.usable(weight)
    if not len(weight):
        return
    packed = quantize_packed(weight, options("gguf", mode=mode), "gguf")
    blocks = ggufs.ours(weight, mode)
    if mode in ggufs.EXACT:
        theirs = gguf_quantize(ggufs.wide(weight), gguf.GGMLQuantizationType[mode])
        assert np.array_equal(blocks, theirs)
    values = gguf_dequantize(blocks, ggufs.kind(mode))
    assert np.array_equal(dequantize_packed(packed).numpy(), values)
