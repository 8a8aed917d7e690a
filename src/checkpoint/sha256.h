// SHA-256 (FIPS 180-4), for digests of checkpoints. Not meant for secrets.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace quantal::checkpoint {

/// Running hash; `update` in any number of pieces gives the hash of their concatenation.
class Sha256 {
 public:
  void update(std::span<const std::uint8_t> bytes);
  void update(std::string_view text);
  void update_u64(std::uint64_t value);  ///< eight bytes, little endian
  std::string hex();                     ///< 64 hexadecimal digits; ends the hash

 private:
  void block(const std::uint8_t* bytes);

  std::array<std::uint32_t, 8> state_ = {0x6a09e667u, 0xbb67ae85u, 0x3c6ef372u, 0xa54ff53au,
                                         0x510e527fu, 0x9b05688cu, 0x1f83d9abu, 0x5be0cd19u};
  std::array<std::uint8_t, 64> buffer_{};
  std::size_t buffered_ = 0;
  std::uint64_t total_ = 0;
};

}  // namespace quantal::checkpoint
