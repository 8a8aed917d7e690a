// How a function is declared that runs on the host and, compiled by nvcc, on a device too. Macros
// only: files of one instruction set include this.
#pragma once

#if defined(__CUDACC__)
#define QUANTAL_HD __host__ __device__ __forceinline__
/// Before a template of both sides whose argument decides where it can run.
#define QUANTAL_EITHER_SIDE _Pragma("nv_exec_check_disable")
/// Before a loop over elements of an array in registers.
#define QUANTAL_UNROLL _Pragma("unroll")
#else
#define QUANTAL_HD inline
#define QUANTAL_EITHER_SIDE
#define QUANTAL_UNROLL
#endif
