// GGUF files as packed models, and llama models written as GGUF.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "checkpoint/gguf.h"
#include "checkpoint/gguf_names.h"
#include "checkpoint/sources.h"
#include "io/temp_folder.h"
#include "quantal/ggml.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

using namespace checkpoint;
using nlohmann::json;

const char* const kFiles[] = {"tiny-f16.gguf",  "tiny-q4_0.gguf", "tiny-q4_1.gguf",
                              "tiny-q5_0.gguf", "tiny-q5_1.gguf", "tiny-q8_0.gguf"};

std::string golden_file(const std::string& name) { return golden_path("checkpoints/gguf/" + name); }

Error error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& e) {
    return e;
  }
  ADD_FAILURE() << "accepted";
  return Error(Errc::kInternal, "accepted");
}

/// Everything of `reader` into a GGUF file.
void write_all(const ModelReader& reader, const std::string& path, const std::string& config,
               const SideTexts& texts) {
  GgufModelWriter writer(path);
  for (const std::string& name : reader.layer_names()) {
    writer.add_layer(name, reader.read_layer(name).view());
  }
  for (const std::string& name : reader.tensor_names()) {
    writer.add_tensor(name, reader.read_tensor(name).view());
  }
  writer.commit(config, texts);
}

TEST(GgufReader, LayersHaveTheValuesOfTheSource) {
  for (const char* name : kFiles) {
    SCOPED_TRACE(name);
    const auto reader = open_gguf_reader(golden_file(name), {});
    const auto source = open_gguf_source(golden_file(name));
    const bool plain = std::string(name) == "tiny-f16.gguf";
    EXPECT_EQ(reader->layer_names().size(), plain ? 0u : 16u);
    EXPECT_EQ(reader->layer_names().size() + reader->tensor_names().size(),
              source->tensors().size());
    EXPECT_EQ(reader->layout(), plain ? "dense gguf" : "gguf gguf");
    EXPECT_EQ(json::parse(reader->config_json()), json::parse(source->config_json()));
    for (const std::string& layer : reader->layer_names()) {
      const PackedMatrix w = reader->read_layer(layer);
      EXPECT_EQ(reader->layer_spec(layer), w.spec);
      EXPECT_EQ(reader->layer_bytes(layer),
                ggml_bytes(ggml_type_of(w.spec), w.spec.rows, w.spec.cols));
      const auto n = static_cast<std::size_t>(w.spec.rows * w.spec.cols);
      std::vector<float> expected(n), actual(n);
      source->read_rows(layer + ".weight", 0, w.spec.rows, DType::kF32, expected.data(),
                        serial_executor());
      dequantize(w.view(), {0, w.spec.rows, 0, w.spec.cols}, DType::kF32, actual.data(),
                 w.spec.cols, serial_executor());
      EXPECT_EQ(std::memcmp(actual.data(), expected.data(), 4 * n), 0) << layer;
    }
    for (const std::string& dense : reader->tensor_names()) {
      const Tensor t = reader->read_tensor(dense);
      const TensorView described = reader->describe_tensor(dense);
      EXPECT_EQ(described.dtype, t.dtype);
      EXPECT_EQ(described.shape, t.shape);
      const HeldTensor held = reader->lend_tensor(dense);
      EXPECT_TRUE(std::equal(held.view.bytes.begin(), held.view.bytes.end(), t.bytes.begin(),
                             t.bytes.end()));
      std::vector<std::uint8_t> expected(t.bytes.size());
      const std::int64_t rows = t.shape.size() == 1 ? 1 : t.shape[0];
      source->read_rows(dense, 0, rows, t.dtype, expected.data(), serial_executor());
      EXPECT_EQ(t.bytes, expected) << dense;
    }
  }
}

TEST(GgufReader, UnknownNamesAndTypesAreRefused) {
  const auto reader = open_gguf_reader(golden_file("tiny-q4_0.gguf"), {});
  EXPECT_EQ(error_of([&] { reader->read_layer("model.norm.x"); }).code(), Errc::kConfig);
  EXPECT_EQ(error_of([&] { reader->read_tensor("nothing"); }).code(), Errc::kConfig);
  EXPECT_EQ(error_of([] { open_gguf_reader("/nonexistent.gguf", {}); }).code(), Errc::kIo);
}

