// Import of quantized layers from hostile tensors: whatever a safetensors file holds, only
// quantal::Error may come out, and an accepted layer can be dequantized and written again.
#include <algorithm>
#include <vector>

#include "input_file.h"
#include "quantal/checkpoint.h"

namespace {

constexpr std::int64_t kMostElements = 1 << 18;

void use_layer(const quantal::PackedMatrix& layer) {
  const quantal::PackedSpec& spec = layer.spec;
  if (spec.cols > kMostElements) return;
  const std::int64_t rows = std::min(spec.rows, kMostElements / spec.cols);
  std::vector<float> out(static_cast<std::size_t>(rows * spec.cols));
  quantal::dequantize(layer.view(), {0, rows, 0, spec.cols}, quantal::DType::kF32, out.data(),
                      spec.cols, quantal::serial_executor());
  if (spec.rows * spec.cols <= kMostElements) {
    static_cast<void>(quantal::dialect_by_id(spec.dialect).export_layer(layer.view(), "x."));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const quantal::fuzz::InputFile input(data, size);
  try {
    const quantal::Checkpoint checkpoint = quantal::load_checkpoint(input.path());
    for (const auto& [name, layer] : checkpoint.layers) use_layer(layer);
  } catch (const quantal::Error&) {
  }
  return 0;
}
