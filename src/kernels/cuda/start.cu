// The CUDA runtime as quantal uses it: devices, launches, errors.
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdlib>

#include "kernels/cuda/start.h"
#include "quantal/core.h"

namespace quantal::cuda {
namespace {

constexpr int kMaxDevices = 64;
constexpr std::size_t kRemembered = 4;

/// The last launches of this thread, for errors that show late.
struct Recent {
  std::array<const char*, kRemembered> names{};
  std::size_t count = 0;

  void add(const char* name) { names[count++ % kRemembered] = name; }
  std::string text() const {
    std::string out;
    for (std::size_t i = count > kRemembered ? count - kRemembered : 0; i < count; ++i) {
      out += (out.empty() ? "" : ", ") + std::string(names[i % kRemembered]);
    }
    return out.empty() ? "none" : out;
  }
};
thread_local Recent t_recent;

bool checks_every_launch() {
  static const bool on = [] {
    const char* value = std::getenv("QUANTAL_CUDA_CHECK");
    return value != nullptr && std::string(value) == "1";
  }();
  return on;
}

std::string error_text(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

[[noreturn]] void fail_launch(const char* name, const char* call, cudaError_t error) {
  cudaGetLastError();  // forgets what is not sticky
  throw CudaFailure{"cuda: " + std::string(call) + " of " + name + " gave " + error_text(error) +
                    ", expected success (launches of this thread before it, one of which may be "
                    "the cause: " +
                    t_recent.text() + "; QUANTAL_CUDA_CHECK=1 names the one)"};
}

void check(const char* name, const char* call, cudaError_t error) {
  if (error != cudaSuccess) fail_launch(name, call, error);
}

/// Capability of a device as 10 * major + minor, asked for once.
int capability(int device) {
  static std::array<std::atomic<int>, kMaxDevices> known{};
  auto& slot = known[static_cast<std::size_t>(device)];
  int value = slot.load(std::memory_order_relaxed);
  if (value != 0) return value;
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    fail(Errc::kDevice, "cuda: device " + std::to_string(device) + " gave " + error_text(error) +
                            ", expected its compute capability");
  }
  value = 10 * major + minor;
  slot.store(value, std::memory_order_relaxed);
  return value;
}

}  // namespace

void check_device(int device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    fail(Errc::kDevice, "cuda: the driver gave " + error_text(error) + ", expected one for CUDA " +
                            std::to_string(CUDART_VERSION / 1000));
  }
  if (device < 0 || device >= count || device >= kMaxDevices) {
    fail(Errc::kDevice, "cuda: device is " + std::to_string(device) + ", expected one of " +
                            std::to_string(count));
  }
  const int found = capability(device);
  if (found >= 80) return;
  fail(Errc::kDevice, "cuda: device " + std::to_string(device) + " has compute capability " +
                          std::to_string(found / 10) + "." + std::to_string(found % 10) +
                          ", expected 8.0 or above");
}

OnDevice::OnDevice(const char* name, Stream stream) : name_(name), stream_(stream) {
  if (stream.device < 0 || stream.device >= kMaxDevices || capability(stream.device) < 80) {
    check_device(stream.device);  // throws
  }
  check(name, "cudaPeekAtLastError before a launch", cudaPeekAtLastError());
  int current = 0;
  check(name, "cudaGetDevice", cudaGetDevice(&current));
  if (current == stream.device) return;
  check(name, "cudaSetDevice", cudaSetDevice(stream.device));
  previous_ = current;
}

OnDevice::~OnDevice() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

void OnDevice::finish() {
  if (!checks_every_launch()) return;
  const auto stream = static_cast<cudaStream_t>(stream_.handle);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(name_, "cudaStreamIsCapturing", cudaStreamIsCapturing(stream, &capture));
  if (capture == cudaStreamCaptureStatusNone) {
    check(name_, "cudaStreamSynchronize", cudaStreamSynchronize(stream));
  }
}

void start_kernel(const char* name, const void* kernel, const Geometry& geometry, void** arguments,
                  Stream stream) {
  constexpr std::int64_t kWithoutAsking = 48 * 1024;
  if (geometry.shared_bytes > kWithoutAsking) {
    check(name, "cudaFuncSetAttribute",
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(geometry.shared_bytes)));
  }
  const dim3 grid(static_cast<unsigned>(geometry.blocks_x),
                  static_cast<unsigned>(geometry.blocks_y));
  check(name, "cudaLaunchKernel",
        cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(geometry.threads)), arguments,
                         static_cast<std::size_t>(geometry.shared_bytes),
                         static_cast<cudaStream_t>(stream.handle)));
  t_recent.add(name);
}

}  // namespace quantal::cuda
