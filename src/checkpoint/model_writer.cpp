#include "checkpoint/model_writer.h"

#include <algorithm>
#include <array>
#include <filesystem>

#include "checkpoint/companions.h"
#include "checkpoint/json.h"
#include "checkpoint/layouts.h"
#include "checkpoint/weight_shapes.h"

namespace quantal {
namespace checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr int kFolderFormat = 2;

void write_text(const std::string& path, const std::string& text) {
  write_file_atomic(path, {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
}

/// Settings of an older quantization go, those of the layout come.
std::string merged_config(const std::string& config_json, const std::string& patch) {
  Json config = parse_json_object(config_json, "config.json");
  config.erase("quantization_config");
  config.erase("quantization");
  if (!patch.empty()) config.merge_patch(parse_json_object(patch, "config patch"));
  return dump_json(config) + "\n";
}

void check_single_target(const std::string& path, bool overwrite) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (fs::is_directory(status)) {
    fail(Errc::kIo, "save: target is a folder, expected a file or nothing", {.path = path});
  }
  if (fs::exists(status) && !overwrite) {
    fail(Errc::kConfig, "save: file exists; pass overwrite to replace it", {.path = path});
  }
}

/// A language model whose output layer is its embedding; transformers' default is that it is.
bool ties_head(const Json& config) {
  if (const auto tied = config.find("tie_word_embeddings"); tied != config.end()) {
    if (tied->is_boolean() && !tied->get<bool>()) return false;
  }
  const auto classes = config.find("architectures");
  if (classes == config.end() || !classes->is_array() || classes->empty()) return true;
  return std::any_of(classes->begin(), classes->end(), [](const Json& name) {
    if (!name.is_string()) return false;
    const auto text = name.get<std::string>();
    return text.find("CausalLM") != std::string::npos || text.find("LMHead") != std::string::npos;
  });
}

/// Field of a dense tensor inside its module.
std::size_t split_at(const std::string& name) {
  const std::size_t dot = name.rfind('.');
  return dot == std::string::npos ? 0 : dot + 1;
}

}  // namespace

bool is_embedding(const std::string& module) {
  const std::size_t dot = module.rfind('.');
  const std::string last = module.substr(dot == std::string::npos ? 0 : dot + 1);
  return last.find("embed") != std::string::npos || last == "wte" || last == "wpe";
}

std::string module_of_weight(const std::string& tensor) {
  constexpr std::string_view kEnd = ".weight";
  return tensor.ends_with(kEnd) ? tensor.substr(0, tensor.size() - kEnd.size()) : std::string();
}

ModelWriter::ModelWriter(const std::string& path, const Dialect* dialect,
                         const SaveOptions& options)
    : path_(path), dialect_(dialect), layout_(choose_layout(dialect, options.layout, path)) {
  if (options.max_shard_bytes < 0) {
    fail(Errc::kConfig,
         "save: max_shard_bytes is " + std::to_string(options.max_shard_bytes) + ", expected >= 0");
  }
  SinkTarget target{.folder = {}, .file = path, .max_shard_bytes = options.max_shard_bytes};
  if (single_file()) {
    check_single_target(path, options.overwrite);
  } else {
    folder_.emplace(path, options.overwrite);
    target.folder = folder_->path(".");
  }
  if (layout_.container == Container::kGguf) {
    gguf_ = std::make_unique<GgufModelWriter>(path);
  } else {
    sink_ = open_sink(layout_, target);
  }
}

ModelWriter::~ModelWriter() = default;

void ModelWriter::add_name(const std::string& name) {
  if (names_.insert(name).second) return;
  fail(Errc::kConfig, "save: name is given twice, expected once", {.path = path_, .tensor = name});
}

void ModelWriter::add_layer(const std::string& name, const PackedView& layer) {
  add_name(name);
  if (dialect_ == nullptr || layer.spec.dialect != dialect_->id) {
    fail(Errc::kConfig,
         "save: layer is of the dialect " + std::string(dialect_by_id(layer.spec.dialect).name) +
             ", expected " +
             (dialect_ == nullptr ? std::string("a dense model") : std::string(dialect_->name)) +
             " as the others",
         {.path = path_, .tensor = name});
  }
  digest_.add_layer(name, layer);
  layers_.push_back({name, layer.spec});
  if (gguf_ != nullptr) return gguf_->add_layer(name, layer);
  const std::string prefix = name.empty() ? "" : name + ".";
  bool first = true;
  for (const NamedTensor& one : dialect_->export_layer(layer, prefix)) {
    sink_->put({.module = name,
                .field = one.name.substr(prefix.size()),
                .view = one.tensor.view(),
                .kind = one.kind,
                .codes = std::exchange(first, false),
                .layer = true});
  }
}

void ModelWriter::add_tensor(const std::string& name, const TensorView& tensor, bool lasting) {
  add_name(name);
  if (gguf_ != nullptr) return gguf_->add_tensor(name, tensor);
  const std::size_t field = split_at(name);
  sink_->put({.module = name.substr(0, field == 0 ? 0 : field - 1),
              .field = name.substr(field),
              .view = tensor,
              .lasting = lasting});
  digest_.add_tensor(name, tensor);
  const std::string module = module_of_weight(name);
  if (tensor.shape.size() == 2 && !module.empty() && !is_embedding(module)) {
    linears_.push_back(module);
  }
}

void ModelWriter::add_companion(const std::string& from, const std::string& name) {
  if (!folder_) return;
  companions_.insert(name);
  std::error_code error;
  fs::copy_file(from, folder_->path(name), error);
  if (error) fail(Errc::kIo, "save: copy of " + name + ": " + error.message(), {.path = from});
}

bool ModelWriter::has_head() const {
  return names_.count("lm_head") != 0 || names_.count("lm_head.weight") != 0;
}

void ModelWriter::name_tied_head(const std::string& config_json) {
  if (has_head() || !ties_head(parse_json_object(config_json, "config.json"))) return;
  for (const char* embedding : {"model.embed_tokens.weight", "transformer.wte.weight"}) {
    if (names_.count(embedding) == 0) continue;
    sink_->put_alias({.module = "lm_head", .field = "weight", .view = {}}, embedding);
    return;
  }
}

void ModelWriter::write_texts(const SideFiles& side, const std::string& config,
                              const SideTexts& texts) {
  for (const auto& [name, text] : carried_texts(texts)) {
    if (companions_.count(name) == 0) write_text(folder_->path(name), text);
  }
  for (const auto& [name, text] : side.texts) write_text(folder_->path(name), text);
  write_text(folder_->path("config.json"), config);
  Json marker;
  marker["folder_format"] = kFolderFormat;
  marker["layout"] = full_name(dialect_, layout_);
  marker["digest"] = digest_.hex();
  marker["layers"] = layers_.size();
  marker["tensors"] = names_.size() - layers_.size();
  write_text(folder_->path(kMarker), dump_json(marker) + "\n");
}

void ModelWriter::commit(const std::string& config_json, std::vector<std::string> dense,
                         const SideTexts& texts) {
  if (gguf_ != nullptr) return gguf_->commit(merged_config(config_json, ""), texts);
  if (dense.empty()) {
    dense = linears_;
    // A tied head has no tensor of its own, but programs must not take it for quantized.
    if (!has_head() && !layers_.empty()) dense.emplace_back("lm_head");
  }
  if (layout_.names_tied_head) name_tied_head(config_json);
  const WeightShapes shapes(config_json);
  for (LayerEntry& layer : layers_) {
    layer.shape_known =
        shapes.find(layer.name) == std::vector<std::int64_t>{layer.spec.rows, layer.spec.cols};
  }
  SinkEnd end;
  if (dialect_ != nullptr) end.side = dialect_->side_files(layout_, layers_, dense);
  const std::string config = merged_config(config_json, end.side.config_patch);
  Json embedded = Json::object();
  for (const auto& [name, text] : end.side.texts) embedded[name] = text;
  if (config != "{}\n") embedded["config.json"] = config;
  if (!embedded.empty()) end.texts_json = dump_json(embedded, -1);
  sink_->finish(end);
  if (!folder_) return;
  write_texts(end.side, config, texts);
  folder_->commit();
}

}  // namespace checkpoint

void save_checkpoint(const std::string& path, const CheckpointView& view,
                     const SaveOptions& options) {
  checkpoint::parse_json_object(view.config_json, "config.json");  // before anything is written
  const Dialect* dialect =
      view.layers.empty() ? nullptr : &dialect_by_id(view.layers.front().second.spec.dialect);
  checkpoint::ModelWriter writer(path, dialect, options);
  for (const auto& [name, layer] : view.layers) writer.add_layer(name, layer);
  for (const auto& [name, tensor] : view.tensors) writer.add_tensor(name, tensor, true);
  writer.commit(view.config_json, view.dense, view.texts);
}

}  // namespace quantal
