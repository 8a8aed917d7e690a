/* quantal's CUDA kernels: the C interface of libquantal_cuda.so, which is found and opened at run
 * time (torch/cuda_library.h). The one exported symbol is quantal_cuda.
 *
 * Every launcher enqueues on the stream that it is given and returns: it allocates nothing, waits
 * for nothing, and may be captured into a graph. Pointers are device memory of the stream's device;
 * nothing is read through them on the host. Buffers of a matrix are those of quantal/packed.h; its
 * codes begin at a multiple of 16 bytes, statistics and shared at a multiple of 4, x and y of
 * small_matmul and tile_matmul at a multiple of 16. Sizes are 64-bit; a matrix may have more than
 * 2^31 elements.
 *
 * Launchers return a code of quantal_cuda_code and, where it is not OK, fill `status`, which may be
 * null. A failure inside a kernel shows at a later call: that call returns QUANTAL_CUDA_FAILED with
 * the launches made since the last good one. With QUANTAL_CUDA_CHECK=1 in the environment each
 * launcher waits for its kernels, so that the launch that failed reports it (not while a stream is
 * captured).
 *
 * `supports_*` say whether a launcher takes the form and sizes; `status` then says why not.
 */
#ifndef QUANTAL_KERNELS_CUDA_LAUNCH_H_
#define QUANTAL_KERNELS_CUDA_LAUNCH_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Changes with any change of this file. */
#define QUANTAL_CUDA_VERSION 3

enum quantal_cuda_code {
  QUANTAL_CUDA_OK = 0,
  QUANTAL_CUDA_SHAPE = 1,       /**< a size is wrong or beyond what the kernel takes */
  QUANTAL_CUDA_CONFIG = 2,      /**< a setting is out of its range */
  QUANTAL_CUDA_DTYPE = 3,       /**< an element type is not taken */
  QUANTAL_CUDA_UNSUPPORTED = 4, /**< a legal form that this kernel does not take */
  QUANTAL_CUDA_DEVICE = 5,      /**< no driver, no such device, or one that is too old */
  QUANTAL_CUDA_FAILED = 6,      /**< CUDA reported an error of this or an earlier launch */
  QUANTAL_CUDA_INTERNAL = 7,    /**< a defect of quantal */
};

typedef struct {
  int32_t code;   /**< quantal_cuda_code */
  char text[768]; /**< what is wrong, zero-terminated, cut where it is longer */
} quantal_cuda_status;

/** A device and one of its streams (cudaStream_t). */
typedef struct {
  int32_t device;
  void* handle;
} quantal_cuda_stream;

/** Element types: 0 float32, 1 float16, 2 bfloat16 (quantal::DType). */
typedef int32_t quantal_cuda_dtype;

/** A packed matrix in device memory; sizes are checked against the spec. */
typedef struct {
  const int64_t* spec; /**< host memory, kSpecInts integers of spec_to_ints */
  const void* codes;
  int64_t codes_bytes;
  const void* stats;
  int64_t stats_bytes;
  const void* shared;
  int64_t shared_bytes;
} quantal_cuda_matrix;

/** out[r * ld + c] = w(row + r, col + c) rounded to `dtype`, bit for bit as on the CPU. `col` is a
 * multiple of 128. */
typedef struct {
  quantal_cuda_matrix w;
  int64_t row, rows, col, cols;
  quantal_cuda_dtype dtype;
  void* out;
  int64_t ld;
} quantal_cuda_panel;

/** Forward: y[m, n] = sum over k of x[m, k] w(n, k), plus bias[n]; x [inputs, cols], y [inputs,
 * rows]. Transposed: y[m, k] = sum over n of x[m, n] w(n, k); x [inputs, rows], y [inputs, cols],
 * no bias. w is rounded to `dtype` (float16 or bfloat16), sums are float32 in an order that depends
 * on the shapes only. */
typedef struct {
  quantal_cuda_matrix w;
  quantal_cuda_dtype dtype;
  const void* x;
  int64_t inputs;
  const void* bias; /**< null: none */
  quantal_cuda_dtype bias_dtype;
  void* y;
} quantal_cuda_product;

