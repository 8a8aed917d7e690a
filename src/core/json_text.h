// JSON from files that may be hostile. Included only by rooms that link nlohmann_json.
#pragma once

#include <array>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <type_traits>

#include "quantal/core.h"

namespace quantal {

inline constexpr int kMaxJsonDepth = 100;
/// Keys of one object whose order is kept; finding a key there takes time in their number.
inline constexpr std::size_t kMaxOrderedKeys = std::size_t{1} << 15;

/// What a key that stands twice means.
enum class JsonKeys {
  kLastWins,  ///< as in Python
  kUnique,    ///< a fault
};

/// Watches the parser and refuses what would take far more time or memory than its text.
template <class Json>
class JsonLimits {
 public:
  JsonLimits(const std::string& path, JsonKeys keys) : path_(path), keys_(keys) {}

  void see(int depth, typename Json::parse_event_t event, const Json& value) {
    if (depth > kMaxJsonDepth) {
      refuse("is not a JSON object of at most " + std::to_string(kMaxJsonDepth) + " levels", "");
    }
    const auto level = static_cast<std::size_t>(depth);
    if (event == Json::parse_event_t::object_start) counts_[level + 1] = 0, names_[level + 1] = {};
    if (event != Json::parse_event_t::key) return;
    if (std::is_same_v<Json, nlohmann::ordered_json> && ++counts_[level] > kMaxOrderedKeys) {
      refuse("has more than " + std::to_string(kMaxOrderedKeys) + " keys in one object", "");
    }
    if (keys_ == JsonKeys::kLastWins) return;
    const auto& name = value.template get_ref<const std::string&>();
    if (!names_[level].insert(name).second) refuse("has the key " + name + " twice", name);
  }

 private:
  [[noreturn]] void refuse(const std::string& what, const std::string& name) const {
    fail(Errc::kCorrupt, "json: text " + what, {.path = path_, .tensor = name});
  }

  const std::string& path_;
  JsonKeys keys_;
  std::array<std::size_t, kMaxJsonDepth + 2> counts_{};
  std::array<std::set<std::string>, kMaxJsonDepth + 2> names_{};
};

/// Parses a text that must be an object. Throws Error{kCorrupt} with path and offset for invalid
/// JSON, for anything but an object, and for what exceeds the limits above.
template <class Json = nlohmann::json>
Json parse_json_object(const std::string& text, const std::string& path,
                       JsonKeys keys = JsonKeys::kLastWins) {
  JsonLimits<Json> limits(path, keys);
  Json parsed;
  try {
    parsed = Json::parse(text, [&](int depth, typename Json::parse_event_t event, Json& value) {
      limits.see(depth, event, value);
      return true;
    });
  } catch (const nlohmann::json::parse_error& e) {
    fail(Errc::kCorrupt, std::string("json: text is not a JSON object: ") + e.what(),
         {.path = path, .tensor = {}, .offset = e.byte == 0 ? 0 : std::int64_t(e.byte) - 1});
  } catch (const nlohmann::json::exception& e) {
    fail(Errc::kCorrupt, std::string("json: text is not a JSON object: ") + e.what(),
         {.path = path, .tensor = {}});
  }
  if (!parsed.is_object()) {
    fail(Errc::kCorrupt,
         std::string("json: text is not a JSON object: it is a ") + parsed.type_name(),
         {.path = path, .tensor = {}});
  }
  return parsed;
}

}  // namespace quantal
