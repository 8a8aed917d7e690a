// quantal formats: the dialects. One descriptor per dialect; everything that differs between
// dialects is reached through it, and nothing outside src/formats switches on a dialect.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "quantal/core.h"
#include "quantal/kernels.h"

namespace quantal {

/// The quantization methods of the public API. The string values are method_name().
enum class QuantizationMethod {
  BNB_NF4,
  BNB_INT8,
  HQQ,
  MLX_INT4,
  MLX_INT8,
  QUANTO_INT2,
  QUANTO_INT4,
  QUANTO_INT8,
  NONE,
};
inline constexpr std::size_t kNumMethods = 9;
std::string_view method_name(QuantizationMethod method) noexcept;       ///< "bnb_nf4" ...
std::string_view method_enum_name(QuantizationMethod method) noexcept;  ///< "BNB_NF4" ...
/// Accepts either spelling, any case; throws Error{kConfig} listing the legal ones.
QuantizationMethod parse_method(std::string_view name);

/// The devices of the public API.
enum class Backend { CUDA, MPS, MLX, CPU };
inline constexpr std::size_t kNumBackends = 4;
std::string_view backend_name(Backend backend) noexcept;  ///< "cuda" ...
Backend parse_backend(std::string_view name);             ///< any case; throws Error{kConfig}

/// Facts about a method that hold whether or not its dialect is part of this build.
struct MethodInfo {
  QuantizationMethod method;
  std::string_view name;       ///< "bnb_nf4"
  std::string_view enum_name;  ///< "BNB_NF4"
  std::string_view dialect;    ///< name of its dialect, "bnb"; empty for NONE
  int bits;                    ///< width that the name implies; 0 where it is free
  unsigned backends;           ///< documented backends, bit set of 1 << Backend
};
/// All methods, in the order of the enumeration:
///
/// | method | bits | documented backends |
/// |---|---|---|
/// | BNB_NF4, BNB_INT8 | 4, 8 | CUDA |
/// | HQQ | free | CUDA, MPS, MLX, CPU |
/// | MLX_INT4, MLX_INT8 | 4, 8 | MPS, MLX |
/// | QUANTO_INT2, _INT4, _INT8 | 2, 4, 8 | CUDA, MPS, CPU |
/// | NONE | free | CUDA, MPS, MLX, CPU |
std::span<const MethodInfo> methods() noexcept;
/// Backends of the documented compatibility matrix, as a bit set of 1 << Backend.
unsigned documented_backends(QuantizationMethod method) noexcept;
/// Width that a method's name implies; nullopt where it is free (HQQ, NONE).
std::optional<int> method_bits(QuantizationMethod method) noexcept;

/// How far a quantizer looks beyond the codes it writes; decides what a rank must read when it
/// quantizes only its rows.
enum class Reach { kRow, kNeighbourRows, kRowBlock, kTensor };
std::string_view reach_name(Reach reach) noexcept;

/// What a caller may ask of a quantizer; each dialect reads what concerns it and refuses what it
/// cannot do. Unset optionals mean the dialect's own default.
struct QuantizeOptions {
  QuantizationMethod method = QuantizationMethod::BNB_NF4;
  int bits = 4;
  std::int64_t group_size = 64;     ///< codes per scale; 0 = one group per row (HQQ None)
  DType value_dtype = DType::kF32;  ///< dtype that the layer dequantizes to
  bool double_quant = true;         ///< bnb: nested absmax
  std::string quant_type = "nf4";   ///< bnb: "nf4" or "fp4"
  int axis = 1;                     ///< hqq
  bool optimize = true;             ///< hqq: half-quadratic solver
  std::optional<bool> round_zero;   ///< hqq: default true only for 4 bits
};

/// Looks a tensor up by full name; nullptr if absent. The view stays valid during the call.
using TensorLookup = std::function<const TensorView*(const std::string&)>;

/// A tensor with a name, as it goes to a file.
struct NamedTensor {
  std::string name;
  Tensor tensor;
};

/// One dialect. All functions are pure and thread-safe.
struct Dialect {
  int id;                  ///< stored in PackedSpec::dialect; never reused
  std::string_view name;   ///< "bnb", "hqq"
  std::string_view title;  ///< for people: "bitsandbytes"
  std::span<const QuantizationMethod> methods;
  std::span<const int> bits;  ///< legal widths
  std::span<const std::int64_t>
      group_sizes;  ///< legal ones; empty = any multiple of group_multiple
  std::int64_t group_multiple;
  Reach (*reach)(const QuantizeOptions& options);

