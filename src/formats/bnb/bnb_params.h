// bitsandbytes: parameters, tables and the facts that a packed spec keeps for the writer.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "kernels/quantize.h"
#include "quantal/formats.h"

namespace quantal::bnb {

inline constexpr int kDialectId = 1;
inline constexpr std::array<std::int64_t, 8> kBlockSizes = {32,  64,   128,  256,
                                                            512, 1024, 2048, 4096};
inline constexpr std::array<int, 2> kBits = {4, 8};
/// Element types that the packed bytes of 4-bit codes may be viewed as (quant_storage).
inline constexpr std::array<DType, 5> kStorageTypes = {DType::kU8, DType::kI8, DType::kF16,
                                                       DType::kBF16, DType::kF32};
/// Scales per second-level block.
inline constexpr std::int64_t kNestedBlock = 256;
/// Floor of the divisor of a block: blocks smaller than this decode to about zero.
inline constexpr float kTinyAbsmax = 1e-38F;
/// Code of an int8 zero in the packed form: code = int8 + 128.
inline constexpr int kInt8Centre = 128;
/// llm_int8_threshold where nothing is said.
inline constexpr float kDefaultThreshold = 6.0F;

/// PackedSpec::dialect_flags of this dialect; all zero for what upstream writes by default.
struct Flags {
  bool fp4 = false;            ///< bit 0: quant_type "fp4"
  DType storage = DType::kU8;  ///< bits 1..5: quant_storage (0 = u8, else dtype + 1)
  std::uint8_t pad = 0;        ///< bits 6..9: pad nibble of an odd tensor, xor the one we write
  bool no_format = false;      ///< bit 10: int8 layer without the tensor weight_format
  float threshold = kDefaultThreshold;  ///< bits 11..42: llm_int8_threshold, xor the default

  std::int64_t to_int() const {
    const std::int64_t stored = storage == DType::kU8 ? 0 : static_cast<std::int64_t>(storage) + 1;
    return (fp4 ? 1 : 0) | (stored << 1) | (static_cast<std::int64_t>(pad) << 6) |
           (no_format ? 1 << 10 : 0) |
           (static_cast<std::int64_t>(threshold_bits(threshold) ^ kDefaultBits) << 11);
  }
  static Flags from_int(std::int64_t bits) {
    Flags f;
    f.fp4 = (bits & 1) != 0;
    const auto stored = static_cast<int>((bits >> 1) & 31);
    f.storage = stored == 0 ? DType::kU8 : static_cast<DType>(stored - 1);
    f.pad = static_cast<std::uint8_t>((bits >> 6) & 15);
    f.no_format = ((bits >> 10) & 1) != 0;
    f.threshold = std::bit_cast<float>(static_cast<std::uint32_t>(bits >> 11) ^ kDefaultBits);
    return f;
  }

 private:
  static constexpr std::uint32_t threshold_bits(float t) { return std::bit_cast<std::uint32_t>(t); }
  static constexpr std::uint32_t kDefaultBits = std::bit_cast<std::uint32_t>(kDefaultThreshold);
};

/// True for layers of LLM.int8; false for 4-bit ones.
inline bool is_int8(const PackedSpec& spec) { return spec.bits == 8; }

/// Thresholds are the float32 midpoints of the ascending codebook; a tie takes the lower value.
const TableQuantizer& table_quantizer(bool fp4);
/// The nibble that fills an odd tensor: the code of 0.
std::uint8_t pad_nibble(bool fp4);
/// The signed dynamic 8-bit map, 256 ascending float32.
const std::array<float, 256>& dynamic_map();

}  // namespace quantal::bnb
