// The quantizer primitives for one vector width; see kernels/quantize.h for what each one does. A
// file compiled for one instruction set defines QUANTAL_LANES and QUANTAL_QUANTIZE_SET, and
// includes this once.
#pragma once

#include "kernels/cpu/quantize_lanes_inl.h"

namespace quantal {
namespace {

/// Calls body(i, parts, valid) for each 16 elements of a run; `parts` are kParts registers, lanes
/// beyond `valid` hold `fill`.
template <class In, class Body>
inline void for_each_16(const In& in, std::int64_t n, float fill, Body body) {
  std::int64_t i = 0;
  for (; i + kVirtual <= n; i += kVirtual) {
    F parts[kParts];
    for (int p = 0; p < kParts; ++p) parts[p] = in.vec(i + p * kWidth);
    body(i, parts, std::int64_t{kVirtual});
  }
  if (i == n) return;
  alignas(64) float tail[kVirtual];
  read_tail(in, i, n - i, fill, tail);
  F parts[kParts];
  for (int p = 0; p < kParts; ++p) parts[p] = load_as<F>(tail + p * kWidth);
  body(i, parts, n - i);
}

// ------------------------------------------------------------------ absmax, table codes

float absmax(WeightRun w, std::int64_t n) {
  return with_reader(w, [n](const auto& in) {
    I most[kParts] = {};
    for_each_16(in, n, 0.0F, [&](std::int64_t, const F* x, std::int64_t) {
      for (int p = 0; p < kParts; ++p) {
        const I m = magnitude(x[p]);
        most[p] = m > most[p] ? m : most[p];
      }
    });
    std::int32_t lanes[kVirtual];
    std::memcpy(lanes, most, sizeof(lanes));
    std::int32_t top = 0;
    for (const std::int32_t l : lanes) top = l > top ? l : top;
    return std::bit_cast<float>(top);
  });
}

/// Writes the low bytes of 16 lanes.
inline void store_codes(const I* lanes, std::int64_t valid, std::uint8_t* out) {
  alignas(64) std::int32_t wide[kVirtual];
  std::memcpy(wide, lanes, sizeof(wide));
  if (valid == kVirtual) {
    for (int l = 0; l < kVirtual; ++l) out[l] = static_cast<std::uint8_t>(wide[l]);
    return;
  }
  for (int l = 0; l < valid; ++l) out[l] = static_cast<std::uint8_t>(wide[l]);
}

/// Number of thresholds below s, lane by lane: a four-step search whose tables are selects.
inline I count_below(const float* t, F s) {
  const I above7 = s > t[7];
  const F t8 = above7 ? all(t[11]) : all(t[3]);
  const I above8 = s > t8;
  const F low4 = above8 ? all(t[5]) : all(t[1]);
  const F high4 = above8 ? all(t[13]) : all(t[9]);
  const I above4 = s > (above7 ? high4 : low4);
  const F q0 = above4 ? all(t[2]) : all(t[0]);
  const F q1 = above4 ? all(t[6]) : all(t[4]);
  const F q2 = above4 ? all(t[10]) : all(t[8]);
  const F q3 = above4 ? all(t[14]) : all(t[12]);
  const F low2 = above8 ? q1 : q0;
  const F high2 = above8 ? q3 : q2;
  const I above2 = s > (above7 ? high2 : low2);
  return (above7 & 8) | (above8 & 4) | (above4 & 2) | (above2 & 1);
}

template <bool kDivide, class In>
inline void encode_table_run(const TableQuantizer& table, const In& in, std::int64_t n,
                             float factor, std::uint8_t* codes) {
  bool identity = true;
  for (std::size_t i = 0; i < 16; ++i) identity = identity && table.codes[i] == i;
  for_each_16(in, n, 0.0F, [&](std::int64_t i, const F* x, std::int64_t valid) {
    I below[kParts];
    for (int p = 0; p < kParts; ++p) {
      F s = kDivide ? x[p] / factor : x[p] * factor;
      s = s > -1.0F ? s : all(-1.0F);
      s = s < 1.0F ? s : all(1.0F);
      below[p] = count_below(table.thresholds.data(), s);
    }
    store_codes(below, valid, codes + i);
    if (identity) return;
    for (std::int64_t l = 0; l < valid; ++l) codes[i + l] = table.codes[codes[i + l]];
  });
}

void encode_table(const TableQuantizer& table, WeightRun w, std::int64_t n, float factor,
                  bool divide, std::uint8_t* codes) {
  with_reader(w, [&](const auto& in) {
    if (divide) {
      encode_table_run<true>(table, in, n, factor, codes);
    } else {
      encode_table_run<false>(table, in, n, factor, codes);
    }
  });
}

// ------------------------------------------------------------------ ranges

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int32_t kInfinityBits = 0x7F800000;

inline bool any_not_finite(const I* most) {
  std::int32_t lanes[kVirtual];
  std::memcpy(lanes, most, sizeof(lanes));
  for (const std::int32_t l : lanes) {
    if (l >= kInfinityBits) return true;
  }
  return false;
}

/// The first weight that is a zero: of -0 and +0 the earlier one is the extreme of a group.
template <class In>
inline float first_zero(const In& in, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    if (in.one(i) == 0.0F) return in.one(i);
  }
  return 0.0F;
}

Range range(WeightRun w, std::int64_t n) {
  return with_reader(w, [n](const auto& in) {
    const float first = in.one(0);  // fills the lanes beyond the end: it changes no extreme
    F low[kParts], high[kParts];
    I most[kParts] = {};
    for (int p = 0; p < kParts; ++p) low[p] = high[p] = all(first);
    for_each_16(in, n, first, [&](std::int64_t, const F* x, std::int64_t) {
      for (int p = 0; p < kParts; ++p) {
        const I m = magnitude(x[p]);
        low[p] = x[p] < low[p] ? x[p] : low[p];
        high[p] = x[p] > high[p] ? x[p] : high[p];
        most[p] = m > most[p] ? m : most[p];
      }
    });
    float lows[kVirtual], highs[kVirtual];
    std::memcpy(lows, low, sizeof(lows));
    std::memcpy(highs, high, sizeof(highs));
    float lowest = lows[0], highest = highs[0];
    for (int l = 1; l < kVirtual; ++l) {
      lowest = lows[l] < lowest ? lows[l] : lowest;
      highest = highs[l] > highest ? highs[l] : highest;
    }
    if (lowest == 0.0F) lowest = first_zero(in, n);
    if (highest == 0.0F) highest = first_zero(in, n);
    return Range{lowest, highest, !any_not_finite(most)};
  });
}

/// One row of `count` neighbouring columns, padded with `fill` to a multiple of kWidth.
template <class In>
inline void read_row(const In& in, std::int64_t i, std::int64_t count, float fill, F* out) {
  std::int64_t j = 0;
  for (; j + kWidth <= count; j += kWidth) out[j / kWidth] = in.vec(i + j);
  if (j == count) return;
  alignas(64) float tail[kWidth];
  for (std::int64_t l = 0; l < kWidth; ++l) tail[l] = j + l < count ? in.one(i + j + l) : fill;
  out[j / kWidth] = load_as<F>(tail);
}

constexpr std::int64_t kColumnVectors = kColumnBlock / kWidth;

bool range_columns(WeightRun w, std::int64_t n, std::int64_t stride, std::int64_t count, float* low,
                   float* high) {
  return with_reader(w, [=](const auto& in) {
    const std::int64_t vectors = ceil_div(count, kWidth);
    F lo[kColumnVectors], hi[kColumnVectors], x[kColumnVectors];
    I most = {};
    for (std::int64_t v = 0; v < vectors; ++v) {
      lo[v] = all(kInfinity);
      hi[v] = all(-kInfinity);
    }
    for (std::int64_t i = 0; i < n; ++i) {
      read_row(in, i * stride, count, 0.0F, x);
      for (std::int64_t v = 0; v < vectors; ++v) {
        const I m = magnitude(x[v]);
        lo[v] = x[v] < lo[v] ? x[v] : lo[v];
        hi[v] = x[v] > hi[v] ? x[v] : hi[v];
        most = m > most ? m : most;
      }
    }
    std::memcpy(low, lo, static_cast<std::size_t>(count) * sizeof(float));
    std::memcpy(high, hi, static_cast<std::size_t>(count) * sizeof(float));
    I lanes[kParts] = {};
    lanes[0] = most;
    return !any_not_finite(lanes);
  });
}

// ------------------------------------------------------------------ affine codes, solver

/// A group's parameters, one per lane.
struct LaneCode {
  F scale, zero;
};

/// rint(clamp(x, 0, max_code)) with the integer in the low bits of `bits`.
inline F affine_code(F w, LaneCode c, float max_code, I* bits) {
  constexpr float kRound = 0x1.8p23F;
  F x = w * c.scale + c.zero;
  x = x > 0.0F ? x : F{};
  x = x < max_code ? x : all(max_code);
  const F shifted = x + kRound;
  *bits = (I)shifted;
  return shifted - kRound;
}

template <bool kShrink>
inline F solver_term(F w, LaneCode c, float max_code, F* residual) {
  I unused;
  const F q = affine_code(w, c, max_code, &unused);
  const F r = (q - c.zero) / c.scale;
  const F d = w - r;
  const F a = abs_of(d);
  *residual = a;
  if constexpr (!kShrink) return q - w * c.scale;
  const F shrunk = a - kSolverInverseBeta * power_of(a);
  const F kept = shrunk > 0.0F ? shrunk : F{};
  const F e = (F)((I)kept | ((I)d & all(std::int32_t{-0x7FFFFFFF - 1})));
  return q - (w - e) * c.scale;
}

/// Sum of the virtual lanes: lane l += lane l + 8, 4, 2, 1.
inline double fold(const D* lanes) {
  constexpr int kLanes = kWidth / 2;
  D sum[2 * kParts];
  std::memcpy(sum, lanes, sizeof(sum));
  for (int half = kParts; half > 0; half /= 2) {
    for (int v = 0; v < half; ++v) sum[v] += sum[v + half];
  }
  alignas(64) double d[kLanes];
  std::memcpy(d, sum, sizeof(d));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) d[l] += d[l + half];
  }
  return d[0];
}

