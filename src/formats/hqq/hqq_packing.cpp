#include "formats/hqq/hqq_packing.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>

#include "formats/tensors.h"

namespace quantal::hqq {
namespace {

struct Rule {
  std::string_view name;
  DType word;
  int field;  ///< bits that a code takes
  int parts;
};

constexpr Rule rule_of(int bits) {
  switch (bits) {
    case 1:
      return {"1bit_u8", DType::kU8, 1, 8};
    case 2:
      return {"2bit_u8", DType::kU8, 2, 4};
    case 3:
      return {"3bit_32", DType::kI32, 3, 10};
    case 4:
      return {"4bit_u8", DType::kU8, 4, 2};
    default:
      return {"8bit_u8", DType::kU8, 8, 1};
  }
}

/// Calls body(part, word, row element, length) for each stretch of weights [start, start + length)
/// that lies in one part.
template <class Body>
void for_each_stretch(const Packing& packing, std::int64_t start, std::int64_t length, Body body) {
  const std::int64_t words = packing.words();
  for (std::int64_t at = start; at < start + length;) {
    const std::int64_t part = at / words, word = at % words;
    const std::int64_t n = std::min(start + length - at, words - word);
    body(part, word, at - start, n);
    at += n;
  }
}

template <class Word>
void pack_words(const PackedView& w, const Packing& packing, Word* words) {
  const PackedSpec& spec = w.spec;
  const std::int64_t code_bytes = layout_of(spec).code_bytes;
  std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    unpack_row(spec.bits, w.codes.data() + r * code_bytes, spec.cols, row.data());
    for_each_stretch(packing, r * spec.cols, spec.cols,
                     [&](std::int64_t part, std::int64_t word, std::int64_t at, std::int64_t n) {
                       const int shift = packing.shift(part);
                       const std::uint8_t* codes = row.data() + at;
                       Word* out = words + word;
                       for (std::int64_t i = 0; i < n; ++i) {
                         out[i] = static_cast<Word>(
                             out[i] | static_cast<Word>(static_cast<Word>(codes[i]) << shift));
                       }
                     });
  }
}

/// Word i at any address.
template <class Word>
Word word_at(const std::uint8_t* words, std::int64_t i) {
  Word word;
  std::memcpy(&word, words + i * static_cast<std::int64_t>(sizeof(Word)), sizeof(Word));
  return word;
}

template <class Word>
void unpack_words(const std::uint8_t* words, const Packing& packing, const std::string& tensor,
                  const PackedSpec& spec, RowRange rows, std::uint8_t* out) {
  const auto mask = static_cast<Word>((1U << packing.bits) - 1);
  const unsigned limit = (1U << spec.bits) - 1;
  std::uint8_t used = 0;
  pack_rows(spec, rows, out, [&](std::int64_t r, std::uint8_t* row) {
    for_each_stretch(packing, r * spec.cols, spec.cols,
                     [&](std::int64_t part, std::int64_t word, std::int64_t at, std::int64_t n) {
                       const int shift = packing.shift(part);
                       std::uint8_t* codes = row + at;
                       for (std::int64_t i = 0; i < n; ++i) {
                         const Word bits = word_at<Word>(words, word + i);
                         codes[i] = static_cast<std::uint8_t>((bits >> shift) & mask);
                       }
                     });
    for (std::int64_t c = 0; c < spec.cols; ++c) used |= row[c];
    if (used > limit) {
      fail(Errc::kCorrupt,
           "hqq: " + tensor + " holds codes above " + std::to_string(limit) +
               " in the flattened row " + std::to_string(r) + ", expected " +
               std::to_string(spec.bits) + "-bit codes",
           {.path = {}, .tensor = tensor});
    }
  });
}

}  // namespace

std::string_view packing_name(int bits) { return rule_of(bits).name; }

Packing packing_of(int bits, const Grouping& grouping, std::string_view where) {
  const Rule rule = rule_of(bits);
  const bool padded = rule.word == DType::kI32;
  if (!padded && grouping.rows % rule.parts != 0) {
    const std::string multiple = rule.parts == 2 ? std::string("an even number")
                                                 : "a multiple of " + std::to_string(rule.parts);
    fail(Errc::kShape, std::string(where) + ": rows of the grouped matrix are " +
                           std::to_string(grouping.rows) + ", expected " + multiple + " at " +
                           std::to_string(bits) + " bits");
  }
  return {rule.name,    rule.word, rule.field, rule.parts, ceil_div(grouping.rows, rule.parts),
          grouping.cols};
}

