"""The names of the documented module `quantization_wrapper`, from where they live in quantal."""

from .adapters import (
    BitsAndBytesAdapter,
    FallbackAdapter,
    HQQAdapter,
    MLXAdapter,
    QuantizationAdapter,
    QuantoAdapter,
    create_quantization_adapter,
)
from .backend import Backend
from .config import (
    QuantizationConfig,
    QuantizationMethod,
    get_recommended_config,
    validate_quantization_config,
)
from .layers import (
    BNBLinear4bit,
    BNBLinear8bit,
    HQQLinearWrapper,
    MLXLinearWrapper,
    MLXModelWrapper,
)
from .linear import QuantizedLinear
from .replace import replace_linear_with_quantized

__all__ = [
    "BNBLinear4bit",
    "BNBLinear8bit",
    "Backend",
    "BitsAndBytesAdapter",
    "FallbackAdapter",
    "HQQAdapter",
    "HQQLinearWrapper",
    "MLXAdapter",
    "MLXLinearWrapper",
    "MLXModelWrapper",
    "QuantizationAdapter",
    "QuantizationConfig",
    "QuantizationMethod",
    "QuantizedLinear",
    "QuantoAdapter",
    "create_quantization_adapter",
    "get_recommended_config",
    "replace_linear_with_quantized",
    "validate_quantization_config",
]
