// What the files of the stable-ABI ops share: checks, and tensors as packed matrices.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "quantal/formats.h"
#include "quantal/kernels.h"

namespace quantal::stable_ops {

namespace stable = torch::stable;
using stable::Tensor;
using torch::headeronly::ScalarType;
using Ints = std::vector<std::int64_t>;

/// Calls an ATen operator through the dispatcher and returns its one result.
template <class... Args>
Tensor call(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return stable::detail::to<Tensor>(stack[0]);
}

/// Throws the error that is being handled again, with torch's words for it where it came through
/// the C interface, which keeps only that a call failed (torch 2.13 and above remember them).
[[noreturn]] void rethrow_explained();
/// An op whose errors are explained.
template <auto kOp>
struct Explained;
template <class Result, class... Args, Result (*kOp)(Args...)>
struct Explained<kOp> {
  static Result call(Args... args) {
    try {
      return kOp(std::move(args)...);
    } catch (const std::runtime_error&) {
      rethrow_explained();
    }
  }
};

/// Forgets the autograd history: kernels compute values only, and out= products refuse tensors
/// that require gradients.
Tensor detached(const Tensor& t);

const char* type_name(ScalarType type);
/// Throws Error{kDtype} for anything but float32, float16 and bfloat16.
DType weight_dtype(const char* what, ScalarType type);
std::string sizes_string(const Tensor& t);
/// Throws Error{kDevice}.
void check_cpu(const char* what, const Tensor& t);
Tensor empty_like_of(const Tensor& like, const Ints& sizes, ScalarType type);
/// The same for a decoded matrix: a large one on a CPU lies in a block of `core/result_block.h`,
/// and its storage can't be resized.
Tensor result_like(const Tensor& like, const Ints& sizes, ScalarType type);

/// A packed weight whose buffers are held (made contiguous if needed) while a kernel reads them.
struct [[gnu::visibility("hidden")]] Packed {  // as torch::stable::Tensor is
  Tensor codes, stats, shared;
  PackedView view;
};
/// Throws Error{kDevice}, Error{kDtype} or Error{kShape} for buffers that do not fit `spec`.
Packed packed_of(const Tensor& codes, const Tensor& stats, const Tensor& shared, const Ints& spec);

/// A tensor [..., width] as m contiguous rows. Views pass through the dispatcher and cost more than
/// a small product, so kernels read `data()`, and only the framework's products ask for `matrix()`.
class [[gnu::visibility("hidden")]] Rows {
 public:
  /// Copies a tensor that has gaps. Throws Error{kDevice} or Error{kShape}.
  Rows(const char* what, const Tensor& t, std::int64_t width);
  /// Uninitialised, with the device, dtype and leading sizes of `like`. `tensor()` is no view:
  /// autograd refuses in-place changes of views that a custom function returned.
  static Rows fresh(const Tensor& like, std::int64_t width);

  std::int64_t count() const { return count_; }
  ScalarType scalar_type() const { return tensor_.scalar_type(); }
  const Tensor& tensor() const { return tensor_; }
  const void* data() const { return tensor_.const_data_ptr(); }
  void* mutable_data() { return tensor_.mutable_data_ptr(); }
  /// [m, width], a view without history.
  Tensor matrix() const;

 private:
  Rows(Tensor tensor, std::int64_t width);

  Tensor tensor_;
  std::int64_t width_, count_;
};
/// Sizes of `t` with the last one replaced.
Ints sizes_with_last(const Tensor& t, std::int64_t last);

}  // namespace quantal::stable_ops
