// Rows of a layer as its tensors hold it: the bytes that reading all of it has there, for every
// cut.
#include "quantal/stored_layer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "formats/layers.h"
#include "formats/quantized_forms.h"
#include "kernels/support.h"
#include "quantal/shards.h"

namespace quantal {
namespace {

using testing::expect_error;
using testing::form_options;
using testing::QuantizedForm;
using testing::TensorMap;

/// What a file says beside the tensors.
LayerFacts facts_of(const Dialect& dialect, const PackedSpec& spec) {
  LayerFacts facts;
  facts.weight_shape = {spec.rows, spec.cols};
  const LayerEntry entry{"l", spec};
  const SideFiles side = dialect.side_files(dialect.layouts.front(), {&entry, 1}, {});
  SideTexts texts = side.texts;
  if (!side.config_patch.empty()) texts["config.json"] = side.config_patch;
  const auto settings = dialect.read_settings(texts);
  for (const char* name : {"", "l"}) {
    if (settings.count(name) != 0) facts.settings = settings.at(name);
  }
  return facts;
}

/// A layer of every form that the dialects have in tensors, opened.
class Opened {
 public:
  explicit Opened(const PackedMatrix& w)
      : tensors_(dialect(w).export_layer(w.view(), "l.")), lookup_(tensors_.lookup()) {
    layer_ = dialect(w).open_layer("l.", lookup_, facts_of(dialect(w), w.spec));
  }
  const StoredLayer& layer() const { return layer_; }

