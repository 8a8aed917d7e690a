#include "quantal/model_fit.h"

#include <algorithm>

#include "checkpoint/saved_settings.h"

namespace quantal {
namespace {

std::string weight_of(const std::string& module) {
  return module.empty() ? "weight" : module + ".weight";
}

std::string word(const LoadReport::Misshapen& one) {
  return one.name + " " + shape_string(one.in_file) + ", expected " + shape_string(one.in_model);
}
const std::string& word(const std::string& name) { return name; }

template <class List>
void add_summary(std::string& out, const char* kind, const List& list, std::size_t shown) {
  if (list.empty()) return;
  out += (out.empty() ? "" : "; ") + std::to_string(list.size()) + " " + kind + ": ";
  for (std::size_t i = 0; i < std::min(shown, list.size()); ++i) {
    out += (i == 0 ? "" : ", ") + word(list[i]);
  }
  if (list.size() > shown) out += ", ...";
}

template <class List>
void add_lines(std::string& out, const char* kind, const List& list) {
  for (const auto& one : list) out += std::string(kind) + " " + word(one) + "\n";
}

/// One walk over both sides.
class Comparison {
 public:
  Comparison(const FileParts& file, const ModelParts& model) : file_(file), model_(model) {}

  LoadReport run() {
    for (const auto& [name, spec] : file_.layers) add_layer(name, spec);
    for (const auto& [name, shape] : file_.tensors) {
      if (expect(name, name, shape)) present_.insert(root_of(name));
    }
    for (const auto& [name, shape] : model_.tensors) {
      const bool alias = model_.tied.count(name) != 0;
      if (!alias && present_.count(name) == 0) report_.missing.push_back(name);
    }
    return std::move(report_);
  }

 private:
  /// The tensor that a name stands for.
  const std::string& root_of(const std::string& name) const {
    const auto tied = model_.tied.find(name);
    return tied == model_.tied.end() ? name : tied->second;
  }

  void add_layer(const std::string& name, const PackedSpec& spec) {
    const std::string weight = weight_of(name);
    if (!expect(name, weight, {spec.rows, spec.cols})) return;
    present_.insert(root_of(weight));
    if (model_.linears.count(name) == 0 && model_.embeddings.count(name) == 0) {
      report_.decoded.push_back(name);
    }
  }

  /// False if the model has no such tensor. A misshapen one is there, so it is not missing too.
  bool expect(const std::string& name, const std::string& tensor, const ModelParts::Shape& shape) {
    const auto found = model_.tensors.find(tensor);
    if (found == model_.tensors.end()) {
      report_.unexpected.push_back(name);
      return false;
    }
    if (found->second != shape) report_.misshapen.push_back({name, shape, found->second});
    return true;
  }

  const FileParts& file_;
  const ModelParts& model_;
  LoadReport report_;
  std::set<std::string> present_;
};

/// Linear layers of the model that the file has, packed or dense.
std::vector<checkpoint::SavedLayer> saved_layers(const FileParts& file, const ModelParts& model) {
  std::vector<checkpoint::SavedLayer> out;
  for (const std::string& name : model.linears) {
    const auto packed = file.layers.find(name);
    const auto dense = file.tensors.find(weight_of(name));
    if (packed != file.layers.end()) {
      out.push_back({name, packed->second.rows, packed->second.cols, packed->second});
    } else if (dense != file.tensors.end() && dense->second.size() == 2 &&
               model.tied.count(weight_of(name)) == 0) {
      out.push_back({name, dense->second[0], dense->second[1], std::nullopt});
    }
  }
  return out;
}

}  // namespace

std::string LoadReport::summary(std::size_t shown) const {
  std::string out;
  add_summary(out, "missing", missing, shown);
  add_summary(out, "unexpected", unexpected, shown);
  add_summary(out, "misshapen", misshapen, shown);
  return out;
}

std::string LoadReport::settings_text() const {
  std::string text;
  for (const Substitution& s : settings) {
    text += (text.empty() ? "settings of the file are used, not the config's: " : "; ") + s.what +
            " " + s.used + " (config: " + s.asked + ")";
  }
  return text;
}

std::string LoadReport::text() const {
  std::string out;
  add_lines(out, "missing", missing);
  add_lines(out, "unexpected", unexpected);
  add_lines(out, "misshapen", misshapen);
  add_lines(out, "decoded", decoded);
  for (const Substitution& s : settings) {
    out += "setting " + s.what + ": " + s.used + ", not " + s.asked + ": " + s.reason + "\n";
  }
  add_lines(out, "note", notes);
  return out;
}

FileParts parts_of(const Checkpoint& file) {
  FileParts out;
  for (const auto& [name, layer] : file.layers) out.layers[name] = layer.spec;
  for (const auto& [name, tensor] : file.tensors) out.tensors[name] = tensor.shape;
  return out;
}

LoadReport compare_model(const FileParts& file, const ModelParts& model,
                         const QuantizationConfig* config) {
  LoadReport report = Comparison(file, model).run();
  if (config != nullptr)
    report.settings = checkpoint::saved_settings(*config, saved_layers(file, model));
  return report;
}

void require_fit(const LoadReport& report, const std::string& path) {
  if (report.fits()) return;
  const std::string first = !report.missing.empty()      ? report.missing.front()
                            : !report.unexpected.empty() ? report.unexpected.front()
                                                         : report.misshapen.front().name;
  fail(Errc::kCorrupt, "load: file does not fit the model: " + report.summary(),
       {.path = path, .tensor = first});
}

}  // namespace quantal
