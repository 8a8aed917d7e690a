// The ops of a GPU with the kernels run on the CPU (tests/kernels/cuda_machine.h): which kernel a
// product takes, panels, biases, outputs, refusals.
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdlib>

#include "kernels/cuda_machine.h"
#include "torch/cuda_library.h"
#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

using Ints = std::vector<std::int64_t>;
using OptionalTensor = std::optional<at::Tensor>;

template <class Result, class... Args>
Result call(const char* name, const char* overload, Args... args) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("quantal_cuda_test::") + name).c_str(), overload)
      .typed<Result(Args...)>()
      .call(args...);
}

class CudaOps : public ::testing::Test {
 protected:
  void SetUp() override {
    use_cuda_library({quantal_cuda(QUANTAL_CUDA_VERSION), "the machine of the tests"});
    kernels_started();
  }

  static PackedTensors packed(std::int64_t rows, std::int64_t cols, const QuantizeOptions& how) {
    torch::manual_seed(rows + cols);
    return quantize(torch::randn({rows, cols}) * 0.1, how);
  }
  static Ints ints(const PackedTensors& w) {
    const auto spec = spec_to_ints(w.spec);
    return {spec.begin(), spec.end()};
  }
  static at::Tensor linear_of(const at::Tensor& x, const PackedTensors& w,
                              const OptionalTensor& bias = std::nullopt) {
    return call<at::Tensor, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                const at::Tensor&, const OptionalTensor&, at::IntArrayRef>(
        "linear", "", x, w.codes, w.stats, w.shared, bias, ints(w));
  }
  static at::Tensor grad_of(const at::Tensor& g, const PackedTensors& w) {
    return call<at::Tensor, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                const at::Tensor&, at::IntArrayRef>("linear_grad_input", "", g, w.codes, w.stats,
                                                    w.shared, ints(w));
  }
  static at::Tensor expected(const at::Tensor& x, const PackedTensors& w) {
    return torch::matmul(x.to(torch::kDouble),
                         dequantize(w, x.scalar_type()).to(torch::kDouble).t());
  }
};

TEST_F(CudaOps, LinearByEveryPath) {
  const PackedTensors w = packed(40, 64, hqq_options(4, 64));
  for (const auto type : {torch::kBFloat16, torch::kHalf}) {
    for (const auto& [m, kernels] :
         {std::pair{1, 1}, {16, 1}, {17, 1}, {33, 1}, {256, 1}, {300, 1}}) {
      const auto x = torch::randn({m, 64}).to(type);
      kernels_started();
      const auto y = linear_of(x, w);
      EXPECT_EQ(kernels_started(), kernels);  // of a panel: to decode it
      EXPECT_EQ(y.scalar_type(), type);
      EXPECT_LE(relative(y, expected(x, w)), 6e-3) << type << " m " << m;
    }
  }
  const auto x = torch::randn({2, 3, 64});  // float32 goes by panels
  const auto y = linear_of(x, w);
  EXPECT_EQ(y.sizes(), (torch::IntArrayRef{2, 3, 40}));
  EXPECT_LE(relative(y, expected(x, w)), 1e-6);
}

TEST_F(CudaOps, FormsThatKernelsDoNotTakeGoByPanels) {
  for (const auto& w :
       {packed(64, 96, hqq_options(4, 64, 0)), packed(40, 72, nf4_options(64, true)),
        packed(12, 64, nf4_options(64, false))}) {
    const auto x = torch::randn({5, w.spec.cols}).to(torch::kBFloat16);
    EXPECT_LE(relative(linear_of(x, w), expected(x, w)), 6e-3);
    const auto g = torch::randn({5, w.spec.rows}).to(torch::kBFloat16);
    EXPECT_LE(
        relative(grad_of(g, w), torch::matmul(g.to(torch::kDouble),
                                              dequantize(w, torch::kBFloat16).to(torch::kDouble))),
        6e-3);
  }
}

TEST_F(CudaOps, GradientsByEveryPath) {
  const PackedTensors w = packed(48, 320, hqq_options(4, 64));
  const auto dense = dequantize(w, torch::kBFloat16).to(torch::kDouble);
  for (const std::int64_t m : {1, 70, 300}) {
    const auto g = torch::randn({m, 48}).to(torch::kBFloat16);
    EXPECT_LE(relative(grad_of(g, w), torch::matmul(g.to(torch::kDouble), dense)), 6e-3) << m;
  }
}

