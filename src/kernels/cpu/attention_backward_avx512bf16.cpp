// Gradients of attention of many rows of bfloat16 (attention_avx512bf16.cpp): weights are computed
// again from the logarithm of their sum (Dao et al., FlashAttention, 2022).
#include "kernels/cpu/attention_avx512_inl.h"

namespace quantal {
namespace {

/// One block of rows against all keys that it sees.
class BackwardBlock {
 public:
  BackwardBlock(const AttentionGradJob& grads, std::int64_t row, std::int64_t rows, float* scratch)
      : grads_(grads),
        job_(grads.job),
        row_(row),
        rows_(rows),
        sight_(grads.job, row, rows),
        dim_(grads.job.dim) {
    auto* next = reinterpret_cast<std::uint32_t*>(scratch);
    const auto take = [&] {
      std::uint32_t* const taken = next;
      next += dim_ / 2 * kRowBlock;
      return taken;
    };
    static_assert(kKeyBlock == kRowBlock);
    const BlockRows q{job_.q, job_.group, row, rows}, g{grads.grad, job_.group, row, rows};
    pack_lanes(q, dim_, query_lanes_ = take());
    pack_pairs(q, kRowBlock, dim_, query_pairs_ = take());
    pack_lanes(g, dim_, grad_lanes_ = take());
    pack_pairs(g, kRowBlock, dim_, grad_pairs_ = take());
    key_pairs_ = take();
    sums_ = reinterpret_cast<float*>(next);
    for (std::int64_t i = 0; i < dim_ * kRowBlock; i += kLanes) {
      _mm512_storeu_ps(sums_ + i, _mm512_setzero_ps());
    }
    read_rows(g, BlockRows{job_.out, job_.group, row, rows});
  }

  void run() {
    for (std::int64_t key = sight_.first_block(); key < sight_.last(); key += kKeyBlock) {
      const std::int64_t left = sight_.last() - key;
      take_keys(key, left < kKeyBlock ? left : kKeyBlock);
    }
    alignas(64) float scale[kRowBlock];
    for (float& by : scale) by = job_.scale;
    store_lanes(sums_, scale, dim_, BlockRows{grads_.dq, job_.group, row_, rows_});
  }

 private:
  /// Logarithms (of base 2) and sum of grad * out of each row.
  void read_rows(const BlockRows& g, const BlockRows& out) {
    for (std::int64_t i = 0; i < kRowBlock; ++i) {
      logs_[i] = means_[i] = 0.0F;  // rows beyond the last: weights of 1 times zeros
      if (i >= rows_) continue;
      const std::int64_t r = row_ + i;
      logs_[i] = kLog2E * job_.lse[r / job_.group + r % job_.group * job_.lse_head];
      __m512 sum = _mm512_setzero_ps();
      for (std::int64_t d = 0; d < dim_; d += kLanes) {
        sum =
            _mm512_fmadd_ps(VecAvx512::load_bf16(g(i) + d), VecAvx512::load_bf16(out(i) + d), sum);
      }
      means_[i] = VecAvx512::sum(sum);
    }
  }

  void take_keys(std::int64_t key, std::int64_t count) {
    const auto* k = static_cast<const std::uint16_t*>(job_.k) + key * job_.k_stride;
    const auto* v = static_cast<const std::uint16_t*>(job_.v) + key * job_.v_stride;
    score_keys(sight_, {k, job_.k_stride, 2}, query_lanes_, dim_, key, count, scores_);
    score_keys(sight_, {v, job_.v_stride, 2}, grad_lanes_, dim_, key, count, grad_weights_);
    const std::int64_t vecs = dim_ / kLanes, steps = kRowBlock / 2;
    if (sight_.all(key, key + count)) {
      differentiate<false>(key, count);
    } else {
      differentiate<true>(key, count);
    }
    multiply<true>({weights_, kRowBlock, 2}, count, {grad_pairs_, dim_}, vecs, steps,
                   {grads_.dv + key * dim_, dim_});
    multiply<true>({grad_scores_, kRowBlock, 2}, count, {query_pairs_, dim_}, vecs, steps,
                   {grads_.dk + key * dim_, dim_});
    pack_pairs(BlockKeys{job_.k, job_.k_stride, key, count}, count, dim_, key_pairs_);
    const auto* pairs = reinterpret_cast<const std::uint16_t*>(key_pairs_);
    multiply<true>({pairs, 2, 2 * dim_}, dim_, {grad_score_pairs_, kRowBlock}, sight_.vecs(),
                   (count + 1) / 2, {sums_, kRowBlock});
  }

