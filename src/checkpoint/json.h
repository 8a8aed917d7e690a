// JSON beside the weights; keys keep their order.
#pragma once

#include <string>

#include "core/json_text.h"

namespace quantal::checkpoint {

using Json = nlohmann::ordered_json;

/// Throws as quantal::parse_json_object.
inline Json parse_json_object(const std::string& text, const std::string& path) {
  return quantal::parse_json_object<Json>(text, path);
}

/// Text of a value; strings that are not UTF-8 lose their bad bytes.
template <class AnyJson>
std::string dump_json(const AnyJson& value, int indent = 2) {
  return value.dump(indent, ' ', false, AnyJson::error_handler_t::replace);
}

}  // namespace quantal::checkpoint
