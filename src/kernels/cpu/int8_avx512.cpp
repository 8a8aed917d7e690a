#include "kernels/cpu/int8_inl.h"
#include "kernels/cpu/vec_avx512.h"

namespace quantal {
namespace {

/// Bytes [k, k + kBytes) of a row, zero from `end` on.
template <int kBytes>
__mmask64 bytes_left(std::int64_t k, std::int64_t end) {
  const std::int64_t n = end - k;
  if (n >= kBytes) return kBytes == 64 ? ~__mmask64{0} : (__mmask64{1} << (kBytes % 64)) - 1;
  return (__mmask64{1} << n) - 1;
}

/// 32 bytes as 16-bit numbers.
struct DotWords {
  static __m256i bytes(const void* p, __mmask64 m) {
    return _mm256_maskz_loadu_epi8(static_cast<__mmask32>(m), p);
  }

  template <int kRows, int kInputs>
  static void run(const Int8Tile& t, int row, int input, std::int32_t* sums) {
    __m512i acc[kInputs][kRows];
    for (auto& one : acc) {
      for (auto& a : one) a = _mm512_setzero_si512();
    }
    for (std::int64_t k = 0; k < t.cols; k += 32) {
      const __mmask64 mask = bytes_left<32>(k, t.cols);
      __m512i codes[kRows];
      for (int r = 0; r < kRows; ++r) {
        codes[r] = _mm512_cvtepu8_epi16(bytes(t.codes + (row + r) * t.code_stride + k, mask));
      }
      for (int m = 0; m < kInputs; ++m) {
        const __m512i x = _mm512_cvtepi8_epi16(bytes(t.x + (input + m) * t.x_stride + k, mask));
        for (int r = 0; r < kRows; ++r) {
          acc[m][r] = _mm512_add_epi32(acc[m][r], _mm512_madd_epi16(codes[r], x));
        }
      }
    }
    for (int m = 0; m < kInputs; ++m) {
      for (int r = 0; r < kRows; ++r) {
        sums[(input + m) * kInt8Rows + row + r] = _mm512_reduce_add_epi32(acc[m][r]);
      }
    }
  }
};

/// 64 bytes, four products to a lane in one instruction.
struct DotVnni {
  template <int kRows, int kInputs>
  [[gnu::target("avx512vnni")]] static void run(const Int8Tile& t, int row, int input,
                                                std::int32_t* sums) {
    __m512i acc[kInputs][kRows];
    for (auto& one : acc) {
      for (auto& a : one) a = _mm512_setzero_si512();
    }
    for (std::int64_t k = 0; k < t.cols; k += 64) {
      const __mmask64 mask = bytes_left<64>(k, t.cols);
      __m512i codes[kRows];
      for (int r = 0; r < kRows; ++r) {
        codes[r] = _mm512_maskz_loadu_epi8(mask, t.codes + (row + r) * t.code_stride + k);
      }
      for (int m = 0; m < kInputs; ++m) {
        const __m512i x = _mm512_maskz_loadu_epi8(mask, t.x + (input + m) * t.x_stride + k);
        for (int r = 0; r < kRows; ++r) {
          acc[m][r] = _mm512_dpbusd_epi32(acc[m][r], codes[r], x);
        }
      }
    }
    for (int m = 0; m < kInputs; ++m) {
      for (int r = 0; r < kRows; ++r) {
        sums[(input + m) * kInt8Rows + row + r] = _mm512_reduce_add_epi32(acc[m][r]);
      }
    }
  }
};

}  // namespace

const Int8Kernels& int8_kernels_avx512(bool vnni) {
  static constexpr Int8Kernels kWords = {round_and_mark<VecAvx512>, quantize_activations<VecAvx512>,
                                         dot_tile<DotWords>};
  static constexpr Int8Kernels kVnni = {round_and_mark<VecAvx512>, quantize_activations<VecAvx512>,
                                        dot_tile<DotVnni>};
  return vnni ? kVnni : kWords;
}

}  // namespace quantal
