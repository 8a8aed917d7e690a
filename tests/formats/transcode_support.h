// Random matrices of every form, and independent views of what a conversion did to them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "formats/bnb/bnb_params.h"
#include "formats/layers.h"
#include "formats/transcode_rules.h"
#include "kernels/support.h"
#include "quantal/transcode.h"

namespace quantal::testing {

inline bool is_super(ScaleSource s) {
  return s == ScaleSource::kSuperU8 || s == ScaleSource::kSuperI8 || s == ScaleSource::kSuperU4;
}

/// How statistics of a random matrix are chosen.
enum class Kind {
  kMixed,    ///< both signs, many sizes, some zero
  kUniform,  ///< the same in all groups, offsets that cancel against half the code range
};

/// One scale or offset in storage `source`.
inline void put_number(ScaleSource source, float value, std::vector<std::uint8_t>& out) {
  if (source == ScaleSource::kE8M0) {
    int exponent = 0;
    std::frexp(std::fabs(value) + 1e-3F, &exponent);
    out.push_back(static_cast<std::uint8_t>(127 + exponent));
  } else if (source == ScaleSource::kE4M3) {
    out.push_back(static_cast<std::uint8_t>(std::fabs(value) * 3000) % 0x7F);
  } else {
    append_float(source, value, out);
  }
}

/// Raw statistics of a plain form. kUniform: scale 2^-5, and the offset that makes the codes
/// symmetric around half their range.
inline void plain_statistics(const PackedSpec& spec, Kind kind, Random& random,
                             std::vector<std::uint8_t>& scales,
                             std::vector<std::uint8_t>& offsets) {
  const int half = 1 << (spec.bits - 1);
  for (std::int64_t g = 0; g < transcoding::num_groups(spec); ++g) {
    float s = random.uniform(0.001F, 0.05F) * (random.below(2) == 0 ? 1.0F : -1.0F);
    if (random.below(20) == 0) s = 0;
    if (spec.offset == Offset::kOver127) s = std::fabs(s) * 127;
    float o = spec.offset == Offset::kZeroPoint ? random.uniform(0, 2.0F * static_cast<float>(half))
                                                : random.uniform(-0.4F, 0.4F);
    if (kind == Kind::kUniform) {
      s = 0x1p-5F;
      const auto h = static_cast<float>(half);
      o = spec.offset == Offset::kZeroPoint ? h : spec.offset == Offset::kShift ? h * s : -h * s;
    }
    put_number(spec.scale, s, scales);
    if (stores_offsets(spec.offset)) put_number(spec.scale, o, offsets);
  }
}

inline std::uint8_t random_sub(const PackedSpec& spec, Random& random) {
  if (spec.scale == ScaleSource::kSuperU4) return static_cast<std::uint8_t>(random.below(256));
  if (spec.scale == ScaleSource::kSuperI8) {
    const int top = spec.bits == 3 ? 32 : 128;  // Q3_K: 6 bits, Q6_K: 8
    return static_cast<std::uint8_t>(random.below(2 * top) - top);
  }
  return static_cast<std::uint8_t>(random.below(64));
}

inline void super_statistics(PackedMatrix& w, Kind kind, Random& random) {
  const PackedSpec& spec = w.spec;
  std::vector<std::uint8_t> subs, sub_offsets;
  std::vector<std::uint16_t> supers, super_offsets;
  const std::int64_t groups = transcoding::num_groups(spec);
  const std::uint8_t one = spec.scale == ScaleSource::kSuperU4 ? 0x11 : 1;
  const float half = static_cast<float>(1 << (spec.bits - 1)) * 0x1p-5F;
  for (std::int64_t g = 0; g < groups; ++g) {
    subs.push_back(kind == Kind::kUniform ? one : random_sub(spec, random));
    sub_offsets.push_back(kind == Kind::kUniform ? std::uint8_t{1} : random_sub(spec, random));
  }
  for (std::int64_t g = 0; g < groups / spec.nested_group_size; ++g) {
    const bool uniform = kind == Kind::kUniform;
    supers.push_back(f32_to_f16(uniform ? 0x1p-5F : random.uniform(-1, 1) * 1e-3F));
    super_offsets.push_back(f32_to_f16(uniform ? half : random.uniform(-1, 1) * 1e-3F));
  }
  FlatStats flat;
  flat.scales = subs.data();
  flat.offsets = sub_offsets.data();
  flat.supers = supers.data();
  flat.super_offsets = super_offsets.data();
  spread_stats(spec, flat, 0, w.stats.data(), serial_executor());
}

inline void nested_statistics(PackedMatrix& w, Kind kind, Random& random) {
  const PackedSpec& spec = w.spec;
  const std::int64_t groups = transcoding::num_groups(spec);
  std::vector<std::uint8_t> codes;
  std::vector<float> absmax2;
  for (std::int64_t g = 0; g < groups; ++g) {
    codes.push_back(kind == Kind::kUniform ? std::uint8_t{200}
                                           : static_cast<std::uint8_t>(random.below(256)));
  }
  for (std::int64_t b = 0; b < ceil_div(groups, spec.nested_group_size); ++b) {
    absmax2.push_back(kind == Kind::kUniform ? 0.01F : random.uniform(0.001F, 0.02F));
  }
  FlatStats flat;
  flat.scales = codes.data();
  flat.absmax2 = absmax2.data();
  spread_stats(spec, flat, 0, w.stats.data(), serial_executor());
  const float offset = 0.0213F;
  std::uint8_t* shared = w.shared.data() + (spec.code_map == CodeMap::kTable ? 64 : 0);
  std::memcpy(shared, &offset, sizeof(offset));
  std::memcpy(shared + 4, bnb::dynamic_map().data(), 4 * 256);
}

/// Codes that mean numbers (no NaN of float8), statistics as `kind` says.
inline PackedMatrix random_form(const PackedSpec& spec, Kind kind, std::uint64_t seed) {
  Random random(seed);
  PackedMatrix w = make_packed(spec);
  const PackedLayout layout = layout_of(spec);
  std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    for (auto& q : row) {
      q = static_cast<std::uint8_t>(random.below(1 << spec.bits));
      if (spec.code_map == CodeMap::kE4M3 && (q & 0x7F) == 0x7F) q = 0;
      if (spec.offset == Offset::kOver127 && q == 0) q = 1;
    }
    pack_row(spec.bits, row.data(), spec.cols, w.codes.data() + r * layout.code_bytes);
  }
  if (is_super(spec.scale)) {
    super_statistics(w, kind, random);
  } else if (spec.scale == ScaleSource::kNestedU8) {
    nested_statistics(w, kind, random);
  } else {
    std::vector<std::uint8_t> scales, offsets;
    plain_statistics(spec, kind, random, scales, offsets);
    FlatStats flat;
    flat.scales = scales.data();
    flat.offsets = offsets.data();
    spread_stats(spec, flat, 0, w.stats.data(), serial_executor());
  }
  return w;
}

