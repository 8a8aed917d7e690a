// Integer products of one or two rows of activations (int_kernels.h): codes are multiplied while
// they are in registers.
#pragma once

#include "kernels/cpu/int_codes_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// Columns of a panel against kInputs rows of activations, one tile, while the codes of a unit are
/// in registers.
template <class V, int kBits, bool kTable, int kInputs, bool kOffsets>
class IntDirect {
 public:
  using I = typename V::I;
  using F = typename V::F;
  using Unit = IntUnit<V, kBits>;
  static constexpr bool kWide = V::kSigned && (kTable || kBits == 8);

  IntDirect(const IntPanel& p, const IntJob& job, int half)
      : unpacker_(*job.form),
        p_(p),
        job_(job),
        row_(half * V::kLanes),
        x_(job.x.q + p.col / 4 * kInputs),
        at_(p.first_run * kInputs) {}

  /// sums[m][rows of this half] += what the columns add.
  void run(IntRows& rows, float* sums) {
#pragma GCC unroll 4
    for (int i = 0; i < kInputs; ++i) sums_[i] = V::load_f(sums + i * 2 * V::kLanes + row_);
    begin_run();
    const std::int64_t columns = 4 * ((p_.runs - 1) * p_.words + p_.last_words);
    IntUnits<V, Unit, false> units(rows, row_, p_.col / Unit::kColumns * Unit::kBytes,
                                   (columns + Unit::kColumns - 1) / Unit::kColumns);
    for (bool more = true; more;) {
      I in[Unit::kVectors];
      rows.template ask<(Unit::kBytes * V::kLanes + 63) / 64>();
      units.next(in);
      more = chunks<0>(in);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kInputs; ++i) V::store_f(sums + i * 2 * V::kLanes + row_, sums_[i]);
  }

 private:
  static constexpr int kChains = 4;  // sums that do not wait for each other

  [[gnu::always_inline]] void begin_run() {
    left_ = ((run_ + 1 == p_.runs ? p_.last_words : p_.words) + 3) / 4;
#pragma GCC unroll 4
    for (int i = 0; i < kInputs; ++i) {
      dot_[i][0] = V::set1_i(job_.x.start[at_ + i]);
#pragma GCC unroll 4
      for (int j = 1; j < kChains; ++j) dot_[i][j] = V::set1_i(0);
    }
  }
  [[gnu::always_inline]] void end_run() {
    const F a = V::load_f(p_.a[run_] + row_);
#pragma GCC unroll 4
    for (int i = 0; i < kInputs; ++i) {
      const I dot = V::add_i(V::add_i(dot_[i][0], dot_[i][1]), V::add_i(dot_[i][2], dot_[i][3]));
      const F scale = V::set1_f(job_.x.scale[at_ + i]);
      sums_[i] = V::fma(V::mul(a, scale), V::to_f(dot), sums_[i]);
      if constexpr (kOffsets) {
        const F total = V::set1_f(job_.x.total[at_ + i]);
        sums_[i] = V::fma(V::load_f(p_.b[run_] + row_), total, sums_[i]);
      }
    }
    ++run_;
    at_ += kInputs;
  }
  /// False at the end of the last run.
  template <int kChunk>
  [[gnu::always_inline]] bool chunks(const I* in) {
    if constexpr (kChunk == Unit::kChunks) {
      return true;
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const I u = unpacker_.template codes<kChunk>(in, j);
#pragma GCC unroll 4
        for (int i = 0; i < kInputs; ++i) {
          dot_[i][j] = V::template dot<kWide>(dot_[i][j], u, V::set1_i(x_[j * kInputs + i]));
        }
      }
      x_ += 4 * kInputs;
      if (--left_ == 0) {
        end_run();
        if (run_ == p_.runs) return false;
        begin_run();
      }
      return chunks<kChunk + 1>(in);
    }
  }

  const IntUnpacker<V, kBits, kTable> unpacker_;
  const IntPanel& p_;
  const IntJob& job_;
  const std::int64_t row_;
  const std::int32_t* x_;
  std::int64_t at_, run_ = 0, left_ = 0;
  F sums_[kInputs];
  I dot_[kInputs][kChains];
};

/// Adds a panel's columns for all inputs.
using AddDirect = void (*)(IntRows& rows, const IntPanel& p, const IntJob& job, float* sums);

template <class V, int kBits, bool kTable, int kInputs, bool kOffsets>
void add_direct(IntRows& rows, const IntPanel& p, const IntJob& job, float* sums) {
  for (int half = 0; half < 2; ++half) {
    IntDirect<V, kBits, kTable, kInputs, kOffsets>(p, job, half).run(rows, sums);
  }
}

/// Null: by panels.
template <class V, int kInputs, bool kOffsets>
AddDirect direct_inputs(const KernelMatrix& w, const IntForm& form) {
  switch (w.bits) {
    case 2:
      return add_direct<V, 2, false, kInputs, kOffsets>;
    case 3:
      return add_direct<V, 3, false, kInputs, kOffsets>;
    case 4:
      if (form.table) return kOffsets ? nullptr : add_direct<V, 4, true, kInputs, false>;
      return add_direct<V, 4, false, kInputs, kOffsets>;
    case 8:
      return add_direct<V, 8, false, kInputs, kOffsets>;
    default:
      return nullptr;
  }
}

template <class V>
AddDirect direct_product(const KernelMatrix& w, const IntJob& job) {
  if constexpr (V::kDirectInputs == 0) {
    return nullptr;
  } else {
    if (job.inputs > V::kDirectInputs) return nullptr;
    if (job.inputs == 1) {
      return w.has_offsets ? direct_inputs<V, 1, true>(w, *job.form)
                           : direct_inputs<V, 1, false>(w, *job.form);
    }
    return w.has_offsets ? direct_inputs<V, 2, true>(w, *job.form)
                         : direct_inputs<V, 2, false>(w, *job.form);
  }
}

}  // namespace
}  // namespace quantal
