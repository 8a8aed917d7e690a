// The JSON header of a safetensors file, as it stands there: nothing is checked against the data.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "quantal/core.h"

namespace quantal::io {

struct SafetensorsEntry {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> entries;  ///< in the order of the text
  std::map<std::string, std::string> metadata;
};

/// Parses the header text. Throws Error{kCorrupt} (with path, tensor and offset in the file) for
/// invalid JSON or UTF-8, duplicate names or fields, missing fields, and values of a wrong kind.
SafetensorsHeader parse_safetensors_header(std::string_view text, const std::string& path);

}  // namespace quantal::io
