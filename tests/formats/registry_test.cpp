#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <string_view>

#include "formats/layers.h"
#include "quantal/formats.h"
#include "quantal/ggml.h"

namespace quantal::testing {
namespace {

using M = QuantizationMethod;

std::set<std::string> backends(M method) {
  std::set<std::string> out;
  for (const Backend b : {Backend::CUDA, Backend::MPS, Backend::MLX, Backend::CPU}) {
    if ((documented_backends(method) & (1u << static_cast<unsigned>(b))) != 0) {
      out.insert(std::string(backend_name(b)));
    }
  }
  return out;
}

TEST(Registry, DocumentedMatrix) {
  const std::set<std::string> all = {"cuda", "mps", "mlx", "cpu"};
  for (const M m : {M::BNB_NF4, M::BNB_INT8}) EXPECT_EQ(backends(m), std::set<std::string>{"cuda"});
  for (const M m : {M::HQQ, M::NONE}) EXPECT_EQ(backends(m), all);
  for (const M m : {M::MLX_INT4, M::MLX_INT8}) {
    EXPECT_EQ(backends(m), (std::set<std::string>{"mps", "mlx"}));
  }
  for (const M m : {M::QUANTO_INT2, M::QUANTO_INT4, M::QUANTO_INT8}) {
    EXPECT_EQ(backends(m), (std::set<std::string>{"cuda", "mps", "cpu"}));
  }
}

TEST(Registry, WidthsThatNamesImply) {
  EXPECT_EQ(method_bits(M::BNB_NF4), 4);
  EXPECT_EQ(method_bits(M::BNB_INT8), 8);
  EXPECT_EQ(method_bits(M::QUANTO_INT2), 2);
  EXPECT_EQ(method_bits(M::HQQ), std::nullopt);
  EXPECT_EQ(method_bits(M::NONE), std::nullopt);
}

TEST(Registry, NamesParseInEitherSpellingAndAnyCase) {
  EXPECT_EQ(methods().size(), kNumMethods);
  for (const MethodInfo& m : methods()) {
    EXPECT_EQ(parse_method(m.name), m.method);
    EXPECT_EQ(parse_method(m.enum_name), m.method);
    EXPECT_EQ(method_name(m.method), m.name);
  }
  EXPECT_EQ(parse_backend("Mps"), Backend::MPS);
  expect_error(Errc::kConfig, {"bnb_nf5", "bnb_nf4, bnb_int8, hqq"},
               [] { parse_method("bnb_nf5"); });
  expect_error(Errc::kConfig, {"rocm", "cuda, mps, mlx, cpu"}, [] { parse_backend("rocm"); });
}

/// What the README's table says of GGUF is what the functions do.
TEST(Registry, FormsThatAreReadAndWritten) {
  for (const Dialect* d : dialects()) {
    EXPECT_FALSE(d->reads.empty()) << d->name;
    EXPECT_FALSE(d->writes.empty()) << d->name;
  }
  std::set<std::string> read, written;
  const auto split = [](std::string_view text, std::set<std::string>& out) {
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t end = std::min(text.find(", ", at), text.size());
      out.emplace(text.substr(at, end - at));
      at = end + 2;
    }
  };
  split(dialect_by_name("gguf").reads, read);
  split(dialect_by_name("gguf").writes, written);
  std::set<std::string> packable, encodable;
  for (std::uint32_t type = 0; type < 64; ++type) {
    const GgmlBlock* block = find_ggml_block(type);
    if (block == nullptr || !ggml_packable(block->type)) continue;
    packable.emplace(block->name);
    if (ggml_encodable(block->type)) encodable.emplace(block->name);
  }
  EXPECT_EQ(read, packable);
  EXPECT_EQ(written, encodable);
}

TEST(Registry, DialectsAreInOrderOfIdAndConsistent) {
  int last = 0;
  for (const Dialect* d : dialects()) {
    EXPECT_GT(d->id, last);
    last = d->id;
    EXPECT_EQ(&dialect_by_id(d->id), d);
    for (const M m : d->methods) {
      EXPECT_EQ(&dialect_of(m), d);
      EXPECT_EQ(methods()[static_cast<std::size_t>(m)].dialect, d->name);
    }
  }
  EXPECT_EQ(dialect_of(M::BNB_NF4).id, 1);
  EXPECT_EQ(dialect_of(M::HQQ).id, 2);
}

TEST(Registry, EveryMethodHasItsDialect) {
  for (const MethodInfo& method : methods()) {
    if (method.method == M::NONE) continue;
    EXPECT_EQ(dialect_of(method.method).name, method.dialect) << method.name;
  }
  EXPECT_EQ(find_dialect(M::NONE), nullptr);
  expect_error(Errc::kUnsupported, {"none does not quantize", "bnb_nf4", "quanto_int8"},
               [] { dialect_of(M::NONE); });
  EXPECT_EQ(dialect_by_name("gguf").id, 5);
  expect_error(Errc::kConfig, {"'awq'", "bnb, hqq, mlx, quanto, gguf"},
               [] { dialect_by_name("awq"); });
  expect_error(Errc::kCorrupt, {"id is 99"}, [] { dialect_by_id(99); });
}

TEST(Registry, QuantizeChecksItsInput) {
  Tensor w = make_tensor(DType::kF32, {4, 64});
  TensorView bad = w.view();
  bad.bytes = bad.bytes.subspan(4);
  expect_error(Errc::kShape, {"bytes of the weights"}, [&] { quantize(bad, {}); });
  bad = w.view();
  bad.dtype = DType::kI32;
  expect_error(Errc::kDtype, {"i32", "f32, f16, bf16"}, [&] { quantize(bad, {}); });
  expect_error(Errc::kShape, {"[0, 64]"}, [&] {
    const Tensor empty = make_tensor(DType::kF32, {0, 64});
    quantize(empty.view(), {});
  });
}

}  // namespace
}  // namespace quantal::testing
