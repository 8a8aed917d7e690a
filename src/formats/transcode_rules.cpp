// What a conversion preserves, derived from the two packed forms.
#include "formats/transcode_rules.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace quantal::transcoding {
namespace {

/// Integers n with mapped code = n * unit; empty if the map has none.
struct IntegerImage {
  std::vector<int> n;
  double unit = 1;
};

IntegerImage integer_image(const PackedSpec& spec) {
  IntegerImage image;
  const auto codes = static_cast<std::size_t>(1) << spec.bits;
  if (spec.code_map == CodeMap::kInteger) {
    for (std::size_t q = 0; q < codes; ++q) image.n.push_back(static_cast<int>(q) - spec.centre);
  } else if (spec.code_map == CodeMap::kE2M1) {
    image.unit = 0.5;
    for (const float v : kE2M1Codebook) image.n.push_back(static_cast<int>(2 * v));
  } else if (spec.code_map == CodeMap::kIq4Nl) {
    for (const float v : kIq4NlCodebook) image.n.push_back(static_cast<int>(v));
  }
  return image;
}

/// Target code of n = 0: the source's own codes where the target can shift them, the target's
/// centre where it cannot (a source with offsets then has to be symmetric around half its range).
int zero_code_of(const PackedSpec& from, const PackedSpec& to) {
  if (!stores_offsets(to.offset)) {
    const int half = 1 << (from.bits - 1);
    return stores_offsets(from.offset) ? from.centre + to.centre - half : to.centre;
  }
  if (from.code_map == CodeMap::kInteger) return from.centre;
  return 1 << (to.bits - 1);
}

bool same_map(const PackedSpec& from, const PackedSpec& to) {
  return from.code_map == to.code_map && from.bits == to.bits && from.centre == to.centre;
}

bool is_bias_pair(Offset a, Offset b) {
  return (a == Offset::kBias && b == Offset::kShift) || (a == Offset::kShift && b == Offset::kBias);
}

bool is_plain(ScaleSource s) {
  return s == ScaleSource::kF32 || s == ScaleSource::kF16 || s == ScaleSource::kBF16;
}

/// The type of a plain scale; f32 stands for sources that are multiplied out.
DType plain_dtype(ScaleSource s) {
  if (s == ScaleSource::kF16) return DType::kF16;
  return s == ScaleSource::kBF16 ? DType::kBF16 : DType::kF32;
}

bool is_two_level(ScaleSource s) {
  return s == ScaleSource::kNestedU8 || s == ScaleSource::kSuperU8 || s == ScaleSource::kSuperI8 ||
         s == ScaleSource::kSuperU4;
}

/// Bits between the highest and the lowest set bit of |n|, both included.
int significant_bits(int n) {
  const auto magnitude = static_cast<unsigned>(std::abs(n));
  return magnitude == 0 ? 0 : std::bit_width(magnitude) - std::countr_zero(magnitude);
}

/// Target code minus target centre of n = 0.
int shift_of(const PackedSpec& to, const CodeMove& move) {
  return move.integers ? move.zero_code - to.centre : 0;
}

/// What is known about the rewritten statistics.
struct Numbers {
  bool exact = true;          ///< the same numbers
  double ulp = 0;             ///< else: bound
  bool in_range = true;       ///< no number can leave the target's storage
  bool must_cancel = false;   ///< the target stores no offset, the source does
  bool integer_zero = false;  ///< target zero points are small integers

