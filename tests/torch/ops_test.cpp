// The differentiable product against a dense reference in double.
#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

struct Form {
  const char* name;
  QuantizeOptions options;
  std::int64_t rows, cols;
};

std::vector<Form> forms() {
  return {{"hqq4", hqq_options(4, 64), 48, 128},
          {"hqq4 groups cross rows", hqq_options(4, 64), 64, 96},
          {"hqq8 groups cross rows", hqq_options(8, 128), 64, 576},
          {"hqq4 axis 0", hqq_options(4, 64, 0), 64, 96},
          {"nf4", nf4_options(64, false), 48, 128},
          {"nf4 double, groups cross rows", nf4_options(64, true), 40, 72}};
}

torch::Tensor random_weight(const Form& form, std::uint64_t seed) {
  torch::manual_seed(seed);
  return torch::randn({form.rows, form.cols}) * 0.1;
}

/// Largest |a - b| over the bound c * sqrt(k) * eps * (|x| |w|) of the product, elementwise.
double bound_ratio(const torch::Tensor& y, const torch::Tensor& x, const torch::Tensor& w,
                   const torch::Tensor& bias, double epsilon) {
  const auto xd = x.to(torch::kDouble), wd = w.to(torch::kDouble);
  auto reference = torch::matmul(xd, wd.t());
  auto scale = torch::matmul(xd.abs(), wd.abs().t());
  if (bias.defined()) {
    reference = reference + bias.to(torch::kDouble);
    scale = scale + bias.to(torch::kDouble).abs();
  }
  const double k = std::sqrt(static_cast<double>(w.size(1)));
  const auto bound = scale * (8 * k * std::pow(2.0, -24)) + reference.abs() * epsilon + 1e-30;
  return ((y.to(torch::kDouble) - reference).abs() / bound).max().item<double>();
}

TEST(Ops, LinearStaysWithinTheSummationBound) {
  for (const Form& form : forms()) {
    const PackedTensors packed = quantize(random_weight(form, 1), form.options);
    const auto w = dequantize(packed, torch::kFloat);
    for (const std::int64_t m : {1, 2, 3, 7, 33, 300}) {
      torch::manual_seed(m);
      const auto x = torch::randn({m, form.cols});
      for (const bool with_bias : {false, true}) {
        const auto bias = with_bias ? torch::randn({form.rows}) : torch::Tensor();
        const auto y = linear(x, packed, bias);
        EXPECT_EQ(y.sizes(), (torch::IntArrayRef{m, form.rows}));
        EXPECT_LE(bound_ratio(y, x, w, bias, std::pow(2.0, -24)), 1) << form.name << " m=" << m;
      }
    }
  }
}

TEST(Ops, HalfTypesRoundOnceMore) {
  for (const auto type : {torch::kBFloat16, torch::kHalf}) {
    const double epsilon = type == torch::kHalf ? std::pow(2.0, -10) : std::pow(2.0, -7);
    for (const Form& form : forms()) {
      const PackedTensors packed = quantize(random_weight(form, 2), form.options);
      // Panels hold the values in the type of x; packed products use them in float32.
      const auto w = dequantize(packed, torch::kFloat);
      for (const std::int64_t m : {1, 5, 300}) {
        const auto x = torch::randn({m, form.cols}).to(type);
        const auto y = linear(x, packed);
        EXPECT_EQ(y.scalar_type(), type);
        EXPECT_LE(relative(y, torch::matmul(x.to(torch::kDouble), w.to(torch::kDouble).t())),
                  epsilon)
            << form.name << " m=" << m;
      }
    }
  }
}

TEST(Ops, AnyShapeOfXAndNonContiguousX) {
  const Form form = forms()[1];
  const PackedTensors packed = quantize(random_weight(form, 3), form.options);
  const auto w = dequantize(packed, torch::kFloat);
  const auto x = torch::randn({3, 5, form.cols});
  EXPECT_LE(relative(linear(x, packed), torch::matmul(x, w.t())), 1e-6);
  EXPECT_LE(relative(linear(x[0][0], packed), torch::matmul(w, x[0][0])), 1e-6);
  const auto turned = torch::randn({form.cols, 6}).t();
  EXPECT_LE(relative(linear(turned, packed), torch::matmul(turned, w.t())), 1e-6);
  const auto strided = torch::randn({4, 2 * form.cols}).narrow(1, 3, form.cols);
  EXPECT_LE(relative(linear(strided, packed), torch::matmul(strided, w.t())), 1e-6);
  EXPECT_EQ(linear(torch::empty({0, form.cols}), packed).sizes(),
            (torch::IntArrayRef{0, form.rows}));
  EXPECT_EQ(linear(torch::empty({2, 0, form.cols}), packed).sizes(),
            (torch::IntArrayRef{2, 0, form.rows}));
}

