#include "checkpoint/companions.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <set>

#include "checkpoint/gguf.h"
#include "checkpoint/locate.h"
#include "quantal/io.h"

namespace quantal::checkpoint {
namespace {

namespace fs = std::filesystem;

std::set<std::string> quantization_files() {
  std::set<std::string> names;
  for (const Dialect* dialect : dialects()) {
    if (dialect->side_files == nullptr) continue;
    for (const FileLayout& layout : dialect->layouts) {
      for (const auto& [name, text] : dialect->side_files(layout, {}, {}).texts) names.insert(name);
    }
  }
  return names;
}

}  // namespace

bool is_quantization_file(const std::string& name) {
  static const std::set<std::string> kNames = quantization_files();
  return kNames.count(name) != 0;
}

std::vector<std::pair<std::string, std::string>> companions_of(const std::string& folder) {
  std::vector<std::pair<std::string, std::string>> out;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    std::error_code ignored;
    const bool kept = entry.is_regular_file(ignored) && !name.starts_with(".") &&
                      name != "config.json" && (name == kTokenizerGguf || !is_weights_name(name)) &&
                      !is_quantization_file(name);
    if (kept) out.emplace_back(entry.path().string(), name);
  }
  std::sort(out.begin(), out.end());
  return out;
}

void add_tokenizer_texts(const std::string& folder, SideTexts& texts) {
  for (const char* name :
       {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", kTokenizerGguf}) {
    const std::string path = folder + "/" + name;
    std::error_code ignored;
    if (fs::exists(path, ignored)) texts[name] = read_text_file(path);
  }
}

SideTexts carried_texts(const SideTexts& texts) {
  SideTexts out;
  for (const char* name : {kTokenizerGguf, "generation_config.json"}) {
    const auto found = texts.find(name);
    if (found != texts.end()) out.insert(*found);
  }
  return out;
}

}  // namespace quantal::checkpoint
