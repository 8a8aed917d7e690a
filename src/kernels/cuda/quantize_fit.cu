#include "kernels/cuda/launchers.h"
#include "kernels/cuda/quantize_fit_inl.h"

namespace quantal::cuda {

void quantize_fit_table(const QuantizeArgs& args, Stream stream) {
  start("quantize_fit_table", quantize_fit_table_kernel, quantize_geometry(args.groups * kWarp),
        args, stream);
}

void quantize_super(const QuantizeArgs& args, Stream stream) {
  const Geometry geometry = super_geometry(args.rows * (args.cols / kSuperWeights));
  const auto encode = [&](void (*kernel)(QuantizeArgs)) {
    start("quantize_super", kernel, geometry, args, stream);
  };
  switch (args.bits) {
    case 4:
      return encode(quantize_super_kernel<4>);
    case 5:
      return encode(quantize_super_kernel<5>);
    default:
      return encode(quantize_super_kernel<6>);
  }
}

}  // namespace quantal::cuda
