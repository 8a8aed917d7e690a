#include "checkpoint/table.h"

#include <algorithm>

namespace quantal::checkpoint {

std::string table(const std::vector<Row>& rows, const std::vector<bool>& right) {
  std::vector<std::size_t> width(right.size(), 0);
  for (const Row& row : rows) {
    for (std::size_t c = 0; c < row.size(); ++c) width[c] = std::max(width[c], row[c].size());
  }
  std::string out;
  for (const Row& row : rows) {
    std::string line;
    for (std::size_t c = 0; c < row.size(); ++c) {
      const std::string pad(width[c] - row[c].size(), ' ');
      line += "  " + (right[c] ? pad + row[c] : row[c] + pad);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

std::string printable(const std::string& text, std::size_t most) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    const bool continues = (byte & 0xC0u) == 0x80u;
    if (out.size() >= most && !continues) return out + "...";
    if (c == '\n') {
      out += "\\n";
    } else {
      out += byte < 0x20 || byte == 0x7F ? '?' : c;
    }
  }
  return out;
}

}  // namespace quantal::checkpoint
