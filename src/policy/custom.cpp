#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

#include "policy/methods.h"
#include "quantal/policy.h"

namespace quantal {
namespace {

/// Names in the order of their registration; one per process, as the adapters behind them are.
struct Registry {
  std::mutex guard;
  std::vector<std::string> names;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

bool is_identifier(const std::string& name) {
  const auto plain = [](char c) { return (c >= 'a' && c <= 'z') || c == '_'; };
  const auto legal = [&](char c) { return plain(c) || (c >= '0' && c <= '9'); };
  return !name.empty() && name.size() <= 64 && plain(name[0]) &&
         std::all_of(name.begin(), name.end(), legal);
}

}  // namespace

void register_custom_method(const std::string& name) {
  if (!is_identifier(name)) {
    fail(Errc::kConfig, "register_adapter: name is '" + name.substr(0, 80) +
                            "', expected lower-case letters, digits and underscores, such as "
                            "'my_method'");
  }
  for (const MethodInfo& method : methods()) {
    if (method.name != name) continue;
    fail(Errc::kConfig, "register_adapter: name is '" + name +
                            "', which is a built-in method, expected another name");
  }
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.guard);
  if (std::find(all.names.begin(), all.names.end(), name) == all.names.end()) {
    all.names.push_back(name);
  }
}

std::vector<std::string> custom_methods() {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.guard);
  return all.names;
}

bool is_custom_method(const std::string& name) {
  const std::vector<std::string> names = custom_methods();
  return std::find(names.begin(), names.end(), name) != names.end();
}

}  // namespace quantal
