"""Packed matrices with random codes and their exact values, written from the description of the
layout in include/quantal/packed.h and of nothing else: a third opinion beside the C++ reference."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

INTEGER, NF4, E2M1, IQ4_NL, E4M3 = 0, 1, 4, 5, 6
NONE, BIAS, SHIFT, ZERO_POINT, OVER_127 = range(5)
F32, F16, BF16, NESTED, E8M0, E4M3_SCALE, SUPER_U8, SUPER_I8 = range(8)
ROW_RUNS, COLUMN_RUNS, COLUMN_BLOCKS = range(3)
TYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
NF4_TABLE = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
IQ4_NL_TABLE = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
E2M1_TABLE = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@dataclass(frozen=True)
class Form:
    """Members of a PackedSpec whose groups divide rows, or are columns (only quantized here)."""

    name: str
    bits: int = 4
    code_map: int = INTEGER
    centre: int = 0
    offset: int = NONE
    scale: int = F32
    value: int = F32
    group: int = 64
    nested: int = 256
    group_map: int = ROW_RUNS

    def spec(self, rows: int, cols: int) -> list[int]:
        group = self.group or cols
        return [1, rows, cols, self.bits, self.code_map, self.centre, self.offset, self.scale,
                self.value, self.group_map, group, self.nested, 0, 0, 0, 0]  # fmt: skip


FORMS = [
    Form("NF4", code_map=NF4, value=BF16),
    Form("NF4 nested", code_map=NF4, scale=NESTED, value=BF16),
    Form("HQQ 4 bits", offset=ZERO_POINT, scale=BF16, value=BF16),
    Form("HQQ 3 bits", bits=3, offset=ZERO_POINT, scale=F16, value=F16),
    Form("HQQ 2 bits", bits=2, offset=ZERO_POINT, scale=BF16, value=BF16, group=16),
    Form("HQQ 1 bit", bits=1, offset=ZERO_POINT, scale=F32, value=F32),
    Form("MLX 4 bits", offset=BIAS, scale=BF16, value=BF16),
    Form("MLX 5 bits", bits=5, offset=BIAS, scale=F16, value=F16, group=32),
    Form("MLX 6 bits", bits=6, offset=BIAS, scale=BF16, value=BF16),
    Form("Quanto 4 bits", offset=SHIFT, scale=BF16, value=BF16, group=128),
    Form("8 bits", bits=8, centre=128, scale=BF16, value=BF16),
    Form("E4M3", bits=8, code_map=E4M3, scale=F32, value=F32),
    Form("MXFP4", code_map=E2M1, scale=E8M0, value=BF16, group=32),
    Form("NVFP4", code_map=E2M1, scale=E4M3_SCALE, value=BF16, group=16),
    Form("Q4_K", offset=SHIFT, scale=SUPER_U8, value=F32, group=32, nested=8),
    Form("Q6_K", bits=6, centre=32, scale=SUPER_I8, value=F32, group=16, nested=16),
]
#: What the encoders of kernels/cuda/quantizer.h make, by their number, with settings of theirs.
ENCODED = {
    "NF4": (0, Form("NF4", code_map=NF4, value=BF16), {"least": 1e-38}),
    "NF4 nested": (0, Form("NF4", code_map=NF4, scale=NESTED, value=BF16), {"least": 1e-38}),
    "LLM.int8": (1, Form("int8", bits=8, centre=128, offset=OVER_127, group=0), {}),
    "MLX 4 bits": (2, Form("MLX", offset=BIAS, scale=BF16, value=BF16), {}),
    "MLX 5 bits": (2, Form("MLX", bits=5, offset=BIAS, scale=F16, value=F16), {}),
    "Quanto 4 bits": (3, Form("Quanto", offset=SHIFT, scale=BF16, value=BF16), {}),
    "Quanto zero points": (
        4,
        Form("Quanto", offset=ZERO_POINT, scale=BF16, value=BF16),
        {"not_a_number": -3.4028234663852886e38},
    ),
    "Quanto 8 bits": (5, Form("Quanto", bits=8, centre=128, scale=F16, value=F16, group=0), {}),
    "HQQ 4 bits": (
        6,
        Form("HQQ", offset=ZERO_POINT, scale=BF16, value=BF16),
        {"tiny_range": 1e-4, "largest_scale": 2e4, "round_zero": 1, "rounds": 20},
    ),
    "HQQ 3 bits, no solver": (
        6,
        Form("HQQ", bits=3, offset=ZERO_POINT, scale=BF16, value=BF16),
        {"tiny_range": 1e-4, "largest_scale": 2e4},
    ),
    "MXFP4": (7, Form("MXFP4", code_map=E2M1, scale=E8M0, value=BF16, group=32), {}),
    "NVFP4": (7, Form("NVFP4", code_map=E2M1, scale=E4M3_SCALE, value=BF16, group=16), {}),
    "MXFP8": (7, Form("MXFP8", bits=8, code_map=E4M3, scale=E8M0, value=BF16, group=32), {}),
}

_BETAS = [10.0]
while len(_BETAS) < 21:
    _BETAS.append(_BETAS[-1] * 1.01)


def _shrinks(power: float) -> dict[str, object]:
    """Quanto's schedule; below no_shrink the remainder is 0 by two roundings."""
    edges = [(0.97 / beta) ** (1 / 1.3) for beta in _BETAS]
    return {
        "rounds": len(_BETAS),
        "power": power,
        "inverse_beta": (ctypes.c_float * 32)(*(1 / beta for beta in _BETAS)),
        "no_shrink": (ctypes.c_float * 32)(*edges),
    }