TEST_F(CudaOps, BiasesOfEveryType) {
  const PackedTensors w = packed(40, 64, nf4_options(64, false));
  for (const std::int64_t m : {3, 40, 300}) {
    const auto x = torch::randn({m, 64}).to(torch::kBFloat16);
    for (const auto type : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
      const auto bias = torch::randn({40}).to(type);
      EXPECT_LE(relative(linear_of(x, w, bias), expected(x, w) + bias.to(torch::kDouble)), 6e-3);
    }
  }
}

TEST_F(CudaOps, InputsWithGapsAndOddPlaces) {
  const PackedTensors w = packed(40, 64, hqq_options(4, 64));
  const auto wide = torch::randn({5, 65}).to(torch::kBFloat16);
  const auto x = wide.slice(1, 1, 65);  // gaps
  EXPECT_LE(relative(linear_of(x, w), expected(x, w)), 6e-3);
  const auto flat = torch::randn({5 * 64 + 1}).to(torch::kBFloat16);
  const auto moved = flat.slice(0, 1).view({5, 64});  // 2 bytes behind a multiple of 16
  EXPECT_LE(relative(linear_of(moved, w), expected(moved, w)), 6e-3);
  EXPECT_EQ(linear_of(torch::empty({0, 64}, torch::kBFloat16), w).sizes(),
            (torch::IntArrayRef{0, 40}));
}

TEST_F(CudaOps, IntoATensor) {
  const PackedTensors w = packed(64, 64, hqq_options(4, 64));
  const auto into = [&](const at::Tensor& x, at::Tensor out) {
    call<void, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
         const OptionalTensor&, at::IntArrayRef, at::Tensor&>("linear", "out", x, w.codes, w.stats,
                                                              w.shared, std::nullopt, ints(w), out);
  };
  const auto x = torch::randn({4, 64}).to(torch::kBFloat16);
  const auto y = linear_of(x, w);
  auto out = torch::empty({4, 64}, torch::kBFloat16);
  into(x, out);
  EXPECT_TRUE(out.equal(y));
  auto gaps = torch::zeros({4, 66}, torch::kBFloat16).slice(1, 1, 65);
  into(x, gaps);
  EXPECT_TRUE(gaps.equal(y));
  auto same = x.clone();
  into(same, same);
  EXPECT_TRUE(same.equal(y));
  EXPECT_THROW(into(x, torch::empty({4, 63}, torch::kBFloat16)), std::exception);
  EXPECT_THROW(into(x, torch::empty({4, 64})), std::exception);
}

TEST_F(CudaOps, Int8HasTheCpusBits) {
  QuantizeOptions options;
  options.method = QuantizationMethod::BNB_INT8;
  options.bits = 8;
  const PackedTensors w = packed(24, 64, options);
  auto x = torch::randn({5, 64}).to(torch::kHalf);
  x[2][7] = 9.0;
  for (const double threshold : {0.0, 6.0}) {
    const auto y = call<at::Tensor, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, const OptionalTensor&, at::IntArrayRef, double>(
        "linear_int8", "", x, w.codes, w.stats, w.shared, std::nullopt, ints(w), threshold);
    EXPECT_TRUE(y.equal(linear_int8(x, w, {}, threshold)));
  }
}

TEST_F(CudaOps, QuantizeByKernelsOrTheCpu) {
  const auto weight = torch::randn({24, 128});
  const auto quantized = [](const at::Tensor& values, const PackedTensors& w) {
    return call<std::tuple<at::Tensor, at::Tensor, at::Tensor>, const at::Tensor&, at::IntArrayRef>(
        "quantize", "", values, ints(w));
  };
  QuantizeOptions odd = hqq_options(4, 64);
  odd.quant_zero = true;
  const QuantizeOptions mxfp4{
      .method = QuantizationMethod::MLX_INT4, .bits = 4, .group_size = 32, .mode = "mxfp4"};
  const QuantizeOptions quanto{
      .method = QuantizationMethod::QUANTO_INT4, .bits = 4, .axis = -1, .mode = "hqq"};
  for (const auto& [options, kernels] : {std::pair{hqq_options(3, 64), true},
                                         {nf4_options(64, true), true},
                                         {hqq_options(4, 64, 0), true},
                                         {mxfp4, true},
                                         {quanto, true},
                                         {odd, false}}) {
    const PackedTensors w = quantize(weight, options);
    kernels_started();
    const auto [codes, stats, shared] = quantized(weight, w);
    EXPECT_EQ(kernels_started() > 0, kernels);
    EXPECT_TRUE(codes.equal(w.codes) && stats.equal(w.stats) && shared.equal(w.shared));
  }
  auto bad = weight.clone();
  bad[3][5] = NAN;
  try {
    quantized(bad, quantize(weight, nf4_options(64, true)));
    FAIL() << "a weight that is not a number was taken";
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find("row 3, column 5"), std::string::npos) << error.what();
  }
}

