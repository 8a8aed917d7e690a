"""The names of the documented module `quantization_wrapper`; all of them live in `quantal`."""

from quantal import (
    Backend,
    BitsAndBytesAdapter,
    FallbackAdapter,
    HQQAdapter,
    MLXAdapter,
    QuantizationAdapter,
    QuantizationConfig,
    QuantizationMethod,
    QuantizedLinear,
    QuantoAdapter,
    create_quantization_adapter,
    get_recommended_config,
    replace_linear_with_quantized,
    validate_quantization_config,
)

__all__ = [
    "Backend",
    "BitsAndBytesAdapter",
    "FallbackAdapter",
    "HQQAdapter",
    "MLXAdapter",
    "QuantizationAdapter",
    "QuantoAdapter",
    "QuantizationConfig",
    "QuantizationMethod",
    "QuantizedLinear",
    "create_quantization_adapter",
    "get_recommended_config",
    "replace_linear_with_quantized",
    "validate_quantization_config",
]
