// Quantizing by the CUDA kernels, run on the CPU, against the bytes of the CPU's quantizers.
#include <gtest/gtest.h>

#include <cmath>

#include "formats/device_quantizer.h"
#include "kernels/cuda/encode_inl.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda_machine.h"
#include "kernels/quantize.h"
#include "kernels/row_int8.h"
#include "kernels/support.h"
#include "quantal/formats.h"

namespace quantal::testing {
namespace {

const quantal_cuda_interface& library() { return *quantal_cuda(QUANTAL_CUDA_VERSION); }

/// Memory at a multiple of 16, full of a pattern.
std::vector<std::uint64_t> memory(std::int64_t bytes) {
  return std::vector<std::uint64_t>(static_cast<std::size_t>(bytes / 8 + 2), 0xA5A5A5A5A5A5A5A5U);
}

struct Outcome {
  int code = 0, refused = 7;
  std::vector<std::uint8_t> codes, stats, shared;
  std::string text;
};

Outcome by_kernels(const PackedSpec& spec, DType dtype, const void* weight) {
  const auto ints = spec_to_ints(spec);
  const PackedLayout layout = layout_of(spec);
  const quantal_cuda_quantizer how = cuda::interface_form(*device_quantizer(spec));
  const std::int64_t c = spec.rows * layout.code_bytes, s = layout.stat_rows * layout.stat_bytes;
  const std::int64_t bytes = library().quantize_workspace(ints.data());
  auto codes = memory(c), stats = memory(s), shared = memory(layout.shared_bytes),
       workspace = memory(bytes);
  Outcome out;
  quantal_cuda_status status{};
  const quantal_cuda_quantization p{
      {ints.data(), codes.data(), c, stats.data(), s, shared.data(), layout.shared_bytes},
      static_cast<int>(dtype),
      weight,
      &how,
      &out.refused,
      workspace.data(),
      bytes};
  out.code = library().quantize(&p, {0, nullptr}, &status);
  out.text = status.text;
  const auto copy = [](const std::vector<std::uint64_t>& from, std::int64_t n) {
    const auto* begin = reinterpret_cast<const std::uint8_t*>(from.data());
    return std::vector<std::uint8_t>(begin, begin + n);
  };
  out.codes = copy(codes, c);
  out.stats = copy(stats, s);
  out.shared = copy(shared, layout.shared_bytes);
  return out;
}

/// Weights with runs of zeros of both signs, equal ones, tiny (also subnormal) and large ones.
std::vector<float> odd_weights(std::int64_t n, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> w(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < w.size(); ++i) {
    const std::size_t kind = i / 32 % 9;
    const float x = random.uniform(-1, 1);
    w[i] = kind == 0   ? (i % 3 == 0 ? -0.0F : 0.0F)
           : kind == 1 ? 0.25F
           : kind == 2 ? std::fabs(x)
           : kind == 3 ? x * 1e-6F
           : kind == 4 ? (i % 2 == 0 ? -0.0F : x * x)
           : kind == 5 ? x * 300.0F
           : kind == 6 ? x * std::ldexp(1.0F, -static_cast<int>(random.below(150)))
                       : x;
  }
  return w;
}

struct Case {
  std::string name;
  QuantizeOptions options;
  std::int64_t rows, cols;
  const char* dialect = nullptr;  ///< null: that of the method
  int width = 0;  ///< of codes where no method has it (layers of files do); 0: that of the method
};
using Sizes = std::pair<std::int64_t, std::int64_t>;  // rows, cols

template <class Change>
Case made(std::string name, QuantizationMethod method, int bits, std::int64_t group, Sizes sizes,
          Change change) {
  Case c{std::move(name), {}, sizes.first, sizes.second};
  c.options.method = method;
  c.options.bits = bits;
  c.options.group_size = group;
  change(c.options);
  return c;
}
Case made(std::string name, QuantizationMethod method, int bits, std::int64_t group, Sizes sizes) {
  return made(std::move(name), method, bits, group, sizes, [](QuantizeOptions&) {});
}

std::vector<Case> bnb_cases() {
  std::vector<Case> out;
  for (const Sizes sizes : {Sizes{12, 192}, {9, 100}}) {
    for (const bool nested : {false, true}) {
      for (const char* type : {"nf4", "fp4"}) {
        out.push_back(made(std::string("bnb ") + type, QuantizationMethod::BNB_NF4, 4, 64, sizes,
                           [&](QuantizeOptions& o) {
                             o.double_quant = nested;
                             o.quant_type = type;
                           }));
      }
    }
    out.push_back(made("bnb int8", QuantizationMethod::BNB_INT8, 8, 0, sizes));
  }
  out.push_back(made("bnb many blocks", QuantizationMethod::BNB_NF4, 4, 32, {70, 160}));
  return out;
}

std::vector<Case> hqq_cases() {
  std::vector<Case> out;
  const auto add = [&](const char* name, int bits, std::int64_t group, Sizes sizes, int axis,
                       bool optimize, const char* mode = "") {
    out.push_back(made(name, QuantizationMethod::HQQ, bits, group, sizes, [&](QuantizeOptions& o) {
      o.axis = axis;
      o.optimize = optimize;
      o.mode = mode;
    }));
  };
  for (const int bits : {1, 2, 3, 4, 5, 6, 8}) {
    for (const bool optimize : {false, true}) {
      add("hqq", bits, 64, {16, 160}, 1, optimize);
      add("hqq columns", bits, 64, {16, 180}, 0, optimize);
    }
  }
  add("hqq rows", 4, 0, {6, 200}, 1, true);
  add("hqq whole columns", 4, 0, {40, 200}, 0, true);
  add("hqq ternary", 2, 64, {8, 160}, 1, true, "1.58");
  add("hqq ternary columns", 2, 64, {8, 160}, 0, true, "1.58");
  return out;
}

std::vector<Case> mlx_cases() {
  std::vector<Case> out;
  for (const int bits : {1, 2, 3, 4, 5, 6, 8}) {
    out.push_back(made("mlx affine", QuantizationMethod::MLX_INT4, 4, 32, {5, 160}));
    out.back().width = bits;
  }
  for (const char* mode : {"mxfp4", "nvfp4", "mxfp8"}) {
    const bool wide = std::string(mode) == "mxfp8";
    for (const Sizes sizes : {Sizes{12, 192}, {7, 96}}) {
      out.push_back(made(std::string("mlx ") + mode,
                         wide ? QuantizationMethod::MLX_INT8 : QuantizationMethod::MLX_INT4, 0, 0,
                         sizes, [&](QuantizeOptions& o) { o.mode = mode; }));
    }
  }
  return out;
}

std::vector<Case> quanto_cases() {
  std::vector<Case> out;
  const auto add = [&](std::string name, QuantizationMethod method, std::int64_t group, Sizes sizes,
                       int axis, const char* mode) {
    out.push_back(made(std::move(name), method, 0, group, sizes, [&](QuantizeOptions& o) {
      o.axis = axis;
      o.mode = mode;
    }));
  };
  for (const int axis : {0, -1}) {
    for (const char* mode : {"max", "zeropoint", "hqq", "hqq,zeropoint"}) {
      add(std::string("quanto ") + mode, QuantizationMethod::QUANTO_INT4, 0,
          axis < 0 ? Sizes{256, 6} : Sizes{6, 256}, axis, mode);
    }
    add("quanto short groups", QuantizationMethod::QUANTO_INT2, 20, {60, 600}, axis,
        "hqq,exact_group");
    add("quanto 2 bits", QuantizationMethod::QUANTO_INT2, 0, {128, 128}, axis, "");
    add("quanto 8 bits", QuantizationMethod::QUANTO_INT8, 0, {6, 250}, axis, "");
  }
  add("quanto one row", QuantizationMethod::QUANTO_INT8, 0, {1, 60}, 0, "");
  add("quanto one row", QuantizationMethod::QUANTO_INT4, 0, {1, 60}, 0, "hqq");
  return out;
}

std::vector<Case> gguf_cases() {
  std::vector<Case> out;
  for (const char* type :
       {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K"}) {
    const bool super = type[3] == 'K';
    for (const Sizes sizes :
         super ? std::vector<Sizes>{{3, 512}, {9, 256}} : std::vector<Sizes>{{5, 192}, {7, 96}}) {
      Case c{std::string("gguf ") + type, {}, sizes.first, sizes.second};
      c.options.mode = type;
      c.dialect = "gguf";  // no method is of it
      out.push_back(c);
    }
  }
  return out;
}

PackedSpec spec_of(const Case& c, DType value) {
  QuantizeOptions options = c.options;
  options.value_dtype = value;
  const Dialect& dialect =
      c.dialect != nullptr ? dialect_by_name(c.dialect) : dialect_of(options.method);
  PackedSpec spec = dialect.make_spec(c.rows, c.cols, options);
  if (c.width != 0) spec.bits = c.width;
  return spec;
}

void expect_bytes(const PackedSpec& spec, DType dtype, const void* weight, ThreadOrder order,
                  const std::string& what) {
  PackedMatrix expected = make_packed(spec);
  dialect_by_id(spec.dialect)
      .quantize(spec, dtype, weight, expected.codes.data(), expected.stats.data(),
                expected.shared.data(), serial_executor());
  set_thread_order(order);
  const Outcome actual = by_kernels(spec, dtype, weight);
  set_thread_order(ThreadOrder::kAscending);
  ASSERT_EQ(actual.code, 0) << actual.text << " " << what;
  ASSERT_EQ(actual.refused, 0) << what;
  ASSERT_EQ(actual.stats, expected.stats) << what;
  ASSERT_EQ(actual.shared, expected.shared) << what;
  ASSERT_EQ(actual.codes, expected.codes) << what;
}

/// Every type of weights and of values. Both orders of threads where the two are the same, one of
/// them, in turn, where they differ.
void expect_bytes(const std::vector<Case>& all, std::uint64_t seed) {
  constexpr DType kTypes[] = {DType::kF32, DType::kF16, DType::kBF16};
  for (const Case& c : all) {
    for (const DType dtype : kTypes) {
      for (const DType value : kTypes) {
        const PackedSpec spec = spec_of(c, value);
        if (dtype != value && spec.value_dtype != value)
          continue;  // the dialect has one of its own
        const std::string what = c.name + " " + describe(spec) + " of " +
                                 std::string(dtype_name(dtype)) + " seed " + std::to_string(++seed);
        ASSERT_TRUE(device_quantizer(spec).has_value()) << what;
        const std::vector<float> wide = odd_weights(c.rows * c.cols, seed);
        std::vector<std::uint32_t> weight(wide.size());
        narrow_from_f32(dtype, wide.data(), std::ssize(wide), weight.data());
        for (const ThreadOrder order : {ThreadOrder::kAscending, ThreadOrder::kDescending}) {
          const bool turn = (seed % 2 == 0) == (order == ThreadOrder::kAscending);
          if (dtype == value || turn) expect_bytes(spec, dtype, weight.data(), order, what);
        }
      }
    }
  }
}

TEST(CudaQuantize, BytesOfBitsandbytes) { expect_bytes(bnb_cases(), 60); }
TEST(CudaQuantize, BytesOfHqq) { expect_bytes(hqq_cases(), 200); }
TEST(CudaQuantize, BytesOfMlx) { expect_bytes(mlx_cases(), 400); }
TEST(CudaQuantize, BytesOfQuanto) { expect_bytes(quanto_cases(), 600); }
TEST(CudaQuantize, BytesOfGguf) { expect_bytes(gguf_cases(), 800); }

TEST(CudaQuantize, MarksWeightsThatAreNotFinite) {
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
    for (auto part : {bnb_cases, hqq_cases, mlx_cases, quanto_cases, gguf_cases}) {
      for (const Case& c : part()) {
        const PackedSpec spec = spec_of(c, DType::kF32);
        const bool slow = device_quantizer(spec)->rounds > 0 && c.options.group_size != 0;
        if (slow) continue;
        std::vector<float> w = odd_weights(c.rows * c.cols, 3);
        w[(static_cast<std::size_t>(c.cols) + 7) % w.size()] = bad;
        EXPECT_EQ(by_kernels(spec, DType::kF32, w.data()).refused, 1) << c.name;
      }
    }
  }
  std::vector<float> w(64 * 64, 70000.0F);  // finite, but not as binary16
  QuantizeOptions options;
  options.method = QuantizationMethod::BNB_INT8;
  options.bits = 8;
  const PackedSpec spec = dialect_of(options.method).make_spec(64, 64, options);
  EXPECT_EQ(by_kernels(spec, DType::kF32, w.data()).refused, 1);
}

TEST(CudaQuantize, MarksScalesThatAreNoHalves) {
  for (const Case& c : gguf_cases()) {
    const PackedSpec spec = spec_of(c, DType::kF32);
    // Within what the searches take, as a range but not as a shift; beyond it.
    for (const float most : {6e7F, 1e8F, 3e38F}) {
      std::vector<float> w = odd_weights(c.rows * c.cols, 4);
      for (std::size_t i = 0; i < 32; ++i) w[i] = i % 2 == 0 ? -most : most * 0.5F;
      PackedMatrix packed = make_packed(spec);
      bool legal = true;
      try {
        dialect_by_id(spec.dialect)
            .quantize(spec, DType::kF32, w.data(), packed.codes.data(), packed.stats.data(),
                      packed.shared.data(), serial_executor());
      } catch (const Error&) {
        legal = false;
      }
      EXPECT_EQ(by_kernels(spec, DType::kF32, w.data()).refused, legal ? 0 : 1)
          << c.name << " " << most;
      EXPECT_TRUE(!legal || c.name == "gguf Q6_K") << c.name << " " << most;
    }
  }
}

TEST(CudaQuantize, OtherFormsAreTheCpusOwn) {
  QuantizeOptions options;
  options.method = QuantizationMethod::HQQ;
  options.quant_zero = true;
  EXPECT_FALSE(device_quantizer(dialect_of(options.method).make_spec(64, 64, options)));
  options = {.method = QuantizationMethod::QUANTO_INT8, .bits = 8};
  EXPECT_TRUE(device_quantizer(dialect_of(options.method).make_spec(1, 64, options)));
  options.axis = -1;
  EXPECT_FALSE(device_quantizer(dialect_of(options.method).make_spec(64, 1, options)));
}

TEST(CudaQuantize, RefusesEncodersThatDoNotMakeTheForm) {
  const PackedSpec spec{.rows = 4, .cols = 64};
  const auto ints = spec_to_ints(spec);
  const PackedMatrix w = make_packed(spec);
  auto codes = memory(4 * 64), stats = memory(64), workspace = memory(4096);
  quantal_cuda_quantizer how{};
  int refused = 0;
  quantal_cuda_quantization p{{ints.data(), codes.data(), std::ssize(w.codes), stats.data(),
                               std::ssize(w.stats), nullptr, 0},
                              0,
                              codes.data(),
                              &how,
                              &refused,
                              workspace.data(),
                              4096};
  quantal_cuda_status status{};
  how.encoder = static_cast<int>(cuda::Encoder::kAnchored);
  EXPECT_EQ(library().supports_quantize(&p, &status), QUANTAL_CUDA_UNSUPPORTED);
  EXPECT_STREQ(
      status.text,
      "cuda quantize: a form of 4 bits in groups of 64 is given, expected one that encoder "
      "2 makes");
  how.encoder = 99;
  EXPECT_EQ(library().supports_quantize(&p, &status), QUANTAL_CUDA_UNSUPPORTED);
  EXPECT_STREQ(status.text, "cuda quantize: encoder is number 99, expected 0 .. 12");
  how.encoder = 0;
  how.rounds = -1;
  EXPECT_EQ(library().supports_quantize(&p, &status), QUANTAL_CUDA_UNSUPPORTED);
  EXPECT_STREQ(status.text, "cuda quantize: rounds are -1, expected 0 .. 1000");
  how.rounds = 0;
  how.max_code = 16;
  EXPECT_EQ(library().supports_quantize(&p, &status), QUANTAL_CUDA_UNSUPPORTED);
  how.max_code = 0;
  p.workspace_bytes = 16;
  EXPECT_EQ(library().supports_quantize(&p, &status), QUANTAL_CUDA_SHAPE);
}

// ------------------------------------------------------------------ single functions

TEST(CudaQuantize, PowerOfEveryHalfAndManyFloats) {
  std::vector<float> in;
  for (std::uint32_t h = 0; h < 0x7C00; ++h)
    in.push_back(f16_to_f32(static_cast<std::uint16_t>(h)));
  Random random(5);
  for (int i = 0; i < 100000; ++i) {
    in.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random.below(0x7F800000))));
  }
  std::vector<float> expected(in.size());
  quantize_kernels_scalar().power(in.data(), std::ssize(in), expected.data());
  for (std::size_t i = 0; i < in.size(); ++i) {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(power_of_one(in[i], kSolverPower)),
              std::bit_cast<std::uint32_t>(expected[i]))
        << in[i];
  }
}

