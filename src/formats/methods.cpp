// Names, widths and documented backends of the quantization methods.
#include <algorithm>
#include <array>
#include <cctype>
#include <string>

#include "quantal/formats.h"

namespace quantal {
namespace {

constexpr unsigned bit(Backend backend) { return 1u << static_cast<unsigned>(backend); }
constexpr unsigned kCuda = bit(Backend::CUDA);
constexpr unsigned kApple = bit(Backend::MPS) | bit(Backend::MLX);
constexpr unsigned kTorchDevices = bit(Backend::CUDA) | bit(Backend::MPS) | bit(Backend::CPU);
constexpr unsigned kEverywhere = kTorchDevices | bit(Backend::MLX);

using M = QuantizationMethod;
constexpr std::array<MethodInfo, kNumMethods> kMethods = {{
    {M::BNB_NF4, "bnb_nf4", "BNB_NF4", "bnb", 4, kCuda},
    {M::BNB_INT8, "bnb_int8", "BNB_INT8", "bnb", 8, kCuda},
    {M::HQQ, "hqq", "HQQ", "hqq", 0, kEverywhere},
    {M::MLX_INT4, "mlx_int4", "MLX_INT4", "mlx", 4, kApple},
    {M::MLX_INT8, "mlx_int8", "MLX_INT8", "mlx", 8, kApple},
    {M::QUANTO_INT2, "quanto_int2", "QUANTO_INT2", "quanto", 2, kTorchDevices},
    {M::QUANTO_INT4, "quanto_int4", "QUANTO_INT4", "quanto", 4, kTorchDevices},
    {M::QUANTO_INT8, "quanto_int8", "QUANTO_INT8", "quanto", 8, kTorchDevices},
    {M::NONE, "none", "NONE", "", 0, kEverywhere},
}};

constexpr bool in_enum_order() {
  for (std::size_t i = 0; i < kMethods.size(); ++i) {
    if (static_cast<std::size_t>(kMethods[i].method) != i) return false;
  }
  return true;
}
static_assert(in_enum_order(), "kMethods is indexed by QuantizationMethod");

constexpr std::array<std::string_view, kNumBackends> kBackendNames = {"cuda", "mps", "mlx", "cpu"};

const MethodInfo& info(QuantizationMethod method) noexcept {
  return kMethods[static_cast<std::size_t>(method)];
}

std::string lower(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return out;
}

}  // namespace

std::span<const MethodInfo> methods() noexcept { return kMethods; }

std::string_view method_name(QuantizationMethod method) noexcept { return info(method).name; }

std::string_view method_enum_name(QuantizationMethod method) noexcept {
  return info(method).enum_name;
}

QuantizationMethod parse_method(std::string_view name) {
  const std::string wanted = lower(name);
  std::string legal;
  for (const MethodInfo& m : kMethods) {
    if (wanted == m.name) return m.method;
    legal += (legal.empty() ? "" : ", ") + std::string(m.name);
  }
  fail(Errc::kConfig, "method: name is '" + std::string(name) + "', expected one of " + legal);
}

unsigned documented_backends(QuantizationMethod method) noexcept { return info(method).backends; }

std::optional<int> method_bits(QuantizationMethod method) noexcept {
  const int bits = info(method).bits;
  return bits == 0 ? std::nullopt : std::optional<int>(bits);
}

std::string_view backend_name(Backend backend) noexcept {
  return kBackendNames[static_cast<std::size_t>(backend)];
}

Backend parse_backend(std::string_view name) {
  const std::string wanted = lower(name);
  for (std::size_t i = 0; i < kNumBackends; ++i) {
    if (wanted == kBackendNames[i]) return static_cast<Backend>(i);
  }
  fail(Errc::kConfig,
       "backend: name is '" + std::string(name) + "', expected one of cuda, mps, mlx, cpu");
}

std::string_view reach_name(Reach reach) noexcept {
  switch (reach) {
    case Reach::kRow:
      return "row";
    case Reach::kNeighbourRows:
      return "neighbour rows";
    case Reach::kRowBlock:
      return "row block";
    case Reach::kTensor:
      return "tensor";
  }
  return "unknown";
}

}  // namespace quantal
