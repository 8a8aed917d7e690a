// Statistics from one spelling to another.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "formats/tensors.h"
#include "formats/transcode_rules.h"

namespace quantal::transcoding {
namespace {

bool is_super(ScaleSource s) {
  return s == ScaleSource::kSuperU8 || s == ScaleSource::kSuperI8 || s == ScaleSource::kSuperU4;
}

template <class T>
T load(const std::uint8_t* p) {
  T v{};
  std::memcpy(&v, p, sizeof(v));
  return v;
}

/// Bytes of one element of a scale that stands for itself.
std::int64_t element_bytes(ScaleSource s) {
  if (s == ScaleSource::kF32) return 4;
  return s == ScaleSource::kF16 || s == ScaleSource::kBF16 ? 2 : 1;
}

/// Decodes elements that stand for themselves; one-byte floats are rounded to the value type.
void read_plain(const PackedSpec& spec, const std::uint8_t* in, std::int64_t n, float* out) {
  if (spec.scale == ScaleSource::kF32 || spec.scale == ScaleSource::kF16 ||
      spec.scale == ScaleSource::kBF16) {
    widen_to_f32(scale_dtype(spec.scale), in, n, out);
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    const double exact = spec.scale == ScaleSource::kE8M0 ? std::ldexp(1.0, in[i] - 127)
                                                          : static_cast<double>(kE4M3Values[in[i]]);
    out[i] = round_once(spec.value_dtype, exact);
  }
}

/// Group k of the second level holds groups [k * size, (k + 1) * size).
Statistics expand_nested(const PackedView& w, const GatheredStats& flat) {
  const std::size_t table = w.spec.code_map == CodeMap::kTable ? 64 : 0;
  const std::uint8_t* second = w.shared.data() + table;
  const auto offset = load<float>(second);
  Statistics out;
  out.scales.resize(flat.scales.size());
  const auto size = static_cast<std::size_t>(w.spec.nested_group_size);
  for (std::size_t g = 0; g < out.scales.size(); ++g) {
    const float product = load<float>(second + 4 + 4 * flat.scales[g]) * flat.absmax2[g / size];
    out.scales[g] = product + offset;
  }
  return out;
}

Statistics expand_supers(const PackedView& w, const GatheredStats& flat) {
  const bool packed = w.spec.scale == ScaleSource::kSuperU4;
  const bool offsets = stores_offsets(w.spec.offset);
  const auto size = static_cast<std::size_t>(w.spec.nested_group_size);
  std::vector<float> supers(flat.supers.size()), super_offsets(flat.super_offsets.size());
  widen_to_f32(DType::kF16, flat.supers.data(), static_cast<std::int64_t>(supers.size()),
               supers.data());
  widen_to_f32(DType::kF16, flat.super_offsets.data(),
               static_cast<std::int64_t>(super_offsets.size()), super_offsets.data());
  Statistics out;
  out.scales.resize(flat.scales.size());
  out.offsets.resize(offsets ? flat.scales.size() : 0);
  for (std::size_t g = 0; g < out.scales.size(); ++g) {
    const std::uint8_t byte = flat.scales[g];
    const int sub = packed                                  ? byte & 15
                    : w.spec.scale == ScaleSource::kSuperI8 ? static_cast<std::int8_t>(byte)
                                                            : byte;
    out.scales[g] = supers[g / size] * static_cast<float>(sub);
    if (!offsets) continue;
    const int sub_offset = packed ? byte >> 4 : flat.offsets[g];
    out.offsets[g] = super_offsets[g / size] * static_cast<float>(sub_offset);
  }
  return out;
}

/// Statistics of column maps lie one after another, scale and offset side by side.
Statistics read_columns(const PackedView& w) {
  const std::int64_t groups = num_groups(w.spec), bytes = element_bytes(w.spec.scale);
  const std::int64_t stride = layout_of(w.spec).stat_bytes;
  Statistics out;
  out.scales.resize(static_cast<std::size_t>(groups));
  if (stores_offsets(w.spec.offset)) out.offsets.resize(out.scales.size());
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::uint8_t* at = w.stats.data() + g * stride;
    read_plain(w.spec, at, 1, out.scales.data() + g);
    if (!out.offsets.empty()) read_plain(w.spec, at + bytes, 1, out.offsets.data() + g);
  }
  return out;
}

// ------------------------------------------------------------------ one group

/// A group's statistics as real numbers, in the target's terms.
struct Real {
  double scale = 0, offset = 0;
  bool possible = true;
  bool replaced = false;  ///< a scale of zero that the target cannot mean
};

/// A constant group under a zero point, w = (q - z) * s: with z = -constant / s so large that no
/// code changes q - z, every weight is the constant. The scale is small enough to be zero again,
/// with its sign, once it is stored as binary16.
Real constant_group(double constant, double sign, DType storage) {
  int exponent = 0;
  std::frexp(constant, &exponent);
  const int e =
      storage == DType::kF16 ? std::min(16 - exponent, 24) : std::min(100, 126 - exponent);
  return {std::copysign(std::ldexp(1.0, -e), sign),
          -std::copysign(1.0, sign) * std::ldexp(constant, e), true, true};
}

struct Rewriter {
  const PackedSpec& from;
  const PackedSpec& to;
  const CodeMove& move;

