"""quantal: one interface over every weight-quantization dialect."""

import torch as _torch  # noqa: F401  (its libraries must be loaded before the operators)

from . import _model_attention, _peft, functional
from ._convert import ConvertReport, convert
from ._core import compatibility_matrix_markdown
from ._core import version as __version__
from ._errors import (
    ConfigError,
    CorruptError,
    DeviceError,
    DtypeError,
    InternalError,
    IoError,
    NotFoundError,
    QuantalError,
    ShapeError,
    UnsupportedError,
)
from ._model_attention import register_attention
from ._plan import Plan, plan
from .adapter_folder import (
    compare_adapter_base,
    load_adapter,
    read_adapter_base,
    save_adapter,
)
from .adapters import (
    BitsAndBytesAdapter,
    FallbackAdapter,
    HQQAdapter,
    MLXAdapter,
    QuantizationAdapter,
    QuantoAdapter,
    available_methods,
    create_quantization_adapter,
    register_adapter,
    registered_adapters,
)
from .backend import (
    Backend,
    BackendCapabilities,
    BackendManager,
    detect_backend,
    get_backend_manager,
    get_device,
)
from .base_identity import BaseIdentity, BaseMatch, base_identity
from .checkpoint import (
    LoadReport,
    file_layouts,
    inspect,
    load_model,
    model_digest,
    save_model,
)
from .chunked_loss import chunked_cross_entropy, chunked_loss, token_losses
from .config import (
    QuantizationConfig,
    QuantizationMethod,
    get_recommended_config,
    validate_quantization_config,
)
from .embedding import QuantizedEmbedding
from .gguf import load_gguf
from .imports import report_import_status
from .linear import PackedLinear, QuantizedLinear
from .loftq import LoftqLayer, initialize_loftq
from .merge import (
    LayerMerge,
    MergeReport,
    dequantize_model,
    merge_report,
    merge_to_full_precision,
)
from .replace import replace_linear_with_quantized
from .report import Report
from .training import prepare_model_for_training
from .training_checkpoint import Restored, TrainingCheckpoints

from . import fsdp  # isort: skip  (stands on all of the above)

#: The base class of every exception of this package.
Error = QuantalError

_model_attention.register_lazily()
_peft.install_lazily()

__all__ = [
    "Backend",
    "BackendCapabilities",
    "BackendManager",
    "BaseIdentity",
    "BaseMatch",
    "BitsAndBytesAdapter",
    "ConfigError",
    "ConvertReport",
    "CorruptError",
    "DeviceError",
    "DtypeError",
    "Error",
    "FallbackAdapter",
    "HQQAdapter",
    "InternalError",
    "IoError",
    "LayerMerge",
    "LoadReport",
    "LoftqLayer",
    "MLXAdapter",
    "MergeReport",
    "NotFoundError",
    "PackedLinear",
    "Plan",
    "QuantalError",
    "QuantizationAdapter",
    "QuantizationConfig",
    "QuantizationMethod",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantoAdapter",
    "Report",
    "Restored",
    "ShapeError",
    "TrainingCheckpoints",
    "UnsupportedError",
    "__version__",
    "available_methods",
    "base_identity",
    "chunked_cross_entropy",
    "chunked_loss",
    "compare_adapter_base",
    "compatibility_matrix_markdown",
    "convert",
    "create_quantization_adapter",
    "dequantize_model",
    "detect_backend",
    "file_layouts",
    "fsdp",
    "functional",
    "get_backend_manager",
    "get_device",
    "get_recommended_config",
    "initialize_loftq",
    "inspect",
    "load_adapter",
    "load_gguf",
    "load_model",
    "merge_report",
    "merge_to_full_precision",
    "model_digest",
    "plan",
    "prepare_model_for_training",
    "read_adapter_base",
    "register_adapter",
    "register_attention",
    "registered_adapters",
    "replace_linear_with_quantized",
    "report_import_status",
    "save_adapter",
    "save_model",
    "token_losses",
    "validate_quantization_config",
]
