// Conversion of whole models: statements, values, files beside the weights, failures.
#include <algorithm>
#include <cmath>

#include "checkpoint/convert_plan.h"
#include "checkpoint/support.h"

namespace quantal {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::error_of;
using testing::golden_path;
using testing::TempFolder;
using testing::view_of;

std::string model_path(const std::string& name) { return golden_path("checkpoints/" + name); }

const char* const kSources[] = {
    "bnb-nf4-double", "bnb-int8", "hqq-pt-4bit", "hqq-pt-2bit",         "quanto-int4",
    "quanto-int8",    "mlx-4bit", "mlx-mixed",   "gguf/tiny-q4_1.gguf", "gguf/tiny-q8_0.gguf"};
const char* const kTargets[] = {"bnb", "hqq", "mlx", "quanto", "gguf", "dense"};

double error_between(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(b[i]) - static_cast<double>(a[i]), 2);
    norm += std::pow(static_cast<double>(a[i]), 2);
  }
  return std::sqrt(difference / norm);
}

using Edge = std::tuple<const char*, const char*>;
class EveryPair : public ::testing::TestWithParam<Edge> {};

/// Whatever the report says about a layer is true of the files.
TEST_P(EveryPair, ReportIsTrueOfTheFiles) {
  const auto& [source, target] = GetParam();
  const TempFolder temp;
  const bool gguf = std::string(target) == "gguf";
  const std::string to = temp.path(gguf ? "model.gguf" : "model");
  ConvertOptions options{.to = target};
  options.dense_dtype = DType::kF32;
  ConvertReport report;
  try {
    report = convert(model_path(source), to, options);
  } catch (const Error& e) {  // transformers has no folder of 4- and 8-bit layers
    EXPECT_EQ(std::string(source) + " " + target, "mlx-mixed bnb") << e.what();
    EXPECT_EQ(e.code(), Errc::kUnsupported) << e.what();
    EXPECT_TRUE(fs::is_empty(temp.path()));
    return;
  }
  const Checkpoint before = load_checkpoint(model_path(source)), after = load_checkpoint(to);
  EXPECT_EQ(after.layout, report.layout);
  EXPECT_TRUE(report.measured);
  EXPECT_GE(report.layers.size(), 14u);
  for (const ConvertReport::Layer& layer : report.layers) {
    SCOPED_TRACE(layer.name + ": " + layer.from + " to " + layer.to);
    const std::vector<float> a = testing::values_of(before, layer.name + ".weight");
    const std::vector<float> b = testing::values_of(after, layer.name + ".weight");
    ASSERT_EQ(a.size(), b.size());
    const double error = error_between(a, b);
    if (layer.kept.values && layer.kept.values_dtype == DType::kF32) EXPECT_TRUE(a == b);
    // The measure is relative to the old or the new norm; they differ by the error itself.
    EXPECT_NEAR(error, layer.relative_error, 0.35 * error + 1e-6);
    EXPECT_LT(error, layer.to.find(" 2-bit") == std::string::npos ? 0.15 : 0.6);
  }
  std::size_t tensors = 0;
  for (const auto& [name, tensor] : before.tensors) {
    if (after.tensors.count(name) == 0) continue;  // quantized
    EXPECT_TRUE(testing::values_of(before, name) == testing::values_of(after, name)) << name;
    ++tensors;
  }
  EXPECT_GE(tensors, static_cast<std::size_t>(report.copied));
  EXPECT_EQ(before.layers.size() + before.tensors.size(),
            after.layers.size() + after.tensors.size());
}

INSTANTIATE_TEST_SUITE_P(Convert, EveryPair,
                         ::testing::Combine(::testing::ValuesIn(kSources),
                                            ::testing::ValuesIn(kTargets)),
                         [](const auto& info) {
                           std::string name = std::string(std::get<0>(info.param)) + "_to_" +
                                              std::get<1>(info.param);
                           for (char& c : name) {
                             if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
                           }
                           return name;
                         });

