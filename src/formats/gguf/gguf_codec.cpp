#include "formats/gguf/gguf_codec.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <string_view>

#include "formats/gguf/gguf_encode.h"
#include "formats/gguf/gguf_params.h"
#include "formats/tensors.h"

namespace quantal::gguf {
namespace {

std::string encodable_names() {
  std::string names;
  for (const BlockForm& form : kForms) {
    if (!ggml_encodable(form.type)) continue;
    names += (names.empty() ? "" : ", ") + std::string(ggml_block(form.type).name);
  }
  return names;
}

/// The block type that the options name: `mode`, or the simplest type of `bits`. A mode that ends
/// in
/// '+' takes the type that llama.cpp's quantizer would for rows that are no whole blocks.
GgmlType type_of(const QuantizeOptions& options, std::int64_t cols) {
  if (!options.mode.empty()) {
    std::string_view name = options.mode;
    const bool or_similar = name.ends_with('+');
    if (or_similar) name.remove_suffix(1);
    const GgmlBlock* block = find_ggml_block(name);
    if (block != nullptr && find_form(block->type) != nullptr && ggml_encodable(block->type)) {
      return or_similar ? ggml_type_for(block->type, cols) : block->type;
    }
    fail(Errc::kConfig, "gguf: mode is \"" + options.mode + "\", expected one of " +
                            encodable_names() + ", each also with '+' behind it");
  }
  switch (options.bits) {
    case 0:
    case 4:
      return GgmlType::kQ4_0;
    case 5:
      return GgmlType::kQ5_0;
    case 6:
      return GgmlType::kQ6_K;
    case 8:
      return GgmlType::kQ8_0;
    default:
      fail(Errc::kConfig, "gguf: bits is " + std::to_string(options.bits) +
                              ", expected one of 4, 5, 6, 8, or a mode (" + encodable_names() +
                              ")");
  }
}

}  // namespace

PackedSpec make_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options) {
  const GgmlType type = type_of(options, cols);
  const std::int64_t elements = ggml_block(type).elements;
  if (elements > 32 && cols % 32 == 0 && cols % elements != 0) {
    const std::string name(ggml_block(type).name);
    fail(Errc::kShape, "gguf: shape is " + shape_string(std::array{rows, cols}) +
                           ", expected rows of a multiple of 256 weights (" + name + "); mode \"" +
                           name + "+\" stores such rows as " +
                           std::string(ggml_block(ggml_type_for(type, cols)).name));
  }
  return ggml_spec(type, rows, cols);
}

void quantize(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
              std::uint8_t* stats, std::uint8_t* /*shared*/, const Executor& executor) {
  const GgmlType type = ggml_type_of(spec);
  if (!is_weight_dtype(dtype)) {
    fail(Errc::kDtype, "gguf: weights have dtype " + std::string(dtype_name(dtype)) +
                           ", expected one of f32, f16, bf16");
  }
  // A few rows at a time, so that the blocks never leave the cache of the thread that makes them.
  const PackedLayout layout = layout_of(spec);
  const std::int64_t few = rows_per_task(spec.cols);
  RowEncoder encoder(type, {dtype, weights}, spec.rows, spec.cols);
  executor.parallel_for(0, spec.rows, few, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t most = std::min(few, end - begin);
    std::vector<std::uint8_t> blocks(static_cast<std::size_t>(ggml_bytes(type, most, spec.cols)));
    std::vector<std::uint8_t> scratch(static_cast<std::size_t>(spec.cols));
    PackedSpec part = spec;
    for (std::int64_t r = begin; r < end; r += part.rows) {
      part.rows = std::min(few, end - r);
      if (!encoder.encode(r, r + part.rows, blocks.data())) return;
      pack_blocks(type, part, blocks.data(), codes + r * layout.code_bytes,
                  stats + r * layout.stat_bytes, scratch.data());
    }
  });
  encoder.check();
}

std::vector<NamedTensor> export_layer(const PackedView& w, const std::string& prefix) {
  const std::vector<std::uint8_t> blocks = unpack_ggml(w, serial_executor());
  const std::int64_t row_bytes = ggml_bytes(ggml_type_of(w.spec), 1, w.spec.cols);
  return {{prefix + "weight", tensor_of(DType::kU8, {w.spec.rows, row_bytes}, blocks)}};
}

bool recognizes(const std::function<bool(const std::string& suffix)>& /*has*/) { return false; }

StoredLayer open_layer(const std::string& prefix, const TensorLookup& /*lookup*/,
                       const LayerFacts& /*facts*/) {
  fail(Errc::kUnsupported,
       "gguf: tensor " + prefix +
           "weight carries no block type outside a GGUF file, expected a .gguf file (pack_ggml)",
       {.path = {}, .tensor = prefix + "weight"});
}

}  // namespace quantal::gguf
