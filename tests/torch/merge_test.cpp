// Merging adapters into packed and dense weights.
#include <nlohmann/json.hpp>

#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

LoraConfig wide_lora(bool dora = false) {
  LoraConfig config;
  config.r = 4;
  config.lora_alpha = 8;
  config.use_dora = dora;
  config.target_modules = {"all-linear"};
  return config;
}

/// A quantized Llama with adapters `names`, the last one DoRA, all active and not zero.
Llama adapted_llama(const std::vector<std::string>& names, int bits = 8, double size = 0.05) {
  auto model = tiny_llama(11);
  create_quantization_adapter(Backend::CPU, hqq_config(bits))->quantize_model(*model);
  for (const auto& name : names) add_lora(*model, wide_lora(&name == &names.back()), name);
  set_adapter(*model, names);
  const torch::NoGradGuard no_grad;
  for (auto& p : lora_parameters(*model)) p.add_(torch::randn_like(p) * size);
  model->eval();
  return model;
}

std::vector<torch::Tensor> packed_state(Llama& model) {
  std::vector<torch::Tensor> out;
  for (const auto& [name, layer] : named_linears(*model)) {
    if (!layer->packed) continue;
    out.push_back(layer->packed->codes.clone());
    out.push_back(layer->packed->stats.clone());
  }
  return out;
}

bool all_equal(const std::vector<torch::Tensor>& a, const std::vector<torch::Tensor>& b) {
  bool same = a.size() == b.size();
  for (std::size_t i = 0; same && i < a.size(); ++i) same = torch::equal(a[i], b[i]);
  return same;
}

torch::Tensor ids() { return torch::arange(30).unsqueeze(0); }

TEST(Merge, IntoPackedWeightsAndBack) {
  torch::manual_seed(1);
  auto model = adapted_llama({"plain", "dora"});
  const auto before = packed_state(model);
  const auto expected = model->forward(ids()).detach();
  merge_adapter(*model);
  EXPECT_FALSE(all_equal(packed_state(model), before));
  // 8-bit codes: the rounding of the merged weights is far below the adapters' effect.
  EXPECT_LE(relative(model->forward(ids()), expected), 0.05);
  const MergeReport report = merge_report(*model);
  ASSERT_EQ(report.layers.size(), 14u);
  EXPECT_GT(report.codes_changed(), report.codes() / 10);
  EXPECT_NEAR(report.surviving(), 1, 0.02);
  EXPECT_LT(report.noise(), 0.2);
  unmerge_adapter(*model);
  EXPECT_TRUE(all_equal(packed_state(model), before));
  EXPECT_TRUE(torch::equal(model->forward(ids()), expected));
  EXPECT_TRUE(merge_report(*model).layers.empty());
}

TEST(Merge, OfSeveralRoundsOnceInOneCallOrTwo) {
  torch::manual_seed(2);
  auto model = adapted_llama({"a", "b"}, 4);
  const auto before = packed_state(model);
  merge_adapter(*model, {"a", "b"});
  const auto together = packed_state(model);
  unmerge_adapter(*model);
  merge_adapter(*model, {"a"});
  EXPECT_FALSE(all_equal(packed_state(model), together));
  merge_adapter(*model, {"b"});
  EXPECT_TRUE(all_equal(packed_state(model), together));
  merge_adapter(*model, {"b"});  // merged already
  EXPECT_TRUE(all_equal(packed_state(model), together));
  unmerge_adapter(*model);
  EXPECT_TRUE(all_equal(packed_state(model), before));
}

TEST(Merge, ReportSaysWhatRoundingTook) {
  torch::manual_seed(3);
  auto model = adapted_llama({"tiny"}, 4, 1e-5);
  set_adapter(*model, {"tiny"});
  merge_adapter(*model);
  const MergeReport report = merge_report(*model);
  EXPECT_LT(report.codes_changed(), report.codes() / 20) << "a tiny change moves few codes";
  const auto json = nlohmann::json::parse(report.to_json());
  EXPECT_EQ(json["layers"].size(), report.layers.size());
  EXPECT_EQ(json["codes"], report.codes());
  const std::string text = report.to_text();
  EXPECT_EQ(text.find("layer"), 0u);
  EXPECT_NE(text.find("codes changed  surviving  noise"), std::string::npos);
  EXPECT_NE(text.rfind("\nall "), std::string::npos);
}

