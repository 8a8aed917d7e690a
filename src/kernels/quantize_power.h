// Constants of a^-0.3 in float32, shared by all instruction sets.
//
// a = 2^k * m with m in [sqrt(1/2), sqrt(2)); log2(a) = k + t * L(t), t = m - 1; y = -0.3f *
// log2(a); 2^y = 2^rint(y) * E(y - rint(y)). All in double, Horner's rule, product and sum rounded
// separately. |error of log2| < 2.1e-10 and relative error of 2^f < 6e-11, so the result differs
// from the exact power by less than 2e-10 before its one rounding to float32: at most 0.502 ulp.
#pragma once

#include <array>
#include <cstdint>

namespace quantal {

/// Minimax coefficients of log2(1 + t) / t on [sqrt(1/2) - 1, sqrt(2) - 1], lowest power first.
inline constexpr std::array<double, 11> kLog2Poly = {
    1.442695044127225,  -0.7213475125112879,  0.48089750827589,    -0.3606741477846599,
    0.2885915971184013, -0.24047945138962507, 0.20481613443932103, -0.17859280624800522,
    0.1731529479580303, -0.17115022220829534, 0.09732439864455948};
/// Minimax coefficients of 2^f on [-1/2, 1/2], lowest power first.
inline constexpr std::array<double, 8> kExp2Poly = {
    0.99999999995955,    0.6931471805350264,    0.24022651213583965,    0.05550410976102149,
    0.00961802560414318, 0.0013333422652007723, 0.00015469731666656328, 1.5316460127645648e-05};
/// Bits of sqrt(1/2) as a double, where the mantissa range begins.
inline constexpr std::int64_t kSqrtHalfBits = 0x3FE6A09E667F3BCD;
/// The exponent of the solver: float32(0.7 - 1).
inline constexpr float kSolverPower = -0.3F;
/// float32(1 / beta), beta = 10.
inline constexpr float kSolverInverseBeta = 0.1F;
/// For a <= this, a - 0.1 * a^-0.3 is below -0.001, so the shrunken residual is exactly zero: the
/// zero of a - 0.1 a^-0.3 is at 0.1^(1 / 1.3) = 0.1701.
inline constexpr float kSolverNoShrink = 0.169F;

}  // namespace quantal
