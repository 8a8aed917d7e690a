// How a function is declared that runs on the host and, compiled by nvcc, on a device too.
#pragma once

#if defined(__CUDACC__)
#define QUANTAL_HD __host__ __device__ __forceinline__
#else
#define QUANTAL_HD inline
#endif
