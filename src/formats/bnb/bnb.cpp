#include "formats/bnb/bnb.h"

#include <array>

#include "formats/bnb/bnb_checkpoint.h"
#include "formats/bnb/bnb_codec.h"
#include "formats/bnb/bnb_params.h"

namespace quantal::bnb {
namespace {

constexpr std::array<QuantizationMethod, 2> kMethods = {QuantizationMethod::BNB_NF4,
                                                        QuantizationMethod::BNB_INT8};

/// The nested offset is the mean of every absmax; without it a block reaches into the next row.
Reach reach(const QuantizeOptions& options) {
  if (options.method == QuantizationMethod::BNB_INT8) return Reach::kRow;
  return options.double_quant ? Reach::kTensor : Reach::kNeighbourRows;
}

}  // namespace

constinit const Dialect kDialect = {
    .id = kDialectId,
    .name = "bnb",
    .title = "bitsandbytes",
    .reads = "NF4, FP4, LLM.int8",
    .writes = "NF4, FP4, LLM.int8",
    .methods = kMethods,
    .bits = kBits,
    .group_sizes = kBlockSizes,
    .group_multiple = 32,
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

}  // namespace quantal::bnb
