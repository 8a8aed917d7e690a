// The ops of devices without kernels, called with tensors on the CPU (aten_test_ops.cpp): values
// have the bits of the CPU's kernels for every form, whatever the panel and the block; products are
// within the bounds that kernels.h states.
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>

#include "kernels/specs.h"
#include "kernels/support.h"
#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

using Ints = std::vector<std::int64_t>;
using OptionalTensor = std::optional<at::Tensor>;
using T = const at::Tensor&;

constexpr at::ScalarType kTypes[] = {torch::kFloat, torch::kHalf, torch::kBFloat16};

template <class Result, class... Args>
Result call(const char* name, const char* overload, Args... args) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("quantal_aten_test::") + name).c_str(), overload)
      .typed<Result(Args...)>()
      .call(args...);
}

Ints ints(const PackedTensors& w) {
  const auto spec = spec_to_ints(w.spec);
  return {spec.begin(), spec.end()};
}

at::Tensor dequantized(const PackedTensors& w, at::ScalarType type) {
  return call<at::Tensor, T, T, T, at::IntArrayRef, at::ScalarType>(
      "dequantize", "", w.codes, w.stats, w.shared, ints(w), type);
}

at::Tensor decoded(const PackedTensors& w, const Panel& p, std::int64_t block) {
  return call<at::Tensor, T, T, T, at::IntArrayRef, at::IntArrayRef, std::int64_t, at::ScalarType>(
      "decode", "", w.codes, w.stats, w.shared, ints(w),
      Ints{p.row_begin, p.row_end, p.col_begin, p.col_end}, block, torch::kFloat);
}

at::Tensor linear_of(T x, const PackedTensors& w, const OptionalTensor& bias = std::nullopt) {
  return call<at::Tensor, T, T, T, T, const OptionalTensor&, at::IntArrayRef>(
      "linear", "", x, w.codes, w.stats, w.shared, bias, ints(w));
}

at::Tensor int8_of(T x, const PackedTensors& w, const OptionalTensor& bias, double threshold,
                   std::int64_t most) {
  return call<at::Tensor, T, T, T, T, const OptionalTensor&, at::IntArrayRef, double, std::int64_t>(
      "int8_product", "", x, w.codes, w.stats, w.shared, bias, ints(w), threshold, most);
}

at::Tensor activations_of(T x, const PackedTensors& w, const OptionalTensor& bias) {
  return call<at::Tensor, T, T, T, T, const OptionalTensor&, at::IntArrayRef>(
      "linear_int8_activations", "", x, w.codes, w.stats, w.shared, bias, ints(w));
}

/// Equal bits; any NaN equals any NaN.
bool same_bits(T a, T b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) return false;
  const auto bits = [](T t) {
    return t.contiguous().view(t.element_size() == 4 ? torch::kInt : torch::kShort);
  };
  return bits(a).eq(bits(b)).logical_or(a.isnan().logical_and(b.isnan())).all().item<bool>();
}

PackedTensors random_tensors(const PackedSpec& spec, std::uint64_t seed) {
  return to_tensors(random_packed(spec, seed, seed % 2 == 0).view());
}

PackedTensors int8_weights(std::int64_t rows, std::int64_t cols) {
  QuantizeOptions options;
  options.method = QuantizationMethod::BNB_INT8;
  options.bits = 8;
  torch::manual_seed(rows + cols);
  return quantize(torch::randn({rows, cols}), options);
}

TEST(AtenOps, EveryFormHasTheCpusBits) {
  std::uint64_t seed = 9000;
  for (const PackedSpec& spec : kernel_specs()) {
    const PackedTensors w = random_tensors(spec, ++seed);
    for (const auto type : kTypes) {
      ASSERT_TRUE(same_bits(dequantized(w, type), dequantize(w, type)))
          << describe(spec) << " as " << type << " seed " << seed;
    }
  }
}

TEST(AtenOps, EveryCodeOfEightBitFloats) {
  for (const auto map : {CodeMap::kE4M3, CodeMap::kE5M2}) {
    const PackedSpec spec{.rows = 1, .cols = 256, .bits = 8, .code_map = map, .group_size = 256};
    PackedMatrix w = make_packed(spec);
    for (int code = 0; code < 256; ++code) w.codes[static_cast<std::size_t>(code)] = code & 255;
    const float one = 1.0F;
    std::memcpy(w.stats.data(), &one, sizeof(one));
    const PackedTensors tensors = to_tensors(w.view());
    EXPECT_TRUE(same_bits(dequantized(tensors, torch::kFloat), dequantize(tensors, torch::kFloat)));
  }
}

