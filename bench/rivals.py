"""The packages that bench/quantize_speed.py runs quantal beside: one Case per form.

Every rival is called as its own users reach it, on the input type it takes: mlx gets its own bf16
array, ggml the float32 matrix that its quantizers read; conversions are not timed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import pathlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from quantal import testing


@dataclass
class Case:
    """One form, quantal's way and the rival's. `dequantize` takes what `quantize` returned."""

    name: str
    rival: str
    options: dict[str, Any]  #: of quantal.testing.options; "method" included
    quantize: Callable[[], Any]
    dequantize: Callable[[Any], Any]
    to_torch: Callable[[Any], torch.Tensor]  #: what `dequantize` returned
    goal: float | None = None  #: rival time / ours that this project wants of quantize
    dequantize_goal: float | None = None
    out_dtype: torch.dtype = torch.bfloat16  #: of the decoded matrix, both sides
    _dialect: str | None = field(default=None, init=False)

    def quantize_ours(self, weight: torch.Tensor) -> testing.Packed:
        settings = dict(self.options)
        method = settings.pop("method")
        dialect = method if method in ("mlx", "gguf") else None
        return testing.quantize_packed(weight, testing.options(method, **settings), dialect)

    def dequantize_ours(self, packed: testing.Packed) -> torch.Tensor:
        return testing.dequantize_packed(packed, self.out_dtype)


# ---------------------------------------------------------------------- bitsandbytes


def bitsandbytes_cases(weight: torch.Tensor) -> Iterator[Case]:
    import bitsandbytes.functional as bnb

    def four_bit(quant_type: str, double: bool) -> Case:
        return Case(
            quant_type.upper() + (" + double quantization" if double else ""),
            "bitsandbytes 0.50.2",
            {
                "method": "bnb_nf4",
                "quant_type": quant_type,
                "group_size": 64,
                "double_quant": double,
            },
            lambda: bnb.quantize_4bit(
                weight, blocksize=64, compress_statistics=double, quant_type=quant_type
            ),
            lambda packed: bnb.dequantize_4bit(*packed),
            lambda values: values,
            goal=20,
            dequantize_goal=2,
        )

    yield four_bit("nf4", False)
    yield four_bit("nf4", True)
    yield four_bit("fp4", False)

    # As Int8Params does: weights become float16 first; codes and row maxima are what layers keep.
    def int8_values(packed: tuple) -> torch.Tensor:
        return bnb.int8_vectorwise_dequant(packed[0], packed[1]).to(weight.dtype)

    yield Case(
        "LLM.int8",
        "bitsandbytes 0.50.2",
        {"method": "bnb_int8", "bits": 8},
        lambda: bnb.int8_vectorwise_quant(weight.to(torch.float16)),
        int8_values,
        lambda values: values,
        goal=10,
        dequantize_goal=2,
    )


# ---------------------------------------------------------------------- HQQ


def hqq_cases(weight: torch.Tensor) -> Iterator[Case]:
    from hqq.core.quantize import Quantizer

    def case(bits: int, group_size: int) -> Case:
        def run() -> tuple:
            codes, meta = Quantizer.quantize(
                weight,
                nbits=bits,
                group_size=group_size,
                optimize=True,
                round_zero=bits == 4,
                axis=1,
                device="cpu",
                compute_dtype=torch.float32,
            )
            meta["compute_dtype"] = torch.float32
            return Quantizer.cpu(codes, meta)

        return Case(
            f"HQQ {bits}-bit g{group_size}, solver",
            "hqq 0.2.8.post1",
            {
                "method": "hqq",
                "bits": bits,
                "group_size": group_size,
                "value_dtype": torch.float32,
            },
            run,
            lambda packed: Quantizer.dequantize(*packed),
            lambda values: values,
            goal=5,
            out_dtype=torch.float32,
        )

    yield case(8, 128)
    for bits in (4, 3, 2, 1):
        yield case(bits, 64)


# ---------------------------------------------------------------------- Quanto


def quanto_cases(weight: torch.Tensor) -> Iterator[Case]:
    from optimum.quanto import (
        AbsmaxOptimizer,
        MaxOptimizer,
        qint2,
        qint4,
        qint8,
        quantize_weight,
    )

    def case(qtype: Any, group_size: int | None) -> Case:
        def run() -> Any:
            if group_size is None:
                scale, shift = AbsmaxOptimizer()(weight, qtype, 0), None
            else:
                scale, shift = MaxOptimizer()(weight, qtype, 0, group_size)
            return quantize_weight(weight, qtype, 0, scale, shift, group_size, optimized=False)

        options: dict[str, Any] = {"method": f"quanto_{qtype.name[1:]}", "bits": qtype.bits}
        if group_size is not None:
            options["group_size"] = group_size
        return Case(
            f"Quanto {qtype.name}" + (f" g{group_size}" if group_size else ", per row"),
            "optimum-quanto 0.2.7",
            options,
            run,
            lambda packed: packed.dequantize(),
            lambda values: values,
            goal=10,
        )

    yield case(qint2, 128)
    yield case(qint4, 128)
    yield case(qint8, None)


# ---------------------------------------------------------------------- MLX


def mlx_cases(weight: torch.Tensor) -> Iterator[Case]:
    import mlx.core as mx

    array = mx.array(weight.view(torch.int16).numpy()).view(mx.bfloat16)
    mx.eval(array)

    def case(name: str, **settings: Any) -> Case:
        def run() -> Any:
            parts = mx.quantize(array, **settings)
            mx.eval(*parts)
            return parts

        def back(parts: Any) -> Any:
            values = mx.dequantize(*parts, dtype=mx.bfloat16, **settings)
            mx.eval(values)
            return values

        def to_torch(values: Any) -> torch.Tensor:
            import numpy

            return torch.from_numpy(numpy.array(values.view(mx.int16))).view(torch.bfloat16)

        return Case(
            name,
            "mlx 0.32.4 (CPU)",
            {"method": "mlx", **settings},
            run,
            back,
            to_torch,
            goal=3,
        )

    for bits in (2, 3, 4, 5, 6, 8):
        yield case(f"MLX affine {bits}-bit g64", group_size=64, bits=bits, mode="affine")
    yield case("MLX mxfp4", group_size=32, bits=4, mode="mxfp4")
    yield case("MLX nvfp4", group_size=16, bits=4, mode="nvfp4")
    yield case("MLX mxfp8", group_size=32, bits=8, mode="mxfp8")


# ---------------------------------------------------------------------- ggml


class Ggml:
    """ggml's own quantizers, from the shared library inside llama-cpp-python."""

    #: name: (number of the type, goal)
    TYPES = {
        "Q4_0": (2, 1.0),
        "Q4_1": (3, 1.0),
        "Q5_0": (6, 1.0),
        "Q5_1": (7, 1.0),
        "Q8_0": (8, 1.0),
        "Q4_K": (12, 1.0),
        "Q5_K": (13, 1.0),
        "Q6_K": (14, 1.0),
    }

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise SystemExit("llama-cpp-python is missing: run `make conformance` once")
        libraries = pathlib.Path(spec.origin).parent / "lib"
        self.library = ctypes.CDLL(str(next(libraries.glob("libggml-base.*"))))
        i64, size, pointer = ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p
        self.chunk = self.library.ggml_quantize_chunk
        self.chunk.restype = size
        self.chunk.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
        self.row_size = self.library.ggml_row_size
        self.row_size.restype = size
        self.row_size.argtypes = [ctypes.c_int, i64]
        self.threads = ThreadPoolExecutor(torch.get_num_threads())

    def _split(self, rows: int, body: Callable[[int, int], None]) -> None:
        count = torch.get_num_threads()
        cuts = [rows * i // count for i in range(count + 1)]
        list(self.threads.map(body, cuts[:-1], cuts[1:]))

    def quantize(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Packed rows of a contiguous float32 matrix, on as many threads as quantal uses."""
        number = self.TYPES[name][0]
        rows, cols = weight.shape
        out = torch.empty(rows, self.row_size(number, cols), dtype=torch.uint8)

        def body(begin: int, end: int) -> None:
            self.chunk(
                number, weight.data_ptr(), out.data_ptr(), begin * cols, end - begin, cols, None
            )

        self._split(rows, body)
        return out

    def dequantize(self, name: str, packed: torch.Tensor, cols: int) -> torch.Tensor:
        decode = getattr(self.library, f"dequantize_row_{name[0].lower()}{name[1:]}")
        decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        decode.restype = None
        rows, row_bytes = packed.shape
        out = torch.empty(rows, cols)

        def body(begin: int, end: int) -> None:
            decode(
                packed.data_ptr() + begin * row_bytes,
                out.data_ptr() + begin * cols * 4,
                (end - begin) * cols,
            )

        self._split(rows, body)
        return out


def ggml_cases(weight: torch.Tensor) -> Iterator[Case]:
    ggml = Ggml()
    wide = weight.float()
    cols = weight.shape[1]
    for name, (_, goal) in Ggml.TYPES.items():
        yield Case(
            f"GGUF {name}",
            "ggml of llama-cpp-python",
            {"method": "gguf", "mode": name, "bits": 0, "group_size": 0},
            lambda name=name: ggml.quantize(name, wide),
            lambda packed, name=name: ggml.dequantize(name, packed, cols),
            lambda values: values,
            goal=goal,
            out_dtype=torch.float32,
        )


CASES: dict[str, Callable[[torch.Tensor], Iterator[Case]]] = {
    "bnb": bitsandbytes_cases,
    "hqq": hqq_cases,
    "quanto": quanto_cases,
    "mlx": mlx_cases,
    "gguf": ggml_cases,
}
