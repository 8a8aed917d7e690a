#include "checkpoint/inspect.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "checkpoint/folder.h"
#include "checkpoint/json.h"
#include "checkpoint/reader.h"
#include "checkpoint/sources.h"
#include "quantal/checkpoint.h"
#include "quantal/ggml.h"

namespace quantal::checkpoint {
namespace {

std::string value_text(const GgufValue& value) {
  return std::visit(
      [](const auto& v) -> std::string {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_same_v<T, std::shared_ptr<GgufArray>>) {
          return "array of " + std::to_string(v->values.size());
        } else if constexpr (std::is_same_v<T, std::string>) {
          return v;
        } else {
          return dump_json(Json(v), -1);
        }
      },
      value);
}

Inspection inspect_gguf(const std::string& path) {
  const GgufFile file = open_gguf(path);
  Inspection out;
  out.container = "GGUF version " + std::to_string(file.version());
  for (const auto& [key, value] : file.metadata())
    out.metadata.emplace_back(key, value_text(value));
  for (const GgufTensor& tensor : file.tensors()) {
    out.tensors.push_back({tensor.name, tensor.shape,
                           std::string(find_ggml_block(tensor.type)->name),
                           checked_numel(tensor.shape, "inspect"),
                           static_cast<std::int64_t>(tensor.bytes.size()), false});
  }
  return out;
}

Inspection inspect_npy(const std::string& path) {
  const Tensor tensor = read_npy(path);
  Inspection out;
  out.container = "npy";
  out.tensors.push_back({"(array)", tensor.shape, std::string(dtype_name(tensor.dtype)),
                         tensor.view().numel(), std::ssize(tensor.bytes), false});
  return out;
}

/// The scalar settings of config.json; its nested ones as JSON text.
void add_config(Inspection& out, const std::string& config_json, const std::string& path) {
  const Json config = parse_json_object(config_json, path);
  for (const auto& [key, value] : config.items()) {
    out.metadata.emplace_back(key,
                              value.is_string() ? value.get<std::string>() : dump_json(value, -1));
  }
}

void add_marker(Inspection& out, const std::string& folder) {
  const std::string path = folder + "/" + kMarker;
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) return;
  const Json marker = parse_json_object(read_text_file(path), path);
  const auto digest = marker.find("digest");
  if (digest != marker.end() && digest->is_string()) {
    out.metadata.emplace_back("quantal digest", digest->get<std::string>());
  }
}

/// Quantized layers first, then everything else.
void add_tensors(Inspection& out, const ModelReader& reader) {
  std::set<std::string> dialects_seen;
  for (const std::string& name : reader.layer_names()) {
    const PackedSpec spec = reader.layer_spec(name);
    dialects_seen.insert(std::string(dialect_by_id(spec.dialect).title));
    out.tensors.push_back({name,
                           {spec.rows, spec.cols},
                           describe_form(spec),
                           spec.rows * spec.cols,
                           reader.layer_bytes(name),
                           true});
  }
  for (const std::string& title : dialects_seen) {
    out.quantization += (out.quantization.empty() ? "" : ", ") + title;
  }
  for (const std::string& name : reader.tensor_names()) {
    const TensorView view = reader.describe_tensor(name);
    const std::int64_t numel = view.numel();
    out.tensors.push_back({name, view.shape, std::string(dtype_name(view.dtype)), numel,
                           numel * static_cast<std::int64_t>(dtype_size(view.dtype)), false});
  }
}

Inspection inspect_model(const std::string& path) {
  const std::unique_ptr<ModelReader> reader = open_model(path, {});
  Inspection out;
  out.container = reader->container();
  out.unread = reader->unread();
  out.layout = reader->layout();
  add_config(out, reader->config_json(), path);
  for (auto& pair : reader->metadata()) out.metadata.push_back(std::move(pair));
  if (!reader->folder().empty()) add_marker(out, reader->folder());
  out.notes = reader->notes();
  add_tensors(out, *reader);
  return out;
}

Inspection inspect_any(const std::string& path) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(path, ignored)) {
    const FileKind kind = detect_file(path);
    if (kind == FileKind::kNpy) return inspect_npy(path);
    if (kind == FileKind::kGguf || path.ends_with(".gguf")) return inspect_gguf(path);
  }
  return inspect_model(path);
}

}  // namespace

Inspection inspect(const std::string& path) {
  Inspection out = inspect_any(path);
  out.path = path;
  return out;
}

}  // namespace quantal::checkpoint
