#include "formats/mlx/mlx_codec.h"

#include <atomic>
#include <cmath>
#include <string>
#include <vector>

#include "formats/mlx/mlx_params.h"
#include "formats/tensors.h"
#include "kernels/grouped.h"

namespace quantal::mlx {
namespace {

/// Quantizes whole rows; holds the scratch of one task.
class RowEncoder {
 public:
  RowEncoder(const PackedSpec& spec, DType dtype)
      : spec_(spec),
        layout_(layout_of(spec)),
        affine_(mode_of(spec).mode == Mode::kAffine),
        converts_(affine_ && dtype != spec.value_dtype && spec.value_dtype != DType::kF32),
        codes_(static_cast<std::size_t>(spec.cols)),
        scales_(static_cast<std::size_t>(layout_.slots)),
        biases_(static_cast<std::size_t>(layout_.slots)) {
    if (!converts_) return;
    wide_.resize(static_cast<std::size_t>(spec.cols));
    narrow_.resize(static_cast<std::size_t>(spec.cols));
  }

  /// Returns false if a weight (rounded to value_dtype) is not finite.
  bool encode(WeightRun weights, std::uint8_t* codes, std::uint8_t* stats) {
    if (!(affine_ ? encode_affine(rounded(weights), stats) : encode_floats(weights, stats))) {
      return false;
    }
    pack_row(spec_.bits, codes_.data(), spec_.cols, codes);
    return true;
  }

 private:
  WeightRun rounded(WeightRun weights) {
    if (!converts_) return weights;
    widen_to_f32(weights.dtype, weights.data, spec_.cols, wide_.data());
    kernels_.narrow(spec_.value_dtype, wide_.data(), spec_.cols, narrow_.data());
    return {spec_.value_dtype, narrow_.data()};
  }

  bool encode_affine(WeightRun weights, std::uint8_t* stats) {
    const AnchoredRun run{weights,        layout_.slots,  spec_.group_size, spec_.bits,
                          scales_.data(), biases_.data(), codes_.data()};
    if (!kernels_.encode_anchored(run)) return false;
    const auto item = static_cast<std::int64_t>(dtype_size(spec_.value_dtype));
    kernels_.narrow(spec_.value_dtype, scales_.data(), layout_.slots, stats);
    kernels_.narrow(spec_.value_dtype, biases_.data(), layout_.slots, stats + layout_.slots * item);
    return true;
  }

  bool encode_floats(WeightRun weights, std::uint8_t* stats) {
    return kernels_.encode_microscaled({weights, layout_.slots, spec_.group_size, spec_.code_map,
                                        spec_.scale, stats, codes_.data()});
  }

  const PackedSpec& spec_;
  const PackedLayout layout_;
  const GroupedKernels& kernels_ = grouped_kernels();
  const bool affine_;
  const bool converts_;  ///< weights are rounded to value_dtype first
  std::vector<std::uint8_t> codes_;
  std::vector<float> scales_, biases_, wide_;
  std::vector<std::uint16_t> narrow_;
};

/// Names the first weight that is not finite, or not once it is rounded to the value type.
[[noreturn]] void refuse_weights(const PackedSpec& spec, WeightRun weights) {
  refuse_not_finite("mlx", weights, spec.rows, spec.cols);
  std::vector<float> wide(static_cast<std::size_t>(spec.cols));
  std::vector<std::uint32_t> rounded(wide.size());
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    widen_to_f32(weights.dtype, weights.at(r * spec.cols).data, spec.cols, wide.data());
    narrow_from_f32(spec.value_dtype, wide.data(), spec.cols, rounded.data());
    std::vector<float> back(wide.size());
    widen_to_f32(spec.value_dtype, rounded.data(), spec.cols, back.data());
    for (std::size_t c = 0; c < back.size(); ++c) {
      if (std::isfinite(back[c])) continue;
      fail(Errc::kUnsupported, "mlx: weight at row " + std::to_string(r) + ", column " +
                                   std::to_string(c) + " is " + python_repr(wide[c]) +
                                   ", expected numbers within the range of " +
                                   std::string(dtype_name(spec.value_dtype)));
    }
  }
  fail(Errc::kInternal, "mlx: a weight was refused, but all are finite");
}

}  // namespace

PackedSpec make_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options) {
  const auto refuse = [](const std::string& text) { fail(Errc::kConfig, "mlx: " + text); };
  Settings settings;
  settings.mode = find_mode(options.mode);
  if (settings.mode == nullptr) {
    refuse("mode is '" + options.mode + "', expected one of " + mode_names());
  }
  settings.bits = options.bits == 0 ? settings.mode->bits : options.bits;
  settings.group_size = options.group_size == 0 ? settings.mode->group_size : options.group_size;
  if (const std::string text = complaint(settings); !text.empty()) refuse(text);
  const int implied = options.method == QuantizationMethod::MLX_INT4   ? 4
                      : options.method == QuantizationMethod::MLX_INT8 ? 8
                                                                       : settings.bits;
  if (settings.bits != implied) {
    refuse("bits is " + std::to_string(settings.bits) + ", expected " + std::to_string(implied) +
           " for method " + std::string(method_name(options.method)));
  }
  if (!is_weight_dtype(options.value_dtype)) {
    refuse("value_dtype is " + std::string(dtype_name(options.value_dtype)) +
           ", expected one of f32, f16, bf16");
  }
  if (cols % settings.group_size != 0) {
    fail(Errc::kShape, "mlx: the last dimension is " + std::to_string(cols) +
                           ", expected a multiple of group_size " +
                           std::to_string(settings.group_size));
  }
  return spec_of(rows, cols, settings, options.value_dtype);
}

void quantize(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
              std::uint8_t* stats, std::uint8_t* /*shared*/, const Executor& executor) {
  if (!is_weight_dtype(dtype)) {
    fail(Errc::kDtype, "mlx: weights have dtype " + std::string(dtype_name(dtype)) +
                           ", expected one of f32, f16, bf16");
  }
  const PackedLayout layout = layout_of(spec);
  const WeightRun run{dtype, weights};
  std::atomic<bool> finite{true};
  executor.parallel_for(0, spec.rows, rows_per_task(spec.cols),
                        [&](std::int64_t begin, std::int64_t end) {
                          RowEncoder encoder(spec, dtype);
                          for (std::int64_t r = begin; r < end; ++r) {
                            if (encoder.encode(run.at(r * spec.cols), codes + r * layout.code_bytes,
                                               stats + r * layout.stat_bytes)) {
                              continue;
                            }
                            finite.store(false, std::memory_order_relaxed);
                            return;
                          }
                        });
  if (!finite) refuse_weights(spec, run);
}

}  // namespace quantal::mlx
