// Quantizing weights on a GPU: by kernels where they are in use and make the dialect's bytes, else
// by the CPU. The op waits for the device.
#include <array>
#include <cstring>

#include "formats/device_quantizer.h"
#include "torch/cuda_library.h"
#include "torch/ops_aten.h"
#include "torch/ops_cuda.h"
#include "torch/ops_link.h"
#include "torch/stable_products.h"

namespace quantal {
void link_cuda_weight_ops() noexcept {}
}  // namespace quantal

namespace quantal::stable_ops {
namespace {

using Buffers = std::tuple<Tensor, Tensor, Tensor>;

stable::Device cpu() { return stable::Device(torch::headeronly::DeviceType::CPU); }

/// Nothing where the kernels do not make this form, or refuse a weight that is not finite: the
/// CPU's code names it.
std::optional<Buffers> by_kernels(const Tensor& weight, const PackedSpec& spec, const Ints& ints) {
  const CudaLibrary& library = cuda_library();
  const auto how = library.functions == nullptr ? std::nullopt : device_quantizer(spec);
  if (!how || spec.residue_bytes != 0) return std::nullopt;
  const DType dtype = checked_weight(weight, spec);
  const PackedLayout layout = layout_of(spec);
  const Tensor source = stable::contiguous(weight);
  const auto fresh = [&](std::int64_t bytes) {
    return empty_like_of(weight, {bytes}, ScalarType::Byte);
  };
  Tensor codes = empty_like_of(weight, {spec.rows, layout.code_bytes}, ScalarType::Byte);
  Tensor stats = empty_like_of(weight, {layout.stat_rows, layout.stat_bytes}, ScalarType::Byte);
  Tensor shared = fresh(layout.shared_bytes);
  Tensor refused = fresh(sizeof(std::int32_t));
  Tensor workspace = fresh(library.functions->quantize_workspace(ints.data()));
  const quantal_cuda_quantizer settings = cuda::interface_form(*how);
  const quantal_cuda_quantization p{
      {ints.data(), codes.mutable_data_ptr(), codes.numel(), stats.mutable_data_ptr(),
       stats.numel(), shared.mutable_data_ptr(), shared.numel()},
      static_cast<std::int32_t>(dtype),
      source.const_data_ptr(),
      &settings,
      static_cast<std::int32_t*>(refused.mutable_data_ptr()),
      workspace.mutable_data_ptr(),
      workspace.numel()};
  quantal_cuda_status status{};
  const int supported = library.functions->supports_quantize(&p, &status);
  if (supported == QUANTAL_CUDA_UNSUPPORTED) return std::nullopt;
  check_cuda(supported, status);
  const int device = weight.is_cpu() ? 0 : weight.get_device_index();
  check_cuda(library.functions->quantize(&p, current_cuda_stream(device), &status), status);
  const Tensor answer = stable::to(refused, cpu());  // waits
  std::int32_t bad = 0;
  std::memcpy(&bad, answer.const_data_ptr(), sizeof(bad));
  if (bad != 0) return std::nullopt;
  return Buffers{codes, stats, shared};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_cuda(Tensor weight, Ints spec_ints) {
  const PackedSpec spec = spec_from_ints(spec_ints);
  const Tensor values = detached(weight);
  if (auto made = by_kernels(values, spec, spec_ints)) return *made;
  return quantize_aten(values, spec_ints);
}

STABLE_TORCH_LIBRARY_IMPL(quantal, CUDA, m) { m.impl("quantize", TORCH_BOX(&quantize_cuda)); }

}  // namespace quantal::stable_ops
