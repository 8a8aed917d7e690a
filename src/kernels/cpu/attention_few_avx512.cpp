#include "kernels/cpu/attention_few_inl.h"
#include "kernels/cpu/vec_avx512.h"

namespace quantal {
namespace {

struct FewAvx512 : VecAvx512 {
  static constexpr int kTile = 16;
  /// 16 trees at once: halves of two vectors, quarters of four, pairs of eight. Entering as 0, 4,
  /// 8, ... they end in order.
  static void sums(const F* a, float scale, float* out) {
    F quarters[4];
    for (int i = 0; i < 4; ++i) {
      const F low = halves(a[i], a[4 + i]), high = halves(a[8 + i], a[12 + i]);
      quarters[i] =
          add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
    }
    const F even = pairs(quarters[0], quarters[1]), odd = pairs(quarters[2], quarters[3]);
    const F total = add(_mm512_shuffle_ps(even, odd, 0x88), _mm512_shuffle_ps(even, odd, 0xDD));
    store(out, mul(set1(scale), total));
  }

 private:
  static F halves(F a, F b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  }
  static F pairs(F a, F b) {
    return add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  }
};

}  // namespace

const FewRowsAttention& few_rows_attention_avx512() {
  static constexpr FewRowsAttention kKernels = {few_rows_part<FewAvx512>,
                                                few_rows_finish<FewAvx512>};
  return kKernels;
}

}  // namespace quantal
