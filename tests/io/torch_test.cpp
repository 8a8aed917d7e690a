#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <numeric>

#include "io/archive_builder.h"
#include "io/read_error.h"
#include "quantal/archive.h"
#include "support/golden.h"

namespace quantal {
namespace {

using testing::expect_error;
using testing::golden_path;
using testing::le;
using testing::p_global;
using testing::p_int;
using testing::p_text;
using testing::p_tuple;
using testing::TempFolder;
using testing::TensorPickle;
using testing::torch_entries;
using testing::write_bytes;
using testing::zip_of;
using testing::ZipEntry;
using Kind = TorchValue::Kind;

template <class T>
std::vector<T> values(const HeldTensor& held) {
  std::vector<T> out(held.view.bytes.size() / sizeof(T));
  if (!out.empty()) std::memcpy(out.data(), held.view.bytes.data(), held.view.bytes.size());
  return out;
}

std::vector<float> counting(std::size_t n) {
  std::vector<float> out(n);
  std::iota(out.begin(), out.end(), 0.0f);
  return out;
}

std::string floats(std::size_t n) {
  const std::vector<float> numbers = counting(n);
  return {reinterpret_cast<const char*>(numbers.data()), n * sizeof(float)};
}

const TorchTensor& tensor_at(const TorchValue& dict, std::string_view key) {
  const TorchValue* found = dict.find(key);
  if (found == nullptr) throw std::runtime_error("no " + std::string(key));
  return found->as_tensor();
}

/// The tensors that both golden zips hold.
void check_golden_tensors(const TorchFile& file, const TorchValue& dict) {
  const HeldTensor a = file.read(tensor_at(dict, "a"));
  EXPECT_EQ(a.view.shape, (std::vector<std::int64_t>{4, 6}));
  EXPECT_EQ(values<float>(a), counting(24));
  EXPECT_EQ(a.view.bytes.data(), file.read(tensor_at(dict, "a")).view.bytes.data());
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(a.view.bytes.data()) % 64, 0u);
  const TorchTensor& transposed = tensor_at(dict, "a_t");
  EXPECT_EQ(transposed.storage, tensor_at(dict, "a").storage);
  const auto columns = values<float>(file.read(transposed));
  ASSERT_EQ(columns.size(), 24u);
  for (std::size_t i = 0; i < 24; ++i) {
    EXPECT_EQ(columns[i], static_cast<float>(i % 4 * 6 + i / 4));
  }
  EXPECT_EQ(values<float>(file.read(tensor_at(dict, "a_slice"))),
            (std::vector<float>{3, 4, 5, 6, 7, 8}));
  const HeldTensor scalar = file.read(tensor_at(dict, "scalar"));
  EXPECT_TRUE(scalar.view.shape.empty());
  EXPECT_EQ(scalar.view.bytes.size(), 4u);
  EXPECT_EQ(file.read(tensor_at(dict, "empty")).view.numel(), 0);
  const std::pair<const char*, DType> types[] = {
      {"t_float64", DType::kF64},       {"t_float16", DType::kF16},
      {"t_bfloat16", DType::kBF16},     {"t_int8", DType::kI8},
      {"t_uint8", DType::kU8},          {"t_int16", DType::kI16},
      {"t_int32", DType::kI32},         {"t_int64", DType::kI64},
      {"t_bool", DType::kBool},         {"t_float8_e4m3fn", DType::kF8E4M3},
      {"t_float8_e5m2", DType::kF8E5M2}};
  for (const auto& [name, dtype] : types) {
    SCOPED_TRACE(name);
    const TorchTensor& tensor = tensor_at(dict, name);
    EXPECT_EQ(tensor.dtype, dtype);
    EXPECT_EQ(file.read(tensor).view.bytes.size(), 6 * dtype_size(dtype));
  }
  EXPECT_EQ(values<std::int64_t>(file.read(tensor_at(dict, "t_int64"))).size(), 6u);
}

TEST(TorchGolden, Tensors) {
  const TorchFile file(golden_path("containers/tensors_zip.pt"));
  EXPECT_EQ(file.root().kind(), Kind::kOrderedDict);
  EXPECT_EQ(file.root().pairs().size(), 16u);
  check_golden_tensors(file, file.root());
}

TEST(TorchGolden, NestedValues) {
  const TorchFile file(golden_path("containers/nested_zip.pt"));
  const TorchValue& root = file.root();
  const TorchValue* state = root.find("state_dict");
  ASSERT_NE(state, nullptr);
  EXPECT_EQ(state->kind(), Kind::kOrderedDict);
  check_golden_tensors(file, *state);
  const TorchTensor& parameter = tensor_at(root, "param");
  EXPECT_TRUE(parameter.parameter);
  EXPECT_TRUE(parameter.requires_grad);
  EXPECT_EQ(parameter.shape, (std::vector<std::int64_t>{2, 2}));
  const TorchValue& config = *root.find("config");
  EXPECT_EQ(config.find("bits")->as_int(), 4);
  EXPECT_EQ(config.find("lr")->as_float(), 0.001);
  EXPECT_EQ(config.find("names")->kind(), Kind::kList);
  EXPECT_EQ(config.find("names")->items().at(1).as_text(), "b");
  EXPECT_EQ(config.find("t")->kind(), Kind::kTuple);
  EXPECT_EQ(config.find("t")->items().at(2).as_int(), 3);
  EXPECT_TRUE(config.find("none")->is_none());
  EXPECT_TRUE(config.find("flag")->as_bool());
  EXPECT_EQ(config.find("big")->as_int(), std::int64_t{1} << 40);
  EXPECT_EQ(config.find("neg")->as_int(), -5);
  EXPECT_EQ(config.find("dtype")->as_dtype(), DType::kBF16);
  EXPECT_EQ(config.find("size")->as_size(), (std::vector<std::int64_t>{3, 4}));
  EXPECT_EQ(config.find("device")->kind(), Kind::kDevice);
  EXPECT_EQ(config.find("device")->as_text(), "cpu");
  EXPECT_EQ(config.find("set")->kind(), Kind::kSet);
  EXPECT_EQ(config.find("set")->items().size(), 2u);
  EXPECT_EQ(config.find("s")->as_text(), "h\xC3\xA9");
  EXPECT_EQ(config.find("absent"), nullptr);
  EXPECT_EQ(config.find("bits")->find("x"), nullptr);
}

TEST(TorchGolden, CheckpointsAndStateDictsWithMetadata) {
  for (const char* name :
       {"dense-f16-bin/pytorch_model.bin", "hqq-pt-4bit/qmodel.pt", "hqq-pt-3bit-axis0/qmodel.pt",
        "hqq-pt-2bit/qmodel.pt", "layout-bnb-dir/pytorch_model.bin", "layout-bnb-single/model.pth",
        "layout-hqq-dir/pytorch_model.bin", "layout-quanto-dir/pytorch_model.bin",
        "layout-quanto-single/quanto_model.pth"}) {
    SCOPED_TRACE(name);
    const std::string path = golden_path("checkpoints/" + std::string(name));
    EXPECT_EQ(detect_file(path), FileKind::kTorch);
    const TorchFile file(path);
    EXPECT_TRUE(file.root().is_dict());
    EXPECT_GT(file.root().pairs().size(), 0u);
  }
  const TorchFile hqq(golden_path("checkpoints/hqq-pt-4bit/qmodel.pt"));
  const TorchValue* layer = hqq.root().find("model.layers.0.mlp.up_proj");
  ASSERT_NE(layer, nullptr);
  EXPECT_EQ(layer->find("nbits")->as_int(), 4);
  EXPECT_EQ(layer->find("shape")->as_size(), (std::vector<std::int64_t>{128, 64}));
  EXPECT_EQ(layer->find("compute_dtype")->as_dtype(), DType::kF16);
}

TEST(TorchGolden, LegacyFileIsRefusedByName) {
  const std::string path = golden_path("containers/legacy_not_zip.pt");
  EXPECT_EQ(detect_file(path), FileKind::kTorchLegacy);
  expect_error([&] { TorchFile file(path); }, Errc::kUnsupported, "legacy torch file");
}

TEST(DetectFile, ByContent) {
  EXPECT_EQ(detect_file(golden_path("containers/stored.npz")), FileKind::kNpz);
  EXPECT_EQ(detect_file(golden_path("containers/c_order.npy")), FileKind::kNpy);
  EXPECT_EQ(detect_file(golden_path("containers/good.safetensors")), FileKind::kSafetensors);
  EXPECT_EQ(detect_file(golden_path("containers/odd_leading_space.safetensors")),
            FileKind::kSafetensors);
  EXPECT_EQ(detect_file(golden_path("checkpoints/gguf/tiny-f16.gguf")), FileKind::kGguf);
  EXPECT_EQ(detect_file(golden_path("checkpoints/hqq-pt-4bit/config.json")), FileKind::kUnknown);
  EXPECT_THROW(detect_file(golden_path("containers/none")), Error);
  const TempFolder folder;
  const auto kind = [&](const std::string& bytes) {
    return detect_file(write_bytes(folder, "x", bytes));
  };
  EXPECT_EQ(kind(""), FileKind::kUnknown);
  EXPECT_EQ(kind(std::string(257, '\0') + "ustar" + std::string(300, '\0')), FileKind::kTar);
  EXPECT_EQ(kind("PK\x03\x04 damaged"), FileKind::kUnknown);
  EXPECT_EQ(kind(zip_of({testing::stored_entry("readme.txt", "hello")})), FileKind::kUnknown);
}

// ------------------------------------------------------------------ files made by hand

class Torch : public ::testing::Test {
 protected:
  std::string write(const std::string& bytes) { return write_bytes(folder_, "x.pt", bytes); }
  TorchFile open(const std::string& body, const std::vector<std::string>& storages = {}) {
    return TorchFile(write(zip_of(torch_entries(body, storages))));
  }
  TempFolder folder_;
};

TEST_F(Torch, EveryOpcode) {
  EXPECT_TRUE(open("N").root().is_none());
  EXPECT_EQ(open("J" + le(0xFFFFFFFE, 4)).root().as_int(), -2);
  EXPECT_EQ(open("M" + le(0xABCD, 2)).root().as_int(), 0xABCD);
  EXPECT_EQ(open(std::string("\x8a\x00", 2)).root().as_int(), 0);
  EXPECT_EQ(open("\x8a\x01\xFF").root().as_int(), -1);
  EXPECT_EQ(open("\x8a\x08" + le(std::uint64_t{1} << 63, 8)).root().as_int(),
            std::numeric_limits<std::int64_t>::min());
  EXPECT_EQ(open("U\x03"
                 "abc")
                .root()
                .as_text(),
            "abc");
  const TorchFile list = open(
      "](K\x01K\x02"
      "eN"
      "a");
  EXPECT_EQ(list.root().items().size(), 3u);
  const TorchFile tuple = open("K\x01\x85q" + le(7, 1) + "h" + le(7, 1) + "\x86");
  EXPECT_EQ(tuple.root().items().at(1).items().at(0).as_int(), 1);
  const TorchFile wide = open("]r" + le(70000, 4) + "j" + le(70000, 4) + "\x86");
  EXPECT_EQ(wide.root().items().size(), 2u);
  EXPECT_EQ(open("\x8f").root().kind(), Kind::kSet);
  const TorchFile dict = open("}" + p_text("a") +
                              "N"
                              "s(" +
                              p_text("b") +
                              "\x88"
                              "u");
  EXPECT_TRUE(dict.root().find("b")->as_bool());
  const TorchFile size = open(p_global("torch", "Size") + "K\x04K\x05\x86\x85\x81");
  EXPECT_EQ(size.root().as_size(), (std::vector<std::int64_t>{4, 5}));
  const TorchFile device = open(p_global("torch", "device") + p_text("cuda") + "K\x01\x86R");
  EXPECT_EQ(device.root().as_text(), "cuda:1");
  const TorchFile state =
      open(p_global("collections", "OrderedDict") + ")R}" + p_text("_metadata") + "Nsb");
  EXPECT_EQ(state.root().kind(), Kind::kOrderedDict);
  EXPECT_TRUE(state.root().pairs().empty());
}

TEST_F(Torch, AccessorsNameTheKind) {
  const TorchFile file = open("]");
  const TorchValue& list = file.root();
  expect_error([&] { list.as_int(); }, Errc::kCorrupt, "value is a list, expected an int");
  expect_error([&] { list.as_bool(); }, Errc::kCorrupt, "a bool");
  expect_error([&] { list.as_float(); }, Errc::kCorrupt, "a float");
  expect_error([&] { list.as_text(); }, Errc::kCorrupt, "a string");
  expect_error([&] { list.as_dtype(); }, Errc::kCorrupt, "a dtype");
  expect_error([&] { list.as_size(); }, Errc::kCorrupt, "a torch.Size");
  expect_error([&] { list.as_tensor(); }, Errc::kCorrupt, "a tensor");
  expect_error([&] { list.pairs(); }, Errc::kCorrupt, "a dict");
  expect_error([&] { TorchValue().items(); }, Errc::kCorrupt, "value is None");
  EXPECT_EQ(TorchValue::integer(3).as_float(), 3.0);
}

TEST_F(Torch, StridedViewsAreMadeRowMajor) {
  const std::string storage = floats(24);
  const auto read = [&](std::uint64_t offset, std::vector<std::uint64_t> shape,
                        std::vector<std::uint64_t> strides) {
    TensorPickle pickle{.numel = 24};
    pickle.offset = offset;
    pickle.shape = p_tuple(shape);
    pickle.strides = p_tuple(strides);
    const TorchFile file = open(pickle.text(), {storage});
    return values<float>(file.read(file.root().as_tensor()));
  };
  EXPECT_EQ(read(0, {2, 3, 4}, {12, 4, 1}), counting(24));
  const auto permuted = read(0, {4, 2, 3}, {1, 12, 4});
  ASSERT_EQ(permuted.size(), 24u);
  for (std::size_t i = 0; i < 4; ++i) {
    for (std::size_t j = 0; j < 2; ++j) {
      for (std::size_t k = 0; k < 3; ++k) {
        EXPECT_EQ(permuted[i * 6 + j * 3 + k], static_cast<float>(i + 12 * j + 4 * k));
      }
    }
  }
  EXPECT_EQ(read(5, {2, 2}, {12, 2}), (std::vector<float>{5, 7, 17, 19}));
  EXPECT_EQ(read(7, {3, 2}, {0, 1}), (std::vector<float>{7, 8, 7, 8, 7, 8}));
  EXPECT_EQ(read(23, {1, 1, 1}, {99, 99, 99}), std::vector<float>{23});
  EXPECT_EQ(read(2, {}, {}), std::vector<float>{2});
  EXPECT_EQ(read(0, {3, 0}, {7, 7}), std::vector<float>{});
  EXPECT_EQ(read(1, {3}, {5}), (std::vector<float>{1, 6, 11}));
}

TEST_F(Torch, BigEndianStoragesAreSwapped) {
  TensorPickle pickle{.numel = 3};
  pickle.storage = p_global("torch", "ShortStorage");
  pickle.shape = p_tuple({3});
  pickle.strides = p_tuple({1});
  auto entries = torch_entries(pickle.text(), {std::string("\x01\x02\x03\x04\x05\x06")});
  const auto read = [&] {
    const TorchFile file(write(zip_of(entries)));
    return values<std::uint16_t>(file.read(file.root().as_tensor()));
  };
  EXPECT_EQ(read(), (std::vector<std::uint16_t>{0x0201, 0x0403, 0x0605}));
  entries[1] = testing::stored_entry("x/byteorder", "big");
  EXPECT_EQ(read(), (std::vector<std::uint16_t>{0x0102, 0x0304, 0x0506}));
  entries[1] = testing::stored_entry("x/byteorder", "middle");
  expect_error(read, Errc::kCorrupt, "byteorder");
  entries.erase(entries.begin() + 1);
  EXPECT_EQ(read(), (std::vector<std::uint16_t>{0x0201, 0x0403, 0x0605}));
}

TEST_F(Torch, MisalignedStoragesAreCopied) {
  bool copied = false;
  for (const char* name : {"x/byteorder", "x/byteorde"}) {
    auto entries = torch_entries(TensorPickle{}.text(), {floats(6)});
    entries[1].name = name;
    const TorchFile file(write(zip_of(entries)));
    const HeldTensor held = file.read(file.root().as_tensor());
    EXPECT_EQ(values<float>(held), counting(6));
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(held.view.bytes.data()) % 4, 0u);
    copied =
        copied || held.view.bytes.data() != file.read(file.root().as_tensor()).view.bytes.data();
  }
  EXPECT_TRUE(copied);
}

