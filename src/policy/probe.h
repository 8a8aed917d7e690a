// Facts about the machine, asked without linking a driver.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "quantal/backend.h"

namespace quantal::policy {

/// Address of a driver's function by name, nullptr if it has none; stands for a loaded library.
using SymbolLookup = std::function<void*(const char* name)>;

/// Fills the CUDA members of `machine` from the driver API (libcuda): no device, an older driver
/// or a failing call leave them as they are.
void probe_cuda(const SymbolLookup& driver, Machine& machine);

/// Total and free bytes of the device with this PCI bus id, from the management library (NVML),
/// which needs no context on the device; nullopt where it cannot tell.
std::optional<MemoryInfo> nvml_memory(const SymbolLookup& nvml, const std::string& pci_bus_id);
/// The same for the first CUDA device, through the libraries of this machine.
std::optional<MemoryInfo> cuda_memory();

/// True if this machine multiplies bf16 in hardware; without it every bf16 product is emulated.
bool cpu_has_bf16();

/// Host memory as text files of Linux tell it: `meminfo` is /proc/meminfo, the others the memory
/// controller's limit, use and statistics, empty where there is no control group.
struct MemoryFiles {
  std::string meminfo, limit, current, stat, status;
};
MemoryInfo parse_host_memory(const MemoryFiles& files);

}  // namespace quantal::policy
