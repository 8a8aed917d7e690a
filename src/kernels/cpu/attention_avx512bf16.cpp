// Attention of many rows of bfloat16: blocks of 64 rows go over the keys 64 at a time with running
// maxima and sums (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022).
#include "kernels/cpu/attention_avx512_inl.h"

namespace quantal {
namespace {

/// One block of rows. Order of a sum: two products at a time over dim; keys in blocks of kKeyBlock,
/// in them two at a time.
class ForwardBlock {
 public:
  ForwardBlock(const AttentionJob& job, std::int64_t row, std::int64_t rows, float* scratch)
      : job_(job),
        row_(row),
        rows_(rows),
        sight_(job, row, rows),
        queries_(reinterpret_cast<std::uint32_t*>(scratch)),
        values_(queries_ + job.dim / 2 * kRowBlock),
        sums_(scratch + job.dim * kRowBlock) {
    static_assert(kKeyBlock == kRowBlock);  // values_ takes as much as queries_
    pack_lanes(BlockRows{job.q, job.group, row, rows}, job.dim, queries_);
    for (std::int64_t i = 0; i < job.dim * kRowBlock; i += kLanes) {
      _mm512_storeu_ps(sums_ + i, _mm512_setzero_ps());
    }
  }

  void run() {
    for (std::int64_t key = sight_.first_block(); key < sight_.last(); key += kKeyBlock) {
      const std::int64_t left = sight_.last() - key;
      take_keys(key, left < kKeyBlock ? left : kKeyBlock);
    }
    finish();
  }

 private:
  void take_keys(std::int64_t key, std::int64_t count) {
    const auto* k = static_cast<const std::uint16_t*>(job_.k) + key * job_.k_stride;
    score_keys(sight_, {k, job_.k_stride, 2}, queries_, job_.dim, key, count, scores_);
    if (sight_.all(key, key + count)) {
      weigh<false>(key, count);
    } else {
      weigh<true>(key, count);
    }
    pack_pairs(BlockKeys{job_.v, job_.v_stride, key, count}, count, job_.dim, values_);
    const auto* v = reinterpret_cast<const std::uint16_t*>(values_);
    multiply<true>({v, 2, 2 * job_.dim}, job_.dim, {weights_, kRowBlock}, sight_.vecs(),
                   (count + 1) / 2, {sums_, kRowBlock});
  }

  /// weights_[key / 2][row] = 2^(score - maximum) of two keys, and what follows from new maxima.
  template <bool kMasked>
  void weigh(std::int64_t key, std::int64_t count) {
    const __m512 scale = _mm512_set1_ps(job_.scale * kLog2E);
    for (int v = 0; v < sight_.vecs(); ++v) {
      const float* scores = scores_ + v * kLanes;
      const auto lanes = [&](std::int64_t i) -> __mmask16 {
        return kMasked ? sight_.lanes(v, key + i) : static_cast<__mmask16>(0xFFFF);
      };
      __m512 most = maxima_[v];
      for (std::int64_t i = 0; i < count; ++i) {
        const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + i * kRowBlock), scale);
        most = kMasked ? _mm512_mask_max_ps(most, lanes(i), most, x) : _mm512_max_ps(most, x);
      }
      rescale(v, most);
      __m512 sum = totals_[v];
      const auto weight = [&](std::int64_t i) {
        const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + i * kRowBlock), scale);
        const __m512 p = power_of_two(_mm512_sub_ps(x, most));
        return kMasked ? _mm512_maskz_mov_ps(lanes(i), p) : p;
      };
      for (std::int64_t i = 0; i < count; i += 2) {
        const __m512 low = weight(i);
        const __m512 high = i + 1 < count ? weight(i + 1) : _mm512_setzero_ps();
        sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
        _mm512_storeu_si512(weights_ + i / 2 * kRowBlock + v * kLanes, pair_lanes(low, high));
      }
      totals_[v] = sum;
    }
  }

  /// Sums so far in terms of a new maximum.
  void rescale(int v, __m512 most) {
    const __m512 old = maxima_[v];
    maxima_[v] = most;
    const __mmask16 grown = _mm512_cmp_ps_mask(old, most, _CMP_NEQ_UQ);
    if (grown == 0) return;
    const __m512 by =
        _mm512_mask_mov_ps(_mm512_set1_ps(1.0F), grown, power_of_two(_mm512_sub_ps(old, most)));
    totals_[v] = _mm512_mul_ps(totals_[v], by);
    float* sums = sums_ + v * kLanes;
    for (std::int64_t d = 0; d < job_.dim; ++d, sums += kRowBlock) {
      _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), by));
    }
  }

  void finish() {
    alignas(64) float inverse[kRowBlock];
    for (int v = 0; v < kRowVecs; ++v) {  // 0 where no key was seen
      const __mmask16 any = _mm512_cmp_ps_mask(totals_[v], _mm512_setzero_ps(), _CMP_NEQ_UQ);
      _mm512_store_ps(inverse + v * kLanes,
                      _mm512_maskz_div_ps(any, _mm512_set1_ps(1.0F), totals_[v]));
    }
    store_lanes(sums_, inverse, job_.dim, BlockRows{job_.out, job_.group, row_, rows_});
    if (job_.lse == nullptr) return;
    for (std::int64_t i = 0; i < rows_; ++i) {
      const std::int64_t r = row_ + i;
      const float most = lane(maxima_, i), total = lane(totals_, i);
      job_.lse[r / job_.group + r % job_.group * job_.lse_head] =
          most * kLn2 + __builtin_logf(total);
    }
  }
  static float lane(const __m512* v, std::int64_t i) {
    alignas(64) float lanes[kLanes];
    _mm512_store_ps(lanes, v[i / kLanes]);
    return lanes[i % kLanes];
  }

  const AttentionJob& job_;
  const std::int64_t row_, rows_;
  const Sight sight_;
  std::uint32_t* const queries_;  // [dim / 2][row]
  std::uint32_t* const values_;   // [key / 2][dim]
  float* const sums_;             // [dim][row], of values
  __m512 maxima_[kRowVecs] = {lowest(), lowest(), lowest(), lowest()};
  __m512 totals_[kRowVecs] = {};
  alignas(64) float scores_[kKeyBlock * kRowBlock];
  alignas(64) std::uint32_t weights_[kKeyBlock / 2 * kRowBlock];

  static __m512 lowest() { return _mm512_set1_ps(-__builtin_inff()); }
};

void forward(const AttentionJob& job, std::int64_t row, std::int64_t rows,
             float* scratch) noexcept {
  ForwardBlock(job, row, rows, scratch).run();
}

void round_sums(const float* sums, std::int64_t parts, std::int64_t stride, float scale,
                std::int64_t n, std::uint16_t* out) noexcept {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    __m512 sum = _mm512_loadu_ps(sums + i);
    for (std::int64_t p = 1; p < parts; ++p) {
      sum = _mm512_add_ps(sum, _mm512_loadu_ps(sums + p * stride + i));
    }
    VecAvx512::store_bf16(out + i, _mm512_mul_ps(sum, _mm512_set1_ps(scale)));
  }
}

}  // namespace

const BlockAttention& block_attention_avx512bf16() {
  static const BlockAttention kernels{forward, attention_backward_avx512bf16, round_sums};
  return kernels;
}

}  // namespace quantal