  /// A number of `bits` significant bits is stored where `room` fit.
  void store(int bits, int room) {
    if (bits <= room) return;
    exact = false;
    ulp = 0.5;
  }
};

void offsets_of(const PackedSpec& from, const PackedSpec& to, const CodeMove& move, Numbers& n) {
  const int have = scale_precision(from.scale), room = scale_precision(to.scale);
  const int shift = shift_of(to, move);
  const bool half = to.scale == ScaleSource::kF16;
  constexpr int kUnbounded = 64;
  if (has_whole_zeros(to)) {  // copied only where they are whole already
    n.in_range = n.in_range && !stores_offsets(from.offset);
    n.integer_zero = true;
    return;
  }
  if (!stores_offsets(from.offset)) {
    n.integer_zero = to.offset == Offset::kZeroPoint;
    if (n.integer_zero || shift == 0) return;
    const int scale_bits = from.offset == Offset::kOver127 ? kUnbounded : have;
    const int shift_bits = significant_bits(shift);
    n.store(shift_bits == 1 ? scale_bits : scale_bits + shift_bits, room);
    n.in_range = n.in_range && !half;
  } else if (from.offset == Offset::kZeroPoint && to.offset == Offset::kZeroPoint) {
    n.store(shift == 0 ? have : kUnbounded, room);
  } else if (to.offset == Offset::kZeroPoint) {  // z = -bias / scale
    n.store(kUnbounded, room);
    n.in_range = n.in_range && !half;
  } else if (from.offset == Offset::kZeroPoint) {  // bias = -z * scale
    n.store(shift == 0 ? 2 * have : kUnbounded, room);
    n.in_range = n.in_range && !half;
  } else {
    n.store(shift == 0 ? have : kUnbounded, room);
  }
}

Numbers numbers_of(const PackedSpec& from, const PackedSpec& to, const CodeMove& move) {
  Numbers n;
  const int have = scale_precision(from.scale), room = scale_precision(to.scale);
  const bool over = from.offset == Offset::kOver127, to_over = to.offset == Offset::kOver127;
  if (over == to_over) {
    n.store(have, room);
  } else {  // the constant 1/127 has 24 bits, 127 has 7
    n.store(over ? have + 24 : have + 7, room);
  }
  if (to.scale == ScaleSource::kF16) n.in_range = from.scale == ScaleSource::kF16;
  if (!is_plain(to.scale)) n.in_range = from.scale == to.scale;
  if (stores_offsets(to.offset)) {
    offsets_of(from, to, move, n);
  } else {
    n.must_cancel = stores_offsets(from.offset) || shift_of(to, move) != 0;
  }
  return n;
}

/// True if no step before the last one rounds: then a value is one rounding of a real number.
bool one_rounding(const PackedSpec& spec, int code_bits, int scale_bits, bool integer_zero) {
  switch (spec.offset) {
    case Offset::kNone:
      return true;
    case Offset::kBias:
    case Offset::kShift:  // f16 left out: a product may overflow
      return spec.value_dtype != DType::kF16 &&
             code_bits + scale_bits <= float_precision(spec.value_dtype);
    case Offset::kZeroPoint:
      return integer_zero;
    case Offset::kOver127:
      return false;
  }
  return false;
}

/// True if both forms do the same steps with the same numbers.
bool same_steps(const PackedSpec& from, const PackedSpec& to, const CodeMove& move) {
  if (from.offset != to.offset && !is_bias_pair(from.offset, to.offset)) return false;
  return shift_of(to, move) == 0 && move.unit == 1;
}

/// The type in which values are equal (f32: as they are), if statistics are the same numbers;
/// nullopt if they differ.
std::optional<DType> equal_values(const PackedSpec& from, const PackedSpec& to,
                                  const CodeMove& move, const Numbers& n) {
  const bool same_type = from.value_dtype == to.value_dtype;
  if (same_type && same_steps(from, to, move)) return DType::kF32;
  const int bits = scale_precision(from.scale);
  if (!one_rounding(from, move.source_bits, bits, false) ||
      !one_rounding(to, move.target_bits, bits, n.integer_zero)) {
    return std::nullopt;
  }
  // A product that fits its type is not rounded at all.
  const bool product = move.integers && !stores_offsets(from.offset);
  const auto effective = [&](DType dtype) {
    const bool fits =
        product && dtype != DType::kF16 && move.source_bits + bits <= float_precision(dtype);
    return fits ? DType::kF32 : dtype;
  };
  if (same_type) return DType::kF32;
  const DType a = effective(from.value_dtype), b = effective(to.value_dtype);
  if (a != b && a != DType::kF32 && b != DType::kF32) return std::nullopt;
  return a == DType::kF32 ? b : a;
}

std::string power(int bits) { return "2^-" + std::to_string(bits); }

std::string scale_words(const PackedSpec& from, const PackedSpec& to, const CodeMove& move) {
  if (from.offset == Offset::kOver127 && to.offset != Offset::kOver127) return "scale = SCB / 127";
  if (to.offset == Offset::kOver127 && from.offset != Offset::kOver127) return "SCB = 127 scale";
  if (is_two_level(from.scale) && !is_two_level(to.scale)) {
    return "two-level statistics are multiplied out";
  }
  return move.unit != 1 ? "scale halved" : "";
}

std::string offset_words(const PackedSpec& from, const PackedSpec& to, const CodeMove& move) {
  if (!stores_offsets(to.offset)) return "";
  const int shift = shift_of(to, move);
  const std::string name = to.offset == Offset::kBias    ? "bias"
                           : to.offset == Offset::kShift ? "shift"
                                                         : "zero";
  if (!stores_offsets(from.offset)) {
    if (to.offset == Offset::kZeroPoint) return "zero = " + std::to_string(shift);
    if (shift == 0) return name + " = 0";
    return name + " = " + (to.offset == Offset::kBias ? "-" : "") + std::to_string(shift) +
           " scale";
  }
  if (from.offset == to.offset) return "";
  if (is_bias_pair(from.offset, to.offset)) {
    return to.offset == Offset::kBias ? "bias = -shift" : "shift = -bias";
  }
  if (to.offset == Offset::kZeroPoint) {
    return from.offset == Offset::kBias ? "zero = -bias / scale" : "zero = shift / scale";
  }
  return to.offset == Offset::kBias ? "bias = -zero scale" : "shift = zero scale";
}

void join(std::string& text, const std::string& more) {
  if (!more.empty()) text += (text.empty() ? "" : "; ") + more;
}

/// Values that differ: at most two roundings on each side and one of each statistic.
std::string bound_words(const PackedSpec& from, const PackedSpec& to) {
  const int p = std::min({float_precision(from.value_dtype), float_precision(to.value_dtype),
                          float_precision(plain_dtype(to.scale))});
  return "weights within 6 x " + power(p) + " of their magnitude";
}

bool nested_stays(const PackedSpec& from, const PackedSpec& to, Alignment alignment) {
  if (from.scale != ScaleSource::kNestedU8) return false;
  if (alignment == Alignment::kSame) return from.nested_group_size == to.nested_group_size;
  const std::int64_t ratio = from.group_size / to.group_size;
  return alignment == Alignment::kSplit &&
         from.nested_group_size * ratio % to.nested_group_size == 0;
}

std::string statistics_words(const PackedSpec& from, const PackedSpec& to, const CodeMove& move,
                             Alignment alignment) {
  std::string words = scale_words(from, to, move);
  join(words, offset_words(from, to, move));
  if (words.empty() && alignment != Alignment::kSplit) words = "statistics as they are";
  if (alignment == Alignment::kSplit) {
    join(words, to.scale == ScaleSource::kNestedU8
                    ? "groups split, both levels of statistics repeated"
                    : "groups split, statistics repeated");
  }
  return words;
}

/// What the statement waits for; empty if it holds for every matrix.
std::string condition_words(const PackedSpec& from, const PackedSpec& to, const CodeMove& move,
                            const Numbers& n, Alignment alignment) {
  std::string words;
  const auto also = [&](const std::string& more) {
    words += (words.empty() ? "" : " and ") + more;
  };
  if (alignment == Alignment::kIrregular) also("groups that become one are equal");
  if (n.must_cancel) {
    const std::string half = std::to_string(-shift_of(to, move));
    also(from.offset == Offset::kBias    ? "bias = -" + half + " scale"
         : from.offset == Offset::kShift ? "shift = " + half + " scale"
                                         : "zero = " + half);
  }
  if (has_whole_zeros(to) && stores_offsets(from.offset)) {
    also("zeros are whole numbers");
  } else if (!n.in_range) {
    also("statistics stay in the range of their new storage");
  }
  return words;
}

}  // namespace

