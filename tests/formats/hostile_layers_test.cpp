// Layers whose tensors lie: a typed error, or a layer that agrees with itself; never more memory
// than the tensors' own class.
#include <gtest/gtest.h>

#include <map>

#include "checkpoint/tensor_set.h"
#include "formats/layers.h"
#include "support/allocation.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

/// One golden layer of a dialect.
struct Source {
  const char* folder;
  const char* dialect;
};
std::ostream& operator<<(std::ostream& out, const Source& s) { return out << s.folder; }

constexpr const char* kPrefix = "model.layers.0.self_attn.k_proj.";

class HostileLayers : public ::testing::TestWithParam<Source> {
 protected:
  void SetUp() override {
    const auto set =
        checkpoint::open_tensor_set(golden_path("checkpoints/" + std::string(GetParam().folder)));
    for (const auto& [name, tensor] : set.tensors) {
      if (!name.starts_with(kPrefix)) continue;
      const HeldTensor held = tensor.read();
      good_.set(name, {held.view.dtype, held.view.shape, bytes_of(held.view)});
      names_.push_back(name);
      bytes_ += held.view.bytes.size();
    }
    for (const auto& [module, settings] : dialect().read_settings(set.texts)) {
      if (module.empty() || module + "." == kPrefix) facts_.settings = settings;
    }
    if (std::string(GetParam().dialect) == "quanto") facts_.weight_shape = {32, 64};
  }
  const Dialect& dialect() const { return dialect_by_name(GetParam().dialect); }

  /// True if the layer is taken.
  bool import(TensorMap& map, const LayerFacts& facts) {
    const AllocationPeak peak;
    bool taken = false;
    try {
      const PackedMatrix w = dialect().import_layer(kPrefix, map.lookup(), facts);
      check_packed(w.view());
      const Tensor values = decode(w, DType::kF32);
      EXPECT_FALSE(dialect().export_layer(w.view(), kPrefix).empty());
      taken = true;
    } catch (const Error& e) {
      EXPECT_NE(errc_name(e.code()), errc_name(Errc::kInternal)) << e.what();
      EXPECT_NE(std::string(e.what()), "");
    }
    EXPECT_LE(peak.bytes(), 64 * bytes_ + (1u << 18));
    return taken;
  }
  bool import_changed(const std::string& name, const std::function<void(Tensor&)>& change) {
    TensorMap map = good_;
    change(map.at(name));
    return import(map, facts_);
  }

  TensorMap good_;
  std::vector<std::string> names_;
  LayerFacts facts_;
  std::size_t bytes_ = 0;
};

TEST_P(HostileLayers, MissingTensors) {
  ASSERT_TRUE(import(good_, facts_));
  int refused = 0;
  for (const std::string& name : names_) {
    SCOPED_TRACE(name);
    TensorMap map = good_;
    map.erase(name);
    refused += import(map, facts_) ? 0 : 1;
  }
  EXPECT_GE(refused, 2);
}

TEST_P(HostileLayers, OtherTypes) {
  for (const std::string& name : names_) {
    SCOPED_TRACE(name);
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64, DType::kF8E4M3,
                              DType::kF8E5M2, DType::kU8, DType::kI8, DType::kU16, DType::kI16,
                              DType::kU32, DType::kI32, DType::kU64, DType::kI64, DType::kBool}) {
      if (dtype == good_.at(name).dtype) continue;
      SCOPED_TRACE(dtype_name(dtype));
      import_changed(name, [&](Tensor& t) { t.dtype = dtype; });
      import_changed(name, [&](Tensor& t) { t = make_tensor(dtype, t.shape); });
    }
  }
}

TEST_P(HostileLayers, OtherShapes) {
  const std::int64_t huge = std::int64_t{1} << 40;
  for (const std::string& name : names_) {
    SCOPED_TRACE(name);
    const Tensor good = good_.at(name);
    const std::int64_t n = good.view().numel();
    const std::vector<std::vector<std::int64_t>> shapes = {
        {},         {0},          {n},          {1, n},    {n, 1},    {1, 1, n}, {n, 2},
        {2, n / 2}, {n / 2, 2},   {huge, huge}, {huge, n}, {n, huge}, {-1},      {-1, -n},
        {0, huge},  {1, 1, 1, n}, {1, huge, 0}, {n + 1},   {n - 1}};
    for (const auto& shape : shapes) {
      if (shape == good.shape) continue;
      SCOPED_TRACE(shape_string(shape));
      import_changed(name, [&](Tensor& t) { t.shape = shape; });  // the bytes stay
      if (shape.empty() || shape[0] < 0 || shape[0] >= huge || shape.back() >= huge) continue;
      if (shape.size() > 1 && shape[1] >= huge) continue;
      import_changed(name, [&](Tensor& t) { t = make_tensor(t.dtype, shape); });
    }
    for (const std::size_t bytes : {std::size_t{0}, good.bytes.size() / 2, good.bytes.size() + 1}) {
      import_changed(name, [&](Tensor& t) { t.bytes.resize(bytes); });
    }
  }
}

/// Every bit of the small tensors, which hold shapes, sizes and settings, and some of the others.
TEST_P(HostileLayers, FlippedBits) {
  int taken = 0;
  for (const std::string& name : names_) {
    SCOPED_TRACE(name);
    const std::size_t size = good_.at(name).bytes.size();
    const std::size_t step = size <= 512 ? 1 : size / 16 + 1;
    for (std::size_t i = 0; i < size; i += step) {
      for (int bit = 0; bit < 8; ++bit) {
        taken += import_changed(name, [&](Tensor& t) {
          t.bytes[i] = static_cast<std::uint8_t>(t.bytes[i] ^ (1 << bit));
        });
      }
      if (HasFailure()) return;
    }
  }
  EXPECT_GT(taken, 0);  // codes may be anything
}

TEST_P(HostileLayers, FactsOfOthers) {
  const std::int64_t huge = std::int64_t{1} << 40;
  for (const std::vector<std::int64_t>& shape : std::vector<std::vector<std::int64_t>>{{huge, huge},
                                                                                       {huge, 64},
                                                                                       {32, huge},
                                                                                       {-1, -1},
                                                                                       {0, 0},
                                                                                       {0, 64},
                                                                                       {64},
                                                                                       {32, 64, 1},
                                                                                       {64, 32},
                                                                                       {1, 2048},
                                                                                       {2048, 1},
                                                                                       {31, 64},
                                                                                       {32, 63}}) {
    SCOPED_TRACE(shape_string(shape));
    LayerFacts facts = facts_;
    facts.weight_shape = shape;
    import(good_, facts);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Golden, HostileLayers,
    ::testing::Values(Source{"bnb-nf4", "bnb"}, Source{"bnb-nf4-double", "bnb"},
                      Source{"bnb-fp4-f16", "bnb"}, Source{"bnb-int8", "bnb"},
                      Source{"layout-bnb-dir", "bnb"}, Source{"hqq-safetensors", "hqq"},
                      Source{"hqq-transformers", "hqq"}, Source{"hqq-pt-3bit-axis0", "hqq"},
                      Source{"quanto-int2", "quanto"}, Source{"quanto-int4", "quanto"},
                      Source{"quanto-int8", "quanto"}, Source{"quanto-float8", "quanto"},
                      Source{"mlx-4bit", "mlx"}, Source{"mlx-mixed", "mlx"},
                      Source{"mlx-mxfp4", "mlx"}),
    [](const auto& info) {
      std::string name = info.param.folder;
      for (char& c : name) c = c == '-' ? '_' : c;
      return name;
    });

}  // namespace
}  // namespace quantal::testing
