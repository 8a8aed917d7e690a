// Exact values of a rectangle of a packed matrix (quantal/kernels.h, dequantize).
#pragma once

#include "kernels/cpu/decode_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// Stores values as one float type. A sink of RowDecoder::run.
template <class T, FloatKind kOut>
struct StoreSink {
  static constexpr std::int64_t kBytes = kOut == FloatKind::kF32 ? 4 : 2;
  std::uint8_t* out;

  void operator()(std::int64_t col, typename T::F v) const {
    std::uint8_t* p = out + col * kBytes;
    if constexpr (kOut == FloatKind::kF32) T::store(reinterpret_cast<float*>(p), v);
    if constexpr (kOut == FloatKind::kF16) T::store_f16(reinterpret_cast<std::uint16_t*>(p), v);
    if constexpr (kOut == FloatKind::kBF16) T::store_bf16(reinterpret_cast<std::uint16_t*>(p), v);
  }
  void tail(std::int64_t col, typename T::F v, std::int64_t n) const {
    store_kind_n<T>(kOut, v, out + col * kBytes, n);
  }
};

template <class T, FloatKind kOut, class Decoder>
void dequantize_rows(const Decoder& decoder, const DequantizeJob& job) {
  const KernelMatrix& w = decoder.w;
  const std::int64_t step = stretch_columns(w);
  Stretch stats;
  for (std::int64_t r = job.row_begin; r < job.row_end; ++r) {
    const std::uint8_t* codes = w.codes + r * w.code_bytes;
    auto* out = static_cast<std::uint8_t*>(job.out) +
                (r - job.row_begin) * job.ld * StoreSink<T, kOut>::kBytes;
    for (std::int64_t c = job.col_begin; c < job.col_end; c += step) {
      const std::int64_t count = min64(step, job.col_end - c);
      expand_stretch<T>(w, r, c, count, stats);
      StoreSink<T, kOut> sink{out + (c - job.col_begin) * StoreSink<T, kOut>::kBytes};
      decoder.run(codes, c, count, stats, sink);
    }
  }
}

template <class T>
void dequantize_kernel(const KernelMatrix& w, const DequantizeJob& job) {
  with_decoder<T>(w, [&job](const auto& decoder) {
    switch (job.out_kind) {
      case FloatKind::kF32:
        return dequantize_rows<T, FloatKind::kF32>(decoder, job);
      case FloatKind::kF16:
        return dequantize_rows<T, FloatKind::kF16>(decoder, job);
      case FloatKind::kBF16:
        return dequantize_rows<T, FloatKind::kBF16>(decoder, job);
    }
  });
}

template <class T>
void widen_kernel(FloatKind kind, const void* in, std::int64_t n, float* out) {
  const std::int64_t bytes = kind == FloatKind::kF32 ? 4 : 2;
  const auto* from = static_cast<const std::uint8_t*>(in);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const std::int64_t count = min64(kLanes, n - i);
    T::store_n(out + i, load_kind_n<T>(kind, from + i * bytes, count), static_cast<int>(count));
  }
}

}  // namespace
}  // namespace quantal