  Real operator()(float s, float o) const {
    const double inverse = static_cast<double>(kInverse127);
    const double scale =
        move.unit * static_cast<double>(s) * (from.offset == Offset::kOver127 ? inverse : 1.0);
    const double shift = move.integers ? move.zero_code - to.centre : 0;
    if (to.offset == Offset::kZeroPoint) return zero_point(scale, static_cast<double>(o), shift);
    double bias = 0;  // of the source, w = n * scale + bias
    if (from.offset == Offset::kBias) bias = static_cast<double>(o);
    if (from.offset == Offset::kShift) bias = -static_cast<double>(o);
    if (from.offset == Offset::kZeroPoint) bias = -static_cast<double>(o) * scale;
    if (shift != 0) bias -= shift * scale;
    switch (to.offset) {
      case Offset::kBias:
        return {scale, bias};
      case Offset::kShift:
        return {scale, -bias};
      default: {
        const bool both = to.offset == from.offset;
        const double stored = to.offset == Offset::kOver127 && !both ? 127 * scale : scale;
        return {both ? move.unit * static_cast<double>(s) : stored, 0, bias == 0};
      }
    }
  }

  Real zero_point(double scale, double o, double shift) const {
    if (!stores_offsets(from.offset)) return {scale, shift};
    if (from.offset == Offset::kZeroPoint) return {scale, shift + o};
    const double bias = from.offset == Offset::kBias ? o : -o;
    constexpr double kBeyond = 0x1p64;  // codes no longer change the weight
    if (bias != 0 && (scale == 0 || std::fabs(bias) >= kBeyond * std::fabs(scale))) {
      return constant_group(bias, scale, scale_dtype(to.scale));
    }
    // Zeros keep their signs, so that the way back finds the bytes of a bias of -0.
    const double zero =
        -(scale == 0 ? std::copysign(bias, bias * std::copysign(1.0, scale)) : bias / scale);
    return {scale, shift == 0 ? zero : shift + zero};
  }
};

// ------------------------------------------------------------------ storage

/// Spacing of a float type's numbers at |x|.
double spacing(DType dtype, double x) {
  const int lowest = dtype == DType::kF16 ? -13 : -125;  // frexp exponent of the smallest normal
  int exponent = 0;
  std::frexp(x, &exponent);
  return std::ldexp(1.0, std::max(exponent, lowest) - float_precision(dtype));
}

/// Appends numbers in one storage type and keeps the largest rounding.
class Storage {
 public:
  explicit Storage(ScaleSource source) : source_(source) {}

