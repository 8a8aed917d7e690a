#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "checkpoint/sha256.h"
#include "io/gguf_builder.h"
#include "io/temp_folder.h"
#include "quantal/checkpoint.h"
#include "support/golden.h"

namespace quantal {
namespace {

using nlohmann::json;
using testing::GgufBuilder;
using testing::golden_path;
using testing::TempFolder;

/// Splits every range into many small pieces, so that pieces are really put together.
class ManyPieces : public Executor {
 public:
  int num_threads() const override { return 3; }
  void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t,
                    const std::function<void(std::int64_t, std::int64_t)>& body) const override {
    for (std::int64_t at = begin; at < end; at += 3) body(at, std::min(at + 3, end));
  }
};

std::int64_t rows_of(const ModelSource::Info& info) {
  std::int64_t rows = 1;
  for (std::size_t d = 0; d + 1 < info.shape.size(); ++d) rows *= info.shape[d];
  return rows;
}

std::vector<float> read_all(const ModelSource& source, const ModelSource::Info& info,
                            const Executor& executor = serial_executor()) {
  std::vector<float> out(static_cast<std::size_t>(checked_numel(info.shape, "test")));
  source.read_rows(info.name, 0, rows_of(info), DType::kF32, out.data(), executor);
  return out;
}

std::string sha256_of(const std::vector<float>& values) {
  checkpoint::Sha256 hash;
  hash.update({reinterpret_cast<const std::uint8_t*>(values.data()), values.size() * 4});
  return hash.hex();
}

class GoldenSource : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenSource, TensorsEqualUpstreamBitForBit) {
  std::ifstream in(golden_path("vectors/checkpoint_expected.json"));
  const json expected = json::parse(in).at(GetParam());
  const auto source = ModelSource::open(golden_path("checkpoints/" + std::string(GetParam())));
  EXPECT_EQ(source->tensors().size(), expected.size());
  for (const auto& info : source->tensors()) {
    SCOPED_TRACE(info.name);
    const json& one = expected.at(info.name);
    EXPECT_EQ(info.shape, one.at("shape").get<std::vector<std::int64_t>>());
    EXPECT_EQ(sha256_of(read_all(*source, info)), one.at("sha256_f32").get<std::string>());
    EXPECT_EQ(read_all(*source, info), read_all(*source, info, ManyPieces()));
  }
}

INSTANTIATE_TEST_SUITE_P(Files, GoldenSource,
                         ::testing::Values("gguf/tiny-f16.gguf", "gguf/tiny-q8_0.gguf",
                                           "gguf/tiny-q4_0.gguf", "gguf/tiny-q4_1.gguf",
                                           "gguf/tiny-q5_0.gguf", "gguf/tiny-q5_1.gguf",
                                           "dense-bf16", "dense-bf16-sharded"));

TEST(ModelSource, ReadsPartsAndNarrows) {
  for (const char* name : {"gguf/tiny-q4_1.gguf", "dense-bf16-sharded"}) {
    SCOPED_TRACE(name);
    const auto source = ModelSource::open(golden_path("checkpoints/" + std::string(name)));
    for (const auto& info : source->tensors()) {
      if (info.name != "model.layers.0.self_attn.q_proj.weight") continue;
      const std::vector<float> all = read_all(*source, info);
      std::vector<float> part(5 * 64);
      source->read_rows(info.name, 11, 16, DType::kF32, part.data(), serial_executor());
      EXPECT_EQ(part, std::vector<float>(all.begin() + 11 * 64, all.begin() + 16 * 64));
      for (const DType dtype : {DType::kBF16, DType::kF16}) {
        std::vector<std::uint16_t> narrow(part.size()), by_hand(part.size());
        source->read_rows(info.name, 11, 16, dtype, narrow.data(), serial_executor());
        narrow_from_f32(dtype, part.data(), std::ssize(part), by_hand.data());
        EXPECT_EQ(narrow, by_hand);
      }
    }
  }
}

