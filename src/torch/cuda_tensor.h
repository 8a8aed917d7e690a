// Packed weights on a GPU as the CUDA kernels take them.
#pragma once

#include "torch/cuda_library.h"
#include "torch/device_tensor.h"

namespace quantal::stable_ops {

class [[gnu::visibility("hidden")]] CudaPacked : public DevicePacked {
 public:
  /// Throws what DevicePacked throws, Error{kDevice} if the kernels are not in use.
  CudaPacked(const char* where, const Tensor& codes, const Tensor& stats, const Tensor& shared,
             const Ints& spec_ints);

  quantal_cuda_matrix view() const;
  const quantal_cuda_interface& kernels() const { return *kernels_; }
  quantal_cuda_stream stream() const;

 private:
  const quantal_cuda_interface* kernels_;
};

}  // namespace quantal::stable_ops