TEST_F(Torch, SumsAreCheckedUnlessTheFileHasNone) {
  auto entries = torch_entries(TensorPickle{}.text(), {floats(6)});
  entries[2].crc ^= 1;
  {
    const TorchFile file(write(zip_of(entries)));
    expect_error([&] { file.read(file.root().as_tensor()); }, Errc::kCorrupt, "CRC-32");
  }
  entries[0].crc ^= 1;
  expect_error([&] { TorchFile file(write(zip_of(entries))); }, Errc::kCorrupt, "CRC-32");
  for (ZipEntry& entry : entries) entry.crc = 0;
  const TorchFile file(write(zip_of(entries)));
  EXPECT_EQ(values<float>(file.read(file.root().as_tensor())), counting(6));
}

// ------------------------------------------------------------------ writer

TorchValue sample_tree(TorchWriter& writer, std::vector<Tensor>& tensors) {
  TorchValue::Pairs pairs;
  for (int d = 0; d <= static_cast<int>(DType::kF8E8M0); ++d) {
    Tensor tensor = make_tensor(static_cast<DType>(d), {3, 4});
    for (std::size_t i = 0; i < tensor.bytes.size(); ++i) {
      tensor.bytes[i] = static_cast<std::uint8_t>((i * 7 + static_cast<std::size_t>(d)) % 2);
    }
    pairs.emplace_back(TorchValue::text(std::string(dtype_name(tensor.dtype))),
                       TorchValue::tensor(writer.add(tensor.view())));
    tensors.push_back(std::move(tensor));
  }
  TorchTensor transposed = pairs[0].second.as_tensor();
  transposed.shape = {4, 3};
  transposed.strides = {1, 4};
  transposed.parameter = transposed.requires_grad = true;
  const auto text = [](const char* s) { return TorchValue::text(s); };
  pairs.emplace_back(text("transposed"), TorchValue::tensor(transposed));
  constexpr auto kMin = std::numeric_limits<std::int64_t>::min();
  TorchValue::Items integers;
  for (const std::int64_t value :
       {std::int64_t{0}, std::int64_t{255}, std::int64_t{256}, std::int64_t{65536},
        std::int64_t{-1}, kMin, ~kMin, std::int64_t{1} << 31, -(std::int64_t{1} << 31) - 1}) {
    integers.push_back(TorchValue::integer(value));
  }
  pairs.emplace_back(
      text("meta"),
      TorchValue::dict({{text("integers"), TorchValue::list(std::move(integers))},
                        {text("real"), TorchValue::real(-0.1)},
                        {text("none"), TorchValue()},
                        {text("flags"), TorchValue::tuple({TorchValue::boolean(true)})},
                        {text("five"), TorchValue::tuple({text("a"), text("b"), text("c"),
                                                          text("d"), text("\xC3\xA9")})},
                        {text("dtype"), TorchValue::dtype(DType::kF16)},
                        {text("device"), TorchValue::device("cuda:2")},
                        {text("size"), TorchValue::size({1, 2, 300, 70000})},
                        {text("set"), TorchValue::set({text("x")})},
                        {TorchValue::integer(7), TorchValue::dict({})},
                        {TorchValue(), TorchValue::list({})}}));
  return TorchValue::ordered_dict(std::move(pairs));
}

