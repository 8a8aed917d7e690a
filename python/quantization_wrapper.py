"""The documented module `quantization_wrapper`: the names of `quantal.quantization_wrapper`."""

from quantal.quantization_wrapper import *  # noqa: F403
from quantal.quantization_wrapper import __all__ as __all__