TEST(Ops, GradientsEqualThoseOfTheDenseLayer) {
  for (const Form& form : forms()) {
    const PackedTensors packed = quantize(random_weight(form, 4), form.options);
    const auto w = dequantize(packed, torch::kFloat);
    for (const std::int64_t m : {1, 3, 200}) {
      auto x = torch::randn({m, form.cols}).requires_grad_();
      auto bias = torch::randn({form.rows}).requires_grad_();
      const auto seed = torch::randn({m, form.rows});
      linear(x, packed, bias).backward(seed);
      const auto expected = torch::matmul(seed.to(torch::kDouble), w.to(torch::kDouble));
      EXPECT_LE(relative(x.grad(), expected), 2e-6) << form.name << " m=" << m;
      EXPECT_LE(relative(bias.grad(), seed.to(torch::kDouble).sum(0)), 2e-6);
    }
  }
}

TEST(Ops, GradientOfXWithoutBiasAndOfBiasAlone) {
  const Form form = forms()[0];
  const PackedTensors packed = quantize(random_weight(form, 5), form.options);
  auto x = torch::randn({2, 3, form.cols}).requires_grad_();
  linear(x, packed).sum().backward();
  EXPECT_EQ(x.grad().sizes(), x.sizes());
  auto bias = torch::zeros({form.rows}).requires_grad_();
  linear(x.detach(), packed, bias).sum().backward();
  EXPECT_TRUE(torch::equal(bias.grad(), torch::full({form.rows}, 6.0)));
  EXPECT_FALSE(linear(x.detach(), packed).requires_grad());
}

TEST(Ops, GradientsCanBeDifferentiatedAgain) {
  const Form form = forms()[0];
  const PackedTensors packed = quantize(random_weight(form, 6), form.options);
  const auto w = dequantize(packed, torch::kFloat);
  auto x = torch::randn({3, form.cols}).requires_grad_();
  auto y = linear(x, packed).square().sum();
  const auto first = torch::autograd::grad({y}, {x}, {}, true, /*create_graph=*/true)[0];
  first.sum().backward();
  const auto ones = torch::ones({3, form.cols});
  const auto expected = 2 * torch::matmul(torch::matmul(ones, w.t()), w);
  EXPECT_LE(relative(x.grad(), expected), 1e-5);
}

TEST(Ops, LargeMatrixUsesSeveralPanels) {
  // 2600 x 1024 float32 is 10.4 MiB: more than one panel in both directions.
  const Form form{"large", hqq_options(4, 64), 2600, 1024};
  const PackedTensors packed = quantize(random_weight(form, 7), form.options);
  const auto w = dequantize(packed, torch::kFloat);
  auto x = torch::randn({400, form.cols}).requires_grad_();
  const auto y = linear(x, packed);
  EXPECT_LE(relative(y, torch::matmul(x, w.t())), 1e-6);
  const auto seed = torch::randn({400, form.rows});
  y.backward(seed);
  EXPECT_LE(relative(x.grad(), torch::matmul(seed, w)), 1e-6);
}

TEST(Ops, ThreadsDoNotChangePackedProducts) {
  const Form form = forms()[2];
  const PackedTensors packed = quantize(random_weight(form, 8), form.options);
  const auto x = torch::randn({1, form.cols});
  const int threads = torch::get_num_threads();
  torch::set_num_threads(1);
  const auto one = linear(x, packed);
  torch::set_num_threads(std::max(threads, 2));
  EXPECT_TRUE(torch::equal(linear(x, packed), one));
  EXPECT_TRUE(torch::equal(quantize(random_weight(form, 8), form.options).codes, packed.codes));
  torch::set_num_threads(threads);
}

TEST(Ops, BadArgumentsAreTypedErrors) {
  const Form form = forms()[0];
  const PackedTensors packed = quantize(random_weight(form, 9), form.options);
  const auto x = torch::randn({2, form.cols});
  expect_error(Errc::kShape, "x has shape [2, 7], expected last dimension 128",
               [&] { linear(x.narrow(1, 0, 7), packed); });
  expect_error(Errc::kDtype, "expected float32, float16 or bfloat16",
               [&] { linear(x.to(torch::kDouble), packed); });
  expect_error(Errc::kShape, "bias has shape [3], expected [48]",
               [&] { linear(x, packed, torch::zeros({3})); });
  PackedTensors torn = packed;
  torn.codes = packed.codes.narrow(0, 0, 5);
  expect_error(Errc::kShape, "codes", [&] { linear(x, torn); });
  torn = packed;
  torn.stats = packed.stats.to(torch::kFloat);
  expect_error(Errc::kDtype, "stats", [&] { linear(x, torn); });
  auto weight = random_weight(form, 9);
  weight[3][4] = std::numeric_limits<float>::quiet_NaN();
  expect_error(Errc::kUnsupported, "3", [&] { quantize(weight, form.options); });
  expect_error(Errc::kConfig, "group",
               [&] { quantize(random_weight(form, 9), hqq_options(4, 7)); });
}

TEST(Ops, RelativeErrorMatchesItsFormula) {
  const Form form{"tall", nf4_options(64, true), 1500, 1024};
  const auto weight = random_weight(form, 10);
  const PackedTensors packed = quantize(weight, form.options);
  const double expected = relative(dequantize(packed, torch::kFloat), weight);
  EXPECT_NEAR(relative_error(weight, packed), expected, 1e-9);
  EXPECT_GT(expected, 0.05);
  EXPECT_LT(expected, 0.12);
}

}  // namespace
}  // namespace quantal::testing
