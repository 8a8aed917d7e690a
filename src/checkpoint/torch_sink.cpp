#include "checkpoint/torch_sink.h"

#include <charconv>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <map>
#include <utility>
#include <vector>

#include "quantal/archive.h"

namespace quantal::checkpoint {
namespace {

/// A dictionary while it is being filled; keys keep the order of their first appearance.
class Tree {
 public:
  /// Puts a value at a dotted path below `key`: ("a.b", "meta.nbits") gives {"a.b": {"meta":
  /// {"nbits": ...}}}.
  void put(const std::string& key, std::string_view path, TorchValue value) {
    Tree& child = at(key);
    if (path.empty()) {
      child.value_ = std::move(value);
      return;
    }
    const std::size_t dot = path.find('.');
    const bool leaf = dot == std::string_view::npos;
    child.put(std::string(path.substr(0, dot)), leaf ? "" : path.substr(dot + 1), std::move(value));
  }

  TorchValue finish(bool ordered) const {
    if (order_.empty()) return value_;
    TorchValue::Pairs pairs;
    for (const auto& [key, child] : order_) {
      pairs.emplace_back(TorchValue::text(key), child->finish(false));
    }
    return ordered ? TorchValue::ordered_dict(std::move(pairs))
                   : TorchValue::dict(std::move(pairs));
  }

 private:
  Tree& at(const std::string& key) {
    auto& slot = children_[key];
    if (slot == nullptr) {
      slot = std::make_unique<Tree>();
      order_.emplace_back(key, slot.get());
    }
    return *slot;
  }

  TorchValue value_;
  std::map<std::string, std::unique_ptr<Tree>> children_;
  std::vector<std::pair<std::string, const Tree*>> order_;
};

template <class T>
T scalar(const TensorView& view) {
  T value{};
  std::memcpy(&value, view.bytes.data(), std::min(sizeof(T), view.bytes.size()));
  return value;
}

/// The number of which `value` is the float32: 1.58, not 1.58000004.
double shortest(float value) {
  char text[32];
  const auto written = std::to_chars(std::begin(text), std::end(text), value);
  double out = static_cast<double>(value);
  std::from_chars(std::begin(text), written.ptr, out);
  return out;
}

/// The Python object that an encoded value stands for.
TorchValue decoded(const Piece& piece) {
  const TensorView& view = piece.view;
  const std::string text(view.bytes.begin(), view.bytes.end());
  switch (piece.kind) {
    case StateKind::kBool:
      return TorchValue::boolean(scalar<std::uint8_t>(view) != 0);
    case StateKind::kInt:
      return TorchValue::integer(view.dtype == DType::kI64 ? scalar<std::int64_t>(view)
                                                           : scalar<std::int32_t>(view));
    case StateKind::kFloat:
      return TorchValue::real(shortest(scalar<float>(view)));
    case StateKind::kText:
      return TorchValue::text(text);
    case StateKind::kDtype:
      return TorchValue::dtype(parse_dtype(text));
    case StateKind::kSize: {
      std::vector<std::int64_t> dims(view.bytes.size() / sizeof(std::int64_t));
      if (!dims.empty()) std::memcpy(dims.data(), view.bytes.data(), view.bytes.size());
      return TorchValue::size(std::move(dims));
    }
    default:
      return {};
  }
}

TorchValue from_json(const Json& json) {
  switch (json.type()) {
    case Json::value_t::boolean:
      return TorchValue::boolean(json.get<bool>());
    case Json::value_t::number_integer:
    case Json::value_t::number_unsigned:
      return TorchValue::integer(json.get<std::int64_t>());
    case Json::value_t::number_float:
      return TorchValue::real(json.get<double>());
    case Json::value_t::string:
      return TorchValue::text(json.get<std::string>());
    case Json::value_t::array: {
      TorchValue::Items items;
      for (const Json& item : json) items.push_back(from_json(item));
      return TorchValue::list(std::move(items));
    }
    case Json::value_t::object: {
      TorchValue::Pairs pairs;
      for (const auto& [key, value] : json.items()) {
        pairs.emplace_back(TorchValue::text(key), from_json(value));
      }
      return TorchValue::dict(std::move(pairs));
    }
    default:
      return {};
  }
}

class TorchSink final : public TensorSink {
 public:
  TorchSink(const FileLayout& layout, SinkTarget target)
      : layout_(layout), target_(std::move(target)) {}

