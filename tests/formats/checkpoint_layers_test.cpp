// Golden checkpoints written by the upstream packages: every quantized layer is imported, decoded
// and exported again.
#include <gtest/gtest.h>

#include <fstream>
#include <set>

#include "checkpoint/sha256.h"
#include "formats/layers.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

nlohmann::json read_json(const std::string& path) {
  std::ifstream in(path);
  return nlohmann::json::parse(in);
}

std::string digest_as_f32(const Tensor& values) {
  std::vector<float> wide(static_cast<std::size_t>(values.view().numel()));
  widen_to_f32(values.dtype, values.bytes.data(), values.view().numel(), wide.data());
  checkpoint::Sha256 hash;
  hash.update({reinterpret_cast<const std::uint8_t*>(wide.data()), wide.size() * sizeof(float)});
  return hash.hex();
}

/// Names below `prefix` in the file.
std::set<std::string> names_below(const SafetensorsFile& file, const std::string& prefix) {
  std::set<std::string> out;
  for (const auto& [name, view] : file.tensors()) {
    if (name.rfind(prefix, 0) == 0) out.insert(name);
  }
  return out;
}

void check_layer(const Dialect& dialect, const SafetensorsFile& file, const std::string& prefix,
                 const nlohmann::json& expected) {
  const PackedMatrix w =
      dialect.import_layer(prefix, [&](const std::string& name) { return file.find(name); }, {});
  const nlohmann::json& weight = expected.at(prefix + "weight");
  EXPECT_EQ(digest_as_f32(decode(w, w.spec.value_dtype)), weight.at("sha256_f32")) << prefix;
  std::set<std::string> written;
  for (const NamedTensor& t : dialect.export_layer(w.view(), prefix)) {
    written.insert(t.name);
    const TensorView* original = file.find(t.name);
    ASSERT_NE(original, nullptr) << t.name;
    EXPECT_EQ(t.tensor.dtype, original->dtype) << t.name;
    EXPECT_EQ(t.tensor.shape, original->shape) << t.name;
    EXPECT_EQ(t.tensor.bytes, bytes_of(*original)) << t.name;
  }
  EXPECT_EQ(written, names_below(file, prefix)) << prefix;
}

/// Checks all layers of the golden checkpoint `name` and returns their number.
int check_checkpoint(const Dialect& dialect, const std::string& name) {
  const SafetensorsFile file(golden_path("checkpoints/" + name + "/model.safetensors"));
  const nlohmann::json expected =
      read_json(golden_path("vectors/checkpoint_expected.json")).at(name);
  std::set<std::string> prefixes;
  for (const auto& [tensor, view] : file.tensors()) {
    for (const std::string ending : {"proj.", "lm_head."}) {
      const std::size_t at = tensor.find(ending);
      if (at != std::string::npos) prefixes.insert(tensor.substr(0, at + ending.size()));
    }
  }
  int layers = 0;
  for (const std::string& prefix : prefixes) {
    const auto has = [&](const std::string& suffix) {
      return file.find(prefix + suffix) != nullptr;
    };
    if (!dialect.recognizes(has)) continue;
    check_layer(dialect, file, prefix, expected);
    ++layers;
  }
  return layers;
}

constexpr int kLayers = 14;  // 2 blocks of 7 projections

TEST(CheckpointLayers, Bitsandbytes) {
  const Dialect& bnb = dialect_of(QuantizationMethod::BNB_NF4);
  for (const char* name :
       {"bnb-nf4", "bnb-nf4-double", "bnb-fp4-f16", "bnb-nf4-storage-bf16", "bnb-int8"}) {
    SCOPED_TRACE(name);
    EXPECT_EQ(check_checkpoint(bnb, name), kLayers);
  }
}

TEST(CheckpointLayers, Hqq) {
  const Dialect& hqq = dialect_of(QuantizationMethod::HQQ);
  for (const char* name : {"hqq-safetensors", "hqq-transformers"}) {
    SCOPED_TRACE(name);
    EXPECT_EQ(check_checkpoint(hqq, name), kLayers);
  }
}

TEST(CheckpointLayers, DialectsDoNotClaimEachOther) {
  const Dialect& hqq = dialect_of(QuantizationMethod::HQQ);
  EXPECT_EQ(check_checkpoint(hqq, "bnb-nf4"), 0);
  const Dialect& bnb = dialect_of(QuantizationMethod::BNB_NF4);
  EXPECT_EQ(check_checkpoint(bnb, "hqq-safetensors"), 0);
}

}  // namespace
}  // namespace quantal::testing
