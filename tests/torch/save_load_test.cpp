// Saving and loading through the adapters: every dialect, every layout, shards, tokenizers, what
// does not fit, and memory.
#include <atomic>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

namespace fs = std::filesystem;

/// config.json of tiny_llama.
std::string tiny_json(bool tied) {
  nlohmann::json config = {{"model_type", "llama"},
                           {"architectures", {"LlamaForCausalLM"}},
                           {"vocab_size", 96},
                           {"hidden_size", 64},
                           {"intermediate_size", 96},
                           {"num_hidden_layers", 2},
                           {"num_attention_heads", 4},
                           {"num_key_value_heads", 2},
                           {"head_dim", 16},
                           {"rms_norm_eps", 1e-6},
                           {"rope_theta", 10000.0},
                           {"hidden_act", "silu"},
                           {"max_position_embeddings", 2048},
                           {"tie_word_embeddings", tied}};
  return config.dump();
}

struct Form {
  const char* name;
  QuantizationMethod method;
  int bits = 4;
  const char* quant_type = "nf4";
  bool double_quant = false;
  std::map<std::string, std::string> options{};
};
std::ostream& operator<<(std::ostream& out, const Form& form) { return out << form.name; }

const std::vector<Form>& forms() {
  using enum QuantizationMethod;
  static const std::vector<Form> kForms = {
      {"nf4", BNB_NF4},
      {"nf4_double", BNB_NF4, 4, "nf4", true},
      {"fp4", BNB_NF4, 4, "fp4"},
      {"int8", BNB_INT8, 8},
      {"hqq4", HQQ},
      {"hqq8_axis0", HQQ, 8, "nf4", false, {{"axis", "0"}}},
      {"hqq3", HQQ, 3},
      {"mlx4", MLX_INT4},
      {"mlx8", MLX_INT8, 8},
      {"mxfp4", MLX_INT4, 4, "nf4", false, {{"mode", "mxfp4"}}},
      {"quanto2", QUANTO_INT2, 2},
      {"quanto4", QUANTO_INT4},
      {"quanto8", QUANTO_INT8, 8},
  };
  return kForms;
}

std::unique_ptr<QuantizationAdapter> adapter_of(const Form& form) {
  QuantizationConfig config;
  config.method = form.method;
  config.bits = form.bits;
  config.bits_set = true;
  config.group_size = 32;
  config.compute_dtype = DType::kF32;
  config.double_quant = form.double_quant;
  config.quant_type = form.quant_type;
  config.backend_options = form.options;
  return create_quantization_adapter(Backend::CPU, config, Support::kExtended);
}

torch::Tensor logits_of(Llama& model) {
  const torch::NoGradGuard no_grad;
  return model->forward(torch::arange(20).unsqueeze(0));
}

void expect_same_packed(Llama& a, Llama& b) {
  const auto one = named_linears(*a), other = named_linears(*b);
  ASSERT_EQ(one.size(), other.size());
  for (std::size_t i = 0; i < one.size(); ++i) {
    ASSERT_EQ(one[i].second->is_quantized(), other[i].second->is_quantized()) << one[i].first;
    if (!one[i].second->is_quantized()) continue;
    const PackedTensors x = one[i].second->packed->packed(), y = other[i].second->packed->packed();
    EXPECT_TRUE(torch::equal(x.codes, y.codes)) << one[i].first;
    EXPECT_TRUE(torch::equal(x.stats, y.stats)) << one[i].first;
    EXPECT_TRUE(torch::equal(x.shared, y.shared)) << one[i].first;
  }
}

// ---------------------------------------------------------------------- every dialect

class EveryDialect : public ::testing::TestWithParam<Form> {};

