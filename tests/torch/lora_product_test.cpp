// A packed layer and its LoRA adapter in one step: the arithmetic of two, and what stays apart.
#include <functional>

#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

struct Case {
  std::int64_t in = 64, out = 45, rank = 4;
  torch::ScalarType dtype = torch::kFloat;
  double dropout = 0;
  torch::ScalarType adapter = torch::kFloat;
};

Linear adapted(const Case& c) {
  Linear layer(c.in, c.out);
  layer->set_quantized(
      QuantizedLinear(quantize(layer->weight, nf4_options(64, false)), layer->bias, c.dtype));
  layer->set_lora(Lora(c.in, c.out, c.rank, 1.5, c.dropout));
  const torch::NoGradGuard no_grad;
  layer->lora()->B.normal_(0, 0.1);
  layer->lora()->to(c.adapter);
  return layer;
}

/// The layer's arithmetic in operators of its own, in `dtype`.
torch::Tensor apart(const LinearImpl& layer, const torch::Tensor& x, const torch::Tensor& seen,
                    torch::ScalarType dtype) {
  const auto w = layer.packed->weight().to(dtype);
  const auto adapter = layer.lora();
  const auto low =
      torch::linear(torch::linear(seen.to(dtype), adapter->A.to(dtype)), adapter->B.to(dtype));
  return torch::linear(x.to(dtype), w, layer.current_bias().to(dtype)) + low * adapter->scaling;
}

std::vector<torch::Tensor> trained(const LinearImpl& layer) {
  return {layer.lora()->A, layer.lora()->B, layer.current_bias()};
}

std::string node_of(const torch::Tensor& y) { return y.grad_fn() ? y.grad_fn()->name() : ""; }
bool is_one_step(const torch::Tensor& y) {
  return node_of(y).find("LowRankFunction") != std::string::npos;
}

double bound(torch::ScalarType dtype) {
  return dtype == torch::kFloat ? 2e-6 : dtype == torch::kHalf ? 2e-3 : 1.5e-2;
}

TEST(LoraProduct, ValuesAndGradientsAreThoseOfTheFormula) {
  torch::manual_seed(1);
  for (const auto dtype : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
    for (const Case& c :
         {Case{64, 45, 1, dtype}, Case{128, 67, 3, dtype}, Case{72, 31, 64, dtype}}) {
      for (const std::int64_t rows : {1, 5, 130}) {
        auto layer = adapted(c);
        layer->packed->bias.set_requires_grad(true);
        const auto x = torch::randn({rows, c.in}).to(dtype).requires_grad_();
        const auto seed = torch::randn({rows, c.out}).to(dtype);
        auto inputs = trained(*layer);
        inputs.push_back(x);
        const auto y = layer->forward(x);
        ASSERT_TRUE(is_one_step(y)) << node_of(y);
        EXPECT_EQ(y.scalar_type(), dtype);
        const auto expected = apart(*layer, x, x, torch::kDouble);
        EXPECT_LE(relative(y, expected), bound(dtype));
        const auto found = torch::autograd::grad({y}, inputs, {seed});
        const auto wide = torch::autograd::grad({expected}, inputs, {seed.to(torch::kDouble)});
        for (std::size_t i = 0; i < inputs.size(); ++i) {
          EXPECT_EQ(found[i].scalar_type(), inputs[i].scalar_type());
          EXPECT_LE(relative(found[i], wide[i]), bound(dtype)) << "gradient " << i;
        }
      }
    }
  }
}

TEST(LoraProduct, AdaptersOf16BitsAreWidenedAndTheirGradientsRoundedOnce) {
  torch::manual_seed(8);
  for (const auto adapter : {torch::kHalf, torch::kBFloat16}) {
    for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
      auto layer = adapted({.rank = 8, .dtype = dtype, .adapter = adapter});
      const auto x = torch::randn({70, 64}).to(dtype).requires_grad_();
      const auto seed = torch::randn({70, 45}).to(dtype);
      std::vector<std::vector<torch::Tensor>> both;
      for (const auto type : {adapter, torch::kFloat}) {  // the same values
        layer->lora()->to(type);
        const auto y = layer->forward(x);
        ASSERT_TRUE(is_one_step(y)) << node_of(y);
        both.push_back(torch::autograd::grad({y}, {layer->lora()->A, layer->lora()->B, x}, {seed},
                                             true, /*create_graph=*/false));
        both.back().push_back(y);
      }
      for (std::size_t i = 0; i < both[0].size(); ++i) {
        const torch::Tensor &narrow = both[0][i], &wide = both[1][i];
        EXPECT_EQ(narrow.scalar_type(), i < 2 ? adapter : dtype);
        EXPECT_TRUE(torch::equal(narrow, wide.to(narrow.scalar_type()))) << i;
      }
    }
  }
}