TEST(ModelSource, GgufConfigHasWhatALlamaConfigNeeds) {
  const auto source = ModelSource::open(golden_path("checkpoints/gguf/tiny-q4_0.gguf"));
  const json config = json::parse(source->config_json());
  const json expected = {{"architectures", {"LlamaForCausalLM"}},
                         {"model_type", "llama"},
                         {"hidden_size", 64},
                         {"intermediate_size", 128},
                         {"num_hidden_layers", 2},
                         {"num_attention_heads", 4},
                         {"num_key_value_heads", 2},
                         {"head_dim", 16},
                         {"hidden_act", "silu"},
                         {"rms_norm_eps", 1e-5},
                         {"rope_theta", 10000.0},
                         {"rope_scaling", nullptr},
                         {"max_position_embeddings", 128},
                         {"vocab_size", 256},
                         {"tie_word_embeddings", false},
                         {"attention_bias", false},
                         {"mlp_bias", false},
                         {"bos_token_id", 1},
                         {"eos_token_id", 2},
                         {"pad_token_id", nullptr},
                         {"torch_dtype", "float32"}};
  EXPECT_EQ(config, expected) << json::diff(expected, config).dump();
  const auto half = ModelSource::open(golden_path("checkpoints/gguf/tiny-f16.gguf"));
  EXPECT_EQ(json::parse(half->config_json()).at("torch_dtype"), "float16");
}

TEST(ModelSource, GgufTokenizerFacts) {
  const auto source = ModelSource::open(golden_path("checkpoints/gguf/tiny-q4_0.gguf"));
  const json facts = json::parse(source->tokenizer_json());
  EXPECT_EQ(facts.at("model"), "llama");
  EXPECT_EQ(facts.at("tokens").size(), 256u);
  EXPECT_EQ(facts.at("tokens")[1], "<s>");
  EXPECT_EQ(facts.at("scores")[4], -4.0);
  EXPECT_EQ(facts.at("token_type")[0], 2);
  EXPECT_EQ(facts.at("add_bos_token"), true);
  const auto folder = ModelSource::open(golden_path("checkpoints/dense-bf16"));
  EXPECT_EQ(folder->tokenizer_json(), "{}");
  EXPECT_EQ(json::parse(folder->config_json()).at("hidden_size"), 64);
}

/// A model with one tensor, of any architecture and with any extra pairs.
GgufBuilder tiny_header(const std::string& architecture, std::uint64_t tensors,
                        std::uint64_t more) {
  GgufBuilder b;
  b.header(tensors, 5 + more).string_pair("general.architecture", architecture);
  b.u32_pair("llama.embedding_length", 32).u32_pair("llama.attention.head_count", 2);
  b.u32_pair("llama.feed_forward_length", 64).u32_pair("llama.block_count", 1);
  return b;
}

class MadeGguf : public ::testing::Test {
 protected:
  std::unique_ptr<ModelSource> open(const GgufBuilder& b) {
    const std::string path = folder_.path("made.gguf");
    std::ofstream(path, std::ios::binary) << b.str();
    return ModelSource::open(path);
  }
  Error error_of(const GgufBuilder& b) {
    try {
      open(b);
    } catch (const Error& e) {
      return e;
    }
    ADD_FAILURE() << "accepted";
    return Error(Errc::kInternal, "accepted");
  }
  TempFolder folder_;
};

TEST_F(MadeGguf, BiasOfQIsPermutedLikeItsRows) {
  GgufBuilder b = tiny_header("llama", 2, 0);
  b.tensor("token_embd.weight", {32, 3}, 0, 0).tensor("blk.0.attn_q.bias", {8}, 0, 384).pad();
  b.data(384);
  for (int i = 0; i < 8; ++i) {
    const float value = static_cast<float>(i);
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, 4);
    b.u32(bits);
  }
  const auto source = open(b);
  float out[8];
  const std::string name = "model.layers.0.self_attn.q_proj.bias";
  source->read_rows(name, 0, 1, DType::kF32, out, serial_executor());
  // Head of four rows: HF order is the even stored rows, then the odd ones.
  const float expected[8] = {0, 2, 1, 3, 4, 6, 5, 7};
  EXPECT_EQ(std::memcmp(out, expected, sizeof out), 0);
  EXPECT_EQ(json::parse(source->config_json()).at("attention_bias"), true);
  EXPECT_EQ(json::parse(source->config_json()).at("tie_word_embeddings"), true);
  EXPECT_EQ(json::parse(source->config_json()).at("vocab_size"), 3);
}