inline std::vector<std::uint8_t> all_codes(const PackedMatrix& w) {
  const PackedLayout layout = layout_of(w.spec);
  std::vector<std::uint8_t> out(static_cast<std::size_t>(w.spec.rows * w.spec.cols));
  for (std::int64_t r = 0; r < w.spec.rows; ++r) {
    unpack_row(w.spec.bits, w.codes.data() + r * layout.code_bytes, w.spec.cols,
               out.data() + r * w.spec.cols);
  }
  return out;
}

inline std::vector<float> all_values(const PackedMatrix& w) {
  const Tensor t = decode(w, DType::kF32);
  const auto* p = t.view().data<float>();
  return {p, p + t.view().numel()};
}

/// |code * scale| + |offset| of every weight, in weight units.
inline std::vector<double> magnitudes(const PackedMatrix& w) {
  const transcoding::Statistics stats = transcoding::read_statistics(w.view());
  const std::vector<std::uint8_t> codes = all_codes(w);
  const PackedSpec& spec = w.spec;
  std::vector<double> out(codes.size());
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    for (std::int64_t c = 0; c < spec.cols; ++c) {
      const auto i = static_cast<std::size_t>(r * spec.cols + c);
      const auto g = static_cast<std::size_t>(transcoding::group_of(spec, r, c));
      double s = std::fabs(static_cast<double>(stats.scales[g]));
      if (spec.offset == Offset::kOver127) s /= 127;
      double top = 0;
      if (spec.code_map == CodeMap::kInteger) {
        top = std::abs(static_cast<int>(codes[i]) - spec.centre);
      } else if (spec.code_map == CodeMap::kE2M1) {
        top = std::fabs(static_cast<double>(kE2M1Codebook[codes[i]]));
      } else {
        top = 127;
      }
      double o = stats.offsets.empty() ? 0 : std::fabs(static_cast<double>(stats.offsets[g]));
      if (spec.offset == Offset::kZeroPoint) o *= s;
      out[i] = top * s + o;
    }
  }
  return out;
}

inline float rounded(DType dtype, float x) {
  if (dtype == DType::kF16) return f16_to_f32(f32_to_f16(x));
  if (dtype == DType::kBF16) return bf16_to_f32(f32_to_bf16(x));
  return x;
}

}  // namespace quantal::testing
