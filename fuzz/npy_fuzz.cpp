// npy reader: only quantal::Error may come out, and an accepted array agrees with its shape.
#include <cstdlib>

#include "input_file.h"
#include "quantal/io.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const quantal::fuzz::InputFile input(data, size);
  try {
    const quantal::Tensor tensor = quantal::read_npy(input.path());
    const auto numel = static_cast<std::size_t>(tensor.view().numel());
    if (numel * quantal::dtype_size(tensor.dtype) != tensor.bytes.size()) std::abort();
  } catch (const quantal::Error&) {
  }
  return 0;
}
