// Peak memory of loading and of conversion, on models whose layers are large enough to be seen.
// Counted twice: what operator new handed out, and the sampled anonymous memory of the process.
#include <malloc.h>

#include "checkpoint/support.h"
#include "kernels/support.h"
#include "support/allocation.h"
#include "support/anonymous_memory.h"

namespace quantal {
namespace {

namespace fs = std::filesystem;
using testing::AllocationPeak;
using testing::AnonymousPeak;
using testing::TempFolder;

constexpr std::int64_t kMiB = 1 << 20;

/// A llama of one block; its feed-forward layers are 9 MiB at 4 bits, 32 MiB in bf16.
constexpr std::int64_t kHidden = 1024, kInner = 16384, kVocabulary = 64;
constexpr const char* kConfig =
    R"({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024,
        "intermediate_size": 16384, "num_hidden_layers": 1, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 2048, "hidden_act": "silu",
        "tie_word_embeddings": true, "torch_dtype": "bfloat16"})";

Tensor random_weight(std::int64_t rows, std::int64_t cols) {
  testing::Random random(7);
  Tensor t = make_tensor(DType::kBF16, {rows, cols});
  auto* out = reinterpret_cast<std::uint16_t*>(t.bytes.data());
  for (std::int64_t i = 0; i < rows * cols; ++i) out[i] = f32_to_bf16(random.uniform(-0.1F, 0.1F));
  return t;
}

QuantizeOptions options_of(const std::string& dialect) {
  QuantizeOptions o;
  o.method = QuantizationMethod::NONE;
  o.group_size = dialect == "gguf" ? 32 : 64;
  o.value_dtype = DType::kBF16;
  o.optimize = false;
  o.double_quant = false;
  o.mode = dialect == "gguf" ? "Q4_1" : "";
  if (dialect == "bnb") o.method = QuantizationMethod::BNB_NF4;
  if (dialect == "hqq") o.method = QuantizationMethod::HQQ;
  if (dialect == "quanto") o.method = QuantizationMethod::QUANTO_INT4;
  return o;
}

/// What is written of a model. One matrix stands under many names: making it takes little.
struct Model {
  std::int64_t packed = 0;  ///< bytes of all packed layers
  std::int64_t layer = 0;   ///< bytes of the largest of them
};

class Writer {
 public:
  Writer(const std::string& dialect, const std::string& config) : name_(dialect) {
    view_.config_json = config;
  }
  void dense(const std::string& name, const Tensor& tensor) {
    view_.tensors.emplace_back(name, tensor.view());
  }
  /// Layers of one weight.
  void layers(const std::vector<std::string>& names, const Tensor& weight) {
    if (name_ == "dense") {
      for (const std::string& name : names) dense(name + ".weight", weight);
      return;
    }
    matrices_.push_back(
        std::make_unique<PackedMatrix>(quantize(weight.view(), dialect_by_name(name_), options())));
    const PackedMatrix& w = *matrices_.back();
    for (const std::string& name : names) view_.layers.emplace_back(name, w.view());
    const auto bytes = static_cast<std::int64_t>(w.codes.size() + w.stats.size());
    model_.packed += bytes * std::ssize(names);
    model_.layer = std::max(model_.layer, bytes);
  }
  Model save(const std::string& path, const std::string& layout) {
    save_checkpoint(path, view_, {.layout = layout});
    return model_;
  }

 private:
  QuantizeOptions options() const { return options_of(name_); }

  std::string name_;
  CheckpointView view_;
  std::vector<std::unique_ptr<PackedMatrix>> matrices_;
  Model model_;
};

/// A whole llama of one block.
Model write_llama(const std::string& path, const std::string& dialect, const std::string& layout) {
  const Tensor embedding = random_weight(kVocabulary, kHidden),
               square = random_weight(kHidden, kHidden);
  const Tensor up = random_weight(kInner, kHidden), down = random_weight(kHidden, kInner);
  Tensor norm = random_weight(1, kHidden);
  norm.shape = {kHidden};
  Writer writer(dialect, kConfig);
  const std::string block = "model.layers.0.";
  writer.dense("model.embed_tokens.weight", embedding);
  for (const char* name : {"model.norm.weight", "model.layers.0.input_layernorm.weight",
                           "model.layers.0.post_attention_layernorm.weight"}) {
    writer.dense(name, norm);
  }
  writer.layers({block + "self_attn.q_proj", block + "self_attn.k_proj", block + "self_attn.v_proj",
                 block + "self_attn.o_proj"},
                square);
  writer.layers({block + "mlp.gate_proj", block + "mlp.up_proj"}, up);
  writer.layers({block + "mlp.down_proj"}, down);
  return writer.save(path, layout);
}