/// `largest` receives the largest residual; with kShrink false the sums are right only if it is at
/// most kSolverNoShrink (then the shrunken residual is exactly zero everywhere).
template <bool kShrink, class In>
inline SolverSums solver_run(const In& in, std::int64_t n, AffineCode code, float* largest) {
  D zero[2 * kParts] = {}, error[2 * kParts] = {};
  F top[kParts] = {};
  const LaneCode c = {all(code.scale), all(code.zero)};
  for_each_16(in, n, 0.0F, [&](std::int64_t, const F* x, std::int64_t valid) {
    F term[kParts], residual[kParts];
    for (int p = 0; p < kParts; ++p) {
      term[p] = solver_term<kShrink>(x[p], c, code.max_code, &residual[p]);
    }
    if (valid < kVirtual) {
      float* t = reinterpret_cast<float*>(term);
      float* r = reinterpret_cast<float*>(residual);
      for (std::int64_t l = valid; l < kVirtual; ++l) t[l] = r[l] = 0.0F;
    }
    for (int p = 0; p < kParts; ++p) {
      zero[2 * p] += low_half(term[p]);
      zero[2 * p + 1] += high_half(term[p]);
      error[2 * p] += low_half(residual[p]);
      error[2 * p + 1] += high_half(residual[p]);
      top[p] = residual[p] > top[p] ? residual[p] : top[p];
    }
  });
  float lanes[kVirtual];
  std::memcpy(lanes, top, sizeof(lanes));
  *largest = 0;
  for (const float l : lanes) *largest = l > *largest ? l : *largest;
  return {fold(zero), fold(error)};
}

