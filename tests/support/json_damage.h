// Texts made from a good JSON text by one change each.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace quantal::testing {

/// Values that settings do not expect.
inline const std::vector<nlohmann::json>& odd_values() {
  static const std::vector<nlohmann::json> kOdd = [] {
    nlohmann::json deep = 1;
    for (int i = 0; i < 60; ++i) deep = nlohmann::json::array({deep});
    return std::vector<nlohmann::json>{nullptr,
                                       true,
                                       "",
                                       "qint3",
                                       "torch.float16",
                                       -1,
                                       0,
                                       7,
                                       1.5,
                                       1e308,
                                       std::int64_t{1} << 62,
                                       std::uint64_t{1} << 63,
                                       nlohmann::json::array(),
                                       nlohmann::json::object(),
                                       nlohmann::json::array({1, "a", nullptr}),
                                       {{"bits", {{"bits", 4}}}},
                                       std::string(100000, 'x'),
                                       deep};
  }();
  return kOdd;
}

/// `good` with every value, at any depth, replaced by every odd value, and left out.
inline std::vector<std::string> with_odd_values(const nlohmann::json& good) {
  std::vector<std::string> out;
  std::vector<nlohmann::json::json_pointer> places;
  const auto walk = [&places](const auto& self, const nlohmann::json& value,
                              const nlohmann::json::json_pointer& at) -> void {
    if (!at.empty()) places.push_back(at);
    if (value.is_object()) {
      for (const auto& [key, item] : value.items()) self(self, item, at / key);
    } else if (value.is_array()) {
      for (std::size_t i = 0; i < value.size(); ++i) self(self, value[i], at / i);
    }
  };
  walk(walk, good, nlohmann::json::json_pointer());
  for (const auto& place : places) {
    for (const nlohmann::json& odd : odd_values()) {
      nlohmann::json changed = good;
      changed[place] = odd;
      out.push_back(changed.dump());
    }
    nlohmann::json without = good;
    nlohmann::json& parent = without[place.parent_pointer()];
    if (!parent.is_object()) continue;
    parent.erase(place.back());
    out.push_back(without.dump());
  }
  return out;
}

/// Texts that are no JSON object: every beginning of `good`, and some that are meant to hurt.
inline std::vector<std::string> broken_texts(const nlohmann::json& good) {
  const std::string text = good.dump();
  std::vector<std::string> out = {
      "[]",
      "null",
      "7",
      "\"text\"",
      text + "}",
      text + "x",
      "{\"a\":01}",
      "{\"a\":\"\xFF\"}",
      "{\"a\":1e999}",
      "{\"a\":tru}",
      std::string(100000, '['),
      "{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}",
      std::string("{\"a\"\0:1}", 8)};
  std::string nested;
  for (int i = 0; i < 50000; ++i) nested += "{\"bits\":";
  out.push_back(nested + "4" + std::string(50000, '}'));
  for (std::size_t size = 0; size < text.size(); ++size) out.push_back(text.substr(0, size));
  return out;
}

}  // namespace quantal::testing