TEST_P(EveryDialect, EveryLayoutGivesTheSameLogits) {
  const TempFolder folder(std::string("layouts_") + GetParam().name);
  for (const bool tied : {true, false}) {
    auto model = tiny_llama(3, tied);
    auto adapter = adapter_of(GetParam());
    adapter->quantize_model(*model);
    const auto layer = named_linears(*model)[0].second;
    ASSERT_TRUE(layer->is_quantized());
    const torch::Tensor expected = logits_of(model);
    for (const FileLayout& layout : file_layouts(&dialect_by_id(layer->packed->spec().dialect))) {
      SCOPED_TRACE(std::string(layout.name) + (tied ? " tied" : ""));
      const std::string path = folder.file(std::string(layout.name) + (tied ? "_tied" : "") +
                                           (layout.weights.empty() ? ".pth" : ""));
      const SaveOptions options{.layout = std::string(layout.name)};
      try {
        adapter->save_quantized_model(*model, path, tiny_json(tied), options);
      } catch (const Error& e) {  // a layout may say that it cannot hold such layers
        EXPECT_EQ(e.code(), Errc::kUnsupported) << e.what();
        EXPECT_FALSE(fs::exists(path));
        continue;
      }
      auto loaded = tiny_llama(4, tied);
      const LoadedModel found = adapter->load_quantized_model(path, *loaded);
      EXPECT_TRUE(found.report.fits());
      EXPECT_TRUE(found.report.settings.empty()) << found.report.text();
      EXPECT_TRUE(found.report.layout.ends_with(layout.name)) << found.report.layout;
      expect_same_packed(model, loaded);
      EXPECT_TRUE(torch::equal(logits_of(loaded), expected));
    }
  }
}

TEST_P(EveryDialect, ShardsGiveTheSameModel) {
  const TempFolder folder(std::string("shards_") + GetParam().name);
  auto model = tiny_llama(5, false);
  auto adapter = adapter_of(GetParam());
  adapter->quantize_model(*model);
  constexpr std::int64_t kShard = 20000;
  adapter->save_quantized_model(*model, folder.file("m"), tiny_json(false),
                                {.max_shard_bytes = kShard});
  std::int64_t shards = 0;
  for (const auto& entry : fs::directory_iterator(folder.file("m"))) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("model-") || !name.ends_with(".safetensors")) continue;
    ++shards;
    // Data of a shard; its header comes on top. One tensor (the head: 24,576 bytes) is larger.
    EXPECT_LE(static_cast<std::int64_t>(entry.file_size()), 96 * 64 * 4 + 8192) << name;
  }
  EXPECT_GE(shards, 3);
  EXPECT_TRUE(fs::exists(folder.file("m/model.safetensors.index.json")));
  LoadedModel found;
  auto loaded = load_quantized_llama(folder.file("m"), *adapter, &found);
  EXPECT_TRUE(torch::equal(logits_of(loaded), logits_of(model)));
  EXPECT_EQ(LlamaConfig::from_json(found.config_json).hidden_size, 64);
}

/// What was loaded is written from its packed form: the source may be gone.
TEST_P(EveryDialect, SavedAfterLoadingWithoutTheSource) {
  const TempFolder folder(std::string("again_") + GetParam().name);
  auto adapter = adapter_of(GetParam());
  torch::Tensor expected;
  {
    auto model = tiny_llama(6, false);
    adapter->quantize_model(*model);
    expected = logits_of(model);
    adapter->save_quantized_model(*model, folder.file("first"), tiny_json(false));
  }
  LoadedModel found;
  auto loaded = load_quantized_llama(folder.file("first"), *adapter, &found);
  const SafetensorsFile first(folder.file("first/model.safetensors"));
  fs::remove_all(folder.file("first"));
  adapter->save_quantized_model(*loaded, folder.file("second"), found.config_json, {}, found.texts);
  const SafetensorsFile second(folder.file("second/model.safetensors"));
  ASSERT_EQ(first.tensors().size(), second.tensors().size());
  for (const auto& [name, tensor] : first.tensors()) {
    const TensorView* same = second.find(name);
    ASSERT_NE(same, nullptr) << name;
    EXPECT_TRUE(std::ranges::equal(same->bytes, tensor.bytes)) << name;
  }
  auto again = load_quantized_llama(folder.file("second"), *adapter);
  EXPECT_TRUE(torch::equal(logits_of(again), expected));
}

INSTANTIATE_TEST_SUITE_P(All, EveryDialect, ::testing::ValuesIn(forms()),
                         [](const auto& info) { return std::string(info.param.name); });

// ---------------------------------------------------------------------- upstream's files

