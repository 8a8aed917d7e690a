#include <string>

#include "quantal/policy.h"

namespace quantal {
namespace {

constexpr std::string_view kYes = "✓", kNo = "✗";  // one column wide, three bytes long

std::string upper(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
  return out;
}

}  // namespace

std::string compatibility_matrix_markdown() {
  std::string head = "| Backend |", rule = "|---------|";
  for (const MethodInfo& facts : methods()) {
    if (facts.method == QuantizationMethod::NONE) continue;
    const std::string name(facts.enum_name);
    head += " " + name + " |";
    rule += std::string(name.size() + 2, '-') + "|";
  }
  std::string table = head + "\n" + rule + "\n";
  for (const Backend backend : {Backend::CUDA, Backend::MPS, Backend::MLX, Backend::CPU}) {
    std::string name = upper(backend_name(backend));
    name.resize(7, ' ');
    table += "| " + name + " |";
    for (const MethodInfo& facts : methods()) {
      if (facts.method == QuantizationMethod::NONE) continue;
      const std::size_t width = facts.enum_name.size();
      table += " " + std::string(documented_support(backend, facts.method) ? kYes : kNo) +
               std::string(width - 1, ' ') + " |";
    }
    table += "\n";
  }
  return table;
}

}  // namespace quantal
