// The CUDA kernels as a library that is found and opened at run time (kernels/cuda/launch.h).
#pragma once

#include <string>

#include "kernels/cuda/launch.h"

namespace quantal {

/// libquantal_cuda.so, or why it is not in use.
struct CudaLibrary {
  const quantal_cuda_interface* functions = nullptr;  ///< null: not in use
  std::string text;                                   ///< where it is, or why it is not in use
};

/// Opened on the first call, and only where QUANTAL_CUDA=1 and torch has CUDA: the file that
/// QUANTAL_CUDA_LIBRARY names, else libquantal_cuda.so beside this code, else by its name alone.
/// Needs a driver and a first device that can run the kernels. Thread-safe, throws nothing.
const CudaLibrary& cuda_library();
/// Replaces what cuda_library() returns (tests). Streams are null then.
void use_cuda_library(CudaLibrary library);

/// torch's current stream of a device. Throws Error{kDevice}.
quantal_cuda_stream current_cuda_stream(int device);

/// Throws the Error of a launcher's code with its text; returns for QUANTAL_CUDA_OK.
void check_cuda(int code, const quantal_cuda_status& status);

}  // namespace quantal
