#include "torch/stable_products.h"

#include <algorithm>
#include <utility>

namespace quantal::stable_ops {

bool given(const std::optional<Tensor>& bias) { return bias && bias->defined(); }

void check_bias(const Tensor& bias, std::int64_t rows) {
  check_cpu("quantal::linear: bias", bias);
  weight_dtype("quantal::linear: bias", bias.scalar_type());
  if (bias.dim() != 1 || bias.size(0) != rows) {
    fail(Errc::kShape, "quantal::linear: bias has shape " + sizes_string(bias) + ", expected [" +
                           std::to_string(rows) + "]");
  }
}

const float* bias_values(const std::optional<Tensor>& bias, std::int64_t rows,
                         std::vector<float>& wide) {
  if (!given(bias)) return nullptr;
  check_bias(*bias, rows);
  const Tensor b = bias->is_contiguous() ? *bias : stable::contiguous(*bias);
  const DType dtype = weight_dtype("quantal::linear: bias", b.scalar_type());
  if (dtype == DType::kF32 && bias->is_contiguous()) {
    return static_cast<const float*>(b.const_data_ptr());
  }
  wide.resize(static_cast<std::size_t>(rows));
  widen_to_f32(dtype, b.const_data_ptr(), rows, wide.data());
  return wide.data();
}

DType checked_weight(const Tensor& weight, const PackedSpec& spec) {
  const DType dtype = weight_dtype("quantal::quantize: weight", weight.scalar_type());
  if (weight.dim() < 2 || weight.size(weight.dim() - 1) != spec.cols ||
      weight.numel() != checked_mul(spec.rows, spec.cols, "weight elements")) {
    fail(Errc::kShape, "quantal::quantize: weight has shape " + sizes_string(weight) +
                           ", expected [" + std::to_string(spec.rows) + ", " +
                           std::to_string(spec.cols) + "] of the spec");
  }
  return dtype;
}

bool share_memory(const Tensor& a, const Tensor& b) {
  const auto range = [](const Tensor& t) {
    const auto* begin = static_cast<const std::uint8_t*>(t.const_data_ptr());
    std::int64_t last = 0;
    for (std::int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return std::pair(begin, begin + (last + 1) * static_cast<std::int64_t>(t.element_size()));
  };
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto [a0, a1] = range(a);
  const auto [b0, b1] = range(b);
  return a0 < b1 && b0 < a1;
}

void check_out(const char* what, const Tensor& out, const Tensor& x, std::int64_t width) {
  const Ints sizes = sizes_with_last(x, width);
  const auto actual = out.sizes();
  if (out.scalar_type() != x.scalar_type()) {
    fail(Errc::kDtype, std::string(what) + " is " + type_name(out.scalar_type()) + ", expected " +
                           type_name(x.scalar_type()) + " as the input");
  }
  if (!std::equal(actual.begin(), actual.end(), sizes.begin(), sizes.end())) {
    fail(Errc::kShape, std::string(what) + " has shape " + sizes_string(out) + ", expected " +
                           shape_string(sizes));
  }
}

void check_dense_out(const std::string& what, const Tensor& out, const PackedSpec& spec) {
  weight_dtype(what.c_str(), out.scalar_type());
  if (out.dim() == 2 && out.size(0) == spec.rows && out.size(1) == spec.cols &&
      out.is_contiguous()) {
    return;
  }
  fail(Errc::kShape, what + " has shape " + sizes_string(out) + ", expected a contiguous [" +
                         std::to_string(spec.rows) + ", " + std::to_string(spec.cols) + "]");
}

Tensor meta_with_last(const Tensor& t, std::int64_t last) {
  Tensor self = detached(t);
  const std::int64_t dim = self.dim();
  if (dim < 1) fail(Errc::kShape, "quantal: x is a scalar, expected [..., in_features]");
  Tensor one = stable::narrow(self, dim - 1, 0, 1);
  Ints sizes(static_cast<std::size_t>(dim), -1);
  sizes.back() = last;
  const Tensor wide = call("aten::expand", "", one, sizes, false);
  return stable::contiguous(wide);
}

}  // namespace quantal::stable_ops
