// Torch files as named tensors. A state dict is flat in most files, but HQQ keeps a dictionary per
// module or per `meta`, and several tools wrap everything once more; all become dotted names.
#include <algorithm>
#include <limits>
#include <map>
#include <utility>

#include "checkpoint/folder.h"
#include "checkpoint/json.h"
#include "checkpoint/tensor_set.h"
#include "quantal/archive.h"

namespace quantal::checkpoint {
namespace {

using Kind = TorchValue::Kind;

/// A small value in the encoding that containers of plain tensors use (formats.h, StateKind).
StoredTensor encoded(StateKind kind, DType dtype, std::vector<std::int64_t> shape,
                     const void* bytes) {
  auto tensor = std::make_shared<Tensor>(make_tensor(dtype, shape));
  const auto* from = static_cast<const std::uint8_t*>(bytes);
  std::copy(from, from + tensor->bytes.size(), tensor->bytes.begin());
  return {dtype, std::move(shape), kind, [tensor] { return HeldTensor{tensor->view(), tensor}; }};
}

StoredTensor encoded_text(StateKind kind, const std::string& text) {
  return encoded(kind, DType::kU8, {static_cast<std::int64_t>(text.size())}, text.data());
}

StoredTensor encoded_int(std::int64_t value) {
  const bool fits = value >= std::numeric_limits<std::int32_t>::min() &&
                    value <= std::numeric_limits<std::int32_t>::max();
  if (!fits) return encoded(StateKind::kInt, DType::kI64, {}, &value);
  const auto narrow = static_cast<std::int32_t>(value);
  return encoded(StateKind::kInt, DType::kI32, {}, &narrow);
}

nlohmann::json to_json(const TorchValue& value) {
  switch (value.kind()) {
    case Kind::kBool:
      return value.as_bool();
    case Kind::kInt:
      return value.as_int();
    case Kind::kFloat:
      return value.as_float();
    case Kind::kText:
    case Kind::kDevice:
      return value.as_text();
    case Kind::kDtype:
      return std::string(dtype_torch_name(value.as_dtype()));
    case Kind::kSize:
      return value.as_size();
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kSet: {
      auto out = nlohmann::json::array();
      for (const TorchValue& item : value.items()) out.push_back(to_json(item));
      return out;
    }
    case Kind::kDict:
    case Kind::kOrderedDict: {
      auto out = nlohmann::json::object();
      for (const auto& [key, item] : value.pairs()) {
        if (key.kind() == Kind::kText) out[key.as_text()] = to_json(item);
      }
      return out;
    }
    default:
      return nullptr;
  }
}

/// Puts the values of one file into a set.
class Flattener {
 public:
  Flattener(TensorSet& set, std::shared_ptr<TorchFile> file) : set_(set), file_(std::move(file)) {}

  void run() {
    const TorchValue root = unwrap(file_->root());
    if (!root.is_dict()) {
      fail(Errc::kUnsupported,
           "checkpoint: file holds " + std::string(torch_kind_name(root.kind())) +
               ", expected a dictionary of tensors",
           {.path = file_->path()});
    }
    for (const auto& [key, value] : root.pairs()) {
      if (value.is_dict() && key.kind() == Kind::kText) {
        const bool meta = key.as_text().ends_with(".meta");
        if (set_.tree == StateTree::kFlat) {
          set_.tree = meta ? StateTree::kMetaDict : StateTree::kByModule;
        }
      }
    }
    flatten("", root);
    drop_tied_head();
    if (!ignored_.empty()) set_.notes.push_back("ignored values of the file: " + ignored_);
  }

 private:
  /// {"state_dict": ..., "<name>_config": ...} and {"model": ...}: the inner dictionary.
  TorchValue unwrap(const TorchValue& root) {
    if (const TorchValue* inner = root.find("state_dict"); inner != nullptr && inner->is_dict()) {
      for (const auto& [key, value] : root.pairs()) {
        const bool settings =
            key.kind() == Kind::kText && value.is_dict() && key.as_text().ends_with("_config");
        if (settings) {
          set_.texts[kEmbedded] = dump_json(to_json(value));
          set_.texts[kEmbeddedKey] = key.as_text();
        } else if (&value != inner) {
          ignore(key);
        }
      }
      return *inner;
    }
    const TorchValue* inner = root.find("model");
    if (inner == nullptr || !inner->is_dict()) return root;
    for (const auto& [key, value] : root.pairs()) {  // a module of the name, not a wrapper
      if (key.kind() == Kind::kText && key.as_text().starts_with("model.")) return root;
    }
    for (const auto& [key, value] : root.pairs()) {
      if (&value != inner) ignore(key);
    }
    return *inner;
  }

