// Attention against its formula in double, whichever kernels run.
#include <ATen/autocast_mode.h>

#include <cmath>
#include <limits>

#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

struct Sizes {
  std::int64_t batch, heads, kv_heads, queries, keys, dim;
};

struct Inputs {
  torch::Tensor q, k, v;
};

Inputs random_inputs(const Sizes& s, torch::ScalarType type, std::uint64_t seed = 1) {
  torch::manual_seed(seed);
  const auto make = [&](std::int64_t heads, std::int64_t positions) {
    return torch::randn({s.batch, heads, positions, s.dim}).to(type);
  };
  return {make(s.heads, s.queries), make(s.kv_heads, s.keys), make(s.kv_heads, s.keys)};
}

/// The formula, in double and differentiable.
torch::Tensor reference(const Inputs& in, const AttentionOptions& options) {
  const auto q = in.q.to(torch::kDouble);
  const std::int64_t shared_by = q.size(1) / in.k.size(1);
  const auto k = in.k.to(torch::kDouble).repeat_interleave(shared_by, 1);
  const auto v = in.v.to(torch::kDouble).repeat_interleave(shared_by, 1);
  const double scale = options.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
  auto scores = torch::matmul(q, k.transpose(2, 3)) * scale;
  const double hidden = -std::numeric_limits<double>::infinity();
  if (options.causal) {
    const auto seen = torch::ones({q.size(2), k.size(2)}, torch::kBool).tril(k.size(2) - q.size(2));
    scores = scores.masked_fill(seen.logical_not(), hidden);
  }
  if (options.mask.defined()) {
    const bool flags = options.mask.scalar_type() == torch::kBool;
    scores = flags ? scores.masked_fill(options.mask.logical_not(), hidden)
                   : scores + options.mask.to(torch::kDouble);
  }
  return torch::matmul(scores.softmax(-1), v);
}

double tolerance(torch::ScalarType type) {
  return type == torch::kFloat ? 1e-5 : type == torch::kHalf ? 2e-3 : 1.6e-2;
}

std::vector<Sizes> sizes() {
  return {{1, 9, 3, 1, 40, 64},  {2, 4, 2, 1, 7, 16},   {2, 4, 4, 5, 5, 16}, {1, 6, 2, 3, 11, 32},
          {2, 4, 2, 33, 33, 64}, {1, 2, 1, 20, 50, 80}, {1, 3, 3, 4, 9, 7},  {2, 2, 1, 1, 1, 64}};
}

TEST(Attention, IsItsFormula) {
  for (const Sizes& s : sizes()) {
    for (const auto type : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
      for (const bool causal : {false, true}) {
        const Inputs in = random_inputs(s, type);
        const AttentionOptions options{.causal = causal};
        const torch::NoGradGuard no_grad;
        const auto y = attention(in.q, in.k, in.v, options);
        EXPECT_EQ(y.sizes(), in.q.sizes());
        EXPECT_EQ(y.scalar_type(), type);
        EXPECT_LT(relative(y, reference(in, options)), tolerance(type))
            << s.heads << "/" << s.kv_heads << " heads, " << s.queries << " of " << s.keys
            << " positions, dim " << s.dim << " " << c10::toString(type) << " causal " << causal;
      }
    }
  }
}

TEST(Attention, GradientsAreThoseOfTheFormula) {
  for (const Sizes& s : sizes()) {
    for (const auto type : {torch::kFloat, torch::kBFloat16}) {
      for (const bool causal : {false, true}) {
        const Inputs in = random_inputs(s, type);
        const AttentionOptions options{.causal = causal};
        for (const auto& t : {in.q, in.k, in.v}) t.requires_grad_();
        const auto grad = torch::randn(in.q.sizes()).to(type);
        const auto grads = torch::autograd::grad({attention(in.q, in.k, in.v, options)},
                                                 {in.q, in.k, in.v}, {grad});
        const auto expected = torch::autograd::grad({reference(in, options)}, {in.q, in.k, in.v},
                                                    {grad.to(torch::kDouble)});
        for (std::size_t i = 0; i < 3; ++i) {
          // A query that sees one key has no gradient of its score: only rounding is left.
          const double size = expected[i].to(torch::kDouble).norm().item<double>();
          const auto difference = grads[i].to(torch::kDouble) - expected[i].to(torch::kDouble);
          EXPECT_EQ(grads[i].scalar_type(), type);
          EXPECT_LE(difference.norm().item<double>(),
                    2 * tolerance(type) * std::max(size, grad.norm().item<double>()))
              << "gradient " << i << " of " << s.queries << " of " << s.keys << " positions, dim "
              << s.dim << " " << c10::toString(type) << " causal " << causal;
        }
      }
    }
  }
}

TEST(Attention, ReadsAnyStrides) {
  const Sizes s{2, 4, 2, 6, 6, 32};
  for (const auto type : {torch::kFloat, torch::kBFloat16}) {
    const Inputs in = random_inputs(s, type);
    const auto expected = attention(in.q, in.k, in.v, {.causal = true});
    // As a model has them: positions before heads, keys in a cache with room, every second value.
    const auto q = in.q.transpose(1, 2).contiguous().transpose(1, 2);
    auto store = torch::full({2, 2, 10, 32}, 99.0, torch::TensorOptions().dtype(type));
    const auto k = store.narrow(2, 0, 6).copy_(in.k);
    auto wide = torch::full({2, 2, 6, 64}, 99.0, torch::TensorOptions().dtype(type));
    const auto v = wide.slice(3, 0, 64, 2).copy_(in.v);
    EXPECT_TRUE(torch::equal(attention(q, k, v, {.causal = true}), expected));
  }
}