TEST(Merge, ReportTextHasPythonsForm) {
  const MergeReport report{{{"a.q_proj", 100, 25, 2, 0.5, 0.25}, {"b", 100, 50, 0, 1, 0}}};
  EXPECT_EQ(report.to_text(),
            "layer     codes changed  surviving  noise\n"
            "a.q_proj        25.00%      0.500  0.250\n"
            "b               50.00%      1.000  0.000\n"
            "all             37.50%      0.500  0.250");
  EXPECT_EQ(report.to_json(),
            R"({"codes":200,"codes_changed":75,"surviving":0.5,"noise":0.25,"layers":[)"
            R"({"name":"a.q_proj","codes":100,"codes_changed":25,"delta_norm":2.0,)"
            R"("surviving":0.5,"noise":0.25},)"
            R"({"name":"b","codes":100,"codes_changed":50,"delta_norm":0.0,)"
            R"("surviving":1.0,"noise":0.0}]})");
}

TEST(Merge, AndUnloadLeavesAPlainQuantizedModel) {
  torch::manual_seed(4);
  auto model = adapted_llama({"a"});
  merge_adapter(*model);
  const auto merged = model->forward(ids()).detach();
  unmerge_adapter(*model);
  merge_and_unload(*model);
  EXPECT_TRUE(adapter_names(*model).empty());
  EXPECT_TRUE(torch::equal(model->forward(ids()), merged));
  EXPECT_EQ(merge_report(*model).layers.size(), 14u);
  unmerge_adapter(*model);
  EXPECT_TRUE(torch::equal(model->forward(ids()), merged)) << "there is nothing left to undo";
}

TEST(Merge, ToFullPrecisionLosesNothing) {
  torch::manual_seed(5);
  auto model = adapted_llama({"a", "dora"}, 4);
  const auto expected = model->forward(ids()).detach();
  merge_to_full_precision(*model, {}, torch::kFloat);
  for (const auto& [name, layer] : named_linears(*model)) {
    EXPECT_FALSE(layer->is_quantized()) << name;
    EXPECT_TRUE(layer->loras().empty()) << name;
  }
  EXPECT_LE(relative(model->forward(ids()), expected), 1e-5);
}

TEST(Merge, UnloadTakesMergedAdaptersOut) {
  torch::manual_seed(6);
  auto model = adapted_llama({"a"}, 4);
  const auto before = packed_state(model);
  merge_adapter(*model);
  unload(*model);
  EXPECT_TRUE(all_equal(packed_state(model), before));
  EXPECT_TRUE(adapter_names(*model).empty());
}

TEST(Merge, DenseLayersGetTheirExactWeightBack) {
  torch::manual_seed(7);
  auto model = tiny_llama(12);
  const auto base = model->forward(ids()).detach();
  add_lora(*model, wide_lora(true));
  const torch::NoGradGuard no_grad;
  for (auto& p : lora_parameters(*model)) p.add_(torch::randn_like(p) * 0.05);
  const auto expected = model->forward(ids());
  merge_adapter(*model);
  EXPECT_LE(relative(model->forward(ids()), expected), 1e-5);
  EXPECT_TRUE(merge_report(*model).layers.empty());
  unload(*model);
  EXPECT_TRUE(torch::equal(model->forward(ids()), base));
}

TEST(Merge, RefusesWhatIsNotFiniteAndChangesNothing) {
  auto model = adapted_llama({"a"}, 4);
  const auto before = packed_state(model);
  {
    const torch::NoGradGuard no_grad;
    named_linears(*model)[0].second->lora("a")->B[0][0] = std::numeric_limits<float>::infinity();
  }
  expect_error(Errc::kUnsupported, "merge_adapter: the merged weight of layer 'model.layers.0",
               [&] { merge_adapter(*model, {}, /*safe_merge=*/true); });
  EXPECT_TRUE(all_equal(packed_state(model), before));
  EXPECT_THROW(merge_adapter(*model), Error);
  EXPECT_TRUE(all_equal(packed_state(model), before));
  expect_error(Errc::kConfig, "merge_adapter: adapter is 'b', expected one of a",
               [&] { merge_adapter(*model, {"b"}); });
}

TEST(Dequantize, MakesEveryLayerDense) {
  auto model = tiny_llama(13);
  create_quantization_adapter(Backend::CPU, hqq_config())->quantize_model(*model);
  const auto expected = model->forward(ids()).detach();
  dequantize_model(*model, torch::kFloat);
  EXPECT_FALSE(named_linears(*model)[0].second->is_quantized());
  EXPECT_LE(relative(model->forward(ids()), expected), 1e-5);
}

}  // namespace
}  // namespace quantal::testing
