// The product of the backward pass with bfloat16 gradients and weights rounded to bfloat16, sums in
// float32 (cpu_kernels.h, Bf16Kernels).
//
// Order of a sum: two products at a time, from zero in each block of rows (kFewRows or kManyRows,
// by the number of inputs); these partial sums are added in order. Each output column is one lane,
// so nothing depends on how columns are cut.
#include "kernels/cpu/bf16_avx512_inl.h"

namespace quantal {
namespace {

constexpr std::int64_t kFewRows = 32;   // decoded at a time for up to kFewInputs inputs
constexpr std::int64_t kManyRows = 64;  // and for more, whose sums take longer to load and store
constexpr std::int64_t kFewInputs = 24;
constexpr std::int64_t kSubColumns = 512;  // columns decoded at a time: 32 KiB with kFewRows rows
constexpr std::int64_t kTotals = kBf16ScratchFloats;  // sums of a tile
constexpr std::int64_t kMaxTileColumns = 2048;
constexpr std::int64_t kMaxTileInputs = kTotals / kSubColumns;
static_assert(kMaxTileColumns <= kStretch);

/// totals[m][16 kVectors columns] += sum over row pairs of g[m] w; pairs[p] are columns of two
/// rows.
template <int kInputs, int kVectors>
void multiply_pairs(const std::uint32_t* pairs, const std::uint16_t* g, std::int64_t ldg,
                    std::int64_t rows, float* totals, std::int64_t ld) {
  __m512 sums[kInputs * kVectors];
#pragma GCC unroll 24
  for (int i = 0; i < kInputs * kVectors; ++i) sums[i] = _mm512_setzero_ps();
  for (std::int64_t n = 0; n < rows; n += 2, pairs += kSubColumns) {
    __m512i values[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) values[v] = load_512(pairs + v * kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < kInputs; ++m) {
      int two = 0;
      __builtin_memcpy(&two, g + m * ldg + n, sizeof(two));
      const __m512i input = _mm512_set1_epi32(two);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) add_products(sums[m * kVectors + v], values[v], input);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kInputs * kVectors; ++i) {
    float* to = totals + i / kVectors * ld + i % kVectors * kLanes;
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sums[i]));
  }
}

/// 64 columns for all inputs: 12 at a time, the last ones by sixes.
void multiply_inputs(std::int64_t inputs, const std::uint32_t* pairs, const std::uint16_t* g,
                     std::int64_t ldg, std::int64_t rows, float* totals, std::int64_t ld) {
  std::int64_t m = 0;
  for (; m + 12 <= inputs; m += 12) {
    multiply_pairs<12, 2>(pairs, g + m * ldg, ldg, rows, totals + m * ld, ld);
    multiply_pairs<12, 2>(pairs + 32, g + m * ldg, ldg, rows, totals + m * ld + 32, ld);
  }
  const auto rest = [&](auto width) {
    constexpr int kInputs = decltype(width)::kBits;
    if (inputs - m < kInputs) return;
    multiply_pairs<kInputs, 4>(pairs, g + m * ldg, ldg, rows, totals + m * ld, ld);
    m += kInputs;
  };
  rest(Width<6>{});
  rest(Width<5>{});
  rest(Width<4>{});
  rest(Width<3>{});
  rest(Width<2>{});
  rest(Width<1>{});
}

/// Lanes of two rows side by side. Blocks of eight columns give four lanes to the first result and
/// four to the second.
inline void interleave(const std::uint16_t* a, const std::uint16_t* b, std::uint32_t* out) {
  const __m512i x = load_512(a);
  const __m512i y = load_512(b);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi16(x, y));
  _mm512_storeu_si512(out + kLanes, _mm512_unpackhi_epi16(x, y));
}

/// Undoes interleave's order of float32 sums: columns [0, 16) and [16, 32) of 32.
struct Sums32 {
  __m512 first, second;
};
inline Sums32 in_order(const float* sums) {
  const __m512 low = _mm512_loadu_ps(sums);
  const __m512 high = _mm512_loadu_ps(sums + kLanes);
  const __m512i one = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i two = _mm512_add_epi32(one, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(low, one, high), _mm512_permutex2var_ps(low, two, high)};
}

/// All rows against columns [col, col + cols) of the output.
class ColumnTile {
 public:
  ColumnTile(const KernelMatrix& w, const Bf16Job& job)
      : w_(w),
        job_(job),
        decode_(bf16_decoder(w)),
        fields_(step_fields(w)),
        block_rows_(job.inputs > kFewInputs ? kManyRows : kFewRows),
        totals_(job.scratch) {}

