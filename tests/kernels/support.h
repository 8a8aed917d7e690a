// Random packed matrices and odd executors for the kernel tests.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "core/half.h"
#include "quantal/kernels.h"

namespace quantal::testing {

/// xorshift64*; the seed is in the name of every failure.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ULL + 1) {}
  std::uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545F4914F6CDD1DULL;
  }
  /// Uniform in [low, high).
  float uniform(float low, float high) {
    return low + (high - low) * static_cast<float>(next() >> 40) * 0x1p-24F;
  }
  std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(next() >> 1) % n; }

 private:
  std::uint64_t state_;
};

/// Tests that switch kernel sets; the one in use is restored.
class KernelSetTest : public ::testing::Test {
 protected:
  void TearDown() override { select_cpu_kernels(initial_); }

 private:
  std::string_view initial_ = active_cpu_kernels();
};

/// Cuts every range into pieces of unequal length, last piece first.
class OddExecutor final : public Executor {
 public:
  int num_threads() const override { return 3; }
  void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t /*grain*/,
                    const std::function<void(std::int64_t, std::int64_t)>& body) const override {
    std::vector<std::int64_t> cuts = {begin};
    for (std::int64_t step = 1; cuts.back() < end; step = step % 7 + 2) {
      cuts.push_back(std::min(end, cuts.back() + step));
    }
    for (std::size_t i = cuts.size(); i-- > 1;) body(cuts[i - 1], cuts[i]);
  }
};

/// One thread per piece, pieces of the grain.
class ThreadExecutor final : public Executor {
 public:
  explicit ThreadExecutor(int threads = 4) : threads_(threads) {}
  int num_threads() const override { return threads_; }
  void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                    const std::function<void(std::int64_t, std::int64_t)>& body) const override {
    const std::int64_t step = std::max(grain, ceil_div(end - begin, num_threads()));
    std::vector<std::thread> threads;
    for (std::int64_t b = begin; b < end; b += step) {
      threads.emplace_back(body, b, std::min(end, b + step));
    }
    for (std::thread& t : threads) t.join();
  }

 private:
  int threads_;
};

inline std::string describe(const PackedSpec& s) {
  const auto number = [](auto v) { return std::to_string(static_cast<std::int64_t>(v)); };
  return number(s.rows) + "x" + number(s.cols) + " bits " + number(s.bits) + " map " +
         number(s.code_map) + " centre " + number(s.centre) + " offset " + number(s.offset) +
         " scale " + number(s.scale) + " value " + std::string(dtype_name(s.value_dtype)) +
         " runs " + number(s.group_map) + " group " + number(s.group_size) + " nested " +
         number(s.nested_group_size);
}

inline void append_float(ScaleSource source, float v, std::vector<std::uint8_t>& out) {
  std::uint8_t bytes[4];
  std::size_t n = 2;
  if (source == ScaleSource::kF32) {
    std::memcpy(bytes, &v, n = 4);
  } else {
    const std::uint16_t h = source == ScaleSource::kF16 ? f32_to_f16(v) : f32_to_bf16(v);
    std::memcpy(bytes, &h, n);
  }
  out.insert(out.end(), bytes, bytes + n);
}

inline bool float_scales(ScaleSource s) { return static_cast<int>(s) <= 2; }

/// Flat statistics of `groups` groups: scales around 0.02 (or, `wild`, zeros, subnormals, huge
/// values and every byte), offsets of the size that each kind has in practice.
struct RandomStats {
  std::vector<std::uint8_t> scales, offsets;
  std::vector<float> absmax2;
  std::vector<std::uint16_t> supers, super_offsets;

