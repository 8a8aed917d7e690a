#include "formats/bnb/bnb_codec.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>

#include "formats/bnb/bnb_int8.h"
#include "formats/bnb/bnb_params.h"
#include "formats/tensors.h"

namespace quantal::bnb {
namespace {

TableQuantizer make_table(const std::array<float, 16>& book, std::array<std::uint8_t, 16> order) {
  TableQuantizer table;
  table.codes = order;
  for (std::size_t i = 0; i + 1 < 16; ++i) {
    table.thresholds[i] = (book[order[i]] + book[order[i + 1]]) / 2.0F;
  }
  return table;
}

/// `count` points from 0.1 to 1: the first half counted from the start, the second from the end,
/// one rounding per point.
std::vector<float> tenth_to_one(int count) {
  const float step = (1.0F - 0.1F) / static_cast<float>(count - 1);
  std::vector<float> out(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) {
    const double from_start = static_cast<double>(0.1F) + static_cast<double>(step) * i;
    const double from_end = 1.0 - static_cast<double>(step) * (count - 1 - i);
    out[static_cast<std::size_t>(i)] = static_cast<float>(i < count / 2 ? from_start : from_end);
  }
  return out;
}

std::array<float, 256> make_dynamic_map() {
  constexpr std::array<float, 7> kTens = {1e-6F, 1e-5F, 1e-4F, 1e-3F, 1e-2F, 1e-1F, 1.0F};
  std::array<float, 256> map{};  // holds the 0 already
  std::size_t n = 1;
  for (int i = 0; i < 7; ++i) {
    const std::vector<float> points = tenth_to_one((1 << i) + 1);
    for (std::size_t k = 0; k + 1 < points.size(); ++k) {
      const float value = kTens[static_cast<std::size_t>(i)] * ((points[k] + points[k + 1]) / 2.0F);
      map[n++] = value;
      map[n++] = -value;
    }
  }
  map[n] = 1.0F;
  std::sort(map.begin(), map.end());
  return map;
}

/// Code of each of 65536 equally spaced points of [-1, 1].
const std::vector<std::uint8_t>& dynamic_codes() {
  static const std::vector<std::uint8_t> codes = [] {
    const std::array<float, 256>& map = dynamic_map();
    std::vector<std::uint8_t> table(65536);
    std::size_t code = 0;
    for (std::size_t j = 0; j < table.size(); ++j) {
      const float point = -1.0F + (2.0F * static_cast<float>(j)) / 65535.0F;
      while (code < 255 && 0.5F * (map[code] + map[code + 1]) < point) ++code;
      table[j] = static_cast<std::uint8_t>(code);
    }
    return table;
  }();
  return codes;
}

/// A block of the second level; returns its absmax.
float encode_dynamic(const float* values, std::int64_t count, float offset,
                     const std::uint8_t* table, std::uint8_t* codes) {
  std::array<float, kNestedBlock> v;
  float top = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const float x = values[i] - offset;
    v[static_cast<std::size_t>(i)] = x;
    top = std::max(top, std::fabs(x));
  }
  if (top == 0) {
    std::fill_n(codes, count, std::uint8_t{0});
    return top;
  }
  const float reciprocal = 1.0F / top;
  for (std::int64_t i = 0; i < count; ++i) {
    const float s = std::min(std::max(v[static_cast<std::size_t>(i)] * reciprocal, -1.0F), 1.0F);
    const float unit = (s + 1.0F) * 0.5F;
    // The product and the sum round once, as a fused multiply-add does: both are exact in double.
    const auto index = static_cast<float>(static_cast<double>(unit) * 65535.0 + 0.5);
    codes[i] = table[static_cast<std::size_t>(index) & 0xFFFFu];
  }
  return top;
}

/// The first pass: absmax of every block, codes of rows [begin, end).
struct RowEncoder {
  const PackedSpec& spec;
  WeightRun weights;
  const TableQuantizer& table;
  const QuantizeKernels& kernels;
  float* absmax;
  std::int64_t numel;

  struct Block {
    std::int64_t index = -1;
    float absmax = 0, factor = 0;
    bool last_short = false;
  };

  /// Full blocks multiply by a rounded reciprocal; a short last block raises absmax and divides.
  Block load(std::int64_t index) const {
    const std::int64_t begin = index * spec.group_size;
    const std::int64_t size = std::min(spec.group_size, numel - begin);
    Block b{index, kernels.absmax(weights.at(begin), size), 0, size < spec.group_size};
    const float divisor = std::max(b.absmax, kTinyAbsmax);
    if (b.last_short) b.absmax = divisor;
    b.factor = b.last_short ? divisor : 1.0F / divisor;
    return b;
  }