bool same(const TorchValue& a, const TorchValue& b);
bool same_tensor(const TorchTensor& a, const TorchTensor& b) {
  return a.dtype == b.dtype && a.shape == b.shape && a.strides == b.strides &&
         a.offset == b.offset && a.storage == b.storage && a.parameter == b.parameter &&
         a.requires_grad == b.requires_grad;
}
bool same(const TorchValue& a, const TorchValue& b) {
  if (a.kind() != b.kind()) return false;
  switch (a.kind()) {
    case Kind::kNone:
      return true;
    case Kind::kBool:
      return a.as_bool() == b.as_bool();
    case Kind::kInt:
      return a.as_int() == b.as_int();
    case Kind::kFloat:
      return a.as_float() == b.as_float();
    case Kind::kText:
    case Kind::kDevice:
      return a.as_text() == b.as_text();
    case Kind::kDtype:
      return a.as_dtype() == b.as_dtype();
    case Kind::kSize:
      return a.as_size() == b.as_size();
    case Kind::kTensor:
      return same_tensor(a.as_tensor(), b.as_tensor());
    case Kind::kDict:
    case Kind::kOrderedDict:
      return std::equal(a.pairs().begin(), a.pairs().end(), b.pairs().begin(), b.pairs().end(),
                        [](const auto& x, const auto& y) {
                          return same(x.first, y.first) && same(x.second, y.second);
                        });
    default:
      return std::equal(a.items().begin(), a.items().end(), b.items().begin(), b.items().end(),
                        same);
  }
}

