// Names that a torch pickle may refer to.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "quantal/core.h"

namespace quantal::io {

enum class TorchSymbol : std::uint8_t {
  kOrderedDict,
  kSet,
  kSize,
  kDevice,
  kRebuildTensorV2,
  kRebuildTensorV3,
  kRebuildParameter,
  kUntypedStorage,
  kStorage,  ///< of the row's dtype
  kDtype,    ///< the row's dtype
};

struct TorchGlobal {
  std::string_view module;
  std::string_view name;
  TorchSymbol symbol;
  DType dtype = DType::kU8;
};

inline constexpr std::array kTorchGlobals = {
    TorchGlobal{"collections", "OrderedDict", TorchSymbol::kOrderedDict},
    TorchGlobal{"__builtin__", "set", TorchSymbol::kSet},
    TorchGlobal{"torch", "Size", TorchSymbol::kSize},
    TorchGlobal{"torch", "device", TorchSymbol::kDevice},
    TorchGlobal{"torch._utils", "_rebuild_tensor_v2", TorchSymbol::kRebuildTensorV2},
    TorchGlobal{"torch._utils", "_rebuild_tensor_v3", TorchSymbol::kRebuildTensorV3},
    TorchGlobal{"torch._utils", "_rebuild_parameter", TorchSymbol::kRebuildParameter},
    TorchGlobal{"torch.storage", "UntypedStorage", TorchSymbol::kUntypedStorage},
    TorchGlobal{"torch", "FloatStorage", TorchSymbol::kStorage, DType::kF32},
    TorchGlobal{"torch", "DoubleStorage", TorchSymbol::kStorage, DType::kF64},
    TorchGlobal{"torch", "HalfStorage", TorchSymbol::kStorage, DType::kF16},
    TorchGlobal{"torch", "BFloat16Storage", TorchSymbol::kStorage, DType::kBF16},
    TorchGlobal{"torch", "ByteStorage", TorchSymbol::kStorage, DType::kU8},
    TorchGlobal{"torch", "CharStorage", TorchSymbol::kStorage, DType::kI8},
    TorchGlobal{"torch", "ShortStorage", TorchSymbol::kStorage, DType::kI16},
    TorchGlobal{"torch", "IntStorage", TorchSymbol::kStorage, DType::kI32},
    TorchGlobal{"torch", "LongStorage", TorchSymbol::kStorage, DType::kI64},
    TorchGlobal{"torch", "BoolStorage", TorchSymbol::kStorage, DType::kBool},
    TorchGlobal{"torch", "float32", TorchSymbol::kDtype, DType::kF32},
    TorchGlobal{"torch", "float64", TorchSymbol::kDtype, DType::kF64},
    TorchGlobal{"torch", "float16", TorchSymbol::kDtype, DType::kF16},
    TorchGlobal{"torch", "bfloat16", TorchSymbol::kDtype, DType::kBF16},
    TorchGlobal{"torch", "uint8", TorchSymbol::kDtype, DType::kU8},
    TorchGlobal{"torch", "int8", TorchSymbol::kDtype, DType::kI8},
    TorchGlobal{"torch", "uint16", TorchSymbol::kDtype, DType::kU16},
    TorchGlobal{"torch", "int16", TorchSymbol::kDtype, DType::kI16},
    TorchGlobal{"torch", "uint32", TorchSymbol::kDtype, DType::kU32},
    TorchGlobal{"torch", "int32", TorchSymbol::kDtype, DType::kI32},
    TorchGlobal{"torch", "uint64", TorchSymbol::kDtype, DType::kU64},
    TorchGlobal{"torch", "int64", TorchSymbol::kDtype, DType::kI64},
    TorchGlobal{"torch", "bool", TorchSymbol::kDtype, DType::kBool},
    TorchGlobal{"torch", "float8_e4m3fn", TorchSymbol::kDtype, DType::kF8E4M3},
    TorchGlobal{"torch", "float8_e5m2", TorchSymbol::kDtype, DType::kF8E5M2},
    TorchGlobal{"torch", "float8_e8m0fnu", TorchSymbol::kDtype, DType::kF8E8M0},
};

}  // namespace quantal::io
