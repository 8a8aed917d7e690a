"""Rivals on a GPU: which are installed, and their products as calls. Every one is optional, is
called as its own users call it, and whatever it raises becomes a note in the table."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timing import Call, reason
from torch import nn

PACKAGES = ("bitsandbytes", "hqq", "hqq_aten", "gemlite", "torchao", "marlin", "peft")
#: What a package must have to be the one that is meant: names are taken twice in the index.
MARKS = {"marlin": "mul"}


def version(package: str) -> str:
    """Its version, "not installed", or why it cannot be imported."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        module = importlib.import_module(package)
    except Exception as error:  # a rival's own
        return "does not import: " + reason(error)
    mark = MARKS.get(package)
    if mark is not None and not hasattr(module, mark):
        return f"not installed (another package of this name is, without {mark})"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "of unknown version"))


def usable(found: dict[str, str], package: str) -> bool:
    return not found[package].startswith(("not installed", "does not import"))


def versions() -> dict[str, str]:
    """Of all packages that are looked for."""
    return {package: version(package) for package in PACKAGES}


@dataclass
class Work:
    """One product: weights [rows, cols] of random values, activations x [m, cols]."""

    form: str
    rows: int
    cols: int
    x: torch.Tensor
    copies: int

    def dense(self) -> torch.Tensor:
        shape = (self.rows, self.cols)
        return torch.randn(shape, device=self.x.device, dtype=self.x.dtype) * 0.02


@dataclass
class Peer:
    """A path of a rival for some forms. `make` gives a call for each copy of the weights."""

    name: str
    needs: tuple[str, ...]
    forms: tuple[str, ...]
    make: Callable[[Work], list[Call]]
    most: int = 1 << 30  #: rows of x up to which it is of interest


# ------------------------------------------------------------------ bitsandbytes


def _nf4(work: Work) -> Iterator[tuple[torch.Tensor, Any]]:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        work.dense(), blocksize=64, compress_statistics="nested" in work.form, quant_type="nf4"
    )
    for _ in range(work.copies):
        yield packed.clone(), state


def bitsandbytes_product(work: Work) -> list[Call]:
    """What Linear4bit calls: its own kernel or dequantize + cuBLAS, as it chooses."""
    import bitsandbytes

    return [
        lambda w=w, s=s: bitsandbytes.matmul_4bit(work.x, w.t(), quant_state=s)
        for w, s in _nf4(work)
    ]


def bitsandbytes_gemv(work: Work) -> list[Call]:
    import bitsandbytes.functional as bnb

    return [lambda w=w, s=s: bnb.gemv_4bit(work.x, w.t(), state=s) for w, s in _nf4(work)]


def bitsandbytes_decoded(work: Work) -> list[Call]:
    import bitsandbytes.functional as bnb

    def product(w: torch.Tensor, s: Any) -> torch.Tensor:
        return nn.functional.linear(work.x, bnb.dequantize_4bit(w, s))

    return [lambda w=w, s=s: product(w, s) for w, s in _nf4(work)]


def bitsandbytes_int8(work: Work) -> list[Call]:
    import bitsandbytes as bnb

    calls: list[Call] = []
    for _ in range(work.copies):
        layer = bnb.nn.Linear8bitLt(
            work.cols, work.rows, bias=False, has_fp16_weights=False, threshold=6.0
        )
        layer.weight = bnb.nn.Int8Params(
            work.dense().half().cpu(), requires_grad=False, has_fp16_weights=False
        )
        layer = layer.to(work.x.device).eval()
        calls.append(lambda layer=layer: layer(work.x))
    return calls


# ------------------------------------------------------------------ hqq


def _hqq_layer(work: Work, axis: int) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = nn.Linear(1, 1, bias=False)
    linear.in_features, linear.out_features = work.cols, work.rows
    linear.weight = nn.Parameter(work.dense(), requires_grad=False)
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=axis)
    config["weight_quant_params"]["optimize"] = False  # times do not depend on the codes
    return HQQLinear(
        linear, quant_config=config, compute_dtype=work.x.dtype, device=str(work.x.device)
    )


def _hqq(work: Work, backend: str, axis: int) -> list[Call]:
    from hqq.core.quantize import HQQBackend

    layers = [_hqq_layer(work, axis) for _ in range(work.copies)]
    # set_backend changes all layers of the process: the method that it would choose is called.
    method = getattr(HQQBackend, backend).value
    return [lambda layer=layer: getattr(layer, method)(work.x) for layer in layers]


def hqq_torch(work: Work) -> list[Call]:
    return _hqq(work, "PYTORCH", axis=1)


def hqq_aten(work: Work) -> list[Call]:
    """Its CUDA extension, which takes axis 0 only."""
    return _hqq(work, "ATEN", axis=0)