TEST(CudaQuantize, TableAndRowCodesOfEveryHalf) {
  std::vector<float> in;
  for (std::uint32_t h = 0; h < 0x10000; ++h) {
    const float v = f16_to_f32(static_cast<std::uint16_t>(h));
    if (std::isfinite(v)) in.push_back(v);
  }
  QuantizeOptions options;
  const PackedSpec spec = dialect_of(options.method).make_spec(1, 64, options);
  cuda::QuantizeArgs args{};
  args.how = *device_quantizer(spec);
  args.bits = 4;
  TableQuantizer table;
  std::ranges::copy(args.how.thresholds, table.thresholds.begin());
  std::ranges::copy(args.how.codes, table.codes.begin());
  std::vector<std::uint8_t> expected(in.size());
  for (const float absmax : {1.0F, 0.013F, 65504.0F, 1e-6F}) {
    for (const bool divide : {false, true}) {
      quantize_kernels_scalar().encode_table(table, {DType::kF32, in.data()}, std::ssize(in),
                                             divide ? absmax : 1.0F / absmax, divide,
                                             expected.data());
      for (std::size_t i = 0; i < in.size(); ++i) {
        ASSERT_EQ(cuda::code_of<cuda::Encoder::kTable>(args, in[i], {absmax, divide ? 1.0F : 0.0F}),
                  expected[i])
            << in[i] << " of " << absmax;
      }
    }
  }
  encode_row_int8_scalar({DType::kF32, in.data()}, std::ssize(in), (1.0F / 65504.0F) * 127.0F,
                         expected.data());
  for (std::size_t i = 0; i < in.size(); ++i) {
    ASSERT_EQ(cuda::code_of<cuda::Encoder::kRowInt8>(args, in[i], {65504.0F, 0.0F}), expected[i]);
  }
}

}  // namespace
}  // namespace quantal::testing
