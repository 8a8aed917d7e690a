// Safetensors reader: only quantal::Error may come out, and accepted views agree with their shapes.
#include <cstdlib>

#include "input_file.h"
#include "quantal/io.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const quantal::fuzz::InputFile input(data, size);
  try {
    const quantal::SafetensorsFile file(input.path());
    for (const auto& [name, view] : file.tensors()) {
      const std::size_t bytes =
          static_cast<std::size_t>(view.numel()) * quantal::dtype_size(view.dtype);
      if (bytes != view.bytes.size() || file.find(name) != &view) std::abort();
      if (quantal::fuzz::touch(view.bytes) == 0x5eed) return 0;  // keeps the sum alive
    }
  } catch (const quantal::Error&) {
  }
  return 0;
}
