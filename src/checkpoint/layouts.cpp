#include "checkpoint/layouts.h"

#include <array>

#include "checkpoint/folder.h"
#include "checkpoint/json.h"

namespace quantal {
namespace checkpoint {
namespace {

constexpr std::array<FileLayout, 7> kDenseLayouts = {{
    {.name = "transformers",
     .title = "folder with config.json and model.safetensors",
     .container = Container::kSafetensors,
     .weights = "model.safetensors"},
    {.name = "torch",
     .title = "folder with config.json and pytorch_model.bin",
     .container = Container::kTorch,
     .weights = "pytorch_model.bin"},
    {.name = "npz",
     .title = "folder with config.json and weights.npz",
     .container = Container::kNpz,
     .weights = "weights.npz"},
    {.name = "single",
     .title = "one safetensors file",
     .container = Container::kSafetensors,
     .weights = {}},
    {.name = "single-torch",
     .title = "one torch file",
     .container = Container::kTorch,
     .weights = {}},
    {.name = "gguf", .title = "one GGUF file", .container = Container::kGguf, .weights = {}},
    {.name = "single-npz", .title = "one npz file", .container = Container::kNpz, .weights = {}},
}};

std::string names(const Dialect* dialect) {
  std::string out;
  for (const FileLayout& layout : layouts_of(dialect)) {
    out += (out.empty() ? "" : ", ") + std::string(layout.name);
  }
  return out;
}

std::string_view dialect_name(const Dialect* dialect) {
  return dialect == nullptr ? std::string_view("dense") : dialect->name;
}

struct Suffix {
  std::string_view text;
  Container container;
};
constexpr std::array<Suffix, 6> kSuffixes = {{{".safetensors", Container::kSafetensors},
                                              {".pt", Container::kTorch},
                                              {".pth", Container::kTorch},
                                              {".bin", Container::kTorch},
                                              {".npz", Container::kNpz},
                                              {".gguf", Container::kGguf}}};

/// How much of what a layout writes beside the weights is there; what is missing counts against it.
int settings_score(const SideFiles& side, const TensorSet& set) {
  int score = 0;
  const auto count = [&score](bool there) { score += there ? 2 : -2; };
  for (const auto& [name, text] : side.texts) count(set.texts.count(name) != 0);
  if (!side.embedded_key.empty()) {
    const auto key = set.texts.find(kEmbeddedKey);
    count(key != set.texts.end() && key->second == side.embedded_key);
  }
  if (side.config_patch.empty()) return score;
  const Json config = parse_json_object(set.config_json(), set.path());
  const Json patch = parse_json_object(side.config_patch, "config patch");
  for (const auto& [key, value] : patch.items()) {
    if (!value.is_null()) count(config.contains(key));
  }
  return score;
}

}  // namespace

std::span<const FileLayout> dense_layouts() { return kDenseLayouts; }

std::span<const FileLayout> layouts_of(const Dialect* dialect) {
  return dialect == nullptr ? dense_layouts() : dialect->layouts;
}

std::string full_name(const Dialect* dialect, const FileLayout& layout) {
  return std::string(dialect_name(dialect)) + " " + std::string(layout.name);
}

const FileLayout& choose_layout(const Dialect* dialect, const std::string& wanted,
                                const std::string& path) {
  const auto layouts = layouts_of(dialect);
  if (layouts.empty()) {
    fail(Errc::kUnsupported,
         "checkpoint: " + std::string(dialect->title) + " has no layout that is written here");
  }
  for (const FileLayout& layout : layouts) {
    if (wanted == layout.name || wanted == full_name(dialect, layout)) return layout;
  }
  if (!wanted.empty()) {
    fail(Errc::kConfig, "save: layout is \"" + wanted + "\", expected one of " + names(dialect) +
                            " (" + std::string(dialect_name(dialect)) + ")");
  }
  for (const Suffix& suffix : kSuffixes) {
    if (!path.ends_with(suffix.text)) continue;
    for (const FileLayout& layout : layouts) {
      if (layout.weights.empty() && layout.container == suffix.container) return layout;
    }
    fail(Errc::kConfig,
         "save: " + std::string(dialect_name(dialect)) + " has no layout of a single " +
             std::string(suffix.text) + " file, expected a folder or one of the layouts " +
             names(dialect),
         {.path = path});
  }
  return layouts.front();
}

const FileLayout& detect_layout(const Dialect* dialect, const TensorSet& set,
                                std::span<const LayerEntry> layers) {
  const FileLayout* best = nullptr;
  int best_score = 0;
  for (const FileLayout& layout : layouts_of(dialect)) {
    int score = 0;
    const auto add = [&score](bool equal, int weight) { score += equal ? weight : 0; };
    add(layout.weights.empty() != set.where.folder, 32);
    add(layout.container == set.where.container, 16);
    add(layout.tree == set.tree, 8);
    add(layout.weights == set.where.weights, 8);
    if (dialect != nullptr && dialect->side_files != nullptr) {
      score += settings_score(dialect->side_files(layout, layers, {}), set);
    }
    if (best == nullptr || score > best_score) best = &layout, best_score = score;
  }
  if (best == nullptr) return kDenseLayouts.front();
  return *best;
}

}  // namespace checkpoint

std::vector<FileLayout> file_layouts(const Dialect* dialect) {
  const auto layouts = checkpoint::layouts_of(dialect);
  return {layouts.begin(), layouts.end()};
}

}  // namespace quantal
