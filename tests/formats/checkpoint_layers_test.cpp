// Golden checkpoints written by the upstream packages: every quantized layer is imported, decoded
// and exported again.
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <set>

#include "checkpoint/sha256.h"
#include "checkpoint/tensor_set.h"
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

/// Import and export of one layer of `set`, whatever container it lies in.
void check_layer(const Dialect& dialect, const checkpoint::TensorSet& set,
                 const std::string& prefix, const nlohmann::json& expected) {
  std::map<std::string, HeldTensor> held;
  for (const auto& [name, tensor] : set.tensors) {
    if (name.starts_with(prefix)) held[name] = tensor.read();
  }
  const TensorLookup lookup = [&](const std::string& name) -> const TensorView* {
    const auto found = held.find(name);
    return found == held.end() ? nullptr : &found->second.view;
  };
  const PackedMatrix w = dialect.import_layer(prefix, lookup, {});
  const nlohmann::json& weight = expected.at(prefix + "weight");
  EXPECT_EQ(digest_as_f32(decode(w, w.spec.value_dtype)), weight.at("sha256_f32")) << prefix;
  std::size_t written = 0;
  for (const NamedTensor& t : dialect.export_layer(w.view(), prefix)) {
    const bool objects = set.where.container == Container::kTorch;
    if (objects && t.kind == StateKind::kPlainOnly) continue;
    if (objects && t.kind == StateKind::kNone) continue;  // nothing is read for None
    SCOPED_TRACE(t.name);
    std::string name = t.name;
    if (held.count(name) == 0) name.insert(prefix.size(), "meta.");  // StateTree::kMetaDict
    ASSERT_EQ(held.count(name), 1u);
    const TensorView& original = held.at(name).view;
    EXPECT_EQ(t.tensor.dtype, original.dtype);
    EXPECT_EQ(t.tensor.shape, original.shape);
    EXPECT_EQ(t.tensor.bytes, bytes_of(original));
    if (objects) EXPECT_EQ(t.kind, set.tensors.at(name).kind);
    ++written;
  }
  EXPECT_EQ(written, held.size()) << prefix;
}

/// Checks all layers of the golden checkpoint `name` and returns their number.
int check_checkpoint(const Dialect& dialect, const std::string& name) {
  const auto set = checkpoint::open_tensor_set(golden_path("checkpoints/" + name));
  const nlohmann::json expected =
      read_json(golden_path("vectors/checkpoint_expected.json")).at(name);
  std::set<std::string> prefixes;
  for (const auto& [tensor, stored] : set.tensors) {
    for (const std::string ending : {"proj.", "lm_head."}) {
      const std::size_t at = tensor.find(ending);
      if (at != std::string::npos) prefixes.insert(tensor.substr(0, at + ending.size()));
    }
  }
  int layers = 0;
  for (const std::string& prefix : prefixes) {
    const auto has = [&](const std::string& suffix) {
      return set.tensors.count(prefix + suffix) != 0;
    };
    if (!dialect.recognizes(has)) continue;
    check_layer(dialect, set, prefix, expected);
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
  for (const char* name : {"hqq-safetensors", "hqq-transformers", "hqq-pt-4bit",
                           "hqq-pt-3bit-axis0", "hqq-pt-2bit", "layout-hqq-dir"}) {
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
