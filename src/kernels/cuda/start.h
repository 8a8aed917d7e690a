// Starting kernels: the one place where host code meets the CUDA runtime (start.cu). Compiled by
// another compiler, start() runs the kernel on what the tests bring.
#pragma once

#include <functional>
#include <string>

#include "kernels/cuda/geometry.h"

namespace quantal::cuda {

struct Stream {
  int device = 0;
  void* handle = nullptr;
};

/// Throws Error{kShape} for more blocks, Error{kInternal} for more shared memory than any device
/// takes.
void check_geometry(const char* name, const Geometry& geometry);

/// Throws Error{kDevice} if the kernels cannot run on this device: no driver, no such device, or
/// below compute capability 8.0.
void check_device(int device);

/// Makes a device the thread's current one for its lifetime, and waits for the launches within if
/// QUANTAL_CUDA_CHECK asks for that. Throws Error{kDevice}.
class OnDevice {
 public:
  OnDevice(const char* name, Stream stream);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  /// Call it behind the last launch. Throws CudaFailure.
  void finish();

 private:
  const char* name_;
  Stream stream_;
  int previous_ = -1;
};

/// CUDA reported an error (QUANTAL_CUDA_FAILED). The text names call, launch and earlier launches.
struct CudaFailure {
  std::string text;
};

#if defined(__CUDACC__)
void start_kernel(const char* name, const void* kernel, const Geometry& geometry, void** arguments,
                  Stream stream);
#else
void run_kernel(const Geometry& geometry, const std::function<void()>& body);
#endif

/// Enqueues kernel(args). Throws CudaFailure, and what check_geometry throws.
template <class Args>
void start(const char* name, void (*kernel)(Args), const Geometry& geometry, const Args& args,
           Stream stream) {
  check_geometry(name, geometry);
#if defined(__CUDACC__)
  Args copy = args;
  void* arguments[] = {&copy};
  start_kernel(name, reinterpret_cast<const void*>(kernel), geometry, arguments, stream);
#else
  static_cast<void>(stream);
  run_kernel(geometry, [&] { kernel(args); });
#endif
}

}  // namespace quantal::cuda
