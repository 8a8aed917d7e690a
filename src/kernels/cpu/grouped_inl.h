// The grouped quantizer primitives for one vector width; see kernels/grouped.h for what each one
// does. A file compiled for one instruction set defines QUANTAL_LANES and QUANTAL_QUANTIZE_SET, and
// includes this once.
#pragma once

#include <utility>

#include "kernels/cpu/quantize_lanes_inl.h"
#include "kernels/grouped.h"
#include "kernels/small_float.h"

namespace quantal {
namespace {

// ------------------------------------------------------------------ integer keys

// Extremes are found on the bit patterns, half as wide for 16-bit weights: k = b ^ (b >> 15 &
// 0x7FFF) as signed integers are ordered as the floats b are (-0 just below +0), and NaN lies
// beyond the infinities on both sides.

template <class K, int kLanes>
struct KeyVector {
  typedef K type __attribute__((vector_size(sizeof(K) * kLanes)));  // NOLINT: needs a typedef
};
template <class K, int kLanes>
using Keys = typename KeyVector<K, kLanes>::type;

template <class K>
constexpr int kSignShift = static_cast<int>(8 * sizeof(K) - 1);
template <class K>
constexpr K kMagnitudeMask = std::numeric_limits<K>::max();

template <class K>
inline K key_of(K bits) {
  return static_cast<K>(bits ^ ((bits >> kSignShift<K>)&kMagnitudeMask<K>));
}

/// The first and the second half of the lanes.
template <class K, int kLanes, std::size_t... kIndex>
inline void halves(Keys<K, kLanes> v, Keys<K, kLanes / 2>* low, Keys<K, kLanes / 2>* high,
                   std::index_sequence<kIndex...>) {
  *low = __builtin_shufflevector(v, v, kIndex...);
  *high = __builtin_shufflevector(v, v, (kIndex + kLanes / 2)...);
}

/// Smallest lane.
template <class K, int kLanes>
inline K smallest(Keys<K, kLanes> v) {
  if constexpr (kLanes == 2) {
    return v[0] < v[1] ? v[0] : v[1];
  } else {
    Keys<K, kLanes / 2> low, high;
    halves<K, kLanes>(v, &low, &high, std::make_index_sequence<kLanes / 2>());
    return smallest<K, kLanes / 2>(low < high ? low : high);
  }
}

/// Facts of a weight type: its bit patterns as signed integers.
template <DType kType>
struct Bits {
  using Key = std::int16_t;
  static constexpr Key kInfinity = kType == DType::kF16 ? 0x7C00 : 0x7F80;
  static float value(Key bits) {
    const auto u = static_cast<std::uint16_t>(bits);
    return kType == DType::kF16 ? f16_to_f32(u) : bf16_to_f32(u);
  }
};
template <>
struct Bits<DType::kF32> {
  using Key = std::int32_t;
  static constexpr Key kInfinity = 0x7F800000;
  static float value(Key bits) { return std::bit_cast<float>(bits); }
};

/// Extremes of a group of n weights (a multiple of 32 / sizeof(Key) and of 16).
template <DType kType>
inline bool range_of(const typename Bits<kType>::Key* data, std::int64_t n, float* low,
                     float* high) {
  using K = typename Bits<kType>::Key;
  constexpr int kLanes = kWidth * 4 / static_cast<int>(sizeof(K));
  using V = Keys<K, kLanes>;
  const auto key_at = [data](std::int64_t i) {
    const V b = load_as<V>(data + i);
    return b ^ ((b >> kSignShift<K>)&kMagnitudeMask<K>);
  };
  V least = key_at(0), most = least;
  for (std::int64_t i = kLanes; i < n; i += kLanes) {
    const V k = key_at(i);
    least = k < least ? k : least;
    most = k > most ? k : most;
  }
  const K low_key = smallest<K, kLanes>(least);
  const K high_key = static_cast<K>(~smallest<K, kLanes>(~most));
  *low = Bits<kType>::value(key_of(low_key));
  *high = Bits<kType>::value(key_of(high_key));
  return high_key < Bits<kType>::kInfinity && low_key > static_cast<K>(~Bits<kType>::kInfinity);
}

/// Largest magnitude of a group of n weights (a multiple of 16).
template <DType kType>
inline bool largest_of(const typename Bits<kType>::Key* data, std::int64_t n, float* largest) {
  using K = typename Bits<kType>::Key;
  constexpr int kLanes = kVirtual < kWidth * 4 / static_cast<int>(sizeof(K))
                             ? kVirtual
                             : kWidth * 4 / static_cast<int>(sizeof(K));
  using V = Keys<K, kLanes>;
  V most = {};
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const V magnitudes = load_as<V>(data + i) & kMagnitudeMask<K>;
    most = magnitudes > most ? magnitudes : most;
  }
  const K bits = static_cast<K>(~smallest<K, kLanes>(~most));
  *largest = Bits<kType>::value(bits);
  return bits < Bits<kType>::kInfinity;
}

/// Writes the low bytes of kWidth lanes.
inline void store_bytes(I lanes, std::uint8_t* out) {
  using B = std::uint8_t __attribute__((vector_size(kWidth)));
  const B bytes = __builtin_convertvector(lanes, B);
  std::memcpy(out, &bytes, sizeof(bytes));
}

// ------------------------------------------------------------------ anchored affine codes

constexpr std::int64_t kBatch = 16;  ///< groups whose statistics are computed side by side
constexpr float kRoundMagic = 0x1.8p23F;

/// rint for any finite x.
inline F rint_of(F x) {
  const F a = abs_of(x);
  const F rounded = (a + 0x1p23F) - 0x1p23F;
  const F kept = a < 0x1p23F ? rounded : a;
  return (F)((I)kept | ((I)x & all(std::int32_t{-0x7FFFFFFF - 1})));
}

/// Scales and biases from extremes, kBatch groups at once.
inline void anchor(const float* lows, const float* highs, int bits, float* scales, float* biases) {
  const F top = all(static_cast<float>((1 << bits) - 1)), tiny = all(kTinyScale);
  for (std::int64_t g = 0; g < kBatch; g += kWidth) {
    const F low = load_as<F>(lows + g), high = load_as<F>(highs + g);
    const F range = high - low;
    const F step = bits == 1 ? range : range / top;
    const F s = step > tiny ? step : tiny;
    F scale = s, bias = low;
    if (bits != 1) {
      const I at_low = abs_of(low) > abs_of(high);
      const F edge = at_low ? low : high;
      const F signed_scale = at_low ? s : -s;
      const F q0 = rint_of(edge / signed_scale);
      const I zero = q0 == F{};
      scale = zero ? signed_scale : edge / q0;
      bias = zero ? F{} : edge;
    }
    std::memcpy(scales + g, &scale, sizeof(scale));
    std::memcpy(biases + g, &bias, sizeof(bias));
  }
}

template <DType kType>
inline void encode_affine_group(const Reader<kType>& in, std::int64_t begin, std::int64_t n,
                                float scale, float bias, float top, std::uint8_t* codes) {
  const F scales = all(scale), biases = all(bias), tops = all(top);
  for (std::int64_t i = 0; i < n; i += kWidth) {
    F x = (in.vec(begin + i) - biases) / scales;
    x = x > F{} ? x : F{};
    x = x < tops ? x : tops;
    store_bytes((I)(x + kRoundMagic) & 0xFF, codes + i);
  }
}

template <DType kType>
bool anchored_run(const AnchoredRun& run) {
  using Key = typename Bits<kType>::Key;
  const auto* data = static_cast<const Key*>(run.weights.data);
  const Reader<kType> in(run.weights.data);
  const auto top = static_cast<float>((1 << run.bits) - 1);
  alignas(64) float lows[kBatch] = {}, highs[kBatch] = {}, scales[kBatch], biases[kBatch];
  for (std::int64_t first = 0; first < run.groups; first += kBatch) {
    const std::int64_t count = run.groups - first < kBatch ? run.groups - first : kBatch;
    bool finite = true;
    for (std::int64_t g = 0; g < count; ++g) {
      const std::int64_t begin = (first + g) * run.group_size;
      finite &= range_of<kType>(data + begin, run.group_size, &lows[g], &highs[g]);
      if (run.bits == 1 && lows[g] == 0.0F) {  // the sign of the bias is that of the first zero
        std::int64_t i = begin;
        while (in.one(i) != 0.0F) ++i;
        lows[g] = in.one(i);
      }
    }
    if (!finite) return false;
    anchor(lows, highs, run.bits, scales, biases);
    for (std::int64_t g = 0; g < count; ++g) {
      const std::int64_t begin = (first + g) * run.group_size;
      encode_affine_group(in, begin, run.group_size, scales[g], biases[g], top, run.codes + begin);
    }
    const auto bytes = static_cast<std::size_t>(count) * sizeof(float);
    std::memcpy(run.scales + first, scales, bytes);
    std::memcpy(run.biases + first, biases, bytes);
  }
  return true;
}

bool encode_anchored(const AnchoredRun& run) {
  if (run.weights.dtype == DType::kF16) return anchored_run<DType::kF16>(run);
  if (run.weights.dtype == DType::kBF16) return anchored_run<DType::kBF16>(run);
  return anchored_run<DType::kF32>(run);
}

// ------------------------------------------------------------------ microscaled codes

/// Rounds to the weight type. |v| < 64; binary16 subnormals are left with too many bits, all far
/// below the smallest code.
template <DType kType>
inline F rounded(F v) {
  constexpr int kDrop = kType == DType::kF16 ? 13 : 16;
  if constexpr (kType == DType::kF32) return v;
  const I u = (I)v;
  const I half = (u >> kDrop & 1) + ((1 << (kDrop - 1)) - 1);
  return (F)((u + half) & -(1 << kDrop));
}

/// E2M1 codes of |v| < 64; ties go to the lower magnitude, nothing becomes -0.
inline I e2m1_codes(F v) {
  const F a = abs_of(v);
  I below = (a > 0.25F) + (a > 0.75F) + (a > 1.25F) + (a > 1.75F);
  below += (a > 2.5F) + (a > 3.5F) + (a > 5.0F);
  return -below | ((((I)v >> 28) & 8) & (below != 0));
}

/// E4M3 codes, half to even, magnitudes above 448 become 448.
inline I e4m3_codes(F v) {
  F a = abs_of(v);
  a = a < kE4M3Max ? a : all(kE4M3Max);
  const I bits = (I)a;
  const I normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3);
  const I small = (I)(a + 0x1p14F) & 15;
  return (a < 0x1p-6F ? small : normal) | (((I)v >> 24) & 0x80);
}

