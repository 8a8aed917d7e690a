// What the source of a kernel may use of the machine that runs it.
//
// Kernels are written against these functions only. nvcc gets the instructions (device_nvidia.h);
// for other compilers the functions are declared here and defined by
// tests/kernels/cuda_machine.cpp, which runs the threads of a block on the CPU, so that tests
// execute the very kernels.
#pragma once

#include <cstdint>

#include "kernels/host_device.h"

#if defined(__CUDACC__)
#define QUANTAL_DEVICE __device__ __forceinline__
#define QUANTAL_KERNEL __global__
#define QUANTAL_KERNEL_THREADS(threads, blocks) __launch_bounds__(threads, blocks)
#else
#define QUANTAL_DEVICE inline
#define QUANTAL_KERNEL inline
#define QUANTAL_KERNEL_THREADS(threads, blocks)
#endif

namespace quantal::cuda {

inline constexpr int kWarp = 32;

/// 16 bytes that one instruction loads or stores; words in memory order.
struct alignas(16) Words4 {
  std::uint32_t w[4];
};
/// 8 bytes that one instruction loads.
struct alignas(8) Float2 {
  float x, y;
};

}  // namespace quantal::cuda

#if defined(__CUDACC__)
#include "kernels/cuda/device_nvidia.h"
#else
namespace quantal::cuda {

int thread_index();              ///< in its block
std::int64_t block_x();          ///< of the grid
std::int64_t block_y();          ///< of the grid
unsigned char* shared_memory();  ///< of the block, 16-byte aligned
void block_sync();               ///< __syncthreads
void warp_sync();                ///< __syncwarp

/// The value of the lane whose number differs by `mask`.
float shuffle_xor(float v, int mask);
std::uint32_t shuffle_xor(std::uint32_t v, int mask);
std::int32_t shuffle_xor(std::int32_t v, int mask);
double shuffle_xor(double v, int mask);

/// 16 bytes from global to shared memory, or zeros where not `valid`; done after async_wait.
void async_copy16(void* shared, const void* global, bool valid);
void async_commit();                  ///< closes a group of copies
void async_wait_all_but(int groups);  ///< until at most so many groups, 0 to 3, are under way
void prefetch(const void* global);    ///< its line into the second-level cache; no effect else

/// Four 8 x 8 matrices of 16-bit elements. Lane 8 i + r names row r of matrix i (16 bytes); lane l
/// receives of matrix i the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) in out[i]; the
/// transposed form (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
/// PTX ISA, "Warp-level matrix load instruction: ldmatrix".
void load_matrices(std::uint32_t out[4], const void* row);
void load_matrices_transposed(std::uint32_t out[4], const void* row);

/// d += a b for a 16 x 16 and b 16 x 8 of two 16-bit floats, d 16 x 8 of float32. With g = lane / 4
/// and t = lane % 4: a = {(g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)}, b = {(2t..,
/// g), (2t + 8.., g)}, d = {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}.
/// PTX ISA, "mma.m16n8k16 with floating point type".
void multiply_f16(float d[4], const std::uint32_t a[4], const std::uint32_t b[2]);
void multiply_bf16(float d[4], const std::uint32_t a[4], const std::uint32_t b[2]);
/// The same for a 16 x 32, b 32 x 8 of int8, four in a register (4t.., 4t + 16..), d of int32.
/// PTX ISA, "mma.m16n8k32 with integer type".
void multiply_s8(std::int32_t d[4], const std::uint32_t a[4], const std::uint32_t b[2]);

}  // namespace quantal::cuda
#endif
