// Pickles that want something run, and files that lie. Nothing is run; every refusal has a name.
#include <gtest/gtest.h>

#include <cstdlib>

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
using testing::read_bytes;
using testing::stored_entry;
using testing::TempFolder;
using testing::TensorPickle;
using testing::torch_entries;
using testing::write_bytes;
using testing::zip_of;
using testing::ZipEntry;

const std::string kOrdered = p_global("collections", "OrderedDict");

class TorchHostile : public ::testing::Test {
 protected:
  void refuses_file(const std::vector<ZipEntry>& entries, Errc code, const std::string& part) {
    const std::string path = write_bytes(folder_, "x.pt", zip_of(entries));
    expect_error([&] { TorchFile file(path); }, code, part);
  }
  void refuses(const std::string& body, Errc code, const std::string& part) {
    refuses_file(torch_entries(body, {std::string(24, '\0')}), code, part);
  }
  void refuses_tensor(const TensorPickle& pickle, Errc code, const std::string& part) {
    refuses(pickle.text(), code, part);
  }
  TempFolder folder_;
};

TEST_F(TorchHostile, NothingIsRun) {
  const std::string marker = folder_.path("was-run");
  const std::string command = p_text("touch " + marker);
  const std::pair<std::string, std::string> calls[] = {{"os", "system"},
                                                       {"posix", "system"},
                                                       {"builtins", "eval"},
                                                       {"__builtin__", "eval"},
                                                       {"builtins", "exec"},
                                                       {"builtins", "getattr"},
                                                       {"subprocess", "Popen"},
                                                       {"torch", "load"},
                                                       {"torch.hub", "load"},
                                                       {"numpy", "load"},
                                                       {"shutil", "rmtree"},
                                                       {"torch._utils", "_rebuild_qtensor"},
                                                       {"torch", "Tensor"},
                                                       {"torch", "Size.x"},
                                                       {"collections", "defaultdict"},
                                                       {"torch.nn", "Linear"},
                                                       {"copyreg", "_reconstructor"}};
  for (const auto& [module, name] : calls) {
    SCOPED_TRACE(module + "." + name);
    refuses(p_global(module, name) + command + "\x85R", Errc::kUnsupported,
            "global " + module + "." + name + ", which is not run");
    refuses(p_global(module, name), Errc::kUnsupported, module + "." + name);
  }
  EXPECT_FALSE(std::filesystem::exists(marker));
}

TEST_F(TorchHostile, CallsOfOtherThingsAreNamed) {
  refuses(p_text("eval") + p_text("1") + "\x85R", Errc::kUnsupported, "calls a string");
  refuses("]" + p_text("1") + "\x85R", Errc::kUnsupported, "calls a list");
  refuses(p_global("torch", "FloatStorage") + "K\x09\x85R", Errc::kUnsupported,
          "calls torch.FloatStorage");
  refuses(p_global("torch", "float16") + ")R", Errc::kUnsupported, "calls torch.float16");
  refuses(p_global("torch", "device") + p_text("cpu") + "\x85\x81", Errc::kUnsupported,
          "calls torch.device by NEWOBJ");
  refuses(p_global("torch._utils", "_rebuild_parameter") + "NNN\x87\x81", Errc::kUnsupported,
          "by NEWOBJ");
  refuses(kOrdered + "]R", Errc::kCorrupt, "arguments of a call are a list");
  refuses(kOrdered + "N\x85R", Errc::kCorrupt, "has 1 arguments");
  refuses(kOrdered, Errc::kUnsupported, "holds collections.OrderedDict itself");
  refuses("}}b", Errc::kUnsupported, "sets attributes of a dict");
  refuses(kOrdered + ")RNb", Errc::kUnsupported, "sets attributes from None");
  refuses(p_global("__builtin__", "set") + ")\x85R", Errc::kCorrupt, "set is made of a tuple");
}

TEST_F(TorchHostile, OpcodesAreNamed) {
  const std::pair<std::string, std::string> opcodes[] = {{"(ios\nsystem\n", "INST"},
                                                         {"(o", "OBJ"},
                                                         {"\x8c\x02os", "SHORT_BINUNICODE"},
                                                         {"NN\x93", "STACK_GLOBAL"},
                                                         {"\x82\x01", "EXT1"},
                                                         {"Psome id\n", "PERSID"},
                                                         {"I1\n", "INT"},
                                                         {"V1\n", "UNICODE"},
                                                         {"S'x'\n", "STRING"},
                                                         {"N0", "POP"},
                                                         {"N2", "DUP"},
                                                         {"(d", "DICT"},
                                                         {"N\x94", "MEMOIZE"},
                                                         {"N\x95", "FRAME"},
                                                         {"\x8b", "LONG4"},
                                                         {"N\x92", "NEWOBJ_EX"},
                                                         {"C", "SHORT_BINBYTES"},
                                                         {"\xFE", "0xfe"}};
  for (const auto& [body, name] : opcodes) {
    SCOPED_TRACE(name);
    refuses(body, Errc::kUnsupported, "opcode " + name);
  }
  auto entries = torch_entries("N");
  entries[0] = stored_entry("x/data.pkl", "\x80\x04N.");
  refuses_file(entries, Errc::kUnsupported, "protocol 4");
}

