// Runs the kernels of kernels/cuda on the CPU: one fiber per thread of a block, blocks one after
// the other. Defines the functions of kernels/cuda/device.h and those of start.h that start.cu
// defines over the CUDA runtime. A barrier that not all threads reach is a std::logic_error.
//
// Stricter than a device where it can be: shared memory begins as garbage, asynchronous copies
// arrive at the wait for them and not before, threads of a warp that meet at different operations
// (or a barrier that some thread never reaches) are an error, and threads can be run last first, so
// that a result that needs a missing barrier differs between the two orders.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/cuda/device.h"
#include "kernels/cuda/geometry.h"

namespace quantal::testing {

enum class ThreadOrder { kAscending, kDescending };

/// Order of the threads of all kernels started from now on.
void set_thread_order(ThreadOrder order);
/// Kernels started since the last call.
int kernels_started();
/// What the next launch finds: a text makes it fail as a device would, once.
void fail_next_launch(std::string text);

}  // namespace quantal::testing
