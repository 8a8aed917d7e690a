// kernels/cuda/device.h for nvcc: each function is one instruction of sm_80 or a few.
#pragma once

namespace quantal::cuda {

QUANTAL_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
QUANTAL_DEVICE std::int64_t block_x() { return blockIdx.x; }
QUANTAL_DEVICE std::int64_t block_y() { return blockIdx.y; }
QUANTAL_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char quantal_shared_memory[];
  return quantal_shared_memory;
}
QUANTAL_DEVICE void block_sync() { __syncthreads(); }
QUANTAL_DEVICE void warp_sync() { __syncwarp(); }

template <class T>
QUANTAL_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFU, v, mask);
}

QUANTAL_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// https://docs.nvidia.com/cuda/parallel-thread-execution/ "cp.async": source bytes beyond the last
// operand are written as zeros, and 0 of them are read here where the source is not valid.
QUANTAL_DEVICE void async_copy16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
QUANTAL_DEVICE void async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
/// `groups` is a constant after inlining.
QUANTAL_DEVICE void async_wait_all_but(int groups) {
  if (groups == 0) {
    asm volatile("cp.async.wait_group 0;\n" ::: "memory");
  } else if (groups == 1) {
    asm volatile("cp.async.wait_group 1;\n" ::: "memory");
  } else if (groups == 2) {
    asm volatile("cp.async.wait_group 2;\n" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 3;\n" ::: "memory");
  }
}
QUANTAL_DEVICE void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(global));
}

// "ldmatrix", fragment layout in device.h.
QUANTAL_DEVICE void load_matrices(std::uint32_t out[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
QUANTAL_DEVICE void load_matrices_transposed(std::uint32_t out[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// "mma.m16n8k16" and "mma.m16n8k32", fragment layout in device.h.
QUANTAL_DEVICE void multiply_f16(float d[4], const std::uint32_t a[4], const std::uint32_t b[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
QUANTAL_DEVICE void multiply_bf16(float d[4], const std::uint32_t a[4], const std::uint32_t b[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
QUANTAL_DEVICE void multiply_s8(std::int32_t d[4], const std::uint32_t a[4],
                                const std::uint32_t b[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace quantal::cuda
