// Packed weights and operands on a device: checks, one device for all.
#pragma once

#include <optional>
#include <string>

#include "torch/stable_tensor.h"

namespace quantal::stable_ops {

/// How buffers and operands must lie in memory.
enum class Placing {
  kContiguous,
  kAligned,  ///< contiguous, at a multiple of 16 bytes: what kernels of a GPU read
};

/// A packed weight on a device; its buffers are held while work that reads them is enqueued.
class [[gnu::visibility("hidden")]] DevicePacked {
 public:
  /// Throws Error{kDevice} if the buffers are on different devices, Error{kDtype} or Error{kShape}
  /// for buffers that do not fit `spec_ints`.
  DevicePacked(const char* where, Placing placing, const Tensor& codes, const Tensor& stats,
               const Tensor& shared, const Ints& spec_ints);

  const PackedSpec& spec() const { return spec_; }
  const Ints& ints() const { return ints_; }
  const Tensor& codes() const { return codes_; }  ///< and a tensor of the device
  const Tensor& stats() const { return stats_; }
  const Tensor& shared() const { return shared_; }

  /// `t` as the placing says; throws Error{kDevice} or Error{kShape} unless it is [.., width].
  Tensor rows(const char* what, const Tensor& t, std::int64_t width) const;
  /// A bias of out_features, or none; the same.
  std::optional<Tensor> bias(const std::optional<Tensor>& bias) const;
  /// Throws Error{kDevice} unless `t` is on the device of the weight.
  void check_place(const std::string& what, const Tensor& t) const;
  /// Throws Error{kDevice}, Error{kDtype} or Error{kShape} unless `out` takes a product of `x` with
  /// this last dimension.
  void check_product(const char* what, const Tensor& out, const Tensor& x, std::int64_t width)
      const;
  /// The same for an `out` of the decoded matrix.
  void check_decoded(const Tensor& out) const;

 private:
  Tensor bytes(const char* what, const Tensor& t, std::size_t expected) const;
  Tensor settled(const Tensor& t) const;

  const char* where_;
  Placing placing_;
  Ints ints_;
  PackedSpec spec_;
  Tensor codes_, stats_, shared_;
};

/// "cuda:1", "cpu".
std::string place_name(const Tensor& t);

}  // namespace quantal::stable_ops
