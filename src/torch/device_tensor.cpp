#include "torch/device_tensor.h"

#include "torch/stable_products.h"

namespace quantal::stable_ops {
namespace {

constexpr std::uintptr_t kAlignment = 16;

std::string type_of_device(stable::DeviceType type) {
  using stable::DeviceType;
  switch (type) {
    case DeviceType::CPU:
      return "cpu";
    case DeviceType::CUDA:
      return "cuda";
    case DeviceType::MPS:
      return "mps";
    case DeviceType::XPU:
      return "xpu";
    case DeviceType::HPU:
      return "hpu";
    case DeviceType::Meta:
      return "meta";
    default:
      return "device type " + std::to_string(static_cast<int>(type));
  }
}

bool same_place(const Tensor& a, const Tensor& b) {
  const stable::Device left = a.device(), right = b.device();
  return left.type() == right.type() && (a.is_cpu() || left.index() == right.index());
}

}  // namespace

std::string place_name(const Tensor& t) {
  const stable::Device place = t.device();
  const std::string name = type_of_device(place.type());
  return t.is_cpu() || place.index() < 0 ? name : name + ":" + std::to_string(place.index());
}

DevicePacked::DevicePacked(const char* where, Placing placing, const Tensor& codes,
                           const Tensor& stats, const Tensor& shared, const Ints& spec_ints)
    : where_(where),
      placing_(placing),
      ints_(spec_ints),
      spec_(spec_from_ints(spec_ints)),
      codes_(codes),
      stats_(stats),
      shared_(shared) {
  const PackedLayout layout = layout_of(spec_);
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  codes_ = bytes("codes", codes, size(spec_.rows * layout.code_bytes));
  stats_ = bytes("stats", stats, size(layout.stat_rows * layout.stat_bytes));
  shared_ = bytes("shared", shared, size(layout.shared_bytes));
}

Tensor DevicePacked::settled(const Tensor& t) const {
  const Tensor whole = t.is_contiguous() ? t : stable::contiguous(t);
  if (placing_ == Placing::kContiguous) return whole;
  const auto address = reinterpret_cast<std::uintptr_t>(whole.const_data_ptr());
  return address % kAlignment == 0 ? whole : stable::clone(whole);
}

Tensor DevicePacked::bytes(const char* what, const Tensor& t, std::size_t expected) const {
  const std::string name = std::string(where_) + ": " + what;
  check_place(name, t);
  if (t.scalar_type() != ScalarType::Byte) {
    fail(Errc::kDtype, name + " is " + type_name(t.scalar_type()) + ", expected uint8");
  }
  check_size(name + " bytes", static_cast<std::size_t>(t.numel()), expected);
  return settled(t);
}

void DevicePacked::check_place(const std::string& what, const Tensor& t) const {
  if (same_place(t, codes_)) return;
  fail(Errc::kDevice,
       what + " is on " + place_name(t) + ", expected " + place_name(codes_) + " as the codes");
}

Tensor DevicePacked::rows(const char* what, const Tensor& t, std::int64_t width) const {
  const std::string name = std::string(where_) + ": " + what;
  check_place(name, t);
  if (t.dim() < 1 || t.size(t.dim() - 1) != width) {
    fail(Errc::kShape, name + " has shape " + sizes_string(t) + ", expected last dimension " +
                           std::to_string(width));
  }
  return settled(t);
}

std::optional<Tensor> DevicePacked::bias(const std::optional<Tensor>& bias) const {
  if (!given(bias)) return std::nullopt;
  const std::string name = std::string(where_) + ": bias";
  check_place(name, *bias);
  weight_dtype(name.c_str(), bias->scalar_type());
  if (bias->dim() != 1 || bias->size(0) != spec_.rows) {
    fail(Errc::kShape, name + " has shape " + sizes_string(*bias) + ", expected [" +
                           std::to_string(spec_.rows) + "]");
  }
  return settled(detached(*bias));
}

void DevicePacked::check_product(const char* what, const Tensor& out, const Tensor& x,
                                 std::int64_t width) const {
  check_place(what, out);
  check_out(what, out, x, width);
}

void DevicePacked::check_decoded(const Tensor& out) const {
  const std::string name = std::string(where_) + ": out";
  check_place(name, out);
  check_dense_out(name, out, spec_);
}

}  // namespace quantal::stable_ops