TEST_F(MadeGguf, RefusesSizesThatTheTensorsContradict) {
  const auto claim_error = [this](const std::string& name, std::uint64_t rows) {
    GgufBuilder b = tiny_header("llama", 1, 1).u32_pair("llama.vocab_size", 3);
    b.tensor(name, {32, rows}, 0, 0).pad().data(32 * rows * 4);
    return error_of(b);
  };
  // The header claims one block, a feed-forward of 64 and two heads of 16.
  const Error blocks = claim_error("blk.3.ffn_up.weight", 64);
  EXPECT_EQ(blocks.code(), Errc::kCorrupt);
  EXPECT_EQ(blocks.site().tensor, "llama.block_count");
  EXPECT_NE(std::string(blocks.what()).find("gives 1, expected 4 as blocks that have tensors"),
            std::string::npos);
  EXPECT_EQ(claim_error("blk.0.ffn_up.weight", 32).site().tensor, "llama.feed_forward_length");
  EXPECT_EQ(claim_error("blk.0.attn_q.weight", 64).site().tensor, "llama.attention.head_count");
  EXPECT_EQ(claim_error("blk.0.attn_k.weight", 64).site().tensor, "llama.attention.head_count_kv");
}

TEST_F(MadeGguf, RefusesForeignOrContradictingModels) {
  const auto weight = [](GgufBuilder b, const std::string& name, std::uint64_t rows) {
    b.tensor(name, {32, rows}, 0, 0).pad().data(32 * rows * 4);
    return b;
  };
  const Error qwen = error_of(weight(tiny_header("qwen2", 1, 0), "token_embd.weight", 3));
  EXPECT_EQ(qwen.code(), Errc::kUnsupported);
  EXPECT_NE(std::string(qwen.what()).find("qwen2"), std::string::npos);
  const Error expert = error_of(weight(tiny_header("llama", 1, 1).u32_pair("llama.vocab_size", 3),
                                       "blk.0.ffn_gate_exps.weight", 4));
  EXPECT_EQ(expert.code(), Errc::kUnsupported);
  EXPECT_EQ(expert.site().tensor, "blk.0.ffn_gate_exps.weight");
  GgufBuilder odd = tiny_header("llama", 1, 1).u32_pair("llama.vocab_size", 3);
  odd.tensor("blk.0.attn_q.bias", {6}, 0, 0).pad().data(6 * 4);
  const Error heads = error_of(odd);
  EXPECT_EQ(heads.code(), Errc::kCorrupt);
  EXPECT_NE(std::string(heads.what()).find("multiple of 2 * 2 heads"), std::string::npos);
  EXPECT_EQ(error_of(weight(tiny_header("llama", 1, 1).u32_pair("llama.attention.head_count_kv", 0),
                            "token_embd.weight", 3))
                .code(),
            Errc::kCorrupt);
  EXPECT_EQ(error_of(weight(tiny_header("llama", 1, 1).string_pair("llama.context_length", "x"),
                            "token_embd.weight", 3))
                .code(),
            Errc::kCorrupt);
  EXPECT_EQ(
      error_of(weight(tiny_header("llama", 1, 1).string_pair("llama.rope.scaling.type", "yarn"),
                      "token_embd.weight", 3))
          .code(),
      Errc::kUnsupported);
  GgufBuilder nothing;
  nothing.header(0, 0);
  EXPECT_EQ(error_of(nothing).code(), Errc::kUnsupported);
}

