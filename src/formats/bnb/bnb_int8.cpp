#include "formats/bnb/bnb_int8.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "formats/bnb/bnb_params.h"
#include "formats/tensors.h"
#include "kernels/row_int8.h"

namespace quantal::bnb {
namespace {

constexpr std::string_view kWhere = "bnb";

PackedSpec int8_spec(std::int64_t rows, std::int64_t cols, const Flags& flags) {
  PackedSpec spec;
  spec.rows = rows;
  spec.cols = cols;
  spec.bits = 8;
  spec.code_map = CodeMap::kInteger;
  spec.centre = kInt8Centre;
  spec.offset = Offset::kOver127;
  spec.scale = ScaleSource::kF32;
  spec.value_dtype = DType::kF32;
  spec.group_size = std::max<std::int64_t>(cols, 1);
  spec.dialect = kDialectId;
  spec.dialect_flags = flags.to_int();
  validate_spec(spec);
  return spec;
}

float round_to_f16(float x) {
  std::uint16_t half = 0;
  float wide = 0;
  narrow_from_f32(DType::kF16, &x, 1, &half);
  widen_to_f32(DType::kF16, &half, 1, &wide);
  return wide;
}

/// Names the first weight that binary16 cannot hold; returns if there is none.
void refuse_beyond_f16(WeightRun w, const PackedSpec& spec) {
  for (std::int64_t i = 0; i < spec.rows * spec.cols; ++i) {
    float value = 0;
    widen_to_f32(w.dtype, w.at(i).data, 1, &value);
    if (std::isfinite(round_to_f16(value))) continue;
    fail(Errc::kUnsupported, std::string(kWhere) + ": weight at row " +
                                 std::to_string(i / spec.cols) + ", column " +
                                 std::to_string(i % spec.cols) + " is " + std::to_string(value) +
                                 ", expected at most 65504 (LLM.int8 rounds weights to float16)");
  }
}

/// Formats of versions before 0.46 that reorder the bytes for one kind of tensor core.
constexpr std::array<std::string_view, 4> kFormats = {"row", "col32", "col_turing", "col_ampere"};

/// Checks `weight_format`, a number or (in old torch files) a text. Absent means row.
void require_row_format(const std::string& name, const TensorView& tensor) {
  constexpr std::array<DType, 4> kKinds = {DType::kU8, DType::kI8, DType::kI32, DType::kI64};
  require_dtype(tensor, name, kWhere, kKinds);
  std::string format = text_of(tensor);
  if (tensor.numel() == 1) {
    std::int64_t number = 0;  // little endian; the sign of an invalid number does not matter
    std::memcpy(&number, tensor.bytes.data(), tensor.bytes.size());
    const bool known = number >= 0 && number < static_cast<std::int64_t>(kFormats.size());
    format = known ? kFormats[static_cast<std::size_t>(number)] : std::to_string(number);
  }
  if (format == kFormats[0]) return;
  const bool historic = std::find(kFormats.begin(), kFormats.end(), format) != kFormats.end();
  const std::string note =
      historic ? " (a historic order of bytes; save the model again with bitsandbytes < 0.46)" : "";
  fail(historic ? Errc::kUnsupported : Errc::kCorrupt,
       std::string(kWhere) + ": weight_format is " + (historic ? format : "unknown") +
           ", expected row" + note,
       {.path = {}, .tensor = name});
}

}  // namespace

PackedSpec make_int8_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options) {
  if (options.bits != 8) {
    fail(Errc::kConfig, "bnb: bits is " + std::to_string(options.bits) + ", expected 8");
  }
  return int8_spec(rows, cols, {});
}