_IQ4_NL_MIDDLES = [(a + b) / 2 / 127 for a, b in zip(IQ4_NL_TABLE, IQ4_NL_TABLE[1:], strict=False)]
ENCODED |= {
    "Q4_0": (8, Form("Q4_0", centre=8, scale=F16, group=32), {}),
    "Q5_1": (9, Form("Q5_1", bits=5, offset=BIAS, scale=F16, group=32), {}),
    "Q8_0": (10, Form("Q8_0", bits=8, centre=128, scale=F16, group=32), {}),
    "IQ4_NL": (
        11,
        Form("IQ4_NL", code_map=IQ4_NL, scale=F16, group=32),
        {
            "thresholds": (ctypes.c_float * 16)(*_IQ4_NL_MIDDLES),
            "values": (ctypes.c_float * 16)(*IQ4_NL_TABLE),
        },
    ),
    "Q4_K": (12, Form("Q4_K", offset=SHIFT, scale=SUPER_U8, group=32, nested=8), {}),
    "Q5_K": (12, Form("Q5_K", bits=5, offset=SHIFT, scale=SUPER_U8, group=32, nested=8), {}),
    "Q6_K": (12, Form("Q6_K", bits=6, centre=32, scale=SUPER_I8, group=16, nested=16), {}),
}
_HQQ = {"tiny_range": 1e-4, "largest_scale": 2e4, "rounds": 20}
_SHIFT = {"offset": SHIFT, "scale": BF16, "value": BF16}
_BF16_POWER = -0.30078125  # -0.3 as bfloat16
ENCODED |= {
    "HQQ columns": (
        6,
        Form("HQQ", offset=ZERO_POINT, scale=BF16, value=BF16, group_map=COLUMN_RUNS),
        {**_HQQ, "round_zero": 1},
    ),
    "HQQ ternary": (
        6,
        Form("HQQ", bits=2, offset=ZERO_POINT, scale=F16, value=F16),
        {**_HQQ, "max_code": 2.0},
    ),
    "Quanto solver": (3, Form("Quanto", group=128, **_SHIFT), _shrinks(_BF16_POWER)),
    "Quanto columns": (3, Form("Quanto", group=8, group_map=COLUMN_BLOCKS, **_SHIFT), {}),
    "Quanto columns, solver, zero points": (
        4,
        Form("Quanto", group=8, group_map=COLUMN_BLOCKS, offset=ZERO_POINT, scale=F32),
        {**_shrinks(-0.3), "not_a_number": -3.4028234663852886e38},
    ),
}
INT8 = Form("LLM.int8", bits=8, centre=128, offset=OVER_127, group=0)


