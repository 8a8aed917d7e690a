// Row-wise int8 codes for one vector width; see kernels/row_int8.h. A file compiled for one
// instruction set defines QUANTAL_LANES and includes this once.
#pragma once

#include "kernels/cpu/quantize_lanes_inl.h"
#include "kernels/row_int8.h"

namespace quantal {
namespace {

/// Nearest binary16, as float32. Normal numbers: carry into the 10-bit mantissa. Below 2^-14 the
/// sum with 0.5 has the spacing of subnormal binary16 (2^-24), so the addition itself rounds.
inline F round_to_f16(F x) {
  const I bits = (I)x;
  const I magnitude_bits = bits & all(std::int32_t{0x7FFFFFFF});
  const I normal = (magnitude_bits + 0xFFF + ((magnitude_bits >> 13) & 1)) & ~0x1FFF;
  const F small = ((F)magnitude_bits + 0.5F) - 0.5F;
  const I value = magnitude_bits < 0x38800000 ? (I)small : normal;
  return (F)(value | (bits ^ magnitude_bits));
}

/// rint(x * factor) + 128 in the low byte: 1.5 * 2^23 + 128 has ulp 1, so the sum rounds half to
/// even (128 is even) and leaves the integer in its low bits.
template <bool kRound>
inline I int8_code(F x, float factor) {
  constexpr float kShift = 0x1.8p23F + 128.0F;
  if constexpr (kRound) x = round_to_f16(x);
  return (I)(x * factor + kShift) & 0xFF;
}

template <bool kRound, class In>
inline void encode_run(const In& in, std::int64_t n, float factor, std::uint8_t* codes) {
  using Bytes = std::uint8_t __attribute__((vector_size(kWidth)));
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const auto bytes = __builtin_convertvector(int8_code<kRound>(in.vec(i), factor), Bytes);
    std::memcpy(codes + i, &bytes, sizeof(bytes));
  }
  if (i == n) return;
  alignas(64) float tail[kVirtual];
  read_tail(in, i, n - i, 0.0F, tail);
  const I last = int8_code<kRound>(load_as<F>(tail), factor);
  std::int32_t lanes[kWidth];
  std::memcpy(lanes, &last, sizeof(lanes));
  for (std::int64_t l = 0; l < n - i; ++l) codes[i + l] = static_cast<std::uint8_t>(lanes[l]);
}

void encode_row_int8(WeightRun w, std::int64_t n, float factor, std::uint8_t* codes) {
  switch (w.dtype) {
    case DType::kF16:
      return encode_run<false>(Reader<DType::kF16>(w.data), n, factor, codes);
    case DType::kBF16:
      return encode_run<true>(Reader<DType::kBF16>(w.data), n, factor, codes);
    default:
      return encode_run<true>(Reader<DType::kF32>(w.data), n, factor, codes);
  }
}

}  // namespace
}  // namespace quantal