class GoldenFolder : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenFolder, LogitsEqualUpstreamBeforeAndAfterSaving) {
  const std::string name = GetParam();
  const TempFolder folder("golden");
  auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
  LoadedModel found;
  auto model = load_quantized_llama(golden_path("checkpoints/" + name), *adapter, &found);
  EXPECT_TRUE(named_linears(*model)[0].second->is_quantized());
  const bool single = name.ends_with(".gguf");
  const std::string saved = folder.file(single ? "saved.gguf" : "saved");
  adapter->save_quantized_model(*model, saved, found.config_json, {.layout = found.report.layout},
                                found.texts);
  auto again = load_quantized_llama(saved, *adapter);
  expect_same_packed(model, again);
  const auto logits = [](Llama& m) {
    const torch::NoGradGuard no_grad;
    m->to(torch::kFloat);  // dense tensors; packed values stay what they are
    return m->forward(golden_ids())[0];
  };
  const auto expected = golden_tensor("vectors/checkpoint_logits.safetensors", name);
  EXPECT_LE(relative(logits(model), expected), 5e-6);
  EXPECT_TRUE(torch::equal(logits(again), logits(model)));
}

INSTANTIATE_TEST_SUITE_P(
    All, GoldenFolder,
    ::testing::Values("bnb-nf4", "bnb-nf4-double", "bnb-fp4-f16", "bnb-nf4-storage-bf16",
                      "bnb-int8", "hqq-pt-4bit", "hqq-pt-3bit-axis0", "hqq-pt-2bit",
                      "hqq-safetensors", "hqq-transformers", "layout-hqq-dir", "mlx-4bit",
                      "mlx-mixed", "mlx-mxfp4", "mlx-npz", "layout-mlx-dir", "quanto-int2",
                      "quanto-int4", "quanto-int8", "quanto-float8", "layout-quanto-dir",
                      "gguf/tiny-q4_0.gguf", "gguf/tiny-q4_1.gguf", "gguf/tiny-q5_0.gguf",
                      "gguf/tiny-q5_1.gguf", "gguf/tiny-q8_0.gguf"),
    [](const auto& info) {
      std::string name = info.param;
      for (char& c : name) {
        if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
      }
      return name;
    });

TEST(SaveLoad, GgufStaysPackedAndKeepsItsTokenizer) {
  const TempFolder folder("gguf");
  auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
  const std::string source = golden_path("checkpoints/gguf/tiny-q4_1.gguf");
  LoadedModel found;
  auto model = load_quantized_llama(source, *adapter, &found);
  EXPECT_TRUE(model->embed_tokens()->is_quantized());
  EXPECT_EQ(found.report.layout, "gguf gguf");
  adapter->save_quantized_model(*model, folder.file("m.gguf"), found.config_json, {}, found.texts);
  EXPECT_FALSE(read_tokenizer(source).empty());
  EXPECT_FALSE(read_tokenizer(folder.file("m.gguf")).empty());
  EXPECT_EQ(ModelSource::open(folder.file("m.gguf"))->tokenizer_json(),
            ModelSource::open(source)->tokenizer_json());
}

TEST(SaveLoad, TokenizerFilesGoWithTheModel) {
  const TempFolder folder("texts");
  auto model = tiny_llama(1, false);
  auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
  adapter->quantize_model(*model);
  const SideTexts texts = {{"tokenizer.json", "{}"},
                           {"tokenizer.model", std::string("\0\xff\n", 3)},
                           {"hqq_config.json", "{}"}};
  adapter->save_quantized_model(*model, folder.file("a"), tiny_json(false), {}, texts);
  EXPECT_FALSE(fs::exists(folder.file("a/hqq_config.json"))) << "settings of another file";
  const LoadedModel found = adapter->load_quantized_model(folder.file("a"), *model);
  adapter->save_quantized_model(*model, folder.file("b"), found.config_json, {}, found.texts);
  EXPECT_EQ(
      read_tokenizer(folder.file("b")),
      (SideTexts{{"tokenizer.json", "{}"}, {"tokenizer.model", texts.at("tokenizer.model")}}));
}

// ---------------------------------------------------------------------- dense models

TEST(SaveLoad, FallbackWritesFoldersAndSingleFilesOfEveryKind) {
  const TempFolder folder("fallback");
  QuantizationConfig config;
  config.method = QuantizationMethod::NONE;
  auto adapter = create_quantization_adapter(Backend::CPU, config);
  ASSERT_NE(dynamic_cast<FallbackAdapter*>(adapter.get()), nullptr);
  for (const bool tied : {true, false}) {
    auto model = tiny_llama(2, tied);
    for (const std::string name :
         {"folder", "one.safetensors", "one.pt", "one.pth", "one.bin", "one.npz", "one.gguf"}) {
      SCOPED_TRACE(name);
      const std::string path = folder.file((tied ? "tied_" : "") + name);
      adapter->save_quantized_model(*model, path, tiny_json(tied));
      auto loaded = tiny_llama(3, tied);
      const LoadedModel found = adapter->load_quantized_model(path, *loaded);
      EXPECT_TRUE(found.report.settings.empty());
      EXPECT_TRUE(torch::equal(logits_of(loaded), logits_of(model)));
    }
  }
}

