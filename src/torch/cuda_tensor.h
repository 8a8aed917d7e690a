// Tensors of a device as the CUDA kernels take them: checks, alignment, one device for all.
#pragma once

#include <optional>
#include <string>

#include "torch/cuda_library.h"
#include "torch/stable_tensor.h"

namespace quantal::stable_ops {

/// A packed weight on a device; its buffers are held while kernels that read them are enqueued.
class [[gnu::visibility("hidden")]] DevicePacked {
 public:
  /// Throws Error{kDevice} if the buffers are on different devices or the kernels are not in use,
  /// Error{kDtype} or Error{kShape} for buffers that do not fit `spec_ints`.
  DevicePacked(const char* where, const Tensor& codes, const Tensor& stats, const Tensor& shared,
               const Ints& spec_ints);

  const PackedSpec& spec() const { return spec_; }
  const Tensor& like() const { return codes_; }  ///< a tensor of the device
  quantal_cuda_matrix view() const;
  const quantal_cuda_interface& kernels() const { return *kernels_; }
  quantal_cuda_stream stream() const;

  /// `t` contiguous and aligned, [.., width]; throws Error{kDevice} or Error{kShape}.
  Tensor rows(const char* what, const Tensor& t, std::int64_t width) const;
  /// A bias of out_features, or none; the same.
  std::optional<Tensor> bias(const std::optional<Tensor>& bias) const;
  /// Throws Error{kDevice} unless `t` is on the device of the weight.
  void check_place(const std::string& what, const Tensor& t) const;

 private:
  Tensor bytes(const char* what, const Tensor& t, std::size_t expected) const;

  const char* where_;
  const quantal_cuda_interface* kernels_;
  Ints ints_;
  PackedSpec spec_;
  Tensor codes_, stats_, shared_;
};

/// "cuda:1", "cpu".
std::string place_name(const Tensor& t);

}  // namespace quantal::stable_ops