template <DType kType>
inline void encode_scaled(const MicroscaledRun& run, std::int64_t begin, float divisor) {
  const Reader<kType> in(run.weights.data);
  std::uint8_t* codes = run.codes + begin;
  // Dividing by a power of two is exact in every weight type but for numbers far below the codes.
  const F inverse = all(1.0F / divisor), divisors = all(divisor);
  if (run.element == CodeMap::kE4M3) {
    for (std::int64_t i = 0; i < run.group_size; i += kWidth) {
      store_bytes(e4m3_codes(in.vec(begin + i) * inverse), codes + i);
    }
    return;
  }
  const bool power = run.scale == ScaleSource::kE8M0;
  for (std::int64_t i = 0; i < run.group_size; i += kWidth) {
    const F x = in.vec(begin + i);
    store_bytes(e2m1_codes(power ? x * inverse : rounded<kType>(x / divisors)), codes + i);
  }
}

/// Any divisor, 0 and subnormals included, and any quotient.
template <DType kType>
void encode_scaled_slowly(const MicroscaledRun& run, std::int64_t begin, float divisor) {
  const Reader<kType> in(run.weights.data);
  for (std::int64_t i = begin; i < begin + run.group_size; ++i) {
    const float v = rounded_to(kType, in.one(i) / divisor);
    run.codes[i] = run.element == CodeMap::kE2M1 ? nearest_e2m1(v) : e4m3_from_f32(v);
  }
}

