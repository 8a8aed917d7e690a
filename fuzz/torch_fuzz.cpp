// Torch files: the input is taken as a whole file, and as the pickle of a file that is otherwise
// right, so that the machine is reached without a matching CRC-32. Only quantal::Error may come
// out, and an accepted tensor agrees with its shape.
#include <cstdlib>
#include <span>
#include <string>

#include "input_file.h"
#include "quantal/archive.h"

namespace {

void put(std::string& out, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out += static_cast<char>(value >> (8 * i) & 0xFF);
}

/// A zip of stored members without checksums.
std::string zip_of(std::span<const std::pair<std::string, std::string>> members) {
  std::string out, directory;
  for (const auto& [name, data] : members) {
    const std::size_t offset = out.size();
    for (std::string* to : {&out, &directory}) {
      const bool entry = to == &directory;
      *to += entry ? "PK\x01\x02" : "PK\x03\x04";
      put(*to, 20, entry ? 4 : 2);
      for (const int bytes : {2, 2, 4, 4}) put(*to, 0, bytes);
      put(*to, data.size(), 4);
      put(*to, data.size(), 4);
      put(*to, name.size(), 2);
      *to += std::string(entry ? 14 : 2, '\0');
      if (entry) put(*to, offset, 4);
      *to += name;
    }
    out += data;
  }
  const std::size_t offset = out.size();
  out += directory + "PK\x05\x06";
  put(out, 0, 4);
  put(out, members.size(), 2);
  put(out, members.size(), 2);
  put(out, directory.size(), 4);
  put(out, offset, 4);
  put(out, 0, 2);
  return out;
}

void read_tensors(const quantal::TorchFile& file, const quantal::TorchValue& value, int& budget) {
  using Kind = quantal::TorchValue::Kind;
  if (--budget < 0) return;
  if (value.is_tensor()) {
    const quantal::HeldTensor held = file.read(value.as_tensor());
    const auto numel = static_cast<std::size_t>(held.view.numel());
    if (numel * quantal::dtype_size(held.view.dtype) != held.view.bytes.size()) std::abort();
    if (quantal::fuzz::touch(held.view.bytes) == 0x5eed) budget = 0;  // keeps the sum alive
  } else if (value.is_dict()) {
    for (const auto& [key, item] : value.pairs()) read_tensors(file, item, budget);
  } else if (value.kind() == Kind::kList || value.kind() == Kind::kTuple) {
    for (const auto& item : value.items()) read_tensors(file, item, budget);
  }
}

void read_file(const std::string& bytes) {
  const quantal::fuzz::InputFile input(reinterpret_cast<const std::uint8_t*>(bytes.data()),
                                       bytes.size());
  try {
    const quantal::TorchFile file(input.path());
    int budget = 64;
    read_tensors(file, file.root(), budget);
  } catch (const quantal::Error&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  read_file(bytes);
  std::pair<std::string, std::string> members[18];
  members[0] = {"x/data.pkl", bytes};
  members[1] = {"x/byteorder", "little"};
  for (std::size_t i = 0; i < 16; ++i) {
    members[i + 2] = {"x/data/" + std::to_string(i), std::string(96, '\1')};
  }
  read_file(zip_of(members));
  return 0;
}
