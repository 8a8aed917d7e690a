// The packed form that a request leads to.
#include <algorithm>
#include <string>

#include "formats/quanto/quanto_codec.h"
#include "formats/tensors.h"

namespace quantal::quanto {
namespace {

[[noreturn]] void refuse(const std::string& text) { fail(Errc::kConfig, "quanto: " + text); }

int bits_of_method(QuantizationMethod method) {
  switch (method) {
    case QuantizationMethod::QUANTO_INT2:
      return 2;
    case QuantizationMethod::QUANTO_INT4:
      return 4;
    case QuantizationMethod::QUANTO_INT8:
      return 8;
    default:
      refuse("method is " + std::string(method_name(method)) +
             ", expected one of quanto_int2, quanto_int4, quanto_int8");
  }
}

struct Mode {
  bool optimize = false, zero_point = false, exact_group = false;
};

Mode parse_mode(const std::string& text, int bits) {
  Mode mode;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find(',', at), text.size());
    const std::string word = text.substr(at, end - at);
    at = end + 1;
    if (word == "hqq") {
      mode.optimize = true;
    } else if (word == "zeropoint") {
      mode.zero_point = true;
    } else if (word == "exact_group") {
      mode.exact_group = true;
    } else if (!word.empty() && word != "max") {
      refuse("mode holds '" + word + "', expected words of max, hqq, zeropoint, exact_group");
    }
  }
  if (bits == 8 && (mode.optimize || mode.zero_point || mode.exact_group)) {
    refuse("mode is '" + text + "', expected max at 8 bits (one absmax scale per row)");
  }
  return mode;
}

/// Codes per scale along `length` weights that share an index of the axis.
std::int64_t group_size_of(std::int64_t length, const Mode& mode, std::int64_t requested) {
  if (!mode.exact_group) return upstream_group_size(length);
  if (requested < 0 || (requested != 0 && length % requested != 0)) {
    refuse("group_size is " + std::to_string(requested) + ", expected a divisor of the " +
           std::to_string(length) + " weights of a row (axis -1: column), or 0 for whole ones");
  }
  return requested;
}

}  // namespace

PackedSpec make_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options) {
  const int bits = bits_of_method(options.method);
  const Mode mode = parse_mode(options.mode, bits);
  if (options.axis < -1 || options.axis > 1) {
    refuse("axis is " + std::to_string(options.axis) + ", expected one of 0, 1 (rows), -1");
  }
  if (!is_weight_dtype(options.value_dtype)) {
    refuse("value_dtype is " + std::string(dtype_name(options.value_dtype)) +
           ", expected one of f32, f16, bf16");
  }
  const bool columns = options.axis == -1;
  Flags flags{.zero_point = mode.zero_point, .optimize = mode.optimize};
  PackedSpec spec;
  spec.rows = rows;
  spec.cols = cols;
  spec.bits = bits;
  spec.scale = scale_source_of(options.value_dtype);
  spec.value_dtype = options.value_dtype;
  spec.group_map = columns ? GroupMap::kColumnBlocks : GroupMap::kRowRuns;
  spec.dialect = kDialectId;
  const std::int64_t length = columns ? rows : cols;
  const std::int64_t group = bits == 8 ? 0 : group_size_of(length, mode, options.group_size);
  spec.group_size = std::max<std::int64_t>(1, group == 0 ? length : group);
  if (bits == 8) {
    spec.centre = kInt8Centre;
    // An axis of size 1 means one scale for the whole tensor.
    flags.per_tensor = (columns ? cols : rows) == 1;
    if (flags.per_tensor) {
      spec.group_map = GroupMap::kRowRuns;
      spec.group_size = std::max<std::int64_t>(1, cols);
    }
  } else {
    spec.offset = mode.zero_point ? Offset::kZeroPoint : Offset::kShift;
    // Upstream reduces the other axis when the axis has size 1: every weight its own group, as
    // along the columns of a single row. Both are runs of one weight.
    if (rows == 1 && (columns || group == 0)) {
      spec.group_map = GroupMap::kRowRuns;
      spec.group_size = 1;
    }
  }
  spec.dialect_flags = flags.to_int();
  validate_spec(spec);
  return spec;
}

}  // namespace quantal::quanto
