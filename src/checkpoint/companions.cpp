#include "checkpoint/companions.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <set>

#include "checkpoint/gguf.h"
#include "checkpoint/locate.h"
#include "checkpoint/reader.h"
#include "quantal/io.h"

namespace quantal::checkpoint {
namespace {

namespace fs = std::filesystem;

/// What tokenizers are kept in, by any tool.
constexpr std::array<const char*, 13> kTokenizerFiles = {"tokenizer.json",
                                                         "tokenizer_config.json",
                                                         "special_tokens_map.json",
                                                         "added_tokens.json",
                                                         "chat_template.jinja",
                                                         "chat_template.json",
                                                         "vocab.json",
                                                         "merges.txt",
                                                         "vocab.txt",
                                                         "tokenizer.model",
                                                         "spiece.model",
                                                         "sentencepiece.bpe.model",
                                                         kTokenizerGguf};

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
  for (const char* name : kTokenizerFiles) {
    const std::string path = folder + "/" + name;
    std::error_code ignored;
    if (fs::exists(path, ignored)) texts[name] = read_text_file(path);
  }
}

SideTexts carried_texts(const SideTexts& texts) {
  SideTexts out;
  const auto carry = [&](const char* name) {
    const auto found = texts.find(name);
    if (found != texts.end()) out.insert(*found);
  };
  for (const char* name : kTokenizerFiles) carry(name);
  carry("generation_config.json");
  return out;
}

}  // namespace quantal::checkpoint

namespace quantal {

SideTexts read_tokenizer(const std::string& path) {
  std::error_code ignored;
  SideTexts texts;
  if (std::filesystem::is_directory(path, ignored)) {
    checkpoint::add_tokenizer_texts(path, texts);
    return texts;
  }
  if (checkpoint::locate(path).container == Container::kGguf) {
    const auto reader = checkpoint::open_model(path, {});
    const auto found = reader->texts().find(checkpoint::kTokenizerGguf);
    if (found != reader->texts().end()) texts.insert(*found);
  }
  return texts;
}

}  // namespace quantal
