// Exact values as bfloat16, with the instruction that rounds to it and the decoders of the products
// (bf16_avx512_inl.h). The instruction takes subnormal numbers for zero, so statistics under which
// a value could be one, and all that has no steps, are left to dequantize_avx512.
#include "kernels/cpu/bf16_avx512_inl.h"

namespace quantal {
namespace {

/// True if numbers are zero or between 2^-30 and 2^100. Where tables and statistics are, values are
/// zero or at least 2^-90: sums are multiples of the last bits of their terms.
bool are_moderate(const float* stats, std::int64_t count) {
  const __m512i least = _mm512_castps_si512(_mm512_set1_ps(0x1p-30F));
  const __m512i most = _mm512_castps_si512(_mm512_set1_ps(0x1p100F));
  __mmask16 others = 0;
  for (std::int64_t k = 0; k < count; k += kLanes) {
    const __mmask16 there = VecAvx512::first(static_cast<int>(min64(kLanes, count - k)));
    const __m512i size =
        _mm512_and_si512(_mm512_castps_si512(_mm512_maskz_loadu_ps(there, stats + k)),
                         _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 outside =
        _mm512_cmplt_epi32_mask(size, least) | _mm512_cmpgt_epi32_mask(size, most);
    others |= outside & _mm512_test_epi32_mask(size, size);
  }
  return others == 0;
}

bool is_moderate(const KernelMatrix& w, std::int64_t columns, const Stretch& stats) {
  const std::int64_t slots = (stats.phase + columns - 1) / slot_columns(w) + 1;
  return are_moderate(stats.scale, slots) &&
         (w.offset == OffsetKind::kNone || w.offset == OffsetKind::kOver127 ||
          are_moderate(stats.offset, slots));
}

bool has_steps(const KernelMatrix& w, const DequantizeJob& job) {
  const int fields = step_fields(w);
  const std::int64_t unit = fields == 1 ? 32 : kLanes * fields;
  return job.out_kind == FloatKind::kBF16 && fields != 0 &&
         (job.col_end - job.col_begin) % unit == 0 && (w.bits > 4 || are_moderate(w.table, kLanes));
}

}  // namespace

void dequantize_avx512bf16(const KernelMatrix& w, const DequantizeJob& job) noexcept {
  if (!has_steps(w, job)) return dequantize_avx512(w, job);
  const DecodeBf16 decode = bf16_decoder<true>(w);
  Stretch stats;
  for (std::int64_t r = job.row_begin; r < job.row_end; ++r) {
    auto* out = static_cast<std::uint16_t*>(job.out) + (r - job.row_begin) * job.ld;
    for (std::int64_t c = job.col_begin; c < job.col_end; c += kStretch, out += kStretch) {
      const std::int64_t n = min64(kStretch, job.col_end - c);
      expand_steps<VecAvx512>(w, r, c, n, stats);
      if (is_moderate(w, n, stats)) {
        decode(w, stats, r, c, 0, n, out);
      } else {
        dequantize_avx512(w, {r, r + 1, c, c + n, job.out_kind, out, job.ld});
      }
    }
  }
}

}  // namespace quantal
