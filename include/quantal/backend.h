// quantal backends: what a machine has, what each device can do, and which one a program runs on.
// No driver is linked; drivers are looked up at run time and may be absent.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "quantal/formats.h"

namespace quantal {

/// Facts about this machine. probe_machine() asks the CPU and the drivers; a program that knows
/// better, because it runs inside a framework, fills the members itself (Python does, from torch).
struct Machine {
  int cuda_devices = 0;    ///< visible to this process
  int cuda_compute = 0;    ///< compute capability of device 0, 90 for 9.0; 0 = not known
  bool cuda_bf16 = false;  ///< device 0 multiplies bfloat16
  std::string cuda_name;   ///< of device 0
  bool mps = false;        ///< a Metal device is there
  bool mlx = false;        ///< Apple silicon with the MLX library
  bool cpu_bf16 = false;   ///< the CPU has bfloat16 instructions
  /// Collectives that the program was built with ("nccl", "gloo"); nullopt = not asked.
  std::optional<std::vector<std::string>> collectives;
};
/// Asks once per process; never throws, what cannot be found out is absent. CUDA is asked through
/// the driver library (CUDA_VISIBLE_DEVICES counts), Metal and MLX on Apple silicon only.
const Machine& probe_machine();

/// Whether tensors can be placed on `backend` of `machine`; always true for CPU.
bool backend_available(Backend backend, const Machine& machine = probe_machine());
/// In order of preference: CUDA, MLX, MPS, CPU.
std::vector<Backend> available_backends(const Machine& machine = probe_machine());
/// The first of available_backends.
Backend detect_backend(const Machine& machine = probe_machine());
/// Device of tensors: "cuda", "mps" or "cpu"; MLX computes beside a framework whose tensors stay on
/// the CPU.
std::string device_name(Backend backend);

/// What a backend offers to training and to quantization.
struct BackendCapabilities {
  /// Widths of the methods that the documented matrix has for the backend, and 16 for none.
  std::vector<int> quantization_bits;
  bool supports_distributed = false;      ///< collectives between processes
  bool supports_fsdp = false;             ///< sharding by FSDP
  bool supports_bfloat16 = false;         ///< products in bfloat16
  bool supports_flash_attention = false;  ///< fused attention
  std::optional<double> max_model_size;   ///< recommended limit, 10^9 parameters
  std::string distributed_backend;        ///< "nccl", "gloo" or empty
  std::vector<std::string> notes;         ///< limits, for people
};
/// What the documentation says of a backend, whatever machine this is:
///
/// | backend | distributed, FSDP | bf16 | flash attention | limit |
/// |---|---|---|---|---|
/// | CUDA | nccl | yes | yes | none |
/// | MPS | gloo | no | no | 70 |
/// | MLX | no | yes | yes | 70 |
/// | CPU | gloo | yes | no | 7 |
BackendCapabilities documented_capabilities(Backend backend);
/// The same, less what `machine` lacks, with notes that say so.
BackendCapabilities backend_capabilities(Backend backend, const Machine& machine);

/// Bytes of memory of a device or of the host; unset where nobody can tell.
struct MemoryInfo {
  std::int64_t total = 0;                 ///< of the device
  std::optional<std::int64_t> available;  ///< could be allocated now
  std::optional<std::int64_t> allocated;  ///< held by this process
};
/// Of the host: what the system has, less where a control group allows this process less.
MemoryInfo host_memory();

/// Suggested sequences per step for a model of `model_size_b` billion parameters: a table of the
/// documentation for 7, 13 and 70, of which the nearest by ratio counts, halved (at least 1) for
/// more than 2048 tokens. Throws Error{kConfig} unless both arguments are positive and finite.
int optimal_batch_size(Backend backend, double model_size_b, std::int64_t sequence_length = 2048);

/// A backend chosen for a program, with its device and capabilities. Immutable.
class BackendManager {
 public:
  /// `backend` nullopt: detect_backend(machine). Throws Error{kConfig} for a backend that the
  /// machine does not have, listing those that it has.
  explicit BackendManager(std::optional<Backend> backend = {},
                          const Machine& machine = probe_machine());
  /// The backend named by the environment variable FSDP_BACKEND; unset or empty: the best one.
  static BackendManager from_env(const Machine& machine = probe_machine());

  Backend backend() const { return backend_; }                  ///< the one that was chosen
  std::string device() const { return device_name(backend_); }  ///< as device_name
  const BackendCapabilities& capabilities() const { return capabilities_; }  ///< of this machine
  const Machine& machine() const { return machine_; }  ///< what the choice was made from

  /// Whether `bits` is one of capabilities().quantization_bits.
  bool supports_quantization(int bits) const;
  /// bf16 where it is supported and preferred, else f16 (CPU: f32, whose f16 is slow).
  DType get_dtype(bool prefer_bfloat16 = true) const;
  /// "nccl", "gloo" or empty.
  const std::string& get_distributed_backend() const { return capabilities_.distributed_backend; }
  /// Throws Error{kConfig} for a model above the recommended size of the backend, or for a size
  /// that is not positive and finite.
  void validate_model_size(double model_size_b) const;
  /// Memory of the device; of the host where it is shared (MPS, MLX, CPU). For CUDA what the driver
  /// says of device 0.
  MemoryInfo get_memory_info() const;
  /// optimal_batch_size of this backend.
  int get_optimal_batch_size(double model_size_b, std::int64_t sequence_length = 2048) const {
    return optimal_batch_size(backend_, model_size_b, sequence_length);
  }
  /// "Backend Manager - System Information" and the facts, one a line.
  std::string describe() const;

 private:
  Backend backend_;
  Machine machine_;
  BackendCapabilities capabilities_;
};

/// What runs one dialect on this machine.
struct EngineStatus {
  std::string dialect;               ///< "bnb"
  std::string title;                 ///< "bitsandbytes"
  std::vector<std::string> methods;  ///< values of QuantizationMethod; empty for GGUF
  std::vector<int> bits;             ///< widths that are quantized to
  /// By backend, in the order of the enumeration: "avx512 kernels", "no device" ...
  std::vector<std::string> engines;
};
/// One entry per dialect. quantal's own kernels run each of them; no other package is asked.
std::vector<EngineStatus> engine_status(const Machine& machine = probe_machine());
/// The same as a table of at most 100 columns, indented by two spaces.
std::string engine_text(const Machine& machine = probe_machine());

/// Version of the library, "0.3.0".
std::string_view library_version() noexcept;
/// What runs here: quantal's own engine for each dialect and device, and the methods of this build.
/// Python's function of that name also lists other packages that are installed; this library needs
/// none. `backend` is only named.
std::string report_import_status(std::optional<Backend> backend = {},
                                 const Machine& machine = probe_machine());

}  // namespace quantal