class MemoryTest {
 protected:
  /// Freed blocks go back at once, so that sampled memory is memory in use.
  MemoryTest() { ::mallopt(M_MMAP_THRESHOLD, 1 << 18); }

  /// Runs `body`; its peak is at most `most` bytes.
  static void expect_within(std::int64_t most, const std::function<void()>& body) {
    AnonymousPeak sampled;
    const AllocationPeak counted;
    body();
    EXPECT_LE(static_cast<std::int64_t>(counted.bytes()), most) << "operator new";
#if !defined(__SANITIZE_ADDRESS__)  // it keeps freed blocks back
    EXPECT_LE(sampled.stop(), most + 2 * kMiB) << "anonymous";
#endif
  }
};

struct Stored {
  const char* dialect;
  const char* layout;
};
std::ostream& operator<<(std::ostream& out, const Stored& s) {
  return out << s.dialect << "_" << s.layout;
}

class LoadMemory : public ::testing::TestWithParam<Stored>, protected MemoryTest {};

/// 12 layers of 4 MiB and an embedding of 32 MiB, which stays in the mapping.
TEST_P(LoadMemory, PackedSizeAndOneLayer) {
  const TempFolder temp;
  Model model;
  {
    const Tensor embedding = random_weight(8192, 2048), weight = random_weight(4096, 2048);
    Writer writer(GetParam().dialect, R"({"model_type": "llama", "hidden_size": 2048,
        "intermediate_size": 4096, "vocab_size": 8192, "torch_dtype": "bfloat16"})");
    std::vector<std::string> names;
    for (int i = 0; i < 12; ++i) {
      names.push_back("model.layers." + std::to_string(i) + ".mlp.up_proj");
    }
    writer.dense("model.embed_tokens.weight", embedding);
    writer.layers(names, weight);
    model = writer.save(temp.path("m"), GetParam().layout);
  }
  if (model.packed > 0) EXPECT_GT(model.packed, 48 * kMiB);
  for (const bool threads : {false, true}) {
    SCOPED_TRACE(threads ? "4 threads" : "1 thread");
    const testing::ThreadExecutor executor;
    LoadOptions options;
    if (threads) options.executor = &executor;
    // Beside the layers, per thread one that is being imported.
    expect_within(model.packed + (threads ? 4 : 1) * 5 * model.layer / 2 + kMiB, [&] {
      const Checkpoint loaded = load_checkpoint(temp.path("m"), options);
      EXPECT_EQ(loaded.layers.size() + loaded.tensors.size(), 13u);
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, LoadMemory,
                         ::testing::Values(Stored{"bnb", "transformers"}, Stored{"hqq", "qmodel"},
                                           Stored{"mlx", "npz"}, Stored{"quanto", "quanto"},
                                           Stored{"dense", "torch"},
                                           Stored{"dense", "transformers"}));

struct Edge {
  const char* from;
  const char* layout;
  const char* to;
};
std::ostream& operator<<(std::ostream& out, const Edge& e) {
  return out << e.from << "_to_" << e.to;
}

class ConvertMemory : public ::testing::TestWithParam<Edge>, protected MemoryTest {};

TEST_P(ConvertMemory, ThreeTimesTheLargestTensor) {
  const TempFolder temp;
  const std::string from = GetParam().from, to = GetParam().to;
  const std::string source = temp.path(from == "gguf" ? "m.gguf" : "m");
  const Model model = write_llama(source, from, GetParam().layout);
  ConvertOptions options{.to = to};
  options.quantize.optimize = false;
  options.quantize.double_quant = false;
  // A packed layer, or where one side is dense the weight in bf16; and slices of constant size.
  const bool dense = from == "dense" || to == "dense";
  const std::int64_t largest = dense ? kInner * kHidden * 2 : model.layer;
  expect_within(3 * largest + 9 * kMiB,
                [&] { convert(source, temp.path(to == "gguf" ? "out.gguf" : "out"), options); });
}

INSTANTIATE_TEST_SUITE_P(
    Edges, ConvertMemory,
    ::testing::Values(Edge{"gguf", "gguf", "mlx"}, Edge{"mlx", "mlx-lm", "gguf"},
                      Edge{"mlx", "npz", "quanto"}, Edge{"quanto", "quanto", "mlx"},
                      Edge{"hqq", "hqq", "mlx"}, Edge{"bnb", "transformers", "hqq"},
                      Edge{"hqq", "qmodel", "bnb"}, Edge{"bnb", "transformers", "bnb"},
                      Edge{"bnb", "guide", "dense"}, Edge{"dense", "transformers", "bnb"},
                      Edge{"dense", "torch", "gguf"}, Edge{"dense", "transformers", "quanto"},
                      Edge{"dense", "torch", "dense"}),
    [](const auto& info) {
      std::stringstream name;
      name << info.param;
      return name.str();
    });

}  // namespace
}  // namespace quantal