TEST_F(TorchHostile, PersistentIdsAreNamed) {
  const std::string storage = p_global("torch", "FloatStorage");
  refuses(p_text("storage") + "Q", Errc::kUnsupported, "persistent id that is a string");
  refuses("(" + p_text("module") + storage + p_text("0") + p_text("cpu") + "K\x01tQ",
          Errc::kUnsupported, "persistent id");
  refuses("(" + p_text("storage") + storage + p_text("0") + p_text("cpu") + "tQ",
          Errc::kUnsupported, "persistent id");
  refuses("(" + p_text("storage") + kOrdered + p_text("0") + p_text("cpu") + "K\x01tQ",
          Errc::kUnsupported, "class is collections.OrderedDict");
  refuses("(" + p_text("storage") + storage + "K\x01" + p_text("cpu") + "K\x01tQ", Errc::kCorrupt,
          "key of a storage is the int 1");
  refuses(
      "(" + p_text("storage") + storage + p_text(std::string(300, 'k')) + p_text("cpu") + "K\x01tQ",
      Errc::kCorrupt, "300 bytes long");
  refuses("(" + p_text("storage") + storage + p_text("0") + p_text("cpu") +
              p_int(std::uint64_t{1} << 62) + "tQ",
          Errc::kCorrupt, "overflows");
  refuses("(" + p_text("storage") + storage + p_text("0") + p_text("cpu") + "K\x01tQ",
          Errc::kUnsupported, "bare storage");
}

TEST_F(TorchHostile, TensorsStayInTheirStorage) {
  TensorPickle t;
  t.offset = 1;
  refuses_tensor(t, Errc::kCorrupt, "reaches element 6 of its storage, expected below 6");
  t = {};
  t.numel = 7;
  refuses_tensor(t, Errc::kCorrupt, "storage is 24 bytes, expected at least 28");
  t = {};
  t.key = "9";
  refuses_tensor(t, Errc::kCorrupt, "no member x/data/9");
  t.key = "../../etc/passwd";
  refuses_tensor(t, Errc::kCorrupt, "no member");
  t = {};
  t.strides = p_tuple({std::uint64_t{1} << 62, 1});
  t.shape = p_tuple({3, 3});
  refuses_tensor(t, Errc::kCorrupt, "without overflow");
  t.shape = p_tuple({std::uint64_t{1} << 62, 1});
  t.strides = p_tuple({1, 1});
  refuses_tensor(t, Errc::kCorrupt, "without overflow");
  t.shape = p_tuple({std::uint64_t{1} << 40, 2});
  t.strides = p_tuple({0, 1});
  refuses_tensor(t, Errc::kUnsupported, "four times the file");
  t = {};
  t.strides = p_tuple({3});
  refuses_tensor(t, Errc::kCorrupt, "2 sizes and 1 strides");
  t = {};
  t.shape = p_tuple(std::vector<std::uint64_t>(65, 1));
  refuses_tensor(t, Errc::kCorrupt, "65 dimensions");
  t = {};
  t.shape = "(J" + le(0xFFFFFFFF, 4) + "K\x03t";
  refuses_tensor(t, Errc::kCorrupt, "the int -1, expected an int >= 0");
  t = {};
  t.shape = "]";
  refuses_tensor(t, Errc::kCorrupt, "a list, expected a tuple of ints");
}

