// What the C interface of the CUDA kernels refuses, and with which words. The launches that would
// pass are not made: pointers here are addresses that nothing may read.
#include <gtest/gtest.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda_machine.h"
#include "quantal/packed.h"

namespace quantal::testing {
namespace {

const quantal_cuda_interface& library() { return *quantal_cuda(QUANTAL_CUDA_VERSION); }
constexpr quantal_cuda_stream kStream{0, nullptr};

/// Device memory: an address of any alignment.
void* memory(std::uintptr_t offset = 0) {
  return reinterpret_cast<void*>((std::uintptr_t{1} << 40) + offset);  // NOLINT
}

class CudaInterface : public ::testing::Test {
 protected:
  explicit CudaInterface() { set({.rows = 64, .cols = 128}); }
  void SetUp() override { kernels_started(); }
  void TearDown() override { EXPECT_EQ(kernels_started(), 0); }

  void set(const PackedSpec& spec) {
    spec_ = spec;
    ints_ = spec_to_ints(spec);
    const PackedLayout layout = layout_of(spec);
    w_ = {ints_.data(),
          memory(),
          spec.rows * layout.code_bytes,
          memory(),
          layout.stat_rows * layout.stat_bytes,
          memory(),
          layout.shared_bytes};
    product_ = {w_, 2, memory(), 4, nullptr, 0, memory()};
    panel_ = {w_, 0, spec.rows, 0, spec.cols, 2, memory(), spec.cols};
  }
  void expect(int code, int expected, const std::string& text) {
    EXPECT_EQ(code, expected) << status_.text;
    EXPECT_EQ(status_.code, expected);
    EXPECT_EQ(std::string(status_.text), text);
  }