  /// Returns false at the first block with a weight that is not finite.
  bool encode(std::int64_t row_begin, std::int64_t row_end, std::uint8_t* codes,
              std::int64_t code_bytes) const {
    std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
    Block block;
    for (std::int64_t r = row_begin; r < row_end; ++r) {
      const std::int64_t start = r * spec.cols, stop = start + spec.cols;
      for (std::int64_t at = start; at < stop;) {
        const std::int64_t index = at / spec.group_size;
        if (index != block.index) {
          block = load(index);
          if (!(block.absmax < std::numeric_limits<float>::infinity())) return false;
          if (index * spec.group_size >= start) absmax[index] = block.absmax;
        }
        const std::int64_t end = std::min(stop, (index + 1) * spec.group_size);
        kernels.encode_table(table, weights.at(at), end - at, block.factor, block.last_short,
                             row.data() + (at - start));
        at = end;
      }
      pack_row(spec.bits, row.data(), spec.cols, codes + r * code_bytes);
    }
    return true;
  }
};

/// Mean of the absmax of all blocks of the matrix that these rows are a part of. In double: the
/// blocks that begin in a row are added first, then rows in order, so that any cut gives it.
float mean_of(const PackedSpec& spec, std::span<const float> absmax, const RowGather& gather,
              const Executor& executor) {
  std::vector<double> rows = sums_by_row(absmax, spec.group_size, spec.rows, spec.cols, executor);
  if (gather) rows = gather(std::move(rows));
  double sum = 0;
  for (const double row : rows) sum += row;
  const std::int64_t blocks = ceil_div(std::ssize(rows) * spec.cols, spec.group_size);
  return static_cast<float>(sum / static_cast<double>(blocks));
}

void write_nested(const PackedSpec& spec, std::span<const float> absmax, float offset,
                  std::uint8_t* stats, std::uint8_t* shared, const Executor& executor) {
  const Nested nested = quantize_dynamic(absmax, offset, executor);
  spread_stats(spec, {nested.codes.data(), nullptr, nested.absmax.data()}, 0, stats, executor);
  std::memcpy(shared, &offset, sizeof(offset));
  std::memcpy(shared + sizeof(offset), dynamic_map().data(), sizeof(dynamic_map()));
}

}  // namespace

const TableQuantizer& table_quantizer(bool fp4) {
  static const TableQuantizer nf4 =
      make_table(kNf4Codebook, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
  // Codes of FP4 by ascending value; the two zeros give a threshold at exactly 0.
  static const TableQuantizer fp4_table =
      make_table(kFp4Codebook, {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3});
  return fp4 ? fp4_table : nf4;
}

std::uint8_t pad_nibble(bool fp4) { return fp4 ? 0 : 7; }

const std::array<float, 256>& dynamic_map() {
  static const std::array<float, 256> map = make_dynamic_map();
  return map;
}

Nested quantize_dynamic(std::span<const float> values, float offset, const Executor& executor) {
  const std::vector<std::uint8_t>& table = dynamic_codes();
  const auto n = static_cast<std::int64_t>(values.size());
  Nested out;
  out.codes.resize(values.size());
  out.absmax.resize(static_cast<std::size_t>(ceil_div(n, kNestedBlock)));
  constexpr std::int64_t kBlocksPerTask = 32;
  executor.parallel_for(
      0, std::ssize(out.absmax), kBlocksPerTask, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t b = first; b < last; ++b) {
          const std::int64_t begin = b * kNestedBlock;
          const std::int64_t count = std::min(kNestedBlock, n - begin);
          out.absmax[static_cast<std::size_t>(b)] = encode_dynamic(
              values.data() + begin, count, offset, table.data(), out.codes.data() + begin);
        }
      });
  return out;
}

namespace {

[[noreturn]] void refuse(const std::string& text) { fail(Errc::kConfig, "bnb: " + text); }

/// QuantizeOptions::mode as quant_storage: a dtype that divides the packed bytes.
DType storage_of(const std::string& mode, std::int64_t rows, std::int64_t cols) {
  if (mode.empty()) return DType::kU8;
  const auto legal = [&](DType d) { return mode == dtype_torch_name(d) || mode == dtype_name(d); };
  const auto* const found = std::find_if(kStorageTypes.begin(), kStorageTypes.end(), legal);
  if (found == kStorageTypes.end()) {
    refuse("mode (quant_storage) is '" + mode +
           "', expected one of uint8, int8, float16, bfloat16, float32");
  }
  const std::int64_t bytes = ceil_div(checked_mul(rows, cols, "bnb: elements"), 2);
  const auto item = static_cast<std::int64_t>(dtype_size(*found));
  if (bytes % item != 0) {
    fail(Errc::kShape, "bnb: packed bytes are " + std::to_string(bytes) +
                           ", expected a multiple of " + std::to_string(item) +
                           " for quant_storage " + mode);
  }
  return *found;
}

}  // namespace

