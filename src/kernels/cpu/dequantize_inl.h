// Exact values of a rectangle of a packed matrix (quantal/kernels.h, dequantize).
#pragma once

#include "kernels/cpu/decode_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// n float32 values to `kind`.
template <class T>
void narrow(FloatKind kind, const float* in, std::int64_t n, std::uint8_t* out) {
  auto* halves = reinterpret_cast<std::uint16_t*>(out);
  std::int64_t i = 0;
  if (kind == FloatKind::kF16) {
    for (; i + kLanes <= n; i += kLanes) T::store_f16(halves + i, T::load(in + i));
  } else {
    for (; i + kLanes <= n; i += kLanes) T::store_bf16(halves + i, T::load(in + i));
  }
  if (i < n) store_kind_n<T>(kind, T::load(in + i), halves + i, n - i);
}

/// 16-bit output of whole vectors of at most 4 bits: the tables are rounded, not the values.
/// count is a multiple of 16.
template <class T>
void look_up_halves(const KernelMatrix& w, FloatKind kind, std::int64_t row, std::int64_t col,
                    std::int64_t count, std::uint16_t* out) {
  const std::uint8_t* codes = w.codes + row * w.code_bytes;
  alignas(64) std::uint16_t halves[kMaxTables * kLanes];
  with_table_width(w.bits, [&]<class W>(W /*width*/) {
    for_tables<T>(
        w, row, col, count,
        [&](const float* tables, std::int64_t slots, std::int64_t phase, std::int64_t c,
            std::int64_t n) {
          narrow<T>(kind, tables, slots * kLanes, reinterpret_cast<std::uint8_t*>(halves));
          for_groups(w.group_size, phase, n,
                     [&](std::int64_t slot, std::int64_t begin, std::int64_t end) {
                       const typename T::H table = T::load_h(halves + slot * kLanes);
                       for (std::int64_t k = c + begin; k < c + end; k += kLanes) {
                         T::lookup_h(out + k, table,
                                     Codes<typename T::Words, W::kBits>::at(codes, col + k));
                       }
                     });
        });
  });
}

template <class T>
void dequantize_row(const KernelMatrix& w, FloatKind kind, std::int64_t row, std::int64_t col,
                    std::int64_t count, std::uint8_t* out) {
  alignas(64) float scratch[kStretch];
  const std::int64_t full = count / kLanes * kLanes;
  if (kind == FloatKind::kF32) {
    decode_row<T>(w, row, col, full, reinterpret_cast<float*>(out));
    if (full == count) return;
    decode_row<T>(w, row, col + full, count - full, scratch);
    return T::store_n(reinterpret_cast<float*>(out) + full, T::load(scratch),
                      static_cast<int>(count - full));
  }
  const bool tables = w.bits <= 4 && whole_vectors(w, row);
  for (std::int64_t c = 0; c < count; c += kStretch) {
    const std::int64_t n = min64(kStretch, count - c);
    if (tables && n % kLanes == 0) {
      look_up_halves<T>(w, kind, row, col + c, n, reinterpret_cast<std::uint16_t*>(out) + c);
    } else {
      decode_row<T>(w, row, col + c, n, scratch);
      narrow<T>(kind, scratch, n, out + c * 2);
    }
  }
}

template <class T>
void dequantize_kernel(const KernelMatrix& w, const DequantizeJob& job) {
  const std::int64_t bytes = float_bytes(job.out_kind);
  for (std::int64_t r = job.row_begin; r < job.row_end; ++r) {
    dequantize_row<T>(w, job.out_kind, r, job.col_begin, job.col_end - job.col_begin,
                      static_cast<std::uint8_t*>(job.out) + (r - job.row_begin) * job.ld * bytes);
  }
}

template <class T>
void widen_kernel(FloatKind kind, const void* in, std::int64_t n, float* out) {
  const std::int64_t bytes = float_bytes(kind);
  const auto* from = static_cast<const std::uint8_t*>(in);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const std::int64_t count = min64(kLanes, n - i);
    T::store_n(out + i, load_kind_n<T>(kind, from + i * bytes, count), static_cast<int>(count));
  }
}

}  // namespace
}  // namespace quantal