bool has_whole_zeros(const PackedSpec& spec) {
  return spec.offset == Offset::kZeroPoint && dialect_by_id(spec.dialect).name == "quanto";
}

int float_precision(DType dtype) noexcept {
  if (dtype == DType::kF16) return 11;
  return dtype == DType::kBF16 ? 8 : 24;
}

int scale_precision(ScaleSource source) noexcept {
  switch (source) {
    case ScaleSource::kF16:
      return 11;
    case ScaleSource::kBF16:
      return 8;
    case ScaleSource::kE8M0:
      return 1;
    case ScaleSource::kE4M3:
      return 4;
    case ScaleSource::kSuperU8:
      return 11 + 8;
    case ScaleSource::kSuperI8:
      return 11 + 7;  // -128 is a power of two
    case ScaleSource::kSuperU4:
      return 11 + 4;
    default:
      return 24;
  }
}

CodeMove code_move(const PackedSpec& from, const PackedSpec& to) {
  CodeMove move;
  const std::size_t codes = std::size_t{1} << from.bits;
  for (std::size_t q = 0; q < codes; ++q) move.map[q] = static_cast<std::uint8_t>(q);
  if (to.code_map != CodeMap::kInteger) {
    move.possible = same_map(from, to);
    return move;
  }
  const IntegerImage image = integer_image(from);
  if (image.n.empty()) return move;
  move.integers = true;
  move.unit = image.unit;
  move.zero_code = zero_code_of(from, to);
  for (std::size_t q = 0; q < codes; ++q) {
    const int code = image.n[q] + move.zero_code;
    if (code < 0 || code >= 1 << to.bits) return move;
    move.map[q] = static_cast<std::uint8_t>(code);
    move.identity = move.identity && code == static_cast<int>(q);
    move.source_bits = std::max(move.source_bits, significant_bits(image.n[q]));
    move.target_bits = std::max(move.target_bits, significant_bits(code - to.centre));
  }
  move.possible = true;
  return move;
}