TEST_F(TorchHostile, TensorArgumentsAreChecked) {
  TensorPickle t;
  t.requires_grad = "K\x01";
  refuses_tensor(t, Errc::kCorrupt, "requires_grad");
  t = {};
  t.hooks = kOrdered + ")R" + p_text("hook") + "Ns";
  refuses_tensor(t, Errc::kUnsupported, "hooks is not empty");
  t = {};
  t.more = "}" + p_text("neg") + "\x88s";
  refuses_tensor(t, Errc::kUnsupported, "metadata is not empty");
  t.more = "}N";
  refuses_tensor(t, Errc::kCorrupt, "has 8 arguments");
  t = {};
  t.function = "_rebuild_tensor_v3";
  refuses_tensor(t, Errc::kCorrupt, "7 to 8");
  t.more = p_global("torch", "float8_e4m3fn");
  refuses_tensor(t, Errc::kCorrupt, "typed storage, expected an untyped one");
  t.storage = p_global("torch.storage", "UntypedStorage");
  t.more = "N";
  refuses_tensor(t, Errc::kCorrupt, "dtype of a tensor is None");
  t.function = "_rebuild_tensor_v2";
  t.more = "";
  refuses_tensor(t, Errc::kCorrupt, "untyped storage, expected a typed one");
  refuses(p_global("torch._utils", "_rebuild_tensor_v2") + "(NNNNNNtR", Errc::kCorrupt,
          "storage of a tensor is None");
  refuses(p_global("torch._utils", "_rebuild_parameter") + "]\x88}\x87R", Errc::kCorrupt,
          "parameter is made of a list");
}

TEST_F(TorchHostile, MachineStaysInItsBounds) {
  refuses("", Errc::kCorrupt, "leaves 0 values");
  refuses("NN", Errc::kCorrupt, "leaves 2 values");
  refuses("(N", Errc::kCorrupt, "leaves 1 values");
  refuses("a", Errc::kCorrupt, "stack is empty");
  refuses("](Na", Errc::kCorrupt, "stack is empty");
  refuses("t", Errc::kCorrupt, "no mark");
  refuses("q\x01", Errc::kCorrupt, "stack is empty");
  refuses("h\x01", Errc::kCorrupt, "memo 1 was never set");
  refuses("j" + le(0xFFFFFFFF, 4), Errc::kCorrupt, "memo 4294967295");
  refuses("}(Nu", Errc::kCorrupt, "no value");
  refuses("N(NNu", Errc::kUnsupported, "SETITEMS to None");
  refuses("}(Ne", Errc::kUnsupported, "APPENDS to a dict");
  refuses("X" + le(0xFFFFFFFF, 4), Errc::kCorrupt, "needs 4294967295 bytes");
  refuses("X" + le(1, 4) + "\xFF", Errc::kCorrupt, "UTF-8");
  refuses("X" + le(3, 4) + "\xED\xA0\x80", Errc::kCorrupt, "UTF-8");
  refuses("X" + le(2, 4) + "\xC0\x80", Errc::kCorrupt, "UTF-8");
  refuses("\x8a\x09" + std::string(9, '\x01'), Errc::kUnsupported, "integer of 9 bytes");
  refuses("cos\nsystem", Errc::kCorrupt, "name has no end");
  refuses("N.N", Errc::kCorrupt, "bytes follow the end");
}

TEST_F(TorchHostile, CyclesDepthAndSharing) {
  refuses(
      "]q\x01h\x01"
      "a",
      Errc::kCorrupt, "holds itself");
  refuses("}q\x01" + p_text("me") + "h\x01s", Errc::kCorrupt, "holds itself");
  refuses(
      "]q\x01h\x01\x85q\x02"
      "a",
      Errc::kCorrupt, "holds itself");
  refuses(std::string(101, ']') + std::string(100, 'a'), Errc::kCorrupt, "nested deeper than 100");
  const std::string path = write_bytes(
      folder_, "deep.pt", zip_of(torch_entries(std::string(100, ']') + std::string(99, 'a'))));
  EXPECT_NO_THROW(TorchFile{path});
  // Each list holds the one before it twice: 2^60 values in 400 bytes.
  std::string laughs = "]";
  for (char i = 0; i < 60; ++i) laughs += std::string("q") + i + "h" + i + "\x86";
  refuses(laughs, Errc::kCorrupt, "sharing makes more than 16777216 values");
  refuses("}" + p_text("k") + "Ns" + p_text("k") + "Ns", Errc::kCorrupt, "\"k\" stands twice");
  refuses("}K\x01Ns\x88Ns", Errc::kCorrupt, "stands twice");
  refuses("}]Ns", Errc::kUnsupported, "key that is a list");
}

TEST_F(TorchHostile, SharedArgumentsDoNotMultiply) {
  std::string set =
      "](" + std::string(1000, 'N') + "eq\x01" + p_global("__builtin__", "set") + "q\x02]";
  for (int i = 0; i < 2000; ++i)
    set +=
        "h\x02h\x01\x85R"
        "a";
  refuses(set, Errc::kCorrupt, "the same list makes many sets");
  refuses(p_global("torch", "Size") + "(" + std::string(100, '\x89') + "t\x85R", Errc::kCorrupt,
          "100 dimensions");
  refuses(kOrdered + "(" + std::string(100, 'N') + "tR", Errc::kCorrupt, "100 arguments");
  refuses("(" + std::string(200000, ']') + "t", Errc::kCorrupt, "more containers");
}

