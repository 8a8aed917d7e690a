#include "kernels/cpu/int_inl.h"
#include "kernels/cpu/vec_scalar.h"

namespace quantal {
namespace {

/// One weight row: a lane is a 32-bit word.
struct IntScalar {
  using I = std::uint32_t;
  using F = float;
  static constexpr int kLanes = 1;
  static constexpr int kInputs = 2;
  static constexpr bool kHoldSums = false;
  static constexpr int kDirectInputs = 0;
  static constexpr bool kCopyUnits = false;
  static constexpr bool kHalves = false;
  static constexpr bool kSigned = false;

  static I load_i(const std::int32_t* p) { return static_cast<I>(*p); }
  static void store_i(std::int32_t* p, I a) { *p = static_cast<std::int32_t>(a); }
  static I set1_i(std::int32_t x) { return static_cast<I>(x); }
  static I add_i(I a, I b) { return a + b; }
  static I and_i(I a, I b) { return a & b; }
  static I or_i(I a, I b) { return a | b; }
  static I xor_i(I a, I b) { return a ^ b; }
  template <int kBy>
  static I shift(I a) {
    if constexpr (kBy > 0) return a >> kBy;
    if constexpr (kBy < 0) return a << -kBy;
    return a;
  }
  struct Levels {
    std::uint8_t v[16];
  };
  static Levels load_levels(const std::uint8_t* p) {
    Levels levels;
    __builtin_memcpy(levels.v, p, sizeof(levels.v));
    return levels;
  }
  static I lookup(const Levels& levels, I index) {
    I out = 0;
    for (unsigned i = 0; i < 4; ++i) {
      out |= static_cast<I>(levels.v[index >> 8 * i & 15U]) << 8 * i;
    }
    return out;
  }
  template <bool kWide>
  static I dot(I sum, I u, I x) {
    std::int32_t total = static_cast<std::int32_t>(sum);
    for (unsigned i = 0; i < 4; ++i) {
      const auto q = static_cast<std::int8_t>(x >> 8 * i & 255U);
      total += static_cast<std::int32_t>(u >> 8 * i & 255U) * q;
    }
    return static_cast<I>(total);
  }

  static F load_f(const float* p) { return *p; }
  static void store_f(float* p, F a) { *p = a; }
  static F set1_f(float x) { return x; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  static F to_f(I a) { return static_cast<float>(static_cast<std::int32_t>(a)); }
  static F cast_f(I a) { return std::bit_cast<float>(a); }

  static void transpose(const std::uint8_t* const* rows, std::int64_t offset, std::int64_t n,
                        I* out) {
    out[0] = 0;
    if (n > 0) __builtin_memcpy(out, rows[0] + offset, sizeof(I));
  }
};

}  // namespace

const IntKernels& int_kernels_scalar() {
  static constexpr IntKernels kKernels = int_kernels<VecScalar, IntScalar>();
  return kKernels;
}

}  // namespace quantal