TEST(AtenOps, PanelsAndBlocksOfAnySize) {
  std::uint64_t seed = 7000;
  for (const PackedSpec& spec : kernel_specs()) {
    if (++seed % 3 != 0 || spec.rows < 3) continue;
    const PackedTensors w = random_tensors(spec, seed);
    const at::Tensor whole = dequantize(w, torch::kFloat);
    const std::int64_t first = spec.cols > 128 ? 128 : 0;
    const std::int64_t last = first + (spec.cols - first) * 4 / 5 + 1;
    for (const std::int64_t block : {1, 300, 1500}) {
      for (const Panel& p : {Panel{0, spec.rows, 0, spec.cols}, Panel{1, spec.rows, first, last},
                             Panel{2, 3, first, spec.cols}}) {
        const at::Tensor expected =
            whole.slice(0, p.row_begin, p.row_end).slice(1, p.col_begin, p.col_end);
        ASSERT_TRUE(same_bits(decoded(w, p, block), expected))
            << describe(spec) << " rows " << p.row_begin << " columns " << p.col_begin << " .. "
            << p.col_end << " block " << block << " seed " << seed;
      }
    }
  }
}

TEST(AtenOps, HeadersFromOutsideStayInsideTheRow) {
  for (const auto scale : {ScaleSource::kF32, ScaleSource::kNestedU8}) {
    const PackedSpec spec{.rows = 5,
                          .cols = 101,
                          .code_map = CodeMap::kNf4,
                          .scale = scale,
                          .group_size = 24,
                          .nested_group_size = 4};
    PackedMatrix w = random_packed(spec, 3);
    const auto stat_bytes = static_cast<std::size_t>(layout_of(spec).stat_bytes);
    for (std::size_t i = 0; i < 4; ++i) w.stats[2 * stat_bytes + i] = 0xFF;
    EXPECT_EQ(dequantized(to_tensors(w.view()), torch::kFloat).sizes(),
              (torch::IntArrayRef{5, 101}));
  }
}

TEST(AtenOps, RowsOfAMatrixDecodeAlone) {
  const PackedSpec spec{.rows = 9, .cols = 100, .offset = Offset::kZeroPoint, .group_size = 64};
  const PackedTensors w = random_tensors(spec, 11);
  const auto rows = torch::tensor({7, 0, 7, 3});
  PackedTensors part{spec, w.codes.index_select(0, rows), w.stats.index_select(0, rows), w.shared};
  part.spec.rows = 4;
  EXPECT_TRUE(same_bits(dequantized(part, torch::kFloat),
                        dequantize(w, torch::kFloat).index_select(0, rows)));
}

TEST(AtenOps, ProductsOverPanelsOfAnySize) {
  for (const auto& options : {hqq_options(4, 64), hqq_options(3, 64, 0), nf4_options(64, true)}) {
    torch::manual_seed(5);
    const PackedTensors w = quantize(torch::randn({96, 320}) * 0.1, options);
    for (const auto type : kTypes) {
      const auto dense = dequantize(w, type).to(torch::kDouble);
      const auto x = torch::randn({2, 3, 320}).to(type), g = torch::randn({5, 96}).to(type);
      const auto bias = torch::randn({96}).to(torch::kHalf);
      const double bound = type == torch::kFloat ? 1e-6 : 6e-3;
      for (const std::int64_t bytes : {1, 20000, 1 << 20}) {
        for (const bool into_views : {false, true}) {
          const auto y =
              call<at::Tensor, T, T, T, T, const OptionalTensor&, at::IntArrayRef, std::int64_t,
                   std::int64_t, bool>("product", "", x, w.codes, w.stats, w.shared, bias, ints(w),
                                       std::int64_t{5000}, bytes, into_views);
          EXPECT_EQ(y.sizes(), (torch::IntArrayRef{2, 3, 96}));
          EXPECT_EQ(y.scalar_type(), type);
          const auto expected = torch::matmul(x.to(torch::kDouble), dense.t()) + bias;
          EXPECT_LE(relative(y, expected), bound);
          const auto dx = call<at::Tensor, T, T, T, T, at::IntArrayRef, std::int64_t, bool>(
              "gradient", "", g, w.codes, w.stats, w.shared, ints(w), bytes, into_views);
          EXPECT_LE(relative(dx, torch::matmul(g.to(torch::kDouble), dense)), bound);
        }
      }
    }
  }
}