/// A dense source: linear layers are quantized, what stays is copied; dense to dense copies all.
TEST(Convert, DenseSources) {
  for (const char* source : {"dense-bf16", "gguf/tiny-f16.gguf"}) {
    for (const char* target : kTargets) {
      SCOPED_TRACE(std::string(source) + " to " + target);
      const TempFolder temp;
      const std::string to = temp.path(std::string(target) == "gguf" ? "m.gguf" : "m");
      const ConvertReport report = convert(model_path(source), to, {.to = target});
      const Checkpoint before = load_checkpoint(model_path(source)), after = load_checkpoint(to);
      EXPECT_EQ(after.layers.size(), std::string(target) == "dense" ? 0u : 14u);
      EXPECT_EQ(report.layers.size(), after.layers.size());
      EXPECT_EQ(report.copied, std::ssize(before.tensors) - std::ssize(after.layers));
      for (const auto& layer : report.layers) {
        EXPECT_GT(layer.relative_error, 0) << layer.name;
        EXPECT_LT(layer.relative_error, 0.15) << layer.name;
      }
      for (const auto& [name, tensor] : after.tensors) {
        EXPECT_TRUE(testing::values_of(before, name) == testing::values_of(after, name)) << name;
      }
    }
  }
}

/// Every golden checkpoint decodes to upstream's own values.
TEST(Convert, DecodedModelsHaveUpstreamsValues) {
  for (const testing::GoldenModel& model : testing::kGoldenModels) {
    if (!fs::is_directory(model_path(model.path))) continue;
    SCOPED_TRACE(model.path);
    const TempFolder temp;
    ConvertOptions options{.to = "dense"};
    options.dense_dtype = DType::kF32;
    convert(model_path(model.path), temp.path("m"), options);
    const Checkpoint dense = load_checkpoint(temp.path("m"));
    EXPECT_TRUE(dense.layers.empty());
    for (const auto& [name, one] : testing::expected_values().at(model.expected).items()) {
      EXPECT_EQ(testing::sha_of(testing::values_of(dense, name)),
                one.at("sha256_f32").get<std::string>())
          << name;
    }
    EXPECT_FALSE(json::parse(dense.config_json).contains("quantization_config"));
  }
}

/// Without a request decoded weights are of the dtype that config.json names; with one it names
/// that.
TEST(Convert, DecodedWeightsHaveTheDtypeOfTheModel) {
  const std::string name = "model.layers.0.mlp.up_proj.weight";
  const auto dtype_of = [&](const std::string& path) {
    return load_checkpoint(path).tensors.at(name).dtype;
  };
  for (const auto& [source, expected] :
       {std::pair{"mlx-4bit", DType::kBF16}, std::pair{"gguf/tiny-q4_1.gguf", DType::kF32},
        std::pair{"bnb-fp4-f16", DType::kF16}}) {
    SCOPED_TRACE(source);
    const TempFolder temp;
    convert(model_path(source), temp.path("a"), {.to = "dense"});
    EXPECT_EQ(dtype_of(temp.path("a")), expected);
    ConvertOptions options{.to = "dense"};
    options.dense_dtype = DType::kF16;
    convert(model_path(source), temp.path("b"), options);
    EXPECT_EQ(dtype_of(temp.path("b")), DType::kF16);
    const json config = json::parse(load_checkpoint(temp.path("b")).config_json);
    EXPECT_EQ(config.contains("dtype") ? config["dtype"] : config["torch_dtype"], "float16");
  }
  const TempFolder temp;  // an embedding that the target does not pack
  convert(model_path("mlx-4bit"), temp.path("m"), {.to = "bnb"});
  EXPECT_EQ(load_checkpoint(temp.path("m")).tensors.at("model.embed_tokens.weight").dtype,
            DType::kBF16);
}

