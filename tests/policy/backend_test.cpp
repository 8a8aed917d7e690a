#include "quantal/backend.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <sstream>

#include "policy/probe.h"
#include "quantal/kernels.h"

namespace quantal {
namespace {

Machine machine_with(bool cuda, bool mps, bool mlx) {
  Machine machine;
  machine.cuda_devices = cuda ? 2 : 0;
  machine.cuda_compute = cuda ? 90 : 0;
  machine.cuda_bf16 = cuda;
  machine.mps = mps;
  machine.mlx = mlx;
  return machine;
}

/// Message of the Error that `body` throws; fails the test if it throws none.
template <class Body>
std::string message_of(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kConfig);
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

TEST(Backend, PreferenceIsCudaThenMlxThenMpsThenCpu) {
  EXPECT_EQ(detect_backend(machine_with(true, true, true)), Backend::CUDA);
  EXPECT_EQ(detect_backend(machine_with(false, true, true)), Backend::MLX);
  EXPECT_EQ(detect_backend(machine_with(false, true, false)), Backend::MPS);
  EXPECT_EQ(detect_backend(machine_with(false, false, false)), Backend::CPU);
  const std::vector<Backend> all = {Backend::CUDA, Backend::MLX, Backend::MPS, Backend::CPU};
  EXPECT_EQ(available_backends(machine_with(true, true, true)), all);
}

TEST(Backend, DeviceNames) {
  EXPECT_EQ(device_name(Backend::CUDA), "cuda");
  EXPECT_EQ(device_name(Backend::MPS), "mps");
  EXPECT_EQ(device_name(Backend::MLX), "cpu");
  EXPECT_EQ(device_name(Backend::CPU), "cpu");
}

TEST(Backend, DocumentedCapabilities) {
  const BackendCapabilities cuda = documented_capabilities(Backend::CUDA);
  EXPECT_TRUE(cuda.supports_distributed && cuda.supports_fsdp && cuda.supports_bfloat16 &&
              cuda.supports_flash_attention);
  EXPECT_EQ(cuda.distributed_backend, "nccl");
  EXPECT_FALSE(cuda.max_model_size);
  const BackendCapabilities mps = documented_capabilities(Backend::MPS);
  EXPECT_FALSE(mps.supports_bfloat16);
  EXPECT_EQ(mps.max_model_size, 70);
  const BackendCapabilities mlx = documented_capabilities(Backend::MLX);
  EXPECT_FALSE(mlx.supports_distributed);
  EXPECT_EQ(mlx.distributed_backend, "");
  const BackendCapabilities cpu = documented_capabilities(Backend::CPU);
  EXPECT_EQ(cpu.distributed_backend, "gloo");
  EXPECT_EQ(cpu.max_model_size, 7);
  EXPECT_EQ(cpu.notes.front(), "Fallback option");
}

TEST(Backend, WidthsAreThoseOfTheDocumentedMethods) {
  const std::vector<int> hqq_and_dense = {1, 2, 3, 4, 5, 6, 8, 16};
  for (const Backend backend : {Backend::CUDA, Backend::MPS, Backend::MLX, Backend::CPU}) {
    EXPECT_EQ(documented_capabilities(backend).quantization_bits, hqq_and_dense);
  }
}

TEST(Backend, CapabilitiesFollowTheMachine) {
  Machine machine = machine_with(true, false, false);
  machine.collectives = {"gloo"};
  BackendCapabilities can = backend_capabilities(Backend::CUDA, machine);
  EXPECT_EQ(can.distributed_backend, "gloo");
  EXPECT_TRUE(can.supports_fsdp);
  machine.collectives = std::vector<std::string>{};
  can = backend_capabilities(Backend::CUDA, machine);
  EXPECT_EQ(can.distributed_backend, "");
  EXPECT_FALSE(can.supports_distributed || can.supports_fsdp);
  machine.cuda_compute = 75;
  machine.cuda_bf16 = false;
  can = backend_capabilities(Backend::CUDA, machine);
  EXPECT_FALSE(can.supports_bfloat16 || can.supports_flash_attention);
  machine.collectives.reset();  // nobody was asked: the documentation stands
  EXPECT_EQ(backend_capabilities(Backend::CUDA, machine).distributed_backend, "nccl");

  machine.cpu_bf16 = true;
  const std::size_t notes = backend_capabilities(Backend::CPU, machine).notes.size();
  machine.cpu_bf16 = false;
  can = backend_capabilities(Backend::CPU, machine);
  ASSERT_EQ(can.notes.size(), notes + 1);
  EXPECT_NE(can.notes.back().find("emulated"), std::string::npos);
  EXPECT_TRUE(can.supports_bfloat16) << "slow, but it works";
}

TEST(Backend, BatchTable) {
  const std::map<Backend, std::array<int, 3>> table = {{Backend::CUDA, {4, 2, 1}},
                                                       {Backend::MPS, {2, 1, 1}},
                                                       {Backend::MLX, {8, 4, 2}},
                                                       {Backend::CPU, {1, 1, 1}}};
  for (const auto& [backend, sizes] : table) {
    EXPECT_EQ(optimal_batch_size(backend, 7), sizes[0]);
    EXPECT_EQ(optimal_batch_size(backend, 13), sizes[1]);
    EXPECT_EQ(optimal_batch_size(backend, 70), sizes[2]);
    EXPECT_EQ(optimal_batch_size(backend, 7, 4096), std::max(1, sizes[0] / 2));
    EXPECT_EQ(optimal_batch_size(backend, 1e-3), sizes[0]);
    EXPECT_EQ(optimal_batch_size(backend, 1e6), sizes[2]);
  }
  EXPECT_EQ(optimal_batch_size(Backend::CUDA, 8, 2048), 4);
  EXPECT_EQ(optimal_batch_size(Backend::CUDA, 40, 2048), 1) << "40 is nearer to 70 than to 13";
  for (const double bad : {0.0, -7.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    EXPECT_NE(message_of([&] { optimal_batch_size(Backend::CUDA, bad); }).find("model_size_b is"),
              std::string::npos);
  }
  EXPECT_NE(message_of([] { optimal_batch_size(Backend::CUDA, 7, 0); }).find("sequence_length"),
            std::string::npos);
}

TEST(BackendManager, ChoosesAndRefuses) {
  const Machine machine = machine_with(false, true, false);
  EXPECT_EQ(BackendManager({}, machine).backend(), Backend::MPS);
  const BackendManager cpu(Backend::CPU, machine);
  EXPECT_EQ(cpu.device(), "cpu");
  EXPECT_EQ(message_of([&] { BackendManager(Backend::CUDA, machine); }),
            "Backend 'cuda' is not available on this system. Available backends: mps, cpu");
}

TEST(BackendManager, Dtypes) {
  const Machine machine = machine_with(true, true, true);
  EXPECT_EQ(BackendManager(Backend::CUDA, machine).get_dtype(), DType::kBF16);
  EXPECT_EQ(BackendManager(Backend::CUDA, machine).get_dtype(false), DType::kF16);
  EXPECT_EQ(BackendManager(Backend::MPS, machine).get_dtype(), DType::kF16);
  EXPECT_EQ(BackendManager(Backend::CPU, machine).get_dtype(), DType::kBF16);
  EXPECT_EQ(BackendManager(Backend::CPU, machine).get_dtype(false), DType::kF32);
}

TEST(BackendManager, ModelSizes) {
  const Machine machine = machine_with(true, true, false);
  EXPECT_NO_THROW(BackendManager(Backend::CUDA, machine).validate_model_size(400));
  EXPECT_NO_THROW(BackendManager(Backend::CPU, machine).validate_model_size(7));
  EXPECT_EQ(message_of([&] { BackendManager(Backend::CPU, machine).validate_model_size(13); }),
            "Model size (13B parameters) exceeds the recommended limit for cpu (7B parameters)");
  EXPECT_EQ(message_of([&] { BackendManager(Backend::MPS, machine).validate_model_size(70.5); }),
            "Model size (70.5B parameters) exceeds the recommended limit for mps (70B parameters)");
  message_of([&] { BackendManager(Backend::CUDA, machine).validate_model_size(-1); });
}

TEST(BackendManager, QuantizationWidths) {
  const BackendManager cpu(Backend::CPU, Machine{});
  for (const int bits : {1, 2, 3, 4, 5, 6, 8, 16}) EXPECT_TRUE(cpu.supports_quantization(bits));
  for (const int bits : {0, 7, 32, -4}) EXPECT_FALSE(cpu.supports_quantization(bits));
}

/// Sets an environment variable while it lives.
class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Environment() { unsetenv(name_); }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const char* name_;
};

TEST(BackendManager, FromEnvironment) {
  const Machine machine = machine_with(true, false, false);
  {
    const Environment variable("FSDP_BACKEND", "CPU");
    EXPECT_EQ(BackendManager::from_env(machine).backend(), Backend::CPU);
  }
  {
    const Environment variable("FSDP_BACKEND", "");
    EXPECT_EQ(BackendManager::from_env(machine).backend(), Backend::CUDA);
  }
  for (const char* bad : {"tpu", "mlx"}) {
    const Environment variable("FSDP_BACKEND", bad);
    const std::string message = message_of([&] { BackendManager::from_env(machine); });
    EXPECT_NE(message.find("FSDP_BACKEND"), std::string::npos) << message;
    EXPECT_NE(message.find(bad), std::string::npos) << message;
  }
  EXPECT_EQ(BackendManager::from_env(machine).backend(), Backend::CUDA);
}

TEST(BackendManager, DescriptionHasTheFacts) {
  Machine machine = machine_with(true, false, false);
  machine.cuda_name = "Some GPU";
  const std::string text = BackendManager({}, machine).describe();
  for (const char* part :
       {"Backend Manager - System Information", "Selected Backend: cuda",
        "Available Backends: cuda, cpu", "Device: cuda (Some GPU, 2 in all)",
        "Quantization bits: 1, 2, 3, 4, 5, 6, 8, 16", "Distributed training: yes (nccl)",
        "Max model size: no limit", "Note: Requires NVIDIA GPU"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  }
}

// ------------------------------------------------------------------ memory

constexpr const char* kMeminfo =
    "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:    9000000 kB\n";
constexpr std::int64_t kTotal = 16000000LL * 1024, kAvailable = 9000000LL * 1024;

TEST(HostMemory, WithoutAControlGroup) {
  const MemoryInfo info =
      policy::parse_host_memory({kMeminfo, "", "", "", "Name:\tx\nVmRSS:\t    2048 kB\n"});
  EXPECT_EQ(info.total, kTotal);
  EXPECT_EQ(info.available, kAvailable);
  EXPECT_EQ(info.allocated, 2048 * 1024);
}

TEST(HostMemory, ControlGroupsLimitIt) {
  policy::MemoryFiles files{kMeminfo, "1000000\n", "900000\n",
                            "anon 1\ninactive_file 300000\nactive_file 5\n", ""};
  MemoryInfo info = policy::parse_host_memory(files);
  EXPECT_EQ(info.total, 1000000);
  EXPECT_EQ(info.available, 1000000 - (900000 - 300000)) << "page cache can be dropped";
  files.current = "2000000";
  EXPECT_EQ(policy::parse_host_memory(files).available, 0) << "never negative";
  files.limit = "max\n";
  EXPECT_EQ(policy::parse_host_memory(files).total, kTotal);
  files.limit = "99999999999999999";  // more than the machine has
  EXPECT_EQ(policy::parse_host_memory(files).available, kAvailable);
}

TEST(HostMemory, DamagedFilesGiveNothing) {
  for (const char* bad : {"", "MemTotal:\n", "MemTotal: kB\n", "MemTotal: -5 kB\n",
                          "MemTotal: 99999999999999999999999 kB", "Mem"}) {
    const MemoryInfo info = policy::parse_host_memory({bad, bad, bad, bad, bad});
    EXPECT_EQ(info.total, 0) << bad;
    EXPECT_FALSE(info.available) << bad;
  }
}

TEST(HostMemory, OfThisMachine) {
  const MemoryInfo info = host_memory();
  EXPECT_GT(info.total, 1 << 20);
  EXPECT_LE(info.total, std::int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE));
  if (info.available) {
    EXPECT_LE(*info.available, info.total);
  }
  const BackendManager cpu(Backend::CPU, Machine{});
  EXPECT_EQ(cpu.get_memory_info().total, info.total);
}

// ------------------------------------------------------------------ drivers

/// A driver of two devices, as functions of the same types as libcuda's and NVML's.
namespace driver {
int init_result = 0;
int init(unsigned) { return init_result; }
int count(int* n) { return *n = 2, 0; }
int get(int* device, int ordinal) { return *device = 10 + ordinal, ordinal == 0 ? 0 : 1; }
int attribute(int* value, int which, int device) {
  if (device != 10) return 1;
  *value = which == 75 ? 8 : which == 76 ? 6 : -1;
  return 0;
}
int name(char* text, int bytes, int device) {
  std::strncpy(text, "Test GPU", static_cast<std::size_t>(bytes));
  return device == 10 ? 0 : 1;
}
int nvml_init() { return 0; }
int nvml_handle(const char* bus, void** handle) {
  *handle = handle;
  return std::strcmp(bus, "0000:01:00.0") == 0 ? 0 : 6;
}
int nvml_memory(void*, unsigned long long* three) {
  three[0] = 80000, three[1] = 70000, three[2] = 10000;
  return 0;
}

template <class Function>
void* address(Function* function) {
  return reinterpret_cast<void*>(function);
}
const std::map<std::string, void*> kSymbols = {
    {"cuInit", address(init)},
    {"cuDeviceGetCount", address(count)},
    {"cuDeviceGet", address(get)},
    {"cuDeviceGetAttribute", address(attribute)},
    {"cuDeviceGetName", address(name)},
    {"nvmlInit_v2", address(nvml_init)},
    {"nvmlDeviceGetHandleByPciBusId_v2", address(nvml_handle)},
    {"nvmlDeviceGetMemoryInfo", address(nvml_memory)}};

/// All functions but one.
policy::SymbolLookup without(const std::string& missing) {
  return [missing](const char* symbol) -> void* {
    const auto found = kSymbols.find(symbol);
    return found == kSymbols.end() || symbol == missing ? nullptr : found->second;
  };
}
}  // namespace driver

TEST(Probe, AsksTheDriver) {
  Machine machine;
  policy::probe_cuda(driver::without(""), machine);
  EXPECT_EQ(machine.cuda_devices, 2);
  EXPECT_EQ(machine.cuda_compute, 86);
  EXPECT_TRUE(machine.cuda_bf16);
  EXPECT_EQ(machine.cuda_name, "Test GPU");
}

TEST(Probe, AnIncompleteOrFailingDriverIsNoDevice) {
  for (const char* missing : {"cuInit", "cuDeviceGetCount", "cuDeviceGet"}) {
    Machine machine;
    policy::probe_cuda(driver::without(missing), machine);
    EXPECT_EQ(machine.cuda_devices, 0) << missing;
  }
  Machine machine;
  policy::probe_cuda(driver::without("cuDeviceGetAttribute"), machine);
  EXPECT_EQ(machine.cuda_devices, 2);
  EXPECT_FALSE(machine.cuda_bf16);
  driver::init_result = 100;  // CUDA_ERROR_NO_DEVICE
  Machine none;
  policy::probe_cuda(driver::without(""), none);
  driver::init_result = 0;
  EXPECT_EQ(none.cuda_devices, 0);
}

TEST(Probe, MemoryOfADevice) {
  const auto info = policy::nvml_memory(driver::without(""), "0000:01:00.0");
  ASSERT_TRUE(info);
  EXPECT_EQ(info->total, 80000);
  EXPECT_EQ(info->available, 70000);
  EXPECT_FALSE(policy::nvml_memory(driver::without(""), "0000:02:00.0"));
  EXPECT_FALSE(policy::nvml_memory(driver::without("nvmlInit_v2"), "0000:01:00.0"));
}

TEST(Probe, OfThisMachineAgreesWithItself) {
  const Machine& machine = probe_machine();
  EXPECT_EQ(&machine, &probe_machine());
  EXPECT_EQ(machine.cuda_devices > 0, policy::cuda_memory().has_value());
#if !defined(__APPLE__)
  EXPECT_FALSE(machine.mps || machine.mlx);
#endif
  EXPECT_EQ(BackendManager().backend(), detect_backend());
}

// ------------------------------------------------------------------ engine

TEST(Engine, NamesTheKernelSetOfEveryDialect) {
  const std::string active(active_cpu_kernels());
  const auto status = engine_status(machine_with(true, false, false));
  ASSERT_EQ(status.size(), dialects().size());
  for (const EngineStatus& dialect : status) {
    ASSERT_EQ(dialect.engines.size(), kNumBackends);
    EXPECT_EQ(dialect.engines[static_cast<std::size_t>(Backend::CPU)], active + " kernels");
    EXPECT_NE(dialect.engines[static_cast<std::size_t>(Backend::CUDA)].find("torch's operators"),
              std::string::npos);
    EXPECT_EQ(dialect.engines[static_cast<std::size_t>(Backend::MPS)], "no device");
    EXPECT_FALSE(dialect.bits.empty());
  }
  select_cpu_kernels("scalar");
  const std::string text = engine_text(Machine{});
  select_cpu_kernels(active);
  EXPECT_NE(text.find("cpu: scalar kernels"), std::string::npos) << text;
  EXPECT_NE(text.find("best first: " + std::string(available_cpu_kernels().front())),
            std::string::npos)
      << text;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 100u) << line;
  for (const MethodInfo& method : methods()) {
    if (method.method == QuantizationMethod::NONE) continue;
    EXPECT_NE(text.find(std::string(method.name)), std::string::npos) << method.name;
  }
}

TEST(Engine, ImportReportNeedsNoOtherPackage) {
  const std::string text = report_import_status(Backend::CUDA, Machine{});
  EXPECT_EQ(text.find("Import Status Report\n=====") == 0, true) << text;
  EXPECT_NE(text.find("\nBackend: cuda\n"), std::string::npos) << text;
  EXPECT_NE(text.find("quantal " + std::string(library_version()) + "; its own engine:\n"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find(engine_text(Machine{})), std::string::npos) << text;
  EXPECT_NE(text.find("Methods of this build: bnb_nf4, bnb_int8, hqq"), std::string::npos) << text;
  EXPECT_NE(report_import_status().find("Backend: not specified"), std::string::npos);
  EXPECT_EQ(library_version().find("0."), 0u);
}

}  // namespace
}  // namespace quantal
