// Small text helpers for messages of the policy room.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quantal::policy {

/// "a, b, c"
std::string join(std::span<const std::string_view> parts);
std::string join(std::span<const int> parts);

/// The candidate with the smallest edit distance to `name` (the first of equals); empty if there
/// are no candidates.
std::string_view nearest_name(std::string_view name, std::span<const std::string_view> candidates);

}  // namespace quantal::policy
