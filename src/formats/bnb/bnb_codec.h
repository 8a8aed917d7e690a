// bitsandbytes: choosing codes and statistics (LLM.int8 in bnb_int8.h).
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "formats/fresh.h"
#include "quantal/formats.h"

namespace quantal::bnb {

/// Dialect::make_spec. options.mode names quant_storage ("" = uint8) of 4-bit layers.
PackedSpec make_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options);

/// Dialect::quantize with the nested offset given instead of computed (nullopt: computed). The
/// offset is the mean of all absmax; its summation order is each implementation's own, so tests
/// compare everything below it at upstream's offset.
void quantize_with_offset(const PackedSpec& spec, DType dtype, const void* weights,
                          std::optional<float> nested_offset, std::uint8_t* codes,
                          std::uint8_t* stats, std::uint8_t* shared, const Executor& executor);

/// Dialect::quantize.
void quantize(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
              std::uint8_t* stats, std::uint8_t* shared, const Executor& executor);

/// Dialect::quantize_part: the offset is the mean over all rows.
void quantize_part(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
                   std::uint8_t* stats, std::uint8_t* shared, const RowGather& gather,
                   const Executor& executor);

/// Second level: u8 codes of numbers and one absmax per kNestedBlock of them.
struct Nested {
  FreshVector<std::uint8_t> codes;
  FreshVector<float> absmax;
};
/// Quantizes `values` - `offset` blockwise with the dynamic map as upstream's CPU path does:
/// through a table of 65536 entries over [-1, 1], which is not exactly the nearest entry. Bit-exact
/// with bitsandbytes 0.50.2.
Nested quantize_dynamic(std::span<const float> values, float offset, const Executor& executor);

}  // namespace quantal::bnb
