// Phases of a plan, the choice of a config, output and bad input.
#include <functional>
#include <sstream>

#include "checkpoint/plan_support.h"

namespace quantal {
namespace {

using namespace testing;  // NOLINT: plan_support.h

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