/** LLM.int8 (quantal/kernels.h, matmul_int8), bit for bit as on the CPU. */
typedef struct {
  quantal_cuda_product product; /**< dtype may be float32 too */
  float threshold;              /**< 0: no outliers */
  void* workspace;              /**< int8_workspace bytes, at a multiple of 16 */
  int64_t workspace_bytes;
} quantal_cuda_int8_product;

/** out[r] = sum over c of w(r, c)^2, float64 [rows]. */
typedef struct {
  quantal_cuda_matrix w;
  double* out;
} quantal_cuda_norms;

/** How weights become codes; the members are those of quantal::cuda::Quantizer (quantizer.h). */
typedef struct {
  int32_t encoder;
  float thresholds[16];
  uint8_t codes[16];
  float values[16];
  float least;
  float not_a_number;
  float tiny_range;
  float largest_scale;
  int32_t round_zero;
  int32_t rounds;
  float max_code;
  float power;
  float inverse_beta[32];
  float no_shrink[32];
  float nested_map[256];
} quantal_cuda_quantizer;

/** Fills the buffers of `w` (which are written here) from weight [rows, cols], bit for bit as on
 * the CPU. `refused`, in device memory, becomes 1 if a weight is not finite and the buffers mean
 * nothing, else 0. */
typedef struct {
  quantal_cuda_matrix w;
  quantal_cuda_dtype dtype;
  const void* weight;
  const quantal_cuda_quantizer* how; /**< host memory */
  int32_t* refused;
  void* workspace; /**< quantize_workspace bytes, at a multiple of 16 */
  int64_t workspace_bytes;
} quantal_cuda_quantization;

/** The functions of the library. */
typedef struct {
  int32_t version; /**< QUANTAL_CUDA_VERSION */

  /** OK if the driver works and `device` can run the kernels (compute capability 8.0 or above). */
  int (*probe)(int32_t device, quantal_cuda_status* status);

  int (*supports_dequantize)(const quantal_cuda_panel* p, quantal_cuda_status* status);
  int (*dequantize)(const quantal_cuda_panel* p, quantal_cuda_stream stream,
                    quantal_cuda_status* status);

  /** At most 32 rows of x, straight from packed codes. */
  int (*supports_small_matmul)(const quantal_cuda_product* p, quantal_cuda_status* status);
  int (*small_matmul)(const quantal_cuda_product* p, quantal_cuda_stream stream,
                      quantal_cuda_status* status);

  /** Any number of rows: weights are decoded into tiles. */
  int (*supports_tile_matmul)(const quantal_cuda_product* p, quantal_cuda_status* status);
  int (*tile_matmul)(const quantal_cuda_product* p, quantal_cuda_stream stream,
                     quantal_cuda_status* status);
  int (*supports_tile_matmul_transposed)(const quantal_cuda_product* p,
                                         quantal_cuda_status* status);
  int (*tile_matmul_transposed)(const quantal_cuda_product* p, quantal_cuda_stream stream,
                                quantal_cuda_status* status);

  /** Bytes; -1 for sizes that are negative or too large. */
  int64_t (*int8_workspace)(int64_t inputs, int64_t cols);
  int (*supports_int8_matmul)(const quantal_cuda_int8_product* p, quantal_cuda_status* status);
  int (*int8_matmul)(const quantal_cuda_int8_product* p, quantal_cuda_stream stream,
                     quantal_cuda_status* status);

  int (*supports_row_square_sums)(const quantal_cuda_norms* p, quantal_cuda_status* status);
  int (*row_square_sums)(const quantal_cuda_norms* p, quantal_cuda_stream stream,
                         quantal_cuda_status* status);

  /** Bytes; -1 for a spec that is refused. */
  int64_t (*quantize_workspace)(const int64_t* spec);
  int (*supports_quantize)(const quantal_cuda_quantization* p, quantal_cuda_status* status);
  int (*quantize)(const quantal_cuda_quantization* p, quantal_cuda_stream stream,
                  quantal_cuda_status* status);
} quantal_cuda_interface;

/** The functions, or null if the library has another version than the caller. */
const quantal_cuda_interface* quantal_cuda(int32_t version);

#ifdef __cplusplus
}
#endif
#endif