  struct Weighted {
    __m512 weight, grad_score;
  };

  /// The weights and the gradients of the scores, each key by key and the latter also in pairs.
  template <bool kMasked>
  void differentiate(std::int64_t key, std::int64_t count) {
    const __m512 scale = _mm512_set1_ps(job_.scale * kLog2E);
    for (int v = 0; v < kRowVecs; v += 2) {
      for (std::int64_t i = 0; i < count; i += 2) {
        Weighted of[2][2] = {};  // [key][vector]
        for (int j = 0; j < (i + 1 < count ? 2 : 1); ++j) {
          for (int u = 0; u < 2 && v + u < sight_.vecs(); ++u) {
            of[j][u] = at<kMasked>(scale, v + u, key + i + j, (i + j) * kRowBlock);
          }
          const std::int64_t to = (i + j) * kRowBlock + v * kLanes;
          _mm512_storeu_si512(weights_ + to, narrow_two(of[j][0].weight, of[j][1].weight));
          _mm512_storeu_si512(grad_scores_ + to,
                              narrow_two(of[j][0].grad_score, of[j][1].grad_score));
        }
        for (int u = 0; u < 2; ++u) {
          _mm512_storeu_si512(grad_score_pairs_ + i / 2 * kRowBlock + (v + u) * kLanes,
                              pair_lanes(of[0][u].grad_score, of[1][u].grad_score));
        }
      }
    }
  }

  template <bool kMasked>
  [[gnu::always_inline]] Weighted at(__m512 scale, int v, std::int64_t key,
                                     std::int64_t row) const {
    const std::int64_t from = row + v * kLanes;
    const __m512 log = _mm512_load_ps(logs_ + v * kLanes);
    const __m512 x = _mm512_mul_ps(_mm512_load_ps(scores_ + from), scale);
    const __m512 p = power_of_two(_mm512_sub_ps(x, log));
    const __m512 g =
        _mm512_sub_ps(_mm512_load_ps(grad_weights_ + from), _mm512_load_ps(means_ + v * kLanes));
    if (!kMasked) return {p, _mm512_mul_ps(p, g)};
    const __mmask16 lanes = sight_.lanes(v, key);
    return {_mm512_maskz_mov_ps(lanes, p), _mm512_maskz_mul_ps(lanes, p, g)};
  }

  const AttentionGradJob& grads_;
  const AttentionJob& job_;
  const std::int64_t row_, rows_;
  const Sight sight_;
  const std::int64_t dim_;
  std::uint32_t *query_lanes_, *query_pairs_, *grad_lanes_, *grad_pairs_, *key_pairs_;
  float* sums_;  // [dim][row], of dq
  alignas(64) float logs_[kRowBlock];
  alignas(64) float means_[kRowBlock];
  alignas(64) float scores_[kKeyBlock * kRowBlock];
  alignas(64) float grad_weights_[kKeyBlock * kRowBlock];  // grad times values
  alignas(64) std::uint16_t weights_[kKeyBlock * kRowBlock];
  alignas(64) std::uint16_t grad_scores_[kKeyBlock * kRowBlock];
  alignas(64) std::uint32_t grad_score_pairs_[kKeyBlock / 2 * kRowBlock];
};

}  // namespace

void attention_backward_avx512bf16(const AttentionGradJob& job, std::int64_t row, std::int64_t rows,
                                   float* scratch) noexcept {
  BackwardBlock(job, row, rows, scratch).run();
}

}  // namespace quantal