TEST_F(CudaOps, ComparisonsWithDenseWeightsGoToTheCpu) {
  const auto weight = torch::randn({24, 128});
  const PackedTensors w = quantize(weight, hqq_options(3, 64));
  const PackedTensors other = quantize(weight + 0.05, w.spec);
  const auto error =
      call<double, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
           at::IntArrayRef>("sampled_error", "", weight, w.codes, w.stats, w.shared, ints(w));
  EXPECT_NEAR(error, relative_error(weight, w), 1e-6);
  const auto survived =
      call<at::Tensor, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
           const at::Tensor&, const at::Tensor&, at::IntArrayRef, const at::Tensor&>(
          "merge_survival", "", w.codes, w.stats, w.shared, other.codes, other.stats, other.shared,
          ints(w), weight + 0.05);
  EXPECT_EQ(survived.sizes(), (torch::IntArrayRef{4}));
  EXPECT_GT(survived[1].item<double>(), 0);
}

TEST_F(CudaOps, DequantizeAndNorms) {
  const PackedTensors w = quantize(torch::randn({24, 128}), hqq_options(3, 64));
  const auto dense =
      call<at::Tensor, const at::Tensor&, const at::Tensor&, const at::Tensor&, at::IntArrayRef,
           at::ScalarType>("dequantize", "", w.codes, w.stats, w.shared, ints(w), torch::kFloat);
  EXPECT_TRUE(dense.equal(dequantize(w, torch::kFloat)));
  const auto sums = call<at::Tensor, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         at::IntArrayRef, at::ScalarType>("row_square_sums", "", w.codes, w.stats,
                                                          w.shared, ints(w), torch::kDouble);
  EXPECT_LE(relative(sums, dense.to(torch::kDouble).square().sum(1)), 1e-14);
}

TEST_F(CudaOps, KernelsOrOperatorsOfTorch) {
  const PackedTensors w = packed(40, 64, hqq_options(4, 64));
  const auto x = torch::randn({3, 64}).to(torch::kBFloat16);
  const auto chosen = [&] {
    return call<at::Tensor, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                const at::Tensor&, const OptionalTensor&, at::IntArrayRef>(
        "chosen_linear", "", x, w.codes, w.stats, w.shared, std::nullopt, ints(w));
  };
  kernels_started();
  EXPECT_LE(relative(chosen(), expected(x, w)), 6e-3);
  EXPECT_GT(kernels_started(), 0);
  use_cuda_library({nullptr, "off for a test"});
  EXPECT_LE(relative(chosen(), expected(x, w)), 6e-3);
  EXPECT_EQ(kernels_started(), 0);
}

TEST_F(CudaOps, RefusesByWord) {
  const PackedTensors w = packed(40, 64, hqq_options(4, 64));
  const auto refused = [&](const at::Tensor& x, const OptionalTensor& bias) -> std::string {
    try {
      linear_of(x, w, bias);
    } catch (const std::exception& error) {
      return error.what();
    }
    return "taken";
  };
  const auto x = torch::randn({2, 64}).to(torch::kBFloat16);
  EXPECT_NE(refused(torch::zeros({2, 63}, torch::kBFloat16), {}).find("expected last dimension 64"),
            std::string::npos);
  EXPECT_NE(refused(torch::zeros({2, 64}, torch::kInt), {}).find("is int32, expected float32"),
            std::string::npos);
  EXPECT_NE(refused(x, torch::zeros({39})).find("bias has shape [39], expected [40]"),
            std::string::npos);
  fail_next_launch("an error of before");
  EXPECT_NE(refused(x, {}).find("small_matmul: an error of before"), std::string::npos);
  use_cuda_library({nullptr, "off for a test"});
  EXPECT_NE(
      refused(x, {}).find("quantal::linear: tensors are on a GPU and the CUDA kernels are not "
                          "in use: off for a test"),
      std::string::npos);
}

}  // namespace
}  // namespace quantal::testing
