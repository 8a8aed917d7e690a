// HQQ: scales and zeros as files hold them: plain, quantized themselves (`quant_zero`,
// `quant_scale`: 8-bit codes `zero_q` with their own scale and zero in `meta_zero`), or stacked in
// one tensor (`zero_scale`).
//
// A packed matrix holds the decoded values. The codes and their parameters cannot be found again
// from those (value_dtype rounds), so they stay in the residue.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/hqq/hqq_params.h"
#include "formats/hqq/hqq_state.h"

namespace quantal::hqq {

/// Name of the residue's entry for what W_q holds beyond codes (hqq_packing.h).
inline constexpr std::string_view kStrayBits = "stray_bits";

/// Statistics of all groups in the order of groups, elements of value_dtype.
struct StoredParameters {
  std::vector<std::uint8_t> scales, zeros;
};

/// Shape of scale and zero: [groups, 1] (axis 1), [1, groups] (axis 0), [] (channel_wise false).
std::vector<std::int64_t> parameter_shape(const PackedSpec& spec);

/// Bytes of a file, or decoded ones with their owner.
struct ParameterBytes {
  std::span<const std::uint8_t> bytes{};
  std::shared_ptr<const std::vector<std::uint8_t>> owner{};
};
struct OpenParameters {
  ParameterBytes scales, zeros;
};

/// Scale and zero of `groups` groups, as StoredParameters: where the file has them plain, views of
/// it; where they are quantized, decoded. Sets quant_zero, quant_scale and stacked, and appends to
/// `residue` what the writer needs. Throws Error{kCorrupt}, {kDtype}, {kShape}, {kUnsupported}
/// naming the field.
OpenParameters open_parameters(const Fields& fields, DType value_dtype, std::int64_t groups,
                               Flags& flags, std::vector<NamedTensor>& residue);

/// Puts parameters into rows of the statistics of a packed matrix, and back. With channel_wise
/// false there is one of each. Throws Error{kCorrupt} if rows disagree about a group.
void write_parameters(const PackedSpec& spec, const OpenParameters& parameters, RowRange rows,
                      std::uint8_t* stats, const Executor& executor);
StoredParameters parameters_of(const PackedView& w);

/// Appends the fields of scale and zero.
void append_parameters(const PackedSpec& spec, StoredParameters parameters,
                       std::span<const NamedTensor> residue, std::vector<NamedTensor>& out);

/// Group size of quantized zeros (0: one scale for all) and scales in upstream's configuration.
inline constexpr std::int64_t kZeroMetaGroup = 0;
inline constexpr std::int64_t kScaleMetaGroup = 128;

/// Fields "<what>_q" and "meta_<what>.*" of the right sizes, numbers still zero. what: "zero" or
/// "scale". group_size: members of a column of codes, or 0. Throws Error{kConfig} if it does not
/// divide the number of groups.
std::vector<NamedTensor> blank_meta(std::string_view what, const PackedSpec& spec,
                                    std::int64_t group_size);
/// Quantizes `values` (one per group, float32 before rounding) to 8 bits along axis 0 without the
/// solver, fills `fields` (from blank_meta) and replaces `values` by what decodes from them.
void quantize_parameters(std::string_view what, const PackedSpec& spec, std::int64_t group_size,
                         std::span<float> values, std::span<NamedTensor> fields);

}  // namespace quantal::hqq