TEST(Convert, Q4_1ToMlxIsExact) {
  const TempFolder temp;
  ConvertOptions options{.to = "mlx"};
  options.lossless_only = true;
  const ConvertReport report = convert(model_path("gguf/tiny-q4_1.gguf"), temp.path("m"), options);
  EXPECT_TRUE(report.lossless()) << report.text();
  const Checkpoint made = load_checkpoint(temp.path("m"));
  for (const auto& [name, one] : testing::expected_values().at("gguf/tiny-q4_1.gguf").items()) {
    EXPECT_EQ(testing::sha_of(testing::values_of(made, name)),
              one.at("sha256_f32").get<std::string>())
        << name;
  }
  EXPECT_TRUE(made.layers.contains("model.embed_tokens"));
  EXPECT_EQ(json::parse(made.config_json).at("quantization").at("group_size"), 32);
}

/// Same dialect, other layout: nothing is touched.
TEST(Convert, LayoutsOfOneDialectKeepEveryByte) {
  const TempFolder temp;
  ConvertOptions options{.to = "hqq"};
  options.save.layout = "transformers";
  const ConvertReport report = convert(model_path("hqq-pt-4bit"), temp.path("m"), options);
  EXPECT_TRUE(report.lossless());
  EXPECT_EQ(report.layers.front().kept.note, "unchanged");
  const Checkpoint a = load_checkpoint(model_path("hqq-pt-4bit")),
                   b = load_checkpoint(temp.path("m"));
  for (const auto& [name, layer] : a.layers) {
    EXPECT_EQ(b.layers.at(name).codes, layer.codes);
    EXPECT_EQ(b.layers.at(name).stats, layer.stats);
  }
}

TEST(Convert, PlanSaysWhatConvertDoes) {
  const ConvertOptions options{.to = "hqq"};
  const std::string source = model_path("gguf/tiny-q4_1.gguf");
  const ConvertReport plan = plan_convert(source, options);
  const TempFolder temp;
  const ConvertReport done = convert(source, temp.path("m"), options);
  ASSERT_EQ(plan.layers.size(), done.layers.size());
  EXPECT_EQ(plan.copied, done.copied);
  EXPECT_EQ(plan.layout, done.layout);
  EXPECT_FALSE(plan.measured);
  for (std::size_t i = 0; i < plan.layers.size(); ++i) {
    EXPECT_EQ(plan.layers[i].to, done.layers[i].to);
    EXPECT_EQ(plan.layers[i].kept.codes, done.layers[i].kept.codes);
    EXPECT_EQ(plan.layers[i].kept.statistics, done.layers[i].kept.statistics);
  }
  EXPECT_NE(plan.text().find("gguf Q4_1"), std::string::npos) << plan.text();
}

std::size_t lines(const std::string& text) {
  return static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
}

/// Layers differ in their measured bounds, not in what is said of them: one row, one sentence.
TEST(Convert, ReportsShareRows) {
  const TempFolder temp;
  convert(model_path("gguf/tiny-q4_1.gguf"), temp.path("hqq"), {.to = "hqq"});
  const ConvertReport back = convert(temp.path("hqq"), temp.path("back.gguf"), {.to = "gguf"});
  EXPECT_GT(back.layers.size(), 10u);
  // Layout, heading, one form, the dense tensors, an empty line, the rule.
  EXPECT_EQ(lines(back.text()), 6u) << back.text();
}

/// A plan looks at no values, so it promises nothing that depends on them.
TEST(Convert, PlansPromiseNothingThatDependsOnValues) {
  const std::string source = model_path("gguf/tiny-q8_0.gguf");
  ConvertOptions options{.to = "quanto"};
  options.dense_dtype = DType::kF32;
  const ConvertReport plan = plan_convert(source, options);
  EXPECT_TRUE(plan.layers.back().kept.values);
  EXPECT_FALSE(plan.lossless());
  EXPECT_NE(plan.text().find("copied if"), std::string::npos) << plan.text();
  EXPECT_NE(plan.text().find("decoded"), std::string::npos) << plan.text();
  const TempFolder temp;
  const ConvertReport done = convert(source, temp.path("m"), options);
  EXPECT_FALSE(done.lossless());
  EXPECT_EQ(done.text().find("copied"), done.text().find("copied as they are")) << done.text();
}