  /// False if the number cannot be stored.
  bool put(double value, bool measured, std::vector<std::uint8_t>& out) {
    if (source_ == ScaleSource::kE8M0 || source_ == ScaleSource::kE4M3) return put_byte(value, out);
    const DType dtype = scale_dtype(source_);
    const float stored = round_once(dtype, value);
    if (!std::isfinite(stored)) return false;
    if (measured) {
      const double error = std::fabs(static_cast<double>(stored) - value);
      if (error != 0) ulp_ = std::max(ulp_, error / spacing(dtype, value));
    }
    const std::size_t at = out.size();
    out.resize(at + dtype_size(dtype));
    narrow_from_f32(dtype, &stored, 1, out.data() + at);
    return true;
  }
  double ulp() const { return ulp_; }

 private:
  /// Only numbers that the byte can mean.
  bool put_byte(double value, std::vector<std::uint8_t>& out) const {
    for (int code = 0; code < 256; ++code) {
      const double meant = source_ == ScaleSource::kE8M0
                               ? std::ldexp(1.0, code - 127)
                               : static_cast<double>(kE4M3Values[static_cast<std::size_t>(code)]);
      if (meant != value || (source_ == ScaleSource::kE8M0 && code == 255)) continue;
      out.push_back(static_cast<std::uint8_t>(code));
      return true;
    }
    return false;
  }

  ScaleSource source_;
  double ulp_ = 0;
};

bool same_bits(float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

/// Source group of every target group; empty if one touches groups with different statistics.
std::vector<std::int64_t> source_groups(const PackedSpec& from, const PackedSpec& to,
                                        const Statistics& stats) {
  const std::int64_t groups = num_groups(to);
  std::vector<std::int64_t> out(static_cast<std::size_t>(groups), -1);
  const bool regular = alignment_of(from, to) != Alignment::kIrregular;
  if (regular && to.group_map == GroupMap::kRowRuns) {
    for (std::int64_t g = 0; g < groups; ++g) {
      out[static_cast<std::size_t>(g)] = g * to.group_size / from.group_size;
    }
    return out;
  }
  for (std::int64_t r = 0; r < to.rows; ++r) {
    for (std::int64_t c = 0; c < to.cols; ++c) {
      std::int64_t& known = out[static_cast<std::size_t>(group_of(to, r, c))];
      const std::int64_t source = group_of(from, r, c);
      if (known < 0) known = source;
      if (known == source) continue;
      const auto a = static_cast<std::size_t>(known), b = static_cast<std::size_t>(source);
      if (!same_bits(stats.scales[a], stats.scales[b]) ||
          (!stats.offsets.empty() && !same_bits(stats.offsets[a], stats.offsets[b]))) {
        return {};
      }
    }
  }
  return out;
}

/// Copies two-level statistics into split groups: codes of the first level and the second level as
/// they are, repeated. False if groups of one new second-level block had different ones.
bool split_nested(const PackedView& from, PackedMatrix& to, const Executor& executor) {
  const GatheredStats flat = gather_stats(from);
  const std::int64_t groups = num_groups(to.spec);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(groups));
  std::vector<float> second(static_cast<std::size_t>(ceil_div(groups, to.spec.nested_group_size)));
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t source = g * to.spec.group_size / from.spec.group_size;
    codes[static_cast<std::size_t>(g)] = flat.scales[static_cast<std::size_t>(source)];
    const float absmax2 =
        flat.absmax2[static_cast<std::size_t>(source / from.spec.nested_group_size)];
    float& block = second[static_cast<std::size_t>(g / to.spec.nested_group_size)];
    if (g % to.spec.nested_group_size == 0) block = absmax2;
    if (!same_bits(block, absmax2)) return false;
  }
  FlatStats out;
  out.scales = codes.data();
  out.absmax2 = second.data();
  spread_stats(to.spec, out, 0, to.stats.data(), executor);
  return true;
}

void write_statistics(PackedMatrix& to, const std::vector<std::uint8_t>& scales,
                      const std::vector<std::uint8_t>& offsets, const Executor& executor) {
  if (to.spec.group_map == GroupMap::kRowRuns) {
    FlatStats flat;
    flat.scales = scales.data();
    flat.offsets = offsets.empty() ? nullptr : offsets.data();
    spread_stats(to.spec, flat, 0, to.stats.data(), executor);
    return;
  }
  const auto bytes = static_cast<std::size_t>(element_bytes(to.spec.scale));
  std::uint8_t* at = to.stats.data();
  for (std::size_t g = 0; g < scales.size() / bytes; ++g) {
    std::memcpy(at, scales.data() + g * bytes, bytes);
    at += bytes;
    if (offsets.empty()) continue;
    std::memcpy(at, offsets.data() + g * bytes, bytes);
    at += bytes;
  }
}

}  // namespace