TEST(AtenOps, EmptyAndStridedInputs) {
  const PackedTensors w = quantize(torch::randn({40, 64}), hqq_options(4, 64));
  EXPECT_EQ(linear_of(torch::empty({0, 64}), w).sizes(), (torch::IntArrayRef{0, 40}));
  const auto x = torch::randn({5, 65}).slice(1, 1, 65);
  EXPECT_LE(relative(linear_of(x, w), linear(x.contiguous(), w)), 1e-6);
  EXPECT_LE(relative(linear_of(x.detach().requires_grad_(), w), linear(x.contiguous(), w)), 1e-6);
  const PackedTensors none = empty_packed({.rows = 0, .cols = 64});
  EXPECT_EQ(linear_of(x, none).sizes(), (torch::IntArrayRef{5, 0}));
  const auto dx = call<at::Tensor, T, T, T, T, at::IntArrayRef>(
      "linear_grad_input", "", torch::empty({3, 0}), none.codes, none.stats, none.shared,
      ints(none));
  EXPECT_TRUE(dx.equal(torch::zeros({3, 64})));
}

TEST(AtenOps, IntoATensor) {
  const PackedTensors w = quantize(torch::randn({64, 64}), hqq_options(4, 64));
  const auto into = [&](T x, at::Tensor out) {
    call<void, T, T, T, T, const OptionalTensor&, at::IntArrayRef, at::Tensor&>(
        "linear", "out", x, w.codes, w.stats, w.shared, std::nullopt, ints(w), out);
  };
  auto x = torch::randn({4, 64});
  const auto y = linear_of(x, w);
  auto gaps = torch::zeros({4, 66}).slice(1, 1, 65);
  into(x, gaps);
  EXPECT_TRUE(gaps.equal(y));
  into(x, x);
  EXPECT_TRUE(x.equal(y));
  EXPECT_THROW(into(x, torch::empty({4, 63})), std::exception);
  EXPECT_THROW(into(x, torch::empty({4, 64}, torch::kHalf)), std::exception);
  auto dense = torch::empty({64, 64}, torch::kBFloat16);
  call<void, T, T, T, at::IntArrayRef, at::Tensor&>("dequantize", "out", w.codes, w.stats, w.shared,
                                                    ints(w), dense);
  EXPECT_TRUE(same_bits(dense, dequantize(w, torch::kBFloat16)));
}

TEST(AtenOps, Int8WithoutOutliersHasTheCpusBits) {
  for (const std::int64_t cols : {64, 1000, 5000}) {  // sums of one block of columns, and of more
    const PackedTensors w = int8_weights(24, cols);
    for (const auto type : kTypes) {
      const auto x = torch::randn({5, cols}).to(type);
      const auto bias = torch::randn({24});
      for (const std::int64_t most : {1, 7000, 1 << 20}) {
        ASSERT_TRUE(same_bits(int8_of(x, w, bias, 0.0, most), linear_int8(x, w, bias, 0.0)))
            << cols << " columns, " << type << ", " << most << " at a time";
        ASSERT_TRUE(same_bits(int8_of(x, w, {}, 100.0, most), linear_int8(x, w, {}, 100.0)));
      }
    }
  }
}

TEST(AtenOps, Int8WithOutliersIsWithinTheBound) {
  const PackedTensors w = int8_weights(24, 200);
  for (const auto type : kTypes) {
    auto x = torch::randn({5, 200}).to(type);
    x[2][7] = 9.0;
    x[4][190] = -7.0;
    const auto y = int8_of(x, w, torch::randn({24}) * 0, 6.0, 1 << 20);
    const auto expected = linear_int8(x, w, {}, 6.0);
    const double step = type == torch::kFloat ? 0x1p-22 : type == torch::kHalf ? 0x1p-10 : 0x1p-7;
    const auto size = torch::matmul(
        x.abs().to(torch::kDouble),
        dequantize(w, torch::kDouble == type ? type : torch::kFloat).abs().to(torch::kDouble).t());
    const auto error = (y.to(torch::kDouble) - expected.to(torch::kDouble)).abs();
    EXPECT_TRUE(
        (error <= step * expected.abs().to(torch::kDouble) + 0x1p-20 * size).all().item<bool>());
    EXPECT_FALSE(same_bits(y, int8_of(x, w, {}, 0.0, 1 << 20)));  // outliers do count
  }
}

TEST(AtenOps, Int8OfRowsThatAreNotFinite) {
  const PackedTensors w = int8_weights(8, 64);
  auto x = torch::randn({4, 64}).to(torch::kHalf);
  x[1][3] = INFINITY;
  x[2][5] = NAN;
  x[3] = torch::zeros({64});
  EXPECT_TRUE(same_bits(int8_of(x, w, {}, 0.0, 1 << 20), linear_int8(x, w, {}, 0.0)));
}

