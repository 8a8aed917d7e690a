// Encoders of the blocks of 32, with the bits of ggml's C reference, and the search of IQ4_NL.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/half.h"
#include "formats/gguf/blocks.h"
#include "formats/gguf/gguf_encode.h"
#include "kernels/block_fit.h"
#include "quantal/kernels.h"

namespace quantal::gguf {
namespace {

using namespace formats::gguf;

constexpr std::int64_t kGroups = 64;  ///< groups between the two passes, 2 KiB of codes

/// Codes and statistics of up to kGroups blocks.
struct Batch {
  alignas(64) std::uint8_t codes[kGroups * kShortGroup];
  float scales[kGroups], lows[kGroups];
  std::uint16_t d[kGroups], m[kGroups];
};

void put_u16(std::uint16_t value, std::uint8_t (&bytes)[2]) {
  bytes[0] = static_cast<std::uint8_t>(value);
  bytes[1] = static_cast<std::uint8_t>(value >> 8);
}

void put_nibbles(const std::uint8_t* codes, std::uint8_t (&qs)[16]) {
  for (int j = 0; j < 16; ++j) {
    qs[j] = static_cast<std::uint8_t>((codes[j] & 15) | codes[j + 16] << 4);
  }
}

void put_fifth_bits(const std::uint8_t* codes, std::uint8_t (&qh)[4]) {
  for (int byte = 0; byte < 4; ++byte) {
    std::uint64_t eight = 0;
    std::memcpy(&eight, codes + 8 * byte, 8);
    // Bit 4 of eight bytes to one byte: the product moves bit 8 i of the mask to bit 56 + i.
    eight = (eight >> 4) & 0x0101010101010101u;
    qh[byte] = static_cast<std::uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
}

void assemble(const Batch& batch, std::int64_t g, Q4_0& block) {
  put_nibbles(batch.codes + g * kShortGroup, block.qs);
}
void assemble(const Batch& batch, std::int64_t g, Q4_1& block) {
  put_u16(batch.m[g], block.m);
  put_nibbles(batch.codes + g * kShortGroup, block.qs);
}
void assemble(const Batch& batch, std::int64_t g, Q5_0& block) {
  put_nibbles(batch.codes + g * kShortGroup, block.qs);
  put_fifth_bits(batch.codes + g * kShortGroup, block.qh);
}
void assemble(const Batch& batch, std::int64_t g, Q5_1& block) {
  put_u16(batch.m[g], block.m);
  put_nibbles(batch.codes + g * kShortGroup, block.qs);
  put_fifth_bits(batch.codes + g * kShortGroup, block.qh);
}
/// The codes of Q8_0 are written where they belong.
void assemble(const Batch& /*batch*/, std::int64_t /*g*/, Q8_0& /*block*/) {}

template <class Block>
constexpr bool kHasMin = std::is_same_v<Block, Q4_1> || std::is_same_v<Block, Q5_1>;
template <class Block>
constexpr bool kHasFifthBit = std::is_same_v<Block, Q5_0> || std::is_same_v<Block, Q5_1>;

template <class Block>
EncodeStatus encode(WeightRun weights, std::int64_t n, std::uint8_t* out) {
  const BlockQuantizeKernels& kernels = block_quantize_kernels();
  Batch batch;
  for (std::int64_t g = 0; g < n / kShortGroup; g += kGroups) {
    const std::int64_t groups = std::min(kGroups, n / kShortGroup - g);
    const WeightRun run = weights.at(g * kShortGroup);
    bool finite = false;
    if constexpr (kHasMin<Block>) {
      finite = kernels.range32(run, groups, kHasFifthBit<Block> ? 31 : 15, batch.scales, batch.lows,
                               batch.codes);
    } else if constexpr (std::is_same_v<Block, Q8_0>) {
      finite = kernels.absmax32(run, groups, batch.scales, out + sizeof(Q8_0::d), sizeof(Q8_0));
    } else {
      finite =
          kernels.extreme32(run, groups, kHasFifthBit<Block> ? 16 : 8, batch.scales, batch.codes);
    }
    if (!finite) return EncodeStatus::kNotFinite;
    bool fits = kernels.to_f16(batch.scales, groups, batch.d);
    if constexpr (kHasMin<Block>) fits = kernels.to_f16(batch.lows, groups, batch.m) && fits;
    if (!fits) return EncodeStatus::kTooLarge;
    for (std::int64_t k = 0; k < groups; ++k, out += sizeof(Block)) {
      // In place: a copy would wait for the bytes just written. Blocks are bytes, of no alignment.
      auto& block = *reinterpret_cast<Block*>(out);
      put_u16(batch.d[k], block.d);
      assemble(batch, k, block);
    }
  }
  return EncodeStatus::kDone;
}

// ------------------------------------------------------------------ IQ4_NL

/// Sums of w * t and t * t over a group, t the table's value of each code; in double, in order.
struct TableSums {
  double wt = 0, tt = 0;
};

TableSums table_sums(const float* w, const std::uint8_t* codes) {
  TableSums s;
  for (std::int64_t i = 0; i < kShortGroup; ++i) {
    const double t = kIq4NlCodebook[codes[i]];
    s.wt += w[i] * t;
    s.tt += t * t;
  }
  return s;
}

/// Scale of w ~ scale * table: least squares for the codes of step widths that put the extreme
/// weight near either end of the table.
float fit_table(const QuantizeKernels& kernels, const TableQuantizer& table, const float* w) {
  float extreme = 0.0F;
  for (std::int64_t i = 0; i < kShortGroup; ++i) {
    if (std::fabs(w[i]) > std::fabs(extreme)) extreme = w[i];
  }
  if (extreme == 0.0F || !std::isfinite(127.0F / extreme)) return 0.0F;
  double best = -1.0, scale = 0.0;
  std::uint8_t codes[kShortGroup];
  for (const float end : {kIq4NlCodebook.front(), kIq4NlCodebook.back()}) {
    for (int step = -kTableSteps; step <= kTableSteps; ++step) {
      const float factor = (end + static_cast<float>(step)) / extreme / 127.0F;
      kernels.encode_table(table, {DType::kF32, w}, kShortGroup, factor, false, codes);
      const TableSums s = table_sums(w, codes);
      // The squared error is sum w^2 - wt^2 / tt. The table has no zero: tt > 0.
      const double gain = s.wt * s.wt / s.tt;
      if (gain > best) best = gain, scale = s.wt / s.tt;
    }
  }
  return static_cast<float>(scale);
}

}  // namespace

const TableQuantizer& iq4_nl_quantizer() {
  static const TableQuantizer kTable = [] {
    TableQuantizer table;
    for (std::size_t i = 0; i < 16; ++i) table.codes[i] = static_cast<std::uint8_t>(i);
    for (std::size_t i = 0; i < 15; ++i) {
      table.thresholds[i] = (kIq4NlCodebook[i] + kIq4NlCodebook[i + 1]) * 0.5F / 127.0F;
    }
    return table;
  }();
  return kTable;
}

EncodeStatus encode_iq4_nl(WeightRun weights, std::int64_t n, std::uint8_t* out) {
  const TableQuantizer& table = iq4_nl_quantizer();
  const QuantizeKernels& kernels = quantize_kernels();
  float w[kShortGroup];
  std::uint8_t codes[kShortGroup];
  for (std::int64_t i = 0; i < n; i += kShortGroup, out += sizeof(IQ4_NL)) {
    widen_to_f32(weights.dtype, weights.at(i).data, kShortGroup, w);
    if (!std::isfinite(kernels.absmax({DType::kF32, w}, kShortGroup))) {
      return EncodeStatus::kNotFinite;
    }
    const std::uint16_t d = f32_to_f16(fit_table(kernels, table, w));
    if ((d & 0x7C00) == 0x7C00) return EncodeStatus::kTooLarge;
    const float scale = f16_to_f32(d);
    const float factor = scale == 0.0F ? 0.0F : 1.0F / scale / 127.0F;
    kernels.encode_table(table, {DType::kF32, w}, kShortGroup, factor, false, codes);
    IQ4_NL block;
    put_u16(d, block.d);
    put_nibbles(codes, block.qs);
    std::memcpy(out, &block, sizeof(block));
  }
  return EncodeStatus::kDone;
}

EncodeStatus encode_blocks32(GgmlType type, WeightRun weights, std::int64_t n, std::uint8_t* out) {
  switch (type) {
    case GgmlType::kQ4_0:
      return encode<Q4_0>(weights, n, out);
    case GgmlType::kQ4_1:
      return encode<Q4_1>(weights, n, out);
    case GgmlType::kQ5_0:
      return encode<Q5_0>(weights, n, out);
    case GgmlType::kQ5_1:
      return encode<Q5_1>(weights, n, out);
    case GgmlType::kQ8_0:
      return encode<Q8_0>(weights, n, out);
    default:
      fail(Errc::kInternal, "gguf: encode_blocks32 has no such type");
  }
}

}  // namespace quantal::gguf