TEST(SaveLoad, TheSuffixDoesNotDecide) {
  const TempFolder folder("suffix");
  auto adapter = create_quantization_adapter(Backend::CPU, {});
  auto model = tiny_llama(2, false);
  for (const std::string suffix : {".safetensors", ".pth", ".npz", ".gguf"}) {
    adapter->save_quantized_model(*model, folder.file("m" + suffix), tiny_json(false));
    fs::rename(folder.file("m" + suffix), folder.file("m.weights"));
    auto loaded = tiny_llama(3, false);
    adapter->load_quantized_model(folder.file("m.weights"), *loaded);
    EXPECT_TRUE(torch::equal(logits_of(loaded), logits_of(model))) << suffix;
    fs::remove(folder.file("m.weights"));
  }
}

/// Files of tied models often hold the head too.
TEST(SaveLoad, TiedModelsTakeFilesWithOrWithoutAHead) {
  const TempFolder folder("tied");
  auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
  auto model = tiny_llama(2, true), loaded = tiny_llama(3, true);
  const auto table = model->named_parameters()["model.embed_tokens.weight"];
  const auto save = [&](bool head, bool embedding) {
    CheckpointView view;
    for (const auto& p : model->named_parameters()) {
      if (!embedding && p.key() == "model.embed_tokens.weight") continue;
      view.tensors.emplace_back(p.key(), tensor_view(p.value()));
    }
    if (head) view.tensors.emplace_back("lm_head.weight", tensor_view(table));
    save_checkpoint(folder.file("m"), view, {.overwrite = true});
  };
  for (const auto& [head, embedding] : {std::pair{true, true}, {true, false}, {false, true}}) {
    save(head, embedding);
    adapter->load_quantized_model(folder.file("m"), *loaded);
    EXPECT_TRUE(torch::equal(logits_of(loaded), logits_of(model))) << head << embedding;
  }
  save(false, false);
  expect_error(Errc::kCorrupt, "1 missing: model.embed_tokens.weight",
               [&] { adapter->load_quantized_model(folder.file("m"), *loaded); });
}

// ---------------------------------------------------------------------- what does not fit

TEST(SaveLoad, EverythingThatDoesNotFitIsNamedAtOnce) {
  const TempFolder folder("misfit");
  auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
  auto model = tiny_llama(3, false);
  adapter->quantize_model(*model);
  CheckpointView view;
  for (const auto& [name, layer] : named_linears(*model)) {
    if (layer->is_quantized() && name != "model.layers.0.mlp.up_proj") {
      view.layers.emplace_back(name, layer->packed->packed().view());
    }
  }
  const torch::Tensor wrong = torch::zeros({63}), extra = torch::zeros({2});
  for (const auto& p : model->named_parameters()) {
    const bool packed = p.key().find(".packed.") != std::string::npos;
    if (packed || p.key() == "model.norm.weight") continue;
    view.tensors.emplace_back(p.key(), tensor_view(p.value()));
  }
  view.tensors.emplace_back("model.norm.weight", tensor_view(wrong));
  view.tensors.emplace_back("model.extra", tensor_view(extra));
  view.config_json = tiny_json(false);
  save_checkpoint(folder.file("m"), view);
  auto other = tiny_llama(4, false);
  const auto before = logits_of(other);
  expect_error(Errc::kCorrupt,
               "1 missing: model.layers.0.mlp.up_proj.weight; 1 unexpected: model.extra; "
               "1 misshapen: model.norm.weight [63], expected [64]",
               [&] { adapter->load_quantized_model(folder.file("m"), *other); });
  EXPECT_TRUE(torch::equal(logits_of(other), before)) << "changed before the check";
  const LoadedModel found =
      adapter->load_quantized_model(folder.file("m"), *other, {.strict = false});
  EXPECT_EQ(found.report.missing, std::vector<std::string>{"model.layers.0.mlp.up_proj.weight"});
  EXPECT_EQ(found.report.unexpected, std::vector<std::string>{"model.extra"});
  ASSERT_EQ(found.report.misshapen.size(), 1u);
  EXPECT_TRUE(named_linears(*other)[0].second->is_quantized());
  EXPECT_FALSE(found.report.fits());
}