  RandomStats(const PackedSpec& spec, std::int64_t groups, Random& random, bool wild) {
    const float zero_point = static_cast<float>((1 << spec.bits) - 1) * 0.47F;
    const float extremes[] = {0.0F, -0.0F, 1e-40F, 3e38F, -1e-7F, 70000.0F};
    for (std::int64_t g = 0; g < groups; ++g) {
      float s = random.uniform(0.01F, 0.03F);
      float o = spec.offset == Offset::kZeroPoint ? zero_point + random.uniform(-2, 2)
                                                  : random.uniform(-0.2F, 0.2F);
      if (wild && random.below(4) == 0) s = extremes[random.below(6)];
      if (wild && random.below(4) == 0) o = extremes[random.below(6)];
      if (float_scales(spec.scale)) {
        append_float(spec.scale, s, scales);
        append_float(spec.scale, o, offsets);
        continue;
      }
      // E8M0 around 2^-6 and E4M3 around 0.02 unless every byte may come.
      const bool any =
          wild || (spec.scale != ScaleSource::kE8M0 && spec.scale != ScaleSource::kE4M3);
      const std::int64_t low = spec.scale == ScaleSource::kE8M0 ? 119 : 8;
      scales.push_back(static_cast<std::uint8_t>(any ? random.below(256) : low + random.below(4)));
      offsets.push_back(static_cast<std::uint8_t>(random.below(256)));
    }
    for (std::int64_t b = 0; b < ceil_div(groups, spec.nested_group_size); ++b) {
      absmax2.push_back(random.uniform(0.005F, 0.02F));
      supers.push_back(f32_to_f16(random.uniform(-3e-4F, 3e-4F)));
      super_offsets.push_back(f32_to_f16(random.uniform(0, 3e-3F)));
      if (wild && random.below(4) == 0) supers.back() = 0x7BFF;
    }
  }
  FlatStats flat() const {
    return {scales.data(), offsets.data(), absmax2.data(), supers.data(), super_offsets.data()};
  }
};

/// Random codes and statistics. Codes of 8-bit floats are finite and small unless `wild`, when NaN
/// and infinity come too.
inline PackedMatrix random_packed(const PackedSpec& spec, std::uint64_t seed, bool wild = false) {
  Random random(seed);
  PackedMatrix w = make_packed(spec);
  const PackedLayout layout = layout_of(spec);
  const bool float8 = spec.code_map == CodeMap::kE4M3 || spec.code_map == CodeMap::kE5M2;
  std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    for (auto& c : row) {
      c = static_cast<std::uint8_t>(random.below(1 << spec.bits));
      if (float8 && !wild) c &= 0xBF;
    }
    pack_row(spec.bits, row.data(), spec.cols, w.codes.data() + r * layout.code_bytes);
  }
  const bool row_runs = spec.group_map == GroupMap::kRowRuns;
  const std::int64_t groups =
      row_runs ? ceil_div(spec.rows * spec.cols, spec.group_size) : layout.stat_rows;
  const RandomStats stats(spec, groups, random, wild);
  for (std::size_t i = 0; i + 4 <= w.shared.size(); i += 4) {
    const float v = random.uniform(-1, 1);
    std::memcpy(w.shared.data() + i, &v, 4);
  }
  if (row_runs) {
    spread_stats(spec, stats.flat(), 0, w.stats.data(), serial_executor());
    return w;
  }
  const auto bytes =
      static_cast<std::ptrdiff_t>(layout.stat_bytes / (stores_offsets(spec.offset) ? 2 : 1));
  w.stats.clear();
  for (std::int64_t g = 0; g < groups; ++g) {
    const auto s = stats.scales.begin() + g * bytes;
    const auto o = stats.offsets.begin() + g * bytes;
    w.stats.insert(w.stats.end(), s, s + bytes);
    if (stores_offsets(spec.offset)) w.stats.insert(w.stats.end(), o, o + bytes);
  }
  return w;
}

inline std::vector<float> random_floats(std::int64_t n, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> v(static_cast<std::size_t>(n));
  for (float& x : v) x = random.uniform(-1, 1);
  return v;
}

/// The values in `dtype`; `values` become what that holds.
inline std::vector<std::uint8_t> rounded_to(DType dtype, std::vector<float>& values) {
  const auto n = static_cast<std::int64_t>(values.size());
  std::vector<std::uint8_t> out(values.size() * dtype_size(dtype));
  narrow_from_f32(dtype, values.data(), n, out.data());
  widen_to_f32(dtype, out.data(), n, values.data());
  return out;
}

}  // namespace quantal::testing