  /// The packed form that `quantize` will fill. Throws Error{kConfig} / Error{kShape} naming the
  /// option, its value and the legal ones.
  PackedSpec (*make_spec)(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options);

  /// Quantizes a row-major [rows, cols] matrix of kF32, kF16 or kBF16 into buffers of
  /// layout_of(spec), bit for bit as upstream's CPU path. Throws Error{kUnsupported} naming the
  /// first NaN or infinite weight (row, column); nothing is promised about the buffers then.
  void (*quantize)(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
                   std::uint8_t* stats, std::uint8_t* shared, const Executor& executor);

  /// Upstream's tensors for one layer, names beginning with `prefix`
  /// ("model.layers.0.mlp.up_proj.").
  std::vector<NamedTensor> (*export_layer)(const PackedView& w, const std::string& prefix);

  /// True if `names` (all tensor names with this prefix removed, e.g. "weight", "weight.absmax")
  /// are those of a layer of this dialect.
  bool (*recognizes)(const std::function<bool(const std::string& suffix)>& has);

  /// Inverse of export_layer on tensor bytes. Throws Error{kCorrupt} / Error{kShape} naming the
  /// tensor, actual and expected.
  PackedMatrix (*import_layer)(const std::string& prefix, const TensorLookup& lookup);

  /// `quantization_config` of a Hugging Face config.json, as JSON text, for a folder holding
  /// layers quantized with `options` and with `skip_modules` left dense.
  std::string (*hf_quantization_config)(const QuantizeOptions& options,
                                        std::span<const std::string> skip_modules);
  /// True if this `quantization_config` (JSON text) belongs to this dialect; fills options.
  bool (*parse_hf_quantization_config)(const std::string& json, QuantizeOptions& options);
};

/// All dialects, in order of id.
std::span<const Dialect* const> dialects();
/// Dialect that quantizes with `method`. Throws Error{kUnsupported} naming the methods of this
/// build for NONE and for methods without a quantizer in it (BNB_INT8, MLX_*, QUANTO_*).
const Dialect& dialect_of(QuantizationMethod method);
const Dialect& dialect_by_id(int id);  ///< throws Error{kCorrupt}
const Dialect* find_dialect(QuantizationMethod method) noexcept;

/// Convenience: make_spec + quantize of `dialect_of(options.method)`.
PackedMatrix quantize(const TensorView& weights, const QuantizeOptions& options,
                      const Executor& executor = serial_executor());

// ------------------------------------------------------------------ GGUF blocks

/// Element types of GGUF tensors (numbers of the file format).
enum class GgmlType : std::uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kI8 = 24,
  kI16 = 25,
  kI32 = 26,
  kI64 = 27,
  kF64 = 28,
  kBF16 = 30,
};

/// Size of a block in elements and bytes.
struct GgmlBlock {
  GgmlType type;
  std::string_view name;      ///< "Q4_1"
  std::int64_t elements = 1;  ///< per block
  std::int64_t bytes = 1;     ///< per block
  bool decodable = false;     ///< decode_ggml handles it
};
/// nullptr for a number that is not in the table.
const GgmlBlock* find_ggml_block(std::uint32_t type) noexcept;

/// Decodes `n` elements (a multiple of the block size) to float32, every product and sum rounded
/// separately as ggml's reference does. `data` holds n / elements * bytes bytes.
void decode_ggml(GgmlType type, const std::uint8_t* data, std::int64_t n, float* out);

}  // namespace quantal
