// JSON from files that may be hostile.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "quantal/core.h"

namespace quantal::checkpoint {

using Json = nlohmann::ordered_json;

/// Parses an object, keeping the order of keys. Throws Error{kCorrupt} with path and offset for
/// invalid JSON, for anything but an object, and for nesting deeper than 100.
inline Json parse_json_object(const std::string& text, const std::string& path) {
  constexpr int kMaxDepth = 100;
  const auto limit_depth = [&path](int depth, Json::parse_event_t, Json&) {
    if (depth > kMaxDepth) {
      fail(Errc::kCorrupt, "json: nesting is deeper than " + std::to_string(kMaxDepth),
           {.path = path});
    }
    return true;
  };
  Json parsed;
  try {
    parsed = Json::parse(text, limit_depth);
  } catch (const Json::parse_error& e) {
    fail(Errc::kCorrupt, std::string("json: text is not valid JSON: ") + e.what(),
         {.path = path, .offset = e.byte == 0 ? 0 : static_cast<std::int64_t>(e.byte) - 1});
  } catch (const Json::exception& e) {
    fail(Errc::kCorrupt, std::string("json: text is not valid JSON: ") + e.what(), {.path = path});
  }
  if (!parsed.is_object()) {
    fail(Errc::kCorrupt,
         std::string("json: text is a ") + parsed.type_name() + ", expected an object",
         {.path = path});
  }
  return parsed;
}

/// Text of a value; strings that are not UTF-8 lose their bad bytes.
inline std::string dump_json(const Json& value, int indent = 2) {
  return value.dump(indent, ' ', false, Json::error_handler_t::replace);
}

}  // namespace quantal::checkpoint
