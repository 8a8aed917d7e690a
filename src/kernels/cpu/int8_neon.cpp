#include "kernels/cpu/int8_inl.h"
#include "kernels/cpu/vec_neon.h"

namespace quantal {
namespace {

/// 16 bytes as 16-bit numbers; products are added to 32-bit lanes.
struct DotNeon {
  template <int kRows, int kInputs>
  static void run(const Int8Tile& t, int row, int input, std::int32_t* sums) {
    int32x4_t acc[kInputs][kRows];
    for (auto& one : acc) {
      for (auto& a : one) a = vdupq_n_s32(0);
    }
    for (std::int64_t k = 0; k < t.cols; k += 16) {
      int16x8_t low[kRows], high[kRows];
      for (int r = 0; r < kRows; ++r) {
        const uint8x16_t codes = vld1q_u8(t.codes + (row + r) * t.code_stride + k);
        low[r] = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes)));
        high[r] = vreinterpretq_s16_u16(vmovl_high_u8(codes));
      }
      for (int m = 0; m < kInputs; ++m) {
        const int8x16_t x = vld1q_s8(t.x + (input + m) * t.x_stride + k);
        const int16x8_t x_low = vmovl_s8(vget_low_s8(x)), x_high = vmovl_high_s8(x);
        for (int r = 0; r < kRows; ++r) {
          acc[m][r] = vmlal_s16(acc[m][r], vget_low_s16(low[r]), vget_low_s16(x_low));
          acc[m][r] = vmlal_high_s16(acc[m][r], low[r], x_low);
          acc[m][r] = vmlal_s16(acc[m][r], vget_low_s16(high[r]), vget_low_s16(x_high));
          acc[m][r] = vmlal_high_s16(acc[m][r], high[r], x_high);
        }
      }
    }
    for (int m = 0; m < kInputs; ++m) {
      for (int r = 0; r < kRows; ++r) {
        sums[(input + m) * kInt8Rows + row + r] = vaddvq_s32(acc[m][r]);
      }
    }
  }
};

}  // namespace

const Int8Kernels& int8_kernels_neon() {
  static constexpr Int8Kernels kKernels = {round_and_mark<VecNeon>, quantize_activations<VecNeon>,
                                           dot_tile<DotNeon>};
  return kKernels;
}

}  // namespace quantal
