#include "io/npy_header.h"

#include <limits>
#include <set>

#include "io/byte_reader.h"

namespace quantal::io {
namespace {

/// Reads the small part of Python's literal syntax that headers use.
class Literal {
 public:
  Literal(std::string_view text, std::int64_t offset, const std::string& path)
      : text_(text), offset_(offset), path_(path) {}

  [[noreturn]] void bad(const std::string& expected) const {
    const std::string actual =
        at_ < text_.size() ? "'" + std::string(1, text_[at_]) + "'" : "the end of the header";
    fail(Errc::kCorrupt, "npy: header has " + actual + ", expected " + expected,
         {.path = path_, .offset = offset_ + static_cast<std::int64_t>(at_)});
  }

  void skip_spaces() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t')) {
      ++at_;
    }
  }

  /// True, and moved past it, if the next character is `c`.
  bool take(char c) {
    skip_spaces();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!take(c)) bad("'" + std::string(1, c) + "'");
  }

  bool peek(char c) {
    skip_spaces();
    return at_ < text_.size() && text_[at_] == c;
  }

  bool at_end() {
    skip_spaces();
    return at_ == text_.size();
  }

  std::string string() {
    skip_spaces();
    if (!peek('\'') && !peek('"')) bad("a quoted string");
    const std::size_t end = text_.find(text_[at_], at_ + 1);
    if (end == std::string_view::npos) bad("a closed string");
    std::string value(text_.substr(at_ + 1, end - at_ - 1));
    at_ = end + 1;
    return value;
  }

  bool boolean() {
    skip_spaces();
    for (const std::string_view word : {"True", "False"}) {
      if (text_.substr(at_, word.size()) != word) continue;
      at_ += word.size();
      return word == "True";
    }
    bad("True or False");
  }

  std::int64_t integer() {
    skip_spaces();
    constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
    std::int64_t value = 0;
    const std::size_t begin = at_;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      const int digit = text_[at_] - '0';
      if (value > (kMax - digit) / 10) bad("a dimension below 2^63");
      value = value * 10 + digit;
    }
    if (at_ == begin) bad("an integer >= 0");
    return value;
  }

  std::vector<std::int64_t> tuple() {
    expect('(');
    std::vector<std::int64_t> values;
    while (!take(')')) {
      if (values.size() == kMostDimensions) {
        bad("at most " + std::to_string(kMostDimensions) + " dimensions");
      }
      values.push_back(integer());
      if (!take(',') && !peek(')')) bad("',' or ')'");
    }
    return values;
  }

  std::int64_t position() const { return offset_ + static_cast<std::int64_t>(at_); }

 private:
  std::string_view text_;
  std::int64_t offset_;
  const std::string& path_;
  std::size_t at_ = 0;
};

}  // namespace

NpyHeader parse_npy_header(std::string_view text, std::int64_t offset, const std::string& path) {
  Literal literal(text, offset, path);
  NpyHeader header;
  std::set<std::string> seen;
  literal.expect('{');
  while (!literal.take('}')) {
    const std::int64_t at = literal.position();
    const std::string key = literal.string();
    literal.expect(':');
    if (!seen.insert(key).second) {
      fail(Errc::kCorrupt, "npy: header key '" + key + "' stands twice, expected once",
           {.path = path, .offset = at});
    }
    if (key == "descr") {
      if (literal.peek('[')) {
        fail(Errc::kUnsupported, "npy: descr is a structured type, expected one plain number type",
             {.path = path, .offset = literal.position()});
      }
      header.descr = literal.string();
    } else if (key == "fortran_order") {
      header.fortran_order = literal.boolean();
    } else if (key == "shape") {
      header.shape = literal.tuple();
    } else {
      fail(Errc::kCorrupt,
           "npy: header key is '" + key + "', expected descr, fortran_order and shape",
           {.path = path, .offset = at});
    }
    if (!literal.take(',') && !literal.peek('}')) literal.bad("',' or '}'");
  }
  if (!literal.at_end()) literal.bad("nothing after '}'");
  if (seen.size() != 3) {
    fail(Errc::kCorrupt,
         "npy: header has " + std::to_string(seen.size()) +
             " keys, expected descr, fortran_order and shape",
         {.path = path, .offset = offset});
  }
  return header;
}

}  // namespace quantal::io
