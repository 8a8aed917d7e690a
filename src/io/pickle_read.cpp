// From the tables of the pickle machine to a tree of values.
#include <algorithm>
#include <set>

#include "io/pickle_machine.h"

namespace quantal::io {
namespace {

using Kind = TorchValue::Kind;
using Tag = PickleValue::Tag;

// One shared list may stand in another many times, that one again, and so on: a small file, a
// gigantic tree.
constexpr std::uint64_t kMostValues = std::uint64_t{1} << 24;

std::string dtype_key(DType dtype) { return "t" + std::string(dtype_name(dtype)); }

/// Turns nodes into values, each once however often it is referred to.
class Resolver {
 public:
  Resolver(const PickleTables& tables, const ErrorSite& site)
      : tables_(tables), site_(site), done_(tables.nodes.size()), texts_(tables.texts.size()) {}

  TorchValue resolve(PickleValue value) { return visit(value, 0).value; }

 private:
  enum class State : std::uint8_t { kNew, kOpen, kDone };
  struct Result {
    TorchValue value;
    std::uint64_t count = 1;  ///< values of the tree below, itself included
    int depth = 0;
    State state = State::kNew;
  };

  [[noreturn]] void corrupt(const std::string& message) const {
    fail(Errc::kCorrupt, "torch: pickle: " + message, site_);
  }

  Result visit(PickleValue value, int depth) {
    switch (value.tag) {
      case Tag::kNone:
        return {};
      case Tag::kBool:
        return {.value = TorchValue::boolean(value.integer != 0)};
      case Tag::kInt:
        return {.value = TorchValue::integer(value.integer)};
      case Tag::kFloat:
        return {.value = TorchValue::real(value.real)};
      case Tag::kText:
        return {.value = text(value.index)};
      case Tag::kGlobal:
        return {.value = global(kTorchGlobals[value.index])};
      case Tag::kStorage:
        fail(Errc::kUnsupported, "torch: pickle holds a bare storage, expected tensors", site_);
      case Tag::kNode:
        break;
    }
    return node(value.index, depth);
  }

  TorchValue text(std::size_t index) {
    TorchValue& value = texts_[index];
    if (value.is_none()) value = TorchValue::text(std::string(tables_.texts[index]));
    return value;
  }

  TorchValue global(const TorchGlobal& found) const {
    if (found.symbol == TorchSymbol::kDtype) return TorchValue::dtype(found.dtype);
    fail(Errc::kUnsupported,
         "torch: pickle holds " + global_name(found) + " itself, expected plain data", site_);
  }

  const Result& node(std::size_t index, int depth) {
    Result& result = done_[index];
    if (result.state == State::kOpen) corrupt("a container holds itself");
    if (depth + result.depth >= kMostPickleDepth) {
      corrupt("containers are nested deeper than " + std::to_string(kMostPickleDepth));
    }
    if (result.state == State::kDone) return result;
    result.state = State::kOpen;
    const PickleNode& from = tables_.nodes[index];
    TorchValue::Items items;
    if (from.kind != Kind::kTensor) {
      items.reserve(from.items.size());
      for (const PickleValue item : from.items) {
        const Result below = visit(item, depth + 1);
        result.depth = std::max(result.depth, below.depth + (item.tag == Tag::kNode ? 1 : 0));
        result.count += below.count;
        if (result.count > kMostValues) corrupt("sharing makes more than 16777216 values of it");
        items.push_back(below.value);
      }
    }
    result.value = make(from, std::move(items));
    result.state = State::kDone;
    return result;
  }

  TorchValue make(const PickleNode& from, TorchValue::Items items) {
    switch (from.kind) {
      case Kind::kList:
        return TorchValue::list(std::move(items));
      case Kind::kTuple:
        return TorchValue::tuple(std::move(items));
      case Kind::kSet:
        check_keys(items, 1);
        return TorchValue::set(std::move(items));
      case Kind::kTensor:
        return TorchValue::tensor(tables_.tensors[from.tensor]);
      case Kind::kSize: {
        std::vector<std::int64_t> dims;
        for (const TorchValue& item : items) dims.push_back(item.as_int());
        return TorchValue::size(std::move(dims));
      }
      case Kind::kDevice:
        return TorchValue::device(items.size() < 2 ? items.at(0).as_text()
                                                   : items[0].as_text() + ":" +
                                                         std::to_string(items[1].as_int()));
      default:
        return dict(from.kind, std::move(items));
    }
  }

  TorchValue dict(Kind kind, TorchValue::Items items) {
    check_keys(items, 2);
    TorchValue::Pairs pairs;
    pairs.reserve(items.size() / 2);
    for (std::size_t i = 0; i + 1 < items.size(); i += 2) {
      pairs.emplace_back(std::move(items[i]), std::move(items[i + 1]));
    }
    return kind == Kind::kDict ? TorchValue::dict(std::move(pairs))
                               : TorchValue::ordered_dict(std::move(pairs));
  }

  /// Every `step`-th item is a key: scalar, and not there twice.
  void check_keys(const TorchValue::Items& items, std::size_t step) const {
    std::set<std::string> seen;
    for (std::size_t i = 0; i < items.size(); i += step) {
      if (seen.insert(key_of(items[i])).second) continue;
      const bool text = items[i].kind() == Kind::kText;
      corrupt("key " +
              (text ? "\"" + items[i].as_text().substr(0, 100) + "\"" : "of a dict or set") +
              " stands twice, expected once");
    }
  }

  /// Equal for keys that Python holds equal; True is 1 and 1.0.
  std::string key_of(const TorchValue& key) const {
    switch (key.kind()) {
      case Kind::kNone:
        return "n";
      case Kind::kBool:
        return key.as_bool() ? "i1" : "i0";
      case Kind::kInt:
        return "i" + std::to_string(key.as_int());
      case Kind::kText:
        return "s" + key.as_text();
      case Kind::kDtype:
        return dtype_key(key.as_dtype());
      default:
        fail(Errc::kUnsupported,
             "torch: pickle has a key that is " + std::string(torch_kind_name(key.kind())) +
                 ", expected a string, int, bool, dtype or None",
             site_);
    }
  }

  const PickleTables& tables_;
  const ErrorSite& site_;
  std::vector<Result> done_;
  std::vector<TorchValue> texts_;
};

}  // namespace

std::string describe(const PickleTables& tables, PickleValue value) {
  switch (value.tag) {
    case Tag::kNone:
      return "None";
    case Tag::kBool:
      return "a bool";
    case Tag::kInt:
      return "the int " + std::to_string(value.integer);
    case Tag::kFloat:
      return "a float";
    case Tag::kText:
      return "a string";
    case Tag::kGlobal:
      return global_name(kTorchGlobals[value.index]);
    case Tag::kStorage:
      return "a storage";
    case Tag::kNode:
      break;
  }
  return std::string(torch_kind_name(tables.nodes[value.index].kind));
}

TorchValue resolve_pickle(const PickleTables& tables, PickleValue root, const ErrorSite& site) {
  return Resolver(tables, site).resolve(root);
}

TorchValue read_torch_pickle(const PickleSource& source) { return PickleMachine(source).run(); }

}  // namespace quantal::io