TEST(Convert, PlansKnowTheLayoutOfTheTarget) {
  const std::string source = model_path("hqq-pt-4bit");
  EXPECT_EQ(plan_convert(source, {.to = "dense"}).layout, "dense transformers");
  EXPECT_EQ(plan_convert(source, {.to = "dense"}, "x.pt").layout, "dense single-torch");
  EXPECT_EQ(error_of([&] { plan_convert(source, {.to = "mlx"}, "x.gguf"); }).code(), Errc::kConfig);
}

/// Words around an error do not repeat file and tensor.
TEST(Convert, ErrorsNameTheirPlaceOnce) {
  const TempFolder temp;
  ConvertOptions options{.to = "mlx"};
  options.quantize.bits = 7;
  const Error error = error_of([&] { plan_convert(model_path("hqq-pt-4bit"), options); });
  const std::string text = error.what();
  EXPECT_NE(text.find("model.layers.0.mlp.down_proj"), std::string::npos) << text;
  const Error inner(Errc::kIo, "disk is full", {.path = "a"});
  EXPECT_STREQ(checkpoint::with_context("layer: ", inner).what(), "layer: disk is full (file=a)");
  EXPECT_EQ(checkpoint::with_context("layer: ", inner).site().path, "a");
}

TEST(Convert, LosslessOnlyRefusesBeforeWriting) {
  const TempFolder temp;
  ConvertOptions options{.to = "hqq"};
  options.lossless_only = true;
  const Error error = error_of([&] { convert(model_path("bnb-nf4"), temp.path("m"), options); });
  EXPECT_EQ(error.code(), Errc::kUnsupported);
  EXPECT_EQ(error.site().tensor, "model.layers.0.mlp.down_proj") << error.what();
  EXPECT_FALSE(fs::exists(temp.path("m")));
  EXPECT_TRUE(fs::is_empty(temp.path()));
}

TEST(Convert, FilesBesideTheWeightsComeAlong) {
  const TempFolder temp;
  fs::copy(model_path("quanto-int4"), temp.path("source"));
  std::ofstream(temp.path("source/tokenizer.json")) << "{}";
  std::ofstream(temp.path("source/README.md")) << "about";
  std::ofstream(temp.path("source/other.safetensors")) << "weights";
  convert(temp.path("source"), temp.path("made"), {.to = "hqq"});
  EXPECT_TRUE(fs::exists(temp.path("made/tokenizer.json")));
  EXPECT_TRUE(fs::exists(temp.path("made/generation_config.json")));
  EXPECT_EQ(read_text_file(temp.path("made/README.md")), "about");
  EXPECT_FALSE(fs::exists(temp.path("made/quanto_qmap.json")));
  EXPECT_FALSE(fs::exists(temp.path("made/other.safetensors")));
  // Replacing a folder of our own drops the settings of the former dialect too.
  convert(model_path("dense-bf16"), temp.path("again"), {.to = "quanto"});
  EXPECT_TRUE(fs::exists(temp.path("again/quanto_qmap.json")));
  convert(model_path("dense-bf16"), temp.path("again"), {.to = "hqq"});
  EXPECT_FALSE(fs::exists(temp.path("again/quanto_qmap.json")));
  EXPECT_TRUE(load_checkpoint(temp.path("again")).layout.starts_with("hqq"));
}