SolverSums solver_step(WeightRun w, std::int64_t n, AffineCode code) {
  return with_reader(w, [=](const auto& in) {
    float largest = 0;
    const SolverSums sums = solver_run<false>(in, n, code, &largest);
    return largest <= kSolverNoShrink ? sums : solver_run<true>(in, n, code, &largest);
  });
}

/// Parameters of up to kColumnBlock groups; unused lanes get scale 1, zero 0.
struct ColumnCodes {
  alignas(64) float scale[kColumnBlock];
  alignas(64) float zero[kColumnBlock];
  ColumnCodes(const float* scales, const float* zeros, std::int64_t count) {
    for (std::int64_t j = 0; j < kColumnBlock; ++j) {
      scale[j] = j < count ? scales[j] : 1.0F;
      zero[j] = j < count ? zeros[j] : 0.0F;
    }
  }
};

/// Sums of up to kColumnBlock groups while rows are added.
struct ColumnSums {
  alignas(64) double zero[kColumnBlock] = {};
  alignas(64) double error[kColumnBlock] = {};
  alignas(64) float largest[kColumnBlock] = {};
};

/// Vectors of columns that are added up at a time: as many as have their sums in registers.
constexpr int kColumnsAtOnce = kWidth == 16 ? 2 : 4;
constexpr std::int64_t kColumnStep = kColumnsAtOnce * kWidth;

/// Adds `rows` rows to the sums of kColumnStep columns from column `j` on; element (i, j) of the
/// columns is element i * stride of `in`.
template <bool kShrink, class In>
inline void add_columns(const In& in, std::int64_t rows, std::int64_t stride, std::int64_t from,
                        std::int64_t j, const ColumnCodes& codes, float max_code,
                        ColumnSums* sums) {
  D zero[2 * kColumnsAtOnce], error[2 * kColumnsAtOnce];
  F top[kColumnsAtOnce];
  LaneCode c[kColumnsAtOnce];
  std::memcpy(zero, sums->zero + j, sizeof(zero));
  std::memcpy(error, sums->error + j, sizeof(error));
  std::memcpy(top, sums->largest + j, sizeof(top));
  for (int v = 0; v < kColumnsAtOnce; ++v) {
    c[v] = {load_as<F>(codes.scale + j + v * kWidth), load_as<F>(codes.zero + j + v * kWidth)};
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    for (int v = 0; v < kColumnsAtOnce; ++v) {
      F residual;
      const F x = in.vec(from + i * stride + v * kWidth);
      const F term = solver_term<kShrink>(x, c[v], max_code, &residual);
      zero[2 * v] += low_half(term);
      zero[2 * v + 1] += high_half(term);
      error[2 * v] += low_half(residual);
      error[2 * v + 1] += high_half(residual);
      top[v] = residual > top[v] ? residual : top[v];
    }
  }
  std::memcpy(sums->zero + j, zero, sizeof(zero));
  std::memcpy(sums->error + j, error, sizeof(error));
  std::memcpy(sums->largest + j, top, sizeof(top));
}

