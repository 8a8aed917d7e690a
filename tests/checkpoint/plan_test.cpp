// The planner against what really lies in memory and in files, and against headers of models that
// no test could load.
#include "quantal/plan.h"

#include <cmath>
#include <numeric>

#include "checkpoint/support.h"
#include "support/allocation.h"

namespace quantal {
namespace {

using nlohmann::json;
using testing::error_of;
using testing::golden_path;
using testing::TempFolder;
using testing::what_of;
using M = QuantizationMethod;

std::string model_path(const std::string& name) { return golden_path("checkpoints/" + name); }

QuantizationConfig config_of(M method, int bits, std::int64_t group = 32) {
  QuantizationConfig config;
  config.method = method;
  config.bits = bits;
  config.bits_set = true;
  config.group_size = group;
  return config;
}

PlanOptions options_of(const QuantizationConfig& config) {
  PlanOptions options;
  options.config = config;
  options.support = Support::kExtended;
  return options;
}

const PlanLayer& layer_of(const Plan& plan, const std::string& name) {
  for (const PlanLayer& layer : plan.layers) {
    if (layer.name == name) return layer;
  }
  throw std::runtime_error("no layer " + name);
}

const PlanPhase& phase_of(const Plan& plan, const std::string& name) {
  for (const PlanPhase& phase : plan.phases) {
    if (phase.name == name) return phase;
  }
  throw std::runtime_error("no phase " + name);
}

std::int64_t part_of(const PlanPhase& phase, PlanPart part) {
  return phase.bytes[static_cast<std::size_t>(part)];
}

// ------------------------------------------------------------------ headers without weights

struct LlamaSizes {
  std::int64_t hidden, intermediate, blocks, heads, key_value_heads, vocabulary;
};
constexpr LlamaSizes kLlama7b = {4096, 11008, 32, 32, 32, 32000};
constexpr LlamaSizes kLlama70b = {8192, 28672, 80, 64, 8, 128256};
constexpr LlamaSizes kLlama405b = {16384, 53248, 126, 128, 8, 128256};

std::vector<std::pair<std::string, std::vector<std::int64_t>>> llama_tensors(const LlamaSizes& s) {
  const std::int64_t kv = s.hidden / s.heads * s.key_value_heads;
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> out = {
      {"lm_head.weight", {s.vocabulary, s.hidden}},
      {"model.embed_tokens.weight", {s.vocabulary, s.hidden}},
      {"model.norm.weight", {s.hidden}}};
  for (std::int64_t i = 0; i < s.blocks; ++i) {
    const std::string block = "model.layers." + std::to_string(i) + ".";
    out.push_back({block + "self_attn.q_proj.weight", {s.hidden, s.hidden}});
    out.push_back({block + "self_attn.k_proj.weight", {kv, s.hidden}});
    out.push_back({block + "self_attn.v_proj.weight", {kv, s.hidden}});
    out.push_back({block + "self_attn.o_proj.weight", {s.hidden, s.hidden}});
    out.push_back({block + "mlp.gate_proj.weight", {s.intermediate, s.hidden}});
    out.push_back({block + "mlp.up_proj.weight", {s.intermediate, s.hidden}});
    out.push_back({block + "mlp.down_proj.weight", {s.hidden, s.intermediate}});
    out.push_back({block + "input_layernorm.weight", {s.hidden}});
    out.push_back({block + "post_attention_layernorm.weight", {s.hidden}});
  }
  return out;
}

/// A folder whose weights file is a header and a hole. Returns the parameters.
std::int64_t write_headers(const std::string& folder, const LlamaSizes& sizes) {
  std::filesystem::create_directories(folder);
  json header;
  std::int64_t at = 0;
  for (const auto& [name, shape] : llama_tensors(sizes)) {
    const std::int64_t bytes = 2 * checked_numel(shape, "test");
    header[name] = {{"dtype", "BF16"}, {"shape", shape}, {"data_offsets", {at, at + bytes}}};
    at += bytes;
  }
  const std::string text = header.dump();
  const std::string path = folder + "/model.safetensors";
  {
    std::ofstream out(path, std::ios::binary);
    const std::uint64_t length = text.size();
    out.write(reinterpret_cast<const char*>(&length), 8);
    out << text;
  }
  std::filesystem::resize_file(path, 8 + text.size() + static_cast<std::uintmax_t>(at));
  std::ofstream(folder + "/config.json") << json{{"model_type", "llama"},
                                                 {"hidden_size", sizes.hidden},
                                                 {"num_attention_heads", sizes.heads},
                                                 {"num_key_value_heads", sizes.key_value_heads},
                                                 {"vocab_size", sizes.vocabulary},
                                                 {"tie_word_embeddings", false}};
  return at / 2;
}

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

// ------------------------------------------------------------------ phases

TEST(Plan, PhasesAddUp) {
  PlanOptions options = options_of(config_of(M::HQQ, 4));
  options.mode = PlanMode::kQlora;
  options.lora_rank = 8;
  options.lora_targets = {"q_proj", "v_proj"};
  const Plan plan = quantal::plan(model_path("dense-bf16"), options);
  const PlanLayer& q = layer_of(plan, "model.layers.0.self_attn.q_proj");
  const PlanLayer& v = layer_of(plan, "model.layers.0.self_attn.v_proj");
  EXPECT_EQ(q.adapter_parameters, 8 * (q.shape[0] + q.shape[1]));
  EXPECT_EQ(plan.adapter_parameters, 2 * (q.adapter_parameters + v.adapter_parameters));
  const std::int64_t adapters = 4 * plan.adapter_parameters;
  for (const char* name : {"resident", "forward", "backward", "optimizer"}) {
    const PlanPhase& phase = phase_of(plan, name);
    EXPECT_EQ(part_of(phase, PlanPart::kBase) + part_of(phase, PlanPart::kDense),
              plan.resident_bytes);
    EXPECT_EQ(part_of(phase, PlanPart::kAdapters), adapters);
    EXPECT_GE(part_of(phase, PlanPart::kOptimizer), 2 * adapters);
    EXPECT_EQ(phase.total(),
              std::accumulate(phase.bytes.begin(), phase.bytes.end(), std::int64_t{0}));
    EXPECT_LE(phase.total(), plan.peak().total());
  }
  EXPECT_EQ(phase_of(plan, "resident").total(), plan.resident_bytes + 3 * adapters);
  EXPECT_EQ(part_of(phase_of(plan, "backward"), PlanPart::kGradients), adapters);
  EXPECT_EQ(part_of(phase_of(plan, "forward"), PlanPart::kGather), 0);
}

TEST(Plan, OptionsMoveThePeakTheRightWay) {
  const auto peak = [](const std::function<void(PlanOptions&)>& change) {
    PlanOptions options = options_of(config_of(M::HQQ, 4));
    options.mode = PlanMode::kQlora;
    options.batch_size = 4;
    options.gradient_checkpointing = false;
    change(options);
    return quantal::plan(model_path("dense-bf16"), options).peak().total();
  };
  const std::int64_t usual = peak([](PlanOptions&) {});
  EXPECT_LT(usual, peak([](PlanOptions& o) { o.batch_size = 5; }));
  EXPECT_LT(usual, peak([](PlanOptions& o) { o.sequence_length = 2049; }));
  EXPECT_LT(usual, peak([](PlanOptions& o) { o.attention = PlanAttention::kEager; }));
  EXPECT_LT(usual, peak([](PlanOptions& o) { o.lora_rank = 64; }));
  EXPECT_GT(usual, peak([](PlanOptions& o) { o.gradient_checkpointing = true; }));
  EXPECT_GT(usual, peak([](PlanOptions& o) { o.optimizer = PlanOptimizer::kSgd; }));
  EXPECT_GT(usual, peak([](PlanOptions& o) { o.lora_dtype = DType::kBF16, o.lora_rank = 16; }));
  EXPECT_GE(usual, peak([](PlanOptions& o) { o.loss_chunk = 128; }));
}

TEST(Plan, OffloadMovesShardsToTheHost) {
  PlanOptions options = options_of(config_of(M::HQQ, 4));
  options.mode = PlanMode::kQlora;
  options.world_size = 2;
  const Plan plan = quantal::plan(model_path("dense-bf16"), options);
  options.cpu_offload = true;
  const Plan offloaded = quantal::plan(model_path("dense-bf16"), options);
  const PlanPhase &here = phase_of(plan, "resident"), &there = phase_of(offloaded, "resident");
  EXPECT_EQ(here.host_bytes, 0);
  EXPECT_EQ(there.total(), 14 * 128);  // specs are buffers: FSDP leaves them where they are
  EXPECT_EQ(there.host_bytes + there.total(), here.total());
  EXPECT_GT(part_of(phase_of(offloaded, "forward"), PlanPart::kGather), 0);
}

// ------------------------------------------------------------------ choosing

TEST(Plan, RecommendsTheMostExactConfigThatFits) {
  const TempFolder temp;
  write_headers(temp.path("llama-7b"), kLlama7b);
  PlanOptions options;
  options.backend = Backend::CUDA;
  double last = -1;
  for (const std::int64_t gigabytes : {24, 12, 8, 6}) {
    options.memory_bytes = gigabytes * 1'000'000'000;
    const Plan plan = quantal::plan(temp.path("llama-7b"), options);
    ASSERT_TRUE(plan.recommended);
    EXPECT_TRUE(plan.fits) << plan.to_text();
    EXPECT_GT(plan.largest_batch, 0);
    double chosen = -1;
    bool before = true;
    for (std::size_t i = 0; i < plan.candidates.size(); ++i) {
      const PlanCandidate& c = plan.candidates[i];
      if (i > 0) {
        EXPECT_LE(plan.candidates[i - 1].relative_error, c.relative_error);
      }
      EXPECT_EQ(c.fits, c.peak_bytes <= plan.usable_bytes);
      if (c.label == plan.label()) chosen = c.relative_error, before = false;
      EXPECT_FALSE(before && c.fits) << c.label;
    }
    EXPECT_GT(chosen, last);
    last = chosen;
  }
}

TEST(Plan, LargestBatchJustFits) {
  PlanOptions options = options_of(config_of(M::HQQ, 4));
  options.memory_bytes = 100'000'000;
  const std::int64_t most = quantal::plan(model_path("dense-bf16"), options).largest_batch;
  ASSERT_GT(most, 1);
  options.batch_size = most;
  EXPECT_TRUE(quantal::plan(model_path("dense-bf16"), options).fits);
  options.batch_size = most + 1;
  EXPECT_FALSE(quantal::plan(model_path("dense-bf16"), options).fits);
}

TEST(Plan, SaysWhenNothingFits) {
  const TempFolder temp;
  write_headers(temp.path("llama-70b"), kLlama70b);
  PlanOptions options;
  options.backend = Backend::CUDA;
  options.memory_bytes = 8'000'000'000;
  const Plan plan = quantal::plan(temp.path("llama-70b"), options);
  EXPECT_FALSE(plan.fits);
  EXPECT_EQ(plan.largest_batch, 0);
  EXPECT_NE(plan.to_text().find("does not fit"), std::string::npos);
  EXPECT_NE(plan.to_json().find("no config of this backend fits"), std::string::npos);
  for (const PlanCandidate& c : plan.candidates) EXPECT_GE(c.peak_bytes, plan.peak().total());
}

TEST(Plan, CandidatesAreThoseOfTheMatrixUnlessExtended) {
  PlanOptions options;
  options.memory_bytes = 1'000'000'000;
  const auto has = [](const Plan& plan, M method) {
    return std::any_of(plan.candidates.begin(), plan.candidates.end(),
                       [&](const PlanCandidate& c) { return c.config.method == method; });
  };
  const Plan documented = quantal::plan(model_path("dense-bf16"), options);
  EXPECT_FALSE(has(documented, M::BNB_NF4));
  EXPECT_TRUE(has(documented, M::HQQ));
  options.support = Support::kExtended;
  EXPECT_TRUE(has(quantal::plan(model_path("dense-bf16"), options), M::BNB_NF4));
}

TEST(Plan, UnsupportedPairsFallBackAsInTheFactory) {
  PlanOptions options = options_of(config_of(M::BNB_NF4, 4));
  options.support = Support::kDocumented;
  const Plan plan = quantal::plan(model_path("dense-bf16"), options);
  EXPECT_EQ(plan.decision.adapter, "FallbackAdapter");
  EXPECT_EQ(plan.resident_bytes, plan.stored_bytes);
  EXPECT_NE(plan.to_text().find("only supported on CUDA"), std::string::npos);
  options.fallback = Fallback::kError;
  EXPECT_EQ(error_of([&] { quantal::plan(model_path("dense-bf16"), options); }).code(),
            Errc::kUnsupported);
}

// ------------------------------------------------------------------ output and bad input

TEST(Plan, TextIsNarrowAndJsonIsComplete) {
  const TempFolder temp;
  write_headers(temp.path("llama-405b"), kLlama405b);
  PlanOptions options;
  options.backend = Backend::CUDA;
  options.memory_bytes = 80'000'000'000;
  options.world_size = 16;
  options.mode = PlanMode::kQlora;
  options.cpu_offload = true;
  for (const std::string& path : {temp.path("llama-405b"), model_path("mlx-mixed")}) {
    const Plan plan = quantal::plan(path, options);
    std::istringstream lines(plan.to_text());
    for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 100u) << line;
    const json all = json::parse(plan.to_json());
    EXPECT_EQ(all["layers"].size(), plan.layers.size());
    EXPECT_EQ(all["phases"].size(), 5u);
    EXPECT_EQ(all["peak_bytes"], plan.peak().total());
    EXPECT_EQ(all["options"]["world_size"], 16);
    std::int64_t bytes = 0;
    for (const json& layer : all["layers"]) bytes += layer["bytes"].get<std::int64_t>();
    EXPECT_EQ(bytes, plan.resident_bytes);
  }
}

TEST(Plan, BadOptions) {
  const auto message = [](const std::function<void(PlanOptions&)>& change) {
    PlanOptions options;
    change(options);
    const Error error = error_of([&] { quantal::plan(model_path("dense-bf16"), options); });
    EXPECT_EQ(error.code(), Errc::kConfig);
    return std::string(error.what());
  };
  EXPECT_EQ(message([](PlanOptions& o) { o.world_size = 0; }),
            "plan: world_size is 0, expected 1 to 1048576");
  EXPECT_NE(message([](PlanOptions& o) { o.memory_bytes = -1; }).find("memory_bytes is -1"),
            std::string::npos);
  EXPECT_NE(message([](PlanOptions& o) { o.batch_size = 0; }).find("batch_size is 0"),
            std::string::npos);
  EXPECT_NE(message([](PlanOptions& o) { o.sequence_length = -5; }).find("sequence_length is -5"),
            std::string::npos);
  EXPECT_NE(message([](PlanOptions& o) { o.lora_rank = 0; }).find("lora_rank"), std::string::npos);
  EXPECT_NE(message([](PlanOptions& o) { o.lora_dropout = 1; }).find("lora_dropout"),
            std::string::npos);
  EXPECT_NE(message([](PlanOptions& o) { o.lora_dtype = DType::kU8; }).find("uint8"),
            std::string::npos);
  EXPECT_NE(message([](PlanOptions& o) {
              o.mode = PlanMode::kQlora;
              o.lora_targets = {"q_prj"};
            }).find("\"q_prj\" matches no linear layer"),
            std::string::npos);
  EXPECT_EQ(what_of([] { parse_plan_mode("train"); }),
            "plan: mode is 'train', expected inference or qlora");
  EXPECT_THROW(parse_plan_optimizer("adam"), Error);
  EXPECT_THROW(parse_plan_attention("flash"), Error);
}

TEST(Plan, HugeOptionsOverflowWithAnError) {
  PlanOptions options;
  options.batch_size = options.sequence_length = std::int64_t{1} << 40;
  EXPECT_EQ(error_of([&] { quantal::plan(model_path("dense-bf16"), options); }).code(),
            Errc::kShape);
}

TEST(Plan, ModelsThatCannotBePlanned) {
  const TempFolder temp;
  EXPECT_EQ(error_of([&] { quantal::plan(temp.path("nowhere"), {}); }).code(), Errc::kIo);
  ModelOutline model{.source = "norms", .tensors = {}};
  model.tensors.push_back({.name = "norm.weight", .shape = {64}});
  const Error error = error_of([&] { quantal::plan(model, {}); });
  EXPECT_EQ(error.code(), Errc::kUnsupported);
  EXPECT_STREQ(error.what(),
               "plan: model 'norms' has 1 tensors, none of them the weight of a linear layer");
}

TEST(Plan, OneLayerWithoutConfigOrBlocks) {
  ModelOutline model{.source = "layer", .tensors = {}};
  model.tensors.push_back(
      {.name = "weight", .kind = OutlineTensor::Kind::kLinear, .shape = {64, 64}});
  const Plan plan = quantal::plan(model, options_of(config_of(M::HQQ, 4)));
  EXPECT_TRUE(plan.layers[0].quantized);
  EXPECT_EQ(part_of(phase_of(plan, "forward"), PlanPart::kActivations), 0);
  EXPECT_NE(plan.to_text().find("no numbered blocks found"), std::string::npos);
}

}  // namespace
}  // namespace quantal
