"""The packages that bench/forward_speed.py runs quantal beside: products with one quantized matrix.

Every rival is called as its own users reach it at its best: bitsandbytes on its packed inference
path, ggml in the interleaved layout that llama.cpp chooses (CPU_REPACK) on a graph of one product,
activations in the type that it takes. Conversions of weights are not timed. A package that is not
installed is left out.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Product = Callable[[torch.Tensor], Any]


def torch_bf16(weight: torch.Tensor) -> Product:
    return lambda x: nn.functional.linear(x, weight)


def bitsandbytes_nf4(weight: torch.Tensor) -> Product:
    """The packed path that Linear4bit takes without gradients; double quantization."""
    import bitsandbytes as bnb
    import bitsandbytes.functional as functional

    codes, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    codes, state = functional._convert_weight_packed_for_cpu(codes, copy.deepcopy(state))
    return lambda x: bnb.matmul_4bit(x, codes, quant_state=state)


def bitsandbytes_training(weight: torch.Tensor) -> Product:
    """The path of Linear4bit under autograd: dequantize, then a dense product."""
    import bitsandbytes as bnb
    import bitsandbytes.functional as functional

    codes, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return lambda x: bnb.matmul_4bit(x, codes.t(), quant_state=state)


def aten_int4(weight: torch.Tensor) -> Product:
    """torch's own kernel, which torchao and Quanto call: asymmetric int4 in groups of 128."""
    rows, cols = weight.shape
    groups = weight.float().reshape(rows, cols // 128, 128)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6)
    codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).reshape(rows, cols)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    zero = low + 8 * scale
    pairs = torch.cat([scale, zero], 2).transpose(0, 1).contiguous().to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, pairs)


class Ggml:
    """Products of ggml's own library, the one inside llama-cpp-python."""

    TYPES = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
    #: Types that ggml can interleave on x86; the product of others reads their own layout.
    INTERLEAVED = ("Q4_0", "Q4_K")
    _F32 = 0

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ImportError("llama-cpp-python")
        folder = pathlib.Path(spec.origin).parent / "lib"
        self._base = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))), mode=ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(next(folder.glob("libggml-cpu.*"))), mode=ctypes.RTLD_GLOBAL)
        self.backend = self.call("backend_cpu_init", ctypes.c_void_p)
        threads = ctypes.c_int(torch.get_num_threads())
        self.call("backend_cpu_set_n_threads", None, self.backend, threads)
        self.plain = self.call("backend_get_default_buffer_type", ctypes.c_void_p, self.backend)
        self.interleaved = self._repack_buffers()

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        symbol = "ggml_" + name
        library = self._base if hasattr(self._base, symbol) else self._cpu
        function = getattr(library, symbol)
        function.restype = result
        return function(*[ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments])

    def _repack_buffers(self) -> int:
        registry = self.call("backend_cpu_reg", ctypes.c_void_p)
        address = self.call(
            "backend_reg_get_proc_address",
            ctypes.c_void_p,
            registry,
            ctypes.c_char_p(b"ggml_backend_dev_get_extra_bufts"),
        )
        device = self.call("backend_reg_dev_get", ctypes.c_void_p, registry, ctypes.c_size_t(0))
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        for kind in kinds:
            if not kind:
                break
            if b"REPACK" in self.call("backend_buft_name", ctypes.c_char_p, kind):
                return kind
        return self.plain

    def context(self) -> int:
        class Params(ctypes.Structure):
            _fields_ = [
                ("size", ctypes.c_size_t),
                ("buffer", ctypes.c_void_p),
                ("no", ctypes.c_bool),
            ]

        size = self.call("tensor_overhead", ctypes.c_size_t) * 8
        size += self.call("graph_overhead", ctypes.c_size_t)
        return self.call("init", ctypes.c_void_p, Params(size, None, True))

    def matrix(self, context: int, kind: int, rows: int, cols: int) -> int:
        i64 = ctypes.c_int64
        return self.call(
            "new_tensor_2d", ctypes.c_void_p, context, ctypes.c_int(kind), i64(cols), i64(rows)
        )


class GgmlProduct:
    """One quantized matrix; x is float32, as ggml takes it, and becomes 8-bit inside."""

    def __init__(self, ggml: Ggml, name: str, weight: torch.Tensor) -> None:
        self.ggml, kind = ggml, Ggml.TYPES[name]
        self.rows, self.cols = weight.shape
        wide = weight.float().contiguous()
        i64, size = ctypes.c_int64, ctypes.c_size_t
        row_size = ggml.call("row_size", size, ctypes.c_int(kind), i64(self.cols))
        packed = torch.empty(self.rows * row_size, dtype=torch.uint8)
        ggml.call(
            "quantize_chunk",
            size,
            ctypes.c_int(kind),
            wide.data_ptr(),
            packed.data_ptr(),
            i64(0),
            i64(self.rows),
            i64(self.cols),
            ctypes.c_void_p(None),
        )
        context = ggml.context()
        self.weight = ggml.matrix(context, kind, self.rows, self.cols)
        buffers = ggml.interleaved if name in Ggml.INTERLEAVED else ggml.plain
        ggml.call("backend_alloc_ctx_tensors_from_buft", ctypes.c_void_p, context, buffers)
        self._set(self.weight, packed)
        self.nbytes = packed.numel()
        self.graphs: dict[int, tuple] = {}

    def _set(self, tensor: int, data: torch.Tensor) -> None:
        size = ctypes.c_size_t
        count = data.numel() * data.element_size()
        self.ggml.call("backend_tensor_set", None, tensor, data.data_ptr(), size(0), size(count))

    def _graph(self, m: int) -> tuple:
        if m not in self.graphs:
            g = self.ggml
            context = g.context()
            x = g.matrix(context, Ggml._F32, m, self.cols)
            graph = g.call("new_graph", ctypes.c_void_p, context)
            y = g.call("mul_mat", ctypes.c_void_p, context, self.weight, x)
            g.call("build_forward_expand", None, graph, y)
            g.call("backend_alloc_ctx_tensors", ctypes.c_void_p, context, g.backend)
            self.graphs[m] = x, y, graph, torch.empty(m, self.rows)
        return self.graphs[m]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tensor, result, graph, out = self._graph(x.shape[0])
        self._set(tensor, x)
        self.ggml.call("backend_graph_compute", ctypes.c_int, self.ggml.backend, graph)
        size = ctypes.c_size_t
        self.ggml.call(
            "backend_tensor_get", None, result, out.data_ptr(), size(0), size(out.numel() * 4)
        )
        return out


def forward_rivals() -> dict[str, tuple[Callable[[torch.Tensor], Product], torch.dtype]]:
    """Name: (function of a bf16 weight, dtype of x)."""
    found: dict[str, tuple[Callable[[torch.Tensor], Product], torch.dtype]] = {
        "torch bf16": (torch_bf16, torch.bfloat16),
        "torch int4": (aten_int4, torch.bfloat16),
    }
    if importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes NF4"] = bitsandbytes_nf4, torch.bfloat16
    try:
        ggml = Ggml()
    except ImportError:
        return found
    for name in Ggml.TYPES:
        make = lambda weight, name=name: GgmlProduct(ggml, name, weight)  # noqa: E731
        found[f"ggml {name}"] = make, torch.float32
    return found