def _plane(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Strips of a plane: byte j, field f is code 16 f + j."""
    fields = 8 // bits
    cut = codes.reshape(*codes.shape[:-1], -1, fields, 16).to(torch.int32)
    shifts = (torch.arange(fields, dtype=torch.int32) * bits).view(fields, 1)
    return (cut << shifts).sum(-2).to(torch.uint8).flatten(-2)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, cols] codes, one per byte, to [rows, code_bytes]."""
    low = {3: 2, 5: 4, 6: 4}.get(bits, bits)
    high = bits - low
    unit = 128 // (high or low)
    rows, cols = codes.shape
    padded = torch.zeros(rows, math.ceil(cols / unit) * unit, dtype=torch.uint8)
    padded[:, :cols] = codes
    units = padded.view(rows, -1, unit)
    parts = [_plane(units & ((1 << low) - 1), low)]
    if high:
        parts.append(_plane(units >> low, high))
    return torch.cat(parts, -1).flatten(1)


def _raw(values: torch.Tensor) -> torch.Tensor:
    """Bytes of the elements of each row."""
    return values.contiguous().view(torch.uint8).reshape(values.shape[0], -1)


@dataclass
class Packed:
    """Buffers of a matrix and its exact values, float32 [rows, cols]."""

    form: Form
    spec: list[int]
    codes: torch.Tensor
    stats: torch.Tensor
    shared: torch.Tensor
    values: torch.Tensor


def _statistics(form: Form, rows: int, slots: int, random: torch.Generator):
    """(scale, offset) as float32 [rows, slots], the bytes of stats, those of shared."""
    uniform = torch.rand(rows, slots, generator=random) * 0.02 + 0.01
    nothing = torch.empty(0, dtype=torch.uint8)
    zeros = torch.zeros(rows, slots)
    if form.scale in TYPES:
        scale = uniform.to(TYPES[form.scale])
        level = (1 << form.bits) * 0.47 if form.offset == ZERO_POINT else 0.1
        offset = (torch.rand(rows, slots, generator=random) * level).to(TYPES[form.scale])
        if form.offset in (NONE, OVER_127):
            return scale.float(), zeros, _raw(scale), nothing
        return scale.float(), offset.float(), torch.cat([_raw(scale), _raw(offset)], 1), nothing
    bytes_ = torch.randint(0, 256, (rows, slots), generator=random).to(torch.uint8)
    if form.scale == E8M0:
        bytes_ = 119 + bytes_ % 4
        return torch.exp2(bytes_.float() - 127), zeros, bytes_, nothing
    if form.scale == E4M3_SCALE:
        bytes_ = 16 + bytes_ % 32
        return bytes_.view(torch.float8_e4m3fn).float(), zeros, bytes_, nothing
    if form.scale == NESTED:
        return _nested(form, bytes_, random)
    offsets = torch.randint(0, 256, (rows, slots), generator=random).to(torch.uint8)
    supers = (torch.rand(rows, slots // form.nested, generator=random) * 3e-4).half()
    if form.offset == NONE:
        stats = torch.cat([bytes_, _raw(supers)], 1)
        signed = bytes_.view(torch.int8).float()
        return supers.float().repeat_interleave(form.nested, 1) * signed, zeros, stats, nothing
    outer = (torch.rand(rows, slots // form.nested, generator=random) * 3e-3).half()

    def spread(t: torch.Tensor) -> torch.Tensor:
        return t.float().repeat_interleave(form.nested, 1)

    stats = torch.cat([bytes_, offsets, _raw(supers), _raw(outer)], 1)
    return spread(supers) * bytes_.float(), spread(outer) * offsets.float(), stats, nothing


def _nested(form: Form, codes: torch.Tensor, random: torch.Generator):
    """scale = map[code] * absmax2[block] + offset; rows begin at any place of a block."""
    rows, slots = codes.shape
    latest = form.nested - math.gcd(slots, form.nested)
    blocks = math.ceil((latest + slots) / form.nested)
    all_blocks = torch.rand(math.ceil(rows * slots / form.nested) + blocks, generator=random) * 0.01
    shared = torch.rand(257, generator=random) * 2 - 1
    first = torch.arange(rows) * slots
    header = torch.zeros(rows, 4, dtype=torch.uint8)
    header[:, 3] = (first % form.nested).to(torch.uint8)
    begin = first // form.nested
    outer = all_blocks[begin[:, None] + torch.arange(blocks)]
    touched = (begin[:, None] + torch.arange(blocks)) * form.nested < first[:, None] + slots
    outer = outer * touched  # unused places are zero
    index = (first[:, None] + torch.arange(slots)) // form.nested
    scale = shared[1:][codes.long()] * all_blocks[index] + shared[0]
    stats = torch.cat([header, codes, _raw(outer)], 1)
    return scale, torch.zeros(rows, slots), stats, shared.view(torch.uint8)


def random_bytes(form: Form, rows: int, cols: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """(codes, stats, shared) with any codes, for times: nothing is packed or decoded."""
    random = torch.Generator().manual_seed(1)
    group = form.group or cols
    by_rows = form.group_map == ROW_RUNS
    shape = (rows, cols // group) if by_rows else (rows * cols // group, 1)
    stats, shared = _statistics(form, *shape, random)[2:]
    width = pack(torch.zeros(1, cols, dtype=torch.uint8), form.bits).shape[1]
    codes = torch.randint(0, 256, (rows, width), dtype=torch.uint8, device=device)
    return codes, stats.contiguous().to(device), shared.to(device)


def make(form: Form, rows: int, cols: int, seed: int = 1) -> Packed:
    """A random matrix of a form, on the CPU."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << form.bits, (rows, cols), generator=random).to(torch.uint8)
    if form.code_map == E4M3:
        codes &= 0xBF  # finite and small
    group = form.group or cols
    scale, offset, stats, shared = _statistics(form, rows, cols // group, random)
    if form.code_map == INTEGER:
        mapped = codes.float() - form.centre
    elif form.code_map == E4M3:
        mapped = codes.view(torch.float8_e4m3fn).float()
    else:
        mapped = torch.tensor(NF4_TABLE if form.code_map == NF4 else E2M1_TABLE)[codes.long()]
    s, o = (t.repeat_interleave(group, 1) for t in (scale, offset))

    def r(t: torch.Tensor) -> torch.Tensor:
        return t.to(TYPES[form.value]).float()

    values = {
        NONE: lambda: r(mapped * s),
        BIAS: lambda: r(r(mapped * s) + o),
        SHIFT: lambda: r(r(mapped * s) - o),
        ZERO_POINT: lambda: r(r(mapped - o) * s),
        OVER_127: lambda: r(r(mapped * s) * torch.tensor(1 / 127, dtype=torch.float32)),
    }[form.offset]()
    spec = form.spec(rows, cols)
    return Packed(form, spec, pack(codes, form.bits), stats.contiguous(), shared, values)
