// What each dialect reads, writes and converts to, generated from the registry for README and cli.
#include <map>
#include <set>
#include <string>

#include "quantal/checkpoint.h"

namespace quantal {
namespace {

std::string first_word(const std::string& text) { return text.substr(0, text.find(' ')); }

/// Dialects that some form of a dialect becomes without loss, by the name of the source.
std::map<std::string, std::set<std::string>> lossless_targets() {
  std::map<std::string, std::set<std::string>> out;
  for (const TranscodeEdge& edge : transcode_edges()) {
    const std::string from = first_word(edge.from), to = first_word(edge.to);
    if (edge.kept.lossless() && from != to) out[from].insert(to);
  }
  return out;
}

template <class Items, class Name>
std::string join(const Items& items, Name name) {
  std::string out;
  for (const auto& item : items) out += (out.empty() ? "" : ", ") + std::string(name(item));
  return out;
}

}  // namespace

std::string formats_markdown() {
  const auto targets = lossless_targets();
  std::string out =
      "| dialect | bits | layouts read and written | converts without loss to "
      "|\n|---|---|---|---|\n";
  for (const Dialect* dialect : dialects()) {
    const auto found = targets.find(std::string(dialect->name));
    const std::set<std::string> to =
        found == targets.end() ? std::set<std::string>{} : found->second;
    out += "| " + std::string(dialect->title) + " (`" + std::string(dialect->name) + "`) | " +
           join(dialect->bits, [](int bits) { return std::to_string(bits); }) + " | " +
           join(file_layouts(dialect),
                [](const FileLayout& layout) { return "`" + std::string(layout.name) + "`"; }) +
           " | " + (to.empty() ? "–" : join(to, [](const std::string& name) { return name; })) +
           " |\n";
  }
  out += "| unquantized (`dense`) | 32, 16 | " +
         join(file_layouts(nullptr),
              [](const FileLayout& layout) { return "`" + std::string(layout.name) + "`"; }) +
         " | – |\n";
  return out;
}

}  // namespace quantal
