#include "formats/quanto/quanto.h"

#include <array>

#include "formats/quanto/quanto_checkpoint.h"
#include "formats/quanto/quanto_codec.h"
#include "formats/quanto/quanto_params.h"

namespace quantal::quanto {
namespace {

constexpr std::array<QuantizationMethod, 3> kMethods = {QuantizationMethod::QUANTO_INT2,
                                                        QuantizationMethod::QUANTO_INT4,
                                                        QuantizationMethod::QUANTO_INT8};

/// The optimizer stops on an error over the whole tensor; groups along axis -1 span rows.
Reach reach(const QuantizeOptions& options) {
  const bool optimize = options.mode.find("hqq") != std::string::npos;
  return optimize || options.axis == -1 ? Reach::kTensor : Reach::kRow;
}

}  // namespace

constinit const Dialect kDialect = {
    .id = kDialectId,
    .name = "quanto",
    .title = "Quanto",
    .reads = "qint2, qint4, qint8, qfloat8",
    .writes = "qint2, qint4, qint8",
    .methods = kMethods,
    .bits = kBits,
    .group_sizes = {},
    .group_multiple = 1,
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

}  // namespace quantal::quanto
