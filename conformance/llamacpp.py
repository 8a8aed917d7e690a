"""llama.cpp through llama-cpp-python, where this run has it.

`scripts/conformance.sh` builds llama-cpp-python once (about six minutes on two cores) and keeps the
wheel; with QUANTAL_SKIP_LLAMA_CPP=1 it does not, and the tests that need it are skipped with that
reason. Anywhere else a missing package is a failure.
"""

import ctypes
import os
from pathlib import Path

import pytest

VERSION = "0.3.36"
SKIP = os.environ.get("QUANTAL_SKIP_LLAMA_CPP") == "1"
needs_llama_cpp = pytest.mark.skipif(
    SKIP, reason="QUANTAL_SKIP_LLAMA_CPP=1: llama-cpp-python was not built for this run"
)


def quantize_file(source: Path, target: Path, name: str, mixture: str = "") -> None:
    """What llama.cpp's own quantizer makes of a GGUF file: Q4_K_M, IQ4_NL, F16 ...; "pure": every
    layer in one type where its rows allow it."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{'ALL' if name == 'F32' else 'MOSTLY'}_{name}")
    params.allow_requantize = True
    params.pure = mixture == "pure"
    params.nthread = 2
    files = str(source).encode(), str(target).encode()
    assert llama_cpp.llama_model_quantize(*files, ctypes.byref(params)) == 0
