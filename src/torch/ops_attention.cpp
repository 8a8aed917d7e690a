// Attention (quantal/attention.h) on torch's stable ABI (see ops_stable.cpp).
//
//   attention(Tensor q, Tensor k, Tensor v, Tensor? runs, bool causal, float scale,
//             bool with_gradient) -> (Tensor out, Tensor lse)
//   attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? runs, Tensor out,
//                      Tensor lse, bool causal, float scale) -> (Tensor, Tensor, Tensor)
//   mask_runs(Tensor mask) -> Tensor runs
//
// q [batch, heads, queries, dim], k and v [batch, kv_heads, keys, dim] with any strides; a last
// axis that is not dense is copied. `out` has the shape of q and lies in memory as [batch, queries,
// heads, dim], which the product behind it reads; runs are int32 [2, batch, queries], first keys
// and ends, causal is false beside them, and mask_runs finds those of a bool mask [batch, 1,
// queries, keys], or gives [0] for a mask that has none; lse is float32 [batch, heads, queries], or
// [0] without a gradient. Gradients lie as empty_like of their inputs does. For tensors on the CPU:
// whoever calls asks attention_refusal before. Python registers autograd and autocast, C++ has
// attention.cpp.

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <string>
#include <tuple>

#include "quantal/attention_choice.h"
#include "torch/ops_link.h"
#include "torch/stable_executor.h"
#include "torch/stable_tensor.h"

namespace quantal {
void link_attention_ops() noexcept {}
}  // namespace quantal

namespace quantal::stable_ops {
namespace {

constexpr std::int64_t kAxes = 4, kLast = 3;

void check_like(const char* what, const Tensor& t, const Tensor& other) {
  check_cpu(what, t);
  if (t.scalar_type() != other.scalar_type()) {
    fail(Errc::kDtype, std::string(what) + " is " + type_name(t.scalar_type()) + ", expected " +
                           type_name(other.scalar_type()) + " as q");
  }
}

void check_sizes(const char* what, const Tensor& t, const Ints& expected) {
  const auto actual = t.sizes();
  if (!std::equal(actual.begin(), actual.end(), expected.begin(), expected.end())) {
    fail(Errc::kShape, std::string(what) + " has shape " + sizes_string(t) + ", expected " +
                           shape_string(expected));
  }
}

std::span<const std::int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.data(), sizes.size()};
}

AttentionShape checked_shape(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                             double scale) {
  check_cpu("quantal::attention: q", q);
  check_like("quantal::attention: k", k, q);
  check_like("quantal::attention: v", v, q);
  return attention_shape(sizes_of(q), sizes_of(k), sizes_of(v), causal, scale);
}

/// Given runs, contiguous.
std::optional<Tensor> checked_runs(const std::optional<Tensor>& runs, AttentionShape& shape) {
  if (!runs || !runs->defined()) return std::nullopt;
  check_cpu("quantal::attention: runs", *runs);
  if (runs->scalar_type() != ScalarType::Int) {
    fail(Errc::kDtype, std::string("quantal::attention: runs is ") +
                           type_name(runs->scalar_type()) + ", expected int32");
  }
  check_sizes("quantal::attention: runs", *runs, {2, shape.batch, shape.queries});
  Tensor dense = runs->is_contiguous() ? *runs : stable::contiguous(*runs);
  shape.run_begin = static_cast<const std::int32_t*>(dense.const_data_ptr());
  shape.run_end = shape.run_begin + shape.batch * shape.queries;
  return dense;
}

/// Where the values of a head follow one another, as the kernels read them.
bool has_dense_heads(const Tensor& t) { return t.size(kLast) <= 1 || t.stride(kLast) == 1; }
Tensor with_dense_heads(const Tensor& t) {
  return has_dense_heads(t) ? t : stable::contiguous(detached(t));
}

AttentionStrides strides_of(const Tensor& t) {
  return {.batch = t.stride(0), .head = t.stride(1), .position = t.stride(2)};
}
/// A view of a tensor with dense heads that outlives it.
AttentionInput input_of(const Tensor& t) { return {t.const_data_ptr(), strides_of(t)}; }
AttentionOutput output_of(Tensor& t) { return {t.mutable_data_ptr(), strides_of(t)}; }

