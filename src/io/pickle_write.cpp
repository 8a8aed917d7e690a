// The tree of a torch file as a pickle of protocol 2.
#include <array>
#include <bit>
#include <limits>
#include <map>
#include <set>

#include "io/pickle.h"
#include "io/torch_symbols.h"
#include "io/utf8.h"

namespace quantal::io {
namespace {

using Kind = TorchValue::Kind;

const TorchGlobal* find_global(TorchSymbol symbol, DType dtype = DType::kU8) {
  for (const TorchGlobal& global : kTorchGlobals) {
    if (global.symbol == symbol && global.dtype == dtype) return &global;
  }
  return nullptr;
}

class PickleWriter {
 public:
  explicit PickleWriter(const std::function<std::int64_t(const TorchTensor&)>& storage_bytes)
      : storage_bytes_(storage_bytes) {}

  std::string write(const TorchValue& root) {
    out_ = "\x80\x02";
    value(root, 0);
    out_ += '.';
    return std::move(out_);
  }

 private:
  void little_endian(std::uint64_t number, int bytes) {
    for (int i = 0; i < bytes; ++i) out_ += static_cast<char>(number >> (8 * i) & 0xFF);
  }

  /// Emits `make` once and refers to it from then on.
  template <class Make>
  void once(const std::string& key, Make make) {
    const auto [found, fresh] = memo_.emplace(key, memo_.size());
    const std::size_t index = found->second;
    if (fresh) make();
    out_ += fresh ? (index < 256 ? 'q' : 'r') : (index < 256 ? 'h' : 'j');
    little_endian(index, index < 256 ? 1 : 4);
  }

  void global(const TorchGlobal& found) {
    const std::string name = std::string(found.module) + "\n" + std::string(found.name) + "\n";
    once("c" + name, [&] { out_ += "c" + name; });
  }
  void global(TorchSymbol symbol) { global(*find_global(symbol)); }

  void text(const std::string& value) {
    if (!is_utf8(value)) fail(Errc::kConfig, "torch: a string is not valid UTF-8");
    if (value.size() > std::numeric_limits<std::uint32_t>::max()) {
      fail(Errc::kConfig, "torch: a string is longer than 4 GiB");
    }
    out_ += 'X';
    little_endian(value.size(), 4);
    out_ += value;
  }
  void word(const std::string& value) {
    once("X" + value, [&] { text(value); });
  }

  void boolean(bool value) { out_ += value ? '\x88' : '\x89'; }

  void integer(std::int64_t value) {
    const auto bits = static_cast<std::uint64_t>(value);
    if (value >= 0 && value < 256) {
      out_ += 'K';
      little_endian(bits, 1);
    } else if (value >= 0 && value < 65536) {
      out_ += 'M';
      little_endian(bits, 2);
    } else if (value >= std::numeric_limits<std::int32_t>::min() &&
               value <= std::numeric_limits<std::int32_t>::max()) {
      out_ += 'J';
      little_endian(bits, 4);
    } else {
      int bytes = 5;  // as few as keep the sign
      while (bytes < 8 && (value >> (8 * bytes - 1)) != (value < 0 ? -1 : 0)) ++bytes;
      out_ += '\x8a';
      little_endian(static_cast<std::uint64_t>(bytes), 1);
      little_endian(bits, bytes);
    }
  }

  void real(double value) {
    const auto bits = std::bit_cast<std::uint64_t>(value);
    out_ += 'G';
    for (int i = 7; i >= 0; --i) out_ += static_cast<char>(bits >> (8 * i) & 0xFF);
  }

  void integers(const std::vector<std::int64_t>& values) {
    begin_tuple(values.size());
    for (const std::int64_t value : values) integer(value);
    end_tuple(values.size());
  }

  void begin_tuple(std::size_t size) {
    if (size > 3) out_ += '(';
  }
  void end_tuple(std::size_t size) {
    constexpr std::array kShort = {')', '\x85', '\x86', '\x87'};
    out_ += size < kShort.size() ? kShort[size] : 't';
  }

  void empty_hooks() {
    global(TorchSymbol::kOrderedDict);
    out_ += ")R";
  }

  void items(const TorchValue::Items& values, int depth) {
    for (const TorchValue& item : values) value(item, depth + 1);
  }

  void list(const TorchValue::Items& values, int depth) {
    out_ += ']';
    if (values.empty()) return;
    out_ += '(';
    items(values, depth);
    out_ += 'e';
  }

