// The CUDA kernels, launched through their C interface and run on the CPU (cuda_machine.h), against
// the scalar reference and the CPU's kernels.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <new>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/matrix.h"
#include "kernels/cuda_machine.h"
#include "kernels/ref/ref.h"
#include "kernels/specs.h"
#include "kernels/support.h"

namespace quantal::testing {
namespace {

const quantal_cuda_interface& library() { return *quantal_cuda(QUANTAL_CUDA_VERSION); }
constexpr quantal_cuda_stream kStream{0, nullptr};

/// Memory that begins at 16 bytes and ends at a page that nobody may touch (but for up to 15 bytes
/// of a pattern), filled with a pattern.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes, int fill = 0xA5) : bytes_(bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t rounded = (bytes + 15) / 16 * 16;
    mapped_ = (rounded + page - 1) / page * page + page;
    void* memory =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<std::uint8_t*>(memory);
    mprotect(memory_ + mapped_ - page, page, PROT_NONE);
    data_ = memory_ + mapped_ - page - rounded;
    std::memset(data_, fill, bytes);
    std::memset(data_ + bytes, kBehind, rounded - bytes);
  }
  explicit Buffer(std::span<const std::uint8_t> bytes) : Buffer(bytes.size()) {
    if (!bytes.empty()) std::memcpy(data_, bytes.data(), bytes.size());
  }
  ~Buffer() { munmap(memory_, mapped_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  std::uint8_t* data() { return data_; }
  std::size_t size() const { return bytes_; }
  bool whole() const {
    return std::all_of(data_ + bytes_, data_ + (bytes_ + 15) / 16 * 16,
                       [](std::uint8_t b) { return b == kBehind; });
  }

 private:
  static constexpr std::uint8_t kBehind = 0x5A;
  std::size_t bytes_, mapped_ = 0;
  std::uint8_t *memory_ = nullptr, *data_ = nullptr;
};

/// A packed matrix as the interface takes it.
struct DeviceMatrix {
  explicit DeviceMatrix(const PackedMatrix& w)
      : ints(spec_to_ints(w.spec)),
        codes(std::span(w.codes)),
        stats(std::span(w.stats)),
        shared(std::span(w.shared)) {}
  quantal_cuda_matrix view() {
    const auto size = [](const Buffer& b) { return static_cast<std::int64_t>(b.size()); };
    return {ints.data(), codes.data(),  size(codes), stats.data(),
            size(stats), shared.data(), size(shared)};
  }
  std::array<std::int64_t, kSpecInts> ints;
  Buffer codes, stats, shared;
};

std::string code_and_text(const quantal_cuda_status& s) {
  return std::to_string(s.code) + " " + s.text;
}

class CudaKernels : public ::testing::Test {
 protected:
  void TearDown() override { set_thread_order(ThreadOrder::kAscending); }
};

// ------------------------------------------------------------------ dequantize

TEST_F(CudaKernels, DequantizeHasTheReferencesBits) {
  std::uint64_t seed = 3000;
  for (const PackedSpec& spec : kernel_specs()) {
    if (++seed % 3 != 0 && spec.cols > 600) continue;
    const PackedMatrix w = random_packed(spec, seed, seed % 2 == 0);
    DeviceMatrix device(w);
    const auto out = static_cast<DType>(seed % 3);
    const std::int64_t begin = spec.cols > 128 && seed % 4 == 0 ? 128 : 0;
    const Panel panel{spec.rows > 2 ? 1 : 0, spec.rows, begin, spec.cols};
    const std::int64_t width = spec.cols - begin, ld = width + (seed % 5 == 0 ? 3 : 0);
    const std::int64_t rows = panel.row_end - panel.row_begin;
    const auto bytes = static_cast<std::size_t>(rows * ld) * dtype_size(out);
    Buffer actual(bytes), expected(bytes);
    ref::dequantize(w.view(), panel, out, expected.data(), ld);
    const quantal_cuda_panel p{device.view(), panel.row_begin,       rows,          begin,
                               width,         static_cast<int>(out), actual.data(), ld};
    quantal_cuda_status status{};
    ASSERT_EQ(library().supports_dequantize(&p, &status), 0) << code_and_text(status);
    ASSERT_EQ(library().dequantize(&p, kStream, &status), 0) << code_and_text(status);
    ASSERT_TRUE(actual.whole());
    std::vector<float> a(bytes / dtype_size(out)), e(a.size());
    widen_to_f32(out, actual.data(), std::ssize(a), a.data());
    widen_to_f32(out, expected.data(), std::ssize(e), e.data());
    for (std::size_t i = 0; i < a.size(); ++i) {
      if (std::isnan(a[i]) && std::isnan(e[i])) continue;
      ASSERT_EQ(std::bit_cast<std::uint32_t>(a[i]), std::bit_cast<std::uint32_t>(e[i]))
          << "element " << i << " " << dtype_name(out) << " " << describe(spec) << " seed " << seed;
    }
  }
}

// ------------------------------------------------------------------ products

enum class Product { kSmall, kTile, kTransposed };

struct Operands {
  std::vector<std::uint16_t> narrow;
  std::vector<float> wide;  // the same values
};
Operands random_operands(DType dtype, std::int64_t n, std::uint64_t seed) {
  Operands out{std::vector<std::uint16_t>(static_cast<std::size_t>(n)), random_floats(n, seed)};
  narrow_from_f32(dtype, out.wide.data(), n, out.narrow.data());
  widen_to_f32(dtype, out.narrow.data(), n, out.wide.data());
  return out;
}

/// Weights rounded to the type of the activations, as float32.
std::vector<float> rounded_weights(const PackedMatrix& w, DType dtype) {
  const std::int64_t n = w.spec.rows * w.spec.cols;
  std::vector<std::uint16_t> narrow(static_cast<std::size_t>(n));
  std::vector<float> wide(narrow.size());
  ref::dequantize(w.view(), {0, w.spec.rows, 0, w.spec.cols}, dtype, narrow.data(), w.spec.cols);
  widen_to_f32(dtype, narrow.data(), n, wide.data());
  return wide;
}

int run(Product product, const quantal_cuda_product& p, quantal_cuda_status* status) {
  switch (product) {
    case Product::kSmall:
      return library().small_matmul(&p, kStream, status);
    case Product::kTile:
      return library().tile_matmul(&p, kStream, status);
    default:
      return library().tile_matmul_transposed(&p, kStream, status);
  }
}

/// Runs a product in both orders of threads, which must agree to the bit, and compares it with sums
/// in double: |error| <= 8 sqrt(depth) 2^-24 sum |x||w| + half a unit of y.
void check_product(Product product, const PackedSpec& spec, DType dtype, std::int64_t inputs,
                   std::uint64_t seed) {
  const bool transposed = product == Product::kTransposed;
  const std::int64_t depth = transposed ? spec.rows : spec.cols;
  const std::int64_t width = transposed ? spec.cols : spec.rows;
  const PackedMatrix w = random_packed(spec, seed);
  DeviceMatrix device(w);
  const Operands x = random_operands(dtype, inputs * depth, seed + 1);
  const std::vector<float> weights = rounded_weights(w, dtype), bias = random_floats(width, seed);
  Buffer xs(std::span(reinterpret_cast<const std::uint8_t*>(x.narrow.data()), x.narrow.size() * 2));
  const auto y_bytes = static_cast<std::size_t>(inputs * width) * 2;
  Buffer y(y_bytes), again(y_bytes, 0x11);
  quantal_cuda_product p{device.view(),
                         static_cast<int>(dtype),
                         xs.data(),
                         inputs,
                         transposed ? nullptr : bias.data(),
                         0,
                         y.data()};
  const std::string what = describe(spec) + " inputs " + std::to_string(inputs) + " " +
                           std::string(dtype_name(dtype)) + " seed " + std::to_string(seed);
  quantal_cuda_status status{};
  set_thread_order(ThreadOrder::kAscending);
  ASSERT_EQ(run(product, p, &status), 0) << code_and_text(status) << " " << what;
  p.y = again.data();
  set_thread_order(ThreadOrder::kDescending);
  ASSERT_EQ(run(product, p, &status), 0) << code_and_text(status) << " " << what;
  ASSERT_EQ(std::memcmp(y.data(), again.data(), y_bytes), 0) << "the order matters: " << what;
  ASSERT_TRUE(y.whole() && again.whole()) << what;

  std::vector<float> actual(static_cast<std::size_t>(inputs * width));
  widen_to_f32(dtype, y.data(), std::ssize(actual), actual.data());
  const double unit = dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
  for (std::int64_t m = 0; m < inputs; ++m) {
    for (std::int64_t n = 0; n < width; ++n) {
      double sum = transposed ? 0.0 : bias[static_cast<std::size_t>(n)], size = std::fabs(sum);
      for (std::int64_t k = 0; k < depth; ++k) {
        const std::int64_t at = transposed ? k * spec.cols + n : n * spec.cols + k;
        const double term = static_cast<double>(x.wide[static_cast<std::size_t>(m * depth + k)]) *
                            weights[static_cast<std::size_t>(at)];
        sum += term;
        size += std::fabs(term);
      }
      const double bound = 8 * std::sqrt(static_cast<double>(depth)) * 0x1p-24 * size +
                           unit * std::fabs(sum) + 0x1p-25;
      ASSERT_NEAR(actual[static_cast<std::size_t>(m * width + n)], sum, bound)
          << "(" << m << ", " << n << ") " << what;
    }
  }
}

/// Every width, map, rule and scale source on one shape, and other shapes for one form.
std::vector<PackedSpec> product_specs(std::int64_t rows) {
  std::vector<PackedSpec> specs;
  for (PackedSpec spec : kernel_specs()) {
    if (!cuda::whole_chunks(spec) || spec.rows == 0 || spec.cols > 600) continue;
    if (spec.rows != 6 && spec.rows != 7) continue;  // add_combinations
    spec.rows = rows;
    specs.push_back(spec);
  }
  return specs;
}

TEST_F(CudaKernels, SmallProductsOfEveryForm) {
  std::uint64_t seed = 5000;
  for (const PackedSpec& spec : product_specs(19)) {
    ++seed;
    const DType dtype = seed % 2 == 0 ? DType::kF16 : DType::kBF16;
    check_product(Product::kSmall, spec, dtype, seed % 4 == 0 ? 11 : seed % 9 == 0 ? 19 : 3, seed);
    if (HasFatalFailure()) return;
  }
}

TEST_F(CudaKernels, SmallProductsOfEveryShape) {
  for (std::int64_t inputs : {1, 2, 7, 8, 9, 16, 17, 31, 32}) {
    for (std::int64_t cols : {16, 32, 48, 1008, 1040, 5136}) {
      const PackedSpec spec{.rows = 1 + 16 * (inputs % 4),
                            .cols = cols,
                            .bits = 3,
                            .offset = Offset::kZeroPoint,
                            .group_size = 16};
      check_product(Product::kSmall, spec, DType::kBF16, inputs, 77);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaKernels, TileProductsOfEveryForm) {
  std::uint64_t seed = 6000;
  for (const PackedSpec& spec : product_specs(24)) {
    if (++seed % 5 != 0) continue;
    const DType dtype = seed % 3 == 0 ? DType::kF16 : DType::kBF16;
    check_product(seed % 2 == 0 ? Product::kTile : Product::kTransposed, spec, dtype, 5, seed);
    if (HasFatalFailure()) return;
  }
}

/// What decodes in ways of its own: tables and integers of 4 bits, other widths, float32 values.
std::vector<PackedSpec> tile_specs(std::int64_t rows, std::int64_t cols) {
  const PackedSpec base{.rows = rows, .cols = cols, .group_size = 16};
  std::vector<PackedSpec> specs(4, base);
  specs[0].code_map = CodeMap::kNf4;
  specs[0].scale = ScaleSource::kNestedU8;
  specs[0].nested_group_size = 8;
  specs[0].value_dtype = DType::kBF16;
  for (int i : {1, 2}) {
    specs[static_cast<std::size_t>(i)].bits = i == 1 ? 4 : 3;
    specs[static_cast<std::size_t>(i)].offset = Offset::kZeroPoint;
    specs[static_cast<std::size_t>(i)].scale = ScaleSource::kBF16;
    specs[static_cast<std::size_t>(i)].value_dtype = DType::kBF16;
  }
  specs[3].offset = Offset::kBias;
  return specs;
}

TEST_F(CudaKernels, TileProductsOfEverySizeOfTiles) {
  constexpr std::int64_t kTiles = 96;  // enough for large ones (tile_matmul.cu)
  for (std::size_t form = 0; form < 4; ++form) {
    const std::int64_t narrow = 3 * 64, wide = kTiles * 128 - 16, high = kTiles / 2 * 128 - 48;
    check_product(Product::kTile, tile_specs(narrow, 144)[form], DType::kBF16, 66, 81);
    check_product(Product::kTransposed, tile_specs(136, narrow)[form], DType::kBF16, 66, 82);
    if (form % 2 == 0) {
      check_product(Product::kTile, tile_specs(wide, 80)[form], DType::kBF16, 3, 83);
      check_product(Product::kTransposed, tile_specs(8, high)[form + 1], DType::kBF16, 129, 84);
    } else {
      check_product(Product::kTile, tile_specs(high, 16)[form], DType::kBF16, 129, 85);
      check_product(Product::kTransposed, tile_specs(72, wide)[form - 1], DType::kBF16, 3, 86);
    }
    if (HasFatalFailure()) return;
  }
}

TEST_F(CudaKernels, TileProductsOfEveryShape) {
  for (std::int64_t inputs : {1, 65, 129}) {
    for (std::int64_t cols : {16, 208}) {
      for (std::int64_t rows : {8, 136}) {
        const PackedSpec spec{
            .rows = rows, .cols = cols, .code_map = CodeMap::kNf4, .group_size = 16};
        check_product(Product::kTile, spec, DType::kBF16, inputs, 78);
        check_product(Product::kTransposed, spec, DType::kBF16, inputs, 79);
        if (HasFatalFailure()) return;
      }
    }
  }
  check_product(Product::kTile, {.rows = 133, .cols = 64}, DType::kF16, 70, 80);
}

// ------------------------------------------------------------------ LLM.int8

void check_int8(DType dtype, std::int64_t inputs, std::int64_t rows, std::int64_t cols,
                float threshold, int centre, std::uint64_t seed) {
  PackedSpec spec{.rows = rows,
                  .cols = cols,
                  .bits = 8,
                  .centre = centre,
                  .offset = Offset::kOver127,
                  .group_size = cols};
  const PackedMatrix w = random_packed(spec, seed);
  DeviceMatrix device(w);
  std::vector<float> wide = random_floats(inputs * cols, seed + 3);
  for (std::size_t i = 0; i < wide.size(); i += 37) wide[i] *= 9.0F;  // outliers
  Buffer x(wide.size() * dtype_size(dtype));
  narrow_from_f32(dtype, wide.data(), std::ssize(wide), x.data());
  const std::vector<float> bias = random_floats(rows, seed + 4);
  const auto bytes = static_cast<std::size_t>(inputs * rows) * dtype_size(dtype);
  Buffer expected(bytes);
  matmul_int8(w.view(), dtype, x.data(), inputs, bias.data(), threshold, expected.data(),
              serial_executor());
  const std::int64_t work = library().int8_workspace(inputs, cols);
  Buffer workspace(static_cast<std::size_t>(work));
  for (const ThreadOrder order : {ThreadOrder::kAscending, ThreadOrder::kDescending}) {
    set_thread_order(order);
    Buffer actual(bytes);
    const quantal_cuda_int8_product p{
        {device.view(), static_cast<int>(dtype), x.data(), inputs, bias.data(), 0, actual.data()},
        threshold,
        workspace.data(),
        work};
    quantal_cuda_status status{};
    ASSERT_EQ(library().int8_matmul(&p, kStream, &status), 0) << code_and_text(status);
    ASSERT_TRUE(actual.whole() && workspace.whole());
    ASSERT_EQ(std::memcmp(actual.data(), expected.data(), bytes), 0)
        << dtype_name(dtype) << " " << inputs << " x " << rows << " x " << cols << " threshold "
        << threshold << " seed " << seed;
  }
}

TEST_F(CudaKernels, Int8ProductsHaveTheCpusBits) {
  std::uint64_t seed = 90;
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (float threshold : {0.0F, 3.0F, 0.9F}) {
      check_int8(dtype, 5, 9, 200, threshold, 128, ++seed);
      if (dtype == DType::kF16) check_int8(dtype, 67, 130, 144, threshold, 128, ++seed);
      check_int8(dtype, 1, 3, 17, threshold, 120, ++seed);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaKernels, Int8ActivationsThatAreNotNumbers) {
  PackedSpec spec{.rows = 4,
                  .cols = 64,
                  .bits = 8,
                  .centre = 128,
                  .offset = Offset::kOver127,
                  .group_size = 64};
  const PackedMatrix w = random_packed(spec, 4);
  DeviceMatrix device(w);
  std::vector<float> x = random_floats(4 * 64, 8);
  x[3] = std::nanf("");
  x[64 + 5] = -INFINITY;
  std::fill(x.begin() + 128, x.begin() + 192, 0.0F);  // scale 0
  for (float threshold : {0.0F, 6.0F}) {
    std::vector<float> expected(16), actual(16, 7.0F);
    matmul_int8(w.view(), DType::kF32, x.data(), 4, nullptr, threshold, expected.data(),
                serial_executor());
    Buffer workspace(static_cast<std::size_t>(library().int8_workspace(4, 64)));
    const quantal_cuda_int8_product p{{device.view(), 0, x.data(), 4, nullptr, 0, actual.data()},
                                      threshold,
                                      workspace.data(),
                                      static_cast<std::int64_t>(workspace.size())};
    ASSERT_EQ(library().int8_matmul(&p, kStream, nullptr), 0);
    for (std::size_t i = 0; i < 16; ++i) {
      EXPECT_TRUE(actual[i] == expected[i] || (std::isnan(actual[i]) && std::isnan(expected[i])))
          << i << ": " << actual[i] << " is not " << expected[i];
    }
  }
}

// ------------------------------------------------------------------ norms

TEST_F(CudaKernels, RowSquareSumsOfEveryForm) {
  std::uint64_t seed = 4000;
  for (const PackedSpec& spec : kernel_specs()) {
    if (++seed % 5 != 0) continue;
    const PackedMatrix w = random_packed(spec, seed);
    DeviceMatrix device(w);
    Buffer out(static_cast<std::size_t>(spec.rows) * 8);
    const quantal_cuda_norms p{device.view(), reinterpret_cast<double*>(out.data())};
    quantal_cuda_status status{};
    ASSERT_EQ(library().row_square_sums(&p, kStream, &status), 0) << code_and_text(status);
    ASSERT_TRUE(out.whole());
    for (std::int64_t r = 0; r < spec.rows; ++r) {
      double sum = 0;
      for (std::int64_t c = 0; c < spec.cols; ++c) {
        const double v = ref::value(w.view(), r, c);
        sum += v * v;
      }
      EXPECT_NEAR(p.out[r], sum, 1e-12 * sum) << describe(spec) << " row " << r;
    }
  }
}

}  // namespace
}  // namespace quantal::testing
