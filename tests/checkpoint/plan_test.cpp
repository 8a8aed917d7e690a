// The planner against what really lies in memory and in files, and against headers of models that
// no test could load.
#include <cmath>
#include <numeric>

#include "checkpoint/plan_support.h"
#include "support/allocation.h"

namespace quantal {
namespace {

using namespace testing;  // NOLINT: plan_support.h

/// Bytes of NF4 with nested absmax in groups of 64, written out: half a byte per weight, a byte per
/// group and 4 per 256 groups or part of them that a row touches, 4 of a row's header; the nested
/// offset, its map of 256 float32, and the spec per layer.
std::int64_t nested_nf4_bytes(std::int64_t rows, std::int64_t cols) {
  const std::int64_t groups = cols / 64;
  const std::int64_t latest = 256 - std::gcd(groups, std::int64_t{256});  // where a row can begin
  const std::int64_t nested = (groups + latest + 255) / 256;
  return rows * (cols / 2 + 4 + groups + 4 * nested) + 4 * 257 + 128;
}

TEST(PlanHeaders, SevenBillionBesideTheRuleOfThumb) {
  const TempFolder temp;
  ASSERT_EQ(write_headers(temp.path("llama-7b"), kLlama7b), 6738415616);
  PlanOptions options = options_of(config_of(M::BNB_NF4, 4, 64));
  options.backend = Backend::CUDA;
  const Plan plan = quantal::plan(temp.path("llama-7b"), options);
  EXPECT_EQ(plan.source, "llama-7b (safetensors, 1 file)");
  EXPECT_EQ(plan.parameters, 6738415616);
  EXPECT_EQ(plan.stored_bytes, 13476831232);
  std::int64_t expected = 2 * (2 * 32000 * 4096 + 65 * 4096);
  expected += 32 * (4 * nested_nf4_bytes(4096, 4096) + 2 * nested_nf4_bytes(11008, 4096) +
                    nested_nf4_bytes(4096, 11008));
  EXPECT_EQ(plan.resident_bytes, expected);
  ASSERT_EQ(plan.rules.size(), 4u);
  const double rules[] = {14, 7, 3.5, 1.75};
  const double per_parameter[] = {2, 1, 0.5, 0.25};
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_DOUBLE_EQ(plan.rules[i].rule_gigabytes, rules[i]);
    EXPECT_DOUBLE_EQ(plan.rules[i].bytes_per_parameter, per_parameter[i]);
  }
  EXPECT_EQ(plan.rules[0].exact_bytes, 13476831232);
  EXPECT_EQ(plan.rules[2].exact_bytes, expected);
  const std::string text = plan.to_text();
  for (const char* words : {"~14 GB", "~7 GB", "~3.5 GB", "~1.75 GB", "13.5 GB", "3.88 GB"}) {
    EXPECT_NE(text.find(words), std::string::npos) << words << "\n" << text;
  }
}

/// Each quantized weight takes its codes, the documented 1, 0.5 and 0.25 bytes, and what the
/// dialect keeps beside them.
TEST(PlanHeaders, BytesPerParameterAreTheDocumentedOnesAndStatistics) {
  const TempFolder temp;
  write_headers(temp.path("llama-7b"), kLlama7b);
  const struct {
    M method;
    int bits;
    double codes, statistics;  ///< bytes per parameter; statistics: at most
  } cases[] = {{M::BNB_INT8, 8, 1, 4.0 / 4096},    {M::BNB_NF4, 4, 0.5, 1.0 / 50},
               {M::HQQ, 8, 1, 1.0 / 15},           {M::HQQ, 4, 0.5, 1.0 / 15},
               {M::HQQ, 2, 0.25, 1.0 / 15},        {M::MLX_INT8, 8, 1, 1.0 / 15},
               {M::MLX_INT4, 4, 0.5, 1.0 / 15},    {M::QUANTO_INT8, 8, 1, 4.0 / 4096},
               {M::QUANTO_INT4, 4, 0.5, 1.0 / 15}, {M::QUANTO_INT2, 2, 0.25, 1.0 / 15}};
  for (const auto& c : cases) {
    const Plan plan =
        quantal::plan(temp.path("llama-7b"), options_of(config_of(c.method, c.bits, 64)));
    SCOPED_TRACE(plan.label());
    std::int64_t parameters = 0, codes = 0, rest = 0;
    for (const PlanLayer& layer : plan.layers) {
      if (!layer.quantized) continue;
      parameters += layer.parameters;
      codes += layer.codes;
      rest += layer.bytes - layer.codes;
    }
    EXPECT_EQ(parameters, 6476005376);
    EXPECT_EQ(static_cast<double>(codes), c.codes * static_cast<double>(parameters));
    EXPECT_LE(static_cast<double>(rest), c.statistics * static_cast<double>(parameters));
  }
}

TEST(PlanHeaders, LargeModelsCostNoMemoryToPlan) {
  const struct {
    LlamaSizes sizes;
    std::int64_t parameters;
  } cases[] = {{kLlama70b, 70553706496}, {kLlama405b, 405853388800}};
  for (const auto& c : cases) {
    const TempFolder temp;
    ASSERT_EQ(write_headers(temp.path("model"), c.sizes), c.parameters);
    PlanOptions options;
    options.backend = Backend::CUDA;
    options.memory_bytes = 80'000'000'000;
    options.world_size = 8;
    options.mode = PlanMode::kQlora;
    const testing::AllocationPeak peak;
    const Plan plan = quantal::plan(temp.path("model"), options);
    EXPECT_LT(peak.bytes(), std::size_t{64} << 20);
    EXPECT_EQ(plan.parameters, c.parameters);
    EXPECT_TRUE(plan.recommended);
    EXPECT_EQ(plan.sizes.blocks, c.sizes.blocks);
    EXPECT_EQ(plan.sizes.key_value, 2048);
    EXPECT_GE(8 * plan.rank_bytes, plan.resident_bytes);
    // Rounding up shares and what is on every rank: tables and specs of quantized layers.
    EXPECT_LT(8 * plan.rank_bytes, plan.resident_bytes + plan.resident_bytes / 100);
    EXPECT_TRUE(plan.fits) << plan.to_text();
  }
}

// ------------------------------------------------------------------ the real run

const QuantizationConfig kForms[] = {
    config_of(M::BNB_NF4, 4),     config_of(M::BNB_INT8, 8),   config_of(M::HQQ, 8),
    config_of(M::HQQ, 4),         config_of(M::HQQ, 3),        config_of(M::HQQ, 2),
    config_of(M::MLX_INT4, 4),    config_of(M::MLX_INT8, 8),   config_of(M::QUANTO_INT8, 8),
    config_of(M::QUANTO_INT4, 4), config_of(M::QUANTO_INT2, 2)};

class PlanForms : public ::testing::TestWithParam<QuantizationConfig> {};

/// Bytes of the text in which bitsandbytes keeps its nested offset: it is as long as the number.
constexpr std::int64_t kOffsetText = 24;

TEST_P(PlanForms, BytesInMemoryAndInFilesAreThoseOfTheConvertedModel) {
  const QuantizationConfig& config = GetParam();
  const Plan plan = quantal::plan(model_path("dense-bf16"), options_of(config));
  SCOPED_TRACE(plan.label());
  const TempFolder temp;
  ConvertOptions options{.to = std::string(dialect_of(config.method).name)};
  options.quantize.bits = config.bits;
  options.quantize.group_size = config.group_size;
  options.quantize.method = config.method;
  options.value_dtype = DType::kBF16;
  convert(model_path("dense-bf16"), temp.path("model"), options);
  const Checkpoint real = load_checkpoint(temp.path("model"));
  ASSERT_EQ(real.layers.size(), 14u);
  std::int64_t bytes = 0;
  for (const auto& [name, layer] : real.layers) {
    const PlanLayer& row = layer_of(plan, name);
    EXPECT_TRUE(row.quantized);
    EXPECT_EQ(row.codes, std::ssize(layer.codes)) << name;
    EXPECT_EQ(row.stats, std::ssize(layer.stats)) << name;
    EXPECT_EQ(row.shared, std::ssize(layer.shared)) << name;
    bytes += std::ssize(layer.codes) + std::ssize(layer.stats) + std::ssize(layer.shared) + 128;
  }
  for (const auto& [name, tensor] : real.tensors) bytes += std::ssize(tensor.bytes);
  EXPECT_EQ(plan.resident_bytes, bytes);
  const json files = json::parse(inspect_json(temp.path("model")));
  const auto stored = files["totals"]["bytes"].get<std::int64_t>();
  if (config.method == M::BNB_NF4) {
    EXPECT_NEAR(static_cast<double>(plan.file_bytes), static_cast<double>(stored),
                14 * kOffsetText);
  } else {
    EXPECT_EQ(plan.file_bytes, stored);
  }
  const Plan again = quantal::plan(temp.path("model"), {});
  EXPECT_EQ(again.label(), "as stored");
  EXPECT_EQ(again.resident_bytes, bytes);
  EXPECT_EQ(again.stored_bytes, stored);
  EXPECT_EQ(again.file_bytes, stored);
}

INSTANTIATE_TEST_SUITE_P(Plan, PlanForms, ::testing::ValuesIn(kForms));

TEST(Plan, FileBytesOfLargeLayersFollowFromSmallOnes) {
  for (const QuantizationConfig& config : kForms) {
    QuantizationConfig grouped = config;
    grouped.group_size = 64;
    ModelOutline model{.source = "one", .tensors = {}};
    model.tensors.push_back(
        {.name = "w.weight", .kind = OutlineTensor::Kind::kLinear, .shape = {5443, 512}});
    PlanOptions options = options_of(grouped);
    const Plan plan = quantal::plan(model, options);
    SCOPED_TRACE(plan.label());
    const Dialect& dialect = dialect_of(config.method);
    const auto choice = LayerRules(plan.decision.config).choose("w", 5443, 512);
    QuantizeOptions quantize = choice.options;
    if (dialect.keeps_weight_dtype) quantize.value_dtype = DType::kF32;
    if (!choice.quantize) {
      EXPECT_FALSE(plan.layers[0].quantized);
      continue;
    }
    const std::vector<std::uint8_t> zeros(5443 * 512 * 4);
    const PackedMatrix matrix =
        quantal::quantize(TensorView{DType::kF32, {5443, 512}, zeros}, dialect, quantize);
    std::int64_t bytes = 0;
    for (const NamedTensor& one : dialect.export_layer(matrix.view(), "")) {
      if (one.kind != StateKind::kNone) bytes += std::ssize(one.tensor.bytes);
    }
    EXPECT_EQ(plan.file_bytes, bytes);
  }
}

TEST(Plan, QuantizedModelsOfEveryDialectArePlannedAsTheyAre) {
  for (const auto& golden : testing::kGoldenModels) {
    SCOPED_TRACE(golden.path);
    const std::string path = model_path(golden.path);
    if (std::string(golden.layout) == "quanto single") {  // it does not tell the shapes
      EXPECT_EQ(error_of([&] { quantal::plan(path, {}); }).code(), Errc::kUnsupported);
      continue;
    }
    const Checkpoint real = load_checkpoint(path);
    std::int64_t bytes = 0;
    for (const auto& [name, layer] : real.layers) {
      bytes += std::ssize(layer.codes) + std::ssize(layer.stats) + std::ssize(layer.shared) + 128;
    }
    for (const auto& [name, tensor] : real.tensors) bytes += std::ssize(tensor.bytes);
    PlanOptions options;
    options.config = QuantizationConfig{};
    options.config->method = M::NONE;
    const Plan plan = quantal::plan(path, options);
    // A tied output layer that is packed stands in memory as a second layer of the same bytes.
    std::int64_t tied = 0;
    for (const PlanLayer& row : plan.layers) tied += row.method == "tied" ? row.bytes : 0;
    EXPECT_EQ(plan.resident_bytes - tied, bytes);
    EXPECT_EQ(plan.rules.size(), 4u);
  }
}

TEST(Plan, LayerConfigsAndSkipsAreThoseOfTheConfig) {
  QuantizationConfig config = config_of(M::HQQ, 4);
  config.skip_modules = {"lm_head", "o_proj"};
  LayerOverride wide, dense;
  wide.bits = 8;
  dense.skip = true;
  config.layer_configs = {
      {"model.layers.0", wide}, {"model.layers.1.mlp", dense}, {"model.layers.7", wide}};
  const Plan plan = quantal::plan(model_path("dense-bf16"), options_of(config));
  EXPECT_EQ(layer_of(plan, "model.layers.0.self_attn.q_proj").method, "hqq 8-bit g32");
  EXPECT_EQ(layer_of(plan, "model.layers.1.self_attn.q_proj").method, "hqq 4-bit g32");
  EXPECT_EQ(layer_of(plan, "model.layers.1.mlp.up_proj").method, "dense bf16");
  EXPECT_FALSE(layer_of(plan, "model.layers.0.self_attn.o_proj").quantized);
  EXPECT_FALSE(layer_of(plan, "lm_head").quantized);
  EXPECT_EQ(plan.unmatched_patterns, std::vector<std::string>{"layer_configs: model.layers.7"});
  EXPECT_NE(plan.to_text().find("model.layers.7"), std::string::npos);
}

TEST(Plan, SharesAreRowsRoundedUp) {
  PlanOptions options = options_of(config_of(M::HQQ, 4));
  options.world_size = 3;
  const Plan plan = quantal::plan(model_path("dense-bf16"), options);
  for (const PlanLayer& row : plan.layers) {
    const std::int64_t rows = (row.shape[0] + 2) / 3;
    const std::int64_t sharded = row.quantized ? row.codes + row.stats : row.bytes;
    EXPECT_EQ(row.rank_bytes, sharded / row.shape[0] * rows + row.bytes - sharded) << row.name;
  }
}

}  // namespace
}  // namespace quantal