template <bool kShrink, class In>
inline float solver_columns(const In& in, std::int64_t n, std::int64_t stride, std::int64_t count,
                            const ColumnCodes& codes, float max_code, SolverSums* sums) {
  constexpr std::int64_t kTailRows = 32;
  ColumnSums totals;
  std::int64_t j = 0;
  for (; j + kColumnStep <= count; j += kColumnStep) {
    add_columns<kShrink>(in, n, stride, j, j, codes, max_code, &totals);
  }
  for (std::int64_t first = 0; j < count && first < n; first += kTailRows) {
    alignas(64) float tail[kTailRows * kColumnStep] = {};
    const std::int64_t rows = n - first < kTailRows ? n - first : kTailRows;
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t l = 0; j + l < count; ++l) {
        tail[i * kColumnStep + l] = in.one((first + i) * stride + j + l);
      }
    }
    add_columns<kShrink>(Reader<DType::kF32>(tail), rows, kColumnStep, 0, j, codes, max_code,
                         &totals);
  }
  float largest = 0;
  for (std::int64_t k = 0; k < count; ++k) {
    sums[k] = {totals.zero[k], totals.error[k]};
    largest = totals.largest[k] > largest ? totals.largest[k] : largest;
  }
  return largest;
}

void solver_step_columns(WeightRun w, std::int64_t n, std::int64_t stride, std::int64_t count,
                         const float* scale, const float* zero, float max_code, SolverSums* sums) {
  const ColumnCodes codes(scale, zero, count);
  with_reader(w, [&](const auto& in) {
    const float largest = solver_columns<false>(in, n, stride, count, codes, max_code, sums);
    if (largest > kSolverNoShrink) {
      solver_columns<true>(in, n, stride, count, codes, max_code, sums);
    }
  });
}

void encode_affine(WeightRun w, std::int64_t n, AffineCode code, std::uint8_t* codes) {
  const LaneCode c = {all(code.scale), all(code.zero)};
  with_reader(w, [&](const auto& in) {
    for_each_16(in, n, 0.0F, [&](std::int64_t i, const F* x, std::int64_t valid) {
      I bits[kParts];
      for (int p = 0; p < kParts; ++p) affine_code(x[p], c, code.max_code, &bits[p]);
      store_codes(bits, valid, codes + i);
    });
  });
}

void encode_affine_each(WeightRun w, std::int64_t n, const float* scale, const float* zero,
                        float max_code, std::uint8_t* codes) {
  with_reader(w, [&](const auto& in) {
    for_each_16(in, n, 0.0F, [&](std::int64_t i, const F* x, std::int64_t valid) {
      alignas(64) float s[kVirtual] = {}, z[kVirtual] = {};
      std::memcpy(s, scale + i, static_cast<std::size_t>(valid) * sizeof(float));
      std::memcpy(z, zero + i, static_cast<std::size_t>(valid) * sizeof(float));
      I bits[kParts];
      for (int p = 0; p < kParts; ++p) {
        const LaneCode c = {load_as<F>(s + p * kWidth), load_as<F>(z + p * kWidth)};
        affine_code(x[p], c, max_code, &bits[p]);
      }
      store_codes(bits, valid, codes + i);
    });
  });
}

void power(const float* in, std::int64_t n, float* out) {
  const Reader<DType::kF32> reader(in);
  for_each_16(reader, n, 1.0F, [&](std::int64_t i, const F* x, std::int64_t valid) {
    F y[kParts];
    for (int p = 0; p < kParts; ++p) y[p] = power_of(x[p]);
    std::memcpy(out + i, y, static_cast<std::size_t>(valid) * sizeof(float));
  });
}

constexpr QuantizeKernels kKernels = {
    QUANTAL_QUANTIZE_SET, absmax,        encode_table,       range, range_columns, solver_step,
    solver_step_columns,  encode_affine, encode_affine_each, power};

}  // namespace
}  // namespace quantal
