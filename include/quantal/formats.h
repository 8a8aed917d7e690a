// quantal formats: the dialects. One descriptor per dialect; everything that differs between
// dialects is reached through it, and nothing outside src/formats switches on a dialect.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "quantal/core.h"
#include "quantal/kernels.h"
#include "quantal/stored_layer.h"

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
inline constexpr std::size_t kNumMethods = 9;                           ///< enumerators
std::string_view method_name(QuantizationMethod method) noexcept;       ///< "bnb_nf4" ...
std::string_view method_enum_name(QuantizationMethod method) noexcept;  ///< "BNB_NF4" ...
/// Accepts either spelling, any case; throws Error{kConfig} listing the legal ones.
QuantizationMethod parse_method(std::string_view name);

/// The devices of the public API.
enum class Backend { CUDA, MPS, MLX, CPU };
inline constexpr std::size_t kNumBackends = 4;            ///< enumerators
std::string_view backend_name(Backend backend) noexcept;  ///< "cuda" ...
Backend parse_backend(std::string_view name);             ///< any case; throws Error{kConfig}

/// Facts about a method that hold whether or not its dialect is part of this build.
struct MethodInfo {
  QuantizationMethod method;   ///< the enumerator
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
std::string_view reach_name(Reach reach) noexcept;  ///< "row", "neighbour rows" ...

/// What a caller may ask of a quantizer; each dialect reads what concerns it and refuses what it
/// cannot do. Unset optionals mean the dialect's own default.
struct QuantizeOptions {
  QuantizationMethod method = QuantizationMethod::BNB_NF4;  ///< decides the dialect
  int bits = 4;                                             ///< width of a code
  std::int64_t group_size = 64;     ///< codes per scale; 0 = one group per row (HQQ None)
  DType value_dtype = DType::kF32;  ///< dtype that the layer dequantizes to
  bool double_quant = true;         ///< bnb: nested absmax
  std::string quant_type = "nf4";   ///< bnb: "nf4" or "fp4"
  int axis = 1;                     ///< hqq
  bool optimize = true;             ///< hqq: half-quadratic solver
  std::optional<bool> round_zero;   ///< hqq: default true only for 4 bits
  std::optional<bool> quant_zero;   ///< hqq: 8-bit zeros as old files have; default: no
  std::optional<bool> quant_scale;  ///< hqq: 8-bit scales as old files have; default: no
  std::string mode;  ///< mlx: "affine" (default), "mxfp4", "nvfp4", "mxfp8"; quanto: "max"
                     ///< (default) or "hqq" optimizer, "zeropoint"; gguf: block type such as "Q4_K"
};

/// What a tensor stands for where a file can hold Python objects (torch zips). Containers of plain
/// tensors hold the encoding: bool u8 scalar, int i32 scalar, float f32 scalar, text and dtype u8
/// characters ("torch.float16"), size i64 [n]; none is left out. kPlainOnly is the opposite of
/// none: a tensor that files of Python objects leave out (HQQ's encoded_state_dict).
enum class StateKind : std::uint8_t {
  kTensor,
  kBool,
  kInt,
  kFloat,
  kText,
  kDtype,
  kSize,
  kNone,
  kPlainOnly
};

/// A tensor with a name, as it goes to a file.
struct NamedTensor {
  std::string name;                     ///< full name in the file
  Tensor tensor;                        ///< its value
  StateKind kind = StateKind::kTensor;  ///< what torch keeps beside it
};

/// Small texts beside the weights by file name: "config.json", "quanto_qmap.json",
/// "hqq_config.json" ...; "embedded" is the settings object inside a single file.
using SideTexts = std::map<std::string, std::string>;

/// Container of a file of tensors.
enum class Container : std::uint8_t { kSafetensors, kTorch, kNpz, kGguf };

/// How tensors are grouped inside a torch file.
enum class StateTree : std::uint8_t {
  kFlat,      ///< {"a.b.weight": tensor}
  kByModule,  ///< {"a.b": {"weight": tensor, "nbits": 4}}
  kMetaDict,  ///< {"a.b.W_q": tensor, "a.b.meta": {"nbits": 4, ...}, "a.b.bias": tensor}
};

/// One of the ways in which users of a dialect keep models on disk. Writers choose it by name;
/// readers detect it from content.
struct FileLayout {
  std::string_view name;   ///< "transformers", "hqq", "guide", "mlx-lm", "npz", "single" ...
  std::string_view title;  ///< for people and --help
  Container container = Container::kSafetensors;  ///< kind of file
  std::string_view weights;  ///< file name in a folder: "model.safetensors"; empty: single file
  StateTree tree = StateTree::kFlat;  ///< how names become a tree
  bool always_index = false;  ///< safetensors: an index also where there is one file (mlx-lm)
  /// The reader asks for the output layer's tensor also where it is the embedding's (hqq): torch
  /// files name the same bytes twice.
  bool names_tied_head = false;
};

/// Files that a layout has beside the weights.
struct SideFiles {
  SideTexts texts;           ///< whole files, except config.json
  std::string config_patch;  ///< JSON merge patch (RFC 7396) for the model's config.json, or ""
  std::string embedded;      ///< single torch file: {"state_dict": ..., "<key>": this}
  std::string embedded_key;  ///< "quanto_config"; empty: no wrapper
  std::map<std::string, std::string> metadata;  ///< of safetensors
};

/// A quantized layer as side_files sees it.
struct LayerEntry {
  std::string name;  ///< module path
  PackedSpec spec;   ///< form of its weight
  /// False where the sizes in config.json do not tell the shape of the weight. A dialect whose
  /// tensors do not tell it either has to write it down.
  bool shape_known = true;
};

/// Where a quantizer needs a fact about all rows of a matrix: takes one value for each row at hand
/// and returns one for each row of the whole matrix, in order. Called from one thread.
using RowGather = std::function<std::vector<double>(std::vector<double> own)>;

/// One dialect. All functions are pure and thread-safe.
struct Dialect {
  int id;                  ///< stored in PackedSpec::dialect; never reused
  std::string_view name;   ///< "bnb", "hqq"
  std::string_view title;  ///< for people: "bitsandbytes"
  /// Forms of layers, for people: those that are read, and those that weights are quantized to. A
  /// layer that was read is written unchanged in any case.
  std::string_view reads;
  std::string_view writes;                      ///< see reads
  std::span<const QuantizationMethod> methods;  ///< that it quantizes with
  std::span<const int> bits;                    ///< legal widths
  std::span<const std::int64_t>
      group_sizes;              ///< legal ones; empty = any multiple of group_multiple
  std::int64_t group_multiple;  ///< see group_sizes
  /// True: values have the dtype of the weight that was quantized (QuantizeOptions::value_dtype is
  /// set to it); false: that of the computation.
  bool keeps_weight_dtype = true;
  /// True: upstream keeps embeddings as quantized layers too; false: they are always dense.
  bool quantizes_embeddings = false;
  Reach (*reach)(const QuantizeOptions& options);  ///< what one row's bytes depend on