  void pairs(const TorchValue::Pairs& values, int depth) {
    if (values.empty()) return;
    std::set<std::string> names;
    out_ += '(';
    for (const auto& [key, item] : values) {
      if (key.kind() == Kind::kText && !names.insert(key.as_text()).second) {
        fail(Errc::kConfig, "torch: dict key is given twice, expected once",
             {.tensor = key.as_text()});
      }
      value(key, depth + 1);
      value(item, depth + 1);
    }
    out_ += 'u';
  }

  void device(const std::string& name) {
    global(TorchSymbol::kDevice);
    const std::size_t colon = name.find(':');
    text(name.substr(0, colon));
    if (colon == std::string::npos) {
      out_ += '\x85';
    } else {
      std::int64_t index = 0;
      for (const char c : name.substr(colon + 1)) {
        if (c < '0' || c > '9' || index > 9999) {
          fail(Errc::kConfig, "torch: device is \"" + name + "\", expected a type and an index");
        }
        index = index * 10 + (c - '0');
      }
      integer(index);
      out_ += '\x86';
    }
    out_ += 'R';
  }

  void tensor(const TorchTensor& value) {
    if (!value.parameter) return data(value, value.requires_grad);
    global(TorchSymbol::kRebuildParameter);
    data(value, false);
    boolean(value.requires_grad);
    empty_hooks();
    out_ += "\x87R";
  }

  void data(const TorchTensor& value, bool requires_grad) {
    const TorchGlobal* storage = find_global(TorchSymbol::kStorage, value.dtype);
    const bool typed = storage != nullptr;
    const std::int64_t itemsize = static_cast<std::int64_t>(dtype_size(value.dtype));
    global(typed ? TorchSymbol::kRebuildTensorV2 : TorchSymbol::kRebuildTensorV3);
    out_ += "((";
    word("storage");
    global(typed ? *storage : *find_global(TorchSymbol::kUntypedStorage));
    text(value.storage);
    word("cpu");
    integer(typed ? storage_bytes_(value) / itemsize : storage_bytes_(value));
    out_ += "tQ";
    integer(value.offset);
    integers(value.shape);
    integers(value.strides);
    boolean(requires_grad);
    empty_hooks();
    if (!typed) global(*find_global(TorchSymbol::kDtype, value.dtype));
    out_ += "tR";
  }

  void value(const TorchValue& found, int depth) {
    switch (found.kind()) {
      case Kind::kNone:
        out_ += 'N';
        return;
      case Kind::kBool:
        return boolean(found.as_bool());
      case Kind::kInt:
        return integer(found.as_int());
      case Kind::kFloat:
        return real(found.as_float());
      case Kind::kText:
        return text(found.as_text());
      case Kind::kDtype:
        return global(*find_global(TorchSymbol::kDtype, found.as_dtype()));
      case Kind::kDevice:
        return device(found.as_text());
      case Kind::kTensor:
        return tensor(found.as_tensor());
      default:
        return container(found, depth);
    }
  }

  void container(const TorchValue& found, int depth) {
    if (depth >= kMostPickleDepth) {
      fail(Errc::kConfig, "torch: values are nested deeper than " +
                              std::to_string(kMostPickleDepth) + " containers");
    }
    switch (found.kind()) {
      case Kind::kList:
        return list(found.items(), depth);
      case Kind::kTuple:
        begin_tuple(found.items().size());
        items(found.items(), depth);
        return end_tuple(found.items().size());
      case Kind::kSet:
        global(TorchSymbol::kSet);
        list(found.items(), depth);
        out_ += "\x85R";
        return;
      case Kind::kSize:
        global(TorchSymbol::kSize);
        integers(found.as_size());
        out_ += "\x85R";
        return;
      case Kind::kOrderedDict:
        empty_hooks();
        return pairs(found.pairs(), depth);
      default:
        out_ += '}';
        return pairs(found.pairs(), depth);
    }
  }

  const std::function<std::int64_t(const TorchTensor&)>& storage_bytes_;
  std::string out_;
  std::map<std::string, std::size_t> memo_;
};

}  // namespace

std::string write_torch_pickle(
    const TorchValue& root, const std::function<std::int64_t(const TorchTensor&)>& storage_bytes) {
  return PickleWriter(storage_bytes).write(root);
}

}  // namespace quantal::io