def gemlite(work: Work) -> list[Call]:
    from gemlite import helper

    made = getattr(helper, "A16W4_HQQ_INT", None) or helper.A16Wn
    layers = [
        made(device=str(work.x.device), dtype=work.x.dtype).from_hqqlinear(_hqq_layer(work, 1))
        for _ in range(work.copies)
    ]
    return [lambda layer=layer: layer(work.x) for layer in layers]


# ------------------------------------------------------------------ torch, torchao, Marlin


def torch_int4(work: Work) -> list[Call]:
    """tinygemm, which torchao calls too."""
    on = work.x.device
    if on.type == "cpu":
        codes = torch.randint(0, 16, (work.rows, work.cols), dtype=torch.int32)
        convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        packed, inner = codes, 1
    else:
        packed = torch.randint(0, 256, (work.rows, work.cols // 2), dtype=torch.uint8, device=on)
        convert, product = (
            torch.ops.aten._convert_weight_to_int4pack,
            torch.ops.aten._weight_int4pack_mm,
        )
        inner = 8
    scales = torch.randn(work.cols // 64, work.rows, 2, device=on, dtype=torch.bfloat16)
    weights = [convert(packed, inner) for _ in range(work.copies)]
    return [lambda w=w: product(work.x, w, 64, scales) for w in weights]


def torch_int8(work: Work) -> list[Call]:
    on = work.x.device
    codes = torch.randint(-128, 128, (work.rows, work.cols), dtype=torch.int8, device=on)
    scales = torch.randn(work.rows, device=on, dtype=torch.bfloat16)
    product = torch.ops.aten._weight_int8pack_mm
    return [
        lambda w=w: product(work.x, w, scales) for w in (codes.clone() for _ in range(work.copies))
    ]


def torchao_int4(work: Work) -> list[Call]:
    """Int4WeightOnlyConfig in tinygemm's layout."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    config = Int4WeightOnlyConfig(
        group_size=64, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    calls: list[Call] = []
    for _ in range(work.copies):
        layer = nn.Linear(
            work.cols, work.rows, bias=False, device=work.x.device, dtype=work.x.dtype
        )
        layer.requires_grad_(False)
        quantize_(layer, config)
        calls.append(lambda layer=layer: layer(work.x))
    return calls


def marlin(work: Work) -> list[Call]:
    """Marlin's own package (fp16, groups of 128), with random codes."""
    import marlin as package

    on = work.x.device
    x = work.x.half()
    y = torch.empty(x.shape[0], work.rows, dtype=torch.float16, device=on)
    scales = torch.rand(work.cols // 128, work.rows, dtype=torch.float16, device=on)
    locks = torch.zeros(work.rows // 128 * 16, dtype=torch.int32, device=on)
    shape = (work.cols // 16, work.rows * 16 // 8)
    weights = [
        torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=on)
        for _ in range(work.copies)
    ]
    return [lambda w=w: package.mul(x, w, y, scales, locks) for w in weights]


NF4, HQQ, INT8 = ("NF4", "NF4 nested"), ("HQQ 4 bits",), ("8 bits",)
PEERS = (
    Peer("bitsandbytes", ("bitsandbytes",), NF4, bitsandbytes_product),
    Peer("bitsandbytes: gemv_4bit", ("bitsandbytes",), ("NF4",), bitsandbytes_gemv, most=1),
    Peer("bitsandbytes: dequantize + cuBLAS", ("bitsandbytes",), NF4, bitsandbytes_decoded),
    Peer("bitsandbytes: LLM.int8", ("bitsandbytes",), ("LLM.int8",), bitsandbytes_int8),
    Peer("torch int4 (tinygemm)", (), HQQ, torch_int4, most=512),
    Peer("torch int8", (), INT8, torch_int8, most=64),
    Peer("torchao int4", ("torchao",), HQQ, torchao_int4, most=64),
    Peer("hqq: torch", ("hqq",), HQQ, hqq_torch, most=64),
    Peer("hqq: ATen (axis 0)", ("hqq", "hqq_aten"), HQQ, hqq_aten),
    Peer("hqq: gemlite", ("hqq", "gemlite"), HQQ, gemlite, most=512),
    Peer("Marlin (fp16, group 128)", ("marlin",), HQQ, marlin, most=512),
)


def of_form(form: str, m: int, found: dict[str, str]) -> Iterator[tuple[Peer, str]]:
    """The rivals of a form at so many rows, each with "" or why it cannot be called."""
    for peer in PEERS:
        if form not in peer.forms or m > peer.most:
            continue
        missing = [package for package in peer.needs if not usable(found, package)]
        yield peer, "; ".join(f"{package} {found[package]}" for package in missing)
