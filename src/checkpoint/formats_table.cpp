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
  const auto names = [](const Dialect* dialect) {
    return join(file_layouts(dialect),
                [](const FileLayout& layout) { return "`" + std::string(layout.name) + "`"; });
  };
  std::string out =
      "| format | reads | quantizes to | files, read and written | converts to all others, without "
      "loss to |\n|---|---|---|---|---|\n";
  for (const Dialect* dialect : dialects()) {
    const std::string name(dialect->name);
    const auto found = targets.find(name);
    const bool same = dialect->reads == dialect->writes;
    out += "| " + std::string(dialect->title) + " (`" + name + "`) | " +
           std::string(dialect->reads) + " | " +
           (same ? "the same" : std::string(dialect->writes)) + " | " + names(dialect) + " | " +
           (found == targets.end() ? "–" : join(found->second, [](const auto& to) { return to; })) +
           " |\n";
  }
  return out + "| unquantized (`dense`) | float32, float16, bfloat16 | the same | " +
         names(nullptr) + " | – |\n";
}

}  // namespace quantal