  PackedSpec spec_;
  std::array<std::int64_t, kSpecInts> ints_{};
  quantal_cuda_matrix w_{};
  quantal_cuda_product product_{};
  quantal_cuda_panel panel_{};
  quantal_cuda_status status_{};
};

TEST_F(CudaInterface, HasOneVersion) {
  EXPECT_EQ(quantal_cuda(QUANTAL_CUDA_VERSION + 1), nullptr);
  ASSERT_NE(quantal_cuda(QUANTAL_CUDA_VERSION), nullptr);
  EXPECT_EQ(library().version, QUANTAL_CUDA_VERSION);
}

TEST_F(CudaInterface, SupportsWhatItLaunches) {
  EXPECT_EQ(library().supports_dequantize(&panel_, &status_), QUANTAL_CUDA_OK);
  EXPECT_EQ(library().supports_small_matmul(&product_, &status_), QUANTAL_CUDA_OK);
  EXPECT_EQ(library().supports_tile_matmul(&product_, &status_), QUANTAL_CUDA_OK);
  EXPECT_EQ(library().supports_tile_matmul_transposed(&product_, nullptr), QUANTAL_CUDA_OK);
  product_.inputs = 0;  // nothing to do is no launch
  product_.x = nullptr;
  EXPECT_EQ(library().small_matmul(&product_, kStream, &status_), QUANTAL_CUDA_OK);
}

TEST_F(CudaInterface, RefusesDevices) {
  expect(library().probe(3, &status_), QUANTAL_CUDA_DEVICE, "cuda: device is 3, expected one of 1");
  expect(library().small_matmul(&product_, {3, nullptr}, &status_), QUANTAL_CUDA_DEVICE,
         "cuda: device is 3, expected one of 1");
}

TEST_F(CudaInterface, ReportsFailuresOfLaunches) {
  fail_next_launch("an error of before");
  expect(library().tile_matmul(&product_, kStream, &status_), QUANTAL_CUDA_FAILED,
         "tile_matmul: an error of before");
}

TEST_F(CudaInterface, RefusesFormsByReason) {
  product_.inputs = 33;
  expect(library().small_matmul(&product_, kStream, &status_), QUANTAL_CUDA_UNSUPPORTED,
         "cuda small_matmul: rows of activations are 33, expected 0 .. 32");
  set({.rows = 64, .cols = 120});
  expect(library().supports_tile_matmul(&product_, &status_), QUANTAL_CUDA_UNSUPPORTED,
         "cuda tile_matmul: in_features are 120 in groups of 64, expected multiples of 16");
  set({.rows = 60, .cols = 128});
  expect(library().supports_tile_matmul_transposed(&product_, &status_), QUANTAL_CUDA_UNSUPPORTED,
         "cuda tile_matmul_transposed: out_features are 60, expected a multiple of 8");
  set({.rows = 64, .cols = 128, .group_map = GroupMap::kColumnRuns});
  expect(library().supports_small_matmul(&product_, &status_), QUANTAL_CUDA_UNSUPPORTED,
         "cuda small_matmul: statistics are shared by rows, expected groups along rows");
  EXPECT_EQ(library().supports_dequantize(&panel_, &status_), QUANTAL_CUDA_OK);
}

TEST_F(CudaInterface, RefusesTypes) {
  product_.dtype = 0;
  expect(library().tile_matmul(&product_, kStream, &status_), QUANTAL_CUDA_UNSUPPORTED,
         "cuda tile_matmul: activations are f32, expected f16 or bf16");
  product_.dtype = 9;
  expect(library().tile_matmul(&product_, kStream, &status_), QUANTAL_CUDA_DTYPE,
         "cuda tile_matmul: dtype is number 9, expected 0 (f32), 1 (f16) or 2 (bf16)");
}

TEST_F(CudaInterface, RefusesPointers) {
  product_.x = memory(8);
  expect(library().tile_matmul(&product_, kStream, &status_), QUANTAL_CUDA_UNSUPPORTED,
         "cuda tile_matmul: x begins 8 bytes behind a multiple of 16, expected a multiple");
  product_.x = nullptr;
  expect(library().small_matmul(&product_, kStream, &status_), QUANTAL_CUDA_CONFIG,
         "cuda small_matmul: x is null, expected memory");
  panel_.w.codes = memory(4);
  expect(library().dequantize(&panel_, kStream, &status_), QUANTAL_CUDA_UNSUPPORTED,
         "cuda: codes begin 4 bytes behind a multiple of 16, expected a multiple");
}

TEST_F(CudaInterface, RefusesSizes) {
  product_.inputs = -1;
  expect(library().tile_matmul(&product_, kStream, &status_), QUANTAL_CUDA_SHAPE,
         "cuda tile_matmul: inputs is -1, expected >= 0");
  panel_.w.stats_bytes -= 1;
  expect(library().dequantize(&panel_, kStream, &status_), QUANTAL_CUDA_SHAPE,
         "packed matrix: stats bytes is 511, expected 512");
  panel_.w = w_;
  panel_.row = 1;
  expect(library().dequantize(&panel_, kStream, &status_), QUANTAL_CUDA_SHAPE,
         "cuda dequantize: panel is 64 x 128 from (1, 0) with ld 128, expected a part of 64 x 128 "
         "from a multiple of 128 columns");
}

TEST_F(CudaInterface, TakesMoreThan2To31ElementsUpToTheGrid) {
  set({.rows = std::int64_t{1} << 22, .cols = 8192});  // 2^35
  EXPECT_EQ(library().supports_dequantize(&panel_, &status_), QUANTAL_CUDA_OK) << status_.text;
  set({.rows = std::int64_t{1} << 36, .cols = 8192, .bits = 1});  // 2^49
  expect(library().dequantize(&panel_, kStream, &status_), QUANTAL_CUDA_SHAPE,
         "cuda: blocks of dequantize_pairs are 68719476736 x 1, expected at least 1 x 1 and at "
         "most 2147483647 x 65535");
  product_.inputs = std::int64_t{1} << 24;
  expect(library().tile_matmul(&product_, kStream, &status_), QUANTAL_CUDA_SHAPE,
         "cuda: blocks of tile_matmul are 536870912 x 131072, expected at least 1 x 1 and at most "
         "2147483647 x 65535");
  set({.rows = 1, .cols = std::int64_t{1} << 31});
  expect(library().supports_dequantize(&panel_, &status_), QUANTAL_CUDA_UNSUPPORTED,
         "cuda: columns and group_size are 2147483712 together, expected at most 2147483647");
}

TEST_F(CudaInterface, RefusesWorkspacesAndFormsOfInt8) {
  quantal_cuda_int8_product p{product_, 6.0F, memory(), 0};
  expect(library().int8_matmul(&p, kStream, &status_), QUANTAL_CUDA_UNSUPPORTED,
         "cuda int8_matmul: weights are 4 bits in groups of 64, expected 8-bit integers over 127 "
         "with one scale per row of 128");
  set({.rows = 64, .cols = 128, .bits = 8, .offset = Offset::kOver127, .group_size = 128});
  p = {product_, 6.0F, memory(), 100};
  expect(library().int8_matmul(&p, kStream, &status_), QUANTAL_CUDA_SHAPE,
         "cuda int8_matmul: workspace has 100 bytes, expected at least 1200");
  EXPECT_EQ(library().int8_workspace(4, 128), 1200);
  EXPECT_EQ(library().int8_workspace(std::int64_t{1} << 60, 128), -1);
  p.threshold = -1.0F;
  expect(library().supports_int8_matmul(&p, &status_), QUANTAL_CUDA_UNSUPPORTED,
         "cuda int8_matmul: threshold is -1.000000, expected >= 0");
}

TEST_F(CudaInterface, RefusesSpecs) {
  ints_[3] = 7;
  expect(library().small_matmul(&product_, kStream, &status_), QUANTAL_CUDA_CONFIG,
         "packed spec: bits is 7, expected 1, 2, 3, 4, 5, 6 or 8");
}

}  // namespace
}  // namespace quantal::testing
