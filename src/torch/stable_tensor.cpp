#include "torch/stable_tensor.h"

#include <algorithm>
#include <array>
#include <span>
#include <utility>

#include "core/result_block.h"

/// Of torch 2.13 and above; null below.
extern "C" [[gnu::weak]] const char* torch_exception_get_what_without_backtrace();

namespace quantal::stable_ops {
namespace {

std::span<const std::uint8_t> bytes_of(const char* what, Tensor& t) {
  check_cpu(what, t);
  if (t.scalar_type() != ScalarType::Byte) {
    fail(Errc::kDtype,
         std::string(what) + " is " + type_name(t.scalar_type()) + ", expected uint8");
  }
  if (!t.is_contiguous()) t = stable::contiguous(t);
  return {static_cast<const std::uint8_t*>(t.const_data_ptr()),
          static_cast<std::size_t>(t.numel())};
}

/// Of a contiguous tensor.
Ints strides_of(const Ints& sizes) {
  Ints strides(sizes.size());
  std::int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0; stride *= std::max<std::int64_t>(sizes[d], 1)) {
    strides[d] = stride;
  }
  return strides;
}

std::size_t size_in_bytes(const Ints& sizes, ScalarType type) {
  const auto dtype = stable::detail::to<std::int32_t>(stable::detail::from(type));
  std::size_t bytes = aoti_torch_dtype_element_size(dtype);
  for (const std::int64_t size : sizes) {
    bytes = static_cast<std::size_t>(
        checked_mul(static_cast<std::int64_t>(bytes), size, "quantal: bytes of a result"));
  }
  return bytes;
}

}  // namespace

void rethrow_explained() {
  try {
    throw;
  } catch (const Error&) {
    throw;
  } catch (const std::runtime_error& error) {
    const std::string text = error.what();
    if (torch_exception_get_what_without_backtrace == nullptr ||
        text.find(" API call failed at ") == std::string::npos) {
      throw;
    }
    throw std::runtime_error(std::string(torch_exception_get_what_without_backtrace()) + " (" +
                             text + ")");
  }
}

Tensor detached(const Tensor& t) { return call("aten::detach", "", t); }

const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "of another type";
  }
}

DType weight_dtype(const char* what, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::Half:
      return DType::kF16;
    case ScalarType::BFloat16:
      return DType::kBF16;
    default:
      fail(Errc::kDtype, std::string(what) + " is " + type_name(type) +
                             ", expected float32, float16 or bfloat16");
  }
}

std::string sizes_string(const Tensor& t) {
  const auto sizes = t.sizes();
  return shape_string({sizes.data(), sizes.size()});
}

void check_cpu(const char* what, const Tensor& t) {
  if (!t.is_cpu()) {
    fail(Errc::kDevice, std::string(what) + " is not a CPU tensor, expected cpu");
  }
}

Tensor empty_like_of(const Tensor& like, const Ints& sizes, ScalarType type) {
  if (!like.is_cpu()) return stable::new_empty(like, {sizes.data(), sizes.size()}, type);
  // Without the dispatcher's look-up by name, which costs as much as a small product.
  const auto dtype = stable::detail::to<std::int32_t>(stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()),
                                                  sizes.data(), strides_of(sizes).data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  const std::size_t bytes = size_in_bytes(sizes, type);
  if (bytes >= kSmallestResultBlock) prefer_large_pages(out.mutable_data_ptr(), bytes);
  return out;
}

Tensor result_like(const Tensor& like, const Ints& sizes, ScalarType type) {
  const std::size_t bytes = like.is_cpu() ? size_in_bytes(sizes, type) : 0;
  if (bytes < kSmallestResultBlock) return empty_like_of(like, sizes, type);
  const Ints strides = strides_of(sizes);
  return stable::from_blob(take_result_block(bytes), {sizes.data(), sizes.size()},
                           {strides.data(), strides.size()},
                           stable::Device(torch::headeronly::DeviceType::CPU), type,
                           [bytes](void* data) { release_result_block(data, bytes); });
}

Packed packed_of(const Tensor& codes, const Tensor& stats, const Tensor& shared, const Ints& spec) {
  Packed p{codes, stats, shared, {}};
  p.view.spec = spec_from_ints(spec);
  p.view.codes = bytes_of("quantal: codes", p.codes);
  p.view.stats = bytes_of("quantal: stats", p.stats);
  p.view.shared = bytes_of("quantal: shared", p.shared);
  check_packed(p.view);
  return p;
}

Rows::Rows(Tensor tensor, std::int64_t width)
    : tensor_(std::move(tensor)), width_(width), count_(width == 0 ? 0 : tensor_.numel() / width) {}

Rows::Rows(const char* what, const Tensor& t, std::int64_t width) : Rows(t, width) {
  check_cpu(what, t);
  if (t.dim() < 1 || t.size(t.dim() - 1) != width) {
    fail(Errc::kShape, std::string(what) + " has shape " + sizes_string(t) +
                           ", expected last dimension " + std::to_string(width));
  }
  if (!t.is_contiguous()) tensor_ = stable::contiguous(t);
}

Rows Rows::fresh(const Tensor& like, std::int64_t width) {
  return {empty_like_of(like, sizes_with_last(like, width), like.scalar_type()), width};
}

Tensor Rows::matrix() const {
  const std::array<std::int64_t, 2> shape{count_, width_};
  return stable::view(detached(tensor_), {shape.data(), shape.size()});
}

Ints sizes_with_last(const Tensor& t, std::int64_t last) {
  const auto sizes = t.sizes();
  Ints out(sizes.begin(), sizes.end());
  out.back() = last;
  return out;
}

}  // namespace quantal::stable_ops