std::vector<std::uint8_t> pack_codes(const PackedView& w, const Packing& packing) {
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(packing.bytes()));
  if (packing.word == DType::kU8) {
    pack_words(w, packing, bytes.data());
    return bytes;
  }
  std::vector<std::uint32_t> words(static_cast<std::size_t>(packing.words()));
  pack_words(w, packing, words.data());
  std::memcpy(bytes.data(), words.data(), bytes.size());
  return bytes;
}

void unpack_codes(std::span<const std::uint8_t> words, const Packing& packing,
                  const std::string& tensor, const PackedSpec& spec, RowRange rows,
                  std::uint8_t* out) {
  const auto unpack =
      packing.word == DType::kU8 ? unpack_words<std::uint8_t> : unpack_words<std::uint32_t>;
  unpack(words.data(), packing, tensor, spec, rows, out);
}

std::vector<std::uint8_t> stray_bits(std::span<const std::uint8_t> bytes, const Packing& packing,
                                     std::int64_t numel) {
  if (packing.word != DType::kI32) return {};
  constexpr std::uint32_t kTopBits = 0xC0000000U;
  const auto words = static_cast<std::int64_t>(bytes.size() / sizeof(std::uint32_t));
  if (words == 0) return {};
  const std::int64_t whole = numel / words;  // parts without padding
  const auto stray_at = [&](std::int64_t i) {
    // Word i misses part k if k * words + i >= numel.
    const std::int64_t parts = whole + (i < numel % words ? 1 : 0);
    const std::uint32_t codes =
        parts == 0 ? 0 : ~((std::uint32_t{1} << packing.shift(parts - 1)) - 1) & ~kTopBits;
    return word_at<std::uint32_t>(bytes.data(), i) & ~codes;
  };
  std::uint32_t any = 0;
  for (std::int64_t i = 0; i < words; ++i) any |= stray_at(i);
  if (any == 0) return {};
  std::vector<std::uint8_t> out(bytes.size());
  for (std::int64_t i = 0; i < words; ++i) {
    const std::uint32_t stray = stray_at(i);
    std::memcpy(out.data() + static_cast<std::size_t>(i) * sizeof(stray), &stray, sizeof(stray));
  }
  return out;
}

std::vector<std::uint8_t> codes_as_numbers(const PackedView& w, DType dtype) {
  const PackedSpec& spec = w.spec;
  const std::int64_t code_bytes = layout_of(spec).code_bytes;
  const std::int64_t item = static_cast<std::int64_t>(dtype_size(dtype));
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(spec.rows * spec.cols * item));
  std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    unpack_row(spec.bits, w.codes.data() + r * code_bytes, spec.cols, row.data());
    const std::vector<float> numbers(row.begin(), row.end());
    narrow_from_f32(dtype, numbers.data(), spec.cols, bytes.data() + r * spec.cols * item);
  }
  return bytes;
}

void codes_from_numbers(const TensorView& numbers, const std::string& tensor,
                        const PackedSpec& spec, RowRange rows, std::uint8_t* out) {
  const std::int64_t item = static_cast<std::int64_t>(dtype_size(numbers.dtype));
  const auto limit = static_cast<float>((1 << spec.bits) - 1);
  std::vector<float> wide(static_cast<std::size_t>(spec.cols));
  pack_rows(spec, rows, out, [&](std::int64_t r, std::uint8_t* row) {
    widen_to_f32(numbers.dtype, numbers.bytes.data() + r * spec.cols * item, spec.cols,
                 wide.data());
    for (std::size_t c = 0; c < wide.size(); ++c) {
      if (!(wide[c] >= 0.0F && wide[c] <= limit && wide[c] == std::rint(wide[c]))) {
        fail(Errc::kCorrupt,
             "hqq: " + tensor + " holds " + std::to_string(wide[c]) + ", expected codes 0 to " +
                 std::to_string(static_cast<int>(limit)),
             {.path = {}, .tensor = tensor});
      }
      row[c] = static_cast<std::uint8_t>(wide[c]);
    }
  });
}

}  // namespace quantal::hqq