Alignment alignment_of(const PackedSpec& from, const PackedSpec& to) {
  if (from.group_map != to.group_map) return Alignment::kIrregular;
  if (from.group_size == to.group_size) return Alignment::kSame;
  return from.group_size % to.group_size == 0 ? Alignment::kSplit : Alignment::kIrregular;
}

std::optional<Preservation> copy_statement(const PackedSpec& from, const PackedSpec& to) {
  const CodeMove move = code_move(from, to);
  if (!move.possible || to.residue_bytes > from.residue_bytes) return std::nullopt;
  const Alignment alignment = alignment_of(from, to);
  const bool same_form = from.scale == to.scale && from.offset == to.offset &&
                         from.nested_group_size == to.nested_group_size;
  if (is_two_level(to.scale)) {  // chosen by a search unless they are there already
    const bool kept =
        same_form && (alignment == Alignment::kSame || nested_stays(from, to, alignment));
    if (!kept || !same_map(from, to)) return std::nullopt;
  }
  Numbers n = numbers_of(from, to, move);
  if (is_two_level(to.scale)) n = Numbers{};
  Preservation p;
  p.codes = true;
  p.statistics = n.exact;
  p.statistics_ulp = n.ulp;
  if (const auto dtype = equal_values(from, to, move, n); n.exact && dtype) {
    p.values = true;
    p.values_dtype = *dtype;
  }
  p.note = statistics_words(from, to, move, alignment);
  if (!p.values) join(p.note, bound_words(from, to));
  const std::string condition = condition_words(from, to, move, n, alignment);
  if (!condition.empty()) join(p.note, "depends on the values: if " + condition);
  return p;
}

}  // namespace quantal::transcoding
