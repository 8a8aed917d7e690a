// What a planner needs of a model on disk.
#include <filesystem>

#include "checkpoint/json.h"
#include "checkpoint/model_writer.h"
#include "checkpoint/plan_parts.h"
#include "checkpoint/reader.h"

namespace quantal {
namespace checkpoint {
namespace {

/// The output layer of a model whose config ties it to the embedding: a second copy in the files is
/// dropped on loading.
constexpr std::string_view kHead = "lm_head";

std::string describe_source(const std::string& path, const ModelReader& reader) {
  std::filesystem::path file(path);
  if (!file.has_filename()) file = file.parent_path();
  return file.filename().string() + " (" + reader.container() + ")";
}

bool ties_embeddings(const std::string& config_json) {
  const Json config = parse_json_object(config_json, "config.json");
  const auto found = config.find("tie_word_embeddings");
  return found != config.end() && found->is_boolean() && found->get<bool>();
}

OutlineTensor packed_tensor(const ModelReader& reader, const std::string& name) {
  OutlineTensor tensor;
  tensor.name = name;
  tensor.kind = OutlineTensor::Kind::kPacked;
  tensor.spec = reader.layer_spec(name);
  tensor.shape = {tensor.spec->rows, tensor.spec->cols};
  tensor.dtype = tensor.spec->value_dtype;
  tensor.stored_bytes = reader.layer_bytes(name);
  return tensor;
}

OutlineTensor dense_tensor(const ModelReader& reader, const std::string& name) {
  const TensorView view = reader.describe_tensor(name);
  OutlineTensor tensor;
  tensor.name = name;
  tensor.shape = view.shape;
  tensor.dtype = view.dtype;
  const std::string module = module_of_weight(name);
  const bool linear = view.shape.size() == 2 && !module.empty() && !is_embedding(module);
  tensor.kind = linear ? OutlineTensor::Kind::kLinear : OutlineTensor::Kind::kDense;
  return tensor;
}

/// A tied head has no weights of its own, whatever the files hold.
void tie_head(ModelOutline& model) {
  const OutlineTensor* embedding = nullptr;
  std::size_t head = model.tensors.size();
  for (std::size_t i = 0; i < model.tensors.size(); ++i) {
    const std::string module = module_name(model.tensors[i]);
    if (is_lookup(model.tensors[i]) && last_part(module).starts_with("embed")) {
      embedding = &model.tensors[i];
    }
    if (module == kHead) head = i;
  }
  if (embedding == nullptr) return;
  const std::string source = embedding->name;
  const bool packed = embedding->kind == OutlineTensor::Kind::kPacked;
  OutlineTensor tied = *embedding;
  if (head < model.tensors.size()) {
    model.tensors.erase(model.tensors.begin() + static_cast<std::ptrdiff_t>(head));
    model.notes.emplace_back("lm_head.weight is in the files, but tied: not counted");
  }
  if (!packed) return;
  tied.name = kHead;
  tied.tied_to = source;
  tied.stored_bytes = 0;
  model.tensors.push_back(std::move(tied));
}

}  // namespace

std::string_view last_part(std::string_view name) {
  const std::size_t dot = name.rfind('.');
  return name.substr(dot == std::string_view::npos ? 0 : dot + 1);
}

std::string module_name(const OutlineTensor& tensor) {
  if (tensor.name == "weight") return {};  // the model is one layer
  const std::string module = module_of_weight(tensor.name);
  return module.empty() ? tensor.name : module;
}

std::string unit_of(const std::string& name) {
  for (std::size_t begin = 0; begin < name.size();) {
    const std::size_t end = std::min(name.find('.', begin), name.size());
    const std::string_view part = std::string_view(name).substr(begin, end - begin);
    if (!part.empty() && part.find_first_not_of("0123456789") == std::string_view::npos) {
      return name.substr(0, end);
    }
    begin = end + 1;
  }
  return {};
}

bool is_lookup(const OutlineTensor& tensor) {
  return tensor.shape.size() == 2 && is_embedding(module_name(tensor)) &&
         tensor.kind != OutlineTensor::Kind::kLinear;
}

bool multiplies(const OutlineTensor& tensor) {
  if (tensor.kind == OutlineTensor::Kind::kLinear) return true;
  return tensor.kind == OutlineTensor::Kind::kPacked && !is_lookup(tensor);
}

std::int64_t numel_of(const OutlineTensor& tensor) {
  return checked_numel(tensor.shape, "plan: elements of " + tensor.name);
}

std::int64_t bytes_of(const OutlineTensor& tensor) {
  if (tensor.stored_bytes >= 0) return tensor.stored_bytes;
  return checked_mul(numel_of(tensor), size_of(tensor.dtype), "plan: bytes of " + tensor.name);
}

}  // namespace checkpoint

ModelOutline outline_of(const std::string& path) {
  using namespace checkpoint;
  const auto reader = open_model(path, {});
  if (!reader->unread().empty()) fail(Errc::kUnsupported, reader->unread(), {.path = path});
  ModelOutline model;
  model.source = describe_source(path, *reader);
  model.config_json = reader->config_json();
  model.notes = reader->notes();
  for (const std::string& name : reader->layer_names()) {
    model.tensors.push_back(packed_tensor(*reader, name));
  }
  for (const std::string& name : reader->tensor_names()) {
    model.tensors.push_back(dense_tensor(*reader, name));
  }
  if (ties_embeddings(model.config_json)) tie_head(model);
  return model;
}

}  // namespace quantal