TEST(SaveLoad, SavedSettingsWinAndTheDifferencesAreTold) {
  const TempFolder folder("settings");
  Form form{"fp4", QuantizationMethod::BNB_NF4, 4, "fp4"};
  auto model = tiny_llama(3, false);
  auto writer = adapter_of(form);
  writer->quantize_model(*model);
  writer->save_quantized_model(*model, folder.file("m"), tiny_json(false));
  form.quant_type = "nf4";
  form.double_quant = true;
  auto reader = adapter_of(form);
  auto loaded = tiny_llama(4, false);
  const auto found = reader->load_quantized_model(folder.file("m"), *loaded);
  EXPECT_TRUE(torch::equal(logits_of(loaded), logits_of(model)));
  ASSERT_EQ(found.report.settings.size(), 2u) << found.report.text();
  EXPECT_EQ(found.report.settings_text(),
            "settings of the file are used, not the config's: quant_type fp4 (config: nf4); "
            "double_quant false (config: true)");
  ASSERT_FALSE(reader->warnings().empty());
  EXPECT_EQ(reader->warnings().back(), found.report.settings_text());
  EXPECT_EQ(reader->report().substitutions.back().what, "double_quant");
  const auto count = reader->report().substitutions.size();
  reader->load_quantized_model(folder.file("m"), *loaded);
  EXPECT_EQ(reader->report().substitutions.size(), count) << "told once";

  auto hqq = create_quantization_adapter(Backend::CPU, hqq_config());
  const auto other = hqq->load_quantized_model(folder.file("m"), *loaded);
  EXPECT_EQ(other.report.settings_text(),
            "settings of the file are used, not the config's: method bnb_nf4 (config: hqq)");
}

// ---------------------------------------------------------------------- memory

std::int64_t anonymous_bytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    std::int64_t kilobytes = 0;
    if (word == "RssAnon:" && status >> kilobytes) return kilobytes * 1024;
  }
  return 0;
}

TEST(SaveLoad, LoadingHoldsNoFullPrecisionCopy) {
  if (anonymous_bytes() == 0) GTEST_SKIP() << "reads RssAnon of /proc/self/status";
  const TempFolder folder("memory");
  constexpr std::int64_t kSize = 2048, kLayers = 8;
  const auto stack = [&] {
    torch::nn::Sequential model;
    for (int i = 0; i < kLayers; ++i) {
      model->push_back(Linear(kSize, kSize, false, torch::kFloat, Init::kNone));
    }
    return model;
  };
  for (const char* name : {"hqq4", "nf4", "mlx4", "quanto4"}) {
    SCOPED_TRACE(name);
    const auto form =
        std::ranges::find_if(forms(), [&](const Form& f) { return std::string(f.name) == name; });
    auto adapter = adapter_of(*form);
    std::int64_t packed = 0;
    {
      auto model = stack();
      for (const auto& [_, layer] : named_linears(*model)) {
        QuantizeOptions options = hqq_options(4, 64);
        options.method = form->method;
        options.optimize = false;
        const torch::NoGradGuard no_grad;
        layer->weight.normal_();
        layer->set_quantized(QuantizedLinear(quantize(layer->weight, options)));
        packed += layer->packed->nbytes();
      }
      adapter->save_quantized_model(*model, folder.file(name));
    }
    auto model = stack();
    const std::int64_t start = anonymous_bytes();
    std::atomic<std::int64_t> peak = start;
    std::atomic<bool> running = true;
    std::thread sampler([&] {
      while (running) peak = std::max<std::int64_t>(peak, anonymous_bytes());
    });
    adapter->load_quantized_model(folder.file(name), *model);
    running = false;
    sampler.join();
    EXPECT_TRUE(named_linears(*model)[0].second->is_quantized());
    constexpr std::int64_t kLargest = kSize * kSize * 4, kMargin = 32 << 20;
    EXPECT_LE(peak - start, packed + kLargest + kMargin);
    EXPECT_LT(packed + kLargest + kMargin, kLayers * kLargest) << "the bound means something";
  }
}

}  // namespace
}  // namespace quantal::testing
