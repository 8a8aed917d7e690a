"""Live comparison with the real upstream packages. Run by `make conformance`.

Everything is imported here, at the top: a package that is missing is a failure of the whole suite,
never a skip.
"""

import importlib.metadata

import bitsandbytes  # noqa: F401
import gguf  # noqa: F401
import hqq  # noqa: F401
import pytest
import torch

import quantal  # noqa: F401

PINNED = {
    "bitsandbytes": "0.50.2",
    "hqq": "0.2.8.post1",
    "optimum-quanto": "0.2.7",
    "gguf": "0.19.0",
    "mlx": "0.32.4",
    "mlx-lm": "0.29.1",
}


def pytest_sessionstart(session):
    for package, version in PINNED.items():
        installed = importlib.metadata.version(package)
        if installed != version:
            raise pytest.UsageError(
                f"{package} {installed} is installed, the specifications name {version}"
            )


@pytest.fixture(autouse=True)
def _single_thread():
    """Upstream's sums depend on the number of threads; ours must not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
