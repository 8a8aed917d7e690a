// What the pickle machine builds before it is a tree of values.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "io/pickle.h"
#include "io/torch_symbols.h"

namespace quantal::io {

/// A value on the machine's stack: itself, or a number in one of the tables.
struct PickleValue {
  enum class Tag : std::uint8_t { kNone, kBool, kInt, kFloat, kNode, kText, kGlobal, kStorage };
  Tag tag = Tag::kNone;
  union {
    std::int64_t integer = 0;
    double real;
    std::size_t index;
  };

  static PickleValue boolean(bool value) {
    PickleValue out;
    out.tag = Tag::kBool;
    out.integer = value ? 1 : 0;
    return out;
  }
  static PickleValue of_integer(std::int64_t value) {
    PickleValue out;
    out.tag = Tag::kInt;
    out.integer = value;
    return out;
  }
  static PickleValue of_real(double value) {
    PickleValue out;
    out.tag = Tag::kFloat;
    out.real = value;
    return out;
  }
  static PickleValue at(Tag tag, std::size_t index) {
    PickleValue out;
    out.tag = tag;
    out.index = index;
    return out;
  }
};

/// An object with identity: it can change after it was stored in another one.
struct PickleNode {
  TorchValue::Kind kind = TorchValue::Kind::kNone;
  std::vector<PickleValue> items;  ///< dicts: key, value, key, value ...
  std::size_t tensor = 0;          ///< of kTensor
};

/// A storage named by a persistent id.
struct PickleStorage {
  std::string_view key;
  bool untyped = false;
  DType dtype = DType::kU8;
  std::int64_t bytes = 0;
};

struct PickleTables {
  std::vector<PickleNode> nodes;
  std::vector<std::string_view> texts;  ///< views of the pickle
  std::vector<PickleStorage> storages;
  std::vector<TorchTensor> tensors;
};

/// Tree below `root`. Throws Error{kCorrupt} as read_torch_pickle.
TorchValue resolve_pickle(const PickleTables& tables, PickleValue root, const ErrorSite& site);

/// "a call", "a list" ...: for messages.
std::string describe(const PickleTables& tables, PickleValue value);
/// "collections.OrderedDict"
std::string global_name(const TorchGlobal& global);

}  // namespace quantal::io