template <DType kType>
bool microscaled_run(const MicroscaledRun& run) {
  const auto* data = static_cast<const typename Bits<kType>::Key*>(run.weights.data);
  const float most = run.element == CodeMap::kE2M1 ? kE2M1Max : kE4M3Max;
  for (std::int64_t g = 0; g < run.groups; ++g) {
    const std::int64_t begin = g * run.group_size;
    float largest = 0;
    if (!largest_of<kType>(data + begin, run.group_size, &largest)) return false;
    const float unit = rounded_to(kType, largest / most);
    float divisor = 1;
    bool plain = true;
    if (run.scale == ScaleSource::kE8M0) {
      const int e = unit == 0 ? 0 : ceil_log2(unit);
      run.scales[g] = static_cast<std::uint8_t>(e + 127);
      divisor = power_of_two(e);
      plain = e >= -126;
    } else {
      run.scales[g] = e4m3_from_f32(unit);
      divisor = e4m3_magnitude(run.scales[g]);
      plain = largest < divisor * 32.0F;  // so that every |v| < 64
    }
    if (plain) {
      encode_scaled<kType>(run, begin, divisor);
    } else {
      encode_scaled_slowly<kType>(run, begin, divisor);
    }
  }
  return true;
}

bool encode_microscaled(const MicroscaledRun& run) {
  if (run.weights.dtype == DType::kF16) return microscaled_run<DType::kF16>(run);
  if (run.weights.dtype == DType::kBF16) return microscaled_run<DType::kBF16>(run);
  return microscaled_run<DType::kF32>(run);
}

// ------------------------------------------------------------------ narrowing

inline I f16_bits(F v) {
  const I u = (I)v, a = u & 0x7FFFFFFF;
  const I normal = (a - 0x38000000 + 0xFFF + (a >> 13 & 1)) >> 13;
  const I small = (I)((F)a + 0.5F) - 0x3F000000;
  const I finite = a < 0x38800000 ? small : normal;
  return (a < 0x477FF000 ? finite : all(std::int32_t{0x7C00})) | ((u >> 16) & 0x8000);
}

inline I bf16_bits(F v) {
  const I u = (I)v;
  return (u + 0x7FFF + (u >> 16 & 1)) >> 16;
}

void narrow(DType dtype, const float* in, std::int64_t n, void* out) {
  if (dtype == DType::kF32) {
    std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(float));
    return;
  }
  auto* halves_out = static_cast<std::uint16_t*>(out);
  const bool half = dtype == DType::kF16;
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const F v = load_as<F>(in + i);
    const I bits = (half ? f16_bits(v) : bf16_bits(v)) & 0xFFFF;
    const H narrow_bits = __builtin_convertvector(bits, H);
    std::memcpy(halves_out + i, &narrow_bits, sizeof(narrow_bits));
  }
  for (; i < n; ++i) halves_out[i] = half ? f32_to_f16(in[i]) : f32_to_bf16(in[i]);
}

constexpr GroupedKernels kKernels = {QUANTAL_QUANTIZE_SET, encode_anchored, encode_microscaled,
                                     narrow};

}  // namespace
}  // namespace quantal