TEST(Convert, GgufToFolderAndBackIsTheSameModel) {
  for (const char* name : {"gguf/tiny-q4_1.gguf", "gguf/tiny-q8_0.gguf"}) {
    SCOPED_TRACE(name);
    const TempFolder temp;
    const bool dense = std::string(name).find("f16") != std::string::npos;
    ConvertOptions there{.to = dense ? "dense" : "mlx"};
    ConvertOptions back{.to = dense ? "dense" : "gguf"};
    convert(model_path(name), temp.path("folder"), there);
    convert(temp.path("folder"), temp.path("back.gguf"), back);
    const Checkpoint a = load_checkpoint(model_path(name)),
                     b = load_checkpoint(temp.path("back.gguf"));
    for (const auto& [tensor, one] : testing::expected_values().at(name).items()) {
      EXPECT_TRUE(testing::values_of(a, tensor) == testing::values_of(b, tensor)) << tensor;
    }
    const auto first = ModelSource::open(model_path(name)),
               second = ModelSource::open(temp.path("back.gguf"));
    EXPECT_EQ(json::parse(first->tokenizer_json()), json::parse(second->tokenizer_json()));
  }
}

TEST(Convert, DenseModelsAreQuantizedByTheRules) {
  const TempFolder temp;
  ConvertOptions options{.to = "hqq"};
  options.quantize.bits = 8;
  options.quantize.group_size = 32;
  options.skip_modules = {"lm_head", "down_proj"};
  const ConvertReport report = convert(model_path("dense-f16-bin"), temp.path("m"), options);
  EXPECT_EQ(report.layers.size(), 12u);
  EXPECT_FALSE(report.lossless());
  for (const auto& layer : report.layers) EXPECT_LT(layer.relative_error, 0.01) << layer.name;
  const Checkpoint made = load_checkpoint(temp.path("m"));
  EXPECT_EQ(made.layers.begin()->second.spec.bits, 8);
  EXPECT_EQ(made.layers.begin()->second.spec.group_size, 32);
  EXPECT_TRUE(made.tensors.contains("model.layers.0.mlp.down_proj.weight"));
  options.quantize.bits = 7;
  EXPECT_EQ(error_of([&] { convert(model_path("dense-bf16"), temp.path("n"), options); }).code(),
            Errc::kConfig);
  EXPECT_FALSE(fs::exists(temp.path("n")));
}

TEST(Convert, ShardsAndProgress) {
  const TempFolder temp;
  ConvertOptions options{.to = "bnb"};
  options.save.max_shard_bytes = 20000;
  std::vector<std::int64_t> done;
  std::int64_t total = 0;
  options.progress = [&](std::int64_t d, std::int64_t t, const std::string&) {
    done.push_back(d);
    total = t;
  };
  convert(model_path("dense-bf16-sharded"), temp.path("m"), options);
  EXPECT_TRUE(fs::exists(temp.path("m/model.safetensors.index.json")));
  EXPECT_FALSE(fs::exists(temp.path("m/model.safetensors")));
  const Checkpoint made = load_checkpoint(temp.path("m"), {.verify_digest = true});
  EXPECT_EQ(made.layers.size(), 14u);
  EXPECT_EQ(done.front(), 0);
  EXPECT_EQ(done.back(), total);
  EXPECT_EQ(done.size(), static_cast<std::size_t>(total) + 1);
}

TEST(Convert, BadRequestsAreRefused) {
  const TempFolder temp;
  const std::string source = model_path("bnb-nf4");
  EXPECT_EQ(error_of([&] { convert(source, temp.path("m"), {.to = "gptq"}); }).code(),
            Errc::kConfig);
  EXPECT_EQ(error_of([&] { convert(source, source, {.to = "hqq"}); }).code(), Errc::kConfig);
  EXPECT_EQ(error_of([&] { convert(source, temp.path("m.npz"), {.to = "hqq"}); }).code(),
            Errc::kConfig);
  EXPECT_EQ(error_of([&] { convert(temp.path("none"), temp.path("m"), {.to = "hqq"}); }).code(),
            Errc::kIo);
  ConvertOptions layout{.to = "hqq"};
  layout.save.layout = "mlx-lm";
  EXPECT_NE(testing::what_of([&] { convert(source, temp.path("m"), layout); }).find("qmodel"),
            std::string::npos);
  EXPECT_TRUE(fs::is_empty(temp.path()));
}

}  // namespace
}  // namespace quantal
