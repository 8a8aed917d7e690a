#include "kernels/cpu/attention_few_inl.h"
#include "kernels/cpu/vec_avx2.h"

namespace quantal {
namespace {

struct FewAvx2 : VecAvx2 {
  static constexpr int kTile = 4;
  /// Four trees at once: halves of a pair of vectors, then pairs of lanes of all four.
  static void sums(const F* a, float scale, float* out) {
    const __m256 even = halves(a[0], a[2]), odd = halves(a[1], a[3]);
    const __m256 w2 =
        _mm256_add_ps(_mm256_shuffle_ps(even, odd, 0x44), _mm256_shuffle_ps(even, odd, 0xEE));
    const __m256 w1 = _mm256_add_ps(w2, _mm256_movehdup_ps(w2));
    const __m128 total =
        _mm_shuffle_ps(_mm256_castps256_ps128(w1), _mm256_extractf128_ps(w1, 1), 0x88);
    _mm_storeu_ps(out, _mm_mul_ps(_mm_set1_ps(scale), total));
  }

 private:
  static __m256 halves(F x, F y) {
    const __m256 a = _mm256_add_ps(x.lo, x.hi), b = _mm256_add_ps(y.lo, y.hi);
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
};

}  // namespace

const FewRowsAttention& few_rows_attention_avx2() {
  static constexpr FewRowsAttention kKernels = {few_rows_part<FewAvx2>, few_rows_finish<FewAvx2>};
  return kKernels;
}

}  // namespace quantal
