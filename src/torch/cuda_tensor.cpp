#include "torch/cuda_tensor.h"

#include "torch/stable_products.h"

namespace quantal::stable_ops {
namespace {

constexpr std::uintptr_t kAlignment = 16;

/// Contiguous, at a multiple of 16 bytes; a copy where it is not.
Tensor settled(const Tensor& t) {
  const Tensor whole = t.is_contiguous() ? t : stable::contiguous(t);
  const auto address = reinterpret_cast<std::uintptr_t>(whole.const_data_ptr());
  return address % kAlignment == 0 ? whole : stable::clone(whole);
}

const quantal_cuda_interface* kernels_in_use(const char* where) {
  const CudaLibrary& library = cuda_library();
  if (library.functions != nullptr) return library.functions;
  fail(Errc::kDevice,
       std::string(where) +
           ": tensors are on a GPU and the CUDA kernels are not in use: " + library.text);
}

}  // namespace

std::string place_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  std::string name = t.is_cuda() ? "cuda:" : "another device, number ";
  name += std::to_string(t.get_device_index());
  return name;
}

DevicePacked::DevicePacked(const char* where, const Tensor& codes, const Tensor& stats,
                           const Tensor& shared, const Ints& spec_ints)
    : where_(where),
      kernels_(kernels_in_use(where)),
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
  if (t.is_cpu() == codes_.is_cpu() && t.is_cuda() == codes_.is_cuda() &&
      (t.is_cpu() || t.get_device_index() == codes_.get_device_index())) {
    return;
  }
  fail(Errc::kDevice,
       what + " is on " + place_name(t) + ", expected " + place_name(codes_) + " as the codes");
}

quantal_cuda_matrix DevicePacked::view() const {
  const auto size = [](const Tensor& t) { return t.numel(); };
  return {ints_.data(), codes_.const_data_ptr(),  size(codes_), stats_.const_data_ptr(),
          size(stats_), shared_.const_data_ptr(), size(shared_)};
}

quantal_cuda_stream DevicePacked::stream() const {
  return current_cuda_stream(codes_.is_cpu() ? 0 : codes_.get_device_index());
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

}  // namespace quantal::stable_ops
