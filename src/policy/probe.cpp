#include "policy/probe.h"

#include <dlfcn.h>

#include <array>
#include <memory>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace quantal {
namespace policy {
namespace {

// The part of the driver API that is asked; numbers of cuda.h, stable since CUDA 3.2.
constexpr int kSuccess = 0;
constexpr int kAttributeMajor = 75, kAttributeMinor = 76;
constexpr int kFirstBf16Compute = 80;  // Ampere: bf16 in tensor cores and in scalar units
constexpr int kNameBytes = 256, kBusIdBytes = 32;
using CuInit = int (*)(unsigned flags);
using CuDeviceGetCount = int (*)(int* count);
using CuDeviceGet = int (*)(int* device, int ordinal);
using CuDeviceGetAttribute = int (*)(int* value, int attribute, int device);
using CuDeviceGetText = int (*)(char* text, int bytes, int device);

// NVML's struct nvmlMemory_t, version 1.
struct NvmlMemory {
  unsigned long long total, free, used;
};
using NvmlDevice = void*;
using NvmlInit = int (*)();
using NvmlGetHandle = int (*)(const char* pci_bus_id, NvmlDevice* device);
using NvmlGetMemory = int (*)(NvmlDevice device, NvmlMemory* memory);

template <class Function>
Function find(const SymbolLookup& library, const char* name) {
  return reinterpret_cast<Function>(library(name));
}

/// Never closed: drivers do not survive being unloaded.
SymbolLookup load_library(const char* file) {
  void* handle = dlopen(file, RTLD_LAZY | RTLD_LOCAL);
  return [handle](const char* name) { return handle == nullptr ? nullptr : dlsym(handle, name); };
}

SymbolLookup cuda_driver() { return load_library("libcuda.so.1"); }

/// The first device after cuInit; nullopt if there is none.
std::optional<int> first_device(const SymbolLookup& driver, int* count) {
  const auto init = find<CuInit>(driver, "cuInit");
  const auto get_count = find<CuDeviceGetCount>(driver, "cuDeviceGetCount");
  const auto get = find<CuDeviceGet>(driver, "cuDeviceGet");
  if (init == nullptr || get_count == nullptr || get == nullptr) return std::nullopt;
  int device = 0;
  if (init(0) != kSuccess || get_count(count) != kSuccess || *count < 1) return std::nullopt;
  if (get(&device, 0) != kSuccess) return std::nullopt;
  return device;
}

template <int kBytes>
std::string device_text(const SymbolLookup& driver, const char* function, int device) {
  const auto get = find<CuDeviceGetText>(driver, function);
  std::array<char, kBytes> text{};
  if (get == nullptr || get(text.data(), kBytes, device) != kSuccess) return {};
  text.back() = '\0';
  return text.data();
}

bool has_metal() {
#if defined(__APPLE__) && defined(__aarch64__)
  using CreateDevice = void* (*)();
  const auto metal = load_library("/System/Library/Frameworks/Metal.framework/Metal");
  const auto create = find<CreateDevice>(metal, "MTLCreateSystemDefaultDevice");
  return create != nullptr && create() != nullptr;
#else
  return false;
#endif
}

bool has_mlx_library() {
#if defined(__APPLE__) && defined(__aarch64__)
  return dlopen("libmlx.dylib", RTLD_LAZY | RTLD_LOCAL) != nullptr;
#else
  return false;
#endif
}

}  // namespace

void probe_cuda(const SymbolLookup& driver, Machine& machine) {
  int count = 0;
  const std::optional<int> device = first_device(driver, &count);
  if (!device) return;
  machine.cuda_devices = count;
  machine.cuda_name = device_text<kNameBytes>(driver, "cuDeviceGetName", *device);
  const auto attribute = find<CuDeviceGetAttribute>(driver, "cuDeviceGetAttribute");
  int major = 0, minor = 0;
  if (attribute == nullptr || attribute(&major, kAttributeMajor, *device) != kSuccess ||
      attribute(&minor, kAttributeMinor, *device) != kSuccess) {
    return;
  }
  machine.cuda_compute = 10 * major + minor;
  machine.cuda_bf16 = machine.cuda_compute >= kFirstBf16Compute;
}

std::optional<MemoryInfo> nvml_memory(const SymbolLookup& nvml, const std::string& pci_bus_id) {
  const auto init = find<NvmlInit>(nvml, "nvmlInit_v2");
  const auto get_handle = find<NvmlGetHandle>(nvml, "nvmlDeviceGetHandleByPciBusId_v2");
  const auto get_memory = find<NvmlGetMemory>(nvml, "nvmlDeviceGetMemoryInfo");
  if (init == nullptr || get_handle == nullptr || get_memory == nullptr) return std::nullopt;
  NvmlDevice device = nullptr;
  NvmlMemory memory{};
  if (init() != kSuccess || get_handle(pci_bus_id.c_str(), &device) != kSuccess ||
      get_memory(device, &memory) != kSuccess) {
    return std::nullopt;
  }
  MemoryInfo info;
  info.total = static_cast<std::int64_t>(memory.total);
  info.available = static_cast<std::int64_t>(memory.free);
  return info;
}

std::optional<MemoryInfo> cuda_memory() {
  const SymbolLookup driver = cuda_driver();
  int count = 0;
  const std::optional<int> device = first_device(driver, &count);
  if (!device) return std::nullopt;
  const std::string bus = device_text<kBusIdBytes>(driver, "cuDeviceGetPCIBusId", *device);
  return nvml_memory(load_library("libnvidia-ml.so.1"), bus);
}

bool cpu_has_bf16() {
#if defined(__x86_64__) || defined(__i386__)
  // Every CPU with AMX-BF16 also has AVX512-BF16, so one question covers both.
  return __builtin_cpu_supports("avx512bf16") != 0;
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kHwcap2Bf16 = 1ul << 14;  // HWCAP2_BF16 of the arm64 kernel interface
  return (getauxval(AT_HWCAP2) & kHwcap2Bf16) != 0;
#else
  return false;
#endif
}

}  // namespace policy

const Machine& probe_machine() {
  static const Machine machine = [] {
    Machine found;
    policy::probe_cuda(policy::cuda_driver(), found);
    found.mps = policy::has_metal();
    found.mlx = found.mps && policy::has_mlx_library();
    found.cpu_bf16 = policy::cpu_has_bf16();
    return found;
  }();
  return machine;
}

}  // namespace quantal
