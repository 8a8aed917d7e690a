#include "io/safetensors_header.h"

#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "io/byte_reader.h"

namespace quantal::io {
namespace {

using nlohmann::json;

constexpr std::int64_t kHeaderStart = 8;  // after the u64 header length

/// Receives the events of one header. Levels: 0 outside, 1 names, 2 fields of an entry or of
/// __metadata__, 3 the array of a field. Values of unknown fields are skipped at any depth.
class HeaderHandler : public nlohmann::json_sax<json> {
 public:
  explicit HeaderHandler(const std::string& path) : path_(path) {}

  SafetensorsHeader take() { return std::move(header_); }

  bool null() override { return scalar("null"); }
  bool boolean(bool) override { return scalar("a boolean"); }
  bool number_float(number_float_t, const string_t& s) override { return scalar(s); }
  bool binary(binary_t&) override { return scalar("binary"); }

  bool number_integer(number_integer_t v) override { return scalar(std::to_string(v)); }

  bool number_unsigned(number_unsigned_t v) override {
    if (skip_depth_ > 0 || skips_here()) return true;
    if (level_ != 3) return scalar(std::to_string(v));
    if (v > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      bad("value is " + std::to_string(v) + ", expected at most 2^63 - 1");
    }
    if (numbers_.size() == kMostDimensions) {
      bad("array has more than " + std::to_string(kMostDimensions) + " numbers, expected " +
          (field_ == Field::kShape ? "at most as many dimensions" : "2"));
    }
    numbers_.push_back(static_cast<std::int64_t>(v));
    return true;
  }

  bool string(string_t& v) override {
    if (skip_depth_ > 0) return true;
    if (level_ == 2 && in_metadata_) {
      header_.metadata.emplace(key_, v);
      return true;
    }
    if (level_ == 2 && field_ == Field::kDtype) {
      entry_.dtype = v;
      return true;
    }
    return scalar("a string");
  }

  bool start_object(std::size_t) override {
    if (skip_depth_ > 0 || skips_here()) {
      ++skip_depth_;
      return true;
    }
    if (level_ >= 2) bad("value is an object, expected " + expected());
    ++level_;
    if (level_ == 2) {
      fields_.clear();
      field_ = Field::kOther;
    }
    return true;
  }

  bool end_object() override {
    if (skip_depth_ > 0) {
      --skip_depth_;
      return true;
    }
    if (level_ == 2 && !in_metadata_) finish_entry();
    --level_;
    return true;
  }

  bool start_array(std::size_t) override {
    if (skip_depth_ > 0 || skips_here()) {
      ++skip_depth_;
      return true;
    }
    if (level_ != 2 || in_metadata_ || field_ == Field::kDtype) {
      bad("value is an array, expected " + expected());
    }
    ++level_;
    numbers_.clear();
    return true;
  }

  bool end_array() override {
    if (skip_depth_ > 0) {
      --skip_depth_;
      return true;
    }
    --level_;
    if (field_ == Field::kShape) {
      entry_.shape = std::move(numbers_);
      numbers_ = {};
      return true;
    }
    if (numbers_.size() != 2) {
      bad("data_offsets has " + std::to_string(numbers_.size()) + " numbers, expected 2");
    }
    entry_.begin = numbers_[0];
    entry_.end = numbers_[1];
    return true;
  }

  bool key(string_t& v) override {
    if (skip_depth_ > 0) return true;
    if (level_ == 1) {
      start_entry(v);
      return true;
    }
    key_ = v;
    if (!fields_.insert(v).second) bad("field \"" + v + "\" stands twice, expected once");
    if (in_metadata_) return true;
    field_ = v == "dtype"          ? Field::kDtype
             : v == "shape"        ? Field::kShape
             : v == "data_offsets" ? Field::kOffsets
                                   : Field::kOther;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& e) override {
    // The parser counts from 1 and may stand one past the end.
    const auto at = static_cast<std::int64_t>(position == 0 ? 0 : position - 1);
    fail(Errc::kCorrupt,
         std::string("safetensors: header is not valid JSON, expected a JSON object: ") + e.what(),
         {.path = path_, .offset = kHeaderStart + at});
  }

 private:
  enum class Field { kDtype, kShape, kOffsets, kOther };

  [[noreturn]] void bad(const std::string& what) const {
    fail(Errc::kCorrupt, "safetensors: " + what,
         {.path = path_, .tensor = entry_.name, .offset = kHeaderStart});
  }

  bool skips_here() const { return level_ == 2 && !in_metadata_ && field_ == Field::kOther; }

  std::string expected() const {
    if (level_ == 0) return "an object of tensors";
    if (level_ == 1) return "an object with dtype, shape and data_offsets";
    if (level_ == 3) return "an integer >= 0";
    if (in_metadata_) return "a string (metadata key \"" + key_ + "\")";
    if (field_ == Field::kDtype) return "the name of a type";
    return "an array of integers >= 0";
  }

  bool scalar(const std::string& what) const {
    if (skip_depth_ > 0 || skips_here()) return true;
    bad("value is " + what + ", expected " + expected());
  }

  void start_entry(const std::string& name) {
    entry_ = {};
    entry_.name = name;
    in_metadata_ = name == "__metadata__";
    if (!names_.insert(name).second) {
      bad("tensor name \"" + name + "\" stands twice, expected once");
    }
  }

  void finish_entry() {
    for (const char* field : {"dtype", "shape", "data_offsets"}) {
      if (fields_.count(field) == 0) bad(std::string("field \"") + field + "\" is missing");
    }
    header_.entries.push_back(std::move(entry_));
    entry_ = {};
  }

  const std::string& path_;
  SafetensorsHeader header_;
  SafetensorsEntry entry_;
  std::vector<std::int64_t> numbers_;
  std::set<std::string> names_;
  std::set<std::string> fields_;
  std::string key_;
  Field field_ = Field::kOther;
  int level_ = 0;
  std::size_t skip_depth_ = 0;
  bool in_metadata_ = false;
};

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view text, const std::string& path) {
  // The JSON library would skip a byte order mark; the format has none.
  if (text.substr(0, 3) == "\xEF\xBB\xBF") {
    fail(Errc::kCorrupt, "safetensors: header begins with a byte order mark, expected '{'",
         {.path = path, .offset = kHeaderStart});
  }
  HeaderHandler handler(path);
  json::sax_parse(text.begin(), text.end(), &handler);
  return handler.take();
}

}  // namespace quantal::io
