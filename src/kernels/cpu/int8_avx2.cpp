#include "kernels/cpu/int8_inl.h"
#include "kernels/cpu/vec_avx2.h"

namespace quantal {
namespace {

std::int32_t sum_lanes(__m256i a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

/// 16 bytes as 16-bit numbers; vpmaddwd is exact, vpmaddubsw would saturate.
struct DotAvx2 {
  static __m128i bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

  template <int kRows, int kInputs>
  static void run(const Int8Tile& t, int row, int input, std::int32_t* sums) {
    __m256i acc[kInputs][kRows];
    for (auto& one : acc) {
      for (auto& a : one) a = _mm256_setzero_si256();
    }
    for (std::int64_t k = 0; k < t.cols; k += 16) {
      __m256i codes[kRows];
      for (int r = 0; r < kRows; ++r) {
        codes[r] = _mm256_cvtepu8_epi16(bytes(t.codes + (row + r) * t.code_stride + k));
      }
      for (int m = 0; m < kInputs; ++m) {
        const __m256i x = _mm256_cvtepi8_epi16(bytes(t.x + (input + m) * t.x_stride + k));
        for (int r = 0; r < kRows; ++r) {
          acc[m][r] = _mm256_add_epi32(acc[m][r], _mm256_madd_epi16(codes[r], x));
        }
      }
    }
    for (int m = 0; m < kInputs; ++m) {
      for (int r = 0; r < kRows; ++r) {
        sums[(input + m) * kInt8Rows + row + r] = sum_lanes(acc[m][r]);
      }
    }
  }
};

}  // namespace

const Int8Kernels& int8_kernels_avx2() {
  static constexpr Int8Kernels kKernels = {round_and_mark<VecAvx2>, quantize_activations<VecAvx2>,
                                           dot_tile<DotAvx2>};
  return kKernels;
}

}  // namespace quantal
