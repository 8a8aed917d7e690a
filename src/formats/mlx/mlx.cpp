#include "formats/mlx/mlx.h"

#include <array>

#include "formats/mlx/mlx_checkpoint.h"
#include "formats/mlx/mlx_codec.h"
#include "formats/mlx/mlx_params.h"

namespace quantal::mlx {
namespace {

constexpr std::array<QuantizationMethod, 2> kMethods = {QuantizationMethod::MLX_INT4,
                                                        QuantizationMethod::MLX_INT8};

/// Groups lie within a row.
Reach reach(const QuantizeOptions& /*options*/) { return Reach::kRow; }

}  // namespace

constinit const Dialect kDialect = {
    .id = kDialectId,
    .name = "mlx",
    .title = "MLX",
    .reads = "affine 1 to 6 and 8 bits, mxfp4, nvfp4, mxfp8",
    .writes = "affine 1 to 6 and 8 bits, mxfp4, nvfp4, mxfp8",
    .methods = kMethods,
    .bits = kBits,
    .group_sizes = kGroupSizes,
    .group_multiple = 32,
    .quantizes_embeddings = true,
    .reach = reach,
    .make_spec = make_spec,
    .quantize = quantize,
    .export_layer = export_layer,
    .recognizes = recognizes,
    .open_layer = open_layer,
    .layouts = kLayouts,
    .side_files = side_files,
    .read_settings = read_settings,
};

}  // namespace quantal::mlx
