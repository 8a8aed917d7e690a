// Random packed matrices and odd executors for the kernel tests.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
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
  int num_threads() const override { return 4; }
  void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                    const std::function<void(std::int64_t, std::int64_t)>& body) const override {
    const std::int64_t step = std::max(grain, ceil_div(end - begin, num_threads()));
    std::vector<std::thread> threads;
    for (std::int64_t b = begin; b < end; b += step) {
      threads.emplace_back(body, b, std::min(end, b + step));
    }
    for (std::thread& t : threads) t.join();
  }
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

inline constexpr int kWidths[] = {1, 2, 3, 4, 5, 6, 8};

/// Every width with every offset, scale source, group map and value type that go together; code
/// maps with every scale source.
inline void add_combinations(std::vector<PackedSpec>& specs) {
  const auto add = [&specs](const PackedSpec& s) {
    try {
      validate_spec(s);
    } catch (const Error&) {
      return;  // which are illegal is tested in packed_test
    }
    specs.push_back(s);
  };
  const DType types[] = {DType::kF32, DType::kF16, DType::kBF16};
  std::size_t count = 0;
  for (int bits : kWidths) {
    for (int offset = 0; offset <= static_cast<int>(Offset::kOver127); ++offset) {
      for (int scale = 0; scale <= static_cast<int>(ScaleSource::kSuperU4); ++scale) {
        for (int map = 0; map <= static_cast<int>(GroupMap::kColumnBlocks); ++map) {
          PackedSpec s{.rows = 6,
                       .cols = 512,
                       .bits = bits,
                       .centre = static_cast<int>(count % 3) * 4,
                       .offset = static_cast<Offset>(offset),
                       .scale = static_cast<ScaleSource>(scale),
                       .value_dtype = types[count++ % 3],
                       .group_map = static_cast<GroupMap>(map),
                       .group_size = map == 2 ? 3 : 16 << (count / 3 % 3),
                       .nested_group_size = count % 2 == 0 ? 8 : 4};
          add(s);
          s.value_dtype = types[count % 3];
          s.cols = 3 * s.group_size * s.nested_group_size;
          add(s);
          s.cols = 101;
          s.group_size = map == 2 ? 2 : map == 1 ? 6 * 101 : 24;
          add(s);
        }
      }
    }
  }
  for (int map = 1; map <= static_cast<int>(CodeMap::kE5M2); ++map) {
    for (int scale = 0; scale <= static_cast<int>(ScaleSource::kSuperU4); ++scale) {
      for (DType type : types) {
        PackedSpec s{.rows = 7,
                     .cols = 256,
                     .bits = map >= static_cast<int>(CodeMap::kE4M3) ? 8 : 4,
                     .code_map = static_cast<CodeMap>(map),
                     .scale = static_cast<ScaleSource>(scale),
                     .value_dtype = type,
                     .group_size = 32,
                     .nested_group_size = 8};
        if (s.scale == ScaleSource::kSuperU4) s.offset = Offset::kShift;
        add(s);
        s.cols = 131;
        s.group_size = 20;
        add(s);
      }
    }
  }
}

/// Specs that between them reach every branch of the decoder: all widths, maps, offsets and scale
/// sources, every value type, groups that divide units and rows, that cross them on multiples of
/// 64, 16, 4 and 1, rows of one unit, a column more and less.
inline std::vector<PackedSpec> kernel_specs() {
  std::vector<PackedSpec> specs;
  const auto add = [&specs](PackedSpec s) { specs.push_back(s); };
  const DType types[] = {DType::kF32, DType::kF16, DType::kBF16};
  for (DType value : types) {
    for (int offset = 0; offset < 4; ++offset) {
      for (int bits : {4, 8}) {
        add({.rows = 9,
             .cols = 256,
             .bits = bits,
             .centre = bits == 8 ? 128 : 8,
             .offset = static_cast<Offset>(offset),
             .value_dtype = value});
        add({.rows = 6,
             .cols = 100,
             .bits = bits,
             .offset = static_cast<Offset>(offset),
             .scale = ScaleSource::kF16,
             .value_dtype = value,
             .group_size = 24});
        add({.rows = 7,
             .cols = 96,
             .bits = bits,
             .offset = static_cast<Offset>(offset),
             .scale = ScaleSource::kBF16,
             .value_dtype = value,
             .group_map = GroupMap::kColumnRuns,
             .group_size = 42});
      }
    }
    for (CodeMap map : {CodeMap::kNf4, CodeMap::kFp4, CodeMap::kTable}) {
      add({.rows = 5, .cols = 320, .code_map = map, .value_dtype = value, .group_size = 32});
      add({.rows = 13,
           .cols = 160,
           .code_map = map,
           .scale = ScaleSource::kNestedU8,
           .value_dtype = value,
           .group_size = 64,
           .nested_group_size = 4});
      add({.rows = 5,
           .cols = 2048,
           .code_map = map,
           .scale = ScaleSource::kNestedU8,
           .value_dtype = value,
           .group_size = 64,
           .nested_group_size = 256});
    }
  }
  for (int bits : kWidths) {
    for (std::int64_t cols : {1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 576, 577, 4112}) {
      for (std::int64_t group : {1, 3, 16, 48, 64, 128}) {
        if (bits != 4 && bits != 8 && cols % group != 0 && group > 3 && cols > 64) continue;
        add({.rows = 5,
             .cols = cols,
             .bits = bits,
             .offset = Offset::kZeroPoint,
             .group_size = group});
      }
    }
  }
  for (int bits : kWidths) {
    for (std::int64_t group : {16, 32, 64, 96, 128, 256}) {  // rows that end inside a unit
      for (std::int64_t groups : {1, 5, 11}) {
        add({.rows = 9,
             .cols = groups * group,
             .bits = bits,
             .centre = 1,
             .offset = Offset::kBias,
             .scale = ScaleSource::kBF16,
             .value_dtype = DType::kBF16,
             .group_size = group});
      }
    }
  }
  add_combinations(specs);
  add({.rows = 3, .cols = 8704, .code_map = CodeMap::kNf4, .group_size = 4096});
  add({.rows = 3, .cols = 8192, .code_map = CodeMap::kNf4, .group_size = 8192});
  add({.rows = 1, .cols = 70, .code_map = CodeMap::kNf4, .group_size = 1024});
  add({.rows = 0, .cols = 64});
  return specs;
}

}  // namespace quantal::testing
