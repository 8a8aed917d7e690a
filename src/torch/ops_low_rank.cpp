// What LoRA adds to a product, and its gradients (quantal/low_rank.h), on torch's stable ABI (see
// ops_stable.cpp).
//
//   add_low_rank_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, float scaling) -> Tensor t
//   low_rank_backward_(Tensor(a!)? x_grad, Tensor grad, Tensor x, Tensor t, Tensor a, Tensor b,
//                      float scaling) -> (Tensor a_grad, Tensor b_grad)
//
// x and x_grad are [..., in], y and grad [..., out], with the same leading sizes and of one dtype;
// a is [rank, in], b [out, rank], each of a dtype of its own (float32, float16, bfloat16), which
// its gradient, a float32 sum, is rounded to; t is float32 [rows, rank]. y and x_grad are added to
// where they lie: contiguous, in memory of their own. For tensors on the CPU. Python and C++ call
// them inside autograd functions of their own.

#include <optional>
#include <string>
#include <tuple>

#include "quantal/low_rank.h"
#include "torch/ops_link.h"
#include "torch/stable_executor.h"
#include "torch/stable_products.h"

namespace quantal {
void link_low_rank_ops() noexcept {}
}  // namespace quantal

namespace quantal::stable_ops {
namespace {

const std::string kAdd = "quantal::add_low_rank_: ";
const std::string kBackward = "quantal::low_rank_backward_: ";

Tensor with_dtype(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : stable::to(detached(t), type);
}

/// A matrix as kernels read it: float32 and contiguous.
Tensor checked_matrix(const std::string& what, const Tensor& t, std::int64_t rows,
                      std::int64_t cols) {
  check_cpu(what.c_str(), t);
  weight_dtype(what.c_str(), t.scalar_type());
  if (t.dim() != 2 || t.size(0) != rows || t.size(1) != cols) {
    fail(Errc::kShape,
         what + " has shape " + sizes_string(t) + ", expected " + shape_string(Ints{rows, cols}));
  }
  const Tensor wide = with_dtype(t, ScalarType::Float);
  return wide.is_contiguous() ? wide : stable::contiguous(wide);
}

/// An adapter whose matrices, as kernels read them, are held meanwhile.
struct [[gnu::visibility("hidden")]] Adapter {
  Tensor a, b;
  LowRank view;
};

Adapter checked_adapter(const std::string& where, const Tensor& a, const Tensor& b, std::int64_t in,
                        std::int64_t out, double scaling) {
  const std::int64_t rank = a.dim() == 2 ? a.size(0) : 0;
  Adapter w{
      checked_matrix(where + "a", a, rank, in), checked_matrix(where + "b", b, out, rank), {}};
  w.view = {.in = in,
            .out = out,
            .rank = rank,
            .a = static_cast<const float*>(w.a.const_data_ptr()),
            .b = static_cast<const float*>(w.b.const_data_ptr()),
            .scaling = static_cast<float>(scaling)};
  return w;
}

std::int64_t last_size(const std::string& what, const Tensor& t) {
  if (t.dim() < 1) fail(Errc::kShape, what + " is a scalar, expected [..., features]");
  return t.size(t.dim() - 1);
}

/// Throws unless `t` can be added to where it lies.
void check_written(const std::string& what, const Tensor& t, const Tensor& like,
                   std::int64_t width) {
  check_cpu(what.c_str(), t);
  check_out(what.c_str(), t, like, width);
  if (!t.is_contiguous()) fail(Errc::kShape, what + " has gaps, expected a contiguous tensor");
  if (share_memory(t, like)) {
    fail(Errc::kUnsupported, what + " shares memory with an operand, expected memory of its own");
  }
}

Tensor add_low_rank_cpu(Tensor y, Tensor x, Tensor a, Tensor b, double scaling) {
  const std::string input = kAdd + "x";
  const DType dtype = weight_dtype(input.c_str(), x.scalar_type());
  const std::int64_t in = last_size(input, x), out = last_size(kAdd + "y", y);
  const Rows rows(input.c_str(), x, in);
  check_written(kAdd + "y", y, x, out);
  const Adapter w = checked_adapter(kAdd, a, b, in, out, scaling);
  Tensor t = empty_like_of(x, {rows.count(), w.view.rank}, ScalarType::Float);
  add_low_rank(w.view, dtype, rows.data(), rows.count(), y.mutable_data_ptr(),
               static_cast<float*>(t.mutable_data_ptr()), stable_executor());
  return t;
}

std::tuple<Tensor, Tensor> low_rank_backward_cpu(std::optional<Tensor> x_grad, Tensor grad,
                                                 Tensor x, Tensor t, Tensor a, Tensor b,
                                                 double scaling) {
  const std::string input = kBackward + "x", output = kBackward + "grad";
  const DType dtype = weight_dtype(input.c_str(), x.scalar_type());
  const std::int64_t in = last_size(input, x), out = last_size(output, grad);
  const Rows rows(input.c_str(), x, in);
  check_out(output.c_str(), grad, x, out);
  const Rows grads(output.c_str(), grad, out);
  const Adapter w = checked_adapter(kBackward, a, b, in, out, scaling);
  const Tensor low = checked_matrix(kBackward + "t", t, rows.count(), w.view.rank);
  void* added = nullptr;
  if (given(x_grad)) {
    check_written(kBackward + "x_grad", *x_grad, grad, in);
    check_written(kBackward + "x_grad", *x_grad, x, in);
    added = x_grad->mutable_data_ptr();
  }
  Tensor a_grad = empty_like_of(x, {w.view.rank, in}, ScalarType::Float);
  Tensor b_grad = empty_like_of(x, {out, w.view.rank}, ScalarType::Float);
  low_rank_backward(w.view, dtype, grads.data(), rows.data(),
                    static_cast<const float*>(low.const_data_ptr()), rows.count(), added,
                    static_cast<float*>(a_grad.mutable_data_ptr()),
                    static_cast<float*>(b_grad.mutable_data_ptr()), stable_executor());
  return {with_dtype(a_grad, a.scalar_type()), with_dtype(b_grad, b.scalar_type())};
}

// ------------------------------------------------------------------ meta kernels

Tensor add_low_rank_meta(Tensor, Tensor x, Tensor a, Tensor, double) {
  const Tensor rows = call("aten::reshape", "", detached(x), Ints{-1, a.size(1)});
  return stable::to(meta_with_last(rows, a.size(0)), ScalarType::Float);
}

std::tuple<Tensor, Tensor> low_rank_backward_meta(std::optional<Tensor>, Tensor, Tensor, Tensor,
                                                  Tensor a, Tensor b, double) {
  return {stable::empty_like(detached(a)), stable::empty_like(detached(b))};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(quantal, m) {
  m.def("add_low_rank_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, float scaling) -> Tensor");
  m.def(
      "low_rank_backward_(Tensor(a!)? x_grad, Tensor grad, Tensor x, Tensor t, Tensor a, "
      "Tensor b, float scaling) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(quantal, CPU, m) {
  m.impl("add_low_rank_", TORCH_BOX(&add_low_rank_cpu));
  m.impl("low_rank_backward_", TORCH_BOX(&low_rank_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(quantal, Meta, m) {
  m.impl("add_low_rank_", TORCH_BOX(&add_low_rank_meta));
  m.impl("low_rank_backward_", TORCH_BOX(&low_rank_backward_meta));
}

}  // namespace quantal::stable_ops
