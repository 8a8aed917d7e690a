// Builds GGUF bytes field by field, true or lying.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace quantal::testing {

class GgufBuilder {
 public:
  GgufBuilder& bytes(std::uint64_t value, int size) {
    for (int i = 0; i < size; ++i) out_ += static_cast<char>(value >> (8 * i) & 0xFF);
    return *this;
  }
  GgufBuilder& u32(std::uint64_t value) { return bytes(value, 4); }
  GgufBuilder& u64(std::uint64_t value) { return bytes(value, 8); }
  GgufBuilder& text(const std::string& value) {
    u64(value.size());
    out_ += value;
    return *this;
  }
  GgufBuilder& header(std::uint64_t tensors, std::uint64_t pairs, std::uint32_t version = 3) {
    out_ += "GGUF";
    return u32(version).u64(tensors).u64(pairs);
  }
  GgufBuilder& string_pair(const std::string& key, const std::string& value) {
    return text(key).u32(8).text(value);
  }
  GgufBuilder& u32_pair(const std::string& key, std::uint32_t value) {
    return text(key).u32(4).u32(value);
  }
  GgufBuilder& tensor(const std::string& name, const std::vector<std::uint64_t>& dims,
                      std::uint32_t type, std::uint64_t offset) {
    text(name).u32(dims.size());
    for (const std::uint64_t dim : dims) u64(dim);
    return u32(type).u64(offset);
  }
  GgufBuilder& pad(std::size_t alignment = 32) {
    while (out_.size() % alignment != 0) out_ += '\0';
    return *this;
  }
  GgufBuilder& data(std::size_t count, char value = 1) {
    out_.append(count, value);
    return *this;
  }
  const std::string& str() const { return out_; }

 private:
  std::string out_;
};

}  // namespace quantal::testing