  /// The packed form that `quantize` will fill. Throws Error{kConfig} / Error{kShape} naming the
  /// option, its value and the legal ones.
  PackedSpec (*make_spec)(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options);

  /// Quantizes a row-major [rows, cols] matrix of kF32, kF16 or kBF16 into buffers of
  /// layout_of(spec), bit for bit as upstream's CPU path. Writes every byte of codes and stats,
  /// padding too; `shared` holds zeros before. Throws Error{kUnsupported} naming the
  /// first NaN or infinite weight (row, column); nothing is promised about the buffers then.
  void (*quantize)(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
                   std::uint8_t* stats, std::uint8_t* shared, const Executor& executor);
  /// The same for rows that are a part of a larger matrix, where its bytes depend on other rows
  /// through sums or maxima by row; null where they do not. See shards.h.
  void (*quantize_part)(const PackedSpec& spec, DType dtype, const void* weights,
                        std::uint8_t* codes, std::uint8_t* stats, std::uint8_t* shared,
                        const RowGather& gather, const Executor& executor) = nullptr;

  /// Upstream's tensors for one layer, names beginning with `prefix`
  /// ("model.layers.0.mlp.up_proj.").
  std::vector<NamedTensor> (*export_layer)(const PackedView& w, const std::string& prefix);

  /// True if `names` (all tensor names with this prefix removed, e.g. "weight", "weight.absmax")
  /// are those of a layer of this dialect.
  bool (*recognizes)(const std::function<bool(const std::string& suffix)>& has);

  /// Inverse of export_layer on tensor bytes, up to where codes and statistics are read:
  /// stored_layer.h says what that takes. Looks up every tensor that belongs to a layer of this
  /// dialect. Throws Error{kCorrupt} / Error{kShape} naming the tensor, actual and expected.
  StoredLayer (*open_layer)(const std::string& prefix, const TensorLookup& lookup,
                            const LayerFacts& facts);
  /// open_layer, and all of it read.
  PackedMatrix import_layer(const std::string& prefix, const TensorLookup& lookup,
                            const LayerFacts& facts) const;

  /// Layouts that can be written, the default first.
  std::span<const FileLayout> layouts{};
  /// Files and settings beside the weights. `dense` are linear modules left unquantized.
  SideFiles (*side_files)(const FileLayout& layout, std::span<const LayerEntry> layers,
                          std::span<const std::string> dense) = nullptr;
  /// Settings by module path, "" for all others, as open_layer takes them; empty if the texts are
  /// not this dialect's. Throws Error{kCorrupt} naming file and key.
  std::map<std::string, std::string> (*read_settings)(const SideTexts& texts) = nullptr;
};

/// All dialects, in order of id.
std::span<const Dialect* const> dialects();
/// Dialect that quantizes with `method`. Throws Error{kUnsupported} naming the methods of this
/// build for NONE and for methods that it does not have.
const Dialect& dialect_of(QuantizationMethod method);
const Dialect& dialect_by_id(int id);                   ///< throws Error{kCorrupt}
const Dialect& dialect_by_name(std::string_view name);  ///< throws Error{kConfig} listing them
const Dialect* find_dialect(QuantizationMethod method) noexcept;  ///< null instead of an error

/// Convenience: make_spec + quantize of `dialect_of(options.method)`.
PackedMatrix quantize(const TensorView& weights, const QuantizeOptions& options,
                      const Executor& executor = serial_executor());
/// The same for a dialect without a method of its own (gguf).
PackedMatrix quantize(const TensorView& weights, const Dialect& dialect,
                      const QuantizeOptions& options, const Executor& executor = serial_executor());

}  // namespace quantal