TEST_F(MadeGguf, RotaryFactorsOfLlama3BecomeRopeScaling) {
  const auto with_factors = [](float middle) {
    GgufBuilder b = tiny_header("llama", 2, 1);
    b.text("llama.rope.freq_base").u32(6).u32(0x48F42400u);  // 500000
    b.tensor("token_embd.weight", {32, 3}, 0, 0).tensor("rope_freqs.weight", {8}, 0, 384).pad();
    b.data(384);
    // head_dim 16: wavelengths 6.3, 32, 167, 861, 4443, 22915 ... ; the fifth lies in the mixed
    // band.
    const float factors[8] = {1, 1, 1, 1, middle, 8, 8, 8};
    for (const float value : factors) {
      std::uint32_t bits = 0;
      std::memcpy(&bits, &value, 4);
      b.u32(bits);
    }
    return b;
  };
  const double smooth = (8192.0 / (2 * 3.14159265358979 * std::sqrt(500000.0)) - 1) / 3;
  const float middle = static_cast<float>(1 / ((1 - smooth) / 8 + smooth));
  const json config = json::parse(open(with_factors(middle))->config_json());
  EXPECT_EQ(config.at("rope_scaling").at("rope_type"), "llama3");
  EXPECT_EQ(config.at("rope_scaling").at("factor"), 8.0);
  EXPECT_EQ(config.at("rope_theta"), 500000.0);
  EXPECT_EQ(error_of(with_factors(2 * middle)).code(), Errc::kUnsupported);
}

TEST(ModelSource, ErrorsNameWhatIsWrong) {
  const auto source = ModelSource::open(golden_path("checkpoints/gguf/tiny-q4_0.gguf"));
  float out[64];
  const auto code_of = [&](const std::string& name, std::int64_t begin, std::int64_t end,
                           DType dtype) {
    try {
      source->read_rows(name, begin, end, dtype, out, serial_executor());
    } catch (const Error& e) {
      EXPECT_EQ(e.site().tensor, name);
      return e.code();
    }
    return Errc::kInternal;
  };
  EXPECT_EQ(code_of("no.such.tensor", 0, 1, DType::kF32), Errc::kConfig);
  EXPECT_EQ(code_of("model.norm.weight", 0, 2, DType::kF32), Errc::kShape);
  EXPECT_EQ(code_of("model.norm.weight", -1, 1, DType::kF32), Errc::kShape);
  EXPECT_EQ(code_of("model.norm.weight", 1, 0, DType::kF32), Errc::kShape);
  EXPECT_EQ(code_of("model.norm.weight", 0, 1, DType::kU8), Errc::kDtype);
  EXPECT_THROW(ModelSource::open("/nonexistent/model.gguf"), Error);
  const TempFolder empty;
  try {
    ModelSource::open(empty.path());
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Errc::kIo);
    EXPECT_NE(std::string(e.what()).find("No checkpoint found in " + empty.path()),
              std::string::npos);
    EXPECT_NE(std::string(e.what()).find("model.safetensors.index.json"), std::string::npos);
  }
}

TEST(ModelSource, LyingIndexIsRefused) {
  const TempFolder folder;
  const auto code_of = [&](const std::string& index) {
    std::ofstream(folder.path("model.safetensors.index.json")) << index;
    try {
      ModelSource::open(folder.path());
    } catch (const Error& e) {
      return e.code();
    }
    return Errc::kInternal;
  };
  const Tensor byte = make_tensor(DType::kU8, {1});
  const std::vector<std::pair<std::string, TensorView>> tensors = {{"a", byte.view()}};
  write_safetensors(folder.path("one.safetensors"), tensors);
  EXPECT_EQ(code_of(R"({"weight_map":{"a":"one.safetensors"}})"), Errc::kInternal);
  EXPECT_EQ(code_of(R"({"weight_map":{"b":"one.safetensors"}})"), Errc::kCorrupt);
  EXPECT_EQ(code_of(R"({"weight_map":{"a":"../one.safetensors"}})"), Errc::kCorrupt);
  EXPECT_EQ(code_of(R"({"weight_map":{"a":".."}})"), Errc::kCorrupt);
  EXPECT_EQ(code_of(R"({"weight_map":{"a":7}})"), Errc::kCorrupt);
  EXPECT_EQ(code_of(R"({"weight_map":[]})"), Errc::kCorrupt);
  EXPECT_EQ(code_of(R"({"weight_map":{"a":"two.safetensors"}})"), Errc::kIo);
  EXPECT_EQ(code_of("{}"), Errc::kCorrupt);
  EXPECT_EQ(code_of("[1"), Errc::kCorrupt);
  EXPECT_EQ(code_of(std::string(100000, '[')), Errc::kCorrupt);
}

}  // namespace
}  // namespace quantal