  void ignore(const TorchValue& key) {
    ignored_ += ignored_.empty() ? "" : ", ";
    ignored_ += key.kind() == Kind::kText ? key.as_text() : std::string("(not a text)");
  }

  void flatten(const std::string& prefix, const TorchValue& dict) {
    for (const auto& [key, value] : dict.pairs()) {
      if (key.kind() != Kind::kText) {
        ignore(key);
        continue;
      }
      const std::string name = prefix + key.as_text();
      if (value.is_dict()) {
        flatten(key.as_text().empty() ? prefix : name + ".", value);
      } else {
        add(name, key, value);
      }
    }
  }

  /// The output layer of a tied model is the embedding under a second name: one tensor.
  void drop_tied_head() {
    const auto head = storages_.find("lm_head.weight");
    if (head == storages_.end()) return;
    const StoredTensor& tensor = set_.tensors.at(head->first);
    const bool tied = std::any_of(storages_.begin(), storages_.end(), [&](const auto& one) {
      return one.first != head->first && one.second == head->second &&
             set_.tensors.at(one.first).shape == tensor.shape &&
             set_.tensors.at(one.first).dtype == tensor.dtype;
    });
    if (!tied) return;
    set_.tensors.erase(head->first);
    set_.second_names.insert(head->first);
  }

  void add(const std::string& name, const TorchValue& key, const TorchValue& value) {
    switch (value.kind()) {
      case Kind::kTensor:
        insert(name, tensor(value.as_tensor()));
        storages_[name] = {value.as_tensor().storage, value.as_tensor().offset};
        return;
      case Kind::kNone:
        return;
      case Kind::kBool: {
        const std::uint8_t byte = value.as_bool() ? 1 : 0;
        return insert(name, encoded(StateKind::kBool, DType::kU8, {}, &byte));
      }
      case Kind::kInt:
        return insert(name, encoded_int(value.as_int()));
      case Kind::kFloat: {
        const auto number = static_cast<float>(value.as_float());
        return insert(name, encoded(StateKind::kFloat, DType::kF32, {}, &number));
      }
      case Kind::kText:
        return insert(name, encoded_text(StateKind::kText, value.as_text()));
      case Kind::kDtype: {
        const std::string text = "torch." + std::string(dtype_torch_name(value.as_dtype()));
        return insert(name, encoded_text(StateKind::kDtype, text));
      }
      case Kind::kSize: {
        const auto& dims = value.as_size();
        return insert(name, encoded(StateKind::kSize, DType::kI64,
                                    {static_cast<std::int64_t>(dims.size())}, dims.data()));
      }
      default:
        return ignore(key);
    }
  }

  StoredTensor tensor(const TorchTensor& one) {
    return {one.dtype, one.shape, StateKind::kTensor, [file = file_, one] {
              HeldTensor held = file->read(one);
              if (held.owner == nullptr) held.owner = file;
              return held;
            }};
  }

  void insert(const std::string& name, StoredTensor tensor) {
    if (!set_.tensors.emplace(name, std::move(tensor)).second) {
      fail(Errc::kCorrupt, "checkpoint: name is given twice, expected once",
           {.path = file_->path(), .tensor = name});
    }
  }

  TensorSet& set_;
  std::shared_ptr<TorchFile> file_;
  std::map<std::string, std::pair<std::string, std::int64_t>> storages_;  ///< key and offset
  std::string ignored_;
};

}  // namespace

void add_torch(TensorSet& set, const std::string& path) {
  Flattener(set, std::make_shared<TorchFile>(path)).run();
}

}  // namespace quantal::checkpoint
