// GGUF container, metadata to config and tokenizer, block decoding. Only quantal::Error may come
// out.
#include <algorithm>
#include <vector>

#include "input_file.h"
#include "quantal/checkpoint.h"
#include "quantal/ggml.h"

namespace {

constexpr std::int64_t kMostElements = 1 << 20;  // keeps a run of the fuzzer fast

void read_container(const std::string& path) {
  const quantal::GgufFile file(path, [](std::uint32_t type) -> quantal::GgufBlockSize {
    const quantal::GgmlBlock* block = quantal::find_ggml_block(type);
    return block == nullptr ? quantal::GgufBlockSize{}
                            : quantal::GgufBlockSize{block->elements, block->bytes};
  });
  for (const quantal::GgufTensor& tensor : file.tensors()) {
    if (quantal::fuzz::touch(tensor.bytes) == 0x5eed) return;  // keeps the sum alive
  }
}

void read_model(const std::string& path) {
  const auto source = quantal::ModelSource::open(path);
  for (const auto& info : source->tensors()) {
    const std::int64_t columns = info.shape.empty() ? 1 : info.shape.back();
    const std::int64_t numel = quantal::checked_numel(info.shape, "fuzz");
    if (columns == 0 || numel == 0 || columns > kMostElements) continue;
    const std::int64_t rows = std::min(numel / columns, kMostElements / columns);
    std::vector<float> out(static_cast<std::size_t>(rows * columns));
    source->read_rows(info.name, 0, rows, quantal::DType::kF32, out.data(),
                      quantal::serial_executor());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const quantal::fuzz::InputFile file(data, size);
  try {
    read_container(file.path());
  } catch (const quantal::Error&) {
    return 0;
  }
  try {
    read_model(file.path());
  } catch (const quantal::Error&) {
  }
  try {
    static_cast<void>(quantal::inspect_json(file.path()));
  } catch (const quantal::Error&) {
  }
  return 0;
}