void quantize_int8(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
                   std::uint8_t* stats, const Executor& executor) {
  const PackedLayout layout = layout_of(spec);
  const QuantizeKernels& kernels = quantize_kernels();
  const EncodeRowInt8 encode = row_int8_encoder();
  const WeightRun run{dtype, weights};
  std::vector<float> scb(static_cast<std::size_t>(spec.rows));
  std::atomic<bool> finite{true};
  executor.parallel_for(
      0, spec.rows, rows_per_task(spec.cols), [&](std::int64_t begin, std::int64_t end) {
        std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
        for (std::int64_t r = begin; r < end; ++r) {
          const WeightRun w = run.at(r * spec.cols);
          // Rounding is monotone: the largest rounded weight is the rounded largest weight.
          const float top = round_to_f16(kernels.absmax(w, spec.cols));
          if (!(top < std::numeric_limits<float>::infinity())) {
            finite.store(false, std::memory_order_relaxed);
            return;
          }
          scb[static_cast<std::size_t>(r)] = top;
          const float factor = top == 0 ? 0.0F : (1.0F / top) * 127.0F;
          encode(w, spec.cols, factor, row.data());
          pack_row(spec.bits, row.data(), spec.cols, codes + r * layout.code_bytes);
        }
      });
  if (!finite) {
    refuse_not_finite(kWhere, run, spec.rows, spec.cols);
    refuse_beyond_f16(run, spec);
  }
  FlatStats flat;
  flat.scales = reinterpret_cast<const std::uint8_t*>(scb.data());
  spread_stats(spec, flat, 0, stats, executor);
}

std::vector<NamedTensor> export_int8(const PackedView& w, const std::string& prefix) {
  const PackedSpec& spec = w.spec;
  const PackedLayout layout = layout_of(spec);
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(spec.rows * spec.cols));
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    unpack_row(spec.bits, w.codes.data() + r * layout.code_bytes, spec.cols,
               bytes.data() + r * spec.cols);
  }
  for (std::uint8_t& b : bytes) b ^= kInt8Centre;  // q + 128 and q differ in the top bit
  std::vector<NamedTensor> out;
  out.push_back({prefix + "weight", Tensor{DType::kI8, {spec.rows, spec.cols}, std::move(bytes)}});
  out.push_back(
      {prefix + "SCB", Tensor{DType::kF32, {spec.rows}, std::move(gather_stats(w).scales)}});
  if (!Flags::from_int(spec.dialect_flags).no_format) {
    out.push_back({prefix + "weight_format", Tensor{DType::kU8, {}, {0}}});
  }
  return out;
}

StoredLayer open_int8(const std::string& prefix, const TensorLookup& lookup, float threshold) {
  const std::string weight_name = prefix + "weight", format_name = prefix + "weight_format";
  const TensorView& weight = require_tensor(lookup, weight_name, kWhere);
  constexpr std::array<DType, 1> kCodes = {DType::kI8};
  require_dtype(weight, weight_name, kWhere, kCodes);
  if (weight.shape.size() != 2) {
    fail(Errc::kShape,
         std::string(kWhere) + ": tensor " + weight_name + " has shape " +
             shape_string(weight.shape) + ", expected 2 dimensions",
         {.path = {}, .tensor = weight_name});
  }
  const TensorView* format = lookup(format_name);
  if (format != nullptr) require_row_format(format_name, *format);
  const TensorView& scb = require_tensor(lookup, prefix + "SCB", kWhere);
  constexpr std::array<DType, 1> kFloat = {DType::kF32};
  require_dtype(scb, prefix + "SCB", kWhere, kFloat);
  require_numel(scb, prefix + "SCB", kWhere, weight.shape[0]);

  Flags flags;
  flags.no_format = format == nullptr;
  flags.threshold = threshold;
  StoredLayer layer;
  layer.spec = int8_spec(weight.shape[0], weight.shape[1], flags);
  layer.read_codes = [spec = layer.spec, bytes = weight.bytes](RowRange rows, std::uint8_t* out) {
    pack_rows(spec, rows, out, [&](std::int64_t r, std::uint8_t* codes) {
      const std::uint8_t* in = bytes.data() + r * spec.cols;
      for (std::int64_t c = 0; c < spec.cols; ++c) {
        codes[c] = static_cast<std::uint8_t>(in[c] ^ kInt8Centre);
      }
    });
  };
  layer.read_stats = [spec = layer.spec, scales = scb.bytes](RowRange rows, std::uint8_t* out) {
    spread_rows(spec, {.scales = scales.data()}, rows, out);
  };
  return layer;
}

}  // namespace quantal::bnb
