#include <cctype>
#include <memory>
#include <regex>
#include <string>
#include <utility>

#include "quantal/policy.h"

namespace quantal {
namespace {

// The standard regular expressions recurse once per character: both sides are bounded so that no
// name or pattern can exhaust the stack.
constexpr std::size_t kMaxPattern = 1024;
constexpr std::size_t kMaxRegexName = 2048;

/// True if `part` covers whole dotted components of `name` at `at`.
bool component_at(const std::string& name, std::size_t at, std::size_t length) {
  const bool begins = at == 0 || name[at - 1] == '.';
  const bool ends = at + length == name.size() || name[at + length] == '.';
  return begins && ends;
}

bool match_plain(const std::string& name, const std::string& pattern, NamePattern::Plain plain) {
  for (std::size_t at = name.find(pattern); at != std::string::npos;
       at = name.find(pattern, at + 1)) {
    if (plain == NamePattern::Plain::kPrefix && at != 0) return false;
    if (component_at(name, at, pattern.size())) return true;
  }
  return false;
}

/// End of the class that starts at `pattern[at] == '['` (index of ']'), npos if it is not closed.
std::size_t class_end(const std::string& pattern, std::size_t at) {
  std::size_t first = at + 1;
  if (first < pattern.size() && (pattern[first] == '!' || pattern[first] == '^')) ++first;
  return pattern.find(']', first + 1);  // a ']' in first place is a member
}

/// Does `c` belong to the class pattern[at .. end], brackets included?
bool in_class(const std::string& pattern, std::size_t at, std::size_t end, char c) {
  std::size_t i = at + 1;
  const bool negated = pattern[i] == '!' || pattern[i] == '^';
  if (negated) ++i;
  bool found = false;
  for (; i < end; ++i) {
    const bool range = i + 2 < end && pattern[i + 1] == '-';
    const char last = range ? pattern[i + 2] : pattern[i];
    found = found || (pattern[i] <= c && c <= last);
    if (range) i += 2;
  }
  return found != negated;
}

/// Length of the single-character element at `pattern[at]` if it accepts `c`, else 0.
std::size_t accept(const std::string& pattern, std::size_t at, char c) {
  if (pattern[at] == '?') return 1;
  if (pattern[at] == '[') {
    const std::size_t end = class_end(pattern, at);
    if (end != std::string::npos) return in_class(pattern, at, end, c) ? end - at + 1 : 0;
  }
  return pattern[at] == c ? 1 : 0;
}

/// Greedy with one point of return: linear in name times pattern, whatever the stars.
bool match_glob(const std::string& name, const std::string& pattern) {
  std::size_t n = 0, p = 0, star = std::string::npos, retry = 0;
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      retry = n;
      continue;
    }
    const std::size_t used = p < pattern.size() ? accept(pattern, p, name[n]) : 0;
    if (used != 0) {
      p += used;
      ++n;
    } else if (star != std::string::npos) {
      p = star + 1;
      n = ++retry;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == std::string::npos;
}

std::function<bool(const std::string&)> regex_matcher(const std::string& text) {
  std::shared_ptr<const std::regex> regex;
  try {
    regex = std::make_shared<const std::regex>(text.substr(3), std::regex::ECMAScript);
  } catch (const std::regex_error& error) {
    fail(Errc::kConfig,
         "pattern: '" + text + "' is not a regular expression (" + error.what() + ")");
  }
  return [regex, text](const std::string& name) {
    if (name.size() > kMaxRegexName) return false;
    try {
      return std::regex_match(name, *regex);
    } catch (const std::regex_error& error) {
      fail(Errc::kConfig,
           "pattern: '" + text + "' is too complex for '" + name + "' (" + error.what() + ")");
    }
  };
}

/// Characters that stand for themselves: of a glob those outside wildcards and classes, of a
/// regular expression letters, digits and underscores.
std::size_t count_literals(const std::string& text, bool regex) {
  std::size_t count = 0;
  for (std::size_t i = regex ? 3 : 0; i < text.size(); ++i) {
    const auto c = static_cast<unsigned char>(text[i]);
    if (regex) {
      count += (std::isalnum(c) != 0 || c == '_') ? 1u : 0u;
    } else if (c == '[' && class_end(text, i) != std::string::npos) {
      i = class_end(text, i);
    } else {
      count += (c == '*' || c == '?') ? 0u : 1u;
    }
  }
  return count;
}

}  // namespace

NamePattern::NamePattern(const std::string& text, Plain plain) : text_(text) {
  if (text.empty()) fail(Errc::kConfig, "pattern: text is '', expected a module name");
  if (text.size() > kMaxPattern) {
    fail(Errc::kConfig, "pattern: length is " + std::to_string(text.size()) + ", expected <= " +
                            std::to_string(kMaxPattern) + " ('" + text.substr(0, 40) + "...')");
  }
  const bool regex = text.starts_with("re:");
  specificity_ = count_literals(text, regex);
  if (regex) {
    match_ = regex_matcher(text);
  } else if (text.find_first_of("*?[") != std::string::npos) {
    match_ = [text](const std::string& name) { return match_glob(name, text); };
  } else {
    match_ = [text, plain](const std::string& name) { return match_plain(name, text, plain); };
  }
}

}  // namespace quantal