 private:
  static const Dialect& dialect(const PackedMatrix& w) { return dialect_by_id(w.spec.dialect); }
  TensorMap tensors_;
  TensorLookup lookup_;
  StoredLayer layer_;
};

std::vector<std::uint8_t> slice(const std::vector<std::uint8_t>& bytes, RowRange rows,
                                std::int64_t row_bytes) {
  return {bytes.begin() + rows.begin * row_bytes, bytes.begin() + rows.end * row_bytes};
}

void expect_slices(const StoredLayer& layer, const PackedMatrix& whole, RowRange rows,
                   RowRange stat_rows) {
  SCOPED_TRACE(std::to_string(rows.begin) + " to " + std::to_string(rows.end) + ", statistics " +
               std::to_string(stat_rows.begin) + " to " + std::to_string(stat_rows.end));
  const PackedLayout layout = layout_of(whole.spec);
  const PackedRows part = read_layer_rows(layer, rows, stat_rows);
  ASSERT_EQ(part.codes, slice(whole.codes, rows, layout.code_bytes));
  ASSERT_EQ(part.stats, slice(whole.stats, stat_rows, layout.stat_bytes));
  ASSERT_EQ(part.shared, whole.shared);
}

/// All parts of up to five ranks, a cut at every few rows, and single rows.
void expect_every_cut(const StoredLayer& layer, const PackedMatrix& whole) {
  const std::int64_t rows = whole.spec.rows, stats = layout_of(whole.spec).stat_rows;
  for (std::int64_t size = 1; size <= 5; ++size) {
    for (std::int64_t rank = 0; rank < size; ++rank) {
      expect_slices(layer, whole, rank_rows(rows, rank, size), rank_rows(stats, rank, size));
    }
  }
  for (std::int64_t at = 0; at <= rows; at += rows > 64 ? 7 : 1) {
    expect_slices(layer, whole, {0, at}, {std::min(at, stats), stats});
    expect_slices(layer, whole, {at, std::min(rows, at + 1)}, {0, 0});
    expect_slices(layer, whole, {at, at}, {std::min(at, stats), std::min(at + 3, stats)});
  }
}

class StoredLayers : public ::testing::TestWithParam<QuantizedForm> {};

TEST_P(StoredLayers, RowsHaveTheBytesOfTheWhole) {
  const QuantizedForm& form = GetParam();
  testing::Random random(11);
  for (int round = 0; round < 4; ++round) {
    QuantizedForm sized = form;
    sized.options.optimize = false;
    if (round != 0 && form.dialect == "bnb") sized.rows = 1 + random.below(150);
    if (round != 0 && form.dialect == "mlx") sized.rows = 1 + random.below(50);
    if (round != 0 && form.dialect == "hqq" && sized.options.axis == 1) {
      sized.rows = 64 * (1 + random.below(4));  // whole words of 8 parts, whole groups of groups
    }
    const PackedMatrix w = testing::quantized(sized, testing::form_weights(sized.rows, sized.cols));
    const Opened opened(w);
    testing::expect_same_bytes(read_layer(opened.layer()), w, "all rows");
    EXPECT_EQ(opened.layer().spec, w.spec);
    expect_every_cut(opened.layer(), w);
  }
}

/// Those that are stored as tensors; gguf's blocks are a file's: checkpoint/layer_rows_test.
std::vector<QuantizedForm> stored_forms() {
  std::vector<QuantizedForm> all = testing::quantized_forms();
  std::erase_if(all, [](const QuantizedForm& form) { return form.dialect == "gguf"; });
  return all;
}

INSTANTIATE_TEST_SUITE_P(Forms, StoredLayers, ::testing::ValuesIn(stored_forms()),
                         [](const auto& info) { return info.param.name; });

TEST(StoredLayer, RangesOutsideAreRefused) {
  const PackedMatrix w = testing::quantized(
      {"", "mlx", form_options(QuantizationMethod::MLX_INT4, 4, 64), 12, 64, false},
      testing::form_weights(12, 64));
  const Opened opened(w);
  for (const RowRange bad : {RowRange{-1, 3}, RowRange{5, 4}, RowRange{0, 13}}) {
    expect_error(Errc::kShape, {"rows are [", "within [0, 12)"}, [&] {
      read_layer_rows(opened.layer(), bad, {0, 0});
    });
    expect_error(Errc::kShape, {"rows of statistics are [", "within [0, 12)"}, [&] {
      read_layer_rows(opened.layer(), {0, 1}, bad);
    });
  }
}

/// HQQ's 5-bit codes lie in bytes: the rank that has the row of a code that is none says so, with
/// the words of reading everything.
TEST(StoredLayer, ACodeThatIsNoneIsFoundByItsRow) {
  const Dialect& hqq = dialect_by_name("hqq");
  QuantizedForm form{"", "hqq", form_options(QuantizationMethod::HQQ, 5, 64), 16, 128, false};
  form.options.optimize = false;
  const PackedMatrix w = testing::quantized(form, testing::form_weights(16, 128));
  TensorMap map(hqq.export_layer(w.view(), "l."));
  map.at("l.W_q").bytes[11 * 128 + 5] = 32;
  const TensorLookup lookup = map.lookup();
  const StoredLayer layer = hqq.open_layer("l.", lookup, {});
  const std::vector<std::string> said = {"codes above 31", "row 11"};
  expect_error(Errc::kCorrupt, said, [&] { read_layer(layer); });
  expect_error(Errc::kCorrupt, said, [&] { read_layer_rows(layer, {8, 12}, {8, 12}); });
  EXPECT_EQ(read_layer_rows(layer, {0, 11}, {0, 11}).codes,
            slice(w.codes, {0, 11}, layout_of(w.spec).code_bytes));
}

/// Bytes that upstream never writes are kept, and decide about the form.
TEST(StoredLayer, SaysWhereValuesDecideAboutTheForm) {
  const auto opened = [](const QuantizedForm& form) {
    return Opened(testing::quantized(form, testing::form_weights(form.rows, form.cols)))
        .layer()
        .spec_from_values;
  };
  using M = QuantizationMethod;
  EXPECT_FALSE(opened({"", "hqq", form_options(M::HQQ, 4, 64), 8, 128, false}));
  EXPECT_TRUE(opened({"", "hqq", form_options(M::HQQ, 3, 64), 8, 128, false}));
  EXPECT_FALSE(opened({"", "bnb", form_options(M::BNB_NF4, 4, 64), 8, 64, false}));
  EXPECT_TRUE(opened({"", "bnb", form_options(M::BNB_NF4, 4, 64), 3, 65, false}));
  EXPECT_FALSE(opened({"", "quanto", form_options(M::QUANTO_INT4, 4, 0), 8, 64, false}));
  EXPECT_TRUE(opened({"", "quanto", form_options(M::QUANTO_INT4, 4, 0), 7, 64, false}));
  EXPECT_FALSE(opened({"", "mlx", form_options(M::MLX_INT4, 4, 64), 7, 64, false}));
}

/// Stray bits of 3-bit words, pad codes, float8 of scale 0, tables, unpacked codes: what `shared`
/// keeps of the whole tensor is the same for every part.
TEST(StoredLayer, KeepsWhatSharedKeeps) {
  using M = QuantizationMethod;
  QuantizedForm three{"", "hqq", form_options(M::HQQ, 3, 64), 8, 128, false};
  three.options.optimize = false;
  const PackedMatrix plain = testing::quantized(three, testing::form_weights(8, 128));
  TensorMap map(dialect_by_name("hqq").export_layer(plain.view(), "l."));
  map.at("l.W_q").bytes[7] |= 0x80;  // the top bit of a word of 30
  const PackedMatrix kept = dialect_by_name("hqq").import_layer("l.", map.lookup(), {});
  ASSERT_GT(kept.spec.residue_bytes, 0);
  expect_every_cut(Opened(kept).layer(), kept);

  const QuantizedForm four{"", "quanto", form_options(M::QUANTO_INT4, 4, 0), 7, 64, false};
  const PackedMatrix even = testing::quantized(four, testing::form_weights(7, 64));
  TensorMap odd(dialect_by_name("quanto").export_layer(even.view(), "l."));
  odd.at("l.weight._data._data").bytes.back() |= 0x50;
  const LayerFacts facts = facts_of(dialect_by_name("quanto"), even.spec);
  const PackedMatrix padded = dialect_by_name("quanto").import_layer("l.", odd.lookup(), facts);
  ASSERT_GT(padded.spec.residue_bytes, 0);
  expect_every_cut(Opened(padded).layer(), padded);

  for (const bool columns : {false, true}) {
    TensorMap float8;
    Tensor data = make_tensor(DType::kF8E4M3, {6, 4});
    for (std::size_t i = 0; i < data.bytes.size(); ++i) {
      data.bytes[i] = static_cast<std::uint8_t>(i % 3 == 0 ? 0x7F : i);  // NaN, or a number
    }
    Tensor scale = make_tensor(
        DType::kF32, columns ? std::vector<std::int64_t>{1, 4} : std::vector<std::int64_t>{6, 1});
    for (std::size_t i = 0; i < scale.bytes.size() / 4; ++i) {
      const float s = i == 1 || i == 3 ? 0.0F : 0.5F;
      std::memcpy(scale.bytes.data() + 4 * i, &s, 4);
    }
    // Weights whose scale is not 0 are numbers.
    for (std::size_t i = 0; i < data.bytes.size(); ++i) {
      const std::size_t group = columns ? i % 4 : i / 4;
      if (group != 1 && group != 3) data.bytes[i] &= 0x77;
    }
    float8.set("l.weight._data", data);
    float8.set("l.weight._scale", scale);
    const PackedMatrix w = dialect_by_name("quanto").import_layer("l.", float8.lookup(), {});
    ASSERT_GT(w.spec.residue_bytes, 0) << columns;
    expect_every_cut(Opened(w).layer(), w);
  }
}

}  // namespace
}  // namespace quantal