TEST_F(TorchHostile, ArchivesAreRefusedByName) {
  refuses_file({stored_entry("readme", "x")}, Errc::kCorrupt, "no <folder>/data.pkl");
  refuses_file({stored_entry("data.pkl", "N.")}, Errc::kCorrupt, "no <folder>/data.pkl");
  refuses_file({stored_entry("a/data.pkl", "N."), stored_entry("b/data.pkl", "N.")}, Errc::kCorrupt,
               "two data.pkl");
  refuses_file({stored_entry("a.npy", "x")}, Errc::kUnsupported, "file is an npz file");
  auto entries = torch_entries("N");
  entries.push_back(stored_entry("x/constants.pkl", "N."));
  entries.push_back(stored_entry("x/code/__torch__.py", "class Net"));
  refuses_file(entries, Errc::kUnsupported, "TorchScript archive");
  entries = torch_entries(std::string(500, 'N'));
  entries[0] = testing::deflated_entry("x/data.pkl", std::string(500, 'N'));
  refuses_file(entries, Errc::kUnsupported, "compressed");
  const std::string tar =
      write_bytes(folder_, "x.tar", std::string(257, '\0') + "ustar" + std::string(300, '\0'));
  expect_error([&] { TorchFile file(tar); }, Errc::kUnsupported, "tar archive");
  expect_error([&] { TorchFile file(golden_path("containers/good.safetensors")); },
               Errc::kUnsupported, "a safetensors file");
  expect_error([&] { TorchFile file(folder_.path("none")); }, Errc::kIo, "none");
}

TEST_F(TorchHostile, ErrorsSayWhere) {
  const std::string path =
      write_bytes(folder_, "x.pt", zip_of(torch_entries("N" + p_global("os", "system") + "R")));
  const Error e = testing::error_of([&] { TorchFile file(path); });
  EXPECT_EQ(e.site().path, path);
  EXPECT_EQ(e.site().offset, 30 + 10 + 3);  // local header, name, PROTO 2, None
}

TEST_F(TorchHostile, EveryTruncationAndFlipIsSafe) {
  for (const char* name : {"tensors_zip", "nested_zip"}) {
    const std::string bytes = read_bytes(golden_path("containers/" + std::string(name) + ".pt"));
    for (std::size_t n = 0; n < bytes.size(); ++n) {
      const std::string path = write_bytes(folder_, "cut.pt", bytes.substr(0, n));
      EXPECT_THROW(TorchFile{path}, Error) << n;
    }
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      std::string flipped = bytes;
      flipped[i] = static_cast<char>(flipped[i] ^ (1 << (i % 8)));
      const std::string path = write_bytes(folder_, "flip.pt", flipped);
      try {
        const TorchFile file(path);
      } catch (const Error&) {
      }
    }
  }
}

TEST_F(TorchHostile, EveryFlipOfThePickleIsSafe) {
  const std::string bytes = read_bytes(golden_path("containers/nested_zip.pt"));
  constexpr std::size_t kBegin = 64, kBytes = 1864;  // data.pkl is the first member
  const std::string pickle = bytes.substr(kBegin, kBytes);
  ASSERT_EQ(pickle[0], '\x80');
  std::vector<std::string> storages(15, std::string(96, '\0'));
  auto entries = torch_entries("N", storages);
  std::size_t accepted = 0;
  for (std::size_t i = 0; i <= pickle.size(); ++i) {
    for (const int bit : {0, 3, 5, 7}) {
      std::string flipped = pickle;
      if (i < pickle.size()) flipped[i] = static_cast<char>(flipped[i] ^ (1 << bit));
      entries[0] = stored_entry("x/data.pkl", flipped);
      const std::string path = write_bytes(folder_, "flip.pt", zip_of(entries));
      try {
        const TorchFile file(path);
        ++accepted;
        const TorchValue* config = file.root().find("config");
        if (i == pickle.size()) {
          ASSERT_NE(config, nullptr);
        }
      } catch (const Error&) {
        ASSERT_LT(i, pickle.size());
      }
    }
  }
  EXPECT_GT(accepted, 100u);  // letters of keys and numbers may be others
}

}  // namespace
}  // namespace quantal
