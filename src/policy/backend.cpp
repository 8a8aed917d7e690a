#include "quantal/backend.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <span>

#include "policy/methods.h"
#include "policy/probe.h"
#include "policy/text.h"
#include "quantal/policy.h"

namespace quantal {
namespace {

constexpr std::array<Backend, 4> kPreference = {Backend::CUDA, Backend::MLX, Backend::MPS,
                                                Backend::CPU};
constexpr int kDenseBits = 16;                 // "not quantized" counts as a width
constexpr int kFirstFlashCompute = 80;         // fused attention kernels need Ampere
constexpr std::int64_t kUsualSequence = 2048;  // tokens that the batch table is for

struct BatchRow {
  double billions;
  std::array<int, kNumBackends> sequences;  // by Backend: CUDA, MPS, MLX, CPU
};
constexpr std::array<BatchRow, 3> kBatches = {
    {{7, {4, 2, 8, 1}}, {13, {2, 1, 4, 1}}, {70, {1, 1, 2, 1}}}};

std::vector<int> documented_widths(Backend backend) {
  std::set<int> widths = {kDenseBits};
  for (const MethodInfo& method : methods()) {
    if (method.method == QuantizationMethod::NONE) continue;
    if (!documented_support(backend, method.method)) continue;
    if (method.bits != 0) {
      widths.insert(method.bits);
    } else {
      const auto built = policy::built_bits(method.method);
      widths.insert(built.begin(), built.end());
    }
  }
  return {widths.begin(), widths.end()};
}

/// Replaces what the table says about collectives by those that the program has.
void apply_collectives(const Machine& machine, BackendCapabilities& can) {
  if (!machine.collectives || can.distributed_backend.empty()) return;
  const auto has = [&](const std::string& name) {
    const auto& known = *machine.collectives;
    return std::find(known.begin(), known.end(), name) != known.end();
  };
  if (has(can.distributed_backend)) return;
  can.notes.push_back("No " + can.distributed_backend + " in this build of the framework");
  can.distributed_backend = has("gloo") ? "gloo" : "";
  can.supports_distributed = can.supports_fsdp = !can.distributed_backend.empty();
}

/// "7", "13.5": a number as people write it.
std::string number(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%g", value);
  return text.data();
}

void check_positive(const char* where, const char* name, double value) {
  if (std::isfinite(value) && value > 0) return;
  fail(Errc::kConfig, std::string(where) + ": " + name + " is " + number(value) +
                          ", expected a finite number > 0");
}

std::string names(const std::vector<Backend>& backends) {
  std::string text;
  for (const Backend b : backends) {
    text += (text.empty() ? "" : ", ") + std::string(backend_name(b));
  }
  return text;
}

const char* yes_no(bool value) { return value ? "yes" : "no"; }

}  // namespace

bool backend_available(Backend backend, const Machine& machine) {
  switch (backend) {
    case Backend::CUDA:
      return machine.cuda_devices > 0;
    case Backend::MPS:
      return machine.mps;
    case Backend::MLX:
      return machine.mlx;
    case Backend::CPU:
      return true;
  }
  return false;
}

std::vector<Backend> available_backends(const Machine& machine) {
  std::vector<Backend> found;
  for (const Backend backend : kPreference) {
    if (backend_available(backend, machine)) found.push_back(backend);
  }
  return found;
}

Backend detect_backend(const Machine& machine) { return available_backends(machine).front(); }

std::string device_name(Backend backend) {
  return std::string(backend_name(backend == Backend::MLX ? Backend::CPU : backend));
}

BackendCapabilities documented_capabilities(Backend backend) {
  BackendCapabilities can;
  switch (backend) {
    case Backend::CUDA:
      can = {{},   true, true,   true,
             true, {},   "nccl", {"Full feature support", "Requires NVIDIA GPU"}};
      break;
    case Backend::MPS:
      can = {{},     true,
             true,   false,
             false,  70,
             "gloo", {"No bfloat16 support", "Use float16 instead", "Limited operator support"}};
      break;
    case Backend::MLX:
      can = {
          {},
          false,
          false,
          true,
          true,
          70,
          "",
          {"Optimized for Apple Silicon", "Unified memory architecture", "Requires MLX library"}};
      break;
    case Backend::CPU:
      can = {{}, true, true, true, false, 7, "gloo", {"Fallback option", "Very slow for training"}};
      break;
  }
  can.quantization_bits = documented_widths(backend);
  return can;
}

BackendCapabilities backend_capabilities(Backend backend, const Machine& machine) {
  BackendCapabilities can = documented_capabilities(backend);
  apply_collectives(machine, can);
  if (backend == Backend::CUDA && machine.cuda_devices > 0) {
    if (!machine.cuda_bf16) {
      can.supports_bfloat16 = false;
      can.notes.emplace_back("No bfloat16 support on this device; use float16");
    }
    if (machine.cuda_compute != 0 && machine.cuda_compute < kFirstFlashCompute) {
      can.supports_flash_attention = false;
      can.notes.emplace_back("No flash attention on this device (it needs compute capability 8.0)");
    }
  }
  if (backend == Backend::CPU && !machine.cpu_bf16) {
    can.notes.emplace_back("bfloat16 is emulated: this CPU has no instructions for it");
  }
  return can;
}

int optimal_batch_size(Backend backend, double model_size_b, std::int64_t sequence_length) {
  check_positive("get_optimal_batch_size", "model_size_b", model_size_b);
  check_positive("get_optimal_batch_size", "sequence_length", static_cast<double>(sequence_length));
  const auto distance = [&](const BatchRow& row) {
    return std::abs(std::log(model_size_b / row.billions));
  };
  const auto* row = std::min_element(
      kBatches.begin(), kBatches.end(),
      [&](const BatchRow& a, const BatchRow& b) { return distance(a) < distance(b); });
  const int size = row->sequences[static_cast<std::size_t>(backend)];
  return sequence_length > kUsualSequence ? std::max(1, size / 2) : size;
}

// ------------------------------------------------------------------ BackendManager

BackendManager::BackendManager(std::optional<Backend> backend, const Machine& machine)
    : backend_(backend.value_or(detect_backend(machine))), machine_(machine) {
  if (!backend_available(backend_, machine)) {
    fail(Errc::kConfig, "Backend '" + std::string(backend_name(backend_)) +
                            "' is not available on this system. Available backends: " +
                            names(available_backends(machine)));
  }
  capabilities_ = backend_capabilities(backend_, machine);
}

BackendManager BackendManager::from_env(const Machine& machine) {
  const char* value = std::getenv("FSDP_BACKEND");
  if (value == nullptr || *value == '\0') return BackendManager({}, machine);
  try {
    return BackendManager(parse_backend(value), machine);
  } catch (const Error& error) {
    fail(error.code(), std::string(error.what()) + " (environment variable FSDP_BACKEND)");
  }
}

bool BackendManager::supports_quantization(int bits) const {
  return policy::has_width(capabilities_.quantization_bits, bits);
}

DType BackendManager::get_dtype(bool prefer_bfloat16) const {
  if (prefer_bfloat16 && capabilities_.supports_bfloat16) return DType::kBF16;
  return backend_ == Backend::CPU ? DType::kF32 : DType::kF16;
}

void BackendManager::validate_model_size(double model_size_b) const {
  check_positive("validate_model_size", "model_size_b", model_size_b);
  const std::optional<double> limit = capabilities_.max_model_size;
  if (!limit || model_size_b <= *limit) return;
  fail(Errc::kConfig,
       "Model size (" + number(model_size_b) + "B parameters) exceeds the recommended limit for " +
           std::string(backend_name(backend_)) + " (" + number(*limit) + "B parameters)");
}

MemoryInfo BackendManager::get_memory_info() const {
  if (backend_ != Backend::CUDA) return host_memory();
  return policy::cuda_memory().value_or(MemoryInfo{});
}

std::string BackendManager::describe() const {
  const BackendCapabilities& can = capabilities_;
  std::string text = "Backend Manager - System Information";
  const auto line = [&text](const std::string& name, const std::string& value) {
    text += "\n" + name + ": " + value;
  };
  line("Selected Backend", std::string(backend_name(backend_)));
  line("Available Backends", names(available_backends(machine_)));
  line("Device", device() + (backend_ == Backend::CUDA && !machine_.cuda_name.empty()
                                 ? " (" + machine_.cuda_name + ", " +
                                       std::to_string(machine_.cuda_devices) + " in all)"
                                 : std::string()));
  line("Quantization bits", policy::join(can.quantization_bits));
  line("Distributed training",
       can.supports_distributed ? "yes (" + can.distributed_backend + ")" : "no");
  line("FSDP support", yes_no(can.supports_fsdp));
  line("BFloat16 support", yes_no(can.supports_bfloat16));
  line("Flash attention", yes_no(can.supports_flash_attention));
  line("Max model size", can.max_model_size ? number(*can.max_model_size) + "B" : "no limit");
  for (const std::string& note : can.notes) line("Note", note);
  return text;
}

}  // namespace quantal
