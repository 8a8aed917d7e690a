// The scalar truth of row-wise int8 codes, and the choice of the active set.
#include <cmath>

#include "core/half.h"
#include "kernels/row_int8.h"
#include "quantal/kernels.h"

namespace quantal {
namespace {

/// Weight i rounded to binary16.
float half_weight(WeightRun w, std::int64_t i) {
  if (w.dtype == DType::kF32) return f16_to_f32(f32_to_f16(static_cast<const float*>(w.data)[i]));
  const std::uint16_t bits = static_cast<const std::uint16_t*>(w.data)[i];
  return f16_to_f32(w.dtype == DType::kF16 ? bits : f32_to_f16(bf16_to_f32(bits)));
}

}  // namespace

void encode_row_int8_scalar(WeightRun w, std::int64_t n, float factor, std::uint8_t* codes) {
  for (std::int64_t i = 0; i < n; ++i) {
    const auto q = static_cast<int>(std::nearbyint(half_weight(w, i) * factor));
    codes[i] = static_cast<std::uint8_t>(q + 128);
  }
}

EncodeRowInt8 row_int8_encoder() {
  [[maybe_unused]] const std::string_view active = active_cpu_kernels();
#if defined(__x86_64__) || defined(__i386__)
  if (active.starts_with("avx512")) return encode_row_int8_avx512;
  if (active == "avx2") return encode_row_int8_avx2;
#elif defined(__aarch64__)
  if (active == "neon") return encode_row_int8_neon;
#endif
  return encode_row_int8_scalar;
}

}  // namespace quantal
