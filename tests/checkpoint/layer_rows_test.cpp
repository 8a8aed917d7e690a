// Rows of packed layers from files: the bytes of the whole layer, and nothing else is read.
#include <algorithm>
#include <cstring>

#include "checkpoint/support.h"
#include "formats/quantized_forms.h"
#include "quantal/ggml.h"
#include "quantal/shards.h"
#include "support/allocation.h"
#include "support/touched_pages.h"

namespace quantal {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::error_of;
using testing::form_options;
using testing::golden_path;
using testing::GoldenModel;
using testing::QuantizedForm;
using testing::TempFolder;
using M = QuantizationMethod;

constexpr const char* kLayer = "model.layers.0.mlp.up_proj";

std::span<const std::uint8_t> slice(const std::vector<std::uint8_t>& bytes, RowRange rows,
                                    std::int64_t row_bytes) {
  return std::span(bytes).subspan(static_cast<std::size_t>(rows.begin * row_bytes),
                                  static_cast<std::size_t>(rows.size() * row_bytes));
}

bool same(const std::vector<std::uint8_t>& a, std::span<const std::uint8_t> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

void expect_slices(const CheckpointReader& reader, const std::string& name,
                   const PackedMatrix& whole, RowRange rows, RowRange stat_rows) {
  const PackedLayout layout = layout_of(whole.spec);
  const PackedRows part = reader.read_layer_rows(name, rows, stat_rows);
  const std::string where =
      name + " rows " + std::to_string(rows.begin) + " to " + std::to_string(rows.end);
  EXPECT_TRUE(same(part.codes, slice(whole.codes, rows, layout.code_bytes))) << where;
  EXPECT_TRUE(same(part.stats, slice(whole.stats, stat_rows, layout.stat_bytes))) << where;
  EXPECT_EQ(part.shared, whole.shared) << where;
}

void expect_parts(const CheckpointReader& reader, const std::string& name) {
  const PackedMatrix whole = reader.read_layer(name);
  EXPECT_EQ(reader.layer_spec(name), whole.spec) << name;
  const std::int64_t rows = whole.spec.rows, stats = layout_of(whole.spec).stat_rows;
  for (std::int64_t size = 1; size <= 5; ++size) {
    for (std::int64_t rank = 0; rank < size; ++rank) {
      expect_slices(reader, name, whole, rank_rows(rows, rank, size), rank_rows(stats, rank, size));
    }
  }
  for (std::int64_t at = 0; at <= rows; at += 5) {
    expect_slices(reader, name, whole, {at, rows}, {0, std::min(at, stats)});
  }
  const Error outside = error_of([&] { reader.read_layer_rows(name, {0, rows + 1}, {0, 0}); });
  EXPECT_EQ(errc_name(outside.code()), errc_name(Errc::kShape));
  EXPECT_EQ(outside.site().tensor, name) << outside.what();
  EXPECT_FALSE(outside.site().path.empty()) << outside.what();
}

class LayerRows : public ::testing::TestWithParam<GoldenModel> {};

TEST_P(LayerRows, AreThoseOfTheWholeLayer) {
  LoadOptions options;
  if (std::string(GetParam().layout) == "quanto single") {
    options.weight_shape = [](const std::string& module) {
      const json& tensors = testing::expected_values().at(GetParam().expected);
      return tensors.at(module + ".weight").at("shape").get<std::vector<std::int64_t>>();
    };
  }
  const std::string path = golden_path("checkpoints/" + std::string(GetParam().path));
  const auto reader = CheckpointReader::open(path, options);
  for (const std::string& name : reader->layer_names()) expect_parts(*reader, name);
}

INSTANTIATE_TEST_SUITE_P(All, LayerRows, ::testing::ValuesIn(testing::kGoldenModels),
                         [](const auto& info) {
                           std::string name = info.param.path;
                           for (char& c : name) {
                             if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
                           }
                           return name;
                         });

TEST(LayerRowsOfFiles, UnknownLayersAreRefused) {
  for (const char* path : {"checkpoints/bnb-nf4", "checkpoints/gguf/tiny-q4_0.gguf"}) {
    const auto reader = CheckpointReader::open(golden_path(path));
    const Error e = error_of([&] { reader->read_layer_rows("nothing", {0, 1}, {0, 1}); });
    EXPECT_EQ(errc_name(e.code()), errc_name(Errc::kConfig)) << path;
  }
}

/// Two layers that differ in values only; in one of them `shared` has to keep some.
TEST(LayerRowsOfFiles, FormsThatValuesDecideAreThoseOfEachLayer) {
  QuantizedForm form{"", "hqq", form_options(M::HQQ, 3, 64), 16, 128, false};
  form.options.optimize = false;
  const PackedMatrix plain = testing::quantized(form, testing::form_weights(16, 128));
  std::vector<NamedTensor> tensors = dialect_by_name("hqq").export_layer(plain.view(), "");
  std::map<std::string, TensorView> views;
  for (NamedTensor& t : tensors) {
    if (t.name == "W_q") t.tensor.bytes[3] |= 0x80;
    views[t.name] = t.tensor.view();
  }
  const PackedMatrix stray =
      dialect_by_name("hqq").import_layer("",
                                          [&](const std::string& name) {
                                            const auto it = views.find(name);
                                            return it == views.end() ? nullptr : &it->second;
                                          },
                                          {});
  CheckpointView view;
  view.layers = {{"a", plain.view()}, {"b", stray.view()}};
  const TempFolder temp;
  save_checkpoint(temp.path("m"), view, {.layout = "hqq"});
  const auto reader = CheckpointReader::open(temp.path("m"));
  EXPECT_EQ(reader->layer_spec("a"), plain.spec);
  EXPECT_EQ(reader->layer_spec("b"), stray.spec);
  expect_parts(*reader, "b");
}

// ------------------------------------------------------------------ what is read

/// A form, and what a quarter of its rows may touch of a tensor, as a share of it: a quarter, if
/// nothing else is said.
struct Reading {
  std::string name;
  QuantizedForm form;
  std::map<std::string, double> shares;  ///< by the end of the tensor's name
};

std::ostream& operator<<(std::ostream& out, const Reading& r) { return out << r.name; }

constexpr std::int64_t kRows = 2048, kCols = 1024;

Reading reading(std::string name, std::string dialect, QuantizeOptions options,
                std::map<std::string, double> shares = {}) {
  options.optimize = false;
  return {std::move(name),
          {"", std::move(dialect), std::move(options), kRows, kCols, false},
          std::move(shares)};
}

std::vector<Reading> readings() {
  std::vector<Reading> out;
  QuantizeOptions o = form_options(M::BNB_NF4, 4, 64);
  out.push_back(reading("nf4_double", "bnb", o, {{".nested_absmax", 1}}));
  o.double_quant = false;
  out.push_back(reading("nf4", "bnb", o));
  out.push_back(reading("int8", "bnb", form_options(M::BNB_INT8, 8, 0)));
  // Codes of HQQ lie in words of several parts, each of which is a stretch of the matrix.
  for (const auto& [bits, share] : {std::pair{8, 0.25}, {4, 0.5}, {2, 1.0}, {3, 1.0}}) {
    out.push_back(reading("hqq" + std::to_string(bits), "hqq", form_options(M::HQQ, bits, 64),
                          {{"W_q", share}}));
  }
  o = form_options(M::HQQ, 4, 64);
  o.axis = 0;
  out.push_back(reading("hqq_axis0", "hqq", o, {{"W_q", 0.5}}));
  o.axis = 1;
  o.quant_zero = o.quant_scale = true;
  out.push_back(reading("hqq_meta", "hqq", o,
                        {{"W_q", 0.5},
                         {"scale_q", 1},
                         {"zero_q", 1},
                         {"meta_scale.scale", 1},
                         {"meta_scale.zero", 1}}));
  out.push_back(reading("mlx4", "mlx", form_options(M::MLX_INT4, 4, 64)));
  o = form_options(M::BNB_NF4, 0, 0);
  o.mode = "mxfp4";
  out.push_back(reading("mxfp4", "mlx", o));
  out.push_back(reading("quanto8", "quanto", form_options(M::QUANTO_INT8, 8, 0)));
  out.push_back(
      reading("quanto4", "quanto", form_options(M::QUANTO_INT4, 4, 0), {{"_data._data", 0.5}}));
  o = form_options(M::QUANTO_INT4, 4, 0);
  o.axis = -1;  // a column's scales lie side by side
  out.push_back(reading("quanto4_axis_minus1", "quanto", o,
                        {{"_data._data", 1}, {"_scale", 1}, {"_shift", 1}}));
  return out;
}

std::int64_t header_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::uint64_t length = 0;
  in.read(reinterpret_cast<char*>(&length), sizeof(length));
  return static_cast<std::int64_t>(8 + length);
}

class RowsRead : public ::testing::TestWithParam<Reading> {};

TEST_P(RowsRead, TouchOnlyTheirPagesAndMemory) {
  const Reading& r = GetParam();
  const PackedMatrix w = testing::quantized(r.form, testing::form_weights(kRows, kCols));
  CheckpointView view;
  view.layers = {{kLayer, w.view()}};
  const TempFolder temp;
  std::string layout;
  for (const FileLayout& l : file_layouts(&dialect_by_name(r.form.dialect))) {
    if (layout.empty() && l.container == Container::kSafetensors) layout = l.name;
  }
  save_checkpoint(temp.path("m"), view, {.layout = layout});
  LoadOptions options;
  options.weight_shape = [](const std::string&) { return std::vector{kRows, kCols}; };
  const auto reader = CheckpointReader::open(temp.path("m"), options);
  const std::string path = temp.path("m/model.safetensors");
  const SafetensorsFile file(path);
  const std::int64_t begin = header_bytes(path);
  const std::uint8_t* data = file.tensors().front().second.bytes.data();

  const RowRange rows = rank_rows(kRows, 1, 4);
  const RowRange stat_rows = rank_rows(layout_of(w.spec).stat_rows, 1, 4);
  const std::int64_t mine =
      rows.size() * layout_of(w.spec).code_bytes + stat_rows.size() * layout_of(w.spec).stat_bytes;
  std::int64_t peak = 0;
  {
    const testing::TouchedPages touched(path);
    {
      const testing::AllocationPeak allocated;
      const PackedRows part = reader->read_layer_rows(kLayer, rows, stat_rows);
      peak = static_cast<std::int64_t>(allocated.bytes());
    }
    for (const auto& [name, tensor] : file.tensors()) {
      double share = 0.25;
      for (const auto& [end, own] : r.shares) {
        if (name.ends_with(end)) share = own;
      }
      const std::int64_t at = begin + (tensor.bytes.data() - data);
      const auto pages = touched.of(at, at + std::ssize(tensor.bytes));
      // Its own borders, and neighbours on its first and last page.
      const auto most = static_cast<std::int64_t>(share * static_cast<double>(pages.all)) + 3;
      EXPECT_LE(pages.read, most) << name << ", " << pages.all << " pages";
      if (pages.all > 64) EXPECT_GE(pages.read, most / 2) << name << ": is anything counted?";
    }
  }
  // Beside the rows: what `shared` keeps (twice, while it is put together), and small things.
  EXPECT_LE(peak, mine + 8 * std::ssize(w.shared) + (64 << 10)) << mine;
  expect_slices(*reader, kLayer, w, rows, stat_rows);
}

INSTANTIATE_TEST_SUITE_P(Forms, RowsRead, ::testing::ValuesIn(readings()),
                         [](const auto& info) { return info.param.name; });

/// A GGUF file of two matrices; rows of q are in another order there.
TEST(RowsReadOfGguf, TouchOnlyTheirPages) {
  for (const GgmlType type : {GgmlType::kQ4_0, GgmlType::kQ6_K}) {
    SCOPED_TRACE(ggml_block(type).name);
    QuantizeOptions o = form_options(M::BNB_NF4, 0, 0);
    o.mode = ggml_block(type).name;
    const QuantizedForm form{"", "gguf", o, kCols, kCols, false};
    const PackedMatrix w = testing::quantized(form, testing::form_weights(kCols, kCols));
    const std::vector<std::uint8_t> blocks = unpack_ggml(w.view(), serial_executor());
    const auto u32 = [](const char* key, std::uint64_t value) {
      return GgufPair{key, GgufType::kU32, value};
    };
    const std::vector<GgufPair> pairs = {
        {"general.architecture", GgufType::kString, std::string("llama")},
        u32("llama.block_count", 1),
        u32("llama.embedding_length", kCols),
        u32("llama.feed_forward_length", kCols),
        u32("llama.attention.head_count", 8),
        u32("llama.context_length", 64),
        u32("llama.vocab_size", 8),
        {"llama.attention.layer_norm_rms_epsilon", GgufType::kF32, 1e-5}};
    const TempFolder temp;
    const std::string path = temp.path("m.gguf");
    const auto number = static_cast<std::uint32_t>(type);
    GgufWriter writer(path, pairs,
                      {{"blk.0.ffn_up.weight", number, {kCols, kCols}, std::ssize(blocks)},
                       {"blk.0.attn_q.weight", number, {kCols, kCols}, std::ssize(blocks)}});
    writer.write(blocks);
    writer.write(blocks);
    writer.commit();

    const auto reader = CheckpointReader::open(path);
    const auto names = std::map<std::string, std::string>{
        {kLayer, "blk.0.ffn_up.weight"},
        {"model.layers.0.self_attn.q_proj", "blk.0.attn_q.weight"}};
    const GgufFile file(path, [](std::uint32_t t) {
      const GgmlBlock* block = find_ggml_block(t);
      return GgufBlockSize{block->elements, block->bytes};
    });
    for (const auto& [name, stored] : names) {
      SCOPED_TRACE(name);
      const RowRange rows = rank_rows(kCols, 2, 4);
      const GgufTensor& tensor = *file.find(stored);
      const std::int64_t at = tensor.file_offset, end = at + std::ssize(tensor.bytes);
      {
        const testing::TouchedPages touched(path);
        reader->read_layer_rows(name, rows, rows);
        const auto pages = touched.of(at, end);
        EXPECT_LE(pages.read, pages.all / 4 + 2);
        EXPECT_GE(pages.read, pages.all / 4 - 1);
      }
      expect_parts(*reader, name);
    }
  }
}

}  // namespace
}  // namespace quantal
