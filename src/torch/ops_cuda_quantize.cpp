// Ops about weights on a GPU that may run on the CPU: quantizing, by kernels where they make the
// dialect's bytes, and the two that compare a packed matrix with a dense one. What goes to the CPU
// is copied there, and the results come back; these ops wait for the device.
#include <array>
#include <cstring>

#include "formats/device_quantizer.h"
#include "torch/cuda_library.h"
#include "torch/ops_cpu.h"
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

Tensor on_cpu(const Tensor& t) { return stable::to(detached(t), cpu()); }

Buffers by_cpu(const Tensor& weight, const Ints& spec) {
  const auto [codes, stats, shared] = quantize_cpu(on_cpu(weight), spec);
  const stable::Device device = weight.device();
  return {stable::to(codes, device), stable::to(stats, device), stable::to(shared, device)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_cuda(Tensor weight, Ints spec_ints) {
  const PackedSpec spec = spec_from_ints(spec_ints);
  const Tensor values = detached(weight);
  if (auto made = by_kernels(values, spec, spec_ints)) return *made;
  return by_cpu(values, spec_ints);
}

double sampled_error_cuda(Tensor weight, Tensor codes, Tensor stats, Tensor shared, Ints spec) {
  return sampled_error_cpu(on_cpu(weight), on_cpu(codes), on_cpu(stats), on_cpu(shared), spec);
}

Tensor merge_survival_cuda(Tensor codes, Tensor stats, Tensor shared, Tensor new_codes,
                           Tensor new_stats, Tensor new_shared, Ints spec, Tensor target) {
  const Tensor out =
      merge_survival_cpu(on_cpu(codes), on_cpu(stats), on_cpu(shared), on_cpu(new_codes),
                         on_cpu(new_stats), on_cpu(new_shared), spec, on_cpu(target));
  return stable::to(out, codes.device());
}

STABLE_TORCH_LIBRARY_IMPL(quantal, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize_cuda));
  m.impl("sampled_error", TORCH_BOX(&sampled_error_cuda));
  m.impl("merge_survival", TORCH_BOX(&merge_survival_cuda));
}

}  // namespace quantal::stable_ops