TEST(GgufModelWriter, WritesBackEveryTensorAndPair) {
  const TempFolder folder;
  const std::string path = folder.path("out.gguf");
  for (const char* name : kFiles) {
    SCOPED_TRACE(name);
    const auto reader = open_gguf_reader(golden_file(name), {});
    write_all(*reader, path, reader->config_json(), reader->texts());
    const GgufFile before = open_gguf(golden_file(name)), after = open_gguf(path);
    ASSERT_EQ(after.tensors().size(), before.tensors().size());
    for (const GgufTensor& tensor : before.tensors()) {
      const GgufTensor* written = after.find(tensor.name);
      ASSERT_NE(written, nullptr) << tensor.name;
      EXPECT_EQ(written->type, tensor.type) << tensor.name;
      EXPECT_EQ(written->shape, tensor.shape) << tensor.name;
      EXPECT_TRUE(std::equal(written->bytes.begin(), written->bytes.end(), tensor.bytes.begin(),
                             tensor.bytes.end()))
          << tensor.name;
    }
    const auto written = after.pairs();
    for (const GgufPair& pair : before.pairs()) {
      const auto same = std::find_if(written.begin(), written.end(),
                                     [&](const GgufPair& p) { return p.key == pair.key; });
      ASSERT_NE(same, written.end()) << pair.key;
      EXPECT_EQ(same->type, pair.type) << pair.key;
      if (pair.type == GgufType::kArray) continue;
      EXPECT_EQ(same->value, pair.value) << pair.key;
    }
    EXPECT_EQ(gguf_tokenizer_json(after), gguf_tokenizer_json(before));
  }
}

