#include "kernels/cpu/attention_few_inl.h"
#include "kernels/cpu/vec_neon.h"

namespace quantal {
namespace {

struct FewNeon : VecNeon {
  static constexpr int kTile = 4;
  /// Four trees at once: pairs of lanes of two vectors, then of all four.
  static void sums(const F* a, float scale, float* out) {
    const float32x4_t total = vpaddq_f32(pairs(a[0], a[1]), pairs(a[2], a[3]));
    vst1q_f32(out, vmulq_n_f32(total, scale));
  }

 private:
  static float32x4_t quarter(F x) { return vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d)); }
  static float32x4_t pairs(F x, F y) {
    const float64x2_t a = vreinterpretq_f64_f32(quarter(x)), b = vreinterpretq_f64_f32(quarter(y));
    return vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(a, b)),
                     vreinterpretq_f32_f64(vzip2q_f64(a, b)));
  }
};

}  // namespace

const FewRowsAttention& few_rows_attention_neon() {
  static constexpr FewRowsAttention kKernels = {few_rows_part<FewNeon>, few_rows_finish<FewNeon>};
  return kKernels;
}

}  // namespace quantal