  void run(std::int64_t col, std::int64_t cols) {
    ld_ = (cols + kPadColumns - 1) / kPadColumns * kPadColumns;
    for (std::int64_t i = 0; i < job_.inputs * ld_; i += kLanes) {
      _mm512_store_ps(totals_ + i, _mm512_setzero_ps());
    }
    for (std::int64_t row = 0; row < w_.rows; row += block_rows_) {
      const std::int64_t rows = min64(block_rows_, w_.rows - row);
      for (std::int64_t r = 0; fields_ != 0 && r < rows; ++r) {
        expand_steps(w_, row + r, col, cols, stats_[r]);
      }
      for (std::int64_t k = 0; k < cols; k += kSubColumns) {
        block(row, rows, col, k, min64(kSubColumns, cols - k));
      }
    }
    for (std::int64_t m = 0; m < job_.inputs; ++m) store(m, col, cols);
  }

 private:
  void block(std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t k,
             std::int64_t n) {
    const std::int64_t padded = (n + kPadColumns - 1) / kPadColumns * kPadColumns;
    for (std::int64_t r = 0; r < rows; r += 2) {
      alignas(64) std::uint16_t two[2 * kSubColumns];
      for (std::int64_t i = 0; i < 2; ++i)
        decode(row, rows, r + i, col, k, n, two + i * kSubColumns);
      for (std::int64_t c = 0; c < padded; c += 32) {
        interleave(two + c, two + kSubColumns + c, pairs_ + r / 2 * kSubColumns + c);
      }
    }
    for (std::int64_t c = 0; c < padded; c += kPadColumns) {
      multiply_inputs(job_.inputs, pairs_ + c, job_.x + row, job_.ldx, rows, totals_ + k + c, ld_);
    }
  }

  /// A row of the block, or zeros after the last one.
  void decode(std::int64_t row, std::int64_t rows, std::int64_t r, std::int64_t col, std::int64_t k,
              std::int64_t n, std::uint16_t* out) {
    if (r >= rows) {
      for (std::int64_t c = 0; c < kSubColumns; ++c) out[c] = 0;
      return;
    }
    // The same columns of the next block: rows are far apart for the hardware's prefetcher.
    if (row + r + block_rows_ < w_.rows) {
      const std::int64_t next = (row + r + block_rows_) * w_.code_bytes + (col + k) * w_.bits / 8;
      for (std::int64_t byte = 0; byte < n * w_.bits / 8; byte += 64) {
        __builtin_prefetch(w_.codes + next + byte);
      }
    }
    decode_(w_, stats_[r], row + r, col, k, n, out);
  }

  void store(std::int64_t m, std::int64_t col, std::int64_t cols) const {
    for (std::int64_t c = 0; c < cols; c += 32) {
      const std::int64_t fields = fields_at(fields_ == 0 ? 1 : fields_, c, cols);
      const Sums32 sums = in_order(totals_ + m * ld_ + c);
      const std::int64_t vector = c / 32;  // it holds chunks f and fields + f of its step
      const std::int64_t at = c - vector % fields * kLanes;
      store_columns(m, col, cols, at, sums.first);
      store_columns(m, col, cols, at + fields * kLanes, sums.second);
    }
  }

  /// 16 output columns from `at` on, as far as they exist.
  void store_columns(std::int64_t m, std::int64_t col, std::int64_t cols, std::int64_t at,
                     __m512 v) const {
    if (at >= cols) return;
    store_kind_n<VecAvx512>(FloatKind::kBF16, v, job_.y + m * job_.ldy + col + at,
                            min64(kLanes, cols - at));
  }

  const KernelMatrix& w_;
  const Bf16Job& job_;
  const DecodeBf16 decode_;
  const int fields_;
  const std::int64_t block_rows_;
  Stretch stats_[kManyRows];
  std::int64_t ld_ = 0;
  alignas(64) std::uint32_t pairs_[kManyRows / 2 * kSubColumns];
  float* const totals_;
};

}  // namespace

void matmul_transposed_avx512bf16(const KernelMatrix& w, const Bf16Job& job, std::int64_t col,
                                  std::int64_t col_end) noexcept {
  for (std::int64_t m = 0; m < job.inputs; m += kMaxTileInputs) {
    Bf16Job part = job;
    part.inputs = min64(kMaxTileInputs, job.inputs - m);
    part.x += m * job.ldx;
    part.y += m * job.ldy;
    const std::int64_t fit = kTotals / part.inputs / kSubColumns * kSubColumns;
    const std::int64_t step = min64(kMaxTileColumns, fit);
    ColumnTile tile(w, part);
    for (std::int64_t c = col; c < col_end; c += step) tile.run(c, min64(step, col_end - c));
  }
}

}  // namespace quantal
