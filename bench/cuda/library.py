"""libquantal_cuda.so through ctypes: the structures of src/kernels/cuda/launch.h."""

from __future__ import annotations

import ctypes
import pathlib
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import forms
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
VERSION = 3
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Status(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int32), ("text", ctypes.c_char * 768)]


class Stream(ctypes.Structure):
    _fields_ = [("device", ctypes.c_int32), ("handle", ctypes.c_void_p)]


class Matrix(ctypes.Structure):
    _fields_ = [
        ("spec", ctypes.POINTER(ctypes.c_int64)),
        ("codes", ctypes.c_void_p),
        ("codes_bytes", ctypes.c_int64),
        ("stats", ctypes.c_void_p),
        ("stats_bytes", ctypes.c_int64),
        ("shared", ctypes.c_void_p),
        ("shared_bytes", ctypes.c_int64),
    ]


class Panel(ctypes.Structure):
    _fields_ = [
        ("w", Matrix),
        ("row", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("col", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("out", ctypes.c_void_p),
        ("ld", ctypes.c_int64),
    ]


class Product(ctypes.Structure):
    _fields_ = [
        ("w", Matrix),
        ("dtype", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("bias_dtype", ctypes.c_int32),
        ("y", ctypes.c_void_p),
    ]


class Int8Product(ctypes.Structure):
    _fields_ = [
        ("product", Product),
        ("threshold", ctypes.c_float),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
    ]


class Norms(ctypes.Structure):
    _fields_ = [("w", Matrix), ("out", ctypes.c_void_p)]


class Quantizer(ctypes.Structure):
    _fields_ = [
        ("encoder", ctypes.c_int32),
        ("thresholds", ctypes.c_float * 16),
        ("codes", ctypes.c_uint8 * 16),
        ("values", ctypes.c_float * 16),
        ("least", ctypes.c_float),
        ("not_a_number", ctypes.c_float),
        ("tiny_range", ctypes.c_float),
        ("largest_scale", ctypes.c_float),
        ("round_zero", ctypes.c_int32),
        ("rounds", ctypes.c_int32),
        ("max_code", ctypes.c_float),
        ("power", ctypes.c_float),
        ("inverse_beta", ctypes.c_float * 32),
        ("no_shrink", ctypes.c_float * 32),
        ("nested_map", ctypes.c_float * 256),
    ]


class Quantization(ctypes.Structure):
    _fields_ = [
        ("w", Matrix),
        ("dtype", ctypes.c_int32),
        ("weight", ctypes.c_void_p),
        ("how", ctypes.POINTER(Quantizer)),
        ("refused", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
    ]


def _supports(args: Any) -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(args), ctypes.POINTER(Status))


def _launch(args: Any) -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(args), Stream, ctypes.POINTER(Status))


class Interface(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_int32),
        ("probe", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.POINTER(Status))),
        ("supports_dequantize", _supports(Panel)),
        ("dequantize", _launch(Panel)),
        ("supports_small_matmul", _supports(Product)),
        ("small_matmul", _launch(Product)),
        ("supports_tile_matmul", _supports(Product)),
        ("tile_matmul", _launch(Product)),
        ("supports_tile_matmul_transposed", _supports(Product)),
        ("tile_matmul_transposed", _launch(Product)),
        ("int8_workspace", ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)),
        ("supports_int8_matmul", _supports(Int8Product)),
        ("int8_matmul", _launch(Int8Product)),
        ("supports_row_square_sums", _supports(Norms)),
        ("row_square_sums", _launch(Norms)),
        ("quantize_workspace", ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))),
        ("supports_quantize", _supports(Quantization)),
        ("quantize", _launch(Quantization)),
    ]


class Weight:
    """A packed matrix on a device: keeps the tensors whose addresses the library is given."""

    def __init__(
        self, spec: Sequence[int], codes: torch.Tensor, stats: torch.Tensor, shared: torch.Tensor
    ) -> None:
        self.spec, self.codes, self.stats, self.shared = list(spec), codes, stats, shared
        self.ints = (ctypes.c_int64 * 16)(*self.spec)

    @property
    def rows(self) -> int:
        return self.spec[1]

    @property
    def cols(self) -> int:
        return self.spec[2]

    def bytes(self) -> int:
        return self.codes.numel() + self.stats.numel() + self.shared.numel()

    def view(self) -> Matrix:
        def part(t: torch.Tensor) -> tuple[int, int]:
            return t.data_ptr(), t.numel()

        return Matrix(self.ints, *part(self.codes), *part(self.stats), *part(self.shared))