  void put(const Piece& piece) override {
    if (piece.kind == StateKind::kPlainOnly) return;
    const auto bytes = std::ssize(piece.view.bytes);
    const bool full = target_.max_shard_bytes > 0 && shard_bytes_ > 0 &&
                      shard_bytes_ + bytes > target_.max_shard_bytes;
    if (full) close_shard();
    if (writer_ == nullptr) writer_ = std::make_unique<TorchWriter>(next_path());
    shard_bytes_ += bytes;
    names_.push_back(piece.name());
    TorchValue value = piece.kind == StateKind::kTensor
                           ? TorchValue::tensor(writer_->add(piece.view))
                           : decoded(piece);
    if (layout_.names_tied_head && !piece.layer) dense_.emplace(piece.name(), value);
    place(piece, std::move(value));
  }

  void put_alias(const Piece& name, const std::string& of) override { place(name, dense_.at(of)); }

  void finish(const SinkEnd& end) override {
    embedded_key_ = end.side.embedded_key;
    embedded_ = end.side.embedded;
    if (writer_ == nullptr) writer_ = std::make_unique<TorchWriter>(next_path());
    close_shard();
    if (target_.folder.empty()) return;
    if (shards_.size() == 1) {
      rename_shard(0, std::string(layout_.weights));
      return;
    }
    write_index();
  }

 private:
  /// Where the layout wants it.
  void place(const Piece& piece, TorchValue value) {
    switch (layout_.tree) {
      case StateTree::kFlat:
        return tree_.put(piece.name(), "", std::move(value));
      case StateTree::kByModule:
        return tree_.put(piece.module, piece.field, std::move(value));
      case StateTree::kMetaDict:
        if (!piece.layer || piece.codes) return tree_.put(piece.name(), "", std::move(value));
        return tree_.put(piece.module.empty() ? "meta" : piece.module + ".meta", piece.field,
                         std::move(value));
    }
  }

  struct Shard {
    std::string path;
    std::vector<std::string> names;
    std::int64_t bytes = 0;
  };

  /// Shards are numbered once their number is known.
  std::string next_path() const {
    if (target_.folder.empty()) return target_.file;
    return target_.folder + "/shard-" + std::to_string(shards_.size());
  }

  void close_shard() {
    TorchValue root = tree_.finish(layout_.tree != StateTree::kByModule);
    if (root.is_none()) root = TorchValue::ordered_dict({});
    if (!embedded_key_.empty()) {
      root = TorchValue::dict(
          {{TorchValue::text("state_dict"), std::move(root)},
           {TorchValue::text(embedded_key_), from_json(parse_json_object(embedded_, "embedded"))}});
    }
    const std::string path = next_path();
    writer_->finish(root);
    writer_.reset();
    shards_.push_back({path, std::exchange(names_, {}), std::exchange(shard_bytes_, 0)});
    tree_ = Tree();
  }

  void rename_shard(std::size_t number, const std::string& name) {
    std::error_code error;
    std::filesystem::rename(shards_[number].path, target_.folder + "/" + name, error);
    if (error) fail(Errc::kIo, "checkpoint: rename: " + error.message(), {.path = name});
  }

  void write_index() {
    const std::string weights(layout_.weights);
    const std::size_t dot = weights.rfind('.');
    const auto five = [](std::size_t n) {
      const std::string digits = std::to_string(n);
      return std::string(digits.size() < 5 ? 5 - digits.size() : 0, '0') + digits;
    };
    std::map<std::string, std::string> map;
    std::int64_t total = 0;
    for (std::size_t i = 0; i < shards_.size(); ++i) {
      const std::string name = weights.substr(0, dot) + "-" + five(i + 1) + "-of-" +
                               five(shards_.size()) + weights.substr(dot);
      rename_shard(i, name);
      total += shards_[i].bytes;
      for (const std::string& tensor : shards_[i].names) map[tensor] = name;
    }
    const std::string text = index_text(total, map);
    write_file_atomic(target_.folder + "/" + weights + ".index.json",
                      {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  }

  FileLayout layout_;
  SinkTarget target_;
  std::unique_ptr<TorchWriter> writer_;
  Tree tree_;
  std::map<std::string, TorchValue> dense_;  ///< where a tensor may get a second name
  std::vector<std::string> names_;
  std::int64_t shard_bytes_ = 0;
  std::vector<Shard> shards_;
  std::string embedded_key_, embedded_;
};

}  // namespace

std::unique_ptr<TensorSink> open_torch_sink(const FileLayout& layout, const SinkTarget& target) {
  return std::make_unique<TorchSink>(layout, target);
}

}  // namespace quantal::checkpoint
