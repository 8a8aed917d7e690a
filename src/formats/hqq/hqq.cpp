#include "formats/hqq/hqq.h"

#include <array>

#include "formats/hqq/hqq_checkpoint.h"
#include "formats/hqq/hqq_codec.h"
#include "formats/hqq/hqq_params.h"
#include "formats/hqq/hqq_settings.h"

namespace quantal::hqq {
namespace {

constexpr std::array<QuantizationMethod, 1> kMethods = {QuantizationMethod::HQQ};

/// The solver stops on an error over the whole tensor; groups along axis 0 span all rows; quantized
/// zeros and scales need the range of all of them.
Reach reach(const QuantizeOptions& options) {
  const bool meta = options.quant_zero.value_or(false) || options.quant_scale.value_or(false);
  if (options.optimize || options.axis == 0 || meta) return Reach::kTensor;
  return options.group_size == 0 ? Reach::kRow : Reach::kNeighbourRows;
}

}  // namespace

constinit const Dialect kDialect = {
    .id = kDialectId,
    .name = "hqq",
    .title = "HQQ",
    .reads = "1 to 6 and 8 bits, both axes",
    .writes = "1 to 6 and 8 bits, both axes",
    .methods = kMethods,
    .bits = kBits,
    .group_sizes = {},
    .group_multiple = kGroupMultiple,
    .keeps_weight_dtype = false,
    .reach = reach,
    .make_spec = make_spec,
    .quantize = quantize,
    .quantize_part = quantize_part,
    .export_layer = export_layer,
    .recognizes = recognizes,
    .open_layer = open_layer,
    .layouts = kLayouts,
    .side_files = side_files,
    .read_settings = read_settings,
};

}  // namespace quantal::hqq
