// Products of many bfloat16 activations with weights rounded to bfloat16 (cpu_kernels.h,
// Bf16Kernels): weights go to panels in which a lane is a row, as in a dense product.
//
// Order of a sum: two products at a time, from zero in each kPanelDepth packed columns; these
// partial sums are added in order; the bias comes last.
#include "kernels/cpu/bf16_avx512_inl.h"
#include "kernels/cpu/transpose_avx512_inl.h"

namespace quantal {
namespace {

constexpr std::int64_t kPanelRows = 32;
constexpr std::int64_t kPanelDepth = 512;  // columns: 32 KiB
constexpr std::int64_t kDecodeRows = 16;   // rows that are transposed at a time
constexpr std::int64_t kScratchLd = kPanelDepth + 32;
static_assert(kSumColumns % kPanelDepth == 0);
static_assert(kMaxBf16Inputs * kPanelRows <= kBf16ScratchFloats);

/// sums[m][32 rows] += sum over column pairs of x[m] w; panel[p] are two columns of 32 rows.
template <int kInputs>
void multiply_panel(const std::uint32_t* panel, const std::uint16_t* x, std::int64_t ldx,
                    std::int64_t columns, float* sums) {
  __m512 part[kInputs * 2];
#pragma GCC unroll 24
  for (int i = 0; i < kInputs * 2; ++i) part[i] = _mm512_setzero_ps();
  for (std::int64_t k = 0; k < columns; k += 2, panel += kPanelRows) {
    const __m512i first = load_512(panel);
    const __m512i second = load_512(panel + kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < kInputs; ++m) {
      int two = 0;
      __builtin_memcpy(&two, x + m * ldx + k, sizeof(two));
      const __m512i input = _mm512_set1_epi32(two);
      add_products(part[2 * m], first, input);
      add_products(part[2 * m + 1], second, input);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kInputs * 2; ++i) {
    _mm512_storeu_ps(sums + i * kLanes, _mm512_add_ps(_mm512_loadu_ps(sums + i * kLanes), part[i]));
  }
}

void multiply_inputs(const std::uint32_t* panel, const std::uint16_t* x, std::int64_t ldx,
                     std::int64_t inputs, std::int64_t columns, float* sums) {
  std::int64_t m = 0;
  const auto from = [&](auto width) {
    constexpr int kInputs = decltype(width)::kBits;
    for (; m + kInputs <= inputs; m += kInputs) {
      multiply_panel<kInputs>(panel, x + m * ldx, ldx, columns, sums + m * kPanelRows);
    }
  };
  from(Width<12>{});
  from(Width<6>{});
  from(Width<3>{});
  from(Width<1>{});
}

/// out[j * kPanelRows + r] = 32-bit lane j of row r, for 16 rows of 32 columns.
void transpose(const std::uint16_t* rows, std::uint32_t* out) {
  __m512i a[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) a[r] = load_512(rows + r * kScratchLd);
  transpose_16(a, [=](int i, __m512i lane) { _mm512_storeu_si512(out + i * kPanelRows, lane); });
}

/// Weight rows [row, row + rows), rows <= kPanelRows, against all inputs.
class PanelProduct {
 public:
  PanelProduct(const KernelMatrix& w, const Bf16Job& job)
      : w_(w),
        job_(job),
        decode_(bf16_decoder(w)),
        stats_needed_(step_fields(w) != 0),
        sums_(job.scratch) {}

  void run(std::int64_t row, std::int64_t rows) {
    for (std::int64_t i = 0; i < job_.inputs * kPanelRows; i += kLanes) {
      _mm512_store_ps(sums_ + i, _mm512_setzero_ps());
    }
    for (std::int64_t c = 0; c < w_.cols; c += kSumColumns) {
      const std::int64_t n = min64(kSumColumns, w_.cols - c);
      for (std::int64_t r = 0; stats_needed_ && r < rows; ++r) {
        expand_steps(w_, row + r, c, n, stats_[r]);
      }
      for (std::int64_t k = 0; k < n; k += kPanelDepth) {
        const std::int64_t columns = fill_panel(row, rows, c, k, min64(kPanelDepth, n - k));
        multiply_inputs(panel_, job_.x + c + k, job_.ldx, job_.inputs, columns, sums_);
      }
    }
    for (std::int64_t m = 0; m < job_.inputs; ++m) {
      for (std::int64_t r = 0; r < rows; r += kLanes) {
        store_outputs(job_, sums_ + m * kPanelRows + r, m, row + r, min64(kLanes, rows - r));
      }
    }
  }

 private:
  /// Columns [c + k, c + k + n) of all rows; returns n rounded up to kPadColumns.
  std::int64_t fill_panel(std::int64_t row, std::int64_t rows, std::int64_t c, std::int64_t k,
                          std::int64_t n) {
    const std::int64_t padded = (n + kPadColumns - 1) / kPadColumns * kPadColumns;
    for (std::int64_t first = 0; first < kPanelRows; first += kDecodeRows) {
      for (std::int64_t r = 0; r < kDecodeRows; ++r) {
        decode(row, rows, first + r, c, k, n, padded, scratch_ + r * kScratchLd);
      }
      for (std::int64_t j = 0; j < padded; j += 32) {
        transpose(scratch_ + j, panel_ + j / 2 * kPanelRows + first);
      }
    }
    return padded;
  }

  void decode(std::int64_t row, std::int64_t rows, std::int64_t r, std::int64_t c, std::int64_t k,
              std::int64_t n, std::int64_t padded, std::uint16_t* out) const {
    if (r >= rows) {
      for (std::int64_t i = 0; i < padded; ++i) out[i] = 0;
      return;
    }
    const std::uint8_t* codes = w_.codes + (row + r) * w_.code_bytes + (c + k) * w_.bits / 8;
    const std::int64_t bytes = n * w_.bits / 8;
    // What the next panel reads: further columns, or the rows after these.
    const std::int64_t last = c + k + n >= w_.cols ? kPanelRows * w_.code_bytes - w_.code_bytes : 0;
    if (last == 0 || row + r + kPanelRows < w_.rows) {
      for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(codes + bytes + last + b);
    }
    decode_(w_, stats_[r], row + r, c, k, n, out);
  }

  const KernelMatrix& w_;
  const Bf16Job& job_;
  const DecodeBf16 decode_;
  const bool stats_needed_;
  Stretch stats_[kPanelRows];
  alignas(64) std::uint16_t scratch_[kDecodeRows * kScratchLd];
  alignas(64) std::uint32_t panel_[kPanelDepth / 2 * kPanelRows];
  float* const sums_;
};

}  // namespace

void matmul_panels_avx512bf16(const KernelMatrix& w, const Bf16Job& job, std::int64_t row,
                              std::int64_t row_end) noexcept {
  PanelProduct product(w, job);
  for (; row < row_end; row += kPanelRows) product.run(row, min64(kPanelRows, row_end - row));
}

}  // namespace quantal