TEST(LoraProduct, DropoutIsWhatTheAdapterSees) {
  for (const bool frozen : {false, true}) {
    auto layer = adapted({.dropout = 0.5});
    layer->train();
    torch::manual_seed(2);
    auto x = torch::randn({9, 64}).set_requires_grad(!frozen);
    const auto seed = torch::randn({9, 45});
    torch::manual_seed(3);
    const auto y = layer->forward(x);
    torch::manual_seed(3);
    const auto seen = torch::dropout(x, 0.5, /*train=*/true);
    const auto expected = apart(*layer, x, seen, torch::kFloat);
    ASSERT_TRUE(is_one_step(y));
    EXPECT_LE(relative(y, expected), 2e-6);
    EXPECT_GE(relative(y, apart(*layer, x, x, torch::kFloat)), 1e-3);
    auto inputs = trained(*layer);
    inputs.pop_back();
    if (!frozen) inputs.push_back(x);
    const auto found = torch::autograd::grad({y}, inputs, {seed});
    const auto wanted = torch::autograd::grad({expected}, inputs, {seed});
    for (std::size_t i = 0; i < inputs.size(); ++i) EXPECT_LE(relative(found[i], wanted[i]), 2e-6);
    layer->eval();
    EXPECT_LE(relative(layer->forward(x), apart(*layer, x, x, torch::kFloat)), 2e-6);
  }
}

TEST(LoraProduct, IsDifferentiatedTwice) {
  for (const auto& [dropout, adapter] :
       {std::pair{0.0, torch::kFloat}, {0.5, torch::kFloat}, {0.0, torch::kBFloat16}}) {
    torch::manual_seed(4);
    auto layer = adapted({.dropout = dropout, .adapter = adapter});
    layer->train();
    const auto x = torch::randn({4, 64}).requires_grad_();
    auto inputs = trained(*layer);
    inputs.pop_back();
    inputs.push_back(x);
    std::vector<std::vector<torch::Tensor>> second;
    for (const bool one_step : {true, false}) {
      torch::manual_seed(5);
      const auto y =
          one_step ? layer->forward(x) : apart(*layer, x, layer->lora()->drop(x), torch::kFloat);
      const auto first = torch::autograd::grad({y.pow(3).sum()}, inputs, {}, true, true);
      auto sum = torch::zeros({});
      for (const auto& g : first) sum = sum + g.square().sum();
      second.push_back(torch::autograd::grad({sum}, inputs));
    }
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      EXPECT_EQ(second[0][i].scalar_type(), inputs[i].scalar_type());
      EXPECT_LE(relative(second[0][i], second[1][i]), adapter == torch::kFloat ? 1e-5 : 1.5e-2)
          << i;
    }
  }
}

TEST(LoraProduct, WithoutGradients) {
  torch::manual_seed(6);
  auto layer = adapted({});
  const auto x = torch::randn({2, 3, 64});
  const torch::NoGradGuard no_grad;
  const auto y = layer->forward(x);
  EXPECT_FALSE(y.requires_grad());
  EXPECT_EQ(y.sizes(), (std::vector<std::int64_t>{2, 3, 45}));
  EXPECT_LE(relative(y, apart(*layer, x, x, torch::kDouble)), 2e-6);
  expect_error(Errc::kShape, "expected last dimension 64", [&] {
    layer->forward(torch::randn({2, 63}));
  });
}

TEST(LoraProduct, OtherLayersAreAddedApart) {
  torch::manual_seed(7);
  const auto x = torch::randn({5, 64});
  const auto check = [&](const char* what, const std::function<void(LinearImpl&)>& change,
                         double allowed = 2e-6) {
    auto layer = adapted({});
    change(*layer);
    const auto y = layer->forward(x);
    EXPECT_FALSE(is_one_step(y)) << what;
    const auto expected = layer->packed ? apart(*layer, x, x, torch::kDouble) : torch::Tensor();
    if (expected.defined()) EXPECT_LE(relative(y, expected), allowed) << what;
  };
  check(
      "int8 activations", [](LinearImpl& l) { l.packed->activations = Activations::kInt8; }, 0.02);
  check("float64 adapter", [](LinearImpl& l) { l.lora()->to(torch::kDouble); });
  check("dense", [](LinearImpl& l) { l.set_dense(l.dense_weight(), l.current_bias()); });
  auto both = adapted({});
  both->set_lora(Lora(64, 45, 2, 1.0, 0.0), "second");  // B is zero
  EXPECT_TRUE(is_one_step(both->forward(x)));
  both->set_active({"default", "second"});
  EXPECT_FALSE(is_one_step(both->forward(x)));
  EXPECT_LE(relative(both->forward(x), apart(*both, x, x, torch::kDouble)), 2e-6);
  EXPECT_FALSE(is_one_step(both->forward(x.to(torch::kDouble))));
  auto dora = adapted({});
  dora->lora()->set_magnitude(dora->weight_norm(*dora->lora()));
  EXPECT_FALSE(is_one_step(dora->forward(x)));
}

}  // namespace
}  // namespace quantal::testing