PackedSpec make_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options) {
  if (options.method == QuantizationMethod::BNB_INT8) return make_int8_spec(rows, cols, options);
  if (options.method != QuantizationMethod::BNB_NF4) {
    refuse("method is " + std::string(method_name(options.method)) +
           ", expected one of bnb_nf4, bnb_int8");
  }
  if (options.bits != 4) refuse("bits is " + std::to_string(options.bits) + ", expected 4");
  if (options.quant_type != "nf4" && options.quant_type != "fp4") {
    refuse("quant_type is '" + options.quant_type + "', expected one of nf4, fp4");
  }
  if (std::find(kBlockSizes.begin(), kBlockSizes.end(), options.group_size) == kBlockSizes.end()) {
    refuse("group_size is " + std::to_string(options.group_size) + ", expected one of " +
           join_numbers(kBlockSizes));
  }
  if (!is_weight_dtype(options.value_dtype)) {
    refuse("value_dtype is " + std::string(dtype_name(options.value_dtype)) +
           ", expected one of f32, f16, bf16");
  }
  const bool fp4 = options.quant_type == "fp4";
  PackedSpec spec;
  spec.rows = rows;
  spec.cols = cols;
  spec.bits = 4;
  spec.code_map = fp4 ? CodeMap::kFp4 : CodeMap::kNf4;
  spec.scale = options.double_quant ? ScaleSource::kNestedU8 : ScaleSource::kF32;
  spec.value_dtype = options.value_dtype;
  spec.group_size = options.group_size;
  spec.nested_group_size = kNestedBlock;
  spec.dialect = kDialectId;
  spec.dialect_flags = Flags{.fp4 = fp4, .storage = storage_of(options.mode, rows, cols)}.to_int();
  validate_spec(spec);
  return spec;
}

namespace {

/// Mean of absmax of the matrix; called once, with the first level of these rows.
using OffsetOf = std::function<float(std::span<const float> absmax)>;

void quantize_blocks(const PackedSpec& spec, WeightRun weights, const OffsetOf& offset_of,
                     std::uint8_t* codes, std::uint8_t* stats, std::uint8_t* shared,
                     const Executor& executor) {
  if (!is_weight_dtype(weights.dtype)) {
    fail(Errc::kDtype, "bnb: weights have dtype " + std::string(dtype_name(weights.dtype)) +
                           ", expected one of f32, f16, bf16");
  }
  if (is_int8(spec)) {
    return quantize_int8(spec, weights.dtype, weights.data, codes, stats, executor);
  }
  const PackedLayout layout = layout_of(spec);
  const std::int64_t numel = checked_mul(spec.rows, spec.cols, "bnb: elements");
  FreshVector<float> absmax(static_cast<std::size_t>(ceil_div(numel, spec.group_size)));
  const RowEncoder encoder{
      spec,          weights, table_quantizer(spec.code_map == CodeMap::kFp4), quantize_kernels(),
      absmax.data(), numel};
  std::atomic<bool> finite{true};
  executor.parallel_for(0, spec.rows, rows_per_task(spec.cols),
                        [&](std::int64_t begin, std::int64_t end) {
                          if (!encoder.encode(begin, end, codes, layout.code_bytes)) {
                            finite.store(false, std::memory_order_relaxed);
                          }
                        });
  if (!finite) refuse_not_finite("bnb", weights, spec.rows, spec.cols);
  if (spec.scale == ScaleSource::kNestedU8) {
    write_nested(spec, absmax, offset_of(absmax), stats, shared, executor);
    return;
  }
  const auto* scales = reinterpret_cast<const std::uint8_t*>(absmax.data());
  spread_stats(spec, {scales, nullptr, nullptr}, 0, stats, executor);
}

}  // namespace

void quantize_with_offset(const PackedSpec& spec, DType dtype, const void* weights,
                          std::optional<float> nested_offset, std::uint8_t* codes,
                          std::uint8_t* stats, std::uint8_t* shared, const Executor& executor) {
  const auto offset_of = [&](std::span<const float> absmax) {
    return nested_offset ? *nested_offset : mean_of(spec, absmax, {}, executor);
  };
  quantize_blocks(spec, {dtype, weights}, offset_of, codes, stats, shared, executor);
}

void quantize_part(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
                   std::uint8_t* stats, std::uint8_t* shared, const RowGather& gather,
                   const Executor& executor) {
  const auto offset_of = [&](std::span<const float> absmax) {
    return mean_of(spec, absmax, gather, executor);
  };
  quantize_blocks(spec, {dtype, weights}, offset_of, codes, stats, shared, executor);
}

void quantize(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
              std::uint8_t* stats, std::uint8_t* shared, const Executor& executor) {
  quantize_part(spec, dtype, weights, codes, stats, shared, {}, executor);
}

}  // namespace quantal::bnb