TEST(Attention, TakesMasks) {
  const Inputs in = random_inputs({2, 4, 2, 5, 8, 16}, torch::kFloat);
  const auto flags = torch::rand({2, 1, 5, 8}) > 0.3;
  flags.select(3, 0).fill_(true);  // every query sees something
  for (const bool causal : {false, true}) {
    for (const auto& mask : {flags, torch::randn({5, 8}), torch::arange(8) > 2}) {
      const AttentionOptions options{.causal = causal, .mask = mask};
      EXPECT_LT(relative(attention(in.q, in.k, in.v, options), reference(in, options)), 1e-5);
    }
  }
}

/// Padding on either side, and two texts in one row.
std::vector<torch::Tensor> run_masks(std::int64_t length) {
  const auto causal = torch::ones({length, length}, torch::kBool).tril();
  auto padded = causal.clone().expand({2, 1, length, length}).contiguous();
  padded[1].slice(2, 0, 3).fill_(false);
  auto right = causal.clone().expand({2, 1, length, length}).contiguous();
  right[0].slice(2, length - 2).fill_(false);
  auto packed = causal.clone();
  packed.slice(0, 4).slice(1, 0, 4).fill_(false);
  return {padded, right, packed};
}

TEST(Attention, RunsOfAMaskAreItsKeys) {
  for (const auto type : {torch::kFloat, torch::kBFloat16}) {
    for (const auto& mask : run_masks(20)) {
      const Inputs in = random_inputs({2, 4, 2, 20, 20, 64}, type);
      for (const auto& t : {in.q, in.k, in.v}) t.requires_grad_();
      const AttentionOptions options{.mask = mask};
      const auto y = attention(in.q, in.k, in.v, options);
      // What nobody sees has no values in the formula; torch's differ from version to version.
      const auto seen = mask.any(-1, true).to(torch::kDouble);
      const auto grad = torch::randn(in.q.sizes()) * seen;
      const auto expected = reference(in, options).nan_to_num() * seen;
      EXPECT_LT(relative(y.to(torch::kDouble) * seen, expected), tolerance(type));
      const auto grads =
          torch::autograd::grad({y}, {in.q, in.k, in.v}, {grad.to(type)}, /*retain_graph=*/false);
      AttentionOptions wide{.mask = mask.logical_or(mask.any(-1, true).logical_not())};
      const auto exact = torch::autograd::grad({reference(in, wide)}, {in.q, in.k, in.v},
                                               {grad.to(torch::kDouble)});
      for (std::size_t i = 0; i < 3; ++i) {
        EXPECT_LT(relative(grads[i], exact[i]), 2 * tolerance(type)) << "gradient " << i;
      }
    }
  }
}

TEST(Attention, TakesAScaleAndAutocast) {
  const Inputs in = random_inputs({1, 4, 2, 5, 5, 16}, torch::kFloat);
  const AttentionOptions options{.causal = true, .scale = 0.7};
  EXPECT_LT(relative(attention(in.q, in.k, in.v, options), reference(in, options)), 1e-5);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto y = attention(in.q, in.k, in.v, options);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  EXPECT_EQ(y.scalar_type(), torch::kBFloat16);
  EXPECT_LT(relative(y, reference(in, options)), 3e-2);
}

TEST(Attention, NamesWhatDoesNotBelongTogether) {
  const Inputs in = random_inputs({2, 4, 2, 5, 8, 16}, torch::kFloat);
  expect_error(Errc::kShape, "q has shape [4, 5, 16], expected [batch, heads, positions, dim]",
               [&] { attention(in.q[0], in.k, in.v); });
  expect_error(Errc::kShape, "k has shape [1, 2, 8, 16], expected [2, kv_heads, keys, 16] as q",
               [&] { attention(in.q, in.k.narrow(0, 0, 1), in.v); });
  expect_error(Errc::kShape, "v has shape [2, 2, 7, 16], expected [2, 2, 8, 16] as k",
               [&] { attention(in.q, in.k, in.v.narrow(2, 0, 7)); });
  expect_error(Errc::kShape, "heads is 3, expected a multiple of kv_heads 2",
               [&] { attention(in.q.narrow(1, 0, 3), in.k, in.v); });
  expect_error(Errc::kShape, "keys is 4, expected >= 5", [&] {
    attention(in.q, in.k.narrow(2, 0, 4), in.v.narrow(2, 0, 4), {.causal = true});
  });
  expect_error(Errc::kDtype, "v is Half, expected Float as q",
               [&] { attention(in.q, in.k, in.v.to(torch::kHalf)); });
  expect_error(Errc::kDevice, "k is on meta, expected cpu",
               [&] { attention(in.q, in.k.to(torch::kMeta), in.v); });
}

TEST(Attention, OtherTypesAreTorchs) {
  const Inputs in = random_inputs({1, 4, 2, 3, 6, 16}, torch::kDouble);
  const AttentionOptions options{.causal = true};
  EXPECT_LT(relative(attention(in.q, in.k, in.v, options), reference(in, options)), 1e-12);
}

TEST(Attention, IsDifferentiatedOnceOrRight) {
  const Inputs in = random_inputs({1, 2, 2, 8, 8, 16}, torch::kBFloat16);
  in.q.requires_grad_();
  const auto y = attention(in.q, in.k, in.v, {.causal = true});
  const auto grads = torch::autograd::grad({y.sum()}, {in.q}, {}, true, /*create_graph=*/true);
  const bool ours =
      attention_refusal(attention_shape(in.q.sizes(), in.k.sizes(), in.v.sizes(), true, 1),
                        DType::kBF16, true)
          .empty();
  if (!ours) return;  // torch's rules
  expect_error(Errc::kUnsupported, "is differentiated twice, expected once",
               [&] { torch::autograd::grad({grads[0].square().sum()}, {in.q}); });
}

}  // namespace
}  // namespace quantal::testing