TEST(GgufModelWriter, NamesWhatAModelLacks) {
  const TempFolder folder;
  const std::string path = folder.path("out.gguf");
  const auto reader = open_gguf_reader(golden_file("tiny-q8_0.gguf"), {});
  const json config = json::parse(reader->config_json());
  const auto with = [&](const char* key, json value) {
    json changed = config;
    changed[key] = std::move(value);
    return error_of([&] { write_all(*reader, path, changed.dump(), {}); });
  };
  const Error layers = with("num_hidden_layers", 3);
  EXPECT_EQ(layers.code(), Errc::kConfig);
  EXPECT_EQ(layers.site().tensor, "model.layers.2.input_layernorm.weight");
  const Error heads = with("num_attention_heads", 8);
  EXPECT_NE(std::string(heads.what()).find("8 heads of 16"), std::string::npos) << heads.what();
  EXPECT_EQ(with("model_type", "qwen2").code(), Errc::kUnsupported);
  EXPECT_EQ(with("hidden_act", "gelu").code(), Errc::kUnsupported);
  EXPECT_EQ(with("hidden_size", nullptr).code(), Errc::kConfig);
  EXPECT_EQ(with("intermediate_size", "128").code(), Errc::kConfig);
  EXPECT_EQ(with("rope_scaling", json{{"rope_type", "yarn"}}).code(), Errc::kUnsupported);

  GgufModelWriter writer(path);
  const Tensor row = make_tensor(DType::kF16, {2, 2});
  EXPECT_EQ(error_of([&] { writer.add_tensor("model.other.weight", row.view()); }).code(),
            Errc::kUnsupported);
  writer.add_tensor("model.norm.weight", row.view());
  EXPECT_EQ(error_of([&] { writer.add_tensor("model.norm.weight", row.view()); }).code(),
            Errc::kConfig);
  const Tensor bytes = make_tensor(DType::kU8, {2, 2});
  EXPECT_EQ(error_of([&] { writer.add_tensor("lm_head.weight", bytes.view()); }).code(),
            Errc::kDtype);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(GgufModelWriter, RotaryScalingsComeBack) {
  const TempFolder folder;
  const std::string path = folder.path("out.gguf");
  const auto reader = open_gguf_reader(golden_file("tiny-q4_0.gguf"), {});
  const json llama3 = {{"rope_type", "llama3"},
                       {"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 8192}};
  for (const json& scaling : {llama3, json{{"rope_type", "linear"}, {"factor", 2.0}}}) {
    json config = json::parse(reader->config_json());
    config["rope_scaling"] = scaling;
    config["rope_theta"] = 500000.0;
    write_all(*reader, path, config.dump(), {});
    const json back = json::parse(open_gguf_reader(path, {})->config_json());
    EXPECT_EQ(back.at("rope_scaling"), scaling);
    EXPECT_EQ(back.at("rope_theta"), 500000.0);
  }
}

TEST(GgufNames, AreInverse) {
  std::vector<std::string> names = required_gguf_names(12);
  names.insert(names.end(), {"output.weight", "blk.3.attn_q.bias", "blk.11.ffn_up.bias"});
  for (const std::string& name : names) {
    EXPECT_EQ(gguf_name(hf_name(name)), name);
    EXPECT_FALSE(hf_name(name).empty());
  }
  for (const char* foreign : {"", "blk.", "blk.x.attn_q.weight", "blk.1.attn_q", "output"}) {
    EXPECT_EQ(hf_name(foreign), "");
    EXPECT_EQ(gguf_name(foreign), "");
  }
}

// ------------------------------------------------------------------ tokenizers

const GgufPair* find(const std::vector<GgufPair>& pairs, const std::string& key) {
  for (const GgufPair& pair : pairs) {
    if (pair.key == key) return &pair;
  }
  return nullptr;
}

std::vector<GgufValue> list(const std::vector<GgufPair>& pairs, const std::string& key) {
  const GgufPair* pair = find(pairs, key);
  if (pair == nullptr) return {};
  return std::get<std::shared_ptr<GgufArray>>(pair->value)->values;
}

json byte_level_tokenizer() {
  return {{"added_tokens",
           {{{"id", 0}, {"content", "<s>"}, {"special", true}},
            {{"id", 5}, {"content", "tool"}, {"special", false}}}},
          {"normalizer", nullptr},
          {"pre_tokenizer",
           {{"type", "Sequence"},
            {"pretokenizers",
             {{{"type", "Digits"}, {"individual_digits", true}},
              {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}}}}},
          {"model",
           {{"type", "BPE"},
            {"vocab", {{"<s>", 0}, {"a", 1}, {"b", 2}, {"ab", 3}, {"abb", 4}}},
            {"merges", {"a b", json::array({"ab", "b"})}}}}};
}

TEST(GgufTokenizer, ByteLevelBpe) {
  const json settings = {{"bos_token", "<s>"},
                         {"eos_token", {{"content", "tool"}}},
                         {"add_bos_token", true},
                         {"chat_template", {{{"name", "default"}, {"template", "T"}}}}};
  const auto pairs = gguf_tokenizer_pairs({{"tokenizer.json", byte_level_tokenizer().dump()},
                                           {"tokenizer_config.json", settings.dump()}},
                                          R"({"pad_token_id": 2})", 7);
  const auto value = [&](const char* key) { return find(pairs, key)->value; };
  EXPECT_EQ(value("tokenizer.ggml.model"), GgufValue(std::string("gpt2")));
  EXPECT_EQ(value("tokenizer.ggml.pre"), GgufValue(std::string("smollm")));
  EXPECT_EQ(list(pairs, "tokenizer.ggml.tokens"),
            (std::vector<GgufValue>{std::string("<s>"), std::string("a"), std::string("b"),
                                    std::string("ab"), std::string("abb"), std::string("tool"),
                                    std::string("[PAD6]")}));
  using I = std::int64_t;
  EXPECT_EQ(list(pairs, "tokenizer.ggml.token_type"),
            (std::vector<GgufValue>{I{3}, I{1}, I{1}, I{1}, I{1}, I{4}, I{5}}));
  EXPECT_EQ(list(pairs, "tokenizer.ggml.merges"),
            (std::vector<GgufValue>{std::string("a b"), std::string("ab b")}));
  EXPECT_EQ(value("tokenizer.ggml.bos_token_id"), GgufValue(std::uint64_t{0}));
  EXPECT_EQ(value("tokenizer.ggml.eos_token_id"), GgufValue(std::uint64_t{5}));
  EXPECT_EQ(value("tokenizer.ggml.padding_token_id"), GgufValue(std::uint64_t{2}));
  EXPECT_EQ(value("tokenizer.ggml.add_bos_token"), GgufValue(true));
  EXPECT_EQ(value("tokenizer.chat_template"), GgufValue(std::string("T")));
  EXPECT_EQ(find(pairs, "tokenizer.ggml.unknown_token_id"), nullptr);
}

TEST(GgufTokenizer, SentencePieceLikeBpe) {
  const json tokenizer = {
      {"added_tokens",
       {{{"id", 0}, {"content", "<unk>"}, {"special", true}},
        {{"id", 1}, {"content", "<s>"}, {"special", true}}}},
      {"normalizer",
       {{"type", "Sequence"},
        {"normalizers", {{{"type", "Prepend"}, {"prepend", "\u2581"}}, {{"type", "Replace"}}}}}},
      {"post_processor",
       {{"type", "TemplateProcessing"},
        {"single", {{{"SpecialToken", {{"id", "<s>"}}}}, {{"Sequence", {{"id", "A"}}}}}}}},
      {"model",
       {{"type", "BPE"},
        {"byte_fallback", true},
        {"unk_token", "<unk>"},
        {"vocab", {{"<unk>", 0}, {"<s>", 1}, {"<0x0A>", 2}, {"a", 3}, {"aa", 4}, {"aaa", 5}}},
        {"merges", {"a a", "aa a", "a aa"}}}}};
  const auto pairs = gguf_tokenizer_pairs({{"tokenizer.json", tokenizer.dump()}}, "{}", 6);
  const auto value = [&](const char* key) { return find(pairs, key)->value; };
  EXPECT_EQ(value("tokenizer.ggml.model"), GgufValue(std::string("llama")));
  using I = std::int64_t;
  EXPECT_EQ(list(pairs, "tokenizer.ggml.token_type"),
            (std::vector<GgufValue>{I{2}, I{3}, I{6}, I{1}, I{1}, I{1}}));
  EXPECT_EQ(list(pairs, "tokenizer.ggml.scores"),
            (std::vector<GgufValue>{0.0, 0.0, 0.0, -1e6, -0.0, -1.0}));
  EXPECT_EQ(value("tokenizer.ggml.add_bos_token"), GgufValue(true));
  EXPECT_EQ(value("tokenizer.ggml.add_eos_token"), GgufValue(false));
  EXPECT_EQ(value("tokenizer.ggml.add_space_prefix"), GgufValue(true));
}

TEST(GgufTokenizer, RefusesWhatHasNoForm) {
  const auto code = [](const json& tokenizer, std::int64_t vocab = 7) {
    return error_of([&] {
             gguf_tokenizer_pairs({{"tokenizer.json", tokenizer.dump()}}, "{}", vocab);
           })
        .code();
  };
  json changed = byte_level_tokenizer();
  changed["model"]["type"] = "Unigram";
  EXPECT_EQ(code(changed), Errc::kUnsupported);
  changed = byte_level_tokenizer();
  changed["pre_tokenizer"]["pretokenizers"][0] = {{"type", "Split"}, {"pattern", {{"Regex", "x"}}}};
  EXPECT_EQ(code(changed), Errc::kUnsupported);
  changed = byte_level_tokenizer();
  changed["model"]["merges"] = {"a"};
  EXPECT_EQ(code(changed), Errc::kCorrupt);
  changed["model"]["merges"] = 7;
  EXPECT_EQ(code(changed), Errc::kUnsupported);
  EXPECT_EQ(code(byte_level_tokenizer(), 5), Errc::kCorrupt);  // an id beyond the embedding
  changed = byte_level_tokenizer();
  changed["model"]["vocab"]["a"] = -1;
  EXPECT_EQ(code(changed), Errc::kCorrupt);
  changed["model"]["vocab"] = json::array();
  EXPECT_EQ(code(changed), Errc::kUnsupported);
  EXPECT_EQ(error_of([] {
              gguf_tokenizer_pairs({{"tokenizer.gguf", "GGUF"}}, "{}", 7);
            }).code(),
            Errc::kCorrupt);
  const auto none = gguf_tokenizer_pairs({}, "{}", 7);
  EXPECT_EQ(find(none, "tokenizer.ggml.model")->value, GgufValue(std::string("none")));
}

}  // namespace
}  // namespace quantal::testing
