#include <array>
#include <cstring>
#include <string>

#include "core/half.h"
#include "quantal/core.h"

namespace quantal {
namespace {

struct DTypeRow {
  DType dtype;
  std::size_t size;
  std::string_view name;
  std::string_view torch_name;
};

constexpr std::array<DTypeRow, 16> kDTypes = {{
    {DType::kF32, 4, "f32", "float32"},
    {DType::kF16, 2, "f16", "float16"},
    {DType::kBF16, 2, "bf16", "bfloat16"},
    {DType::kF64, 8, "f64", "float64"},
    {DType::kU8, 1, "u8", "uint8"},
    {DType::kI8, 1, "i8", "int8"},
    {DType::kU16, 2, "u16", "uint16"},
    {DType::kI16, 2, "i16", "int16"},
    {DType::kU32, 4, "u32", "uint32"},
    {DType::kI32, 4, "i32", "int32"},
    {DType::kU64, 8, "u64", "uint64"},
    {DType::kI64, 8, "i64", "int64"},
    {DType::kBool, 1, "bool", "bool"},
    {DType::kF8E4M3, 1, "f8e4m3", "float8_e4m3fn"},
    {DType::kF8E5M2, 1, "f8e5m2", "float8_e5m2"},
    {DType::kF8E8M0, 1, "f8e8m0", "float8_e8m0fnu"},
}};

constexpr bool rows_match_enum() {
  for (std::size_t i = 0; i < kDTypes.size(); ++i) {
    if (static_cast<std::size_t>(kDTypes[i].dtype) != i) return false;
  }
  return true;
}
static_assert(rows_match_enum());

[[noreturn]] void fail_weight_dtype(std::string_view where, DType dtype) {
  fail(Errc::kDtype, std::string(where) + ": dtype is " + std::string(dtype_name(dtype)) +
                         ", expected f32, f16 or bf16");
}

}  // namespace

std::size_t dtype_size(DType dtype) noexcept {
  return kDTypes[static_cast<std::size_t>(dtype)].size;
}

std::string_view dtype_name(DType dtype) noexcept {
  return kDTypes[static_cast<std::size_t>(dtype)].name;
}

std::string_view dtype_torch_name(DType dtype) noexcept {
  return kDTypes[static_cast<std::size_t>(dtype)].torch_name;
}

DType parse_dtype(std::string_view name) {
  std::string_view bare = name;
  if (bare.starts_with("torch.")) bare.remove_prefix(6);
  if (bare == "half") bare = "f16";
  if (bare == "float") bare = "f32";
  std::string legal;
  for (const DTypeRow& row : kDTypes) {
    if (bare == row.name || bare == row.torch_name) return row.dtype;
    legal += (legal.empty() ? "" : ", ") + std::string(row.torch_name);
  }
  fail(Errc::kDtype, "dtype is '" + std::string(name) + "', expected one of " + legal);
}

void widen_to_f32(DType dtype, const void* in, std::int64_t n, float* out) {
  const auto* halves = static_cast<const std::uint16_t*>(in);
  switch (dtype) {
    case DType::kF32:
      if (n > 0) std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(float));
      return;
    case DType::kF16:
      for (std::int64_t i = 0; i < n; ++i) out[i] = f16_to_f32(halves[i]);
      return;
    case DType::kBF16:
      for (std::int64_t i = 0; i < n; ++i) out[i] = bf16_to_f32(halves[i]);
      return;
    default:
      fail_weight_dtype("widen_to_f32", dtype);
  }
}

void narrow_from_f32(DType dtype, const float* in, std::int64_t n, void* out) {
  auto* halves = static_cast<std::uint16_t*>(out);
  switch (dtype) {
    case DType::kF32:
      if (n > 0) std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(float));
      return;
    case DType::kF16:
      for (std::int64_t i = 0; i < n; ++i) halves[i] = f32_to_f16(in[i]);
      return;
    case DType::kBF16:
      for (std::int64_t i = 0; i < n; ++i) halves[i] = f32_to_bf16(in[i]);
      return;
    default:
      fail_weight_dtype("narrow_from_f32", dtype);
  }
}

}  // namespace quantal
