// How a function is declared that runs on the host and, compiled by nvcc, on a device too.
#pragma once

#if defined(__CUDACC__)
#define QUANTAL_HD __host__ __device__ __forceinline__
/// Before a template of both sides whose argument decides where it can run.
#define QUANTAL_EITHER_SIDE _Pragma("nv_exec_check_disable")
#else
#define QUANTAL_HD inline
#define QUANTAL_EITHER_SIDE
#endif