/// [batch, heads, queries, dim] in the memory of [batch, queries, heads, dim].
Tensor empty_out(const AttentionShape& s, ScalarType type) {
  const std::array<std::int64_t, kAxes> sizes{s.batch, s.heads, s.queries, s.dim};
  const std::int64_t row = s.heads * s.dim;
  const std::array<std::int64_t, kAxes> strides{s.queries * row, s.dim, row, 1};
  const auto dtype = stable::detail::to<std::int32_t>(stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kAxes, sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

std::tuple<Tensor, Tensor> attention_cpu(Tensor q, Tensor k, Tensor v, std::optional<Tensor> runs,
                                         bool causal, double scale, bool with_gradient) {
  const DType dtype = weight_dtype("quantal::attention: q", q.scalar_type());
  AttentionShape shape = checked_shape(q, k, v, causal, scale);
  const auto held = checked_runs(runs, shape);
  const Tensor queries = with_dense_heads(q), keys = with_dense_heads(k);
  const Tensor values = with_dense_heads(v);
  Tensor out = empty_out(shape, q.scalar_type());
  const Ints lse_sizes =
      with_gradient ? Ints{shape.batch, shape.heads, shape.queries} : Ints{std::int64_t{0}};
  Tensor lse = empty_like_of(q, lse_sizes, ScalarType::Float);
  attention(shape, dtype, input_of(queries), input_of(keys), input_of(values), output_of(out),
            with_gradient ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr,
            stable_executor());
  return {out, lse};
}

/// What a kernel writes a gradient of `input` into: the result itself, or, where its heads are not
/// dense, a contiguous tensor that is copied into it.
class [[gnu::visibility("hidden")]] Gradient {
 public:
  explicit Gradient(const Tensor& input)
      : result_(stable::empty_like(detached(input))),
        written_(has_dense_heads(result_)
                     ? result_
                     : empty_like_of(input, sizes_with_last(input, input.size(kLast)),
                                     input.scalar_type())) {}
  AttentionOutput output() { return output_of(written_); }
  Tensor result() {
    if (result_.data_ptr() != written_.data_ptr()) stable::copy_(result_, written_);
    return result_;
  }

 private:
  Tensor result_, written_;
};

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                          std::optional<Tensor> runs, Tensor out,
                                                          Tensor lse, bool causal, double scale) {
  const DType dtype = weight_dtype("quantal::attention_backward: q", q.scalar_type());
  AttentionShape shape = checked_shape(q, k, v, causal, scale);
  const auto held = checked_runs(runs, shape);
  const Ints sizes{shape.batch, shape.heads, shape.queries, shape.dim};
  check_like("quantal::attention_backward: grad", grad, q);
  check_sizes("quantal::attention_backward: grad", grad, sizes);
  check_like("quantal::attention_backward: out", out, q);
  check_sizes("quantal::attention_backward: out", out, sizes);
  check_cpu("quantal::attention_backward: lse", lse);
  if (lse.scalar_type() != ScalarType::Float) {
    fail(Errc::kDtype, std::string("quantal::attention_backward: lse is ") +
                           type_name(lse.scalar_type()) + ", expected float32");
  }
  check_sizes("quantal::attention_backward: lse", lse, {shape.batch, shape.heads, shape.queries});
  const Tensor logs = lse.is_contiguous() ? lse : stable::contiguous(detached(lse));
  const Tensor dense[] = {with_dense_heads(q), with_dense_heads(k), with_dense_heads(v),
                          with_dense_heads(out), with_dense_heads(grad)};
  Gradient dq(q), dk(k), dv(v);
  attention_backward(shape, dtype,
                     {.q = input_of(dense[0]),
                      .k = input_of(dense[1]),
                      .v = input_of(dense[2]),
                      .out = input_of(dense[3]),
                      .lse = static_cast<const float*>(logs.const_data_ptr()),
                      .grad = input_of(dense[4])},
                     {.q = dq.output(), .k = dk.output(), .v = dv.output()}, stable_executor());
  return {dq.result(), dk.result(), dv.result()};
}

Tensor mask_runs_cpu(Tensor mask) {
  check_cpu("quantal::mask_runs: mask", mask);
  if (mask.scalar_type() != ScalarType::Bool || mask.dim() != kAxes || mask.size(1) != 1) {
    fail(Errc::kShape, std::string("quantal::mask_runs: mask is ") + type_name(mask.scalar_type()) +
                           " " + sizes_string(mask) + ", expected bool [batch, 1, queries, keys]");
  }
  const Tensor dense = with_dense_heads(mask);
  const std::int64_t batch = mask.size(0), queries = mask.size(2), keys = mask.size(kLast);
  Tensor runs = empty_like_of(mask, {2, batch, queries}, ScalarType::Int);
  auto* begin = static_cast<std::int32_t*>(runs.mutable_data_ptr());
  std::int32_t* end = begin + batch * queries;
  const auto* seen = static_cast<const std::uint8_t*>(dense.const_data_ptr());
  for (std::int64_t b = 0; b < batch; ++b, begin += queries, end += queries) {
    const auto* rows = seen + b * dense.stride(0);
    if (!runs_of_mask(rows, queries, keys, dense.stride(2), begin, end)) {
      return empty_like_of(mask, {0}, ScalarType::Int);
    }
  }
  return runs;
}

// ------------------------------------------------------------------ meta kernels

/// Fresh and contiguous. Sizes may be symbolic here and cannot be read through the stable ABI, so
/// they travel inside views.
Tensor contiguous_like(const Tensor& t, ScalarType type) {
  const std::optional<torch::headeronly::MemoryFormat> format =
      torch::headeronly::MemoryFormat::Contiguous;
  return call("aten::empty_like", "", t, std::optional<ScalarType>(type), std::nullopt,
              std::nullopt, std::nullopt, format);
}

std::tuple<Tensor, Tensor> attention_meta(Tensor q, Tensor, Tensor, std::optional<Tensor>, bool,
                                          double, bool with_gradient) {
  const Tensor self = detached(q);
  const Tensor out = contiguous_like(stable::transpose(self, 1, 2), q.scalar_type());
  const Tensor lse = with_gradient
                         ? contiguous_like(stable::select(self, kLast, 0), ScalarType::Float)
                         : empty_like_of(q, {0}, ScalarType::Float);
  return {stable::transpose(out, 1, 2), lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_meta(Tensor, Tensor q, Tensor k, Tensor v,
                                                           std::optional<Tensor>, Tensor, Tensor,
                                                           bool, double) {
  return {stable::empty_like(detached(q)), stable::empty_like(detached(k)),
          stable::empty_like(detached(v))};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(quantal, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? runs, bool causal, float scale, "
      "bool with_gradient) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? runs, Tensor out, "
      "Tensor lse, bool causal, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("mask_runs(Tensor mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(quantal, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
  m.impl("mask_runs", TORCH_BOX(&mask_runs_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(quantal, Meta, m) {
  m.impl("attention", TORCH_BOX(&attention_meta));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_meta));
}

}  // namespace quantal::stable_ops