class Library:
    """The launchers as functions of tensors. Each raises RuntimeError with the library's text."""

    def __init__(self, path: pathlib.Path) -> None:
        entry = ctypes.CDLL(str(path)).quantal_cuda
        entry.restype = ctypes.POINTER(Interface)
        found = entry(VERSION)
        if not found:
            raise RuntimeError(f"{path} has another interface, expected version {VERSION}")
        self._functions = found.contents

    def probe(self, device: int) -> None:
        status = Status()
        self._check(self._functions.probe(device, ctypes.byref(status)), status)

    @staticmethod
    def _check(code: int, status: Status) -> None:
        if code != 0:
            raise RuntimeError(f"code {code}: {status.text.decode()}")

    def _run(self, name: str, args: ctypes.Structure, like: torch.Tensor) -> None:
        stream = Stream(0, None)
        if like.is_cuda:
            handle = torch.cuda.current_stream(like.device).cuda_stream
            stream = Stream(like.device.index, handle)
        status = Status()
        code = getattr(self._functions, name)(ctypes.byref(args), stream, ctypes.byref(status))
        self._check(code, status)

    def dequantize(self, w: Weight, out: torch.Tensor) -> None:
        args = Panel(w.view(), 0, w.rows, 0, w.cols, DTYPES[out.dtype], out.data_ptr(), w.cols)
        self._run("dequantize", args, out)

    def matmul(
        self,
        name: str,
        w: Weight,
        x: torch.Tensor,
        y: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        """`name` is small_matmul, tile_matmul or tile_matmul_transposed."""
        self._run(name, self._product(w, x, y, bias), x)

    @staticmethod
    def _product(w: Weight, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return Product(
            w.view(),
            DTYPES[x.dtype],
            x.data_ptr(),
            x.shape[0],
            None if bias is None else bias.data_ptr(),
            0 if bias is None else DTYPES[bias.dtype],
            y.data_ptr(),
        )

    def int8_workspace(self, inputs: int, cols: int) -> int:
        return self._functions.int8_workspace(inputs, cols)

    def int8_matmul(
        self, w: Weight, x: torch.Tensor, y: torch.Tensor, threshold: float, workspace: torch.Tensor
    ) -> None:
        args = Int8Product(
            self._product(w, x, y, None), threshold, workspace.data_ptr(), workspace.numel()
        )
        self._run("int8_matmul", args, x)

    def quantize_workspace(self, w: Weight) -> int:
        return self._functions.quantize_workspace(w.ints)

    def quantize(
        self,
        w: Weight,
        weight: torch.Tensor,
        how: Quantizer,
        refused: torch.Tensor,
        workspace: torch.Tensor,
    ) -> None:
        """Fills the buffers of `w`; `refused` is int32 [1]."""
        args = Quantization(
            w.view(),
            DTYPES[weight.dtype],
            weight.data_ptr(),
            ctypes.pointer(how),
            refused.data_ptr(),
            workspace.data_ptr(),
            workspace.numel(),
        )
        self._run("quantize", args, weight)

    def row_square_sums(self, w: Weight, out: torch.Tensor) -> None:
        self._run("row_square_sums", Norms(w.view(), out.data_ptr()), out)


class Quantized:
    """Buffers that an encoder of `forms.ENCODED` fills from a weight on its device."""

    def __init__(self, library: Library, name: str, weight: torch.Tensor) -> None:
        encoder, form, settings = forms.ENCODED[name]
        rows, cols = weight.shape
        codes, stats, shared = forms.random_bytes(form, rows, cols, str(weight.device))
        self._library, self._weight = library, weight
        self.w = Weight(
            form.spec(rows, cols), *(torch.empty_like(t, device=weight.device).fill_(0xA5)
                                     for t in (codes, stats, shared))
        )  # fmt: skip
        middles = [(a + b) / 2 for a, b in zip(forms.NF4_TABLE, forms.NF4_TABLE[1:], strict=False)]
        members = {
            "encoder": encoder,
            "thresholds": (ctypes.c_float * 16)(*middles),
            "codes": (ctypes.c_uint8 * 16)(*range(16)),
            "nested_map": (ctypes.c_float * 256)(*((i - 127) / 128 for i in range(256))),
        }
        self._how = Quantizer(**(members | settings))
        self.refused = torch.full((1,), 7, dtype=torch.int32, device=weight.device)
        self._workspace = torch.empty(
            library.quantize_workspace(self.w), dtype=torch.uint8, device=weight.device
        )

    def run(self) -> None:
        self._library.quantize(self.w, self._weight, self._how, self.refused, self._workspace)

    def moved(self) -> int:
        """Bytes of the weight and the buffers."""
        return self._weight.numel() * self._weight.element_size() + self.w.bytes()


# ------------------------------------------------------------------ building

HOST_SOURCES = [
    *(f"src/core/{name}.cpp" for name in ("dtype", "error", "sizes")),
    *(f"src/kernels/{name}.cpp" for name in ("packed", "strips")),
    *(f"src/kernels/cuda/{name}.cpp" for name in ("geometry", "matrix", "refusals")),
]


def build(folder: pathlib.Path, architecture: str, jobs: int = 16) -> pathlib.Path:
    """Compiles the library for one architecture ("90a") with nvcc alone; returns its path."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [ROOT / name for name in HOST_SOURCES]
    sources += sorted((ROOT / "src/kernels/cuda").glob("*.cu"))
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++20", "-O3", "-fmad=false", code, f"-I{ROOT}/src", f"-I{ROOT}/include"]
    flags += ["-Xcompiler=-ffp-contract=off,-fPIC,-fvisibility=hidden"]

    def compile_one(source: pathlib.Path) -> pathlib.Path:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        subprocess.run([nvcc, *flags, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(jobs) as pool:
        objects = [str(path) for path in pool.map(compile_one, sources)]
    library = folder / "libquantal_cuda.so"
    subprocess.run([nvcc, "-shared", "-cudart", "static", *objects, "-o", str(library)], check=True)
    return library


def build_emulated(folder: pathlib.Path, jobs: int = 16) -> pathlib.Path:
    """The same library for the CPU, with the kernels run by tests/kernels/cuda_machine.cpp: what
    quantized bytes are compared with. Needs a C++20 compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [ROOT / name for name in HOST_SOURCES]
    sources += [s for s in (ROOT / "src/kernels/cuda").glob("*.cu") if s.stem != "start"]
    sources.append(ROOT / "tests/kernels/cuda_machine.cpp")
    flags = ["-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
    flags += [f"-I{ROOT / name}" for name in ("src", "include", "tests")]

    def compile_one(source: pathlib.Path) -> pathlib.Path:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        subprocess.run(
            ["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True
        )
        return target

    with ThreadPoolExecutor(jobs) as pool:
        objects = [str(path) for path in pool.map(compile_one, sources)]
    library = folder / "libquantal_cuda_emulated.so"
    subprocess.run(["g++", "-shared", *objects, "-o", str(library)], check=True)
    return library
