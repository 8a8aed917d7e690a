#include "torch/cuda_tensor.h"

namespace quantal::stable_ops {
namespace {

const quantal_cuda_interface* kernels_in_use(const char* where) {
  const CudaLibrary& library = cuda_library();
  if (library.functions != nullptr) return library.functions;
  fail(Errc::kDevice,
       std::string(where) +
           ": tensors are on a GPU and the CUDA kernels are not in use: " + library.text);
}

}  // namespace

CudaPacked::CudaPacked(const char* where, const Tensor& codes, const Tensor& stats,
                       const Tensor& shared, const Ints& spec_ints)
    : DevicePacked(where, Placing::kAligned, codes, stats, shared, spec_ints),
      kernels_(kernels_in_use(where)) {}

quantal_cuda_matrix CudaPacked::view() const {
  return {ints().data(),   codes().const_data_ptr(),  codes().numel(), stats().const_data_ptr(),
          stats().numel(), shared().const_data_ptr(), shared().numel()};
}

quantal_cuda_stream CudaPacked::stream() const {
  return current_cuda_stream(codes().is_cpu() ? 0 : codes().get_device_index());
}

}  // namespace quantal::stable_ops