float round_once(DType dtype, double value) {
  auto f = static_cast<float>(value);
  if (dtype == DType::kF32 || !std::isfinite(f)) return f;
  if (static_cast<double>(f) != value) {
    // To odd: the next rounding then sees on which side of a tie the number lies.
    if (std::fabs(static_cast<double>(f)) > std::fabs(value)) f = std::nextafterf(f, 0.0F);
    std::uint32_t bits = 0;
    std::memcpy(&bits, &f, sizeof(bits));
    bits |= 1;
    std::memcpy(&f, &bits, sizeof(bits));
  }
  std::uint16_t half = 0;
  float out = 0;
  narrow_from_f32(dtype, &f, 1, &half);
  widen_to_f32(dtype, &half, 1, &out);
  return out;
}

std::int64_t num_groups(const PackedSpec& spec) {
  if (spec.group_map == GroupMap::kColumnBlocks) return spec.rows / spec.group_size * spec.cols;
  return ceil_div(spec.rows * spec.cols, spec.group_size);
}

std::int64_t group_of(const PackedSpec& spec, std::int64_t row, std::int64_t col) {
  const std::int64_t flat = row * spec.cols + col;
  if (spec.group_map == GroupMap::kRowRuns) return flat / spec.group_size;
  if (spec.group_map == GroupMap::kColumnRuns) return flat % num_groups(spec);
  return row / spec.group_size * spec.cols + col;
}

Statistics read_statistics(const PackedView& w) {
  if (w.spec.group_map != GroupMap::kRowRuns) return read_columns(w);
  const GatheredStats flat = gather_stats(w);
  if (w.spec.scale == ScaleSource::kNestedU8) return expand_nested(w, flat);
  if (is_super(w.spec.scale)) return expand_supers(w, flat);
  Statistics out;
  const std::int64_t groups = num_groups(w.spec);
  out.scales.resize(static_cast<std::size_t>(groups));
  read_plain(w.spec, flat.scales.data(), groups, out.scales.data());
  if (stores_offsets(w.spec.offset)) {
    out.offsets.resize(out.scales.size());
    read_plain(w.spec, flat.offsets.data(), groups, out.offsets.data());
  }
  return out;
}

std::optional<double> convert_statistics(const PackedView& from, const CodeMove& move,
                                         PackedMatrix& to, const Executor& executor) {
  if (to.spec.scale == ScaleSource::kNestedU8) {
    return split_nested(from, to, executor) ? std::optional<double>(0) : std::nullopt;
  }
  const Statistics stats = read_statistics(from);
  const std::vector<std::int64_t> sources = source_groups(from.spec, to.spec, stats);
  if (sources.empty() && num_groups(to.spec) != 0) return std::nullopt;
  const Rewriter rewrite{from.spec, to.spec, move};
  const bool has_offsets = stores_offsets(to.spec.offset);
  Storage storage(to.spec.scale);
  std::vector<std::uint8_t> scales, offsets;
  const bool whole = has_whole_zeros(to.spec);
  const double top_code = (1 << to.spec.bits) - 1;
  for (const std::int64_t source : sources) {
    const auto g = static_cast<std::size_t>(source);
    const Real real = rewrite(stats.scales[g], stats.offsets.empty() ? 0.0F : stats.offsets[g]);
    if (whole &&
        !(real.offset == std::floor(real.offset) && real.offset >= 0 && real.offset <= top_code)) {
      return std::nullopt;
    }
    if (!real.possible || !storage.put(real.scale, !real.replaced, scales) ||
        (has_offsets && !storage.put(real.offset, !real.replaced, offsets))) {
      return std::nullopt;
    }
  }
  write_statistics(to, scales, offsets, executor);
  return storage.ulp();
}

}  // namespace quantal::transcoding