TEST_F(Torch, WriterIsReadBack) {
  const std::string path = folder_.path("out.pt");
  std::vector<Tensor> tensors;
  TorchWriter writer(path);
  const TorchValue tree = sample_tree(writer, tensors);
  EXPECT_FALSE(std::filesystem::exists(path));
  writer.finish(tree);
  EXPECT_EQ(detect_file(path), FileKind::kTorch);
  const TorchFile file(path);
  EXPECT_TRUE(same(file.root(), tree));
  for (const Tensor& tensor : tensors) {
    SCOPED_TRACE(dtype_name(tensor.dtype));
    const HeldTensor held = file.read(tensor_at(file.root(), dtype_name(tensor.dtype)));
    EXPECT_EQ(values<std::uint8_t>(held), tensor.bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(held.view.bytes.data()) % 64, 0u);
  }
  std::vector<Tensor> again;
  TorchWriter second(folder_.path("again.pt"));
  second.finish(sample_tree(second, again));
  EXPECT_EQ(testing::read_bytes(path), testing::read_bytes(folder_.path("again.pt")));
}

TEST_F(Torch, WriterRefuses) {
  const std::string path = folder_.path("out.pt");
  const Tensor tensor = make_tensor(DType::kF32, {2, 3});
  const auto finish = [&](const std::function<TorchValue(TorchTensor)>& tree) {
    return [&, tree] {
      TorchWriter writer(path);
      writer.finish(tree(writer.add(tensor.view())));
    };
  };
  expect_error(finish([](TorchTensor t) {
                 t.offset = 1;
                 return TorchValue::tensor(t);
               }),
               Errc::kConfig, "reaches element 6 of its storage");
  expect_error(finish([](TorchTensor t) {
                 t.storage = "1";
                 return TorchValue::tensor(t);
               }),
               Errc::kConfig, "expected one that this writer wrote");
  expect_error(finish([](TorchTensor) { return TorchValue::text("\xFF"); }), Errc::kConfig,
               "UTF-8");
  expect_error(finish([](TorchTensor) { return TorchValue::device("cuda:x"); }), Errc::kConfig,
               "device");
  expect_error(finish([](TorchTensor) {
                 return TorchValue::dict({{TorchValue::text("k"), TorchValue()},
                                          {TorchValue::text("k"), TorchValue()}});
               }),
               Errc::kConfig, "given twice");
  const auto nested = [](int depth) {
    TorchValue value = TorchValue::list({});
    for (int i = 1; i < depth; ++i) value = TorchValue::list({value});
    return value;
  };
  EXPECT_NO_THROW(finish([&](TorchTensor) { return nested(100); })());
  EXPECT_NO_THROW(TorchFile{path});
  expect_error(finish([&](TorchTensor) { return nested(101); }), Errc::kConfig, "nested deeper");
  TorchWriter writer(path);
  const TensorView lying{DType::kF32, {3, 3}, tensor.bytes};
  expect_error([&] { writer.add(lying); }, Errc::kShape, "tensor bytes");
}

}  // namespace
}  // namespace quantal