TEST(AtenOps, Int8ActivationsAreWithinTheirBound) {
  std::uint64_t seed = 4000;
  int forms = 0;
  for (const PackedSpec& spec : kernel_specs()) {
    if (++seed % 2 == 0) continue;  // tame ones
    if (spec.rows == 0 || !int8_activations_refusal(spec).empty()) continue;
    ++forms;
    const PackedTensors w = random_tensors(spec, seed);
    torch::manual_seed(static_cast<std::int64_t>(seed));
    const auto x = torch::randn({3, spec.cols});
    const auto y = activations_of(x, w, {});
    const auto dense = dequantize(w, torch::kFloat).to(torch::kDouble);
    const auto exact = torch::matmul(x.to(torch::kDouble), dense.t());
    // sum over runs of max |x| / 254 * sum |w|: at most with the row's largest x
    const auto bound = x.abs().amax(1, true).to(torch::kDouble) / 254 * dense.abs().sum(1) * 1.01;
    ASSERT_TRUE(((y.to(torch::kDouble) - exact).abs() <= bound + 1e-6).all().item<bool>())
        << describe(spec) << " seed " << seed;
    ASSERT_FALSE(same_bits(y, linear_of(x, w)) && spec.cols > 1) << "activations are not rounded";
  }
  EXPECT_GT(forms, 50);
}

TEST(AtenOps, Int8ActivationsRoundAsTheCpuDoes) {
  // Weights that are exact in the CPU's integers: only the order of sums may differ.
  torch::manual_seed(8);
  for (const auto& [rows, cols] : {std::pair{32, 256}, {16, 130}, {8, 48}}) {
    const PackedTensors w =
        quantize(torch::randn({rows, cols}), hqq_options(4, cols % 64 == 0 ? 64 : 0));
    for (const auto type : kTypes) {
      auto x = torch::randn({6, cols}).to(type);
      x[1] = x[1] * 1e-30;
      x[2].slice(0, 0, 16) = 0;
      const auto bias = torch::randn({rows});
      const double bound = type == torch::kFloat ? 1e-6 : 6e-3;
      EXPECT_LE(relative(activations_of(x, w, bias), linear_int8_activations(x, w, bias)), bound);
    }
  }
  const PackedTensors w = quantize(torch::randn({32, 256}), hqq_options(4, 64));
  auto x = torch::randn({3, 256});
  x[1][200] = NAN;
  x[2][0] = INFINITY;
  const auto bad = activations_of(x, w, {}).isnan();
  EXPECT_TRUE(bad.equal(linear_int8_activations(x, w).isnan()));
  const PackedTensors refused = quantize(torch::randn({32, 256}), hqq_options(4, 64, 0));
  EXPECT_THROW(activations_of(x, refused, {}), std::exception);
}

TEST(AtenOps, RowSumsOfBothTypes) {
  for (const auto& options : {hqq_options(3, 64), hqq_options(4, 64, 0)}) {
    const PackedTensors w = quantize(torch::randn({24, 128}), options);
    const auto expected = dequantize(w, torch::kFloat).to(torch::kDouble).square().sum(1);
    for (const auto& [type, bound] : {std::pair{torch::kDouble, 1e-14}, {torch::kFloat, 1e-6}}) {
      const auto sums = call<at::Tensor, T, T, T, at::IntArrayRef, at::ScalarType>(
          "row_square_sums", "", w.codes, w.stats, w.shared, ints(w), type);
      EXPECT_EQ(sums.scalar_type(), type);
      EXPECT_LE(relative(sums, expected), bound);
    }
  }
}

TEST(AtenOps, QuantizesToTheCpusBytes) {
  const auto weight = torch::randn({24, 128});
  const PackedTensors w = quantize(weight, hqq_options(3, 64));
  const auto [codes, stats, shared] =
      call<std::tuple<at::Tensor, at::Tensor, at::Tensor>, T, at::IntArrayRef>("quantize", "",
                                                                               weight, ints(w));
  EXPECT_TRUE(codes.equal(w.codes) && stats.equal(w.stats) && shared.equal(w.shared));
}

TEST(AtenOps, RefusesByWord) {
  const PackedTensors w = quantize(torch::randn({40, 64}), hqq_options(4, 64));
  const auto refused = [&](T x, const OptionalTensor& bias) -> std::string {
    try {
      linear_of(x, w, bias);
    } catch (const std::exception& error) {
      return error.what();
    }
    return "taken";
  };
  const auto contains = [](const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
  };
  const auto x = torch::randn({2, 64});
  EXPECT_TRUE(contains(refused(torch::zeros({2, 63}), {}), "expected last dimension 64"));
  EXPECT_TRUE(contains(refused(torch::zeros({2, 64}, torch::kInt), {}), "is int32, expected"));
  EXPECT_TRUE(contains(refused(x, torch::zeros({39})), "bias has shape [39], expected [40]"));
  EXPECT_TRUE(contains(refused(x, torch::zeros({40}, torch::kLong)), "bias is int64"));
}

}  // namespace
}  // namespace quantal::testing
